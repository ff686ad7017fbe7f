"""How ``pp`` functions write: all at the end, to the object itself or to a copy, with their arguments in ``uns``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K

if TYPE_CHECKING:
    from anndata import AnnData


def writable(adata: AnnData, copy: bool) -> AnnData:
    """The object to write to: a copy if asked for; a view is made an object of its own first."""
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.is_view and not adata.isbacked:
        adata._init_as_actual(adata.copy())
    return adata


def _plain(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple | set | frozenset):
        values = list(value)
        return (
            np.array([str(v) for v in values], dtype=object)
            if any(isinstance(v, str) for v in values)
            else np.array(values)
        )
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float | str | np.ndarray):
        return value
    return str(value)


def record(adata: AnnData, name: str, **parameters: Any) -> None:
    """Write parameters to ``uns["scpert"][name]``, in types that h5ad and zarr can hold; None is left out."""
    kept = {k: _plain(v) for k, v in parameters.items() if v is not None}
    adata.uns[K.UNS] = {**adata.uns.get(K.UNS, {}), name: kept}
