"""Figures of gene regulatory networks and of their evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_choice, check_net, check_seed, check_whole, listing
from ..errors import MissingKeyError, ScpertError
from ._figure import COLOURS, finish, need_columns, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["grn", "grn_evaluation"]


def grn(
    adata: AnnData | pd.DataFrame,
    key: str = K.GRN,
    *,
    kind: str = "network",
    n_edges: int = 40,
    gene: str | None = None,
    n_genes: int = 40,
    random_state: int = 0,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw a gene regulatory network.

    Parameters
    ----------
    adata
        After :func:`scpert.tl.infer_grn`, or a net (``source, target, weight``).
    key
        Where the network is.
    kind
        ``"network"``: the strongest edges, activation red, repression blue, regulators filled. ``"heatmap"``:
        regulators by targets.
    n_edges
        So many edges at most (``"network"``).
    gene
        Only edges of this gene and among its neighbours.
    n_genes
        So many regulators and targets at most (``"heatmap"``).
    random_state
        Seed of the layout.
    ax, show, return_fig
        As everywhere in :mod:`scpert.pl`.

    Returns
    -------
    Axes, or the figure.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=600, n_genes=40, n_targets=5)
    >>> scpert.tl.infer_grn(adata)
    >>> ax = scpert.pl.grn(adata, n_edges=10)
    """
    random_state = check_seed(random_state)
    check_choice("kind", kind, ("network", "heatmap"))
    check_whole("n_edges", n_edges)
    check_whole("n_genes", n_genes)
    if isinstance(adata, pd.DataFrame):
        net = adata
    else:
        from ..get import grn_df

        net = grn_df(adata, key, unmeasured=True)
    missing = [c for c in (K.SOURCE, K.TARGET, K.WEIGHT) if c not in net.columns]
    if missing:
        raise MissingKeyError(f"The net lacks the column(s) {listing(missing)}; it has {listing(net.columns)}.")
    net = check_net(net, "net")
    net = net[net[K.WEIGHT] != 0]
    if gene is not None:
        touches = (net[K.SOURCE] == gene) | (net[K.TARGET] == gene)
        if not touches.any():
            raise ScpertError(
                f"The network has no edge of {gene!r}. It has regulators such as {listing(net[K.SOURCE].unique(), 5)}."
            )
        near = set(net.loc[touches, K.SOURCE]) | set(net.loc[touches, K.TARGET])
        net = net[net[K.SOURCE].isin(near) & net[K.TARGET].isin(near)]
    net = net.iloc[np.argsort(-net[K.WEIGHT].abs().to_numpy(), kind="stable")]
    if kind == "heatmap":
        return finish(_heatmap(net, n_genes, ax), show, return_fig)
    net = net.head(int(n_edges))
    ax = new_axes(ax, (6.5, 5.5))
    ax.set_axis_off()
    if net.empty:
        ax.text(0.5, 0.5, "no edges", ha="center", va="center", transform=ax.transAxes)
        return finish(ax, show, return_fig)
    _draw_network(net, ax, random_state, gene)
    return finish(ax, show, return_fig)


def _draw_network(net: pd.DataFrame, ax: Axes, random_state: int, gene: str | None) -> None:
    import networkx as nx
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.patheffects import withStroke

    graph = nx.DiGraph()
    graph.add_weighted_edges_from(net.itertuples(index=False, name=None))
    place = ax.get_position()
    inches = ax.get_figure().get_size_inches()
    width, height = 72 * inches[0] * place.width, 72 * inches[1] * place.height
    position = _layout(graph, width, height, random_state)
    weight = net[K.WEIGHT].abs().to_numpy()
    line = 0.6 + 2.2 * weight / weight.max()
    for (source, target, w), lw in zip(net.itertuples(index=False, name=None), line, strict=True):
        colour = COLOURS["red"] if w > 0 else COLOURS["blue"]
        both = graph.has_edge(target, source)
        ax.add_patch(
            FancyArrowPatch(
                tuple(position[source]),
                tuple(position[target]),
                arrowstyle="-|>" if w > 0 else "|-|,widthA=0,widthB=3",
                mutation_scale=9 if w > 0 else 2,
                connectionstyle=f"arc3,rad={0.18 if both else 0.05}",
                shrinkA=8,
                shrinkB=9,
                lw=lw,
                color=colour,
                alpha=0.75,
                zorder=1,
            )
        )
    regulators = set(net[K.SOURCE])
    for node, (px, py) in position.items():
        chief = node in regulators
        ax.scatter(
            px,
            py,
            s=130 if chief else 55,
            color=COLOURS["orange"] if node == gene else COLOURS["black"] if chief else "white",
            edgecolors=COLOURS["black"],
            linewidths=0.8,
            zorder=2,
        )
        ax.annotate(
            node,
            (px, py),
            xytext=(0, 8 if chief else 6),
            textcoords="offset points",
            ha="center",
            fontsize=8 if chief else 7,
            fontweight="bold" if chief else "normal",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=3,
        )
    corners = np.array(list(position.values()))
    ax.set_xlim(min(0, corners[:, 0].min() - 20), max(width, corners[:, 0].max() + 20))
    ax.set_ylim(min(0, corners[:, 1].min() - 15), max(height, corners[:, 1].max() + 20))
    ax.legend(
        handles=[
            Line2D([], [], color=COLOURS["red"], label="goes up with the regulator"),
            Line2D([], [], color=COLOURS["blue"], label="goes down with the regulator"),
            Line2D([], [], color=COLOURS["black"], marker="o", ls="", ms=8, label="regulator"),
        ],
        frameon=False,
        fontsize="x-small",
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=3,
    )


def _layout(graph: Any, width: float, height: float, random_state: int) -> dict[str, np.ndarray]:
    """Positions in points of a box ``width`` x ``height``: components packed in rows, names moved apart."""
    import networkx as nx

    parts = sorted(nx.weakly_connected_components(graph), key=lambda p: (-len(p), min(p)))
    # a component takes an area in proportion to its nodes
    side = [np.sqrt(len(p)) for p in parts]
    across = max(side[0], np.sqrt(sum(s * s for s in side) * width / height))
    names: list[str] = []
    points: list[np.ndarray] = []
    x = y = row = 0.0
    for nodes, size in zip(parts, side, strict=True):
        part = graph.subgraph(sorted(nodes)).to_undirected()
        layout = nx.spring_layout(part, seed=random_state, k=2.2 / np.sqrt(len(nodes)), iterations=200, weight=None)
        if x > 0 and x + size > across * 1.05:
            x, y, row = 0.0, y + row, 0.0
        for node, at in layout.items():
            names.append(node)
            points.append(np.array([x, y]) + (np.asarray(at) * 0.42 + 0.5) * size)
        x, row = x + size, max(row, size)
    at = np.array(points)
    low, span = at.min(axis=0), np.ptp(at, axis=0)
    margin = np.array([30.0, 20.0])
    room = np.array([width, height]) - 2 * margin
    at = np.where(
        span > 1e-9, margin + (at - low) / np.where(span > 1e-9, span, 1) * room, np.array([width, height]) / 2
    )
    # names are boxes; overlapping ones push each other along the axis of the smaller overlap
    half = np.array([[2.6 * len(n) + 4, 11.0] for n in names])
    for _ in range(300):
        apart = at[:, None] - at[None]
        overlap = half[:, None] + half[None] - np.abs(apart)
        hit = (overlap > 0).all(axis=-1)
        np.fill_diagonal(hit, False)
        if not hit.any():
            break
        first = np.arange(len(at))[:, None] < np.arange(len(at))[None]
        sign = np.where(apart != 0, np.sign(apart), np.where(first, -1.0, 1.0)[..., None])
        vertical = overlap[..., 1] * width <= overlap[..., 0] * height
        step = np.where(np.stack([~vertical, vertical], axis=-1) & hit[..., None], sign * overlap / 2, 0.0)
        at = at + 0.6 * step.sum(axis=1)
        at = np.clip(at, margin, np.array([width, height]) - margin)
    return dict(zip(names, at, strict=True))


def _heatmap(net: pd.DataFrame, n_genes: int, ax: Axes | None) -> Axes:
    strength = net.assign(s=net[K.WEIGHT].abs())
    rows = strength.groupby(K.SOURCE)["s"].sum().nlargest(n_genes).index
    columns = strength[strength[K.SOURCE].isin(rows)].groupby(K.TARGET)["s"].sum().nlargest(n_genes).index
    table = net[net[K.SOURCE].isin(rows) & net[K.TARGET].isin(columns)]
    matrix = table.pivot_table(index=K.SOURCE, columns=K.TARGET, values=K.WEIGHT, fill_value=0.0)
    ax = new_axes(ax, (2.2 + 0.18 * matrix.shape[1], 1.4 + 0.18 * matrix.shape[0]))
    if matrix.empty:
        ax.text(0.5, 0.5, "no edges", ha="center", va="center", transform=ax.transAxes)
        return ax
    if min(matrix.shape) > 2:
        from scipy.cluster.hierarchy import leaves_list, linkage

        matrix = matrix.iloc[leaves_list(linkage(matrix.to_numpy(), "average"))]
        matrix = matrix.iloc[:, leaves_list(linkage(matrix.to_numpy().T, "average"))]
    limit = float(np.quantile(np.abs(matrix.to_numpy()[matrix.to_numpy() != 0]), 0.98))
    image: Any = ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.set_yticks(np.arange(len(matrix)), matrix.index, fontsize=7)
    ax.set_xticks(np.arange(matrix.shape[1]), matrix.columns, rotation=90, fontsize=7)
    ax.set_ylabel("regulator")
    ax.set_xlabel("target")
    ax.get_figure().colorbar(image, ax=ax, shrink=0.6, label="weight")
    return ax


def grn_evaluation(
    table: pd.DataFrame,
    *,
    metric: str = "precision",
    evidence: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Quality of a network against the number of its edges, with the baselines at the same numbers.

    Parameters
    ----------
    table
        From :func:`scpert.tl.evaluate_grn`: columns ``evidence``, ``network``, ``k`` and metrics.
    metric
        Column to draw.
    evidence
        ``"interventions"`` or ``"reference"``; by default the first that is in the table.
    ax, show, return_fig
        As everywhere in :mod:`scpert.pl`.

    Returns
    -------
    Axes, or the figure.

    Raises
    ------
    MissingKeyError
        If the table is of another function or lacks the metric.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=600, n_genes=40, n_targets=5)
    >>> train, test = adata[::2].copy(), adata[1::2].copy()
    >>> scpert.tl.infer_grn(train)
    >>> table = scpert.tl.evaluate_grn(train, observed=test, k=(5, 10))
    >>> ax = scpert.pl.grn_evaluation(table, metric="precision")
    """
    need_columns(table, ("evidence", "network", "k"), "scpert.tl.evaluate_grn")
    values = [c for c in table.columns if c not in ("evidence", "network", "k", "n_edges")]
    if metric not in values:
        raise MissingKeyError(f"The table has no metric {metric!r}; it has {listing(values, 30)}.")
    known = [str(e) for e in table["evidence"].unique()]
    if evidence is None:
        evidence = known[0]
    check_choice("evidence", evidence, known)
    table = table[table["evidence"] == evidence]
    size = "n_edges" if "n_edges" in table else "k"  # a network with fewer edges than k is judged by those it has
    ax = new_axes(ax, (4.8, 3.4))
    cycle = [COLOURS[c] for c in ("red", "blue", "sky", "green", "purple", "orange", "black")]
    for i, (label, part) in enumerate(table.groupby("network", sort=False)):
        part = part.dropna(subset=[metric]).sort_values("k").drop_duplicates(size)
        random = label == "random"
        ax.plot(
            part[size],
            part[metric],
            "o--" if random else "o-",
            ms=4,
            color=COLOURS["grey"] if random else cycle[i % len(cycle)],
            label=str(label).replace("_", " "),
        )
    ax.set_xscale("log")
    sizes = sorted(table["k"].unique())
    ax.set_xticks(sizes, [f"{int(n):,}" for n in sizes])
    ax.minorticks_off()
    ax.set_xlabel("strongest edges")
    ax.set_ylabel(metric.replace("_", " "))
    ax.set_title(f"judged by {evidence}", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(ax, show, return_fig)
