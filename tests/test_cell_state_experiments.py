"""CellState: manipulation, screens, regulators, transfer, gene network; simulated states with known regulators."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scpert.errors import LabelError, MissingKeyError, ScpertError, UnknownTargetError
from scpert.model import CellState
from scpert.model._cell_state_stats import adjust, auroc, match_nearest, rank_product, tail_pvalues


def states(
    *,
    n: int = 200,
    n_tf: int = 30,
    planted: int = 4,
    per_tf: int = 8,
    extra: int = 60,
    effect: float = 1.5,
    seed: int = 0,
) -> tuple[ad.AnnData, pd.DataFrame, list[str]]:
    """Two states; the planted factors are higher in the goal and drive their targets, the others vary at random."""
    rng = np.random.default_rng(seed)
    goal = np.arange(n) % 2 == 1
    tf = rng.normal(size=(n, n_tf))
    tf[:, :planted] += effect * goal[:, None]
    sign = rng.choice([1.0, -1.0], size=(n_tf, per_tf))
    targets = (tf[:, :, None] * sign[None] * 0.7 + 0.5 * rng.normal(size=(n, n_tf, per_tf))).reshape(n, -1)
    log = 5 + np.hstack([tf * 0.6, targets, rng.normal(size=(n, extra))])
    names = (
        [f"TF{i}" for i in range(n_tf)]
        + [f"T{i}_{j}" for i in range(n_tf) for j in range(per_tf)]
        + [f"N{i}" for i in range(extra)]
    )
    adata = ad.AnnData(np.maximum(log, 0).astype(np.float32), var=pd.DataFrame(index=names))
    adata.obs["state"] = np.where(goal, "goal", "start")
    net = pd.DataFrame(
        [(f"TF{i}", f"T{i}_{j}", sign[i, j]) for i in range(n_tf) for j in range(per_tf)],
        columns=["source", "target", "weight"],
    )
    return adata, net, [f"TF{i}" for i in range(planted)]


def fit(adata: ad.AnnData, **options) -> CellState:
    CellState.setup_anndata(adata, scale="log1p")
    model = CellState(adata, hidden=(64,), n_latent=options.pop("n_latent", 20), **options)
    model.train(max_epochs=2)
    return model


@pytest.fixture(scope="module")
def planted():
    adata, net, truth = states(n=280)
    adata = adata[:200].copy()
    return adata, net, truth, fit(adata)


def held_out() -> ad.AnnData:
    """Samples of the same states that the model of ``planted`` has not seen."""
    return states(n=280)[0][200:].copy()


# ------------------------------------------------------------------------------------------ statistics


def test_adjust_is_scipys():
    from scipy.stats import false_discovery_control

    p = np.random.default_rng(0).random(50) ** 2
    np.testing.assert_allclose(adjust(p), false_discovery_control(p))
    assert np.isnan(adjust(np.array([0.1, np.nan]))[1])


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth, score = rng.random((30, 3)) < 0.4, np.round(rng.normal(size=(30, 3)), 1)
    np.testing.assert_allclose(auroc(truth, score), [roc_auc_score(truth[:, j], score[:, j]) for j in range(3)])


def test_tail_pvalues_are_uniform_and_calibrated_in_the_tail():
    rng = np.random.default_rng(0)
    null = rng.standard_t(5, size=4000)
    p = tail_pvalues(rng.standard_t(5, size=20000), null)
    for level in (0.5, 0.1, 0.01, 0.001):
        assert np.mean(p <= level) == pytest.approx(level, rel=0.5)
    assert tail_pvalues(np.array([50.0]), null)[0] < 1e-4


def test_rank_product_and_matching():
    np.testing.assert_allclose(rank_product([3.0, 2.0, 1.0]), [1 / 3, 2 / 3, 1])
    draws = match_nearest(np.array([0.0, 9.0]), np.arange(10.0), np.random.default_rng(0), 50, width=3)
    assert set(draws[0]) == {0, 1, 2} and set(draws[1]) == {7, 8, 9}


# ------------------------------------------------------------------------------------------ manipulation


def test_manipulation_is_relative_to_the_own_reconstruction(planted):
    adata, _, _, model = planted
    before = adata.copy()
    out = model.manipulate(adata, ["TF0", "TF1"])
    assert out.shape == adata.shape
    np.testing.assert_allclose(out.X - out.layers["delta"], out.layers["reconstruction"], atol=1e-4)
    position = [adata.var_names.get_loc(g) for g in ("TF0", "TF1")]
    np.testing.assert_allclose(out.X[:, position], 0, atol=1e-5)
    rest = np.setdiff1d(np.arange(adata.n_vars), position)
    np.testing.assert_allclose(out.layers["reconstruction"][:, rest], model.reconstruct(adata)[:, rest], atol=1e-4)
    assert out.obs["converged"].all() and out.obs["ood"].notna().all()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    np.testing.assert_array_equal(adata.X, before.X)


def test_paired_is_two_passes(planted):
    adata, _, _, model = planted
    moved = adata.copy()
    j = adata.var_names.get_loc("TF2")
    moved.X[:, j] = 7.0
    expected = model.reconstruct(moved) - model.reconstruct(adata)
    out = model.manipulate(adata, "TF2", mode="set", level=7.0)
    rest = np.arange(adata.n_vars) != j
    np.testing.assert_allclose(out.layers["delta"][:, rest], expected[:, rest], atol=1e-4)


@pytest.mark.parametrize("method", ["paired", "fixed_point", "conditional", "jacobian"])
def test_nothing_changes_at_the_own_level(planted, method):
    adata, _, _, model = planted
    one = adata[:1].copy()
    level = float(one[:, "TF0"].X[0, 0])
    out = model.manipulate(one, "TF0", mode="set", level=level, method=method)
    np.testing.assert_allclose(out.layers["delta"], 0, atol=2e-4)


def test_jacobian_is_a_finite_difference(planted):
    adata, _, _, model = planted
    one = adata[:3].copy()
    j = adata.var_names.get_loc("TF0")
    step = one.X[:, j].mean() * 0 + 0.01
    moved = one.copy()
    moved.X[:, j] += step
    difference = (model.reconstruct(moved) - model.reconstruct(one)) / step
    out = model.manipulate(one, "TF0", mode="set", level=5.0, method="jacobian")
    slope = out.layers["delta"] / (5.0 - one.X[:, [j]])
    rest = np.arange(adata.n_vars) != j
    np.testing.assert_allclose(slope[:, rest], difference[:, rest], atol=5e-3)


@pytest.mark.parametrize("method", ["fixed_point", "conditional"])
def test_others_follow_the_gene_to_its_level(planted, method):
    adata, net, _, model = planted
    out = model.manipulate(adata, "TF0", mode="overexpress", method=method)
    assert out.obs["converged"].mean() > 0.95
    mean = pd.Series(out.layers["delta"].mean(0), adata.var_names)
    own = net[net["source"] == "TF0"].set_index("target")["weight"]
    assert (np.sign(mean[own.index]) == own).all()
    other = mean[[g for g in adata.var_names if not g.startswith(("TF0", "T0_"))]]
    assert mean[own.index].abs().mean() > 3 * other.abs().mean()


def test_conditional_of_a_linear_model_follows_the_covariance():
    rng = np.random.default_rng(0)
    values = 5 + rng.normal(size=(300, 4)) @ np.diag([3.0, 1.0, 0.5, 0.3]) @ rng.normal(size=(4, 30)) * 0.3
    adata = ad.AnnData(np.maximum(values, 0.1).astype(np.float32))
    CellState.setup_anndata(adata, scale="log1p")
    model = CellState(adata, hidden=(8,), n_latent=4)
    model.train(max_epochs=1, train_size=1.0, early_stopping=False, lr=1e-9)
    with torch.no_grad():
        model.module.output.weight.zero_()
        model.module.output.bias.zero_()
    model._learn_reference(np.arange(300), np.arange(300).astype(str))
    covariance = np.cov(model.reconstruct(adata).T)
    own = adata.X[:1].copy()
    out = model.manipulate(adata[:1].copy(), adata.var_names[3], mode="set", level=own[0, 3] + 1, method="conditional")
    expected = covariance[3] / covariance[3, 3]
    assert np.corrcoef(out.layers["delta"][0], expected)[0, 1] > 0.99
    np.testing.assert_allclose(out.layers["delta"][0], expected, atol=0.2)


def test_conditional_does_not_count_depth():
    """Counts of unrelated genes: logs go up and down together with the total, which says nothing about the genes."""
    rng = np.random.default_rng(0)
    depth = np.exp(rng.normal(0, 1, size=(1500, 1)))
    adata = ad.AnnData(
        rng.poisson(depth * rng.uniform(1, 4, 40)).astype(np.float32) + np.eye(1500, 40, dtype="float32")
    )
    CellState.setup_anndata(adata, scale="counts")
    model = CellState(adata, hidden=(16,), n_latent=10)
    model.train(max_epochs=1)

    def common() -> float:
        delta = model.manipulate(adata[:50].copy(), adata.var_names[0], method="conditional").layers["delta"].mean(0)
        return float(-delta[1:].mean() / delta[1:].std())

    held = common()
    model.reference_["cov_at_depth"] = model.reference_["cov"]
    assert common() > 1
    assert abs(held) < 0.3


def test_strange_samples_are_flagged(planted):
    adata, _, _, model = planted
    strange = adata[:20].copy()
    strange.X = (
        np.random.default_rng(0).permuted(strange.X, axis=1)
        + np.random.default_rng(1).random(strange.shape).astype(np.float32) * 4
    )
    assert model.manipulate(strange, "TF0").obs["ood"].min() > model.manipulate(adata, "TF0").obs["ood"].quantile(0.95)


def test_manipulation_survives_files(planted, tmp_path):
    adata, _, _, model = planted
    out = model.manipulate(adata, "TF0")
    out.write_h5ad(tmp_path / "a.h5ad")
    out.write_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "a.h5ad").layers["delta"], out.layers["delta"])


def test_bad_manipulations(planted):
    adata, _, _, model = planted
    with pytest.raises(UnknownTargetError, match="not measured") as caught:
        model.manipulate(adata, "TF00")
    assert "TF0" in caught.value.suggestions["TF00"]
    with pytest.raises(ScpertError, match="needs level"):
        model.manipulate(adata, "TF0", mode="set")
    with pytest.raises(ScpertError, match="cannot be negative"):
        model.manipulate(adata, "TF0", mode="set", level=-1)
    with pytest.raises(ScpertError, match="only .* are measured"):
        model.manipulate(adata, [f"x{i}" for i in range(adata.n_vars + 1)])
    with pytest.raises(ScpertError, match="twice"):
        model.manipulate(adata, ["TF0", "TF0"])
    with pytest.raises(ScpertError, match="mode="):
        model.manipulate(adata, "TF0", mode="delete")


# ------------------------------------------------------------------------------------------ screens


def test_screen_finds_planted_regulators_and_repeats(planted):
    from sklearn.metrics import average_precision_score

    adata, _, truth, model = planted
    factors = [g for g in adata.var_names if g.startswith("TF")]
    out = [
        model.screen(adata, groupby="state", start="start", goal="goal", genes=factors, mode="set", n_null=200)
        for _ in range(2)
    ]
    pd.testing.assert_frame_equal(*out)
    table = out[0].set_index("gene")
    assert {"shift", "zscore", "pvals", "pvals_adj"} <= set(table)
    found = average_precision_score(table.index.isin(truth), table["zscore"])
    assert found > 0.9 > 3 * len(truth) / len(factors)
    knocked = model.screen(
        adata, groupby="state", start="goal", goal="start", genes=factors, mode="knockout", n_null=200
    )
    assert set(truth) <= set(knocked["gene"].head(6))


@pytest.mark.parametrize("seed", range(3))
def test_screen_without_any_state_finds_about_nothing(seed):
    adata, _, _ = states(planted=0, n=120, seed=seed)
    model = fit(adata)
    table = model.screen(adata, groupby="state", start="start", goal="goal", mode="set", n_null=300)
    assert (table["pvals_adj"] < 0.1).mean() <= 0.02


def test_bad_states(planted):
    adata, net, _, model = planted
    common = {"groupby": "state", "start": "start"}
    with pytest.raises(ScpertError, match="are both"):
        model.screen(adata, groupby="state", start="goal", goal="goal")
    with pytest.raises(MissingKeyError, match="is not in adata.obs"):
        model.screen(adata, goal="elsewhere", **common)
    with pytest.raises(MissingKeyError, match="groupby"):
        model.screen(adata, groupby="stat", start="start", goal="goal")
    one = adata.copy()
    one.obs["state"] = np.where(np.arange(adata.n_obs) == 0, "single", adata.obs["state"])
    with pytest.raises(ScpertError, match="1 sample"):
        model.screen(one, goal="single", **common)
    with pytest.raises(UnknownTargetError, match="not measured"):
        model.master_regulators(adata, goal="goal", net=net, regulators=["TF0", "XYZ"], **common)
    with pytest.raises(ScpertError, match="no signs"):
        model.master_regulators(adata, goal="goal", net=net[["source", "target"]], **common)
    with pytest.raises(ScpertError, match="no signs"):
        model.master_regulators(adata, goal="goal", net=net.assign(weight=1.0), **common)
    with pytest.raises(ScpertError, match="k=1"):
        model.cooperative_regulators(adata, goal="goal", k=1, **common)


# ------------------------------------------------------------------------------------------ regulators


def test_master_regulators_combine_two_lines_of_evidence(planted):
    adata, net, truth, model = planted
    table = model.master_regulators(adata, groupby="state", start="start", goal="goal", net=net, n_boot=20)
    assert {"regulator", "activity", "virtual", "score", "rank"} <= set(table)
    assert set(table["regulator"].head(len(truth))) == set(truth)
    assert (table["rank_lower"] <= table["rank_upper"]).all()
    # regulon evidence does not see the regulator, virtual evidence does not see the net
    wrong = net.assign(target=np.random.default_rng(0).permutation(net["target"]))
    other = model.master_regulators(adata, groupby="state", start="start", goal="goal", net=wrong, n_boot=0).set_index(
        "regulator"
    )
    same = table.set_index("regulator").loc[other.index]
    np.testing.assert_allclose(other["virtual"], same["virtual"])
    assert not np.allclose(other["activity"], same["activity"])


def test_activity_is_decouplers_formula(planted):
    adata, net, _, model = planted
    table = model.master_regulators(adata, groupby="state", start="start", goal="goal", net=net, n_boot=0).set_index(
        "regulator"
    )
    from scpert.model._cell_state_regulators import _signature

    y = (adata.X - model._mean) / model._scale
    goal = (adata.obs["state"] == "goal").to_numpy()
    signature = _signature(y[~goal], y[goal])
    w = np.zeros(adata.n_vars)
    own = net[net["source"] == "TF0"]
    w[adata.var_names.get_indexer(own["target"])] = own["weight"]
    r = np.corrcoef(w, signature)[0, 1]
    assert table.loc["TF0", "activity"] == pytest.approx(r * np.sqrt((adata.n_vars - 2) / (1 - r**2)), rel=1e-3)


def test_master_regulators_per_sample(planted):
    adata, net, truth, model = planted
    table = model.master_regulators(
        adata, groupby="state", start="start", goal="goal", net=net, per_sample=True, n_boot=2
    )
    goal = adata.obs_names[adata.obs["state"] == "goal"]
    assert len(table) == len(goal) * 30 and set(table["sample"]) == set(goal)
    share = table[table["rank"] <= 8].groupby("regulator").size() / len(goal)
    assert share.reindex(truth).mean() > 2 * share.drop(truth, errors="ignore").mean()
    assert table["stability"].between(0, 1).all()


def cooperation(seed: int, together: bool, n: int = 300) -> ad.AnnData:
    """Module genes follow A and B only where both are high (or, without cooperation, each by itself)."""
    rng = np.random.default_rng(seed)
    on = rng.random((n, 6)) < 0.5
    module = (on[:, 0] & on[:, 1]) * 1.0 if together else 0.5 * (on[:, 0] * 1.0 + on[:, 1])
    factors = 2.0 * on + 0.3 * rng.normal(size=(n, 6))
    genes = 2.0 * module[:, None] + 0.4 * rng.normal(size=(n, 30))
    noise = rng.normal(size=(n, 40))
    X = 5 + np.hstack([factors, genes, noise])
    names = [*"ABCDEF", *[f"M{i}" for i in range(30)], *[f"N{i}" for i in range(40)]]
    adata = ad.AnnData(X.astype(np.float32), var=pd.DataFrame(index=names))
    adata.obs["state"] = np.select([module > 0.9, ~on[:, 0] & ~on[:, 1]], ["goal", "start"], "between")
    return adata


def regulators_together(adata: ad.AnnData, **options) -> pd.DataFrame:
    model = fit(adata, n_latent=8)
    return model.cooperative_regulators(
        adata, groupby="state", start="start", goal="goal", regulators=list("ABCDEF"), **options
    )


@pytest.mark.parametrize("seed", range(2))
def test_cooperation_is_found_and_addition_is_not_called(seed):
    table = regulators_together(cooperation(seed, True))
    assert {"regulators", "shift", "additive", "synergy", "zscore", "pvals", "pvals_adj"} <= set(table)
    assert len(table) == 15
    assert table["regulators"][0] == "A+B" and table["pvals_adj"][0] < 1e-3
    assert (table["pvals_adj"] < 0.1).sum() <= 2
    np.testing.assert_allclose(table["shift"], table["additive"] + table["synergy"])
    added = regulators_together(cooperation(seed, False)).set_index("regulators")
    assert (added["pvals_adj"] > 0.1).all()
    assert abs(added.loc["A+B", "synergy"]) < 0.1 * added.loc["A+B", "shift"]


def test_cooperation_of_three_and_in_each_sample():
    rng = np.random.default_rng(3)
    adata = cooperation(3, True, n=400)
    on = adata.X[:, :3] > 6
    three = on.all(axis=1)
    adata.X[:, 6:36] = 5 + 2.0 * three[:, None] + 0.4 * rng.normal(size=(400, 30))
    adata.obs["state"] = np.select([three, ~on.any(axis=1)], ["goal", "start"], "between")
    triples = regulators_together(adata, k=3, beam=3)
    assert triples["regulators"][0] == "A+B+C" and triples["pvals_adj"][0] < 0.01
    assert triples["regulators"].str.count(r"\+").eq(2).all()
    each = regulators_together(adata, k=3, beam=3, per_sample=True, max_samples=5)
    assert each["sample"].nunique() == 5 and len(each) == 5 * len(triples)
    mine = each[each["regulators"] == "A+B+C"]["synergy"]
    assert mine.mean() == pytest.approx(triples["synergy"][0], rel=0.25)


def test_interaction_is_ordinary_least_squares_with_hc3():
    """Against the textbook formula, one sample left out at a time for the leverages."""
    from scpert.model._cell_state_surface import ResponseSurfaces

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = x[:, 0] + x[:, 0] * x[:, 1] + rng.normal(size=60) * (1 + x[:, 0] ** 2)
    start, goal = np.array([-1.0, -1.0]), np.array([1.0, 0.5])
    found = ResponseSurfaces(y, x, start, goal, 2).fit(np.array([[0, 1]]))
    hinge = np.maximum(x - np.median(x, axis=0), 0)
    product = np.prod((x - start) / (goal - start), axis=1)
    D = np.column_stack([np.ones(60), x, hinge, product])
    beta = np.linalg.lstsq(D, y, rcond=None)[0]
    hat = np.linalg.pinv(D)
    left_out = [y[i] - D[i] @ np.linalg.lstsq(np.delete(D, i, 0), np.delete(y, i), rcond=None)[0] for i in range(60)]
    error = np.sqrt(((hat[-1] * left_out) ** 2).sum())
    np.testing.assert_allclose(found.interaction[0], beta[-1], rtol=1e-4)
    np.testing.assert_allclose(found.t[0], beta[-1] / error, rtol=1e-4)
    at = lambda v: np.r_[1, v, np.maximum(v - np.median(x, axis=0), 0), np.prod((v - start) / (goal - start))]  # noqa: E731
    assert found.total[0] == pytest.approx((at(goal) - at(start)) @ beta, rel=1e-4)


def test_regulators_that_are_always_together_cannot_be_told_apart():
    adata = cooperation(0, True)
    adata.X[:, 1] = adata.X[:, 0]
    table = regulators_together(adata).set_index("regulators")
    assert table.loc["A+B", "pvals_adj"] > 0.1
    with pytest.raises(ScpertError, match="too few"):
        regulators_together(adata[:40].copy(), k=4)


# ------------------------------------------------------------------------------------------ transfer, network


def test_classification_is_compared_and_predicts(planted):
    adata, _, _, model = planted
    new = held_out()
    tuned = model.fine_tune(new, task="classification", groupby="state")
    assert {"fine_tuned", "from_scratch", "pca_logistic"} <= set(tuned.report_.index)
    assert tuned.report_.loc["fine_tuned", "balanced_accuracy"] > 0.8
    p = tuned.predict_class()
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert (p.idxmax(axis=1) == new.obs["state"]).mean() > 0.9
    moved = model.fine_tune(
        new, task="classification", groupby="state", freeze="none", adapter_rank=2, max_epochs=2, n_folds=2
    )
    assert moved is not model and moved.report_["balanced_accuracy"].notna().all()


def test_transfer_aligns_genes_by_name_and_reports(planted, tmp_path):
    adata, _, _, model = planted
    new = held_out()[:, 30:].copy()
    new.var_names = ["NEW0", "NEW1", *new.var_names[2:]]
    tuned = model.fine_tune(new, task="reconstruction", max_epochs=2)
    row = tuned.report_.iloc[0]
    assert (row["genes_new"], row["genes_missing"], row["genes_shared"]) == (2, 32, new.n_vars - 2)
    assert {"fine_tuned", "before", "from_scratch", "pca"} <= set(tuned.report_.index)
    assert tuned.report_["r2_imputed"].notna().all()
    tuned.save(tmp_path / "t")
    again = CellState.load(tmp_path / "t")
    pd.testing.assert_frame_equal(again.report_, tuned.report_)


def test_transfer_helps_with_few_samples_and_does_not_hurt_with_many():
    """New samples share the factors of the source, but have another centre; PCA and a model from scratch see them alone."""
    rng = np.random.default_rng(0)
    loadings, noise = rng.normal(size=(8, 200)), 0.5

    def samples(n: int, shift: float, scores: float = 1.0) -> ad.AnnData:
        x = 8 + shift * np.sin(np.arange(200)) + scores * rng.normal(size=(n, 8)) @ loadings
        return ad.AnnData(np.maximum(x + noise * rng.normal(size=x.shape), 0).astype(np.float32) / 3)

    source = samples(200, 0.0)
    model = fit(source, n_latent=8)
    gain = []
    for n in (9, 120):
        report = model.fine_tune(samples(n, 1.0), task="reconstruction").report_["r2_imputed"]
        assert report["fine_tuned"] > max(report["from_scratch"], report["before"]) - 0.01
        assert report["fine_tuned"] > report["pca"] - 0.02  # least squares on 200 genes, where the model scales up
        gain.append(report["fine_tuned"] - report["from_scratch"])
    assert gain[0] > 0.1 > abs(gain[1])
    tuned = model.fine_tune(samples(5, 1.0), task="reconstruction", compare=False)
    assert tuned.n_latent == 8 and tuned.extra_["closed_form"]["share"] > 0
    assert model.fine_tune(samples(120, 1.0), task="reconstruction", compare=False).history_ == {}


def test_frozen_encoder_stays(planted):
    _, _, _, model = planted
    tuned = model.fine_tune(held_out(), task="reconstruction", max_epochs=2, compare=False)
    for name, value in model.module.encoder.state_dict().items():
        np.testing.assert_array_equal(tuned.module.encoder.state_dict()[name], value)


def test_perturbation_head(planted):
    adata, _, _, model = planted
    labels = np.where(adata.obs["state"] == "goal", "TF0", "control")
    new = adata.copy()
    new.obs["perturbation"] = labels
    tuned = model.fine_tune(new, task="perturbation", groupby="perturbation")
    shift = tuned.predict_shift(new[labels == "control"].copy())
    truth = adata.X[labels == "TF0"].mean(0) - adata.X[labels == "control"].mean(0)
    assert np.corrcoef(shift.X[0], truth)[0, 1] > 0.8
    assert tuned.report_.loc["fine_tuned", "correlation"] > 0.5


def test_bad_fine_tuning(planted):
    adata, _, _, model = planted
    new = adata[:60].copy()
    new.obs["x"] = [None, *["a"] * 30, *["b"] * 29]
    with pytest.raises(LabelError, match="missing in 1"):
        model.fine_tune(new, task="classification", groupby="x")
    new.obs["x"] = ["c", *["a"] * 30, *["b"] * 29]
    with pytest.raises(LabelError, match="single sample"):
        model.fine_tune(new, task="classification", groupby="x")
    new.obs["x"] = pd.Categorical(["a"] * 30 + ["b"] * 30, categories=["a", "b", "c"])
    with pytest.raises(LabelError, match="have no sample"):
        model.fine_tune(new, task="classification", groupby="x")
    with pytest.raises(ScpertError, match="needs four"):
        model.fine_tune(adata[:3].copy(), task="reconstruction")
    renamed = new.copy()
    renamed.var_names = [f"ENSG{i}" for i in range(new.n_vars)]
    with pytest.raises(MissingKeyError, match="share 0"):
        model.fine_tune(renamed, task="reconstruction")


def _own_slope(model: CellState, adata: ad.AnnData, gene: str) -> float:
    """Mean derivative of a gene's reconstruction by its own input, by finite differences."""
    j = adata.var_names.get_loc(gene)
    moved = adata.copy()
    moved.X[:, j] += 0.01
    return float((model.reconstruct(moved) - model.reconstruct(adata))[:, j].mean() / 0.01)


def test_gene_network_is_the_jacobian_and_finds_targets(planted):
    from sklearn.metrics import average_precision_score

    adata, net, _, model = planted
    genes = list(adata.var_names[:100])
    found = model.gene_network(genes=genes, top_k=0, n_states=2, random_state=1)
    rows = np.sort(np.random.default_rng(1).choice(adata.n_obs, 2, replace=False))
    out = model.manipulate(adata[rows].copy(), "TF0", mode="overexpress", method="jacobian")
    change = out.layers["delta"][:, adata.var_names.get_loc("TF0")]
    slope = pd.Series((out.layers["delta"] / change[:, None] * model._scale[0] / model._scale).mean(0), adata.var_names)
    mine = found[found["source"] == "TF0"].set_index("target")["weight"]
    np.testing.assert_allclose(mine, slope[mine.index], atol=1e-5)
    shares = model.gene_network(genes=genes, top_k=0, n_states=2, random_state=1, standardise=True)
    own = {g: _own_slope(model, adata[rows].copy(), g) for g in ("TF0", "TF5")}
    both = [float(t.set_index(["source", "target"]).loc[("TF0", "TF5"), "weight"]) for t in (found, shares)]
    assert both[1] == pytest.approx(both[0] / np.sqrt(own["TF0"] * own["TF5"]), rel=1e-3)
    table = model.gene_network(regulators=[f"TF{i}" for i in range(30)], top_k=0)
    truth = set(zip(net["source"], net["target"], strict=True))
    known = [(s, t) in truth for s, t in zip(table["source"], table["target"], strict=True)]
    assert average_precision_score(known, table["weight"].abs()) > 5 * np.mean(known)


@pytest.mark.skipif(
    not {"SCPERT_TEST_DATA", "SCPERT_TEST_PRIORS"} <= set(os.environ),
    reason="set SCPERT_TEST_DATA and SCPERT_TEST_PRIORS",
)
def test_real_lineage_factor_of_adrenal_tumours():
    a = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / "bulk_tcga_5cohorts_rsem.h5ad")
    a.var_names = a.var["symbol"].astype(str)
    a = a[:, ~a.var_names.duplicated()]
    net = pd.read_csv(
        Path(os.environ["SCPERT_TEST_PRIORS"]) / "collectri_human_2023.tsv.gz", sep="\t", keep_default_na=False
    )
    keep = a.var_names.isin(set(net["source"])) | (np.arange(a.n_vars) % 8 == 0)
    a = a[:, keep & np.isin(a.var_names, [*set(net["source"]), *net["target"]])].copy()
    CellState.setup_anndata(a)
    model = CellState(a, hidden=(256,), n_latent=32)
    model.train(max_epochs=1)
    table = model.master_regulators(
        a, groupby="cohort", start="rest", goal="ACC", net=net.astype({"weight": float}), n_boot=0
    )
    row = table.set_index("regulator").loc["NR5A1"]
    assert row["rank"] <= 10 and row["rank_virtual"] <= 25
