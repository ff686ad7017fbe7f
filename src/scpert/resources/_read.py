"""Readers of annotation, gene-set and table files: plain, gzip or zip, any line ends, tabs only."""

from __future__ import annotations

import datetime
import gzip
import io
import logging
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from .._checks import listing
from ..errors import FileFormatError, ScpertError
from ._fetch import provenance as _record

logger = logging.getLogger("scpert")

__all__ = [
    "ancestors",
    "check_acyclic",
    "column",
    "local_file",
    "open_text",
    "provenance",
    "read_gmt",
    "read_table",
    "taxon",
]

_CHUNK = 1_000_000  # rows of a table parsed at a time

#: NCBI taxonomy identifiers of the organisms that may be named.
TAXA = {"human": "9606", "mouse": "10090", "rat": "10116", "yeast": "559292", "zebrafish": "7955", "fly": "7227"}


def taxon(organism: str | int) -> str:
    """NCBI taxonomy identifier, as text, of an organism named in :data:`TAXA` or given as a number."""
    name = str(organism).strip().casefold()
    if name in TAXA:
        return TAXA[name]
    if name.isdigit():
        return name
    raise ScpertError(
        f"organism={organism!r} is not known. Choose one of {listing(TAXA)}, or give the NCBI taxonomy identifier."
    )


def local_file(path: Any, argument: str) -> Path:
    """Return ``path`` as an existing, non-empty file."""
    path = Path(path).expanduser()
    if not path.is_file():
        beside = (
            listing(sorted(p.name for p in path.parent.iterdir() if p.is_file()), 5) if path.parent.is_dir() else ""
        )
        there = f" Its folder has {beside}." if beside else ""
        raise FileFormatError(f"{argument}={str(path)!r} is not a file.{there} Give the path of a downloaded file.")
    if path.stat().st_size == 0:
        raise FileFormatError(f"{argument}={str(path)!r} is empty. Download it again.")
    with open(path, "rb") as raw:  # gzip, zip and parquet tell by themselves whether they are whole
        plain = not raw.read(4).startswith((b"\x1f\x8b", b"PK", b"PAR1"))
        raw.seek(-1, 2)
        if plain and raw.read(1) not in (b"\n", b"\r"):
            logger.warning("%s does not end with a line end: if it was downloaded, it may be cut off", path)
    return path


@contextmanager
def open_text(path: Path) -> Iterator[Iterable[str]]:
    """Open a text file that may be gzip or zip (told by its first bytes); a damaged one raises FileFormatError."""
    try:
        with open(path, "rb") as raw:
            first = raw.read(256)
            magic = first[:4]
            raw.seek(0)
            if first.lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise FileFormatError(f"{path} is a web page, not the file itself. Download the file that it links to.")
            binary: Any = raw
            if magic[:2] == b"\x1f\x8b":
                binary = gzip.GzipFile(fileobj=raw)
            elif magic == b"PK\x03\x04":
                archive = zipfile.ZipFile(raw)
                inside = [n for n in archive.namelist() if not n.endswith("/")]
                if len(inside) != 1:
                    raise FileFormatError(
                        f"{path} holds {len(inside)} files ({listing(inside, 5)}): unpack the one wanted."
                    )
                binary = archive.open(inside[0])
            yield io.TextIOWrapper(io.BufferedReader(binary), encoding="utf-8-sig", newline=None)
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as err:
        raise FileFormatError(f"{path} is truncated or damaged ({err}). Download it again.") from err
    except UnicodeDecodeError as err:
        raise FileFormatError(
            f"{path} is no UTF-8 text ({err}). Is it an annotation file, plain, gzip or zip?"
        ) from err


def provenance(path: Path, licence: str, **more: Any) -> dict[Any, Any]:
    """What ``.attrs`` records: source (address or path), date (of the download, or of the file), licence, SHA-256."""
    record = _record(path)
    changed = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    return {
        "source": record.get("url", str(path)),
        "date": record.get("date", changed),
        "licence": licence,
        "sha256": record["sha256"],
        **more,
    }


def read_table(
    path: Path,
    *,
    comment: str | None = None,
    columns: Collection[str] | None = None,
    keep: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """A table with a header: tab, comma or space separated (told by the header), all text, stripped; or parquet.

    Parameters
    ----------
    path
        Plain, gzip, zip or parquet.
    comment
        Lines that begin so are left out.
    columns
        Names in lower case: other columns are not kept, unless none bears such a name.
    keep
        Rows to keep, asked a million rows at a time: what is left out does not take memory.
    """
    if path.suffix in (".parquet", ".pq"):
        try:
            table = pd.read_parquet(path).astype(str)
        except (OSError, ValueError) as err:
            raise FileFormatError(f"{path} is no readable parquet file ({err}). Download it again.") from err
        return table if keep is None else keep(table)
    with open_text(path) as lines:
        header = ""
        for line in lines:
            if line.strip() and not (comment and line.startswith(comment)):
                header = line.rstrip("\n")
                break
        separator = "\t" if "\t" in header else "," if "," in header else r"\s+"
        names = [n.strip().strip('"').lstrip("#").strip() for n in re.split(separator, header.strip(" "))]
        again = sorted({n for n in names if names.count(n) > 1})
        if again:
            raise FileFormatError(f"{path} has more than one column {listing(again)}. Rename or drop the others.")
        wanted = [n for n in names if columns is not None and n.casefold() in columns] or names
        parts = []
        if len(separator) == 1:
            _check_width(path, separator, len(names), comment)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a line longer than the header
                reader = pd.read_csv(  # type: ignore[call-overload]
                    lines,
                    sep=separator,
                    names=names,
                    header=None,
                    usecols=None if wanted == names else wanted,
                    dtype=str,
                    keep_default_na=False,
                    quoting=3 if separator == "\t" else 0,
                    engine="c",
                    index_col=False,
                    chunksize=_CHUNK,
                )
                for part in reader:
                    for name in part.columns:
                        part[name] = part[name].fillna("").str.strip()
                    short = (part == "").any(axis=1) if len(separator) > 1 else None  # pandas fills short lines up
                    if short is not None and short.any():
                        row = " ".join(part[short].iloc[0]).strip()
                        raise FileFormatError(
                            f"{path}: the line of {row[:60]!r} has fewer fields than the header, which has {len(names)}. "
                            "Is the file truncated?"
                        )
                    parts.append(part if keep is None else keep(part))
        except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as err:
            raise FileFormatError(
                f"{path} is no table with one header line and as many fields in each line: {err}"
            ) from err
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=wanted, dtype=str)


def _check_width(path: Path, separator: str, width: int, comment: str | None) -> None:
    """Raise if a line has fewer fields than the header (pandas fills them up), or more that are not empty."""
    kind = "tab" if separator == "\t" else "comma"
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            here = line.count(separator)
            if here == width - 1 or not line.strip() or (comment and line.startswith(comment)):
                continue
            if kind == "comma" and '"' in line:  # the comma may belong to a field
                continue
            if here < width - 1 or line.rstrip(" \r\n" + separator).count(separator) > width - 1:
                raise FileFormatError(
                    f"{path}: line {number} has {here + 1} {kind}-separated field(s), the header {width}. Is the "
                    "file truncated, or does its header not name the first column (row names)?"
                )


def column(table: pd.DataFrame, names: Sequence[str], what: str, where: Any) -> str:
    """The column of a table that bears one of ``names``, whatever its case."""
    by_name = {str(c).strip().casefold(): c for c in table.columns}
    for name in names:
        if name.casefold() in by_name:
            return by_name[name.casefold()]
    raise FileFormatError(
        f"{where} has no column for the {what}: it has {listing(table.columns, 15)}; known names are {listing(names)}. "
        "Rename the column."
    )


def read_gmt(path: Path) -> list[tuple[str, str, list[str]]]:
    """Gene sets of a GMT file: ``(name, description, genes)`` for each line, split at tabs only.

    Names and descriptions may hold spaces; genes are stripped, empty ones and repeats dropped.
    """
    sets = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = [f.strip() for f in line.rstrip("\n").split("\t")]
            if len(fields) < 3 or not fields[0]:
                raise FileFormatError(
                    f"{path}: line {number} has {len(fields)} tab-separated field(s); a GMT line has a name, a "
                    "description and genes, separated by tabs. Is the file truncated or separated by spaces?"
                )
            sets.append((fields[0], fields[1], list(dict.fromkeys(g for g in fields[2:] if g))))
    if not sets:
        raise FileFormatError(f"{path} holds no gene set.")
    return sets


def check_acyclic(parents: dict[str, set[str]], where: Any) -> list[str]:
    """Order in which every parent comes before its children; a cycle raises and is named.

    Parameters
    ----------
    parents
        Parents by child.
    where
        Name of the file or table, for the message.
    """
    nodes = set(parents) | {p for ps in parents.values() for p in ps}
    children: dict[str, list[str]] = {n: [] for n in nodes}
    waiting = dict.fromkeys(nodes, 0)
    for child, its_parents in parents.items():
        waiting[child] = len(its_parents)
        for parent in its_parents:
            children[parent].append(child)
    ready = sorted(n for n in nodes if waiting[n] == 0)
    order: list[str] = []
    while ready:
        node = ready.pop()
        order.append(node)
        for child in children[node]:
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    if len(order) == len(nodes):
        return order
    left = nodes - set(order)
    node = min(left)
    walk: list[str] = []
    while node not in walk:  # every node that is left has a parent that is left
        walk.append(node)
        node = min(p for p in parents[node] if p in left)
    loop = [*walk[walk.index(node) :], node]
    raise FileFormatError(f"The hierarchy {where} has a cycle: {' -> '.join(loop[:12])}. Remove one of these edges.")


def ancestors(parents: dict[str, set[str]], where: Any) -> dict[str, set[str]]:
    """All ancestors of every node of a hierarchy without cycles."""
    out: dict[str, set[str]] = {}
    for node in check_acyclic(parents, where):
        above = set(parents.get(node, ()))
        out[node] = above.union(*(out[p] for p in above))
    return out
