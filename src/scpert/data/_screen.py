"""A checked view on a screen: labels, scale and streaming access to its values.

Everything in scpert that reads cells goes through :class:`Screen`. It never densifies the matrix:
rows come in chunks, as CSR, on the scale asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_unique_names, listing
from ..errors import LabelError, MissingKeyError, ScaleError, ScpertError
from ._perturbation import check_labels

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Moments", "ScaleEvidence", "Screen", "iter_rows", "log1p_cp10k", "read_rows", "scale_evidence"]

logger = logging.getLogger("scpert")

CHUNK_ROWS = 2048
_SAMPLE_ROWS = 2000


# ---------------------------------------------------------------------------------------------- matrices


def _as_csr(block: Any) -> sparse.csr_matrix:
    if hasattr(block, "compute"):  # dask
        block = block.compute()
    if hasattr(block, "to_memory"):  # anndata's backed sparse data set
        block = block.to_memory()
    if not sparse.issparse(block):
        block = np.asarray(block)
        if block.dtype == object or not np.issubdtype(block.dtype, np.number) and block.dtype != bool:
            raise ScaleError(f"The matrix holds {block.dtype}, not numbers.")
        block = sparse.csr_matrix(block.astype(_safe_dtype(block.dtype), copy=False))
    out = block.tocsr()
    if not out.has_canonical_format:  # entries that are to be added up would be taken one by one
        out = out.copy()
        out.sum_duplicates()
    dtype = _safe_dtype(out.dtype)
    return sparse.csr_matrix((out.data.astype(dtype, copy=False), out.indices, out.indptr), shape=out.shape)


def _safe_dtype(dtype: np.dtype) -> type:
    # float16 overflows at 65,504 and integers wrap: all arithmetic is done in float32 or float64.
    return np.float64 if dtype == np.float64 else np.float32


def iter_rows(X: Any, chunk: int = CHUNK_ROWS) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield ``(first row, CSR block)`` over a matrix of any kind.

    Sparse, dense, backed (h5py, zarr) and dask matrices are read in contiguous blocks, so that no more than
    ``chunk`` rows are ever in memory beside the matrix itself. A CSC matrix in memory is converted once.
    """
    if sparse.issparse(X) and X.format != "csr":
        X = X.tocsr()
    for start in range(0, X.shape[0], chunk):
        yield start, _as_csr(X[start : start + chunk])


def read_rows(X: Any, index: np.ndarray, chunk: int = CHUNK_ROWS) -> sparse.csr_matrix:
    """Rows ``index`` (in that order) of a matrix of any kind, as CSR."""
    index = np.asarray(index)
    if index.dtype == bool:
        index = np.flatnonzero(index)
    if sparse.issparse(X) or isinstance(X, np.ndarray):
        if sparse.issparse(X) and X.format != "csr":
            X = X.tocsr()
        return _as_csr(X[index])
    distinct, inverse = np.unique(index, return_inverse=True)  # backed matrices want sorted, distinct rows
    if len(distinct) == 0:
        return sparse.csr_matrix((0, X.shape[1]), dtype=np.float32)
    parts = [_as_csr(X[distinct[s : s + chunk]]) for s in range(0, len(distinct), chunk)]
    return sparse.vstack(parts, format="csr")[inverse.reshape(-1)]


def log1p_cp10k(counts: sparse.csr_matrix, library_size: np.ndarray) -> sparse.csr_matrix:
    """Natural ``log1p`` of counts per 10,000; a new matrix, zeros stay zeros.

    Parameters
    ----------
    counts
        Counts, CSR ``(cell, gene)``.
    library_size
        Total counts of each cell ``(cell,)``, all above zero.
    """
    factor = (K.TARGET_SUM / np.asarray(library_size, dtype=np.float64)).astype(counts.dtype)
    data = np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr)))
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


# ---------------------------------------------------------------------------------------------- scale


@dataclass(frozen=True)
class ScaleEvidence:
    """What a sample of rows says about the scale of a matrix."""

    minimum: float
    maximum: float
    integers: float  # share of the stored non-zero values that are integers
    row_sum_cv: float  # coefficient of variation of row sums
    expm1_sum_cv: float  # the same of expm1(values), NaN if it overflows
    expm1_sum: float  # their median
    finite: bool

    @property
    def scale(self) -> str | None:
        """``"counts"``, ``"log1p"``, ``"effects"`` or ``None`` where the evidence is ambiguous."""
        if not self.finite:
            return None
        if self.minimum < 0:
            return K.SCALE_EFFECTS
        if self.integers == 1.0:
            return K.SCALE_COUNTS
        if self.maximum > 20:
            return None  # too large for logs, no integers: normalised but not logged, or corrected counts
        if self.integers > 0.9 or (self.row_sum_cv < 0.01 and not self.expm1_sum_cv < 0.01):
            return None
        return K.SCALE_LOG1P

    def __str__(self) -> str:
        return (
            f"{100 * self.integers:.0f} % of the non-zero values are integers, minimum {self.minimum:.4g}, maximum "
            f"{self.maximum:.4g}, row sums vary by {100 * self.row_sum_cv:.0f} %, sums of expm1 by "
            f"{100 * self.expm1_sum_cv:.0f} % (median {self.expm1_sum:.4g})"
        )


def scale_evidence(X: Any) -> ScaleEvidence:
    """Look at up to 2,000 rows spread over the matrix."""
    n = X.shape[0]
    if n == 0 or X.shape[1] == 0:
        raise ScpertError(f"The matrix is empty: shape {tuple(X.shape)}.")
    block = read_rows(X, np.unique(np.linspace(0, n - 1, min(n, _SAMPLE_ROWS)).astype(int)))
    data = block.data[block.data != 0].astype(np.float64)
    if len(data) == 0:
        raise ScpertError("All values looked at are zero. Is the right layer named (layer=)?")
    finite = bool(np.isfinite(data).all())
    data = data[np.isfinite(data)] if not finite else data

    def variation(values: np.ndarray) -> tuple[float, float]:
        values = values[values > 0]
        return (float(np.std(values) / np.mean(values)), float(np.median(values))) if len(values) else (np.nan, np.nan)

    top = float(data.max()) if len(data) else np.nan
    expm1_cv, expm1_median = np.nan, np.nan
    if finite and top < 50:
        expm1_cv, expm1_median = variation(np.asarray(block.expm1().sum(axis=1)).ravel())
    low = float(min(data.min(), 0.0)) if len(data) else np.nan
    return ScaleEvidence(
        minimum=low,
        maximum=top,
        integers=float(np.mean(data == np.rint(data))) if len(data) else np.nan,
        row_sum_cv=variation(np.asarray(block.sum(axis=1)).ravel())[0],
        expm1_sum_cv=expm1_cv,
        expm1_sum=expm1_median,
        finite=finite,
    )


def _named_layers(adata: AnnData) -> list[str]:
    return [str(name) for name in adata.layers if name is not None]  # newer anndata lists X under None


def resolve_layer(adata: AnnData, layer: str | None, scale: str = K.SCALE_AUTO) -> str | None:
    """The layer to read: the one named; else ``"counts"`` if it is there and counts may be read; else X (``None``)."""
    if layer is not None:
        if layer not in adata.layers:
            raise MissingKeyError(
                f"layer={layer!r} is not in adata.layers, which has {listing(_named_layers(adata)) or '(none)'}. "
                "Leave layer=None to read adata.layers['counts'] or adata.X."
            )
        return layer
    if scale in (K.SCALE_AUTO, K.SCALE_COUNTS) and K.COUNTS in adata.layers:
        return K.COUNTS
    if adata.X is None:
        raise MissingKeyError(f"adata.X is empty: name a layer= ({listing(_named_layers(adata)) or 'there are none'}).")
    return None


def resolve_scale(X: Any, scale: str, allowed: tuple[str, ...], where: str) -> str:
    """The scale of a matrix, decided by evidence and checked against what the caller says and allows."""
    check_choice("scale", scale, (K.SCALE_AUTO, *K.SCALES))
    evidence = scale_evidence(X)
    if not evidence.finite:
        raise ScaleError(
            f"{where} holds NaN or infinite values. Find their origin; scpert does not replace them "
            "(np.isfinite tells where they are)."
        )
    found = evidence.scale
    if scale == K.SCALE_AUTO:
        if found is None or (found == K.SCALE_EFFECTS and K.SCALE_EFFECTS not in allowed):
            raise ScaleError(
                f"Cannot tell whether {where} holds counts or log1p values: {evidence}. "
                f"Say which: scale= one of {listing(allowed)}, or name the right layer=."
            )
        if found not in allowed:
            raise ScaleError(_mismatch(where, found, " or ".join(allowed), evidence))
        logger.info("%s: taken as %s (%s)", where, found, evidence)
        return found
    if scale not in allowed:
        raise ScaleError(f"scale={scale!r} is not possible here: allowed are {listing(allowed)}.")
    if scale == K.SCALE_COUNTS and (evidence.minimum < 0 or evidence.integers < 1.0):
        raise ScaleError(_mismatch(where, found, K.SCALE_COUNTS, evidence))
    if scale == K.SCALE_LOG1P and (
        evidence.minimum < 0 or evidence.maximum > 50 or (evidence.integers == 1.0 and evidence.maximum > 1)
    ):
        raise ScaleError(_mismatch(where, found, K.SCALE_LOG1P, evidence))
    return scale


def _mismatch(where: str, found: str | None, wanted: str, evidence: ScaleEvidence) -> str:
    looks = {
        K.SCALE_COUNTS: "raw counts",
        K.SCALE_LOG1P: "log-transformed values",
        K.SCALE_EFFECTS: "effects (there are negative values)",
        None: "neither counts nor log1p values",
    }[found]
    cure = {
        K.SCALE_COUNTS: "Keep the raw counts in adata.layers['counts'] (before normalising), or name their layer=.",
        K.SCALE_LOG1P: "Use sc.pp.normalize_total(adata, target_sum=1e4); sc.pp.log1p(adata), or scale='counts'.",
        K.SCALE_EFFECTS: "Name scale='effects' only for tables of effects.",
    }.get(wanted, f"Name the right layer= or scale= ({wanted}).")
    return f"{where} was to hold {wanted}, but looks like {looks}: {evidence}. {cure}"


# ---------------------------------------------------------------------------------------------- screen


@dataclass(frozen=True)
class Moments:
    """Per-group sums over cells of log1p CP10k values (or effects).

    Attributes
    ----------
    groups
        Names, ``(group,)``.
    n
        Cells per group, ``(group,)``.
    mean, var
        ``(group, gene)``; the variance has ``n - 1`` in the denominator and is NaN for one cell.
    """

    groups: np.ndarray
    n: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Screen:
    """A checked, read-only view on an AnnData with perturbation labels.

    Parameters
    ----------
    adata
        Cells by genes; X or a layer holds counts, log1p CP10k values or effects.
    perturbation_key, control
        Column of the labels, and the label of the control cells.
    layer, scale
        Where the values are and what they are: see :func:`resolve_layer` and :func:`resolve_scale`.
    library_size_key
        Column with the full library size, for small panels; by default the row sums.
    allowed
        Scales that the caller can use.
    require_control
        Whether control cells must be there (never for effects).
    """

    def __init__(
        self,
        adata: AnnData,
        *,
        perturbation_key: str = K.PERTURBATION,
        control: str = K.CONTROL,
        layer: str | None = None,
        scale: str = K.SCALE_AUTO,
        library_size_key: str | None = None,
        allowed: tuple[str, ...] = (K.SCALE_COUNTS, K.SCALE_LOG1P),
        require_control: bool = True,
    ):
        if adata.n_obs == 0 or adata.n_vars == 0:
            raise ScpertError(f"The AnnData is empty: {adata.n_obs} cells, {adata.n_vars} genes.")
        check_unique_names(adata)
        self.adata = adata
        self.perturbation_key = perturbation_key
        self.control = control
        series = check_obs_key(adata, perturbation_key, "perturbation_key")
        self.layer = resolve_layer(adata, layer, scale)
        where = "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"
        self.where = where
        self.scale = resolve_scale(self.X, scale, allowed, where)
        need_control = require_control and self.scale != K.SCALE_EFFECTS
        try:
            self.labels = check_labels(
                series, control if need_control else None, key=perturbation_key, genes=adata.var_names
            )
        except LabelError as error:
            if need_control and K.SCALE_EFFECTS in allowed and series.is_unique:  # one row a label: a table of effects?
                raise LabelError(
                    f"{error} If the rows are effects, already relative to control, say scale='effects'."
                ) from None
            raise
        if scale == K.SCALE_AUTO and self.scale == K.SCALE_EFFECTS:
            controls = np.flatnonzero(self.is_control)[:_SAMPLE_ROWS]
            if len(controls) > 1 and np.abs(self.rows(controls).data).max(initial=0.0) > 1e-6:
                raise ScaleError(
                    f"{where} has negative values, as a table of effects has, but its {int(self.is_control.sum())} control rows "
                    "are not zero: scaled or corrected cells? Name a layer of counts or log1p values (layer=); if rows are "
                    "effects or profiles of perturbations, say scale='effects'."
                )
        self.library_size_key = library_size_key
        if library_size_key is not None:
            check_obs_key(adata, library_size_key, "library_size_key")

    @property
    def X(self) -> Any:
        """The matrix, of whatever kind it is."""
        return self.adata.X if self.layer is None else self.adata.layers[self.layer]

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return self.adata.n_obs

    @property
    def genes(self) -> pd.Index:
        """Names of the genes."""
        return self.adata.var_names

    @cached_property
    def is_control(self) -> np.ndarray:
        """Boolean ``(cell,)``."""
        return self.labels == self.control

    @cached_property
    def perturbations(self) -> list[str]:
        """Labels other than the control, sorted."""
        return sorted(set(self.labels) - {self.control})

    @cached_property
    def library_size(self) -> np.ndarray:
        """Total counts of each cell, float64 ``(cell,)``; an empty cell raises."""
        if self.library_size_key is not None:
            size = pd.to_numeric(self.adata.obs[self.library_size_key], errors="coerce").to_numpy(dtype=np.float64)
            origin = f"adata.obs[{self.library_size_key!r}]"
        else:
            size = np.empty(self.n_cells)
            for start, block in iter_rows(self.X):
                size[start : start + block.shape[0]] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            origin = f"the row sums of {self.where}"
        bad = ~(np.isfinite(size) & (size > 0))
        if bad.any():
            raise ScpertError(
                f"{int(bad.sum())} cell(s) have no library size by {origin} (first: "
                f"{self.adata.obs_names[bad][0]!r}). Empty cells cannot be normalised: drop them with "
                "sc.pp.filter_cells(adata, min_counts=1), or name the full library size with library_size_key=."
            )
        return size

    def _check_block(self, block: sparse.csr_matrix, start: int) -> None:
        if not np.isfinite(block.data).all():
            row = start + int(np.searchsorted(block.indptr, np.flatnonzero(~np.isfinite(block.data))[0], "right")) - 1
            raise ScaleError(f"{self.where} holds NaN or infinite values (first in row {row}).")
        if self.scale != K.SCALE_EFFECTS and len(block.data) and block.data.min() < 0:
            row = start + int(np.searchsorted(block.indptr, int(block.data.argmin()), "right")) - 1
            raise ScaleError(f"{self.where} holds negative values (first in row {row}), which {self.scale} cannot be.")

    def chunks(self, *, normalised: bool = True, chunk: int = CHUNK_ROWS) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Yield ``(rows, CSR block)`` over all cells; log1p CP10k unless ``normalised=False``. One pass."""
        own_size = self.library_size_key is None and "library_size" not in self.__dict__
        sizes = None if own_size or self.scale != K.SCALE_COUNTS else self.library_size
        for start, block in iter_rows(self.X, chunk):
            self._check_block(block, start)
            rows = slice(start, start + block.shape[0])
            if normalised and self.scale == K.SCALE_COUNTS:
                size = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel() if sizes is None else sizes[rows]
                if (size <= 0).any():
                    _ = self.library_size  # raises with the names of the empty cells
                block = log1p_cp10k(block, size)
            yield rows, block

    def rows(self, index: np.ndarray, *, normalised: bool = True) -> sparse.csr_matrix:
        """Rows ``index`` as CSR; log1p CP10k unless ``normalised=False``."""
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        block = read_rows(self.X, index)
        self._check_block(block, 0)
        if normalised and self.scale == K.SCALE_COUNTS:
            if self.library_size_key is None and "library_size" not in self.__dict__:
                size = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
                if (size <= 0).any():
                    _ = self.library_size
            else:
                size = self.library_size[index]
            block = log1p_cp10k(block, size)
        return block

    def moments(
        self,
        groups: np.ndarray | None = None,
        *,
        mask: np.ndarray | None = None,
        progress: Callable[[Any], Any] | None = None,
    ) -> Moments:
        """Mean and variance of each group of cells and gene, in one pass over the matrix.

        Parameters
        ----------
        groups
            Group of each cell ``(cell,)``; by default the labels.
        mask
            Cells to use, boolean ``(cell,)``.
        progress
            Wraps the iterator over chunks (a progress bar).
        """
        names, codes = np.unique(np.asarray(self.labels if groups is None else groups).astype(str), return_inverse=True)
        codes = codes.reshape(-1)
        use = np.ones(self.n_cells, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        n = np.bincount(codes[use], minlength=len(names))
        total = np.zeros((len(names), len(self.genes)))
        square = np.zeros_like(total)
        chunks = self.chunks()
        for rows, block in chunks if progress is None else progress(chunks):
            keep = np.flatnonzero(use[rows])
            if len(keep) == 0:
                continue
            member = sparse.csr_matrix(
                (np.ones(len(keep)), (codes[rows][keep], keep)), shape=(len(names), block.shape[0])
            )
            total += (member @ block).toarray()
            squared = block.copy()
            squared.data = squared.data.astype(np.float64) ** 2
            square += (member @ squared).toarray()
        present = n > 0
        if not present.all():
            names, n, total, square = names[present], n[present], total[present], square[present]
        mean, var = total, square  # in place, a row at a time: with many groups these are the largest arrays there are
        with np.errstate(divide="ignore", invalid="ignore"):
            for i, cells in enumerate(n):
                mean[i] /= cells
                var[i] = np.maximum(var[i] - cells * mean[i] ** 2, 0.0) / (cells - 1) if cells > 1 else np.nan
        return Moments(names.astype(object), n, mean, var)


def cell_hashes(names: pd.Index) -> np.ndarray:
    """Sorted 64-bit hashes of cell names."""
    parts = [
        pd.util.hash_array(names[start : start + 8192].to_numpy(dtype=object), categorize=False)
        for start in range(0, len(names), 8192)
    ]
    out = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    out.sort()
    return out
