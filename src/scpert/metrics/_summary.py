"""From tables to judgements: the ceiling, the calibrated score, paired comparisons, and which metrics can be believed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse, stats

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_seed, check_whole, listing
from .._docs import shared_docs
from .._progress import progress
from ..data._effects import Effects
from ..errors import ScpertError
from ._evaluate import compute
from ._pair import Blocks, Pair, Reference, group_rows, shares, without_strata
from ._registry import METRICS, resolve

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["by_chance", "ceiling", "compare", "dynamic_range", "pseudobulk", "summarise", "training_mean"]

logger = logging.getLogger("scpert")

NOTHING = "nothing to predict here"
#: With fewer clusters than that, percentiles of the bootstrap claim too much.
_FEW = 8


# ---------------------------------------------------------------------------------------------- predictions to compare with


@shared_docs
def pseudobulk(
    adata: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
) -> AnnData:
    """Mean profiles of real cells, in the form of a prediction.

    Parameters
    ----------
    adata
        Cells by genes, or a table of effects.
    {labels}
    {values}
    covariate_keys
        Columns within which perturbed cells are compared with control cells, as in :class:`Reference`.

    Returns
    -------
    AnnData, perturbation by gene: ``X`` log1p CP10k (effects for tables of effects), ``layers["delta"]`` its shift
    against the control cells, ``obs["n_cells"]``.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> scpert.metrics.pseudobulk(adata).shape
    (5, 40)
    """
    reference = Reference(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        covariate_keys=covariate_keys,
    )
    return as_prediction(reference, reference.mean, reference.mean - reference.control_mean, n_cells=reference.n_cells)


def as_prediction(reference: Reference, mean: np.ndarray, delta: np.ndarray, **obs: Any) -> AnnData:
    """Arrays ``(perturbation, gene)`` as a prediction."""
    from anndata import AnnData as Table

    labels = pd.Index([str(p) for p in reference.perturbations])
    frame = pd.DataFrame({K.PERTURBATION: labels.to_numpy(dtype=object), **obs}, index=labels)
    out = Table(
        X=np.asarray(mean, dtype=np.float64), obs=frame, var=pd.DataFrame(index=pd.Index(reference.genes.astype(str)))
    )
    out.layers[K.DELTA] = np.asarray(delta, dtype=np.float64)
    return out


def training_mean(reference: Reference) -> AnnData:
    """The baseline that scores 0: for every observed perturbation the mean of the training perturbations.

    Parameters
    ----------
    reference
        With training data.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> reference = scpert.metrics.Reference(adata, train=adata)
    >>> scpert.metrics.training_mean(reference).n_obs
    5
    """
    if reference.centroid is None:
        raise ScpertError("The training mean needs training data: Reference(observed, train=...).")
    base = reference.train_control if reference.train_control is not None else reference.control_mean
    n = len(reference.perturbations)
    return as_prediction(reference, np.tile(reference.centroid, (n, 1)), np.tile(reference.centroid - base, (n, 1)))


# ---------------------------------------------------------------------------------------------- ceiling


def ceiling(
    observed: AnnData | Reference,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    train: AnnData | None = None,
    metrics: str | Sequence[str] | None = None,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
    n_draws: int = 20,
    kind: str = "split_half",
    random_state: int = 0,
) -> pd.DataFrame:
    """What a replicate of the experiment would score: one half of the cells against the other.

    In each draw the cells of every perturbation and the controls are cut into two disjoint halves; one half plays the
    prediction, the other the truth. The table is the mean over the draws. Halves have half the cells, so a model that is
    compared with all test cells can exceed the ceiling a little. A table of effects is cut by its standard errors
    (``layers["std_error"]``): noise of their size is added to one half and subtracted from the other.

    Parameters
    ----------
    observed, perturbation_key, control, train, layer, scale, library_size_key, covariate_keys
        As in :func:`evaluate`.
    metrics
        By default all metrics of mean profiles. Metrics of cells can be named; they cost one evaluation per draw.
    n_draws
        Number of random halvings.
    kind
        ``"split_half"``, or ``"interpolated"``: the interpolated duplicate of Miller et al. (2025), ``α dup + (1 - α)
        mean`` with ``α_g = 1 - padj_g`` (Welch's test of the predicting half against its controls, BH), which needs
        ``train``.
    random_state
        Seed of the halvings.

    Returns
    -------
    As :func:`evaluate`; ``attrs["n_draws"]``; ``attrs["mismatched"]``: metric -> perturbation -> what the replicate of
    *another* perturbation scores; a metric with one value for the set has nothing to resample, so there it is 2.6 standard
    deviations between draws above that. Perturbations with fewer than two cells are NaN.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> table = scpert.metrics.ceiling(adata, metrics="pearson_delta", n_draws=3)
    >>> list(table.columns)
    ['pearson_delta']
    """
    random_state = check_seed(random_state)
    n_draws = check_whole("n_draws", n_draws)
    check_choice("kind", kind, ("split_half", "interpolated"))
    if isinstance(observed, Reference):
        reference = observed
    else:
        reference = Reference(
            observed,
            train,
            perturbation_key=perturbation_key,
            control=control,
            layer=layer,
            scale=scale,
            library_size_key=library_size_key,
            covariate_keys=covariate_keys,
        )
    names = [m.name for m in resolve(metrics, [n for n, m in METRICS.items() if m.default and "cells" not in m.needs])]
    if kind == "interpolated" and reference.centroid is None:
        raise ScpertError("The interpolated duplicate needs training data (train=): it shrinks towards their mean.")
    labels = reference.perturbations
    noise = None
    if reference.scale == K.SCALE_EFFECTS and kind == "interpolated":
        return _empty(labels, names, "the interpolated duplicate tests cells, and a table of effects has none")
    if reference.scale == K.SCALE_EFFECTS:
        effects = Effects.from_screen(reference.screen)
        if not np.isfinite(effects.std_error).any():
            reason = "a table of effects without standard errors has no halves: give a replicate table as a prediction instead"
            return _empty(labels, names, reason)
        noise = np.sqrt(effects.sampling_variance[[effects.row[p] for p in labels]].astype(np.float64))
    elif len(reference.rows[reference.control]) < 2:
        return _empty(labels, names, "fewer than two control cells: they cannot be halved")
    usable = list(labels) if noise is not None else [p for p in labels if len(reference.rows[p]) >= 2]
    if not usable:
        return _empty(labels, names, "fewer than two cells in each perturbation: they cannot be halved")
    generators = np.random.default_rng(random_state).spawn(n_draws)
    total: pd.DataFrame | None = None
    count: pd.DataFrame | None = None
    own: list[pd.DataFrame] = []
    wrong: list[pd.DataFrame] = []
    reasons: dict[str, dict[str, str]] = {}
    needs_cells = any("cells" in METRICS[n].needs for n in names)
    for rng in progress(generators, total=n_draws, description="Ceiling", unit="draw"):
        half = _halve(reference, usable, rng) if noise is None else _thinned(reference, noise, rng)
        table = half.scores(kind, names)
        if len(usable) > 1:
            turn = int(rng.integers(1, len(usable)))
            own.append(by_chance(table))
            wrong.append(by_chance(half.scores(kind, names, turn=turn)))
        if table.attrs["reasons"]:
            reasons = table.attrs["reasons"]
        filled = table.fillna(0.0)
        total = filled if total is None else total + filled
        count = table.notna().astype(float) if count is None else count + table.notna()
    if total is None or count is None:
        raise ScpertError(f"n_draws={n_draws}: give a number of draws above 0.")
    out = (total / count.where(count > 0)).reindex(labels)
    out.index.name = "perturbation"
    for label in set(labels) - set(usable):
        for name in out.columns:
            reasons.setdefault(name, {})[label] = "fewer than two cells: they cannot be halved"
    out.attrs = {
        "reasons": reasons,
        "n_draws": n_draws,
        "kind": kind,
        "level": "cell" if needs_cells else "pseudobulk",
    }
    if wrong:
        limits = _mismatched(own, wrong)
        out.attrs["mismatched"] = {str(m): {str(p): float(v) for p, v in limits[m].dropna().items()} for m in limits}
    return out


def _mismatched(own: Sequence[pd.DataFrame], wrong: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """What the replicate of another perturbation scores; for metrics of the set at most (the best value: not known)."""
    limits = pd.concat(wrong).groupby(level=0).mean()
    spread = pd.concat(own).groupby(level=0).std()
    for name in limits.columns:
        m = METRICS.get(str(name))
        if m is None or m.level != "set" or m.higher_is_better is None:
            continue
        sign = 1.0 if m.higher_is_better else -1.0
        limits[name] = limits[name] + sign * 2.6 * spread[name] if len(own) > 2 else m.best
    return limits


def _empty(labels: Sequence[str], names: Sequence[str], reason: str) -> pd.DataFrame:
    columns = [c for n in names for c in (METRICS[n].columns or (n,))]
    out = pd.DataFrame(np.nan, index=pd.Index(list(labels), name="perturbation"), columns=columns)
    out.attrs = {"reasons": {c: {"all": reason} for c in columns}, "n_draws": 0}
    return out


class _Half(Reference):
    """A reference of some of the cells, with means computed from sums; shares screen and training data with its parent."""

    def __init__(self, parent: Reference, rows: dict[str, np.ndarray], moments: dict[str, np.ndarray]):
        self.__dict__.update(
            {
                k: v
                for k, v in parent.__dict__.items()
                if k not in {"_cache", "_moments", "rows", "perturbations", "n_cells"}
            }
        )
        self.rows = rows
        self.perturbations = sorted(set(rows) - {parent.control})
        self.n_cells = np.array([len(rows[p]) for p in self.perturbations])
        self._cache, self._blocks = {}, Blocks()
        self.__dict__["_moments"] = moments


class _Halves:
    def __init__(self, predicting: _Half, truth: _Half):
        self.predicting, self.truth = predicting, truth

    def scores(self, kind: str, names: Sequence[str], *, turn: int = 0) -> pd.DataFrame:
        """Table of the metrics; within strata only metrics of cells are those of cells, which are not shifted."""
        cells = [n for n in names if "cells" in METRICS[n].needs]
        if not cells or len(cells) == len(names) or self.truth.strata is None:
            return compute(self.pair(kind, bool(cells), turn=turn), names)
        table = compute(self.pair(kind, False, turn=turn), names)
        of_cells = compute(self.pair(kind, True, turn=turn), cells)
        table[of_cells.columns] = of_cells
        reasons = {k: v for k, v in table.attrs["reasons"].items() if k not in of_cells.columns}
        table.attrs["reasons"] = reasons | of_cells.attrs["reasons"]
        return table

    def pair(self, kind: str, cells: bool, *, turn: int = 0) -> Pair:
        """One half as the prediction of the other; ``turn``: each perturbation is predicted by another one's replicate.

        Metrics of cells have the perturbed cells mixed instead, each perturbation as many as it has.
        """
        a = self.predicting
        mean, base = a.mean, a.control_mean
        if kind == "interpolated":
            centroid: Any = a.centroid
            alpha = 1.0 - _padj(a)
            mean = alpha * mean + (1 - alpha) * centroid
        if cells and kind == "split_half":
            return Pair(_cells_of(a, turn), self.truth, level="cell")
        mean = np.roll(mean, turn, axis=0)
        return Pair(as_prediction(a, mean, mean - base), self.truth, level="pseudobulk")


def _cells_of(half: _Half, turn: int) -> AnnData:
    from anndata import AnnData as Table

    order = [*half.perturbations, half.control]
    rows = [half.rows[p] for p in order]
    if turn:  # other perturbations' cells, as many as there are: their number alone moves tests and E-distances
        mixed = np.random.default_rng(turn).permutation(np.concatenate(rows[:-1]))
        rows = [*np.split(mixed, np.cumsum([len(part) for part in rows[:-1]])[:-1]), rows[-1]]
    X = sparse.vstack([half.screen.rows(part) for part in rows], format="csr")
    labels = np.repeat(np.array(order, dtype=object), [len(part) for part in rows])
    obs = pd.DataFrame({half.perturbation_key: labels}, index=pd.Index([f"cell{i}" for i in range(len(labels))]))
    return Table(X=X, obs=obs, var=pd.DataFrame(index=pd.Index(half.genes.astype(str))))


def _thinned(reference: Reference, noise: np.ndarray, rng: np.random.Generator) -> _Halves:
    r"""Halves of a table of effects by its standard errors.

    :math:`d + s w` and :math:`d - s w` with normal :math:`w` are independent measurements of the same effect, each with twice the
    variance :math:`s^2`, as halves of the cells are (Gaussian data thinning, Neufeld et al. 2024).
    """
    step = noise * rng.standard_normal(noise.shape)
    zero, none = np.zeros(noise.shape[1]), np.full(noise.shape[1], np.nan)
    halves = [
        _Half(
            reference,
            dict(reference.rows),
            {
                "mean": reference.mean + sign * step,
                "var": np.full(noise.shape, np.nan),
                "control": zero,
                "control_var": none,
            },
        )
        for sign in (1.0, -1.0)
    ]
    return _Halves(*halves)


def _halve(reference: Reference, usable: Sequence[str], rng: np.random.Generator) -> _Halves:
    """Disjoint halves, of the controls in each stratum; one pass over the matrix gives the sums of all."""
    codes = np.full(reference.screen.n_cells, -1)
    strata = np.zeros(len(codes), dtype=int) if reference.strata is None else reference.strata
    controls = group_rows(strata[reference.rows[reference.control]])
    groups = [(label, reference.rows[label]) for label in usable]
    groups += [(reference.control, reference.rows[reference.control][at]) for at in controls.values()]
    pieces: tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]] = ({}, {})
    for i, (label, members) in enumerate(groups):
        mixed = rng.permutation(members)
        cut = len(mixed) // 2
        for side, part in enumerate((mixed[:cut], mixed[cut : 2 * cut])):
            pieces[side].setdefault(label, []).append(part)
            codes[part] = 2 * i + side
    rows = [{label: np.sort(np.concatenate(parts)) for label, parts in side.items()} for side in pieces]
    size = 2 * len(groups)
    total = np.zeros((size, len(reference.genes)))
    square = np.zeros_like(total)
    for where, block in reference.screen.chunks():
        keep = np.flatnonzero(codes[where] >= 0)
        member = sparse.csr_matrix((np.ones(len(keep)), (codes[where][keep], keep)), shape=(size, block.shape[0]))
        total += (member @ block).toarray()
        squared = sparse.csr_matrix(
            (block.data.astype(np.float64) ** 2, block.indices, block.indptr), shape=block.shape
        )
        square += (member @ squared).toarray()
    n = np.bincount(codes[codes >= 0], minlength=size)[:, None].astype(float)
    k = len(usable)
    by_name = np.argsort(np.array(usable, dtype=object).astype(str), kind="stable")
    halves = []
    for side in (0, 1):
        of_side = [x[side::2] for x in (total, square, n)]
        mean, var = _mean_var(*(x[:k][by_name] for x in of_side))
        base, base_var = _mean_var(*(x[k:].sum(axis=0, keepdims=True) for x in of_side))
        if reference.strata is not None:
            in_stratum, cells = of_side[0][k:] / of_side[2][k:], of_side[2][k:, 0]
            share = shares([rows[side][label] for label in np.array(usable, dtype=object)[by_name]], strata)
            without_strata(mean, share[:, [int(s) for s in controls]], in_stratum, cells / cells.sum())
        moments = {"mean": mean, "var": var, "control": base[0], "control_var": base_var[0]}
        if reference.strata is not None:  # a perturbation is as sure as the controls of its own strata are many
            _, within = _mean_var(*(x[k:] for x in of_side))
            dof = np.maximum(cells - 1, 0)
            pooled = dof @ np.nan_to_num(within) / dof.sum() if dof.any() else base_var[0]
            own = share[:, [int(s) for s in controls]] ** 2 @ (1 / cells)
            moments["base_square"] = own[:, None] * pooled
        halves.append(_Half(reference, rows[side], moments))
    return _Halves(*halves)


def _mean_var(total: np.ndarray, square: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = total / n
    with np.errstate(invalid="ignore", divide="ignore"):
        var = np.where(n > 1, np.maximum(square - n * mean**2, 0) / (n - 1), np.nan)
    return mean, var


def _padj(half: Reference) -> np.ndarray:
    """BH-adjusted p of Welch's test of each perturbation against control ``(perturbation, gene)``."""
    from scipy.stats import false_discovery_control
    from scipy.stats import t as student

    n, c = half.n_cells[:, None].astype(float), float(len(half.rows[half.control]))
    a, b = half.var / n, half._moments.get("base_square", half._moments["control_var"] / c)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = (half.mean - half.control_mean) / np.sqrt(a + b)
        df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (c - 1))
        p = 2 * student.sf(np.abs(t), df)
    p = np.where(np.isfinite(p), p, 1.0)
    return false_discovery_control(p, axis=1)


# ---------------------------------------------------------------------------------------------- scores


def _shared(tables: Mapping[str, pd.DataFrame], metric_names: Sequence[str] | None) -> tuple[list[str], list[str]]:
    for name, table in tables.items():
        if not isinstance(table, pd.DataFrame):
            raise ScpertError(
                f"{name} must be a table that scpert.metrics.evaluate returned; got {type(table).__name__}."
            )
    first, *others = tables.values()
    rows = [p for p in first.index if all(p in t.index for t in others)]
    if not rows:
        raise ScpertError(f"The tables {listing(tables)} share no perturbation.")
    known = [c for c in first.columns if all(c in t.columns for t in others)]
    if metric_names is None:
        return rows, known
    missing = [m for m in metric_names if m not in known]
    if missing:
        raise ScpertError(f"The metric(s) {listing(missing)} are not in all tables; shared are {listing(known, 60)}.")
    return rows, list(metric_names)


def _values(table: pd.DataFrame, rows: Sequence[str], name: str) -> np.ndarray:
    """A column; where the *prediction* is flat and so has no value, what a prediction without information scores."""
    out = table[name].reindex(list(rows)).to_numpy(dtype=float)
    chance = METRICS[name].chance if name in METRICS else None
    why = table.attrs.get("reasons", {}).get(name, {})
    if chance is None or not why:
        return out
    out = out.copy()
    for i, row in enumerate(rows):
        if np.isnan(out[i]) and str(why.get(row, why.get("all", ""))).startswith("the predicted"):
            out[i] = chance
    return out


def _higher(name: str) -> bool | None:
    m = METRICS.get(name)
    return m.higher_is_better if m is not None else None


def _snap(difference: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Differences of rounding (single precision) are none."""
    return np.where(np.abs(difference) <= 1e-6 * np.abs(scale) + 1e-7, 0.0, difference)


def _clusters(rows: Sequence[str] | np.ndarray, clusters: Mapping[str, str] | pd.Series | None) -> np.ndarray:
    """Cluster of each perturbation, codes from 0; one that has none (or NaN) is a cluster of its own."""
    lookup = (
        {} if clusters is None else {p: c for p, c in clusters.items() if not pd.api.types.is_scalar(c) or pd.notna(c)}
    )
    codes: np.ndarray = np.unique([str(lookup.get(p, f"\0{p}")) for p in rows], return_inverse=True)[1].reshape(-1)
    return codes


def _resampler(
    rows: Sequence[str] | np.ndarray, clusters: Mapping[str, str] | pd.Series | None, n_boot: int, seed: int
) -> np.ndarray:
    """Weights ``(n_boot, n)``: how often each perturbation is drawn; whole clusters are drawn together."""
    rng = np.random.default_rng(seed)
    groups = np.arange(len(rows)) if clusters is None else _clusters(rows, clusters)
    k = int(groups.max()) + 1
    draws = rng.multinomial(k, np.full(k, 1.0 / k), size=n_boot)
    return draws[:, groups].astype(float)


def _n_clusters(rows: Sequence[str] | np.ndarray, clusters: Mapping[str, str] | pd.Series | None) -> int:
    return int(_clusters(rows, clusters).max(initial=-1)) + 1


def _stretched(boot: np.ndarray, estimate: float, k: int, percent: float = 2.5) -> np.ndarray:
    """Bootstrap replicates; of fewer than eight clusters moved from the estimate, as Student's t is wider than the normal.

    A bootstrap of few clusters does not leave their range and has (k - 1) / k of their variance (Hesterberg 2015): four positive
    values of four, which chance gives in one of 16 cases, would always have a limit above zero.
    """
    if not 2 <= k < _FEW:
        return boot
    share = percent / 100
    wider = stats.t.isf(share, k - 1) * np.sqrt(k / (k - 1)) / stats.norm.isf(share)
    out: np.ndarray = estimate + wider * (boot - estimate)
    return out


def _weighted_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1)
    return np.where(total > 0, weights @ values / np.where(total > 0, total, 1), np.nan)


def summarise(
    table: pd.DataFrame,
    baseline: pd.DataFrame,
    ceiling: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    clusters: Mapping[str, str] | pd.Series | None = None,
    n_boot: int = 2000,
    confidence: float = 0.95,
    random_state: int = 0,
) -> pd.DataFrame:
    """Calibrated scores: 0 is the training mean, 1 the replicate.

    ``score = (s_model - s_baseline) / (s_ceiling - s_baseline)`` with ``s`` the mean over the perturbations that all
    three tables have a value for. Where the ceiling is not clearly better than the baseline (2.5 % bootstrap limit of their
    difference), or not clearly better than the replicate of another perturbation (0.5 % limit, for metrics of the set 2.6
    standard deviations between draws; this one shares the noise of the controls and of the centroid, which alone makes halves
    correlate), the score is NaN and the verdict says "nothing to predict here"; so it does where fewer than five
    perturbations, and fewer than half of them, have a value. A prediction that is flat, and so has no correlation, counts
    with the metric's value by chance: nobody gains by predicting nothing.

    Parameters
    ----------
    table, baseline, ceiling
        Tables of :func:`evaluate` for the model and for the training mean, and of :func:`ceiling`.
    metrics
        By default all that the three tables share.
    clusters
        Perturbation -> cluster (a complex): whole clusters are resampled together; a perturbation without one (NaN) is one of its own.
    n_boot, confidence, random_state
        Bootstrap over perturbations. With fewer than eight limits are wider, by Student's t.

    Returns
    -------
    DataFrame, one row per metric: ``model``, ``baseline``, ``ceiling`` (means), ``score``, ``lower``, ``upper``,
    ``n`` (perturbations), ``verdict``.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(1500, 40, 8, 0, random_state=0)
    >>> m = scpert.metrics
    >>> reference = m.Reference(adata, train=adata)
    >>> top = m.ceiling(reference, metrics=["mse"], n_draws=3)
    >>> base = m.evaluate(m.training_mean(reference), reference, metrics=["mse"])
    >>> float(m.summarise(top, base, top).loc["mse", "score"])
    1.0
    """
    random_state = check_seed(random_state)
    n_boot = check_whole("n_boot", n_boot)
    check_fraction("confidence", confidence)
    rows, names = _shared({"table": table, "baseline": baseline, "ceiling": ceiling}, metrics)
    tail = 100 * (1 - confidence) / 2
    out = []
    for name in names:
        values = np.column_stack([_values(t, rows, name) for t in (table, baseline, ceiling)])
        ok = np.isfinite(values).all(axis=1)
        record: dict[str, Any] = {"metric": name, "n": int(ok.sum())}
        higher = _higher(name)
        # each mean over the same perturbations; where nothing is shared, over its own
        means = values[ok].mean(axis=0) if ok.any() else np.array([_nanmean(values[:, i]) for i in range(3)])
        record.update(model=means[0], baseline=means[1], ceiling=means[2], score=np.nan, lower=np.nan, upper=np.nan)
        if higher is None:
            record["verdict"] = "no calibrated score: the best value is not an end of the scale"
        elif not ok.any():
            empty = [
                w
                for w, i in (("the model", 0), ("the baseline", 1), ("the ceiling", 2))
                if not np.isfinite(values[:, i]).any()
            ]
            record["verdict"] = f"undefined for {' and '.join(empty) or 'the shared perturbations'}"
        elif _too_few(ok) and METRICS[name].level != "set":
            record["verdict"] = f"{NOTHING}: undefined for {len(rows) - ok.sum()} of {len(rows)} perturbations"
        else:
            wrong = ceiling.attrs.get("mismatched", {}).get(name, {})
            other = np.array([wrong.get(row, np.nan) for row in rows], dtype=float)[ok]
            _score(
                record,
                values[ok],
                other,
                np.asarray(rows, dtype=object)[ok],
                higher,
                name,
                clusters,
                n_boot,
                tail,
                random_state,
            )
        out.append(record)
    columns = ["model", "baseline", "ceiling", "score", "lower", "upper", "n", "verdict"]
    return pd.DataFrame(out, columns=["metric", *columns]).set_index("metric")


def _nanmean(x: np.ndarray) -> float:
    return float(np.nanmean(x)) if np.isfinite(x).any() else np.nan


def _score(
    record: dict[str, Any],
    values: np.ndarray,
    mismatched: np.ndarray,
    rows: np.ndarray,
    higher: bool,
    name: str,
    clusters: Mapping[str, str] | pd.Series | None,
    n_boot: int,
    tail: float,
    seed: int,
) -> None:
    sign = 1.0 if higher else -1.0
    values = values.copy()
    values[:, 0] = values[:, 1] + _snap(values[:, 0] - values[:, 1], values[:, 1])
    model, base, top = values.mean(axis=0)
    gap = sign * (top - base)
    is_set = METRICS[name].level == "set"
    if is_set or len(rows) < 2:
        clear = gap > 1e-9 and not _no_better(values[:, 2], mismatched, rows, sign, None, n_boot, seed, is_set)
        lower = upper = np.nan
    else:
        weights = _resampler(rows, clusters, n_boot, seed)
        m, b, c = (_weighted_means(values[:, i], weights) for i in range(3))
        gaps, k = sign * (c - b), _n_clusters(rows, clusters)
        clear = np.nanpercentile(_stretched(gaps, gap, k), 2.5) > 1e-9
        clear &= not _no_better(values[:, 2], mismatched, rows, sign, clusters, n_boot, seed, is_set)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = np.where(gaps > 1e-9, sign * (m - b) / gaps, np.nan)
        lower = upper = np.nan
        if gap > 1e-9 and np.isfinite(scores).any():
            scores = _stretched(scores, sign * (model - base) / gap, k, tail)
            lower, upper = np.nanpercentile(scores, [tail, 100 - tail])
    if not clear:
        record["verdict"] = f"{NOTHING}: the replicate is not clearly better than the training mean"
        return
    record.update(score=sign * (model - base) / gap, lower=lower, upper=upper)
    if np.isfinite(lower):
        record["verdict"] = (
            "better than the training mean"
            if lower > 0
            else "worse than the training mean"
            if upper < 0
            else "not clearly different from the training mean"
        )
    else:
        record["verdict"] = f"one {'value for the set' if is_set else 'perturbation'}: no limits"


def _too_few(defined: np.ndarray) -> bool:
    """Whether a metric is undefined for most perturbations (no gene changes, say), and the rest are a chance few."""
    return bool(defined.sum() < min(5, len(defined) / 2))


def _no_better(
    replicate: np.ndarray,
    mismatched: np.ndarray,
    rows: np.ndarray,
    sign: float,
    clusters: Mapping[str, str] | pd.Series | None,
    n_boot: int,
    seed: int,
    is_set: bool,
) -> bool:
    """Whether the replicate is not clearly better than that of another perturbation: noise that all of them share."""
    known = np.isfinite(mismatched)
    own = sign * (replicate[known] - mismatched[known])
    if is_set:  # `mismatched` holds the limit already
        return bool(known.any() and own.mean() <= 1e-9)
    if known.sum() < 2:
        return False
    boot = _weighted_means(own, _resampler(rows[known], clusters, n_boot, seed))
    boot = _stretched(boot, float(own.mean()), _n_clusters(rows[known], clusters), 0.5)
    return bool(np.nanpercentile(boot, 0.5) <= 1e-9)


def compare(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    clusters: Mapping[str, str] | pd.Series | None = None,
    n_boot: int = 2000,
    confidence: float = 0.95,
    random_state: int = 0,
) -> pd.DataFrame:
    """Tell whether ``a`` is better than ``b``, by a paired bootstrap over perturbations.

    It does not ask whether the data hold anything to predict: on a screen without effects *no change* has less error than
    a mean that is noise. :func:`summarise` asks that.

    Parameters
    ----------
    a, b
        Tables of :func:`evaluate` on the same perturbations.
    metrics, n_boot, confidence, random_state
        As in :func:`summarise`.
    clusters
        Perturbation -> cluster. Perturbations of one complex are no independent evidence: whole clusters are resampled.

    Returns
    -------
    DataFrame, one row per metric: ``a``, ``b`` (means), ``difference`` (positive: ``a`` is better), ``lower``,
    ``upper``, ``pvals`` (two-sided, bootstrap), ``n``, ``n_clusters``.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> table = scpert.metrics.evaluate(scpert.metrics.pseudobulk(adata), adata, metrics=["mse"])
    >>> float(scpert.metrics.compare(table, table).loc["mse", "difference"])
    0.0
    """
    random_state = check_seed(random_state)
    n_boot = check_whole("n_boot", n_boot)
    check_fraction("confidence", confidence)
    rows, names = _shared({"a": a, "b": b}, metrics)
    tail = 100 * (1 - confidence) / 2
    out = []
    for name in names:
        values = np.column_stack([_values(t, rows, name) for t in (a, b)])
        ok = np.isfinite(values).all(axis=1)
        higher = _higher(name)
        sign = -1.0 if higher is False else 1.0
        record: dict[str, Any] = {
            "metric": name,
            "n": int(ok.sum()),
            "a": _nanmean(values[ok, 0]),
            "b": _nanmean(values[ok, 1]),
        }
        if ok.sum() and higher is not None:
            difference = sign * _snap(values[ok, 0] - values[ok, 1], values[ok, 1])
            record["difference"] = difference.mean()
            kept = np.asarray(rows, dtype=object)[ok]
            record["n_clusters"] = _n_clusters(kept, clusters)
            if METRICS[name].level != "set" and record["n_clusters"] > 1:
                boot = _weighted_means(difference, _resampler(kept, clusters, n_boot, random_state))
                boot = _stretched(boot[np.isfinite(boot)], difference.mean(), record["n_clusters"], tail)
                record["lower"], record["upper"] = np.percentile(boot, [tail, 100 - tail])
                tails = min((np.sum(boot <= 0) + 1), (np.sum(boot >= 0) + 1)) / (len(boot) + 1)
                record["pvals"] = float(min(1.0, 2 * tails))
        out.append(record)
    columns = ["a", "b", "difference", "lower", "upper", "pvals", "n", "n_clusters"]
    return pd.DataFrame(out, columns=["metric", *columns]).set_index("metric")


def dynamic_range(
    baseline: pd.DataFrame,
    ceiling: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    n_boot: int = 2000,
    random_state: int = 0,
) -> pd.DataFrame:
    """Which metrics can be believed on this data set (Miller et al. 2025).

    ``DRF = (s_neg - s_pos) / (s_neg - s_perfect)``: the share of the way from the negative control (the training mean)
    to a perfect score that a replicate covers; ``BDS``: the share of perturbations for which the replicate beats the
    negative control (ties 1/2). Halves share the noise of controls and centroid, so a metric is believable only if the
    replicate is clearly better than that of another perturbation, too (0.5 % limit).

    Parameters
    ----------
    baseline, ceiling
        Tables of the training mean and of the replicate (split half or interpolated duplicate).
    metrics, n_boot, random_state
        As in :func:`summarise`.

    Returns
    -------
    DataFrame, one row per metric: ``negative``, ``positive``, ``perfect``, ``drf``, ``drf_lower``, ``bds``,
    ``bds_lower`` (2.5 % bootstrap limits), ``believable`` (both limits above 0 and 0.5, better than another's replicate;
    never for metrics with one value for the set, which have no limits), ``n``.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(1500, 40, 8, 0, random_state=0)
    >>> m = scpert.metrics
    >>> reference = m.Reference(adata, train=adata)
    >>> base = m.evaluate(m.training_mean(reference), reference, metrics=["mse"])
    >>> list(m.dynamic_range(base, m.ceiling(reference, metrics=["mse"], n_draws=2)).index)
    ['mse']
    """
    random_state = check_seed(random_state)
    n_boot = check_whole("n_boot", n_boot)
    rows, names = _shared({"baseline": baseline, "ceiling": ceiling}, metrics)
    out = []
    for name in names:
        higher = _higher(name)
        if higher is None:
            continue
        values = np.column_stack([_values(t, rows, name) for t in (baseline, ceiling)])
        ok = np.isfinite(values).all(axis=1)
        record: dict[str, Any] = {
            "metric": name,
            "n": int(ok.sum()),
            "perfect": METRICS[name].best,
            "believable": False,
        }
        if ok.any():
            v = values[ok]
            best = float(METRICS[name].best)  # type: ignore[arg-type]
            sign = 1.0 if higher else -1.0
            wins = np.where(v[:, 0] == v[:, 1], 0.5, (sign * (v[:, 1] - v[:, 0]) > 0).astype(float))
            negative, positive = v.mean(axis=0)
            record.update(negative=negative, positive=positive, bds=wins.mean())
            record["drf"] = (negative - positive) / (negative - best) if negative != best else np.nan
            if len(v) > 1 and METRICS[name].level != "set":
                weights = _resampler(np.asarray(rows, dtype=object)[ok], None, n_boot, random_state)
                neg, pos, won = (_weighted_means(x, weights) for x in (v[:, 0], v[:, 1], wins))
                with np.errstate(invalid="ignore", divide="ignore"):
                    drf = _stretched(np.where(neg != best, (neg - pos) / (neg - best), np.nan), record["drf"], len(v))
                record["drf_lower"] = float(np.nanpercentile(drf, 2.5)) if np.isfinite(drf).any() else np.nan
                record["bds_lower"] = float(np.nanpercentile(_stretched(won, record["bds"], len(v)), 2.5))
                wrong = ceiling.attrs.get("mismatched", {}).get(name, {})
                kept = np.asarray(rows, dtype=object)[ok]
                other = np.array([wrong.get(row, np.nan) for row in kept], dtype=float)
                record["believable"] = bool(
                    not _too_few(ok)
                    and record["drf_lower"] > 0
                    and record["bds_lower"] > 0.5
                    and not _no_better(v[:, 1], other, kept, sign, None, n_boot, random_state, False)
                )
        out.append(record)
    columns = ["negative", "positive", "perfect", "drf", "drf_lower", "bds", "bds_lower", "believable", "n"]
    return pd.DataFrame(out, columns=["metric", *columns]).set_index("metric")


def by_chance(table: pd.DataFrame) -> pd.DataFrame:
    """A table in which flat predictions have the value that a prediction without information scores.

    Parameters
    ----------
    table
        Of :func:`evaluate`, with its reasons.

    Returns
    -------
    A copy. Values that are undefined for another reason stay NaN.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> flat = scpert.metrics.pseudobulk(adata)
    >>> flat.X[:] = flat.X - flat.layers["delta"]
    >>> flat.layers["delta"][:] = 0
    >>> table = scpert.metrics.evaluate(flat, adata, metrics=["pearson_delta"])
    >>> float(scpert.metrics.by_chance(table)["pearson_delta"].iloc[0])
    0.0
    """
    out = table.copy()
    out.attrs = dict(table.attrs)
    for name in out.columns:
        out[name] = _values(table, list(table.index), name)
    return out
