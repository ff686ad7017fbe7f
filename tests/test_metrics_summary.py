"""Ceiling, calibrated scores, paired comparison, dynamic range, screens without any effect."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scpert
from scpert import metrics
from scpert.errors import ScpertError

NAMES = ["pearson_delta", "pearson_delta_centroid", "mse", "centroid_accuracy", "retrieval_l2_no_targets", "wmse"]


@pytest.fixture(scope="module")
def parts():
    adata = scpert.datasets.simulated(1600, 60, 12, n_combinations=0, random_state=0, effect_size=2.0)
    half = np.random.default_rng(0).random(adata.n_obs) < 0.5
    return adata[half].copy(), adata[~half].copy()


@pytest.fixture(scope="module")
def tables(parts):
    train, test = parts
    reference = metrics.Reference(test, train)
    return {
        "reference": reference,
        "base": metrics.evaluate(metrics.training_mean(reference), reference, metrics=NAMES),
        "top": metrics.ceiling(reference, metrics=NAMES, n_draws=8),
        "own": metrics.evaluate(metrics.pseudobulk(train), reference, metrics=NAMES),
    }


def test_mean_scores_zero_and_replicate_one(tables):
    zero = metrics.summarise(tables["base"], tables["base"], tables["top"], n_boot=200)
    one = metrics.summarise(tables["top"], tables["base"], tables["top"], n_boot=200)
    assert np.isfinite(one["score"]).all()
    np.testing.assert_allclose(zero["score"], 0, atol=1e-9)
    np.testing.assert_allclose(one["score"], 1, atol=1e-9)
    np.testing.assert_allclose(one[["lower", "upper"]], 1, atol=1e-6)


def test_score_is_its_formula(tables):
    base, top, own = (tables[k] for k in ("base", "top", "own"))
    out = metrics.summarise(own, base, top, n_boot=500)
    for name in ("pearson_delta", "mse", "centroid_accuracy"):
        want = (own[name].mean() - base[name].mean()) / (top[name].mean() - base[name].mean())
        assert out.loc[name, "score"] == pytest.approx(want)
        assert out.loc[name, "lower"] <= out.loc[name, "score"] <= out.loc[name, "upper"]
    assert out.loc["pearson_delta", "verdict"] == "better than the training mean"


def test_halves_are_disjoint_and_their_means_right(parts):
    from scpert.metrics._summary import _halve

    reference = metrics.Reference(parts[1])
    halves = _halve(reference, reference.perturbations, np.random.default_rng(0))
    logs = reference.screen.rows(np.arange(reference.screen.n_cells)).toarray()
    for label in (*reference.perturbations, "control"):
        a, b = halves.predicting.rows[label], halves.truth.rows[label]
        assert not set(a) & set(b)
        assert len(a) == len(b) == len(reference.rows[label]) // 2
    p = halves.truth.perturbations[3]
    np.testing.assert_allclose(halves.truth.mean[3], logs[halves.truth.rows[p]].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(halves.truth.var[3], logs[halves.truth.rows[p]].var(0, ddof=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        halves.predicting.control_mean, logs[halves.predicting.rows["control"]].mean(0), rtol=1e-5
    )


def test_ceiling_repeats_and_reads_cells(parts):
    a = metrics.ceiling(parts[1], metrics=["pearson_delta", "wasserstein"], n_draws=2, random_state=1)
    b = metrics.ceiling(parts[1], metrics=["pearson_delta", "wasserstein"], n_draws=2, random_state=1)
    pd.testing.assert_frame_equal(a, b)
    assert a.notna().all().all()
    c = metrics.ceiling(parts[1], metrics=["pearson_delta"], n_draws=2, random_state=2)
    assert not np.allclose(a["pearson_delta"], c["pearson_delta"])


def test_interpolated_duplicate_lies_nearer_to_the_truth(tables):
    plain = tables["top"]
    mixed = metrics.ceiling(tables["reference"], metrics=NAMES, n_draws=8, kind="interpolated")
    assert mixed["mse"].mean() < plain["mse"].mean()
    with pytest.raises(ScpertError, match="needs training data"):
        metrics.ceiling(tables["reference"].screen.adata, kind="interpolated")


def test_flat_predictions_count_by_chance(tables):
    flat = metrics.training_mean(tables["reference"])
    table = metrics.evaluate(flat, tables["reference"], metrics=["pearson_delta_centroid"])
    assert table["pearson_delta_centroid"].isna().all()
    assert (metrics.by_chance(table)["pearson_delta_centroid"] == 0).all()
    assert metrics.summarise(table, tables["base"], tables["top"]).loc["pearson_delta_centroid", "score"] == 0


def test_paired_bootstrap_has_the_right_width():
    rng = np.random.default_rng(0)
    index = pd.Index([f"P{i}" for i in range(400)], name="perturbation")
    b = pd.DataFrame({"mse": rng.random(400)}, index=index)
    a = b + rng.normal(-0.02, 0.2, (400, 1))
    out = metrics.compare(a, b, n_boot=4000).loc["mse"]
    d = (b - a)["mse"]
    assert out["difference"] == pytest.approx(d.mean())  # positive: a has the smaller error
    width = 2 * 1.96 * d.std() / np.sqrt(400)
    assert out["upper"] - out["lower"] == pytest.approx(width, rel=0.1)


def test_clusters_widen_the_limits():
    rng = np.random.default_rng(0)
    index = pd.Index([f"P{i}" for i in range(200)], name="perturbation")
    shared = np.repeat(rng.normal(0, 1, 20), 10)
    a = pd.DataFrame({"pearson_delta": shared + rng.normal(0, 0.1, 200)}, index=index)
    b = pd.DataFrame({"pearson_delta": np.zeros(200)}, index=index)
    clusters = {f"P{i}": f"C{i // 10}" for i in range(200)}
    alone, together = metrics.compare(a, b), metrics.compare(a, b, clusters=clusters)

    def width(t):
        return (t["upper"] - t["lower"]).iloc[0]

    assert width(together) > 2 * width(alone)
    assert together["n_clusters"].iloc[0] == 20
    some = pd.Series(clusters).where(np.arange(200) < 100)  # NaN: in no complex
    assert metrics.compare(a, b, clusters=some)["n_clusters"].iloc[0] == 10 + 100


def test_dynamic_range(tables):
    out = metrics.dynamic_range(tables["base"], tables["top"])
    for name in ("mse", "centroid_accuracy"):
        best = metrics.METRICS[name].best
        neg, pos = tables["base"][name].mean(), tables["top"][name].mean()
        assert out.loc[name, "drf"] == pytest.approx((neg - pos) / (neg - best))
    assert out.loc["centroid_accuracy", "believable"]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_to_predict_without_effect(seed):
    """On screens without any effect the calibrated score says so, whatever the metric and the prediction."""
    adata = scpert.datasets.simulated(
        1200, 60, 12, n_combinations=0, effect_size=0.0, quality_fail=0.0, random_state=seed
    )
    half = np.random.default_rng(seed).random(adata.n_obs) < 0.5
    train, test = adata[half].copy(), adata[~half].copy()
    reference = metrics.Reference(test, train)
    base = metrics.evaluate(metrics.training_mean(reference), reference)
    top = metrics.ceiling(reference, n_draws=10, random_state=seed)
    own = metrics.evaluate(metrics.pseudobulk(train), reference)
    out = metrics.summarise(own, base, top).drop(index="variance_ratio")
    assert out["score"].isna().all(), out
    assert out["verdict"].str.startswith("nothing to predict here").all(), out
    assert not metrics.dynamic_range(base, top)["believable"].any()


def _null_of_unseen(seed: int):
    """Half of the perturbations held out of a screen without effects; test and training controls are few."""
    adata = scpert.datasets.simulated(1500, 80, 16, n_combinations=0, random_state=seed, effect_size=0.0)
    scpert.pp.split(adata, kind="perturbations", fractions=(0.5, 0.0, 0.5), random_state=seed)
    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    return metrics.Reference(test, train)


def test_metrics_of_the_set_claim_nothing_without_effect():
    """The training mean happens to correlate negatively here: a ceiling of 0 is above it, and means nothing."""
    names = ["ate_pearson", "ate_pearson_top20", "ate_r2"]
    reference = _null_of_unseen(0)
    base = metrics.evaluate(metrics.training_mean(reference), reference, metrics=names)
    top = metrics.ceiling(reference, metrics=names, n_draws=10)
    assert top["ate_pearson"].iloc[0] > base["ate_pearson"].iloc[0] + 0.02
    out = metrics.summarise(top, base, top)
    assert out["score"].isna().all() and out["verdict"].str.startswith("nothing to predict here").all(), out


def test_metrics_of_the_set_have_a_score_where_there_are_effects(parts):
    names = ["ate_pearson", "ate_pearson_top20", "ate_r2"]
    reference = metrics.Reference(parts[1], parts[0])
    base = metrics.evaluate(metrics.training_mean(reference), reference, metrics=names)
    top = metrics.ceiling(reference, metrics=names, n_draws=5)
    np.testing.assert_allclose(metrics.summarise(top, base, top)["score"], 1)
    few = metrics.ceiling(reference, metrics=names, n_draws=2)  # no spread to tell from two draws
    assert metrics.summarise(few, base, few)["verdict"].str.startswith("nothing to predict here").all()


def test_no_metric_is_believed_without_effect():
    """Halves share the noise of controls and centroid: without effects they beat the training mean by that alone."""
    for seed in range(3):
        reference = _null_of_unseen(seed)
        base = metrics.evaluate(metrics.training_mean(reference), reference)
        top = metrics.ceiling(reference, n_draws=10, random_state=seed)
        out = metrics.dynamic_range(base, top)
        assert not out["believable"].any(), out[out["believable"]]


def test_metrics_of_cells_claim_nothing_without_effect():
    """Number of cells and chance findings of single perturbations are no effects."""
    names = ["pearson_edistance", "roc_auc", "pr_auc", "de_direction_match", "energy_distance", "overlap_at_N"]
    for seed in (0, 2):
        adata = scpert.datasets.simulated(1200, 60, 12, n_combinations=0, effect_size=0.0, random_state=seed)
        half = np.random.default_rng(seed).random(adata.n_obs) < 0.5
        train, test = adata[half].copy(), adata[~half].copy()
        reference = metrics.Reference(test, train)
        top = metrics.ceiling(reference, metrics=names, n_draws=5, random_state=seed)
        scpert.model.PerturbedMean.setup_anndata(train)
        model = scpert.model.PerturbedMean(train)
        model.train()
        cells = model.predict_perturbation(reference.perturbations, level="cell")
        base = metrics.evaluate(cells, reference, metrics=names)
        out = metrics.summarise(base, base, top, n_boot=500)
        assert out["score"].isna().all(), out


def test_replicates_of_others_are_known_for_cells_and_interpolated_duplicates(parts):
    reference = metrics.Reference(parts[1], parts[0])
    cells = metrics.ceiling(reference, metrics=["energy_distance"], n_draws=1)
    wrong = pd.Series(cells.attrs["mismatched"]["energy_distance"])
    assert (wrong.loc[cells.index] > cells["energy_distance"]).mean() > 0.9
    smooth = metrics.ceiling(reference, metrics=["centroid_accuracy"], n_draws=2, kind="interpolated")
    wrong = pd.Series(smooth.attrs["mismatched"]["centroid_accuracy"])
    assert smooth["centroid_accuracy"].mean() > wrong.mean() + 0.3


def test_errors_of_summaries(tables):
    other = tables["base"].copy()
    other.index = [f"X{i}" for i in range(len(other))]
    with pytest.raises(ScpertError, match="share no perturbation"):
        metrics.summarise(tables["own"], other, tables["top"])
    with pytest.raises(ScpertError, match="not in all tables"):
        metrics.summarise(tables["own"], tables["base"], tables["top"], metrics=["rmse"])
    with pytest.raises(ScpertError, match="must be a table"):
        metrics.compare(tables["own"], 3)
    with pytest.raises(ScpertError, match="n_draws"):
        metrics.ceiling(tables["reference"], n_draws=0)
    with pytest.raises(ScpertError, match="n_boot=10.5: give a whole number"):
        metrics.compare(tables["own"], tables["base"], n_boot=10.5)
    with pytest.raises(ScpertError, match="kind='other'"):
        metrics.ceiling(tables["reference"], kind="other")
    with pytest.raises(ScpertError, match="needs training data"):
        metrics.training_mean(metrics.Reference(tables["reference"].screen.adata))


def test_few_perturbations_claim_little():
    """Four of four gains are no proof: chance gives them in one of 16 cases. Twelve of twelve are."""
    rng = np.random.default_rng(0)
    for n, clear in ((4, False), (12, True)):
        base = pd.DataFrame({"mse": rng.uniform(1.0, 2.0, n)}, index=[f"p{i}" for i in range(n)])
        better = base - np.resize([0.01, 0.02, 0.03, 0.2], n)[:, None]
        row = metrics.compare(better, base).loc["mse"]
        assert (row["lower"] > 0) == clear and row["difference"] > 0
        assert (row["pvals"] < 0.05) == clear


def test_tables_of_effects_are_halved_by_their_standard_errors():
    """The halves are as alike as those of the cells; noise alone has nothing to predict."""
    found = {}
    for size in (0.0, 1.5):
        adata = scpert.datasets.simulated(3000, 60, 20, 0, effect_size=size, random_state=1)
        effects = scpert.tl.perturbation_effects(adata)
        options = {"metrics": ["pearson_delta", "mse"], "n_draws": 10}
        table = metrics.ceiling(effects, scale="effects", train=effects, **options)
        cells = metrics.ceiling(adata, train=adata, **options)
        assert table["pearson_delta"].mean() == pytest.approx(cells["pearson_delta"].mean(), abs=0.12)
        base = metrics.evaluate(
            metrics.training_mean(metrics.Reference(effects, effects, scale="effects")),
            metrics.Reference(effects, effects, scale="effects"),
            metrics=["pearson_delta", "mse"],
        )
        found[size] = metrics.summarise(base, base, table)["verdict"]
    assert found[0.0].str.startswith("nothing to predict").all()
    assert not found[1.5].str.startswith("nothing to predict").any()
    del effects.layers["std_error"]
    assert metrics.ceiling(effects, scale="effects", metrics="mse")["mse"].isna().all()


def test_library_size_of_train_is_asked_for():
    adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    adata.obs["size"] = np.asarray(adata.X.sum(axis=1)).ravel()
    train = adata.copy()
    del train.obs["size"]
    with pytest.raises(ScpertError, match="library_size_key of train"):
        metrics.Reference(adata, train, library_size_key="size")
