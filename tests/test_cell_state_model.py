"""CellState: network, fit, evaluation, files, bad input."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scpert.errors import MissingKeyError, NotTrainedError, ScaleError, ScpertError, SplitError
from scpert.model import CellState
from scpert.model._cell_state_fit import closed_form_start, group_folds, principal_axes
from scpert.module._cell_state import CellStateModule
from scpert.nn._autoencoder import ResidualStack, negative_binomial_nll


def bulk(n: int = 120, g: int = 150, k: int = 4, seed: int = 0, patients: int = 60) -> ad.AnnData:
    """Linear abundances with a low-rank state."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k))
    log = 4 + rng.normal(size=g) + z @ rng.normal(size=(k, g)) * 0.7 + 0.3 * rng.normal(size=(n, g))
    X = np.expm1(np.maximum(log, 0)).astype(np.float32) * 10
    obs = pd.DataFrame(
        {"state": np.where(z[:, 0] > 0, "sick", "well"), "patient": (np.arange(n) % patients).astype(str)}
    )
    obs.index = [f"s{seed}_{i}" for i in range(n)]
    return ad.AnnData(sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(g)]))


@pytest.fixture(scope="module")
def data() -> ad.AnnData:
    adata = bulk()
    rng = np.random.default_rng(1)
    fold = group_folds(adata.obs["patient"].to_numpy(dtype=str), 4, rng)
    adata.obs["split"] = np.where(fold == 0, "test", "train")
    return adata


@pytest.fixture(scope="module")
def model(data: ad.AnnData) -> CellState:
    CellState.setup_anndata(data, group_key="patient", split_key="split")
    model = CellState(data, hidden=(64,), n_latent=6)
    model.train(max_epochs=3)
    return model


# ------------------------------------------------------------------------------------------ network


def test_published_size_on_the_meta_device():
    size = CellState.PUBLISHED
    with torch.device("meta"):
        module = CellStateModule(size["n_genes"], size["hidden"], size["n_latent"], linear=False)
    widths = [size["n_genes"], *size["hidden"], size["n_latent"]]
    plain = 2 * sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    assert plain == 1_179_320_000
    assert abs(module.n_weights / plain - 1) < 1e-3
    assert all(p.is_meta for p in module.parameters())


def test_layers_wider_than_the_genes_keep_the_linear_path(data):
    CellState.setup_anndata(data)
    wide = CellState(data, hidden=(2 * data.n_vars,), n_latent=6)
    assert wide.module.linear
    wide.train(max_epochs=1)
    table = wide.evaluate(n_boot=20)
    assert table.loc["model", "r2_imputed"] > 0.9 * table.loc["pca", "r2_imputed"]


def test_a_very_deep_stack_trains():
    torch.manual_seed(0)
    stack = ResidualStack((8, *[24] * 40, 8))
    x = torch.randn(64, 8)
    target = x.flip(1) ** 2
    optimizer = torch.optim.Adam(stack.parameters(), lr=2e-3)
    first = float(((stack(x) - target) ** 2).mean().detach())
    for _ in range(80):
        loss = ((stack(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * min(first, float(target.var()))
    assert float(stack.first.weight.grad.abs().sum()) > 0


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    a = ResidualStack((10, 12, 7, 5))
    b = ResidualStack((10, 12, 7, 5), checkpointing=True)
    b.load_state_dict(a.state_dict())
    x = torch.randn(6, 10)
    for stack in (a, b):
        stack.train()
        stack(x).square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_negative_binomial_is_scipys():
    from scipy.stats import nbinom

    counts, mean, theta = np.array([0.0, 3.0, 17.0]), np.array([0.5, 4.0, 9.0]), np.array([0.7, 2.0, 5.0])
    mine = negative_binomial_nll(*(torch.tensor(v) for v in (counts, mean, np.log(theta))))
    np.testing.assert_allclose(mine, -nbinom.logpmf(counts, theta, theta / (theta + mean)), rtol=1e-6)


def test_principal_axes_are_scikit_learns():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    for shape in ((20, 50), (50, 20)):
        x = rng.normal(size=shape).astype(np.float32) * np.linspace(3, 1, shape[1], dtype=np.float32)
        x -= x.mean(0)
        V = principal_axes(torch.from_numpy(x), 4).numpy()
        W = PCA(4, svd_solver="full").fit(x).components_
        np.testing.assert_allclose(np.abs(np.sum(V * W.T, axis=0)), 1, atol=1e-3)


def test_closed_form_start_without_its_output_layer_is_pca():
    rng = np.random.default_rng(0)
    Y = torch.from_numpy(rng.normal(size=(40, 30)).astype(np.float32))
    module = CellStateModule(30, (16,), 5)
    closed_form_start(module, Y, np.arange(40).astype(str), rng, (0.15, 0.3))
    with torch.no_grad():
        module.output.weight.zero_()
        module.output.bias.zero_()
        V = principal_axes(Y, 5)
        torch.testing.assert_close(module(Y), Y @ V @ V.T, atol=1e-4, rtol=1e-3)


def test_one_gene_shift_of_the_first_layer_is_the_full_encoder(model):
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.normal(size=(5, model.n_genes)).astype(np.float32))
    genes, change = torch.tensor([[3, 7]] * 5), torch.from_numpy(rng.normal(size=(5, 2)).astype(np.float32))
    moved = y.clone()
    moved[:, [3, 7]] += change
    with torch.no_grad():
        parts = model.module.first_shift(model.module.first(y), genes, change)
        torch.testing.assert_close(model.module.encode_parts(parts), model.module.encode(moved), atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------ fit


def test_groups_are_never_torn_apart(data, model):
    groups = data.obs["patient"].to_numpy(dtype=str)
    fold = group_folds(groups, 5, np.random.default_rng(0))
    assert pd.DataFrame({"g": groups, "f": fold}).groupby("g")["f"].nunique().max() == 1
    train = set(data.obs.loc[list(model.train_names_), "patient"])
    assert not train & set(data.obs.loc[data.obs["split"] == "test", "patient"])


def test_history_has_scvi_names_and_training_repeats(data):
    out = []
    for _ in range(2):
        CellState.setup_anndata(data, group_key="patient")
        m = CellState(data, hidden=(32, 16), n_latent=4, random_state=3)
        m.train(max_epochs=2, early_stopping=False, accelerator="cpu", devices=1, batch_size=20, lr=1e-3)
        out.append(m.get_latent_representation())
    assert set(m.history) >= {"train_loss", "validation_loss", "validation_error_masked"}
    assert len(m.history["train_loss"]) == 2
    np.testing.assert_array_equal(*out)


def test_random_start_learns(data):
    CellState.setup_anndata(data, group_key="patient")
    m = CellState(data, hidden=(64, 32), n_latent=6, linear=False)
    m.train(max_epochs=40, early_stopping=False, lr=2e-3)
    error = m.history["validation_error_masked"].iloc[:, 0]
    assert error.min() < 0.7  # 1 is the gene mean


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_move_all_weights(data, optimizer):
    CellState.setup_anndata(data)
    m = CellState(data, hidden=(16,), n_latent=4, checkpointing=True)
    before = {k: v.clone() for k, v in m.module.named_parameters()}
    m.train(
        max_epochs=3,
        start="random",
        optimizer=optimizer,
        early_stopping=False,
        lr=1e-2,
        train_size=1.0,
        precision="bf16",
    )
    still = [k for k, v in m.module.named_parameters() if torch.equal(v, before[k])]
    assert not still


def test_evaluate_beats_the_gene_mean_and_reports_limits(model):
    table = model.evaluate(n_boot=200)
    assert {"model", "pca", "gene_mean", "neighbours"} <= set(table.index)
    assert {"r2_pooled", "r2_gene", "r2_imputed", "sample_correlation", "detection_auroc"} <= set(table.columns)
    assert abs(table.loc["gene_mean", "r2_imputed"]) < 1e-9
    row = table.loc["model"]
    assert row["r2_imputed"] > 0.5
    assert row["r2_imputed_lower"] < row["r2_imputed"] < row["r2_imputed_upper"]
    assert table.loc["gene_mean", "imputed_ahead_lower"] > 0.3
    assert row["r2_imputed"] >= table.loc["pca", "r2_imputed"] - 0.02
    assert row["r2_pooled"] > table.loc["gene_mean", "r2_pooled"]
    bins = pd.DataFrame(table.attrs["by_expression"])
    assert set(bins["method"]) == set(table.index)


def test_evaluate_agrees_with_scikit_learns_pca(model, data):
    from sklearn.decomposition import PCA

    log = np.log1p(data.X.toarray())
    y = (log - model._mean) / model._scale
    train = data.obs["split"].to_numpy() == "train"
    pca = PCA(6, svd_solver="full").fit(y[train])
    guess = pca.inverse_transform(pca.transform(y[~train])) * model._scale + model._mean
    truth = log[~train]
    base = log[train].mean(0)
    expected = np.median(1 - ((guess - truth) ** 2).sum(0) / ((truth - base) ** 2).sum(0))
    assert model.evaluate(n_boot=0).loc["pca", "r2_gene"] == pytest.approx(expected, abs=5e-3)


def test_training_samples_are_left_out_of_an_evaluation(model, data):
    inside = data[data.obs["split"] == "train"].copy()
    with pytest.raises(SplitError, match="trained on"):
        model.evaluate(inside)
    other = bulk(seed=5)
    other.obs_names = data.obs_names  # same names, other samples
    assert model.evaluate(other, n_boot=0).attrs["n_samples"] == other.n_obs


def test_save_and_load_without_data(model, data, tmp_path):
    model.save(tmp_path / "m")
    again = CellState.load(tmp_path / "m")
    np.testing.assert_array_equal(again.get_latent_representation(data), model.get_latent_representation(data))
    np.testing.assert_allclose(again.manipulate(data, "G3").X, model.manipulate(data, "G3").X)
    attached = CellState.load(tmp_path / "m", data)
    assert attached.evaluate(n_boot=0)["r2_imputed"].equals(model.evaluate(n_boot=0)["r2_imputed"])


def test_genes_are_aligned_by_name(model, data):
    shuffled = data[:, np.random.default_rng(0).permutation(data.n_vars)].copy()
    np.testing.assert_allclose(
        model.get_latent_representation(shuffled), model.get_latent_representation(data), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_out_of_core_is_in_memory(data, tmp_path, kind, monkeypatch):
    path = tmp_path / f"d.{kind}"
    clean = ad.AnnData(data.X, obs=data.obs[["patient"]], var=data.var[[]])
    getattr(clean, f"write_{kind}")(path)
    backed = CellState.open_backed(path)
    assert not sp.issparse(backed.X)
    monkeypatch.setattr("scpert.model._cell_state.MEMORY_LIMIT", 4 * data.n_vars * 40)
    latent = []
    for a in (clean, backed):
        CellState.setup_anndata(a, group_key="patient")
        m = CellState(a, hidden=(16,), n_latent=4)
        m.train(max_epochs=2, lr=1e-3)
        latent.append(m.get_latent_representation())
    np.testing.assert_allclose(*latent, atol=1e-4)


def test_archs4_is_copied_block_by_block(data, tmp_path, monkeypatch):
    import sys
    import types

    import h5py

    path = tmp_path / "archs4.h5"
    counts = np.rint(data.X.toarray()).astype(np.uint32)
    genes = [*data.var_names[:-1], data.var_names[0]]  # one symbol twice
    with h5py.File(path, "w") as f:
        f["data/expression"] = counts.T
        f["meta/genes/symbol"] = np.array(genes, dtype="S")
        f["meta/samples/geo_accession"] = np.array(data.obs_names, dtype="S")
        f["meta/samples/series_id"] = np.array(data.obs["patient"], dtype="S")
    sizes = []

    def index(file, rows, silent=False):
        sizes.append(len(rows))
        with h5py.File(file) as f:
            return pd.DataFrame(f["data/expression"][:, rows], index=genes, columns=[f"c{r}" for r in rows])

    fake = types.ModuleType("archs4py")
    fake.data = types.SimpleNamespace(index=index)
    monkeypatch.setitem(sys.modules, "archs4py", fake)
    with pytest.raises(ScpertError, match="out="):
        CellState.open_backed(path)
    out = CellState.open_backed(path, out=tmp_path / "a.h5ad", chunk=50)
    assert max(sizes) == 50
    np.testing.assert_array_equal(out.X[:], counts[:, :-1])
    CellState.setup_anndata(out, group_key="series")
    m = CellState(out, hidden=(16,), n_latent=4)
    m.train(max_epochs=1)
    assert m.get_latent_representation().shape == (data.n_obs, 4)


def test_negative_binomial_head_on_counts():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(150, 3))
    mean = np.exp(1.0 + z @ rng.normal(size=(3, 40)) * 0.5)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    CellState.setup_anndata(adata)
    m = CellState(adata, hidden=(32,), n_latent=4, head="nb")
    m.train(max_epochs=5, lr=1e-3)
    table = m.evaluate(n_boot=0)
    assert np.isfinite(table.loc["model"].drop(["r2_imputed_lower", "r2_imputed_upper", "imputed_ahead_lower"])).all()
    assert (m.reconstruct() >= -1e-5).all()
    assert float(m.history["validation_loss"].iloc[-1, 0]) < 5


def test_negative_binomial_starts_at_the_mean_of_the_logs():
    """Genes on in a few samples only have a mean far above the mean of their logs: the start must know."""
    rng = np.random.default_rng(1)
    rate = np.exp(2.0 + rng.normal(size=(120, 4)) @ rng.normal(size=(4, 80)) * 1.5)
    adata = ad.AnnData(rng.poisson(rate).astype(np.float32))
    CellState.setup_anndata(adata)
    m = CellState(adata, hidden=(32,), n_latent=6, head="nb")
    m.train(max_epochs=1)
    share, mean = m.module.log_fraction.numpy(), np.log(np.maximum(np.expm1(m._mean), 1e-2))
    np.testing.assert_allclose(share - share.mean(), mean - mean.mean(), atol=1e-3)
    assert m.evaluate(n_boot=0).loc["model", "r2_imputed"] > 0.6  # PCA, by least squares: 0.88


# ------------------------------------------------------------------------------------------ bad input


def test_scales_are_told_apart_and_never_guessed(data):
    log = ad.AnnData(np.log1p(data.X.toarray()), obs=data.obs, var=data.var)
    counts = ad.AnnData(np.rint(data.X.toarray()), obs=data.obs, var=data.var)
    for a, scale in ((data, "linear"), (log, "log1p"), (counts, "counts")):
        b = a.copy()
        CellState.setup_anndata(b)
        assert CellState(b, hidden=(8,), n_latent=3).scale_ == scale
    with pytest.raises(ScaleError, match="looks like"):
        CellState.setup_anndata(data.copy(), scale="log1p")
    with pytest.raises(ScaleError, match="looks like"):
        CellState.setup_anndata(data.copy(), scale="counts")
    with pytest.raises(ScaleError, match="looks like"):
        CellState.setup_anndata(log, scale="linear")
    between = log.copy()
    between.X = between.X * 4
    with pytest.raises(ScaleError, match="Cannot tell"):
        CellState.setup_anndata(between)
    tpm = data.X.toarray()
    tpm = ad.AnnData(np.rint(tpm / tpm.sum(1, keepdims=True) * 1e6))
    with pytest.raises(ScaleError, match="Cannot tell"):
        CellState.setup_anndata(tpm)


def test_other_scale_is_refused_later(model, data):
    log = ad.AnnData(np.log1p(data.X.toarray()), obs=data.obs, var=data.var)
    with pytest.raises(ScaleError, match="looks like log"):
        model.manipulate(log, "G1")


def test_negative_values_are_refused(data):
    bad = data.copy()
    bad.X = bad.X.toarray()
    bad.X[3, 4] = -1.5
    with pytest.raises(ScaleError, match="negative"):
        CellState.setup_anndata(bad)


def test_duplicated_and_renamed_genes(model, data):
    twice = data.copy()
    twice.var_names = ["G0", *list(twice.var_names[:-1])]
    with pytest.raises(ScpertError, match="more than once"):
        CellState.setup_anndata(twice)
    renamed = data.copy()
    renamed.var_names = [f"ENSG{i}" for i in range(data.n_vars)]
    with pytest.raises(MissingKeyError, match="Rename them"):
        model.get_latent_representation(renamed)


def test_all_zero_genes_cannot_be_manipulated(data):
    a = data.copy()
    X = a.X.toarray()
    X[:, 5] = 0
    a.X = X
    CellState.setup_anndata(a)
    m = CellState(a, hidden=(8,), n_latent=3)
    m.train(max_epochs=1)
    assert np.isfinite(m.reconstruct()).all()
    with pytest.raises(ScpertError, match="constant"):
        m.manipulate(a, "G5")


def test_fewer_samples_than_the_bottleneck(data):
    few = data[:20].copy()
    CellState.setup_anndata(few)
    with pytest.raises(ScpertError, match="n_latent=30"):
        CellState(few, n_latent=30)
    assert CellState(few).n_latent < 20


def test_untrained_and_unusable_arguments(data):
    CellState.setup_anndata(data)
    m = CellState(data, hidden=(8,), n_latent=3)
    with pytest.raises(NotTrainedError):
        m.manipulate(data, "G1")
    with pytest.raises(ScaleError, match="needs counts"):
        CellState(data, head="nb")
    with pytest.raises(ScpertError, match="mask"):
        CellState(data, mask=(0.5, 0.2))
    with pytest.raises(MissingKeyError, match="group_key"):
        CellState.setup_anndata(data, group_key="donor")
    one = data.copy()
    one.obs["one"] = "a"
    with pytest.raises(ScpertError, match="one group only"):
        CellState.setup_anndata(one, group_key="one")


@pytest.mark.skipif("SCPERT_TEST_DATA" not in os.environ, reason="set SCPERT_TEST_DATA to test on the real tumours")
def test_real_tumours_are_imputed_beyond_pca():
    a = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / "bulk_tcga_5cohorts_rsem.h5ad")
    a = a[:, ::3].copy()  # with a tenth of the genes, PCA is level
    a.obs["patient"] = [str(s)[:12] for s in a.obs_names]
    fold = group_folds(a.obs["patient"].to_numpy(dtype=str), 5, np.random.default_rng(1))
    a.obs["split"] = np.where(fold == 0, "test", "train")
    CellState.setup_anndata(a, group_key="patient", split_key="split")
    m = CellState(a, n_latent=48)
    m.train(max_epochs=1)
    table = m.evaluate(n_boot=200)
    others = table.index.drop("model")
    assert (table.loc[others, "imputed_ahead_lower"] > 0).all()
