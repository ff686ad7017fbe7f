"""Which cells carry their perturbation, judged by the counts of the target itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from ..data._effects import _STRATA_BYTES

if TYPE_CHECKING:
    from ..data import Screen

logger = logging.getLogger("scpert")

#: Cells that what is common to the regulators counts for, in the share of carriers and the fold change of each.
_PRIOR_CELLS = 20.0
_ITERATIONS = 60
#: Limits of the share of carriers, of the inverse dispersion, and of the fold change of the target in carriers.
_SHARE, _THETA, _FOLD = (0.02, 0.98), (0.05, 50.0), (1e-3, 1e3)


def carrier_weights(
    screen: Screen, regulators: list[str], position: np.ndarray, strata: np.ndarray
) -> np.ndarray | None:
    r"""Probability that each cell of a single perturbation carries it, by the counts of its own target.

    .. math:: x \sim \pi_i\, NB(\kappa_i\, l\, \mu_i, \theta_i) + (1 - \pi_i)\, NB(l\, \mu_i, \theta_i)

    for the target's counts :math:`x` in the cells of regulator :math:`i` with library size :math:`l`; :math:`\mu_i` (of the
    stratum) and :math:`\theta_i` come from the controls. :math:`\pi_i` and :math:`\kappa_i` are fitted by EM and drawn to
    their common values. Nothing else of a cell is looked at.

    Returns
    -------
    array ``(cell,)``, 1 for controls, combinations, and regulators that are not measured or that moved against most others.
    ``None`` if there are no counts, or cells that escaped do not explain the targets' counts better than one common fold change
    does, by the Bayesian information criterion.
    """
    measured = np.flatnonzero(position >= 0)
    if screen.scale != K.SCALE_COUNTS or len(measured) == 0:
        return None
    code = pd.Index(np.asarray(regulators, dtype=object)[measured]).get_indexer(pd.Index(screen.labels))
    count, size = np.zeros(screen.n_cells), np.asarray(screen.library_size, dtype=np.float64)
    n_strata, n = int(strata.max()) + 1, len(measured)
    total, exposure = np.zeros((n_strata, n)), np.zeros(n_strata)
    square, cross = np.zeros(n), np.zeros((n_strata, n))
    for where, block in screen.chunks(normalised=False):
        rows = np.arange(screen.n_cells)[where]
        own = sparse.csr_matrix(block)[:, position[measured]].astype(np.float64)
        mine = np.flatnonzero(code[rows] >= 0)
        count[rows[mine]] = np.asarray(own[mine, code[rows[mine]]]).ravel()
        control = np.flatnonzero(screen.is_control[rows])
        member = sparse.csr_matrix(
            (np.ones(len(control)), (strata[rows[control]], np.arange(len(control)))), shape=(n_strata, len(control))
        )
        total += (member @ own[control]).toarray()
        cross += (member @ sparse.diags_array(size[rows[control]]) @ own[control]).toarray()
        square += np.asarray(own[control].power(2).sum(axis=0)).ravel()
    np.add.at(exposure, strata[screen.is_control], size[screen.is_control])
    size2 = np.bincount(strata[screen.is_control], size[screen.is_control] ** 2, minlength=n_strata)
    pooled = np.maximum(total.sum(axis=0), 0.5) / exposure.sum()
    # a stratum with few controls is drawn to all of them with the weight of one count
    rate = (total + 1.0) / (exposure[:, None] + 1.0 / pooled) if n_strata > 1 else pooled[None, :]
    power = (rate**2 * size2[:, None]).sum(axis=0)
    excess = square - 2 * (rate * cross).sum(axis=0) + power - (rate * exposure[:, None]).sum(axis=0)
    theta = 1.0 / np.clip(excess / np.maximum(power, 1e-12), 1 / _THETA[1], 1 / _THETA[0])

    cells = np.flatnonzero(code >= 0)
    of, x = code[cells], count[cells]
    expected = np.maximum(rate[strata[cells], of] * size[cells], 1e-9)
    observed, usual = (np.bincount(of, values, minlength=n) for values in (x, expected))
    ratio = observed / np.maximum(usual, 1e-9)
    down = bool(np.median(ratio) < 1)
    follows = (ratio < 1) if down else (ratio > 1)
    if not follows.any():
        return None
    keep = follows[of]
    cells, of, x, expected = cells[keep], of[keep], x[keep], expected[keep]
    fitted = _Mixture(x, expected, of, theta, down)
    share, fold = fitted.fit(mixed=True)
    if share is None or fitted.likelihood(share, fold) - fitted.likelihood(*fitted.fit(mixed=False)) < 0.5 * np.log(
        len(x)
    ):
        return None
    weight = np.ones(screen.n_cells)
    weight[cells] = fitted.posterior(share, fold)
    logger.info(
        "%.0f %% of the cells carry their perturbation, by the counts of their targets", 100 * weight[cells].mean()
    )
    return weight


class _Mixture:
    """Counts ``x`` ``(cell,)`` with the mean ``expected`` of a control, of the regulators ``of``."""

    def __init__(self, x: np.ndarray, expected: np.ndarray, of: np.ndarray, theta: np.ndarray, down: bool):
        self.x, self.expected, self.of, self.theta = x, expected, of, theta
        self.limits = (_FOLD[0], 0.98) if down else (1.02, _FOLD[1])
        self.n = np.bincount(of, minlength=len(theta))
        self.start = self.density(np.ones(len(theta)))

    def density(self, fold: np.ndarray) -> np.ndarray:
        """Log-likelihood of each cell but for what does not depend on the mean."""
        theta, mean = self.theta[self.of], fold[self.of] * self.expected
        return self.x * np.log(mean / (mean + theta)) - theta * np.log(mean + theta)

    def odds(self, share: np.ndarray, fold: np.ndarray) -> np.ndarray:
        return (np.log(share) - np.log1p(-share))[self.of] + self.density(fold) - self.start

    def posterior(self, share: np.ndarray, fold: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-np.clip(self.odds(share, fold), -30, 30)))

    def likelihood(self, share: np.ndarray | None, fold: np.ndarray) -> float:
        if share is None:
            return float(self.density(fold).sum())
        escaped = np.log1p(-share)[self.of] + self.start
        return float((escaped + np.logaddexp(0.0, self.odds(share, fold))).sum())

    def fit(self, *, mixed: bool) -> tuple[np.ndarray | None, np.ndarray]:
        """Share of carriers (``None`` where all are) and fold change of each regulator, by EM."""
        overall = float(np.clip(self.x.sum() / self.expected.sum(), *self.limits))
        fold = np.full(len(self.theta), np.clip(overall**2 if mixed else overall, *self.limits))
        share = np.full(len(self.theta), 0.7) if mixed else None
        used = self.n > 0
        for _ in range(_ITERATIONS):
            p = np.ones(len(self.x)) if share is None else self.posterior(share, fold)
            theta = self.theta[self.of]
            weight = p * theta / (theta + fold[self.of] * self.expected)
            top, below, carriers = (
                np.bincount(self.of, values, minlength=len(self.n))
                for values in (weight * self.x, weight * self.expected, p)
            )
            common = top.sum() / max(below.sum(), 1e-12)
            each = below / np.maximum(carriers, 1e-9)
            fold = (top + _PRIOR_CELLS * each * common) / np.maximum(below + _PRIOR_CELLS * each, 1e-12)
            fold = np.clip(np.where(used, fold, common), *self.limits)
            if share is not None:
                mean = carriers.sum() / self.n.sum()
                share = np.clip((carriers + _PRIOR_CELLS * mean) / (self.n + _PRIOR_CELLS), *_SHARE)
        return share, fold


def weighted_effects(
    screen: Screen, regulators: list[str], weight: np.ndarray, strata: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Shift of the weighted mean of each regulator's cells, its standard error, and the mean weight.

    .. math:: d_i = \frac{\sum_c w_c x_c}{\sum_c w_c} - \sum_s \omega_{is} m_{cs}, \qquad
        s_i^2 = v_i \frac{\sum_c w_c^2}{(\sum_c w_c)^2} + \sum_s \omega_{is}^2 \frac{v_{cs}}{n_{cs}}

    with the share :math:`\omega_{is}` of the weights in stratum :math:`s`; the weighted variance :math:`v_i` within strata counts at
    least as much as that of the controls, and theirs at least as much as :math:`v_i`.

    Returns
    -------
    shift and standard error, float32 ``(regulator, gene)``, and mean weight ``(regulator,)``.
    """
    n_strata, n, n_genes = int(strata.max()) + 1, len(regulators), len(screen.genes)
    some = max(1, _STRATA_BYTES // (16 * n_strata * n_genes))
    if n_strata > 1 and n > some:  # a pass for each block of regulators, in place of all sums at once
        blocks = [weighted_effects(screen, regulators[i : i + some], weight, strata) for i in range(0, n, some)]
        shift, error, share = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return shift, error, share
    code = pd.Index(regulators).get_indexer(pd.Index(screen.labels))
    # the controls of each stratum behind the regulators
    group = np.where(screen.is_control, n + strata, code)
    used = group >= 0
    part = np.where(screen.is_control, n, code) * n_strata + strata
    sums = np.zeros(((n + 1) * n_strata, n_genes))  # of each regulator, and of the controls, in each stratum
    squares = np.zeros((n + n_strata, n_genes))
    for where, block in screen.chunks():
        rows = np.arange(screen.n_cells)[where]
        mine = np.flatnonzero(used[rows])
        square = block.copy()
        square.data = square.data.astype(np.float64) ** 2
        for out, index, values in ((sums, part, block), (squares, group, square)):
            member = sparse.csr_matrix((weight[rows[mine]], (index[rows[mine]], mine)), shape=(len(out), len(rows)))
            out += (member @ values).toarray()
    within = np.zeros((len(squares), n_strata))
    np.add.at(within, (group[used], strata[used]), weight[used])
    power = np.bincount(group[used], weight[used] ** 2, minlength=len(squares))
    all_weights = within.sum(axis=1)
    mean = np.concatenate([sums[: n * n_strata].reshape(n, n_strata, n_genes).sum(axis=1), sums[n * n_strata :]])
    mean /= np.maximum(all_weights, 1e-12)[:, None]
    squares /= np.maximum(all_weights, 1e-12)[:, None]
    variance = squares - mean**2
    if n_strata > 1:  # what differs between strata is no noise of a shift within them
        for i in range(n):
            of_strata = sums[i * n_strata : (i + 1) * n_strata] ** 2 / np.maximum(within[i], 1e-12)[:, None]
            variance[i] = squares[i] - of_strata.sum(axis=0) / max(all_weights[i], 1e-12)
    variance = np.maximum(variance, 0.0)
    n_controls = all_weights[n:]
    spread = variance[n:] * (n_controls / np.maximum(n_controls - 1, 1))[:, None]
    omega = within[:n] / np.maximum(all_weights[:n], 1e-12)[:, None]
    own = np.maximum(variance[:n], omega @ spread) * (power[:n] / np.maximum(all_weights[:n], 1e-12) ** 2)[:, None]
    for s, count in enumerate(n_controls):
        own += (omega[:, s] ** 2 / max(count, 1))[:, None] * np.maximum(spread[s], variance[:n])
    error = np.sqrt(own)
    share = all_weights[:n] / np.maximum(np.bincount(code[code >= 0], minlength=n), 1)
    return (mean[:n] - omega @ mean[n:]).astype(np.float32), error.astype(np.float32), share
