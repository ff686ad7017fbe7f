import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import scpert
from scpert.errors import LabelError, MissingKeyError, ScaleError, ScpertError
from scpert.pp._quality import GENE_SETS, _valley


def counts(n=240, seed=0):
    """Four labels; 30 genes with mitochondrial, ribosomal and haemoglobin ones; A is knocked down in its cells."""
    rng = np.random.default_rng(seed)
    genes = ["A", "B", "MT-CO1", "MT-ND1", "RPS3", "RPL5", "HBB", "HBA1", "HBP1", "RPS6KA1"] + [
        f"G{i}" for i in range(20)
    ]
    labels = np.array(["control"] * (n // 2) + ["A"] * (n // 4) + ["B"] * (n // 4 - 4) + ["A+B"] * 4, dtype=object)
    mean = rng.gamma(2, 4, len(genes)) + 2
    X = rng.poisson(mean * rng.uniform(0.7, 1.3, (n, 1)))
    X[labels == "A", 0] = rng.poisson(0.1 * mean[0], (labels == "A").sum())
    obs = pd.DataFrame({"perturbation": labels, "batch": rng.choice(["x", "y"], n)}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


CHEAP = ["counts_low", "genes_low", "mito_high", "ribo_high", "hb_high"]


@pytest.mark.parametrize("mad_scale", [1.0, 1.4826])
def test_quality_flags_are_the_published_criteria(mad_scale):
    adata = counts()
    scpert.pp.quality_flags(adata, criteria=CHEAP, per_criterion=True, mad_scale=mad_scale)
    X, symbols = adata.X.toarray(), np.array(adata.var_names)
    total = X.sum(1)
    values = {
        "counts_low": total,
        "genes_low": (X > 0).sum(1),
        "mito_high": 100 * X[:, np.isin(symbols, ["MT-CO1", "MT-ND1"])].sum(1) / total,
        "ribo_high": 100 * X[:, np.isin(symbols, ["RPS3", "RPL5"])].sum(1) / total,
        "hb_high": 100 * X[:, np.isin(symbols, ["HBB", "HBA1"])].sum(1) / total,
    }
    union = np.zeros(adata.n_obs, dtype=bool)
    for name, x in values.items():
        width = 3 * mad_scale * stats.median_abs_deviation(x)
        expected = x < np.median(x) - width if name.endswith("low") else x > np.median(x) + width
        expected &= width > 0
        assert (adata.obs[f"quality_fail_{name}"] == expected).all()
        union |= expected
    assert (adata.obs["quality_fail"] == union).all() and union.any()


def test_gene_sets():
    match = {
        k: [
            g
            for g in (
                "MT-CO1",
                "mt-Nd1",
                "MTOR",
                "RPS3",
                "Rpl13a",
                "RPLP0",
                "RPSA",
                "RPS6KA1",
                "RPS4X",
                "RPSAP9",
                "HBB",
                "HBG2",
                "Hba-a1",
                "HBP1",
                "HBEGF",
            )
            if p.match(g)
        ]
        for k, p in GENE_SETS.items()
    }
    assert match["mito"] == ["MT-CO1", "mt-Nd1"]
    assert match["ribo"][:4] == ["RPS3", "Rpl13a", "RPLP0", "RPSA"] and "RPS6KA1" not in match["ribo"]
    assert match["hb"] == ["HBB", "HBG2", "Hba-a1"]


def test_quality_by_batch_and_planted_failure():
    adata = counts()
    X = adata.X.toarray()
    X[7, 2] += 500
    X[9] = (X[9] > np.median(X[9])).astype(np.float32)
    adata.X = sparse.csr_matrix(X)
    scpert.pp.quality_flags(adata, criteria=CHEAP, batch_key="batch", per_criterion=True)
    assert adata.obs["quality_fail_mito_high"].iloc[7] and adata.obs["quality_fail_counts_low"].iloc[9]
    alone = adata[adata.obs["batch"] == "x"].copy()
    scpert.pp.quality_flags(alone, criteria=CHEAP)
    assert (alone.obs["quality_fail"] == adata.obs.loc[alone.obs_names, "quality_fail"]).all()


def test_what_cannot_be_computed_is_said(caplog):
    adata = counts()[:, 8:].copy()
    with caplog.at_level("INFO", logger="scpert"):
        scpert.pp.quality_flags(adata, criteria=CHEAP)
    assert "mito_high not computed" in caplog.text
    table = adata.uns["scpert"]["quality_fail"]["criteria"].set_index("criterion")
    assert "no such genes" in table.loc["mito_high", "status"] and table.loc["mito_high", "n_fail"] == 0


def test_scrublet_calls_planted_doublets():
    pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    kinds = rng.gamma(0.3, 8, (4, 200))
    kind = rng.integers(4, size=400)
    X = rng.poisson(kinds[kind])
    pairs = rng.choice(400, (20, 2))
    pairs = pairs[kind[pairs[:, 0]] != kind[pairs[:, 1]]]
    X = np.vstack([X, X[pairs[:, 0]] + X[pairs[:, 1]]])
    adata = ad.AnnData(sparse.csr_matrix(X.astype(np.float32)))
    scpert.pp.quality_flags(adata, criteria=["doublet"])
    called = adata.obs["quality_fail"].to_numpy()
    assert called[400:].mean() > 0.6 and called[:400].mean() < 0.1


def test_valley_lies_between_two_modes():
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(0, 0.5, 4000), rng.normal(5, 0.5, 2000)]
    assert 1.0 < _valley(values) < 4.0


@pytest.mark.parametrize("form", ["csc", "dense", "int", "float16", "view", "layer", "backed"])
def test_quality_of_every_kind_of_matrix(form, tmp_path):
    adata = counts()
    expected = scpert.pp.quality_flags(adata, criteria=CHEAP, copy=True).obs["quality_fail"]
    if form == "csc":
        adata.X = adata.X.tocsc()
    elif form == "dense":
        adata.X = adata.X.toarray()
    elif form == "int":
        adata.X = adata.X.astype(np.int64)
    elif form == "float16":
        adata.X = adata.X.toarray().astype(np.float16)
    elif form == "view":
        adata = adata[:]
    elif form == "layer":
        adata.layers["counts"] = adata.X.copy()
        adata.X = adata.X.log1p()
    else:
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    scpert.pp.quality_flags(adata, criteria=CHEAP)
    assert (adata.obs["quality_fail"].to_numpy() == expected.to_numpy()).all()


def test_quality_refuses():
    adata = counts()
    logs = adata.copy()
    logs.X = logs.X.log1p()
    with pytest.raises(ScaleError, match="counts"):
        scpert.pp.quality_flags(logs)
    with pytest.raises(MissingKeyError, match="raw"):
        scpert.pp.quality_flags(adata, layer="raw")
    with pytest.raises(ScpertError, match="n_mads"):
        scpert.pp.quality_flags(adata, n_mads=0)
    with pytest.raises(ScpertError, match="Did you mean 'mito_high'"):
        scpert.pp.quality_flags(adata, criteria=["mito"])
    adata.X.data[5] = np.nan
    with pytest.raises(ScaleError, match="NaN"):
        scpert.pp.quality_flags(adata)
    assert "quality_fail" not in adata.obs and "scpert" not in adata.uns


# ---------------------------------------------------------------------------------------------- perturbations


def log1p_cp10k(adata):
    X = adata.X.toarray().astype(np.float64)
    return np.log1p(1e4 * X / X.sum(1, keepdims=True))


def test_filter_by_cells_degs_and_change():
    adata = counts()
    L = log1p_cp10k(adata)
    labels = adata.obs["perturbation"].to_numpy()
    p = stats.ttest_ind(L[labels == "A"], L[labels == "control"], equal_var=False).pvalue
    n_degs = int((stats.false_discovery_control(p) < 0.05).sum())
    out = scpert.pp.filter_perturbations(adata, min_cells=5, min_degs=n_degs, max_target_change=-0.3, copy=True)
    assert set(out.obs["perturbation"]) == {"control", "A"} and adata.n_obs == 240
    table = out.uns["scpert"]["filter_perturbations"]["perturbations"].set_index("perturbation")
    assert table.loc["A", "n_degs"] == n_degs and table.loc["A+B", "dropped_for"] == "min_cells"
    linear = np.expm1(L)[:, 0]
    change = linear[labels == "A"].mean() / linear[labels == "control"].mean() - 1
    assert table.loc["A", "target_change"] == pytest.approx(change, rel=1e-4)
    scpert.pp.filter_perturbations(adata, min_cells=5)
    assert set(adata.obs["perturbation"]) == {"control", "A", "B"}


def test_filter_by_target_expression():
    adata = counts()
    L = log1p_cp10k(adata)
    labels = adata.obs["perturbation"].to_numpy()
    column = {"A": 0, "B": 1}
    keep = np.ones(adata.n_obs, dtype=bool)
    for name in ("A", "B", "A+B"):
        for t in name.split("+"):
            limit = np.percentile(L[labels == "control", column[t]].astype(np.float32), 40)
            keep &= (labels != name) | (L[:, column[t]].astype(np.float32) <= limit)
    out = scpert.pp.filter_perturbations(adata, min_cells=0, max_target_expression_percentile=40, copy=True)
    assert set(out.obs_names) == set(adata.obs_names[keep]) and (~keep).any()


def test_filter_refuses_and_changes_nothing():
    adata = counts()
    with pytest.raises(ScpertError, match="No perturbation would be left of 3"):
        scpert.pp.filter_perturbations(adata, min_cells=1000)
    with pytest.raises(ScpertError, match="percentile"):
        scpert.pp.filter_perturbations(adata, max_target_expression_percentile=110)
    with pytest.raises(LabelError, match="ctrl"):
        scpert.pp.filter_perturbations(adata, control="ctrl")
    assert adata.n_obs == 240 and not adata.uns


def test_filter_round_trip(tmp_path):
    adata = counts()
    scpert.pp.filter_perturbations(adata, min_cells=5, min_degs=1)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    assert ad.read_zarr(tmp_path / "a.zarr").uns["scpert"]["filter_perturbations"]["min_cells"] == 5


# ---------------------------------------------------------------------------------------------- genes


def test_select_genes_is_scanpys_seurat():
    sc = pytest.importorskip("scanpy")
    adata = scpert.datasets.simulated(n_cells=300, n_genes=120, n_targets=5)
    scpert.pp.select_genes(adata, 20, keep_targets=False)
    reference = adata.copy()
    reference.X = sparse.csr_matrix(log1p_cp10k(adata))
    sc.pp.highly_variable_genes(reference, flavor="seurat", n_top_genes=20)
    ours, theirs = adata.var["highly_variable_score"], reference.var["dispersions_norm"]
    np.testing.assert_allclose(ours.fillna(0), theirs.fillna(0), atol=1e-4)
    differ = adata.var["highly_variable"] != reference.var["highly_variable"]  # only where scores are tied
    assert adata.var["highly_variable"].sum() == 20 and ours[differ].nunique() <= 1
    assert ours[adata.var["highly_variable"]].min() >= ours[~adata.var["highly_variable"]].max()


def test_select_genes_keeps_targets_and_looks_at_training_cells_only():
    adata = counts()
    first = scpert.pp.select_genes(adata, 3, copy=True)
    assert first.var.loc[["A", "B"], "highly_variable"].all() and 3 <= first.var["highly_variable"].sum() <= 5
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 2, "train", "test")
    train_only = scpert.pp.select_genes(adata[adata.obs["split"] == "train"].copy(), 3, copy=True)
    scpert.pp.select_genes(adata, 3)
    np.testing.assert_allclose(adata.var["highly_variable_score"], train_only.var["highly_variable_score"])
    scpert.pp.select_genes(adata, 3, subset=True)
    assert adata.n_vars <= 5 and {"A", "B"} <= set(adata.var_names)
    scpert.pp.select_genes(adata, 10_000)
    assert adata.var["highly_variable"].all()


def test_select_genes_refuses():
    adata = counts()
    with pytest.raises(ScpertError, match="n_top_genes"):
        scpert.pp.select_genes(adata, 0)
    adata.obs["split"] = "test"
    with pytest.raises(ScpertError, match="train"):
        scpert.pp.select_genes(adata, 3)
    assert "highly_variable" not in adata.var
