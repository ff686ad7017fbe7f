"""What every figure function shares: making axes without touching global state, and handing them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "finish", "new_axes"]

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


def finish(ax: Axes | Any, show: bool | None, return_fig: bool) -> Axes | Figure | Any:
    """Show the figure if asked to, and return axes or figure."""
    first = ax if hasattr(ax, "get_figure") else ax.ravel()[0]
    if show:
        import matplotlib.pyplot as plt

        plt.show()
    return first.get_figure() if return_fig else ax
