"""Reading expression for :class:`scpert.model.CellState`: scale by evidence, rows on demand, files out of core."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scipy import sparse
from scvi.data.fields import BaseAnnDataField

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_unique_names, listing
from .._files import written_whole
from .._progress import progress
from ..data._screen import read_rows, resolve_layer, scale_evidence
from ..errors import FileFormatError, ScaleError, ScpertError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EXPRESSION", "ExpressionField", "ExpressionReader", "expression_scale", "open_backed"]

logger = logging.getLogger("scpert")

EXPRESSION = "expression"
LINEAR = "linear"
EXPRESSION_SCALES = (K.SCALE_COUNTS, LINEAR, K.SCALE_LOG1P)
#: Counts of bulk samples (median total above this) are brought to a million, counts of cells to 10,000.
BULK_TOTAL = 1e5


def expression_scale(X: Any, scale: str, where: str) -> str:
    """``"counts"``, ``"linear"`` (TPM, RSEM) or ``"log1p"``, by evidence, checked against what the caller says."""
    check_choice("scale", scale, (K.SCALE_AUTO, *EXPRESSION_SCALES))
    e = scale_evidence(X)
    if not e.finite:
        raise ScaleError(f"{where} holds NaN or infinite values; scpert does not replace them.")
    if e.minimum < 0:
        raise ScaleError(
            f"{where} holds negative values (minimum {e.minimum:.4g}): neither counts nor TPM, RSEM or log1p values can be "
            "negative. Log ratios, z-scores and batch-corrected values cannot be used: give the values before that step."
        )
    rounded_tpm = e.integers == 1.0 and X.shape[0] > 3 and e.row_sum_cv < 1e-3 and e.maximum > 100
    if e.integers == 1.0:
        found = None if rounded_tpm else K.SCALE_COUNTS
    elif e.maximum > 100:
        found = LINEAR if e.integers < 0.9 else None
    elif e.maximum <= 20 and e.integers <= 0.9 and not (e.row_sum_cv < 0.01 and not e.expm1_sum_cv < 0.01):
        found = K.SCALE_LOG1P
    else:
        found = None
    if scale == K.SCALE_AUTO:
        if found is None:
            raise ScaleError(
                f"Cannot tell whether {where} holds counts, linear abundances (TPM, RSEM) or logs: {e}. Say which: "
                f"scale= one of {listing(EXPRESSION_SCALES)}."
            )
        logger.info("%s: taken as %s (%s)", where, found, e)
        return found
    refused = {
        K.SCALE_COUNTS: e.integers < 1.0,
        LINEAR: e.maximum <= 20 and e.integers <= 0.9,
        K.SCALE_LOG1P: e.maximum > 30 or (e.integers == 1.0 and e.maximum > 1),
    }[scale]
    if refused:
        looks = {
            K.SCALE_COUNTS: "raw counts",
            LINEAR: "linear abundances such as TPM or RSEM",
            K.SCALE_LOG1P: "log-transformed values",
            None: "none of the known scales",
        }[found]
        raise ScaleError(
            f"{where} was to hold {scale!r}, but looks like {looks}: {e}. Name the right scale= "
            f"({listing(EXPRESSION_SCALES)}) or the right layer=."
        )
    return scale


class ExpressionReader:
    """Rows of a matrix of any kind (in memory, backed, dask) as dense log expression, float32.

    Counts become ``log1p`` of counts per ``target_sum``, linear abundances their ``log1p``; logs stay.
    """

    def __init__(self, adata: AnnData, layer: str | None, scale: str, target_sum: float):
        self.X = adata.X if layer is None else adata.layers[layer]
        self.where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        self.names = np.asarray(adata.obs_names, dtype=object)
        self.scale, self.target_sum, self.shape = scale, target_sum, self.X.shape

    def raw(self, index: np.ndarray) -> np.ndarray:
        """Rows as they are stored, dense float32 ``(row, gene)``; NaN and negative values raise."""
        block = self.X[index] if isinstance(self.X, np.ndarray) else read_rows(self.X, index).toarray()
        block = np.asarray(block, dtype=np.float32)
        if not np.isfinite(block).all() or (block.size and block.min() < 0):
            raise ScaleError(f"{self.where} holds negative, NaN or infinite values: {self.scale} cannot be.")
        return block

    def log(self, raw: np.ndarray) -> np.ndarray:
        """Raw rows on the log scale; a new array."""
        if self.scale == K.SCALE_COUNTS:
            total = raw.sum(axis=1, keepdims=True, dtype=np.float64)
            if (total <= 0).any():
                raise ScpertError(
                    f"{int((total <= 0).sum())} sample(s) of {self.where} have no count at all: drop them."
                )
            return np.log1p(raw * (self.target_sum / total)).astype(np.float32)
        return np.log1p(raw) if self.scale == LINEAR else raw.copy()

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Log expression of some rows, float32 ``(row, gene)``."""
        return self.log(self.raw(index))


class ExpressionField(BaseAnnDataField):
    """The values of a matrix as a field of scvi-tools' registry; needs no labels."""

    def __init__(self, *, layer: str | None, scale: str, group_key: str | None, split_key: str | None):
        self.options = {"layer": layer, "scale": scale, "group_key": group_key, "split_key": split_key}

    @property
    def registry_key(self) -> str:
        return EXPRESSION

    @property
    def attr_name(self) -> str:
        return "X"

    @property
    def attr_key(self) -> None:
        return None

    @property
    def is_empty(self) -> bool:
        return False

    def get_field_data(self, adata: AnnData) -> Any:
        return adata.X

    def validate_field(self, adata: AnnData) -> None:
        check_unique_names(adata)

    def register_field(self, adata: AnnData) -> dict:
        if adata.n_obs < 2 or adata.n_vars < 2:
            raise ScpertError(
                f"The AnnData has {adata.n_obs} samples and {adata.n_vars} genes: CellState needs two at least."
            )
        self.validate_field(adata)
        o = self.options
        layer = resolve_layer(
            adata, o["layer"], K.SCALE_LOG1P if o["scale"] in (LINEAR, K.SCALE_LOG1P) else K.SCALE_AUTO
        )
        where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        X = adata.X if layer is None else adata.layers[layer]
        scale = expression_scale(X, str(o["scale"]), where)
        if o["group_key"] is not None:
            groups = check_obs_key(adata, o["group_key"], "group_key")
            if groups.isna().any():
                raise ScpertError(
                    f"adata.obs[{o['group_key']!r}] is NaN in {int(groups.isna().sum())} samples: fill it."
                )
            if groups.nunique() < 2:
                raise ScpertError(
                    f"adata.obs[{o['group_key']!r}] has one group only: splits by group need two at least (patients, studies)."
                )
        if o["split_key"] is not None:
            split = check_obs_key(adata, o["split_key"], "split_key").astype(str)
            strange = sorted(set(split) - {K.TRAIN, K.VAL, K.TEST})
            if strange or not (split == K.TRAIN).any():
                raise ScpertError(
                    f"adata.obs[{o['split_key']!r}] must hold 'train' and may hold 'val' and 'test'; it holds "
                    f"{listing(sorted(set(split)), 5)}."
                )
            n_train = int((split == K.TRAIN).sum())
        else:
            n_train = int(adata.n_obs)
        target_sum = K.TARGET_SUM
        if scale == K.SCALE_COUNTS:
            some = np.unique(np.linspace(0, adata.n_obs - 1, min(adata.n_obs, 500)).astype(int))
            if float(np.median(np.asarray(read_rows(X, some).sum(axis=1)))) > BULK_TOTAL:
                target_sum = 1e6
        return {
            "layer": layer,
            "scale": scale,
            "target_sum": float(target_sum),
            "genes": [str(g) for g in adata.var_names],
            "n_cells": int(adata.n_obs),
            "n_train": n_train,
        }

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        return dict(state_registry)

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_cells": state_registry["n_cells"], "n_vars": len(state_registry["genes"])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        table = rich.table.Table(title="expression State Registry")
        table.add_column("Scale")
        table.add_row(state_registry["scale"])
        return table


# ---------------------------------------------------------------------------------------------- files


def open_backed(
    path: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    chunk: int = 500,
    samples: Sequence[int] | None = None,
) -> AnnData:
    """Open a large file without reading its matrix: h5ad, zarr, or ARCHS4's HDF5.

    Parameters
    ----------
    path
        ``.h5ad`` and ``.zarr`` stay where they are; rows are read when they are needed. An ARCHS4 file
        (``data/expression``, gene x sample) is first copied block by block to ``out``, sample x gene, because reading
        single samples from it is slow.
    out
        h5ad to write from an ARCHS4 file.
    chunk
        Samples per block.
    samples
        Positions of the ARCHS4 samples to take; by default all.

    Returns
    -------
    AnnData whose ``X`` is on disk. ``obs`` of ARCHS4 has ``series``, its studies: a ``group_key``.

    Notes
    -----
    ARCHS4 is read by ``archs4py`` (``pip install 'scpert[archs4]'``). At most ``chunk`` samples are in memory.
    """
    import anndata as ad
    import h5py

    path = Path(path)
    if not path.exists():
        raise FileFormatError(f"There is no file {str(path)!r}.")
    if path.suffix == ".zarr" or path.is_dir():
        import zarr

        group = zarr.open_group(str(path), mode="r")
        X: Any = group["X"]
        X = ad.io.sparse_dataset(X) if isinstance(X, zarr.Group) else X
        obs: Any = ad.io.read_elem(group["obs"])
        var: Any = ad.io.read_elem(group["var"])
        return AnnData(X, obs=obs, var=var)
    if not h5py.is_hdf5(path):
        raise FileFormatError(f"{str(path)!r} is neither h5ad, zarr nor HDF5.")
    with h5py.File(path, "r") as file:
        archs4 = "data" in file and "expression" in file["data"]
    if not archs4:
        return ad.read_h5ad(path, backed="r")
    if out is None:
        raise ScpertError("An ARCHS4 file is copied to sample x gene first: name an h5ad to write with out=.")
    _copy_archs4(path, Path(out), chunk, samples)
    return ad.read_h5ad(out, backed="r")


def _copy_archs4(path: Path, out: Path, chunk: int, samples: Sequence[int] | None) -> None:
    import h5py
    from anndata.io import write_elem

    try:
        import archs4py
    except ImportError as error:
        raise ScpertError("Reading ARCHS4 needs archs4py: pip install 'scpert[archs4]'.") from error
    with h5py.File(path, "r") as file:
        meta = file["meta"]
        accession = np.asarray(meta["samples"]["geo_accession"]).astype(str)
        series = np.asarray(meta["samples"]["series_id"]).astype(str)
        symbols = meta["genes"]["symbol" if "symbol" in meta["genes"] else "gene_symbol"]
        genes = pd.Index(np.asarray(symbols).astype(str))
    index = np.arange(len(accession)) if samples is None else np.asarray(samples, dtype=int)
    first = ~genes.duplicated()
    if not first.all():
        logger.info(
            "%d gene symbols occur more than once in %s: the first of each is taken", int((~first).sum()), path.name
        )
    keep = np.flatnonzero(first)
    with written_whole(out) as draft:
        obs = pd.DataFrame({"series": pd.Categorical(series[index])}, index=pd.Index(accession[index], dtype=str))
        empty = AnnData(
            sparse.csr_matrix((len(index), len(keep)), dtype=np.float32), obs=obs, var=pd.DataFrame(index=genes[keep])
        )
        empty.write_h5ad(draft)
        with h5py.File(draft, "r+") as file:
            del file["X"]
            write_elem(
                file,
                "X",
                np.zeros((0, len(keep)), dtype=np.uint32),
                dataset_kwargs={
                    "maxshape": (None, len(keep)),
                    "chunks": (min(64, len(index)), len(keep)),
                    "compression": "lzf",
                },
            )
            X = file["X"]
            blocks = range(0, len(index), chunk)
            for start in progress(blocks, total=len(blocks), description="copy ARCHS4", unit="block"):
                part = [int(i) for i in index[start : start + chunk]]
                values = archs4py.data.index(str(path), part, silent=True).to_numpy().T
                X.resize(start + len(part), axis=0)
                X[start : start + len(part)] = values[:, keep]


def row_blocks(n: int, size: int) -> list[np.ndarray]:
    """Positions 0..n-1 in blocks."""
    return [np.arange(s, min(s + size, n)) for s in range(0, n, size)]
