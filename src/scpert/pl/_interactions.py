"""Figures of genetic interactions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_choice
from .._docs import shared_docs
from ..errors import MissingKeyError, ScpertError
from ._figure import COLOURS, finish, name_points, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["genetic_interactions"]

_CLASSES = {
    "synergy": COLOURS["red"],
    "suppression": COLOURS["blue"],
    "additive": COLOURS["grey"],
    "epistasis": COLOURS["purple"],
    "redundancy": COLOURS["green"],
    "neomorphism": COLOURS["orange"],
    "undetermined": COLOURS["black"],
}


@shared_docs
def genetic_interactions(
    adata: AnnData | pd.DataFrame,
    *,
    kind: str = "coefficients",
    origin: str | None = None,
    key: str = K.INTERACTIONS,
    n_labels: int = 12,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Show the interactions of combinations.

    Parameters
    ----------
    adata
        After :func:`scpert.tl.genetic_interactions`, or its table.
    kind
        ``"coefficients"``: c1 against c2, coloured by class, with limits, the additive point and the magnitudes of
        synergy and suppression as arcs; limits far from all of these leave the frame. ``"magnitude"``: predicted against
        measured magnitude.
    origin
        For coefficients: ``"measured"`` or ``"predicted"``; by default measured where there are any.
    key
        Where the table is.
    n_labels
        Of so many combinations farthest from additive (of magnitudes: from the measured one) those are named whose names
        do not overlap.
    {axes}

    Returns
    -------
    The axes, or the figure.

    Raises
    ------
    MissingKeyError
        If there is no table.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=900, n_genes=60, n_targets=6, n_combinations=4)
    >>> scpert.tl.genetic_interactions(adata, n_boot=0)
    >>> ax = scpert.pl.genetic_interactions(adata)
    >>> ax.get_xlabel()
    'c1 (first target)'
    """
    check_choice("kind", kind, ("coefficients", "magnitude"))
    if isinstance(adata, pd.DataFrame):
        table = adata
    elif key in adata.uns:
        table = adata.uns[key]
    else:
        raise MissingKeyError(f"adata.uns has no {key!r}. Call scpert.tl.genetic_interactions(adata) first.")
    draw: Any = None
    if kind == "coefficients":
        there = table["origin"].astype(str)
        origin = origin or ("measured" if (there == "measured").any() else "predicted")
        check_choice("origin", origin, ("measured", "predicted"))
        rows = table[(there == origin) & (table["n_targets"] == 2)]
        if rows.empty:
            raise ScpertError(f"There is no {origin} combination of two targets in the table.")
        draw = _coefficients
    else:
        parts = [table[table["origin"].astype(str) == o].set_index("perturbation") for o in ("measured", "predicted")]
        rows = parts[0].join(parts[1][["magnitude"]], rsuffix="_of_prediction", how="inner").reset_index()
        if rows.empty:
            raise ScpertError(
                "No combination is both measured and predicted: call genetic_interactions(..., predicted=...)."
            )
        draw = _magnitude
    ax = new_axes(ax, (5, 5))
    draw(rows, ax, n_labels)
    return finish(ax, show, return_fig)


def _scatter(rows: pd.DataFrame, x: str, y: str, ax: Axes) -> None:
    for name, colour in _CLASSES.items():
        part = rows[rows["class"].astype(str) == name]
        if len(part):
            ax.scatter(part[x], part[y], s=24, color=colour, label=f"{name} ({len(part)})", zorder=3)
    ax.legend(fontsize="small", frameon=False)


def _name(rows: pd.DataFrame, x: str, y: str, far: np.ndarray, n: int, ax: Axes) -> None:
    order = np.argsort(-far, kind="stable")[:n]
    name_points(ax, rows[x].to_numpy(), rows[y].to_numpy(), rows["perturbation"].astype(str).to_numpy(), order)


def _coefficients(rows: pd.DataFrame, ax: Axes, n_labels: int) -> None:
    from ..tl import INTERACTION_THRESHOLDS

    has_limits = {"c1_lower", "c1_upper", "c2_lower", "c2_upper"} <= set(rows.columns)
    if has_limits:
        limits = rows[["c1", "c2", "c1_lower", "c1_upper", "c2_lower", "c2_upper"]].to_numpy(dtype=float)
        for c1, c2, left, right, low, high in limits:
            ax.plot([left, right], [c2, c2], color="0.8", lw=0.8, zorder=1)
            ax.plot([c1, c1], [low, high], color="0.8", lw=0.8, zorder=1)
    angle = np.linspace(0, np.pi / 2, 100)
    for name in ("synergy_magnitude", "suppression_magnitude"):
        radius = np.sqrt(2) * INTERACTION_THRESHOLDS[name]
        ax.plot(radius * np.cos(angle), radius * np.sin(angle), color="0.6", lw=0.8, ls="--", zorder=2)
    ax.plot([1], [1], marker="+", color="black", ms=12, zorder=2)
    _scatter(rows, "c1", "c2", ax)
    found = rows[["c1", "c2"]].to_numpy(dtype=float)
    low, high = np.nanmin(found, initial=0.0), np.nanmax(found, initial=1.8)
    room = 0.2 * (high - low)
    ax.set(xlim=(low - room, high + room), ylim=(low - room, high + room), aspect="equal")
    ax.set(xlabel="c1 (first target)", ylabel="c2 (second target)")
    _name(rows, "c1", "c2", np.hypot(found[:, 0] - 1, found[:, 1] - 1), n_labels, ax)


def _magnitude(rows: pd.DataFrame, ax: Axes, n_labels: int) -> None:
    x, y = "magnitude", "magnitude_of_prediction"
    _scatter(rows, x, y, ax)
    low = float(min(rows[x].min(), rows[y].min()))
    high = float(max(rows[x].max(), rows[y].max()))
    ax.plot([low, high], [low, high], color="0.6", lw=0.8, ls="--", zorder=1)
    room = 0.15 * max(high - low, 0.1)
    ax.set(xlim=(low - room, high + room), ylim=(low - room, high + room), aspect="equal")
    title = f"n = {len(rows)}"
    if len(rows) > 2:
        title += f", Pearson {np.corrcoef(rows[x], rows[y])[0, 1]:.2f}"
    ax.set(xlabel="magnitude, measured", ylabel="magnitude, predicted")
    ax.set_title(title, fontsize="medium")
    _name(rows, x, y, np.abs(rows[x].to_numpy() - rows[y].to_numpy()), n_labels, ax)
