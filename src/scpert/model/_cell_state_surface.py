"""Response surfaces of a state over the levels of a few genes, and tests of what is beyond addition; numpy only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .._progress import progress

__all__ = ["ResponseSurfaces", "Surfaces", "n_columns"]

#: A contrast whose variance is inflated more than this by the other terms cannot be told from the data.
INFLATION = 1e6


def n_columns(k: int, df: int) -> int:
    """Columns of the design of a set of ``k`` genes."""
    return 1 + k * df + 2**k - k - 1


@dataclass
class Surfaces:
    """Fitted surfaces of some sets. ``r`` is the member that is added last.

    ``total`` ``(set,)``: rise of the score where all members go from start to goal; ``interaction`` ``(set, r)``: what that
    has beyond all members but ``r``, plus ``r`` alone; ``t`` ``(set, r)``: its robust t, 0 where the data cannot tell;
    ``curve`` ``(set, member, piece)`` and ``products`` ``(set, subset)``: coefficients.
    """

    sets: np.ndarray
    total: np.ndarray
    interaction: np.ndarray
    t: np.ndarray
    curve: np.ndarray
    products: np.ndarray


class ResponseSurfaces:
    r"""Regression of a score on the levels of sets of genes: a curve for each gene, and all products.

    With the coded level :math:`x_g`, 0 at the start and 1 at the goal,

    .. math:: E[s] = \beta_0 + \sum_{g \in S} f_g(y_g) + \sum_{U \subseteq S, |U| \ge 2} \gamma_U \prod_{g \in U} x_g

    with piecewise linear :math:`f_g`. What member :math:`r` adds beyond addition is :math:`\sum_{U \ni r} \gamma_U`; its
    standard error allows for unequal variances (HC3, MacKinnon and White 1985).

    Parameters
    ----------
    score
        What is explained, ``(sample,)``.
    levels
        Levels of the genes, ``(sample, gene)``.
    start, goal
        Levels of the two states, ``(gene,)``.
    df
        Pieces of each curve.
    """

    def __init__(self, score: np.ndarray, levels: np.ndarray, start: np.ndarray, goal: np.ndarray, df: int):
        self.score, self.df = score - score.mean(), df
        self.start, self.goal = start, goal
        self.centre, self.spread = levels.mean(axis=0), levels.std(axis=0) + 1e-9
        self.knots = np.quantile((levels - self.centre) / self.spread, np.linspace(0, 1, df + 1)[1:-1], axis=0)
        # a gene that does not differ between the states has no scale of its own: a quarter of its spread, at least
        step = goal - start
        self.step = np.where(step < 0, -1.0, 1.0) * np.maximum(np.abs(step), 0.25 * self.spread)
        self.coded = (levels - start) / self.step
        self.curves = self.pieces(levels)
        self.curves -= self.curves.mean(axis=0)

    def pieces(self, levels: np.ndarray) -> np.ndarray:
        """Piecewise linear functions of each gene, ``(row, gene, piece)``."""
        x = (levels - self.centre) / self.spread
        return np.stack([x, *(np.maximum(x - q, 0.0) for q in self.knots)], axis=2)

    def fit(
        self, sets: np.ndarray, description: str = "response surfaces", score: np.ndarray | None = None
    ) -> Surfaces:
        """Surfaces of sets of columns of ``levels``, ``(set, member)``; of another score if one is given."""
        score = self.score if score is None else score - score.mean()
        n, (m, k), df = len(self.score), sets.shape, self.df
        subsets = _subsets(k)
        contrast = np.array([[float(r in u) for u in subsets] for r in range(k)])
        first = 1 + k * df  # column of the first product
        out = Surfaces(
            sets, np.zeros(m), np.zeros((m, k)), np.zeros((m, k)), np.zeros((m, k, df)), np.zeros((m, len(subsets)))
        )
        rise = self.pieces(self.goal[None])[0] - self.pieces(self.start[None])[0]
        size = max(1, int(2e6 / (n * n_columns(k, df))))
        blocks = range(0, m, size)
        for b in progress(blocks, total=len(blocks), description=description, unit="batch"):
            part, here = sets[b : b + size], slice(b, b + size)
            products = np.stack([self.coded[:, part[:, u]].prod(axis=2).T for u in subsets], axis=2)
            unit = np.maximum(products.std(axis=1, keepdims=True), 1e-9)
            design = np.concatenate(
                [
                    np.ones((len(part), n, 1)),
                    self.curves[:, part].transpose(1, 0, 2, 3).reshape(len(part), n, k * df),
                    (products - products.mean(axis=1, keepdims=True)) / unit,
                ],
                axis=2,
            )
            gram = design.transpose(0, 2, 1) @ design
            hat = design @ np.linalg.inv(gram + 1e-7 * n * np.eye(gram.shape[1]))
            beta = hat.transpose(0, 2, 1) @ score
            left = score - (design @ beta[:, :, None])[:, :, 0]
            left /= 1.0 - np.minimum((hat * design).sum(axis=2), 0.99)
            out.products[here] = beta[:, first:] / unit[:, 0]
            out.curve[here] = beta[:, 1:first].reshape(len(part), k, df)
            out.interaction[here] = out.products[here] @ contrast.T
            out.total[here] = (out.curve[here] * rise[part]).sum(axis=(1, 2)) + out.products[here].sum(axis=1)
            scaled = contrast / unit  # set, split, subset
            influence = hat[:, :, first:] @ scaled.transpose(0, 2, 1)
            error = np.sqrt((influence**2 * left[:, :, None] ** 2).sum(axis=1))
            inflation = n * (influence**2).sum(axis=1) / np.maximum((scaled**2).sum(axis=2), 1e-300)
            known = (inflation < INFLATION) & (error > 1e-12)
            out.t[here] = np.where(known, out.interaction[here] / np.where(known, error, 1.0), 0.0)
        return out

    def fitted(self, found: Surfaces, i: int) -> np.ndarray:
        """Values of the surface of set ``i`` in each sample, up to a constant, ``(sample,)``."""
        row = found.sets[i]
        value = (self.curves[:, row] * found.curve[i]).sum(axis=(1, 2))
        for u, weight in zip(_subsets(len(row)), found.products[i], strict=True):
            value += weight * self.coded[:, row[list(u)]].prod(axis=1)
        return value

    def of_samples(self, fitted: Surfaces, last: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Total and interaction (of the split ``last``) from the levels of each sample to the goal, ``(set, sample)``."""
        coded = (levels - self.start) / self.step
        rise = self.pieces(self.goal[None]) - self.pieces(levels)
        total, interaction = np.empty((2, len(fitted.sets), len(levels)))
        for i, (row, r) in enumerate(zip(fitted.sets, last, strict=True)):
            total[i] = (rise[:, row] * fitted.curve[i]).sum(axis=(1, 2))
            interaction[i] = 0.0
            for u, weight in zip(_subsets(len(row)), fitted.products[i], strict=True):
                own = coded[:, row[list(u)]]
                total[i] += weight * (1.0 - own.prod(axis=1))
                if r in u:
                    mine, others = own[:, u.index(r)], np.delete(own, u.index(r), axis=1).prod(axis=1)
                    interaction[i] += weight * (1.0 - mine) * (1.0 - others)
        return total, interaction


def _subsets(k: int) -> list[tuple[int, ...]]:
    return [c for size in range(2, k + 1) for c in itertools.combinations(range(k), size)]
