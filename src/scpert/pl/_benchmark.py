"""Figures of benchmarks: forest plots, critical differences, calibration of predicted intervals."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_choice
from ..errors import MissingKeyError, ScpertError
from ._figure import finish, need_columns, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

__all__ = ["calibration", "leaderboard"]

_REFERENCES = ("training_mean", "ceiling")


def leaderboard(
    board: pd.DataFrame,
    *,
    metric: str | None = None,
    kind: str = "forest",
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Any:
    """Draw a leaderboard.

    ``"forest"``: the calibrated score of every model in every task with its 95 % limits; dashed lines at 0 (training
    mean) and 1 (replicate). ``"critical_difference"``: mean rank over the tasks; models that a bar joins do not differ
    by Nemenyi's test at 5 % (Demšar 2006).

    Parameters
    ----------
    board
        Table of :func:`scpert.benchmark.leaderboard`.
    metric
        By default the first of ``pearson_delta_centroid``, ``pearson_delta``, ``mse`` that is there.
    kind
        See above.
    ax, show, return_fig
        Axes to draw on; show the figure; return the figure instead of the axes.

    Returns
    -------
    Axes, or the figure.

    Examples
    --------
    >>> import pandas as pd
    >>> import scpert
    >>> board = pd.DataFrame({"task": "t", "metric": "mse", "model": ["A", "B"], "rank": [1, 2]})
    >>> board = board.assign(score=[0.5, 0.1], lower=[0.4, -0.1], upper=[0.6, 0.3])
    >>> ax = scpert.pl.leaderboard(board, metric="mse", show=False)
    """
    check_choice("kind", kind, ("forest", "critical_difference"))
    columns = ("task", "metric", "model", "rank", "score", "lower", "upper")
    need_columns(board, columns, "scpert.benchmark.leaderboard")
    known = list(board["metric"].unique())
    if metric is None:
        metric = next((m for m in ("pearson_delta_centroid", "pearson_delta", "mse") if m in known), known[0])
    check_choice("metric", metric, known)
    part = board[board["metric"] == metric]
    return finish(_forest(part, metric, ax) if kind == "forest" else _critical(part, metric, ax), show, return_fig)


#: Scores that a forest plot has room for; an arrow stands for one beyond, a clipped line for a limit.
_SHOWN = (-2.0, 3.0)


def _forest(part: pd.DataFrame, metric: str, ax: Axes | None) -> Axes:
    part = part[~part["model"].isin(_REFERENCES)]
    tasks = list(part["task"].unique())
    ax = new_axes(ax, (7, 1 + 0.28 * max(1, len(part))))
    y, ticks, names = 0.0, [], []
    for task in tasks:
        rows = part[part["task"] == task].sort_values("rank", kind="stable")
        for row in rows.itertuples():
            if np.isfinite(row.score):
                if np.isfinite(row.lower) and np.isfinite(row.upper):
                    ax.plot(np.clip([row.lower, row.upper], *_SHOWN), [y, y], "-", color="C0", lw=1.5)
                beyond = "<" if row.score < _SHOWN[0] else ">" if row.score > _SHOWN[1] else "o"
                ax.plot(np.clip(row.score, *_SHOWN), y, beyond, color="C0", ms=5)
            else:
                why = "failed" if str(getattr(row, "verdict", "")).startswith("failed") else "no score"
                ax.text(0.02, y, why, va="center", fontsize=8, color="0.5")
            ticks.append(y)
            names.append(f"{row.model}  ({task})" if len(tasks) > 1 else str(row.model))
            y += 1
        y += 0.7
    for at in (0, 1):
        ax.axvline(at, color="0.6", lw=1, ls="--")
    ax.set_yticks(ticks, names)
    ax.set_ylim(y - 0.7 - 0.3, -0.7)
    ax.set_xlabel(f"calibrated score of {metric}: 0 training mean, 1 replicate")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


@lru_cache
def _nemenyi(k: int) -> float:
    """Critical value of Nemenyi's test of ``k`` models at 5 %."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(0.95, k, np.inf) / np.sqrt(2))


def _critical(part: pd.DataFrame, metric: str, ax: Axes | None) -> Axes:
    ranks = part[part["model"] != "ceiling"].pivot_table(index="task", columns="model", values="rank").dropna(axis=1)
    ranks = ranks.rank(axis=1)
    n, k = ranks.shape
    if n < 2 or k < 2:
        raise ScpertError(f"Critical differences need two models and two tasks with values; there are {k} and {n}.")
    mean = ranks.mean().sort_values()
    critical = _nemenyi(k) * float(np.sqrt(k * (k + 1) / (6 * n)))
    ax = new_axes(ax, (7, 1 + 0.28 * k))
    for i, (model, value) in enumerate(mean.items()):
        ax.plot(value, i, "o", color="0.4" if model in _REFERENCES else "C0")
    last = -1
    bars = 0
    for i in range(k):
        j = int(np.flatnonzero(mean.to_numpy() <= mean.iloc[i] + critical)[-1])
        if j > max(i, last):
            ax.plot([mean.iloc[i], mean.iloc[j]], [k + 0.4 * bars] * 2, "-", color="0.2", lw=3, solid_capstyle="butt")
            last, bars = j, bars + 1
    ax.set_yticks(range(k), [str(m) for m in mean.index])
    ax.set_ylim(k + 0.4 * max(1, bars), -0.6)
    ax.set_xlabel(f"mean rank over {n} tasks by {metric} (critical difference {critical:.2f})")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def calibration(
    predicted: AnnData,
    observed: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Any:
    """Share of observed mean values inside the predicted intervals, against their nominal level.

    Intervals are ``X ± z * std`` with ``layers["std"]``, the standard deviation of the predicted mean. The curve of a
    calibrated model is the diagonal. The 90 % limits of ``layers["lower"]`` and ``layers["upper"]``, where they are, are
    a point of their own. The observed mean has noise that an honest interval includes.

    Parameters
    ----------
    predicted
        A prediction of mean profiles with ``layers["std"]`` or both limits.
    observed
        Real cells with controls, or a table of effects.
    perturbation_key, control, layer, scale, library_size_key
        As in :func:`scpert.metrics.evaluate`.
    ax, show, return_fig
        Axes to draw on; show the figure; return the figure instead of the axes.

    Returns
    -------
    Axes, or the figure.

    Raises
    ------
    MissingKeyError
        If the prediction has no intervals.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, random_state=0)
    >>> predicted = scpert.metrics.pseudobulk(adata)
    >>> predicted.layers["std"] = predicted.X * 0 + 0.1
    >>> ax = scpert.pl.calibration(predicted, adata, show=False)
    """
    from scipy.stats import norm

    from ..metrics import Reference
    from ..metrics._pair import Pair

    if K.STD not in predicted.layers and not {K.LOWER, K.UPPER} <= set(predicted.layers):
        raise MissingKeyError(
            "The prediction has no intervals: neither layers['std'] nor layers['lower'] and layers['upper']. "
            "KnowledgeGP writes them."
        )
    reference = Reference(
        observed,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    pair = Pair(predicted, reference, level="pseudobulk")
    rows = np.array([pair.prediction.rows[p][0] for p in pair.perturbations])
    ax = new_axes(ax, (4, 4))
    ax.plot([0, 1], [0, 1], color="0.6", ls="--", lw=1)

    def values(name: str) -> np.ndarray:
        return np.asarray(predicted.layers[name])[np.ix_(rows, pair.pred_gene_index)]

    if K.STD in predicted.layers:
        std = values(K.STD)
        z = np.abs(pair.observed - pair.predicted) / np.where(std > 0, std, np.nan)
        z = z[np.isfinite(z)]
        nominal = np.linspace(0.05, 0.99, 40)
        inside = [(z <= norm.ppf(0.5 + level / 2)).mean() if len(z) else np.nan for level in nominal]
        ax.plot(nominal, inside, color="C0", label="X ± z std")
    if {K.LOWER, K.UPPER} <= set(predicted.layers):
        low, high = values(K.LOWER), values(K.UPPER)
        ok = np.isfinite(low) & np.isfinite(high)
        covered = ((pair.observed >= low) & (pair.observed <= high))[ok].mean() if ok.any() else np.nan
        ax.plot(0.9, covered, "o", color="C1", label=f"90 % limits cover {100 * covered:.1f} %")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level", ylabel="share of observed values inside", aspect="equal")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return finish(ax, show, return_fig)
