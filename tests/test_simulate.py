"""The simulator: its truth against closed forms, its counts against the truth."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert
from scpert.data import _simulate as sim
from scpert.errors import ScpertError

simulated = scpert.datasets.simulated
QUIET = {"noise": 0.0, "batch_sd": 0.0, "quality_fail": 0.0, "penetrance": 1.0}


def weights(adata):
    """Dense direct effects ``(regulator, target)``."""
    place = {g: i for i, g in enumerate(adata.var_names)}
    A = np.zeros((adata.n_vars, adata.n_vars))
    for source, target, weight in adata.uns["truth"]["net"].itertuples(index=False):
        A[place[source], place[target]] = weight
    return A


def effects(adata):
    """Dense total effects, perturbation x gene."""
    table = adata.uns["truth"]["effects"].pivot(index="source", columns="target", values="weight")
    labels = sorted(set(adata.obs["perturbation"]) - {"control"})
    return table.reindex(index=labels, columns=adata.var_names).fillna(0.0)


def clamped(A, held):
    """Oracle: solve the network with the equations of the held genes replaced by their levels."""
    cut = A.copy()
    cut[:, list(held)] = 0.0
    d = np.zeros(len(A))
    d[list(held)] = list(held.values())
    return np.linalg.solve(np.eye(len(A)) - cut.T, d)


# ---------------------------------------------------------------------------------------------- form


def test_small_call_has_the_contracts_form():
    adata = simulated(n_cells=300, n_genes=40, n_targets=5)
    assert adata.shape == (300, 40)
    assert sparse.issparse(adata.X) and adata.X.format == "csr" and adata.X.has_canonical_format
    assert adata.X.dtype == np.float32 and (adata.X.data == np.rint(adata.X.data)).all() and adata.X.data.min() >= 1
    assert (np.asarray(adata.X.sum(axis=1)) > 0).all()
    assert "split" not in adata.obs
    labels = adata.obs["perturbation"].value_counts()
    assert (labels >= 1).all() and len(labels) == 1 + 5 + 8
    assert labels["control"] == 45
    targets = scpert.data.targets_of(adata.obs["perturbation"])
    assert len(targets) == 5 and set(targets) <= set(adata.var_names)
    assert list(adata.var_names[adata.var["target"]]) == targets
    assert set(adata.uns["truth"]) == {"net", "effects", "interactions", "annotations", "parameters"}
    assert scpert.data.Screen(adata).scale == "counts"


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_genes": 12, "n_targets": 12, "n_combinations": 0},
        {"n_genes": 120, "n_targets": 120, "n_combinations": 3},
        {"n_genes": 2, "n_targets": 1},
        {"n_genes": 2, "n_targets": 2, "n_combinations": 1},
        {"n_genes": 12},
        {"n_genes": 30, "n_targets": 4, "n_combinations": 6, "mode": "knockout", "platform": "targeted"},
        {"n_genes": 150, "n_targets": 4, "mode": "activation", "platform": "transcriptome", "cycles": True},
        {"n_genes": 30, "n_regulators": 30, "n_targets": 3, "n_batches": 1, "n_donors": 1},
        {"n_genes": 30, "n_regulators": 1, "n_targets": 3, "depth": 1, "strength": 0.0},
        {"n_genes": 30, "control_fraction": 0.0},
        {"n_genes": 30, "control_fraction": 1.0},
        {"n_genes": 30, "library_size": 4.0, "quality_fail": 1.0},
    ],
)
def test_edge_cases(arguments):
    adata = simulated(n_cells=260, **arguments)
    assert adata.shape == (260, arguments["n_genes"])
    assert (adata.obs["perturbation"].value_counts() > 0).all()
    assert (adata.obs["perturbation"] == "control").any()
    assert (np.asarray(adata.X.sum(axis=1)) > 0).all()
    assert np.isfinite(adata.uns["truth"]["effects"]["weight"]).all()


def test_cells_per_perturbation():
    adata = simulated(n_genes=20, n_targets=4, n_combinations=1, cells_per_perturbation=7, control_fraction=0.5)
    assert dict(adata.obs["perturbation"].value_counts().drop("control").value_counts()) == {7: 5}
    assert (adata.obs["perturbation"] == "control").sum() == 35


def test_same_seed_same_screen_whatever_the_global_state():
    np.random.seed(1)  # noqa: NPY002
    one = simulated(n_cells=200, n_genes=30)
    np.random.seed(2)  # noqa: NPY002
    two = simulated(n_cells=200, n_genes=30)
    other = simulated(n_cells=200, n_genes=30, random_state=1)
    assert (one.X != two.X).nnz == 0 and one.obs.equals(two.obs)
    assert (one.X != other.X).nnz > 0
    assert not one.uns["truth"]["net"].equals(other.uns["truth"]["net"])


@pytest.mark.parametrize("n_combinations", [0, 3])
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_round_trip(tmp_path, form, n_combinations):
    adata = simulated(n_cells=100, n_genes=30, n_targets=4, n_combinations=n_combinations)
    path = tmp_path / f"screen.{form}"
    getattr(adata, f"write_{form}")(path)
    back = getattr(ad, f"read_{form}")(path)
    for name, table in adata.uns["truth"].items():
        other = back.uns["truth"][name]
        if isinstance(table, pd.DataFrame):
            assert list(other.columns) == list(table.columns)
            assert (other.to_numpy() == table.to_numpy()).all()
        else:
            assert other == table
    assert (back.obs["perturbation"].astype(str) == adata.obs["perturbation"].astype(str)).all()
    assert back.obs["perturbed"].dtype == bool


# ---------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_hierarchy_has_the_depth_asked_for(depth):
    net = simulated(n_cells=50, n_genes=200, n_targets=20, depth=depth).uns["truth"]["net"]
    graph = nx.from_pandas_edgelist(net, "source", "target", create_using=nx.DiGraph)
    assert nx.dag_longest_path_length(graph) == depth


def test_cycles_stay_below_the_radius():
    adata = simulated(
        n_cells=50, n_genes=100, n_targets=10, n_regulators=60, cycles=True, strength=2.0, mean_out_degree=20
    )
    A = weights(adata)
    assert not nx.is_directed_acyclic_graph(nx.from_numpy_array(A, create_using=nx.DiGraph))
    assert np.abs(np.linalg.eigvals(np.abs(A))).max() == pytest.approx(0.8, abs=1e-6)


def test_spectral_radius_against_eigenvalues():
    rng = np.random.default_rng(0)
    matrix = sparse.random(40, 40, 0.1, random_state=rng, format="csr")
    assert sim.spectral_radius(matrix) == pytest.approx(np.abs(np.linalg.eigvals(matrix.toarray())).max(), rel=1e-5)
    ring = sparse.csr_matrix(np.roll(np.eye(5), 1, axis=1) * 0.7)  # periodic
    assert sim.spectral_radius(ring) == pytest.approx(0.7, abs=1e-6)
    assert sim.spectral_radius(sparse.csr_matrix((5, 5))) == pytest.approx(0.0, abs=1e-9)


def test_signs_strength_and_sparsity():
    net = simulated(n_cells=50, n_genes=600, n_targets=20, n_regulators=60, n_modules=0, strength=0.5).uns["truth"][
        "net"
    ]
    size = net["weight"].abs()
    assert abs((net["weight"] > 0).mean() - 0.7) < 4 * np.sqrt(0.21 / len(net))
    assert abs(size.mean() - 0.5) < 4 * size.std() / np.sqrt(len(net))
    assert (net["source"] != net["target"]).all() and not net.duplicated(["source", "target"]).any()
    assert net["source"].nunique() == 60


def test_few_hubs_many_small_regulators():
    share = {}
    for exponent in (2.1, 6.0):
        tops = []
        for seed in range(5):
            net = simulated(
                n_cells=50, n_genes=600, n_targets=40, n_regulators=100, degree_exponent=exponent, random_state=seed
            ).uns["truth"]["net"]
            degree = np.sort(net["source"].value_counts().to_numpy())
            tops.append(degree[-10:].sum() / degree.sum())
        share[exponent] = np.mean(tops)
    assert share[2.1] > share[6.0] + 0.1  # a tenth of the regulators holds much more than a tenth of the edges
    assert share[2.1] > 0.25


def test_modules_share_effects_and_annotations():
    inside, outside = [], []
    for seed in range(5):
        adata = simulated(
            n_cells=80, n_genes=300, n_targets=20, n_combinations=0, depth=1, n_modules=4, random_state=seed
        )
        table = effects(adata)
        term = adata.uns["truth"]["annotations"].set_index("gene")["term"]
        corr = np.corrcoef(table.drop(columns=table.index).to_numpy())
        same = term[table.index].to_numpy()[:, None] == term[table.index].to_numpy()[None]
        upper = np.triu(np.ones_like(same), 1).astype(bool)
        inside.append(corr[same & upper].mean())
        outside.append(corr[~same & upper].mean())
    assert np.mean(inside) > np.mean(outside) + 0.2


# ---------------------------------------------------------------------------------------------- effects


@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("mode", ["knockdown", "knockout", "activation"])
def test_total_effects_are_the_clamped_steady_state(mode, cycles):
    adata = simulated(
        n_cells=60, n_genes=60, n_targets=10, n_combinations=0, mode=mode, cycles=cycles, saturation=None, depth=4
    )
    A, table = weights(adata), effects(adata)
    for target, row in table.iterrows():
        place = adata.var_names.get_loc(target)
        assert (row[target] > 0) == (mode == "activation")
        np.testing.assert_allclose(row.to_numpy(), clamped(A, {place: row[target]}), atol=1e-8)


def test_saturated_steady_state_satisfies_its_equation():
    adata = simulated(n_cells=60, n_genes=80, n_targets=10, n_combinations=0, strength=1.5, saturation=0.7)
    A, table = weights(adata), effects(adata)
    for target, row in table.iterrows():
        others = (adata.var_names != target) & ~adata.var_names.str.startswith("MT-")
        expected = 0.7 * np.tanh(row.to_numpy() @ A / 0.7)
        np.testing.assert_allclose(row.to_numpy()[others], expected[others], atol=1e-8)
        assert np.abs(row[others]).max() <= 0.7


def test_own_level_and_its_spread():
    table = effects(simulated(n_cells=600, n_genes=400, n_targets=150, n_combinations=0, target_level=0.3))
    own = np.array([table.loc[t, t] for t in table.index])
    assert np.median(own) == pytest.approx(np.log(0.3), rel=0.06)
    assert own.std() > 0.05


def test_combinations_follow_their_class():
    adata = simulated(n_cells=200, n_genes=80, n_targets=8, n_combinations=12)
    table, listed = effects(adata), adata.uns["truth"]["interactions"]
    assert list(listed["class"]) == ["additive", "synergistic", "suppressive", "epistatic"] * 3
    assert set(listed["perturbation"]) == {label for label in adata.obs["perturbation"] if "+" in label}
    for row in listed.itertuples(index=False):
        a, b = row.perturbation.split("+")
        assert (a, b) == (row.first, row.second)
        expected = row.c1 * table.loc[a] + row.c2 * table.loc[b]
        expected[a], expected[b] = table.loc[a, a], table.loc[b, b]
        np.testing.assert_allclose(table.loc[row.perturbation], expected, atol=1e-12)
    kinds = listed.drop_duplicates("class").set_index("class")[["c1", "c2"]]
    assert kinds.loc["additive"].tolist() == [1, 1] and kinds.loc["epistatic"].tolist() == [1, 0]
    assert (kinds.loc["synergistic"] > 1).all() and (kinds.loc["suppressive"] < 1).all()


def test_null_screen_has_no_effect():
    adata = simulated(n_cells=4000, n_genes=50, n_targets=4, n_combinations=0, effect_size=0.0, **QUIET)
    assert len(adata.uns["truth"]["effects"]) == 0
    moments = scpert.data.Screen(adata).moments()
    control = list(moments.groups).index("control")
    error = moments.var / moments.n[:, None]
    z = (moments.mean - moments.mean[control]) / np.sqrt(error + error[control] + 1e-12)
    z = np.delete(z, control, axis=0)[:, moments.mean[control] > 0.05]
    assert np.mean(np.abs(z) > 2.58) < 0.05  # 1 % expected


def test_no_strength_leaves_the_targets_only():
    table = simulated(n_cells=60, n_genes=60, n_targets=6, n_combinations=0, strength=0.0).uns["truth"]["effects"]
    assert list(table["source"]) == list(table["target"])


def test_observed_fold_changes_are_the_truth():
    adata = simulated(
        n_cells=12_000, n_genes=40, n_targets=4, n_combinations=1, platform="targeted", control_fraction=0.3, **QUIET
    )
    X, labels, table = adata.X.toarray(), adata.obs["perturbation"].astype(str).to_numpy(), effects(adata)
    control = X[labels == "control"]
    for label, row in table.iterrows():
        cells = X[labels == label]
        seen = (control.mean(axis=0) > 0.3) & (cells.mean(axis=0) > 0.3)
        found = np.log(cells.mean(axis=0)[seen] / control.mean(axis=0)[seen])
        error = np.sqrt(
            sum((m.var(axis=0)[seen] / len(m)) / m.mean(axis=0)[seen] ** 2 for m in (cells, control))
        )  # delta method
        z = (found - row.to_numpy()[seen]) / error
        assert np.abs(z).max() < 5


# ---------------------------------------------------------------------------------------------- cells


def test_penetrance_and_controls():
    adata = simulated(n_cells=4000, n_genes=20, n_targets=4, penetrance=0.7)
    perturbed, control = adata.obs["perturbed"], adata.obs["perturbation"] == "control"
    assert not perturbed[control].any()
    assert abs(perturbed[~control].mean() - 0.7) < 4 * np.sqrt(0.21 / (~control).sum())


def test_unperturbed_cells_look_like_controls():
    adata = simulated(n_cells=6000, n_genes=20, n_targets=2, n_combinations=0, penetrance=0.5, n_regulators=2)
    screen = scpert.data.Screen(adata)
    target = scpert.data.targets_of(screen.labels)[0]
    x = np.asarray(screen.rows(np.arange(adata.n_obs))[:, [adata.var_names.get_loc(target)]].todense()).ravel()
    hit = (screen.labels == target) & adata.obs["perturbed"].to_numpy()
    missed = (screen.labels == target) & ~adata.obs["perturbed"].to_numpy()
    assert x[hit].mean() < x[missed].mean()
    gap = x[missed].mean() - x[screen.is_control].mean()
    assert abs(gap) < 4 * np.sqrt(x[missed].var() / missed.sum() + x[screen.is_control].var() / screen.is_control.sum())


def test_failed_cells_are_small_and_mitochondrial():
    adata = simulated(n_cells=2000, n_genes=200, n_targets=5, quality_fail=0.2)
    failed = adata.obs["quality_fail_truth"].to_numpy()
    mito = adata.var_names.str.startswith("MT-")
    assert mito.any()
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    share = np.asarray(adata.X[:, mito].sum(axis=1)).ravel() / total
    assert np.median(total[failed]) < 0.5 * np.median(total[~failed])
    assert share[failed].mean() > 2.5 * share[~failed].mean()
    net = adata.uns["truth"]["net"]
    assert not net["source"].str.startswith("MT-").any() and not net["target"].str.startswith("MT-").any()


def test_covariates_shift_genes():
    adata = simulated(n_cells=6000, n_genes=30, n_targets=2, platform="targeted", batch_sd=0.5, n_batches=3)
    assert list(adata.obs["batch"].cat.categories) == ["batch1", "batch2", "batch3"]
    assert list(adata.obs["donor"].cat.categories) == ["donor1", "donor2"]
    crossed = pd.crosstab(adata.obs["batch"], adata.obs["perturbation"])
    assert (crossed.to_numpy() > 0).all()
    control = adata[adata.obs["perturbation"] == "control"]
    means = np.stack([control[control.obs["batch"] == b].X.mean(axis=0).A1 for b in adata.obs["batch"].cat.categories])
    assert np.log(means[:, means.min(axis=0) > 1]).std(axis=0).mean() > 0.2


def test_counts_have_the_stated_mean_and_variance():
    n, mean, dispersion = 40_000, np.array([0.2, 1.0, 20.0, 30.0]), np.array([0.5, 1.2, 0.2, 0.1])
    model = sim.CountModel(np.log(mean), dispersion, np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=int), 0.0)
    blocks = sim.sample_counts(
        model,
        np.zeros((1, 4)),
        np.full((1, 1), -1),
        np.zeros(n, dtype=int),
        np.ones(n),
        [],
        np.random.default_rng(0),
    )
    X = sim.stack(blocks, (n, 4)).toarray().astype(float)
    var = mean + dispersion * mean**2
    np.testing.assert_allclose(X.mean(axis=0), mean, rtol=0.03)
    np.testing.assert_allclose(X.var(axis=0), var, rtol=0.06)


def test_disturbances_obey_the_network_with_held_genes():
    rng = np.random.default_rng(3)
    A = np.triu(rng.normal(0, 0.5, (7, 7)), 1)
    network = sim.Network(sparse.csr_matrix(A), np.arange(6), np.arange(7), np.full(7, -1))
    response, noisy = sim.noise_response(network, 0.3)
    model = sim.CountModel(np.zeros(7), np.ones(7), response, noisy, 0.3)
    codes = np.array([[-1, -1], [2, -1], [1, 3], [6, -1], [4, 6]])
    out = sim._disturbances(model, codes, np.random.default_rng(9))
    drawn = np.zeros((5, 7))
    drawn[:, noisy] = 0.3 * np.random.default_rng(9).standard_normal((5, len(noisy)), dtype=np.float32)
    for row, targets in enumerate(codes):
        held = targets[targets >= 0]
        cut, noise = A.copy(), drawn[row].copy()
        cut[:, held], noise[held] = 0.0, 0.0
        np.testing.assert_allclose(out[row], np.linalg.solve(np.eye(7) - cut.T, noise), atol=1e-5)


def test_noise_correlates_regulators_with_their_targets():
    kinds = {}
    for noise in (0.0, 0.8):
        adata = simulated(
            n_cells=3000, n_genes=40, n_targets=2, n_combinations=0, n_regulators=4, n_modules=0, depth=1, noise=noise,
            control_fraction=0.9, platform="targeted", library_size=2000,
        )  # fmt: skip
        control = adata[adata.obs["perturbation"] == "control"]
        X = pd.DataFrame(scpert.data.Screen(control).rows(np.arange(control.n_obs)).toarray(), columns=adata.var_names)
        net = adata.uns["truth"]["net"]
        net = net[net["weight"].abs() > 0.4]
        kinds[noise] = np.mean([np.sign(w) * X[s].corr(X[t]) for s, t, w in net.itertuples(index=False)])
    assert kinds[0.8] > kinds[0.0] + 0.1


def test_stack_equals_vstack():
    rng = np.random.default_rng(0)
    blocks = [
        sparse.random(n, 9, d, format="csr", dtype=np.float32, random_state=rng)
        for n, d in [(4, 0.0), (7, 0.9), (2, 0.1)]
    ]
    joined = sim.stack(iter(blocks), (13, 9))
    np.testing.assert_array_equal(joined.toarray(), sparse.vstack(blocks).toarray())
    assert len(joined.data) == len(joined.indices) == joined.indptr[-1]


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_targets": 50, "n_genes": 40}, "n_targets=50 is more than n_genes=40"),
        ({"n_targets": 3, "n_combinations": 4}, "n_combinations=4: 3 targets make only 3 pairs"),
        ({"n_cells": 10, "n_targets": 10, "n_combinations": 0}, "give at least 11"),
        ({"n_cells": 10.5}, "n_cells=10.5: give an integer"),
        ({"n_genes": 1}, "n_genes=1: give an integer of at least 2"),
        ({"mode": "knock-out"}, "mode='knock-out' is not known.*knockout"),
        ({"platform": "10x"}, "platform='10x' is not known"),
        ({"penetrance": 1.2}, "penetrance=1.2: give a number between 0 and 1"),
        ({"target_level": 2.0}, "target_level=2.0 does not fit mode='knockdown'"),
        ({"target_level": 0.5, "mode": "activation"}, "does not fit mode='activation'"),
        ({"max_radius": 1.0}, "max_radius=1.0: give a number between 0 and 1"),
        ({"degree_exponent": 2.0}, "degree_exponent=2.0: give a number above 2"),
        ({"strength": -1.0}, "strength=-1.0: give a number >= 0"),
        ({"depth": 0}, "depth=0: give an integer of at least 1"),
        ({"n_regulators": 600, "n_genes": 500}, "n_regulators=600: give at most"),
        ({"saturation": 0.0}, "saturation=0.0: give a number > 0"),
        ({"cells_per_perturbation": 5, "control_fraction": 1.0}, "control_fraction=1 leaves no perturbed cells"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ScpertError, match=message):
        simulated(**arguments)


def test_counts_that_explode_are_refused():
    with pytest.raises(ScpertError, match="counts in a cell: effects add up"):
        simulated(n_cells=60, n_genes=60, n_targets=30, strength=8.0, mean_out_degree=20, saturation=None, depth=5)


def test_many_regulators_keep_counts_in_bounds():
    adata = simulated(n_cells=700, n_genes=400, n_targets=400, n_combinations=20)
    assert adata.X.max() < 1e5


def test_steady_state_that_does_not_exist():
    loop = sparse.csr_matrix(np.array([[0.0, 1.1, 0.0], [0.0, 0.0, 1.1], [0.0, 1.1, 0.0]]))
    with pytest.raises(ScpertError, match="no stable steady state"):
        sim.total_effects(loop, np.array([[0]]), np.array([[-1.0]]), max_iterations=100)


# ---------------------------------------------------------------------------------------------- real screens


@pytest.mark.skipif("SCPERT_TEST_DATA" not in os.environ, reason="SCPERT_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("file", "platform"),
    [
        ("norman2019_k562_crispra_perturbench.h5ad", "transcriptome"),
        ("schraivogel2020_k562_tapseq_crispat.h5ad", "targeted"),
    ],
)
def test_means_and_zeros_lie_where_the_real_screen_has_them(file, platform):
    real = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / file).X.toarray()
    made = simulated(n_cells=3000, n_genes=real.shape[1], platform=platform).X.toarray()
    assert abs((made == 0).mean() - (real == 0).mean()) < 0.05
    q = (0.5, 0.75, 0.9)
    gap = np.log10(np.quantile(made.mean(axis=0), q) + 1e-3) - np.log10(np.quantile(real.mean(axis=0), q) + 1e-3)
    assert np.abs(gap).max() < 0.3  # a factor of two
    total = np.log10(np.median(made.sum(axis=1)) / np.median(real.sum(axis=1)))
    assert abs(total) < 0.3
