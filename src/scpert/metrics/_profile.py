"""Metrics of mean profiles: each takes a :class:`Pair` and returns one value per perturbation (NaN where undefined)."""

from __future__ import annotations

import numpy as np

from ._pair import FLAT, Pair, top_mask, top_share
from ._registry import Undefined, metric

DELTA_EXPLOIT = "predicting the average response of all perturbations scores high (systematic variation)"
SCALE_EXPLOIT = "shrinking every prediction towards the mean lowers it"
FLAT_PREDICTION = "the predicted shift is constant over the genes"
FLAT_TRUTH = "the observed shift is constant over the genes"
ORACLE = "the genes are chosen by the test truth: a leak shared by all models; the target itself is usually among them"


# ---------------------------------------------------------------------------------------------- kernels


def masked_correlation(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Row-wise Pearson correlation over the genes in ``mask``; NaN where either side is flat."""
    w = np.ones(a.shape, dtype=bool) if mask is None else mask
    n = np.maximum(w.sum(axis=1, keepdims=True), 1)
    a = np.where(w, a - np.where(w, a, 0).sum(axis=1, keepdims=True) / n, 0.0)
    b = np.where(w, b - np.where(w, b, 0).sum(axis=1, keepdims=True) / n, 0.0)
    na, nb = np.sqrt((a**2).sum(axis=1)), np.sqrt((b**2).sum(axis=1))
    flat = (na <= FLAT * np.sqrt(n[:, 0])) | (nb <= FLAT * np.sqrt(n[:, 0])) | (w.sum(axis=1) < 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.clip((a * b).sum(axis=1) / (na * nb), -1.0, 1.0)
    return np.where(flat, np.nan, out)


def masked_mean(values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Row-wise mean over the genes in ``mask``; NaN where it is empty."""
    if mask is None:
        return values.mean(axis=1)
    n = mask.sum(axis=1)
    return np.where(n > 0, np.where(mask, values, 0.0).sum(axis=1) / np.maximum(n, 1), np.nan)


def correlate(pair: Pair, a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Correlation of a prediction ``a`` with the truth ``b``, with a reason where it is undefined."""
    out = masked_correlation(a, b, mask)
    if np.isnan(out).any():
        flat = np.isnan(masked_correlation(a, a, mask))
        raise_partial(out, np.where(flat, FLAT_PREDICTION, FLAT_TRUTH))
    return out


def raise_partial(values: np.ndarray, reasons: np.ndarray | str) -> None:
    """Hand back values of which some are undefined, with the reason of each."""
    if isinstance(reasons, str):
        reasons = np.full(len(values), reasons, dtype=object)
    raise Undefined(values=values, reasons=np.asarray(reasons, dtype=object))


def need_centroid(pair: Pair) -> np.ndarray:
    if pair.centroid is None:
        raise Undefined("needs the training data (train=) with all genes: the perturbed centroid comes from them")
    return pair.centroid


# ---------------------------------------------------------------------------------------------- errors


@metric("mse", best=0, formula="mean_g (m̂_pg - m_pg)²", source="cell-eval", exploit=SCALE_EXPLOIT)
def mse(pair: Pair) -> np.ndarray:
    """Mean squared error of the predicted mean profile."""
    return ((pair.predicted - pair.observed) ** 2).mean(axis=1)


@metric(
    "mae", best=0, formula="mean_g |m̂_pg - m_pg|", source="cell-eval; Virtual Cell Challenge", exploit=SCALE_EXPLOIT
)
def mae(pair: Pair) -> np.ndarray:
    """Mean absolute error of the predicted mean profile."""
    return np.abs(pair.predicted - pair.observed).mean(axis=1)


@metric("rmse", best=0, formula="sqrt(mean_g (m̂_pg - m_pg)²)", source="textbook", exploit=SCALE_EXPLOIT)
def rmse(pair: Pair) -> np.ndarray:
    """Root mean squared error of the predicted mean profile."""
    return np.sqrt(mse(pair))


@metric("l2", best=0, formula="||m̂_p - m_p||", source="Ahlmann-Eltze et al. 2025", exploit=SCALE_EXPLOIT)
def l2(pair: Pair) -> np.ndarray:
    """Euclidean distance between predicted and observed mean profile."""
    return np.linalg.norm(pair.predicted - pair.observed, axis=1)


@metric("mse_delta", best=0, formula="mean_g (δ̂_pg - δ_pg)²", source="cell-eval", exploit=SCALE_EXPLOIT)
def mse_delta(pair: Pair) -> np.ndarray:
    """Mean squared error of the predicted shift against control."""
    return ((pair.predicted_delta - pair.delta) ** 2).mean(axis=1)


@metric("mae_delta", best=0, formula="mean_g |δ̂_pg - δ_pg|", source="cell-eval", exploit=SCALE_EXPLOIT)
def mae_delta(pair: Pair) -> np.ndarray:
    """Mean absolute error of the predicted shift against control."""
    return np.abs(pair.predicted_delta - pair.delta).mean(axis=1)


@metric(
    "mse_delta_no_target",
    best=0,
    formula="mse_delta over genes that are not p's targets",
    source="Csendes et al. 2025",
    exploit=SCALE_EXPLOIT,
)
def mse_delta_no_target(pair: Pair) -> np.ndarray:
    """Mean squared error of the shift, the perturbation's own targets left out."""
    return masked_mean((pair.predicted_delta - pair.delta) ** 2, pair.not_target)


@metric(
    "mse_top20",
    best=0,
    formula="mse over the 20 genes with the largest |δ_pg|",
    source="GEARS (Roohani 2023)",
    exploit=ORACLE,
)
def mse_top20(pair: Pair) -> np.ndarray:
    """Mean squared error over the 20 genes that changed most."""
    return masked_mean((pair.predicted - pair.observed) ** 2, pair.top(20))


@metric(
    "mse_top20_no_target",
    best=0,
    formula="mse_top20, chosen among genes that are not p's targets",
    source="Csendes et al. 2025",
    exploit=ORACLE,
)
def mse_top20_no_target(pair: Pair) -> np.ndarray:
    """Mean squared error over the 20 genes that changed most, the targets left out."""
    return masked_mean((pair.predicted - pair.observed) ** 2, pair.top(20, without_targets=True))


@metric(
    "share_within_5pct",
    best=1,
    formula="share of the 20 genes with the largest |δ_pg| where |m̂ - m| <= 0.05 |m|",
    source="GEARS-type evaluations",
    exploit=ORACLE + "; no-change is within 5 % at weak effects",
)
def share_within_5pct(pair: Pair) -> np.ndarray:
    """Share of the 20 most changed genes predicted within 5 % of the observed mean."""
    near = np.abs(pair.predicted - pair.observed) <= 0.05 * np.abs(pair.observed)
    return masked_mean(near.astype(float), pair.top(20))


# ---------------------------------------------------------------------------------------------- correlations


@metric("pearson_delta", best=1, chance=0.0, formula="corr_g(δ̂_p, δ_p)", source="cell-eval", exploit=DELTA_EXPLOIT)
def pearson_delta(pair: Pair) -> np.ndarray:
    """Pearson correlation of predicted and observed shift against control."""
    return correlate(pair, pair.predicted_delta, pair.delta)


@metric(
    "pearson_delta_no_target",
    best=1,
    chance=0.0,
    formula="corr_g(δ̂_p, δ_p) over genes that are not p's targets",
    source="Csendes et al. 2025",
    exploit=DELTA_EXPLOIT,
)
def pearson_delta_no_target(pair: Pair) -> np.ndarray:
    """Correlation of the shifts, the perturbation's own targets left out."""
    return correlate(pair, pair.predicted_delta, pair.delta, pair.not_target)


@metric(
    "pearson_delta_top20",
    best=1,
    chance=0.0,
    formula="corr over the 20 genes with the largest |δ_pg|",
    source="GEARS; Systema",
    exploit=ORACLE + "; " + DELTA_EXPLOIT,
)
def pearson_delta_top20(pair: Pair) -> np.ndarray:
    """Correlation of the shifts over the 20 genes that changed most."""
    return correlate(pair, pair.predicted_delta, pair.delta, pair.top(20))


@metric(
    "pearson_delta_top20_no_target",
    best=1,
    chance=0.0,
    formula="corr over the 20 genes with the largest |δ_pg| that are not p's targets",
    source="Csendes et al. 2025",
    exploit=ORACLE,
)
def pearson_delta_top20_no_target(pair: Pair) -> np.ndarray:
    """Correlation of the shifts over the 20 genes that changed most, the targets left out."""
    return correlate(pair, pair.predicted_delta, pair.delta, pair.top(20, without_targets=True))


@metric(
    "pearson_delta_top20_train",
    best=1,
    chance=0.0,
    formula="corr over the 20 genes whose shift varies most between training perturbations",
    source="scpert: the top-k metric without the leak",
    needs=("train",),
    exploit=DELTA_EXPLOIT,
)
def pearson_delta_top20_train(pair: Pair) -> np.ndarray:
    """Correlation of the shifts over 20 genes chosen on training data."""
    if pair.train_effects is None or len(pair.train_effects) < 2:
        raise Undefined("needs train= with control cells and at least two perturbations: they choose the genes")
    mask = top_mask(pair.train_effects.var(axis=0)[None, :], 20, pair.genes)
    return correlate(pair, pair.predicted_delta, pair.delta, np.broadcast_to(mask, pair.delta.shape))


@metric(
    "spearman_delta",
    best=1,
    chance=0.0,
    formula="rank correlation of δ̂_p and δ_p",
    source="textbook",
    exploit=DELTA_EXPLOIT,
)
def spearman_delta(pair: Pair) -> np.ndarray:
    """Spearman correlation of predicted and observed shift."""
    from scipy.stats import rankdata

    flat = np.isnan(masked_correlation(pair.predicted_delta, pair.predicted_delta))
    out = masked_correlation(rankdata(pair.predicted_delta, axis=1), rankdata(pair.delta, axis=1))
    out = np.where(flat, np.nan, out)
    if np.isnan(out).any():
        raise_partial(out, np.where(flat, FLAT_PREDICTION, FLAT_TRUTH))
    return out


@metric(
    "cosine_delta",
    best=1,
    chance=0.0,
    formula="<δ̂_p, δ_p> / (||δ̂_p|| ||δ_p||)",
    source="textbook",
    exploit=DELTA_EXPLOIT,
)
def cosine_delta(pair: Pair) -> np.ndarray:
    """Cosine of predicted and observed shift."""
    a, b = pair.predicted_delta, pair.delta
    na, nb = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    flat = na <= FLAT * np.sqrt(a.shape[1])
    zero = flat | (nb <= FLAT * np.sqrt(a.shape[1]))
    out = np.where(zero, np.nan, np.clip((a * b).sum(axis=1) / np.where(zero, 1.0, na * nb), -1, 1))
    if zero.any():
        raise_partial(out, np.where(flat, "the predicted shift is zero in all genes", FLAT_TRUTH))
    return out


@metric(
    "r2_delta",
    best=1,
    formula="1 - ||δ̂_p - δ_p||² / ||δ_p - mean_g δ_p||²",
    source="textbook",
    exploit=SCALE_EXPLOIT,
)
def r2_delta(pair: Pair) -> np.ndarray:
    """Share of the variance of the observed shift over genes that the prediction explains."""
    return _r2(pair, pair.delta - pair.delta.mean(axis=1, keepdims=True))


@metric(
    "r2_delta_zero",
    best=1,
    formula="1 - ||δ̂_p - δ_p||² / ||δ_p||²",
    source="textbook; no change scores 0",
    exploit=SCALE_EXPLOIT,
)
def r2_delta_zero(pair: Pair) -> np.ndarray:
    """As ``r2_delta``, but against no change."""
    return _r2(pair, pair.delta)


def _r2(pair: Pair, scatter: np.ndarray) -> np.ndarray:
    below = (scatter**2).sum(axis=1)
    flat = below <= FLAT**2 * scatter.shape[1]
    error = ((pair.predicted_delta - pair.delta) ** 2).sum(axis=1)
    out = np.where(flat, np.nan, 1 - error / np.where(flat, 1.0, below))
    if flat.any():
        raise_partial(out, "the observed shift is constant")
    return out


# ---------------------------------------------------------------------------------------------- Systema


@metric(
    "pearson_delta_centroid",
    best=1,
    chance=0.0,
    formula="corr_g(m̂_p - r, m_p - r), r = mean of the training perturbations' centroids",
    source="Systema (Viñas Torné et al. 2025)",
    needs=("train",),
    exploit="no change, as all that is below average, scores above 0 where most perturbations are weak; r is on both sides",
)
def pearson_delta_centroid(pair: Pair) -> np.ndarray:
    """Correlation of the shifts from the perturbed centroid: what is specific to a perturbation."""
    r = need_centroid(pair)
    return correlate(pair, pair.predicted - r, pair.observed - r)


@metric(
    "pearson_delta_centroid_no_target",
    best=1,
    chance=0.0,
    formula="pearson_delta_centroid over genes that are not p's targets",
    source="Systema; Csendes et al. 2025",
    needs=("train",),
    exploit="as pearson_delta_centroid",
)
def pearson_delta_centroid_no_target(pair: Pair) -> np.ndarray:
    """Centroid-referenced correlation, the targets left out."""
    r = need_centroid(pair)
    return correlate(pair, pair.predicted - r, pair.observed - r, pair.not_target)


@metric(
    "pearson_delta_centroid_top20",
    best=1,
    chance=0.0,
    formula="pearson_delta_centroid over the 20 genes with the largest |δ_pg|",
    source="Systema (Viñas Torné et al. 2025)",
    needs=("train",),
    exploit=ORACLE,
)
def pearson_delta_centroid_top20(pair: Pair) -> np.ndarray:
    """Centroid-referenced correlation over the 20 genes that changed most."""
    r = need_centroid(pair)
    return correlate(pair, pair.predicted - r, pair.observed - r, pair.top(20))


# ---------------------------------------------------------------------------------------------- weighted


def rest_weights(pair: Pair) -> np.ndarray:
    """Weights of WMSE: squared min-max of |t| of each perturbation against all other perturbed cells; rows sum to 1."""
    ref = pair.reference
    if len(ref.perturbations) < 2:
        raise Undefined("needs at least two observed perturbations: the weights compare each with the rest")
    mean, n = ref.mean[:, pair.gene_index], ref.n_cells[:, None].astype(float)
    if ref.scale == "effects" or (n < 2).all():
        if (n > 1).any():
            raise Undefined(
                "needs one row of each perturbation of a table of effects: the weights compare each with the rest"
            )
        if len(mean) < 3:
            raise Undefined("needs at least three observed perturbations: the weights compare each with the rest")
        # one row per perturbation: its distance from the others, in their standard deviations
        total, k = mean.sum(axis=0), len(mean)
        rest = (total - mean) / (k - 1)
        sd = np.sqrt(np.maximum(((mean**2).sum(axis=0) - mean**2 - (k - 1) * rest**2) / (k - 2), 0))
        t = np.abs(mean - rest) / np.where(sd > 0, sd, np.inf)
    else:
        var = ref.var[:, pair.gene_index]
        square = np.where(n > 1, var * (n - 1), 0.0) + n * mean**2  # one cell does not vary within its perturbation
        rest_n = n.sum() - n
        rest_mean = ((n * mean).sum(axis=0) - n * mean) / rest_n
        rest_var = (square.sum(axis=0) - square - rest_n * rest_mean**2) / (rest_n - 1)
        se = np.sqrt(np.maximum(var / n + rest_var / rest_n, 0))
        t = np.where(se > 0, np.abs(mean - rest_mean) / np.where(se > 0, se, 1), 0.0)
        t[n[:, 0] < 2] = np.nan  # its own variance is not known
    t = t[pair.ref_index]
    low, high = t.min(axis=1, keepdims=True), t.max(axis=1, keepdims=True)
    w = ((t - low) / np.where(high > low, high - low, 1)) ** 2
    total = w.sum(axis=1, keepdims=True)
    out = np.where(total > 0, w / np.where(total > 0, total, 1), 1 / w.shape[1])
    return np.where(np.isnan(t), np.nan, out)


_ONE_CELL = "needs at least two cells of the perturbation: the weights are t statistics"


@metric(
    "wmse",
    best=0,
    formula="Σ_g w_pg (m̂_pg - m_pg)², w = ((|t| - min)/(max - min))², normalised, t of p against the rest",
    source="Mejia et al. 2025",
    exploit="the weights grow with the distance from the mean and so handicap it: read mse beside it",
)
def wmse(pair: Pair) -> np.ndarray:
    """Squared error weighted by how specific a gene's change is."""
    out = (rest_weights(pair) * (pair.predicted - pair.observed) ** 2).sum(axis=1)
    if np.isnan(out).any():
        raise_partial(out, _ONE_CELL)
    return out


@metric(
    "r2_weighted",
    best=1,
    formula="1 - Σ w (m̂ - m)² / Σ w (m - r)², r = training perturbations' centroid",
    source="Mejia et al. 2025; Miller et al. 2025",
    needs=("train",),
    exploit="as wmse",
)
def r2_weighted(pair: Pair) -> np.ndarray:
    """Weighted R² about the mean of all training perturbations, which scores 0."""
    r, w = need_centroid(pair), rest_weights(pair)
    below = (w * (pair.observed - r) ** 2).sum(axis=1)
    flat = below <= FLAT**2
    out = np.where(flat, np.nan, 1 - (w * (pair.predicted - pair.observed) ** 2).sum(axis=1) / np.where(flat, 1, below))
    if np.isnan(out).any():
        raise_partial(out, np.where(flat, "the observed profile equals the training centroid", _ONE_CELL))
    return out


# ---------------------------------------------------------------------------------------------- genes and directions


def _jaccard(pair: Pair, k: int) -> np.ndarray:
    if pair.delta.shape[1] <= k:
        raise Undefined(f"needs more than {k} genes: with {pair.delta.shape[1]} every set is the same")
    flat = np.abs(pair.predicted_delta).max(axis=1) <= FLAT
    # genes that are predicted to change alike share the last places, as a draw among them would give on average
    shared = (top_share(np.abs(pair.predicted_delta), k) * pair.top(k)).sum(axis=1)
    out = np.where(flat, np.nan, shared / (2 * k - shared))
    if flat.any():
        raise_partial(out, "the predicted shift is zero in all genes: no order of genes")
    return out


@metric(
    "jaccard_top20",
    best=1,
    chance=0.0,
    formula="|T̂ ∩ T| / |T̂ ∪ T|, T = 20 largest |δ_pg|, tied places of T̂ by shares",
    source="SAMS-VAE (Bereket & Karaletsos 2023)",
    exploit=DELTA_EXPLOIT,
)
def jaccard_top20(pair: Pair) -> np.ndarray:
    """Overlap of the 20 most changed genes, predicted and observed."""
    return _jaccard(pair, 20)


@metric(
    "jaccard_top50",
    best=1,
    chance=0.0,
    formula="|T̂ ∩ T| / |T̂ ∪ T|, T = 50 largest |δ_pg|",
    source="SAMS-VAE (Bereket & Karaletsos 2023)",
    exploit=DELTA_EXPLOIT,
)
def jaccard_top50(pair: Pair) -> np.ndarray:
    """Overlap of the 50 most changed genes, predicted and observed."""
    return _jaccard(pair, 50)


@metric(
    "direction_match_top20",
    best=1,
    formula="share of the 20 largest |δ_pg| with sign(δ̂) = sign(δ)",
    source="GEARS",
    exploit=ORACLE,
)
def direction_match_top20(pair: Pair) -> np.ndarray:
    """Share of the 20 most changed genes whose direction is right."""
    return masked_mean((np.sign(pair.predicted_delta) == np.sign(pair.delta)).astype(float), pair.top(20))


def _ate(pair: Pair, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    a, b = pair.predicted_delta, pair.delta
    return (a.ravel(), b.ravel()) if mask is None else (a[mask], b[mask])


def _flat_correlation(a: np.ndarray, b: np.ndarray) -> float:
    value = masked_correlation(a[None, :], b[None, :])[0]
    if np.isnan(value):
        flat = np.isnan(masked_correlation(a[None, :], a[None, :])[0])
        raise Undefined("the predicted shifts are all equal" if flat else "the observed shifts are all equal")
    return float(value)


ATE_SOURCE = "SAMS-VAE, GPO-VAE ('ATE-ρ'); natural log1p here, log2 there: correlations agree"


@metric(
    "ate_pearson",
    best=1,
    chance=0.0,
    level="set",
    formula="corr over all (p, g) of δ̂_pg and δ_pg",
    source=ATE_SOURCE,
    exploit=DELTA_EXPLOIT + "; strong perturbations and genes dominate",
)
def ate_pearson(pair: Pair) -> float:
    """Correlation of all average treatment effects at once."""
    return _flat_correlation(*_ate(pair, None))


@metric(
    "ate_r2",
    best=1,
    level="set",
    formula="1 - Σ (δ̂ - δ)² / Σ (δ - mean δ)² over all (p, g)",
    source=ATE_SOURCE,
    exploit="strong perturbations and genes dominate",
)
def ate_r2(pair: Pair) -> float:
    """R² of all average treatment effects at once."""
    a, b = _ate(pair, None)
    below = ((b - b.mean()) ** 2).sum()
    if below <= FLAT**2 * len(b):
        raise Undefined("all observed shifts are equal")
    return float(1 - ((a - b) ** 2).sum() / below)


@metric(
    "ate_pearson_top20",
    best=1,
    chance=0.0,
    level="set",
    formula="ate_pearson over each p's 20 largest |δ_pg|",
    source=ATE_SOURCE,
    exploit=ORACLE,
)
def ate_pearson_top20(pair: Pair) -> float:
    """Correlation of the average treatment effects of each perturbation's 20 most changed genes."""
    return _flat_correlation(*_ate(pair, pair.top(20)))


@metric(
    "variance_ratio",
    best=1,
    level="set",
    formula="Σ_g Var_p(δ̂_pg) / Σ_g Var_p(δ_pg)",
    source="mode collapse check",
    exploit="noise raises it; far below 1: all predictions alike (mode collapse); beyond 1: inflated",
    target=True,
)
def variance_ratio(pair: Pair) -> float:
    """How much predictions differ between perturbations, relative to how much the truth does."""
    if len(pair.perturbations) < 2:
        raise Undefined("needs at least two perturbations")
    below = pair.delta.var(axis=0).sum()
    if below <= FLAT**2 * pair.delta.shape[1]:
        raise Undefined("the observed shifts do not differ between perturbations")
    return float(pair.predicted_delta.var(axis=0).sum() / below)
