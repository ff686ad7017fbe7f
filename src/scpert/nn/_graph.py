"""Graphs as tensors: simplified graph convolution on one table, attention over the edges of a mask.

Both work on a table of nodes, never on a table per cell. Imports torch and numpy only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn

from .. import _keys as K

__all__ = ["EdgeAttention", "GraphConv", "csr_parts", "edge_attention", "net_matrix", "normalised_adjacency"]


# ---------------------------------------------------------------------------------------------- nets to matrices


def net_matrix(net: pd.DataFrame, nodes: Sequence[str], *, symmetric: bool = False) -> sparse.csr_matrix:
    """Weights of a net as a CSR matrix ``(source, target)`` over ``nodes``; edges with other nodes are left out.

    Parameters
    ----------
    net
        Columns ``source``, ``target``, ``weight``; checked before with ``_checks.check_net``.
    nodes
        Names of rows and columns.
    symmetric
        Whether the larger weight of the two directions counts for both.
    """
    index = pd.Index(nodes)
    rows, columns = index.get_indexer(pd.Index(net[K.SOURCE])), index.get_indexer(pd.Index(net[K.TARGET]))
    inside = (rows >= 0) & (columns >= 0)
    weight = net[K.WEIGHT].to_numpy(dtype=np.float64)[inside]
    matrix = sparse.csr_matrix((weight, (rows[inside], columns[inside])), shape=(len(index), len(index)))
    return matrix.maximum(matrix.T).tocsr() if symmetric else matrix


def normalised_adjacency(matrix: sparse.spmatrix) -> sparse.csr_matrix:
    r"""What graph convolutions propagate with: :math:`D^{-1/2}(A+I)^T D^{-1/2}`, rows receive.

    The same numbers as ``torch_geometric``'s ``gcn_norm``: a missing self loop gets weight 1, degrees are sums of the
    incoming weights, nodes without any degree get nothing. Weights are taken by their absolute value.

    Parameters
    ----------
    matrix
        Weights ``(source, target)``.

    Returns
    -------
    CSR matrix ``(target, source)``: multiply it with a table of nodes.
    """
    weights = abs(matrix.tocsr().astype(np.float64))
    own = weights.diagonal()
    weights = (weights + sparse.diags(np.where(own == 0, 1.0, 0.0))).tocsr()
    degree = np.asarray(weights.sum(axis=0)).ravel()
    with np.errstate(divide="ignore"):
        scale = sparse.diags(np.where(degree > 0, 1.0 / np.sqrt(degree), 0.0))
    out = (scale @ weights.T @ scale).tocsr()
    out.sort_indices()
    return out


def csr_parts(matrix: sparse.spmatrix) -> tuple[Tensor, Tensor, Tensor]:
    """``(indptr, indices, values)`` of a CSR matrix as int64 and float32 tensors."""
    matrix = matrix.tocsr()
    matrix.sort_indices()
    return (
        torch.as_tensor(matrix.indptr.astype(np.int64)),
        torch.as_tensor(matrix.indices.astype(np.int64)),
        torch.as_tensor(matrix.data.astype(np.float32)),
    )


def _csr(indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)


# ---------------------------------------------------------------------------------------------- convolution


class GraphConv(nn.Module):
    r"""Simplified graph convolution (SGC, Wu et al. 2019): :math:`\hat A^k X W + b`, as in PyG's ``SGConv``.

    Parameters
    ----------
    adjacency
        Result of :func:`normalised_adjacency`, ``(node, node)``.
    n_in, n_out
        Widths of the table before and after.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor

    def __init__(self, adjacency: sparse.spmatrix, n_in: int, n_out: int):
        super().__init__()
        self.n_nodes = adjacency.shape[0]
        indptr, indices, values = csr_parts(adjacency)
        self.register_buffer("indptr", indptr)
        self.register_buffer("indices", indices)
        self.register_buffer("values", values)
        self.linear = nn.Linear(n_in, n_out)

    def propagate(self, table: Tensor, rows: Tensor | None = None) -> Tensor:
        r""":math:`\hat A X` at all nodes, or at ``rows`` only: then no other node is computed.

        Parameters
        ----------
        table
            ``(node, dim)``.
        rows
            Nodes, int64 ``(row,)``.

        Returns
        -------
        ``(row, dim)``.
        """
        if rows is None:
            receiver = torch.repeat_interleave(
                torch.arange(self.n_nodes, device=table.device), self.indptr[1:] - self.indptr[:-1]
            )
            sender, values, n = self.indices, self.values, self.n_nodes
        else:
            start, count = self.indptr[rows], self.indptr[rows + 1] - self.indptr[rows]
            n = len(rows)
            receiver = torch.repeat_interleave(torch.arange(n, device=table.device), count)
            first = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
            edge = torch.arange(len(receiver), device=table.device) - first + start[receiver]
            sender, values = self.indices[edge], self.values[edge]
        message = table.index_select(0, sender) * values.to(table.dtype)[:, None]
        return table.new_zeros(n, table.shape[1]).index_add_(0, receiver, message)

    def forward(self, table: Tensor, rows: Tensor | None = None) -> Tensor:
        """``(node, n_in)`` -> ``(row, n_out)``."""
        return self.linear(self.propagate(table, rows))


# ---------------------------------------------------------------------------------------------- attention


class _EdgeAttentionFunction(torch.autograd.Function):
    """Softmax attention restricted to a sparse pattern; keeps one number per edge and head for the way back."""

    @staticmethod
    def forward(ctx, q, k, v, indptr, indices, t_indptr, t_indices, t_order):
        n_batch, n_heads, n_nodes, d = q.shape
        shape = (n_nodes, n_nodes)
        lengths = indptr[1:] - indptr[:-1]
        receiver = torch.repeat_interleave(torch.arange(n_nodes, device=q.device), lengths)
        zero = q.new_zeros(len(indices))
        out = torch.empty_like(q)
        weights = q.new_empty(n_batch, n_heads, len(indices))
        scale = 1.0 / math.sqrt(d)
        for b in range(n_batch):
            for h in range(n_heads):
                pattern = _csr(indptr, indices, zero, shape)
                score = torch.sparse.sampled_addmm(pattern, q[b, h], k[b, h].T, beta=0.0, alpha=scale).values()
                top = torch.full((n_nodes,), -torch.inf, dtype=q.dtype, device=q.device)
                top.scatter_reduce_(0, receiver, score, "amax")
                e = torch.exp(score - top[receiver])
                total = q.new_zeros(n_nodes).index_add_(0, receiver, e)
                w = e / total[receiver]
                weights[b, h] = w
                out[b, h] = _csr(indptr, indices, w, shape) @ v[b, h]
        ctx.save_for_backward(q, k, v, weights, indptr, indices, t_indptr, t_indices, t_order, receiver)
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, weights, indptr, indices, t_indptr, t_indices, t_order, receiver = ctx.saved_tensors
        n_batch, n_heads, n_nodes, d = q.shape
        shape = (n_nodes, n_nodes)
        zero = q.new_zeros(len(indices))
        scale = 1.0 / math.sqrt(d)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b in range(n_batch):
            for h in range(n_heads):
                w, g = weights[b, h], grad[b, h].contiguous()
                dv[b, h] = _csr(t_indptr, t_indices, w[t_order], shape) @ g
                dw = torch.sparse.sampled_addmm(_csr(indptr, indices, zero, shape), g, v[b, h].T, beta=0.0).values()
                inner = q.new_zeros(n_nodes).index_add_(0, receiver, w * dw)
                ds = w * (dw - inner[receiver]) * scale
                dq[b, h] = _csr(indptr, indices, ds, shape) @ k[b, h]
                dk[b, h] = _csr(t_indptr, t_indices, ds[t_order], shape) @ q[b, h]
        return dq, dk, dv, None, None, None, None, None


def edge_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention in which a node sees only its neighbours.

    .. math:: o_i = \sum_{j \in N(i)} \frac{\exp(q_i k_j / \sqrt d)}{\sum_{l \in N(i)} \exp(q_i k_l / \sqrt d)} v_j

    Parameters
    ----------
    q, k, v
        ``(batch, head, node, dim)``.
    pattern
        Buffers of :class:`EdgeAttention`: CSR of the mask and of its transpose.

    Returns
    -------
    The output ``(batch, head, node, dim)`` and the weights ``(batch, head, edge)`` in the order of the CSR mask.
    """
    return _EdgeAttentionFunction.apply(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        pattern["indptr"],
        pattern["indices"],
        pattern["t_indptr"],
        pattern["t_indices"],
        pattern["t_order"],
    )


class EdgeAttention(nn.Module):
    """Multi-head self-attention over the edges of a mask; every node also sees itself.

    Time and memory grow with the number of edges, not with the square of the nodes.

    Parameters
    ----------
    mask
        Square matrix; node *i* may look at node *j* where ``mask[i, j]`` is not zero.
    n_hidden
        Width of the table.
    n_heads
        Number of heads; divides ``n_hidden``.
    """

    indptr: Tensor
    indices: Tensor

    def __init__(self, mask: sparse.spmatrix, n_hidden: int, n_heads: int):
        super().__init__()
        if n_hidden % n_heads:
            raise ValueError(f"n_hidden={n_hidden} cannot be shared by n_heads={n_heads}: choose a divisor.")
        self.n_heads = n_heads
        n = mask.shape[0]
        allowed = ((mask != 0).astype(np.int8) + sparse.identity(n, dtype=np.int8, format="csr")).tocsr()
        allowed.sort_indices()
        order = sparse.csr_matrix((np.arange(1, allowed.nnz + 1), allowed.indices, allowed.indptr), shape=(n, n))
        transposed = order.T.tocsr()
        transposed.sort_indices()
        for name, value in {
            "indptr": allowed.indptr,
            "indices": allowed.indices,
            "t_indptr": transposed.indptr,
            "t_indices": transposed.indices,
            "t_order": transposed.data - 1,
        }.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value).astype(np.int64)))
        self.dense = allowed.nnz == n * n  # nothing is masked: no need to walk over edges
        self.qkv = nn.Linear(n_hidden, 3 * n_hidden)
        self.out = nn.Linear(n_hidden, n_hidden)

    @property
    def n_edges(self) -> int:
        """Number of pairs that may look at each other, self included."""
        return len(self.indices)

    def forward(self, x: Tensor, *, return_weights: bool = False) -> Any:
        """``(batch, node, n_hidden)`` -> the same shape; and the weights ``(batch, head, edge)`` if asked for."""
        n_batch, n_nodes, width = x.shape
        q, k, v = self.qkv(x).view(n_batch, n_nodes, 3, self.n_heads, width // self.n_heads).permute(2, 0, 3, 1, 4)
        if self.dense and not return_weights:
            mixed, weights = nn.functional.scaled_dot_product_attention(q, k, v), None
        else:
            mixed, weights = edge_attention(q, k, v, dict(self.named_buffers()))
        out = self.out(mixed.transpose(1, 2).reshape(n_batch, n_nodes, width))
        return (out, weights) if return_weights else out
