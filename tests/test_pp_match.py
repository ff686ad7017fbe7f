import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

import scpert
from scpert.errors import MissingKeyError, ScaleError, ScpertError, SplitError
from scpert.pp._match import _assign, _draw, _relative_entropy, transport_plan

METHODS = ["ot", "nearest", "assignment", "random"]


def two_states(n_control=120, n=40, seed=0):
    """Controls and perturbed cells in two states (genes 0-9 or 10-19 high); perturbation A also raises gene 20."""
    rng = np.random.default_rng(seed)
    labels = np.array(["control"] * n_control + ["A"] * n + ["B"] * n, dtype=object)
    state = rng.integers(2, size=len(labels))
    mean = np.full((len(labels), 25), 5.0)
    mean[state == 0, :10] *= 6
    mean[state == 1, 10:20] *= 6
    mean[labels == "A", 20] *= 4
    obs = pd.DataFrame({"perturbation": labels, "state": state, "batch": rng.choice(["x", "y"], len(labels))})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return ad.AnnData(sparse.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs)


@pytest.mark.parametrize("method", METHODS)
def test_matches_are_controls_of_the_same_split_and_covariate(method, tmp_path):
    adata = two_states()
    scpert.pp.split(adata, kind="cells", covariate_keys="batch")
    before = adata.copy()
    scpert.pp.match_controls(adata, method=method, covariate_keys="batch")
    matched = adata.obs.loc[adata.obs["matched_control"]]
    assert (matched["perturbation"] == "control").all()
    for key in ("split", "batch"):
        assert (matched[key].to_numpy() == adata.obs[key].to_numpy()).all()
    control = adata.obs["perturbation"] == "control"
    assert (adata.obs.loc[control, "matched_control"] == adata.obs_names[control]).all()
    again = scpert.pp.match_controls(before, method=method, covariate_keys="batch", copy=True)
    assert (again.obs["matched_control"] == adata.obs["matched_control"]).all()
    assert "matched_control" not in before.obs
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    assert list(ad.read_h5ad(tmp_path / "a.h5ad").obs["matched_control"]) == list(adata.obs["matched_control"])
    assert ad.read_zarr(tmp_path / "a.zarr").uns["scpert"]["matched_control"]["method"] == method


@pytest.mark.parametrize(
    "kwargs",
    [
        {"method": "ot"},
        {"method": "ot", "pick": "barycentric"},
        {"method": "nearest"},
        {"method": "assignment"},
        {"method": "ot", "max_cells": 30},
    ],
)
def test_transport_keeps_the_state_of_a_cell(kwargs):
    adata = two_states()
    scpert.pp.match_controls(adata, **kwargs)
    cells = adata.obs["perturbation"] != "control"
    same = (
        adata.obs.loc[adata.obs.loc[cells, "matched_control"], "state"].to_numpy()
        == adata.obs.loc[cells, "state"].to_numpy()
    )
    scpert.pp.match_controls(adata, method="random")
    chance = (
        adata.obs.loc[adata.obs.loc[cells, "matched_control"], "state"].to_numpy()
        == adata.obs.loc[cells, "state"].to_numpy()
    )
    assert same.mean() > 0.85 > chance.mean()


def test_plan_really_transports():
    """The row entropy of the plan is well below uniform; with GPO-VAE's scaling it is uniform."""
    adata = two_states()
    scpert.pp.match_controls(adata)
    assert adata.uns["scpert"]["matched_control"]["row_entropy"] < 0.8
    L = np.log1p(adata.X.toarray())
    control = (adata.obs["perturbation"] == "control").to_numpy()
    flat = transport_plan(cdist(L[~control], L[control]) / 100, 1.0)
    assert _relative_entropy(flat).mean() > 0.999


@pytest.mark.parametrize("epsilon", [0.2, 0.05, 0.01])
def test_plan_agrees_with_pot_in_the_log_domain(epsilon):
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(1)
    C = cdist(rng.normal(size=(30, 4)), rng.normal(size=(45, 4)) + 0.5, "sqeuclidean")
    C /= np.median(C)
    P = transport_plan(C, epsilon)
    reference = ot.bregman.sinkhorn_log(
        np.full(30, 1 / 30), np.full(45, 1 / 45), C, epsilon, numItermax=20_000, stopThr=1e-10
    )
    np.testing.assert_allclose(P, reference * 30, atol=2e-3)
    np.testing.assert_allclose(P.sum(axis=0), 30 / 45, atol=0.02)
    assert np.isfinite(transport_plan(C * 1e4, epsilon)).all()


def test_entropy_draw_and_assignment():
    assert _relative_entropy(np.full((2, 8), 1 / 8)) == pytest.approx(1)
    assert _relative_entropy(np.eye(4)) == pytest.approx(0)
    P = np.array([[0.2, 0.0, 0.8]])
    drawn = np.bincount([_draw(P, np.random.default_rng(i))[0] for i in range(2000)], minlength=3) / 2000
    np.testing.assert_allclose(drawn, P[0], atol=0.04)
    rng = np.random.default_rng(0)
    C = rng.random((7, 3))
    chosen = _assign(C)
    assert set(np.bincount(chosen, minlength=3)) <= {2, 3}
    from itertools import permutations

    small = rng.random((4, 4))
    best = min(sum(small[i, p[i]] for i in range(4)) for p in permutations(range(4)))
    assert small[np.arange(4), _assign(small)].sum() == pytest.approx(best)


def test_own_representation_and_one_control():
    adata = two_states()
    adata.obsm["X_own"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    scpert.pp.match_controls(adata, method="nearest", use_rep="X_own")
    control = (adata.obs["perturbation"] == "control").to_numpy()
    d = cdist(adata.obsm["X_own"][~control], adata.obsm["X_own"][control])
    expected = adata.obs_names[control][d.argmin(axis=1)]
    assert (adata.obs["matched_control"][~control].to_numpy() == np.asarray(expected)).all()
    one = adata[np.flatnonzero(control)[:1].tolist() + np.flatnonzero(~control).tolist()].copy()
    for method in METHODS:
        scpert.pp.match_controls(one, method=method)
        assert set(one.obs["matched_control"]) == {one.obs_names[0]}


def test_refuses():
    adata = two_states()
    with pytest.raises(ScpertError, match="Choose one of 'ot'"):
        scpert.pp.match_controls(adata, method="wd")
    with pytest.raises(ScpertError, match="epsilon"):
        scpert.pp.match_controls(adata, epsilon=0)
    with pytest.raises(MissingKeyError, match="X_umap"):
        scpert.pp.match_controls(adata, use_rep="X_umap")
    adata.obs["plate"] = np.where(adata.obs["perturbation"] == "A", "p2", "p1")
    with pytest.raises(SplitError, match=r"p2 \(40 cells\)"):
        scpert.pp.match_controls(adata, covariate_keys="plate")
    adata.X.data[3] = np.inf
    with pytest.raises(ScaleError, match="infinite"):
        scpert.pp.match_controls(adata)
    assert "matched_control" not in adata.obs and not adata.uns
