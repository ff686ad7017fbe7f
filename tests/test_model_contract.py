"""What every registered perturbation model must do."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scpert
from scpert.errors import (
    FileFormatError,
    LabelError,
    MissingKeyError,
    NotTrainedError,
    ScaleError,
    ScpertError,
    UnknownTargetError,
)
from scpert.model import MODELS, PerturbationModel

NAMES = [name for name, cls in MODELS.items() if issubclass(cls, PerturbationModel)]
SMALL = {"n_hidden": 8, "n_latent": 4, "n_feedforward": 16, "n_intermediate": 8}


def build(name: str, adata: ad.AnnData, **setup):
    import inspect

    cls = MODELS[name]
    setup = {"split_key": "split", "quality_key": "quality_fail", "covariate_keys": ["batch"], **setup}
    cls.setup_anndata(adata, **setup)
    accepted = inspect.signature(cls.__init__).parameters
    return cls(adata, **{k: v for k, v in SMALL.items() if k in accepted})


@pytest.fixture(scope="module")
def trained(_small_screen):
    """Every model, trained once for two epochs."""
    cache = {}

    def get(name: str):
        if name not in cache:
            adata = _small_screen.copy()
            before = {"X": adata.X.copy(), "obs": adata.obs.copy(), "uns": set(adata.uns), "layers": set(adata.layers)}
            model = build(name, adata)
            start = None if model.module is None else {k: v.clone() for k, v in model.module.named_parameters()}
            model.train(max_epochs=2, batch_size=32)
            cache[name] = (model, adata, before, start)
        return cache[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_leaves_the_data_alone(name, trained):
    model, adata, before, start = trained(name)
    assert model.is_trained_
    for key, table in model.history.items():
        assert np.isfinite(table.to_numpy(dtype=float)).all(), key
    if start is not None:
        now = dict(model.module.named_parameters())
        still = [k for k, v in start.items() if v.requires_grad and torch.equal(v, now[k].cpu())]
        assert not still, f"parameters that never moved: {still}"
    assert (adata.X != before["X"]).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before["obs"])
    assert set(adata.layers) == before["layers"]
    assert set(adata.uns) - before["uns"] <= {"_scvi_uuid", "_scvi_manager_uuid"}


@pytest.mark.parametrize("name", NAMES)
def test_prediction_form(name, trained):
    model, adata, *_ = trained(name)
    out = model.predict_perturbation()
    assert list(out.var_names) == list(adata.var_names)
    assert np.isfinite(out.X).all() and (out.X >= 0).all()
    base = model.reference_.mean
    np.testing.assert_allclose(out.X - base, out.layers["delta"], atol=1e-5)
    assert set(out.obs["status"]) <= {"trained", "combination", "unseen", "fallback"}
    assert model.scope in ("seen", "combinations", "unseen")
    assert set(out.obs["perturbation"]) <= set(model.labels_)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_repeats_and_order_does_not_matter(name, trained):
    model, *_ = trained(name)
    first = model.predict_perturbation()
    labels = list(first.obs_names)
    again = model.predict_perturbation(labels[::-1])
    np.testing.assert_allclose(again[labels].X, first.X, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(model.predict_perturbation(labels).X, first.X)
    double = next(x for x in model.labels_ if "+" in x)
    a, b = double.split("+")
    if double in labels:
        np.testing.assert_array_equal(
            model.predict_perturbation(f"{b}+{a}").X, model.predict_perturbation(f"{a}+{b}").X
        )


@pytest.mark.parametrize("name", NAMES)
def test_cells(name, trained):
    model, *_ = trained(name)
    label = model.predict_perturbation().obs_names[0]
    cells = model.predict_perturbation(label, level="cell", n_samples=30, random_state=1)
    assert cells.shape == (30, model.n_genes)
    assert (cells.obs["perturbation"] == label).all()
    values = cells.X.toarray() if sparse.issparse(cells.X) else cells.X
    assert np.isfinite(values).all() and (values >= 0).all()
    np.testing.assert_allclose(cells.layers["delta"], values - model.reference_.mean, atol=1e-6)
    again = model.predict_perturbation(label, level="cell", n_samples=30, random_state=1)
    np.testing.assert_array_equal(values, again.X.toarray() if sparse.issparse(again.X) else again.X)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_agree(name, trained, tmp_path):
    model, *_ = trained(name)
    model.save(tmp_path / "model")
    planted = tmp_path / "planted"
    payload = f"cos\nsystem\n(S'touch {planted}'\ntR.".encode()  # a pickle that runs a command
    for file in ("model.pt", "attr.pkl", "tables.pkl"):
        (tmp_path / "model" / file).write_bytes(payload)
    loaded = MODELS[name].load(tmp_path / "model")
    assert not planted.exists()
    np.testing.assert_allclose(loaded.predict_perturbation().X, model.predict_perturbation().X, rtol=0, atol=1e-6)
    assert loaded.scope == model.scope
    files = {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file() and p.suffix not in (".pt", ".pkl")}
    assert files <= {".json", ".safetensors", ".parquet"}
    with pytest.raises(ScpertError, match="overwrite=True"):
        model.save(tmp_path / "model")


@pytest.mark.parametrize("name", NAMES)
def test_seed_repeats_and_sparse_equals_dense(name, _small_screen):
    results = []
    for dense in (False, False, True):
        adata = _small_screen.copy()
        if dense:
            adata.X = adata.X.toarray()
        model = build(name, adata)
        model.train(max_epochs=1, batch_size=64, random_state=3)
        results.append(model.predict_perturbation().X)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], results[2], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_targets(name, trained):
    model, *_ = trained(name)
    known = model.targets_[0]
    with pytest.raises(UnknownTargetError, match="on_unknown") as caught:
        model.predict_perturbation(known + "X")
    assert known in caught.value.suggestions[known + "X"]
    with pytest.raises(UnknownTargetError):
        model.predict_perturbation(f"{known}+NOSUCHGENE")
    with pytest.raises(LabelError, match="is the control"):
        model.predict_perturbation("control")
    mean = model.predict_perturbation("NOSUCHGENE", on_unknown="mean")
    assert list(mean.obs["status"]) == ["fallback"]
    shift = np.zeros(model.n_genes) if name == "NoChange" else model.effects_.mean
    start = model.reference_.mean
    np.testing.assert_allclose(mean.layers["delta"][0], np.maximum(shift + start, 0) - start, atol=1e-5)
    near = model.predict_perturbation(known.lower() if known != known.lower() else known.upper(), on_unknown="nearest")
    np.testing.assert_allclose(near.X, model.predict_perturbation(known).X, atol=1e-6)
    table = model.coverage([known, "NOSUCHGENE"])
    assert list(table["status"]) == ["trained", "unknown"]
    assert list(model.coverage([]).columns) == list(table.columns) and model.coverage("control").empty


@pytest.mark.parametrize("name", NAMES)
def test_embedding_has_a_row_for_each_trained_target(name, trained):
    model, *_ = trained(name)
    table = model.get_perturbation_embedding()
    assert table.index.is_unique and np.isfinite(table.to_numpy()).all()
    assert set(model.targets_) <= set(table.index) and table.index.name == "target"


@pytest.mark.parametrize("name", NAMES)
def test_held_out_labels_follow_the_scope(name, _small_screen):
    adata = _small_screen.copy()
    held = sorted(x for x in set(adata.obs["perturbation"]) if "+" not in x and x != "control")[0]
    split = np.where(adata.obs["perturbation"].str.contains(held), "test", "train")
    adata.obs["split"] = split
    model = build(name, adata)
    model.train(max_epochs=1, batch_size=64)
    assert held not in model.effects_.labels
    if model.scope == "unseen":
        try:
            out = model.predict_perturbation(held)
        except UnknownTargetError:
            assert not model.coverage(held)["predictable"].iloc[0]
        else:
            assert out.obs["status"].iloc[0] in ("unseen", "fallback")
    else:
        with pytest.raises(UnknownTargetError, match="cannot predict"):
            model.predict_perturbation(held)


@pytest.mark.parametrize("name", NAMES)
def test_predict_before_train(name, _small_screen):
    model = build(name, _small_screen.copy())
    with pytest.raises(NotTrainedError, match="train"):
        model.predict_perturbation()


@pytest.mark.parametrize("name", ["PerturbedMean", "GPOVAE"])
def test_new_controls_are_aligned_by_name(name, trained, _small_screen):
    model, *_ = trained(name)
    controls = _small_screen[_small_screen.obs["perturbation"] == "control"].copy()
    shuffled = controls[:, controls.var_names[::-1]].copy()
    label = model.effects_.labels[0]
    np.testing.assert_allclose(
        model.predict_perturbation(label, shuffled).X, model.predict_perturbation(label, controls).X, atol=1e-6
    )
    store = len(model._per_instance_manager_store[model.id])
    for _ in range(3):
        model.predict_perturbation(label, controls)
    assert len(model._per_instance_manager_store[model.id]) == store
    with pytest.raises(MissingKeyError, match="1 of the model's 12 genes"):
        model.predict_perturbation(label, controls[:, 1:].copy())


def test_new_controls_must_be_controls(trained, _small_screen):
    model, *_ = trained("PerturbedMean")
    label = model.effects_.labels[0]
    perturbed = _small_screen[_small_screen.obs["perturbation"] != "control"].copy()
    with pytest.raises(LabelError, match="start from control cells"):
        model.predict_perturbation(label, perturbed)
    del perturbed.obs["perturbation"]
    assert np.isfinite(model.predict_perturbation(label, perturbed).X).all()


def test_setting_up_a_copy_leaves_the_original_usable(small_screen):
    cls = scpert.model.PerturbedMean
    cls.setup_anndata(small_screen)
    part = small_screen[::2].copy()
    cls.setup_anndata(part)
    assert cls(small_screen).adata is small_screen
    assert cls(part).adata is part


def test_quality_column(small_screen):
    small_screen.obs["q"] = "good"
    with pytest.raises(ScpertError, match="must be True"):
        scpert.model.CRADLEVAE.setup_anndata(small_screen, quality_key="q")
    for dtype in ("category", "boolean", "int64"):
        small_screen.obs["q"] = pd.Series(np.arange(small_screen.n_obs) % 2 == 0, small_screen.obs_names).astype(dtype)
        scpert.model.CRADLEVAE.setup_anndata(small_screen, quality_key="q")


def test_arguments_of_training(small_screen):
    cls = scpert.model.ConditionalVAE
    cls.setup_anndata(small_screen, covariate_keys="batch")  # one column, as a string
    model = cls(small_screen, n_hidden=8, n_latent=4)
    assert list(model.covariates_) == ["batch"]
    for wrong, match in (
        ({"max_epochs": 1.5}, "max_epochs=1.5: give a whole number"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"train_size": 2.0}, "train_size=2.0"),
        ({"train_size": 0.8, "validation_size": 0.3}, "together they may not exceed 1"),
    ):
        with pytest.raises(ScpertError, match=match):
            model.train(**wrong)
    model.train(max_epochs=2, train_size=0.7, validation_size=0.2)
    sizes = [len(x) for x in (model.train_indices, model.validation_indices, model.test_indices)]
    assert sizes == [168, 48, 24]
    assert all(table.dtypes.iloc[0] == np.float64 for table in model.history.values())  # can be plotted
    with pytest.raises(LabelError, match="pass control cells as adata="):
        model.predict_perturbation(small_screen)
    with pytest.raises(ScpertError, match="must be an AnnData"):
        model.predict_perturbation(adata=small_screen.X)


@pytest.mark.parametrize("seed", [None, "a", 1.5, -1, 2**32, True])
def test_a_seed_is_a_whole_number(seed, small_screen, trained):
    adata = small_screen
    scpert.model.PerturbedMean.setup_anndata(adata)
    calls = [
        lambda: scpert.model.PerturbedMean(adata).train(random_state=seed),
        lambda: scpert.model.CPAVAE(adata, n_latent=4, n_hidden=8, random_state=seed),
        lambda: trained("PerturbedMean")[0].predict_perturbation(random_state=seed),
        lambda: scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5, random_state=seed),
        lambda: scpert.tl.infer_grn(adata, random_state=seed),
        lambda: scpert.pp.match_controls(adata, random_state=seed),
    ]
    if seed is not None:  # a generator or None draw anew
        calls.append(lambda: scpert.pp.split(adata, kind="cells", random_state=seed))
    for call in calls:
        with pytest.raises(ScpertError, match="random_state=.*whole number from 0"):
            call()


def test_files_of_a_newer_format_and_damaged_ones_are_refused(trained, tmp_path):
    model, *_ = trained("GPOVAE")
    model.save(tmp_path / "m")
    file = tmp_path / "m" / "model.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(FileFormatError, match="Update scpert"):
        scpert.model.GPOVAE.load(tmp_path / "m")
    file.write_text(json.dumps(document)[:500])
    with pytest.raises(FileFormatError, match="truncated"):
        scpert.model.GPOVAE.load(tmp_path / "m")
    file.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="load it with scpert.model.GPOVAE"):
        scpert.model.Additive.load(tmp_path / "m")
    weights = tmp_path / "m" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        scpert.model.GPOVAE.load(tmp_path / "m")
    with pytest.raises(FileFormatError, match="no model.json"):
        scpert.model.GPOVAE.load(tmp_path)


def test_a_failed_save_leaves_the_old_one(trained, tmp_path, monkeypatch):
    model, *_ = trained("Additive")
    model.save(tmp_path / "m")
    old = (tmp_path / "m" / "model.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save(tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "model.json").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_interruption_keeps_the_best_state(small_screen):
    from lightning.pytorch import Callback

    class Interrupt(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    model = build("GPOVAE", small_screen)
    model.train(max_epochs=50, callbacks=[Interrupt()])
    assert model.is_trained_ and model.best_epoch_ <= 2
    assert np.isfinite(model.predict_perturbation().X).all()


def test_mudata(small_screen):
    import mudata

    guides = sorted(set(small_screen.obs["perturbation"]) - {"control"})
    singles = sorted({g for label in guides for g in label.split("+")})
    names = [f"{g}_1" for g in singles] + ["non-targeting_1"]
    calls = np.zeros((small_screen.n_obs, len(names)), dtype=np.float32)
    for i, label in enumerate(small_screen.obs["perturbation"]):
        hits = [f"{t}_1" for t in label.split("+")] if label != "control" else ["non-targeting_1"]
        calls[i, [names.index(h) for h in hits]] = 1
    guide = ad.AnnData(
        sparse.csr_matrix(calls), obs=pd.DataFrame(index=small_screen.obs_names), var=pd.DataFrame(index=names)
    )
    rna = small_screen.copy()
    wanted = rna.obs["perturbation"].astype(str).tolist()
    del rna.obs["perturbation"]
    mdata = mudata.MuData({"rna": rna, "guide": guide})
    scpert.model.PerturbedMean.setup_mudata(mdata, modalities={"rna": "rna", "guide": "guide"})
    model = scpert.model.PerturbedMean(mdata)
    model.train()
    assert mdata.mod["rna"].obs["perturbation"].astype(str).tolist() == wanted
    with pytest.raises(MissingKeyError, match="no modality"):
        scpert.model.PerturbedMean.setup_mudata(mdata, modalities={"rna": "rna", "guide": "crispr"})


# ------------------------------------------------------------------------------------------------ bad input


def _setup(adata, **kwargs):
    scpert.model.PerturbedMean.setup_anndata(adata, **kwargs)


def test_bad_labels(small_screen):
    with pytest.raises(MissingKeyError, match="Its columns are"):
        _setup(small_screen, perturbation_key="gene")
    with pytest.raises(LabelError, match="control='control'"):
        _setup(small_screen, control="ctrl")
    other = small_screen.copy()
    other.obs["perturbation"] = other.obs["perturbation"].astype(str).replace("control", "non-targeting")
    with pytest.raises(LabelError, match="non-targeting"):
        _setup(other)
    nan = small_screen.copy()
    nan.obs["perturbation"] = nan.obs["perturbation"].astype(object)
    nan.obs.loc[nan.obs_names[:3], "perturbation"] = np.nan
    with pytest.raises(LabelError, match="NaN in 3 of 240"):
        _setup(nan)
    a, b = sorted(x for x in set(small_screen.obs["perturbation"]) if "+" not in x and x != "control")[:2]
    for delimiter in ("_", ";", "|"):
        bad = small_screen.copy()
        bad.obs["perturbation"] = bad.obs["perturbation"].astype(str).replace(a, f"{a}{delimiter}{b}")
        with pytest.raises(LabelError, match="annotate_perturbations"):
            _setup(bad)
    only = small_screen[small_screen.obs["perturbation"] == "control"].copy()
    with pytest.raises(LabelError, match="no perturbation"):
        _setup(only)


def test_bad_values(small_screen):
    for value in (np.nan, np.inf):
        bad = small_screen.copy()
        bad.X = bad.X.astype(np.float32)
        bad.X.data[5] = value
        with pytest.raises(ScaleError, match="NaN or infinite"):
            _setup(bad)
    bad = small_screen.copy()
    bad.X = bad.X.astype(np.float32)
    bad.X.data[5] = -1
    with pytest.raises(ScaleError):
        _setup(bad, scale="counts")
    logs = small_screen.copy()
    logs.X = logs.X.astype(np.float32).log1p()
    with pytest.raises(ScaleError, match="100 % of the non-zero values are integers|integers"):
        scpert.model.GPOVAE.setup_anndata(logs)
    with pytest.raises(ScaleError, match="looks like raw counts"):
        _setup(small_screen, scale="log1p")
    with pytest.raises(ScpertError, match="Choose one of"):
        _setup(small_screen, scale="cpm")
    with pytest.raises(MissingKeyError, match="not in adata.layers"):
        _setup(small_screen, layer="raw")


def test_bad_shapes(small_screen):
    twice = small_screen.copy()
    twice.var_names = ["g"] * twice.n_vars
    with pytest.raises(ScpertError, match="var_names are not unique"):
        _setup(twice)
    twice = small_screen.copy()
    twice.obs_names = ["c"] * twice.n_obs
    with pytest.raises(ScpertError, match="obs_names are not unique"):
        _setup(twice)
    with pytest.raises(ScpertError, match="empty"):
        _setup(small_screen[:0].copy())
    empty = small_screen.copy()
    X = empty.X.tolil()
    X[3] = 0
    empty.X = X.tocsr()
    _setup(empty)
    model = scpert.model.PerturbedMean(empty)
    with pytest.raises(ScpertError, match="Empty cells cannot be normalised"):
        model.train()


@pytest.mark.parametrize(
    "kind", ["integer", "float16", "csc", "dense", "view", "string", "backed", "dask", "zero_gene"]
)
def test_forms_of_data(kind, small_screen, tmp_path):
    reference = small_screen.copy()
    adata = small_screen.copy()
    if kind == "integer":
        adata.X = adata.X.astype(np.int64)
    elif kind == "float16":
        adata.X = adata.X.toarray().astype(np.float16)
    elif kind == "csc":
        adata.X = adata.X.tocsc()
    elif kind == "dense":
        adata.X = adata.X.toarray()
    elif kind == "view":
        adata = small_screen[np.arange(small_screen.n_obs)]
    elif kind == "string":
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    elif kind == "backed":
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif kind == "dask":
        da = pytest.importorskip("dask.array")
        adata.X = da.from_array(adata.X.toarray(), chunks=(50, -1))
    elif kind == "zero_gene":
        X = adata.X.tolil()
        X[:, 0] = 0
        adata.X = X.tocsr()
        reference.X = adata.X.copy()
    predictions = []
    for data in (adata, reference):
        model = build("PerturbedMean", data, quality_key=None)
        model.train()
        predictions.append(model.predict_perturbation().X)
    np.testing.assert_allclose(*predictions, atol=1e-5)
    model = build("GPOVAE", adata, quality_key=None)
    model.train(max_epochs=1)
    assert np.isfinite(model.predict_perturbation().X).all()


def test_one_cell_perturbation(small_screen):
    labels = small_screen.obs["perturbation"].astype(str).to_numpy()
    labels[0] = small_screen.var_names[-1]
    small_screen.obs["perturbation"] = labels
    small_screen.obs["split"] = "train"
    for name in ("Additive", "GPOVAE"):
        model = build(name, small_screen, quality_key=None)
        model.train(max_epochs=1)
        assert np.isfinite(model.predict_perturbation().X).all()
