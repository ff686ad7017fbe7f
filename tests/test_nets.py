"""Nets from annotations, cells and pathways: against dense formulas; bad input."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert
from scpert.errors import ScaleError, ScpertError, SplitError
from scpert.pp import _nets, coexpression_net, pathway_mask, similarity_net
from scpert.resources import Reactome, gene_ontology

PRIORS = os.environ.get("SCPERT_TEST_PRIORS")


def edges(net: pd.DataFrame) -> dict[tuple[str, str], float]:
    assert list(net.columns) == ["source", "target", "weight"]
    out = dict(zip(zip(net["source"], net["target"], strict=True), net["weight"], strict=True))
    assert len(out) == len(net)
    return out


def annotations(rng, n_genes=70, n_terms=30, n=600) -> pd.DataFrame:
    # a few terms of very many genes, many of few: both ways of counting are used
    terms = np.minimum(rng.geometric(0.08, n), n_terms)
    return pd.DataFrame(
        {"gene": [f"G{g:02d}" for g in rng.integers(n_genes, size=n)], "term": [f"T{t}" for t in terms]}
    )


@pytest.mark.parametrize("block", [7, 1024])
def test_jaccard_against_sets(monkeypatch, block):
    monkeypatch.setattr(_nets, "_BLOCK", block)
    table = annotations(np.random.default_rng(0))
    sets = table.groupby("gene")["term"].agg(set)
    expected = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        for a in sets.index
        for b in sets.index
        if a != b and len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= 0.2
    }
    found = edges(similarity_net(table, top_k=None, threshold=0.2))
    assert found.keys() == expected.keys()
    assert np.allclose([found[e] for e in expected], list(expected.values()), atol=1e-6)
    some = edges(similarity_net(table, top_k=3, threshold=0.2))
    for gene in sets.index:  # each target keeps its three most similar genes, ties by name
        order = sorted((e for e in expected if e[1] == gene), key=lambda e: (-np.float32(expected[e]), e[0]))
        assert {e for e in some if e[1] == gene} == set(order[:3])
    few = ["G01", "G02", "G03", "absent"]
    inside = {e for e in expected if set(e) <= set(few)}
    assert edges(similarity_net(table, top_k=None, threshold=0.2, genes=few)).keys() == inside


def test_similarity_bad_input():
    table = annotations(np.random.default_rng(0))
    with pytest.raises(ScpertError, match="columns gene and term; got a DataFrame with the columns 'symbol'"):
        similarity_net(table.rename(columns={"gene": "symbol"}))
    with pytest.raises(ScpertError, match="got dict"):
        similarity_net({})
    with pytest.raises(ScpertError, match="NaN in gene or term"):
        similarity_net(pd.DataFrame({"gene": ["A", None], "term": ["x", "x"]}))
    with pytest.raises(ScpertError, match="None of the 1 genes is annotated"):
        similarity_net(table, genes=["ENSG1"])
    with pytest.raises(ScpertError, match="threshold=0"):
        similarity_net(table, threshold=0)
    with pytest.raises(ScpertError, match="top_k=0"):
        similarity_net(table, top_k=0)
    assert similarity_net(pd.DataFrame({"gene": ["A", "B"], "term": ["x", "y"]})).empty
    spaced = table.assign(gene=" " + table["gene"], term=table["term"] + " ")
    pd.testing.assert_frame_equal(similarity_net(spaced), similarity_net(table))


@pytest.mark.skipif(not PRIORS, reason="SCPERT_TEST_PRIORS does not name a folder with real annotation files")
def test_map2k3_map2k6_in_the_go_of_2015():
    go = gene_ontology(Path(PRIORS) / "go_direct_allev_human_2015-07.tsv.gz")
    found = edges(similarity_net(go))
    assert found[("MAP2K3", "MAP2K6")] == pytest.approx(0.585, abs=0.001)
    assert found[("MAP2K6", "MAP2K3")] == found[("MAP2K3", "MAP2K6")]


# ------------------------------------------------------------------------------------------------ co-expression


@pytest.fixture(scope="module")
def screen():
    adata = scpert.datasets.simulated(n_cells=500, n_genes=50, n_targets=5, random_state=3)
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 3 == 0, "test", "train")
    return adata


def pearson(adata, cells) -> pd.DataFrame:
    counts = adata.X.toarray()[cells]
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(values.T)
    np.fill_diagonal(r, 0)
    return pd.DataFrame(np.nan_to_num(r), adata.var_names, adata.var_names)


def test_coexpression_uses_training_cells_only(screen):
    train = (screen.obs["split"] == "train").to_numpy()
    r = pearson(screen, train)
    found = edges(coexpression_net(screen, threshold=0.1, top_k=None))
    expected = {(a, b) for a in r.index for b in r.index if abs(r.loc[a, b]) >= 0.1}
    assert found.keys() == expected
    assert np.allclose([found[e] for e in expected], [r.loc[e] for e in expected], atol=1e-5)
    assert min(found.values()) < 0  # signed
    changed = screen.copy()
    X = changed.X.toarray()
    X[~train] = np.random.default_rng(0).poisson(5, X[~train].shape)
    changed.X = sparse.csr_matrix(X)
    pd.testing.assert_frame_equal(coexpression_net(changed, threshold=0.1), coexpression_net(screen, threshold=0.1))
    everything = edges(coexpression_net(screen, threshold=0.1, top_k=None, split_key=None))
    assert everything.keys() != found.keys()


def test_coexpression_within_covariates(screen):
    """Against numpy: correlation of what is left without the means of each batch."""
    train = (screen.obs["split"] == "train").to_numpy()
    counts = screen.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    screen = screen.copy()
    screen.obs["run"] = np.where(np.arange(screen.n_obs) % 3 == 0, "x", "y")
    screen.obs["part"] = np.where(np.arange(screen.n_obs) % 2 == 0, "a", "b")
    both = (screen.obs["run"] + screen.obs["part"]).to_numpy()
    for batch in np.unique(both):
        values[both == batch] -= values[train & (both == batch)].mean(axis=0)
    r = np.corrcoef(values[train].T)
    net = coexpression_net(screen, threshold=0.05, top_k=None, covariate_keys=["run", "part"])
    found = edges(net)
    expected = {
        (a, b): r[i, j]
        for i, a in enumerate(screen.var_names)
        for j, b in enumerate(screen.var_names)
        if i != j and abs(r[i, j]) >= 0.05
    }
    assert found.keys() == expected.keys()
    assert np.allclose([found[e] for e in expected], list(expected.values()), atol=1e-5)


def test_coexpression_top_k_and_forms(screen, monkeypatch):
    r = pearson(screen, (screen.obs["split"] == "train").to_numpy()).abs()
    net = coexpression_net(screen, threshold=0.01, top_k=4)
    for gene, part in net.groupby("target"):
        assert set(part["source"]) == set(r[gene].nlargest(4).index)
    dense = screen.copy()
    dense.X = dense.X.toarray()
    pd.testing.assert_frame_equal(coexpression_net(dense, threshold=0.01, top_k=4), net)
    monkeypatch.setattr(_nets, "_BLOCK", 9)
    pd.testing.assert_frame_equal(coexpression_net(screen, threshold=0.01, top_k=4), net)
    logged = screen.copy()
    counts = logged.X.toarray()
    logged.X = sparse.csr_matrix(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4))
    again = coexpression_net(logged, threshold=0.01, top_k=4, scale="log1p")
    pd.testing.assert_frame_equal(again, net, atol=1e-5)


def test_coexpression_bad_input(screen):
    other = screen.copy()
    other.obs["split"] = "test"
    with pytest.raises(SplitError, match="has 0 training cells .*'test'"):
        coexpression_net(other)
    other = screen.copy()
    other.X.data[3] = np.nan
    with pytest.raises(ScaleError, match="NaN or infinite"):
        coexpression_net(other)
    with pytest.raises(ScpertError, match="threshold=1.5"):
        coexpression_net(screen, threshold=1.5)
    constant = screen.copy()
    X = constant.X.toarray()
    X[:, 0] = 0
    constant.X = sparse.csr_matrix(X)
    net = coexpression_net(constant, threshold=0.01)
    assert constant.var_names[0] not in set(net["source"]) | set(net["target"])
    assert coexpression_net(screen, threshold=1.0).empty


# ------------------------------------------------------------------------------------------------ mask


R = Reactome({"P": list("ABCD"), "Q": list("AB"), "S": list("EX")}, {}, [("P", "Q")])


def test_mask_by_name_symmetric_with_self():
    adata = ad.AnnData(np.ones((2, 6)), var=pd.DataFrame(index=list("FDBAEY")))
    fallback = pd.DataFrame(
        {"source": ["F", "A", "A", "F"], "target": ["A", "D", "E", "Z"], "weight": [0.9, 0.8, 0.7, 0.6]}
    )
    found = edges(pathway_mask(adata, R, fallback_net=fallback))
    own = {(g, g) for g in "FDBAEY"}
    shared = {(a, b) for a in "ABD" for b in "ABD"}
    outside = {("F", "A"), ("A", "F")}  # F is not in Reactome; A-E and A-D are for Reactome to decide
    assert found.keys() == own | shared | outside
    assert set(found.values()) == {1.0}
    assert edges(pathway_mask(adata, R, level=1)).keys() == own | {("A", "B"), ("B", "A")}


def test_mask_does_not_depend_on_gene_order():
    genes = list("FDBAEY")
    one = pathway_mask(genes, R)
    pd.testing.assert_frame_equal(one, pathway_mask(genes[::-1], R))


def test_mask_bad_input():
    with pytest.raises(ScpertError, match="The mask is empty: no two of the 2 genes .*'ENSG1'"):
        pathway_mask(["ENSG1", "ENSG2"], R)
    with pytest.raises(ScpertError, match="must be a scpert.resources.Reactome .* got dict"):
        pathway_mask(["A", "B"], {})
    for net, message in (
        (pd.DataFrame({"from": ["A"], "to": ["B"]}), "lacks the column"),
        (pd.DataFrame({"source": ["A"], "target": ["F"], "weight": [np.nan]}), "NaN, infinite"),
        (pd.DataFrame({"source": ["M"], "target": ["N"]}), "shares no edge with the genes"),
    ):
        with pytest.raises(ScpertError, match=message):
            pathway_mask(["A", "B", "F"], R, fallback_net=net)
    loops = pd.DataFrame({"source": ["F", "F", "F"], "target": ["F", "A", "A"], "weight": [1, 0.5, 0.7]})
    assert ("F", "A") in edges(pathway_mask(["A", "B", "F"], R, fallback_net=loops))


def test_the_empty_text_is_no_annotation():
    table = pd.DataFrame({"gene": ["A", "B", "C", "D"], "term": ["", "", "x", "x"]})
    net = scpert.pp.similarity_net(table)
    assert set(net["source"]) == {"C", "D"}
    with pytest.raises(ScpertError, match="None of the 1 genes is annotated"):
        scpert.pp.similarity_net(table, genes="CD")
    with pytest.raises(ScpertError, match="top_k='a'"):
        scpert.pp.similarity_net(table, top_k="a")


def test_rounding_is_no_correlation_within_strata():
    adata = ad.AnnData(np.random.default_rng(0).poisson(1.0, (40, 2001)).astype(np.float32) + 1)
    adata.obs["cell"] = adata.obs_names  # nothing varies within strata of one cell
    assert len(coexpression_net(adata, covariate_keys="cell", scale="counts")) == 0
