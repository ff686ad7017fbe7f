"""Descriptions of parameters that many functions share, filled into their docstrings so that ``help()`` is complete."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import indent

__all__ = ["shared_docs"]

PARAMETERS = {
    "labels": """\
perturbation_key
    Column of ``obs`` with the labels: ``control``, ``GENE``, ``GENE_A+GENE_B``.
control
    Label of the control cells.""",
    "values": """\
layer
    Layer that holds the values; by default ``"counts"`` if there is one, else ``X``.
scale
    What the values are: ``"counts"``, ``"log1p"`` (natural, of counts per 10,000), or ``"auto"``, which decides by
    evidence that it logs, and refuses where that is ambiguous.
library_size_key
    Column of ``obs`` with the full library size, for small panels; by default the row sums.""",
    "copy": """\
copy
    Work on a copy and return it.""",
    "axes": """\
ax
    Axes to draw in; by default those of a new figure.
show
    Whether to show the figure at once.
return_fig
    Return the figure instead of the axes.""",
}


def shared_docs[F: Callable](function: F) -> F:
    """Replace each line of the docstring that is ``{name}`` by the shared description of that name."""
    if function.__doc__:  # there is none under python -OO
        function.__doc__ = re.sub(
            r"^( *)\{(\w+)\}$", lambda m: indent(PARAMETERS[m[2]], m[1]), function.__doc__, flags=re.MULTILINE
        )
    return function
