"""Genetic interactions: how the shift of a combination follows from the shifts of its single perturbations."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from .. import _keys as K
from .._checks import check_fraction, check_positive, check_seed, check_whole, listing
from .._progress import progress
from ..data import Screen, canonical, parse
from ..data._effects import need_controls, strata_of
from ..errors import MissingKeyError, ScpertError
from ..pp._write import writable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "INTERACTION_THRESHOLDS",
    "distance_correlation",
    "evaluate_interactions",
    "genetic_interactions",
    "theil_sen",
]

logger = logging.getLogger("scpert")

#: Limits of the classes, in the order in which they are tried: see :func:`genetic_interactions`.
INTERACTION_THRESHOLDS = {
    "neomorphism_fit": 0.5,
    "neomorphism_strength": 0.5,
    "redundancy_similarity": 0.7,
    "redundancy_magnitude": 0.75,
    "epistasis_dominance": 0.6,
    "synergy_magnitude": 1.25,
    "suppression_magnitude": 0.75,
}
CLASSES = ("synergy", "suppression", "additive", "epistasis", "redundancy", "neomorphism")
_SMALL = 256  # samples up to this size: all pairs at once is faster than sorting
_BLOCK = 2**16  # numbers at once, which stay in the processor's cache
_HUBER = 4.0  # residuals beyond so many standard errors lose weight
_WEAK = 4.0  # singles that stand out of their noise by fewer standard errors are corrected in part
_LEAST = 1e-3  # coefficients below count as this in the dominance, which stays finite


# ---------------------------------------------------------------------------------------------- Theil-Sen


def _subsets(n: int, k: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """All subsets of ``k`` of ``n`` rows if there are at most ``most``, else so many random ones; ``(subset, k)``."""
    if comb(n, k) <= most:
        return np.array(list(combinations(range(n), k)), dtype=np.int64).reshape(-1, k)
    drawn = rng.integers(n, size=(most, k))
    for _ in range(100):
        ordered = np.sort(drawn, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            break
        drawn[again] = rng.integers(n, size=(int(again.sum()), k))
    return drawn


def _spatial_median(points: np.ndarray, weights: np.ndarray, tolerance: float, most: int = 500) -> np.ndarray:
    """Point of the least weighted sum of distances to ``points`` ``(n, k)``: Weiszfeld's iteration."""
    if points.shape[1] == 1:
        order = np.argsort(points[:, 0], kind="stable")
        half = np.cumsum(weights[order]) / weights.sum()
        at = int(np.searchsorted(half, 0.5 - 1e-12))
        low = points[order[at], 0]
        exact = abs(half[at] - 0.5) < 1e-12 and at + 1 < len(points)
        return np.array([(low + points[order[at + 1], 0]) / 2 if exact else low])
    median = np.median(points, axis=0)
    for _ in range(most):
        away = points - median
        distance = np.sqrt(np.einsum("ij,ij->i", away, away))
        pull = weights / np.maximum(distance, 1e-12)
        following = pull @ points / pull.sum()
        moved = np.abs(following - median).max()
        median = following
        if moved < tolerance * max(1.0, np.abs(median).max()):
            break
    return median


def _solve(X: np.ndarray, y: np.ndarray, subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact solutions of the subsets' equations and the absolute determinants; singular ones are left out."""
    k = X.shape[1]
    if k == 2:
        i, j = subsets[:, 0], subsets[:, 1]
        determinant = X[i, 0] * X[j, 1] - X[i, 1] * X[j, 0]
        size = np.abs(X[i, 0] * X[j, 1]) + np.abs(X[i, 1] * X[j, 0])
        good = np.abs(determinant) > 1e-10 * np.maximum(size, np.finfo(float).tiny)
        i, j, determinant = i[good], j[good], determinant[good]
        first = (y[i] * X[j, 1] - y[j] * X[i, 1]) / determinant
        second = (X[i, 0] * y[j] - X[j, 0] * y[i]) / determinant
        return np.column_stack([first, second]), np.abs(determinant)
    A = X[subsets]
    determinant = np.abs(np.linalg.det(A))
    good = determinant > 1e-10 * np.maximum(np.prod(np.linalg.norm(A, axis=2), axis=1), np.finfo(float).tiny)
    return np.linalg.solve(A[good], y[subsets[good]][..., None])[..., 0], determinant[good]


def theil_sen(
    X: np.ndarray,
    y: np.ndarray,
    *,
    weighted: bool = True,
    max_subsets: int = 10_000,
    random_state: int = 0,
    subsets: np.ndarray | None = None,
    tolerance: float = 1e-6,
) -> np.ndarray:
    r"""Theil-Sen regression through the origin: spatial median of exact solutions of small subsets.

    Each subset of as many rows as there are columns is solved exactly; the coefficients are the spatial median of
    these solutions. With ``weighted=False`` this is :class:`sklearn.linear_model.TheilSenRegressor` without intercept.
    With weights, a subset counts by its absolute determinant :math:`|\det X_S|`: subsets of rows that hold no signal
    have near-zero determinants and arbitrary solutions. (With :math:`(\det X_S)^2` and the mean in place of the median
    it would be least squares, by Jacobi's theorem.)

    Parameters
    ----------
    X
        ``(row, column)``.
    y
        ``(row,)``.
    weighted
        Whether subsets count by their determinant.
    max_subsets
        So many random subsets, if there are more.
    random_state
        Seed of the random subsets.
    subsets
        Rows of each subset ``(subset, column)``, instead of drawing them.
    tolerance
        Last step of the iteration to the spatial median, relative to the coefficients above 1.

    Returns
    -------
    Coefficients ``(column,)``; NaN if no subset can be solved.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    >>> theil_sen(X, X @ [0.5, 1.5]).round(6).tolist()
    [0.5, 1.5]
    """
    random_state = check_seed(random_state)
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if X.ndim != 2 or y.shape != (len(X),):
        raise ScpertError(f"X must be (row, column) and y (row,); got shapes {X.shape} and {y.shape}.")
    if len(X) < X.shape[1]:
        return np.full(X.shape[1], np.nan)
    if subsets is None:
        subsets = _subsets(len(X), X.shape[1], max_subsets, np.random.default_rng(random_state))
    points, determinant = _solve(X, y, subsets)
    if len(points) == 0:
        return np.full(X.shape[1], np.nan)
    return _spatial_median(points, determinant if weighted else np.ones(len(points)), tolerance)


# ---------------------------------------------------------------------------------------------- distance correlation


def _row_sums(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Sum over j of ``|x_i - x_j|`` for every i."""
    n = len(x)
    ordered = x[order]
    below = np.cumsum(ordered) - ordered
    sums = ordered * (2 * np.arange(n) - n + 1) - 2 * below + ordered.sum() - ordered
    out = np.empty(n)
    out[order] = sums
    return out


def _product_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum over all ordered pairs of ``|x_i - x_j| |y_i - y_j|`` in O(n log^2 n).

    In the order of x, ``(x_j - x_i)`` is never negative, so the sum is that of ``(x_j - x_i)(y_j - y_i)`` over pairs,
    with the pairs turned round in which y falls. Those in which y rises are found by merging neighbouring blocks.
    """
    n = len(x)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(y, kind="stable")] = np.arange(n)
    plain = n * (x @ y) - x.sum() * y.sum()  # over unordered pairs
    rising = 0.0
    position = np.arange(n)
    values = np.stack([np.ones(n), x, y, x * y])
    width = 1
    while width < n:
        merged = np.argsort(position // (2 * width) * n + rank, kind="stable")
        left = (merged // width) % 2 == 0
        sums = np.cumsum(values[:, merged] * left, axis=1)
        block = merged // (2 * width)
        first = np.searchsorted(block, block)  # start of each element's block
        before = np.where(first > 0, sums[:, np.maximum(first, 1) - 1], 0.0)
        count, sum_x, sum_y, sum_xy = (sums - before)[:, ~left]
        xr, yr = x[merged[~left]], y[merged[~left]]
        rising += float(np.sum(count * xr * yr - yr * sum_x - xr * sum_y + sum_xy))
        width *= 2
    return 2 * (2 * rising - plain)


def _squared_covariance(x: np.ndarray, y: np.ndarray, rows_x: np.ndarray, rows_y: np.ndarray) -> float:
    """Squared distance covariance (V-statistic) of two samples of numbers, given their sums of distances."""
    n = len(x)
    if x is y:
        product = 2 * (n * float(x @ x) - float(x.sum()) ** 2)
    elif n <= _SMALL:
        product = float(np.einsum("ij,ij->", np.abs(x[:, None] - x), np.abs(y[:, None] - y)))
    else:
        product = _product_sum(x, y)
    return product / n**2 - 2 * float(rows_x @ rows_y) / n**3 + float(rows_x.sum() * rows_y.sum()) / n**4


def _moments_nd(x: np.ndarray, y: np.ndarray, block: int = 512) -> tuple[float, float, float]:
    """Squared distance covariance of x with y, x with x, y with y; blocks of the distance matrices at a time."""
    n = len(x)
    rows = {"a": np.empty(n), "b": np.empty(n)}
    products = np.zeros(3)
    for start in range(0, n, block):
        part = slice(start, start + block)
        a = np.sqrt(((x[part, None, :] - x[None, :, :]) ** 2).sum(axis=2))
        b = np.sqrt(((y[part, None, :] - y[None, :, :]) ** 2).sum(axis=2))
        products += [np.einsum("ij,ij->", p, q) for p, q in ((a, b), (a, a), (b, b))]
        rows["a"][part], rows["b"][part] = a.sum(axis=1), b.sum(axis=1)
    pairs = (("a", "b"), ("a", "a"), ("b", "b"))
    cov, var_x, var_y = (
        products[i] / n**2 - 2 * (rows[p] @ rows[q]) / n**3 + rows[p].sum() * rows[q].sum() / n**4
        for i, (p, q) in enumerate(pairs)
    )
    return float(cov), float(var_x), float(var_y)


def distance_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Distance correlation of two samples (Szekely, Rizzo and Bakirov 2007), between 0 (independent) and 1.

    Parameters
    ----------
    x, y
        ``(n,)`` or ``(n, k)``.

    Returns
    -------
    The distance correlation; NaN if a sample is constant. Two vectors take O(n log^2 n), otherwise O(n^2).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(10.0)
    >>> round(distance_correlation(x, 3 - 2 * x), 6)
    1.0
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) != len(y) or len(x) < 2:
        raise ScpertError(f"x and y need the same length of at least 2; got {len(x)} and {len(y)}.")
    x, y = (v[:, 0] if v.ndim == 2 and v.shape[1] == 1 else v for v in (x, y))
    if x.ndim == 1 and y.ndim == 1:
        scale_x, scale_y = np.ptp(x), np.ptp(y)
        if scale_x == 0 or scale_y == 0:
            return float("nan")
        x, y = (x - x.mean()) / scale_x, (y - y.mean()) / scale_y
        rows_x, rows_y = (_row_sums(v, np.argsort(v, kind="stable")) for v in (x, y))
        cov = _squared_covariance(x, y, rows_x, rows_y)
        var_x, var_y = _squared_covariance(x, x, rows_x, rows_x), _squared_covariance(y, y, rows_y, rows_y)
    else:
        cov, var_x, var_y = _moments_nd(x.reshape(len(x), -1), y.reshape(len(y), -1))
    if var_x <= 1e-15 * max(1.0, var_y) or var_y <= 1e-15 * max(1.0, var_x):
        return float("nan")
    return float(sqrt(min(1.0, max(cov, 0.0) / sqrt(var_x * var_y))))


# ---------------------------------------------------------------------------------------------- one combination


def _corrected(X: np.ndarray, y: np.ndarray, error: np.ndarray, multiple: float = 1.0) -> np.ndarray:
    r"""Robust regression through the origin with errors of known covariance in all shifts.

    With errors :math:`S_g` of the singles' and :math:`s_g` of their covariance with the combination's shift, and Huber's
    weights :math:`w_g`,

    .. math:: \Bigl(\sum_g w_g (x_g x_g^T - S_g)\Bigr) c = \sum_g w_g (x_g y_g - s_g)

    has the noise-free coefficients as its expected solution (the classical correction for attenuation, Fuller 1987), if
    the choice of the genes does not depend on these errors. The solution has no finite variance where the singles hardly
    stand out of their noise: along each principal direction of the moments, relative to the noise, with eigenvalue
    :math:`\lambda` (1: noise alone, with a standard error of :math:`\tau = \sqrt{2/n}` over n genes), what is left after
    the correction is the positive root of :math:`r (r - (\lambda - 1)) = (2 \tau)^2` in place of :math:`\lambda - 1`.

    Parameters
    ----------
    X, y
        Shifts ``(replicate, gene, k)`` and ``(replicate, gene)``, in units that make the errors alike.
    error
        Covariance of the errors of the k singles' and the combination's shift ``(gene, k + 1, k + 1)``.
    multiple
        Resampled data bear their errors twice: 2.

    Returns
    -------
    Coefficients ``(replicate, k)``.
    """
    k, n = X.shape[2], X.shape[1]
    block = max(1, _BLOCK // n)
    if len(X) > block:
        parts = [slice(i, i + block) for i in range(0, len(X), block)]
        return np.concatenate([_corrected(X[part], y[part], error, multiple) for part in parts])
    S, s, own = error[:, :k, :k].reshape(n, k * k), error[:, :k, k], error[:, k, k]
    tolerance = 1e-5 if multiple == 1 else 1e-3  # resamplings
    least = (_WEAK * sqrt(2 / n) / multiple) ** 2
    Xt = np.ascontiguousarray(X.transpose(0, 2, 1))
    weight = np.ones_like(y)
    c = np.zeros((len(X), k))
    for _ in range(50):
        weighted = Xt * weight[:, None]
        noise = multiple * (weight @ S).reshape(-1, k, k) + 1e-12 * np.eye(k)
        root = np.linalg.inv(np.linalg.cholesky(noise))
        signal, direction = np.linalg.eigh(root @ (weighted @ Xt.transpose(0, 2, 1)) @ root.transpose(0, 2, 1))
        to = direction.transpose(0, 2, 1) @ root  # whitens the noise and turns to the principal directions
        left = (signal - 1 + np.sqrt((signal - 1) ** 2 + least)) / 2
        share = np.maximum(signal - left, 0.0)[..., None]  # of the correction
        cross = to @ (weighted @ y[..., None]) - share * (to @ (multiple * (weight @ s))[..., None])
        following = (to.transpose(0, 2, 1) @ (cross / left[..., None]))[..., 0]
        moved = np.abs(following - c).max()
        c = following
        if moved < tolerance:
            break
        spread = own - 2 * c @ s.T + (c[:, :, None] * c[:, None, :]).reshape(-1, k * k) @ S.T
        residual = np.abs(y - (c[:, None] @ Xt)[:, 0]) / np.sqrt(np.maximum(multiple * spread, 1e-12))
        median = np.partition(residual, n // 2, axis=1)[:, n // 2, None]
        residual /= np.maximum(1.0, median / 0.6745)  # shifts that do not fit, too
        weight = np.minimum(1.0, _HUBER / np.maximum(residual, 1e-12))
    return c


def _of_coefficients(c: np.ndarray) -> dict[str, float]:
    size = np.maximum(np.abs(c), _LEAST)
    out = {f"c{i + 1}": float(x) for i, x in enumerate(c)}
    return out | {"magnitude": float(np.linalg.norm(c)), "dominance": float(np.log10(size.max() / size.min()))}


def _measures(X: np.ndarray, y: np.ndarray, c: np.ndarray, full: bool = False) -> dict[str, float]:
    """All measures of one combination: ``X`` the singles' shifts ``(gene, k)``, ``y`` the combination's."""
    k = X.shape[1]
    out = _of_coefficients(c)
    out["model_fit"] = distance_correlation(X @ c, y) if np.isfinite(c).all() else np.nan
    each = np.array([distance_correlation(X[:, i], y) for i in range(k)])
    out["equality"] = float(each.min() / each.max()) if np.isfinite(each).all() and each.max() > 0 else np.nan
    between = [distance_correlation(X[:, i], X[:, j]) for i, j in combinations(range(k), 2)]
    out["similarity_singles"] = float(np.min(between))
    strongest = np.linalg.norm(X, axis=0).max()
    out["strength"] = float(np.linalg.norm(y) / strongest) if strongest > 0 else np.nan
    if full:
        out["similarity"] = distance_correlation(X, y)
    return out


#: Standard deviations by which shifts must be longer than their noise alone would be.
_CLEAR = 3.0
#: Or the error rate, over all genes and singles (Bonferroni), at which one gene shows that there is a shift.
_SINGLE_GENE = 0.01


@dataclass
class _Seen:
    """What stands out of the noise: any single's shift, and the combination's beyond the fit."""

    singles: bool = True
    beyond: bool = True


def _stands_out(shift: np.ndarray, variance: np.ndarray, resampled: np.ndarray | None) -> bool:
    """Whether a shift ``(gene,)`` is longer than noise of this variance makes it; ``resampled`` ``(replicate, gene)`` tell how noise varies."""
    use = variance > 0
    length = float((shift[use] ** 2 / variance[use]).sum())
    mean, sd = float(use.sum()), sqrt(2.0 * use.sum())
    if resampled is not None and len(resampled) > 1:  # genes do not vary independently
        noise = ((resampled[:, use] - shift[use]) ** 2 / variance[use]).sum(axis=1)
        mean, sd = max(mean, float(noise.mean())), max(sd, float(noise.std(ddof=1)))
    return length > mean + _CLEAR * sd


def _classify(m: Mapping[str, float], k: int, limits: Mapping[str, float], seen: _Seen) -> str:
    """Class of a combination of ``k`` targets by the stated thresholds."""
    relative = m["magnitude"] / sqrt(k)
    if not np.isfinite(relative):
        return "undetermined"
    if seen.beyond and m["model_fit"] < limits["neomorphism_fit"] and m["strength"] >= limits["neomorphism_strength"]:
        return "neomorphism"
    if not seen.singles:
        return "undetermined"
    if m["similarity_singles"] >= limits["redundancy_similarity"] and relative <= limits["redundancy_magnitude"]:
        return "redundancy"
    if m["dominance"] >= limits["epistasis_dominance"]:
        return "epistasis"
    if relative >= limits["synergy_magnitude"]:
        return "synergy"
    if relative <= limits["suppression_magnitude"]:
        return "suppression"
    return "additive"


class _Shifts:
    """Shifts from the controls of their own strata, their errors and resampled shifts, of measured perturbations."""

    def __init__(self, screen: Screen, strata: np.ndarray, n_boot: int, random_state: int):
        self.screen, self.strata = screen, strata
        self.effects = screen.scale == K.SCALE_EFFECTS
        labels, code = np.unique(screen.labels.astype(str), return_inverse=True)
        self.row = {str(g): i for i, g in enumerate(labels)}
        n_strata, n_genes = int(strata.max(initial=0)) + 1, len(screen.genes)
        moments = screen.moments(
            code * n_strata + strata, progress=lambda chunks: progress(chunks, description="means", unit="chunk")
        )
        label, stratum = np.divmod(moments.groups.astype(np.int64), n_strata)
        n = np.zeros((len(labels), n_strata), dtype=np.int64)
        n[label, stratum] = moments.n
        self.n, self.freedom = n.sum(axis=1), np.maximum(n - 1, 0).sum(axis=1)
        #: Share of the cells of a label in each stratum ``(label, stratum)``.
        self.share = n / self.n[:, None]
        self.mean, var = np.zeros((len(labels), n_genes)), np.zeros((len(labels), n_genes))
        np.add.at(self.mean, label, self.share[label, stratum][:, None] * moments.mean)
        many = moments.n > 1
        np.add.at(var, label[many], (moments.n[many] - 1)[:, None] * moments.var[many])
        var[self.freedom == 0] = np.nan
        var /= np.maximum(self.freedom, 1)[:, None]
        #: Means of the controls and their squared errors ``(stratum, gene)``; zero where there are none.
        self.control_mean, self.control_se2 = np.zeros((n_strata, n_genes)), np.zeros((n_strata, n_genes))
        if self.effects:
            self.se2 = np.full_like(self.mean, np.nan)
            self.control_se2[:] = np.nan
            self.control_sd = np.full(n_genes, np.nan)
        else:
            self.se2 = var / self.n[:, None]
            at = (label == self.row[screen.control]) & many
            self.control_mean[stratum[at]] = moments.mean[at]
            self.control_se2[stratum[at]] = moments.var[at] / moments.n[at, None]
            self.control_sd = np.sqrt(var[self.row[screen.control]])
        self.n_boot = 0 if self.effects else n_boot
        self.random_state = random_state
        self._control_boot: np.ndarray | None = None

    def shift(self, label: str) -> np.ndarray:
        return self.mean[self.row[label]] - self.share[self.row[label]] @ self.control_mean

    def shared_error(self, one: str, other: str) -> np.ndarray:
        """Covariance of two shifts, by the controls that both are compared with ``(gene,)``."""
        out: np.ndarray = (self.share[self.row[one]] * self.share[self.row[other]]) @ self.control_se2
        return out

    def zscore(self, label: str) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.abs(self.shift(label)) / np.sqrt(self.se2[self.row[label]] + self.shared_error(label, label))
        return np.nan_to_num(z, nan=0.0, posinf=0.0)

    def _resampled(self, label: str) -> np.ndarray:
        """Sums of cells resampled in each stratum ``(n_boot, stratum, gene)``; draws do not depend on what else is asked for."""
        rng = np.random.default_rng([self.random_state, zlib.crc32(label.encode())])
        out = np.zeros((self.n_boot, self.share.shape[1], len(self.screen.genes)))
        of_label, row = self.screen.labels == label, self.row[label]
        n = np.rint(self.share[row] * self.n[row])
        # a lone cell of its stratum does not vary by resampling: the others vary for it
        wider = 1.0 if label == self.screen.control else n.sum() / max(n[n > 1].sum(), 1.0)
        for s in np.flatnonzero(n):
            index = np.flatnonzero(of_label & (self.strata == s))
            counts = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=self.n_boot)
            if len(n) > 1 and len(index) > 1:  # n cells vary about their own mean by (n - 1) / n (Rao and Wu 1988)
                counts = 1 + (counts - 1) * np.sqrt(wider * len(index) / (len(index) - 1))
            for start in range(0, len(index), 4096):
                block = self.screen.rows(index[start : start + 4096])
                out[:, s] += np.asarray((block.T @ counts[:, start : start + 4096].T).T)
        return out

    def resampled_shift(self, label: str) -> np.ndarray:
        if self._control_boot is None:
            control = self.row[self.screen.control]
            n = np.maximum(self.share[control] * self.n[control], 1)
            self._control_boot = self._resampled(self.screen.control) / n[:, None]
        mean = self._resampled(label).sum(axis=1) / self.n[self.row[label]]
        return mean - np.einsum("s,bsg->bg", self.share[self.row[label]], self._control_boot)


def _predicted_shifts(predicted: AnnData, genes: pd.Index, key: str, control: str) -> dict[str, np.ndarray]:
    """Predicted shifts by canonical label, over the genes of the data (NaN where not predicted)."""
    if K.DELTA not in predicted.layers:
        raise MissingKeyError(
            "predicted has no layers['delta']: pass what a model's predict_perturbation returned (rows are perturbations)."
        )
    column = key if key in predicted.obs else K.PERTURBATION
    if column not in predicted.obs:
        raise MissingKeyError(f"predicted.obs has no column {key!r} with the perturbations' labels.")
    if K.STATUS in predicted.obs:  # a substitute such as the mean effect says nothing of interactions
        stand_in = (predicted.obs[K.STATUS].astype(str) == K.FALLBACK).to_numpy()
        if stand_in.any():
            names = predicted.obs[column].astype(str)[stand_in]
            logger.warning(
                "genetic_interactions: %d predictions are fallbacks and left out: %s", stand_in.sum(), listing(names, 5)
            )
            if stand_in.all():
                raise ScpertError(
                    "All predictions are fallbacks (obs['status']): the model knows none of these targets."
                )
            predicted = predicted[~stand_in]
    position = predicted.var_names.get_indexer(genes)
    if not (position >= 0).any():
        raise ScpertError(
            f"predicted shares no gene with the data: it has {listing(predicted.var_names, 4)}, the data "
            f"{listing(genes, 4)}. Predict with the same gene names."
        )
    layer: Any = predicted.layers[K.DELTA]
    delta = np.asarray(layer.toarray() if hasattr(layer, "toarray") else layer, dtype=np.float64)
    labels = np.array([canonical(str(x), control) for x in predicted.obs[column]], dtype=object)
    out = {}
    for label in dict.fromkeys(labels):
        mean = delta[labels == label].mean(axis=0)
        out[str(label)] = np.where(position >= 0, mean[np.maximum(position, 0)], np.nan)
    return out


def genetic_interactions(
    adata: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    predicted: AnnData | None = None,
    n_boot: int = 100,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
    genes: Iterable[str] | None = None,
    min_zscore: float = 3.0,
    min_genes: int = 50,
    weighted: bool = True,
    max_subsets: int = 10_000,
    confidence: float = 0.95,
    thresholds: Mapping[str, float] | None = None,
    key_added: str = K.INTERACTIONS,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    r"""Genetic interactions of the combinations, measured and predicted.

    The shift of a combination is explained by those of its single perturbations, gene by gene (Norman et al. 2019),

    .. math:: \delta_{ab} = c_1\,\delta_a + c_2\,\delta_b + \epsilon,

    by a robust regression over all genes, each divided by its standard deviation within perturbations, that corrects
    for the noise in the singles' shifts (Fuller 1987). Predictions and effects are fitted by Theil-Sen over the genes
    with a detectable shift.

    Parameters
    ----------
    adata
        Cells by genes with combinations (``A+B``, any number of targets) and their single perturbations; or effects
        (``scale="effects"``), which have no limits.
    perturbation_key, control
        Column of the labels; label of the control.
    predicted
        What ``predict_perturbation`` returned: its combinations are analysed too. Their singles are taken from the data
        if measured there, else from the prediction.
    n_boot
        Resamplings for the limits, of cells (controls, singles and combination) or, for predictions, of genes; 0: none.
    layer, scale, library_size_key
        Where the values are, what they are, and the column with the full library size.
    covariate_keys
        Columns (batch, donor ...) within which cells are compared, as in :func:`scpert.tl.perturbation_effects`: shifts are from the
        controls of a cell's own stratum, and cells are resampled within strata.
    genes
        Genes to use. By default the coefficients of measured combinations come from all genes; the other measures, and
        coefficients by Theil-Sen, from those with a z-score of at least ``min_zscore`` in any single or in the measured
        combination, and at least the ``min_genes`` highest. The combination's own targets are always left out.
    min_zscore, min_genes
        See ``genes``.
    weighted, max_subsets
        With ``weighted=False`` measured combinations too are fitted by plain Theil-Sen, the estimator of the literature
        (scikit-learn's), which noisy genes and noisy singles draw towards zero. It solves small subsets of genes exactly
        and takes the spatial median of the solutions; predictions and effects otherwise count a subset by its absolute
        determinant. Of more than ``max_subsets`` subsets so many are drawn.
    confidence
        Of the limits.
    thresholds
        Replaces some of :data:`scpert.tl.INTERACTION_THRESHOLDS`.
    key_added
        Where the table is written.
    random_state
        Seed of resampling and of random subsets.
    copy
        Return a copy with the table instead of writing into ``adata``.

    Returns
    -------
    ``None``; writes ``adata.uns[key_added]``, a DataFrame with one row per combination and origin (index: the label;
    of predictions with `` (predicted)`` behind):

    ``perturbation``, ``origin`` (``measured``, ``predicted``), ``n_targets``, ``n_cells``, ``n_genes`` (of the fit)
        What was analysed.
    ``c1``, ``c2``, ...
        Coefficients of the targets in alphabetical order (NaN beyond ``n_targets``).
    ``magnitude``
        :math:`\sqrt{c_1^2 + c_2^2 + \dots}`; :math:`\sqrt{k}` for k targets that add up.
    ``model_fit``
        Distance correlation of the fitted with the combination's shift.
    ``equality``
        Lowest over highest distance correlation of a single with the combination: 1, both contribute alike.
    ``similarity``, ``similarity_singles``
        Distance correlation of the singles together with the combination; lowest one between two singles.
    ``dominance``
        :math:`|\log_{10}(|c_1| / |c_2|)|` (highest over lowest; coefficients below 0.001 count as 0.001).
    ``strength``
        Length of the combination's shift over that of the stronger single.
    ``class``, ``class_confidence``
        See below; and the share of the resamplings, turned round the estimate as for the limits (magnitude and dominance
        from turned coefficients), with the same class.
    ``<measure>_lower``, ``<measure>_upper``
        Limits: basic bootstrap, :math:`2\hat\theta - q`, for all measures but ``similarity``.

    Raises
    ------
    ScpertError
        If there is no combination whose singles are there; if a stratum with perturbed cells has fewer than two control cells.

    Notes
    -----
    The classes, with the relative magnitude :math:`m = \text{magnitude}/\sqrt{k}`, tried in this order: *neomorphism*:
    model fit below 0.5 with a strength of at least 0.5, and, of measured cells, a shift beyond the fit that is longer than its noise
    by three standard deviations and makes up at least half of the combination's (both without the expected noise); *undetermined*:
    no single's shift is longer than its noise by as much, and none of its genes stands out (at 0.01, Bonferroni); *redundancy*: singles similar by at least 0.7 and
    :math:`m \le 0.75`; *epistasis*: dominance of at least 0.6 (one coefficient four times the other); *synergy*:
    :math:`m \ge 1.25`; *suppression*: :math:`m \le 0.75`; else *additive*.

    The correction is partial for singles that hardly stand out of their noise: their coefficients stay drawn towards
    zero, and their limits are wide. The page on interactions tells the coverage of the limits on simulated screens.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=900, n_genes=60, n_targets=6, n_combinations=4)
    >>> scpert.tl.genetic_interactions(adata, n_boot=20)
    >>> len(adata.uns["genetic_interactions"])
    4
    """
    random_state = check_seed(random_state)
    check_fraction("confidence", confidence)
    if check_positive("n_boot", n_boot, zero=True) > 0:
        n_boot = check_whole("n_boot", n_boot)
    check_whole("max_subsets", max_subsets)
    check_whole("min_genes", min_genes)
    check_positive("min_zscore", min_zscore, zero=True)
    limits = dict(INTERACTION_THRESHOLDS)
    unknown = set(thresholds or ()) - set(limits)
    if unknown:
        raise ScpertError(f"thresholds has unknown names {listing(sorted(unknown))}; known are {listing(limits)}.")
    for name, value in (thresholds or {}).items():
        limits[name] = check_positive(f"thresholds[{name!r}]", value, zero=True)
    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        allowed=K.SCALES,
    )
    chosen = None
    if genes is not None:
        wanted = pd.Index([str(g) for g in genes])
        absent = wanted.difference(screen.genes)
        if len(absent):
            raise ScpertError(f"genes names {listing(absent, 5)}, which are not in adata.var_names.")
        chosen = np.asarray(screen.genes.isin(wanted))
    guessed = {} if predicted is None else _predicted_shifts(predicted, screen.genes, perturbation_key, control)
    measured = [p for p in screen.perturbations if len(parse(p, control)) > 1]
    jobs = [("measured", p) for p in measured] + [("predicted", p) for p in guessed if len(parse(p, control)) > 1]
    if not jobs:
        raise ScpertError(
            f"There is no combination among the perturbations (such as {listing(screen.perturbations, 5)}). "
            "Combinations are labelled 'GENE_A+GENE_B': see scpert.pp.annotate_perturbations."
        )
    known = set(screen.perturbations)
    lacking = {
        (o, p): [t for t in parse(p, control) if t not in known and (o == "measured" or t not in guessed)]
        for o, p in jobs
    }
    skipped = sorted({p for (_, p), singles in lacking.items() if singles})
    if len(without := [job for job in jobs if lacking[job]]) == len(jobs):
        example = without[0]
        raise ScpertError(
            f"No combination can be analysed: each lacks a single perturbation (such as {example[1]!r}, which lacks "
            f"{listing(lacking[example])}). Measure the singles, or pass predicted= with them."
        )
    jobs = [job for job in jobs if not lacking[job]]
    if skipped:
        logger.warning("genetic_interactions: %d combinations lack a single: %s", len(skipped), listing(skipped))
    if covariate_keys and screen.scale == K.SCALE_EFFECTS:
        logger.info(
            "genetic_interactions: covariate_keys is ignored: a table of effects has no cells to compare within strata"
        )
        covariate_keys = None
    strata, strata_names = strata_of(adata, covariate_keys)
    if len(strata_names) > 1:
        need_controls(screen, strata, lambda cell: strata_names[strata[cell]])
    shifts = _Shifts(screen, strata, int(n_boot), random_state)
    if not shifts.effects:  # one cell (of each stratum) has no error
        lone = {p for p, i in shifts.row.items() if shifts.freedom[i] < 1}
        in_each = " in each stratum" if len(strata_names) > 1 else ""
        if control in lone:
            raise ScpertError(f"There is one control cell ({control!r}): shifts from it have no error. Measure more.")
        alone = [(o, p) for o, p in jobs if lone & {*parse(p, control), *([p] if o == "measured" else [])}]
        jobs = [job for job in jobs if job not in alone]
        if not jobs:
            raise ScpertError(
                f"No combination can be analysed: each rests on a perturbation of one cell{in_each} ({listing(sorted(lone))}), "
                "whose shift has no error. Measure more cells of these."
            )
        if alone:
            names = sorted({p for _, p in alone})
            logger.warning("genetic_interactions: %d combinations rest on one cell: %s", len(names), listing(names))
    rows = []
    for origin, label in progress(jobs, total=len(jobs), description="interactions", unit="combination"):
        options = (limits, min_zscore, int(min_genes), weighted, int(max_subsets), confidence)
        rows.append(_analyse(shifts, guessed, origin, label, control, chosen, *options))
    table = pd.DataFrame(rows)
    most = int(table["n_targets"].max())
    ids = ["perturbation", "origin", "n_targets", "n_cells", "n_genes", "class", "class_confidence"]
    measures = [f"c{i + 1}" for i in range(most)]
    measures += ["magnitude", "model_fit", "equality", "similarity", "similarity_singles", "dominance", "strength"]
    bounds = [f"{m}_{side}" for m in measures if m != "similarity" for side in ("lower", "upper")]
    table = table.reindex(columns=ids[:5] + measures + ids[5:] + bounds)
    numbers = table.columns.difference(["perturbation", "origin", "class"], sort=False)
    table[numbers] = table[numbers].astype({c: np.int64 if c.startswith("n_") else np.float64 for c in numbers})
    table.index = pd.Index([p if o == "measured" else f"{p} (predicted)" for o, p in jobs], dtype=str)
    out = writable(adata, copy)
    out.uns[key_added] = table
    return out if copy else None


def _analyse(
    shifts: _Shifts,
    guessed: Mapping[str, np.ndarray],
    origin: str,
    label: str,
    control: str,
    chosen: np.ndarray | None,
    limits: Mapping[str, float],
    min_zscore: float,
    min_genes: int,
    weighted: bool,
    max_subsets: int,
    confidence: float,
) -> dict[str, Any]:
    singles = parse(label, control)
    k = len(singles)
    here = [t for t in singles if t in shifts.row]
    X = np.column_stack([shifts.shift(t) if t in shifts.row else guessed[t] for t in singles])
    y = shifts.shift(label) if origin == "measured" else guessed[label]
    use = np.isfinite(X).all(axis=1) & np.isfinite(y) & ~shifts.screen.genes.isin(singles)
    if shifts.effects:
        unit = np.ones(len(y))
    elif len(here) == k:
        unit = np.sqrt(sum(shifts.se2[shifts.row[t]] + shifts.shared_error(t, t) for t in singles))
    else:  # singles that were predicted have no error of their own
        unit = shifts.control_sd
    unit = np.where(np.isfinite(unit), unit, 0.0)
    use &= unit > 0
    if chosen is not None:
        use &= chosen
    every = np.flatnonzero(use)
    if shifts.effects or not here:
        ranked = np.abs(np.column_stack([X, y])).max(axis=1) / np.where(unit > 0, unit, np.inf)
        least = np.inf
    else:
        ranked = np.max([shifts.zscore(p) for p in [*here, *([label] if label in shifts.row else [])]], axis=0)
        least = min_zscore
    if chosen is None and use.sum() > min_genes:
        ranked = np.where(use, ranked, -1.0)
        use &= ranked >= min(least, np.sort(ranked)[-min_genes])
    index = np.flatnonzero(use)  # with a detectable shift
    if len(index) <= k:
        raise ScpertError(
            f"{label}: only {len(index)} gene(s) can be used for {k} coefficients. Use more genes, or leave genes=None."
        )
    seed = np.random.default_rng([shifts.random_state, zlib.crc32(label.encode()), 1])
    used = [shifts.row[p] for p in [*singles, label, control] if p in shifts.row]
    corrected = weighted and not shifts.effects and origin == "measured" and shifts.freedom[used].min() > 0
    if corrected:  # by all genes: a choice by these shifts would depend on their errors, which the correction excludes
        n = shifts.n[used]
        pooled = n**2 @ shifts.se2[used] / n.sum()  # variance within perturbations
        fitted, fit_unit = every, np.sqrt(pooled[every])
        error = (shifts.se2[used[: k + 1]][:, fitted] / fit_unit**2).T[:, :, None] * np.eye(k + 1)
        compared = [*singles, label]
        for i, one in enumerate(compared):
            for j, other in enumerate(compared):
                error[:, i, j] += shifts.shared_error(one, other)[fitted] / fit_unit**2
    else:
        fitted, fit_unit = index, unit[index]
        subsets = _subsets(len(index), k, max_subsets, seed)

    def fit(Xb: np.ndarray, yb: np.ndarray, again: bool = True) -> np.ndarray:
        """Coefficients of each replicate ``(replicate, k)``."""
        if corrected:
            return _corrected(Xb, yb, error, 2.0 if again else 1.0)
        tolerance = 1e-4 if again else 1e-6
        return np.array(
            [
                theil_sen(Xi, yi, weighted=weighted, subsets=subsets, tolerance=tolerance)
                for Xi, yi in zip(Xb, yb, strict=True)
            ]
        )

    c = fit(X[None, fitted] / fit_unit[:, None], y[None, fitted] / fit_unit, again=False)[0]
    Xs, ys = X[index] / unit[index, None], y[index] / unit[index]
    row: dict[str, Any] = _measures(Xs, ys, c, full=True)
    Xb = yb = None
    seen = _Seen()
    if origin == "measured":
        if shifts.n_boot:
            Xb = np.stack([shifts.resampled_shift(t) for t in singles], axis=2)
            yb = shifts.resampled_shift(label)
        if not shifts.effects:
            seen = _seen(shifts, singles, label, every, X, y, c, Xb, yb, limits)
    elif len(here) == k and not shifts.effects:  # measured singles that are noise say nothing of a prediction either
        seen = _Seen(singles=_some_single(shifts, singles, every, X))
    kind = _classify(row, k, limits, seen)
    n_cells = int(shifts.n[shifts.row[label]]) if origin == "measured" else 0
    row.update(perturbation=label, origin=origin, n_targets=k, n_cells=n_cells, n_genes=len(fitted))
    row.update({"class": kind, "class_confidence": np.nan})
    if shifts.n_boot:
        if Xb is not None and yb is not None:
            cb = fit(Xb[:, fitted] / fit_unit[:, None], yb[:, fitted] / fit_unit)
            Xb, yb = Xb[:, index] / unit[index, None], yb[:, index] / unit[index]
        else:  # what was learned from the same cells does not vary independently of the singles: genes are drawn
            genes = seed.integers(len(index), size=(shifts.n_boot, len(index)))
            Xb, yb = Xs[genes], ys[genes]
            cb = fit(Xb, yb)
        replicates = [_measures(Xi, yi, ci) for Xi, yi, ci in zip(Xb, yb, cb, strict=True)]
        turned = [{name: 2 * row[name] - r[name] for name in r} for r in replicates]  # as in the limits
        turned = [r | _of_coefficients(2 * c - ci) for r, ci in zip(turned, cb, strict=True)]
        row["class_confidence"] = (
            np.nan
            if kind == "undetermined"
            else float(np.mean([_classify(r, k, limits, seen) == kind for r in turned]))
        )
        tail = (1 - confidence) / 2
        for name in replicates[0]:
            values = np.array([r[name] for r in replicates])
            values = values[np.isfinite(values)]
            if len(values) > 1 and np.isfinite(row[name]):
                low, high = np.quantile(values, [tail, 1 - tail])
                row[f"{name}_lower"], row[f"{name}_upper"] = 2 * row[name] - high, 2 * row[name] - low
    return row


def _variance_of(shifts: _Shifts, label: str, genes: np.ndarray) -> np.ndarray:
    """Of the mean of a label's cells; few cells that happen to agree (most often in zeros) vary as the controls do."""
    row = shifts.row[label]
    out: np.ndarray = np.maximum(shifts.se2[row], shifts.control_sd**2 / shifts.n[row])[genes]
    return out


def _some_single(
    shifts: _Shifts, singles: Sequence[str], genes: np.ndarray, X: np.ndarray, Xb: np.ndarray | None = None
) -> bool:
    """Whether the shift of any measured single stands out of its noise."""
    variance = np.array([_variance_of(shifts, t, genes) + shifts.shared_error(t, t)[genes] for t in singles])
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.nan_to_num(X[genes] / np.sqrt(variance.T), posinf=0.0, neginf=0.0)
    return bool(np.abs(z).max() > special.ndtri(1 - _SINGLE_GENE / (2 * z.size))) or any(
        _stands_out(X[genes, i], variance[i], None if Xb is None else Xb[:, genes, i]) for i in range(len(singles))
    )


def _seen(
    shifts: _Shifts,
    singles: Sequence[str],
    label: str,
    genes: np.ndarray,
    X: np.ndarray,
    y: np.ndarray,
    c: np.ndarray,
    Xb: np.ndarray | None,
    yb: np.ndarray | None,
    limits: Mapping[str, float],
) -> _Seen:
    """What of a measured combination stands out of its noise, over ``genes`` (chosen without regard to the shifts)."""
    some = _some_single(shifts, singles, genes, X, Xb)
    own, of_label = np.array([_variance_of(shifts, t, genes) for t in singles]), _variance_of(shifts, label, genes)
    control = shifts.shared_error(label, label)[genes]
    X, y = X[genes], y[genes]
    Xb, yb = (None, None) if Xb is None or yb is None else (Xb[:, genes], yb[:, genes])
    residual = y - X @ c
    # the controls are in all shifts
    weight = shifts.share[shifts.row[label]] - c @ shifts.share[[shifts.row[t] for t in singles]]
    noise = c**2 @ own + of_label + weight**2 @ shifts.control_se2[:, genes]
    beyond = _stands_out(residual, noise, None if Xb is None or yb is None else yb - Xb @ c)
    unit = np.where(of_label + control > 0, of_label + control, np.inf)
    left = float(((residual**2 - noise) / unit).sum())
    whole = float(((y**2 - of_label - control) / unit).sum())
    return _Seen(some, beyond and left >= (1 - limits["neomorphism_fit"]) * whole)


def evaluate_interactions(
    interactions: AnnData | pd.DataFrame, *, k: int = 20, key: str = K.INTERACTIONS
) -> pd.DataFrame:
    """How well predicted interactions agree with the measured ones.

    Parameters
    ----------
    interactions
        The AnnData after :func:`genetic_interactions` with ``predicted=``, or its table.
    k
        Combinations called synergistic (highest magnitude) and suppressive (lowest), as in BioDSNN's figure 7.
    key
        Where the table is.

    Returns
    -------
    DataFrame, one row per ``metric``: ``value``, ``chance`` (of a random ranking; NaN where it has no meaning) and
    ``n`` (combinations measured and predicted). Metrics: ``synergy_recovery`` and ``suppression_recovery`` (share of
    the k that are found), ``magnitude_pearson``, ``coefficients_pearson``, ``class_agreement`` (where the measured class is
    determined).

    Raises
    ------
    ScpertError
        If no combination is both measured and predicted.

    Examples
    --------
    >>> import pandas as pd
    >>> from scpert.tl import evaluate_interactions
    >>> row = dict(n_targets=2, c1=1.0, c2=0.5, magnitude=1.1)
    >>> rows = [
    ...     row | {"perturbation": p, "origin": o, "class": "additive"}
    ...     for p in ("A+B", "C+D")
    ...     for o in ("measured", "predicted")
    ... ]
    >>> evaluate_interactions(pd.DataFrame(rows), k=1)["n"].tolist()
    [2, 2, 2, 2, 2]
    """
    check_whole("k", k)
    if isinstance(interactions, pd.DataFrame):
        table = interactions
    elif key in interactions.uns:
        table = interactions.uns[key]
    else:
        raise MissingKeyError(
            f"adata.uns has no {key!r}. Call scpert.tl.genetic_interactions(adata, predicted=...) first."
        )
    parts = {o: table[table["origin"].astype(str) == o].set_index("perturbation") for o in ("measured", "predicted")}
    both = parts["measured"].index.intersection(parts["predicted"].index)
    if len(both) == 0:
        raise ScpertError(
            f"No combination is both measured ({len(parts['measured'])}) and predicted ({len(parts['predicted'])}). "
            "Call genetic_interactions(adata, predicted=...) with predictions of measured combinations."
        )
    true, guess = parts["measured"].loc[both], parts["predicted"].loc[both]
    size = {n: t["magnitude"] / np.sqrt(t["n_targets"]) for n, t in (("true", true), ("guess", guess))}
    n, top = len(both), int(min(k, len(both)))

    def found(highest: bool) -> float:
        sign = -1 if highest else 1
        order = [set(both[np.argsort(sign * size[x].to_numpy(), kind="stable")[:top]]) for x in ("true", "guess")]
        return len(order[0] & order[1]) / top

    def pearson(x: np.ndarray, y: np.ndarray) -> float:
        good = np.isfinite(x) & np.isfinite(y)
        x, y = x[good], y[good]
        return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan

    columns = [c for c in table.columns if c[:1] == "c" and c[1:].isdigit()]
    flat = [t[columns].to_numpy(dtype=float).ravel() for t in (true, guess)]
    told = (true["class"].astype(str) != "undetermined").to_numpy()
    same = true["class"].astype(str).to_numpy() == guess["class"].astype(str).to_numpy()
    agree = same[told].mean() if told.any() else np.nan
    rows = [
        ("synergy_recovery", found(True), top / n),
        ("suppression_recovery", found(False), top / n),
        ("magnitude_pearson", pearson(size["true"].to_numpy(), size["guess"].to_numpy()), 0.0),
        ("coefficients_pearson", pearson(*flat), 0.0),
        ("class_agreement", float(agree), np.nan),
    ]
    return pd.DataFrame([(*r, n) for r in rows], columns=["metric", "value", "chance", "n"]).set_index("metric")
