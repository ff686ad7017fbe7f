"""Gene Ontology annotations, regulons and interactomes as plain DataFrames."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from .. import _keys as K
from .._checks import check_choice, check_net, check_positive, check_whole, listing
from ..errors import FileFormatError, ScpertError
from ._fetch import fetch
from ._read import ancestors, column, local_file, open_text, provenance, read_gmt, read_table, taxon
from ._symbols import rename_genes

__all__ = ["gene_ontology", "interactome", "regulons"]

logger = logging.getLogger("scpert")

FORMATS = ("gaf", "gene2go", "table", "gmt")
DOMAINS = {"BP": "P", "MF": "F", "CC": "C"}
_DOMAIN_NAMES = {
    **{k: k for k in DOMAINS},
    **{v: k for k, v in DOMAINS.items()},
    "biological_process": "BP",
    "molecular_function": "MF",
    "cellular_component": "CC",
    "Process": "BP",
    "Function": "MF",
    "Component": "CC",
}
#: Names of the columns of a table, the last of them those of BioMart.
_GENE = ["gene", "symbol", "gene_symbol", "genesymbol", "gene_name", "gene name", "external_gene_name", "hgnc symbol"]
_TERM = ["term", "go_id", "go", "term_id", "pathway", "pathway_id", "go term accession"]
_GAF_URL = "https://current.geneontology.org/annotations/{}.gaf.gz"
_GAF_FILES = {"9606": "goa_human", "10090": "mgi", "10116": "rgd", "559292": "sgd", "7955": "zfin", "7227": "fb"}
_OBO_URL = "https://current.geneontology.org/ontology/go-basic.obo"
_STRING_URL = "https://stringdb-downloads.org/download/{kind}.v12.0/{taxon}.{kind}.v12.0.txt.gz"
_STRING_TAXA = {"559292": "4932"}  # STRING files yeast under the species, not under the strain
#: Names for proteins in STRING's aliases file, the best first; older releases join several by blanks.
_STRING_ALIASES = (
    "Ensembl_HGNC_symbol",
    "BioMart_HUGO",
    "UniProt_GN_Name",
    "BLAST_UniProt_GN_Name",
    "Ensembl_UniProt_GN",
)
_BIOGRID_URL = "https://downloads.thebiogrid.org/Download/BioGRID/Latest-Release/BIOGRID-ALL-LATEST.tab3.zip"
_GO_TERM = re.compile(r"GO:\d{7}")
_GO_ID = re.compile(r"\((GO:\d{7})\)\s*$")


# ---------------------------------------------------------------------------------------------- Gene Ontology


def _sniff(path: Path) -> str:
    """Which annotation format a file has."""
    with open_text(path) as lines:
        for line in lines:
            if line.startswith("!"):
                return "gaf"
            if line.startswith("#tax_id"):
                return "gene2go"
            if line.strip():
                break
        else:
            raise FileFormatError(f"{path} is empty or holds comments only. Download it again.")
    if ".gmt" in [s.casefold() for s in path.suffixes]:
        return "gmt"
    fields = line.rstrip("\n").split("\t")
    if len(fields) in (15, 17) and fields[4].startswith("GO:"):
        return "gaf"
    if len(fields) == 8 and _GO_TERM.fullmatch(fields[2].strip()):
        return "gene2go"
    names = {f.strip().casefold() for f in fields}
    if names & {*_GENE, *_TERM} or "," in line and len(fields) == 1:
        return "table"
    return "gmt" if len(fields) > 2 else "table"


def _read_gaf(path: Path, tax: str | None) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.startswith("!") or not line.strip():
                continue
            f = line.rstrip("\n").split("\t")
            if len(f) < 13:
                raise FileFormatError(
                    f"{path}: line {number} has {len(f)} columns, a GAF line 15 or 17. Is the file truncated?"
                )
            if tax is not None and f"taxon:{tax}" not in f[12].split("|"):
                continue
            rows.append((f[2].strip(), f[4].strip(), f[3], f[6].strip(), f[8].strip()))
    return pd.DataFrame(rows, columns=["gene", "term", "qualifier", "evidence", "domain"])


def _read_gene2go(path: Path, tax: str | None) -> pd.DataFrame:
    rows: list[tuple[str, ...]] = []
    with open_text(path) as lines:  # the file of all organisms has 10^8 lines: filter while reading
        for number, line in enumerate(lines, 1):
            if line.startswith("#") or not line.strip():
                continue
            f = line.rstrip("\n").split("\t")
            if len(f) < 8:
                raise FileFormatError(
                    f"{path}: line {number} has {len(f)} columns, a gene2go line 8. Is the file truncated?"
                )
            if tax is None or f[0].strip() == tax:
                rows.append((f[1].strip(), f[2].strip(), f[4], f[3].strip(), f[7].strip()))
    return pd.DataFrame(rows, columns=["gene", "term", "qualifier", "evidence", "domain"])


def _read_annotations(path: Path, form: str, tax: str | None) -> pd.DataFrame:
    if form == "gaf":
        return _read_gaf(path, tax)
    if form == "gene2go":
        return _read_gene2go(path, tax)
    rows: list[tuple[str, ...]] = []
    if form == "gmt":
        for name, description, genes in read_gmt(path):
            if re.match(r"GO:\d{7}$", description) and not re.match(r"GO:\d{7}$", name):
                raise FileFormatError(
                    f"{path} has GO terms where a GMT file has descriptions: it looks like a table without a header. Name its columns "
                    "(gene, term) in a first line."
                )
            hit = _GO_ID.search(name)
            term = hit.group(1) if hit else name
            domain = description.split("|", 1)[0] if "|" in description else ""
            rows.extend((gene, term, domain) for gene in genes)
        return pd.DataFrame(rows, columns=["gene", "term", "domain"])
    table = read_table(path, comment="!")
    gene, term = column(table, _GENE, "gene", path), column(table, _TERM, "term", path)
    out = pd.DataFrame({"gene": table[gene], "term": table[term]})
    by_name = {c.casefold(): c for c in table.columns}
    for name, known in (("domain", ("domain", "aspect")), ("evidence", ("evidence",)), ("qualifier", ("qualifier",))):
        for candidate in known:
            if candidate in by_name:
                out[name] = table[by_name[candidate]]
    return out


def _read_gene_ids(gene_ids: str | PathLike | pd.DataFrame) -> dict[str, str]:
    if isinstance(gene_ids, pd.DataFrame):
        table, where = gene_ids.astype(object).where(gene_ids.notna(), "").astype(str), "gene_ids"
    else:
        path = local_file(gene_ids, "gene_ids")
        table, where = read_table(path), str(path)
    identifier = column(table, ["GeneID", "entrez_id", "gene_id", "ncbi_gene_id"], "NCBI gene identifier", where)
    symbol = column(table, ["symbol", "gene", "gene_symbol"], "symbol", where)
    number = table[identifier].str.strip().str.removesuffix(".0")  # pandas reads a column with gaps as floats
    name = table[symbol].str.strip()
    keep = (number != "") & (name != "")
    return dict(zip(number[keep], name[keep], strict=True))


def _read_is_a(hierarchy: str | PathLike | pd.DataFrame) -> tuple[dict[str, set[str]], dict[str, str], str]:
    """Parents by term, current identifier by old one, and the name of the source."""
    parents: dict[str, set[str]] = {}
    renamed: dict[str, str] = {}
    if isinstance(hierarchy, pd.DataFrame):
        table, where = hierarchy.astype(str), "hierarchy"
    else:
        path = local_file(hierarchy, "hierarchy")
        where = str(path)
        with open_text(path) as lines:
            first = next((line for line in lines if line.strip()), "")
            if first.startswith("format-version") or first.startswith("["):
                term = None
                for line in lines:
                    line = line.strip()
                    if line.startswith("["):
                        term = None
                    elif line.startswith("id: "):
                        term = line[4:].strip()
                    elif term and line.startswith("is_a: "):
                        parents.setdefault(term, set()).add(line[6:].split("!")[0].split("{")[0].strip())
                    elif term and line.startswith("alt_id: "):
                        renamed[line[8:].strip()] = term
                if not parents:
                    raise FileFormatError(f"{path} is an OBO file without is_a lines. Is it truncated?")
                return parents, renamed, where
        table = read_table(path)
    child = column(table, ["child", "source", "term"], "child term", where)
    parent = column(table, ["parent", "target"], "parent term", where)
    for c, p in zip(table[child], table[parent], strict=True):
        parents.setdefault(c, set()).add(p)
    return parents, renamed, where


def _above(term: str, parents: dict[str, set[str]], above: dict[str, set[str]], levels: int | None) -> set[str]:
    """Ancestors of a term, at most ``levels`` steps away."""
    if levels is None:
        return above.get(term, set())
    found: set[str] = set()
    step = {term}
    for _ in range(levels):
        step = {p for t in step for p in parents.get(t, ())} - found
        found |= step
    return found


def gene_ontology(
    path: str | PathLike | None = None,
    *,
    organism: str | int = "human",
    format: str | None = None,
    propagate: bool | None = None,
    hierarchy: str | PathLike | pd.DataFrame | None = None,
    levels: int | None = None,
    domains: Collection[str] | None = None,
    evidence: Collection[str] | None = None,
    exclude_terms: Iterable[str] = (),
    min_terms: int = 1,
    aliases: str | PathLike | pd.DataFrame | None = None,
    gene_ids: str | PathLike | pd.DataFrame | None = None,
) -> pd.DataFrame:
    r"""Gene Ontology annotations: which gene bears which term.

    Parameters
    ----------
    path
        A local file, plain, gzip or zip: GAF, NCBI's gene2go, a table with a header (``symbol`` or ``gene``;
        ``go_id`` or ``term``), or GMT. Without it the consortium's GAF of the organism is downloaded once
        into :attr:`scpert.settings.cache_dir <scpert._settings.Settings>`.
    organism
        ``human``, ``mouse``, ``rat``, ``yeast``, ``zebrafish``, ``fly`` or an NCBI taxonomy identifier. It selects the
        file to download and the lines of a GAF or gene2go file; a table or GMT file is taken whole.
    format
        ``gaf``, ``gene2go``, ``table`` or ``gmt``; told from the file by default.
    propagate
        Whether a gene bears all ancestors (over is_a) of its terms too. Default: if a ``hierarchy`` is given.
    hierarchy
        ``go-basic.obo``, or a table (or DataFrame) with columns ``child`` and ``parent``. Downloaded if
        ``propagate=True`` and none is given. Alternative identifiers of ``go-basic.obo`` become the current ones.
    levels
        Propagate only so many levels up: 1 adds the parents. ``None``: all ancestors.
    domains
        Of ``BP``, ``MF``, ``CC``: only terms of these.
    evidence
        Only annotations with these evidence codes (``"IDA"``, ``"IMP"`` ...), where the file has codes. ``None``: all but
        ``"ND"``, which says that nothing is known of the gene.
    exclude_terms
        Terms to drop, before propagation and after. For a graph of genes drop ``("GO:0005515",)``, protein binding:
        sparsely annotated genes that share nothing else would become neighbours. So would genes of which nothing is
        known, in a table without evidence codes: drop the roots, ``"GO:0008150"``, ``"GO:0003674"`` and ``"GO:0005575"``.
    min_terms
        Genes with fewer terms are dropped.
    aliases
        Table of gene names to approved symbols: see :func:`map_symbols`. Unmapped genes stay and are listed in
        ``.attrs["unmapped"]``.
    gene_ids
        For gene2go, which has numbers: a table with ``GeneID`` (or ``entrez_id``) and ``Symbol``. Without it the
        numbers stay.

    Returns
    -------
    DataFrame ``gene``, ``term``, sorted, each pair once. ``.attrs``: ``source``, ``date``, ``licence``, ``sha256``,
    ``unmapped``.

    Raises
    ------
    FileFormatError
        If a file is truncated or has another format, or the hierarchy a cycle.
    DownloadError
        If a download fails.

    Notes
    -----
    Annotations with the qualifier NOT are dropped.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from scpert.resources import gene_ontology
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "go.tsv"
    >>> _ = file.write_text("symbol\tgo_id\nKLF1\tGO:0000001\nCBL\tGO:0000001\n")
    >>> gene_ontology(file)["gene"].tolist()
    ['CBL', 'KLF1']
    """
    check_positive("min_terms", min_terms)
    evidence = [evidence] if isinstance(evidence, str) else evidence
    domains = [domains] if isinstance(domains, str) else domains
    exclude_terms = [exclude_terms] if isinstance(exclude_terms, str) else exclude_terms
    if levels is not None:
        check_whole("levels", levels)
        if hierarchy is None and not propagate:
            raise ScpertError("levels= counts parents in the hierarchy of terms: give hierarchy=, or propagate=True.")
    tax = taxon(organism)
    if path is None:
        if tax not in _GAF_FILES:
            raise ScpertError(
                f"No official file is known for organism={organism!r} (known: {listing(_GAF_FILES)}). Download its GAF "
                "and pass it as path=."
            )
        name = _GAF_FILES[tax] + ".gaf.gz"
        file = fetch(_GAF_URL.format(_GAF_FILES[tax]), name, subfolder="resources")
    else:
        file = local_file(path, "path")
    form = _sniff(file) if format is None else check_choice("format", format, FORMATS)
    # A database's own GAF holds its organism alone, whose strain may have another number: do not filter it.
    table = _read_annotations(file, form, None if path is None and tax != "9606" else tax)
    if table.empty and form in ("table", "gmt"):
        raise FileFormatError(f"{file} has no line but its header. Download it again.")
    if table.empty:
        raise FileFormatError(
            f"{file} holds no annotation of organism={organism!r} (taxon {tax}). Name the organism of the file."
        )
    if "qualifier" in table:  # "NOT", "NOT|involved_in" (GAF) or "NOT involved_in" (gene2go)
        table = table[~table["qualifier"].str.contains(r"(?:^|[| ])NOT(?:$|[| ])", regex=True)]
    if evidence is not None:
        if "evidence" not in table:
            raise ScpertError(f"{file} has no evidence codes: leave evidence=None, or use a GAF or gene2go file.")
        table = table[table["evidence"].isin({str(e) for e in evidence})]
    elif "evidence" in table:
        table = table[table["evidence"] != "ND"]
    if domains is not None:
        wanted = {check_choice("domains", d, DOMAINS) for d in domains}
        if "domain" not in table or not table["domain"].isin(_DOMAIN_NAMES).any():
            raise ScpertError(f"{file} does not say the domain of its terms: leave domains=None.")
        table = table[table["domain"].map(_DOMAIN_NAMES).isin(wanted)]
    excluded = {str(t) for t in exclude_terms}
    table = table.loc[(table["gene"] != "") & (table["term"] != "") & ~table["term"].isin(excluded), ["gene", "term"]]
    attrs = provenance(file, "GO: CC BY 4.0", format=form)
    if form in ("gaf", "gene2go"):
        attrs["organism"] = str(organism)
    if form == "gene2go":
        if gene_ids is None:
            logger.warning("%s names genes by NCBI numbers: pass gene_ids= (GeneID, Symbol) to get symbols", file)
        else:
            symbols = _read_gene_ids(gene_ids)
            attrs["unmapped_ids"] = sorted(set(table["gene"]) - set(symbols))
            if len(table) and set(attrs["unmapped_ids"]) == set(table["gene"]):
                raise ScpertError(
                    f"gene_ids has none of the identifiers of {file}: it has {listing(symbols, 3)}, the file "
                    f"{listing(attrs['unmapped_ids'], 3)}. Give NCBI's numbers of the same organism."
                )
            table = table.assign(gene=table["gene"].map(symbols)).dropna(subset="gene")
    table, report = rename_genes(table, ["gene"], aliases, "Gene Ontology")
    attrs.update(report)
    if propagate if propagate is not None else hierarchy is not None:
        if hierarchy is None:
            hierarchy = fetch(_OBO_URL, "go-basic.obo", subfolder="resources")
        parents, renamed, where = _read_is_a(hierarchy)
        above = ancestors(parents, where)
        excluded |= {renamed[t] for t in excluded & set(renamed)}
        # alternative identifiers are the same term
        table = table.assign(term=table["term"].map(lambda t: renamed.get(t, t)).astype(object))
        table = table[~table["term"].isin(excluded)]
        terms = [str(t) for t in table["term"].unique()]
        unknown = sorted(t for t in terms if t not in above)
        if terms and len(unknown) == len(terms):
            raise FileFormatError(
                f"The hierarchy {where} holds none of the terms of {file} (such as {listing(unknown, 3)}). Is it a "
                "hierarchy of the same ontology?"
            )
        attrs.update(hierarchy=where, terms_not_in_hierarchy=unknown)
        lists = [[t, *sorted(_above(t, parents, above, levels))] for t in terms]
        closure = pd.DataFrame({"term": terms, "all": lists}, dtype=object)
        table = table.drop_duplicates().merge(closure, on="term")[["gene", "all"]].explode("all")
        table = table.rename(columns={"all": "term"})
        table = table[~table["term"].isin(excluded)]
    table = table.drop_duplicates()
    if min_terms > 1:
        counts = table["gene"].value_counts()
        table = table[table["gene"].map(counts) >= min_terms]
    if table.empty:
        raise ScpertError(f"No annotation of {file} is left: loosen domains, evidence, exclude_terms or min_terms.")
    table = table.sort_values(["gene", "term"], ignore_index=True)
    table.attrs = attrs
    return table


# ---------------------------------------------------------------------------------------------- regulons


def regulons(
    path: str | PathLike | None = None,
    *,
    source: str = "collectri",
    organism: str = "human",
    confidence: Collection[str] | None = None,
    aliases: str | PathLike | pd.DataFrame | None = None,
) -> pd.DataFrame:
    r"""Transcription factors and their targets: a signed net.

    Parameters
    ----------
    path
        A local table, plain, gzip or parquet, with the regulator (``source`` or ``tf``), the ``target`` and a sign or
        weight (``weight`` or ``mor``, or ``effect`` with Activation and Repression). Without it CollecTRI or DoRothEA
        is asked for through decoupler (online).
    source
        ``collectri`` or ``dorothea``; used without ``path``.
    organism
        As decoupler names it; used without ``path``.
    confidence
        Keep these levels (``"A"`` ... ``"E"``) where the table has a ``confidence`` column.
    aliases
        See :func:`map_symbols`.

    Returns
    -------
    Net ``source``, ``target``, ``weight`` (positive: activates; negative: represses; 1 where nothing is said). A pair
    that is listed more than once has the mean of its weights; self loops and edges whose mean is 0 are dropped.
    ``.attrs``: ``source``, ``date``, ``licence``, ``sha256`` where it is a file.

    Raises
    ------
    FileFormatError
        If the table cannot be read, or has no such columns.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from scpert.resources import regulons
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "regulons.tsv"
    >>> _ = file.write_text("tf\ttarget\tmor\nGATA1\tKLF1\t1\nGATA1\tSPI1\t-1\n")
    >>> regulons(file)["weight"].tolist()
    [1.0, -1.0]
    """
    check_choice("source", source, ("collectri", "dorothea"))
    licence = "as the file's source says (CollecTRI, DoRothEA: composite, parts non-commercial)"
    if path is None:
        table, attrs = _decoupler(source, organism, confidence, licence)
        where: Any = f"decoupler's {source}"
    else:
        file = local_file(path, "path")
        table, where, attrs = read_table(file), file, provenance(file, licence)
    regulator = column(table, ["source", "tf", "regulator"], "regulator", where)
    target = column(table, ["target", "gene"], "target", where)
    by_name = {c.casefold(): c for c in table.columns}
    if confidence is not None and path is not None:
        level = column(table, ["confidence"], "confidence", where)
        table = table[table[level].isin({str(c) for c in confidence})]
        if table.empty:
            raise ScpertError(f"{where} has no edge of confidence {listing(confidence)}.")
    net = pd.DataFrame({K.SOURCE: table[regulator], K.TARGET: table[target]})
    signed = next((by_name[c] for c in ("weight", "mor") if c in by_name), None)
    if signed is not None:
        net[K.WEIGHT] = table[signed]
    elif "effect" in by_name:
        net[K.WEIGHT] = table[by_name["effect"]].str.casefold().map({"activation": 1.0, "repression": -1.0})
        logger.info("%s: %d edges of unknown sign dropped", where, int(net[K.WEIGHT].isna().sum()))
        net = net.dropna()
    net, report = rename_genes(net, [K.SOURCE, K.TARGET], aliases, "regulons")
    net = check_net(net, f"The table {where}")
    net = net[net[K.WEIGHT] != 0].reset_index(drop=True)
    net.attrs = {**attrs, **report}
    return net


def _decoupler(
    source: str, organism: str, confidence: Collection[str] | None, licence: str
) -> tuple[pd.DataFrame, dict[Any, Any]]:
    import datetime

    import decoupler

    try:
        if source == "collectri":
            table = decoupler.op.collectri(organism=organism)
        else:
            table = decoupler.op.dorothea(organism=organism, levels=sorted(confidence or "ABC"))
    except Exception as err:
        raise ScpertError(
            f"decoupler could not get {source} for {organism!r} ({type(err).__name__}: {err}). Check the connection, or "
            "pass a local table as path=."
        ) from err
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return table, {
        "source": f"decoupler {decoupler.__version__}: {source}",
        "date": date,
        "licence": licence,
        "sha256": "",
        "organism": organism,
    }


# ---------------------------------------------------------------------------------------------- interactome

_FIRST, _SECOND = ["gene_a", "source", "gene1", "a"], ["gene_b", "target", "gene2", "b"]
_PAIR_COLUMNS = {
    *_FIRST,
    *_SECOND,
    *("weight", "score", "protein1", "protein2", "combined_score"),
    *(f"{what} interactor {end}" for what in ("official symbol", "organism id") for end in "ab"),
}


def _string_names(info: str | PathLike | pd.DataFrame) -> dict[str, str]:
    """Gene names of STRING's proteins, from its ``protein.info`` or ``protein.aliases`` file."""
    names = info.astype(str) if isinstance(info, pd.DataFrame) else read_table(local_file(info, "info"))
    names = names.rename(columns=lambda c: str(c).lstrip("#"))
    identifier = column(names, ["string_protein_id", "protein_external_id", "protein_id"], "protein", "info")
    by_name = {c.casefold(): c for c in names.columns}
    if not {"alias", "source"} <= set(by_name):
        name = column(names, ["preferred_name", "gene", "symbol", "alias"], "gene name", "info")
        return dict(zip(names[identifier], names[name], strict=True))
    out: dict[str, str] = {}
    kinds = names[by_name["source"]].str.split()
    for kind in reversed(_STRING_ALIASES):  # the best is written last
        rows = names[kinds.map(lambda own, kind=kind: kind in own)]
        rows = rows.sort_values(by_name["alias"]).drop_duplicates(identifier)
        out.update(zip(rows[identifier], rows[by_name["alias"]], strict=True))
    if not out:
        raise FileFormatError(
            f"info has aliases of the sources {listing(names[by_name['source']].unique(), 5)}, none of which names genes "
            f"(known: {listing(_STRING_ALIASES)}). Take STRING's protein.info file."
        )
    return out


def interactome(
    path: str | PathLike | None = None,
    *,
    source: str = "string",
    organism: str | int = "human",
    min_score: float = 700,
    info: str | PathLike | pd.DataFrame | None = None,
    aliases: str | PathLike | pd.DataFrame | None = None,
) -> pd.DataFrame:
    r"""Interactions between genes' products: a symmetric net.

    Parameters
    ----------
    path
        A local file, plain, gzip or zip: two columns of genes (``gene_a``, ``gene_b``, or ``source``, ``target``;
        optional ``score`` or ``weight``), STRING's ``protein.links`` (then ``info`` is needed), or BioGRID's tab3.
        Without it STRING 12.0 or the latest BioGRID is downloaded once into the cache.
    source
        ``string`` or ``biogrid``; used without ``path``.
    organism
        See :func:`gene_ontology`; used for the download, and for BioGRID's tab3, which holds all organisms.
    min_score
        Least combined score of STRING, of 1,000 (700: high confidence).
    info
        STRING's ``protein.info`` or ``protein.aliases``: the gene names of its proteins.
    aliases
        See :func:`map_symbols`.

    Returns
    -------
    Net ``source``, ``target``, ``weight``, with every pair in both directions. ``weight`` is STRING's score / 1000, the
    file's score where it has one, else 1. ``.attrs``: ``source``, ``date``, ``licence``, ``sha256``.

    Raises
    ------
    FileFormatError
        If a file cannot be read, or proteins have no names.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from scpert.resources import interactome
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "pairs.tsv"
    >>> _ = file.write_text("gene_a\tgene_b\nKLF1\tGATA1\n")
    >>> interactome(file)["source"].tolist()
    ['GATA1', 'KLF1']
    """
    check_choice("source", source, ("string", "biogrid"))
    check_positive("min_score", min_score, zero=True)
    tax = taxon(organism)
    if path is None and source == "string":
        species = _STRING_TAXA.get(tax, tax)
        urls = {kind: _STRING_URL.format(kind=kind, taxon=species) for kind in ("protein.links", "protein.info")}
        file = fetch(urls["protein.links"], f"{species}.protein.links.v12.0.txt.gz", subfolder="resources")
        if info is None:
            info = fetch(urls["protein.info"], f"{species}.protein.info.v12.0.txt.gz", subfolder="resources")
    elif path is None:
        file = fetch(_BIOGRID_URL, "BIOGRID-ALL-LATEST.tab3.zip", subfolder="resources")
    else:
        file = local_file(path, "path")

    def few(part: pd.DataFrame) -> pd.DataFrame:
        """Rows that can count: STRING's file has 10^7, BioGRID's of all organisms 10^6 of 37 columns."""
        names = {c.casefold(): c for c in part.columns}
        if {"protein1", "combined_score"} <= set(names):
            return part[~(pd.to_numeric(part[names["combined_score"]], errors="coerce") < min_score)]
        for end in "ab":
            name = names.get(f"organism id interactor {end}")
            part = part if name is None else part[part[name] == tax]
        return part

    table = read_table(file, columns=_PAIR_COLUMNS, keep=few)
    by_name = {c.casefold(): c for c in table.columns}
    licence = "as the file's source says (STRING: CC BY 4.0; BioGRID: MIT)"
    if "protein1" in by_name:
        licence = "STRING: CC BY 4.0"
        score = pd.to_numeric(table[column(table, ["combined_score"], "score", file)], errors="coerce")
        net = pd.DataFrame({K.SOURCE: table[by_name["protein1"]], K.TARGET: table[by_name["protein2"]]})
        net[K.WEIGHT] = score / 1000
        if info is None:
            raise ScpertError(
                f"{file} names proteins by Ensembl identifiers: pass STRING's protein.info file as info=."
            )
        symbols = _string_names(info)
        unknown = set(net[K.SOURCE]).union(net[K.TARGET]).difference(symbols)
        if unknown:
            raise FileFormatError(
                f"info has no name for {len(unknown)} proteins of {file} (such as {listing(sorted(unknown), 3)}). Take "
                "both files of the same version and organism."
            )
        net = net.assign(**{c: net[c].map(symbols) for c in (K.SOURCE, K.TARGET)})
    elif "official symbol interactor a" in by_name:
        licence = "BioGRID: MIT"
        net = pd.DataFrame({K.SOURCE: table[by_name["official symbol interactor a"]]})
        net[K.TARGET] = table[by_name["official symbol interactor b"]]
    else:
        a, b = column(table, _FIRST, "first gene", file), column(table, _SECOND, "second gene", file)
        net = pd.DataFrame({K.SOURCE: table[a], K.TARGET: table[b]})
        weight = next((by_name[c] for c in ("weight", "score") if c in by_name), None)
        if weight is not None:
            net[K.WEIGHT] = table[weight]
    if net.empty:
        raise ScpertError(f"No interaction of {file} is left for organism={organism!r} and min_score={min_score}.")
    net, report = rename_genes(net, [K.SOURCE, K.TARGET], aliases, "interactome")
    net = pd.concat([net, net.rename(columns={K.SOURCE: K.TARGET, K.TARGET: K.SOURCE})], ignore_index=True)
    net = check_net(net, f"The table {file}")
    net.attrs = {**provenance(file, licence), **report}
    return net
