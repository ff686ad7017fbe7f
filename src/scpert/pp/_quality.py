"""Which cells, perturbations and genes to keep."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_obs_key, check_positive, check_seed, listing
from .._docs import shared_docs
from .._progress import progress
from ..data import Screen, iter_rows, parse, targets_of
from ..data._screen import CHUNK_ROWS, resolve_layer, resolve_scale
from ..errors import ScaleError, ScpertError
from ._labels import _SYMBOL_COLUMNS
from ._write import record, writable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["filter_perturbations", "quality_flags", "select_genes"]

logger = logging.getLogger("scpert")

#: Gene sets of the quality criteria, by symbol (any case). ``RPS6KA1`` and its like are kinases, not ribosomal.
GENE_SETS = {
    "mito": re.compile(r"^MT-", re.IGNORECASE),
    "ribo": re.compile(r"^RP[SL](?!\d+K)[\dAPX]", re.IGNORECASE),
    "hb": re.compile(r"^HB[ABDEGMQZ](\d|-.*)?$", re.IGNORECASE),
}
_SUSPICIOUS = 0.25
_EXACT_NEIGHBOURS = 60_000
_CRITERIA = ("counts_low", "genes_low", "mito_high", "ribo_high", "hb_high", "doublet")


def _symbols(adata: AnnData) -> pd.Index:
    """Gene symbols: the names, or a column of ``var`` where the names are Ensembl identifiers."""
    names = adata.var_names.astype(str)
    if len(names) and names.str.match(r"^ENS[A-Z]*G\d+").mean() > 0.5:
        for column in _SYMBOL_COLUMNS:
            if column in adata.var.columns:
                return pd.Index(adata.var[column].astype(str))
    return names


@shared_docs
def quality_flags(
    adata: AnnData,
    *,
    layer: str | None = K.COUNTS,
    n_mads: float = 3,
    key_added: str = K.QUALITY_FAIL,
    mad_scale: float = 1.0,
    batch_key: str | None = None,
    criteria: Sequence[str] | None = None,
    per_criterion: bool = False,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    r"""Flag cells of poor quality by the six criteria of CRADLE-VAE and GPO-VAE.

    A cell fails if one of these holds, with :math:`m` the median over the cells (of its batch) and
    :math:`\mathrm{MAD} = \mathrm{median} |x - m|`:

    - total counts, or number of genes detected, :math:`< m - n \cdot s \cdot \mathrm{MAD}`
    - per cent of counts from mitochondrial, ribosomal or haemoglobin genes :math:`> m + n \cdot s \cdot \mathrm{MAD}`
    - Scrublet calls it a doublet (:func:`scanpy.pp.scrublet`)

    The cells stay where they are: the quality-aware models learn from the failures. A criterion that cannot be had (no
    such genes on the panel, a MAD of zero, Scrublet without a threshold) fails no cell, and is said in the log and
    in ``uns``.

    Parameters
    ----------
    adata
        Cells by genes.
    layer
        Raw counts; where there is no layer ``"counts"``, X, if it holds counts.
    n_mads
        Number of MADs :math:`n`.
    key_added
        Column to write.
    mad_scale
        Factor :math:`s` of the MAD: 1 as published, 1.4826 for a standard deviation under normality.
    batch_key
        Column whose values have medians of their own, and doublets called apart.
    criteria
        Which of ``counts_low``, ``genes_low``, ``mito_high``, ``ribo_high``, ``hb_high``, ``doublet`` to use; by default
        all. Leave out ``hb_high`` in erythroid cells such as K562, and the percentages on small targeted panels.
    per_criterion
        Also write a column for each criterion.
    random_state
        Seed of Scrublet.
    {copy}

    Returns
    -------
    ``None``, or the copy. Writes

    ``adata.obs[key_added]``
        bool ``(cell,)``.
    ``adata.obs[key_added + "_" + criterion]``
        bool ``(cell,)``, if ``per_criterion``: ``counts_low``, ``genes_low``, ``mito_high``, ``ribo_high``, ``hb_high``,
        ``doublet``.
    ``adata.uns["scpert"][key_added]``
        The arguments and ``criteria``, a DataFrame: criterion, status, number of cells that fail.

    Raises
    ------
    ScaleError
        The matrix does not hold counts.
    MissingKeyError
        No such layer or column.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.quality_flags(adata, criteria=["counts_low", "genes_low"])
    >>> adata.obs["quality_fail"].dtype
    dtype('bool')
    """
    random_state = check_seed(random_state)
    check_positive("n_mads", n_mads)
    check_positive("mad_scale", mad_scale)
    chosen = list(_CRITERIA) if criteria is None else [check_choice("criteria", c, _CRITERIA) for c in criteria]
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ScpertError(f"The AnnData is empty: {adata.n_obs} cells, {adata.n_vars} genes.")
    if layer == K.COUNTS and layer not in adata.layers:
        layer = None  # X, if it holds counts: checked below
    layer = resolve_layer(adata, layer, K.SCALE_LOG1P if layer is None else K.SCALE_COUNTS)
    X = adata.X if layer is None else adata.layers[layer]
    resolve_scale(X, K.SCALE_COUNTS, (K.SCALE_COUNTS,), "adata.X" if layer is None else f"adata.layers[{layer!r}]")
    batch = np.zeros(adata.n_obs, dtype=np.int64)
    if batch_key is not None:
        batch = pd.factorize(check_obs_key(adata, batch_key, "batch_key").astype(str))[0]

    symbols = _symbols(adata)
    sets = {name: np.array([bool(p.match(s)) for s in symbols]) for name, p in GENE_SETS.items()}
    member = sparse.csr_matrix(np.column_stack([np.ones(adata.n_vars), *sets.values()]))
    sums = np.empty((adata.n_obs, 1 + len(sets)))
    n_genes = np.empty(adata.n_obs)
    for start, block in progress(iter_rows(X), total=-(-adata.n_obs // CHUNK_ROWS), description="Quality"):
        if not np.isfinite(block.data).all() or (len(block.data) and block.data.min() < 0):
            raise ScaleError(
                f"The counts hold NaN, infinite or negative values (between rows {start} and {start + block.shape[0]})."
            )
        rows = slice(start, start + block.shape[0])
        sums[rows] = (block.astype(np.float64) @ member).toarray()
        block.eliminate_zeros()
        n_genes[rows] = np.diff(block.indptr)
    total = sums[:, 0]
    percent = 100 * sums[:, 1:] / np.where(total > 0, total, 1)[:, None]

    fail: dict[str, np.ndarray] = {}
    status: dict[str, str] = {}
    values = {"counts_low": total, "genes_low": n_genes} | {
        f"{name}_high": percent[:, i] if present.any() else None for i, (name, present) in enumerate(sets.items())
    }
    for criterion, x in values.items():
        fail[criterion] = np.zeros(adata.n_obs, dtype=bool)
        if criterion not in chosen:
            status[criterion] = "not asked for"
            continue
        if x is None:
            status[criterion] = "not computed: no such genes are measured"
            continue
        flat = []
        for b in np.unique(batch):
            at = batch == b
            median = np.median(x[at])
            width = n_mads * mad_scale * np.median(np.abs(x[at] - median))
            if width == 0:
                flat.append(b)
                continue
            fail[criterion][at] = x[at] < median - width if criterion.endswith("low") else x[at] > median + width
        status[criterion] = (
            "computed"
            if not flat
            else f"not computed: the MAD is 0{'' if batch_key is None else f' in {len(flat)} of {batch.max() + 1} batches'}"
        )
    fail["doublet"], status["doublet"] = (
        _doublets(adata, X, batch if batch_key is not None else None, random_state)
        if "doublet" in chosen
        else (np.zeros(adata.n_obs, dtype=bool), "not asked for")
    )
    for criterion in chosen:
        if status[criterion] != "computed":
            logger.info("quality_flags: %s %s", criterion, status[criterion])
        elif fail[criterion].mean() > _SUSPICIOUS:
            logger.warning(
                "quality_flags: %s fails %.0f %% of the cells, which looks like biology or a small panel rather than "
                "failures; leave it out with criteria=.",
                criterion,
                100 * fail[criterion].mean(),
            )

    flag = np.logical_or.reduce([fail[c] for c in _CRITERIA])
    logger.info("quality_flags: %d of %d cells fail", flag.sum(), len(flag))
    adata = writable(adata, copy)
    adata.obs[key_added] = flag
    if per_criterion:
        for criterion in _CRITERIA:
            adata.obs[f"{key_added}_{criterion}"] = fail[criterion]
    table = pd.DataFrame(
        {
            "criterion": list(_CRITERIA),
            "status": [status[c] for c in _CRITERIA],
            "n_fail": [int(fail[c].sum()) for c in _CRITERIA],
        },
        index=[str(i) for i in range(len(_CRITERIA))],
    )
    record(
        adata, key_added, layer=layer or "X", n_mads=n_mads, mad_scale=mad_scale, batch_key=batch_key, criteria=table
    )
    return adata if copy else None


def _doublets(adata: AnnData, X: Any, batch: np.ndarray | None, random_state: int) -> tuple[np.ndarray, str]:
    """Scrublet's calls, and whether they could be made."""
    none = np.zeros(adata.n_obs, dtype=bool)
    if adata.n_obs < 100 or adata.n_vars < 30:
        return none, "not computed: fewer than 100 cells or 30 genes"
    import warnings

    import anndata
    import scanpy as sc

    blocks = [block for _, block in iter_rows(X)]
    work = anndata.AnnData(sparse.vstack(blocks, format="csr"))
    if batch is not None:
        work.obs["batch"] = pd.Categorical(batch.astype(str))
    size = min(adata.n_obs, adata.n_vars) if batch is None else min(int(np.bincount(batch).min()), adata.n_vars)
    problem = ""
    verbosity, sc.settings.verbosity = sc.settings.verbosity, 0
    try:
        # a small panel keeps few variable genes; some releases of pynndescent, for the approximate neighbours of large
        # data, do not fit scanpy's, and exact neighbours do
        ways = (False,) if 3 * adata.n_obs <= _EXACT_NEIGHBOURS else (None, False)
        for n_comps, approximate in [(n, way) for n in (30, 10, 5) for way in ways]:
            if n_comps >= size:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sc.pp.scrublet(  # the threshold is found below: scanpy asks scikit-image for it
                        work,
                        n_prin_comps=n_comps,
                        batch_key=None if batch is None else "batch",
                        threshold=1.0,
                        use_approx_neighbors=approximate,
                        random_state=random_state,
                        verbose=False,
                    )
                break
            except (AttributeError, ImportError, ValueError, RuntimeError, IndexError, np.linalg.LinAlgError) as error:
                problem = f"{type(error).__name__}: {error}"
    finally:
        sc.settings.verbosity = verbosity
    if "doublet_score" not in work.obs.columns:
        return none, f"not computed: Scrublet stopped ({problem})"[:200]
    score = np.asarray(work.obs["doublet_score"], dtype=float)
    runs = {"": work.uns["scrublet"]} if batch is None else work.uns["scrublet"]["batches"]
    lost = []
    for name, run in runs.items():
        at = slice(None) if batch is None else batch == int(name)
        threshold = _valley(np.asarray(run["doublet_scores_sim"]))
        if threshold is None:
            lost.append(name)
        else:
            none[at] = score[at] > threshold
    if lost:
        return none, "not computed: the scores of simulated doublets have no two modes" + (
            "" if batch is None else f" in {len(lost)} of {len(runs)} batches"
        )
    return none, "computed"


def _valley(values: np.ndarray, n_bins: int = 256, max_smooth: int = 10_000) -> float | None:
    """The minimum between the two modes of a histogram, smoothed until it has two (Prewitt and Mendelsohn); or None."""
    from scipy.ndimage import uniform_filter1d

    counts, edges = np.histogram(values, bins=n_bins)
    smooth = counts.astype(float)
    for _ in range(max_smooth):
        smooth = uniform_filter1d(smooth, 3)
        rising = np.sign(np.diff(smooth))
        turns = np.flatnonzero(rising != 0)
        peaks = [turns[i] + 1 for i in range(len(turns) - 1) if rising[turns[i]] > 0 > rising[turns[i + 1]]]
        if len(peaks) < 2:
            return None
        if len(peaks) == 2:
            low = peaks[0] + int(np.argmin(smooth[peaks[0] : peaks[1] + 1]))
            return float((edges[low] + edges[low + 1]) / 2)
    return None


# ---------------------------------------------------------------------------------------------- perturbations


@shared_docs
def filter_perturbations(
    adata: AnnData,
    *,
    min_cells: int = 25,
    min_degs: int = 0,
    max_target_expression_percentile: float | None = None,
    max_target_change: float | None = None,
    pvals_adj_cutoff: float = 0.05,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Keep perturbations with enough cells and effect, and cells in which the perturbation took: CausalBench's filters.

    In this order: perturbations with fewer than ``min_cells`` cells go; those with fewer than ``min_degs``
    differentially expressed genes; those whose target is not changed as far as ``max_target_change``; cells in which a
    target is expressed above the percentile of the controls; and once more perturbations with fewer than ``min_cells``
    cells. Controls stay. CausalBench [1]_ uses more than 50 genes (by an Anderson-Darling test; here by Welch's
    t-test with Benjamini-Hochberg correction), a change of -0.3, the 10th percentile, and 25 and 100 cells.
    The last two filters suit knock-downs and knock-outs, not activation; a target that is not measured passes them.

    Parameters
    ----------
    adata
        Cells by genes, with labels in the standard form.
    min_cells
        Fewest cells of a perturbation.
    min_degs
        Fewest genes with an adjusted p value below ``pvals_adj_cutoff`` against the controls, targets included.
    max_target_expression_percentile
        Perturbed cells whose target (each of them, in combinations) lies above this percentile (0 to 100) of its
        log1p CP10k values in the controls are dropped; ``None``: no such filter.
    max_target_change
        Largest relative change of the mean CP10k-scale expression of the targets against the controls, such as -0.3
        (30 % down or more); ``None``: no such filter.
    pvals_adj_cutoff
        See ``min_degs``.
    {labels}
    {values}
    copy
        Return the filtered copy and leave ``adata`` as it is.

    Returns
    -------
    ``None`` (``adata`` is subset in place, as by scanpy's filters), or the copy. Writes

    ``adata.uns["scpert"]["filter_perturbations"]``
        The arguments and ``perturbations``, a DataFrame with a row for each perturbation that was there:
        ``perturbation``, ``n_cells`` before and ``n_kept`` after, ``n_degs`` and ``target_change`` (NaN where not
        computed), ``dropped_for`` (empty if kept).

    Raises
    ------
    ScpertError
        No perturbation would be left, with the number that each filter drops.

    References
    ----------
    .. [1] Chevalley et al., A large-scale benchmark for network inference from single-cell perturbation data
       (CausalBench), Communications Biology 8, 412, 2025.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.filter_perturbations(adata, min_cells=10)
    >>> bool(adata.obs["perturbation"].value_counts().min() >= 10)
    True
    """
    check_positive("min_cells", min_cells, zero=True)
    check_positive("min_degs", min_degs, zero=True)
    check_fraction("pvals_adj_cutoff", pvals_adj_cutoff)
    if max_target_expression_percentile is not None:
        check_fraction("max_target_expression_percentile / 100", max_target_expression_percentile / 100)
    if adata.isbacked and not copy:
        raise ScpertError(
            "A backed AnnData cannot be filtered in place: pass copy=True, or load it with adata.to_memory()."
        )
    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    labels = screen.labels.astype(str)
    names, position, n = np.unique(labels, return_inverse=True, return_counts=True)
    table = pd.DataFrame(
        {"n_cells": n, "n_kept": n, "n_degs": np.nan, "target_change": np.nan, "dropped_for": ""}, index=names
    )
    table = table.drop(index=control)

    def drop(which: pd.Series, reason: str) -> None:
        table.loc[which & (table["dropped_for"] == ""), "dropped_for"] = reason

    drop(table["n_cells"] < min_cells, "min_cells")
    if min_degs > 0:
        table["n_degs"] = _n_degs(screen, pvals_adj_cutoff).reindex(table.index)
        drop(~(table["n_degs"] >= min_degs), "min_degs")
    column = {str(g): i for i, g in enumerate(screen.genes)}
    targets = {name: [column[t] for t in parse(name, control) if t in column] for name in table.index}
    keep = np.ones(adata.n_obs, dtype=bool)
    if max_target_change is not None or max_target_expression_percentile is not None:
        measured = np.array(sorted({c for cs in targets.values() for c in cs}), dtype=np.int64)
        unmeasured = [name for name, cs in targets.items() if len(cs) < len(parse(name, control))]
        if unmeasured:
            logger.info("filter_perturbations: targets of %s are not measured and pass", listing(unmeasured, 5))
        of_column = {c: i for i, c in enumerate(measured)}
        values = sparse.vstack([block[:, measured] for _, block in screen.chunks()], format="csc")
        if max_target_change is not None:
            linear = values.copy()
            linear.data = np.expm1(linear.data)
            member = sparse.csr_matrix((np.ones(len(position)), (position, np.arange(len(position)))))
            mean = (member @ linear).toarray() / n[:, None]
            base = mean[list(names).index(control)]
            with np.errstate(divide="ignore", invalid="ignore"):
                change = mean / base - 1
            row = {name: i for i, name in enumerate(names)}
            for name, cs in targets.items():
                if cs:
                    table.loc[name, "target_change"] = np.max(change[row[name], [of_column[c] for c in cs]])
            drop(table["target_change"] > max_target_change, "max_target_change")
        if max_target_expression_percentile is not None:
            control_rows = values[screen.is_control]
            limit = {
                c: np.percentile(control_rows[:, [i]].toarray(), max_target_expression_percentile)
                for c, i in of_column.items()
            }
            by_name = {name: np.flatnonzero(labels == name) for name in table.index}
            rows_of = values.tocsr()
            for name, cs in targets.items():
                for c in cs:
                    at = by_name[name]
                    keep[at] &= rows_of[at][:, [of_column[c]]].toarray().ravel() <= limit[c]
    kept = pd.Series(np.bincount(position, weights=keep, minlength=len(names)).astype(int), index=names)
    table["n_kept"] = kept.reindex(table.index)
    drop(table["n_kept"] < min_cells, "min_cells" if max_target_expression_percentile is None else "target_expression")
    table.loc[table["dropped_for"] != "", "n_kept"] = 0
    stay = {control, *table.index[table["dropped_for"] == ""]}
    keep &= np.isin(labels, list(stay))
    dropped = table["dropped_for"].value_counts().drop("", errors="ignore")
    said = ", ".join(f"{reason}: {k}" for reason, k in dropped.items()) or "none"
    if len(stay) == 1:
        raise ScpertError(f"No perturbation would be left of {len(table)} (dropped for {said}). Use weaker limits.")
    logger.info(
        "filter_perturbations: %d of %d perturbations and %d of %d cells stay; dropped for %s",
        len(stay) - 1,
        len(table),
        keep.sum(),
        len(keep),
        said,
    )
    if copy:
        out = adata[keep].to_memory() if adata.isbacked else adata[keep].copy()
    else:
        adata._inplace_subset_obs(keep)
        out = adata
    record(
        out,
        "filter_perturbations",
        min_cells=min_cells,
        min_degs=min_degs,
        max_target_expression_percentile=max_target_expression_percentile,
        max_target_change=max_target_change,
        pvals_adj_cutoff=pvals_adj_cutoff,
        perturbations=table.rename_axis("perturbation").reset_index().set_axis([str(i) for i in range(len(table))]),
    )
    return out if copy else None


def _welch_p(screen: Screen) -> tuple[np.ndarray, np.ndarray]:
    """Names of the groups and p values of Welch's t-test against the controls ``(group, gene)``; NaN where undefined."""
    from scipy import stats

    m = screen.moments()
    c = int(np.flatnonzero(m.groups == screen.control)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = m.var / m.n[:, None], m.var[c] / m.n[c]
        t = (m.mean - m.mean[c]) / np.sqrt(a + b)
        freedom = (a + b) ** 2 / (a**2 / (m.n[:, None] - 1) + b**2 / (m.n[c] - 1))
    return m.groups, 2 * stats.t.sf(np.abs(t), freedom)


def _n_degs(screen: Screen, cutoff: float) -> pd.Series:
    from scipy import stats

    groups, p = _welch_p(screen)
    adjusted = np.stack([stats.false_discovery_control(row) for row in np.where(np.isfinite(p), p, 1.0)])
    return pd.Series((adjusted < cutoff).sum(axis=1), index=groups.astype(str), dtype=float)


# ---------------------------------------------------------------------------------------------- genes


@shared_docs
def select_genes(
    adata: AnnData,
    n_top_genes: int,
    *,
    keep_targets: bool = True,
    subset: bool = False,
    key_added: str = "highly_variable",
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    split_key: str = K.SPLIT,
    copy: bool = False,
) -> AnnData | None:
    r"""Mark highly variable genes, and the perturbed genes with them.

    The normalised dispersion of Seurat, as in :func:`scanpy.pp.highly_variable_genes` with ``flavor="seurat"``, in one
    pass over the matrix: of counts per 10,000, :math:`d = \ln(\mathrm{var}/\mathrm{mean})` is standardised within 20
    bins of :math:`\ln(1 + \mathrm{mean})`. If the column ``split_key`` is there, training cells alone decide.

    Parameters
    ----------
    adata
        Cells by genes, with labels in the standard form.
    n_top_genes
        Number of genes by dispersion; targets come on top. If the data has no more genes than this, all are marked.
    keep_targets
        Mark every measured target of a perturbation.
    subset
        Drop the genes that are not marked.
    key_added
        Column of ``var`` to write.
    {labels}
    {values}
    split_key
        Column of the split; cells other than ``train`` are not looked at. All cells, where there is no such column.
    {copy}

    Returns
    -------
    ``None``, or the copy. Writes

    ``adata.var[key_added]``
        bool ``(gene,)``.
    ``adata.var[key_added + "_score"]``
        Normalised dispersion ``(gene,)``; NaN for a gene that no cell expresses.
    ``adata.uns["scpert"]["select_genes"]``
        The arguments and numbers of genes.

    Raises
    ------
    ScpertError, LabelError, ScaleError
        Labels or values that cannot be read.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.select_genes(adata, 10, keep_targets=False)
    >>> int(adata.var["highly_variable"].sum())
    10
    """
    check_positive("n_top_genes", n_top_genes)
    if adata.isbacked and subset and not copy:
        raise ScpertError(
            "A backed AnnData cannot be subset in place: pass copy=True, or load it with adata.to_memory()."
        )
    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        require_control=False,
    )
    use = np.ones(adata.n_obs, dtype=bool)
    if split_key in adata.obs.columns:
        use = (adata.obs[split_key].astype(str) == K.TRAIN).to_numpy()
        if use.sum() < 2:
            raise ScpertError(
                f"adata.obs[{split_key!r}] has {int(use.sum())} cells that are {K.TRAIN!r}. Make a split with scpert.pp.split, "
                "or pass split_key='' to use all cells."
            )
    total, square = np.zeros(adata.n_vars), np.zeros(adata.n_vars)
    for rows, block in progress(screen.chunks(), total=-(-adata.n_obs // CHUNK_ROWS), description="Genes"):
        block = block[use[rows]].astype(np.float64)
        block.data = np.expm1(block.data)
        total += np.asarray(block.sum(axis=0)).ravel()
        block.data **= 2
        square += np.asarray(block.sum(axis=0)).ravel()
    n = int(use.sum())
    mean = total / n
    score = _dispersion(mean, np.maximum(square - n * mean**2, 0) / (n - 1))

    order = np.lexsort((np.arange(len(score)), -np.where(np.isfinite(score), score, -np.inf)))
    marked = np.zeros(adata.n_vars, dtype=bool)
    marked[order[: int(n_top_genes)]] = True
    if n_top_genes >= adata.n_vars:
        logger.info("select_genes: all %d genes are marked (n_top_genes=%d)", adata.n_vars, n_top_genes)
    is_target = np.isin(adata.var_names.astype(str), targets_of(screen.labels, control))
    added = int((is_target & ~marked).sum()) if keep_targets else 0
    if keep_targets:
        marked |= is_target
    logger.info("select_genes: %d genes, %d of them only as targets; decided on %d cells", marked.sum(), added, n)

    adata = writable(adata, copy)
    adata.var[key_added] = marked
    adata.var[f"{key_added}_score"] = score
    record(
        adata,
        "select_genes",
        n_top_genes=int(n_top_genes),
        keep_targets=bool(keep_targets),
        n_targets_added=added,
        n_cells=n,
        split_key=split_key if split_key in adata.obs.columns else "",
    )
    if subset:
        adata._inplace_subset_var(marked)
    return adata if copy else None


def _dispersion(mean: np.ndarray, var: np.ndarray, n_bins: int = 20) -> np.ndarray:
    """Dispersion standardised within bins of the mean; a gene alone in its bin gets 1, as in scanpy."""
    expressed = mean > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.log(np.where(expressed & (var > 0), var / np.where(expressed, mean, 1), np.nan))
    frame = pd.DataFrame(
        {"bin": pd.cut(np.log1p(np.where(expressed, mean, 1e-12)), bins=n_bins, labels=False), "d": dispersion}
    )
    grouped = frame.groupby("bin")["d"]
    centre, width = grouped.transform("mean"), grouped.transform("std")
    alone = width.isna()
    score = (frame["d"] - centre.where(~alone, 0)) / width.where(~alone, centre)
    return score.where(expressed).to_numpy(dtype=float)
