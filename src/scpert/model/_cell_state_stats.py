"""Null distributions, rank aggregation and baselines of :class:`scpert.model.CellState`; numpy only."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import genpareto, rankdata

__all__ = [
    "adjust",
    "auroc",
    "imputation_scores",
    "matched_null",
    "match_nearest",
    "rank_product",
    "regulon_activity",
    "tail_pvalues",
]


def adjust(pvals: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg; NaN stay NaN."""
    p = np.asarray(pvals, dtype=float)
    out = np.full(p.shape, np.nan)
    ok = np.isfinite(p)
    m = int(ok.sum())
    if m:
        order = np.argsort(p[ok])
        ranked = p[ok][order] * m / np.arange(1, m + 1)
        back = np.empty(m)
        back[order] = np.minimum.accumulate(ranked[::-1])[::-1]
        out[ok] = np.minimum(back, 1.0)
    return out


def tail_pvalues(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    r"""One-sided :math:`P(\mathrm{null} \ge \mathrm{observed})`, at least ``1 / (n + 1)`` by counting.

    Where fewer than ten null values are as large and the null has 200 or more, the tail above its 95 % quantile is a
    generalised Pareto law (Knijnenburg et al. 2009), never below what counting could show by more than a factor 1,000.
    """
    null = np.sort(np.asarray(null, dtype=float))
    n = len(null)
    beyond = n - np.searchsorted(null, observed, side="left")
    p = (beyond + 1.0) / (n + 1.0)
    rare = beyond < 10
    if n >= 200 and rare.any():
        threshold = np.quantile(null, 0.95)
        excess = null[null > threshold] - threshold
        if len(excess) >= 10 and excess.max() > 0:
            shape, _, scale = genpareto.fit(excess, floc=0)
            shape = max(shape, 0.0)  # no finite end: conservative
            tail = len(excess) / n * genpareto.sf(np.asarray(observed)[rare] - threshold, shape, scale=scale)
            p[rare] = np.clip(tail, 1e-3 / (n + 1), 1.0)
    return p


def matched_null(
    shift: np.ndarray, tested: np.ndarray, null: np.ndarray, features: np.ndarray, *, neighbours: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Z and one-sided p of the shift of tested genes against null genes that resemble them.

    Parameters
    ----------
    shift
        Shift of all genes looked at, ``(gene,)``.
    tested, null
        Positions in ``shift``.
    features
        What genes are matched by, ``(gene, feature)``: mean and standard deviation of expression.
    neighbours
        Null genes that a gene is compared with.

    Notes
    -----
    The z of a gene is its distance from the median of its matched null genes in units of their spread (1.4826 MAD, and
    at least a tenth of the spread of all null genes); each null gene gets a z in the same way, without itself. The p
    value is the place of the z among all null z.
    """
    ranks = np.column_stack([rankdata(f) / len(f) for f in np.asarray(features, dtype=float).T])
    k = int(min(neighbours, max(len(null) - 1, 1)))

    def spread(x: np.ndarray) -> float:
        return 1.4826 * float(np.median(np.abs(x - np.median(x))))

    floor = max(0.1 * float(np.std(shift[null])), 0.1 * spread(shift[null]), 1e-12)

    def score(genes: np.ndarray) -> np.ndarray:
        out = np.empty(len(genes))
        for i, g in enumerate(genes):
            distance = ((ranks[null] - ranks[g]) ** 2).sum(axis=1)
            distance[null == g] = np.inf
            near = null[np.argpartition(distance, k - 1)[:k]]
            out[i] = (shift[g] - np.median(shift[near])) / max(spread(shift[near]), floor)
        return out

    z_null = score(null)
    z = score(tested)
    return z, tail_pvalues(z, z_null)


def match_nearest(value: np.ndarray, pool: np.ndarray, rng: np.random.Generator, n: int, width: int = 20) -> np.ndarray:
    """For each value ``n`` draws among the ``width`` positions of ``pool`` that are nearest to it, ``(value, n)``."""
    order = np.argsort(pool)
    place = np.searchsorted(pool[order], value)
    width = min(width, len(pool))
    start = np.clip(place - width // 2, 0, len(pool) - width)
    return order[start[:, None] + rng.integers(0, width, size=(len(value), n))]


def auroc(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column; NaN where a column has one class only."""
    n = truth.shape[0]
    rank = np.apply_along_axis(rankdata, 0, score)
    positive = truth.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (np.where(truth, rank, 0.0).sum(axis=0) - positive * (positive + 1) / 2) / (positive * (n - positive))
    return np.where((positive > 0) & (positive < n), area, np.nan)


def imputation_scores(prediction: np.ndarray, truth: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per sample: squared error of the hidden entries, and that of predicting the mean (0): ``(sample,)`` each."""
    return (
        np.where(hidden, (prediction - truth) ** 2, 0.0).sum(axis=1, dtype=np.float64),
        np.where(hidden, truth**2, 0.0).sum(axis=1, dtype=np.float64),
    )


def regulon_activity(signature: np.ndarray, genes: pd.Index, net: pd.DataFrame, tmin: int) -> dict[str, pd.DataFrame]:
    """Activities of the regulators in each row by decoupler's ``ulm`` and ``viper``: tables ``(row, regulator)``."""
    import decoupler as dc

    frame = pd.DataFrame(
        np.asarray(signature, dtype=np.float64), columns=genes, index=[f"s{i}" for i in range(len(signature))]
    )
    out = {}
    for name in ("ulm", "viper"):
        options = {"pleiotropy": False} if name == "viper" else {}
        score = getattr(dc.mt, name)(frame, net, tmin=tmin, verbose=False, **options)[0]
        out[name] = pd.DataFrame(score.to_numpy() if hasattr(score, "to_numpy") else score, columns=score.columns)
    return out


def rank_product(*columns: np.ndarray) -> np.ndarray:
    """Geometric mean of the ranks (1 = highest value) of each column, divided by their number; in (0, 1], small is good."""
    ranks = [rankdata(-np.nan_to_num(np.asarray(c, dtype=float), nan=-np.inf)) / len(c) for c in columns]
    return np.exp(np.mean(np.log(ranks), axis=0))
