"""GPO-VAE: effects in gene space, aligned with a network, and followed to targets that were never perturbed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from .. import _keys as K
from .._checks import check_fraction, check_positive, check_seed, check_whole, listing, suggest
from .._progress import progress
from ..data._effects import without_own
from ..data._perturbation import parse
from ..errors import LabelError, ScpertError, UnknownTargetError
from ._base import PerturbationModel, Reference
from ._factored import _Factored
from ._knowledge import GeneFeatures, read_knowledge, usable

__all__ = ["GPOVAE"]

logger = logging.getLogger("scpert")

#: Training targets from which on it can be judged whether knowledge predicts better than the mean.
_LEAST_TARGETS = 6


def knowledge_share(deviation: np.ndarray, mean: np.ndarray, measured: np.ndarray) -> float:
    r"""How far predictions of held-out training targets are followed beyond the mean, in [0, 1].

    The slope of the measured on the predicted deviations from the mean; 0 unless following it brings the predictions
    nearer, in correlation with the measured effects and in squared error, each with a one-sided 95 % limit of the paired
    gain over the targets above zero. Each target is judged with the slope of the others.

    Parameters
    ----------
    deviation
        Predicted deviation from the mean ``(target, gene)``, without the target's own effect.
    mean
        Mean of the measured effects that the prediction was made from ``(target, gene)``.
    measured
        Measured effects ``(target, gene)``.
    """
    n = len(measured)
    square, product = (deviation**2).sum(axis=1), (deviation * (measured - mean)).sum(axis=1)
    slope = np.clip((product.sum() - product) / np.maximum(square.sum() - square, 1e-12), 0.0, 1.0)
    followed = mean + slope[:, None] * deviation

    def correlation(a: np.ndarray) -> np.ndarray:
        a, b = a - a.mean(axis=1, keepdims=True), measured - measured.mean(axis=1, keepdims=True)
        return (a * b).sum(axis=1) / np.maximum(np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)), 1e-12)

    nearer = ((mean - measured) ** 2).sum(axis=1) - ((followed - measured) ** 2).sum(axis=1)
    for gain in (correlation(followed) - correlation(mean), nearer):
        if not gain.mean() > 1.645 * gain.std(ddof=1) / np.sqrt(n):
            return 0.0
    return float(np.clip(product.sum() / max(square.sum(), 1e-12), 0.0, 1.0))


def _rows_of(process: Any, targets: list[str]) -> np.ndarray:
    return np.asarray(process.predict_perturbation(targets, on_unknown="mean")[targets].layers[K.DELTA])


class GPOVAE(_Factored):
    r"""VAE of counts whose perturbation effects live in gene space and are aligned with a regulatory network.

    .. math::
        Z_p = \sum_{t \in p} M_t \odot E_t \in \mathbb{R}^{G}, \qquad
        \rho = \mathrm{softmax}\big(f([z_b, Z_p, q\,a]) + Z_p\big)

    so that :math:`\sigma(\hat W_{tj}) = q(M_{tj} = 1)` is the probability that target :math:`t` acts on gene :math:`j`
    and :math:`E_{tj}` its signed strength in log fold changes. The alignment term draws the K-hop accumulation of the
    signed adjacency :math:`A = \sigma(\hat W) \odot \mathrm{sign}(\hat E)` (smoothed near zero),

    .. math:: T_K = \sum_{k=0}^{K} (\gamma A / s)^k A, \qquad s \ge \text{spectral radius of } A, \ \gamma < 1,

    to the evidence of the training cells: sign times one minus local false discovery rate of every total effect.
    After GPO-VAE :cite:p:`GPOVAE2025`; ``published=True`` follows the paper's equations (no skip connection, effect
    guide that depends on the mask, accumulation of the raw logits, :math:`|x - \text{matched control}|` as target).
    The docs page lists every deviation.

    Parameters
    ----------
    adata
        Counts, set up by :meth:`setup_anndata`; ``quality_key`` and ``matched_control_key`` are used if given.
    n_latent, n_hidden
        Sizes of the basal state and of the hidden layers.
    n_hidden_basal
        Size of the hidden layer of the encoder of the basal state; ``None``: ``n_hidden``.
    n_hops
        Intermediate regulators over which an effect is accumulated.
    mask_prior
        Prior probability of an edge.
    grn_weight, sparsity_weight, counterfactual_weight
        Weights of the alignment, of the mean edge probability, and of the counterfactual term.
    published
        Follow the paper's equations.
    fold_change_threshold
        Subtracted from the paper's alignment target (only ``published=True``: 0.8 for K562, 0.5 for RPE1, 0.4 for
        Adamson).
    n_particles
        Draws of the latents per training step (the paper uses 5).
    effect_scale
        Prior standard deviation of an effect, in log fold changes.
    knowledge
        Prior knowledge about genes, as in :class:`KnowledgeGP`: name -> annotations, net or embedding. With it the model
        predicts targets that were never perturbed: their rows of mask x effect come from those of the training targets
        by a Gaussian process, followed as far as it predicts held-out training targets better than the mean does.
        Without it such targets are refused.
    shrinkage
        Combine the network's shift with the measured shift of training cells by empirical Bayes; default: unless
        ``published``.
    random_state
        Seed of the start weights.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.GPOVAE.setup_anndata(adata)
    >>> model = scpert.model.GPOVAE(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=2)
    >>> model.predict_perturbation().shape[1]
    40
    >>> list(model.get_grn().columns)[:3]
    ['source', 'target', 'weight']
    """

    _preset = {"use_quality": True, "gene_space": True, "concatenate": True}
    #: Weights of :meth:`get_grn` are changes under the perturbation; :func:`scpert.tl.infer_grn` turns them into signs
    #: of the regulator's activity.
    grn_sign = "perturbation"
    #: The paper's hyperparameters for its three data sets: ``GPOVAE(adata, **GPOVAE.PUBLISHED["k562"])``.
    PUBLISHED: Mapping[str, Mapping[str, Any]] = {
        name: {
            "published": True,
            "n_latent": n_latent,
            "n_hidden": 400,
            "n_hidden_basal": n_hidden_basal,
            "n_hops": 5,
            "mask_prior": 0.3,
            "grn_weight": 100.0,
            "sparsity_weight": sparsity_weight,
            "counterfactual_weight": 0.1,
            "fold_change_threshold": fold_change_threshold,
            "n_particles": 5,
        }
        for name, n_latent, n_hidden_basal, sparsity_weight, fold_change_threshold in (
            ("k562", 100, 200, 5.0, 0.8),
            ("rpe1", 200, 200, 10.0, 0.5),
            ("adamson", 100, 400, 1.0, 0.4),
        )
    }

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 100,
        n_hidden: int = 400,
        n_hidden_basal: int | None = None,
        n_hops: int = 5,
        mask_prior: float = 0.3,
        grn_weight: float = 100.0,
        sparsity_weight: float = 5.0,
        counterfactual_weight: float = 0.1,
        published: bool = False,
        fold_change_threshold: float = 0.5,
        n_particles: int = 1,
        effect_scale: float = 1.0,
        knowledge: Mapping[str, pd.DataFrame] | pd.DataFrame | None = None,
        shrinkage: bool | None = None,
        random_state: int = 0,
    ):
        random_state = check_seed(random_state)
        super().__init__(adata, registry)
        self._features = read_knowledge(knowledge)
        if self._features:
            self.scope = "unseen"
        for name, value in (
            ("grn_weight", grn_weight),
            ("sparsity_weight", sparsity_weight),
            ("counterfactual_weight", counterfactual_weight),
            ("fold_change_threshold", fold_change_threshold),
        ):
            check_positive(name, value, zero=True)
        options = self._remember(locals())
        options["shrinkage"] = (not published) if shrinkage is None else shrinkage
        self._build(
            options,
            published=published,
            skip=not published,
            correlated_guide=published,
            n_hops=n_hops,
            mask_prior=mask_prior,
            grn_weight=grn_weight,
            sparsity_weight=sparsity_weight,
            counterfactual_weight=counterfactual_weight,
            fold_change_threshold=fold_change_threshold,
            n_particles=n_particles,
            effect_scale=effect_scale,
        )
        if published:
            self._plan_defaults = {**self._plan_defaults, "lr": 3e-4}

    def get_grn(self, *, threshold: float = 0.5, regulators: Sequence[str] | None = None) -> pd.DataFrame:
        """The network in the model.

        Parameters
        ----------
        threshold
            Least probability of an edge.
        regulators
            Sources to read out; default: every target that was trained on. With ``knowledge=`` they may be genes that were
            never perturbed: their rows, of probabilities and of mask x effect, come from those of the training targets by
            a Gaussian process, and are followed beyond the mean row as far as held-out training targets confirm it. If they
            do not, such a gene has no edges, and a warning says so.

        Returns
        -------
        A net: ``source`` (target of perturbations), ``target`` (measured gene), ``weight`` (signed: probability x mean
        log fold change under the perturbation, see ``grn_sign``), ``probability``, ``std`` (posterior standard deviation
        of mask x effect; predictive for an inferred row), ``inferred`` (the source was never perturbed); strongest edges
        first. A target's effect on itself is left out.

        Raises
        ------
        UnknownTargetError
            If a regulator was neither trained on nor is known to ``knowledge=``.
        """
        self._check_trained()
        check_fraction("threshold", threshold)
        trained = [t for t in self.targets_ if t in self._trained_targets]
        names = (
            trained if regulators is None else list(dict.fromkeys(np.atleast_1d(np.asarray(regulators, dtype=object))))
        )
        probability, weight, std = self._network(names)
        keep = (probability > threshold) & (weight != 0)
        own = pd.Index(self.genes_).get_indexer(pd.Index(names))
        keep[np.flatnonzero(own >= 0), own[own >= 0]] = False
        source, target = np.nonzero(keep)
        net = pd.DataFrame(
            {
                K.SOURCE: np.asarray(names, dtype=object)[source],
                K.TARGET: np.asarray(self.genes_, dtype=object)[target],
                K.WEIGHT: weight[source, target],
                "probability": probability[source, target],
                "std": std[source, target],
                "inferred": ~np.isin(names, trained)[source],
            }
        )
        order = np.argsort(-net[K.WEIGHT].abs().to_numpy(), kind="stable")
        return net.iloc[order].reset_index(drop=True)

    def _network(self, regulators: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of each edge, probability x mean effect, and its standard deviation ``(regulator, gene)``."""
        inferred = [r for r in regulators if r not in self._trained_targets]
        unknown = [r for r in inferred if not self._covers(r)]
        if unknown:
            known = sorted(self._trained_targets | self._graph_targets())
            hints = {r: suggest(r, known) for r in unknown}
            first = next((f" Did you mean {listing(h)}?" for h in hints.values() if h), "")
            raise UnknownTargetError(
                f"regulators= holds {listing(unknown)}: never perturbed, and knowledge= says nothing of them.{first} Name "
                f"trained targets such as {listing(sorted(self._trained_targets), 4)}, or train with knowledge= of these genes.",
                tuple(unknown),
                hints,
            )
        rows = pd.Index(self.targets_).get_indexer(pd.Index(np.asarray(regulators, dtype=object)))
        index = torch.from_numpy(np.where(np.isin(regulators, inferred), 0, rows)).to(self.device)
        with torch.inference_mode():
            probability = torch.sigmoid(self.module.mask_logits)
            loc, log_scale = self.module.effect_parameters(index, probability[index])
            probability = probability[index]
            variance = probability * torch.exp(2 * log_scale) + probability * (1 - probability) * loc**2
        chance, weight, std = (a.cpu().numpy() for a in (probability, probability * loc, torch.sqrt(variance)))
        if inferred:
            where = np.flatnonzero(np.isin(regulators, inferred))
            chance[where], weight[where], std[where] = self._inferred_rows([regulators[i] for i in where])
        return chance, weight, std

    def _inferred_rows(self, genes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What :meth:`_network` gives, for genes that were never perturbed; 0 where knowledge is not confirmed."""
        centre, process, share = self._rows_from_knowledge
        if share == 0:
            logger.warning(
                "knowledge predicts held-out training targets no better than the mean: %s, never perturbed, get no edges.",
                listing(genes),
            )
            nothing = np.zeros((len(genes), self.n_genes), dtype=np.float32)
            return nothing, nothing.copy(), nothing.copy()
        found = process.predict_perturbation(genes, on_unknown="mean")[genes]
        singles = [t for t in self.targets_ if t in self.effects_.singles]
        chance = self._network(singles)[0]
        likely = _rows_of(self._fit_rows(singles, chance), genes)
        mean = chance.mean(axis=0)
        return (
            np.clip(mean + share * (likely - mean), 0.0, 1.0).astype(np.float32),
            (centre + share * (np.asarray(found.layers[K.DELTA]) - centre)).astype(np.float32),
            np.asarray(found.layers[K.STD], dtype=np.float32),
        )

    # ------------------------------------------------------------------------------------------ prior knowledge

    @cached_property
    def _used(self) -> dict[str, GeneFeatures]:
        """Tables of knowledge that know something of the training targets."""
        return usable(self._features, sorted(self.effects_.singles), type(self).__name__)

    def _graph_targets(self) -> frozenset[str]:
        tables = self._used if self._features and self.effects_ else self._features
        return frozenset().union(*(f.known for f in tables.values()))

    def _covers(self, target: str) -> bool:
        return target in self._graph_targets()

    def _unseen_delta(self, targets: list[str], reference: Reference, batch_size: int) -> tuple[np.ndarray, float]:
        """Mean effect plus a share of what the network makes of the rows that knowledge predicts; own genes as those of others.

        And this share.
        """
        centre, process, share = self._rows_from_knowledge
        delta = np.tile(self.effects_.mean, (len(targets), 1))
        if share > 0:
            shift = self._decode_rows(np.vstack([centre, _rows_of(process, targets)]), reference)
            delta = delta + share * (shift[1:] - shift[0])
        self.effects_.put_own([(t,) for t in targets], delta)
        return delta, share

    def _decode_rows(self, rows: np.ndarray, reference: Reference) -> np.ndarray:
        return self._decode_effects(torch.from_numpy(rows.astype(np.float32)).to(self.device), reference)

    @cached_property
    def _rows_from_knowledge(self) -> tuple[np.ndarray, Any, float]:
        """Mean row of mask x effect of the training targets, :class:`KnowledgeGP` on these rows, and its share.

        The share comes from cross-fitting: the rows of a fifth of the training targets are predicted from the others,
        kernels and all, decoded, and compared with the measured effects, beside the mean of all perturbations without
        these targets: what such a target is given where knowledge says nothing.
        """
        singles = [t for t in self.targets_ if t in self.effects_.singles]
        position = {t: i for i, t in enumerate(self.targets_)}
        with torch.inference_mode():
            index = torch.tensor([position[t] for t in singles], dtype=torch.long, device=self.device)
            rows = self.module.mean_rows(index).cpu().numpy()
        measured = self.effects_.delta[[self.effects_.singles[t] for t in singles]].astype(np.float64)
        centre = self._apart(singles, rows).mean(axis=0)
        n = len(singles)
        if n < _LEAST_TARGETS:
            logger.info("fewer than %d training targets: unseen targets have the mean effect", _LEAST_TARGETS)
            return centre, None, 0.0
        deviation, mean = np.zeros_like(measured), np.zeros_like(measured)
        order = np.random.default_rng(0).permutation(n)
        for fold in progress(np.array_split(order, 5), total=5, description="cross-fit knowledge", unit="fold"):
            rest = np.setdiff1d(order, fold)
            known = [singles[i] for i in rest]
            process, start = self._fit_rows(known, rows[rest]), self._apart(known, rows[rest]).mean(axis=0)
            decoded = self._decode_rows(
                np.vstack([start, _rows_of(process, [singles[i] for i in fold])]), self.reference_
            )
            # the mean that would be given without knowledge: of all perturbations, combinations too
            held = {singles[i] for i in fold}
            others = [i for i, targets in enumerate(self.effects_.targets) if not held & set(targets)]
            deviation[fold], mean[fold] = decoded[1:] - decoded[0], self.effects_.delta[others].mean(axis=0)
        own = self._target_gene[[position[t] for t in singles]]  # what it does to its own gene confirms no knowledge
        at = np.flatnonzero(own >= 0)
        deviation[at, own[at]], measured[at, own[at]] = 0.0, mean[at, own[at]]
        share = knowledge_share(deviation, mean, measured)
        process = self._fit_rows(singles, rows) if share > 0 else None
        if process is None or process.trust_ == 0:  # a fold or two may have been confirmed where all together are not
            process, share = None, 0.0
            logger.info(
                "knowledge predicts held-out training targets no better than the mean: unseen ones have the mean"
            )
        return centre, process, share

    def _apart(self, singles: list[str], rows: np.ndarray) -> np.ndarray:
        """Rows of the network without what a target does to its own gene: decoded, this would pass for knowledge of other genes."""
        return without_own(rows, [(t,) for t in singles], self.genes_)

    def _fit_rows(self, singles: list[str], rows: np.ndarray) -> Any:
        from ._gp import KnowledgeGP

        tables = self._options["knowledge"]
        tables = {"knowledge": tables} if isinstance(tables, pd.DataFrame) else tables
        table = AnnData(self._apart(singles, rows), obs=pd.DataFrame({K.PERTURBATION: singles}, index=singles))
        table.var_names = self.genes_
        KnowledgeGP.setup_anndata(table, scale=K.SCALE_EFFECTS)
        process = KnowledgeGP(table, knowledge={k: v for k, v in tables.items() if k in self._used})
        process.train()
        return process

    # ------------------------------------------------------------------------------------------ explanation and fit

    def explain(self, perturbation: str, *, n_edges: int = 30) -> pd.DataFrame:
        """The edges over which a perturbation reaches genes in the model's network, hop by hop.

        Parameters
        ----------
        perturbation
            A label whose targets were trained on.
        n_edges
            Strongest contributions to return.

        Returns
        -------
        DataFrame ``hop, source, target, weight``: the signed contribution of each edge to the K-hop accumulation that
        the alignment uses; hop 0 are the perturbation's own edges. Only measured targets pass effects on. Negative: it lowers
        the target under this perturbation.
        """
        self._check_trained()
        check_whole("n_edges", n_edges)
        targets = parse(perturbation, self.control_)
        if not targets:
            raise LabelError(f"{perturbation!r} is the control: it has no effect to explain.")
        missing = [t for t in targets if t not in self._trained_targets]
        if missing:
            hints = [hint for t in missing for hint in suggest(t, self._trained_targets, n=1)]
            raise UnknownTargetError(
                f"{perturbation!r}: the model was not trained on {listing(missing)}, so its network has no edges of it. "
                + (f"Did you mean {listing(hints)}? " if hints else "")
                + f"Name targets such as {listing(sorted(self._trained_targets), 4)}.",
                tuple(missing),
                {t: suggest(t, self._trained_targets) for t in missing},
            )
        m = self.module
        with torch.inference_mode():
            A, onward = m.adjacency().cpu().numpy(), m.onward().cpu().numpy()
        rows, columns = m.hop_rows.cpu().numpy(), m.hop_columns.cpu().numpy()
        own = self._target_gene >= 0
        A[np.flatnonzero(own), self._target_gene[own]] = 0.0
        square = np.abs(onward[:, columns])
        scale = max(1.0, float(np.sqrt(square.sum(0).max(initial=0) * square.sum(1).max(initial=0)))) / m.hop_decay
        genes, names = np.asarray(self.genes_, dtype=object), np.asarray(self.targets_, dtype=object)
        position = {t: i for i, t in enumerate(self.targets_)}
        parts = []
        start = A[[position[t] for t in targets]]
        for t, row in zip(targets, start, strict=True):
            parts.append(pd.DataFrame({"hop": 0, K.SOURCE: t, K.TARGET: genes, K.WEIGHT: row}))
        step = start.sum(axis=0)
        for hop in range(1, m.n_hops + 1):
            passed = step[columns] / scale
            contribution = passed[:, None] * onward
            i, j = np.nonzero(np.abs(contribution) > 1e-6)
            table = {"hop": hop, K.SOURCE: names[rows[i]], K.TARGET: genes[j], K.WEIGHT: contribution[i, j]}
            parts.append(pd.DataFrame(table))
            step = contribution.sum(axis=0)
        out = pd.concat(parts, ignore_index=True)
        out = out[out[K.WEIGHT] != 0]
        return out.iloc[np.argsort(-out[K.WEIGHT].abs().to_numpy(), kind="stable")[:n_edges]].reset_index(drop=True)

    def train(self, max_epochs: int | None = None, **kwargs: Any) -> None:
        """Train; see :meth:`PerturbationModel.train`. ``published=True`` draws matched controls as partners."""
        if self.module.published and self.setup_args_["matched_control_key"] is None:
            logger.info("no matched_control_key: controls of the same covariates are drawn at random as partners")
        if self._screen.adata.n_obs < 2:
            raise ScpertError("Training needs more than one cell.")
        for name in ("_rows_from_knowledge", "_used", "_known"):
            self.__dict__.pop(name, None)
        super().train(max_epochs, **kwargs)
        if self._features:
            self.__dict__.pop("_known", None)
            self._graph_targets()  # warns of tables that know nothing


GPOVAE.train.__doc__ = PerturbationModel.train.__doc__
