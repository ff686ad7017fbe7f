"""Readers of GO, regulons, interactomes and aliases: formats, damage, mapping, provenance."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zipfile
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from scpert.errors import DownloadError, FileFormatError, ScpertError
from scpert.resources import gene_ontology, interactome, map_symbols, reactome, regulons
from scpert.resources._read import ancestors, open_text, read_gmt, read_table

PRIORS = os.environ.get("SCPERT_TEST_PRIORS")
needs_priors = pytest.mark.skipif(
    not PRIORS, reason="SCPERT_TEST_PRIORS does not name a folder with real annotation files"
)

GAF = (
    "!gaf-version: 2.2\n"
    "!a comment\n"
    "U\tP1\tKLF1\tinvolved_in\tGO:0000001\tPMID:1\tIDA\t\tP\tname with space\t\tprotein\ttaxon:9606\t20200101\tU\t\t\n"
    "U\tP1\tKLF1\tNOT|involved_in\tGO:0000002\tPMID:1\tIDA\t\tP\tname\t\tprotein\ttaxon:9606\t20200101\tU\t\t\n"
    "U\tP2\tCBL\tenables\tGO:0005515\tPMID:1\tIEA\t\tF\tname\t\tprotein\ttaxon:9606|taxon:10090\t20200101\tU\t\t\n"
    "U\tP3\tKlf1\tenables\tGO:0000001\tPMID:1\tIEA\t\tP\tname\t\tprotein\ttaxon:10090\t20200101\tU\t\t\n"
)
GENE2GO = (
    "#tax_id\tGeneID\tGO_ID\tEvidence\tQualifier\tGO_term\tPubMed\tCategory\n"
    "9606\t10661\tGO:0000001\tIDA\tinvolved_in\tsome term\t1\tProcess\n"
    "9606\t867\tGO:0000003\tIEA\tNOT involved_in|x\tterm\t1\tProcess\n"
    "9606\t867\tGO:0000002\tIEA\tenables\tterm\t1\tFunction\n"
    "10090\t16596\tGO:0000001\tIEA\tenables\tterm\t1\tFunction\n"
)


def write(path: Path, text: str, form: str = "plain") -> Path:
    """The same text as a plain, gzip, zip or Windows file."""
    if form == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.txt", text)
    elif form == "windows":
        path.write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    else:
        path.write_text(text)
    return path


def pairs(table: pd.DataFrame) -> set[tuple[str, str]]:
    assert list(table.columns) == ["gene", "term"]
    return set(zip(table["gene"], table["term"], strict=True))


@pytest.mark.parametrize("form", ["plain", "gzip", "zip", "windows"])
def test_gaf_selects_organism_and_drops_not(tmp_path, form):
    out = gene_ontology(write(tmp_path / "a.gaf", GAF, form))
    assert pairs(out) == {("KLF1", "GO:0000001"), ("CBL", "GO:0005515")}
    assert out.attrs["format"] == "gaf"
    assert pairs(gene_ontology(tmp_path / "a.gaf", organism="mouse")) == {("Klf1", "GO:0000001"), ("CBL", "GO:0005515")}


def test_gaf_filters(tmp_path):
    path = write(tmp_path / "a.gaf", GAF)
    assert pairs(gene_ontology(path, exclude_terms=["GO:0005515"])) == {("KLF1", "GO:0000001")}
    assert pairs(gene_ontology(path, domains=["MF"])) == {("CBL", "GO:0005515")}
    assert pairs(gene_ontology(path, evidence=["IDA"])) == {("KLF1", "GO:0000001")}
    with pytest.raises(ScpertError, match="No annotation .* is left"):
        gene_ontology(path, evidence=["XXX"])
    with pytest.raises(ScpertError, match="domains='XX' is not known"):
        gene_ontology(path, domains=["XX"])
    with pytest.raises(FileFormatError, match="no annotation of organism='fly'"):
        gene_ontology(path, organism="fly")
    with pytest.raises(ScpertError, match="organism='martian' is not known"):
        gene_ontology(path, organism="martian")


def test_no_data_is_no_annotation(tmp_path):
    """Genes of which nothing is known bear the root term with the code ND: they are no neighbours."""
    line = "UniProtKB\tP1\t{}\tinvolved_in\t{}\tX\t{}\t\tP\t\t\tprotein\ttaxon:9606\t20200101\tUniProt\t\t\n"
    known = [("KLF1", "GO:0000001", "IDA"), ("CBL", "GO:0000001", "IEA")]
    unknown = [("A", "GO:0008150", "ND"), ("B", "GO:0008150", "ND")]
    path = write(tmp_path / "a.gaf", "".join(line.format(*row) for row in known + unknown))
    assert pairs(gene_ontology(path)) == {(gene, term) for gene, term, _ in known}
    assert pairs(gene_ontology(path, evidence=["ND"])) == {(gene, term) for gene, term, _ in unknown}


def test_gene2go_maps_numbers_to_symbols(tmp_path):
    path = write(tmp_path / "gene2go.gz", GENE2GO, "gzip")
    ids = pd.DataFrame({"GeneID": [10661], "Symbol": ["KLF1"]})
    out = gene_ontology(path, gene_ids=ids)
    assert pairs(out) == {("KLF1", "GO:0000001")}
    assert out.attrs["unmapped_ids"] == ["867"]
    rough = pd.DataFrame({"GeneID": [10661.0, np.nan], "Symbol": [" KLF1 ", "CBL"]})  # as pandas reads a file with gaps
    assert pairs(gene_ontology(path, gene_ids=rough)) == {("KLF1", "GO:0000001")}
    with pytest.raises(ScpertError, match="none of the identifiers"):
        gene_ontology(path, gene_ids=pd.DataFrame({"GeneID": ["ENSG1"], "Symbol": ["KLF1"]}))
    assert pairs(gene_ontology(path)) == {("10661", "GO:0000001"), ("867", "GO:0000002")}


@pytest.mark.parametrize("form", ["plain", "gzip", "windows"])
def test_table_and_gmt_with_spaces_in_names(tmp_path, form):
    table = write(tmp_path / "t.tsv", " symbol \tgo_id\n KLF1 \tGO:1 \nNA\tGO:1\n", form)
    assert pairs(gene_ontology(table)) == {("KLF1", "GO:1"), ("NA", "GO:1")}  # NA is a gene here
    gmt = write(
        tmp_path / "t.gmt", "heart cell fate (GO:0000006)\t\tKLF1\tCBL \nother set\tBP|words here\tCBL\tCBL\n\n", form
    )
    assert pairs(gene_ontology(gmt)) == {("KLF1", "GO:0000006"), ("CBL", "GO:0000006"), ("CBL", "other set")}
    assert read_gmt(gmt)[1] == ("other set", "BP|words here", ["CBL"])


def test_min_terms_and_propagation_against_networkx(tmp_path):
    rng = np.random.default_rng(0)
    edges = [(f"T{i}", f"T{j}") for i in range(1, 40) for j in rng.choice(i, size=min(i, 2), replace=False)]
    hierarchy = write(tmp_path / "h.tsv", "child\tparent\n" + "".join(f"{c}\t{p}\n" for c, p in edges))
    rows = [(f"G{rng.integers(12)}", f"T{rng.integers(40)}") for _ in range(60)]
    path = write(tmp_path / "a.tsv", "gene\tterm\n" + "".join(f"{g}\t{t}\n" for g, t in rows))
    graph = nx.DiGraph(edges)
    expected = {(g, t) for g, t in rows} | {(g, a) for g, t in rows for a in nx.descendants(graph, t)}
    out = gene_ontology(path, hierarchy=hierarchy)
    assert pairs(out) == expected
    assert pairs(gene_ontology(path, hierarchy=hierarchy, propagate=False)) == set(rows)
    for levels in (1, 2):
        near = {(gene, t) for gene, term in rows for t in nx.ego_graph(graph, term, levels)}
        assert pairs(gene_ontology(path, hierarchy=hierarchy, levels=levels)) == near
    few = gene_ontology(path, min_terms=5)
    counts = pd.Series([g for g, _ in set(rows)]).value_counts()
    assert set(few["gene"]) == set(counts[counts >= 5].index)
    assert "T0" not in set(gene_ontology(path, hierarchy=hierarchy, exclude_terms=["T0"])["term"])


def test_obo_and_old_identifiers(tmp_path):
    obo = write(
        tmp_path / "go.obo",
        "format-version: 1.2\n\n[Term]\nid: GO:2\nalt_id: GO:9\nis_a: GO:1 ! the root\n\n[Typedef]\nid: part_of\nis_a: x\n",
    )
    path = write(tmp_path / "a.tsv", "gene\tterm\nA\tGO:9\nB\tGO:2\n")
    both = {(gene, term) for gene in "AB" for term in ("GO:1", "GO:2")}
    assert pairs(gene_ontology(path, hierarchy=obo)) == both  # one term, by whichever of its identifiers
    path = write(tmp_path / "c.tsv", "gene\tterm\nA\tGO:9\nB\tGO:2\nC\tGO:1\n")
    for term in ("GO:9", "GO:2"):
        assert pairs(gene_ontology(path, hierarchy=obo, exclude_terms=[term])) == {("C", "GO:1")}
    with pytest.raises(ScpertError, match="No annotation"):
        gene_ontology(path, hierarchy=obo, exclude_terms=["GO:1", "GO:2"])
    with pytest.raises(FileFormatError, match="holds none of the terms"):
        gene_ontology(write(tmp_path / "b.tsv", "gene\tterm\nA\tXX:9\n"), hierarchy=obo)


def test_hierarchy_with_cycle_is_named(tmp_path):
    hierarchy = write(tmp_path / "h.tsv", "child\tparent\nA\tB\nB\tC\nC\tA\nD\tA\n")
    path = write(tmp_path / "a.tsv", "gene\tterm\nG\tD\n")
    with pytest.raises(FileFormatError, match=r"has a cycle: A -> B -> C -> A"):
        gene_ontology(path, hierarchy=hierarchy)
    with pytest.raises(FileFormatError, match="cycle: A -> A"):
        ancestors({"A": {"A"}}, "x")


def test_damaged_files(tmp_path):
    whole = gzip.compress(("symbol\tgo_id\n" + "".join(f"G{i}\tGO:{i * 7919}\n" for i in range(5000))).encode())
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    for call in (gene_ontology, regulons, interactome):
        with pytest.raises(FileFormatError, match="truncated or damaged"):
            call(cut)
    flipped = tmp_path / "flipped.tsv.gz"
    flipped.write_bytes(whole[:100] + bytes(b ^ 255 for b in whole[100:200]) + whole[200:])
    with pytest.raises(FileFormatError):
        gene_ontology(flipped)
    empty = tmp_path / "empty.tsv"
    empty.touch()
    with pytest.raises(FileFormatError, match="is empty"):
        gene_ontology(empty)
    with pytest.raises(FileFormatError, match="no line but its header"):
        gene_ontology(write(tmp_path / "header.tsv", "symbol\tgo_id\n"))
    with pytest.raises(FileFormatError, match="is not a file"):
        gene_ontology(tmp_path / "nowhere.tsv")
    with pytest.raises(FileFormatError, match="15 or 17. Is the file truncated"):
        gene_ontology(write(tmp_path / "t.gaf", GAF[:-60]))
    with pytest.raises(FileFormatError, match="a gene2go line 8"):
        gene_ontology(write(tmp_path / "gene2go", GENE2GO[:-30]))
    with pytest.raises(FileFormatError, match="tab-separated field"):
        gene_ontology(write(tmp_path / "spaces.gmt", "name description KLF1 CBL\n"))
    with pytest.raises(FileFormatError, match="no column for the term"):
        gene_ontology(write(tmp_path / "c.tsv", "gene\tvalue\nA\t1\n"))
    with pytest.raises(FileFormatError, match="line 3 has 1 tab-separated"):
        read_table(write(tmp_path / "short.tsv", "gene\tterm\nA\tx\nB\n"))
    binary = tmp_path / "b.tsv"
    binary.write_bytes(b"gene\tterm\n\xff\xfe\x00\x81\n")
    with pytest.raises(FileFormatError, match="no UTF-8 text"):
        gene_ontology(binary)
    two = tmp_path / "two.zip"
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a", "x")
        archive.writestr("b", "x")
    with pytest.raises(FileFormatError, match="holds 2 files"), open_text(two):
        pass


def test_a_plain_file_that_stops_within_a_line_is_announced(tmp_path, caplog):
    whole = "symbol\tgo_id\nKLF1\tGO:0000001\nCBL\tGO:0000002\n"
    gene_ontology(write(tmp_path / "whole.tsv", whole))
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(whole[:-1].encode()))
    gene_ontology(packed)
    assert not caplog.records
    gene_ontology(write(tmp_path / "cut.tsv", whole[:-4]))
    assert "may be cut off" in caplog.text


def test_provenance(tmp_path):
    path = write(tmp_path / "a.tsv", "gene\tterm\nA\tx\n")
    attrs = gene_ontology(path).attrs
    assert attrs["source"] == str(path) and attrs["licence"] == "GO: CC BY 4.0" and attrs["date"][:2] == "20"
    assert attrs["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ symbols


HGNC = (
    "hgnc_id\tsymbol\talias_symbol\tprev_symbol\n"
    'HGNC:1\tKMT2A\t"TRX1|ALL-1"\tMLL\n'
    "HGNC:2\tTRX1B\tTRX1\t\n"
    "HGNC:3\tMLL2\t\t\n"
)


def test_map_symbols(tmp_path):
    path = write(tmp_path / "hgnc.txt", HGNC)
    out = map_symbols(["KMT2A", "MLL", "ALL-1", "mll", "TRX1", "NEW", "MLL2"], path).set_index("symbol")
    assert out["approved"].to_dict() == {
        "KMT2A": "KMT2A",
        "MLL": "KMT2A",
        "ALL-1": "KMT2A",
        "mll": "KMT2A",
        "TRX1": "TRX1",  # an alias of two genes is not guessed
        "NEW": "NEW",
        "MLL2": "MLL2",
    }
    assert out["how"].tolist() == ["approved", "previous", "alias", "case", "unmapped", "unmapped", "approved"]


def test_aliases_rename_and_report(tmp_path):
    aliases = pd.DataFrame({"symbol_or_alias": ["MLL"], "approved_symbol": ["KMT2A"]})
    path = write(tmp_path / "a.tsv", "gene\tterm\nMLL\tx\nKMT2A\tx\nKMT2A\ty\nODD\ty\n")
    out = gene_ontology(path, aliases=aliases)
    assert pairs(out) == {("KMT2A", "x"), ("KMT2A", "y"), ("ODD", "y")}
    assert out.attrs["unmapped"] == ["ODD"] and out.attrs["renamed"] == 1
    net = interactome(write(tmp_path / "i.tsv", "gene_a\tgene_b\nMLL\tODD\n"), aliases=aliases)
    assert set(net["source"]) == {"KMT2A", "ODD"} and net.attrs["unmapped"] == ["ODD"]
    with pytest.raises(FileFormatError, match="no column for the alias"):
        map_symbols(["A"], pd.DataFrame({"x": ["A"], "y": ["B"]}))


# ------------------------------------------------------------------------------------------------ nets


def test_regulons_forms(tmp_path):
    net = regulons(write(tmp_path / "c.tsv", "source\ttarget\tweight\nA\tB\t1\nA\tB\t-1\nA\tC\t-1\nA\tA\t1\n"))
    assert net.values.tolist() == [["A", "C", -1.0]]  # self loop and contradictory pair gone
    dorothea = write(tmp_path / "d.csv", "tf,confidence,target,mor\nA,A,B,1\nA,D,C,-1\n", "windows")
    assert len(regulons(dorothea)) == 2
    assert regulons(dorothea, confidence=["A"])["target"].tolist() == ["B"]
    pd.DataFrame({"tf": ["A"], "target": ["B"], "mor": [-1.0]}).to_parquet(tmp_path / "d.parquet")
    assert regulons(tmp_path / "d.parquet")["weight"].tolist() == [-1.0]
    trrust = write(tmp_path / "t.tsv", "tf\ttarget\teffect\nA\tB\tRepression\nA\tC\tUnknown\n")
    assert regulons(trrust).values.tolist() == [["A", "B", -1.0]]
    assert regulons(write(tmp_path / "u.tsv", "tf\ttarget\nA\tB\n"))["weight"].tolist() == [1.0]
    with pytest.raises(ScpertError, match="NaN, infinite or no numbers"):
        regulons(write(tmp_path / "n.tsv", "tf\ttarget\tmor\nA\tB\tx\n"))
    with pytest.raises(ScpertError, match="no edge of confidence"):
        regulons(dorothea, confidence=["Z"])
    with pytest.raises(ScpertError, match="source='encode' is not known"):
        regulons(source="encode")


def test_interactome_forms(tmp_path):
    net = interactome(write(tmp_path / "p.tsv", "gene_a\tgene_b\nB\tA\nA\tB\nA\tA\nA\tC\n"))
    assert net.values.tolist() == [["A", "B", 1.0], ["A", "C", 1.0], ["B", "A", 1.0], ["C", "A", 1.0]]
    links = write(
        tmp_path / "l.txt.gz", "protein1 protein2 combined_score\n9606.P1 9606.P2 900\n9606.P1 9606.P3 300\n", "gzip"
    )
    info = write(tmp_path / "i.txt", "#string_protein_id\tpreferred_name\n9606.P1\tA\n9606.P2\tB\n9606.P3\tC\n")
    net = interactome(links, info=info)
    assert net.values.tolist() == [["A", "B", 0.9], ["B", "A", 0.9]]
    assert len(interactome(links, info=info, min_score=200)) == 4
    with pytest.raises(ScpertError, match="min_score='high': give a number"):
        interactome(links, info=info, min_score="high")
    with pytest.raises(ScpertError, match="pass STRING's protein.info file as info="):
        interactome(links)
    with pytest.raises(FileFormatError, match="no name for 1 proteins"):
        interactome(links, info=pd.DataFrame({"string_protein_id": ["9606.P1"], "preferred_name": ["A"]}))
    head = "Official Symbol Interactor A\tOfficial Symbol Interactor B\tOrganism ID Interactor A\tOrganism ID Interactor B\n"
    tab3 = write(tmp_path / "b.tab3.zip", head + "A\tB\t9606\t9606\nA\tXa\t9606\t10090\n", "zip")
    assert interactome(tab3).values.tolist() == [["A", "B", 1.0], ["B", "A", 1.0]]
    with pytest.raises(ScpertError, match="No interaction .* is left"):
        interactome(tab3, organism="yeast")


def test_interactome_bad_and_odd_files(tmp_path):
    links = write(tmp_path / "l.txt", "protein1 protein2 combined_score\n9606.P1 9606.P2 900\n")
    aliases = write(
        tmp_path / "a.txt",
        "#string_protein_id\talias\tsource\n9606.P1\tENSG1\tEnsembl_gene\n9606.P1\tX1\tUniProt_GN_Name\n"
        "9606.P1\tKLF1\tEnsembl_HGNC_symbol\n9606.P2\tCBL\tBLAST_KEGG_NAME BioMart_HUGO\n",
    )
    assert interactome(links, info=aliases).values.tolist() == [["CBL", "KLF1", 0.9], ["KLF1", "CBL", 0.9]]
    with pytest.raises(FileFormatError, match="aliases of the sources 'Ensembl_gene', none of which names genes"):
        interactome(
            links,
            info=pd.DataFrame({"string_protein_id": ["9606.P1"], "alias": ["E"], "source": ["Ensembl_gene"]}),
        )
    for text, message in (
        ("protein1 protein2 combined_score\nP1 P2 900\nP1 P2", "the line of 'P1 P2' has fewer fields"),
        ("gene_a,gene_b\nA,B\nA", "line 3 has 1 comma-separated"),
        ("gene_a\tgene_b\n1\tA\tB\n", "header not name the first column"),
        ("gene_a\tgene_a\tgene_b\nA\tA\tB\n", "more than one column 'gene_a'"),
        ("<!DOCTYPE html>\n<html></html>\n", "is a web page"),
    ):
        with pytest.raises(FileFormatError, match=message):
            interactome(write(tmp_path / "bad.txt", text))


def test_large_files_are_filtered_while_reading(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        (f"P{a}", f"P{b}", s)
        for a, b, s in zip(*rng.integers([[0], [0], [150]], [[40], [40], [999]], (3, 900)), strict=True)
    ]
    links = write(
        tmp_path / "l.txt", "protein1 protein2 combined_score\n" + "".join(f"{a} {b} {s}\n" for a, b, s in rows)
    )
    info = pd.DataFrame({"string_protein_id": [f"P{i}" for i in range(40)], "gene": [f"G{i}" for i in range(40)]})
    whole = interactome(links, info=info)
    monkeypatch.setattr("scpert.resources._read._CHUNK", 100)
    pd.testing.assert_frame_equal(interactome(links, info=info), whole)
    kept = {frozenset((a, b)) for a, b, s in rows if s >= 700 and a != b}
    assert {
        frozenset(("P" + s[1:], "P" + t[1:])) for s, t in zip(whole["source"], whole["target"], strict=True)
    } == kept
    seen = []
    read_table(links, keep=lambda part: (seen.append(len(part)), part)[1])
    assert seen == [100] * 9


def test_annotations_told_by_their_content(tmp_path):
    mart = "Gene stable ID\tGene name\tGO term accession\nENSG1\tKLF1\tGO:0000001\nENSG2\tCBL\t\n"
    assert pairs(gene_ontology(write(tmp_path / "mart_export.txt", mart))) == {("KLF1", "GO:0000001")}
    headless = "".join(line + "\n" for line in GENE2GO.splitlines()[1:2])
    assert gene_ontology(write(tmp_path / "g", headless)).attrs["format"] == "gene2go"


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A server on the loopback in the place of the official ones: the path is that of the address, host in front."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    import scpert
    from scpert.resources import _fetch, _knowledge, _reactome

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.files.get(self.path[1:])
            self.server.asked.append(self.path[1:])
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files, httpd.asked = {}, []
    url = f"http://127.0.0.1:{httpd.server_port}/"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(scpert.settings, "cache_dir", tmp_path / "cache")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for module in (_knowledge, _reactome):
        monkeypatch.setattr(
            module, "fetch", lambda address, *a, **k: _fetch.fetch(address.replace("https://", url), *a, **k)
        )
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside.txt", text)
    return buffer.getvalue()


def test_downloads_from_the_official_addresses(official, tmp_path):
    string = "stringdb-downloads.org/download/{0}.v12.0/{1}.{0}.v12.0.txt.gz"
    tab3 = "Official Symbol Interactor A\tOfficial Symbol Interactor B\tOrganism ID Interactor A\tOrganism ID Interactor B\n"
    official.files = {
        "current.geneontology.org/annotations/goa_human.gaf.gz": gzip.compress(GAF.encode()),
        "current.geneontology.org/annotations/mgi.gaf.gz": gzip.compress(GAF[: GAF.index("U")].encode() + b"x"),
        "current.geneontology.org/ontology/go-basic.obo": b"format-version: 1.2\n[Term]\nid: GO:0000001\nis_a: GO:0 ! x\n",
        string.format("protein.links", "9606"): gzip.compress(b"protein1 protein2 combined_score\nP1 P2 900\n"),
        string.format("protein.info", "9606"): gzip.compress(b"#string_protein_id\tpreferred_name\nP1\tA\nP2\tB\n"),
        string.format("protein.links", "4932"): gzip.compress(b"protein1 protein2 combined_score\nY1 Y2 800\n"),
        string.format("protein.info", "4932"): gzip.compress(b"#string_protein_id\tpreferred_name\nY1\tA\nY2\tB\n"),
        "downloads.thebiogrid.org/Download/BioGRID/Latest-Release/BIOGRID-ALL-LATEST.tab3.zip": zipped(
            tab3 + "A\tB\t9606\t9606\nC\tD\t559292\t559292\n"
        ),
        "reactome.org/download/current/ReactomePathways.gmt.zip": zipped("All\tR-HSA-1\tA\tB\nSome\tR-HSA-2\tA\n"),
        "reactome.org/download/current/ReactomePathways.txt": b"R-HSA-1\tAll\tHomo sapiens\nR-HSA-2\tSome\tHomo sapiens\n",
        "reactome.org/download/current/ReactomePathwaysRelation.txt": b"R-HSA-1\tR-HSA-2\n",
    }
    for _ in range(2):  # the second time from the cache
        go = gene_ontology(propagate=True)
        assert ("KLF1", "GO:0") in pairs(go)
        assert interactome().values.tolist() == [["A", "B", 0.9], ["B", "A", 0.9]]
        assert interactome(organism="yeast")["weight"].tolist() == [0.8, 0.8]
        assert interactome(source="biogrid")["source"].tolist() == ["A", "B"]
        assert interactome(source="biogrid", organism="yeast")["source"].tolist() == ["C", "D"]
        assert reactome().levels("Some") == {1: ["R-HSA-2"], 2: ["R-HSA-1"]}
    assert len(official.asked) == len(official.files) - 1 == len(set(official.asked))
    assert go.attrs["source"].endswith("goa_human.gaf.gz") and go.attrs["date"].endswith("+00:00")
    body = official.files["current.geneontology.org/annotations/goa_human.gaf.gz"]
    assert go.attrs["sha256"] == hashlib.sha256(body).hexdigest()
    with pytest.raises(DownloadError, match="answered 404"):
        gene_ontology(organism="rat")
    with pytest.raises(FileFormatError, match="truncated"):
        gene_ontology(organism="mouse")
    with pytest.raises(ScpertError, match="No official file is known for organism=3702"):
        gene_ontology(organism=3702)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_decoupler(monkeypatch):
    import decoupler

    table = pd.DataFrame({"source": ["A"], "target": ["B"], "weight": [-1.0]})
    monkeypatch.setattr(decoupler.op, "collectri", lambda organism: table)
    net = regulons()
    assert net.values.tolist() == [["A", "B", -1.0]] and "collectri" in net.attrs["source"]

    def fail(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr(decoupler.op, "dorothea", fail)
    with pytest.raises(ScpertError, match="could not get dorothea .*no network.*pass a local table"):
        regulons(source="dorothea")


# ------------------------------------------------------------------------------------------------ real files


@needs_priors
def test_real_files_are_read_as_pandas_reads_them():
    folder = Path(PRIORS)
    go = folder / "go_direct_allev_human_2015-07.tsv.gz"
    raw = pd.read_csv(go, sep="\t", keep_default_na=False, dtype=str)
    out = gene_ontology(go)
    assert pairs(out) == set(zip(raw["symbol"], raw["go_id"], strict=True))
    yeast = gene_ontology(folder / "go_direct_allev_yeast_2018-11.tsv.gz", organism="yeast")
    assert "ACT1" in set(yeast["gene"])
    gmt = gene_ontology(folder / "go_gene2go_subset_human_2024-04.gmt.gz")
    tsv = gene_ontology(folder / "go_gene2go_subset_human_2024-04.tsv.gz")
    assert pairs(gmt) == pairs(tsv)
    enrichr = gene_ontology(folder / "enrichr_GO_Biological_Process_2021.gmt.gz")
    assert enrichr["term"].str.fullmatch(r"GO:\d{7}").all()
    net = regulons(folder / "collectri_human_2023.tsv.gz")
    assert {"MYC", "GATA1"} <= set(net["source"]) and set(net["weight"]) <= {-1.0, 1.0}
    levels = regulons(folder / "dorothea_human_A-E_v1.7.parquet", confidence="AB")
    raw = pd.read_parquet(folder / "dorothea_human_A-E_v1.7.parquet")
    raw = raw[raw["confidence"].isin(["A", "B"]) & (raw["tf"] != raw["target"])]
    assert len(levels) == len(raw.drop_duplicates(["tf", "target"]))
    string = interactome(folder / "string_v12.0_human_score800.tsv.gz")
    mirrored = string.rename(columns={"source": "target", "target": "source"})
    pd.testing.assert_frame_equal(
        mirrored.sort_values(["source", "target"], ignore_index=True)[["source", "target", "weight"]], string
    )


@needs_priors
def test_real_propagation_and_aliases():
    folder = Path(PRIORS)
    edges = pd.read_csv(folder / "go_isa_edges_2024-02.tsv.gz", sep="\t")
    graph = nx.DiGraph(list(zip(edges["child"], edges["parent"], strict=True)))
    path = folder / "go_direct_expev_human_2018-10.tsv.gz"
    direct = gene_ontology(path)
    out = gene_ontology(path, hierarchy=folder / "go_isa_edges_2024-02.tsv.gz")
    for gene in np.random.default_rng(0).choice(direct["gene"].unique(), 25, replace=False):
        terms = set(direct.loc[direct["gene"] == gene, "term"])
        expected = terms.union(*(nx.descendants(graph, t) for t in terms if t in graph))
        assert set(out.loc[out["gene"] == gene, "term"]) == expected
    mapping = map_symbols(["MLL", "klf1", "NOTAGENE"], folder / "hgnc_alias_to_approved_2022-04.tsv.gz")
    assert mapping["approved"].tolist() == ["KMT2A", "KLF1", "NOTAGENE"]


def test_one_name_is_a_name_and_not_its_letters(tmp_path):
    file = tmp_path / "a.gaf"
    file.write_text(GAF)
    whole = gene_ontology(file)
    assert "GO:0005515" in set(whole["term"])
    assert "GO:0005515" not in set(gene_ontology(file, exclude_terms="GO:0005515")["term"])
    pd.testing.assert_frame_equal(gene_ontology(file, evidence="IDA"), gene_ontology(file, evidence=["IDA"]))
    pd.testing.assert_frame_equal(gene_ontology(file, domains="BP"), gene_ontology(file, domains=["BP"]))
    with pytest.raises(ScpertError, match="give hierarchy="):
        gene_ontology(file, levels=1)


def test_strings_own_header_in_a_table(tmp_path):
    links = tmp_path / "links.txt"
    links.write_text("protein1 protein2 combined_score\n9606.P1 9606.P2 900\n")
    info = pd.DataFrame({"#string_protein_id": ["9606.P1", "9606.P2"], "preferred_name": ["A", "B"]})
    assert interactome(links, info=info)["source"].tolist() == ["A", "B"]


@pytest.mark.parametrize("options", [{"evidence": "IMP"}, {"exclude_terms": ("GO:0000001",)}])
def test_nothing_left_below_a_hierarchy_is_said(tmp_path, options):
    (tmp_path / "a.tsv").write_text("gene\tterm\tevidence\nA\tGO:0000001\tIDA\n")
    above = pd.DataFrame({"child": ["GO:0000001"], "parent": ["GO:0008150"]})
    if "evidence" in options:
        line = "9606\t1\tGO:0000001\tIDA\tinvolved_in\tx\t-\tProcess\n"
        (tmp_path / "a.tsv").write_text(
            "#tax_id\tGeneID\tGO_ID\tEvidence\tQualifier\tGO_term\tPubMed\tCategory\n" + line
        )
    with pytest.raises(ScpertError, match="No annotation of .* is left"):
        gene_ontology(tmp_path / "a.tsv", hierarchy=above, min_terms=1, **options)
