"""Mann-Whitney tests of many groups of cells against one, over a sparse matrix."""

from __future__ import annotations

import numpy as np
from scipy import sparse, stats

from .._progress import progress

__all__ = ["rank_sums"]


def rank_sums(
    values: sparse.csr_matrix, code: np.ndarray, n_groups: int, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Z and two-sided p (normal, corrected for ties and continuity) as :func:`scipy.stats.mannwhitneyu`.

    Parameters
    ----------
    values
        ``(cell, gene)``, not negative.
    code
        Group of each cell: 0 the controls, 1 ... ``n_groups`` the others ``(cell,)``.
    n_groups
        Number of groups beside the controls.
    columns
        Genes to test; by default all.

    Returns
    -------
    Two arrays ``(group, gene)``; z is positive where the group is higher than the controls.
    """
    values = sparse.csc_matrix(values)
    columns = np.arange(values.shape[1]) if columns is None else np.asarray(columns)
    n = np.bincount(code, minlength=n_groups + 1).astype(np.float64)
    n_control, n_own = n[0], n[1:]
    z = np.zeros((n_groups, len(columns)))
    total = n_own + n_control
    for out, gene in enumerate(progress(columns, total=len(columns), description="rank tests", unit="gene")):
        start, stop = values.indptr[gene], values.indptr[gene + 1]
        x, group = values.data[start:stop], code[values.indices[start:stop]]
        stored = x != 0
        x, group = x[stored], group[stored]
        level, rank = np.unique(np.concatenate([[0.0], x]), return_inverse=True)
        rank = rank.reshape(-1)[1:]
        zero = int(np.searchsorted(level, 0.0))
        control = np.bincount(rank[group == 0], minlength=len(level)).astype(np.float64)
        control[zero] = n_control - control.sum()
        below = np.cumsum(control) - control
        wins = below + 0.5 * control  # of one value against the controls
        mine = group > 0
        stored_own = np.bincount(group[mine] - 1, minlength=n_groups)
        u = np.bincount(group[mine] - 1, weights=wins[rank[mine]], minlength=n_groups).astype(np.float64)
        zeros = n_own - stored_own
        u += zeros * wins[zero]
        # ties: sum over levels of t^3 - t with t = controls + own at that level
        ties = np.full(n_groups, float((control**3 - control).sum()))
        pair, count = np.unique((group[mine] - 1) * len(level) + rank[mine], return_counts=True)
        which, at = pair // len(level), pair % len(level)
        joint = control[at] + count
        extra = (joint**3 - joint) - (control[at] ** 3 - control[at])
        ties += np.bincount(which, weights=extra, minlength=n_groups)
        joint0 = control[zero] + zeros
        ties += (joint0**3 - joint0) - (control[zero] ** 3 - control[zero])
        with np.errstate(divide="ignore", invalid="ignore"):
            sd = np.sqrt(n_own * n_control / 12.0 * ((total + 1) - ties / (total * (total - 1))))
            difference = u - n_own * n_control / 2.0
            corrected = np.sign(difference) * np.maximum(np.abs(difference) - 0.5, 0.0)
            z[:, out] = np.where(sd > 0, corrected / sd, 0.0)
    return z, 2.0 * stats.norm.sf(np.abs(z))
