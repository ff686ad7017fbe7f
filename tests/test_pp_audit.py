import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert


def screen(n=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array(["control"] * 80 + ["A"] * 40 + ["B"] * 40 + ["A+B"] * 40, dtype=object)
    mean = np.full((n, 12), 8.0)
    mean[labels == "A", 0] = 1
    mean[labels == "B", 1] = 1
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame(index=["A", "B"] + [f"G{i}" for i in range(10)])
    return ad.AnnData(sparse.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=obs, var=var)


def rows(adata, **kwargs):
    before = adata.copy() if adata.n_obs else adata
    table = scpert.pp.audit(adata, **kwargs)
    assert list(table.columns) == ["check", "value", "status", "advice"]
    assert set(table["status"]) <= {"ok", "warn", "fail"}
    assert list(adata.obs.columns) == list(before.obs.columns) and not adata.uns
    assert (table.loc[table["status"] == "fail", "advice"] != "").all()
    return table.drop_duplicates("check").set_index("check")


def test_good_screen():
    table = rows(screen())
    assert "fail" not in set(table["status"])
    assert table.loc["scale of X", "value"] == "counts"
    assert table.loc["control cells", "value"] == "80"
    assert "minimum 40, median 40" in table.loc["cells per perturbation", "value"]
    assert "2 of 2 down, 2 beyond" in table.loc["on-target change", "value"]
    assert "cells" in table.loc["possible splits", "value"] and "GPOVAE" in table.loc["possible models", "value"]


def spoil(name):
    adata = screen()
    if name == "no column":
        adata.obs = adata.obs.rename(columns={"perturbation": "perturbations"})
    elif name == "other control":
        adata.obs["perturbation"] = adata.obs["perturbation"].replace("control", "non-targeting")
    elif name == "nan labels":
        adata.obs.iloc[3, 0] = np.nan
    elif name == "all nan labels":
        adata.obs["perturbation"] = np.nan
    elif name == "delimiter":
        adata.obs["perturbation"] = adata.obs["perturbation"].str.replace("+", "_")
    elif name == "nan values":
        adata.X.data[4] = np.nan
    elif name == "negative":
        adata.X.data[4] = -1
    elif name == "scaled":
        adata.X = adata.X.toarray() - 5.5
    elif name == "names":
        adata.obs_names = ["c"] * adata.n_obs
    elif name == "empty cell":
        X = adata.X.toarray()
        X[2] = 0
        adata.X = sparse.csr_matrix(X)
    elif name == "zeros":
        adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    elif name == "no cells":
        adata = adata[:0].copy()
    elif name == "no X":
        adata = ad.AnnData(obs=adata.obs, var=adata.var)
    elif name == "only controls":
        adata.obs["perturbation"] = "control"
    elif name == "not logs, not counts":
        adata.X.data = adata.X.data * 7.3
    return adata


@pytest.mark.parametrize(
    ("name", "check", "advice"),
    [
        ("no column", "perturbation labels", "Is it 'perturbations'"),
        ("other control", "control cells", "non-targeting"),
        ("nan labels", "NaN labels", "notna"),
        ("all nan labels", "NaN labels", "notna"),
        ("delimiter", "form of the labels", "annotate_perturbations"),
        ("nan values", "NaN or infinite values", "origin"),
        ("names", "duplicate cell names", "obs_names_make_unique"),
        ("empty cell", "empty cells", "filter_cells"),
        ("zeros", "scale of X", "zero"),
        ("no cells", "cells", "no cell"),
        ("no X", "values used", "layer"),
        ("only controls", "perturbations", "controls"),
        ("not logs, not counts", "values used", "layer"),
    ],
)
def test_bad_data_are_reported_not_raised(name, check, advice):
    table = rows(spoil(name))
    assert table.loc[check, "status"] == "fail"
    assert advice in table.loc[check, "advice"]


@pytest.mark.parametrize("name", ["negative", "scaled"])
def test_negative_values_are_taken_for_effects(name):
    table = rows(spoil(name))
    assert table.loc["scale of X", "value"] == "effects"
    assert "cannot be used" in table.loc["possible models", "advice"]


def test_layers_few_cells_and_log_values():
    adata = screen()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata = adata[:165].copy()
    table = rows(adata)
    assert table.loc["scale of X", "value"] == "log1p" and table.loc["values used", "value"] == "counts: counts"
    assert "A+B (5)" in table.loc["cells per perturbation", "advice"]
    assert table.loc["cells per perturbation", "status"] == "warn"


@pytest.mark.parametrize("form", ["csc", "dense", "backed", "view", "dask"])
def test_every_kind_of_matrix(form, tmp_path):
    adata = screen()
    expected = scpert.pp.audit(adata).set_index("check")["value"]
    if form == "csc":
        adata.X = adata.X.tocsc()
    elif form == "dense":
        adata.X = adata.X.toarray()
    elif form == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif form == "view":
        adata = adata[:]
    else:
        da = pytest.importorskip("dask.array")
        adata.X = da.from_array(adata.X.toarray(), chunks=(64, 12))
    got = scpert.pp.audit(adata).set_index("check")["value"]
    assert expected.drop("memory").equals(got.drop("memory"))


@pytest.mark.parametrize(
    "file", ["norman2019_k562_crispra_perturbench.h5ad", "schraivogel2020_k562_tapseq_crispat.h5ad"]
)
def test_real_screens_are_ready(file):
    folder = os.environ.get("SCPERT_TEST_DATA")
    if not folder or not (Path(folder) / file).exists():
        pytest.skip(f"SCPERT_TEST_DATA does not point at {file}")
    adata = ad.read_h5ad(Path(folder) / file)
    labels = adata.obs["perturbation"].astype(str)
    table = scpert.pp.audit(adata)
    assert "fail" not in set(table["status"])
    scpert.pp.annotate_perturbations(adata, "perturbation", key_added="again")
    assert all(
        set(a.split("+")) == set(b.split("+")) for a, b in set(zip(labels, adata.obs["again"].astype(str), strict=True))
    )
    scpert.pp.split(adata, kind="perturbations")
    half = adata[:: 4 if adata.n_obs > 10_000 else 1].copy()
    scpert.pp.match_controls(half, max_cells=256)
    assert half.uns["scpert"]["matched_control"]["row_entropy"] < 0.8
