"""What graphs and measured effects say before any network is trained: the linear graph model, solved exactly.

A simplified graph convolution with free node features and a linear read-out is a linear model of the rows of the
normalised adjacency. With a Gaussian prior on its weights it has a closed form, and so have its leave-one-out errors,
by which the strength of each graph is chosen. Numpy and scipy only, but for the gradient of the strengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
from scipy import linalg, optimize, sparse

__all__ = ["GraphPrior"]

_MOST_ROWS = 500  # of the matrix that the strengths are chosen on
_MOSTLY_NOISE = 5.0  # times the median noise of the rows
_EVIDENCE = 1.0  # weight of the likelihood beside the leave-one-out error


class GraphPrior:
    r"""Gaussian process of effects over perturbations, additive in the targets.

    .. math::
        \delta_p = \sum_{a \in p} (\mu + u_a + \sum_s f_a^{(s)}) + \epsilon_p,\qquad
        \operatorname{cov}(f_a^{(s)}, f_b^{(s)}) = w_s \frac{\hat A_a \hat A_b^T}{|\hat A_a||\hat A_b|}

    for each gene alike: a mean effect :math:`\mu` per target, an effect :math:`u_a` of the target's own with variance
    :math:`w_u`, one term for each graph :math:`s`, and noise whose variance is known from the standard errors.
    A target that was measured carries :math:`u_a` into its combinations: they are predicted (nearly) additively. One
    that was not is predicted by the mean and by its neighbours, as far as the graphs predict left-out perturbations.

    Parameters
    ----------
    adjacencies
        What joins targets, by name: the normalised adjacency of a graph, ``(target, target)``, or any other features,
        ``(target, feature)``; zero rows for targets of which nothing is known.
    """

    def __init__(self, adjacencies: Mapping[str, sparse.spmatrix]):
        self.names = tuple(adjacencies)
        self.features: list[sparse.csr_matrix] = []
        for adjacency in adjacencies.values():
            norm = np.sqrt(np.asarray(adjacency.multiply(adjacency).sum(axis=1)).ravel())
            scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
            self.features.append((sparse.diags(scale) @ adjacency).tocsr())
        self.n_targets = self.features[0].shape[0]

    # -------------------------------------------------------------------------------------- covariances

    def _design(self, sets: Sequence[Sequence[int]]) -> sparse.csr_matrix:
        rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        columns = np.fromiter((t for s in sets for t in s), dtype=np.int64, count=len(rows))
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(sets), self.n_targets))

    def _covariances(self, a: sparse.csr_matrix, b: sparse.csr_matrix) -> Iterator[np.ndarray]:
        """Unweighted terms: constant, mean per target, own, one a graph."""
        na, nb = np.asarray(a.sum(axis=1)).ravel(), np.asarray(b.sum(axis=1)).ravel()
        yield np.ones((len(na), len(nb)))
        yield np.outer(na, nb)
        yield (a @ b.T).toarray()
        for f in self.features:
            yield ((a @ f) @ (b @ f).T).toarray()

    # -------------------------------------------------------------------------------------- fit

    def fit(
        self,
        sets: Sequence[Sequence[int]],
        delta: np.ndarray,
        noise: np.ndarray,
        random_state: int = 0,
        *,
        gene_noise: np.ndarray | None = None,
        by_reliability: bool = False,
        temper: bool = False,
    ) -> GraphPrior:
        """Choose the strengths and solve.

        Parameters
        ----------
        sets
            Targets of each training perturbation.
        delta
            Effects ``(perturbation, gene)``.
        noise
            Variance of the effects by sampling, mean over the genes, ``(perturbation,)``; zeros where unknown.
        random_state
            Seed of the choice of rows where there are many.
        gene_noise
            Variance of the effects by sampling ``(perturbation, gene)``. With it, genes that move
            much more than their noise are shrunken little, and genes that do not are shrunken much.
        by_reliability
            Choose the strengths by the genes as far as they are reliable, by signal over signal and noise: for tables, whose standard
            errors may be of any size, so that genes that are noise do not hide what the others tell.
        temper
            Divide each effect's deviation from the mean by the square root of its relative size, so that a few huge
            effects do not speak for all; for tables of single perturbations. What is predicted for measured
            perturbations is tempered too.
        """
        delta = np.asarray(delta, dtype=np.float64)
        if temper:
            mean = delta.mean(axis=0)
            size = np.linalg.norm(delta - mean, axis=1)
            size = np.maximum(size / max(size.mean(), 1e-12), 0.1)
            delta = mean + (delta - mean) / np.sqrt(size)[:, None]
        design = self._design(sets)
        noise = np.asarray(noise, dtype=np.float64)
        told = noise <= _MOSTLY_NOISE * np.median(noise)  # rows that are mostly noise say nothing of the genes
        weight = np.ones(delta.shape[1])
        if by_reliability and gene_noise is not None:
            weight = self._reliability(delta[told], gene_noise[told])
            noise = (gene_noise * weight).mean(axis=1, dtype=np.float64)
        scale = max(float(np.mean(delta**2 * weight)), 1e-12)
        noise = np.maximum(noise, 1e-3 * scale)
        rows = np.arange(len(delta))
        if len(rows) > _MOST_ROWS:
            rows = np.sort(np.random.default_rng(random_state).choice(rows, _MOST_ROWS, replace=False))
        parts = list(self._covariances(design[rows], design[rows]))
        if all(len(t) == 1 for t in sets):
            parts = parts[1:]  # the constant is the mean per target
        gram = (delta[rows] * weight) @ delta[rows].T / delta.shape[1]
        weights = self._choose(parts, gram, noise[rows], scale)
        self.weights = np.concatenate([np.zeros(3 + len(self.features) - len(weights)), weights])
        K = self._covariance(design, design)
        # (K + lambda_g D)^-1 for every gene at once, by the eigenvalues of D^-1/2 K D^-1/2
        root = 1.0 / np.sqrt(noise)
        values, vectors = linalg.eigh(root[:, None] * K * root, check_finite=False)
        values = np.maximum(values, 0.0)
        self.ratio = np.ones(delta.shape[1])
        if gene_noise is not None:
            self.ratio = self._noise_ratio(delta[told], gene_noise[told], weight)
        resolvent = 1.0 / (values[:, None] + self.ratio)
        self.design, self.noise = design, noise
        self.alpha = root[:, None] * (vectors @ (resolvent * (vectors.T @ (root[:, None] * delta))))
        self.inverse = root[:, None] * ((vectors / (values + 1.0)) @ vectors.T) * root
        self.loo = delta - self.alpha / (root[:, None] ** 2 * (vectors**2 @ resolvent))
        return self

    @staticmethod
    def _reliability(delta: np.ndarray, gene_noise: np.ndarray) -> np.ndarray:
        """Signal over signal and noise of each gene, 1 on average ``(gene,)``; signal is what chance does not explain (two standard errors)."""
        noise = gene_noise.mean(axis=0, dtype=np.float64)
        signal = np.maximum(np.mean(delta**2, axis=0) - (1 + 2 * np.sqrt(2 / len(delta))) * noise, 0.0)
        if not signal.any():
            return np.ones(delta.shape[1])
        signal = np.maximum(signal, 0.02 * signal.mean())
        weight: np.ndarray = signal / (signal + noise)
        return weight / weight.mean()

    @staticmethod
    def _noise_ratio(delta: np.ndarray, gene_noise: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Noise over signal of each gene, relative to that of all genes by their weight, ``(gene,)``."""
        if not np.any(gene_noise > 0):
            return np.ones(delta.shape[1])
        gene_noise = gene_noise.mean(axis=0)
        signal = np.mean(delta**2, axis=0) - gene_noise
        signal = np.maximum(signal, 0.02 * max(np.average(signal, weights=weight), 1e-12))
        ratio = (gene_noise / np.average(gene_noise, weights=weight)) / (signal / np.average(signal, weights=weight))
        return np.clip(ratio, 0.02, 50.0)

    def _covariance(self, a: sparse.csr_matrix, b: sparse.csr_matrix) -> np.ndarray:
        """Weighted sum of the terms; one term in memory at a time."""
        out = np.zeros((a.shape[0], b.shape[0]))
        for weight, part in zip(self.weights, self._covariances(a, b), strict=True):
            if weight:
                out += weight * part
        return out

    def _variance(self, a: sparse.csr_matrix) -> np.ndarray:
        """Diagonal of the covariance of perturbations with themselves, ``(perturbation,)``."""
        n = np.asarray(a.sum(axis=1)).ravel()
        terms = [np.ones(len(n)), n**2, n]
        for f in self.features:
            row = (a @ f).tocsr()
            terms.append(np.asarray(row.multiply(row).sum(axis=1)).ravel())
        return np.einsum("s,si->i", self.weights, np.stack(terms))

    @staticmethod
    def _choose(parts: list[np.ndarray], gram: np.ndarray, noise: np.ndarray, scale: float) -> np.ndarray:
        """Strengths by the mean squared leave-one-out error and, for what it leaves open, the likelihood."""
        stack = np.stack(parts)
        n = len(noise)
        start = np.full(len(parts), 0.3)

        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            w = np.exp(theta) * scale
            A = np.einsum("s,sij->ij", w, stack) + np.diag(noise)
            inverse = linalg.inv(A, check_finite=False, overwrite_a=True)
            inverse = (inverse + inverse.T) / 2
            B = inverse @ gram
            C = B @ inverse
            d = np.diag(inverse)
            loo = np.diag(C) / d**2
            total = loo.mean()
            # d inverse = -inverse dA inverse;  dC = -(inverse dA C + C dA inverse)
            sign, logdet = np.linalg.slogdet(inverse)
            evidence = 0.5 * (np.trace(B) - logdet) / n
            u, v = 1.0 / d**2 / n, 2.0 * np.diag(C) / d**3 / n
            gradient = np.empty(len(w))
            for s, part in enumerate(stack):
                T = inverse @ part
                dC = -2.0 * np.einsum("ij,ji->i", T, C)
                dI = -np.einsum("ij,ji->i", T, inverse)
                g_loo = (u * dC - v * dI).sum() / total
                g_evidence = 0.5 * (np.trace(T) - np.einsum("ij,ji->", T, B)) / n
                gradient[s] = (g_loo + _EVIDENCE * g_evidence) * w[s]
            return float(np.log(total) + _EVIDENCE * evidence), gradient

        best = optimize.minimize(
            objective,
            np.log(start),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-14.0, 6.0)] * len(parts),
            options={"maxiter": 30},
        )
        return np.exp(best.x) * scale

    # -------------------------------------------------------------------------------------- predict

    def predict(self, sets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Effects ``(perturbation, gene)`` and their variance, alike for all genes ``(perturbation,)``."""
        new = self._design(sets)
        K = self._covariance(new, self.design)
        return K @ self.alpha, np.maximum(self._variance(new) - ((K @ self.inverse) * K).sum(axis=1), 0.0)

    @cached_property
    def joined(self) -> np.ndarray:
        """Whether any graph joins a target to a measured one, boolean ``(target,)``."""
        found = np.zeros(self.n_targets, dtype=bool)
        for f in self.features:
            measured = np.asarray(abs(self.design @ f).sum(axis=0)).ravel() > 0
            found |= abs(f) @ measured.astype(np.float64) > 0
        return found

    def reach(self, sets: Sequence[Sequence[int]]) -> np.ndarray:
        """Whether any graph joins a perturbation to a measured one, boolean ``(perturbation,)``."""
        new = self._design(sets)
        found = np.zeros(len(sets), dtype=bool)
        for f in self.features:
            found |= np.asarray(abs((new @ f) @ (self.design @ f).T).sum(axis=1)).ravel() > 0
        return found

    def shares(self, sets: Sequence[Sequence[int]]) -> np.ndarray:
        """Share of each measured perturbation in a prediction, ``(perturbation, measured)``; rows add to 1."""
        K = self._covariance(self._design(sets), self.design)
        predicted = K @ self.alpha
        total = np.maximum((predicted**2).sum(axis=1, keepdims=True), 1e-12)
        return K * (predicted @ self.alpha.T) / total

    # -------------------------------------------------------------------------------------- files

    def state(self) -> dict[str, np.ndarray]:
        """What :meth:`fit` found, as arrays."""
        return {
            "weights": self.weights,
            "rows": self.design.indptr.copy(),
            "columns": self.design.indices.copy(),
            "noise": self.noise,
            "alpha": self.alpha,
            "inverse": self.inverse,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> GraphPrior:
        """Take back :meth:`state`."""
        self.weights, self.noise = state["weights"], state["noise"]
        self.alpha, self.inverse = state["alpha"], state["inverse"]
        shape = (len(state["rows"]) - 1, self.n_targets)
        self.design = sparse.csr_matrix((np.ones(len(state["columns"])), state["columns"], state["rows"]), shape=shape)
        self.loo = np.empty((0, self.alpha.shape[1]))
        return self
