"""Distributions and accumulations that the modules share: masks, negative binomial, K-hop sums, expected logs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _keys as K

__all__ = [
    "ExpectedLog1p",
    "bernoulli_kl",
    "k_hop",
    "k_hop_scale",
    "nb_constant",
    "nb_log_prob",
    "normal_kl",
    "normal_kl_pair",
    "straight_through_bernoulli",
]


def straight_through_bernoulli(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw 0/1 from ``Bernoulli(sigmoid(logits))`` with the gradient of a relaxed (binary concrete) draw.

    Shapes: any; the result has the shape of ``logits``.
    """
    u = torch.rand_like(logits).clamp_(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + soft - soft.detach()


def bernoulli_kl(logits: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(sigmoid(logits)) || Bernoulli(prior)), elementwise."""
    p = torch.sigmoid(logits)
    log_p, log_1p = F.logsigmoid(logits), F.logsigmoid(-logits)
    return p * (log_p - np.log(prior)) + (1 - p) * (log_1p - np.log1p(-prior))


def normal_kl(loc: Tensor, log_scale: Tensor, prior_scale: float = 1.0) -> Tensor:
    """KL(N(loc, exp(log_scale)^2) || N(0, prior_scale^2)), elementwise."""
    ratio = torch.exp(2 * log_scale) / prior_scale**2
    return 0.5 * (ratio + (loc / prior_scale) ** 2 - 1.0) - log_scale + np.log(prior_scale)


def normal_kl_pair(loc_q: Tensor, log_scale_q: Tensor, loc_p: Tensor, log_scale_p: Tensor) -> Tensor:
    """KL(N_q || N_p) of two normal distributions, elementwise."""
    var = torch.exp(2 * (log_scale_q - log_scale_p))
    return 0.5 * (var + ((loc_q - loc_p) * torch.exp(-log_scale_p)) ** 2 - 1.0) + log_scale_p - log_scale_q


def nb_constant(x: Tensor, log_theta: Tensor) -> Tensor:
    """The terms of a negative binomial that do not depend on its mean, summed over genes, ``(cell,)``.

    ``lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)`` is zero where ``x`` is: only the counts above zero are computed.
    """
    cell, gene = torch.nonzero(x, as_tuple=True)
    count, theta = x[cell, gene], torch.exp(log_theta)
    terms = torch.lgamma(count + theta[gene]) - torch.lgamma(theta)[gene] - torch.lgamma(count + 1)
    return torch.zeros(len(x), dtype=x.dtype, device=x.device).index_add(0, cell, terms)


def nb_log_prob(x: Tensor, log_mean: Tensor, log_theta: Tensor, constant: Tensor | None = None) -> Tensor:
    """Log-probability of counts under a negative binomial with ``var = mean + mean^2 / theta``, summed over genes.

    Parameters
    ----------
    x
        Counts, ``(cell, gene)``.
    log_mean
        Natural logarithm of the mean, ``(cell, gene)``.
    log_theta
        Natural logarithm of the inverse dispersion, ``(gene,)``.
    constant
        :func:`nb_constant` of the same counts, if it is there already.

    Returns
    -------
    ``(cell,)``
    """
    theta = torch.exp(log_theta)
    log_mix = torch.logaddexp(log_theta.expand_as(log_mean), log_mean)
    constant = nb_constant(x, log_theta) if constant is None else constant
    return constant + (theta * log_theta).sum() + (x * log_mean - (x + theta) * log_mix).sum(1)


def k_hop_scale(square: Tensor) -> Tensor:
    """Upper bound of the spectral radius of a matrix ``(target, target)``: sqrt(|A|_1 |A|_inf), at least 1."""
    if square.numel() == 0:
        return square.new_ones(())
    size = square.abs()
    return (size.sum(0).max() * size.sum(1).max()).sqrt().clamp_min(1.0)


def k_hop(start: Tensor, onward: Tensor, square: Tensor, columns: Tensor, n_hops: int, scale: Tensor | float) -> Tensor:
    r"""Effects that reach genes over at most ``n_hops`` intermediate regulators.

    .. math:: T_K = \sum_{k=0}^{K} a\,(\gamma \hat A)^k

    for rows :math:`a` of the adjacency and :math:`\gamma\hat A` its square part divided by ``scale``. With ``scale``
    above the spectral radius the series converges; for a non-negative adjacency it is monotone in every edge at fixed
    ``scale``. A hop is a product of (row, target) with (target, target), and only their sum meets (target, gene); never a
    power of the matrix.

    Parameters
    ----------
    start
        Rows of the adjacency to accumulate, ``(row, gene)``.
    onward
        Rows of the adjacency of the targets that are measured genes, ``(measured target, gene)``.
    square
        Their entries for each other, ``onward[:, columns]``, ``(measured target, measured target)``.
    columns
        Genes of the measured targets, ``(measured target,)``.
    n_hops
        Intermediate steps; 0 gives ``start``.
    scale
        Divides every hop.
    """
    if n_hops == 0 or len(columns) == 0:
        return start
    passed = reached = start[:, columns] / scale
    for _ in range(n_hops - 1):
        passed = (passed @ square) / scale
        reached = reached + passed
    return start + reached @ onward


class ExpectedLog1p:
    r"""Mean of log1p CP10k of a cell's counts, given its rate: what a measured pseudobulk estimates.

    For :math:`x \sim \mathrm{NB}(l\rho, \theta_g)` the mean of :math:`\log(1 + 10^4 x / l)` lies below
    :math:`\log(1 + 10^4\rho)`, the more the sparser the gene. A prediction that is compared with measured log values
    has to be on the same side of the logarithm. The expectation is tabulated once per gene over
    :math:`\log\rho` (gamma quantiles of the negative binomial's mixture, exact Poisson sums) and interpolated.

    Parameters
    ----------
    theta
        Inverse dispersion, ``(gene,)``.
    library
        Library sizes of the cells that are averaged over, ``(cell,)``.
    """

    n_grid = 64
    low, high = np.log(1e-9), 0.0

    def __init__(self, theta: np.ndarray, library: np.ndarray, n_library: int = 8, n_nodes: int = 32):
        from scipy.special import gammaincinv
        from scipy.stats import poisson

        theta = np.clip(np.asarray(theta, dtype=np.float64), 1e-3, 1e6)
        sizes = np.quantile(np.asarray(library, dtype=np.float64), (np.arange(n_library) + 0.5) / n_library)
        nodes = gammaincinv(theta[:, None], (np.arange(n_nodes) + 0.5) / n_nodes) / theta[:, None]
        nodes /= np.maximum(nodes.mean(axis=1, keepdims=True), 1e-300)  # the mean stays exact
        rho = np.exp(np.linspace(self.low, self.high, self.n_grid))
        table = np.zeros((len(theta), self.n_grid))
        log_rate = np.linspace(np.log(1e-8), np.log(1e7), 400)
        rate = np.exp(log_rate)
        small = rate < 60
        counts = np.arange(0, 200)
        pmf = poisson.pmf(counts[None, :], rate[small][:, None])
        for size in sizes:
            c = K.TARGET_SUM / size
            h = np.log1p(c * rate) - 0.5 * c**2 * rate / (1 + c * rate) ** 2
            h[small] = pmf @ np.log1p(c * counts)
            for j, r in enumerate(rho):
                lam = np.log(np.maximum(size * r * nodes, 1e-8))
                table[:, j] += np.interp(lam, log_rate, h).mean(axis=1)
        self.table = (table / len(sizes)).astype(np.float32)

    def __call__(self, log_rho: Tensor) -> Tensor:
        """Expected log1p CP10k, ``(cell, gene)``, of rates given by their natural logarithm."""
        table = torch.as_tensor(self.table, device=log_rho.device)
        position = ((log_rho - self.low) / (self.high - self.low) * (self.n_grid - 1)).clamp(0, self.n_grid - 1.001)
        left = position.long()
        weight = position - left
        gene = torch.arange(table.shape[0], device=log_rho.device).expand_as(left)
        return table[gene, left] * (1 - weight) + table[gene, left + 1] * weight

    def inverse(self, mean: np.ndarray) -> np.ndarray:
        """Log rate whose expected log1p CP10k is ``mean``, ``(gene,)``."""
        grid = np.linspace(self.low, self.high, self.n_grid)
        return np.array(
            [np.interp(m, np.maximum.accumulate(row), grid) for m, row in zip(mean, self.table, strict=True)]
        )
