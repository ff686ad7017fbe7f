"""tl.evaluate_grn and tl.grn_stability: definitions by brute force, perfect and random networks, refusals."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import scpert
from scpert.errors import MissingKeyError, ScpertError
from scpert.tl._evaluate_grn import _auprc, rewire, wasserstein


@pytest.fixture(scope="module")
def halves() -> tuple[ad.AnnData, ad.AnnData]:
    adata = scpert.datasets.simulated(
        n_genes=60, n_targets=12, n_combinations=0, cells_per_perturbation=120, strength=0.6, random_state=4
    )
    return adata[::2].copy(), adata[1::2].copy()


class Net:
    """A network as a model would give it."""

    def __init__(self, table: pd.DataFrame):
        self.table = table

    def get_grn(self) -> pd.DataFrame:
        return self.table


def with_net(adata: ad.AnnData, source, target, weight) -> ad.AnnData:
    out = adata.copy()
    table = pd.DataFrame({"source": source, "target": target, "weight": np.asarray(weight, dtype=float)})
    scpert.tl.infer_grn(out, model=Net(table))
    return out


def all_pairs(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    regulators = sorted(p for p in adata.obs["perturbation"].astype(str).unique() if p != "control")
    source = np.repeat(regulators, adata.n_vars)
    target = np.tile(adata.var_names.to_numpy(), len(regulators))
    return source[source != target], target[source != target]


def scipy_tests(adata: ad.AnnData, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = adata.X.toarray()
    x = pd.DataFrame(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4), columns=adata.var_names)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    p, distance = [], []
    for s, t in zip(source, target, strict=True):
        own, control = x[t].to_numpy()[labels == s], x[t].to_numpy()[labels == "control"]
        p.append(stats.mannwhitneyu(own, control, method="asymptotic").pvalue if np.ptp(np.r_[own, control]) else 1.0)
        distance.append(stats.wasserstein_distance(own, control))
    return np.array(p), np.array(distance)


def test_perfect_and_random_networks(halves):
    """By scipy: a perfect network has precision 1 and a false omission rate of 0; the released code's rate is blind."""
    train, test = halves
    source, target = all_pairs(test)
    p, distance = scipy_tests(test, source, target)
    positive = stats.false_discovery_control(p) <= 0.05
    assert 20 < positive.sum() < len(positive) / 2
    size = int(positive.sum())
    perfect = with_net(train, source[positive], target[positive], np.ones(size))
    wrong = np.random.default_rng(0).choice(np.flatnonzero(~positive), size, replace=False)
    opposite = with_net(train, source[wrong], target[wrong], np.ones(size))
    options = {"observed": test, "k": (size,), "composition": False, "n_cells": 10_000, "n_permutations": 5}
    good = scpert.tl.evaluate_grn(perfect, **options).set_index("network").loc["grn"]
    bad = scpert.tl.evaluate_grn(opposite, **options).set_index("network").loc["grn"]
    assert good["n_positives"] == size == good["n_edges"]
    assert good["precision"] == 1 and good["recall"] == 1 and good["false_omission_rate"] == 0
    assert good["auprc"] == pytest.approx(1.0)
    assert bad["precision"] == 0
    assert bad["false_omission_rate"] == pytest.approx(size / (len(positive) - size))
    assert good["mean_wasserstein"] == pytest.approx(distance[positive].mean(), rel=1e-4)
    assert bad["mean_wasserstein"] == pytest.approx(distance[wrong].mean(), rel=1e-4)
    assert good["causalbench_precision"] == pytest.approx((p[positive] < 0.05).mean())
    # the documented bug: predicted edges stay among the "omitted" pairs, so every network gets the same figure
    assert good["released_false_omission_rate"] == bad["released_false_omission_rate"] > 0.01
    assert good["causalbench_false_omission_rate"] < bad["causalbench_false_omission_rate"]


def test_baselines_stand_beside_at_the_same_size(halves):
    train, test = halves
    train = train.copy()
    scpert.tl.infer_grn(train)
    table = scpert.tl.evaluate_grn(train, observed=test, k=(10, 20, 100_000), n_permutations=5)
    assert set(table["network"]) == {"grn", "effect_size", "zscore", "correlation", "random"}
    assert table.groupby("k")["n_edges"].nunique().eq(1).all()
    last = table[table["k"] == 100_000].set_index("network")
    assert last.loc["grn", "n_edges"] == train.varp["grn"].nnz
    first = table[table["k"] == 20].set_index("network")
    assert first.loc["grn", "precision"] > 0.8 > 0.5 > first.loc["random", "precision"]
    assert first.loc["grn", "mean_wasserstein"] > 2 * first.loc["random", "mean_wasserstein"]
    assert first.loc["grn", "sign_accuracy"] > 0.9 and first.loc["effect_size", "sign_accuracy"] > 0.9
    assert first.loc["random", "early_precision_ratio"] == 1.0


def test_reference_net_and_its_null(halves):
    train, _ = halves
    truth = train.uns["truth"]["net"]
    train = train.copy()
    scpert.tl.infer_grn(train, method="sparse_inverse", threshold=0)
    table = scpert.tl.evaluate_grn(train, reference=truth, k=(30,), n_permutations=30).set_index("network")
    row = table.loc["grn"]
    assert row["evidence"] == "reference"
    assert row["precision"] > 2 * row["null_precision"] and row["null_p"] < 0.05
    assert row["auprc"] > table.loc["random", "auprc"]
    from sklearn.metrics import average_precision_score

    source, target = all_pairs(train)
    keep = np.isin(source, truth["source"])
    edges = set(map(tuple, truth[["source", "target"]].to_numpy()))
    label = [pair in edges for pair in zip(source[keep], target[keep], strict=True)]
    net = scpert.get.grn_df(train).set_index(["source", "target"])["weight"].abs()
    score = [net.get(pair, 0.0) for pair in zip(source[keep], target[keep], strict=True)]
    assert row["auprc"] == pytest.approx(average_precision_score(label, score), rel=1e-6)


def test_refuses_the_cells_it_was_inferred_from(halves):
    train, test = halves
    train = train.copy()
    scpert.tl.infer_grn(train)
    with pytest.raises(ScpertError, match="all .* cells of adata were used"):
        scpert.tl.evaluate_grn(train)
    with pytest.raises(ScpertError, match="judged on what it has seen"):
        scpert.tl.evaluate_grn(train, observed=train[:100].copy())
    with pytest.raises(ScpertError, match="by their names"):  # another data set that counts its cells from 0
        other = test.copy()
        other.obs_names = train.obs_names[: other.n_obs]
        scpert.tl.evaluate_grn(train, observed=other)
    for k, message in (((), "k= is empty"), ((2.5,), "k=2.5"), (0, "k=0:")):
        with pytest.raises(ScpertError, match=message):
            scpert.tl.evaluate_grn(train, observed=test, k=k)
    controls = test[test.obs["perturbation"] == "control"].copy()
    with pytest.raises(ScpertError, match="it has controls only"):
        scpert.tl.evaluate_grn(train, observed=controls)
    with pytest.raises(MissingKeyError, match="no network 'other'"):
        scpert.tl.evaluate_grn(train, key="other", observed=test)
    with pytest.raises(ScpertError, match="none of the genes"):
        strange = test.copy()
        strange.var_names = [f"ENSG{i}" for i in range(strange.n_vars)]
        scpert.tl.evaluate_grn(train, observed=strange)
    with pytest.raises(ScpertError, match="reference"):
        scpert.tl.evaluate_grn(train, reference=pd.DataFrame({"source": ["X"], "target": ["Y"]}))
    told = scpert.tl.evaluate_grn(train, allow_same_cells=True, k=(10,), n_permutations=2)
    assert told["precision"].notna().any()


def test_evaluation_overwrites_nothing_and_says_nothing_of_it(halves, caplog):
    train = halves[0].copy()
    scpert.tl.infer_grn(train)
    before = train.varp["grn"].copy()
    with caplog.at_level("WARNING", logger="scpert"):
        table = scpert.tl.evaluate_grn(train, observed=halves[1], k=(20,), n_permutations=2)
    assert "overwritten" not in caplog.text and (before != train.varp["grn"]).nnz == 0
    assert "correlation" in set(table["network"])


def test_held_out_by_split(halves):
    adata = ad.concat(halves)
    adata.obs["split"] = np.where(np.arange(adata.n_obs) < halves[0].n_obs, "train", "test")
    scpert.tl.infer_grn(adata, split_key="split")
    within = scpert.tl.evaluate_grn(adata, k=(20,), n_permutations=2)
    train = halves[0].copy()
    scpert.tl.infer_grn(train)
    outside = scpert.tl.evaluate_grn(train, observed=halves[1], k=(20,), n_permutations=2)
    pd.testing.assert_frame_equal(within, outside)


def test_wasserstein_and_auprc_by_library():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    samples = [rng.poisson(1.0, 40).astype(float), rng.normal(1, 1, 7), np.zeros(3), np.array([5.0])]
    for other in (rng.normal(1, 1, 70), rng.poisson(1.0, 30).astype(float), np.zeros(1)):
        values, group = np.concatenate(samples), np.repeat(range(4), [len(x) for x in samples])
        mixed = rng.permutation(len(values))
        expected = [stats.wasserstein_distance(x, other) for x in samples]
        np.testing.assert_allclose(wasserstein(values[mixed], group[mixed], other), expected, atol=1e-12)
    truth, score = rng.random(200) < 0.2, rng.integers(0, 10, 200).astype(float)
    assert _auprc(score, truth) == pytest.approx(average_precision_score(truth, score))


def test_rewire_keeps_degrees():
    import networkx as nx

    rng = np.random.default_rng(0)
    graph = nx.gnm_random_graph(40, 150, seed=0, directed=True)
    source, target = map(np.array, zip(*graph.edges, strict=True))
    shuffled = rewire(source, target, rng)
    other = nx.DiGraph(list(zip(source, shuffled, strict=True)))
    assert other.number_of_edges() == 150 and nx.number_of_selfloops(other) == 0
    assert dict(other.out_degree) == {n: d for n, d in graph.out_degree if n in other}
    assert dict(other.in_degree) == {n: d for n, d in graph.in_degree if n in other}
    assert (shuffled != target).mean() > 0.7


def test_stability(halves):
    train, _ = halves
    same = scpert.tl.grn_stability(train, by="seed", n=2, k=(10,))
    assert same["jaccard"].item() == 1.0 and same["sign_agreement"].item() == 1.0
    boot = scpert.tl.grn_stability(train, n=3, k=(10, 50), method="sparse_inverse")
    assert ((boot["jaccard"] > 0.1) & (boot["jaccard"] < 1)).all()
    assert "grn" not in train.varp
    with pytest.raises(ScpertError, match="by='cells'"):
        scpert.tl.grn_stability(train, by="cells")


def test_stability_of_other_cells_whatever_is_in_the_data(halves, tmp_path):
    """A network that is there already, a copy asked for, a mask of cells, a backed file."""
    train = halves[0].copy()
    options = {"n": 2, "k": (20,), "method": "sparse_inverse"}
    plain = scpert.tl.grn_stability(train, **options)
    scpert.tl.infer_grn(train)
    before = train.varp["grn"].copy()
    pd.testing.assert_frame_equal(plain, scpert.tl.grn_stability(train, **options, copy=True))
    pd.testing.assert_frame_equal(plain, scpert.tl.grn_stability(train, **options, key_added="other"))
    assert (before != train.varp["grn"]).nnz == 0 and list(train.varp) == ["grn"]
    mask = (train.obs["perturbation"] == train.obs["perturbation"].iloc[-1]).to_numpy()
    told = scpert.tl.grn_stability(train, **options, observational=mask)
    train.obs["aside"] = mask
    pd.testing.assert_frame_equal(told, scpert.tl.grn_stability(train, **options, observational="aside"))
    train.write_h5ad(tmp_path / "train.h5ad")
    backed = ad.read_h5ad(tmp_path / "train.h5ad", backed="r")
    pd.testing.assert_frame_equal(plain, scpert.tl.grn_stability(backed, **options))
    for wrong, message in (({"n": 1}, "two or more"), ({"k": ()}, "k= is empty"), ({"perturbation_key": "x"}, "no")):
        with pytest.raises(ScpertError, match=message):
            scpert.tl.grn_stability(train, **{**options, **wrong})


def test_causalbench_measures_of_every_network_take_values_as_they_are(halves):
    train, test = halves[0].copy(), halves[1]
    scpert.tl.infer_grn(train)
    options = {"observed": test, "k": (20,), "n_cells": 10_000, "n_permutations": 0}
    table = scpert.tl.evaluate_grn(train, **options).set_index("network")
    net = scpert.get.grn_df(train).head(20)
    p, distance = scipy_tests(test, net["source"].to_numpy(), net["target"].to_numpy())
    assert table.loc["grn", "causalbench_mean_wasserstein"] == pytest.approx(distance.mean(), rel=1e-4)
    assert table.loc["grn", "causalbench_precision"] == pytest.approx((p < 0.05).mean())
    assert table.loc["grn", "mean_wasserstein"] != pytest.approx(distance.mean(), rel=1e-4)  # without composition
    columns = [c for c in table if c.startswith("causalbench")]
    assert len(columns) == 3 and table[columns].notna().all(axis=None)
    assert table.loc["grn", "causalbench_false_omission_rate"] < table.loc["random", "causalbench_false_omission_rate"]
    for wrong in ({"n_cells": 0}, {"n_permutations": -1}, {"observed": 3}):
        with pytest.raises(ScpertError, match="give a number|must be an AnnData"):
            scpert.tl.evaluate_grn(train, **{**options, **wrong})


def test_batches_make_no_true_edges():
    """A network of what batches do is confirmed by cells that have the same batches, unless they are compared within them."""
    adata = scpert.datasets.simulated(n_genes=60, n_targets=8, n_combinations=0, cells_per_perturbation=160)
    rng = np.random.default_rng(0)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    names = sorted(set(labels) - {"control"})
    late = rng.random(len(labels)) < np.where(np.isin(labels, names[:4]), 0.8, 0.3)
    x = adata.X.toarray()
    x[:, 50:] = np.where(late[:, None], rng.poisson(x[:, 50:] * 2 + 2), x[:, 50:])
    adata.X = x
    adata.obs["run"] = late.astype(str)
    train, test = adata[::2].copy(), adata[1::2].copy()
    effects = adata.uns["truth"]["effects"]
    true = set(map(tuple, effects[["source", "target"]].to_numpy()))
    wrong = [(s, t) for s in names[:4] for t in adata.var_names[50:] if (s, t) not in true and s != t]
    source, target = zip(*wrong, strict=True)
    net = with_net(train, source, target, np.ones(len(wrong)))
    options = {"observed": test, "k": (len(wrong),), "n_permutations": 0}
    free = scpert.tl.evaluate_grn(net, **options).set_index("network").loc["grn"]
    within = scpert.tl.evaluate_grn(net, covariate_keys="run", **options).set_index("network").loc["grn"]
    assert free["precision"] > 0.5 and within["precision"] < 0.1
    assert within["mean_wasserstein"] < 0.8 * free["mean_wasserstein"]
    assert within["causalbench_precision"] == free["causalbench_precision"]
    train.uns.pop("truth")
    scpert.tl.infer_grn(train, covariate_keys="run")  # those of the inference are the default
    told, default = (
        scpert.tl.evaluate_grn(train, observed=test, k=(30,), n_permutations=0, **extra)
        for extra in ({"covariate_keys": ["run"]}, {})
    )
    pd.testing.assert_frame_equal(told, default)


def test_cells_of_a_model_are_seen(halves):
    """A network read out of a trained model may not be judged on the cells that the model learned from."""
    train, test = (x.copy() for x in halves)
    scpert.model.GPOVAE.setup_anndata(train)
    model = scpert.model.GPOVAE(train, n_latent=3, n_hidden=8)
    model.train(max_epochs=1)
    for options in ({}, {"method": "gpovae"}):
        scpert.tl.infer_grn(test, model=model, threshold=0, **options)
        with pytest.raises(ScpertError, match="were used to infer"):
            scpert.tl.evaluate_grn(test, observed=train, k=(10,))
        with pytest.raises(ScpertError, match="all .* cells of adata were used"):
            scpert.tl.evaluate_grn(test, k=(10,))  # their signs were used
    split = train.copy()
    split.obs["split"] = np.where(np.arange(split.n_obs) % 3 == 0, "test", "train")
    scpert.model.LinearGRN.setup_anndata(split, split_key="split")
    linear = scpert.model.LinearGRN(split)
    linear.train()
    scpert.tl.infer_grn(split, model=linear)
    table = scpert.tl.evaluate_grn(split, k=(10,), n_permutations=0)  # its test cells
    assert table["n_positives"].iloc[0] > 0


def test_saved_models_know_their_cells(halves, tmp_path):
    train = halves[0].copy()
    scpert.model.LinearGRN.setup_anndata(train)
    model = scpert.model.LinearGRN(train)
    model.train()
    model.save(tmp_path / "m")
    back = scpert.model.LinearGRN.load(tmp_path / "m")
    np.testing.assert_array_equal(back.cells_, model.cells_)
    scpert.tl.infer_grn(train, model=back)
    with pytest.raises(ScpertError, match="Nothing to judge"):
        scpert.tl.evaluate_grn(train, k=(10,))


def test_no_positives_among_controls_of_rare_genes():
    """Random labels over controls, genes in few cells: by the normal tail false positives came in nearly every run."""
    rng = np.random.default_rng(0)
    false = 0
    for seed in range(8):
        x = rng.poisson(rng.gamma(0.3, 0.1, size=120), size=(1600, 120)).astype(float)
        x[:, 0] += 30
        labels = np.where(np.arange(1600) < 1000, "control", rng.choice([f"P{i}" for i in range(20)], 1600))
        adata = ad.AnnData(
            x,
            obs=pd.DataFrame({"perturbation": labels}, index=[f"c{seed}-{i}" for i in range(1600)]),
            var=pd.DataFrame(index=[f"G{i}" for i in range(120)]),
        )
        net = with_net(adata, ["P0"], ["G1"], [1.0])
        table = scpert.tl.evaluate_grn(net, allow_same_cells=True, k=(1,), n_permutations=0)
        false += int(table["n_positives"].iloc[0])
    assert false <= 1


def test_baselines_see_the_same_strata_and_samples():
    adata = scpert.datasets.simulated(n_genes=50, n_targets=6, n_combinations=0, cells_per_perturbation=120)
    rng = np.random.default_rng(0)
    adata.obs["run"] = rng.choice(["x", "y", "z"], adata.n_obs)
    x = adata.X.toarray()
    x[:, 30:] = rng.poisson(x[:, 30:] * (1.0 + 2.0 * (adata.obs["run"] == "x").to_numpy()[:, None]) + 1)
    adata.X = x
    train, test = adata[::2].copy(), adata[1::2].copy()
    scpert.tl.infer_grn(train, method="correlation", covariate_keys="run", threshold=0)
    table = scpert.tl.evaluate_grn(train, observed=test, k=(30,), n_permutations=0).set_index("network")
    assert table.loc["grn", "auprc"] == pytest.approx(table.loc["correlation", "auprc"])
    wild = adata.obs["perturbation"].astype(str).to_numpy()
    wild[rng.choice(np.flatnonzero(wild == "control"), 60, replace=False)] = "wild"
    adata.obs["perturbation"] = wild
    train, test = adata[::2].copy(), adata[1::2].copy()
    scpert.tl.infer_grn(train, method="sparse_inverse", observational="wild")
    table = scpert.tl.evaluate_grn(train, observed=test, k=(30,), n_permutations=0).set_index("network")
    assert table.loc["grn", "n_candidates"] == 6 * 49


def test_stability_of_what_cannot_vary_is_refused():
    adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    effects = scpert.tl.perturbation_effects(adata)
    with pytest.raises(ScpertError, match="every label has one row"):
        scpert.tl.grn_stability(effects, scale="effects")
    with pytest.raises(ScpertError, match="has one network"):
        scpert.tl.grn_stability(adata, model=Net(adata.uns["truth"]["net"]))


@pytest.mark.parametrize("form", ["control", "layer", "library_size_key", "scale", "no layer"])
def test_held_out_cells_are_read_by_what_is_said_of_them(halves, form):
    """And the cells of the inference, for the baselines, as the inference read them."""
    train, test = (half.copy() for half in halves)
    options: dict[str, str] = {}
    if form == "control":
        test.obs["perturbation"] = test.obs["perturbation"].astype(str).replace("control", "NT")
        options = {"control": "NT"}
    elif form == "layer":
        test.layers["raw"], test.X = test.X.copy(), test.X.log1p()
        options = {"layer": "raw"}
    elif form == "library_size_key":
        test.obs["size"] = np.asarray(test.X.sum(axis=1)).ravel()
        options = {"library_size_key": "size"}
    elif form == "scale":
        counts = test.X.toarray()
        test.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
        options = {"scale": "log1p"}
    else:
        train.layers["raw"], train.X = train.X.copy(), train.X.log1p()
    scpert.tl.infer_grn(train, layer="raw" if form == "no layer" else None)
    found = scpert.tl.evaluate_grn(train, observed=test, k=(20,), **options)
    plain = halves[0].copy()
    scpert.tl.infer_grn(plain)
    expected = scpert.tl.evaluate_grn(plain, observed=halves[1], k=(20,))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def test_cells_judge_the_network_of_a_table_of_effects(halves):
    """Counts were taken for effects, as the table of the inference holds effects."""
    train, test = halves
    effects, cells = scpert.tl.perturbation_effects(train), train.copy()
    for adata in (effects, cells):
        scpert.tl.infer_grn(adata, n_edges=20)
    found, expected = (
        scpert.tl.evaluate_grn(adata, observed=test, k=(20,)).set_index("network") for adata in (effects, cells)
    )
    same = ["n_positives", "n_candidates", "causalbench_mean_wasserstein", "mean_wasserstein"]
    pd.testing.assert_frame_equal(found.loc[["effect_size"], same], expected.loc[["effect_size"], same])


def test_what_uns_effects_of_others_holds_does_not_matter(halves):
    train, test = (half.copy() for half in halves)
    table = scpert.tl.perturbation_effects(train)
    again = scpert.tl.perturbation_effects(table)
    assert np.array_equal(again.uns["effects"]["cells"], table.uns["effects"]["cells"])
    assert np.array_equal(again.var["sensitivity"], table.var["sensitivity"])
    scpert.tl.infer_grn(train)
    expected = scpert.tl.evaluate_grn(train, observed=test, k=(5,))
    for own in ("some cells", 3.0, np.arange(3), again):
        test.uns["effects"] = table.uns["effects"] = own
        pd.testing.assert_frame_equal(scpert.tl.evaluate_grn(train, observed=test, k=(5,)), expected)
        scpert.tl.infer_grn(table)


def test_tables_of_effects_remember_their_cells(halves, tmp_path):
    train, test = halves
    effects, held_out = scpert.tl.perturbation_effects(train), scpert.tl.perturbation_effects(test)
    cells = train.copy()
    for adata in (effects, cells):
        scpert.tl.infer_grn(adata)
    effects.write_h5ad(tmp_path / "a.h5ad")
    for adata in (cells, effects, ad.read_h5ad(tmp_path / "a.h5ad")):
        for observed in (train, scpert.tl.perturbation_effects(train)):
            with pytest.raises(ScpertError, match=f"{train.n_obs} of {train.n_obs} cells of observed were used"):
                scpert.tl.evaluate_grn(adata, observed=observed, k=(5,))
        table = scpert.tl.evaluate_grn(adata, observed=held_out, k=(5,))
        assert set(table["network"]) == {"grn", "effect_size", "zscore", "correlation", "random"}


def test_genes_that_only_the_held_out_cells_have_are_no_candidates(halves):
    train, test = (half.copy() for half in halves)
    for adata in (train, test):
        adata.obs["size"] = np.asarray(adata.X.sum(axis=1)).ravel()
    few = train[:, ::2].copy()
    scpert.tl.infer_grn(few, library_size_key="size")
    tables = [
        scpert.tl.evaluate_grn(few, observed=observed, k=(20,), composition=False)
        for observed in (test, test[:, ::2].copy())
    ]
    pd.testing.assert_frame_equal(*tables)


def test_tables_of_profiles_with_several_controls_are_judged_as_such():
    """Two rows of the wild type in a table of profiles do not make cells of its rows."""
    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(30)]
    effect = rng.normal(size=(10, 30)) * (rng.random((10, 30)) < 0.2)
    effect[np.arange(10), np.arange(10)] = -3.0
    labels = np.repeat(["control", *names[:10]], 3)
    halves = []
    for half in "ab":
        values = 5.0 + np.repeat(np.vstack([np.zeros(30), effect]), 3, axis=0) + 0.2 * rng.normal(size=(33, 30))
        obs = pd.DataFrame({"perturbation": labels}, index=[f"{half}{i}" for i in range(33)])
        halves.append(ad.AnnData(values, obs=obs, var=pd.DataFrame(index=names)))
    train, test = halves
    scpert.tl.infer_grn(train, scale="effects")
    said, found = (scpert.tl.evaluate_grn(train, observed=test, k=(20,), scale=s) for s in ("effects", "auto"))
    pd.testing.assert_frame_equal(found, said)
    assert found.loc[found["network"] == "grn", "precision"].item() > 0.7


def test_composition_of_a_held_out_table_is_as_said(halves):
    """And the measures named after CausalBench take its values as they are."""
    train, test = halves
    train = train.copy()
    scpert.tl.infer_grn(train)
    table = scpert.tl.perturbation_effects(test)
    bare = table.copy()
    del bare.var["sensitivity"]
    with_factor = scpert.tl.evaluate_grn(train, observed=bare, k=(20,))
    pd.testing.assert_frame_equal(
        scpert.tl.evaluate_grn(train, observed=table, k=(20,), composition=False), with_factor
    )
    corrected = scpert.tl.evaluate_grn(train, observed=table, k=(20,))
    assert not np.allclose(corrected["mean_wasserstein"], with_factor["mean_wasserstein"])
    columns = ["causalbench_precision", "causalbench_mean_wasserstein"]
    grn = corrected["network"] == "grn"
    pd.testing.assert_frame_equal(corrected.loc[grn, columns], with_factor.loc[grn, columns])
