"""Annotations by the words of term names."""

from __future__ import annotations

import pandas as pd
import pytest

from scpert.errors import FileFormatError, ScpertError
from scpert.resources import term_words

GO = pd.DataFrame({"gene": ["A", "A", "B", "C"], "term": ["T:1", "T:2", "T:3", "T:9"]})
NAMES = {"T:1": "mediator complex", "T:2": "RNA polymerase II binding", "T:3": "core Mediator complex, RNA-bound"}


def pairs(table: pd.DataFrame) -> set[tuple[str, str]]:
    return set(table.itertuples(index=False, name=None))


def test_words_that_genes_share():
    words = term_words(GO, NAMES)
    assert pairs(words) == {("A", "mediator"), ("B", "mediator"), ("A", "rna"), ("B", "rna")}
    every = term_words(GO, NAMES, min_genes=1)
    assert ("A", "ii") in pairs(every) and "complex" not in set(every["term"]) and "C" not in set(every["gene"])
    assert not every.duplicated().any()


@pytest.mark.parametrize("form", ["obo", "table", "frame"])
def test_names_from_files(tmp_path, form):
    table = pd.DataFrame({"go_id": list(NAMES), "name": list(NAMES.values())})
    names = table
    if form == "obo":
        names = tmp_path / "x.obo"
        text = "".join(f"\n[Term]\nid: {k}\nname: {v}\n" for k, v in NAMES.items())
        names.write_text("format-version: 1.2\n" + text + "\n[Typedef]\nid: part_of\nname: part of\n")
    elif form == "table":
        names = tmp_path / "names.tsv"
        table.to_csv(names, sep="\t", index=False)
    pd.testing.assert_frame_equal(term_words(GO, names), term_words(GO, NAMES))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ScpertError, match="has a name"):
        term_words(GO, {"X": "y"})
    with pytest.raises(ScpertError, match="annotations has the columns"):
        term_words(GO[["gene"]], NAMES)
    empty = tmp_path / "x.obo"
    empty.write_text("format-version: 1.2\n\n[Term]\nid: T:1\n")
    with pytest.raises(FileFormatError, match="without names"):
        term_words(GO, empty)
