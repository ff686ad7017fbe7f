"""tl.perturbation_effects against scipy, on every kind of matrix, and with bad input."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import scpert
from scpert.errors import LabelError, MissingKeyError, ScaleError, ScpertError
from scpert.tl._effects import benjamini_hochberg


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return scpert.datasets.simulated(n_cells=400, n_genes=30, n_targets=4, n_combinations=1, random_state=1)


def normalised(adata: ad.AnnData) -> np.ndarray:
    counts = adata.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def test_equals_scipy_welch_and_bh(screen):
    effects = scpert.tl.perturbation_effects(screen)
    x, labels = normalised(screen), screen.obs["perturbation"].astype(str).to_numpy()
    for row, label in enumerate(effects.obs_names):
        own, control = x[labels == label], x[labels == "control"]
        expected = stats.ttest_ind(own, control, equal_var=False)
        np.testing.assert_allclose(effects.X[row], own.mean(0) - control.mean(0), atol=1e-5)
        both = np.isfinite(expected.statistic)
        np.testing.assert_allclose(effects.layers["zscore"][row][both], expected.statistic[both], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(effects.layers["pvals"][row][both], expected.pvalue[both], rtol=1e-2, atol=1e-6)
    finite = np.isfinite(effects.layers["pvals"])
    np.testing.assert_allclose(
        effects.layers["pvals_adj"][finite], stats.false_discovery_control(effects.layers["pvals"][finite])
    )
    assert list(effects.obs["n_cells"]) == [int((labels == p).sum()) for p in effects.obs_names]


def test_benjamini_hochberg_leaves_nan():
    p = np.array([[0.01, np.nan], [0.5, 0.02]])
    out = benjamini_hochberg(p)
    assert np.isnan(out[0, 1])
    np.testing.assert_allclose(out[np.isfinite(p)], stats.false_discovery_control(p[np.isfinite(p)]))


@pytest.mark.parametrize("kind", ["csc", "dense", "float16", "int", "view", "dask", "backed", "categorical"])
def test_same_for_every_kind_of_matrix(screen, kind, tmp_path):
    expected = scpert.tl.perturbation_effects(screen)
    other = screen.copy()
    if kind == "csc":
        other.X = sparse.csc_matrix(other.X)
    elif kind == "dense":
        other.X = other.X.toarray()
    elif kind == "float16":
        other.X = other.X.toarray().astype(np.float16)
    elif kind == "int":
        other.X = other.X.astype(np.int64)
    elif kind == "view":
        other = ad.concat([other, other], index_unique="-")[: screen.n_obs]
    elif kind == "dask":
        array = pytest.importorskip("dask.array")
        other.X = array.from_array(other.X.toarray(), chunks=(100, -1))
    elif kind == "backed":
        other.write_h5ad(tmp_path / "a.h5ad")
        other = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif kind == "categorical":
        other.obs["perturbation"] = other.obs["perturbation"].astype(str).astype("category")
    found = scpert.tl.perturbation_effects(other)
    np.testing.assert_allclose(found.X, expected.X, atol=1e-5)
    np.testing.assert_allclose(found.layers["pvals"], expected.layers["pvals"], atol=1e-4)


def test_strata_compare_within_batches():
    """A batch effect confounded with the perturbation vanishes with covariate_keys, and one stratum changes nothing."""
    rng = np.random.default_rng(0)
    batch = np.repeat(["a", "b"], 300)
    label = np.where(rng.random(600) < np.where(batch == "a", 0.2, 0.8), "G0", "control")
    x = rng.normal(1.0, 0.3, size=(600, 5)) + (batch == "b")[:, None]
    adata = ad.AnnData(np.maximum(x, 0.01), obs=pd.DataFrame({"perturbation": label, "batch": batch, "one": "1"}))
    adata.obs_names = [str(i) for i in range(600)]
    adata.var_names = [f"G{i}" for i in range(5)]
    plain = scpert.tl.perturbation_effects(adata, scale="log1p")
    within = scpert.tl.perturbation_effects(adata, scale="log1p", covariate_keys="batch")
    assert np.abs(plain.X).min() > 0.3
    assert np.abs(within.X).max() < 0.15
    assert within.layers["pvals"].min() > 1e-4
    one = scpert.tl.perturbation_effects(adata, scale="log1p", covariate_keys=["one"])
    np.testing.assert_allclose(one.layers["zscore"], plain.layers["zscore"])
    # by hand: the mean over cells of x minus the mean of the controls of the cell's batch
    x = adata.X
    control = {b: x[(batch == b) & (label == "control")].mean(0) for b in "ab"}
    by_hand = np.mean([x[i] - control[batch[i]] for i in np.flatnonzero(label == "G0")], axis=0)
    np.testing.assert_allclose(within.X[0], by_hand, atol=1e-6)


def test_one_cell_gives_nan_not_a_crash(screen, caplog):
    adata = screen.copy()
    labels = adata.obs["perturbation"].astype(str).to_numpy(dtype=object)
    labels[np.flatnonzero(labels == "control")[0]] = "LONELY"
    adata.obs["perturbation"] = labels
    with caplog.at_level("WARNING", logger="scpert"):
        effects = scpert.tl.perturbation_effects(adata)
    assert np.isnan(effects["LONELY"].layers["pvals"]).all()
    assert np.isfinite(effects["LONELY"].X).all()
    assert "LONELY" in caplog.text


def test_few_cells_are_named(screen, caplog):
    labels = screen.obs["perturbation"].astype(str)
    first = sorted(set(labels) - {"control"})[0]
    rows = np.flatnonzero(labels == first)
    some = screen[np.setdiff1d(np.arange(screen.n_obs), rows[10:])].copy()
    scpert.tl.perturbation_effects(some)
    assert f"fewer than 30 cells ({first!r})" in caplog.text
    caplog.clear()
    scpert.tl.perturbation_effects(screen[labels.isin(["control", labels.value_counts().index[1]])].copy())
    assert "fewer than 30" not in caplog.text


def test_constant_gene_has_no_evidence(screen):
    adata = screen.copy()
    dense = adata.X.toarray()
    dense[:, 0] = 0
    adata.X = sparse.csr_matrix(dense)
    effects = scpert.tl.perturbation_effects(adata)
    assert (effects.layers["zscore"][:, 0] == 0).all()
    assert (effects.layers["pvals"][:, 0] == 1).all()


def test_tables_of_effects_are_not_centred():
    rng = np.random.default_rng(0)
    table = ad.AnnData(
        rng.normal(size=(6, 4)),
        obs=pd.DataFrame({"perturbation": ["A", "B", "C", "D", "D", "control"]}, index=list("uvwxyz")),
        var=pd.DataFrame(index=["A", "B", "C", "E"]),
    )
    effects = scpert.tl.perturbation_effects(table)
    assert effects.uns["effects"]["scale"] == "effects"
    np.testing.assert_allclose(effects["A"].X[0], table.X[0])
    np.testing.assert_allclose(effects["D"].X[0], table.X[3:5].mean(0))
    assert list(effects.obs["n_cells"]) == [1, 1, 1, 2]
    assert effects.obs.loc["A", "on_target"] == pytest.approx(table.X[0, 0])


def test_library_size_of_a_small_panel(screen):
    adata = screen.copy()
    adata.obs["full"] = np.asarray(adata.X.sum(axis=1)).ravel() * 3.0
    effects = scpert.tl.perturbation_effects(adata, library_size_key="full")
    x = np.log1p(adata.X.toarray() / adata.obs["full"].to_numpy()[:, None] * 1e4)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    label = effects.obs_names[0]
    np.testing.assert_allclose(effects.X[0], x[labels == label].mean(0) - x[labels == "control"].mean(0), atol=1e-5)


def test_round_trip_and_long_form(screen, tmp_path):
    effects = scpert.tl.perturbation_effects(screen, covariate_keys=["batch"])
    effects.write_h5ad(tmp_path / "e.h5ad")
    effects.write_zarr(tmp_path / "e.zarr")
    for back in (ad.read_h5ad(tmp_path / "e.h5ad"), ad.read_zarr(tmp_path / "e.zarr")):
        np.testing.assert_array_equal(back.layers["pvals"], effects.layers["pvals"])
        assert back.uns["effects"]["statistic"] == "welch"
    table = scpert.get.effects_df(effects)
    assert len(table) == effects.n_obs * effects.n_vars
    row = table[(table["perturbation"] == effects.obs_names[1]) & (table["gene"] == effects.var_names[2])]
    assert row["effect"].item() == effects.X[1, 2]


def test_bad_input(screen):
    adata = screen.copy()
    before = adata.copy()
    with pytest.raises(MissingKeyError, match="perturbation_key='guide'"):
        scpert.tl.perturbation_effects(adata, perturbation_key="guide")
    with pytest.raises(LabelError, match="control='NT'"):
        scpert.tl.perturbation_effects(adata, control="NT")
    with pytest.raises(MissingKeyError, match="covariate_keys='nothing'"):
        scpert.tl.perturbation_effects(adata, covariate_keys="nothing")
    with pytest.raises(ScaleError, match="log1p"):
        scpert.tl.perturbation_effects(adata, scale="log1p")
    table = ad.AnnData(
        np.eye(3, dtype=np.float32) * 0.5, obs=pd.DataFrame({"perturbation": list("ABC")}, index=list("abc"))
    )
    with pytest.raises(LabelError, match="say scale='effects'"):
        scpert.tl.perturbation_effects(table)
    only = adata[adata.obs["perturbation"] == "control"].copy()
    with pytest.raises(ScpertError, match="no perturbation"):
        scpert.tl.perturbation_effects(only)
    adata.obs["donor2"] = np.where(adata.obs["perturbation"] == "control", "x", "y")
    with pytest.raises(ScpertError, match="fewer than two control cells: 'y'"):
        scpert.tl.perturbation_effects(adata, covariate_keys="donor2")
    adata.obs["donor3"] = pd.Series([None] * adata.n_obs, index=adata.obs_names, dtype=object)
    with pytest.raises(ScpertError, match="NaN"):
        scpert.tl.perturbation_effects(adata, covariate_keys="donor3")
    assert (adata.X != before.X).nnz == 0 and not adata.uns.keys() - before.uns.keys()


def test_many_strata_are_read_in_blocks(monkeypatch):
    """Blocks of perturbations give what one pass gives."""
    from scpert.data import _effects

    adata = scpert.datasets.simulated(n_cells=1500, n_genes=40, n_targets=12, n_combinations=0, random_state=0)
    adata.obs["plate"] = np.random.default_rng(0).choice(list("abcde"), adata.n_obs)
    whole = scpert.tl.perturbation_effects(adata, covariate_keys="plate")
    monkeypatch.setattr(_effects, "_STRATA_BYTES", 24 * 5 * 40 * 5)
    parts = scpert.tl.perturbation_effects(adata, covariate_keys="plate")
    np.testing.assert_allclose(parts.X, whole.X, rtol=1e-12)
    for layer in ("std_error", "zscore", "pvals"):
        np.testing.assert_allclose(parts.layers[layer], whole.layers[layer], rtol=1e-9, equal_nan=True)
    np.testing.assert_array_equal(parts.obs["n_cells"], whole.obs["n_cells"])
