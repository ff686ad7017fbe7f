"""The network of :class:`scpert.model.CellState`: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn._autoencoder import ResidualStack, negative_binomial_nll

__all__ = ["CellStateModule"]


class CellStateModule(nn.Module):
    r"""A denoising autoencoder of standardised log expression.

    .. math::

        \tilde x = \frac{o \odot y}{\bar o}, \qquad
        z = A^\top \tilde x + \gamma \odot f(\tilde x), \qquad
        \hat y = B^\top z + c + W\,\phi(g(z / s))

    :math:`y` are standardised values (0 is the gene's mean), :math:`o` marks the observed genes and :math:`\bar o` is
    their share: a masked gene is set to its mean and the rest is scaled up, as dropout does. :math:`f` and :math:`g` are
    residual stacks. The gate :math:`\gamma` starts at zero. Where ``linear=False`` the linear path (:math:`A, B`) and the
    gate are left out.

    Parameters
    ----------
    n_genes, hidden, n_latent
        Sizes; ``hidden`` from the genes inwards, mirrored in the decoder.
    linear
        Whether the linear path is there.
    head
        ``"gaussian"`` or ``"nb"``: squared error of standardised values, or negative binomial counts.
    dropout
        Share of hidden units dropped.
    checkpointing
        Recompute activations in the backward pass.
    """

    def __init__(
        self,
        n_genes: int,
        hidden: Sequence[int],
        n_latent: int,
        *,
        linear: bool = True,
        head: str = "gaussian",
        dropout: float = 0.0,
        checkpointing: bool = False,
        adapter_rank: int | None = None,
    ):
        super().__init__()
        hidden = tuple(int(h) for h in hidden)
        self.n_genes, self.hidden, self.n_latent, self.head = int(n_genes), hidden, int(n_latent), head
        self.encoder = ResidualStack((n_genes, *hidden, n_latent), dropout=dropout, checkpointing=checkpointing)
        self.decoder = ResidualStack((n_latent, *hidden[::-1]), dropout=dropout, checkpointing=checkpointing)
        self.norm = nn.LayerNorm(hidden[0])
        self.output = nn.Linear(hidden[0], n_genes)
        self.linear = linear
        if linear:
            self.A = nn.Parameter(torch.randn(n_genes, n_latent) / n_genes**0.5)
            self.B = nn.Parameter(torch.randn(n_latent, n_genes) / n_latent**0.5)
            self.gate = nn.Parameter(torch.zeros(n_latent))
        if adapter_rank:
            self.down = nn.Parameter(torch.randn(n_genes, adapter_rank) / n_genes**0.5)
            self.up = nn.Parameter(torch.zeros(adapter_rank, n_latent))
        self.adapter_rank = adapter_rank
        self.register_buffer("z_scale", torch.ones(()))
        self.register_buffer("mean", torch.zeros(n_genes))  # of log expression, per gene
        self.register_buffer("scale", torch.ones(n_genes))
        self.register_buffer("log_fraction", torch.zeros(n_genes if head == "nb" else 0))
        self.register_buffer("target_sum", torch.tensor(1e4))
        if head == "nb":
            self.log_theta = nn.Parameter(torch.zeros(n_genes))

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return sum(p.numel() for p in self.parameters())

    # ------------------------------------------------------------------------------------------ forward

    def masked(self, y: Tensor, observed: Tensor | None = None) -> Tensor:
        """Masked genes at their mean, the others scaled up by the share that is observed."""
        if observed is None:
            return y
        return y * observed / observed.mean(dim=1, keepdim=True).clamp_min(1e-3)

    def first(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The only part of the encoder that touches all genes: linear in ``x``."""
        return (
            self.encoder.first(x),
            x @ self.A if self.linear else None,
            x @ self.down if self.adapter_rank else None,
        )

    def first_shift(
        self, parts: tuple[Tensor, Tensor | None, Tensor | None], genes: Tensor, change: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``first`` of inputs in which ``genes`` ``(row, m)`` are moved by ``change`` ``(row, m)``.

        Costs nothing per unmoved gene, which is what makes a screen of all genes cheap.
        """

        def add(base: Tensor | None, weight: Tensor | None) -> Any:
            if base is None or weight is None:
                return base
            return base + torch.einsum("rm,rmh->rh", change, weight[genes])

        return (
            add(parts[0], self.encoder.first.weight.T),
            add(parts[1], self.A if self.linear else None),
            add(parts[2], self.down if self.adapter_rank else None),
        )

    def encode_parts(self, parts: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
        """Latent state from what :meth:`first` gave."""
        z = self.encoder.rest(parts[0])
        if parts[1] is not None:
            z = parts[1] + self.gate * z
        if parts[2] is not None:
            z = z + parts[2] @ self.up
        return z

    def encode(self, y: Tensor, observed: Tensor | None = None) -> Tensor:
        """Standardised values ``(sample, gene)`` to the latent state ``(sample, latent)``."""
        return self.encode_parts(self.first(self.masked(y, observed)))

    def features(self, z: Tensor) -> Tensor:
        """Last hidden layer of the decoder ``(sample, hidden[0])``."""
        return F.gelu(self.norm(self.decoder(z / self.z_scale)))

    def decode_raw(self, z: Tensor, genes: Tensor | None = None) -> Tensor:
        """What the decoder puts out: standardised values, or (negative binomial head) logits in their unit."""
        h = self.features(z)
        if genes is None:
            out = self.output(h)
            return out + z @ self.B if self.linear else out
        out = h @ self.output.weight[genes].T + self.output.bias[genes]
        return out + z @ self.B[:, genes] if self.linear else out

    def decode(self, z: Tensor, genes: Tensor | None = None) -> Tensor:
        """Standardised log expression of all genes, or of some, from the latent state."""
        if self.head != "nb":
            return self.decode_raw(z, genes)
        out = (torch.log1p(self.target_sum * self.fractions(self.decode_raw(z))) - self.mean) / self.scale
        return out if genes is None else out[:, genes]

    def forward(self, y: Tensor, observed: Tensor | None = None) -> Tensor:
        """Reconstruction of standardised log expression."""
        return self.decode(self.encode(y, observed))

    def fractions(self, raw: Tensor) -> Tensor:
        """Share of each gene in the counts of a sample (negative binomial head)."""
        return torch.softmax(self.log_fraction + raw * self.scale, dim=1)

    def loss(
        self, y: Tensor, observed: Tensor, *, counts: Tensor | None = None, masked_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Training loss, and the squared error of the masked genes relative to their mean's.

        Parameters
        ----------
        y
            Standardised values ``(sample, gene)``.
        observed
            1 for observed genes, 0 for masked ones, ``(sample, gene)``.
        counts
            Counts, for the negative binomial head.
        masked_weight
            Weight of the masked genes; the observed ones weigh 1.
        """
        raw = self.decode_raw(self.encode(y, observed)).float()
        weight = observed + masked_weight * (1.0 - observed)
        decoded = raw
        if self.head == "nb":
            if counts is None:
                raise ValueError("The negative binomial head needs counts.")
            fractions = self.fractions(raw)
            each = negative_binomial_nll(counts, fractions * counts.sum(dim=1, keepdim=True), self.log_theta)
            decoded = (torch.log1p(self.target_sum * fractions.detach()) - self.mean) / self.scale
        else:
            each = (raw - y) ** 2
        loss = (weight * each).sum() / weight.sum()
        with torch.no_grad():
            hidden = 1.0 - observed
            error = (hidden * (decoded - y) ** 2).sum() / (hidden * y**2).sum().clamp_min(1e-6)
        return loss, error
