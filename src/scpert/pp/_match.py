"""For each perturbed cell a control cell that it might have been."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _keys as K
from .._checks import check_choice, check_positive, check_seed, listing
from .._docs import shared_docs
from .._progress import progress
from ..data import Screen
from ..errors import MissingKeyError, ScpertError, SplitError
from ._split import _strata
from ._write import record, writable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["match_controls", "transport_plan"]

logger = logging.getLogger("scpert")

METHODS = ("ot", "nearest", "assignment", "random")
_MAX_ENTROPY = 0.8
_PCA_CELLS = 20_000


@shared_docs
def match_controls(
    adata: AnnData,
    *,
    method: str = "ot",
    key_added: str = K.MATCHED_CONTROL,
    random_state: int = 0,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    split_key: str = K.SPLIT,
    covariate_keys: str | Sequence[str] | None = None,
    use_rep: str | None = None,
    n_pcs: int = 30,
    epsilon: float = 0.05,
    pick: str = "sampled",
    max_cells: int = 512,
    copy: bool = False,
) -> AnnData | None:
    r"""Match each perturbed cell with a control cell of the same split and covariates.

    ``"ot"`` transports the cells of each perturbation to the controls: with the squared Euclidean distances :math:`C` in
    principal components, divided by their median, and uniform marginals :math:`a, b`,

    .. math:: P = \arg\min_{P 1 = a, P^\top 1 = b} \langle P, C \rangle + \epsilon \sum_{ij} P_{ij} (\ln P_{ij} - 1)

    by Sinkhorn's algorithm, stabilised in the log domain [1]_. A cell takes a control drawn from its row of :math:`P`
    (``pick="sampled"``), or the control nearest to the barycentre of its row (``"barycentric"``, which favours
    controls in the middle). The mean entropy of the rows over :math:`\ln m` (:math:`m` controls), 1 where the plan knows
    nothing, is logged and recorded; above 0.8 a warning says so. GPO-VAE's plan (Euclidean distances over 100, :math:`\epsilon = 1`)
    has 1.0000.
    ``"nearest"``: the nearest control. ``"assignment"``: one-to-one with the least sum of :math:`C`; with fewer controls than
    cells each control is used equally often (but for one). ``"random"``: any control.

    Cells and controls of a perturbation beyond ``max_cells`` are taken in random batches of at most so many.

    Parameters
    ----------
    adata
        Cells by genes, with labels in the standard form.
    method
        See above.
    key_added
        Column to write.
    random_state
        Seed of the components, the batches and the draws.
    {labels}
    {values}
    split_key
        Column of the split, matched within if it is there. The components are fitted on training cells.
    covariate_keys
        Columns (batch, cell line) to match within.
    use_rep
        Array of ``adata.obsm`` to measure distances in, instead of principal components of log1p CP10k.
    n_pcs
        Number of principal components.
    epsilon
        Entropic regularisation, in units of the median cost.
    pick
        ``"sampled"`` or ``"barycentric"``.
    max_cells
        Largest side of a cost matrix.
    {copy}

    Returns
    -------
    ``None``, or the copy. Writes

    ``adata.obs[key_added]``
        ``obs`` name of the matched control ``(cell,)``; of a control, its own.
    ``adata.uns["scpert"][key_added]``
        The arguments; ``row_entropy`` (``"ot"``), the mean over perturbed cells of the relative entropy;
        ``mean_cost``, the mean cost of the matches in units of the median cost, and ``random_cost``, that of random ones.

    Raises
    ------
    SplitError
        A split and covariate without controls, with the number of its cells.

    References
    ----------
    .. [1] Schmitzer, Stabilized sparse scaling algorithms for entropy regularized transport problems, 2019.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.match_controls(adata)
    >>> set(adata.obs.loc[adata.obs["matched_control"], "perturbation"])
    {'control'}
    """
    check_choice("method", method, METHODS)
    check_choice("pick", pick, ("sampled", "barycentric"))
    check_positive("epsilon", epsilon)
    check_positive("max_cells", max_cells)
    check_positive("n_pcs", n_pcs)
    random_state = check_seed(random_state)
    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    rng = np.random.default_rng(random_state)
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or ())
    has_split = split_key in adata.obs.columns
    within = ([split_key] if has_split else []) + keys
    strata = _strata(adata, within, codes=False) if within else np.full(adata.n_obs, "all", dtype=object)
    labels, is_control = screen.labels.astype(str), screen.is_control
    jobs: list[tuple[np.ndarray, np.ndarray]] = []  # cells of one perturbation, controls; of one stratum
    lacking = []
    for stratum in sorted(set(strata)):
        here = strata == stratum
        controls = np.flatnonzero(here & is_control)
        cells = here & ~is_control
        if cells.any() and len(controls) == 0:
            lacking.append(f"{stratum.replace(chr(31), ', ')} ({int(cells.sum())} cells)")
            continue
        jobs += [(np.flatnonzero(cells & (labels == name)), controls) for name in sorted(set(labels[cells]))]
    if lacking:
        raise SplitError(
            f"No controls to match within {', '.join(within)}: {listing(lacking)}. Split again with the covariates "
            "(scpert.pp.split(..., covariate_keys=...)), match within fewer columns, or drop these cells."
        )
    if method == "random":
        Z = np.zeros((adata.n_obs, 1))
    else:
        fit = (
            (adata.obs[split_key].astype(str) == K.TRAIN).to_numpy() if has_split else np.ones(adata.n_obs, dtype=bool)
        )
        Z = _representation(adata, screen, use_rep, int(n_pcs), fit, rng)

    match = np.arange(adata.n_obs)
    entropy, cost, chance, n_matched = 0.0, 0.0, 0.0, 0
    batches = [b for cells, controls in jobs for b in _batches(cells, controls, int(max_cells), rng)]
    for cells, controls in progress(batches, total=len(batches), description="Matching", unit="batch"):
        if method == "random":
            match[cells] = rng.choice(controls, len(cells))
            continue
        C, unit = _cost(Z[cells], Z[controls])
        if method == "nearest":
            chosen = C.argmin(axis=1)
        elif method == "assignment":
            chosen = _assign(C)
        else:
            P = transport_plan(C, epsilon)
            entropy += float(_relative_entropy(P).sum())
            if pick == "sampled":
                chosen = _draw(P, rng)
            else:
                centre = P @ Z[controls]
                chosen = _cost(centre, Z[controls])[0].argmin(axis=1)
        match[cells] = controls[chosen]
        cost += float(C[np.arange(len(cells)), chosen].sum())
        chance += float(C.mean(axis=1).sum())
        n_matched += len(cells)

    found: dict[str, Any] = {}
    if n_matched:
        found = {"mean_cost": cost / n_matched, "random_cost": chance / n_matched}
    if method == "ot" and n_matched:
        found["row_entropy"] = entropy / n_matched
        message = "match_controls: relative row entropy of the plans %.2f (1: the plan knows nothing), cost of the matches %.2f against %.2f at random"
        values = (found["row_entropy"], found["mean_cost"], found["random_cost"])
        if found["row_entropy"] > _MAX_ENTROPY:
            logger.warning(message + "; use a smaller epsilon, more genes, or method='nearest'", *values)
        else:
            logger.info(message, *values)
    adata = writable(adata, copy)
    adata.obs[key_added] = np.asarray(adata.obs_names, dtype=object)[match].astype(str).astype(object)
    record(
        adata,
        key_added,
        method=method,
        within=within or None,
        random_state=random_state,
        use_rep=use_rep or "",
        n_pcs=Z.shape[1],
        epsilon=float(epsilon),
        pick=pick,
        max_cells=int(max_cells),
        **found,
    )
    return adata if copy else None


def _representation(
    adata: AnnData, screen: Screen, use_rep: str | None, n_pcs: int, fit: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Coordinates of the cells ``(cell, dim)``."""
    if use_rep is not None:
        if use_rep not in adata.obsm:
            raise MissingKeyError(
                f"use_rep={use_rep!r} is not in adata.obsm, which has {listing(adata.obsm.keys()) or '(nothing)'}."
            )
        Z = np.asarray(adata.obsm[use_rep], dtype=np.float64)
        if not np.isfinite(Z).all():
            raise ScpertError(f"adata.obsm[{use_rep!r}] holds NaN or infinite values.")
        return Z
    from sklearn.decomposition import PCA

    at = np.flatnonzero(fit)
    if len(at) > _PCA_CELLS:
        at = np.sort(rng.choice(at, _PCA_CELLS, replace=False))
    n_pcs = max(1, min(n_pcs, len(at) - 1, screen.n_cells - 1, adata.n_vars - 1))
    block = screen.rows(at)
    seed = int(rng.integers(2**31 - 1))
    if min(block.shape) < 3 or n_pcs >= min(block.shape) - 1:  # too small for Lanczos
        pca = PCA(n_pcs, svd_solver="full").fit(block.toarray())
    else:
        pca = PCA(n_pcs, svd_solver="arpack", random_state=seed).fit(block)
    offset = pca.mean_ @ pca.components_.T
    Z = np.empty((screen.n_cells, n_pcs))
    for rows, chunk in screen.chunks():
        Z[rows] = chunk @ pca.components_.T - offset
    return Z


def _batches(
    cells: np.ndarray, controls: np.ndarray, size: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (cells, controls) of at most ``size`` each; within them one batch of cells meets one draw of controls."""
    if len(cells) <= size and len(controls) <= size:
        return [(cells, controls)]
    parts = np.array_split(rng.permutation(cells), -(-len(cells) // size))
    return [
        (p, np.sort(rng.choice(controls, size, replace=False)) if len(controls) > size else controls) for p in parts
    ]


def _cost(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """Squared Euclidean distances ``(a, b)`` in units of their median."""
    from scipy.spatial.distance import cdist

    C = cdist(a, b, "sqeuclidean")
    unit = float(np.median(C))
    if unit <= 0:
        unit = float(C.mean()) or 1.0
    return C / unit, unit


def transport_plan(C: np.ndarray, epsilon: float) -> np.ndarray:
    """Entropic transport plan with uniform marginals, its rows scaled to sum to 1: ``(cell, control)``.

    Parameters
    ----------
    C
        Costs ``(cell, control)``.
    epsilon
        Entropic regularisation, in the unit of the costs.
    """
    import warnings

    import ot

    n, m = C.shape
    if m == 1:
        return np.ones((n, 1))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        P = ot.bregman.sinkhorn_stabilized(
            np.full(n, 1 / n), np.full(m, 1 / m), C, epsilon, numItermax=1000, tau=1e5, stopThr=1e-5, warn=False
        )
        if not np.isfinite(P).all() or (P.sum(axis=1) <= 0).any():
            P = ot.bregman.sinkhorn_log(
                np.full(n, 1 / n), np.full(m, 1 / m), C, epsilon, numItermax=1000, stopThr=1e-5, warn=False
            )
    return P / P.sum(axis=1, keepdims=True)


def _relative_entropy(P: np.ndarray) -> np.ndarray:
    """Entropy of each row over ``ln m``: 0 where a cell goes to one control, 1 where to all alike."""
    m = P.shape[1]
    if m == 1:
        return np.zeros(len(P))
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(P > 0, P * np.log(P), 0.0).sum(axis=1) / np.log(m)


def _draw(P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column for each row, with the probabilities of the row."""
    cumulative = np.cumsum(P, axis=1)
    u = rng.random(len(P)) * cumulative[:, -1]
    return np.minimum((cumulative <= u[:, None]).sum(axis=1), P.shape[1] - 1)


def _assign(C: np.ndarray) -> np.ndarray:
    """Least-cost assignment of rows to columns; every column is used equally often, but for one."""
    from scipy.optimize import linear_sum_assignment

    n, m = C.shape
    times = -(-n // m)
    slots = np.tile(C, (1, times))
    slots[:, : m * (n // m)] -= C.max() + 1  # these must be filled before the last, partial round
    rows, columns = linear_sum_assignment(slots)
    out = np.empty(n, dtype=np.int64)
    out[rows] = columns % m
    return out
