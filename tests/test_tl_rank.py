"""tl.rank_perturbations: the perturbation that makes the goal comes first; formulas by hand; bad input."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scpert
from scpert.errors import ScpertError


@pytest.fixture(scope="module")
def screen():
    return scpert.datasets.simulated(
        n_genes=60, n_targets=6, n_combinations=2, cells_per_perturbation=120, strength=0.6, random_state=1
    )


def test_held_out_goal_is_reached_by_its_own_perturbation():
    """Effects from one half of the cells; the goal is another half's cells of one perturbation, single or double."""
    screen = scpert.datasets.simulated(
        n_genes=60, n_targets=6, n_combinations=2, cells_per_perturbation=400, strength=0.6, random_state=1
    )
    half = np.arange(screen.n_obs) % 2 == 0
    effects = scpert.tl.perturbation_effects(screen[half].copy())
    rest = screen[~half].copy()
    labels = sorted(set(rest.obs["perturbation"].astype(str)) - {"control"})
    far = 0
    for label in labels:
        table = scpert.tl.rank_perturbations(rest, effects, goal=label, doubles=False, exclude_targets=False)
        assert table["remaining"].is_monotonic_increasing
        own = table.iloc[0]
        assert own["perturbation"] == label
        assert own["lower"] < 1 < own["upper"] or abs(own["progress"] - 1) < 0.3
        assert own["pvals_adj"] < 0.05
        # without the targets themselves only those that move other genes can be told apart
        if (effects[label].layers["pvals_adj"] < 0.05).sum() - len(label.split("+")) >= 5:
            far += 1
            table = scpert.tl.rank_perturbations(rest, effects, goal=label, doubles=False)
            assert table.loc[0, "perturbation"] == label
    assert far >= 3


def test_tables_of_effects_start_from_zero(screen):
    effects = scpert.tl.perturbation_effects(screen)
    label = effects.obs_names[0]
    assert "control" not in effects.obs_names
    table = scpert.tl.rank_perturbations(effects, goal=label, scale="effects", doubles=False, exclude_targets=False)
    assert table.loc[0, "perturbation"] == label
    assert table.loc[0, "remaining"] == pytest.approx(0, abs=1e-6)


def test_formulas_by_hand(screen):
    effects = scpert.tl.perturbation_effects(screen)
    wanted = pd.Series(np.random.default_rng(0).normal(size=screen.n_vars), index=screen.var_names)
    table = scpert.tl.rank_perturbations(screen, effects, goal=wanted, exclude_targets=False).set_index("perturbation")
    label = effects.obs_names[0]
    delta, d = effects[label].X[0], wanted.to_numpy()
    row = table.loc[label]
    assert row["progress"] == pytest.approx(delta @ d / (d @ d))
    assert row["cosine"] == pytest.approx(delta @ d / np.linalg.norm(d) / np.linalg.norm(delta))
    assert row["remaining"] == pytest.approx(np.linalg.norm(d - delta) / np.linalg.norm(d))
    error = effects[label].layers["std_error"][0]
    assert row["std_error"] == pytest.approx(np.sqrt(((d * error) ** 2).sum()) / (d @ d))
    single = table[table["n_targets"] == 1]
    double = table[table["status"] == "sum"]
    for name, value in double["progress"].items():
        a, b = name.split("+")
        assert value == pytest.approx(single.loc[a, "progress"] + single.loc[b, "progress"])


def test_model_and_groups(screen):
    model = scpert.model.Additive
    model.setup_anndata(screen)
    trained = model(screen)
    trained.train()
    goal = sorted(set(screen.obs["perturbation"].astype(str)) - {"control"})[0]
    by_model = scpert.tl.rank_perturbations(trained, goal=goal)
    assert by_model["n_targets"].max() == 2
    assert goal in set(by_model["perturbation"].head(3))
    mask = (screen.obs["perturbation"].astype(str) == goal).to_numpy()
    by_mask = scpert.tl.rank_perturbations(screen, trained, goal=mask)
    pd.testing.assert_frame_equal(by_mask, by_model)
    by_cells = scpert.tl.rank_perturbations(screen, trained, goal=screen[mask].copy())
    pd.testing.assert_frame_equal(by_cells, by_model)


def test_bad_input(screen):
    with pytest.raises(ScpertError, match="no value of"):
        scpert.tl.rank_perturbations(screen, goal="NOT_THERE")
    with pytest.raises(ScpertError, match="no way to go"):
        scpert.tl.rank_perturbations(screen, goal="control")
    with pytest.raises(ScpertError, match="names no gene"):
        scpert.tl.rank_perturbations(screen, goal=pd.Series([1.0], index=["ENSG"]))
    with pytest.raises(ScpertError, match="mask has shape"):
        scpert.tl.rank_perturbations(screen, goal=np.ones(3, dtype=bool))
    with pytest.raises(ScpertError, match="trained model"):
        scpert.tl.rank_perturbations(
            screen, object(), goal="control", perturbations=["G1"], start=np.ones(screen.n_obs, bool)
        )
    effects = scpert.tl.perturbation_effects(screen)
    with pytest.raises(ScpertError, match="No effect of 'NOPE'"):
        scpert.tl.rank_perturbations(screen, effects, goal=effects.obs_names[0], perturbations=["NOPE"])


def state_screen(n_controls: int = 100) -> ad.AnnData:
    """Twenty perturbations without any effect, another state of the cells, few controls."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.5, 1, 400) + 0.05
    other = mean * np.where(np.arange(400) < 15, 3, 1)
    groups = [("control", n_controls, mean), *((f"P{i}", 100, mean) for i in range(20)), ("state", 100, other)]
    counts = np.vstack([rng.negative_binomial(2, 2 / (2 + m), size=(n, 400)) for _, n, m in groups])
    labels = np.repeat([name for name, _, _ in groups], [n for _, n, _ in groups])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(400)]))


def test_noise_of_shared_controls_is_no_progress():
    """Way and effects are relative to the same controls: their noise alone brought every perturbation nearer."""
    screen = state_screen()
    table = scpert.tl.rank_perturbations(screen, goal="state", doubles=False).set_index("perturbation")
    null = table.drop("state")
    assert (null["pvals"] < 0.05).sum() <= 4 and abs(null["progress"].mean()) < 0.1
    assert table.loc["state", "progress"] == pytest.approx(1)  # the very cells that the goal is made of
    double = scpert.tl.rank_perturbations(screen, goal="state", perturbations=["state+P1"], doubles=False).iloc[0]
    # both singles are relative to the same controls: the error of the sum is no less than that of the second part
    assert double["status"] == "sum" and double["std_error"] > 0.9 * table.loc["P1", "std_error"]
    # effects that were made beforehand of the same cells are told by their controls, those of other cells too
    effects = scpert.tl.perturbation_effects(screen)
    again = scpert.tl.rank_perturbations(screen, effects, goal="state", doubles=False)
    pd.testing.assert_frame_equal(again.set_index("perturbation"), table)
    controls = screen.obs["perturbation"].eq("control").to_numpy()
    half = controls & (np.cumsum(controls) % 2 == 0)
    effects = scpert.tl.perturbation_effects(screen[~half].copy())
    apart = scpert.tl.rank_perturbations(screen, effects, goal="state", start=half, doubles=False)
    assert (apart["pvals"] < 0.05).sum() <= 5


def test_a_model_starts_from_controls_that_it_did_not_see(caplog):
    screen = state_screen(200)
    screen.obs["split"] = np.where(np.arange(screen.n_obs) % 2, "train", "test")
    model = scpert.model.Additive
    found = {}
    for key in (None, "split"):
        model.setup_anndata(screen, split_key=key)
        trained = model(screen)
        trained.train()
        caplog.clear()
        found[key] = scpert.tl.rank_perturbations(trained, goal="state", doubles=False).query("perturbation != 'state'")
        assert ("their noise alone" in caplog.text) == (key is None)
    assert abs(found["split"]["progress"].mean()) < 0.5 * found[None]["progress"].mean()


def test_a_model_is_asked_about_its_data_as_it_was_set_up():
    screen = state_screen(50)
    screen.obs = screen.obs.rename(columns={"perturbation": "guide"}).replace({"guide": {"control": "NT"}})
    screen.obs["size"] = np.asarray(screen.X).sum(axis=1) * 3.0
    setup = {"perturbation_key": "guide", "control": "NT", "library_size_key": "size"}
    model = scpert.model.PerturbedMean
    model.setup_anndata(screen, **setup)
    trained = model(screen)
    trained.train()
    by_model = scpert.tl.rank_perturbations(trained, goal="state", perturbations=["P1"])
    said = scpert.tl.rank_perturbations(screen, trained, goal="state", perturbations="P1", **setup)
    pd.testing.assert_frame_equal(by_model, said)


def test_effects_without_standard_errors_have_no_limits(screen):
    effects = scpert.tl.perturbation_effects(screen)
    del effects.layers["std_error"]
    table = scpert.tl.rank_perturbations(screen, effects, goal=effects.obs_names[0])
    assert table[["std_error", "lower", "upper", "pvals"]].isna().all(axis=None) and table["progress"].notna().all()


def test_goals_as_an_analyst_gives_them(screen):
    goal = screen.uns["truth"]["net"]["source"].iloc[0]
    mask = screen.obs["perturbation"] == goal  # a Series of cells, not of genes
    table = scpert.tl.rank_perturbations(screen, goal=mask)
    pd.testing.assert_frame_equal(table, scpert.tl.rank_perturbations(screen, goal=mask.to_numpy()))
    genes = list(screen.var_names[:2])
    for wrong, message in (
        (pd.Series([1.0, np.nan], index=genes), "no finite shift"),
        (pd.Series(["a", "b"], index=genes), "no finite shift"),
        (pd.Series([1.0, 2.0], index=genes[:1] * 2), "more than once"),
    ):
        with pytest.raises(ScpertError, match=message):
            scpert.tl.rank_perturbations(screen, goal=wrong)
    with pytest.raises(ScpertError, match="n_doubles=1.5"):
        scpert.tl.rank_perturbations(screen, goal=goal, n_doubles=1.5)


def test_batches_are_no_way_and_no_progress():
    """Goal cells of another batch than most controls: without strata its shift is the way; within strata the perturbation is."""
    adata = scpert.datasets.simulated(n_genes=60, n_targets=6, cells_per_perturbation=150, strength=1.0)
    rng = np.random.default_rng(0)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    goal, other = "G60", "G19"
    late = rng.random(len(labels)) < np.where(np.isin(labels, [goal, other]), 0.8, 0.3)
    x = adata.X.toarray()
    x[:, 20:50] = np.where(late[:, None], rng.poisson(x[:, 20:50] * 4 + 2), x[:, 20:50])
    adata.X = x
    adata.obs["run"] = late.astype(str)
    free = scpert.tl.rank_perturbations(adata, goal=goal, doubles=False).set_index("perturbation")
    within = scpert.tl.rank_perturbations(adata, goal=goal, doubles=False, covariate_keys="run").set_index(
        "perturbation"
    )
    assert free.loc[other, "progress"] > 0.6 and abs(within.loc[other, "progress"]) < 0.35
    assert within.index[0] == goal and within.loc[goal, "progress"] == pytest.approx(1.0)
    assert within.loc[goal, "pvals"] == 0.0
    with pytest.raises(ScpertError, match="no cell to start from"):
        scpert.tl.rank_perturbations(
            adata, goal=goal, start=(labels == "control") & ~late, covariate_keys="run", doubles=False
        )


def test_nullable_masks_and_unknown_candidates(screen):
    mask = (screen.obs["perturbation"] == screen.obs["perturbation"].iloc[0]).astype("boolean")
    plain = scpert.tl.rank_perturbations(screen, goal=mask.to_numpy(dtype=bool), doubles=False)
    pd.testing.assert_frame_equal(scpert.tl.rank_perturbations(screen, goal=mask, doubles=False), plain)
    mask.iloc[3] = pd.NA
    with pytest.raises(ScpertError, match="1 missing value"):
        scpert.tl.rank_perturbations(screen, goal=mask, doubles=False)
    scpert.model.PerturbedMean.setup_anndata(screen)
    model = scpert.model.PerturbedMean(screen)
    model.train()
    goal = next(p for p in screen.obs["perturbation"] if p != "control")
    with pytest.raises(scpert.errors.UnknownTargetError, match="Leave it out") as caught:
        scpert.tl.rank_perturbations(screen, model, goal=goal, perturbations=[goal, "NOT_A_GENE"])
    assert "on_unknown" not in str(caught.value)
