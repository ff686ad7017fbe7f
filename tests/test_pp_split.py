import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scpert
from scpert.data import parse
from scpert.errors import LabelError, MissingKeyError, ScpertError, SplitError

KINDS = ["cells", "perturbations", "combinations", "contexts", "folds"]
HELD_OUT = ["perturbations", "combinations", "folds"]


def screen(n_targets=8, combos=("T0+T1", "T1+T2", "T2+T3", "T4+T5", "T0+T5", "T6+T7"), n=12, n_control=40, seed=0):
    labels = ["control"] * n_control + [f"T{i}" for i in range(n_targets) for _ in range(n)]
    labels += [c for c in combos for _ in range(n)]
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"perturbation": labels, "donor": rng.choice(["d1", "d2"], len(labels))})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return ad.AnnData(rng.poisson(3, (len(obs), 10)).astype(np.float32), obs=obs)


def by_label(adata, key="split"):
    """Values of the split by label."""
    return adata.obs.groupby(adata.obs["perturbation"].astype(str))[key].agg(lambda s: set(s.astype(str)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path):
    adata = screen()
    first = scpert.pp.split(adata, kind=kind, copy=True)
    assert "split" not in adata.obs and "scpert" not in adata.uns
    second = scpert.pp.split(adata, kind=kind, copy=True)
    assert (first.obs["split"] == second.obs["split"]).all()
    other = scpert.pp.split(adata, kind=kind, random_state=1, copy=True)
    assert (first.obs["split"] != other.obs["split"]).any()
    control = first.obs["perturbation"] == "control"
    assert set(first.obs["split"]) == {"train", "val", "test"} == set(first.obs.loc[control, "split"])
    assert first.obs["split_group"].notna().all() and set(first.obs.loc[control, "split_group"]) == {"control"}
    pd.testing.assert_frame_equal(first.obs[adata.obs.columns], adata.obs)
    first.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    first.write_zarr(tmp_path / "a.zarr")
    assert back.uns["scpert"]["split"]["kind"] == kind
    assert list(back.obs["split"]) == list(first.obs["split"]) == list(ad.read_zarr(tmp_path / "a.zarr").obs["split"])


@pytest.mark.parametrize("kind", HELD_OUT)
@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_target_in_training(kind, seed):
    adata = screen()
    scpert.pp.split(adata, kind=kind, random_state=seed)
    values = by_label(adata).drop("control")
    assert all(len(v) == 1 for v in values)  # all cells of a label go the same way
    parts = {p: {label for label, v in values.items() if v == {p}} for p in ("train", "val", "test")}
    assert all(parts.values())
    trained_targets = {t for label in parts["train"] for t in parse(label)}
    held_singles = {label for p in ("val", "test") for label in parts[p] if "+" not in label}
    assert not trained_targets & held_singles


@pytest.mark.parametrize("kind", HELD_OUT)
def test_order_of_cells_is_irrelevant(kind):
    adata = screen()
    shuffled = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    scpert.pp.split(adata, kind=kind)
    scpert.pp.split(shuffled, kind=kind)
    assert by_label(adata).drop("control").equals(by_label(shuffled).drop("control"))


@pytest.mark.parametrize("seed", range(4))
def test_combination_strata_hold(seed):
    adata = screen()
    scpert.pp.split(adata, kind="combinations", random_state=seed)
    values = by_label(adata)
    train = {label for label, v in values.items() if "train" in v}
    group = by_label(adata, "split_group")
    combos = [label for label in values.index if "+" in label]
    for label in combos:
        alone = sum(t in train for t in parse(label))
        anywhere = sum(any(t in parse(other) for other in train - {"control"}) for t in parse(label))
        assert group[label] == {f"seen{alone}"} and alone == anywhere
    tested = {next(iter(group[c])) for c in combos if values[c] == {"test"}}
    assert {"seen0", "seen1"} & tested
    assert any(values[c] == {"train"} for c in combos)


def test_combinations_with_all_singles_seen():
    adata = screen()
    scpert.pp.split(adata, kind="combinations", seen=(2,))
    values = by_label(adata)
    assert all(values[f"T{i}"] == {"train"} for i in range(8))
    assert set(adata.obs.loc[adata.obs["split"] == "test", "split_group"]) == {"control", "seen2"}


def test_a_target_never_alone_is_not_trained_on():
    adata = screen(combos=("T0+T1", "T1+T2", "T2+T3", "T4+X", "T5+X", "Y+Z"))
    scpert.pp.split(adata, kind="combinations")
    values = by_label(adata)
    assert all(values[c] <= {"val", "test"} for c in ("T4+X", "T5+X", "Y+Z"))


def test_cells_are_divided_by_the_fractions_within_perturbations_and_covariates():
    adata = screen(n=40)
    scpert.pp.split(adata, kind="cells", fractions=(0.5, 0.25, 0.25), covariate_keys="donor")
    table = pd.crosstab(adata.obs["perturbation"], adata.obs["split"])
    assert (table[["train", "val", "test"]].to_numpy() == [20, 10, 10]).all()
    table = pd.crosstab([adata.obs["perturbation"], adata.obs["donor"]], adata.obs["split"])
    share = table["train"] - 0.5 * table.sum(axis=1)
    assert share.abs().max() <= 1.5


def test_contexts_keep_every_perturbation_in_training():
    adata = screen()
    scpert.pp.split(adata, kind="contexts", context_key="donor", fractions=(0.5, 0.25, 0.25))
    obs = adata.obs[adata.obs["perturbation"] != "control"]
    assert all("train" in v for v in by_label(adata))
    pairs = obs.groupby(["perturbation", "donor"])["split"].nunique()
    assert (pairs == 1).all()
    held = obs[obs["split"] != "train"]
    assert len(held) and set(held["split_group"]) == {"new_context"}
    scpert.pp.split(adata, kind="contexts", context_key="donor", contexts=["d2"])
    obs = adata.obs[adata.obs["perturbation"] != "control"]
    assert set(obs.loc[obs["split"] == "test", "donor"]) == {"d2"}


def test_context_is_found_and_said(caplog):
    adata = screen()
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 2, "b1", "b2")
    scpert.pp.split(adata, kind="contexts", fractions=(0.5, 0.25, 0.25))
    assert adata.uns["scpert"]["split"]["context_key"] == "donor"
    assert "'donor' is taken as the context; 'batch' could be meant" in caplog.text


def test_folds_cover_each_single_perturbation_once():
    adata = screen(combos=())
    tested, fold_columns = [], []
    for fold in range(4):
        scpert.pp.split(adata, kind="folds", n_folds=4, fold=fold)
        obs = adata.obs[adata.obs["perturbation"] != "control"]
        tested += sorted(set(obs.loc[obs["split"] == "test", "perturbation"]))
        assert set(obs.loc[obs["split"] == "test", "split_fold"]) == {fold}
        fold_columns.append(adata.obs["split_fold"].to_numpy())
    assert sorted(tested) == [f"T{i}" for i in range(8)]
    assert all((f == fold_columns[0]).all() for f in fold_columns)


def test_effect_sizes_are_spread():
    # eight weak and eight strong perturbations: the two of the test set are one of each
    adata = screen(n_targets=16, combos=(), n=10)
    strong = adata.obs["perturbation"].isin([f"T{i}" for i in range(8, 16)]).to_numpy()
    X = adata.X.copy()
    X[strong, 0] += 500
    adata.X = X
    for seed in range(5):
        scpert.pp.split(
            adata, kind="perturbations", fractions=(0.5, 0.25, 0.25), stratify_by_effect=True, random_state=seed
        )
        test = {label for label, v in by_label(adata).items() if v == {"test"}}
        assert len({label for label in test if int(label[1:]) >= 8}) == 2 == len(test) / 2


def test_small_screen_of_the_contract():
    adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    for kind in ("cells", "perturbations", "folds"):
        scpert.pp.split(adata, kind=kind)
        assert set(adata.obs["split"]) == {"train", "val", "test"}


def test_tables_of_effects_need_no_control():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"perturbation": [f"T{i}" for i in range(20)]}, index=[f"r{i}" for i in range(20)])
    adata = ad.AnnData(rng.normal(size=(20, 5)).astype(np.float32), obs=obs)
    scpert.pp.split(adata, kind="perturbations")
    assert adata.obs["split"].value_counts().to_dict() == {"train": 14, "val": 4, "test": 2}
    adata.X = np.abs(adata.X)
    with pytest.raises(LabelError, match="control=None"):
        scpert.pp.split(adata, kind="perturbations")
    scpert.pp.split(adata, kind="folds", control=None)


@pytest.mark.parametrize(
    ("adata", "kwargs", "error", "match"),
    [
        (screen(), {"kind": "cell"}, ScpertError, "Did you mean 'cells'"),
        (screen(), {"kind": "cells", "fractions": (0.5, 0.5)}, SplitError, "three numbers"),
        (screen(), {"kind": "cells", "fractions": (0.5, 0.2, 0.1)}, SplitError, "sum to 1"),
        (screen(), {"kind": "cells", "fractions": (0.0, 0.5, 0.5)}, SplitError, "train"),
        (screen(n_targets=2, combos=()), {"kind": "perturbations"}, SplitError, "Too few perturbations.*: 2"),
        (screen(n_targets=4, combos=()), {"kind": "folds"}, SplitError, "5 folds: 4"),
        (screen(), {"kind": "folds", "fold": 5}, SplitError, "fold=5"),
        (screen(combos=()), {"kind": "combinations"}, SplitError, "Too few combinations.*: 0"),
        (screen(n_targets=0, combos=("A+B", "C+D", "A+D")), {"kind": "combinations"}, SplitError, "perturbed alone"),
        (screen(n=1), {"kind": "cells"}, SplitError, r"T0 \(1\)"),
        (screen(n_control=2), {"kind": "perturbations"}, SplitError, "2 control"),
        (screen(n_targets=0, combos=()), {"kind": "cells"}, SplitError, "no perturbation"),
        (screen()[screen().obs["donor"] == "d1"].copy(), {"kind": "contexts"}, SplitError, "context_key="),
        (screen(), {"kind": "contexts", "context_key": "doner"}, MissingKeyError, "donor"),
        (screen(), {"kind": "contexts", "contexts": ["d3"]}, SplitError, "d3"),
        (screen(), {"kind": "cells", "perturbation_key": "guide"}, MissingKeyError, "guide"),
        (screen(), {"kind": "cells", "control": "ctrl"}, LabelError, "control"),
        (screen(), {"kind": "cells", "covariate_keys": ["batch"]}, MissingKeyError, "batch"),
    ],
)
def test_refuses_and_changes_nothing(adata, kwargs, error, match):
    before = adata.obs.copy()
    with pytest.raises(error, match=match):
        scpert.pp.split(adata, **kwargs)
    pd.testing.assert_frame_equal(adata.obs, before)
    assert "scpert" not in adata.uns


@pytest.mark.parametrize("bad", ["nan", "name", "delimiter"])
def test_refuses_bad_labels(bad):
    adata = screen()
    if bad == "nan":
        adata.obs.loc["c50", "perturbation"] = np.nan
    elif bad == "delimiter":
        adata.obs.loc[adata.obs["perturbation"] == "T0+T1", "perturbation"] = "T0_T1"
    else:
        adata.obs_names = ["c0", *adata.obs_names[:-1]]
    match = {"nan": "NaN in 1 of", "name": "not unique", "delimiter": "delimiter"}[bad]
    with pytest.raises(ScpertError, match=match):
        scpert.pp.split(adata, kind="cells")
