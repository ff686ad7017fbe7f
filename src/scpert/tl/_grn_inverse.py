"""``sparse_inverse``: direct edges out of the matrix of total effects."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from .. import _keys as K
from .._progress import progress
from ._grn import Scores
from ._grn_methods import method_options, partial_regression, total_effects

if TYPE_CHECKING:
    from ._grn import Problem

__all__ = ["direct_effects", "sparse_inverse", "strongest_path"]

logger = logging.getLogger("scpert")


def strongest_path(zscore: np.ndarray, position: np.ndarray, cut: float = 0.0) -> np.ndarray:
    r"""Strength of the best two-step path that could explain each total effect.

    .. math:: m_{ij} = \max_k \left[\min(|z_{ik}|, |z_{kj}|) - c\right]_+ \text{ over } k \text{ with }
              \operatorname{sign}(z_{ik} z_{kj}) = \operatorname{sign}(z_{ij})

    Parameters
    ----------
    zscore
        Signed (by activity of the regulator) evidence ``(regulator, gene)``.
    position
        Column of each regulator among the genes, -1 where it is not measured ``(regulator,)``.
    cut
        :math:`c`: only what both steps have above it counts.

    Returns
    -------
    array ``(regulator, gene)``, 0 where no path has the right sign.
    """
    z = np.asarray(zscore, dtype=np.float32).copy()
    measured = np.flatnonzero(position >= 0)
    z[measured, position[measured]] = 0.0
    up, down = np.maximum(z - cut, 0.0), np.maximum(-z - cut, 0.0)
    onward_up, onward_down = up[measured], down[measured]
    out = np.zeros_like(z)
    for row in progress(range(len(z)), total=len(z), description="indirect paths", unit="regulator"):
        first_up, first_down = up[row, position[measured]], down[row, position[measured]]
        a, b = np.flatnonzero(first_up), np.flatnonzero(first_down)
        same, other = np.zeros(z.shape[1], np.float32), np.zeros(z.shape[1], np.float32)
        for index, first, to_same, to_other in (
            (a, first_up, onward_up, onward_down),
            (b, first_down, onward_down, onward_up),
        ):
            if len(index):
                step = first[index, None]
                same = np.maximum(same, np.minimum(step, to_same[index]).max(axis=0))
                other = np.maximum(other, np.minimum(step, to_other[index]).max(axis=0))
        out[row] = np.where(z[row] > 0, same, np.where(z[row] < 0, other, np.maximum(same, other)))
    return out


def chance_path(n_regulators: int) -> float:
    r"""Standard errors :math:`t` that the best of :math:`n` paths over noise reaches: one of them is expected above.

    Both steps are beyond :math:`t`, with the sign asked for, with probability :math:`2\,\Phi(-t)^2`.
    """
    return float(max(-special.ndtri(1.0 / np.sqrt(2.0 * max(n_regulators, 1))), 0.0))


def direct_effects(
    shift: np.ndarray,
    error: np.ndarray,
    position: np.ndarray,
    *,
    penalty: float | np.ndarray = 3.0,
    cut: float = 3.0,
    n_iter: int = 200,
    tolerance: float = 1e-3,
) -> np.ndarray:
    r"""Sparse inverse of the matrix of total effects, weighted by standard errors.

    If the regulator :math:`i` is set from outside, the others follow
    :math:`x_{ij} = \sum_{k \ne j} x_{ik} A_{kj}` for every gene :math:`j \ne i` (steady state of a linear network), where
    :math:`x_{ii}` is the shift of the regulator itself. Column :math:`j` of the direct effects :math:`A` solves this
    system by a lasso over the perturbations :math:`i \ne j`, weighted by :math:`1/s_{ij}`. Genes that were not perturbed
    have no column (missing interventions); a regulator that is not measured has one that only its own perturbation
    moves. Inputs below ``cut`` standard errors are taken for zero, as noise in the inputs would be taken for edges.

    Parameters
    ----------
    shift, error
        Total effects and their standard errors ``(regulator, gene)``.
    position
        Column of each regulator among the genes, -1 where it is not measured ``(regulator,)``.
    penalty
        In standard errors: a coefficient must explain more than this; a number or ``(regulator, gene)``.
    cut
        See above.
    n_iter, tolerance
        Steps of the accelerated proximal gradient method at most, and the relative change at which it stops.

    Returns
    -------
    array ``(regulator, gene)``: change of the gene (in units of ``shift``) when the regulator alone is moved as far as
    its perturbation moves it; to get the change per unit of the regulator, divide by its own shift.
    """
    n_regulators, n_genes = shift.shape
    measured = np.flatnonzero(position >= 0)
    finite = np.isfinite(error) & (error > 0)
    error = np.where(finite, error, np.nan)
    with np.errstate(invalid="ignore"):
        count = finite.sum(axis=0)
        of_gene = np.sqrt(np.where(finite, error**2, 0.0).sum(axis=0) / np.maximum(count, 1))
        of_gene = np.where(of_gene > 0, of_gene, 1.0)
        of_row = np.array(
            [np.median((row / of_gene)[ok]) if ok.any() else 1.0 for row, ok in zip(error, finite, strict=True)]
        )

    inputs = np.zeros((n_regulators, n_regulators))
    seen = np.nan_to_num(np.abs(shift) > cut * np.nan_to_num(error, nan=np.inf))
    inputs[:, measured] = np.where(seen, shift, 0.0)[:, position[measured]]
    own = np.ones(n_regulators)
    own[measured] = shift[measured, position[measured]]
    alive = own != 0
    own = np.where(alive, own, 1.0)
    np.fill_diagonal(inputs, np.where(alive, own, 0.0))
    design = (inputs / own[None, :] / of_row[:, None]).astype(np.float32)
    outcome = (np.nan_to_num(shift) / of_gene[None, :] / of_row[:, None]).astype(np.float32)
    used = np.ones((n_regulators, n_genes), dtype=np.float32)
    used[measured, position[measured]] = (
        0.0  # under its own perturbation a gene obeys the perturbation, not the network
    )
    free = used.copy()
    free[~alive] = 0.0

    bound = np.float32(max(float(np.linalg.norm(design, 2)) ** 2, 1e-12))
    shrink = (np.asarray(penalty, dtype=np.float32) / bound).astype(np.float32)
    solution = np.zeros((n_regulators, n_genes), dtype=np.float32)
    ahead, momentum = solution, 1.0
    for _ in progress(range(n_iter), total=n_iter, description="sparse inverse", unit="step"):
        gradient = design.T @ (used * (design @ ahead - outcome))
        moved = ahead - gradient / bound
        moved = np.sign(moved) * np.maximum(np.abs(moved) - shrink, 0.0) * free
        following = (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        change = moved - solution
        ahead = moved + np.float32((momentum - 1.0) / following) * change
        momentum, solution = following, moved
        if np.abs(change).max(initial=0.0) <= tolerance * max(float(np.abs(solution).max(initial=0.0)), 1e-12):
            break
    return solution.astype(np.float64) * of_gene[None, :]


def indirect_discount(
    shift: np.ndarray,
    error: np.ndarray,
    sign: np.ndarray,
    position: np.ndarray,
    *,
    penalty: float | np.ndarray = 3.0,
    cut: float = 3.0,
    path_cut: float | None = None,
    path_scale: float = 2.0,
    floor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Factor :math:`(\mathrm{floor} + f)/(1 + m/\mathrm{path\_scale})` of each total effect, and the direct effects.

    :math:`f` is the share of the effect that :func:`direct_effects` leaves it, :math:`m` the strength of the
    :func:`strongest_path` beside it.

    Parameters
    ----------
    shift, error
        Total effects and their standard errors ``(regulator, gene)``.
    sign
        +1 where the perturbation raises its target, -1 where it lowers it ``(regulator,)``.
    position
        Column of each regulator among the genes, -1 where it is not measured ``(regulator,)``.
    path_cut
        Standard errors that both steps of a path must exceed; default: one more than :func:`chance_path`.
    """
    if path_cut is None:
        path_cut = 1.0 + chance_path(int((position >= 0).sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        evidence = np.nan_to_num(np.where(error > 0, shift / error, 0.0))
    paths = strongest_path(sign[:, None] * evidence, position, path_cut)
    direct = direct_effects(shift, error, position, penalty=penalty, cut=cut)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.nan_to_num(direct / shift, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    return (floor + share) / (1.0 + paths / path_scale), direct


def sparse_inverse(problem: Problem) -> Scores:
    """Direct edges; page ``docs/grn/sparse_inverse.md``."""
    options = method_options(
        problem,
        "sparse_inverse",
        penalty=3.0,
        cut=3.0,
        path_cut=None,
        path_scale=2.0,
        floor=1.0,
        composition=True,
        carriers=True,
    )
    found = total_effects(problem, composition=options.pop("composition"), carriers=options.pop("carriers"))
    position = problem.position
    if problem.prior is not None:
        options["penalty"] = options["penalty"] / (1.0 + problem.prior)
    factor, direct = indirect_discount(found.shift, found.noise, found.sign, position, **options)
    score = np.abs(np.nan_to_num(found.zscore)) * factor
    if problem.observational is not None and problem.observational.shape[0] >= 10:
        score *= 1.0 + 0.3 * np.abs(partial_regression(problem.observational, position, len(problem.genes)))
    if problem.prior is not None:
        score *= 1.0 + problem.prior
    return Scores(
        found.sign[:, None] * np.sign(found.shift) * score,
        None,
        {"effect": found.shift, "direct": direct, K.STD_ERROR: found.error},
        {"unmeasured": [r for r, p in zip(problem.regulators, position, strict=True) if p < 0]},
    )
