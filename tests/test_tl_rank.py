"""tl.rank_perturbations: the perturbation that makes the goal comes first; formulas by hand; bad input."""

from __future__ import annotations

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
