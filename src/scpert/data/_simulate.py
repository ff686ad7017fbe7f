"""Counts from a known gene regulatory network, with known effects and interactions.

Three steps, each a function of its own: a network (:func:`random_network`), the steady state of every perturbation
(:func:`total_effects`) and counts of cells (:func:`sample_counts`). Pure numpy and scipy; genes are integers here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import ndtri

from ..errors import ScpertError

__all__ = ["CountModel", "Network", "random_network", "sample_counts", "total_effects"]

_CHUNK_VALUES = 4_000_000  # cells x genes drawn at a time
_MAX_NOISY_REGULATORS = 200
_LARGEST_MEAN = 1e6  # counts of a gene in a cell; float32 holds integers up to 1.6e7


# ---------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Network:
    """A signed network on genes ``0 .. n_genes - 1``.

    Attributes
    ----------
    matrix
        Direct effects, CSR ``(regulator, target)``: change of the target's log expression per unit change of the
        regulator's.
    regulators
        Genes with outgoing edges, ``(n_regulators,)``.
    level
        Position in the hierarchy, ``(n_genes,)``: 0 is the top, ``depth`` are genes that regulate nothing.
    module
        Module of each gene, ``(n_genes,)``; -1 for none.
    """

    matrix: sparse.csr_matrix
    regulators: np.ndarray
    level: np.ndarray
    module: np.ndarray


def random_network(
    regulators: np.ndarray,
    others: np.ndarray,
    *,
    mean_out_degree: float,
    exponent: float,
    strength: float,
    activators: float,
    depth: int,
    cycles: bool,
    max_radius: float,
    n_modules: int,
    module_share: float,
    rng: np.random.Generator,
) -> Network:
    """Draw a sparse signed network with power-law out-degrees; see :func:`scpert.datasets.simulated`."""
    n_genes = len(regulators) + len(others)
    level = np.full(n_genes, depth)
    level[regulators] = np.arange(len(regulators)) * depth // len(regulators)
    is_regulator = np.zeros(n_genes, dtype=bool)
    is_regulator[regulators] = True
    module = np.full(n_genes, -1)
    if n_modules:
        module[regulators] = np.arange(len(regulators)) % n_modules
        # genes that regulate nothing belong to a module too; the last of n_modules + 1 shares stays without
        shares = rng.permutation(len(others)) * (n_modules + 1) // max(len(others), 1)
        module[others] = np.where(shares < n_modules, shares, -1)
    tail = 1.0 - rng.random(len(regulators))
    degree = tail ** (-1.0 / (exponent - 1.0))
    degree = np.maximum(1, np.rint(degree * mean_out_degree / degree.mean())).astype(int)
    module_weight = strength * rng.gamma(4.0, 0.25, n_genes) * np.where(rng.random(n_genes) < activators, 1.0, -1.0)
    module_rank = rng.permutation(n_genes)
    rows, columns, weights = [], [], []
    for regulator, k in zip(regulators, degree, strict=True):
        if cycles:
            allowed = np.setdiff1d(np.arange(n_genes), [regulator])
        else:
            allowed = np.flatnonzero(level > level[regulator])
        k = min(k, max(1, int(0.6 * len(allowed))), len(allowed))
        if k == 0:
            continue
        chosen = np.empty(0, dtype=int)
        # a chain through all levels, so that the depth asked for is reached
        below = np.flatnonzero(is_regulator & (level == level[regulator] + 1))
        if len(below):
            chosen = rng.choice(below, 1)
        shared = np.intersect1d(np.flatnonzero((module == module[regulator]) & ~is_regulator), allowed)
        if module[regulator] >= 0 and len(shared):
            n_shared = min(rng.binomial(k - len(chosen), module_share) if k > len(chosen) else 0, len(shared))
            core = shared[np.argsort(module_rank[shared])]  # the same genes first for all regulators of the module
            chosen = np.concatenate([chosen, core[:n_shared]])
        rest = np.setdiff1d(allowed, chosen)
        n_rest = min(max(k - len(chosen), 0), len(rest))
        chosen = np.concatenate([chosen, rng.choice(rest, n_rest, replace=False)])
        weight = strength * rng.gamma(4.0, 0.25, len(chosen))
        weight *= np.where(rng.random(len(chosen)) < activators, 1.0, -1.0)
        same = (module[chosen] == module[regulator]) & (module[chosen] >= 0) & ~is_regulator[chosen]
        weight[same] = module_weight[chosen[same]] * rng.lognormal(0.0, 0.2, int(same.sum()))
        rows.append(np.full(len(chosen), regulator))
        columns.append(chosen)
        weights.append(weight)
    matrix = sparse.csr_matrix((n_genes, n_genes))
    if rows:
        matrix = sparse.csr_matrix(
            (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(n_genes, n_genes)
        )
        matrix.eliminate_zeros()
        matrix.sort_indices()
    if cycles and (radius := spectral_radius(abs(matrix))) > max_radius:
        matrix = matrix * (max_radius / radius)
    return Network(matrix, regulators, level, module)


def spectral_radius(matrix: sparse.csr_matrix, n_iterations: int = 500) -> float:
    """Largest eigenvalue of a matrix without negative entries, by power iteration on ``I + matrix``.

    The unit matrix makes the iteration converge for periodic matrices too.
    """
    vector = np.ones(matrix.shape[0])
    value = 0.0
    for _ in range(n_iterations):
        following = vector + matrix @ vector
        new = np.linalg.norm(following) / np.linalg.norm(vector)
        vector = following / np.linalg.norm(following)
        if abs(new - value) < 1e-10 * new:
            break
        value = new
    return max(float(new) - 1.0, 0.0)


# ---------------------------------------------------------------------------------------------- steady state


def total_effects(
    matrix: sparse.csr_matrix,
    codes: np.ndarray,
    own: np.ndarray,
    *,
    saturation: float | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
) -> np.ndarray:
    r"""Change of log expression at the steady state of each perturbation.

    With direct effects :math:`A` (row regulates column) and target genes :math:`T` held at :math:`d`,
    :math:`\delta_T = d` and :math:`\delta_g = \sum_h A_{hg}\,\delta_h` for :math:`g \notin T`; with a saturation
    :math:`s`, :math:`\delta_g = s \tanh(\frac1s \sum_h A_{hg}\,\delta_h)`. Found by iteration, which converges where
    the spectral radius of :math:`|A|` is below 1 (and ends after ``depth`` steps without cycles).

    Parameters
    ----------
    matrix
        Direct effects ``(gene, gene)``.
    codes
        Targets of each perturbation, ``(perturbation, width)``, padded with -1.
    own
        Log level at which each target is held, ``(perturbation, width)``.

    Returns
    -------
    float64 ``(perturbation, gene)``.
    """
    n_genes = matrix.shape[0]
    effects = np.zeros((len(codes), n_genes))
    rows, slots = np.nonzero(codes >= 0)
    genes, held = codes[rows, slots], own[rows, slots]
    effects[rows, genes] = held
    transposed = matrix.T.tocsr()
    for _ in range(max_iterations):
        following = np.asarray((transposed @ effects.T).T)
        if saturation is not None:
            following = saturation * np.tanh(following / saturation)
        following[rows, genes] = held
        change = np.abs(following - effects).max(initial=0.0)
        effects = following
        if change < tolerance:
            return effects
    raise ScpertError(
        "The network has no stable steady state: effects still change after "
        f"{max_iterations} steps. Lower strength=, or keep max_radius= below 1."
    )


# ---------------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class CountModel:
    """How cells are counted; all logarithms natural.

    Attributes
    ----------
    log_mean
        Log expected count of each gene in an unperturbed cell of average size, ``(gene,)``.
    dispersion
        Negative binomial over-dispersion of each gene, ``(gene,)``: variance = mean + dispersion x mean squared.
    response
        Total response of every gene to a unit disturbance of each noisy regulator, ``(n_noisy, gene)``.
    noisy
        The noisy regulators, ``(n_noisy,)``.
    noise
        Standard deviation of their disturbance in each cell.
    saturation
        Bound of the log disturbance of a gene; ``None`` for none.
    """

    log_mean: np.ndarray
    dispersion: np.ndarray
    response: np.ndarray
    noisy: np.ndarray
    noise: float
    saturation: float | None = None


def gene_log_means(n_genes: int, centre: float, spread: float, ceiling: float, rng: np.random.Generator) -> np.ndarray:
    """Quantiles of a normal distribution, cut at ``ceiling``, in random order: the same spectrum for every seed."""
    quantiles = ndtri((np.arange(n_genes) + 0.5) / n_genes)
    return rng.permutation(np.minimum(centre + spread * quantiles, ceiling))


def noise_response(network: Network, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Linear response ``(n_noisy, gene)`` to the (at most 200) regulators with most targets; none without noise."""
    n_genes = network.matrix.shape[0]
    degree = np.diff(network.matrix.indptr)
    noisy = np.argsort(-degree, kind="stable")[: min(_MAX_NOISY_REGULATORS, int((degree > 0).sum()))]
    if noise == 0 or len(noisy) == 0:
        return np.zeros((0, n_genes), dtype=np.float32), np.zeros(0, dtype=int)
    noisy = np.sort(noisy)
    term = np.zeros((len(noisy), n_genes))
    term[np.arange(len(noisy)), noisy] = 1.0
    response, transposed = term.copy(), network.matrix.T.tocsr()
    for _ in range(2000):
        term = np.asarray((transposed @ term.T).T)
        response += term
        if np.abs(term).max(initial=0.0) < 1e-8:
            break
    return response.astype(np.float32), noisy


def chunk_rows(n_genes: int) -> int:
    """Cells drawn at a time."""
    return max(1, _CHUNK_VALUES // n_genes)


def sample_counts(
    model: CountModel,
    effects: np.ndarray,
    codes: np.ndarray,
    state: np.ndarray,
    cell_factor: np.ndarray,
    batch_effects: list[tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> Iterator[sparse.csr_matrix]:
    """Yield CSR blocks of counts, in order.

    Parameters
    ----------
    model
        The count model.
    effects
        Log effects, ``(state, gene)``; row 0 is the unperturbed state.
    codes
        Targets of each state, ``(state, width)``, padded with -1.
    state
        State of each cell, ``(cell,)``.
    cell_factor
        Size of each cell relative to the average, ``(cell,)``.
    batch_effects
        Pairs of log effects ``(level, gene)`` and levels ``(cell,)``.
    """
    n_genes = len(model.log_mean)
    with np.errstate(over="ignore"):
        rates = np.exp(model.log_mean + effects).astype(np.float32)
    factors = [(np.exp(table).astype(np.float32), level) for table, level in batch_effects]
    shape = (1.0 / model.dispersion).astype(np.float32)
    scale = model.dispersion.astype(np.float32)
    chunk = chunk_rows(n_genes)
    for start in range(0, len(state), chunk):
        rows = slice(start, start + chunk)
        mean = rates[state[rows]]
        mean *= cell_factor[rows, None].astype(np.float32)
        for table, level in factors:
            mean *= table[level[rows]]
        if len(model.noisy):
            with np.errstate(over="ignore", invalid="ignore"):
                mean *= np.exp(_disturbances(model, codes[state[rows]], rng))
        if not mean.max(initial=0.0) < _LARGEST_MEAN:
            raise ScpertError(
                f"A gene would have {mean.max():.3g} counts in a cell: effects add up over many edges. Lower strength=, "
                "mean_out_degree=, noise= or n_regulators=, or set saturation=3."
            )
        drawn = rng.standard_gamma(shape, size=mean.shape, dtype=np.float32)
        drawn *= scale
        drawn *= mean
        counts = rng.poisson(drawn)
        for row in np.flatnonzero(counts.sum(axis=1) == 0):
            total = np.cumsum(mean[row].astype(np.float64))
            counts[row, min(np.searchsorted(total, rng.random() * total[-1], side="right"), n_genes - 1)] = 1
        flat = counts.reshape(-1)
        place = np.flatnonzero(flat)
        indptr = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(counts, axis=1), out=indptr[1:])
        yield sparse.csr_matrix(
            (flat[place].astype(np.float32), (place % n_genes).astype(np.int32), indptr), shape=counts.shape
        )


def _disturbances(model: CountModel, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log disturbance of every gene in each cell, ``(cell, gene)``; targets held by a perturbation do not vary.

    Holding gene t replaces its equation by ``delta_t = 0``. In a linear system this equals adding to t's own
    disturbance the amount that brings it to zero, which is found for all of a cell's held genes together.
    """
    drawn = model.noise * rng.standard_normal((len(codes), len(model.noisy)), dtype=np.float32)
    position = np.full(model.response.shape[1], -1)
    position[model.noisy] = np.arange(len(model.noisy))
    held = np.where(codes >= 0, position[codes], -1)
    for cells, held_slots in _by_held(held):
        own = np.stack([held[cells, slot] for slot in held_slots], axis=1)  # (cell, held genes)
        genes = model.noisy[own]
        level = np.einsum("cr,crh->ch", drawn[cells], model.response[:, genes].transpose(1, 0, 2))
        matrix = model.response[own[:, :, None], genes[:, None, :]].transpose(0, 2, 1)
        drawn[cells[:, None], own] -= np.linalg.solve(matrix, level[..., None])[..., 0]
    out = drawn @ model.response
    if model.saturation is not None:
        out = np.float32(model.saturation) * np.tanh(out / np.float32(model.saturation))
    rows, slots = np.nonzero(codes >= 0)
    out[rows, codes[rows, slots]] = 0.0
    return out


def _by_held(held: np.ndarray) -> Iterator[tuple[np.ndarray, list[int]]]:
    pattern = (held >= 0) @ (1 << np.arange(held.shape[1]))
    for value in np.unique(pattern):
        if value:
            yield np.flatnonzero(pattern == value), [s for s in range(held.shape[1]) if value >> s & 1]


def stack(blocks: Iterable[sparse.csr_matrix], shape: tuple[int, int]) -> sparse.csr_matrix:
    """One CSR matrix from blocks of rows; needs little memory beyond the result.

    The two large arrays grow in place by the density seen so far, so that blocks are never held beside their copy.
    """
    data, indices = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32)
    indptr = np.zeros(shape[0] + 1, dtype=np.int64)
    row = 0
    for block in blocks:
        start, end = indptr[row], indptr[row] + block.nnz
        indptr[row : row + block.shape[0] + 1] = start + block.indptr
        row += block.shape[0]
        if end > len(data):
            room = int(min(1.02 * end / row * shape[0], shape[0] * shape[1])) + 1
            data.resize(max(room, end), refcheck=False)
            indices.resize(max(room, end), refcheck=False)
        data[start:end], indices[start:end] = block.data, block.indices
    data.resize(indptr[-1], refcheck=False)
    indices.resize(indptr[-1], refcheck=False)
    if indptr[-1] <= np.iinfo(np.int32).max:
        indptr = indptr.astype(np.int32)
    return sparse.csr_matrix((data, indices, indptr), shape=shape)
