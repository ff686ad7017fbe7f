"""Simple models in closed form: matching mean, linear PCA, nearest neighbours, ridge, linear network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_net, check_positive, check_whole, listing
from ..data._perturbation import join
from ..errors import ScpertError
from ._base import ClosedFormModel, Prediction, Reference
from ._knowledge import GeneFeatures, read_knowledge, usable

__all__ = ["KNN", "LinearGRN", "LinearPCA", "MatchingMean", "Ridge", "TargetwiseModel"]


class TargetwiseModel(ClosedFormModel):
    """Base of models that predict single targets and add them up for combinations.

    A subclass implements ``_informed(target)``, whether it can say something about a target that was not perturbed alone,
    and ``_predict_targets(targets)``, the shifts of such targets. A perturbation that was trained on is predicted by its own
    effect, one whose targets are all uninformed by the mean effect (status ``fallback``).
    """

    scope = "unseen"
    _uncovered = "fallback"

    def _informed(self, target: str) -> bool:
        raise NotImplementedError

    def _predict_targets(self, targets: list[str]) -> np.ndarray:
        raise NotImplementedError

    def _covers(self, target: str) -> bool:
        return self.effects_ is None or target in self.effects_.singles or self._informed(target)

    def _status(self, targets: tuple[str, ...]) -> str | None:
        status = super()._status(targets)
        if status not in (K.FALLBACK, K.COMBINATION) or len(targets) < 2:
            return status
        known = [t for t in targets if self._covers(t)]
        if not known:  # trained in other combinations only, or not at all: the mean once, not for each target
            return K.FALLBACK
        if status == K.FALLBACK:  # the mean stands in for some target
            return K.COMBINATION if len(known) == len(targets) else K.UNSEEN
        return status

    def _shifts(self, targets: list[tuple[str, ...]]) -> dict[str, np.ndarray]:
        """Shift of each target that occurs: its own effect, the prediction or the mean."""
        e = self.effects_
        names = sorted({x for t in targets for x in t})
        out = {x: e.delta[e.singles[x]] for x in names if x in e.singles}
        missing = [x for x in names if x not in out and self._informed(x)]
        if missing:
            out.update(zip(missing, self._predict_targets(missing), strict=True))
        return {x: out.get(x, e.mean) for x in names}

    def _combine(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.sum(parts, axis=0)

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        e = self.effects_
        shifts = self._shifts(targets)
        delta = np.empty((len(targets), self.n_genes), dtype=np.float32)
        fallback = np.zeros(len(targets), dtype=bool)
        for i, t in enumerate(targets):
            row = e.row.get(join(t, self.control_))
            delta[i] = e.delta[row] if row is not None else self._combine([shifts[x] for x in t])
            fallback[i] = row is None and not all(self._covers(x) for x in t)
        return Prediction(delta, fallback=fallback)


class MatchingMean(TargetwiseModel):
    r"""Predicts a combination by the mean of its single effects.

    .. math:: \hat\delta_{ab} = \tfrac12 (\delta_a + \delta_b)

    A single that was not measured is replaced by the mean effect, and the status is ``fallback``
    :cite:p:`VinasTorne2025`. On combinations of unlike genes this predicts less than the additive model and wins where
    effects saturate.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=400, n_genes=40, n_targets=5, n_combinations=2)
    >>> scpert.model.MatchingMean.setup_anndata(adata)
    >>> model = scpert.model.MatchingMean(adata)
    >>> model.train()
    >>> a, b = model.targets_[:2]
    >>> model.predict_perturbation(f"{a}+{b}").shape
    (1, 40)
    """

    scope = "combinations"

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None):
        super().__init__(adata, registry)
        self._remember(locals())

    def _informed(self, target: str) -> bool:
        return False

    def _combine(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.mean(parts, axis=0)


class LinearPCA(TargetwiseModel):
    r"""Linear map from an embedding of the perturbed gene to the effect :cite:p:`Ahlmann2025`.

    .. math:: \hat\delta_p = b + G W P_p, \quad
        W = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P (P^\top P + \lambda I)^{-1}

    with the training effects :math:`Y` (gene, perturbation), their mean :math:`b`, the gene embedding :math:`G` (first
    principal components of the centred effects) and the embedding :math:`P` of the perturbed genes: their own rows of
    :math:`G` (the gene must be measured), or ``embedding``, e.g. the principal components of another screen, which is the
    stronger variant where there is one.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    n_components
        Number of principal components (at most perturbations - 1).
    ridge
        :math:`\lambda`.
    embedding
        Genes as index, numbers as columns; ``None``: the principal components of the training effects.

    Notes
    -----
    :math:`G` are the scores divided by :math:`\sqrt{n - 1}` for n training perturbations, so that the size of :math:`\lambda` does not
    depend on n; the article's code takes them undivided, which shrinks less.
    Combinations are sums over targets. A target without embedding has the mean effect and the status ``fallback``.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.LinearPCA.setup_anndata(adata)
    >>> model = scpert.model.LinearPCA(adata, n_components=3)
    >>> model.train()
    >>> other = next(gene for gene in model.genes_ if gene not in model.targets_)
    >>> str(model.predict_perturbation(other).obs["status"].iloc[0])
    'unseen'
    """

    _fitted = ("gene_embedding_", "map_", "targets_embedding_")

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_components: int = 10,
        ridge: float = 0.1,
        embedding: pd.DataFrame | None = None,
    ):
        super().__init__(adata, registry)
        self._remember(locals())
        self.n_components = check_whole("n_components", n_components)
        self.ridge = float(check_positive("ridge", ridge))
        if embedding is not None:
            read_knowledge({"embedding": embedding})  # refuses anything but a finite embedding with unique genes
            if "gene" in embedding.columns or "source" in embedding.columns:
                raise ScpertError("embedding must have genes as index and only numbers as columns.")
            embedding = embedding.set_axis(embedding.index.astype(str))
        self.embedding = embedding
        self.targets_embedding_: pd.DataFrame | None = None

    def _fit(self) -> None:
        e = self.effects_
        rows = np.array(sorted(e.singles.values()), dtype=int)
        singles = [e.targets[i][0] for i in rows]
        Y = (e.delta - e.mean).T.astype(np.float64)
        u, s, _ = np.linalg.svd(Y, full_matrices=False)
        k = max(1, min(self.n_components, int((s > 1e-9 * max(s[0], 1e-30)).sum())))
        G = u[:, :k] * s[:k] / np.sqrt(max(Y.shape[1] - 1, 1))
        table = pd.DataFrame(G, index=self.genes_) if self.embedding is None else self.embedding
        have = [i for i, t in zip(rows, singles, strict=True) if t in table.index]
        self.gene_embedding_ = G
        if self.embedding is not None and len(have) < 2:
            raise ScpertError(
                f"embedding knows {len(have)} of the {len(singles)} training targets (it has genes such as "
                f"{listing(table.index, 3)}, the data {listing(singles, 3)}). Bring both to the same kind of gene names."
            )
        d = table.shape[1]
        if have:
            P = table.loc[[e.targets[i][0] for i in have]].to_numpy(dtype=np.float64)
            left = np.linalg.solve(G.T @ G + self.ridge * np.eye(k), G.T @ Y[:, have] @ P)
            self.map_ = np.linalg.solve((P.T @ P + self.ridge * np.eye(d)).T, left.T).T
        else:
            self.map_ = np.zeros((k, d))
        self.targets_embedding_ = table if have else table.iloc[:0]

    def _informed(self, target: str) -> bool:
        return self.targets_embedding_ is not None and target in self.targets_embedding_.index

    def _graph_targets(self) -> frozenset[str]:
        return frozenset() if self.embedding is None else frozenset(self.embedding.index)

    def _predict_targets(self, targets: list[str]) -> np.ndarray:
        P = self.targets_embedding_.loc[targets].to_numpy(dtype=np.float64)
        return (self.effects_.mean + P @ (self.gene_embedding_ @ self.map_).T).astype(np.float32)

    def get_perturbation_embedding(self) -> pd.DataFrame:
        """Embedding :math:`P` of the targets that the model knows ``(target, dim)``."""
        self._check_trained()
        return self.targets_embedding_.rename_axis("target")


class KnowledgeModel(TargetwiseModel):
    """Base of models with ``knowledge``: reads the tables and knows which genes they tell something of."""

    knowledge: Any = None

    @cached_property
    def _features(self) -> dict[str, GeneFeatures]:
        """All tables."""
        return read_knowledge(self.knowledge)

    @cached_property
    def _used(self) -> dict[str, GeneFeatures]:
        """The tables that know at least two of the single training perturbations."""
        return usable(self._features, sorted(self.effects_.singles), type(self).__name__)

    @cached_property
    def _of_singles(self) -> list[sparse.csr_matrix]:
        """Features of the single training perturbations by each of these tables, ``(feature, single)``."""
        singles = sorted(self.effects_.singles)
        return [f.rows(singles).T.tocsr() for f in self._used.values()]

    def _learn_reference(self, random_state: int = 0) -> None:
        super()._learn_reference(random_state)
        self.__dict__.pop("_used", None)
        self.__dict__.pop("_of_singles", None)

    def _graph_targets(self) -> frozenset[str]:
        return frozenset().union(*(f.known for f in self._features.values())) if self._features else frozenset()

    def _informed(self, target: str) -> bool:
        return any(target in f.known for f in self._used.values())


class KNN(KnowledgeModel):
    r"""Predicts an unseen perturbation by those of its nearest genes in prior knowledge.

    .. math:: \hat\delta_p = \frac{\sum_{t \in N_k(p)} w_{pt}\, \delta_t}{\sum_{t \in N_k(p)} w_{pt}}

    The similarity is the mean over the tables of the cosine of their features (information-content
    weighted annotations, neighbourhoods in a net, centred embeddings); only positive similarities count.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    knowledge
        Name -> table: annotations (``gene``, ``term``), a net (``source``, ``target``, optional ``weight``) or an embedding
        (genes as index, numbers as columns). Without it every unseen perturbation has the mean effect.
    k
        Number of neighbours.
    weights
        ``"similarity"``: :math:`w = s`; ``"softmax"``: :math:`w = \exp(s/\tau)`; ``"uniform"``.
    temperature
        :math:`\tau` of ``"softmax"``.

    Notes
    -----
    Combinations are sums over targets. A target that no table knows, or that is like no training target, has the mean effect
    and the status ``fallback``.

    Examples
    --------
    >>> import pandas as pd
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.KNN.setup_anndata(adata)
    >>> genes = list(adata.var_names[:10])
    >>> go = pd.DataFrame({"gene": genes, "term": ["x", "y"] * 5})
    >>> model = scpert.model.KNN(adata, knowledge={"go": go}, k=2)
    >>> model.train()
    >>> model.predict_perturbation(genes[0]).n_obs
    1
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        knowledge: Mapping[str, pd.DataFrame] | None = None,
        k: int = 20,
        weights: str = "similarity",
        temperature: float = 0.1,
    ):
        super().__init__(adata, registry)
        self._remember(locals())
        self.knowledge = knowledge
        self.k = check_whole("k", k)
        self.weights = check_choice("weights", weights, ("similarity", "softmax", "uniform"))
        self.temperature = float(check_positive("temperature", temperature))
        _ = self._features

    def _fit(self) -> None:
        _ = self._used

    def _similarity(self, targets: list[str]) -> tuple[np.ndarray, list[str]]:
        singles = sorted(self.effects_.singles)
        total = np.zeros((len(targets), len(singles)))
        for f, known in zip(self._used.values(), self._of_singles, strict=True):
            total += np.clip((f.rows(targets) @ known).toarray(), -1.0, 1.0)
        return total / max(len(self._used), 1), singles

    def _informed(self, target: str) -> bool:
        if not super()._informed(target):
            return False
        return bool((self._similarity([target])[0] > 0).any())

    def _predict_targets(self, targets: list[str]) -> np.ndarray:
        e = self.effects_
        similarity, singles = self._similarity(targets)
        effects = e.delta[[e.singles[s] for s in singles]]
        out = np.empty((len(targets), self.n_genes), dtype=np.float32)
        for i, s in enumerate(similarity):
            near = np.argsort(-s, kind="stable")[: self.k]
            near = near[s[near] > 0]
            w = {
                "similarity": s[near],
                "softmax": np.exp((s[near] - s[near].max()) / self.temperature),
                "uniform": np.ones(len(near)),
            }[self.weights]
            out[i] = (w / w.sum()) @ effects[near]
        return out


class Ridge(KnowledgeModel):
    r"""Ridge regression of effects on features of the perturbed gene, in its dual form.

    .. math:: \hat\delta_p = \bar\delta + k_p^\top (K + \lambda I)^{-1} (\Delta - \bar\delta), \quad K = \Phi\Phi^\top

    :math:`\Phi` holds the features of all tables side by side, those of a table scaled to length :math:`1/\sqrt{S}` for
    :math:`S` tables. :math:`\lambda` has the least closed-form leave-one-out error on the training perturbations.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    knowledge
        As in :class:`KNN`: gene ontology, text or any other embedding, nets.
    alpha
        :math:`\lambda`; ``None``: by leave-one-out.

    Notes
    -----
    Combinations are sums over targets. A target that no table knows has the mean effect and the status ``fallback``.

    Examples
    --------
    >>> import pandas as pd
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.Ridge.setup_anndata(adata)
    >>> genes = list(adata.var_names)
    >>> go = pd.DataFrame({"gene": genes, "term": ["x", "y"] * 20})
    >>> model = scpert.model.Ridge(adata, knowledge={"go": go})
    >>> model.train()
    >>> model.predict_perturbation(genes[-1]).n_obs
    1
    """

    _fitted = ("alpha_", "dual_", "rows_")

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        knowledge: Mapping[str, pd.DataFrame] | None = None,
        alpha: float | None = None,
    ):
        super().__init__(adata, registry)
        self._remember(locals())
        self.knowledge = knowledge
        self.alpha = None if alpha is None else float(check_positive("alpha", alpha))
        _ = self._features

    def _gram(self, a: list[str], b: list[str]) -> np.ndarray:
        total = sum((f.kernel(a, b) for f in self._used.values()), np.zeros((len(a), len(b))))
        return total / max(len(self._used), 1)

    def _fit(self) -> None:
        e = self.effects_
        singles = [t for t in sorted(e.singles) if any(t in f.known for f in self._used.values())]
        self.rows_ = np.array([e.singles[t] for t in singles], dtype=np.int64)
        residual = e.delta[self.rows_].astype(np.float64) - e.mean
        if len(singles) == 0:
            self.alpha_, self.dual_ = np.nan, np.zeros((0, self.n_genes), dtype=np.float32)
            return
        values, vectors = np.linalg.eigh(self._gram(singles, singles))
        rotated = vectors.T @ residual
        if self.alpha is not None:
            self.alpha_ = self.alpha
        else:
            grid = np.geomspace(1e-2, 1e3, 21)
            self.alpha_ = float(grid[np.argmin([_loo_error(values, vectors, rotated, a) for a in grid])])
        self.dual_ = (vectors @ (rotated / (np.maximum(values, 0.0) + self.alpha_)[:, None])).astype(np.float32)

    def _predict_targets(self, targets: list[str]) -> np.ndarray:
        names = [self.effects_.targets[i][0] for i in self.rows_]
        return (self.effects_.mean + self._gram(targets, names) @ self.dual_).astype(np.float32)


def _loo_error(values: np.ndarray, vectors: np.ndarray, rotated: np.ndarray, alpha: float) -> float:
    """Mean squared leave-one-out error of kernel ridge: residuals are ``(A^-1 y)_i / (A^-1)_ii``, ``A = K + alpha I``."""
    inverse = 1.0 / (np.maximum(values, 0.0) + alpha)
    diagonal = (vectors**2) @ inverse
    return float(np.mean(((vectors @ (inverse[:, None] * rotated)) / diagonal[:, None]) ** 2))


class LinearGRN(TargetwiseModel):
    r"""Linear gene regulatory network fitted to cells, through which the shift of the perturbed gene is propagated.

    Every gene is regressed on its regulators over the training cells, with a ridge penalty

    .. math:: B_{Rj} = (C_{RR} + \lambda I)^{-1} C_{Rj}, \quad \Delta \leftarrow B^\top \Delta, \quad \Delta_p = d_p

    (:math:`C`: covariance of log1p CP10k values, a gene never regulating itself), then the shift :math:`\Delta` is propagated
    ``n_steps`` times with the perturbed genes clamped to :math:`d_p`, as CellOracle does (Kamimoto et al. 2023), and kept within
    the range that expression can have.

    Parameters
    ----------
    adata
        Cells, set up by :meth:`setup_anndata`; tables of effects hold no covariance and are refused.
    net
        Net ``source, target``: regulators of each gene. ``None``: every measured gene may regulate every other (at most
        ``max_regulators``, the perturbed and then the most variable ones).
    ridge
        :math:`\lambda` in units of the mean variance of the regulators.
    n_steps
        Steps of propagation.
    max_regulators
        Regulators to keep without a net.

    Notes
    -----
    :math:`d_p` is the measured shift of the target's own gene, for an unseen target its control mean times the median relative
    shift of the trained targets (-1, a knock-out, if none is measured). A trained perturbation is predicted by its own
    effect; a target that is not measured, or regulates nothing, has the mean effect and the status ``fallback``; combinations
    are sums over targets.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.LinearGRN.setup_anndata(adata)
    >>> model = scpert.model.LinearGRN(adata)
    >>> model.train()
    >>> list(model.get_grn().columns)
    ['source', 'target', 'weight']
    """

    _scales = (K.SCALE_COUNTS, K.SCALE_LOG1P)
    _fitted = ("regulators_", "coefficients_", "relative_shift_", "top_")

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        net: pd.DataFrame | None = None,
        ridge: float = 1.0,
        n_steps: int = 3,
        max_regulators: int = 1000,
    ):
        super().__init__(adata, registry)
        self._remember(locals())
        self.net = None if net is None else check_net(net, "net", known=self.genes_)
        if self.net is not None and self.net.empty:
            raise ScpertError("net has no edge between two genes: pass regulators and targets, or net=None.")
        self.ridge = float(check_positive("ridge", ridge))
        self.n_steps = check_whole("n_steps", n_steps)
        self.max_regulators = check_whole("max_regulators", max_regulators)
        self.regulators_ = np.zeros(0, dtype=np.int64)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {g: i for i, g in enumerate(self.genes_)}

    def _fit(self) -> None:
        mask, e = self._train_mask(), self.effects_
        strata = self._strata()  # genes that go together because of a batch do not regulate each other
        strata = np.zeros(self._screen.n_cells, dtype=np.int64) if strata is None else strata
        moments = self._screen.moments(strata, mask=mask)
        size, n = moments.n[:, None], int(moments.n.sum())
        freedom = max(n - len(size), 1)
        variance = (np.nan_to_num(moments.var) * (size - 1)).sum(axis=0) / freedom
        if self.net is not None:
            regulators = sorted({self._position[g] for g in self.net[K.SOURCE]})
        else:
            first = [self._position[t] for t in sorted(e.singles) if t in self._position]
            order = [*first, *np.argsort(-variance, kind="stable").tolist()]
            regulators = sorted(list(dict.fromkeys(order))[: max(self.max_regulators, len(first))])
        self.regulators_ = R = np.array(regulators, dtype=np.int64)
        cross = np.zeros((len(R), self.n_genes))
        self.top_ = np.zeros(self.n_genes)
        for rows, block in self._screen.chunks():
            part = block[np.flatnonzero(mask[rows])]
            if part.shape[0]:
                cross += (part[:, R].T @ part).toarray()
                self.top_ = np.maximum(self.top_, part.max(axis=0).toarray().ravel())
        C = (cross - (size * moments.mean)[:, R].T @ moments.mean) / freedom
        penalty = self.ridge * max(float(np.mean(np.diag(C[:, R]))), 1e-12)
        B = np.zeros((len(R), self.n_genes))
        if self.net is None:
            inverse = np.linalg.inv(C[:, R] + penalty * np.eye(len(R)))
            B[:] = inverse @ C
            own = -inverse / np.diag(inverse)  # regression of a regulator on the others, from the inverse
            own[np.diag_indices(len(R))] = 0.0
            B[:, R] = own
        else:
            where = {g: i for i, g in enumerate(R)}
            for target, group in self.net.groupby(K.TARGET):
                j = self._position[target]
                use = np.array([where[self._position[s]] for s in group[K.SOURCE]])
                B[use, j] = np.linalg.solve(C[np.ix_(use, R[use])] + penalty * np.eye(len(use)), C[use, j])
        self.coefficients_ = B
        shifts = [
            e.delta[row, self._position[t]] / e.control_mean[self._position[t]]
            for t, row in e.singles.items()
            if t in self._position and e.control_mean[self._position[t]] > 0.05
        ]
        self.relative_shift_ = float(np.median(shifts)) if shifts else -1.0

    def _informed(self, target: str) -> bool:
        return target in self._position and self._position[target] in set(self.regulators_.tolist())

    def _clamp(self, target: str) -> float:
        e, j = self.effects_, self._position[target]
        return float(e.delta[e.singles[target], j] if target in e.singles else self.relative_shift_ * e.control_mean[j])

    def _propagate(self, targets: tuple[str, ...]) -> np.ndarray:
        base = self.effects_.control_mean
        j = np.array([self._position[t] for t in targets])
        fixed = np.array([self._clamp(t) for t in targets])
        delta = np.zeros(self.n_genes)
        delta[j] = fixed
        for _ in range(self.n_steps):
            delta = np.clip(base + delta[self.regulators_] @ self.coefficients_, 0.0, self.top_) - base
            delta[j] = fixed
        return delta.astype(np.float32)

    def _predict_targets(self, targets: list[str]) -> np.ndarray:
        return np.stack([self._propagate((t,)) for t in targets])

    def get_grn(self) -> pd.DataFrame:
        """The fitted coefficients as a net ``source, target, weight``, strongest first."""
        self._check_trained()
        i, j = np.nonzero(self.coefficients_)
        genes = np.asarray(self.genes_, dtype=object)
        table = pd.DataFrame(
            {K.SOURCE: genes[self.regulators_[i]], K.TARGET: genes[j], K.WEIGHT: self.coefficients_[i, j]}
        )
        return table.sort_values(K.WEIGHT, key=np.abs, ascending=False, kind="stable", ignore_index=True)
