"""Gene symbols brought to the approved ones: approved, previous and alias names, any case."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from os import PathLike
from typing import Any

import pandas as pd

from .._checks import listing
from ..errors import FileFormatError
from ._read import column, local_file, read_table

__all__ = ["map_symbols", "read_aliases", "rename_genes"]

logger = logging.getLogger("scpert")

APPROVED, PREVIOUS, ALIAS, CASE, UNMAPPED = "approved", "previous", "alias", "case", "unmapped"


def read_aliases(aliases: str | PathLike | pd.DataFrame) -> pd.DataFrame:
    """Bring an alias table to the columns ``name``, ``approved``, ``kind``.

    Two forms are read: HGNC's complete set (``symbol``, ``prev_symbol``, ``alias_symbol``, names split at ``|``)
    and a list of pairs (``symbol_or_alias`` or ``alias``, and ``approved_symbol`` or ``approved``).
    """
    if isinstance(aliases, pd.DataFrame):
        table, where = aliases.astype(str), "the alias table"
    else:
        path = local_file(aliases, "aliases")
        table, where = read_table(path), str(path)
    if {"name", "approved", "kind"} <= set(table.columns):
        return table
    if "prev_symbol" in table.columns or "alias_symbol" in table.columns:
        symbol = column(table, ["symbol"], "approved symbol", where)
        parts = [pd.DataFrame({"name": table[symbol], "approved": table[symbol], "kind": APPROVED})]
        for field, kind in (("prev_symbol", PREVIOUS), ("alias_symbol", ALIAS)):
            if field in table.columns:
                names: Any = table[field].str.strip('"').str.split("|")
                part = pd.DataFrame({"name": names, "approved": table[symbol], "kind": kind}).explode("name")
                parts.append(part)
        out = pd.concat(parts, ignore_index=True)
    else:
        name = column(table, ["symbol_or_alias", "alias", "synonym", "name", "symbol"], "alias", where)
        approved = column(table, ["approved_symbol", "approved", "gene"], "approved symbol", where)
        kinds = (table[name] == table[approved]).map({True: APPROVED, False: ALIAS})
        out = pd.DataFrame({"name": table[name], "approved": table[approved], "kind": kinds})
        known = pd.DataFrame({"name": out["approved"].unique()})
        out = pd.concat([out, known.assign(approved=known["name"], kind=APPROVED)], ignore_index=True)
    out = out.map(lambda text: str(text).strip())
    out = out[(out["name"] != "") & ~out["approved"].isin(["", "NA", "nan"])].drop_duplicates(ignore_index=True)
    if out.empty:
        raise FileFormatError(f"{where} holds no pair of a name and an approved symbol.")
    return out


def map_symbols(symbols: Iterable[str], aliases: Any) -> pd.DataFrame:
    """Map gene symbols to approved ones.

    A symbol that is itself approved stays. Otherwise a previous symbol, then an alias, then either of them in
    another case is looked up; a name that stands for several genes is left unmapped rather than guessed.

    Parameters
    ----------
    symbols
        Gene names.
    aliases
        Path of HGNC's complete set or of a table of pairs (``symbol_or_alias``, ``approved_symbol``), or such a
        DataFrame.

    Returns
    -------
    One row per distinct symbol: ``symbol``, ``approved`` (the symbol itself where unmapped) and ``how``
    (``approved``, ``previous``, ``alias``, ``case``, ``unmapped``).

    Raises
    ------
    FileFormatError
        If the alias table cannot be read.

    Examples
    --------
    >>> import pandas as pd
    >>> from scpert.resources import map_symbols
    >>> table = pd.DataFrame({"symbol_or_alias": ["MLL", "KMT2A"], "approved_symbol": ["KMT2A", "KMT2A"]})
    >>> map_symbols(["MLL", "kmt2a", "NONE1"], table)["approved"].tolist()
    ['KMT2A', 'KMT2A', 'NONE1']
    """
    table = read_aliases(aliases)
    lookup: dict[str, dict[str, set[str]]] = {kind: defaultdict(set) for kind in (APPROVED, PREVIOUS, ALIAS, CASE)}
    for name, approved, kind in zip(table["name"], table["approved"], table["kind"], strict=True):
        lookup[kind][name].add(approved)
    folded: dict[str, dict[str, set[str]]] = {kind: defaultdict(set) for kind in (APPROVED, PREVIOUS, ALIAS)}
    for kind, names in folded.items():
        for name, approved_set in lookup[kind].items():
            names[name.casefold()] |= approved_set
    rows = []
    for symbol in dict.fromkeys(str(s).strip() for s in symbols):
        tries = [(kind, lookup[kind].get(symbol)) for kind in (APPROVED, PREVIOUS, ALIAS)]
        tries += [(CASE, folded[kind].get(symbol.casefold())) for kind in (APPROVED, PREVIOUS, ALIAS)]
        kind, hits = next(((k, h) for k, h in tries if h), (UNMAPPED, None))
        if hits is None or len(hits) > 1:  # unknown, or one name of several genes
            rows.append((symbol, symbol, UNMAPPED))
        else:
            rows.append((symbol, next(iter(hits)), kind))
    return pd.DataFrame(rows, columns=["symbol", "approved", "how"])


def rename_genes(
    table: pd.DataFrame, columns: list[str], aliases: Any, what: str
) -> tuple[pd.DataFrame, dict[Any, Any]]:
    """Bring the gene columns of a table to approved symbols; unmapped genes stay and are reported."""
    if aliases is None:
        return table, {}
    mapping = map_symbols(pd.unique(pd.concat([table[c] for c in columns])), aliases)
    new = dict(zip(mapping["symbol"], mapping["approved"], strict=True))
    table = table.copy()
    for name in columns:
        table[name] = table[name].map(new)
    unmapped = mapping.loc[mapping["how"] == UNMAPPED, "symbol"].tolist()
    changed = int((mapping["symbol"] != mapping["approved"]).sum())
    logger.info(
        "%s: %d of %d gene symbols renamed to the approved ones, %d unmapped%s",
        what,
        changed,
        len(mapping),
        len(unmapped),
        f" ({listing(unmapped, 5)})" if unmapped else "",
    )
    return table, {"renamed": changed, "unmapped": unmapped}
