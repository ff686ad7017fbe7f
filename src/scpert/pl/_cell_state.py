"""Figures of :class:`scpert.model.CellState`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._checks import check_choice
from ..errors import ScpertError
from ._figure import finish, need_columns, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cooperative", "master_regulators", "patient_regulators", "reconstruction", "screen"]

_INK, _MUTED, _BLUE, _ORANGE, _GREY = "#222222", "#8a8f98", "#2f6db3", "#d1642b", "#c9ccd1"
_NAMES = {
    "model": "CellState",
    "pca": "PCA, same bottleneck",
    "gene_mean": "gene mean",
    "neighbours": "nearest neighbours",
}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    ax = new_axes(ax, size)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _spread(positions: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Positions moved apart so that labels do not overlap, order kept."""
    out = np.asarray(positions, dtype=float).copy()
    order = np.argsort(out)
    for a, b in zip(order[:-1], order[1:], strict=True):
        out[b] = max(out[b], out[a] + gap)
    over = out[order[-1]] - high if len(order) else 0
    if over > 0:
        out[order[-1]] = high
        for b, a in zip(order[::-1][:-1], order[::-1][1:], strict=True):
            out[a] = min(out[a], out[b] - gap)
    return out


def reconstruction(
    table: pd.DataFrame,
    *,
    metric: str = "r2_imputed",
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Any:
    """Held-out score of CellState beside the methods without a network, with limits where there are any.

    Parameters
    ----------
    table
        Result of :meth:`scpert.model.CellState.evaluate`.
    metric
        Column of it; ``"by_expression"`` draws the imputation R2 by bin of expression instead.
    ax, show, return_fig
        Axes to draw on; whether to show the figure; whether to return it instead of the axes.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> table = pd.DataFrame({"r2_imputed": [0.7, 0.6]}, index=["model", "pca"])
    >>> axes = scpert.pl.reconstruction(table)
    """
    if metric == "by_expression":
        bins = pd.DataFrame(table.attrs.get("by_expression", {}))
        need_columns(bins, ("method", "from", "to", "r2_imputed"), "CellState.evaluate")
        ax = _axes(ax, (5.2, 3.4))
        shown = [m for m in ("model", "pca", "neighbours", "gene_mean") if m in set(bins["method"])]
        for name, colour in zip(shown, (_BLUE, _ORANGE, _MUTED, _GREY), strict=False):
            part = bins[bins["method"] == name]
            ax.plot(
                range(len(part)), part["r2_imputed"], "o-", color=colour, label=_NAMES.get(name, name), lw=1.6, ms=4
            )
        part = bins[bins["method"] == shown[0]]
        labels = [
            f"{'' if np.isinf(a) else f'{a:.1f}'}–{'' if np.isinf(b) else f'{b:.1f}'}"
            for a, b in zip(part["from"], part["to"], strict=True)
        ]
        ax.set_xticks(range(len(part)), labels)
        ax.set(xlabel="log1p expression", ylabel="R² of masked genes")
        ax.legend(frameon=False, fontsize=8)
        return finish(ax, show, return_fig)
    need_columns(table, (metric,), "CellState.evaluate")
    ax = _axes(ax, (5.2, 0.38 * len(table) + 0.9))
    values = table[metric].to_numpy(dtype=float)
    y = np.arange(len(table))[::-1]
    colours = [_BLUE if name == "model" else _GREY for name in table.index]
    ax.barh(y, values, color=colours, height=0.62)
    lower, upper = f"{metric}_lower", f"{metric}_upper"
    ends = values.copy()
    if lower in table and upper in table:
        ax.hlines(y, table[lower], table[upper], color=_INK, lw=1)
        ends = np.fmax(values, table[upper].to_numpy(dtype=float))
    width = max(np.nanmax(ends) - min(np.nanmin(values), 0), 1e-9)
    for at, value, end in zip(y, values, ends, strict=True):
        ax.text(max(end, 0) + 0.015 * width, at, f"{value:.3f}", va="center", fontsize=8, color=_INK)
    names = [_NAMES.get(str(n), str(n).replace("pca_", "PCA, ")) for n in table.index]
    ax.set_yticks(y, names)
    ax.set_xlim(min(0, np.nanmin(values)), np.nanmax(ends) + 0.14 * width)
    ax.set_xlabel({"r2_imputed": "R² of masked genes, held-out samples"}.get(metric, metric))
    ax.tick_params(axis="y", length=0)
    return finish(ax, show, return_fig)


def master_regulators(
    table: pd.DataFrame, *, n_top: int = 20, ax: Axes | None = None, show: bool | None = None, return_fig: bool = False
) -> Any:
    """The best regulators with the ranks by each line of evidence and bootstrap limits of the combined rank.

    Parameters
    ----------
    table
        Result of :meth:`scpert.model.CellState.master_regulators` (not per sample).
    n_top
        Regulators shown.
    ax, show, return_fig
        As in :func:`reconstruction`.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> table = pd.DataFrame({"regulator": ["A", "B"], "rank": [1, 2], "rank_regulon": [1, 2], "rank_virtual": [2, 1]})
    >>> axes = scpert.pl.master_regulators(table)
    """
    need_columns(table, ("regulator", "rank", "rank_regulon", "rank_virtual"), "CellState.master_regulators")
    if "sample" in table:
        raise ScpertError("This table has a row for each sample: draw it with scpert.pl.patient_regulators.")
    top = table.sort_values("rank").head(int(n_top))
    ax = _axes(ax, (5.2, 0.24 * len(top) + 1.2))
    y = np.arange(len(top))[::-1]
    ax.hlines(y, 0.9, np.maximum(top["rank_regulon"], top["rank_virtual"]), color=_GREY, lw=0.6, zorder=0)
    if {"rank_lower", "rank_upper"} <= set(top):
        ax.hlines(
            y, top["rank_lower"], top["rank_upper"], color=_INK, lw=2.4, alpha=0.35, label="combined, 90 % limits"
        )
    ax.plot(top["rank_regulon"], y, "s", color=_ORANGE, ms=5, label="regulon activity")
    ax.plot(top["rank_virtual"], y, "o", color=_BLUE, ms=5, label="virtual manipulation")
    ax.plot(top["rank"], y, "D", color=_INK, ms=4, label="combined")
    ax.set_yticks(y, top["regulator"], fontsize=8)
    ax.set_xscale("log")
    ax.set(xlabel="rank among the regulators (log scale)")
    ax.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.75 / (0.24 * len(top) + 1.2)), ncols=2
    )
    return finish(ax, show, return_fig)


def screen(
    table: pd.DataFrame,
    *,
    kind: str = "volcano",
    n_labels: int = 12,
    fdr: float = 0.1,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Any:
    """A virtual screen as a volcano (shift against p) or by rank.

    Parameters
    ----------
    table
        Result of :meth:`scpert.model.CellState.screen`.
    kind
        ``"volcano"`` or ``"rank"``.
    n_labels
        Genes named.
    fdr
        Genes below it are coloured.
    ax, show, return_fig
        As in :func:`reconstruction`.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> table = pd.DataFrame(
    ...     {
    ...         "gene": ["A", "B"],
    ...         "shift": [1.0, -0.2],
    ...         "zscore": [3.0, -1.0],
    ...         "pvals": [0.01, 0.8],
    ...         "pvals_adj": [0.02, 0.8],
    ...     }
    ... )
    >>> axes = scpert.pl.screen(table, kind="rank")
    """
    check_choice("kind", kind, ("volcano", "rank"))
    need_columns(table, ("gene", "shift", "zscore", "pvals", "pvals_adj"), "CellState.screen")
    ax = _axes(ax, (5.6, 4.0))
    table = table.sort_values("zscore", ascending=False, ignore_index=True)
    hit = (table["pvals_adj"] < fdr).to_numpy()
    if kind == "volcano":
        x, y = table["shift"].to_numpy(), -np.log10(table["pvals"].to_numpy())
        ax.axvline(0, color=_GREY, lw=0.8, zorder=0)
        ax.set(xlabel=_towards(table), ylabel="-log10 p (matched random genes)")
    else:
        x, y = np.arange(1, len(table) + 1), table["zscore"].to_numpy()
        ax.axhline(0, color=_GREY, lw=0.8, zorder=0)
        ax.set(xlabel="rank", ylabel="z of the shift towards the goal")
    ax.scatter(x[~hit], y[~hit], s=8, color=_GREY, linewidths=0, rasterized=len(x) > 3000)
    ax.scatter(x[hit], y[hit], s=14, color=_ORANGE, linewidths=0, label=f"FDR < {fdr:g} ({int(hit.sum())})")
    n = min(int(n_labels), len(table))
    if n:
        ax.margins(x=0.05, y=0.06)
        if kind == "volcano":
            ax.set_xlim(min(x.min(), 0) - 0.05 * np.ptp(x), x.max() + 0.28 * max(np.ptp(x), 1e-12))
        low, high = ax.get_ylim()
        at = _spread(y[:n], 0.05 * (high - low), low, high)
        edge = ax.get_xlim()[1]
        for i in range(n):
            ax.annotate(
                table["gene"][i],
                (x[i], y[i]),
                xytext=(edge if kind == "volcano" else x[i] + 0.12 * len(table), at[i]),
                fontsize=8,
                color=_INK,
                va="center",
                ha="right" if kind == "volcano" else "left",
                arrowprops={"arrowstyle": "-", "color": _MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
            )
    if hit.any():
        ax.legend(frameon=False, fontsize=8, loc="upper left" if kind == "volcano" else "lower left")
    return finish(ax, show, return_fig)


def _towards(table: pd.DataFrame) -> str:
    goal = table.attrs.get("goal")
    return f"shift towards {goal}" if goal else "shift towards the goal"


def cooperative(
    table: pd.DataFrame, *, n_top: int = 15, ax: Axes | None = None, show: bool | None = None, return_fig: bool = False
) -> Any:
    """The sets with the largest synergy as a network: regulators on a circle, a line for each pair.

    Parameters
    ----------
    table
        Result of :meth:`scpert.model.CellState.cooperative_regulators`.
    n_top
        Sets drawn; width is the synergy's z, colour its sign, dashed lines are not significant (FDR 0.1).
    ax, show, return_fig
        As in :func:`reconstruction`.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> table = pd.DataFrame(
    ...     {"regulators": ["A+B", "A+C"], "synergy": [1.0, 0.2], "zscore": [4.0, 1.0], "pvals_adj": [0.01, 0.5]}
    ... )
    >>> axes = scpert.pl.cooperative(table)
    """
    need_columns(table, ("regulators", "synergy", "zscore", "pvals_adj"), "CellState.cooperative_regulators")
    top = table.sort_values("zscore", ascending=False).head(int(n_top))
    sets = [row.split("+") for row in top["regulators"]]
    names = list(dict.fromkeys(n for s in sets for n in s))
    ax = _axes(ax, (5.0, 4.8))
    angle = {n: 2 * np.pi * i / len(names) + np.pi / 2 for i, n in enumerate(names)}
    place = {n: np.array([np.cos(a), np.sin(a)]) for n, a in angle.items()}
    strength = top["zscore"].abs().to_numpy()
    strongest = max(float(strength.max()), 1e-9)
    for members, z, p, value in zip(sets, strength, top["pvals_adj"], top["zscore"], strict=True):
        for i, a in enumerate(members):
            for b in members[i + 1 :]:
                points = np.stack([place[a], place[b]])
                ax.plot(
                    *points.T,
                    color=_ORANGE if value > 0 else _BLUE,
                    lw=0.6 + 3.4 * z / strongest,
                    alpha=0.75,
                    ls="-" if p < 0.1 else (0, (4, 3)),
                    solid_capstyle="round",
                    zorder=1,
                )
    for n in names:
        ax.plot(*place[n], "o", ms=9, color="white", mec=_INK, mew=1.2, zorder=2)
        x, y = 1.12 * place[n]
        side = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
        ax.text(x, y, n, ha=side, va="center", fontsize=9, color=_INK)
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.3, 1.45), aspect="equal")
    ax.set_axis_off()
    ax.set_title("synergy: orange above, blue below additive; dashed: FDR ≥ 0.1", fontsize=8, color=_MUTED)
    return finish(ax, show, return_fig)


def patient_regulators(
    table: pd.DataFrame, *, n_top: int = 25, ax: Axes | None = None, show: bool | None = None, return_fig: bool = False
) -> Any:
    """Rank of each regulator in each patient as a heat map; patients and regulators are ordered by likeness.

    Parameters
    ----------
    table
        Result of :meth:`scpert.model.CellState.master_regulators` with ``per_sample=True``.
    n_top
        Regulators shown: those with the best median rank.
    ax, show, return_fig
        As in :func:`reconstruction`.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> table = pd.DataFrame({"sample": ["p", "p", "q", "q"], "regulator": ["A", "B"] * 2, "rank": [1, 2, 2, 1]})
    >>> axes = scpert.pl.patient_regulators(table)
    """
    need_columns(table, ("sample", "regulator", "rank"), "CellState.master_regulators(per_sample=True)")
    from scipy.cluster.hierarchy import leaves_list, linkage

    wide = table.pivot(index="regulator", columns="sample", values="rank").astype(float)
    wide = wide.loc[wide.median(axis=1).sort_values(kind="stable").index[: int(n_top)]]
    values: pd.DataFrame = wide.transform(np.log10)
    if values.shape[1] > 2:
        values = values.iloc[:, leaves_list(linkage(values.T, "average"))]
    if values.shape[0] > 2:
        values = values.iloc[leaves_list(linkage(values, "average"))]
    ax = _axes(ax, (min(11.0, 0.16 * values.shape[1] + 2.6), 0.22 * values.shape[0] + 1.3))
    last = float(np.log10(max(table["rank"].max(), 2)))
    image = ax.imshow(values, aspect="auto", cmap="YlGnBu_r", vmin=0, vmax=last, interpolation="nearest")
    ax.set_yticks(range(len(values)), values.index, fontsize=8)
    names = [str(c) for c in values.columns]
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), [n if len(n) <= 14 else n[:14] + "…" for n in names], rotation=90, fontsize=6)
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(names)} patients")
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ticks = [t for t in (1, 10, 100, 1000) if np.log10(t) <= last + 0.05]
    bar = ax.figure.colorbar(image, ax=ax, ticks=np.log10(ticks), shrink=0.7, pad=0.02)
    bar.ax.set_yticklabels([str(t) for t in ticks])
    bar.set_label("rank in the patient", fontsize=8)
    bar.outline.set_visible(False)
    return finish(ax, show, return_fig)
