"""Annotations of genes by the words in the names of their terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike

import pandas as pd

from .._checks import listing
from ..errors import FileFormatError, ScpertError
from ._read import column, local_file, open_text, read_table

__all__ = ["term_words"]

_WORD = re.compile(r"[a-z0-9]+")
#: Words that hold terms together and say nothing of a gene.
_COMMON = frozenset("of the to and in a by process activity complex regulation positive negative".split())


def term_words(
    annotations: pd.DataFrame, names: str | PathLike | pd.DataFrame | Mapping[str, str], *, min_genes: int = 2
) -> pd.DataFrame:
    """Annotations of genes by the words in the names of their terms.

    Neighbouring terms of an ontology share words where they share no parent (*RNA polymerase II*, *mediator*): a second table of
    knowledge beside the terms themselves, for ``knowledge=`` of :class:`~scpert.model.KnowledgeGP`, ``KNN`` and ``Ridge``.

    Parameters
    ----------
    annotations
        Columns ``gene``, ``term``, as from :func:`gene_ontology`.
    names
        Names of terms: ``go-basic.obo``, a table (file or DataFrame) with columns ``term`` (or ``go_id``, ``id``) and ``name``, or a
        mapping.
    min_genes
        Words of fewer genes are dropped.

    Returns
    -------
    DataFrame ``gene``, ``term`` (a word in lower case, without those that many names share, such as *process*), sorted, each pair once.

    Raises
    ------
    ScpertError
        If no term has a name.

    Examples
    --------
    >>> import pandas as pd
    >>> from scpert.resources import term_words
    >>> go = pd.DataFrame({"gene": ["MED12", "CCNC"], "term": ["GO:0016592", "GO:0070847"]})
    >>> words = term_words(go, {"GO:0016592": "mediator complex", "GO:0070847": "core mediator complex"})
    >>> words["term"].tolist()
    ['mediator', 'mediator']
    """
    lacking = {"gene", "term"} - set(annotations.columns)
    if lacking:
        raise ScpertError(
            f"annotations has the columns {listing(annotations.columns)}, but not {listing(sorted(lacking))}. Give a table gene, term, as "
            "from scpert.resources.gene_ontology."
        )
    name = _names(names)
    terms = annotations["term"].astype(str).unique()
    words = {t: sorted(set(_WORD.findall(name[t].lower())) - _COMMON) for t in terms if t in name}
    if not words:
        raise ScpertError(
            f"None of the {len(terms)} terms (such as {listing(terms, 3)}) has a name: names knows {listing(name, 3)}. Give the names of "
            "the same ontology."
        )
    table = annotations[["gene", "term"]].astype(str)
    table = table.assign(term=table["term"].map(words)).explode("term").dropna().drop_duplicates()
    table = table[table["term"].map(table["term"].value_counts()) >= min_genes]
    return table.sort_values(["gene", "term"], ignore_index=True)


def _names(names: str | PathLike | pd.DataFrame | Mapping[str, str]) -> Mapping[str, str]:
    if isinstance(names, Mapping):
        return {str(k): str(v) for k, v in names.items()}
    where = "names"
    if isinstance(names, pd.DataFrame):
        table = names.astype(str)
    else:
        path = local_file(names, "names")
        where = str(path)
        found: dict[str, str] = {}
        with open_text(path) as lines:
            term, obo = None, False
            for line in lines:
                obo = obo or line.startswith(("format-version", "[Term]"))
                if not obo and line.strip():
                    break
                if line.startswith("["):
                    term = None
                elif line.startswith("id: "):
                    term = line[4:].strip()
                elif term and line.startswith("name: "):
                    found[term] = line[6:].strip()
        if obo and not found:
            raise FileFormatError(f"{path} is an OBO file without names of terms. Is it truncated?")
        if obo:
            return found
        table = read_table(path)
    term_column = column(table, ["term", "go_id", "id"], "term", where)
    return dict(zip(table[term_column], table[column(table, ["name"], "name", where)], strict=True))
