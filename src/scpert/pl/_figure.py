"""What the figure functions share: checking tables, making axes without touching global state, naming points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .._checks import listing
from ..errors import MissingKeyError, ScpertError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "finish", "name_points", "need_columns", "new_axes"]

#: Colours that people with colour-blindness tell apart (Okabe and Ito).
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#8C8C8C",
    "black": "#222222",
}


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def need_columns(table: pd.DataFrame, columns: Iterable[str], origin: str) -> None:
    """Refuse a table without these columns, or without rows; ``origin`` is what returns such a table."""
    missing = [c for c in columns if c not in getattr(table, "columns", ())]
    if missing:
        raise MissingKeyError(f"The table lacks the column(s) {listing(missing)}: pass what {origin} returned.")
    if len(table) == 0:
        raise ScpertError("The table is empty: there is nothing to draw.")


def name_points(ax: Axes, x: Any, y: Any, names: Any, order: Iterable[int], fontsize: float = 7) -> None:
    """Name points, the first in ``order`` first, where a name fits into the axes and on no other name; else leave it out.

    Call it last: it needs the limits of the axes.
    """
    figure: Any = ax.get_figure()
    figure.canvas.figure.draw_without_rendering()  # puts the axes in their place
    frame = ax.bbox
    points = ax.transData.transform([[float(a), float(b)] for a, b in zip(x, y, strict=True)])
    pixel = figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for i in order:
        name = str(names[i])
        width, height, gap = 0.68 * fontsize * len(name) * pixel, 1.2 * fontsize * pixel, 3 * pixel
        for right, up in ((True, True), (False, True), (True, False), (False, False)):
            left = points[i][0] + (gap if right else -gap - width)
            low = points[i][1] + (gap if up else -gap - height)
            inside = left > frame.x0 and left + width < frame.x1 and low > frame.y0 and low + height < frame.y1
            free = all(left > b or left + width < a or low > d or low + height < c for a, b, c, d in taken)
            if inside and free:
                taken.append((left, left + width, low, low + height))
                ax.annotate(
                    name,
                    (float(x[i]), float(y[i])),
                    fontsize=fontsize,
                    xytext=(3 if right else -3, 3 if up else -3),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    va="bottom" if up else "top",
                )
                break


def finish(ax: Axes | Any, show: bool | None, return_fig: bool) -> Axes | Figure | Any:
    """Show the figure if asked to, and return axes or figure."""
    first = ax if hasattr(ax, "get_figure") else ax.ravel()[0]
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return first.get_figure() if return_fig else ax
