"""Layers: a multi-layer perceptron whose first layer takes its inputs in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP", "SplitLinear"]


class SplitLinear(nn.Module):
    """A linear layer on ``[a, b, ...]`` that never concatenates: each part is multiplied where it is smallest.

    A part that is the same for many cells (the effect of a perturbation, ``(perturbation, gene)``) is multiplied once
    per perturbation and gathered, instead of once per cell.
    """

    def __init__(self, n_in: Sequence[int], n_out: int):
        super().__init__()
        total = sum(n_in)
        self.parts = nn.ModuleList([nn.Linear(n, n_out, bias=False) if n else nn.Identity() for n in n_in])
        self.bias = nn.Parameter(torch.zeros(n_out))
        for layer in self.parts:
            if isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.weight, -(total**-0.5), total**-0.5)

    def forward(self, *inputs: Tensor | tuple[Tensor, Tensor] | None, start: Tensor | None = None) -> Tensor:
        """Sum of the parts; a part may be ``(rows, index)``: rows are multiplied, then gathered by index.

        ``start`` is the product of parts that the caller has computed before and gives as ``None`` now.
        """
        out = self.bias if start is None else self.bias + start
        for layer, value in zip(self.parts, inputs, strict=True):
            if value is None or not isinstance(layer, nn.Linear):
                continue
            if isinstance(value, tuple):
                rows, index = value
                out = out + layer(rows)[index]
            else:
                out = out + layer(value)
        return out


class MLP(nn.Module):
    """Split first layer, LeakyReLU, residual hidden layers; the caller adds the head."""

    def __init__(self, n_in: Sequence[int], n_hidden: int, n_layers: int, *, layer_norm: bool = False):
        super().__init__()
        self.first = SplitLinear(n_in, n_hidden)
        self.norm = nn.LayerNorm(n_hidden) if layer_norm else nn.Identity()
        self.rest = nn.ModuleList([nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1)])
        self.activation = nn.LeakyReLU()

    def forward(self, *inputs: Tensor | tuple[Tensor, Tensor] | None, start: Tensor | None = None) -> Tensor:
        """Hidden values ``(cell, n_hidden)``."""
        h = self.activation(self.norm(self.first(*inputs, start=start)))
        for layer in self.rest:
            h = h + self.activation(layer(h))
        return h
