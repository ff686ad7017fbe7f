"""The methods of :func:`scpert.tl.infer_grn`: each takes a Problem and gives Scores."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse, special

from .. import _keys as K
from .._checks import check_choice, listing
from ..data import parse
from ..data._effects import perturbation_sign, std_errors_of, strata_of
from ..errors import ScaleError, ScpertError
from ._effects import SENSITIVITY, cells_behind, effects_of_cells, sensitivity, table_spread, welch
from ._grn import Scores, prior_factor, weighted_bh
from ._grn_carriers import carrier_weights, weighted_effects

if TYPE_CHECKING:
    from ._grn import Problem

logger = logging.getLogger("scpert")


def method_options(problem: Problem, method: str, **defaults: Any) -> dict[str, Any]:
    unknown = [name for name in problem.options if name not in defaults]
    if unknown:
        allowed = listing(defaults) or "(none)"
        raise ScpertError(
            f"infer_grn(method={method!r}) does not know the option(s) {listing(unknown)}; it has {allowed}."
        )
    return {**defaults, **problem.options}


@dataclass
class Evidence:
    """Total effects of the regulators ``(regulator, gene)``, each by its own single perturbation."""

    shift: np.ndarray
    error: np.ndarray
    zscore: np.ndarray
    pvals: np.ndarray
    noise: np.ndarray  # as error, but never swollen by effects: what a real effect must exceed
    sign: np.ndarray  # (regulator,): +1 where the perturbation raises its target, -1 where it lowers it
    offset: np.ndarray  # (regulator,): log of the factor common to most genes, already taken out
    offset_error: np.ndarray  # (regulator,): its standard error
    share: np.ndarray  # (regulator,): mean weight of its cells; 1 where all count the same


def total_effects(problem: Problem, *, composition: bool = True, carriers: bool = False) -> Evidence:
    """Shift of each gene in each regulator's single perturbation, with error and p-value.

    Cells: Welch's statistics with two cautions. Counts are compositions: if a perturbation lowers strong genes, all
    others rise in CP10k. The offset that most genes share (weighted median over genes of shift over sensitivity, the
    mean of ``1 - exp(-x)`` over controls, which is how ``log1p`` responds to a factor) is taken out. And the variances of
    the perturbed cells and of the controls both count as the larger of the two: few cells that happen to agree are no evidence.

    With ``carriers`` (rankings) each cell counts as far as it carries its perturbation, by the counts of its target
    (:func:`carrier_weights`), if that explains them better. Not for tests: a cell with little of the target may have little
    of what goes with it for other reasons.

    Tables: effects are taken as they are, but for the noise of the control in all of them (:func:`_reference_error`); of profiles
    without replicates the median of each gene is subtracted. Rows of one label are added, weighted by how far they moved their own
    target. Where a table of effects has standard errors, these are the errors, and nothing is subtracted. Otherwise edges are
    ranked by the shift over the root mean square of the gene over the perturbations (a gene that many perturbations move must move
    more); p-values are normal and take 1.4826 times the median absolute shift, which a minority of real effects does not swell.
    """
    screen = problem.screen
    singles = sorted({t[0] for p in screen.perturbations if len(t := parse(p, screen.control)) == 1})
    if set(problem.regulators) < set(
        singles
    ):  # noise, and the direction of most, are those of the screen, whoever is asked for
        whole = total_effects(
            replace(problem, regulators=singles, prior=None), composition=composition, carriers=carriers
        )
        rows = pd.Index(singles).get_indexer(pd.Index(problem.regulators))
        return Evidence(**{f.name: getattr(whole, f.name)[rows] for f in fields(Evidence)})
    if screen.scale != K.SCALE_EFFECTS and screen.is_control.sum() > 1:
        with_controls = screen.perturbations
        shift, error, freedom, _, _ = effects_of_cells(
            screen, with_controls, problem.covariate_keys or None, cautious=True
        )
        rows = pd.Index(with_controls).get_indexer(pd.Index(problem.regulators))
        if len(rows) < len(shift) or (np.diff(rows) < 0).any():
            shift, error, freedom = shift[rows], error[rows], freedom[rows]
        share = np.ones(len(shift))
        if carriers:
            strata, _ = strata_of(screen.adata, problem.covariate_keys or None)
            weights = carrier_weights(screen, problem.regulators, problem.position, strata)
            if weights is not None:
                shift, error, share = weighted_effects(screen, problem.regulators, weights, strata)
        offset = offset_error = np.zeros(len(shift))
        if composition:
            offset, offset_error = without_composition(shift, error, sensitivity(screen))
            if screen.library_size_key is None and not offset_error.any():
                logger.warning(
                    "Fewer than %d genes are measured with an error: what a perturbation of one does to the shares of all others in a cell "
                    "cannot be told from effects. Name the full library size (library_size_key=).",
                    _FEWEST_GENES,
                )
        zscore, pvals = welch(shift, error, freedom)
        return Evidence(
            shift,
            error,
            zscore,
            pvals,
            error,
            perturbation_sign(shift, error, problem.position),
            offset,
            offset_error,
            share,
        )
    shift, error, noise, freedom = _table_effects(problem)
    offset = offset_error = np.zeros(len(shift))
    table = screen.adata
    if composition and cells_behind(table) is not None and SENSITIVITY in table.var and K.STD_ERROR in table.layers:
        offset, offset_error = without_composition(shift, error, np.asarray(table.var[SENSITIVITY], dtype=np.float64))
    zscore, _ = welch(shift, error, np.inf)
    _, pvals = welch(shift, noise, np.broadcast_to(freedom[:, None], shift.shape))
    return Evidence(
        shift,
        error,
        zscore,
        pvals,
        noise,
        perturbation_sign(shift, noise, problem.position),
        offset,
        offset_error,
        np.ones(len(shift)),
    )


def without_composition(shift: np.ndarray, error: np.ndarray, per_factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Take the log factor that most genes share out of ``shift`` ``(regulator, gene)``, in place; the factor and its standard error.

    ``per_factor`` ``(gene,)`` is how far a gene shifts per unit of it (:func:`~scpert.tl._effects.sensitivity`). The weighted median of
    independent normal ratios with weights :math:`w_g`, one over their errors, has the standard error
    :math:`\sqrt{\pi / 2} / \sqrt{\sum_g w_g^2}`. Fewer than ten genes do not tell it (0).
    """
    offset, noise = np.zeros(len(shift)), np.zeros(len(shift))
    for row, (values, errors) in enumerate(zip(shift, error, strict=True)):
        use = (per_factor > 0) & np.isfinite(errors) & (errors > 0)
        if use.sum() >= _FEWEST_GENES:
            ratio, weight = values[use] / per_factor[use], per_factor[use] / errors[use]
            order = np.argsort(ratio, kind="stable")
            total = np.cumsum(weight[order])
            offset[row] = ratio[order][np.searchsorted(total, total[-1] / 2)]
            noise[row] = np.sqrt(np.pi / 2) / np.sqrt((weight**2).sum())
            values -= offset[row] * per_factor
    return offset, noise


#: Genes that tell the factor common to most of them.
_FEWEST_GENES = 10
#: Asymptotic efficiency of the median absolute deviation, beside the standard deviation, for normal values.
_MAD_EFFICIENCY = 0.37


def _table_effects(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shift, error, noise ``(regulator, gene)``, and the degrees of freedom of the noise ``(regulator,)``."""
    screen = problem.screen
    given = screen.scale == K.SCALE_EFFECTS
    if not given:
        logger.warning(
            "There are fewer than two control cells: the reference of each gene is its median over all rows, "
            "and its spread over the perturbations is the error."
        )
    single = pd.Index(problem.regulators).get_indexer(pd.Index(screen.labels))
    rows = np.flatnonzero(~screen.is_control)
    values = screen.rows(rows).toarray().astype(np.float64)
    position = problem.position
    label = single[rows]
    measured = (label >= 0) & (position[label] >= 0)
    typical = measured if len(np.unique(label[measured])) >= 3 else np.ones(len(rows), dtype=bool)
    crowded = [problem.regulators[r] for r in np.unique(label[~measured & (label >= 0)]) if (label == r).sum() >= 10]
    if crowded and measured.any():
        logger.warning(
            "%s: many rows, no measured gene; if they are observational, say observational=.", listing(crowded)
        )
    errors = std_errors_of(screen.adata, rows) if given else None
    if errors is None:
        off_target = values[typical].copy()
        own = np.where(label[typical] >= 0, position[label[typical]], -1)
        off_target[np.flatnonzero(own >= 0), own[own >= 0]] = np.nan
        values -= _reference_error(off_target) if given else np.median(values[typical], axis=0)
    spread = 1.4826 * np.median(np.abs(values[typical]), axis=0)  # most perturbations do not touch a gene
    spread = np.where(spread > 0, spread, np.sqrt(np.mean(values[typical] ** 2, axis=0)))
    shift = np.zeros((len(problem.regulators), len(problem.genes)))
    length = np.zeros(len(problem.regulators))
    told = np.zeros_like(shift)
    for r in range(len(problem.regulators)):
        mine = np.flatnonzero(label == r)
        weight = np.ones(len(mine))
        if position[r] >= 0 and len(mine) > 1 and spread[position[r]] > 0:
            moved = values[mine, position[r]] / spread[position[r]]
            weight = np.sqrt(1.0 + moved**2)
            weight /= weight.max()
        length[r] = np.sqrt((weight**2).sum())
        shift[r] = weight @ values[mine] / length[r] ** 2
        if errors is not None:
            told[r] = np.sqrt(weight**2 @ errors[mine] ** 2) / length[r] ** 2
    if errors is not None:
        freedom = np.full(len(shift), np.inf)
        if (
            K.N_CELLS in screen.adata.obs
        ):  # few cells that happen to agree are no evidence: as in cells, here by the other rows
            n = pd.to_numeric(screen.adata.obs[K.N_CELLS].iloc[rows], errors="coerce").fillna(1.0).to_numpy(dtype=float)
            cells = np.array([n[label == r].sum() for r in range(len(shift))])
            typical_cell = np.nanmean(told**2 * cells[:, None], axis=0)
            told = np.fmax(
                told, np.sqrt(typical_cell / np.maximum(cells, 1)[:, None]) * np.where(np.isnan(told), np.nan, 1.0)
            )
            freedom = np.maximum(cells - 1.0, 1.0)
        return shift, told, told, freedom
    # in units of one full-strength row
    usual = position >= 0 if (position >= 0).sum() >= 3 else np.ones(len(position), dtype=bool)
    error = table_spread((shift * length[:, None])[usual])[None, :] / length[:, None]
    # a median of few deviations is itself uncertain: it has 0.37 of the precision of a standard deviation
    freedom = np.full(len(shift), max(_MAD_EFFICIENCY * (int(typical.sum()) - 1), 1.0))
    return shift, error, spread[None, :] / length[:, None], freedom


#: Rows that a table of effects must have before they tell what the reference was off by.
_REFERENCE_ROWS = 20


def _reference_error(values: np.ndarray) -> np.ndarray:
    r"""What the control that was subtracted from a table of effects was off by ``(gene,)``, the same in all of its rows.

    .. math:: m_j \sim N\Big(0, \big(\omega^2 + \tfrac{\pi}{2n}\big) v_j\Big), \qquad
        \hat c_j = \frac{\omega^2}{\omega^2 + \pi/2n}\, m_j

    for the median :math:`m_j` of a gene over :math:`n` rows and the variance :math:`v_j` of its values around it: the noise of the
    control has :math:`\omega^2` times the variance of a row, at most 1 (a control that was one row), by the median of
    :math:`m_j^2 / v_j` over genes. What is beyond three standard deviations is no noise but an effect of most perturbations and
    stays. A control of many cells has next to none, and few rows do not tell (0).

    Parameters
    ----------
    values
        ``(row, gene)``, NaN in each row's own target.
    """
    n = len(values)
    positive, negative = (values > 0).mean(), (values < 0).mean()
    if n >= 10 and max(positive, negative) > 0.95:
        logger.warning(
            "scale='effects', but %.0f %% of the values have the same sign: profiles, not relative to a control. Their reference is "
            "the median of each gene over the rows. Subtract a control, or add its profile as a row, to choose another.",
            100 * max(positive, negative),
        )
        middle: np.ndarray = np.nanmedian(values, axis=0)
        return middle
    if n < _REFERENCE_ROWS:
        return np.zeros(values.shape[1])
    middle = np.nanmedian(values, axis=0)
    deviation = 1.4826 * np.nanmedian(np.abs(values - middle), axis=0)
    varies = deviation > 0
    if not varies.any():
        return np.zeros_like(middle)
    of_median = np.pi / (2 * n)
    noise = np.clip(np.median((middle[varies] / deviation[varies]) ** 2) / 0.4549 - of_median, 0.0, 1.0)
    limit = 3.0 * np.sqrt(noise) * deviation
    out: np.ndarray = noise / (noise + of_median) * middle * (np.abs(middle) <= limit)
    return out


def interventional(problem: Problem) -> Scores:
    """Total effects with error control over the whole screen; page ``docs/grn/interventional.md``."""
    options = method_options(problem, "interventional", composition=True)
    found = total_effects(problem, composition=options["composition"])
    if problem.statistic == "rank":
        found = rank_effects(problem, found)
    position = problem.position
    own = np.flatnonzero(position >= 0)
    found.pvals[own, position[own]] = np.nan  # a target's own change is not tested
    adjusted = weighted_bh(found.pvals, problem.prior)
    weight = np.nan_to_num(found.zscore, copy=False)
    if problem.prior is not None:  # the ranking looks at the same weighted p-values as the error rate
        counted = np.clip(found.pvals / prior_factor(found.pvals, problem.prior), 1e-300, 1.0 - 1e-6)
        with np.errstate(invalid="ignore"):
            weight *= special.ndtri(counted / 2) / special.ndtri(np.clip(found.pvals, 1e-300, 1.0 - 1e-6) / 2)
        np.nan_to_num(weight, copy=False)
    weight *= found.sign[:, None].astype(weight.dtype)
    return Scores(
        weight,
        adjusted <= problem.fdr,
        {"effect": found.shift, K.STD_ERROR: found.error, K.PVALS: found.pvals, K.PVALS_ADJ: adjusted},
        {"unmeasured": [r for r, p in zip(problem.regulators, position, strict=True) if p < 0]},
    )


# ---------------------------------------------------------------------------------------------- over cells


def _blocks(problem: Problem) -> Any:
    """Yield ``(CSR block, stratum of each row)``; observational samples from elsewhere are a stratum of their own."""
    strata, names = strata_of(problem.screen.adata, problem.covariate_keys)
    for rows, block in problem.screen.chunks():
        yield block, strata[rows]
    if problem.observational is not None:
        yield problem.observational, np.full(problem.observational.shape[0], len(names))


def _grams(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Centred sums of products over cells, centred within strata, in one pass.

    Returns regulators x regulators, regulators x genes, gene sums of squares, and the residual number of cells.
    """
    index = problem.position
    n_genes, n_strata = len(problem.genes), 1
    within = np.zeros((len(index), len(index)))
    across = np.zeros((len(index), n_genes))
    square = np.zeros(n_genes)
    sums: dict[int, np.ndarray] = {}
    count: dict[int, int] = {}
    for block, strata in _blocks(problem):
        block = block.astype(np.float64)
        some = block[:, index]
        within += (some.T @ some).toarray()
        across += (some.T @ block).toarray()
        square += np.asarray(block.multiply(block).sum(axis=0)).ravel()
        for s in np.unique(strata):
            mine = strata == s
            sums[s] = sums.get(s, 0.0) + np.asarray(block[mine].sum(axis=0)).ravel()
            count[s] = count.get(s, 0) + int(mine.sum())
    for s, total in sums.items():
        mean = total / count[s]
        within -= count[s] * np.outer(mean[index], mean[index])
        across -= count[s] * np.outer(mean[index], mean)
        square -= count[s] * mean**2
    n_strata = len(sums)
    return within, across, np.maximum(square, 0.0), sum(count.values()) - n_strata


def _scales(within: np.ndarray, square: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One over the root of the sum of squares of regulators and genes; 0 for what is constant."""
    bar = 1e-10 * n

    def inverse_root(values: np.ndarray) -> np.ndarray:
        return np.where(values > bar, 1.0 / np.sqrt(np.maximum(values, bar)), 0.0)

    return inverse_root(np.diag(within)), inverse_root(square)


def _apply_prior(weight: np.ndarray, prior: np.ndarray | None) -> np.ndarray:
    return weight if prior is None else weight * (1.0 + prior)


def correlation(problem: Problem) -> Scores:
    """Pearson correlation over cells (within strata); page ``docs/grn/correlation.md``."""
    method_options(problem, "correlation")
    within, across, square, n = _grams(problem)
    of_regulator, of_gene = _scales(within, square, n)
    r = np.clip(of_regulator[:, None] * across * of_gene[None, :], -1.0, 1.0)
    return Scores(_apply_prior(r, problem.prior))


def ridge(problem: Problem) -> Scores:
    """Ridge regression of every gene on the other regulators; page ``docs/grn/ridge.md``."""
    alpha = method_options(problem, "ridge", alpha=None)["alpha"]
    within, across, square, n = _grams(problem)
    of_regulator, of_gene = _scales(within, square, n)
    gram = of_regulator[:, None] * within * of_regulator[None, :]
    cross = of_regulator[:, None] * across * of_gene[None, :]
    value, vector = np.linalg.eigh(gram)
    value = np.maximum(value, 0.0)
    projected = vector.T @ cross
    if alpha is None:
        own = np.isin(np.arange(len(problem.genes)), problem.position)
        use = (of_gene > 0) & (~own if (~own).any() else True)
        alpha = _generalised_cross_validation(value, projected[:, use], n)
        logger.info("ridge: alpha = %.3g by generalised cross-validation.", alpha)
    inverse = (vector / (value + alpha)) @ vector.T
    coefficient = inverse @ cross
    for row, gene in enumerate(problem.position):
        # the regression of a regulator on the others: by the inverse of the partitioned matrix
        coefficient[:, gene] = -inverse[:, row] / inverse[row, row]
        coefficient[row, gene] = 0.0
    coefficient[:, of_gene == 0] = 0.0
    coefficient[of_regulator == 0] = 0.0
    return Scores(_apply_prior(coefficient, problem.prior), notes={"alpha": float(alpha)})


def _generalised_cross_validation(value: np.ndarray, projected: np.ndarray, n: int) -> float:
    """The ridge penalty that minimises generalised cross-validation summed over the (standardised) genes."""
    power = (projected**2).sum(axis=1)
    grid = np.logspace(-4, 2, 49)
    scores = []
    for alpha in grid:
        explained = (power * (value + 2 * alpha) / (value + alpha) ** 2).sum()
        freedom = (value / (value + alpha)).sum()
        scores.append((projected.shape[1] - explained) / max(n - freedom, 1e-9) ** 2)
    return float(grid[int(np.argmin(scores))])


def partial_regression(
    samples: sparse.csr_matrix, position: np.ndarray, n_genes: int, alpha: float = 0.5
) -> np.ndarray:
    """Standardised ridge coefficients of genes on the measured regulators over samples ``(regulator, gene)``."""
    values = samples.toarray().astype(np.float64)
    values -= values.mean(axis=0)
    length = np.sqrt((values**2).sum(axis=0))
    values = np.divide(values, length, out=np.zeros_like(values), where=length > 1e-12)
    measured = np.flatnonzero(position >= 0)
    some = values[:, position[measured]]
    inverse = np.linalg.inv(some.T @ some + alpha * np.eye(len(measured)))
    coefficient = inverse @ (some.T @ values)
    for row, gene in enumerate(position[measured]):
        coefficient[:, gene] = -inverse[:, row] / inverse[row, row]
        coefficient[row, gene] = 0.0
    out = np.zeros((len(position), n_genes))
    out[measured] = coefficient
    return out


def boosting(problem: Problem) -> Scores:
    """Gradient-boosted trees per gene, as GRNBoost2; page ``docs/grn/boosting.md``."""
    from joblib import Parallel, delayed

    from .._progress import progress

    options = method_options(
        problem,
        "boosting",
        n_estimators=300,
        learning_rate=0.05,
        max_depth=3,
        max_features=0.1,
        subsample=0.9,
        patience=10,
        max_cells=5000,
        trees="scikit-learn",
    )
    grow = {"scikit-learn": _boosted_gain, "lightgbm": _lightgbm_gain}[
        check_choice("trees", options.pop("trees"), ("scikit-learn", "lightgbm"))
    ]
    if grow is _lightgbm_gain:
        _need_lightgbm()
    rng = np.random.default_rng(problem.random_state)
    rows, strata = _rows_of(problem, options.pop("max_cells"), rng)
    samples = rows.tocsc()
    index = problem.position
    inputs = _centred(samples[:, index].toarray(), strata).astype(np.float32, order="C")
    seeds = rng.integers(0, 2**31 - 1, size=len(problem.genes))
    jobs = Parallel(n_jobs=problem.n_jobs or 1, return_as="generator")(
        delayed(_boost_one)(
            grow,
            inputs,
            _centred(samples[:, [g]].toarray(), strata).ravel(),
            int(np.max(np.where(index == g, np.arange(len(index)), -1))),
            int(seeds[g]),
            options,
        )
        for g in range(len(problem.genes))
    )
    weight = np.zeros((len(index), len(problem.genes)))
    for g, importance in enumerate(progress(jobs, total=len(problem.genes), description="boosting", unit="gene")):
        weight[:, g] = importance
    _, across, _, _ = _grams(problem)
    return Scores(_apply_prior(np.sign(across) * weight, problem.prior))


def _rows_of(problem: Problem, limit: int, rng: np.random.Generator) -> tuple[sparse.csr_matrix, np.ndarray]:
    """At most ``limit`` cells and the observational samples, and the stratum of each row."""
    n = problem.screen.n_cells
    index = np.arange(n) if n <= limit else np.sort(rng.choice(n, limit, replace=False))
    if n > limit:
        logger.info("boosting: %d of %d cells drawn (max_cells=).", limit, n)
    strata, names = strata_of(problem.screen.adata, problem.covariate_keys)
    rows = problem.screen.rows(index)
    if problem.observational is None:
        return rows, strata[index]
    more = np.full(problem.observational.shape[0], len(names) if len(names) > 1 else 0)
    return sparse.vstack([rows, problem.observational], format="csr"), np.concatenate([strata[index], more])


def _centred(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Values less the mean of their stratum, if there is more than one ``(cell, gene)``."""
    if strata.max() > 0:
        for s in np.unique(strata):
            values[strata == s] -= values[strata == s].mean(axis=0)
    return values


def _need_lightgbm() -> Any:
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        raise ScpertError(
            f"trees='lightgbm' needs LightGBM, which cannot be imported ({error}). Install it (pip install 'scpert[boost]'), or use "
            "trees='scikit-learn'."
        ) from error
    return lightgbm


def _boost_one(
    grow: Callable[..., np.ndarray],
    inputs: np.ndarray,
    target: np.ndarray,
    own: int,
    seed: int,
    options: dict[str, Any],
) -> np.ndarray:
    """Importance of each regulator for one gene; trees are added until held-out cells stop improving."""
    importance = np.zeros(inputs.shape[1])
    use = np.flatnonzero(np.arange(inputs.shape[1]) != own)
    if len(use) and target.std() >= 1e-8:
        importance[use] = grow(inputs[:, use], (target - target.mean()) / target.std(), seed, options)
    return importance


def _lightgbm_gain(inputs: np.ndarray, target: np.ndarray, seed: int, options: dict[str, Any]) -> np.ndarray:
    """What :func:`_boosted_gain` gives, by LightGBM; one draw of cells judges all trees, in place of one a tree."""
    lightgbm = _need_lightgbm()
    order = np.random.RandomState(seed).permutation(len(target))
    inside, outside = np.split(order, [max(1, int(options["subsample"] * len(target)))])
    settings = {
        "objective": "l2",
        "learning_rate": options["learning_rate"],
        "max_depth": options["max_depth"],
        "num_leaves": 2 ** options["max_depth"],
        "feature_fraction_bynode": max(options["max_features"], 1.0 / inputs.shape[1]),
        "seed": seed,
        "num_threads": 1,
        "deterministic": True,
        "verbosity": -1,
    }
    seen = lightgbm.Dataset(inputs[inside], target[inside])
    judged: dict[str, Any] = {}
    if len(outside):
        stop = lightgbm.early_stopping(options["patience"], verbose=False)
        judged = {"valid_sets": [seen.create_valid(inputs[outside], target[outside])], "callbacks": [stop]}
    model = lightgbm.train(settings, seen, options["n_estimators"], **judged)
    gain = model.feature_importance("gain", iteration=model.best_iteration).astype(np.float64)
    gain /= max(gain.sum(), 1e-12)
    if not judged:
        return gain
    before = float(np.mean((target[outside] - target[inside].mean()) ** 2))
    return gain * max(before - model.best_score["valid_0"]["l2"], 0.0)


def _boosted_gain(inputs: np.ndarray, target: np.ndarray, seed: int, options: dict[str, Any]) -> np.ndarray:
    """Share of each regulator in the gain of the trees times what they explain out of bag ``(regulator,)``.

    The cells that a tree did not see judge what it adds, before and after on the same cells: scikit-learn's own
    ``oob_improvement_`` compares each tree's cells with those of the tree before, and a few cells with a large value, in the
    one draw and not in the other, then count as explained.
    """
    from sklearn.tree import DecisionTreeRegressor

    rng = np.random.RandomState(seed)
    residual, n = target.astype(np.float64), len(target)
    n_inside = max(1, int(options["subsample"] * n))
    gain = np.zeros(inputs.shape[1])
    improvement: list[float] = []
    for _ in range(options["n_estimators"]):
        order = rng.permutation(n)
        inside, outside = order[:n_inside], order[n_inside:]
        tree = DecisionTreeRegressor(
            max_depth=options["max_depth"],
            max_features=options["max_features"],
            random_state=rng,
        )
        tree.fit(inputs[inside], residual[inside], check_input=False)
        gain += tree.tree_.compute_feature_importances(normalize=False)
        before = residual[outside]
        residual -= options["learning_rate"] * tree.tree_.predict(inputs)[:, 0]
        if len(outside):
            improvement.append(float(np.mean(before**2 - residual[outside] ** 2)))
            recent = improvement[-options["patience"] :]
            if len(recent) == options["patience"] and np.mean(recent) < 0:
                break
    gain /= max(gain.sum(), 1e-12)
    return gain * max(float(np.max(np.cumsum(improvement))), 0.0) if improvement else gain


# ---------------------------------------------------------------------------------------------- a model


#: ``infer_grn(method="gpovae")`` trains a small model, for as many epochs as show it this many cells (within limits).
_GPOVAE_SIZE = {"n_latent": 20, "n_hidden": 128}
_GPOVAE_CELLS, _GPOVAE_EPOCHS = 200_000, (5, 100)


def gpovae(problem: Problem) -> Scores:
    """Train GPO-VAE for a while and read the network out of it; page ``docs/grn/gpovae.md``."""
    from ..model import GPOVAE
    from ._grn_inverse import indirect_discount

    options = dict(problem.options)
    max_epochs, direct, carriers, trained = (
        options.pop(n, d) for n, d in (("max_epochs", None), ("direct", True), ("carriers", True), ("model", None))
    )
    allowed = [n for n in inspect.signature(GPOVAE.__init__).parameters if n not in ("self", "adata", "registry")]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ScpertError(
            f"infer_grn(method='gpovae') does not know the option(s) {listing(unknown)}; it has max_epochs, direct, "
            f"carriers and those of GPOVAE: {', '.join(allowed)}."
        )
    if problem.screen.scale != K.SCALE_COUNTS:
        raise ScaleError(
            f"method='gpovae' trains a model of counts; {problem.screen.where} holds {problem.screen.scale} values. Name a layer "
            "of raw counts (layer=), or use another method: all others take logs, and the first two tables of effects."
        )
    if trained is not None and (options or max_epochs is not None):
        raise ScpertError(
            f"{listing([*options, *(['max_epochs'] if max_epochs is not None else [])])} are options of the training, and model= is "
            "trained already. Leave one of them out."
        )
    if trained is None:
        trained = _train_gpovae(problem, options, max_epochs)
    trained._check_trained()
    names = problem.regulators
    genes, columns = pd.Index(trained.genes_), pd.Index(trained.genes_).get_indexer(pd.Index(problem.genes))
    missing = [*(r for r in names if r not in {*trained.targets_, *problem.inferred}), *problem.genes.difference(genes)]
    if missing:
        raise ScpertError(
            f"The model was not trained on {listing(missing)}. Give regulators= and genes that it knows, or let "
            "infer_grn train one (model=None)."
        )
    probability, effect, std = (a[:, columns] for a in trained._network(names))
    # the model's effects are log fold changes under the perturbation: turned into signs of the regulator's activity
    perturbed = [r for r in names if r not in problem.inferred]
    seen = replace(problem, regulators=perturbed or sorted(trained.effects_.singles))
    measured = total_effects(seen, carriers=direct and carriers)
    row = pd.Index(seen.regulators).get_indexer(pd.Index(names))
    usual = 1.0 if measured.sign.sum() > 0 else -1.0  # of a gene that was never perturbed, the others decide
    sign = np.where(row >= 0, measured.sign[row], usual)
    weight = sign[:, None] * effect
    if direct:
        weight = np.zeros_like(weight)
        if perturbed:
            # the network's effect is the mean over all cells of a perturbation, carriers or not
            decoded = _decoded_effects(trained, seen, columns, measured.error)
            shift = (measured.shift + decoded / np.maximum(measured.share, 0.1)[:, None]) / 2
            zscore, _ = welch(shift, measured.error, np.inf)
            factor, _ = indirect_discount(shift, measured.noise, measured.sign, seen.position)
            weight[row >= 0] = (measured.sign[:, None] * np.nan_to_num(zscore) * factor)[row[row >= 0]]
        if problem.inferred and trained._rows_from_knowledge[2] > 0:
            # nothing was measured: half of the evidence is missing, and noise is that of a perturbation in the middle
            error = np.nanmedian(measured.error, axis=0, keepdims=True)
            shift = trained._unseen_delta(problem.inferred, trained.reference_, 1024)[0][:, columns]
            error = np.repeat(error, len(shift), axis=0)
            zscore, _ = welch(_without_offset(problem, shift, error) / 2, error, np.inf)
            weight[row < 0] = sign[row < 0, None] * np.nan_to_num(zscore)
    return Scores(
        _apply_prior(weight, problem.prior),
        probability > 0.5,
        {"probability": probability, "effect": effect, "std": std},
        {"unmeasured": [r for r, p in zip(names, problem.position, strict=True) if p < 0]},
    )


def _train_gpovae(problem: Problem, options: dict[str, Any], max_epochs: int | None) -> Any:
    from ..model import GPOVAE

    screen = problem.screen
    data = screen.adata.to_memory()  # a copy, backed or not
    GPOVAE.setup_anndata(
        data,
        perturbation_key=screen.perturbation_key,
        control=screen.control,
        layer=screen.layer,
        scale=screen.scale,
        library_size_key=screen.library_size_key,
        covariate_keys=problem.covariate_keys or None,
    )
    trained = GPOVAE(data, **{**_GPOVAE_SIZE, "random_state": problem.random_state, **options})
    if max_epochs is None:
        max_epochs = int(np.clip(np.ceil(_GPOVAE_CELLS / screen.n_cells), *_GPOVAE_EPOCHS))
    trained.train(max_epochs, random_state=problem.random_state)
    return trained


def _decoded_effects(trained: Any, problem: Problem, columns: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Shift of each gene that the network decodes under each regulator, without the factor common to most genes."""
    shift = trained._network_delta([(r,) for r in problem.regulators], trained.reference_, 1024)[:, columns]
    return _without_offset(problem, shift, error)


def _without_offset(problem: Problem, shift: np.ndarray, error: np.ndarray) -> np.ndarray:
    out = shift.copy()
    without_composition(out, error, sensitivity(problem.screen))
    return out


# ---------------------------------------------------------------------------------------------- ranks


def rank_effects(problem: Problem, found: Evidence) -> Evidence:
    """The same effects with Mann-Whitney statistics instead of Welch's (cells only)."""
    from ._rank_sum import scaled_rank_sums

    screen = problem.screen
    if screen.scale == K.SCALE_EFFECTS or screen.is_control.sum() < 2:
        raise ScpertError(
            "statistic='rank' needs cells of every perturbation and of the control; use statistic='welch'."
        )
    code = pd.Index([screen.control, *problem.regulators]).get_indexer(pd.Index(screen.labels))
    used = np.flatnonzero(code >= 0)
    strata, _ = strata_of(screen.adata, problem.covariate_keys or None)
    z, pvals = scaled_rank_sums(screen.rows(used), code[used], found.offset, found.offset_error, strata[used])
    return replace(found, zscore=z, pvals=pvals)
