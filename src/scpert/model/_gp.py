"""A closed-form predictor of unseen perturbations from prior knowledge: Gaussian process, smoother, amplitude, limits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import linalg, optimize

from .._checks import check_positive, listing
from .._progress import progress
from ..data._perturbation import join, parse
from ..errors import LabelError, UnknownTargetError
from ._base import Prediction, Reference
from ._closed_form import KnowledgeModel
from ._knowledge import GeneFeatures, _embedding

__all__ = ["KnowledgeGP"]

logger = logging.getLogger("scpert")

#: Rows on which kernel weights, noise and limits are learned; more training perturbations than that are sampled.
MAX_LEARN = 1000
#: Components kept when ``rank`` is not given.
MAX_RANK = 150
COVERAGE = 0.9
_NOISE = np.geomspace(0.1, 1000.0, 25)
#: Levels of noise that components share where every level costs a factorisation of all rows.
MAX_LEVELS = 6


def _inverse(A: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric positive definite matrix."""
    factor = linalg.cholesky(A, lower=False, check_finite=False)
    upper = linalg.lapack.dpotri(factor, lower=0)[0]
    return np.triu(upper) + np.triu(upper, 1).T


def _alignment(
    F: np.ndarray, offset: np.ndarray, offset2: float, target: np.ndarray, dot: np.ndarray, length: np.ndarray
):
    """1 - mean cosine of ``offset + F`` with the observed rows, and its gradient in ``F``."""
    n = len(F)
    size = np.sqrt(offset2 + 2 * F @ offset + (F**2).sum(axis=1) + 1e-6 * (F**2).sum() / n + 1e-12)
    inner = dot + (F * target).sum(axis=1)
    loss = 1.0 - np.mean(inner / (size * length))
    gradient = -(target / (size * length)[:, None] - (inner / length / size**3)[:, None] * (F + offset)) / n
    return loss, gradient


def learn_weights(
    kernels: np.ndarray,
    scores: np.ndarray,
    rows: np.ndarray,
    mean: np.ndarray,
    axes: np.ndarray,
    noise: np.ndarray,
    steps: int = 30,
) -> np.ndarray:
    r"""Kernel weights with the least leave-one-out loss, by L-BFGS with an analytic gradient.

    The loss is the sum of the relative squared error, of 1 - mean cosine with the observed rows, and of the same after the
    mean is subtracted from both, all of the closed-form leave-one-out predictions
    :math:`r_i - [A^{-1}R]_i / [A^{-1}]_{ii}`, :math:`A = \sum_s \theta_s K_s + \mathrm{diag}(\text{noise})`.

    Parameters
    ----------
    kernels
        ``(kernel, row, row)``.
    scores
        Residual rows in the basis ``axes``, ``(row, component)``.
    rows, mean
        Observed rows ``(row, gene)`` and their mean ``(gene,)``.
    axes
        Orthonormal, ``(component, gene)``.
    noise
        Relative noise variance of each row, mean 1.
    """
    J, n = len(kernels), len(scores)
    total = (scores**2).sum() / n
    projected, offset = rows @ axes.T, mean @ axes.T
    dot, length = rows @ mean, np.linalg.norm(rows, axis=1) + 1e-12
    rest = np.linalg.norm(rows - mean, axis=1) + 1e-12
    nothing = np.zeros(scores.shape[1])

    def loss(log_theta: np.ndarray) -> tuple[float, np.ndarray]:
        theta = np.exp(log_theta)
        A = np.tensordot(theta, kernels, 1)
        A[np.diag_indices(n)] += noise
        inverse = _inverse(A)
        alpha, diagonal = inverse @ scores, np.diag(inverse)
        error = alpha / diagonal[:, None]
        F = scores - error
        raw, raw_gradient = _alignment(F, offset, float(mean @ mean), projected, dot, length)
        own, own_gradient = _alignment(F, nothing, 0.0, scores, np.zeros(n), rest)
        value = 0.5 * (error**2).sum() / n / total + raw + own
        by_error = error / n / total - raw_gradient - own_gradient
        left = inverse @ (by_error / diagonal[:, None])
        by_diagonal = (by_error * alpha).sum(axis=1) / diagonal**2
        by_A = -(left @ alpha.T) + (inverse * by_diagonal) @ inverse
        return value, np.tensordot(kernels, by_A, ([1, 2], [0, 1])) * theta

    start = np.full(J, np.log(0.5 / J))
    found = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(-9.0, 5.0)] * J, options={"maxiter": steps}
    )
    return np.exp(found.x)


def _smooth(similarity: np.ndarray, values: np.ndarray, mean: np.ndarray, floor: float) -> np.ndarray:
    """Mean of ``values`` weighted by similarity, the overall mean counting ``floor``."""
    total = similarity.sum(axis=1)[:, None] + floor
    return (similarity @ values + floor * mean) / total


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.einsum("ij,ij->i", a, b) / np.maximum(size, 1e-12)))


class KnowledgeGP(KnowledgeModel):
    r"""Predicts unseen perturbations from prior knowledge, in closed form.

    The effect of a perturbation is the mean effect, plus a Gaussian process over genes with one kernel per table and scale, cut
    to the leading components, plus noise:

    .. math:: \delta_p / s_p = m + V^\top f_p + \varepsilon_p, \quad
        f_{\cdot k} \sim \mathcal N\big(0, \textstyle\sum_s \theta_s K_s\big), \quad
        \varepsilon_{pk} \sim \mathcal N(0, \sigma_k^2 \nu_p)

    Kernel weights :math:`\theta`, the noise :math:`\sigma_k^2` of each component and all that follows come from closed-form
    leave-one-out predictions of the training perturbations, never from others: a local average over similar genes is mixed in
    with the share that fits best, the amplitude :math:`s_p` of a perturbation is predicted by the same average, and the limits
    are the quantiles of the leave-one-out errors, relative to the predicted amplitude and the posterior variance.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    knowledge
        Name -> table: annotations (``gene``, ``term``), a net (``source``, ``target``, optional ``weight``) or an embedding
        (genes as index, numbers as columns), e.g. the effects of another screen. A table that knows fewer than two training
        targets is ignored with a warning.
    rank
        Components of the training effects to keep; ``None``: at most 150.
    coexpression
        Add a kernel of the genes' own profiles over the training perturbations, for targets that are measured.
    coherence
        Weight terms of annotations and neighbours in nets by how alike the training effects of their genes are, instead of by
        information content. A gene's own effect has no part in the weights of its features.

    Notes
    -----
    A target that no table knows has exactly the mean effect and the status ``fallback``. A perturbation that was trained on has
    its own effect, shrunk to what the model would predict without it in proportion to its standard errors, where these are
    known. Combinations are sums over targets, times a scale, plus a low-rank interaction
    (ridge on :math:`u_a + u_b` and :math:`u_a \circ u_b`), both learned from training combinations by leave-one-out, and left out
    where they do not help. ``layers["lower"]`` and ``["upper"]`` hold 90 % limits for a new measurement of the effect,
    ``["std"]`` its standard deviation.

    Examples
    --------
    >>> import pandas as pd
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=6)
    >>> scpert.model.KnowledgeGP.setup_anndata(adata)
    >>> go = pd.DataFrame({"gene": list(adata.var_names), "term": ["x", "y"] * 20})
    >>> model = scpert.model.KnowledgeGP(adata, knowledge={"go": go})
    >>> model.train()
    >>> model.predict_perturbation(adata.var_names[-1]).obs["status"].iloc[0]
    'unseen'
    """

    _fitted = (
        "singles_", "theta_", "axes_", "centre_", "scale_row_", "alpha_", "noise_row_", "noise_component_", "learn_", "inverse_",
        "mix_", "power_", "floor_", "amplitude_", "low_", "high_", "gene_sd_", "spread_", "quantile_", "loo_", "interaction_",
        "kernel_names_",
    )  # fmt: skip

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        knowledge: Mapping[str, pd.DataFrame] | None = None,
        rank: int | None = None,
        coexpression: bool = False,
        coherence: bool = True,
    ):
        super().__init__(adata, registry)
        self._remember(locals())
        self.knowledge = knowledge
        self.rank = None if rank is None else int(check_positive("rank", rank))
        self.coexpression = coexpression
        self.coherence = coherence
        _ = self._features

    # ------------------------------------------------------------------------------------------ kernels

    @property
    def _tables(self) -> list[GeneFeatures]:
        tables = list((self._weighted if self.coherence else self._used).values())
        return [*tables, self._own] if self.coexpression else tables

    @cached_property
    def _weighted(self) -> dict[str, GeneFeatures]:
        """The tables, features weighted by the coherence of the training effects."""
        if len(self.singles_) == 0 or len(self.axes_) == 0:
            return self._used
        e = self.effects_
        residual = e.delta[[e.singles[t] for t in self.singles_]] / self.scale_row_[:, None] - self.centre_
        unit = residual @ self.axes_.T / np.maximum(np.linalg.norm(residual, axis=1), 1e-12)[:, None]
        return {name: f.coherent(list(self.singles_), unit) for name, f in self._used.items()}

    @property
    def _own(self) -> GeneFeatures:
        """Genes by their profiles over the training perturbations, within their leading components."""
        if "_own_features" not in self.__dict__:
            u, s, vt = np.linalg.svd(self.effects_.delta - self.effects_.mean, full_matrices=False)
            k = max(1, min(20, len(s) - 1))
            self.__dict__["_own_features"] = _embedding(
                "coexpression", pd.DataFrame((vt[:k].T * s[:k]), index=self.genes_)
            )
        return self.__dict__["_own_features"]

    def _learn_reference(self, random_state: int = 0) -> None:
        super()._learn_reference(random_state)
        self.__dict__.pop("_own_features", None)
        self.__dict__.pop("_weighted", None)

    def _informed(self, target: str) -> bool:
        return super()._informed(target) or (self.coexpression and target in self._own.known)

    def _stack(self, a: list[str], b: list[str]) -> np.ndarray:
        """All kernels between two sets of genes, ``(kernel, a, b)``; the last is constant."""
        out = []
        for f in self._tables:
            k = f.kernel(a, b)
            out += [k, k**2]
        out.append(np.ones((len(a), len(b))))
        return np.stack(out)

    def _similarity(self, stack: np.ndarray) -> np.ndarray:
        """Non-negative similarity of the local average, from the weighted kernels but the constant one."""
        weight = self.theta_[:-1] / max(self.theta_[:-1].sum(), 1e-12)
        return np.maximum(np.tensordot(weight, stack[:-1], 1), 0.0) ** self.power_

    # ------------------------------------------------------------------------------------------ fit

    def _fit(self) -> None:
        e = self.effects_
        self.singles_ = np.array([t for t in sorted(e.singles) if self._informed(t)], dtype=object)
        self.low_, self.high_ = e.delta.min(axis=0), e.delta.max(axis=0)
        self.loo_ = np.zeros((0, self.n_genes), dtype=np.float32)
        self._reset()
        if len(self.singles_) >= 3:
            self._fit_process(e.delta[[e.singles[t] for t in self.singles_]].astype(np.float64))
        else:
            if self._tables:
                logger.warning(
                    "KnowledgeGP: fewer than 3 training targets are in the knowledge: unseen ones have the mean effect"
                )
            self.singles_ = self.singles_[:0]
        self._fit_interaction()

    def _reset(self) -> None:
        g = self.n_genes
        self.kernel_names_ = np.array(
            [f"{name}{x}" for name in [*self._used, *["coexpression"] * self.coexpression] for x in ("", "^2")]
            + ["constant"],
            dtype=object,
        )
        self.theta_ = np.zeros(len(self.kernel_names_))
        self.axes_, self.centre_ = np.zeros((0, g)), np.zeros(g)
        self.scale_row_, self.noise_row_, self.noise_component_ = np.ones(0), np.ones(0), np.ones(0)
        self.alpha_, self.inverse_, self.learn_ = np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0, dtype=np.int64)
        self.mix_, self.power_, self.floor_ = 1.0, 1.0, 0.1
        self.amplitude_ = np.array([1.0, 0.0])
        self.gene_sd_, self.spread_, self.quantile_ = np.ones(g), np.array([1.0, 0.0, 0.0]), np.ones(g)

    def _row_noise(self, residual2: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Relative noise of rows from their standard errors, or from cell numbers; mean 1."""
        e = self.effects_
        rows = [e.singles[t] for t in self.singles_]
        with np.errstate(invalid="ignore"):
            error2 = np.nansum(e.std_error[rows].astype(np.float64) ** 2, axis=1) / scale**2
        unknown = ~np.isfinite(e.std_error[rows]).any(axis=1)
        if unknown.all():
            n = np.maximum(e.n_cells[rows].astype(np.float64), 1.0)
            if np.ptp(n) == 0:
                return np.ones(len(rows))
            error2 = np.quantile(residual2 * n, 0.1) / n
        elif unknown.any():
            error2[unknown] = error2[~unknown].max()
        signal = max(float(np.mean(np.maximum(residual2 - error2, 0.0))), 0.05 * float(np.mean(residual2)), 1e-12)
        noise = signal + error2
        return noise / noise.mean()

    def _fit_process(self, delta: np.ndarray) -> None:
        n = len(delta)
        length = np.linalg.norm(delta, axis=1)
        positive = length[length > 0]
        if len(positive) == 0:  # nothing happens in this screen: the mean, zero, is all there is to say
            self.singles_ = self.singles_[:0]
            return
        typical = np.exp(np.log(positive).mean())
        amplitude = np.maximum(length / typical, 0.05)
        self.scale_row_ = np.sqrt(amplitude)
        rows = delta / self.scale_row_[:, None]
        self.centre_ = rows.mean(axis=0)
        residual = rows - self.centre_
        rng = np.random.default_rng(self.random_state_)
        self.learn_ = np.arange(n) if n <= MAX_LEARN else np.sort(rng.choice(n, MAX_LEARN, replace=False))
        self.axes_ = _principal_axes(residual, min(self.rank or MAX_RANK, n - 1, delta.shape[1]), rng)
        self.__dict__.pop("_weighted", None)
        scores = residual @ self.axes_.T
        self.noise_row_ = self._row_noise((residual**2).sum(axis=1), self.scale_row_)

        L = self.learn_
        names = list(self.singles_)
        small = [names[i] for i in L]
        stack = self._stack(small, small)
        scale = max(float(np.sqrt((scores**2).sum() / n)), 1e-12)
        if scale <= 1e-9:
            self.singles_ = self.singles_[:0]
            return
        self.theta_ = learn_weights(
            stack, scores[L] / scale, rows[L] / scale, self.centre_ / scale, self.axes_, self.noise_row_[L]
        )
        root = np.sqrt(self.noise_row_[L])
        whitened = np.tensordot(self.theta_, stack, 1) / np.outer(root, root)
        values, vectors = np.linalg.eigh(whitened)
        values = np.maximum(values, 0.0)
        rotated = vectors.T @ (scores[L] / root[:, None])
        loo, choice = self._component_noise(values, vectors, rotated, root, len(_NOISE) if len(L) == n else MAX_LEVELS)
        self.noise_component_ = _NOISE[choice]
        if len(L) == n:
            inner = rotated / (values[:, None] + self.noise_component_)
            self.alpha_ = (vectors @ inner) / root[:, None]
        else:
            self.alpha_ = self._solve_all(names, scores)
        level = float(np.median(self.noise_component_))
        self.inverse_ = ((vectors / (values + level)) @ vectors.T) / np.outer(root, root)
        self._fit_rest(delta[L], rows[L], amplitude[L], stack, scores[L] - loo)

    def _component_noise(
        self,
        values: np.ndarray,
        vectors: np.ndarray,
        rotated: np.ndarray,
        root: np.ndarray,
        n_levels: int = len(_NOISE),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leave-one-out errors ``(row, component)`` at the best noise of each component, and which that is.

        At most ``n_levels`` different levels are used, added one by one as they reduce the summed error most.
        """
        errors = []
        for noise in _NOISE:
            h = 1.0 / (values + noise)
            errors.append((vectors @ (h[:, None] * rotated)) / ((vectors**2) @ h)[:, None] * root[:, None])
        stacked = np.stack(errors)
        losses = (stacked**2).mean(axis=1)
        if n_levels < len(_NOISE):
            kept: list[int] = []
            best = np.full(losses.shape[1], np.inf)
            for _ in range(n_levels):
                kept.append(int(np.minimum(losses, best).sum(axis=1).argmin()))
                best = np.minimum(best, losses[kept[-1]])
            levels = np.unique(kept)
            choice = levels[losses[levels].argmin(axis=0)]
        else:
            choice = losses.argmin(axis=0)
        return stacked[choice, :, np.arange(len(choice))].T, choice

    def _solve_all(self, names: list[str], scores: np.ndarray) -> np.ndarray:
        """Dual coefficients for all rows, by one Cholesky factor per level of noise."""
        n = len(names)
        A = np.zeros((n, n), dtype=np.float32)
        step = 1024
        for start in range(0, n, step):
            part = names[start : start + step]
            A[start : start + step] = np.tensordot(self.theta_, self._stack(part, names), 1)
        A = 0.5 * (A + A.T)
        alpha = np.zeros_like(scores)
        for level in progress(
            np.unique(self.noise_component_), description="solve for all perturbations", unit="level"
        ):
            group = np.flatnonzero(self.noise_component_ == level)
            B = A.copy()
            B[np.diag_indices(n)] += (level * self.noise_row_).astype(np.float32)
            factor = linalg.cho_factor(B, lower=True, overwrite_a=True, check_finite=False)
            alpha[:, group] = linalg.cho_solve(factor, scores[:, group].astype(np.float32), check_finite=False)
        return alpha

    def _fit_rest(
        self, delta: np.ndarray, rows: np.ndarray, amplitude: np.ndarray, stack: np.ndarray, loo_scores: np.ndarray
    ) -> None:
        """Local average, amplitude and limits, from leave-one-out predictions of the learning rows."""
        n = len(delta)
        process = self.centre_ + loo_scores @ self.axes_
        flat = self.centre_ + ((rows - self.centre_) @ self.axes_.T) @ self.axes_
        best = (-np.inf, 1.0, 1.0, 0.1)
        mean = delta.mean(axis=0)
        for power in (1.0, 2.0):
            self.power_ = power
            S = self._similarity(stack)
            S[np.diag_indices(n)] = 0.0
            floor = 0.1 * float(np.median(S.sum(axis=1))) / 10
            local = _smooth(S, flat, self.centre_, max(floor, 1e-6))
            for mix in (0.25, 0.5, 0.75, 1.0):
                D = mix * process + (1 - mix) * local
                value = _mean_cosine(D, rows) + _mean_cosine(D - self.centre_, rows - self.centre_)
                if value > best[0] + 1e-6:
                    best = (value, power, mix, max(floor, 1e-6))
        _, self.power_, self.mix_, self.floor_ = best
        S = self._similarity(stack)
        S[np.diag_indices(n)] = 0.0
        D = self.mix_ * process + (1 - self.mix_) * _smooth(S, flat, self.centre_, self.floor_)
        size = _smooth(S, amplitude[:, None], np.array([amplitude.mean()]), self.floor_)[:, 0]
        self.amplitude_ = _amplitude_weights(D, size, delta, amplitude)
        predicted = np.clip((self.amplitude_[0] + self.amplitude_[1] * size)[:, None] * D, self.low_, self.high_)
        error = delta - predicted
        prior = np.diag(np.tensordot(self.theta_, stack, 1))
        variance = np.maximum(1.0 / np.diag(self.inverse_) - float(np.median(self.noise_component_)), 0.0)
        self.gene_sd_ = np.sqrt(np.maximum((error**2).mean(axis=0), 1e-20))
        relative = ((error / self.gene_sd_) ** 2).mean(axis=1)
        features = np.column_stack([np.ones(n), size**2, size**2 * np.minimum(variance, prior)])
        self.spread_ = optimize.nnls(features / relative[:, None].clip(0.1), relative / relative.clip(0.1))[0]
        if not self.spread_.any():
            self.spread_ = np.array([1.0, 0.0, 0.0])
        sd = np.sqrt(np.maximum(features @ self.spread_, 1e-6))[:, None] * self.gene_sd_
        ratio = np.abs(error) / sd
        level = min(1.0, COVERAGE * (n + 1) / n)
        pooled = float(np.quantile(ratio, level))
        self.quantile_ = np.quantile(ratio, level, axis=0) if n >= 200 else np.full(delta.shape[1], pooled)
        self.loo_ = np.zeros((len(self.singles_), delta.shape[1]), dtype=np.float32)
        self.loo_[self.learn_] = predicted
        rest = np.setdiff1d(np.arange(len(self.singles_)), self.learn_)
        self.loo_[rest] = mean
        del mean

    # ------------------------------------------------------------------------------------------ combinations

    def _fit_interaction(self) -> None:
        e = self.effects_
        doubles = [i for i, t in enumerate(e.targets) if len(t) == 2 and all(x in e.singles for x in t)]
        self.interaction_: dict[str, Any] = {"scale": 1.0, "used": False}
        if len(doubles) < 4:
            return
        base = np.stack([e.delta[[e.singles[x] for x in e.targets[i]]].sum(axis=0) for i in doubles]).astype(np.float64)
        truth = e.delta[doubles].astype(np.float64)
        cross, square = (base * truth).sum(axis=1), (base**2).sum(axis=1)
        left = np.clip((cross.sum() - cross) / np.maximum(square.sum() - square, 1e-12), 0.0, 1.5)
        additive = ((truth - base) ** 2).sum()
        errors = truth - left[:, None] * base
        if (errors**2).sum() >= additive:
            return
        scale = float(np.clip(cross.sum() / max(square.sum(), 1e-12), 0.0, 1.5))
        self.interaction_ = {"scale": scale, "used": False}
        axes = _principal_axes(
            e.delta.astype(np.float64) - e.mean, min(10, len(e.labels) - 1), np.random.default_rng(0)
        )
        phi = np.stack([self._pair_features(axes, e.targets[i][0], e.targets[i][1]) for i in doubles])
        norm = max(float(np.sqrt((phi**2).sum() / len(phi))), 1e-12)
        phi /= norm
        values, vectors = np.linalg.eigh(phi @ phi.T)
        residual = truth - scale * base
        rotated = vectors.T @ residual
        grid = np.geomspace(1e-2, 1e3, 16)
        losses = []
        for ridge in grid:
            h = 1.0 / (np.maximum(values, 0.0) + ridge)
            losses.append((((vectors @ (h[:, None] * rotated)) / ((vectors**2) @ h)[:, None]) ** 2).sum())
        if min(losses) < 0.98 * (residual**2).sum():
            ridge = grid[int(np.argmin(losses))]
            dual = vectors @ (rotated / (np.maximum(values, 0.0) + ridge)[:, None])
            weights = (phi.T @ dual) / norm
            self.interaction_ = {"scale": scale, "used": True, "axes": axes, "weights": weights}

    def _pair_features(
        self, axes: np.ndarray, a: str, b: str, shifts: dict[str, np.ndarray] | None = None
    ) -> np.ndarray:
        e = self.effects_
        u, v = ((shifts[x] if shifts else e.delta[e.singles[x]]) @ axes.T for x in (a, b))
        size = np.sqrt(np.mean(u**2) * np.mean(v**2)) ** 0.5 + 1e-12
        return np.concatenate([u + v, u * v / size])

    # ------------------------------------------------------------------------------------------ prediction

    def _predict_unseen(self, targets: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Shift and standard deviation of single targets."""
        e = self.effects_
        names = list(self.singles_)
        if not names:
            return np.tile(e.mean, (len(targets), 1)), np.full((len(targets), self.n_genes), np.nan)
        rows = e.delta[[e.singles[t] for t in names]] / self.scale_row_[:, None]
        flat = self.centre_ + ((rows - self.centre_) @ self.axes_.T) @ self.axes_
        amplitude = self.scale_row_**2
        shift = np.empty((len(targets), self.n_genes))
        sd = np.empty_like(shift)
        for start in range(0, len(targets), 256):
            part = targets[start : start + 256]
            stack = self._stack(part, names)
            cross = np.tensordot(self.theta_, stack, 1)
            S = self._similarity(stack)
            D = self.centre_ + (cross @ self.alpha_) @ self.axes_
            D = self.mix_ * D + (1 - self.mix_) * _smooth(S, flat, self.centre_, self.floor_)
            size = _smooth(S, amplitude[:, None], np.array([amplitude.mean()]), self.floor_)[:, 0]
            shift[start : start + 256] = (self.amplitude_[0] + self.amplitude_[1] * size)[:, None] * D
            prior = np.array([float(self.theta_ @ self._stack([t], [t])[:, 0, 0]) for t in part])
            near = cross[:, self.learn_]
            variance = np.clip(prior - np.einsum("ij,jk,ik->i", near, self.inverse_, near, optimize=True), 0.0, prior)
            features = np.column_stack([np.ones(len(part)), size**2, size**2 * variance])
            sd[start : start + 256] = np.sqrt(np.maximum(features @ self.spread_, 1e-6))[:, None] * self.gene_sd_
        return np.clip(shift, self.low_, self.high_), sd

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        e = self.effects_
        names = sorted({x for t in targets for x in t})
        unseen = [x for x in names if x not in e.singles and self._informed(x)]
        shifts: dict[str, np.ndarray] = {}
        sds: dict[str, np.ndarray] = {}
        if unseen:
            shift, sd = self._predict_unseen(unseen)
            shifts, sds = dict(zip(unseen, shift, strict=True)), dict(zip(unseen, sd, strict=True))
        for x in names:
            if x in e.singles:
                shifts[x], sds[x] = self._posterior(x)
            elif x not in shifts:
                shifts[x], sds[x] = e.mean, e.delta.std(axis=0)
        n = len(targets)
        delta, std, half = (np.empty((n, self.n_genes), dtype=np.float32) for _ in range(3))
        fallback = np.zeros(n, dtype=bool)
        for i, t in enumerate(targets):
            row = e.row.get(join(t, self.control_))
            if row is not None:
                delta[i], std[i] = self._posterior(t[0]) if len(t) == 1 else (e.delta[row], e.std_error[row])
                half[i] = 1.645 * std[i]
                continue
            total = np.sum([shifts[x] for x in t], axis=0)
            if len(t) > 1:
                total = self.interaction_["scale"] * total
                if self.interaction_["used"] and len(t) == 2:
                    pair = self._pair_features(self.interaction_["axes"], t[0], t[1], shifts=shifts)
                    total = total + pair @ self.interaction_["weights"]
            delta[i] = total
            std[i] = np.sqrt(np.sum([sds[x] ** 2 for x in t], axis=0))
            half[i] = std[i] * (self.quantile_ if any(x in unseen for x in t) else 1.645)
            fallback[i] = not all(self._covers(x) for x in t)
        lower, upper = delta - half, delta + half
        return Prediction(delta, std, lower, upper, fallback)

    def _posterior(self, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Own effect of a trained target, shrunk by its standard errors to the leave-one-out prediction."""
        e = self.effects_
        row = e.singles[target]
        own, error = e.delta[row].astype(np.float64), e.std_error[row].astype(np.float64)
        where = np.flatnonzero(self.singles_ == target)
        if len(where) == 0 or not np.isfinite(error).any():
            return own, error
        prior2 = np.maximum(self.gene_sd_**2 - np.nanmedian(e.std_error**2, axis=0), 0.1 * self.gene_sd_**2)
        error2 = np.where(np.isfinite(error), error**2, 0.0)
        weight = prior2 / (prior2 + error2)
        return weight * own + (1 - weight) * self.loo_[where[0]], np.sqrt(weight * error2)

    # ------------------------------------------------------------------------------------------ explanation

    def explain(self, perturbation: str, *, n_top: int | None = 20) -> pd.DataFrame:
        """Which training perturbations and which kernels carry a prediction.

        Parameters
        ----------
        perturbation
            A target, or a combination (a block of rows for each target).
        n_top
            Rows to keep for each target, by absolute share; ``None``: all.

        Returns
        -------
        DataFrame with columns ``target``, ``training`` (training perturbation), ``kernel`` (name of the table; ``constant`` for
        what all genes of the tables share), ``similarity`` (kernel value), ``weight`` (kernel weight times similarity) and
        ``share``: contribution to the process's deviation from the mean, projected on it; the shares of a target sum to 1.

        Raises
        ------
        UnknownTargetError
            If a target is in no table.
        """
        self._check_trained()
        targets = parse(perturbation, self.control_)
        if not targets:
            raise LabelError(f"{perturbation!r} is the control: it has no prediction to explain.")
        missing = [t for t in targets if not self._informed(t)]
        if missing or len(self.singles_) == 0:
            raise UnknownTargetError(
                f"{listing(missing or targets)}: no table of knowledge that is in use tells anything of it, so its prediction is the "
                "mean effect. Give knowledge with this gene.",
                tuple(missing or targets),
            )
        names = list(self.singles_)
        blocks = []
        for t in targets:
            stack = self._stack([t], names)[:, 0]  # (kernel, training)
            use = np.array([n != t for n in names])
            parts = (self.theta_[:, None] * stack) * use
            deviation = parts.sum(axis=0) @ self.alpha_
            inner = self.alpha_ @ deviation
            share = parts * inner / max(float(deviation @ deviation), 1e-30)
            n_kernels = len(self._tables)
            labels = [f.name for f in self._tables] + ["constant"]
            for j in range(n_kernels + 1):
                pick = [2 * j, 2 * j + 1] if j < n_kernels else [len(stack) - 1]
                blocks.append(
                    pd.DataFrame(
                        {
                            "target": t,
                            "training": names,
                            "kernel": labels[j],
                            "similarity": stack[pick[0]],
                            "weight": parts[pick].sum(axis=0),
                            "share": share[pick].sum(axis=0),
                        }
                    )
                )
        table = pd.concat(blocks, ignore_index=True)
        table = table[table["weight"] != 0]
        order = table["share"].abs().sort_values(ascending=False, kind="stable").index
        table = table.loc[order]
        if n_top is not None:
            table = table.groupby("target", sort=False).head(n_top)
        return table.sort_values("target", kind="stable").reset_index(drop=True)

    def kernel_weights(self) -> pd.DataFrame:
        """Learned weight of every table: its kernel and the squared one, and the share of the prior variance."""
        self._check_trained()
        rows = [(f.name, f.kind, *self.theta_[2 * j : 2 * j + 2]) for j, f in enumerate(self._tables)]
        rows.append(("constant", "constant", self.theta_[-1], 0.0))
        out = pd.DataFrame(rows, columns=["table", "kind", "linear", "squared"]).set_index("table")
        total = out[["linear", "squared"]].to_numpy().sum(axis=1)
        return out.assign(share=total / max(total.sum(), 1e-30))


def _principal_axes(residual: np.ndarray, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Leading right singular vectors ``(rank, gene)``: exact for small matrices, by random projection for large ones."""
    rank = max(1, min(rank, *residual.shape))
    if min(residual.shape) <= 2000:
        return np.linalg.svd(residual, full_matrices=False)[2][:rank]
    q = residual @ rng.standard_normal((residual.shape[1], rank + 20))
    for _ in range(3):
        q = np.linalg.qr(residual @ (residual.T @ np.linalg.qr(q)[0]))[0]
    return np.linalg.svd(q.T @ residual, full_matrices=False)[2][:rank]


def _amplitude_weights(D: np.ndarray, size: np.ndarray, delta: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """``(a, b)`` such that ``(a + b size) D`` is nearest to ``delta``; ``b = 0`` where amplitudes do not differ."""
    inner, square = (D * delta).sum(axis=1), (D**2).sum(axis=1)
    if np.std(np.log(amplitude)) < 0.05 or len(D) < 20:
        return np.array([np.clip(inner.sum() / max(square.sum(), 1e-30), 0.0, 3.0), 0.0])
    features = np.column_stack([np.ones(len(size)), size])
    gram = (features * square[:, None]).T @ features
    gram += 1e-6 * np.trace(gram) * np.eye(2)
    a, b = np.linalg.solve(gram, features.T @ inner)
    return np.array([a, b])
