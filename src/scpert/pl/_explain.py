"""Figure of what carries a prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_positive
from .._docs import shared_docs
from ..errors import ScpertError
from ._figure import COLOURS, finish, need_columns, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["explain"]


@shared_docs
def explain(
    net: pd.DataFrame,
    *,
    n_evidence: int = 8,
    n_genes: int = 12,
    n_links: int = 20,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw the part of the graphs that carries a prediction, from left to right.

    Left: measured perturbations (their share in the prediction, grey where negative) and neighbours of the targets in the graphs; middle:
    the perturbation; right: genes with the largest predicted shifts, red up, blue down, and arcs between them where one
    feels the other through co-expression or attention. Widths are weights.

    Parameters
    ----------
    net
        Result of ``explain(perturbation)`` of a GEARS or BioDSNN model: ``source``, ``target``, ``weight``, ``kind``.
    n_evidence, n_genes, n_links
        So many nodes on the left, genes on the right and arcs at most.
    {axes}

    Returns
    -------
    Axes, or the figure.

    Raises
    ------
    ScpertError
        If ``net`` is not such a result.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.GEARS.setup_anndata(adata)
    >>> model = scpert.model.GEARS(adata, n_hidden=8)
    >>> model.train(max_epochs=1, accelerator="cpu")
    >>> ax = scpert.pl.explain(model.explain(model.targets_[0]))
    """
    need_columns(net, (K.SOURCE, K.TARGET, K.WEIGHT, "kind"), "explain(perturbation) of GEARS or BioDSNN")
    effect = net[net["kind"] == "effect"]
    if effect.empty:
        raise ScpertError("The table has no row of the kind 'effect': pass what explain(perturbation) returned.")
    for name, value in {"n_evidence": n_evidence, "n_genes": n_genes}.items():
        check_positive(name, value)
    label = str(effect[K.SOURCE].iloc[0])
    effect = effect.reindex(effect[K.WEIGHT].abs().sort_values(ascending=False).index).head(int(n_genes))
    genes = list(effect[K.TARGET])
    targets = set(label.split("+"))
    left = net[
        ~net["kind"].isin(["effect", "coexpression", "pathway"])
        | ((net["kind"] == "coexpression") & net[K.TARGET].isin(targets))
    ]
    left = left[(left["kind"] == "evidence") | ~left[K.SOURCE].isin(targets)]
    strength = left[K.WEIGHT].abs() / left.groupby("kind")[K.WEIGHT].transform(lambda w: w.abs().max())
    left = left.assign(strength=strength).sort_values("strength", ascending=False)
    shown = left.drop_duplicates(K.SOURCE).head(int(n_evidence))

    ax = new_axes(ax, (7.0, 0.32 * max(len(genes), len(shown), 4) + 0.8))
    height = np.linspace(1, 0, max(len(genes), 2))[: len(genes)]
    at = dict(zip(genes, height, strict=True))
    for name, y in zip(shown[K.SOURCE], np.linspace(1, 0, max(len(shown), 2))[: len(shown)], strict=True):
        ax.text(-0.02, y, name, ha="right", va="center", fontsize=8)
        for row in left[left[K.SOURCE] == name].itertuples():
            evidence = row.kind == "evidence"
            ax.plot(
                [0, 0.93],
                [y, 0.5],
                lw=0.4 + 3.5 * row.strength,
                alpha=0.7,
                color=COLOURS["orange" if evidence else "green"] if row.weight >= 0 else COLOURS["grey"],
                ls="-" if evidence else "--",
                solid_capstyle="round",
            )
    ax.text(1.0, 0.5, label.replace("+", "\n+ "), ha="center", va="center", fontsize=9, fontweight="bold",
            bbox={"boxstyle": "round", "fc": "white", "ec": COLOURS["black"]})  # fmt: skip
    top = float(effect[K.WEIGHT].abs().max()) or 1.0
    for gene, weight in zip(genes, effect[K.WEIGHT], strict=True):
        colour = COLOURS["red"] if weight > 0 else COLOURS["blue"]
        ax.plot([1.07, 2.0], [0.5, at[gene]], color=colour, lw=0.4 + 3.5 * abs(weight) / top, alpha=0.7)
        ax.text(2.02, at[gene], f"{gene} ({weight:+.2f})", ha="left", va="center", fontsize=8)
    links = net[net["kind"].isin(["coexpression", "pathway"]) & net[K.SOURCE].isin(genes) & net[K.TARGET].isin(genes)]
    links = links.reindex(links[K.WEIGHT].abs().sort_values(ascending=False).index).head(int(n_links))
    largest = float(links[K.WEIGHT].abs().max()) if len(links) else 1.0
    for a, b, weight, kind in zip(
        links[K.SOURCE].map(at), links[K.TARGET].map(at), links[K.WEIGHT], links["kind"], strict=True
    ):
        t = np.linspace(0, np.pi, 30)
        ax.plot(
            2.55 + 0.35 * abs(a - b) * np.sin(t) + 0.02,
            (a + b) / 2 + (a - b) / 2 * np.cos(t),
            color=COLOURS["purple" if kind == "pathway" else "sky"],
            lw=0.3 + 2.0 * abs(weight) / largest,
            alpha=0.8,
        )
    kinds = {
        "measured perturbation": ("orange", "-", ((left["kind"] == "evidence") & (left[K.WEIGHT] >= 0)).any()),
        "measured, negative share": ("grey", "-", ((left["kind"] == "evidence") & (left[K.WEIGHT] < 0)).any()),
        "graph neighbour": ("green", "--", (left["kind"] != "evidence").any()),
        "up": ("red", "-", (effect[K.WEIGHT] > 0).any()),
        "down": ("blue", "-", (effect[K.WEIGHT] < 0).any()),
        "attention": ("purple", "-", (links["kind"] == "pathway").any()),
        "co-expression": ("sky", "-", (links["kind"] == "coexpression").any()),
    }
    for name, (colour, style, there) in kinds.items():
        if there:
            ax.plot([], [], color=COLOURS[colour], ls=style, label=name)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, frameon=False, fontsize=7)
    ax.set_xlim(-0.4, 3.0)
    ax.set_ylim(-0.08, 1.08)
    ax.axis("off")
    return finish(ax, show, return_fig)
