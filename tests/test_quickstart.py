"""The one call from a screen to a report, on small simulated screens and on the real ones where they are."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert
from scpert.errors import ScpertError


@pytest.fixture(scope="module")
def screen():
    return scpert.datasets.simulated(n_cells=500, n_genes=40, n_targets=5, n_combinations=1, random_state=0)


@pytest.fixture(scope="module")
def done(screen, tmp_path_factory):
    before = screen.copy()
    out = tmp_path_factory.mktemp("quickstart")
    result = scpert.quickstart(screen, max_epochs=2, out=out)
    return before, screen, result, out


def test_files_can_be_read_again(done):
    _, _, result, out = done
    adata = ad.read_h5ad(out / "results.h5ad")
    assert set(adata.obs["split"].astype(str)) == {"train", "val", "test"}
    assert sparse.issparse(adata.varp["grn"]) and adata.varp["grn"].shape == (40, 40)
    assert adata.obsm["X_gpovae"].shape[0] == adata.n_obs
    assert adata.uns["scpert"]["quickstart"]["data_hash"]
    pd.testing.assert_frame_equal(scpert.get.grn_df(adata, unmeasured=True), result.grn, check_dtype=False)
    prediction = ad.read_h5ad(out / "prediction.h5ad")
    assert {"delta", "std"} <= set(prediction.layers)
    held = set(adata.obs.loc[adata.obs["split"].astype(str) == "test", "perturbation"].astype(str)) - {"control"}
    assert set(prediction.obs["perturbation"].astype(str)) == held
    scores = pd.read_csv(out / "scores.csv")
    assert {"GPOVAE", "no change", "perturbed mean", "training-cell mean"} == set(scores["model"])
    again = scpert.model.GPOVAE.load(out / "model")
    np.testing.assert_allclose(
        again.predict_perturbation(sorted(held)).X,
        result.model.predict_perturbation(sorted(held)).X,
        rtol=1e-5,
        atol=1e-6,
    )


def test_scores_are_of_test_cells_only(done):
    _, _, result, _ = done
    parts = {p: result.adata[result.adata.obs["split"].astype(str) == p].copy() for p in ("train", "test")}
    reference = scpert.metrics.Reference(parts["test"], train=parts["train"])
    table = scpert.metrics.evaluate(result.prediction, reference, metrics=["pearson_delta"])
    value = result.scores.set_index(["model", "metric"]).loc[("GPOVAE", "pearson_delta"), "value"]
    np.testing.assert_allclose(value, table["pearson_delta"].mean(), rtol=1e-6)


def test_report_is_one_self_contained_page(done):
    *_, out = done
    page = (out / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page) and "@import" not in page
    assert "url(" not in page and "<script" not in page
    for heading in ("prediction", "Predicted against observed", "network", "Data", "Split", "Training", "Provenance"):
        assert re.search(rf"<h2>[^<]*{heading}", page), heading
    for needed in ("scpert", "SHA-256", "seed", "ceiling", "best:", "worst:"):
        assert needed in page
    figures = {f.name for f in (out / "figures").iterdir()}
    assert {"scores.png", "grn.png", "training.png", "top_genes.png", "predicted_vs_observed_best.png"} <= figures
    assert not list(out.glob(".*.part"))


def test_the_callers_data_stay_as_they_were(done):
    before, after, _, _ = done
    assert list(after.obs.columns) == list(before.obs.columns)
    assert set(after.uns) == set(before.uns)
    assert not list(after.obsm) and not list(after.varp)
    assert (after.X != before.X).nnz == 0


def test_labels_of_another_convention(screen, tmp_path):
    adata = screen.copy()
    labels = adata.obs["perturbation"].astype(str)
    adata.obs["condition"] = [x if x == "control" else x if "+" in x else f"{x}+ctrl" for x in labels]
    adata.obs["condition"] = adata.obs["condition"].replace({"control": "ctrl"}).astype("category")
    del adata.obs["perturbation"]
    result = scpert.quickstart(
        adata, perturbation_key="condition", control="ctrl", model="perturbedmean", out=tmp_path / "out"
    )
    assert list(result.adata.obs["perturbation"].astype(str)) == list(labels)
    assert "perturbation" not in adata.obs
    assert (tmp_path / "out" / "report.html").is_file()


def test_held_out_combinations(tmp_path):
    adata = scpert.datasets.simulated(n_cells=600, n_genes=30, n_targets=6, n_combinations=6, random_state=1)
    result = scpert.quickstart(adata, model="Additive", split="combinations", out=tmp_path)
    test = result.adata.obs["split"].astype(str) == "test"
    seen = set(result.adata.obs.loc[~test, "perturbation"].astype(str)) - {"control"}
    assert not seen & set(result.prediction.obs["perturbation"].astype(str))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpvae"}, "GPOVAE|gpovae"),
        ({"split": "rows"}, "split"),
        ({"perturbation_key": "guide"}, "guide"),
        ({"control": "untreated"}, "untreated"),
    ],
)
def test_bad_input_writes_nothing(screen, tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(ScpertError, match=message):
        scpert.quickstart(screen, out=out, max_epochs=1, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["norman2019_k562_crispra_perturbench.h5ad", "schraivogel2020_k562_tapseq_crispat.h5ad"]
)
def test_real_screens(real_data, tmp_path, name):
    path = real_data / name
    if not path.is_file():
        pytest.skip(f"{name} is not in SCPERT_TEST_DATA")
    result = scpert.quickstart(path, max_epochs=3, out=tmp_path)
    r = result.scores[result.scores["metric"] == "pearson_delta"].set_index("model")["value"]
    assert r["GPOVAE"] > max(r["no change"], r["perturbed mean"])
    assert len(result.grn) > 0
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert ad.read_h5ad(tmp_path / "results.h5ad").n_obs == result.adata.n_obs
