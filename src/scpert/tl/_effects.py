"""Mean shift of every perturbation and gene with Welch statistics, in one streaming pass over the cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import listing
from .._docs import shared_docs
from .._progress import progress
from ..data import Screen, parse
from ..data._effects import effects_in_strata, need_controls, std_errors_of, strata_of
from ..data._screen import CHUNK_ROWS, cell_hashes
from ..errors import ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["benjamini_hochberg", "perturbation_effects"]

logger = logging.getLogger("scpert")

#: Column of ``var`` by which tables of effects can be corrected for composition.
SENSITIVITY = "sensitivity"
#: With fewer cells Welch's variance of a gene is too often near zero by chance.
_FEW_CELLS = 30


def benjamini_hochberg(pvals: np.ndarray) -> np.ndarray:
    """Adjusted p-values over all finite entries of an array of any shape; NaN stays NaN."""
    pvals = np.asarray(pvals, dtype=np.float64)
    tested = np.isfinite(pvals)
    values = pvals[tested]
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    ranked *= len(ranked)
    for start in range(0, len(ranked), 65536):  # in pieces: the ranks would be another array of this size
        piece = ranked[start : start + 65536]
        piece /= np.arange(start + 1, start + len(piece) + 1)
    np.minimum.accumulate(ranked[::-1], out=ranked[::-1])
    np.minimum(ranked, 1.0, out=ranked)
    values[order] = ranked
    del order, ranked
    out = np.full(pvals.shape, np.nan)
    out[tested] = values
    return out


@shared_docs
def perturbation_effects(
    adata: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
) -> AnnData:
    r"""Effect of each perturbation on each gene against the control cells, with Welch statistics.

    One pass over the matrix, which may be sparse, dense, backed or dask, and is never densified; beside a
    block of 2,048 cells only the sums per group are kept (two float64 arrays ``(group, gene)``).

    With :math:`m, v, n` the mean, variance and number of cells of perturbation :math:`p` or of the controls
    :math:`c`,

    .. math:: d_{pg} = m_{pg} - m_{cg}, \quad s^2_{pg} = v_{pg}/n_p + v_{cg}/n_c, \quad z_{pg} = d_{pg}/s_{pg},

    and the two-sided p-value is that of Student's t with Welch's degrees of freedom
    (`scipy.stats.ttest_ind(equal_var=False)`). With ``covariate_keys`` each cell is compared with the
    controls of its own stratum: :math:`d_{pg} = \sum_s w_{ps} (m_{psg} - m_{csg})` with
    :math:`w_{ps} = n_{ps}/n_p`, the variance of the perturbed cells pooled within strata, and
    :math:`s^2_{pg} = v_{pg}/n_p + \sum_s w_{ps}^2 v_{csg}/n_{cs}`.

    Parameters
    ----------
    adata
        Cells by genes, with labels in the standard form. It is not changed.
    {labels}
    layer, scale
        Where the values are and what they are (``"counts"``, ``"log1p"``, ``"effects"``, ``"auto"``). For
        ``"effects"`` (rows are perturbations, already relative to control) nothing is subtracted, rows of one
        label are averaged, and standard errors are those of ``layers["std_error"]``. Without that layer it is the spread
        of the gene over all perturbations (its root mean square, as most perturbations do not touch a gene), over the
        square root of the number of rows; p-values are then normal.
    library_size_key
        Column with the full library size, for small panels.
    covariate_keys
        Columns (batch, donor, cell line ...) within which cells are compared.

    Returns
    -------
    AnnData, perturbation x gene
        ``X`` mean shift, log1p CP10k; layers ``std_error``, ``zscore``, ``pvals``, ``pvals_adj``
        (Benjamini-Hochberg over the whole screen: all perturbations and genes at once); obs ``perturbation``,
        ``n_cells``, ``on_target`` (shift of the target itself, mean over targets, NaN if not measured),
        ``n_significant`` (genes with ``pvals_adj`` at most 0.05); var ``control_mean`` and, of cells, ``sensitivity`` (how far
        ``log1p`` moves per unit of a log factor: the mean of ``1 - exp(-x)`` over the controls); ``uns["effects"]``
        says how they were made, and of which cells (hashes of their names). A perturbation with one cell has a shift
        but NaN statistics (a log line says so), as has a gene that is constant in both groups at different values.

    Raises
    ------
    MissingKeyError
        If a column or layer is missing.
    LabelError
        If labels are NaN, not in the standard form, or no cell is a control.
    ScaleError
        If the values are not on the scale said, or NaN.
    ScpertError
        If a stratum with perturbed cells has fewer than two control cells.

    Notes
    -----
    A few cells that happen to agree, most often in zeros, have a variance near zero, and Welch's p-values of such genes are far too
    small, whatever the correction (the page on network inference has the error rates). A warning names perturbations with fewer than
    30 cells. :func:`scpert.tl.infer_grn` counts the variance of few cells at least as that of the controls and keeps its error rate.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> effects = scpert.tl.perturbation_effects(adata)
    >>> effects.shape[1]
    40
    """
    from anndata import AnnData

    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        allowed=K.SCALES,
    )
    perturbations = screen.perturbations
    if not perturbations:
        raise ScpertError(
            f"All {screen.n_cells} cells are labelled {control!r}: there is no perturbation to measure. "
            f"Is {perturbation_key!r} the right column (perturbation_key=)?"
        )
    if screen.scale == K.SCALE_EFFECTS:
        shift, error, n, control_mean = effects_of_table(screen, perturbations)
        freedom: np.ndarray | float = np.inf
        told = K.STD_ERROR in screen.adata.layers
        statistic = "standard errors of the table" if told else "spread over perturbations"
    else:
        statistic = "welch"
        shift, error, freedom, n, control_mean = effects_of_cells(screen, perturbations, covariate_keys)

    zscore, pvals = welch(shift, error, freedom)
    del freedom
    undefined = [p for p, bad in zip(perturbations, ~np.isfinite(zscore).any(axis=1), strict=True) if bad]
    if undefined:
        logger.warning(
            "%d perturbation(s) have no statistics (fewer than two cells, or fewer than two controls): %s.",
            len(undefined),
            listing(undefined),
        )
    few = [p for p, cells in zip(perturbations, n, strict=True) if 2 <= cells < _FEW_CELLS]
    if few and screen.scale != K.SCALE_EFFECTS:
        logger.warning(
            "%d perturbation(s) have fewer than %d cells (%s): where these happen to agree, most often in zeros, Welch's p-values are far "
            "too small, and so are the adjusted ones. scpert.tl.infer_grn keeps its error rate there.",
            len(few),
            _FEW_CELLS,
            listing(few, 5),
        )
    adjusted = benjamini_hochberg(pvals)
    position = {g: i for i, g in enumerate(screen.genes)}
    on_target = np.full(len(perturbations), np.nan)
    for row, label in enumerate(perturbations):
        own = [position[t] for t in parse(label, control) if t in position]
        if own:
            on_target[row] = shift[row, own].mean()
    obs = pd.DataFrame(
        {
            K.PERTURBATION: np.asarray(perturbations, dtype=object),
            K.N_CELLS: n,
            "on_target": on_target,
            "n_significant": (np.nan_to_num(adjusted, nan=1.0) <= 0.05).sum(axis=1),
        },
        index=pd.Index(np.asarray(perturbations, dtype=object)),
    )
    out = AnnData(X=shift, obs=obs, var=pd.DataFrame(index=screen.genes.copy()))
    out.layers[K.STD_ERROR] = error
    out.layers[K.ZSCORE] = zscore
    out.layers[K.PVALS] = pvals
    out.layers[K.PVALS_ADJ] = adjusted
    out.var["control_mean"] = control_mean
    if screen.scale != K.SCALE_EFFECTS:
        out.var[SENSITIVITY] = sensitivity(screen)
    elif cells_behind(adata) is not None and SENSITIVITY in adata.var:  # a table of such a table
        out.var[SENSITIVITY] = adata.var[SENSITIVITY].to_numpy()
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or [])
    out.uns["effects"] = {
        "statistic": statistic,
        "correction": "benjamini-hochberg over all perturbations and genes",
        "perturbation_key": perturbation_key,
        "control": control,
        "scale": screen.scale,
        "layer": screen.layer or "X",
        "library_size_key": library_size_key or "",
        "covariate_keys": np.asarray(keys, dtype=object).astype(str),
        "n_control": int(screen.is_control.sum()),
    }
    cells = cell_hashes(adata.obs_names) if screen.scale != K.SCALE_EFFECTS else cells_behind(adata)
    if cells is not None:
        out.uns["effects"]["cells"] = cells
    return out


def cells_behind(table: AnnData) -> np.ndarray | None:
    """Hashes of the cells of a table of :func:`perturbation_effects`; ``None`` of anything else, whatever ``uns["effects"]`` holds."""
    notes = table.uns.get("effects")
    cells = notes.get("cells") if isinstance(notes, Mapping) else None
    return cells if isinstance(cells, np.ndarray) and cells.dtype == np.uint64 else None


def sensitivity(screen: Screen) -> np.ndarray:
    """How far a gene's ``log1p`` moves per unit of a log factor of all genes ``(gene,)``: the mean of ``1 - exp(-x)`` over the controls."""
    controls = np.flatnonzero(screen.is_control)
    out = np.zeros(len(screen.genes))
    for start in range(0, len(controls), CHUNK_ROWS):  # all of them: which ones were drawn would depend on their order
        some = screen.rows(controls[start : start + CHUNK_ROWS])
        some.data = -np.expm1(-some.data)
        out += np.asarray(some.sum(axis=0, dtype=np.float64)).ravel() / len(controls)
    return out


def welch(shift: np.ndarray, error: np.ndarray, freedom: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """z-scores and two-sided p-values (float64) of shifts; NaN where a gene is constant at different values."""
    from scipy import special

    with np.errstate(divide="ignore", invalid="ignore"):
        zscore = shift / error
    constant = error == 0
    zscore[constant] = np.where(shift[constant] == 0, 0.0, np.nan)
    pvals = np.empty(zscore.shape)
    for row, z in enumerate(zscore):  # a row at a time: float64, whatever the shifts are, without a second array
        below = -np.abs(z, dtype=np.float64)
        pvals[row] = special.ndtr(below) if np.isscalar(freedom) else special.stdtr(freedom[row], below)
    pvals *= 2.0
    pvals[constant & (shift == 0)] = 1.0
    return zscore, pvals


def effects_of_table(screen: Screen, perturbations: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    moments = screen.moments(mask=~screen.is_control)
    order = pd.Index(moments.groups).get_indexer(pd.Index(perturbations))
    shift, n = moments.mean[order], moments.n[order]
    errors = std_errors_of(screen.adata, np.flatnonzero(~screen.is_control))
    if errors is None:
        return shift, table_spread(shift)[None, :] / np.sqrt(n)[:, None], n, np.zeros(shift.shape[1])
    row = pd.Index(perturbations).get_indexer(pd.Index(screen.labels[~screen.is_control]))
    square = np.zeros(shift.shape)
    np.add.at(square, row, errors.astype(np.float64) ** 2)
    return shift, np.sqrt(square) / n[:, None], n, np.zeros(shift.shape[1])


def table_spread(shift: np.ndarray) -> np.ndarray:
    """Root mean square of each gene over the perturbations ``(gene,)``: most of them do not touch a gene."""
    return np.sqrt(np.mean(shift**2, axis=0))


def effects_of_cells(
    screen: Screen,
    perturbations: list[str],
    covariate_keys: str | Sequence[str] | None,
    *,
    cautious: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """:func:`~scpert.data._effects.effects_in_strata` of all cells; a stratum without controls is refused."""
    strata, names = strata_of(screen.adata, covariate_keys)
    if len(names) > 1:
        need_controls(screen, strata, lambda cell: names[strata[cell]])
    total = screen.n_cells // CHUNK_ROWS + 1
    return effects_in_strata(
        screen,
        perturbations,
        strata,
        cautious=cautious,
        progress=lambda x: progress(x, total=total, description="effects", unit="block"),
    )
