"""GEARS and BioDSNN: one network of two streams.

The knowledge stream turns a perturbation into one number per gene. It depends on genes and perturbations only, so it
runs once for each distinct perturbation of a batch, on one (gene, hidden) table, and its result is gathered to the
cells. The data stream (BioDSNN) is a variational autoencoder of the control cell that is paired with each cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy import sparse
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import _keys as K
from ..nn._graph import EdgeAttention, GraphConv

__all__ = ["CellStream", "GraphModule", "KnowledgeStream", "autofocus_loss", "direction_loss"]

_LOG_VARIANCE_RANGE = (-8.0, 8.0)


# ---------------------------------------------------------------------------------------------- loss


def _per_perturbation_mean(per_cell: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Mean over perturbations of the mean over their cells: few cells weigh as much as many."""
    total = per_cell.new_zeros(n_groups).index_add_(0, group, per_cell)
    count = per_cell.new_zeros(n_groups).index_add_(0, group, torch.ones_like(per_cell))
    return (total / count.clamp_min(1.0)).sum() / (count > 0).sum()


def autofocus_loss(
    predicted: Tensor,
    observed: Tensor,
    group: Tensor,
    n_groups: int,
    *,
    exponent: float,
    gene_weight: Tensor | None = None,
) -> Tensor:
    r"""Mean over perturbations, their cells and genes of :math:`|x - \hat x|^{2+\gamma}` (GEARS, BioDSNN).

    Parameters
    ----------
    predicted, observed
        ``(cell, gene)``.
    group
        Perturbation of each cell, int64 ``(cell,)``.
    n_groups
        Number of perturbations.
    exponent
        :math:`2 + \gamma`.
    gene_weight
        ``(gene,)``, mean 1.
    """
    error = (predicted - observed).abs()
    error = error * error if exponent == 2 else (error * error) ** 2 if exponent == 4 else error**exponent
    if gene_weight is not None:
        error = error * gene_weight
    return _per_perturbation_mean(error.mean(1), group, n_groups)


def direction_loss(
    predicted: Tensor, observed: Tensor, control: Tensor, group: Tensor, n_groups: int, *, temperature: float
) -> Tensor:
    r"""Mean of :math:`[\tanh((x-c)/\tau) - \tanh((\hat x-c)/\tau)]^2` over perturbations, cells and genes.

    The published term has signs in the place of the two hyperbolic tangents, and so no gradient;
    it is the limit :math:`\tau \to 0`.

    Parameters
    ----------
    predicted, observed
        ``(cell, gene)``.
    control
        Mean of the control cells, ``(gene,)``.
    group, n_groups
        As in :func:`autofocus_loss`.
    temperature
        :math:`\tau`, in units of log1p CP10k.
    """
    error = (torch.tanh((observed - control) / temperature) - torch.tanh((predicted - control) / temperature)) ** 2
    return _per_perturbation_mean(error.mean(1), group, n_groups)


# ---------------------------------------------------------------------------------------------- knowledge stream


def _mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class _MaskedEncoderLayer(nn.Module):
    """One transformer encoder layer (post-norm) whose attention sees the edges of the mask only."""

    def __init__(self, mask: sparse.spmatrix, n_hidden: int, n_heads: int, n_feedforward: int):
        super().__init__()
        self.attention = EdgeAttention(mask, n_hidden, n_heads)
        self.norm1, self.norm2 = nn.LayerNorm(n_hidden), nn.LayerNorm(n_hidden)
        self.feedforward = nn.Sequential(
            nn.Linear(n_hidden, n_feedforward), nn.ReLU(), nn.Linear(n_feedforward, n_hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.feedforward(x))


class KnowledgeStream(nn.Module):
    """From a set of targets to one shift per gene.

    Parameters
    ----------
    gene_adjacency
        Normalised co-expression graph ``(gene, gene)``.
    target_adjacencies
        Normalised graphs of targets, by name, each ``(target, target)`` over the same vocabulary.
    mask
        Pairs of genes that may attend to each other; ``None``: the cross-gene layer of GEARS in the place of attention.
    n_hidden, n_heads, n_feedforward, n_layers
        Widths, and the number of attention layers.
    chunk
        Perturbations that are in memory at a time; more of them are recomputed on the way back.
    """

    def __init__(
        self,
        gene_adjacency: sparse.spmatrix,
        target_adjacencies: Mapping[str, sparse.spmatrix],
        mask: sparse.spmatrix | None = None,
        *,
        n_hidden: int = 64,
        n_heads: int = 2,
        n_feedforward: int = 512,
        n_layers: int = 1,
        chunk: int = 8,
    ):
        super().__init__()
        n_genes = gene_adjacency.shape[0]
        n_targets = next(iter(target_adjacencies.values())).shape[0]
        self.n_genes, self.n_targets, self.n_hidden, self.chunk = n_genes, n_targets, n_hidden, chunk
        self.gene_table = nn.Parameter(torch.randn(n_genes, n_hidden))
        self.gene_position = nn.Parameter(torch.randn(n_genes, n_hidden))
        self.gene_conv = GraphConv(gene_adjacency, n_hidden, n_hidden)
        self.gene_norm = nn.LayerNorm(n_hidden)
        self.gene_mlp = _mlp(n_hidden, n_hidden, n_hidden)
        self.target_table = nn.Parameter(torch.randn(n_targets, n_hidden))
        self.target_names = tuple(target_adjacencies)
        self.target_convs = nn.ModuleList(GraphConv(a, n_hidden, n_hidden) for a in target_adjacencies.values())
        self.fuse = _mlp(n_hidden, n_hidden, n_hidden)
        self.post_norm = nn.LayerNorm(n_hidden)
        self.encoder: nn.ModuleList | None = None
        if mask is not None:
            self.encoder = nn.ModuleList(
                _MaskedEncoderLayer(mask, n_hidden, n_heads, n_feedforward) for _ in range(n_layers)
            )
        else:
            self.recover = _mlp(n_hidden, 2 * n_hidden, n_hidden)
            self.cross_gene = _mlp(n_genes, n_hidden, n_hidden)
            self.cross_weight = nn.Parameter(torch.randn(n_genes, n_hidden) / n_hidden**0.5 * 0.1)
            self.own_weight = nn.Parameter(torch.ones(n_genes))
        self.read_weight = nn.Parameter(torch.randn(n_genes, n_hidden) / n_hidden**0.5 * 0.1)
        self.read_bias = nn.Parameter(torch.zeros(n_genes))

    def gene_rows(self) -> list[tuple[str, int]]:
        """Names of the parameters that have an axis of genes, and that axis."""
        rows = [("gene_table", 0), ("gene_position", 0), ("read_weight", 0), ("read_bias", 0)]
        if self.encoder is None:
            rows += [("cross_gene.0.weight", 1), ("cross_weight", 0), ("own_weight", 0)]
        return rows

    def genes(self) -> Tensor:
        """Table of genes after the co-expression graph, ``(gene, hidden)``."""
        base = torch.relu(self.gene_norm(self.gene_table))
        return self.gene_mlp(base + 0.2 * self.gene_conv(self.gene_position))

    def targets(self, rows: Tensor | None = None) -> Tensor:
        """Table of targets after their graphs, ``(row, hidden)``: the mean over the graphs."""
        tables = [conv(self.target_table, rows) for conv in self.target_convs]
        return tables[0] if len(tables) == 1 else torch.stack(tables).mean(0)

    def perturbations(self, codes: Tensor) -> Tensor:
        """Embedding of perturbations ``(perturbation, hidden)`` from padded codes ``(perturbation, most targets)``."""
        present = codes >= 0
        if not bool(present.any()):
            return self.gene_table.new_zeros(len(codes), self.n_hidden)
        distinct, inverse = torch.unique(codes[present], return_inverse=True)
        table = self.targets(distinct)
        row = torch.arange(len(codes), device=codes.device)[:, None].expand_as(codes)[present]
        total = table.new_zeros(len(codes), self.n_hidden).index_add_(0, row, table.index_select(0, inverse))
        return self.fuse(total) * present.any(1, keepdim=True)

    def _read(self, genes: Tensor, perturbation: Tensor) -> Tensor:
        x = torch.relu(self.post_norm(genes[None] + perturbation[:, None]))
        if self.encoder is not None:
            for layer in self.encoder:
                x = layer(x)
            return (x * self.read_weight).sum(-1) + self.read_bias
        x = self.recover(x)
        own = (x * self.read_weight).sum(-1) + self.read_bias
        return own * self.own_weight + self.cross_gene(own) @ self.cross_weight.T

    def forward(self, codes: Tensor) -> Tensor:
        """Shifts ``(perturbation, gene)`` of distinct perturbations.

        Parameters
        ----------
        codes
            Padded codes of targets, ``(perturbation, most targets)``; a row of -1 is the control, whose shift is zero.
        """
        genes, perturbation = self.genes(), self.perturbations(codes)
        if len(codes) <= self.chunk:
            shift = self._read(genes, perturbation)
        elif torch.is_grad_enabled():
            parts = perturbation.split(self.chunk)
            shift = torch.cat([checkpoint(self._read, genes, part, use_reentrant=False) for part in parts])
        else:
            shift = torch.cat([self._read(genes, part) for part in perturbation.split(self.chunk)])
        return shift * (codes >= 0).any(1, keepdim=True)

    @torch.no_grad()
    def attention(self, codes: Tensor) -> list[Tensor]:
        """Attention weights of each layer for one perturbation, mean over the heads, ``(edge,)``."""
        if self.encoder is None:
            return []
        x = torch.relu(self.post_norm(self.genes()[None] + self.perturbations(codes)[:, None]))
        found = []
        for layer in cast("list[_MaskedEncoderLayer]", list(self.encoder)):
            _, weights = layer.attention(x, return_weights=True)
            found.append(weights[0].mean(0))
            x = layer(x)
        return found


# ---------------------------------------------------------------------------------------------- data stream


class CellStream(nn.Module):
    r"""Variational autoencoder of a control cell; only what is expressed is generated anew.

    .. math:: z \sim N(\mu(x), \sigma^2(x)),\quad \hat x = f(z)\cdot 1[x > 0]

    Parameters
    ----------
    n_genes, n_latent
        Sizes.
    hidden
        Widths of the encoder's layers; the decoder mirrors them.
    output
        ``"softplus"`` (expression is not negative) or ``"linear"``.
    """

    def __init__(self, n_genes: int, *, n_latent: int = 16, hidden: tuple[int, ...] = (32,), output: str = "softplus"):
        super().__init__()
        widths = (n_genes, *hidden)
        encoder: list[nn.Module] = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            encoder += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder)
        self.mean, self.log_variance = nn.Linear(widths[-1], n_latent), nn.Linear(widths[-1], n_latent)
        decoder: list[nn.Module] = []
        widths = (n_latent, *hidden[::-1])
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            decoder += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]
        self.decoder = nn.Sequential(*decoder)
        self.read = nn.Linear(widths[-1], n_genes)
        self.output = output

    def gene_rows(self) -> list[tuple[str, int]]:
        """Names of the parameters that have an axis of genes, and that axis."""
        return [("encoder.0.weight", 1), ("read.weight", 0), ("read.bias", 0)]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, ``(cell, latent)``."""
        h = self.encoder(x)
        return self.mean(h), self.log_variance(h).clamp(*_LOG_VARIANCE_RANGE)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """Regenerated expression ``(cell, gene)``; zeros of ``x`` stay zeros."""
        out = self.read(self.decoder(z))
        out = nn.functional.softplus(out) if self.output == "softplus" else out
        return out * (x > 0)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """``x_hat``, and ``kl`` ``(cell,)`` to the standard normal; without ``noise`` the mean is decoded."""
        mean, log_variance = self.encode(x)
        z = mean if noise is None else mean + noise * (0.5 * log_variance).exp()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        return {"x_hat": self.decode(z, x), "kl": kl, "mean": mean}


# ---------------------------------------------------------------------------------------------- both


class GraphModule(BaseModuleClass):
    """Knowledge stream plus, for BioDSNN, data stream; loss on log1p CP10k values or effects.

    Parameters
    ----------
    knowledge
        The knowledge stream.
    cell
        The data stream; ``None``: the control cell itself is the base (GEARS, and BioDSNN without VAE).
    n_labels
        Number of labels of the data.
    scale
        ``"counts"``, ``"log1p"`` or ``"effects"``.
    autofocus, direction_weight, direction_temperature, kl_weight, reconstruction_weight
        The loss: exponent minus two, and the weights of its terms.
    gene_weight
        Weights of genes in the autofocus term, ``(gene,)``, mean 1.
    """

    def __init__(
        self,
        knowledge: KnowledgeStream,
        cell: CellStream | None,
        n_labels: int,
        scale: str,
        *,
        autofocus: float = 2.0,
        direction_weight: float = 0.1,
        direction_temperature: float = 0.1,
        kl_weight: float = 1e-3,
        reconstruction_weight: float = 1.0,
        gene_weight: np.ndarray | None = None,
    ):
        super().__init__()
        n_genes = knowledge.n_genes
        self.knowledge, self.cell, self.scale = knowledge, cell, scale
        self.register_buffer("control_mean", torch.zeros(n_genes))
        weight = torch.ones(n_genes) if gene_weight is None else torch.as_tensor(np.asarray(gene_weight, np.float32))
        self.register_buffer("gene_weight", weight if gene_weight is not None else None)
        # what is known of each label's shift before the network, and whether the network learns from its cells;
        # needed in training only
        self.register_buffer("offset", torch.zeros(1, n_genes), persistent=False)
        self.register_buffer("learn", torch.ones(n_labels, dtype=torch.bool), persistent=False)
        self.autofocus, self.direction_weight = autofocus, direction_weight
        self.direction_temperature, self.kl_weight = direction_temperature, kl_weight
        self.reconstruction_weight = reconstruction_weight

    def reset_by_name(self, names: Sequence[str]) -> None:
        """Give the initial rows of every gene by the order of the names, so that the order of the columns is nothing."""
        rank = torch.as_tensor(np.argsort(np.argsort(np.asarray(names, dtype=str), kind="stable"), kind="stable"))
        with torch.no_grad():
            for stream in (self.knowledge, self.cell):
                if stream is None:
                    continue
                parameters = dict(stream.named_parameters())
                for name, axis in stream.gene_rows():
                    parameters[name].copy_(parameters[name].index_select(axis, rank))

    def log1p(self, x: Tensor, library: Tensor) -> Tensor:
        """Values of a batch as log1p CP10k (effects: as they are)."""
        return torch.log1p(x / library * K.TARGET_SUM) if self.scale == K.SCALE_COUNTS else x

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor | None]:
        if "control_x" not in tensors:
            return {"control": None}
        return {"control": self.log1p(tensors["control_x"], tensors["control_library"])}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict:
        # cells of controls, and of perturbations held out by the model, have no part in the knowledge stream
        learn = tensors["label"] >= 0
        if self.training:
            learn &= self.learn[tensors["label"].clamp_min(0)]
        return {"codes": tensors["codes"], "learn": learn}

    @auto_move_data
    def inference(self, control: Tensor | None) -> dict[str, Any]:
        """The base that shifts are added to ``(cell, gene)`` and its KL ``(cell,)``; both ``None`` for effects."""
        if control is None:
            return {"control": None, "base": None, "kl": None}
        if self.cell is None:
            return {"control": control, "base": control, "kl": control.new_zeros(len(control))}
        noise = control.new_empty(len(control), self.cell.mean.out_features).normal_() if self.training else None
        out = self.cell(control, noise)
        return {"control": control, "base": out["x_hat"], "kl": out["kl"]}

    @auto_move_data
    def generative(self, codes: Tensor, learn: Tensor) -> dict[str, Any]:
        """Shifts of the distinct perturbations of a batch and, for each cell that is learned from, its row there."""
        rows = torch.nonzero(learn).squeeze(1)
        if len(rows) == 0:
            return {"rows": rows, "group": rows, "shift": None, "n_groups": 0}
        distinct, group = torch.unique(codes[rows], dim=0, return_inverse=True)
        return {"rows": rows, "group": group, "shift": self.knowledge(distinct), "n_groups": len(distinct)}

    def loss(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], generative_outputs: dict[str, Any]
    ) -> LossOutput:
        """Autofocus + direction + reconstruction + KL."""
        x = self.log1p(tensors["x"], tensors["library"])
        out, n = generative_outputs, len(x)
        control, base = inference_outputs["control"], inference_outputs["base"]
        parts: dict[str, Tensor] = {}
        loss = x.new_zeros(())
        error = x.new_zeros(n)
        if out["n_groups"]:
            rows, group, m = out["rows"], out["group"], out["n_groups"]
            expected = out["shift"].index_select(0, group)
            if len(self.offset) > 1:
                expected = expected + self.offset[tensors["label"][rows]]
            predicted = expected if base is None else base[rows] + expected
            observed = x[rows]
            parts["autofocus"] = autofocus_loss(
                predicted, observed, group, m, exponent=2.0 + self.autofocus, gene_weight=self.gene_weight
            )
            parts["direction"] = direction_loss(
                predicted, observed, self.control_mean, group, m, temperature=self.direction_temperature
            )
            loss = loss + parts["autofocus"] + self.direction_weight * parts["direction"]
            error = error.index_copy(0, rows, ((predicted - observed) ** 2).mean(1))
        kl = x.new_zeros(n)
        if self.cell is not None and control is not None:
            seen = (control > 0).sum(1).clamp_min(1)
            parts["reconstruction"] = (((base - control) ** 2).sum(1) / seen).mean()
            kl = inference_outputs["kl"]
            loss = loss + self.reconstruction_weight * parts["reconstruction"] + self.kl_weight * kl.mean()
        if not loss.requires_grad and torch.is_grad_enabled():  # a batch of controls only, without a data stream
            loss = loss + 0.0 * self.knowledge.read_bias.sum()
        return LossOutput(
            loss=loss,
            reconstruction_loss=error,
            kl_local=kl,
            extra_metrics={k: v.detach() for k, v in parts.items()},
            n_obs_minibatch=n,
        )
