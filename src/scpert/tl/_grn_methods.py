"""The methods of :func:`scpert.tl.infer_grn`: each takes a Problem and gives Scores."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import _keys as K
from .._checks import listing
from ..errors import ScpertError
from ._effects import perturbation_effects, table_spread
from ._grn import Scores, weighted_bh

if TYPE_CHECKING:
    from ._grn import Problem

logger = logging.getLogger("scpert")


def _options(problem: Problem, method: str, **defaults: Any) -> dict[str, Any]:
    unknown = [name for name in problem.options if name not in defaults]
    if unknown:
        allowed = listing(defaults) or "(none)"
        raise ScpertError(
            f"infer_grn(method={method!r}) does not know the option(s) {listing(unknown)}; it has {allowed}."
        )
    return {**defaults, **problem.options}


def total_effects(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shift, standard error and p-value of each regulator's own perturbation on each gene ``(regulator, gene)``.

    Where perturbations have no replicates (one row each), the standard error of a gene is its spread over the
    perturbations, as for tables of effects.
    """
    from scipy import stats

    screen = problem.screen
    effects = perturbation_effects(
        screen.adata,
        perturbation_key=screen.perturbation_key,
        control=screen.control,
        layer=screen.layer,
        scale=screen.scale,
        library_size_key=screen.library_size_key,
        covariate_keys=problem.covariate_keys,
    )
    index = effects.obs_names.get_indexer(problem.regulators)
    shift = np.asarray(effects.X)[index]
    error = np.asarray(effects.layers[K.STD_ERROR])[index]
    pvals = np.asarray(effects.layers[K.PVALS])[index]
    single = ~np.isfinite(error).any(axis=1)
    if single.any():
        everyone = np.asarray(effects.X)
        if len(everyone) > 2:
            spread = table_spread(everyone - np.median(everyone, axis=0))
            logger.warning(
                "%d perturbation(s) have no replicates: the spread of each gene over the perturbations is their error.",
                int(single.sum()),
            )
            error[single] = spread / np.sqrt(effects.obs[K.N_CELLS].to_numpy()[index][single])[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                z = np.where(error[single] > 0, shift[single] / error[single], 0.0)
            pvals[single] = 2 * stats.norm.sf(np.abs(z))
    return shift, error, pvals


def regulator_sign(problem: Problem, shift: np.ndarray) -> np.ndarray:
    """-1 for a regulator that its perturbation lowers, +1 for one that it raises ``(regulator,)``.

    Of an unmeasured regulator (or one that did not move) the majority of the others decides; -1 where there is none.
    """
    position = problem.genes.get_indexer(problem.regulators)
    own = np.array([shift[r, p] if p >= 0 else np.nan for r, p in enumerate(position)])
    known = np.sign(own[np.isfinite(own) & (own != 0)])
    typical = 1.0 if known.sum() > 0 else -1.0
    return np.where(np.isfinite(own) & (own != 0), np.sign(own), typical)


def interventional(problem: Problem) -> Scores:
    """Total effects with error control over the whole screen; page ``docs/grn/interventional.md``."""
    from scipy import stats

    _options(problem, "interventional")
    shift, error, pvals = total_effects(problem)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, shift / error, 0.0)
    position = problem.genes.get_indexer(problem.regulators)
    own = np.flatnonzero(position >= 0)
    tested = pvals.copy()
    tested[own, position[own]] = np.nan
    adjusted = weighted_bh(tested, problem.prior)
    sign = regulator_sign(problem, shift)
    weight = sign[:, None] * z
    keep = np.nan_to_num(adjusted, nan=1.0) <= problem.fdr
    return Scores(
        weight,
        keep,
        {"effect": shift, K.STD_ERROR: error, K.PVALS: pvals, K.PVALS_ADJ: adjusted},
        {"unmeasured": [r for r, p in zip(problem.regulators, position, strict=True) if p < 0]},
    )
