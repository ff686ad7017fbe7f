"""Conditional VAE and compositional autoencoder: a cell's latent and its perturbation meet before the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor, nn

from .. import _keys as K

__all__ = ["ConditionalModule"]


class _Reverse(torch.autograd.Function):
    """Identity on the way there, minus ``weight`` times the gradient on the way back (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.weight * grad, None


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
    return nn.Sequential(*layers)


class ConditionalModule(BaseModuleClass):
    r"""One of two ways to condition, on log1p CP10k values with a Gaussian likelihood.

    - ``additive=False`` (conditional VAE): :math:`z \sim q(z \mid x, e_p)`, :math:`\hat x = f(z, e_p)`.
    - ``additive=True`` (compositional): :math:`z = z_{basal}(x) + e_p + \sum_c e_c`, :math:`\hat x = f(z)`; an optional
      adversary reads the targets from :math:`z_{basal}` and its gradient is reversed.

    with :math:`e_p = \sum_{a \in p} e_a`.

    Parameters
    ----------
    n_genes, n_targets, n_categories
        Genes; targets; categories of each covariate.
    n_hidden, n_layers, n_latent
        Widths and number of hidden layers of encoder and decoder.
    additive
        See above.
    adversary_weight
        Strength of the adversary; 0: there is none.
    kl_weight
        Weight of the KL to the standard normal; 0 with ``additive`` makes it a plain autoencoder.
    scale
        ``"counts"`` or ``"log1p"``.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_categories: Sequence[int] = (),
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_latent: int = 32,
        additive: bool = False,
        adversary_weight: float = 0.0,
        kl_weight: float = 1.0,
        scale: str = K.SCALE_COUNTS,
    ):
        super().__init__()
        self.additive, self.scale, self.kl_weight = additive, scale, kl_weight
        self.adversary_weight = adversary_weight
        self.n_targets, self.n_latent = n_targets, n_latent
        width = n_latent if additive else n_hidden
        self.target_table = nn.Parameter(0.1 * torch.randn(n_targets, width))
        self.covariate_tables = nn.ParameterList([nn.Parameter(0.1 * torch.randn(n, width)) for n in n_categories])
        hidden = [n_hidden] * n_layers
        self.encoder = _layers([n_genes + (0 if additive else width), *hidden])
        self.mean = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent) if kl_weight > 0 else None
        self.decoder = _layers([n_latent + (0 if additive else width), *hidden])
        self.read = nn.Linear(n_hidden, n_genes)
        self.log_scale = nn.Parameter(torch.zeros(n_genes))
        self.adversary: nn.Sequential | None = None
        if adversary_weight > 0:
            self.adversary = nn.Sequential(*_layers([n_latent, n_hidden]), nn.Linear(n_hidden, n_targets))

    def gene_rows(self) -> list[tuple[str, int]]:
        """Names of the parameters whose leading entries on an axis are genes, and that axis."""
        return [("encoder.0.weight", 1), ("read.weight", 0), ("read.bias", 0)]

    def reset_by_name(self, rank: Tensor) -> None:
        """Give initial weights by the rank of the genes' names, so that the order of the columns is nothing."""
        parameters = dict(self.named_parameters())
        n = len(rank)
        with torch.no_grad():
            for name, axis in self.gene_rows():
                p = parameters[name]
                p.narrow(axis, 0, n).copy_(p.narrow(axis, 0, n).index_select(axis, rank))

    def condition(self, codes: Tensor, covariates: Tensor) -> Tensor:
        """Sum of the embeddings of targets and covariates, ``(cell, width)``."""
        padded = torch.cat([self.target_table, self.target_table.new_zeros(1, self.target_table.shape[1])])
        out = padded[codes].sum(1)  # a code of -1 is the last, zero row
        for j, table in enumerate(self.covariate_tables):
            out = out + table[covariates[:, j]]
        return out

    def log1p(self, x: Tensor, library: Tensor) -> Tensor:
        """Values of a batch as log1p CP10k."""
        return torch.log1p(x / library * K.TARGET_SUM) if self.scale == K.SCALE_COUNTS else x

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return {
            "x": self.log1p(tensors["x"], tensors["library"]),
            "condition": self.condition(tensors["codes"], tensors["covariates"]),
        }

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Tensor], **kwargs: Any
    ) -> dict:
        return {"z": inference_outputs["z"], "condition": inference_outputs["condition"]}

    @auto_move_data
    def inference(self, x: Tensor, condition: Tensor) -> dict[str, Any]:
        """Latent of the cell: ``z``, its ``mean``, and the KL ``(cell,)``."""
        h = self.encoder(x if self.additive else torch.cat([x, condition], 1))
        mean = self.mean(h)
        if self.log_variance is None:
            return {"x": x, "z": mean, "mean": mean, "kl": mean.new_zeros(len(mean)), "condition": condition}
        log_variance = self.log_variance(h).clamp(-8.0, 8.0)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        kl = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        return {"x": x, "z": z, "mean": mean, "kl": kl, "condition": condition}

    @auto_move_data
    def generative(self, z: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Mean of the cell's expression, ``(cell, gene)``."""
        h = self.decoder(z + condition if self.additive else torch.cat([z, condition], 1))
        return {"mean": self.read(h)}

    def loss(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], generative_outputs: dict[str, Any]
    ) -> LossOutput:
        """Gaussian likelihood with one variance a gene, KL, and the adversary's cross-entropy."""
        x, mean = inference_outputs["x"], generative_outputs["mean"]
        log_scale = self.log_scale.clamp(-5.0, 5.0)
        nll = (0.5 * ((x - mean) / log_scale.exp()) ** 2 + log_scale).sum(1)
        kl = inference_outputs["kl"]
        loss = nll.mean() + self.kl_weight * kl.mean()
        extra = {}
        if self.adversary is not None:
            seen = _Reverse.apply(inference_outputs["mean"], self.adversary_weight)
            codes = tensors["codes"]
            wanted = x.new_zeros(len(x), self.n_targets + 1).scatter_(
                1, codes.masked_fill(codes < 0, self.n_targets), 1.0
            )[:, :-1]
            adversary = nn.functional.binary_cross_entropy_with_logits(self.adversary(seen), wanted)
            loss = loss + len(self.read.bias) * adversary
            extra["adversary"] = adversary.detach()
        return LossOutput(loss=loss, reconstruction_loss=nll, kl_local=kl, extra_metrics=extra, n_obs_minibatch=len(x))
