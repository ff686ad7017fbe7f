"""Nets of genes: shared annotations, co-expression in training cells, shared pathways."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_fraction, check_net, check_obs_key, check_unique_names, check_whole, listing
from .._progress import progress
from ..data._effects import strata_of
from ..data._screen import iter_rows, log1p_cp10k, resolve_layer, resolve_scale
from ..errors import ScaleError, ScpertError, SplitError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["coexpression_net", "pathway_mask", "similarity_net"]

logger = logging.getLogger("scpert")

_BLOCK = 1024  # genes handled at a time: bounds the memory of the products


def _check_top_k(top_k: int | None) -> int | None:
    if top_k is None:
        return None
    return check_whole("top_k", top_k)


def _net(source: Any, target: Any, weight: Any) -> pd.DataFrame:
    net = pd.DataFrame({K.SOURCE: source, K.TARGET: target, K.WEIGHT: np.asarray(weight, dtype=np.float64)})
    return net.sort_values([K.SOURCE, K.TARGET], ignore_index=True)


def _strongest(score: np.ndarray, weight: np.ndarray, start: int, threshold: float, top_k: int | None) -> tuple:
    """``(row, column, weight)`` of each row's ``top_k`` highest scores that reach ``threshold``; ties by column."""
    rows = np.arange(len(score))
    score[rows, start + rows] = -1.0  # a gene is not its own neighbour
    if top_k is not None and top_k < score.shape[1]:
        kth = -np.partition(-score, top_k - 1, axis=1)[:, top_k - 1]
        row, col = np.nonzero((score >= kth[:, None]) & (score >= threshold))
        order = np.lexsort((col, -score[row, col], row))
        row, col = row[order], col[order]
        first = np.searchsorted(row, np.arange(len(score)))
        keep = np.arange(len(row)) - first[row] < top_k
        row, col = row[keep], col[keep]
    else:
        row, col = np.nonzero(score >= threshold)
    return start + row, col, weight[row, col]


def similarity_net(
    annotations: pd.DataFrame,
    *,
    top_k: int | None = 20,
    threshold: float = 0.1,
    genes: Iterable[str] | None = None,
) -> pd.DataFrame:
    r"""Genes that share annotations: the graph of perturbations of GEARS and BioDSNN.

    The weight of two genes with term sets :math:`N_u` and :math:`N_v` is Jaccard's

    .. math:: J_{uv} = |N_u \cap N_v| / |N_u \cup N_v|

    and each gene (``target``) keeps the ``top_k`` genes (``source``) that are most similar to it.

    Parameters
    ----------
    annotations
        Columns ``gene`` and ``term``: :func:`scpert.resources.gene_ontology`, or
        ``Reactome.to_annotations()``.
    top_k
        Neighbours kept per gene; of equals the alphabetically first. ``None``: all.
    threshold
        Least similarity, above 0 and at most 1.
    genes
        Only these genes (perturbed and measured ones, for example); by default all annotated ones.

    Returns
    -------
    Net ``source``, ``target``, ``weight`` without self loops; empty if no pair reaches the threshold.

    Raises
    ------
    ScpertError
        If the columns are missing or no gene is left.

    Notes
    -----
    Sparse products of blocks of genes: time grows with the sum over terms of the squared number of their genes,
    memory with the block, not with the square of the genes.

    Examples
    --------
    >>> import pandas as pd
    >>> from scpert.pp import similarity_net
    >>> go = pd.DataFrame({"gene": ["A", "A", "B", "B", "C"], "term": ["x", "y", "x", "y", "y"]})
    >>> similarity_net(go, top_k=1).values.tolist()
    [['A', 'B', 1.0], ['A', 'C', 0.5], ['B', 'A', 1.0]]
    """
    top_k = _check_top_k(top_k)
    check_fraction("threshold", threshold)
    if threshold == 0:
        raise ScpertError("threshold=0: give a number above 0, otherwise every pair of genes is an edge.")
    if not isinstance(annotations, pd.DataFrame) or not {"gene", "term"} <= set(annotations.columns):
        got = (
            f"a DataFrame with the columns {listing(annotations.columns, 10)}"
            if isinstance(annotations, pd.DataFrame)
            else type(annotations).__name__
        )
        raise ScpertError(f"annotations must be a DataFrame with the columns gene and term; got {got}. Rename yours.")
    if annotations[["gene", "term"]].isna().to_numpy().any():
        raise ScpertError(
            "annotations has NaN in gene or term. Drop these rows (dropna), or read with keep_default_na=False."
        )
    table = annotations[["gene", "term"]].astype(str).apply(lambda column: column.str.strip())
    table = table[(table["gene"] != "") & (table["term"] != "")]  # no annotation
    if genes is not None:
        wanted = {genes} if isinstance(genes, str) else {str(g) for g in genes}
        table = table[table["gene"].isin(wanted)]
        if table.empty:
            raise ScpertError(
                f"None of the {len(wanted)} genes is annotated: genes has {listing(sorted(wanted), 4)}, annotations "
                f"{listing(annotations['gene'].astype(str).unique(), 4)}. Bring both to the same kind of gene names."
            )
    if table.empty:
        raise ScpertError("annotations is empty.")
    codes, names = pd.factorize(table["gene"], sort=True)
    terms, term_names = pd.factorize(table["term"])
    member = sparse.csr_matrix(
        (np.ones(len(codes), dtype=np.float32), (codes, terms)), shape=(len(names), len(term_names))
    )
    member.sum_duplicates()
    member.data[:] = 1.0
    size = np.diff(member.indptr).astype(np.float32)
    # Terms of many genes cost most in a sparse product and least in a dense one: split them.
    common = np.asarray(member.sum(axis=0)).ravel() > max(64, len(names) / 64)
    dense = member[:, np.flatnonzero(common)].toarray()
    rare = member[:, np.flatnonzero(~common)].tocsr()
    rare_t = rare.T.tocsr()
    parts = []
    starts = range(0, len(names), _BLOCK)
    for start in progress(starts, total=len(starts), description="shared annotations", unit="block"):
        stop = min(start + _BLOCK, len(names))
        shared = dense[start:stop] @ dense.T
        few = (rare[start:stop] @ rare_t).tocoo()
        shared[few.row, few.col] += few.data
        union = size[start:stop, None] + size[None, :]
        union -= shared
        np.divide(shared, union, out=shared)
        parts.append(_strongest(shared, shared, start, float(np.float32(threshold)), top_k))
    row, col, weight = (np.concatenate(x) for x in zip(*parts, strict=True))
    gene_names = np.asarray(names, dtype=object)
    net = _net(gene_names[col], gene_names[row], weight)
    net.attrs = dict(annotations.attrs)
    return net


def coexpression_net(
    adata: AnnData,
    *,
    threshold: float = 0.4,
    top_k: int | None = 20,
    split_key: str | None = "split",
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """Genes that are expressed together in the training cells: the graph of genes of GEARS and BioDSNN.

    The weight is Pearson's r (signed) of two genes' log1p CP10k values over the training cells; each gene (``target``)
    keeps the ``top_k`` genes (``source``) of the highest ``|r|``.

    Parameters
    ----------
    adata
        Cells by genes.
    threshold
        Least ``|r|``.
    top_k
        Neighbours kept per gene; ``None``: all.
    split_key
        Column of ``obs``: only cells that are ``"train"`` there count. If it is not there, or ``None``, all cells count
        (a log line says so).
    layer, scale, library_size_key
        Where the values are, what they are, and the column with the full library size: as in every model.
    covariate_keys
        Columns (batch, donor ...) within which cells are correlated: the means of each stratum are taken out, so that genes which a
        batch shifts together are no pair for that.

    Returns
    -------
    Net ``source``, ``target``, ``weight`` without self loops; empty if no pair reaches the threshold. Genes that do not
    vary have no edge.

    Raises
    ------
    SplitError
        If the split column has no (or one) training cell.

    Notes
    -----
    One pass over the matrix in chunks; the memory beside it is two (gene, gene) matrices.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> net = scpert.pp.coexpression_net(adata, threshold=0.2)
    >>> list(net.columns)
    ['source', 'target', 'weight']
    """
    check_fraction("threshold", threshold)
    top_k = _check_top_k(top_k)
    check_unique_names(adata)
    name = resolve_layer(adata, layer, scale)
    X = adata.X if name is None else adata.layers[name]
    where = "adata.X" if name is None else f"adata.layers[{name!r}]"
    scale = resolve_scale(X, scale, K.SCALES, where)
    use = np.ones(adata.n_obs, dtype=bool)
    if split_key is not None and split_key in adata.obs:
        use = (adata.obs[split_key].astype(str) == K.TRAIN).to_numpy()
        if use.sum() < 2:
            raise SplitError(
                f"adata.obs[{split_key!r}] has {int(use.sum())} training cells (value {K.TRAIN!r}; it has "
                f"{listing(adata.obs[split_key].astype(str).unique(), 6)}). Make a split with scpert.pp.split, or pass "
                "split_key=None to use all cells."
            )
    else:
        logger.info(
            "coexpression_net: no column %r in adata.obs, all %d cells count as training cells", split_key, adata.n_obs
        )
        if adata.n_obs < 2:
            raise SplitError("Co-expression needs at least two cells.")
    sizes = None
    if library_size_key is not None and scale == K.SCALE_COUNTS:
        column = check_obs_key(adata, library_size_key, "library_size_key")
        sizes = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    n_genes = adata.n_vars
    gram = np.zeros((n_genes, n_genes))
    strata, strata_names = strata_of(adata, covariate_keys)
    total = np.zeros((len(strata_names), n_genes))
    shift: np.ndarray | None = None
    chunk = 2048
    n_chunks = -(-adata.n_obs // chunk)
    for start, block in progress(iter_rows(X, chunk), total=n_chunks, description="co-expression", unit="chunk"):
        keep = np.flatnonzero(use[start : start + block.shape[0]])
        if len(keep) == 0:
            continue
        if not np.isfinite(block.data).all():
            raise ScaleError(f"{where} holds NaN or infinite values. Find their origin first.")
        block = block[keep]
        if scale == K.SCALE_COUNTS:
            size = np.asarray(block.sum(axis=1)).ravel() if sizes is None else sizes[start + keep]
            if not (np.isfinite(size) & (size > 0)).all():
                raise ScpertError(
                    "A training cell has no counts (or no library size). Drop empty cells with "
                    "sc.pp.filter_cells(adata, min_counts=1)."
                )
            block = log1p_cp10k(block, size)
        values = block.toarray().astype(np.float64 if n_genes <= 2000 else np.float32, copy=False)
        if shift is None:  # values near their mean keep the sums of squares exact
            shift = values.mean(axis=0)
        values -= shift
        gram += values.T @ values
        for s in np.unique(strata[start + keep]):
            total[s] += values[strata[start + keep] == s].sum(axis=0, dtype=np.float64)
    n = int(use.sum())
    cells = np.bincount(strata[use], minlength=len(total))
    before = np.diag(gram).copy()
    gram -= total.T @ (total / np.maximum(cells, 1)[:, None])
    deviation = np.sqrt(np.maximum(np.diag(gram), 0.0))
    varies = (deviation > 1e-6 * np.sqrt(n)) & (deviation**2 > 1e-5 * before)  # what is left is not rounding alone
    inverse = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
    gram *= inverse[:, None]
    gram *= inverse[None, :]
    np.clip(gram, -1.0, 1.0, out=gram)
    parts = [
        _strongest(np.abs(gram[s : s + _BLOCK]), gram[s : s + _BLOCK], s, max(threshold, np.finfo(float).tiny), top_k)
        for s in range(0, n_genes, _BLOCK)
    ]
    row, col, weight = (np.concatenate(x) for x in zip(*parts, strict=True))
    names = adata.var_names.astype(str).to_numpy(dtype=object)
    return _net(names[col], names[row], weight)


def pathway_mask(
    adata: AnnData | Sequence[str],
    reactome: Any,
    *,
    fallback_net: pd.DataFrame | None = None,
    level: int | None = None,
) -> pd.DataFrame:
    """Pairs of measured genes between which BioDSNN's attention is allowed.

    Two genes are a pair if they share a Reactome pathway. A gene that Reactome does not hold is paired by
    ``fallback_net`` instead. Every gene is paired with itself.

    Parameters
    ----------
    adata
        The measured genes are its ``var_names``; or a list of genes.
    reactome
        A :class:`scpert.resources.Reactome`.
    fallback_net
        Net of genes, usually :func:`coexpression_net`: an edge counts, in both directions, where Reactome holds not
        both of its genes.
    level
        Only pathways of this level. The top pathways hold thousands of genes, so that over all human genes every fifth
        pair shares some pathway; ``level=1``, the lowest pathways, leaves one pair in a hundred. ``None``: all levels.

    Returns
    -------
    Net ``source``, ``target``, ``weight`` (1), symmetric, self pairs included; ``attrs["outside"]`` names the genes that Reactome
    does not hold.

    Raises
    ------
    ScpertError
        If no two different genes are paired: other gene names, usually.

    Examples
    --------
    >>> import scpert
    >>> reactome = scpert.resources.Reactome({"P": ["A", "B"], "Q": ["B", "C"]})
    >>> mask = scpert.pp.pathway_mask(["A", "B", "D"], reactome)
    >>> mask.values.tolist()
    [['A', 'A', 1.0], ['A', 'B', 1.0], ['B', 'A', 1.0], ['B', 'B', 1.0], ['D', 'D', 1.0]]
    """
    if hasattr(adata, "var_names"):
        check_unique_names(adata)  # type: ignore[arg-type]
        names = np.asarray(adata.var_names, dtype=object)
    else:
        names = np.asarray(list(dict.fromkeys(str(g) for g in adata)), dtype=object)
    if not hasattr(reactome, "pathways"):
        raise ScpertError(
            f"reactome must be a scpert.resources.Reactome (scpert.resources.reactome(...)); got {type(reactome).__name__}."
        )
    position = {str(g): i for i, g in enumerate(names)}
    n = len(names)
    rows: list[int] = []
    cols: list[int] = []
    number: dict[str, int] = {}
    for gene, i in position.items():
        for pathway in reactome.pathways(gene, level):
            rows.append(i)
            cols.append(number.setdefault(pathway, len(number)))
    member = sparse.csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, cols)), shape=(n, max(1, len(number))))
    allowed = (member @ member.T).astype(bool).tocoo()
    pairs = [np.column_stack([allowed.row, allowed.col]), np.column_stack([np.arange(n), np.arange(n)])]
    held = np.array([g in reactome for g in names], dtype=bool)
    if fallback_net is not None:
        net = check_net(fallback_net, "fallback_net", known=position)
        source = net[K.SOURCE].map(position).to_numpy(dtype=int)
        target = net[K.TARGET].map(position).to_numpy(dtype=int)
        outside = ~(held[source] & held[target])
        source, target = source[outside], target[outside]
        pairs += [np.column_stack([source, target]), np.column_stack([target, source])]
    edges = np.unique(np.concatenate(pairs).astype(np.int64), axis=0)
    if len(edges) == n:
        raise ScpertError(
            f"The mask is empty: no two of the {n} genes (such as {listing(names, 4)}) share a pathway"
            f"{'' if level is None else f' of level {level}'}{' or an edge of fallback_net' if fallback_net is not None else ''}. "
            f"Reactome has genes such as {listing(reactome.all_genes, 4)}: bring both to the same kind of gene names, or "
            "pass fallback_net=scpert.pp.coexpression_net(adata)."
        )
    share = (len(edges) - n) / max(1, n * (n - 1))
    if share > 0.1 and n > 1000:
        logger.info(
            "pathway_mask: %.0f %% of the gene pairs are allowed (%d); level=1 leaves the lowest pathways only",
            100 * share,
            len(edges),
        )
    net = _net(names[edges[:, 0]], names[edges[:, 1]], np.ones(len(edges)))
    net.attrs["outside"] = [str(g) for g, inside in zip(names, held, strict=True) if not inside]
    return net
