"""What split, quality flags and network inference write survives files, for every method of inference."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert

METHODS = ("interventional", "sparse_inverse", "ridge", "boosting", "correlation", "gpovae")


@pytest.fixture(scope="module")
def screen():
    adata = scpert.datasets.simulated(n_cells=400, n_genes=30, n_targets=5, n_combinations=1, random_state=0)
    scpert.pp.split(adata, kind="cells", random_state=0)
    adata.layers["counts"] = adata.X.copy()
    scpert.pp.quality_flags(adata)
    return adata


def _again(adata, path, form):
    if form == "h5ad":
        adata.write_h5ad(path)
        return ad.read_h5ad(path)
    pytest.importorskip("zarr")
    adata.write_zarr(path)
    return ad.read_zarr(path)


@pytest.mark.parametrize("method", METHODS)
def test_network_survives(screen, tmp_path, method):
    adata = screen.copy()
    options = {}
    if method == "gpovae":
        scpert.model.GPOVAE.setup_anndata(adata, split_key="split")
        options["model"] = scpert.model.GPOVAE(adata, n_latent=4, n_hidden=8)
        options["model"].train(max_epochs=2)
        for key in ("_scvi_uuid", "_scvi_manager_uuid"):
            adata.uns.pop(key, None)
    scpert.tl.infer_grn(adata, method=method, n_jobs=1, **options)
    net = adata.varp["grn"]
    assert sparse.issparse(net) and net.format == "csr" and net.shape == (30, 30)
    assert np.isfinite(net.data).all()
    assert adata.uns["grn"]["method"] == method
    for form in ("h5ad", "zarr"):
        again = _again(adata, tmp_path / f"screen.{form}", form)
        assert (again.varp["grn"] != net).nnz == 0
        assert again.uns["grn"]["method"] == method
        pd.testing.assert_frame_equal(scpert.get.grn_df(again), scpert.get.grn_df(adata), check_dtype=False)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_split_flags_and_truth_survive(screen, tmp_path, form):
    again = _again(screen, tmp_path / f"screen.{form}", form)
    for column in ("perturbation", "split", "split_group", "quality_fail"):
        assert list(again.obs[column].astype(str)) == list(screen.obs[column].astype(str)), column
    assert (again.X != screen.X).nnz == 0
    assert set(again.uns["truth"]) == set(screen.uns["truth"])
