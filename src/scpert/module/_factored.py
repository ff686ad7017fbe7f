"""The factored family: basal state, masked perturbation effects, quality effect, GRN alignment. Tensors only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _keys as K
from ..nn._layers import MLP
from ..nn._stats import (
    bernoulli_kl,
    k_hop,
    k_hop_scale,
    nb_constant,
    nb_log_prob,
    normal_kl,
    normal_kl_pair,
    straight_through_bernoulli,
)

__all__ = ["FactoredModule"]

#: Log fold change below which the sign of an effect is smoothed.
_SMALL_EFFECT = 0.05


class BatchTargets(NamedTuple):
    """The distinct targets and perturbations of a batch: each is computed once and gathered to its cells."""

    rows: Tensor  #: distinct targets, ``(row,)``
    kind: Tensor  #: perturbation of each pair of a perturbation and one of its targets, ``(pair,)``
    row: Tensor  #: position in ``rows`` of each pair's target, ``(pair,)``
    which: Tensor  #: perturbation of each cell, ``(cell,)``
    n_kinds: int

    def add_up(self, values: Tensor) -> Tensor:
        """Sum of ``values`` ``(row, ...)`` over the targets of each perturbation, ``(perturbation, ...)``."""
        total = values.new_zeros(self.n_kinds, *values.shape[1:])
        return total.index_add(0, self.kind, values.index_select(0, self.row))


class FactoredModule(BaseModuleClass):
    r"""One network for CPA-VAE, SAMS-VAE, CRADLE-VAE and GPO-VAE.

    .. math::
        M_{tj} &\sim \mathrm{Bernoulli}(\pi) \qquad E_{tj} \sim N(0, \sigma_E^2) \qquad z_b \sim N(0, I) \\
        Z_p &= \sum_{t \in p} M_t \odot E_t \qquad
        \rho = \mathrm{softmax}\big(f([z_b, Z_p, q\,a]) + Z_p\big) \qquad x \sim \mathrm{NB}(l \rho, \theta)

    with targets :math:`t` of the perturbation :math:`p`, the quality flag :math:`q` and its effect :math:`a`. The
    second :math:`Z_p` (``skip``) is there where effects live in gene space; presets in latent space add
    (:math:`z_b + Z_p`) instead of concatenating. The objective is the ELBO per cell,

    .. math:: \log p(x \mid z) - KL(z_b) - \sum_{t \in p} \frac{KL(M_t) + KL(E_t)}{n_t} - \frac{KL(a)}{n},

    where :math:`n_t` counts the training cells with target :math:`t`: summed over the cells this is every global KL
    exactly once, computed for the rows that a batch needs.

    Parameters
    ----------
    n_genes, n_targets
        Sizes.
    target_gene
        Column of each target among the measured genes, -1 if it is not measured, ``(n_targets,)``.
    gene_space
        Effects have one entry a gene (GPO-VAE) instead of one a latent dimension.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        *,
        target_gene: np.ndarray,
        gene_space: bool,
        use_mask: bool,
        concatenate: bool,
        skip: bool,
        use_quality: bool,
        correlated_guide: bool,
        published: bool,
        n_latent: int,
        n_hidden: int,
        n_hidden_basal: int,
        n_layers: int,
        mask_prior: float,
        effect_scale: float,
        n_hops: int,
        hop_decay: float,
        grn_weight: float,
        sparsity_weight: float,
        counterfactual_weight: float,
        fold_change_threshold: float,
        n_particles: int,
        n_covariates: tuple[int, ...],
        open_panel: bool,
    ):
        super().__init__()
        self.gene_space, self.use_mask, self.concatenate, self.skip = gene_space, use_mask, concatenate, skip
        self.use_quality, self.correlated_guide, self.published = use_quality, correlated_guide, published
        self.n_genes, self.n_targets, self.n_latent = n_genes, n_targets, n_latent
        self.mask_prior, self.effect_scale, self.n_hops, self.hop_decay = mask_prior, effect_scale, n_hops, hop_decay
        self.grn_weight, self.sparsity_weight = grn_weight, sparsity_weight
        self.counterfactual_weight = counterfactual_weight
        self.fold_change_threshold, self.n_particles = fold_change_threshold, n_particles
        self.n_covariates, self.open_panel = tuple(n_covariates), open_panel
        width = n_genes if gene_space else n_latent
        self.width = width
        n_cov = sum(n_covariates)

        # global latents
        if use_mask:
            self.mask_logits = nn.Parameter(torch.zeros(n_targets, width))
        if correlated_guide:
            self.guide = MLP([width if use_mask else 0, n_targets], n_hidden, 4)
            self.guide_head = nn.Linear(n_hidden, 2 * width)
            nn.init.zeros_(self.guide_head.bias)
        else:
            self.effect_loc = nn.Parameter(0.01 * torch.randn(n_targets, width))
            self.effect_log_scale = nn.Parameter(torch.full((n_targets, width), -2.0))
        if use_quality:
            self.quality_loc = nn.Parameter(torch.zeros(n_latent))
            self.quality_log_scale = nn.Parameter(torch.full((n_latent,), -2.0))

        # per cell
        self.encoder = MLP([n_genes, width, n_latent if use_quality else 0, n_cov], n_hidden_basal, 1)
        self.encoder_head = nn.Linear(n_hidden_basal, 2 * n_latent)
        parts = [n_latent, width, n_latent if use_quality else 0] if concatenate else [n_latent, 0, 0]
        self.decoder = MLP([*parts, n_cov], n_hidden, n_layers)
        self.decoder_head = nn.Linear(n_hidden, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        if open_panel:  # the panel is part of a larger library: the rest takes what is left of the softmax
            self.rest_logit = nn.Parameter(torch.zeros(1))

        # constants
        self.register_buffer("x_mean", torch.zeros(n_genes))
        self.register_buffer("x_std", torch.ones(n_genes))
        self.register_buffer("cells_per_target", torch.ones(n_targets))
        column = torch.as_tensor(np.asarray(target_gene), dtype=torch.long)
        self.register_buffer("own_column", column)
        #: +1 where the perturbation raises its target, -1 where it lowers it ``(target,)``
        self.register_buffer("direction", torch.ones(n_targets))
        self.register_buffer("hop_rows", torch.nonzero(column >= 0).ravel())
        self.register_buffer("hop_columns", column[column >= 0])
        # evidence of the training cells, needed only while training: sign x probability of an effect
        self.register_buffer("evidence", torch.zeros(0), persistent=False)
        self.register_buffer("evidence_weight", torch.zeros(0), persistent=False)

    # ------------------------------------------------------------------------------------------ global latents

    def parameters_of(self, rows: Tensor | None) -> dict[str, Tensor]:
        """Rows of the global parameters, ``(row, width)`` each; a batch gathers its own once for all draws."""
        names = ["mask_logits"] if self.use_mask else []
        names += [] if self.correlated_guide else ["effect_loc", "effect_log_scale"]
        whole = {name: getattr(self, name) for name in names}
        return whole if rows is None else {name: value.index_select(0, rows) for name, value in whole.items()}

    def sample_rows(
        self, rows: Tensor, gathered: dict[str, Tensor], *, kl: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Draw effects ``(row, width)`` of some targets; and their KL ``(row,)``, if it is asked for."""
        mask = straight_through_bernoulli(gathered["mask_logits"]) if self.use_mask else None
        loc, log_scale = self.effect_parameters(rows, mask, gathered)
        effect = loc + torch.exp(log_scale) * torch.randn_like(loc)
        drawn = effect if mask is None else mask * effect
        if not kl:
            return drawn, None
        total = normal_kl(loc, log_scale, self.effect_scale).sum(1)
        if self.use_mask:
            total = total + bernoulli_kl(gathered["mask_logits"], self.mask_prior).sum(1)
        return drawn, total

    def effect_parameters(
        self, rows: Tensor, mask: Tensor | None, gathered: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Location and log-scale of q(E | M) for some targets, ``(row, width)`` each."""
        if not self.correlated_guide:
            gathered = self.parameters_of(rows) if gathered is None else gathered
            return gathered["effect_loc"], gathered["effect_log_scale"]
        which = F.one_hot(rows, self.n_targets).to(self.guide_head.weight.dtype)
        loc, log_scale = self.guide_head(self.guide(mask, which)).chunk(2, dim=1)
        return loc, log_scale.clamp(-6, 1) - 1.0

    def mean_rows(self, rows: Tensor) -> Tensor:
        """Posterior mean of the effects, ``(row, width)``."""
        gathered = self.parameters_of(rows)
        mask = torch.sigmoid(gathered["mask_logits"]) if self.use_mask else None
        loc, _ = self.effect_parameters(rows, mask, gathered)
        return loc if mask is None else mask * loc

    @staticmethod
    def distinct(codes: Tensor) -> BatchTargets:
        """Distinct targets and perturbations of cells with target codes ``(cell, slot)``, -1 where a slot is empty."""
        kinds, which = torch.unique(codes, dim=0, return_inverse=True)
        there = kinds >= 0
        rows, row = torch.unique(kinds[there], return_inverse=True)
        return BatchTargets(rows, torch.nonzero(there)[:, 0], row, which, len(kinds))

    # ------------------------------------------------------------------------------------------ scvi-tools' steps

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return {"tensors": tensors}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict, **kwargs: Any
    ) -> dict[str, Any]:
        return {"tensors": tensors, "inference_outputs": inference_outputs}

    def one_hot(self, covariates: Tensor) -> Tensor | None:
        """Covariates as 0/1 columns."""
        if not self.n_covariates:
            return None
        return torch.cat([F.one_hot(covariates[:, j], n).float() for j, n in enumerate(self.n_covariates)], dim=1)

    def standardise(self, x: Tensor, library: Tensor) -> Tensor:
        """Network input: standardised log1p, of raw counts (published) or of CP10k."""
        return (torch.log1p(x if self.published else x / library * K.TARGET_SUM) - self.x_mean) / self.x_std

    def embed(self, x: Tensor, library: Tensor) -> Tensor:
        """What the encoder's first layer makes of the counts: the same for every draw of the effects."""
        return self.encoder.first.parts[0](self.standardise(x, library))

    def encode(
        self,
        x: Tensor,
        library: Tensor,
        effect: tuple[Tensor, Tensor],
        artefact: Tensor | None,
        covariates: Tensor | None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Location and log-scale of q(z_b | x, p, q), ``(cell, n_latent)`` each."""
        embedded = self.embed(x, library) if embedded is None else embedded
        hidden = self.encoder(None, effect, artefact, covariates, start=embedded)
        loc, log_scale = self.encoder_head(hidden).chunk(2, dim=1)
        return loc, log_scale.clamp(-6, 4) - 1.0

    def decode(
        self, z: Tensor, effect: tuple[Tensor, Tensor], artefact: Tensor | None, covariates: Tensor | None
    ) -> Tensor:
        """Natural logarithm of the rates rho, ``(cell, gene)``."""
        if self.concatenate:
            hidden = self.decoder(z, effect, artefact, covariates)
        else:
            rows, index = effect
            z = z + rows[index] if artefact is None else z + rows[index] + artefact
            hidden = self.decoder(z, None, None, covariates)
        logits = self.decoder_head(hidden)
        if self.skip:
            rows, index = effect
            logits = logits + rows[index]
        if self.open_panel:
            total = torch.logaddexp(torch.logsumexp(logits, dim=1, keepdim=True), self.rest_logit)
            return logits - total
        return F.log_softmax(logits, dim=1)

    @auto_move_data
    def inference(self, tensors: dict[str, Tensor], first: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sample global rows and the basal state of each cell.

        ``first`` is the result of an earlier draw for the same cells: what does not depend on the draw is taken from it.
        """
        if first is None:
            embedded = self.embed(tensors["x"], tensors["library"])
            targets = self.distinct(tensors["codes"])
            gathered = self.parameters_of(targets.rows)
        else:
            embedded, targets, gathered = (first[k] for k in ("embedded", "targets", "gathered"))
        rows, which = targets.rows, targets.which
        effects, row_kl = self.sample_rows(rows, gathered, kl=first is None)
        perturbation = targets.add_up(effects)
        kl_per_cell = None if row_kl is None else targets.add_up(row_kl / self.cells_per_target[rows])[which]
        artefact = None
        if self.use_quality:
            draw = self.quality_loc + torch.exp(self.quality_log_scale) * torch.randn_like(self.quality_loc)
            artefact = tensors["quality"] * draw
        covariates = self.one_hot(tensors["covariates"])
        effect = (perturbation, which)
        loc, log_scale = self.encode(tensors["x"], tensors["library"], effect, artefact, covariates, embedded)
        z = loc + torch.exp(log_scale) * torch.randn_like(loc)
        return {
            "z": z,
            "embedded": embedded,
            "loc": loc,
            "log_scale": log_scale,
            "effect": effect,
            "artefact": artefact,
            "artefact_draw": draw if self.use_quality else None,
            "covariates": covariates,
            "kl_rows": kl_per_cell,
            "targets": targets,
            "gathered": gathered,
        }

    @auto_move_data
    def generative(self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]) -> dict[str, Tensor]:
        """Rates of each cell under its own quality; no other branch is decoded."""
        o = inference_outputs
        return {"log_rho": self.decode(o["z"], o["effect"], o["artefact"], o["covariates"])}

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        kl_weight: float = 1.0,
        n_obs: int = 1,
    ) -> LossOutput:
        """Negative ELBO per cell plus the alignment terms."""
        o, x, library = inference_outputs, tensors["x"], tensors["library"]
        constant, log_library = nb_constant(x, self.log_theta), torch.log(library)

        def reconstruct(log_rho: Tensor) -> Tensor:
            return -nb_log_prob(x, log_library + log_rho, self.log_theta, constant)

        reconstruction = reconstruct(generative_outputs["log_rho"])
        kl_rows = o["kl_rows"]
        if self.training and self.n_particles > 1:  # further draws of every latent
            for _ in range(self.n_particles - 1):
                again = self.inference(tensors, o)
                reconstruction = reconstruction + reconstruct(self.generative(tensors, again)["log_rho"])
            reconstruction = reconstruction / self.n_particles
        kl_cell = normal_kl(o["loc"], o["log_scale"]).sum(1)
        kl_global = torch.zeros((), device=x.device)
        if self.use_quality:
            kl_global = normal_kl(self.quality_loc, self.quality_log_scale).sum() / n_obs
        loss = (reconstruction + kl_weight * (kl_cell + kl_rows)).mean() + kl_weight * kl_global
        extra: dict[str, Tensor] = {}
        if self.use_quality and self.counterfactual_weight > 0 and "other_x" in tensors:
            extra["counterfactual"] = self._counterfactual(tensors, o)
            loss = loss + self.counterfactual_weight * extra["counterfactual"]
        if (
            self.gene_space
            and self.grn_weight > 0
            and len(o["targets"].rows)
            and (self.published or self.evidence.numel())
        ):
            extra["grn"] = self._alignment_published(tensors, o) if self.published else self._alignment(o)
            loss = loss + self.grn_weight * extra["grn"]
        if self.gene_space and self.use_mask and self.sparsity_weight > 0 and len(o["targets"].rows):
            extra["sparsity"] = torch.sigmoid(
                self.mask_logits if self.published else o["gathered"]["mask_logits"]
            ).mean()
            loss = loss + self.sparsity_weight * extra["sparsity"]
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction,
            kl_local=kl_cell + kl_rows,
            kl_global=kl_global * n_obs,
            extra_metrics=extra,
        )

    # ------------------------------------------------------------------------------------------ alignment terms

    def _counterfactual(self, tensors: dict[str, Tensor], o: dict[str, Any]) -> Tensor:
        """KL between the basal states of real cells of the other quality and of this cell, told that it has it."""
        has = tensors["has_other"].ravel() > 0
        if not bool(has.any()):
            return torch.zeros((), device=tensors["x"].device)
        rows, which = o["effect"]
        flipped = (1 - tensors["quality"][has]) * o["artefact_draw"]
        covariates = None if o["covariates"] is None else o["covariates"][has]
        other_library = tensors["other_library"][has]
        real = self.encode(tensors["other_x"][has], other_library, (rows, which[has]), flipped, covariates)
        told = self.encode(
            tensors["x"][has], tensors["library"][has], (rows, which[has]), flipped, covariates, o["embedded"][has]
        )
        return normal_kl_pair(*real, *told).sum(1).mean()

    def adjacency(self, rows: Tensor | None = None, gathered: dict[str, Tensor] | None = None) -> Tensor:
        """Each possible edge in [-1, 1]: mask probability x (smoothed) sign of the effect, ``(target, gene)``.

        The sign, not the size: a small effect can be certain, and the alignment must not inflate it.
        """
        gathered = self.parameters_of(rows) if gathered is None else gathered
        rows = torch.arange(self.n_targets, device=self.x_mean.device) if rows is None else rows
        mask = torch.sigmoid(gathered["mask_logits"]) if self.use_mask else None
        loc, _ = self.effect_parameters(rows, mask, gathered)
        strength = loc * torch.rsqrt(loc**2 + _SMALL_EFFECT**2)
        return strength if mask is None else mask * strength

    def _without_own(self, edges: Tensor, rows: Tensor) -> Tensor:
        """Edges ``(row, gene)`` without those of targets to themselves: a knock-down is no edge, and passes nothing on."""
        column = self.own_column[rows]
        has = torch.nonzero(column >= 0).ravel()
        return edges.index_put((has, column[has]), edges.new_zeros(()))

    def onward(self) -> Tensor:
        """What genes do that are raised, of the targets that are measured: edges times the direction ``(measured target, gene)``."""
        edges = self.adjacency(None if len(self.hop_rows) == self.n_targets else self.hop_rows)
        return self._without_own(edges, self.hop_rows) * self.direction[self.hop_rows, None]

    def _alignment(self, o: dict[str, Any]) -> Tensor:
        """Weighted squared distance of the K-hop accumulation from the signed evidence, for the rows in the batch.

        Edges are changes under the perturbation: where that lowers its target, a target that another perturbation lowers passes on
        what its own perturbation does, and one that is raised the opposite (:meth:`onward`). The network that passes effects on is held fixed within a step: gradients reach the rows in the batch, each of
        which has evidence of its own, and not all rows through every hop.
        """
        rows = o["targets"].rows
        own = self._without_own(self.adjacency(rows, o["gathered"]), rows)
        if self.n_hops and len(self.hop_rows):
            with torch.no_grad():
                onward = self.onward()
                square = onward[:, self.hop_columns]
                scale = k_hop_scale(square) / self.hop_decay
            total = k_hop(own, onward, square, self.hop_columns, self.n_hops, scale)
        else:
            total = own
        weight = self.evidence_weight[rows]
        return (weight * (total - self.evidence[rows]) ** 2).sum() / weight.sum().clamp_min(1.0)

    def _alignment_published(self, tensors: dict[str, Tensor], o: dict[str, Any]) -> Tensor:
        """The paper's term: L1 between the accumulated logits and |x - matched control| - threshold, per cell."""
        which = o["effect"][1]
        scale = torch.tensor(float(self.n_genes), device=which.device)
        start = o["gathered"]["mask_logits"]
        onward = self.parameters_of(None if len(self.hop_rows) == self.n_targets else self.hop_rows)["mask_logits"]
        total = k_hop(start, onward, onward[:, self.hop_columns], self.hop_columns, self.n_hops, scale)
        wanted = torch.log1p(tensors["x"] / tensors["library"] * K.TARGET_SUM)
        partner = torch.log1p(tensors["control_x"] / tensors["control_library"] * K.TARGET_SUM)
        target = (wanted - partner).abs() - self.fold_change_threshold
        return (o["targets"].add_up(total)[which] - target).abs().mean()

    # ------------------------------------------------------------------------------------------ prediction

    @torch.inference_mode()
    def basal(self, x: Tensor, library: Tensor, covariates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Posterior mean of z_b of good-quality control cells, and their covariates as 0/1 columns."""
        none = torch.zeros(1, self.width, device=x.device)
        index = torch.zeros(len(x), dtype=torch.long, device=x.device)
        cov = self.one_hot(covariates)
        artefact = torch.zeros(len(x), self.n_latent, device=x.device) if self.use_quality else None
        return self.encode(x, library, (none, index), artefact, cov)[0], cov

    @torch.inference_mode()
    def predict(self, z: Tensor, effect: Tensor, covariates: Tensor | None, *, failed: bool = False) -> Tensor:
        """Log rates ``(cell, gene)`` of cells with basal state ``z`` under one effect ``(width,)``.

        Of good quality, or with the effect of ``failed`` quality.
        """
        index = torch.zeros(len(z), dtype=torch.long, device=z.device)
        artefact = torch.zeros(len(z), self.n_latent, device=z.device) if self.use_quality else None
        if artefact is not None and failed:
            artefact = artefact + self.quality_loc
        return self.decode(z, (effect[None], index), artefact, covariates)
