"""Reactome: pathways, levels, hierarchy; against networkx and the source files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from scpert.errors import FileFormatError, MissingKeyError, ScpertError
from scpert.resources import Reactome, reactome

PRIORS = os.environ.get("SCPERT_TEST_PRIORS")
needs_priors = pytest.mark.skipif(
    not PRIORS, reason="SCPERT_TEST_PRIORS does not name a folder with real annotation files"
)


def check_against_networkx(r: Reactome, graph: nx.DiGraph, nodes) -> None:
    level = {p: i + 1 for i, ps in enumerate(nx.topological_generations(graph.reverse())) for p in ps}
    for p in nodes:
        assert r.level(p) == level[p]
        assert r.parents(p) == sorted(graph.predecessors(p))
        assert r.children(p) == sorted(graph.successors(p))
        assert r.ancestors(p) == nx.ancestors(graph, p)
        assert r.descendants(p) == nx.descendants(graph, p)
        levels = r.levels(p)
        assert {x for ps in levels.values() for x in ps} == nx.ancestors(graph, p) | {p}
        assert all(level[x] == n for n, ps in levels.items() for x in ps)
        assert list(levels) == sorted(levels) and levels[r.level(p)] == [p]


def test_random_hierarchy_against_networkx():
    rng = np.random.default_rng(1)
    ids = [f"R-HSA-{i}" for i in range(60)]
    edges = [
        (ids[j], ids[i])
        for i in range(1, 60)
        for j in rng.choice(i, size=min(i, int(rng.integers(1, 3))), replace=False)
    ]
    sets = {p: [f"G{g}" for g in rng.choice(30, size=4, replace=False)] for p in ids}
    r = Reactome(sets, {}, edges)
    check_against_networkx(r, nx.DiGraph(edges), ids)
    assert r.n_levels == nx.dag_longest_path_length(nx.DiGraph(edges)) + 1
    for gene in r.all_genes:
        assert r.pathways(gene) == sorted(p for p in ids if gene in sets[p])
        at_levels = [r.pathways(gene, level=n) for n in range(1, r.n_levels + 1)]
        assert sorted(p for ps in at_levels for p in ps) == r.pathways(gene)
    assert r.pathways(["G1", "G2"]) == {"G1": r.pathways("G1"), "G2": r.pathways("G2")}
    net = r.to_net()
    assert set(zip(net["source"], net["target"], strict=True)) == {(p, g) for p in ids for g in sets[p]}
    assert set(zip(*r.hierarchy_net()[["source", "target"]].to_numpy().T, strict=True)) == set(edges)
    table = r.table(["G3"])
    assert table["pathway"].tolist() == sorted(r.pathways("G3"), key=lambda p: (r.level(p), p))


def test_names_unknown_and_ambiguous():
    r = Reactome(
        {"R-HSA-1": ["A"], "R-HSA-2": ["B"], "R-HSA-3": ["C"]}, {"R-HSA-1": "x y", "R-HSA-2": "same", "R-HSA-3": "same"}
    )
    assert r.genes("x y") == ["A"] and "A" in r and "Z" not in r and r.pathways("Z") == []
    with pytest.raises(MissingKeyError, match="stands for 2 pathways"):
        r.genes("same")
    with pytest.raises(MissingKeyError, match="holds no pathway 'R-HSA-9'.*Did you mean"):
        r.parents("R-HSA-9")
    with pytest.raises(ScpertError, match="the levels are 1"):
        r.pathways("A", level=2)
    with pytest.raises(ScpertError, match="level='1': give a number"):
        r.pathways("A", level="1")
    with pytest.raises(ScpertError, match="hold no gene"):
        Reactome({"R-HSA-1": []})


def test_cycle_is_named():
    with pytest.raises(FileFormatError, match="Reactome has a cycle: A -> B -> A|cycle: A -> B -> A"):
        Reactome({"A": ["G"]}, {}, [("A", "B"), ("B", "A")])


@pytest.fixture
def files(tmp_path):
    gmt = tmp_path / "r.gmt.gz"
    gmt.write_bytes(
        gzip.compress(b"All of it\tR-HSA-1\tA\tB\tC \r\nSome\tR-HSA-2\tA\tB\r\nMore, with space\tR-HSA-3\tC\r\n")
    )
    names = tmp_path / "n.txt"
    names.write_text(
        "R-HSA-1\tAll of it\tHomo sapiens\nR-HSA-2\tSome\tHomo sapiens\nR-MMU-1\tAll of it\tMus musculus\n"
    )
    relation = tmp_path / "h.txt"
    relation.write_text("R-HSA-1\tR-HSA-2\nR-HSA-1\tR-HSA-3\nR-MMU-1\tR-MMU-2\n")
    return gmt, names, relation


def test_official_form(files):
    r = reactome(*files)
    assert r.all_pathways == ["R-HSA-1", "R-HSA-2", "R-HSA-3"]
    assert r.pathways("C") == ["R-HSA-1", "R-HSA-3"] and r.genes("More, with space") == ["C"]
    assert r.attrs["licence"] == "Reactome: CC0 1.0" and set(r.attrs["files"]) == {"path", "names", "hierarchy"}
    assert repr(r).startswith("Reactome with 3 pathways on 2 levels, 3 genes")
    assert reactome(files).to_net().equals(r.to_net())
    with pytest.raises(ScpertError, match="path has 2 files: give three"):
        reactome(files[:2])
    mapped = reactome(*files, aliases=pd.DataFrame({"alias": ["A"], "approved": ["AA"]}))
    assert "AA" in mapped and "A" not in mapped and mapped.attrs["unmapped"] == ["B", "C"]


def test_any_species_by_its_own_files(tmp_path):
    (tmp_path / "r.gmt").write_text("All\tR-GGA-1\tA\tB\nSome\tR-GGA-2\tA\n")
    (tmp_path / "h.txt").write_text("R-GGA-1\tR-GGA-2\nR-HSA-1\tR-HSA-2\n")
    r = reactome(tmp_path / "r.gmt", hierarchy=tmp_path / "h.txt", organism="GGA")
    assert r.all_pathways == ["R-GGA-1", "R-GGA-2"] and r.level("All") == 2


def test_download_is_used_without_path(files, monkeypatch):
    by_name = dict(
        zip(["ReactomePathways.gmt.zip", "ReactomePathways.txt", "ReactomePathwaysRelation.txt"], files, strict=True)
    )
    asked = []

    def fetch(url, filename, sha256=None, *, subfolder):
        asked.append(url)
        return by_name[filename]

    monkeypatch.setattr("scpert.resources._reactome.fetch", fetch)
    assert reactome().genes("Some") == ["A", "B"]
    assert all(u.startswith("https://reactome.org/download/current/") for u in asked) and len(asked) == 3


def test_bad_files(files, tmp_path, caplog):
    gmt, names, relation = files
    flat = reactome(gmt)  # gene sets alone work: no hierarchy, one level
    assert flat.n_levels == 1 and flat.genes("Some") == reactome(*files).genes("Some") and not flat.parents("Some")
    with pytest.raises(ScpertError, match="gene sets as path="):
        reactome(hierarchy=relation)
    with pytest.raises(FileFormatError, match="places none of the pathways"):
        reactome(*files, organism="mouse")
    with pytest.raises(ScpertError, match="organism='martian' is not known"):
        reactome(*files, organism="martian")
    with pytest.raises(ScpertError, match="official gene sets are human"):
        reactome(organism="mouse")
    other = tmp_path / "o.gmt"
    other.write_text("HALLMARK\thttp://x\tA\tB\n")
    with pytest.raises(FileFormatError, match="no Reactome identifier"):
        reactome(other, hierarchy=relation)
    cycle = tmp_path / "c.tsv"
    cycle.write_text("parent\tchild\nR-HSA-1\tR-HSA-2\nR-HSA-2\tR-HSA-1\n")
    with pytest.raises(FileFormatError, match="cycle: R-HSA-1 -> R-HSA-2 -> R-HSA-1"):
        reactome(gmt, hierarchy=cycle)
    half = tmp_path / "half.gmt"
    half.write_text("Some\tR-HSA-1\tA\n")
    tree = tmp_path / "tree.txt"
    tree.write_text("R-HSA-1\tR-HSA-2\nR-HSA-1\tR-HSA-3\n")
    assert reactome(half, hierarchy=tree).attrs["without_genes"] == ["R-HSA-2", "R-HSA-3"]
    assert "2 of the 3 pathways of the hierarchy have no genes" in caplog.text
    cut = tmp_path / "cut.gmt.gz"
    cut.write_bytes(gmt.read_bytes()[:-20])
    with pytest.raises(FileFormatError, match="truncated"):
        reactome(cut, hierarchy=relation)
    short = tmp_path / "short.txt"
    short.write_text("R-HSA-1\tR-HSA-2\nR-HSA-1\n")
    with pytest.raises(FileFormatError, match="line 2 has one column"):
        reactome(gmt, hierarchy=short)


@needs_priors
@pytest.mark.parametrize(
    "sets, version",
    [("reactome_gene_sets_human_c2023-02", "c2023-02"), ("reactome_gene_sets_human_2024-04", "c2024-05")],
)
def test_agrees_with_the_three_source_files(sets, version):
    folder = Path(PRIORS)
    paths = [
        folder / f"{sets}.gmt.gz",
        folder / f"reactome_pathway_names_human_{version}.tsv.gz",
        folder / f"reactome_hierarchy_human_{version}.tsv.gz",
    ]
    r = reactome(*paths)
    raw = {}
    for line in gzip.open(paths[0], "rt"):
        first, second, *genes = line.rstrip("\n").split("\t")
        raw[first if first.startswith("R-HSA") else second] = set(genes)
    names = pd.read_csv(paths[1], sep="\t").set_index("pathway_id")["name"]
    edges = pd.read_csv(paths[2], sep="\t")
    graph = nx.DiGraph(list(zip(edges["parent"], edges["child"], strict=True)))
    rng = np.random.default_rng(0)
    genes = sorted(set().union(*raw.values()))
    for gene in rng.choice(genes, 50, replace=False):
        found = r.pathways(gene)
        assert found == sorted(p for p, g in raw.items() if gene in g)
        for p in found:
            assert set(r.genes(p)) == raw[p]
            assert p not in names.index or r.names[p] == names[p].strip()
    check_against_networkx(r, graph, rng.choice(sorted(graph), 100, replace=False))


def test_a_list_of_identifiers_is_no_gene_sets(tmp_path):
    file = tmp_path / "NCBI2Reactome.txt"
    file.write_text("7157\tR-HSA-109581\thttps://reactome.org/x\tApoptosis\tTAS\tHomo sapiens\n")
    with pytest.raises(FileFormatError, match="ReactomePathways.gmt"):
        reactome(file)
