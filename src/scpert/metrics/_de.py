"""Differential expression: one rank-sum engine for real and predicted cells, and the metrics that compare the results.

The engine sorts the control cells once. Every group is then ranked against them by binary search, all genes at once, and
ties (zeros above all) are counted, not sorted: cost and memory follow the non-zero values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._progress import progress
from ..data import Screen
from ._pair import Pair
from ._profile import raise_partial
from ._registry import Undefined, metric

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["wilcoxon"]

FDR = 0.05


# ---------------------------------------------------------------------------------------------- engine


def _keys(block: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Sorted 64-bit keys (gene, value) of the non-zero entries, and the gene of each: single precision, order kept."""
    nonzero = block.data != 0
    value = block.data[nonzero].astype(np.float32)
    bits = value.view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))  # negative values too sort as numbers
    keys = (block.indices[nonzero].astype(np.uint64) << np.uint64(32)) | bits.astype(np.uint64)
    keys.sort()
    return keys, (keys >> np.uint64(32)).astype(np.int64)


def _runs(keys: np.ndarray) -> np.ndarray:
    """First position of each distinct key."""
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, dtype=int)


class RankSum:
    """Mann-Whitney tests of many groups against one set of control cells.

    Parameters
    ----------
    control
        Control cells, CSR ``(cell, gene)``, log1p values (single precision is compared).
    """

    def __init__(self, control: sparse.csr_matrix):
        self.n, self.n_genes = control.shape
        self.keys, gene = _keys(control)
        self.start = np.searchsorted(gene, np.arange(self.n_genes + 1))
        nonzero = np.diff(self.start)
        self.zeros = self.n - nonzero
        negative = (self.keys & np.uint64(0x80000000)) == 0
        self.negative = np.bincount(gene[negative], minlength=self.n_genes)
        first = _runs(self.keys)
        length = np.diff(np.append(first, len(self.keys)))
        self.run = np.append(np.repeat(length, length), 0)  # how often the key at each position is there
        self.sentinel = np.append(self.keys, np.uint64(0xFFFFFFFFFFFFFFFF))
        size = length.astype(float)
        self.ties = np.bincount(gene[first], weights=size**3 - size, minlength=self.n_genes)

    def test(
        self, group: sparse.csr_matrix, *, continuity: bool = True, tie_correct: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Z scores and two-sided p values of a group against the control ``(gene,)``.

        ``z > 0``: higher in the group. As ``scipy.stats.mannwhitneyu(method="asymptotic")`` with the continuity
        correction, as ``scanpy.tl.rank_genes_groups(method="wilcoxon")`` without it.
        """
        from scipy.special import ndtr

        n, genes = group.shape[0], self.n_genes
        keys, gene = _keys(group)
        left = np.searchsorted(self.keys, keys, side="left")
        equal = np.where(self.sentinel[left] == keys, self.run[left], 0).astype(float)
        less = (left - self.start[gene]).astype(float)
        positive = (keys & np.uint64(0x80000000)) != 0
        less[positive] += self.zeros[gene[positive]]
        u = np.bincount(gene, weights=less + 0.5 * equal, minlength=genes)
        zeros = n - np.bincount(gene, minlength=genes)
        u += zeros * (self.negative + 0.5 * self.zeros)
        first = _runs(keys)
        mine = np.diff(np.append(first, len(keys))).astype(float)
        theirs = equal[first]
        both = mine + theirs
        ties = self.ties + np.bincount(gene[first], weights=(both**3 - both) - (theirs**3 - theirs), minlength=genes)
        zero = (zeros + self.zeros).astype(float)
        ties += zero**3 - zero
        total = float(n + self.n)
        if not tie_correct:
            ties = np.zeros(genes)
        variance = n * self.n / 12.0 * ((total + 1) - ties / max(total * (total - 1), 1.0))
        off = u - 0.5 * n * self.n
        flat = variance <= 1e-12
        sd = np.sqrt(np.where(flat, 1.0, variance))
        size = np.abs(off) - (0.5 if continuity else 0.0)
        p = np.where(flat, 1.0, np.minimum(2 * ndtr(-size / sd), 1.0))
        return np.where(flat, 0.0, np.sign(off) * size / sd), p


def log2_fold_change(mean: np.ndarray, control: np.ndarray) -> np.ndarray:
    """``log2(expm1(mean) / expm1(control))`` of mean log1p values; 0 where both are zero, infinite where one is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.log2(np.maximum(np.expm1(mean), 0) / np.maximum(np.expm1(control), 0))
    return np.where(np.isnan(out), 0.0, out)


def wilcoxon(
    adata: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    continuity: bool = True,
    tie_correct: bool = True,
) -> pd.DataFrame:
    """Rank-sum test of every perturbation against the control cells, gene by gene.

    Cells are read group by group from sparse, dense or backed matrices; only the control cells stay in memory.

    Parameters
    ----------
    adata, perturbation_key, control, layer, scale, library_size_key
        As everywhere.
    continuity
        Continuity correction (scipy and cell-eval have it, scanpy has not).
    tie_correct
        Correct the variance for ties.

    Returns
    -------
    DataFrame, one row per perturbation and gene: ``perturbation``, ``gene``, ``log2_fold_change`` (of means of log1p
    values, back-transformed), ``zscore``, ``pvals``, ``pvals_adj`` (BH within the perturbation).

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> len(scpert.metrics.wilcoxon(adata))
    200
    """
    from scipy.stats import false_discovery_control

    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    cells = screen.rows(screen.is_control)
    engine, base = RankSum(cells), np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel()
    genes = np.asarray(screen.genes.astype(str), dtype=object)
    parts = []
    for label in progress(screen.perturbations, description="Rank-sum tests", unit="perturbation"):
        group = screen.rows(screen.labels == label)
        z, p = engine.test(group, continuity=continuity, tie_correct=tie_correct)
        mean = np.asarray(group.mean(axis=0, dtype=np.float64)).ravel()
        parts.append(
            pd.DataFrame(
                {
                    "perturbation": label,
                    "gene": genes,
                    "log2_fold_change": log2_fold_change(mean, base),
                    "zscore": z,
                    "pvals": p,
                    "pvals_adj": false_discovery_control(p),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


# ---------------------------------------------------------------------------------------------- results of a pair


@dataclass(frozen=True)
class Tests:
    """Tests of all perturbations of a pair, each ``(perturbation, gene)``."""

    fold: np.ndarray
    p: np.ndarray
    fdr: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        return self.fdr < FDR


def _tests(pair: Pair) -> tuple[Tests, Tests]:
    """Tests of the real and of the predicted cells; the real ones are kept with the reference."""
    from scipy.stats import false_discovery_control

    if "tests" in pair.__dict__:
        return pair.__dict__["tests"]
    for label in pair.perturbations:
        if len(pair.reference.rows[label]) < 1:
            raise Undefined("needs observed cells")
    cache = pair.reference._cache.setdefault(("tests", tuple(pair.gene_index)), {})
    missing = [p for p in pair.perturbations if p not in cache]
    real_control = pair.observed_cells(pair.control)
    if missing:
        engine = RankSum(real_control)
        for label in missing:
            cache[label] = engine.test(pair.observed_cells(label))[1]
    real = np.array([cache[label] for label in pair.perturbations])
    own_control = pair.control in pair.prediction.rows
    predicted_control = pair.predicted_cells(pair.control)
    if own_control and not np.isfinite(predicted_control.data).all():
        own_control, predicted_control = False, real_control
    engine = RankSum(predicted_control)
    predicted = np.array([engine.test(pair.predicted_cells(label))[1] for label in pair.perturbations])
    base = np.asarray(predicted_control.mean(axis=0, dtype=np.float64)).ravel()
    observed = pair.observed
    if pair.reference.strata is not None:  # folds are of the cells that are tested, as they are
        cells = [pair.observed_cells(label) for label in pair.perturbations]
        observed = np.array([np.asarray(x.mean(axis=0, dtype=np.float64)).ravel() for x in cells])
    out = (
        Tests(log2_fold_change(observed, pair.observed_control), real, false_discovery_control(real, axis=1)),
        Tests(log2_fold_change(pair.predicted, base), predicted, false_discovery_control(predicted, axis=1)),
    )
    pair.__dict__["tests"] = out
    return out


def _order(tests: Tests, row: int, names: np.ndarray) -> np.ndarray:
    """Significant genes by falling |log2 fold change|; ties by p value, then by name (never by position)."""
    genes = np.flatnonzero(tests.significant[row])
    size = np.abs(tests.fold[row, genes]).astype(np.float32)
    return genes[np.lexsort((names[genes], tests.p[row, genes], -size))]


def _ranked(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each gene among the significant ones, real and predicted ``(perturbation, gene)``; the last where it is not."""
    if "ranked" not in pair.__dict__:
        names = np.argsort(np.argsort(pair.genes.astype(str)))
        out = []
        for tests in _tests(pair):
            ranks = np.full(tests.p.shape, tests.p.shape[1], dtype=np.int32)
            for i in range(len(ranks)):
                order = _order(tests, i, names)
                ranks[i, order] = np.arange(len(order))
            out.append(ranks)
        pair.__dict__["ranked"] = (out[0], out[1])
    return pair.__dict__["ranked"]


NO_REAL = "no gene changes significantly in the observed cells"
NO_PREDICTED = "the predicted cells have no significant gene"
DE_SOURCE = "cell-eval (0 there where undefined)"


def _finish(values: list[float], reasons: list[str]) -> np.ndarray:
    out = np.array(values, dtype=float)
    if np.isnan(out).any():
        raise_partial(out, np.array(reasons, dtype=object))
    return out


def _shared_top(pair: Pair, k: int | None, n_significant: np.ndarray, reason: str) -> np.ndarray:
    """Share of the first ``min(k, n_significant)`` genes of one ranking that the other has there too."""
    real, predicted = _ranked(pair)
    size = n_significant if k is None else np.minimum(k, n_significant)
    common = ((real < size[:, None]) & (predicted < size[:, None])).sum(axis=1)
    out = np.where(size > 0, common / np.maximum(size, 1), np.nan)
    if np.isnan(out).any():
        raise_partial(out, reason)
    return out


def _overlap(pair: Pair, k: int | None) -> np.ndarray:
    return _shared_top(pair, k, _tests(pair)[0].significant.sum(axis=1), NO_REAL)


def _precision(pair: Pair, k: int | None) -> np.ndarray:
    return _shared_top(pair, k, _tests(pair)[1].significant.sum(axis=1), NO_PREDICTED)


for _k in (None, 50, 100, 200, 500):
    _n = "N" if _k is None else str(_k)
    _recall, _precise = partial(_overlap, k=_k), partial(_precision, k=_k)
    _recall.__doc__ = f"Share of the top {_n} significant genes (by fold change) that are among the top {_n} predicted."
    _precise.__doc__ = f"Share of the top {_n} predicted significant genes that are among the top {_n} real ones."
    metric(
        f"overlap_at_{_n}",
        best=1,
        chance=0.0,
        level="cell",
        needs=("cells",),
        formula="|top_k real ∩ top_k predicted| / k, k = min(k, significant real genes), by |log2 fold change|",
        source=DE_SOURCE + "; N is the Virtual Cell Challenge's DES",
        exploit="spreading or adding zeros to predicted cells changes which genes are significant",
    )(_recall)
    metric(
        f"precision_at_{_n}",
        best=1,
        chance=0.0,
        level="cell",
        needs=("cells",),
        formula="|top_k real ∩ top_k predicted| / k, k = min(k, significant predicted genes), by |log2 fold change|",
        source=DE_SOURCE,
        exploit="calling few, sure genes",
    )(_precise)


@metric(
    "de_spearman_sig",
    best=1,
    chance=0.0,
    level="set",
    needs=("cells",),
    formula="Spearman over perturbations of the numbers of significant genes, perturbations with at least one real",
    source="cell-eval (1 there where there is none)",
    exploit="number of predicted cells drives the number of significant genes",
)
def de_spearman_sig(pair: Pair) -> float:
    """Whether perturbations with many changed genes also have many in the prediction."""
    from scipy.stats import rankdata

    real, predicted = _tests(pair)
    a, b = real.significant.sum(axis=1), predicted.significant.sum(axis=1)
    keep = a > 0
    if keep.sum() < 2 or len(np.unique(a[keep])) < 2:
        raise Undefined("needs two perturbations with different numbers of significant genes")
    if len(np.unique(b[keep])) < 2:
        raise Undefined("the predicted numbers of significant genes are all equal")
    return float(np.corrcoef(rankdata(a[keep]), rankdata(b[keep]))[0, 1])


@metric(
    "de_direction_match",
    best=1,
    chance=0.5,
    level="cell",
    needs=("cells",),
    formula="share of the real significant genes with sign(log2 fold change) equal in real and predicted cells",
    source="cell-eval",
    exploit="predicting the average response",
)
def de_direction_match(pair: Pair) -> np.ndarray:
    """Share of the significantly changed genes whose direction is right."""
    real, predicted = _tests(pair)
    same = np.sign(real.fold) == np.sign(predicted.fold)
    n = real.significant.sum(axis=1)
    out = np.where(n > 0, (same & real.significant).sum(axis=1) / np.maximum(n, 1), np.nan)
    if np.isnan(out).any():
        raise_partial(out, NO_REAL)
    return out


@metric(
    "de_spearman_lfc_sig",
    best=1,
    chance=0.0,
    level="cell",
    needs=("cells",),
    formula="Spearman of real and predicted log2 fold change over the real significant genes",
    source="cell-eval",
    exploit="predicting the average response",
)
def de_spearman_lfc_sig(pair: Pair) -> np.ndarray:
    """Rank correlation of the fold changes of the significantly changed genes."""
    real, predicted = _tests(pair)
    values, reasons = [], []
    for i in range(len(pair.perturbations)):
        keep = real.significant[i]
        (a, n_a), (b, n_b) = (_ranks(x.fold[i, keep].astype(np.float32)) for x in (real, predicted))
        if n_a < 2:
            values.append(np.nan)
            reasons.append("fewer than two genes change significantly in the observed cells")
        elif n_b < 2:
            values.append(np.nan)
            reasons.append("the predicted fold changes are all equal")
        else:
            values.append(_correlation(a, b))
            reasons.append("")
    return _finish(values, reasons)


@metric(
    "de_sig_genes_recall",
    best=1,
    chance=0.0,
    level="cell",
    needs=("cells",),
    formula="|significant real ∩ significant predicted| / |significant real|",
    source="cell-eval",
    exploit="calling every gene significant (many predicted cells, little spread)",
)
def de_sig_genes_recall(pair: Pair) -> np.ndarray:
    """Share of the significantly changed genes that are significant in the prediction."""
    real, predicted = _tests(pair)
    n = real.significant.sum(axis=1)
    out = np.where(n > 0, (real.significant & predicted.significant).sum(axis=1) / np.maximum(n, 1), np.nan)
    if np.isnan(out).any():
        raise_partial(out, NO_REAL)
    return out


@metric(
    "de_nsig_counts",
    best=None,
    level="cell",
    needs=("cells",),
    columns=("de_nsig_counts_real", "de_nsig_counts_pred"),
    formula="number of genes with FDR < 0.05",
    source="cell-eval",
    exploit="a count, no score",
)
def de_nsig_counts(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of significant genes, real and predicted."""
    real, predicted = _tests(pair)
    return real.significant.sum(axis=1), predicted.significant.sum(axis=1)


def _labels_and_scores(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    real, predicted = _tests(pair)
    fdr = np.clip(predicted.fdr.astype(np.float32), np.float32(1e-10), np.float32(1.0))
    return real.significant, -np.log10(fdr)


ONE_CLASS = "all or none of the genes change significantly in the observed cells"


@metric(
    "pr_auc",
    best=1,
    level="cell",
    needs=("cells",),
    formula="average precision; labels: real FDR < 0.05, score: -log10 predicted FDR (single precision)",
    source="cell-eval",
    exploit="rises with the share of significant genes: compare with that share",
)
def pr_auc(pair: Pair) -> np.ndarray:
    """Area under the precision-recall curve for finding the significantly changed genes."""
    labels, scores = _labels_and_scores(pair)
    out = np.array([average_precision(l, s) for l, s in zip(labels, scores, strict=True)])
    if np.isnan(out).any():
        raise_partial(out, ONE_CLASS)
    return out


@metric(
    "roc_auc",
    best=1,
    chance=0.5,
    level="cell",
    needs=("cells",),
    formula="area under the ROC curve; labels and scores as pr_auc",
    source="cell-eval",
    exploit="predicting the average response",
)
def roc_auc(pair: Pair) -> np.ndarray:
    """Area under the ROC curve for finding the significantly changed genes."""
    labels, scores = _labels_and_scores(pair)
    out = np.array([auroc(l, s) for l, s in zip(labels, scores, strict=True)])
    if np.isnan(out).any():
        raise_partial(out, ONE_CLASS)
    return out


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision (sum of precision times step in recall over distinct scores); NaN with one class."""
    positives = labels.sum()
    if positives in (0, len(labels)):
        return np.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = hits[last]
    return float(np.sum(np.diff(hits, prepend=0) / positives * hits / (last + 1)))


def _ranks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Mid-ranks, and how many distinct values there are."""
    distinct, code, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[code], len(distinct)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve by mid-ranks; NaN with one class."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return np.nan
    ranks = _ranks(scores)[0][labels].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))
