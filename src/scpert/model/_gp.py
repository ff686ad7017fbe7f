"""A closed-form predictor of unseen perturbations from prior knowledge: Gaussian process, local average, amplitude, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import linalg, ndimage, optimize

from .._checks import check_whole, listing
from .._progress import progress
from ..data._perturbation import join, parse
from ..errors import LabelError, UnknownTargetError
from ._base import Prediction, Reference
from ._closed_form import KnowledgeModel
from ._knowledge import GeneFeatures, _embedding
from ._response import NORMAL_90, Response, fit_response, limit_widths, spread

__all__ = ["KnowledgeGP"]

logger = logging.getLogger("scpert")

_FEWEST_DOUBLES = 4
#: Rows on which weights, noise and limits are learned; more training perturbations than that are sampled.
MAX_LEARN = 1000
#: Components kept when ``rank`` is not given.
MAX_RANK = 150
#: Folds of the training perturbations from which everything is learned; of few perturbations, twice as many.
N_FOLDS = 5
_NOISE = np.geomspace(0.1, 1000.0, 25)
#: Levels of noise that components share where every level costs a factorisation of all rows.
MAX_LEVELS = 6
#: Powers of a table's kernel in the local average.
_POWERS = (1, 2, 4)
#: Squared standard errors by which held-out rows come nearer than their mean without any signal, as weights were chosen on
#: the same rows: 0.7 to 1.6 on average where it was measured.
_BY_CHANCE = 1.5
#: Neighbouring components over which noise and gain are pooled.
_WINDOW = 9


@dataclass
class _Fold:
    """Perturbations held out, and the others as they are seen without them.

    Attributes
    ----------
    train, test
        Rows.
    centre, axes
        Mean of the training rows, ``(gene,)``, and their principal axes, ``(component, gene)``.
    scores
        Training rows without the centre on the axes, ``(train, component)``.
    rows
        Observed rows that are held out, ``(test, gene)``.
    noise
        Relative noise of the training rows.
    among, across
        Kernels of the process among training rows and from held-out to training rows, ``(kernel, row, train)``.
    near
        Similarities of the local average, ``(similarity, test, train)``.
    """

    train: np.ndarray
    test: np.ndarray
    centre: np.ndarray
    axes: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    noise: np.ndarray
    among: np.ndarray
    across: np.ndarray
    near: np.ndarray

    @cached_property
    def target(self) -> np.ndarray:
        """Held-out rows on the axes of the others, ``(test, component)``."""
        return (self.rows - self.centre) @ self.axes.T

    @cached_property
    def squares(self) -> float:
        """Sum of squares of the held-out rows around the others' mean."""
        return float(((self.rows - self.centre) ** 2).sum())

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, ...]:
        rest = self.rows - self.centre
        return (
            self.rows @ self.axes.T, self.centre @ self.axes.T, self.rows @ self.centre,
            np.linalg.norm(self.rows, axis=1) + 1e-12, np.linalg.norm(rest, axis=1) + 1e-12,
        )  # fmt: skip

    def loss(self, F: np.ndarray, total: float, n: int) -> tuple[float, np.ndarray]:
        """Half the relative squared error plus two times 1 - cosine, of predicted scores, and its gradient in them.

        ``total`` is the sum of squares and ``n`` the number of rows of all folds.
        """
        projected, offset, dot, length, rest = self._lengths
        error = self.target - F
        raw, raw_gradient = _alignment(F, offset, float(self.centre @ self.centre), projected, dot, length)
        nothing, zeros = np.zeros(len(offset)), np.zeros(len(F))
        own, own_gradient = _alignment(F, nothing, 0.0, self.target, zeros, rest)
        share = len(F) / n
        value = 0.5 * float((error**2).sum()) / total + share * (raw + own)
        return value, -error / total + share * (raw_gradient + own_gradient)


def _alignment(
    F: np.ndarray, offset: np.ndarray, offset2: float, target: np.ndarray, dot: np.ndarray, length: np.ndarray
) -> tuple[float, np.ndarray]:
    """1 - mean cosine of ``offset + F`` with the observed rows, and its gradient in ``F``."""
    n = len(F)
    size = np.sqrt(offset2 + 2 * F @ offset + (F**2).sum(axis=1) + 1e-6 * (F**2).sum() / n + 1e-12)
    inner = dot + (F * target).sum(axis=1)
    loss = 1.0 - float(np.mean(inner / (size * length)))
    gradient = -(target / (size * length)[:, None] - (inner / length / size**3)[:, None] * (F + offset)) / n
    return loss, gradient


def _totals(folds: list[_Fold]) -> tuple[float, int]:
    return max(sum(f.squares for f in folds), 1e-30), sum(len(f.test) for f in folds)


def process_loss(log_theta: np.ndarray, folds: list[_Fold]) -> tuple[float, np.ndarray]:
    r"""Loss of the Gaussian process on held-out rows, and its gradient in the logs of the kernel weights.

    The rows of a fold are predicted by :math:`K_{fr} (K_{rr} + \mathrm{diag}\,\nu_r)^{-1} R_r` from the other rows r,
    :math:`K = \sum_s \theta_s K_s`.
    """
    theta = np.exp(log_theta)
    total, n = _totals(folds)
    value, gradient = 0.0, np.zeros(len(theta))
    for f in folds:
        A = np.tensordot(theta, f.among, 1)
        A[np.diag_indices(len(A))] += f.noise
        factor = linalg.cho_factor(A, lower=True, overwrite_a=True, check_finite=False)
        alpha = linalg.cho_solve(factor, f.scores, check_finite=False)
        across = np.tensordot(theta, f.across, 1)
        part, G = f.loss(across @ alpha, total, n)
        back = linalg.cho_solve(factor, across.T @ G, check_finite=False)
        value += part
        gradient += np.tensordot(f.across, G @ alpha.T, ([1, 2], [0, 1]))
        gradient -= np.tensordot(f.among, back @ alpha.T, ([1, 2], [0, 1]))
    return value, gradient * theta


def average_loss(log_weights: np.ndarray, folds: list[_Fold]) -> tuple[float, np.ndarray]:
    """Loss of the local average on held-out rows, and its gradient in the logs of the weights; the last is the floor."""
    weights = np.exp(log_weights)
    total, n = _totals(folds)
    value, gradient = 0.0, np.zeros(len(weights))
    for f in folds:
        S = np.tensordot(weights[:-1], f.near, 1)
        size = S.sum(axis=1)[:, None] + weights[-1]
        F = (S @ f.scores) / size
        part, G = f.loss(F, total, n)
        value += part
        shrink = (G * F).sum(axis=1)[:, None] / size
        gradient[:-1] += np.tensordot(f.near, (G @ f.scores.T) / size - shrink, ([1, 2], [0, 1]))
        gradient[-1] -= shrink.sum()
    return value, gradient * weights


def _minimise(loss: Callable, folds: list[_Fold], start: np.ndarray, steps: int) -> np.ndarray:
    bounds = [(-12.0, 9.0)] * len(start)
    found = optimize.minimize(
        loss, start, args=(folds,), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps}
    )
    return np.exp(found.x)


def _pooled(values: np.ndarray) -> np.ndarray:
    """Means over neighbouring components (last axis)."""
    return ndimage.uniform_filter1d(values, _WINDOW, axis=-1, mode="nearest")


def _smooth(similarity: np.ndarray, values: np.ndarray, mean: np.ndarray | float, floor: float) -> np.ndarray:
    """Mean of ``values`` weighted by similarity, the overall mean counting ``floor``."""
    total = similarity.sum(axis=1)[:, None] + floor
    return (similarity @ values + floor * mean) / total


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.einsum("ij,ij->i", a, b) / np.maximum(size, 1e-12)))


def _drawn_sd(errors: np.ndarray, prior_rows: float = 10.0) -> np.ndarray:
    """Root mean square of each gene's errors ``(row, gene)``, drawn to that of all genes with the weight of some rows."""
    square = errors**2
    out: np.ndarray = np.sqrt((square.sum(axis=0) + prior_rows * square.mean()) / (len(errors) + prior_rows))
    return out


class KnowledgeGP(KnowledgeModel):
    r"""Predicts unseen perturbations from prior knowledge, in closed form.

    The effect of a perturbation is the mean effect, plus a Gaussian process over genes with one kernel per table and scale, cut
    to the leading components, plus noise:

    .. math:: \delta_p / s_p = m + V^\top f_p + \varepsilon_p, \quad
        f_{\cdot k} \sim \mathcal N\big(0, \textstyle\sum_s \theta_s K_s\big), \quad
        \varepsilon_{pk} \sim \mathcal N(0, \sigma_k^2 \nu_p)

    A local average over similar genes, :math:`\sum_j S_{pj} \delta_j / (\sum_j S_{pj} + \phi)` with
    :math:`S = \sum_s (\nu_{s1} K_s + \nu_{s2} K_s^2 + \nu_{s4} K_s^4)`, is mixed in. All weights, the floor :math:`\phi`, the
    noise :math:`\sigma_k^2` and the gain of each component, the share of the mixture, the amplitude :math:`s_p` (predicted by
    the same average), the response of each gene to its predicted deviation (a slope, and a smooth surface), how far the
    predictions are trusted beyond the mean, and the limits (quantiles of the errors, relative to the predicted amplitude and the
    posterior variance) are learned from training perturbations that were held out in folds: axes, features and means of a fold
    come from its other perturbations alone.

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
    A target that no table knows has exactly the mean effect and the status ``fallback``. ``trust_`` in [0, 1] says how
    far the knowledge is followed; at 0 every unseen target has exactly the mean, but for its own gene. What a perturbation does to its own
    gene is not learned from: it says nothing of related targets; the own gene of an unseen target moves as those of the
    trained ones do on average. A perturbation that was trained on has its own effect,
    shrunk to what the model would predict without it in proportion to its standard errors, where these are known.
    Combinations are sums over targets, times a scale, plus a low-rank interaction (ridge on :math:`u_a + u_b` and
    :math:`u_a \circ u_b`), both learned from training combinations by leave-one-out, and left out where they do not
    help; if all targets are unseen, as far as the knowledge is trusted, and the mean once for the rest.
    ``layers["lower"]`` and ``["upper"]`` hold 90 % limits for a new measurement of the effect (of a trained perturbation, with as
    many cells), ``["std"]`` its standard deviation (of a trained one, that of the effect). Those of combinations of trained targets
    come from left-out training doubles; with fewer than four of these nothing is known of how far effects add up, and the limits are
    NaN, as are those of more than two trained targets.

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
        "double_sd_",
        "singles_", "theta_", "similarity_weights_", "axes_", "centre_", "scale_row_", "alpha_", "scores_", "noise_row_",
        "noise_component_", "gain_", "response_", "trust_", "learn_", "inverse_", "mix_", "floor_", "amplitude_", "low_", "high_", "gene_sd_", "spread_",
        "quantile_", "held_out_", "interaction_", "kernel_names_",
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
        self.rank = None if rank is None else check_whole("rank", rank)
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
        """The tables, features weighted by the coherence of all training effects."""
        if len(self.singles_) == 0 or len(self.axes_) == 0:
            return self._used
        e = self.effects_
        rows = e.without_own()[[e.singles[t] for t in self.singles_]] / self.scale_row_[:, None]
        return self._coherent(list(self.singles_), rows - self.centre_, self.axes_)

    def _coherent(self, names: list[str], residual: np.ndarray, axes: np.ndarray) -> dict[str, GeneFeatures]:
        unit = residual @ axes.T / np.maximum(np.linalg.norm(residual, axis=1), 1e-12)[:, None]
        return {name: f.coherent(names, unit) for name, f in self._used.items()}

    @property
    def _own(self) -> GeneFeatures:
        """Genes by their profiles over the training perturbations, within their leading components."""
        if "_own_features" not in self.__dict__:
            effects = self.effects_.without_own()
            self.__dict__["_own_features"] = self._profiles(effects - effects.mean(axis=0))
        return self.__dict__["_own_features"]

    def _profiles(self, centred: np.ndarray) -> GeneFeatures:
        """Genes by the leading components of their profiles over perturbations."""
        s, vt = np.linalg.svd(centred, full_matrices=False)[1:]
        k = max(1, min(20, len(s) - 1))
        return _embedding("coexpression", pd.DataFrame(vt[:k].T * s[:k], index=self.genes_))

    def _learn_reference(self, random_state: int = 0) -> None:
        super()._learn_reference(random_state)
        self.__dict__.pop("_own_features", None)
        self.__dict__.pop("_weighted", None)

    def _in_knowledge(self, target: str) -> bool:
        return super()._informed(target) or (self.coexpression and target in self._own.known)

    def _informed(self, target: str) -> bool:
        """Whether knowledge holds the target and enough training targets to have learned from."""
        return self._in_knowledge(target) and (not self.is_trained_ or len(self.singles_) > 0)

    def _kernels(self, a: list[str], b: list[str], tables: list[GeneFeatures] | None = None) -> list[np.ndarray]:
        return [f.kernel(a, b) for f in (self._tables if tables is None else tables)]

    def _process_kernel(self, kernels: list[np.ndarray]) -> np.ndarray:
        """Weighted sum of the kernels, their squares and the constant one."""
        total = np.full_like(kernels[0], self.theta_[-1])
        for j, k in enumerate(kernels):
            total += self.theta_[2 * j] * k + self.theta_[2 * j + 1] * k**2
        return total

    def _similarity(self, kernels: list[np.ndarray]) -> np.ndarray:
        """Similarity of the local average."""
        return np.sum([self._similarity_of(j, k) for j, k in enumerate(kernels)], axis=0)

    def _similarity_of(self, table: int, kernel: np.ndarray) -> np.ndarray:
        """Part of a table in it: weighted powers of what is positive in its kernel."""
        positive = np.maximum(kernel, 0.0)
        weights = self.similarity_weights_.reshape(-1, len(_POWERS))[table]
        return np.sum([w * positive**p for p, w in zip(_POWERS, weights, strict=True)], axis=0)

    def _prior(self, genes: list[str]) -> np.ndarray:
        """Prior variance of the process, ``(gene,)``: a kernel is 1 for a known gene with itself."""
        total = np.full(len(genes), self.theta_[-1])
        for j, f in enumerate(self._tables):
            total += self.theta_[2 * j : 2 * j + 2].sum() * np.array([g in f.known for g in genes])
        return total

    # ------------------------------------------------------------------------------------------ fit

    def _fit(self) -> None:
        e = self.effects_
        self.singles_ = np.array([t for t in sorted(e.singles) if self._in_knowledge(t)], dtype=object)
        self.low_, self.high_ = e.delta.min(axis=0), e.delta.max(axis=0)
        self.held_out_ = np.zeros((0, self.n_genes), dtype=np.float32)
        self._reset()
        if len(self.singles_) >= 3:
            self._fit_process(e.without_own()[[e.singles[t] for t in self.singles_]].astype(np.float64))
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
        self.similarity_weights_ = np.zeros(len(self.kernel_names_) // 2 * len(_POWERS))
        self.axes_, self.centre_ = np.zeros((0, g)), np.zeros(g)
        self.scale_row_, self.noise_row_, self.noise_component_ = np.ones(0), np.ones(0), np.ones(0)
        self.alpha_, self.inverse_, self.learn_ = np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0, dtype=np.int64)
        self.scores_, self.gain_, self.response_ = np.zeros((0, 0)), np.ones(0), asdict(Response())
        self.mix_, self.floor_, self.trust_ = 1.0, 0.1, 1.0
        self.amplitude_ = np.array([1.0, 0.0])
        self.gene_sd_, self.spread_, self.quantile_ = np.ones(g), np.array([1.0, 0.0, 0.0]), np.ones(g)

    def _row_noise(self, residual2: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Relative noise of rows from their standard errors, or from cell numbers; mean 1."""
        e = self.effects_
        rows = [e.singles[t] for t in self.singles_]
        if np.isfinite(e.std_error).any():
            error2 = e.sampling_variance[rows].sum(axis=1, dtype=np.float64) / scale**2
        else:
            n = np.maximum(e.n_cells[rows].astype(np.float64), 1.0)
            if np.ptp(n) == 0:
                return np.ones(len(rows))
            error2 = np.quantile(residual2 * n, 0.1) / n
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
        self.axes_ = self._axes(residual, rng)
        self.__dict__.pop("_weighted", None)
        self.scores_ = scores = residual @ self.axes_.T
        self.noise_row_ = self._row_noise((residual**2).sum(axis=1), self.scale_row_)
        if np.sqrt((scores**2).sum() / n) <= 1e-9:
            self.singles_ = self.singles_[:0]
            return
        names = list(self.singles_)
        L = self.learn_
        folds = self._folds(names, rows, rng)
        n_kernels = len(folds[0].across)
        self.theta_ = _minimise(process_loss, folds, np.full(n_kernels, np.log(0.5 / n_kernels)), steps=30)
        n_near = len(folds[0].near)
        learned = _minimise(average_loss, folds, np.append(np.full(n_near, -np.log(n_near)), 0.0), steps=60)
        self.similarity_weights_, self.floor_ = learned[:-1], float(learned[-1])
        process, average, variance = self._held_out_scores(folds, len(_NOISE) if len(L) == n else MAX_LEVELS)

        kernel = self._process_kernel(self._kernels([names[i] for i in L], [names[i] for i in L]))
        root = np.sqrt(self.noise_row_[L])
        values, vectors = np.linalg.eigh(kernel / np.outer(root, root))
        values = np.maximum(values, 0.0)
        if len(L) == n:
            inner = (vectors.T @ (scores / root[:, None])) / (values[:, None] + self.noise_component_)
            self.alpha_ = (vectors @ inner) / root[:, None]
        else:
            self.alpha_ = self._solve_all(names, scores)
        level = float(np.median(self.noise_component_))
        self.inverse_ = ((vectors / (values + level)) @ vectors.T) / np.outer(root, root)
        self._fit_rest(delta, folds, process, average, variance, amplitude)

    def _axes(self, residual: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _principal_axes(residual, min(self.rank or MAX_RANK, len(residual) - 1, residual.shape[1]), rng)

    def _folds(self, names: list[str], rows: np.ndarray, rng: np.random.Generator) -> list[_Fold]:
        """The rows to learn from in folds; nothing in a fold has seen the effects that it holds out."""
        learn = self.learn_
        n_folds = min(len(learn), N_FOLDS if len(learn) > 200 else 2 * N_FOLDS)
        folds = []
        for part in np.array_split(rng.permutation(len(learn)), n_folds):
            test, train = np.sort(learn[part]), np.sort(np.delete(learn, part))
            centre = rows[train].mean(axis=0)
            residual = rows[train] - centre
            axes = self._axes(residual, rng)
            known, hidden = [names[i] for i in train], [names[i] for i in test]
            features = self._coherent(known, residual, axes) if self.coherence else self._used
            tables = list(features.values())
            if self.coexpression:
                effects = rows[train] * self.scale_row_[train, None]
                tables.append(self._profiles(effects - effects.mean(axis=0)))
            among, across = self._kernels(known, known, tables), self._kernels(hidden, known, tables)
            folds.append(
                _Fold(
                    train=train,
                    test=test,
                    centre=centre,
                    axes=axes,
                    scores=residual @ axes.T,
                    rows=rows[test],
                    noise=self.noise_row_[train],
                    among=_process_parts(among),
                    across=_process_parts(across),
                    near=np.stack([np.maximum(k, 0.0) ** p for k in across for p in _POWERS]),
                )
            )
        return folds

    def _held_out_scores(
        self, folds: list[_Fold], n_levels: int
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Scores of the held-out rows of each fold by the process and by the average, and the process's variances.

        Sets the noise of every component: of ``_NOISE`` the level with the least error in the component and its neighbours.
        """
        rank = min(f.scores.shape[1] for f in folds)
        errors = np.zeros((len(_NOISE), rank))
        parts = []
        for f in folds:
            root = np.sqrt(f.noise)
            values, vectors = np.linalg.eigh(np.tensordot(self.theta_, f.among, 1) / np.outer(root, root))
            values = np.maximum(values, 0.0)
            left = (np.tensordot(self.theta_, f.across, 1) / root) @ vectors
            rotated = vectors.T @ (f.scores / root[:, None])
            parts.append((values, left, rotated))
            for i, noise in enumerate(_NOISE):
                errors[i] += ((f.target - (left / (values + noise)) @ rotated)[:, :rank] ** 2).sum(axis=0)
        noise = _NOISE[_levels(_pooled(errors), n_levels)]
        self.noise_component_ = np.append(noise, np.full(len(self.axes_) - rank, noise[-1]))
        median = float(np.median(self.noise_component_))
        process, average, variance = [], [], np.zeros(len(self.singles_))
        for f, (values, left, rotated) in zip(folds, parts, strict=True):
            process.append(left @ (rotated / (values[:, None] + self.noise_component_[: f.scores.shape[1]])))
            S = np.tensordot(self.similarity_weights_, f.near, 1)
            average.append(_smooth(S, f.scores, 0.0, self.floor_))
            prior = self._prior([self.singles_[i] for i in f.test])
            variance[f.test] = prior - ((left**2) / (values + median)).sum(axis=1)
        return process, average, np.maximum(variance, 0.0)

    def _solve_all(self, names: list[str], scores: np.ndarray) -> np.ndarray:
        """Dual coefficients for all rows, by one Cholesky factor per level of noise."""
        n = len(names)
        A = np.zeros((n, n), dtype=np.float32)
        step = 1024
        for start in range(0, n, step):
            part = names[start : start + step]
            A[start : start + step] = self._process_kernel(self._kernels(part, names))
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
        self,
        delta: np.ndarray,
        folds: list[_Fold],
        process: list[np.ndarray],
        average: list[np.ndarray],
        variance: np.ndarray,
        amplitude: np.ndarray,
    ) -> None:
        """Mixture, gain, amplitude and limits, from the held-out rows."""
        best = -np.inf
        for mix in np.linspace(0.0, 1.0, 11):
            value = 0.0
            for f, g, a in zip(folds, process, average, strict=True):
                deviation = (mix * g + (1 - mix) * a) @ f.axes
                value += len(f.test) * _mean_cosine(deviation + f.centre, f.rows)
                value += len(f.test) * _mean_cosine(deviation, f.rows - f.centre)
            if value > best + 1e-9:
                best, self.mix_ = value, float(mix)
        scores = [self.mix_ * g + (1 - self.mix_) * a for g, a in zip(process, average, strict=True)]
        self.gain_ = _gain(scores, [f.target for f in folds], len(self.axes_))

        n = len(delta)
        L = self.learn_
        deviations = [(F * self.gain_[: F.shape[1]]) @ f.axes for f, F in zip(folds, scores, strict=True)]
        every = self.effects_.without_own()
        means, centres = zip(*(self._without(f, delta, every, amplitude) for f in folds), strict=True)
        self.trust_ = _trust(folds, deviations, centres)
        if self.trust_ == 0:
            logger.warning(
                "KnowledgeGP: held-out training targets do not confirm the knowledge: unseen ones have the mean effect"
            )
        response, deviations = fit_response(
            deviations,
            [f.rows - f.centre for f in folds],
            [f.centre for f in folds],
            [f.scores @ f.axes for f in folds],
        )
        self.response_ = {**asdict(response), "spread": spread(self.scores_ @ self.axes_)}
        direction, mean, size = np.zeros_like(delta), np.tile(delta.mean(axis=0), (n, 1)), np.zeros(n)
        for f, d, others in zip(folds, deviations, means, strict=True):
            S = np.tensordot(self.similarity_weights_, f.near, 1)
            size[f.test] = _smooth(S, amplitude[f.train][:, None], amplitude[f.train].mean(), self.floor_)[:, 0]
            direction[f.test], mean[f.test] = f.centre + d, others
        self.amplitude_ = _amplitude_weights(direction[L], size[L], delta[L], amplitude[L])
        predicted = self._scaled(direction[L], size[L], mean[L])
        self.held_out_ = mean.astype(np.float32)
        self.held_out_[L] = predicted

        error = delta[L] - predicted
        self.gene_sd_ = np.sqrt(np.maximum((error**2).mean(axis=0), 1e-20))
        moves = error.any(axis=0) | ~error.any()  # genes that are not expressed have no error
        relative = ((error / self.gene_sd_)[:, moves] ** 2).mean(axis=1)
        features = _spread_features(size[L], variance[L])
        self.spread_ = optimize.nnls(features / relative[:, None].clip(0.1), relative / relative.clip(0.1))[0]
        if not self.spread_.any():
            self.spread_ = np.array([1.0, 0.0, 0.0])
        sd = np.sqrt(np.maximum(features @ self.spread_, 1e-6))[:, None] * self.gene_sd_
        self.quantile_ = limit_widths(np.abs(error) / sd)

    def _without(
        self, fold: _Fold, delta: np.ndarray, every: np.ndarray, amplitude: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What held-out targets are given without knowledge: the mean of all other perturbations, and that of their scaled effects.

        Combinations count, too, and targets that no table knows: ``every`` are the effects of all, without own genes.
        """
        e = self.effects_
        if len(e.labels) == len(self.singles_):
            return delta[fold.train].mean(axis=0), fold.centre
        held = {self.singles_[i] for i in fold.test}
        rows = every[[i for i, targets in enumerate(e.targets) if not held & set(targets)]].astype(np.float64)
        length, strongest = np.linalg.norm(rows, axis=1), int(amplitude.argmax())
        size = np.maximum(length / np.linalg.norm(delta[strongest]) * amplitude[strongest], 0.05)
        return rows.mean(axis=0), (rows / np.sqrt(size)[:, None]).mean(axis=0)

    def _scaled(self, direction: np.ndarray, size: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Direction times the amplitude that its predicted size stands for, as far as the knowledge is trusted beyond the mean."""
        told = np.maximum(self.amplitude_[0] + self.amplitude_[1] * size, 0.0)[:, None] * direction
        return self.trust_ * np.clip(told, self.low_, self.high_) + (1 - self.trust_) * mean

    # ------------------------------------------------------------------------------------------ combinations

    def _fit_interaction(self) -> None:
        e = self.effects_
        doubles = [i for i, t in enumerate(e.targets) if len(t) == 2 and all(x in e.singles for x in t)]
        self.interaction_: dict[str, Any] = {"scale": 1.0, "used": False}
        self.double_sd_ = np.full(self.n_genes, np.nan)  # without doubles nothing is known of how far effects add up
        if len(doubles) < _FEWEST_DOUBLES:
            return
        base = np.stack([e.delta[[e.singles[x] for x in e.targets[i]]].sum(axis=0) for i in doubles]).astype(np.float64)
        truth = e.delta[doubles].astype(np.float64)
        cross, square = (base * truth).sum(axis=1), (base**2).sum(axis=1)
        left = np.clip((cross.sum() - cross) / np.maximum(square.sum() - square, 1e-12), 0.0, 1.5)
        additive = ((truth - base) ** 2).sum()
        errors = truth - left[:, None] * base
        self.double_sd_ = _drawn_sd(truth - base if (errors**2).sum() >= additive else errors)
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
            h = 1.0 / (np.maximum(values, 0.0) + ridge)
            self.double_sd_ = _drawn_sd((vectors @ (h[:, None] * rotated)) / ((vectors**2) @ h)[:, None])

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
        amplitude, respond = self.scale_row_**2, Response(**self.response_)
        shift = np.empty((len(targets), self.n_genes))
        sd = np.empty_like(shift)
        for start in range(0, len(targets), 256):
            part = targets[start : start + 256]
            kernels = self._kernels(part, names)
            cross, S = self._process_kernel(kernels), self._similarity(kernels)
            scores = self.mix_ * (cross @ self.alpha_) + (1 - self.mix_) * _smooth(S, self.scores_, 0.0, self.floor_)
            size = _smooth(S, amplitude[:, None], amplitude.mean(), self.floor_)[:, 0]
            deviation = respond((scores * self.gain_) @ self.axes_, self.centre_)
            shift[start : start + 256] = self._scaled(self.centre_ + deviation, size, e.mean)
            near = cross[:, self.learn_]
            variance = self._prior(part) - np.einsum("ij,jk,ik->i", near, self.inverse_, near, optimize=True)
            features = _spread_features(size, np.maximum(variance, 0.0))
            sd[start : start + 256] = np.sqrt(np.maximum(features @ self.spread_, 1e-6))[:, None] * self.gene_sd_
        return shift, sd

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
            e.put_own([(x,) for x in unseen], shift, sd)
            shifts, sds = dict(zip(unseen, shift, strict=True)), dict(zip(unseen, sd, strict=True))
        known = np.isfinite(e.std_error).any() and any(x in e.singles for x in names)
        variance = e.sampling_variance if known else None
        typical = None if variance is None else np.median(variance, axis=0)
        for x in names:
            if x in e.singles:
                shifts[x], sds[x] = self._posterior(x, variance, typical)
            elif x not in shifts:
                shifts[x], sds[x] = e.mean, e.delta.std(axis=0)
        n = len(targets)
        delta, std, half = (np.empty((n, self.n_genes), dtype=np.float32) for _ in range(3))
        fallback = np.zeros(n, dtype=bool)
        for i, t in enumerate(targets):
            row = e.row.get(join(t, self.control_))
            if row is not None:
                delta[i], std[i] = (shifts[t[0]], sds[t[0]]) if len(t) == 1 else (e.delta[row], e.std_error[row])
                noise = e.std_error[row] if variance is None else np.sqrt(variance[row])
                half[i] = NORMAL_90 * np.hypot(std[i], noise)  # a new measurement has its own noise
                continue
            total = np.sum([shifts[x] for x in t], axis=0)
            if len(t) > 1:
                # what stands for the mean in all of them is one mean, not their sum
                trust = 1.0 if any(x in e.singles for x in t) or not unseen else self.trust_
                total = self.interaction_["scale"] * (total - (1 - trust) * len(t) * e.mean) + (1 - trust) * e.mean
                if self.interaction_["used"] and len(t) == 2:
                    pair = self._pair_features(self.interaction_["axes"], t[0], t[1], shifts=shifts)
                    total = total + trust * (pair @ self.interaction_["weights"])
            delta[i] = total
            std[i] = np.sqrt(np.sum([sds[x] ** 2 for x in t], axis=0))
            if any(x in unseen for x in t):
                half[i] = std[i] * self.quantile_
            elif len(t) == 1 or not all(x in e.singles for x in t):
                half[i] = NORMAL_90 * std[i]
            elif len(t) == 2:
                std[i] = np.where(np.isfinite(self.double_sd_), self.double_sd_, std[i])
                half[i] = NORMAL_90 * self.double_sd_
            else:
                half[i] = np.nan
            fallback[i] = not all(self._covers(x) for x in t)
        lower, upper = delta - half, delta + half
        return Prediction(delta, std, lower, upper, fallback)

    def _posterior(
        self, target: str, variance: np.ndarray | None, typical: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Own effect of a trained target, shrunk by its standard errors to what is predicted without it, but for its own gene."""
        e = self.effects_
        row = e.singles[target]
        own, where = e.delta[row].astype(np.float64), np.flatnonzero(self.singles_ == target)
        if len(where) == 0 or variance is None or typical is None:
            return own, e.std_error[row].astype(np.float64)
        error2 = variance[row].astype(np.float64)
        prior2 = np.maximum(self.gene_sd_**2 - typical, 0.1 * self.gene_sd_**2)
        weight = prior2 / (prior2 + error2)
        told = self.held_out_[where[0]]
        # effects are sparse: one that is far from what is told stands for itself
        apart = np.maximum(prior2, (own - told) ** 2 - error2)
        delta, sd = weight * own + (1 - weight) * told, np.sqrt(weight**2 * error2 + (1 - weight) ** 2 * apart)
        for j in np.flatnonzero(
            e.genes == target
        ):  # its own gene is foretold by no other perturbation, but by others' own genes
            delta[j], sd[j] = e.own_shift(row, int(j), float(error2[j]))
        return delta, sd

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
        what all genes of the tables share), ``similarity`` (kernel value), ``weight`` (weight in the process and in the local
        average, mixed as the model mixes them) and ``share``: contribution to the predicted deviation from the mean (before the
        response of the genes), projected on it; the shares of a target sum to 1, or are 0 where the knowledge is not trusted
        (``trust_``).

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
        labels = [f.name for f in self._tables] + ["constant"]
        use = np.array([[n != t for n in names] for t in targets])
        blocks = []
        for i, t in enumerate(targets):
            kernels = self._kernels([t], names)
            size = float((self._similarity(kernels)[0] * use[i]).sum()) + self.floor_
            scores = self.mix_ * self.alpha_, (1 - self.mix_) * self.scores_ / size
            parts = []  # of each kernel: its weights on the rows of the process and of the average
            for j, k in enumerate(kernels):
                process = self.theta_[2 * j] * k[0] + self.theta_[2 * j + 1] * k[0] ** 2
                parts.append((process, self._similarity_of(j, k)[0], k[0]))
            parts.append((np.full(len(names), self.theta_[-1]), np.zeros(len(names)), np.ones(len(names))))
            parts = [(process * use[i], near * use[i], k) for process, near, k in parts]
            deviation = sum(process @ scores[0] + near @ scores[1] for process, near, _ in parts) * self.gain_
            inner = [s @ (self.gain_ * deviation) / max(float(deviation @ deviation), 1e-30) for s in scores]
            for label, (process, near, k) in zip(labels, parts, strict=True):
                blocks.append(
                    pd.DataFrame(
                        {
                            "target": t,
                            "training": names,
                            "kernel": label,
                            "similarity": k,
                            "weight": self.mix_ * process + (1 - self.mix_) * near / size,
                            "share": (self.trust_ > 0) * (process * inner[0] + near * inner[1]),
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
        """Learned weights of every table.

        Returns
        -------
        DataFrame, table as index: ``kind``; ``linear`` and ``squared``, weights of its kernel and the squared one in the Gaussian
        process; ``average``, its share of the similarity among the training perturbations in the local average; ``share``, of
        both, mixed as the model mixes them. The process's part of it is that of the prior variance.
        """
        self._check_trained()
        tables = self._tables
        learned = [self.singles_[i] for i in self.learn_] if len(self.singles_) else []
        near = np.zeros(len(tables) + 1)
        for j, f in enumerate(tables):
            part = self._similarity_of(j, f.kernel(learned, learned))
            near[j] = part.sum() - np.trace(part)
        rows = [(f.name, f.kind, *self.theta_[2 * j : 2 * j + 2]) for j, f in enumerate(tables)]
        rows.append(("constant", "constant", self.theta_[-1], 0.0))
        out = pd.DataFrame(rows, columns=["table", "kind", "linear", "squared"]).set_index("table")
        prior = out[["linear", "squared"]].to_numpy().sum(axis=1)
        out["average"] = near / max(near.sum(), 1e-30)
        share = self.mix_ * prior / max(prior.sum(), 1e-30) + (1 - self.mix_) * out["average"]
        return out.assign(share=share)


def _principal_axes(residual: np.ndarray, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Leading right singular vectors ``(rank, gene)``: exact for small matrices, by random projection for large ones."""
    rank = max(1, min(rank, *residual.shape))
    rows, columns = residual.shape
    if 4 * rows < columns and rows <= 2000:  # the rows' products are a small matrix
        values, vectors = np.linalg.eigh(residual @ residual.T)
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        if values[-1] > 1e-10 * values[0]:
            return (vectors.T @ residual) / np.sqrt(values)[:, None]
    if min(rows, columns) <= 2000:
        return np.linalg.svd(residual, full_matrices=False)[2][:rank]
    q = residual @ rng.standard_normal((residual.shape[1], rank + 20))
    for _ in range(3):
        q = np.linalg.qr(residual @ (residual.T @ np.linalg.qr(q)[0]))[0]
    return np.linalg.svd(q.T @ residual, full_matrices=False)[2][:rank]


def _process_parts(kernels: list[np.ndarray]) -> np.ndarray:
    """What the process weighs, in the order of ``theta_``: every kernel and its square, and the constant one."""
    return np.stack([*(k**p for k in kernels for p in (1, 2)), np.ones_like(kernels[0])])


def _levels(losses: np.ndarray, n_levels: int) -> np.ndarray:
    """Best row of ``losses`` for each column; at most ``n_levels`` rows, added one by one as they reduce the sum most."""
    if n_levels >= len(losses):
        return losses.argmin(axis=0)
    kept: list[int] = []
    best = np.full(losses.shape[1], np.inf)
    for _ in range(n_levels):
        kept.append(int(np.minimum(losses, best).sum(axis=1).argmin()))
        best = np.minimum(best, losses[kept[-1]])
    levels = np.unique(kept)
    return levels[losses[levels].argmin(axis=0)]


def _trust(folds: list[_Fold], deviations: list[np.ndarray], centres: Sequence[np.ndarray]) -> float:
    """Share of the knowledge's predictions that is followed beyond the mean: 1 - chance / t^2, or 0.

    t is the gain of held-out rows, from the mean that they are given without knowledge to their predictions, in standard errors.
    """
    gain = np.concatenate(
        [
            ((f.rows - mean) ** 2 - (f.rows - f.centre - d) ** 2).sum(axis=1)
            for f, d, mean in zip(folds, deviations, centres, strict=True)
        ]
    )
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    if gain.mean() <= 0 or error <= 0:
        return 0.0
    return max(0.0, 1.0 - _BY_CHANCE * float(error / gain.mean()) ** 2)


def _gain(scores: list[np.ndarray], target: list[np.ndarray], rank: int) -> np.ndarray:
    """Slope of the held-out scores on the predicted ones for each component, shrunk to the overall slope; in [0, 2]."""
    shared = min(F.shape[1] for F in scores)
    F, T = (np.vstack([x[:, :shared] for x in parts]) for parts in (scores, target))
    cross, square = (F * T).sum(axis=0), (F**2).sum(axis=0)
    overall = cross.sum() / max(square.sum(), 1e-30)
    prior = 0.1 * square.mean() + 1e-30
    gain = np.clip((_pooled(cross) + prior * overall) / (_pooled(square) + prior), 0.0, 2.0)
    return np.append(gain, np.full(rank - shared, gain[-1]))


def _spread_features(size: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """What the variance of a prediction is linear in: a constant, the squared amplitude, and this times the process's variance."""
    return np.column_stack([np.ones(len(size)), size**2, size**2 * variance])


def _amplitude_weights(D: np.ndarray, size: np.ndarray, delta: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """``(a, b)`` such that ``(a + b size) D`` is nearest to ``delta``; ``b = 0`` where size tells nothing."""
    inner, square = (D * delta).sum(axis=1), (D**2).sum(axis=1)
    flat = np.array([np.clip(inner.sum() / max(square.sum(), 1e-30), 0.0, 3.0), 0.0])
    if np.std(np.log(amplitude)) < 0.05 or len(D) < 20:
        return flat
    features = np.column_stack([np.ones(len(size)), size])
    gram = (features * square[:, None]).T @ features
    gram += 1e-6 * np.trace(gram) * np.eye(2)
    a, b = np.linalg.solve(gram, features.T @ inner)
    return np.array([a, b]) if b > 0 else flat
