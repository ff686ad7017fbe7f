"""Residual, normalised stacks that train at any depth; torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["ResidualStack", "negative_binomial_nll"]


def _fit_width(x: Tensor, width: int) -> Tensor:
    """The shortcut of a block whose width changes: an average over neighbours, without any weight."""
    return x if x.shape[-1] == width else F.adaptive_avg_pool1d(x.unsqueeze(-2), width).squeeze(-2)


class ResidualStack(nn.Module):
    r"""Layers of any widths: :math:`h_{l+1} = S(h_l) + W_l\,\phi(\mathrm{LN}(h_l)) + b_l`.

    :math:`S` is the identity where the width stays and an average over neighbouring units where it changes, so that the
    number of weights is that of the plain network of the same widths. The first layer is linear.

    Parameters
    ----------
    widths
        Input width, then the width of each layer.
    dropout
        Share of the units dropped before each layer but the first.
    checkpointing
        Recompute the blocks in the backward pass instead of keeping their activations.
    """

    def __init__(self, widths: Sequence[int], *, dropout: float = 0.0, checkpointing: bool = False):
        super().__init__()
        self.widths = tuple(int(w) for w in widths)
        self.checkpointing = checkpointing
        self.first = nn.Linear(self.widths[0], self.widths[1])
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in self.widths[1:-1])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths[1:-1], self.widths[2:], strict=True))
        self.dropout = nn.Dropout(dropout)
        depth = max(len(self.layers), 1)
        for layer in self.layers:  # keeps the variance of a deep sum near that of a single layer
            if not layer.weight.is_meta:
                with torch.no_grad():
                    layer.weight.mul_(depth**-0.5)

    def _block(self, i: int, h: Tensor) -> Tensor:
        layer: Any = self.layers[i]
        return _fit_width(h, layer.out_features) + layer(self.dropout(F.gelu(self.norms[i](h))))

    def rest(self, h: Tensor) -> Tensor:
        """All layers but the first."""
        for i in range(len(self.layers)):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(self._block, i, h, use_reentrant=False)
            else:
                h = self._block(i, h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        """``(sample, widths[0])`` to ``(sample, widths[-1])``."""
        return self.rest(self.first(x))


def negative_binomial_nll(counts: Tensor, mean: Tensor, log_theta: Tensor) -> Tensor:
    r"""Minus the log-likelihood of counts under a negative binomial with variance :math:`\mu + \mu^2/\theta`.

    All arguments ``(sample, gene)`` or broadcast to it.
    """
    theta = torch.exp(log_theta)
    log_sum = torch.log(theta + mean)
    return -(
        torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1.0)
        + theta * (log_theta - log_sum)
        + counts * (torch.log(mean + 1e-12) - log_sum)
    )
