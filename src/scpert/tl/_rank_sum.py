"""Mann-Whitney tests of many groups of cells against one, over a sparse matrix."""

from __future__ import annotations

import numpy as np
from scipy import sparse, special, stats

from .._progress import progress

__all__ = ["rank_sums", "scaled", "scaled_rank_sums"]


def rank_sums(
    values: sparse.csr_matrix, code: np.ndarray, n_groups: int, strata: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    r"""Z and two-sided p of Mann-Whitney tests of groups of cells against the controls.

    Z is that of :func:`scipy.stats.mannwhitneyu` (corrected for ties and continuity). Of a gene that few cells express the rank
    sum is skewed, and far out the normal distribution makes p too small by orders of magnitude. Its third cumulant under
    permutations of the cells is known: for midranks :math:`a_i` of :math:`N = n + m` cells, :math:`n` of them in the group,

    .. math:: \kappa_3 = \frac{n m (m - n)}{N (N-1) (N-2)} \sum_i (a_i - \bar a)^3,

    zero without ties. On the side to which it is skewed, p is the tail of the gamma (Pearson III) distribution with
    these cumulants, otherwise that of the normal. With strata, the sums of the strata are added with the weights
    :math:`1 / (N_s + 1)` of van Elteren (1960), and so are their cumulants; there is no correction for continuity then.

    Parameters
    ----------
    values
        ``(cell, gene)``, not negative.
    code
        Group of each cell: 0 the controls, 1 ... ``n_groups`` the others ``(cell,)``.
    n_groups
        Number of groups beside the controls.
    strata
        Stratum of each cell, codes ``(cell,)``; cells are compared with the controls of theirs.

    Returns
    -------
    Two arrays ``(group, gene)``; z is positive where the group is higher than the controls.
    """
    n_genes = values.shape[1]
    strata = np.zeros(len(code), dtype=np.int64) if strata is None else strata
    present = np.unique(strata)
    total = np.zeros((3, n_groups, n_genes))  # of the difference from its expectation: value, variance, third cumulant
    bar = progress(range(len(present) * n_genes), total=len(present) * n_genes, description="rank tests", unit="gene")
    for s in present:
        mine = strata == s
        columns = sparse.csc_matrix(values[mine] if len(present) > 1 else values)
        group = code[mine]
        size = np.bincount(group, minlength=n_groups + 1).astype(np.float64)
        weight = (1.0 / (size[1:] + size[0] + 1))[:, None] ** np.arange(1, 4) if len(present) > 1 else np.ones((1, 3))
        for gene, _ in zip(range(n_genes), bar, strict=False):
            start, stop = columns.indptr[gene], columns.indptr[gene + 1]
            found = _cumulants(columns.data[start:stop], group[columns.indices[start:stop]], size)
            total[:, :, gene] += (weight * found).T
    difference, variance, third = total
    if len(present) == 1:
        difference = np.sign(difference) * np.maximum(np.abs(difference) - 0.5, 0.0)
    sd = np.sqrt(np.maximum(variance, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(sd > 0, difference / sd, 0.0)
        skew = np.where(sd > 0, third / sd**3, 0.0)
    pvals = 2.0 * stats.norm.sf(np.abs(z))
    heavy = skew * z > 1e-6
    shape = 4.0 / skew[heavy] ** 2
    pvals[heavy] = 2.0 * special.gammaincc(shape, shape + np.abs(z[heavy]) * np.sqrt(shape))
    return z, np.minimum(pvals, 1.0)


def scaled(values: sparse.csr_matrix, code: np.ndarray, log_factor: np.ndarray) -> sparse.csr_matrix:
    """``log1p`` values with the CP10k of group ``g`` divided by ``exp(log_factor[g - 1])``; a new matrix."""
    factor = np.exp(-np.concatenate([[0.0], log_factor]))[code]
    data = np.log1p(np.expm1(values.data) * np.repeat(factor.astype(values.dtype), np.diff(values.indptr)))
    return sparse.csr_matrix((data, values.indices, values.indptr), shape=values.shape)


def scaled_rank_sums(
    values: sparse.csr_matrix,
    code: np.ndarray,
    log_factor: np.ndarray,
    error: np.ndarray,
    strata: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Z and two-sided p of :func:`rank_sums` where most genes of a group share a factor that is known with an error.

    The cells of a group are scaled by :math:`e^{-\lambda}`. However little, that breaks the ties of counts with the controls (cells of one
    depth) all to one side; z is therefore the mean of :math:`z(\lambda + b)` over factors :math:`b` up to that between counts of 1 and 2.
    The noise of :math:`\lambda` would be an effect of all genes at once: with its standard error :math:`\tau` and the slope
    :math:`z'` over these factors, z is divided by :math:`\sqrt{1 + (z' \tau)^2}`. Z is that of the p-value, as a normal would have it.
    """

    def zscores(factor: np.ndarray) -> np.ndarray:
        z, pvals = rank_sums(scaled(values, code, factor), code, len(factor), strata)
        return np.sign(z) * np.where(pvals > 1e-300, -special.ndtri(pvals / 2), np.abs(z))

    if np.any(error):
        around = np.log(2) / 2 * np.array([-0.75, -0.25, 0.25, 0.75])
        z, slope = np.zeros((2, len(log_factor), values.shape[1]))
        for b in around:
            at = zscores(log_factor + b)
            z += at / len(around)
            slope += at * b / (around**2).sum()
        z /= np.sqrt(1.0 + (slope * error[:, None]) ** 2)
    else:
        z = zscores(log_factor)
    return z, 2.0 * special.ndtr(-np.abs(z))


def _cumulants(x: np.ndarray, group: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Mann-Whitney's U of each group less its expectation, its variance and third cumulant ``(group, 3)``.

    ``x`` are the stored values of a gene, ``group`` their groups (0 the controls), ``size`` the cells of each group.
    """
    n_control, n_own = size[0], size[1:]
    stored = x != 0
    x, group = x[stored], group[stored]
    level, rank = np.unique(np.concatenate([[0.0], x]), return_inverse=True)
    rank = rank.reshape(-1)[1:]
    zero = int(np.searchsorted(level, 0.0))
    control = np.bincount(rank[group == 0], minlength=len(level)).astype(np.float64)
    control[zero] = n_control - control.sum()
    below = np.cumsum(control) - control
    mine = group > 0
    # how many cells of each group are at each level where it has any
    zeros = n_own - np.bincount(group[mine] - 1, minlength=len(n_own))
    some = np.flatnonzero(zeros > 0)
    pair, count = np.unique((group[mine] - 1) * len(level) + rank[mine], return_counts=True)
    pair, count = np.concatenate([pair, some * len(level) + zero]), np.concatenate([count, zeros[some]])
    order = np.argsort(pair)
    which, at, count = pair[order] // len(level), pair[order] % len(level), count[order]

    def per_group(amount: np.ndarray) -> np.ndarray:
        return np.bincount(which, weights=amount, minlength=len(n_own))

    u = per_group(count * (below + 0.5 * control)[at])
    n = n_own + n_control
    middle = (n + 1) / 2
    joint = control[at] + count
    tied, alone = joint**3 - joint, control**3 - control
    ties = alone.sum() + per_group(tied - alone[at])
    # sum of (t^3 - t) (midrank - middle) over levels of t cells: -4 times the sum of the cubes of midranks less their mean
    seen = np.cumsum(count) - count
    before = seen - (np.cumsum(n_own) - n_own)[which]  # cells of the same group at lower levels
    higher = alone.sum() - np.cumsum(alone)
    lean = (alone * (below + (control + 1) / 2)).sum() - alone.sum() * middle + per_group(count * higher[at])
    lean += per_group(
        tied * (below[at] + before + (joint + 1) / 2 - middle[which])
        - alone[at] * (below[at] + before + (control[at] + 1) / 2 - middle[which])
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = n_own * n_control / 12.0 * ((n + 1) - ties / (n * (n - 1)))
        third = n_own * n_control * (n_control - n_own) / (n * (n - 1) * (n - 2)) * (-lean / 4.0)
    return np.stack([u - n_own * n_control / 2.0, np.nan_to_num(variance), np.nan_to_num(third)], axis=1)
