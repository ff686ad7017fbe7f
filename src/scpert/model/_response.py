"""How observed values follow predictions, learned from held-out rows: response (slopes, a smooth surface) and limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

__all__ = ["NORMAL_90", "COVERAGE", "Response", "fit_response", "limit_widths", "spread"]

#: Standard deviations of a normal to either side that hold 90 %.
NORMAL_90 = 1.645

#: Share of the values of unseen perturbations that limits are made to hold.
COVERAGE = 0.9

#: Pseudo-weight with which a gene's slope is shrunk to that of all genes, in mean sums of squares.
_PRIOR = 0.5
#: Deviations beyond this many standard deviations of a gene bend the surface no further.
_REACH = 3.0
_RIDGE = 1e-4


@dataclass
class Response:
    r"""Expected value of a gene given its predicted deviation from the mean.

    .. math:: g_j d + \tau_j \sum_k w_k b_k(d_j, m_j, \lVert d \rVert)

    for the predicted deviation d of gene j, its mean m and the standard deviation :math:`\tau` of its training values. The basis b
    holds all products of :math:`g_j d_j / \tau_j` and :math:`m_j / \tau_j` up to the third degree, and both times the logarithm of the
    length of the predicted row. Values that are bounded or mostly zero do not follow a linear prediction in a straight line.

    Attributes
    ----------
    slope
        g, ``(gene,)``; empty: 1 for all.
    weights
        w, ``(term,)``; empty: no surface.
    spread
        :math:`\tau`, ``(gene,)``.
    length
        Typical length of a predicted row.
    """

    slope: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spread: np.ndarray = field(default_factory=lambda: np.zeros(0))
    length: float = 1.0

    def __call__(self, deviation: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Expected deviations, ``(row, gene)``, of predicted ones from the mean ``(gene,)``."""
        out = deviation * self.slope if len(self.slope) else deviation
        if len(self.weights):
            out = out + sum(w * t for w, t in zip(self.weights, self.terms(deviation, centre), strict=True))
        return out

    def terms(self, deviation: np.ndarray, centre: np.ndarray) -> Iterator[np.ndarray]:
        """The basis, times the spread: ``(row, gene)`` each."""
        x = np.clip(deviation * self.slope / self.spread, -_REACH, _REACH)
        m = np.broadcast_to(centre / self.spread, x.shape)
        size = np.log(np.linalg.norm(deviation, axis=1) / self.length + 0.1)[:, None]
        for i in range(4):
            for j in range(4 - i):
                yield self.spread * x**i * m**j
        yield self.spread * size * x
        yield self.spread * size * m


def spread(rows: np.ndarray) -> np.ndarray:
    """Standard deviation of each gene of rows without their mean; at least a twentieth of the mean one."""
    out = np.sqrt((rows**2).mean(axis=0))
    return np.maximum(out, 0.05 * out.mean() + 1e-12)


def _slope(cross: np.ndarray, square: np.ndarray) -> np.ndarray:
    overall = cross.sum() / max(float(square.sum()), 1e-30)
    prior = _PRIOR * float(square.mean()) + 1e-30
    return np.clip((cross + prior * overall) / (square + prior), 0.0, 2.0)


def _solve(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-30))
    return np.linalg.solve(gram / np.outer(scale, scale) + _RIDGE * np.eye(len(gram)), moment / scale) / scale


def fit_response(
    predicted: list[np.ndarray], rest: list[np.ndarray], centres: list[np.ndarray], training: list[np.ndarray]
) -> tuple[Response, list[np.ndarray]]:
    """Learn the response from folds.

    Each of its two parts is kept only if it makes the squared error smaller in folds that it was not learned from.

    Parameters
    ----------
    predicted, rest
        Predicted and observed deviations of the held-out rows of each fold, ``(row, gene)``.
    centres
        Mean of the other rows of each fold, ``(gene,)``.
    training
        The other rows of each fold without their mean, ``(row, gene)``.

    Returns
    -------
    The response learned from all folds, with the spread of the last one (to be replaced by that of all rows), and the expected
    deviations of each fold's rows, learned from the other folds (but that the slopes of those, on which the shared weights of the
    surface rest, have seen it).
    """
    cross = np.stack([(d * y).sum(axis=0) for d, y in zip(predicted, rest, strict=True)])
    square = np.stack([(d**2).sum(axis=0) for d in predicted])
    length = max(float(np.mean([np.linalg.norm(d, axis=1).mean() for d in predicted])), 1e-12)
    apart = [
        Response(_slope(cross.sum(axis=0) - c, square.sum(axis=0) - s), spread=spread(x), length=length)
        for c, s, x in zip(cross, square, training, strict=True)
    ]
    grams, moments, straight = [], [], []
    for r, d, y, m in zip(apart, predicted, rest, centres, strict=True):
        straight.append(r(d, m))
        B = np.stack([t.ravel() for t in r.terms(d, m)])
        grams.append(B @ B.T)
        moments.append(B @ (y - straight[-1]).ravel())
    gram, moment = np.sum(grams, axis=0), np.sum(moments, axis=0)
    for r, g, b in zip(apart, grams, moments, strict=True):
        r.weights = _solve(gram - g, moment - b)
    curved = [r(d, m) for r, d, m in zip(apart, predicted, centres, strict=True)]

    kinds = {"none": predicted, "slope": straight, "surface": curved}
    loss = {kind: sum(float(((y - v) ** 2).sum()) for y, v in zip(rest, kinds[kind], strict=True)) for kind in kinds}
    best = min(loss, key=loss.__getitem__)
    together = Response(spread=apart[-1].spread, length=length)
    if best != "none":
        together.slope = _slope(cross.sum(axis=0), square.sum(axis=0))
    if best == "surface":
        together.weights = _solve(gram, moment)
    return together, kinds[best]


def limit_widths(ratio: np.ndarray) -> np.ndarray:
    """Half-width of each gene's limits in standard deviations, from errors on left-out rows.

    The quantile of the gene's errors that holds 90 % of one row more than there are (split conformal), drawn towards that
    of all genes as far as chance alone explains how unequally the latter holds the genes (empirical Bayes).

    Parameters
    ----------
    ratio
        Absolute errors in standard deviations, ``(row, gene)``.

    Returns
    -------
    ``(gene,)``
    """
    n = len(ratio)
    level = min(1.0, COVERAGE * (n + 1) / n)
    moves = ratio.any(axis=0)
    if not moves.any():
        return np.zeros(ratio.shape[1])
    pooled = np.quantile(ratio[:, moves], level)
    chance = COVERAGE * (1 - COVERAGE) / n
    unequal = max((ratio[:, moves] <= pooled).mean(axis=0).var() - chance, 0.0)
    own = unequal / (unequal + chance)
    return own * np.quantile(ratio, level, axis=0) + (1 - own) * pooled
