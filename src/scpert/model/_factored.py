"""CPA-VAE, SAMS-VAE and CRADLE-VAE: presets of one module; GPO-VAE, the fourth, is in ``_gpovae.py``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_positive, check_seed, check_whole, listing
from .._progress import progress
from ..data._effects import Effects, perturbation_sign
from ..data._field import covariate_codes, quality_failures
from ..data._loader import PerturbationSplitter, ScreenTensors
from ..data._perturbation import encode, join, multi_hot
from ..data._screen import Screen
from ..errors import ScpertError
from ..module._factored import FactoredModule
from ..nn._stats import ExpectedLog1p, nb_log_prob
from ._base import PerturbationModel, Prediction, Reference

__all__ = ["CPAVAE", "CRADLEVAE", "SAMSVAE"]

logger = logging.getLogger("scpert")

_PREDICT_CELLS = 256


def signed_evidence(delta: np.ndarray, std_error: np.ndarray, n_iterations: int = 50) -> tuple[np.ndarray, np.ndarray]:
    r"""Sign times probability of an effect, by a two-group model of the z-scores of all (perturbation, gene) pairs.

    .. math:: z \sim \pi_0 N(0, 1) + (1 - \pi_0) N(0, 1 + \tau^2),

    fitted by EM; the evidence is :math:`\mathrm{sign}(z)\,(1 - \mathrm{lfdr}(z))`.

    Returns
    -------
    evidence and z, ``(perturbation, gene)``; 0 where the standard error is unknown or zero.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.nan_to_num(delta / std_error, nan=0.0, posinf=0.0, neginf=0.0)
    flat = z[np.isfinite(std_error) & (std_error > 0)].astype(np.float64)
    if len(flat) == 0:
        return np.zeros_like(z), z
    pi0, tau2 = 0.9, max(float(np.quantile(flat**2, 0.99)), 4.0)

    def posterior(values: np.ndarray) -> np.ndarray:
        log_odds = np.log((1 - pi0) / pi0) - 0.5 * np.log1p(tau2) + 0.5 * values**2 * (1 - 1 / (1 + tau2))
        return 1 / (1 + np.exp(-np.clip(log_odds, -50, 50)))

    for _ in range(n_iterations):
        p = posterior(flat)
        pi0 = float(np.clip(1 - p.mean(), 0.02, 0.9999))
        tau2 = float(np.clip((p * flat**2).sum() / max(p.sum(), 1e-9) - 1, 3.0, 1e4))
    return (np.sign(z) * posterior(z)).astype(np.float32), z


def _quality_values(screen: Screen, counts: sparse.csr_matrix, criteria: Sequence[str] | None) -> dict[str, np.ndarray]:
    """What the quality criteria look at, each ``(cell,)``."""
    from ..pp._quality import GENE_SETS, _symbols

    symbols = _symbols(screen.adata)
    total = np.asarray(counts.sum(axis=1)).ravel().astype(np.float64)
    counts.eliminate_zeros()
    out = {"counts_low": total, "genes_low": np.diff(counts.indptr).astype(np.float64)}
    for name, pattern in GENE_SETS.items():
        member = np.array([bool(pattern.match(x)) for x in symbols])
        if member.any():
            out[f"{name}_high"] = 100 * np.asarray(counts[:, member].sum(axis=1)).ravel() / np.maximum(total, 1)
    if criteria is None:
        return out
    return {c: out[check_choice("criteria", c, tuple(out))] for c in criteria}


class _Factored(PerturbationModel):
    """The family; a preset fixes ``_preset``."""

    scope = "combinations"
    _scales = (K.SCALE_COUNTS,)
    _uses = ("quality_key", "matched_control_key", "covariate_keys", "library_size_key")
    _preset: Mapping[str, Any] = {}
    _stratified = True
    _max_epochs = 100
    _group_labels = 32

    #: What measured effects add to the network's shift, ``(perturbation, gene)``; ``None`` without shrinkage.
    shrinkage_: Any
    spread_: np.ndarray

    def _build(self, options: dict[str, Any], **module: Any) -> None:
        gene = {g: i for i, g in enumerate(self.genes_)}
        self._target_gene = np.array([gene.get(t, -1) for t in self.targets_])
        settings = {
            "gene_space": False,
            "use_mask": True,
            "concatenate": False,
            "skip": False,
            "correlated_guide": False,
            "published": False,
            "n_layers": 2,
            "mask_prior": 0.1,
            "effect_scale": 1.0,
            "n_hops": 0,
            "hop_decay": 0.5,
            "grn_weight": 0.0,
            "sparsity_weight": 0.0,
            "counterfactual_weight": 0.0,
            "fold_change_threshold": 0.5,
            "n_particles": 1,
            **self._preset,
            **module,
            "use_quality": self._preset.get("use_quality", False) and self.setup_args_["quality_key"] is not None,
        }
        if self.setup_args_["quality_key"] is not None and not settings["use_quality"]:
            logger.info("%s makes no use of quality_key but for get_quality_ratio", type(self).__name__)
        basal = options.get("n_hidden_basal")
        sizes = {"n_latent": options["n_latent"], "n_hidden": options["n_hidden"]}
        sizes["n_hidden_basal"] = options["n_hidden"] if basal is None else basal
        sizes = {name: check_whole(name, size) for name, size in sizes.items()}
        settings["n_particles"] = check_whole("n_particles", settings["n_particles"])
        if check_positive("n_hops", settings["n_hops"], zero=True) != int(settings["n_hops"]):
            raise ScpertError(f"n_hops={settings['n_hops']!r}: give a whole number, 0 or above.")
        settings["n_hops"] = int(settings["n_hops"])
        check_positive("effect_scale", settings["effect_scale"])
        if check_fraction("mask_prior", settings["mask_prior"]) in (0, 1):
            raise ScpertError(
                f"mask_prior={settings['mask_prior']!r}: give a probability between 0 and 1, neither of them."
            )
        with self._seeded(options["random_state"]):
            self.module = FactoredModule(
                self.n_genes,
                len(self.targets_),
                target_gene=self._target_gene,
                **sizes,
                n_covariates=tuple(len(c) for c in self.covariates_.values()),
                open_panel=self.setup_args_["library_size_key"] is not None,
                **settings,
            )
        partners = []
        if self.module.use_quality and self.module.counterfactual_weight > 0:
            partners.append("quality")
        if self.module.published and self.module.gene_space and self.module.grn_weight > 0:
            partners.append("control")
        self._partners = tuple(partners)
        self.shrinkage_ = None

    # ------------------------------------------------------------------------------------------ training

    def _passing(self) -> np.ndarray:
        """Cells that passed quality control, all where the model does not look at it, boolean ``(cell,)``."""
        key = self.setup_args_["quality_key"] if self.module.use_quality else None
        return ~quality_failures(self._screen.adata, key)

    def _train_mask(self) -> np.ndarray:
        """Cells that effects are measured in: what a failed cell shows may be its failure. The module trains on all."""
        return super()._train_mask() & self._passing()

    def _effects_of(self, mask: np.ndarray) -> Effects:
        """Effects of passing cells, within the strata of the covariates, where there are any."""
        return super()._effects_of(mask & self._passing())

    def _learn_reference(self, random_state: int = 0) -> None:
        super()._learn_reference(random_state)
        lost = sorted({*self._screen.labels[super()._train_mask()]} - {self.control_, *self.effects_.labels})
        if lost:
            logger.warning("No training cell of %s passed quality control: no effect was measured.", listing(lost, 5))

    def _before_training(self, random_state: int) -> None:
        """Start where the training cells are: mean rates, dispersions and shrunken effects."""
        module, screen, mask = self.module, self._screen, self._train_mask()
        module.cpu()
        names, codes = np.unique(screen.labels.astype(str), return_inverse=True)
        codes = codes.reshape(-1)
        strata = self._strata()
        strata = np.zeros(screen.n_cells, dtype=np.int64) if strata is None else strata
        in_control = mask & screen.is_control
        n_strata = int(strata.max()) + 1
        codes = np.where(screen.is_control, len(names) + strata, codes)  # controls by stratum, behind the perturbations
        n_groups = len(names) + n_strata
        rate, square = (np.zeros((n_groups, self.n_genes)) for _ in range(2))
        raw = np.zeros((2, self.n_genes))
        exposure, n = np.zeros(n_groups), 0
        size = screen.library_size
        for rows, block in screen.chunks(normalised=False):
            keep = np.flatnonzero(mask[rows])
            if len(keep) == 0:
                continue
            block, library, group = block[keep].astype(np.float64), size[rows][keep], codes[rows][keep]
            member = sparse.csr_matrix((np.ones(len(keep)), (group, np.arange(len(keep)))), shape=(n_groups, len(keep)))
            rate += (member @ block).toarray()
            exposure += np.bincount(group, library, minlength=n_groups)
            square += (member @ block.power(2)).toarray()
            entered = block if module.published else sparse.diags_array(K.TARGET_SUM / library).tocsr() @ block
            entered = sparse.csr_matrix(entered).log1p()
            raw[0] += np.asarray(entered.sum(axis=0)).ravel()
            raw[1] += np.asarray(entered.power(2).sum(axis=0)).ravel()
            n += len(keep)
        mean = raw[0] / n
        std = np.sqrt(np.maximum(raw[1] / n - mean**2, 0.0))
        module.x_mean.copy_(torch.from_numpy(mean))
        module.x_std.copy_(torch.from_numpy(np.maximum(std, 1e-2)))

        effects = self.effects_
        labels, n_cells = np.unique(screen.labels[super()._train_mask()].astype(str), return_counts=True)
        hits = multi_hot(encode(labels, self.targets_, self.control_), len(self.targets_))
        module.cells_per_target.copy_(torch.from_numpy(np.maximum(hits.T @ n_cells, 1.0)))

        single = [t for t in self.targets_ if t in effects.singles]
        if single:
            of, position = [effects.singles[t] for t in single], pd.Index(self.genes_).get_indexer(pd.Index(single))
            sign = perturbation_sign(effects.delta[of], np.nan_to_num(effects.std_error[of], nan=np.inf), position)
            usual = 1.0 if sign.sum() > 0 else -1.0
            direction = pd.Series(sign, index=single).reindex(self.targets_).fillna(usual)
            module.direction.copy_(torch.tensor(direction.to_numpy(dtype=np.float32)))

        control = int(np.flatnonzero(names == self.control_)[0])
        by_stratum = slice(len(names), None)
        for sums in (rate, exposure, square):
            sums[control] = sums[by_stratum].sum(axis=0)
        prior = 0.5 * K.TARGET_SUM / np.maximum(exposure, 1.0)  # half a count a group
        per_10k = rate / np.maximum(exposure, 1.0)[:, None] * K.TARGET_SUM
        log_rate = np.log(per_10k + prior[:, None])
        base = log_rate[control]
        module.decoder_head.bias.data.copy_(torch.from_numpy(base - np.log(K.TARGET_SUM)))
        module.decoder_head.weight.data.mul_(0.1)
        if module.open_panel:
            rest = 1.0 - rate[control].sum() / max(exposure[control], 1.0)
            module.rest_logit.data.fill_(float(np.log(np.clip(rest, 1e-4, 1.0))))
        # method of moments on control cells: E[x^2 - x] = (1 + 1/theta) rho^2 E[l^2]
        rho = per_10k[control] / K.TARGET_SUM
        l2 = float((size[in_control] ** 2).sum())
        excess = (square[control] - rate[control]) / np.maximum(rho**2 * l2, 1e-12) - 1.0
        theta = 1.0 / np.clip(excess, 1e-2, 1e2)
        module.log_theta.data.copy_(torch.from_numpy(np.log(np.clip(theta, 0.05, 100.0))))

        if module.gene_space and not module.published:
            evidence, _ = signed_evidence(effects.delta, effects.std_error)
            row = {label: i for i, label in enumerate(effects.labels)}
            group_of = {label: i for i, label in enumerate(names)}
            # what the controls of the same strata would have: for each label the mean of their rates by its cells
            share = np.zeros((len(names), n_strata))
            perturbed = mask & ~screen.is_control
            np.add.at(share, (codes[perturbed], strata[perturbed]), 1.0)
            share /= np.maximum(share.sum(axis=1, keepdims=True), 1.0)
            signed = np.zeros((len(self.targets_), self.n_genes), dtype=np.float32)
            weight = np.zeros_like(signed)
            log_fold = np.zeros_like(signed)
            for t, target in enumerate(self.targets_):
                if target in row:
                    signed[t] = evidence[row[target]]
                    i = group_of[target]
                    expected = np.log(share[i] @ per_10k[by_stratum] + prior[control])
                    log_fold[t] = np.clip(log_rate[i] - expected, -4, 4)
                    weight[t] = np.isfinite(effects.std_error[row[target]])
                    if self._target_gene[t] >= 0:
                        weight[t, self._target_gene[t]] = 0.0  # the perturbation itself is no edge
            module.evidence = torch.from_numpy(signed)
            module.evidence_weight = torch.from_numpy(weight)
            probability = np.clip(np.abs(signed), 0.02, 0.98)
            module.mask_logits.data.copy_(torch.from_numpy(np.log(probability / (1 - probability))))
            if not module.correlated_guide:
                module.effect_loc.data.copy_(torch.from_numpy(log_fold * np.abs(signed)))

    def _after_training(self, tensors: ScreenTensors, splitter: PerturbationSplitter) -> None:
        """Empirical Bayes: how far measured training effects pull the prediction away from the network's.

        The network's shift is the prior mean, the training cells' shift with its standard error the likelihood; the
        prior variance of each gene is estimated by the method of moments, towards its mean over genes. The network has
        seen the training cells, so this alone trusts it too much: validation cells, which it has not seen, decide by
        non-negative least squares how much of the shrunken and of the whole residual is added.
        """
        self.__dict__.pop("_expected", None)
        self.__dict__.pop("_trained_targets", None)
        self.module.evidence = torch.zeros(0)
        self.module.evidence_weight = torch.zeros(0)
        self.shrinkage_ = None
        if not self._options.get("shrinkage", True):
            return
        effects = self.effects_
        network = self._network_delta(effects.targets, self.reference_, 1024)
        residual = effects.delta - network
        se2 = np.nan_to_num(effects.std_error.astype(np.float64) ** 2, nan=np.inf)
        known = np.isfinite(se2)
        excess = np.where(known, residual**2 - np.where(known, se2, 0.0), 0.0)
        count = np.maximum(known.sum(axis=0), 1)
        per_gene = excess.sum(axis=0) / count
        overall = float(excess.sum() / max(known.sum(), 1))
        prior_weight = 10.0
        tau2 = np.maximum((per_gene * count + prior_weight * overall) / (count + prior_weight), 0.0)
        weight = tau2 / (tau2 + se2 + 1e-12)
        share = self._validated_shares(network, weight * residual, residual, splitter)
        weight = np.where(known, np.minimum(share[0] * weight + share[1], 1.0), 0.0)
        self.shrinkage_ = (weight * residual).astype(np.float32)
        # an estimate of zero does not say that the network is exact: what the moments cannot tell from zero stays
        noise = np.where(known, se2, 0.0).sum(axis=0) / count
        unsure = np.maximum(tau2, np.sqrt(2.0 / (count + prior_weight)) * noise)
        self.spread_ = np.sqrt(weight * np.where(known, se2, 0.0) + (1 - weight) * unsure).astype(np.float32)

    def _validated_shares(
        self, network: np.ndarray, shrunken: np.ndarray, residual: np.ndarray, splitter: PerturbationSplitter
    ) -> tuple[float, float]:
        """Shares of the shrunken and the whole residual that predict validation cells best; (1, 0) without any."""
        from scipy.optimize import nnls

        mask = np.zeros(self._screen.n_cells, dtype=bool)
        mask[splitter.val_idx] = True
        if not (mask & self._screen.is_control).any() or not (mask & ~self._screen.is_control).any():
            return 1.0, 0.0
        held = self._effects_of(mask)
        mine = [self.effects_.row[label] for label in held.labels if label in self.effects_.row]
        theirs = [i for i, label in enumerate(held.labels) if label in self.effects_.row]
        noise = held.std_error[theirs].astype(np.float64) ** 2
        use = np.isfinite(noise) & np.isfinite(self.effects_.std_error[mine])
        if use.sum() < 100:
            return 1.0, 0.0
        precision = np.sqrt(1.0 / (noise[use] + noise[use].mean()))
        design = np.stack([shrunken[mine][use], residual[mine][use]], axis=1) * precision[:, None]
        shares, _ = nnls(design, (held.delta[theirs] - network[mine])[use] * precision)
        return float(min(shares[0], 1.5)), float(min(shares[1], 1.0))

    # ------------------------------------------------------------------------------------------ prediction

    @cached_property
    def _expected(self) -> ExpectedLog1p:
        theta = torch.exp(self.module.log_theta).detach().cpu().numpy()
        return ExpectedLog1p(theta, self.reference_.library)

    def _unseen_delta(self, targets: list[str], reference: Reference, batch_size: int) -> tuple[np.ndarray, float]:
        """Shift ``(target, gene)`` of targets that the model was not trained on, and how far knowledge makes it."""
        raise NotImplementedError

    def _effect(self, targets: list[tuple[str, ...]]) -> torch.Tensor:
        """Posterior mean effect of each set of targets, ``(perturbation, width)``."""
        with torch.inference_mode():
            codes = self._codes(targets)
            rows = torch.unique(codes[codes >= 0])
            member = (codes.unsqueeze(2) == rows).any(1).float()
            return member.to(self.device) @ self.module.mean_rows(rows.to(self.device))

    def _basal(self, reference: Reference) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.from_numpy(reference.values.toarray().astype(np.float32)).to(self.device)
        library = torch.from_numpy(reference.library[:, None]).to(self.device)
        return self.module.basal(x, library, torch.from_numpy(reference.covariates).to(self.device))

    def _network_delta(self, targets: list[tuple[str, ...]], reference: Reference, batch_size: int) -> np.ndarray:
        """Shift that the network alone predicts, log1p CP10k ``(perturbation, gene)``; paired with its own control."""
        return self._decode_effects(self._effect(targets), reference)

    def _decode_effects(self, effect: torch.Tensor, reference: Reference) -> np.ndarray:
        """Shift of the mean log1p CP10k under each effect ``(perturbation, width)``."""
        if len(reference) > _PREDICT_CELLS:
            reference = reference.take(np.linspace(0, len(reference) - 1, _PREDICT_CELLS).astype(int))
        z, covariates = self._basal(reference)
        expected = self._expected
        with torch.inference_mode():
            zero = torch.zeros(self.module.width, device=self.device)
            start = expected(self.module.predict(z, zero, covariates)).mean(0)
            out = np.empty((len(effect), self.n_genes), dtype=np.float32)
            for i in progress(range(len(effect)), description="predict", unit="perturbation"):
                out[i] = (expected(self.module.predict(z, effect[i], covariates)).mean(0) - start).cpu().numpy()
        return out

    def _residual(self, targets: tuple[str, ...]) -> np.ndarray:
        """What measured effects add to the network's shift."""
        row = self.effects_.row.get(join(targets, self.control_))
        if row is not None:
            return self.shrinkage_[row]
        rows = [self.effects_.singles[t] for t in targets if t in self.effects_.singles]
        return self.shrinkage_[rows].sum(axis=0)

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        trained = [tuple(t for t in wanted if t in self._trained_targets) for wanted in targets]
        unseen = sorted({t for wanted in targets for t in wanted if t not in self._trained_targets})
        delta = np.zeros((len(targets), self.n_genes), dtype=np.float32)
        std = None if self.shrinkage_ is None else np.full_like(delta, np.nan)
        some = [i for i, t in enumerate(trained) if t]
        if some:
            delta[some] = self._network_delta([trained[i] for i in some], reference, batch_size)
        if std is not None:
            for i in some:
                delta[i] += self._residual(trained[i])
                row = self.effects_.row.get(join(targets[i], self.control_))
                rows = [self.effects_.singles.get(t) for t in targets[i]] if row is None else [row]
                if None not in rows:  # the corrections of the singles are added
                    std[i] = np.sqrt((self.spread_[rows] ** 2).sum(axis=0))
        if unseen:
            shift, share = self._unseen_delta(unseen, reference, batch_size)
            position = {t: j for j, t in enumerate(unseen)}
            for i, wanted in enumerate(targets):
                new = [position[t] for t in wanted if t in position]
                delta[i] += shift[new].sum(axis=0)
                if len(new) == len(wanted):  # what stands for the mean in all of them is one mean, not their sum
                    delta[i] -= (1 - share) * (len(new) - 1) * self.effects_.mean
        return Prediction(delta, std)

    def _predict_cells(
        self,
        targets: tuple[str, ...],
        delta: np.ndarray,
        reference: Reference,
        rng: np.random.Generator,
        batch_size: int,
    ) -> np.ndarray:
        """Counts drawn from the decoder, as log1p CP10k; rates are scaled so that the mean shift is ``delta``."""
        if any(t not in self._trained_targets for t in targets):  # no row of its own: shift the cells
            return super()._predict_cells(targets, delta, reference, rng, batch_size)
        counts = self._draw_counts(targets, reference, rng, delta=delta)
        return np.log1p(counts / reference.library[:, None] * K.TARGET_SUM).astype(np.float32)

    def _draw_counts(
        self,
        targets: tuple[str, ...],
        reference: Reference,
        rng: np.random.Generator,
        *,
        delta: np.ndarray | None = None,
        failed: bool = False,
    ) -> np.ndarray:
        """Counts ``(cell, gene)`` of the reference's cells under a perturbation; rates scaled to the shift ``delta``."""
        z, covariates = self._basal(reference)
        effect = self._effect([targets])[0]
        with torch.inference_mode():
            log_rho = self.module.predict(z, effect, covariates, failed=failed)
            rates = log_rho.cpu().numpy()
            if delta is not None:
                expected = self._expected
                start = expected(self.module.predict(z, torch.zeros_like(effect), covariates)).mean(0)
                wanted = np.maximum(start.cpu().numpy() + delta, 0.0)
                factor = expected.inverse(wanted) - expected.inverse(expected(log_rho).mean(0).cpu().numpy())
                rates = rates + np.clip(factor, -8, 8)
        rho = np.exp(np.minimum(rates, 0.0))
        theta = torch.exp(self.module.log_theta).detach().cpu().numpy()
        return rng.poisson(rng.gamma(theta, 1.0, rho.shape) * (reference.library[:, None] * rho / theta))

    # ------------------------------------------------------------------------------------------ read-outs

    def get_latent_representation(self, adata: AnnData | None = None, *, batch_size: int | None = None) -> np.ndarray:
        """Basal state of cells: what is left when perturbation and quality are accounted for.

        Parameters
        ----------
        adata
            Cells; by default the registered ones. Cells without labels count as controls; targets that the model was
            not trained on raise.
        batch_size
            Cells per batch.

        Returns
        -------
        float32 array ``(cell, n_latent)``.
        """
        self._check_trained()
        screen = self._screen_of(adata, labels=False)
        data = screen.adata
        codes = encode(screen.labels, self.targets_, self.control_)
        quality = self.setup_args_["quality_key"]
        failed = quality_failures(data, quality if quality in data.obs else None)
        covariates = covariate_codes(data, self.covariates_)
        size = self._batch_size if batch_size is None else batch_size
        out = np.empty((screen.n_cells, self.module.n_latent), dtype=np.float32)
        m, device = self.module, self.device
        with torch.inference_mode():
            for start in range(0, screen.n_cells, size):
                rows = np.arange(start, min(start + size, screen.n_cells))
                x = torch.from_numpy(screen.rows(rows, normalised=False).toarray().astype(np.float32)).to(device)
                library = torch.from_numpy(screen.library_size[rows].astype(np.float32)[:, None]).to(device)
                targets = m.distinct(torch.from_numpy(codes[rows]).to(device))
                effect = (targets.add_up(m.mean_rows(targets.rows)), targets.which)
                artefact = None
                if m.use_quality:
                    artefact = torch.from_numpy(failed[rows].astype(np.float32)[:, None]).to(device) * m.quality_loc
                cov = m.one_hot(torch.from_numpy(covariates[rows]).to(device))
                out[rows] = m.encode(x, library, effect, artefact, cov)[0].cpu().numpy()
        return out

    def get_perturbation_embedding(self) -> pd.DataFrame:
        """Posterior mean effects ``(target, dim)``; for GPOVAE the dimensions are genes, in log fold changes."""
        self._check_trained()
        rows = torch.arange(len(self.targets_), device=self.device)
        with torch.inference_mode():
            values = self.module.mean_rows(rows).cpu().numpy()
        columns = self.genes_ if self.module.gene_space else [f"dim_{i}" for i in range(values.shape[1])]
        return pd.DataFrame(values, index=pd.Index(self.targets_, name="target"), columns=columns)

    # ------------------------------------------------------------------------------------------ the papers' metrics

    def get_iwelbo(self, *, split: str = K.TEST, n_samples: int = 100, batch_size: int = 256) -> float:
        r"""Importance-weighted bound on the log-likelihood per cell, on cells of one part of the split.

        .. math:: \frac{1}{n} \sum_i \log \frac{1}{S} \sum_{s=1}^{S}
            \frac{p(x_i \mid z_s, p_i)\, p(z_s)}{q(z_s \mid x_i, p_i)}

        with the effects at their posterior mean: the bound of the cells given what was learned of the perturbations.

        Parameters
        ----------
        split
            ``"test"``, ``"val"`` or ``"train"``; without a ``split_key`` all cells are training cells.
        n_samples
            Draws :math:`S` per cell (the papers use 100).
        batch_size
            Cells at a time.
        """
        self._check_trained()
        n_samples, batch_size = check_whole("n_samples", n_samples), check_whole("batch_size", batch_size)
        tensors = ScreenTensors(self._screen, self._field_state, self.setup_args_)
        rows = self._rows_in(split)
        m, device, total = self.module, self.device, 0.0
        with self._seeded(0), torch.inference_mode():
            for start in progress(range(0, len(rows), batch_size), description="IWELBO", unit="batch"):
                batch = {k: v.to(device) for k, v in tensors.batch(rows[start : start + batch_size]).items()}
                targets = m.distinct(batch["codes"])
                effect = (targets.add_up(m.mean_rows(targets.rows)), targets.which)
                artefact = batch["quality"] * m.quality_loc if m.use_quality else None
                covariates = m.one_hot(batch["covariates"])
                loc, log_scale = m.encode(batch["x"], batch["library"], effect, artefact, covariates)
                weights = []
                for _ in range(n_samples):
                    noise = torch.randn_like(loc)
                    z = loc + torch.exp(log_scale) * noise
                    log_mean = torch.log(batch["library"]) + m.decode(z, effect, artefact, covariates)
                    log_p = nb_log_prob(batch["x"], log_mean, m.log_theta)
                    weights.append(log_p + (0.5 * noise**2 - 0.5 * z**2 + log_scale).sum(1))
                total += float((torch.logsumexp(torch.stack(weights), 0) - np.log(n_samples)).sum())
        return total / len(rows)

    def _rows_in(self, split: str) -> np.ndarray:
        """Rows of one part of the split that are controls or of a trained perturbation."""
        check_choice("split", split, (K.TRAIN, K.VAL, K.TEST))
        key = self.setup_args_["split_key"]
        labels = self._screen.labels
        part = self._screen.adata.obs[key].astype(str).to_numpy() if key else np.full(len(labels), K.TRAIN)
        rows = np.flatnonzero((part == split) & np.isin(labels, [*self.effects_.labels, self.control_]))
        if len(rows) == 0:
            raise ScpertError(
                f"No cell of a trained perturbation is in split={split!r}; "
                + (f"adata.obs[{key!r}] has {listing(np.unique(part))}." if key else "the model has no split_key=.")
            )
        return rows

    def get_quality_ratio(
        self,
        *,
        split: str = K.TEST,
        n_mads: Sequence[float] = (3, 4, 5),
        criteria: Sequence[str] | None = None,
        n_cells: int = 100,
        random_state: int = 0,
    ) -> pd.DataFrame:
        r"""Share of generated cells that pass the quality criteria: the QC ratio of CRADLE-VAE and GPO-VAE.

        A cell passes at :math:`n` MADs if none of its total counts and number of genes lies below, and none of its per
        cent mitochondrial, ribosomal and haemoglobin counts above, median :math:`\mp\, n` MAD (not scaled) of real
        cells. These are held-out cells of good quality (all, without a ``quality_key``), ``n_cells`` a perturbation at
        most. The criteria are those of :func:`scpert.pp.quality_flags` but for doublets, which one generated cell cannot
        be. Generated cells have the library sizes of control cells of the training data, and totals of their own.

        Parameters
        ----------
        split
            Where the real cells are from: ``"test"``, ``"val"`` or ``"train"``.
        n_mads
            Widths.
        criteria
            Which of ``counts_low``, ``genes_low``, ``mito_high``, ``ribo_high``, ``hb_high``; by default all that the genes
            allow and whose MAD is not zero. Leave out ``hb_high`` in erythroid cells.
        n_cells
            Cells of each perturbation, real ones for the thresholds at most, and generated ones.
        random_state
            Seed of both.

        Returns
        -------
        DataFrame, a row for each width: ``real`` (share of all real cells of the split), ``generated`` (decoded with good
        quality), ``generated_failed`` (decoded with failed quality; NaN without a ``quality_key``).

        Raises
        ------
        ScpertError
            If the split has no cell, or no criterion can be had.
        """
        self._check_trained()
        check_positive("n_cells", n_cells)
        random_state = check_seed(random_state)
        widths = [check_positive("n_mads", width) for width in np.atleast_1d(np.asarray(n_mads, dtype=float))]
        screen, rows = self._screen, self._rows_in(split)
        rng = np.random.default_rng(random_state)
        key = self.setup_args_["quality_key"]
        good = rows if key is None else rows[~quality_failures(screen.adata, key)[rows]]
        labels = screen.labels
        some = [rng.permutation(good[labels[good] == x])[: int(n_cells)] for x in np.unique(labels[good])]
        if not some:
            raise ScpertError(f"No cell of split={split!r} passes {key!r}: there is nothing to set the thresholds by.")
        real = _quality_values(screen, screen.rows(np.concatenate(some), normalised=False), criteria)
        median = {c: np.median(v) for c, v in real.items()}
        mad = {c: np.median(np.abs(v - median[c])) for c, v in real.items()}
        used = [c for c in real if mad[c] > 0]
        if not used:
            raise ScpertError(
                "No criterion can be had: the genes are not measured, or every MAD is zero. Name criteria=."
            )

        def passing(counts: Any) -> np.ndarray:
            """``(width,)``."""
            values = _quality_values(screen, sparse.csr_matrix(counts), used)
            away = np.max(
                [(median[c] - v if c.endswith("low") else v - median[c]) / mad[c] for c, v in values.items()], axis=0
            )
            return np.array([np.mean(away <= width) for width in widths])

        wanted = [x for x in np.unique(labels[rows]) if x in self.effects_.row]
        branches = [False, True] if self.module.use_quality else [False]
        shares: dict[bool, list[np.ndarray]] = {failed: [] for failed in branches}
        for label in progress(wanted, total=len(wanted), description="QC ratio", unit="perturbation"):
            start = self.reference_.take(np.sort(rng.choice(len(self.reference_), int(n_cells))))
            for failed in branches:
                targets = self.effects_.targets[self.effects_.row[label]]
                shares[failed].append(passing(self._draw_counts(targets, start, rng, failed=failed)))
        table = {"real": passing(screen.rows(rows, normalised=False)), "generated": np.mean(shares[False], axis=0)}
        table["generated_failed"] = np.mean(shares[True], axis=0) if True in shares else np.full(len(widths), np.nan)
        return pd.DataFrame(table, index=pd.Index(widths, name="n_mads"))

    # ------------------------------------------------------------------------------------------ files

    def _get_state(self) -> dict[str, Any]:
        state = super()._get_state()
        if self.shrinkage_ is not None:
            state["shrinkage"] = {"residual": self.shrinkage_, "spread": self.spread_}
        return state

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        if "shrinkage" in state:
            self.shrinkage_, self.spread_ = state["shrinkage"]["residual"], state["shrinkage"]["spread"]


class CPAVAE(_Factored):
    r"""Variational compositional autoencoder: :math:`z = z_b + \sum_{t \in p} E_t` in latent space.

    The compositional idea of CPA :cite:p:`Lotfollahi2023` with a variational basal state and without an adversary, as
    used as a baseline by SAMS-VAE :cite:p:`Bereket2023`.

    Parameters
    ----------
    adata
        Counts, set up by :meth:`setup_anndata`.
    n_latent, n_hidden
        Sizes.
    shrinkage
        Combine the network's shift with the measured shift of training cells by empirical Bayes.
    random_state
        Seed of the start weights.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.CPAVAE.setup_anndata(adata)
    >>> model = scpert.model.CPAVAE(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=2)
    >>> model.get_latent_representation().shape
    (300, 5)
    """

    _preset = {"use_mask": False}

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 32,
        n_hidden: int = 128,
        shrinkage: bool = True,
        random_state: int = 0,
    ):
        random_state = check_seed(random_state)
        super().__init__(adata, registry)
        self._build(self._remember(locals()))


class SAMSVAE(_Factored):
    r"""Sparse additive mechanism shift VAE: :math:`z = z_b + \sum_{t \in p} M_t \odot E_t` in latent space.

    After :cite:t:`Bereket2023`; global KL terms are analytic, see :class:`~scpert.module._factored.FactoredModule`.

    Parameters
    ----------
    adata
        Counts, set up by :meth:`setup_anndata`.
    n_latent, n_hidden
        Sizes.
    mask_prior
        Prior probability that a perturbation acts on a latent dimension.
    correlated_guide
        Let the effect's posterior depend on the mask (a network), as published; else mean-field.
    n_particles
        Draws of the latents per training step.
    shrinkage, random_state
        As in :class:`CPAVAE`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.SAMSVAE.setup_anndata(adata)
    >>> model = scpert.model.SAMSVAE(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=2)
    >>> model.get_perturbation_embedding().shape
    (5, 5)
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 32,
        n_hidden: int = 128,
        mask_prior: float = 0.1,
        correlated_guide: bool = False,
        n_particles: int = 1,
        shrinkage: bool = True,
        random_state: int = 0,
    ):
        random_state = check_seed(random_state)
        super().__init__(adata, registry)
        self._build(
            self._remember(locals()), mask_prior=mask_prior, correlated_guide=correlated_guide, n_particles=n_particles
        )


class CRADLEVAE(_Factored):
    r"""SAMS-VAE with an effect of failed quality and counterfactual reasoning about it.

    After CRADLE-VAE :cite:p:`Baek2024`: :math:`z = z_b + \sum_t M_t \odot E_t + q\,a` with the quality flag :math:`q`.
    The counterfactual term compares the basal state of a cell, told that it has the other quality, with that of a real
    cell of the same perturbation and that quality. Needs ``quality_key``; without it this is SAMS-VAE.

    Parameters
    ----------
    adata
        Counts, set up by :meth:`setup_anndata` with ``quality_key``.
    n_latent, n_hidden, mask_prior, correlated_guide, n_particles, shrinkage, random_state
        As in :class:`SAMSVAE`.
    counterfactual_weight
        Weight of the counterfactual term.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.CRADLEVAE.setup_anndata(adata)
    >>> model = scpert.model.CRADLEVAE(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=2)
    >>> model.predict_perturbation().shape[1]
    40
    """

    _preset = {"use_quality": True}

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 32,
        n_hidden: int = 128,
        mask_prior: float = 0.1,
        counterfactual_weight: float = 0.1,
        correlated_guide: bool = False,
        n_particles: int = 1,
        shrinkage: bool = True,
        random_state: int = 0,
    ):
        random_state = check_seed(random_state)
        super().__init__(adata, registry)
        self._build(
            self._remember(locals()),
            mask_prior=mask_prior,
            counterfactual_weight=counterfactual_weight,
            correlated_guide=correlated_guide,
            n_particles=n_particles,
        )
