"""Metrics of distributions of cells, and the agreement of clusters of perturbations."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import sparse

from ._pair import Pair
from ._profile import raise_partial
from ._registry import Undefined, metric

logger = logging.getLogger("scpert")

N_COMPONENTS = 50
_ROWS, _COLUMNS = 256, 512


# ---------------------------------------------------------------------------------------------- kernels


class _Distances:
    """Sums of Euclidean distances to the rows of ``y``.

    The squared distance is one matrix product, ``[x, |x|², 1] [-2y, 1, |y|²]'``, in blocks that stay in the processor's
    cache; the side of ``y`` is laid out once.
    """

    def __init__(self, y: np.ndarray):
        self.n = len(y)
        right = np.empty((y.shape[1] + 2, len(y)))
        np.multiply(y.T, -2, out=right[:-2])
        right[-2], right[-1] = 1.0, np.einsum("ij,ij->i", y, y)
        self.parts = [np.ascontiguousarray(right[:, j : j + _COLUMNS]) for j in range(0, len(y), _COLUMNS)]

    def total(self, x: np.ndarray) -> float:
        """Sum of the distances of all rows of ``x`` to all of ``y``."""
        total = 0.0
        buffer = np.empty(_ROWS * _COLUMNS)
        left = np.empty((min(_ROWS, len(x)), x.shape[1] + 2))
        for i in range(0, len(x), _ROWS):
            block = x[i : i + _ROWS]
            rows = left[: len(block)]
            rows[:, :-2], rows[:, -2], rows[:, -1] = block, np.einsum("ij,ij->i", block, block), 1.0
            for part in self.parts:
                d = buffer[: rows.shape[0] * part.shape[1]].reshape(rows.shape[0], part.shape[1])
                np.matmul(rows, part, out=d)
                np.maximum(d, 0, out=d)
                np.sqrt(d, out=d)
                total += float(d.sum())
        return total


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance of all rows of ``x`` to all of ``y``; both centred alike beforehand."""
    return _Distances(y).total(x) / (len(x) * len(y))


def within_distance(x: np.ndarray) -> float:
    """Mean Euclidean distance between the rows of ``x``, the zero distance of each to itself included."""
    total = 0.0
    for i in range(0, len(x), _ROWS):
        a = x[i : i + _ROWS]
        d = a @ a.T
        square = np.diag(d).copy()
        d *= -2
        d += square
        d += square[:, None]
        np.fill_diagonal(d, 0.0)
        np.maximum(d, 0, out=d)
        total += float(np.sqrt(d, out=d).sum())
        if i + _ROWS < len(x):
            total += 2 * _Distances(a).total(x[i + _ROWS :])
    return total / len(x) ** 2


def energy(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance ``2E|X-Y| - E|X-X'| - E|Y-Y'|`` of two samples (V statistic: 0 for equal samples)."""
    if x.shape == y.shape and np.array_equal(x, y):
        return 0.0
    center = y.mean(axis=0)
    x, y = x - center, y - center
    return max(0.0, 2 * mean_distance(x, y) - within_distance(x) - within_distance(y))


def wasserstein_1d(x: np.ndarray, y: np.ndarray, power: int = 1) -> np.ndarray:
    """Exact ``W_p^p`` of each column of two samples, of any sizes ``(column,)``."""
    n, m = len(x), len(y)
    x, y = np.sort(x, axis=0), np.sort(y, axis=0)
    if n == m:
        return (np.abs(x - y) ** power).mean(axis=0)
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # levels times n*m: exact integers
    i, j = -(-steps // m) - 1, -(-steps // n) - 1
    weight = np.diff(steps, prepend=0) / (n * m)
    return weight @ np.abs(x[i] - y[j]) ** power


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD, mean over RBF kernels with 0.5, 1 and 2 times the median distance; cut at 0."""
    from scipy.spatial.distance import cdist

    xx, yy, xy = cdist(x, x, "sqeuclidean"), cdist(y, y, "sqeuclidean"), cdist(x, y, "sqeuclidean")
    pooled = np.concatenate([xx[np.triu_indices(len(x), 1)], yy[np.triu_indices(len(y), 1)], xy.ravel()])
    median = np.median(pooled)
    if not median > 0:
        return 0.0
    n, m = len(x), len(y)
    total = 0.0
    for factor in (0.5, 1.0, 2.0):
        gamma = 1.0 / (2 * factor**2 * median)
        kx, ky = np.exp(-gamma * xx), np.exp(-gamma * yy)
        total += (kx.sum() - n) / (n * (n - 1)) + (ky.sum() - m) / (m * (m - 1)) - 2 * np.exp(-gamma * xy).mean()
    return max(0.0, float(total / 3))


# ---------------------------------------------------------------------------------------------- cells of a pair


def _draw(n: int, size: int, seed: int) -> np.ndarray:
    if n <= size:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size, replace=False))


def components(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Mean and axes ``(gene, component)`` of a PCA of training cells (of observed cells without ``train=``)."""
    if "components" in pair.__dict__:
        return pair.__dict__["components"]
    key = ("components", tuple(pair.gene_index), pair.random_state)
    cache = pair.reference._cache
    if key not in cache:
        from sklearn.utils.extmath import randomized_svd

        screen = pair.reference.train or pair.reference.screen
        names = screen.genes.astype(str).get_indexer(pd.Index(pair.genes))
        if (names < 0).any():
            screen, names = pair.reference.screen, pair.gene_index
        rows = _draw(screen.n_cells, 4000, pair.random_state)
        cells = screen.rows(rows)[:, names].toarray().astype(np.float64)
        mean = cells.mean(axis=0)
        k = min(N_COMPONENTS, *cells.shape)
        axes = np.zeros((len(mean), k))
        if k:  # random numbers belong to genes, not to places, and signs to axes: no figure depends on the order of the genes
            order = np.argsort(np.asarray(pair.genes, dtype=str), kind="stable")
            found = randomized_svd((cells - mean)[:, order], k, random_state=pair.random_state)[2].T
            axes[order] = found * np.where(found[np.abs(found).argmax(axis=0), np.arange(k)] < 0, -1.0, 1.0)
        cache[key] = (mean, axes)
    pair.__dict__["components"] = cache[key]
    return cache[key]


def _samples(pair: Pair, *, reduced: bool, size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """Predicted and observed cells of each perturbation, dense, at most ``max_cells``; ``None``: fewer than two."""
    size = pair.max_cells if size is None else min(size, pair.max_cells)
    for label in pair.perturbations:
        a, b = pair.predicted_cells(label), pair.observed_cells(label)
        if a.shape[0] < 2 or b.shape[0] < 2:
            yield None
            continue
        parts = []
        for block in (a, b):
            cells = block[_draw(block.shape[0], size, pair.random_state)].toarray().astype(np.float64)
            if reduced:
                mean, axes = components(pair)
                cells = (cells - mean) @ axes
            parts.append(cells)
        yield parts[0], parts[1]


FEW = "needs at least two predicted and two observed cells"


def _each(pair: Pair, function, **options) -> np.ndarray:
    out = np.array([np.nan if s is None else function(*s) for s in _samples(pair, **options)], dtype=float)
    if np.isnan(out).any():
        raise_partial(out, FEW)
    return out


_CELL: dict = {"best": 0, "level": "cell", "needs": ("cells",)}


@metric(
    "energy_distance",
    formula="2E||X-Y|| - E||X-X'|| - E||Y-Y'|| of predicted and observed cells, 50 components of training cells",
    source="E-distance (Peidli et al. 2024)",
    exploit="predicting observed-like noise around the average response",
    **_CELL,
)
def energy_distance(pair: Pair) -> np.ndarray:
    """Energy distance between predicted and observed cells."""
    return _each(pair, energy, reduced=True)


@metric(
    "energy_distance_normalised",
    formula="E(predicted, observed) / E(control, observed)",
    source="scperturb-type; 1 is no better than control cells",
    exploit="as energy_distance",
    **_CELL,
)
def energy_distance_normalised(pair: Pair) -> np.ndarray:
    """Energy distance to the observed cells, relative to that of control cells."""
    mean, axes = components(pair)
    control = pair.observed_cells(pair.control)
    control = (control[_draw(control.shape[0], pair.max_cells, pair.random_state)].toarray() - mean) @ axes
    out, reasons = [], []
    for sample in _samples(pair, reduced=True):
        below = np.nan if sample is None else energy(control, sample[1])
        out.append(np.nan if sample is None or below <= 1e-12 else energy(*sample) / below)
        reasons.append(FEW if sample is None else "the observed cells equal the control cells")
    values = np.array(out, dtype=float)
    if np.isnan(values).any():
        raise_partial(values, np.array(reasons, dtype=object))
    return values


@metric(
    "mmd",
    formula="unbiased MMD², RBF, bandwidth median × (0.5, 1, 2), 50 components of training cells, cut at 0",
    source="Gretton et al. 2012",
    exploit="blind to shifts much smaller than the bandwidth",
    **_CELL,
)
def mmd(pair: Pair) -> np.ndarray:
    """Squared maximum mean discrepancy between predicted and observed cells."""
    return _each(pair, mmd2, reduced=True)


@metric(
    "wasserstein",
    formula="mean_g W1(predicted x_g, observed x_g)",
    source="CausalBench (Chevalley et al. 2022)",
    exploit="genes are judged one by one: dependence between genes is not seen",
    **_CELL,
)
def wasserstein(pair: Pair) -> np.ndarray:
    """Mean over genes of the Wasserstein-1 distance between predicted and observed cells."""
    return _each(pair, lambda x, y: wasserstein_1d(x, y).mean(), reduced=False)


@metric(
    "sliced_wasserstein",
    formula="sqrt(mean over 100 random directions of W2²), 50 components of training cells",
    source="Bonneel et al. 2015",
    exploit="as energy_distance",
    **_CELL,
)
def sliced_wasserstein(pair: Pair) -> np.ndarray:
    """Sliced Wasserstein-2 distance between predicted and observed cells."""
    k = components(pair)[1].shape[1]
    directions = np.random.default_rng(pair.random_state).normal(size=(k, 100))
    directions /= np.linalg.norm(directions, axis=0)
    return _each(pair, lambda x, y: np.sqrt(wasserstein_1d(x @ directions, y @ directions, 2).mean()), reduced=True)


@metric(
    "wasserstein2",
    formula="exact optimal transport with squared Euclidean cost, 50 components of training cells, at most 300 cells",
    source="POT (Flamary et al. 2021)",
    exploit="grows with the number of components and falls with the number of cells: compare equal sizes only",
    default=False,
    **_CELL,
)
def wasserstein2(pair: Pair) -> np.ndarray:
    """Wasserstein-2 distance between predicted and observed cells."""
    import ot

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(max(0.0, ot.emd2([], [], ot.dist(x, y)))))

    return _each(pair, distance, reduced=True, size=300)


@metric(
    "pearson_edistance",
    best=1,
    chance=0.0,
    level="set",
    needs=("cells",),
    formula="corr_p(E(observed p, control), E(predicted p, its control)), Euclidean in all genes, all cells",
    source="cell-eval",
    exploit="only the order of the effect sizes counts",
)
def pearson_edistance(pair: Pair) -> float:
    """Whether strong perturbations are predicted to be strong."""
    if len(pair.perturbations) < 3:
        raise Undefined("needs at least three perturbations")
    key = ("edistance", tuple(pair.gene_index), tuple(pair.perturbations))
    cache = pair.reference._cache
    if key not in cache:
        cache[key] = _edistances(pair, observed=True)
    a, b = cache[key], _edistances(pair, observed=False)
    if np.std(b) <= 1e-9:
        raise Undefined("the predicted E-distances are all equal")
    if np.std(a) <= 1e-9:
        raise Undefined("the observed E-distances are all equal")
    return float(np.corrcoef(a, b)[0, 1])


def _dense(block: sparse.csr_matrix) -> np.ndarray:
    return block.toarray().astype(np.float64, copy=False)


def _edistances(pair: Pair, *, observed: bool) -> np.ndarray:
    """E-distances to control but for the spread of the control, which is the same for all and cannot move a correlation."""
    cells = pair.observed_cells if observed else pair.predicted_cells
    control = _dense(cells(pair.control))
    center = control.mean(axis=0)
    control -= center
    to_control = _Distances(control)
    out = []
    for label in pair.perturbations:
        group = _dense(cells(label))
        group -= center
        out.append(2 * to_control.total(group) / (len(group) * to_control.n) - within_distance(group))
    return np.array(out)


# ---------------------------------------------------------------------------------------------- clusters


@metric(
    "clustering_agreement",
    best=1,
    chance=0.0,
    level="set",
    formula="best adjusted mutual information of Leiden clusters of observed and of predicted centroids (resolutions 0.2-2)",
    source="cell-eval",
    exploit="the best of seven resolutions is kept; few perturbations make it noise",
    default=False,
)
def clustering_agreement(pair: Pair) -> float:
    """Whether predicted perturbations group as the observed ones do."""
    if len(pair.perturbations) < 4:
        raise Undefined("needs at least four perturbations to cluster")
    if importlib.util.find_spec("igraph") is None:
        raise Undefined("needs igraph for Leiden clusters: pip install igraph (it comes with scpert[eval])")
    truth = _clusters(pair.observed, (1.0,))[0]
    found = _clusters(pair.predicted, (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0))
    distinct = {tuple(labels) for labels in found}  # neighbouring resolutions often find the same clusters
    return float(max(0.0, *(adjusted_mutual_information(truth, np.array(labels)) for labels in distinct)))


def adjusted_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information above that of chance over the mean entropy above it (Vinh et al. 2010), as scikit-learn's."""
    from sklearn.metrics.cluster import expected_mutual_information

    n = len(a)
    (_, code_a), (_, code_b) = (np.unique(x, return_inverse=True) for x in (a, b))
    table = np.zeros((code_a.max() + 1, code_b.max() + 1), dtype=np.int64)
    np.add.at(table, (code_a, code_b), 1)
    if table.shape == (1, 1) or table.shape == (n, n):
        return 1.0
    rows, columns = table.sum(axis=1) / n, table.sum(axis=0) / n
    joint = table / n
    filled = joint > 0
    mutual = float((joint[filled] * np.log((joint / np.outer(rows, columns))[filled])).sum())
    expected = expected_mutual_information(sparse.csr_matrix(table), n)
    entropy = -0.5 * float((rows * np.log(rows)).sum() + (columns * np.log(columns)).sum())
    span, tiny = entropy - expected, np.finfo(float).eps
    return (mutual - expected) / (min(span, -tiny) if span < 0 else max(span, tiny))


def fuzzy_graph(points: np.ndarray, n_neighbors: int) -> sparse.csr_matrix:
    """Weighted neighbour graph of UMAP (McInnes et al. 2018), exact neighbours, as ``scanpy.pp.neighbors`` makes it.

    Each point's distances are scaled so that the memberships ``exp(-(d - ρ) / σ)`` of its neighbours sum to ``log2(k)``,
    ρ being the distance of the nearest; the graph is the fuzzy union with its transpose.
    """
    from scipy.spatial.distance import cdist

    n = len(points)
    full = cdist(points, points)
    np.fill_diagonal(full, -1.0)  # a point comes first among its own neighbours
    index = np.argsort(full, axis=1, kind="stable")[:, :n_neighbors]
    near = np.take_along_axis(full, index, axis=1)
    near[:, 0] = 0.0
    near = near.astype(np.float32).astype(np.float64)
    rho = np.where(near > 0, near, np.inf).min(axis=1)
    rho[~np.isfinite(rho)] = 0.0
    excess = np.maximum(near[:, 1:] - rho[:, None], 0.0)
    low, high, sigma = np.zeros(n), np.full(n, np.inf), np.ones(n)
    target, open_ = np.log2(n_neighbors), np.ones(n, dtype=bool)
    for _ in range(64):
        total = np.exp(-excess / sigma[:, None]).sum(axis=1)
        open_ &= np.abs(total - target) >= 1e-5
        if not open_.any():
            break
        down, up = open_ & (total > target), open_ & (total <= target)
        high[down], low[up] = sigma[down], sigma[up]
        with np.errstate(invalid="ignore"):
            middle = np.where(np.isinf(high), 2 * sigma, (low + high) / 2)
        sigma = np.where(open_, middle, sigma)
    least = 1e-3 * np.where(rho > 0, near.mean(axis=1), near.mean())
    sigma = np.maximum(sigma, least)
    weight = np.exp(-excess / np.where(sigma > 0, sigma, 1.0)[:, None])
    rows = np.repeat(np.arange(n), n_neighbors - 1)
    graph = sparse.csr_matrix((weight.ravel(), (rows, index[:, 1:].ravel())), shape=(n, n))
    both = graph.multiply(graph.T)
    return (graph + graph.T - both).tocsr()


class _Random:
    """Random numbers for igraph from a seed of its own, as scanpy draws them."""

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed)

    def getrandbits(self, k: int) -> int:
        return self._state.tomaxint() & ((1 << k) - 1)

    def randint(self, low: int, high: int) -> int:
        return self._state.randint(low, high + 1)

    def random(self) -> float:
        return self._state.random_sample()

    def gauss(self, mean: float, sd: float) -> float:
        return self._state.normal(mean, sd)


def _clusters(centroids: np.ndarray, resolutions: tuple[float, ...]) -> list[np.ndarray]:
    """Leiden clusters at each resolution, by the same calls and seed as ``scanpy.tl.leiden(flavor="igraph")``."""
    import random

    import igraph

    graph = fuzzy_graph(centroids, min(15, len(centroids) - 1)).tocoo()
    upper = graph.row < graph.col
    edges = np.column_stack([graph.row[upper], graph.col[upper]])
    network = igraph.Graph(n=len(centroids), edges=edges.tolist(), directed=False)
    weights = graph.data[upper].astype(np.float32).tolist()
    out = []
    for resolution in resolutions:
        igraph.set_random_number_generator(_Random(0))
        try:
            found = network.community_leiden(
                objective_function="modularity", weights=weights, resolution=resolution, n_iterations=2
            )
        finally:
            igraph.set_random_number_generator(random)
        out.append(np.array(found.membership))
    return out
