"""Metrics of retrieval: whether a prediction is nearer to its own perturbation than to the others.

Ties get half credit, so that a constant prediction has no luck with the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from ._pair import Pair
from ._registry import Undefined, metric

__all__ = ["distances"]

RTOL = 1e-9  # distances closer than this are one distance


def distances(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Distance of each row of ``a`` to each of ``b``: l1, l2 or cosine (1 for a zero vector)."""
    from scipy.spatial.distance import cdist

    if kind == "cosine":
        a, b = _unit(a), _unit(b)
        return 1.0 - a @ b.T
    return cdist(a, b, {"l1": "cityblock", "l2": "euclidean"}[kind])


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


def _beats(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where the own distance is smaller, 1/2 at ties, 0 elsewhere."""
    tie = np.abs(own - other) <= RTOL * np.maximum(np.abs(own), np.abs(other)) + 1e-12
    return np.where(tie, 0.5, (own < other).astype(float))


def _need_two(pair: Pair) -> int:
    if len(pair.perturbations) < 2:
        raise Undefined("needs at least two perturbations to tell apart")
    return len(pair.perturbations)


#: What a distance adds up over genes.
Term = Callable[[np.ndarray, np.ndarray], np.ndarray]


class _Without:
    """Sums over the genes that perturbations target, by which sums over all genes shrink to those over the others.

    All sums are ``(p, q)``: p a prediction, q an observed perturbation. Nothing is summed gene by gene for each pair, so a
    screen of thousands of perturbations takes no more than its distances do.
    """

    def __init__(self, pair: Pair):
        self.targets, (n, n_genes) = pair.targets, pair.delta.shape
        rows = np.repeat(np.arange(n), [len(own) for own in self.targets])
        genes = np.concatenate([np.zeros(0, dtype=int), *self.targets])
        self.member = sparse.csr_matrix((np.ones(len(rows)), (rows, genes)), shape=(n, n_genes))
        order = np.argsort(genes, kind="stable")
        shared, start, count = np.unique(genes[order], return_index=True, return_counts=True)
        self.shared = [
            (g, rows[order[i : i + k]]) for g, i, k in zip(shared, start, count, strict=True) if k > 1
        ]  # genes that several perturbations target

    def of_p(self, term: Term, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Sum of ``term(a_p, b_q)`` over the targets of p."""
        out = np.zeros((len(a), len(b)))
        for p, own in enumerate(self.targets):
            if len(own):
                out[p] = term(a[p, own], b[:, own]).sum(axis=1)
        return out

    def of_either(self, term: Term, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Sum of ``term(a_p, b_q)`` over the targets of p and of q."""
        out = self.of_p(term, a, b) + self.of_p(lambda x, y: term(y, x), b, a).T
        for g, rows in self.shared:  # counted twice where both target it
            out[np.ix_(rows, rows)] -= term(a[rows, g][:, None], b[rows, g][None, :])
        return out

    def of_row(self, values: np.ndarray) -> np.ndarray:
        """Sum of the values of p ``(p, gene)`` over the targets of p and of q."""
        own = self.member.multiply(values).tocsr()
        both = (own @ self.member.T).toarray()
        return (self.member @ values.T).T + np.asarray(own.sum(axis=1)).reshape(-1, 1) - both


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * y


def _absolute(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x - y)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x - y) ** 2


def _sums(a: np.ndarray, b: np.ndarray, kind: str) -> tuple[Term, np.ndarray]:
    """The term of a distance and its sums over all genes: products for cosine, squares for l2."""
    if kind == "cosine":
        return _product, a @ b.T
    return (_absolute, distances(a, b, "l1")) if kind == "l1" else (_square, distances(a, b, "l2") ** 2)


def _masked_distance(pair: Pair, kind: str) -> np.ndarray:
    """Distance (predicted p, observed q) over the genes that are not p's targets; l2: squared."""
    a, b, without = pair.predicted_delta, pair.delta, _Without(pair)
    term, full = _sums(a, b, kind)
    left = full - without.of_p(term, a, b)
    if kind != "cosine":
        return np.maximum(left, 0)
    whole_a, whole_b = (a**2).sum(axis=1)[:, None], (b**2).sum(axis=1)
    aa = whole_a - np.asarray(without.member.multiply(a**2).sum(axis=1)).reshape(-1, 1)
    return _cosine(left, aa, whole_b - without.member @ (b**2).T, whole_a, whole_b)


def _discrimination(pair: Pair, kind: str) -> np.ndarray:
    n = _need_two(pair)
    d = _masked_distance(pair, kind)
    wins = _beats(np.diag(d)[:, None], d)
    np.fill_diagonal(wins, 1.0)
    return 1.0 - (1.0 - wins).sum(axis=1) / n


_PDS: dict = {
    "best": 1,
    "chance": 0.5,
    "formula": "1 - rank_p / P, rank_p = #{q: d_pq < d_pp} + #ties/2, d over genes but p's targets",
    "source": "cell-eval, Virtual Cell Challenge (ties there by row order; there only a single target is left out)",
}
CONSTANT = (
    "a constant prediction scores 0.5 + 1/(2P), and more where targets are measured: p's own strong change is left out of its "
    "own distance only (the retrieval metrics without targets leave it out of all)"
)


@metric(
    "discrimination_score_l1",
    exploit="depends on the scale: multiplying all predictions changes it; " + CONSTANT,
    **_PDS,
)
def discrimination_score_l1(pair: Pair) -> np.ndarray:
    """Perturbation discrimination score by Manhattan distance of the shifts."""
    return _discrimination(pair, "l1")


@metric("discrimination_score_l2", exploit="depends on the scale of the predictions; " + CONSTANT, **_PDS)
def discrimination_score_l2(pair: Pair) -> np.ndarray:
    """Perturbation discrimination score by Euclidean distance of the shifts."""
    return _discrimination(pair, "l2")


@metric("discrimination_score_cosine", exploit="blind to the size of the effect; " + CONSTANT, **_PDS)
def discrimination_score_cosine(pair: Pair) -> np.ndarray:
    """Perturbation discrimination score by cosine distance of the shifts."""
    return _discrimination(pair, "cosine")


def _pairwise_without_targets(pair: Pair, kind: str) -> np.ndarray:
    """Share of q that p's prediction beats, comparing each p and q over the genes that neither targets."""
    n = _need_two(pair)
    a, b, without = pair.predicted_delta, pair.delta, _Without(pair)
    term, full = _sums(a, b, kind)
    other = full - without.of_either(term, a, b)
    own = np.diag(full)[:, None] - without.of_row(term(a, b))
    if kind == "cosine":
        whole_a, whole_b = (a**2).sum(axis=1)[:, None], (b**2).sum(axis=1)[:, None]
        aa, bb = whole_a - without.of_row(a**2), whole_b - without.of_row(b**2)
        wins = _beats(_cosine(own, aa, bb, whole_a, whole_b), _cosine(other, aa, bb.T, whole_a, whole_b.T))
    else:
        wins = _beats(np.maximum(own, 0), np.maximum(other, 0))
    np.fill_diagonal(wins, 0.0)
    return wins.sum(axis=1) / (n - 1)


def _cosine(dot: np.ndarray, aa: np.ndarray, bb: np.ndarray, whole_a: np.ndarray, whole_b: np.ndarray) -> np.ndarray:
    """Distance from sums that are left of ``whole`` ones: what is left of rounding is a zero vector."""
    aa, bb = (
        np.where(left > 1e-12 * whole, left, 0.0) for left, whole in ((aa, whole_a), (bb, whole_b))
    )  # rest of rounding
    norm = np.sqrt(aa * bb)
    return 1.0 - np.where(norm > 0, dot / np.where(norm > 0, norm, 1.0), 0.0)


_NIR: dict = {
    "best": 1,
    "chance": 0.5,
    "formula": "mean_q [d(δ̂_p, δ_p) < d(δ̂_p, δ_q)], d over genes that neither p nor q targets; 0.5 by chance",
    "source": "Kernfeld et al. 2025",
}


@metric("retrieval_l1_no_targets", exploit="depends on the scale of the predictions", **_NIR)
def retrieval_l1_no_targets(pair: Pair) -> np.ndarray:
    """Share of other perturbations told apart (Manhattan), the targets of both left out."""
    return _pairwise_without_targets(pair, "l1")


@metric("retrieval_l2_no_targets", exploit="depends on the scale of the predictions", **_NIR)
def retrieval_l2_no_targets(pair: Pair) -> np.ndarray:
    """Share of other perturbations told apart (Euclidean), the targets of both left out."""
    return _pairwise_without_targets(pair, "l2")


@metric("retrieval_cosine_no_targets", exploit="blind to the size of the effect", **_NIR)
def retrieval_cosine_no_targets(pair: Pair) -> np.ndarray:
    """Share of other perturbations told apart (cosine), the targets of both left out."""
    return _pairwise_without_targets(pair, "cosine")


@metric(
    "centroid_accuracy",
    best=1,
    chance=0.5,
    formula="(1/(P-1)) #{q != p: ||m̂_p - m_q|| > ||m̂_p - m_p||}, ties 1/2; 0.5 by chance",
    source="Systema (Viñas Torné et al. 2025); the same as NIR of Miller et al. 2025",
    exploit="the knocked-down target alone can identify a perturbation: see retrieval_l2_no_targets",
)
def centroid_accuracy(pair: Pair) -> np.ndarray:
    """Share of other perturbations whose centroid is farther from the prediction than its own."""
    n = _need_two(pair)
    d = distances(pair.predicted, pair.observed, "l2")
    wins = _beats(np.diag(d)[:, None], d)
    np.fill_diagonal(wins, 0.0)
    return wins.sum(axis=1) / (n - 1)


@metric(
    "transposed_rank",
    best=0,
    chance=0.5,
    formula="(1/(P-1)) #{q != p: d(δ̂_q, δ_p) < d(δ̂_p, δ_p)}, ties 1/2, d Euclidean; 0.5 by chance",
    source="PerturBench (Wu et al. 2024; there ties count in full and the division is by P)",
    exploit="depends on the scale of the predictions",
)
def transposed_rank(pair: Pair) -> np.ndarray:
    """Share of other predictions that lie nearer to the observed effect than its own prediction."""
    n = _need_two(pair)
    d = distances(pair.predicted_delta, pair.delta, "l2").T  # row p: distance of all predictions to truth p
    losses = 1.0 - _beats(np.diag(d)[:, None], d)
    np.fill_diagonal(losses, 0.0)
    return losses.sum(axis=1) / (n - 1)
