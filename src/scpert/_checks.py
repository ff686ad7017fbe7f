"""Argument checks that print what was got, what is allowed and what to do; imports numpy and pandas only."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import _keys as K
from .errors import LabelError, MissingKeyError, ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "check_choice",
    "check_fraction",
    "check_net",
    "check_obs_key",
    "check_positive",
    "check_unique_names",
    "check_whole",
    "listing",
    "suggest",
]


def listing(values: Iterable[Any], limit: int = 10) -> str:
    """``'a', 'b', ... (12 in all)``: at most ``limit`` values, for a message."""
    values = list(values)
    text = ", ".join(repr(str(v)) for v in values[:limit])
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"


def suggest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Known names that resemble ``name``: first those equal but for case, then close ones."""
    known = [str(k) for k in known]
    folded = str(name).casefold()
    same = [k for k in known if k.casefold() == folded]
    close = [k for k in difflib.get_close_matches(str(name), known, n=n, cutoff=0.6) if k not in same]
    return (same + close)[:n]


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``, else raise with the choices and a suggestion."""
    if value in choices:
        return value
    hint = suggest(str(value), [str(c) for c in choices], n=1)
    did_you_mean = f" Did you mean {hint[0]!r}?" if hint else ""
    raise ScpertError(f"{name}={value!r} is not known. Choose one of {listing(choices, 40)}.{did_you_mean}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def check_positive(name: str, value: float, *, zero: bool = False) -> float:
    """Return ``value`` if it is a positive number (or zero, if allowed)."""
    if not _is_number(value) or not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ScpertError(f"{name}={value!r}: give a number {'>= 0' if zero else '> 0'}.")
    return value


def check_whole(name: str, value: float) -> int:
    """Return ``value`` as an integer if it is a whole number above zero."""
    if int(check_positive(name, value)) != value or isinstance(value, bool):
        raise ScpertError(f"{name}={value!r}: give a whole number above 0.")
    return int(value)


def as_mask(values: Any, name: str) -> np.ndarray | None:
    """``values`` as a boolean array if they are boolean (numpy, pandas' nullable, categories), else ``None``."""
    dtype = getattr(values, "dtype", None)
    if dtype is not None and pd.api.types.is_bool_dtype(dtype):
        if missing := int(np.sum(pd.isna(values))):
            raise ScpertError(f"{name} has {missing} missing value(s): say True or False for each.")
        return np.asarray(values, dtype=bool)
    array = np.asarray(values)
    return array if array.dtype == bool and array.ndim == 1 else None


def check_seed(value: int, name: str = "random_state") -> int:
    """Return ``value`` as an integer if it can seed every generator: a whole number from 0 to 2**32 - 1."""
    if not _is_number(value) or isinstance(value, bool) or not 0 <= value < 2**32 or int(value) != value:
        raise ScpertError(
            f"{name}={value!r}: give a whole number from 0 to 2**32 - 1. The same number gives the same result; for another draw "
            "give another one."
        )
    return int(value)


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it lies in [0, 1]."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ScpertError(f"{name}={value!r}: give a number between 0 and 1.")
    return value


def check_obs_key(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return ``adata.obs[key]``; a missing column raises with the columns there are."""
    if key in adata.obs.columns:
        column: Any = adata.obs[key]
        return column
    hint = suggest(key, adata.obs.columns, n=1)
    did_you_mean = f" Did you mean {hint[0]!r}?" if hint else ""
    raise MissingKeyError(
        f"{argument}={key!r} is not a column of adata.obs.{did_you_mean} Its columns are "
        f"{listing(adata.obs.columns, 20) or '(none)'}. Pass the column's name as {argument}=."
    )


def check_unique_names(adata: AnnData) -> None:
    """Raise if cells or genes bear the same name twice: alignment by name would be ambiguous."""
    for axis, names, cure in (
        ("obs", adata.obs_names, "adata.obs_names_make_unique()"),
        ("var", adata.var_names, "adata.var_names_make_unique()"),
    ):
        if not names.is_unique:
            twice = names[names.duplicated()].unique()
            raise ScpertError(
                f"adata.{axis}_names are not unique: {listing(twice, 5)} occur more than once. "
                f"Merge or rename them, or call {cure}."
            )


def check_net(net: pd.DataFrame, argument: str, *, known: Collection[str] | None = None) -> pd.DataFrame:
    """Return a clean copy of a net: ``source, target, weight``, no NaN, no self loop, no duplicate.

    White space around names and self loops are dropped, duplicates averaged; if ``known`` is given, edges with other genes are
    dropped too and an empty rest raises.
    """
    if not isinstance(net, pd.DataFrame):
        raise ScpertError(
            f"{argument} must be a DataFrame with columns source, target and (optional) weight; got {type(net).__name__}."
        )
    missing = [c for c in (K.SOURCE, K.TARGET) if c not in net.columns]
    if missing:
        raise ScpertError(
            f"{argument} lacks the column(s) {listing(missing)}; it has {listing(net.columns, 20)}. "
            "A net has the columns source, target and (optional) weight: rename yours with net.rename(columns=...)."
        )
    nameless = net[[K.SOURCE, K.TARGET]].isna().any(axis=1).to_numpy()
    if nameless.any():
        raise ScpertError(
            f"{argument} has {int(nameless.sum())} edge(s) without a source or target (NaN; first: row "
            f"{net.index[nameless][0]!r}). Drop them (dropna), or read the file with keep_default_na=False."
        )
    source, target = (net[c].astype(str).str.strip() for c in (K.SOURCE, K.TARGET))
    weight = pd.to_numeric(net[K.WEIGHT], errors="coerce") if K.WEIGHT in net.columns else pd.Series(1.0, net.index)
    bad = ~np.isfinite(weight.to_numpy(dtype=float))
    if bad.any():
        raise ScpertError(
            f"{argument} has {int(bad.sum())} weight(s) that are NaN, infinite or no numbers (first: row "
            f"{net.index[bad][0]!r}). Drop these edges or give them a weight."
        )
    out = pd.DataFrame(
        {K.SOURCE: source.to_numpy(), K.TARGET: target.to_numpy(), K.WEIGHT: weight.to_numpy(dtype=float)}
    )
    out = out[out[K.SOURCE] != out[K.TARGET]]
    if known is not None:
        known = set(known)
        inside = out[K.SOURCE].isin(known) & out[K.TARGET].isin(known)
        if len(out) and not inside.any():
            strange = [g for g in pd.unique(out[[K.SOURCE, K.TARGET]].to_numpy().ravel()) if g not in known]
            raise ScpertError(
                f"{argument} shares no edge with the genes of the data: it has genes such as "
                f"{listing(strange, 4)}, the data {listing(sorted(known), 4)}. "
                "Bring both to the same kind of gene names (symbols or Ensembl identifiers, same organism)."
            )
        out = out[inside]
    mean: Any = out.groupby([K.SOURCE, K.TARGET], sort=True, as_index=False)[K.WEIGHT].mean()
    return mean


def check_sequence_of_names(name: str, value: str | Sequence[str]) -> list[str]:
    """Return a list of names from one name or many."""
    values = [value] if isinstance(value, str) else [str(v) for v in value]
    if not values:
        raise LabelError(f"{name} is empty: give at least one name.")
    return values
