"""Genetic interactions: estimators against scikit-learn and formulas, recovery of simulated classes, round trips."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert
from scpert.data import Screen
from scpert.errors import MissingKeyError, ScpertError
from scpert.tl import evaluate_interactions, genetic_interactions
from scpert.tl._interactions import _SMALL, _classify, _Seen, _Shifts, distance_correlation, theil_sen

DATA = os.environ.get("SCPERT_TEST_DATA")
CLASS = {"additive": "additive", "synergistic": "synergy", "suppressive": "suppression", "epistatic": "epistasis"}


# ------------------------------------------------------------------------------------------------ estimators


@pytest.mark.parametrize("k", [2, 3])
def test_unweighted_theil_sen_is_that_of_scikit_learn(k):
    from sklearn.linear_model import TheilSenRegressor

    rng = np.random.default_rng(k)
    X = rng.normal(size=(25, k))
    y = X @ np.array([0.7, 1.2, -0.5])[:k] + 0.3 * rng.standard_t(2, size=25)
    other = TheilSenRegressor(fit_intercept=False, max_subpopulation=1e5, max_iter=3000, tol=1e-9, random_state=0)
    assert np.allclose(theil_sen(X, y, weighted=False), other.fit(X, y).coef_, atol=1e-4)


@pytest.mark.parametrize("weighted", [True, False])
def test_theil_sen_laws(weighted):
    rng = np.random.default_rng(0)
    X, c = rng.normal(size=(200, 2)), np.array([1.5, -0.4])
    assert np.allclose(theil_sen(X, X @ c, weighted=weighted), c, atol=1e-5)
    y = X @ c
    y[:40] += rng.normal(0, 30, 40)  # a fifth of the genes is anything
    assert np.abs(theil_sen(X, y, weighted=weighted) - c).max() < 0.02
    assert np.abs(np.linalg.lstsq(X, y, rcond=None)[0] - c).max() > 0.1
    assert np.array_equal(
        theil_sen(X, y, weighted=weighted, max_subsets=500, random_state=1),
        theil_sen(X, y, weighted=weighted, max_subsets=500, random_state=1),
    )
    assert np.isnan(theil_sen(np.ones((9, 2)), np.ones(9))).all()  # singular everywhere
    assert np.isnan(theil_sen(np.ones((1, 2)), np.ones(1))).all()
    with pytest.raises(ScpertError, match="got shapes"):
        theil_sen(X, y[:-1])


def test_one_column_is_the_weighted_median_of_ratios():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=31), rng.normal(size=31)
    assert theil_sen(x[:, None], y, weighted=False)[0] == pytest.approx(np.median(y / x))
    order = np.argsort(y / x)
    half = np.cumsum(np.abs(x[order])) / np.abs(x).sum()
    assert theil_sen(x[:, None], y)[0] == pytest.approx((y / x)[order][np.argmax(half >= 0.5)])


def test_determinant_weights_resist_genes_without_signal():
    rng = np.random.default_rng(4)
    X = np.vstack([rng.normal(0, 3, (30, 2)), np.zeros((150, 2))])
    y = X @ [1.0, 0.5]
    X = X + rng.normal(0, 0.2, X.shape)
    y = y + rng.normal(0, 0.2, len(y))
    error = {w: np.abs(theil_sen(X, y, weighted=w) - [1.0, 0.5]).max() for w in (True, False)}
    assert error[True] < 0.2 and error[False] > 0.5


def oracle(x, y):
    """Distance correlation by double centring (Szekely, Rizzo and Bakirov 2007)."""
    a, b = (np.linalg.norm(v[:, None] - v[None], axis=2) for v in (x.reshape(len(x), -1), y.reshape(len(y), -1)))
    a, b = (d - d.mean(0) - d.mean(1)[:, None] + d.mean() for d in (a, b))
    return np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))


@pytest.mark.parametrize("n", [2, 3, 30, _SMALL + 1, 700])
def test_distance_correlation_against_formula(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    for y in (x + rng.normal(size=n), x**2, np.r_[np.arange(2), rng.integers(0, 3, n - 2)].astype(float)):
        assert distance_correlation(x, y) == pytest.approx(oracle(x, y), abs=1e-9)
        assert distance_correlation(y, 1e3 - 7 * x) == pytest.approx(oracle(x, y), abs=1e-9)
        both = np.column_stack([x, rng.normal(size=n)])
        assert distance_correlation(both, y) == pytest.approx(oracle(both, y), abs=1e-9)
    assert np.isnan(distance_correlation(x, np.ones(n)))
    with pytest.raises(ScpertError, match="same length"):
        distance_correlation(x, x[:-1])


# ------------------------------------------------------------------------------------------------ recovery


@pytest.fixture(scope="module")
def screen():
    adata = scpert.datasets.simulated(
        n_cells=12_000, n_genes=200, n_targets=12, n_combinations=16, mode="activation", random_state=1
    )
    genetic_interactions(adata, n_boot=30)
    return adata


def with_truth(adata) -> pd.DataFrame:
    table = scpert.get.interactions_df(adata).set_index("perturbation")
    truth = adata.uns["truth"]["interactions"].set_index("perturbation").loc[table.index]
    turned = (truth["first"] > truth["second"]).to_numpy()
    table["true_c1"] = np.where(turned, truth["c2"], truth["c1"])
    table["true_c2"] = np.where(turned, truth["c1"], truth["c2"])
    table["true_class"] = truth["class"].map(CLASS)
    return table


def test_simulated_interactions_are_recovered(screen):
    table = with_truth(screen)
    assert len(table) == 16 and (table["origin"] == "measured").all()
    assert screen.uns["genetic_interactions"].index.tolist() == table.index.tolist()
    found, true = table[["c1", "c2"]].to_numpy().ravel(), table[["true_c1", "true_c2"]].to_numpy().ravel()
    assert np.corrcoef(found, true)[0, 1] > 0.9
    assert (table["class"] == table["true_class"]).mean() > 0.75
    inside = (table["c1_lower"] <= table["true_c1"]) & (table["true_c1"] <= table["c1_upper"])
    assert inside.mean() > 0.5
    assert np.allclose(table["magnitude"], np.hypot(table["c1"], table["c2"]))
    assert table["class_confidence"].between(0, 1).all() and (table["c1_lower"] < table["c1_upper"]).all()
    for name in ("model_fit", "equality", "similarity", "similarity_singles"):
        assert table[name].between(0, 1).all()


def test_repeats_and_does_not_touch_anything_else(screen):
    before = screen.copy()
    out = genetic_interactions(screen, n_boot=30, copy=True)
    pd.testing.assert_frame_equal(out.uns["genetic_interactions"], screen.uns["genetic_interactions"])
    other = genetic_interactions(screen, n_boot=30, copy=True, random_state=5).uns["genetic_interactions"]
    assert not np.allclose(other["c1_lower"], screen.uns["genetic_interactions"]["c1_lower"])
    assert (screen.X != before.X).nnz == 0 and list(screen.obs) == list(before.obs)
    assert set(screen.uns) == set(before.uns)
    shuffled = screen[np.random.default_rng(0).permutation(screen.n_obs)].copy()[:, screen.var_names[::-1]].copy()
    tables = [
        genetic_interactions(x, n_boot=0, max_subsets=20_000, copy=True).uns["genetic_interactions"].iloc[:, :12]
        for x in (screen, shuffled)
    ]
    pd.testing.assert_frame_equal(*tables, atol=1e-4)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_survives_writing(screen, tmp_path, form):
    small = screen[:50].copy()
    path = tmp_path / f"x.{form}"
    getattr(small, f"write_{form}")(path)
    back = ad.read_h5ad(path) if form == "h5ad" else ad.read_zarr(path)
    expected = screen.uns["genetic_interactions"]
    pd.testing.assert_frame_equal(
        back.uns["genetic_interactions"], expected, check_dtype=False, check_index_type=False, check_column_type=False
    )


# ------------------------------------------------------------------------------------------------ constructed


def effects(rows: dict[str, np.ndarray]) -> ad.AnnData:
    return ad.AnnData(np.vstack(list(rows.values())), obs=pd.DataFrame({"perturbation": list(rows)}, index=list(rows)))


def test_classes_of_constructed_effects():
    rng = np.random.default_rng(0)
    a, b, d, new = rng.normal(size=(4, 80))
    like_a = a + 0.1 * rng.normal(size=80)
    adata = effects(
        {
            "A": a, "B": b, "C": like_a, "D": d,
            "A+B": a + b,
            "A+D": 1.7 * a + 1.6 * d,
            "B+D": 0.3 * b + 0.4 * d,
            "B+C": 1.0 * like_a,
            "A+C": 0.5 * a + 0.5 * like_a,
            "C+D": new,
            "A+B+D": a + b + d,
        }
    )  # fmt: skip
    genetic_interactions(adata, scale="effects")
    table = adata.uns["genetic_interactions"].set_index("perturbation")
    assert table["class"].to_dict() == {
        "A+B": "additive",
        "A+B+D": "additive",
        "A+C": "redundancy",
        "A+D": "synergy",
        "B+C": "epistasis",
        "B+D": "suppression",
        "C+D": "neomorphism",
    }
    three = table.loc["A+B+D"]
    assert np.allclose(three[["c1", "c2", "c3"]].astype(float), 1, atol=1e-6)
    assert three["magnitude"] == pytest.approx(np.sqrt(3)) and np.isnan(table.loc["A+B", "c3"])
    assert table.loc["A+B", "model_fit"] == pytest.approx(1) and table["c1_lower"].isna().all()
    assert table.loc["A+D", "dominance"] == pytest.approx(np.log10(1.7 / 1.6), abs=1e-4)
    fit = table.loc["A+D"]
    d1, d2 = oracle(a, 1.7 * a + 1.6 * d), oracle(d, 1.7 * a + 1.6 * d)
    use = 50  # of the 80 genes those with the largest shifts count
    assert fit["n_genes"] == use
    everything = effects({"A": a, "D": d, "A+D": 1.7 * a + 1.6 * d})
    genetic_interactions(everything, scale="effects", min_genes=80)
    assert everything.uns["genetic_interactions"]["equality"].item() == pytest.approx(min(d1, d2) / max(d1, d2))
    loose = genetic_interactions(adata, scale="effects", thresholds={"synergy_magnitude": 3}, copy=True)
    assert loose.uns["genetic_interactions"].set_index("perturbation").loc["A+D", "class"] == "additive"


def test_no_shift_is_undetermined():
    assert _classify({"magnitude": np.nan}, 2, {}, _Seen()) == "undetermined"


def test_predicted_combinations(screen):
    truth = with_truth(screen)
    effects_table = scpert.tl.perturbation_effects(screen)
    row = {p: i for i, p in enumerate(effects_table.obs_names)}
    dense = effects_table.X.toarray() if sparse.issparse(effects_table.X) else np.asarray(effects_table.X)
    labels = [*truth.index[:10], "+".join(reversed(truth.index[10].split("+")))]
    additive = np.vstack([sum(dense[row[t]] for t in p.split("+")) for p in labels])
    predicted = ad.AnnData(
        np.zeros_like(additive),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"p{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=screen.var_names),
        layers={"delta": additive},
    )[:, ::-1].copy()
    adata = genetic_interactions(screen, predicted=predicted, n_boot=5, copy=True)
    table = adata.uns["genetic_interactions"]
    found = table[table["origin"] == "predicted"]
    assert len(found) == 11 and (found["n_cells"] == 0).all()
    assert found.index.tolist() == [f"{p} (predicted)" for p in truth.index[:11]]
    assert np.allclose(found[["c1", "c2"]], 1, atol=1e-4) and (found["class"] == "additive").all()
    out = evaluate_interactions(adata, k=4)
    assert out.loc["synergy_recovery", "n"] == 11 and out.loc["synergy_recovery", "chance"] == pytest.approx(4 / 11)
    measured = table.copy()
    measured["origin"] = "measured"
    twice = pd.concat(
        [table[table["origin"] == "measured"], table[table["origin"] == "measured"].assign(origin="predicted")]
    )
    perfect = evaluate_interactions(twice, k=4)["value"]
    assert np.allclose(perfect, 1)
    ax = scpert.pl.genetic_interactions(adata, kind="magnitude")
    assert ax.get_xlabel() == "magnitude, measured"
    # singles that were only predicted
    without = screen[screen.obs["perturbation"] != truth.index[0].split("+")[0]].copy()
    singles = truth.index[0].split("+")
    both = ad.AnnData(
        np.zeros((3, screen.n_vars)),
        obs=pd.DataFrame({"perturbation": [truth.index[0], *singles]}, index=list("abc")),
        var=pd.DataFrame(index=screen.var_names),
        layers={"delta": np.vstack([dense[row[p]] for p in (truth.index[0], *singles)])},
    )
    adata = genetic_interactions(without, predicted=both, n_boot=0, copy=True)
    rows = adata.uns["genetic_interactions"].query("origin == 'predicted'")
    assert rows["perturbation"].tolist() == [truth.index[0]] and rows["c1"].notna().all()


def test_figure(screen):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    assert scpert.pl.genetic_interactions(screen, ax=ax) is ax
    assert scpert.pl.genetic_interactions(screen, ax=ax, return_fig=True) is fig
    with pytest.raises(ScpertError, match="both measured and predicted"):
        scpert.pl.genetic_interactions(screen, kind="magnitude")
    with pytest.raises(MissingKeyError, match="has no 'x'"):
        scpert.pl.genetic_interactions(screen, key="x")
    plt.close("all")


def test_bad_input(screen):
    singles = screen[~screen.obs["perturbation"].astype(str).str.contains("+", regex=False)].copy()
    with pytest.raises(ScpertError, match="There is no combination"):
        genetic_interactions(singles)
    combination = screen.uns["truth"]["interactions"]["perturbation"].iloc[0]
    few = screen[screen.obs["perturbation"].isin([combination, "control"])].copy()
    with pytest.raises(ScpertError, match="each lacks a single"):
        genetic_interactions(few)
    with pytest.raises(ScpertError, match="genes names 'NOPE'"):
        genetic_interactions(screen, genes=["NOPE"])
    with pytest.raises(ScpertError, match=r"only [0-2] gene\(s\) can be used"):
        genetic_interactions(screen, genes=list(screen.var_names[:2]))
    with pytest.raises(ScpertError, match="unknown names 'synergy'"):
        genetic_interactions(screen, thresholds={"synergy": 1})
    with pytest.raises(MissingKeyError, match="no layers\\['delta'\\]"):
        genetic_interactions(
            screen, predicted=ad.AnnData(np.zeros((1, 3)), obs=pd.DataFrame({"perturbation": ["A+B"]}, index=["a"]))
        )
    with pytest.raises(ScpertError, match="both measured .16. and predicted .0."):
        evaluate_interactions(screen)
    with pytest.raises(ScpertError, match="confidence=2"):
        genetic_interactions(screen, confidence=2)


def test_singles_of_one_cell_are_left_out(screen, caplog):
    labels = screen.obs["perturbation"].astype(str)
    combinations = sorted(x for x in labels.unique() if "+" in x)
    single = combinations[0].split("+")[0]
    first = np.flatnonzero(labels == single)[0]
    adata = screen[((labels != single) | (np.arange(screen.n_obs) == first)).to_numpy()].copy()
    genetic_interactions(adata, n_boot=0)
    assert list(adata.uns["genetic_interactions"].index) == [x for x in combinations if single not in x.split("+")]
    assert "rest on one cell" in caplog.text
    alone = adata[adata.obs["perturbation"].isin(["control", *combinations[0].split("+"), combinations[0]])].copy()
    with pytest.raises(ScpertError, match="of one cell"):
        genetic_interactions(alone)


@pytest.mark.skipif(not DATA, reason="SCPERT_TEST_DATA does not name a folder with real screens")
def test_norman_doubles_agree_with_the_authors_fits():
    adata = ad.read_h5ad(Path(DATA) / "norman2019_k562_crispra_perturbench.h5ad")
    genetic_interactions(adata, library_size_key="library_size", n_boot=0)
    table = adata.uns["genetic_interactions"].set_index("perturbation")
    fits = pd.read_csv(Path(DATA) / "norman2019_gi_reference" / "regr_fits_final.csv", index_col=0)
    fits = fits.rename(index=lambda name: "+".join(sorted(name.split("_"))))
    names = fits.index
    assert set(table.index) <= set(names) and len(table) == 5
    reference = fits.loc[table.index, ["ts_coef_first", "ts_coef_second"]].to_numpy()
    # all five names are in alphabetical order in the authors' table
    assert np.corrcoef(table[["c1", "c2"]].to_numpy().ravel(), reference.ravel())[0, 1] > 0.8


def test_the_correction_undoes_what_known_noise_does_to_the_coefficients():
    """Least squares on shifts with as much noise as signal is drawn to half of the truth; the correction is not."""
    from scpert.tl._interactions import _corrected

    rng = np.random.default_rng(0)
    truth, n = np.array([1.0, 0.6]), 4000
    clean = rng.standard_normal((20, n, 2))
    X = clean + rng.standard_normal(clean.shape)
    y = clean @ truth + rng.standard_normal(clean.shape[:2])
    error = np.tile(np.eye(3), (n, 1, 1))
    plain = np.array([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(X, y, strict=True)]).mean(axis=0)
    np.testing.assert_allclose(plain, truth / 2, atol=0.02)
    np.testing.assert_allclose(_corrected(X, y, error).mean(axis=0), truth, atol=0.05)
    np.testing.assert_allclose(_corrected(clean, clean @ truth, 1e-9 * error), np.tile(truth, (20, 1)), atol=1e-4)


def test_limits_cover_the_noise_free_coefficients():
    """Small screens drawn from a large one, whose coefficients are the truth; the slope is not drawn to zero."""
    pool = scpert.datasets.simulated(
        n_cells=24_000, n_genes=200, n_targets=8, n_combinations=8, mode="activation", random_state=5
    )
    large = genetic_interactions(pool, n_boot=0, copy=True).uns["genetic_interactions"]
    groups = pool.obs.groupby("perturbation", observed=True).indices
    rng = np.random.default_rng(0)
    found, true, inside = [], [], []
    for _ in range(5):
        drawn = [rng.choice(i, size=300 if p == "control" else 60, replace=False) for p, i in groups.items()]
        table = genetic_interactions(pool[np.concatenate(drawn)], n_boot=60, copy=True).uns["genetic_interactions"]
        for c in ("c1", "c2"):
            found.append(table[c])
            true.append(large[c])
            inside.append((table[f"{c}_lower"] <= large[c]) & (large[c] <= table[f"{c}_upper"]))
    found, true = np.concatenate(found), np.concatenate(true)
    assert len(found) == 80
    assert np.mean(inside) >= 0.88, np.mean(inside)
    assert abs(found @ true / (true @ true) - 1) < 0.1


def test_coefficients_of_measured_combinations_do_not_hang_on_the_choice_of_genes(screen):
    table = screen.uns["genetic_interactions"]
    other = genetic_interactions(screen, n_boot=0, min_zscore=30, min_genes=20, copy=True).uns["genetic_interactions"]
    pd.testing.assert_frame_equal(other[["c1", "c2", "n_genes"]], table[["c1", "c2", "n_genes"]])
    assert table["n_genes"].min() > 150 and not np.allclose(other["model_fit"], table["model_fit"])
    plain = genetic_interactions(screen, n_boot=0, min_genes=20, min_zscore=30, weighted=False, copy=True)
    assert plain.uns["genetic_interactions"]["n_genes"].max() < 150
    genes = list(screen.var_names[:80])
    few = genetic_interactions(screen, n_boot=0, genes=genes, copy=True).uns["genetic_interactions"]
    assert few["n_genes"].between(60, 80).all() and not np.allclose(few["c1"], table["c1"])


def test_a_wild_gene_hardly_moves_the_corrected_coefficients():
    from scpert.tl._interactions import _corrected

    rng = np.random.default_rng(1)
    truth, n = np.array([1.0, 0.6]), 1000
    clean = 2 * rng.standard_normal((1, n, 2))
    X, y = clean + rng.standard_normal(clean.shape), clean @ truth + rng.standard_normal((1, n))
    wild = y.copy()
    wild[:, :5] += 200 * np.sign(X[:, :5, 0])
    error = np.tile(np.eye(3), (n, 1, 1))
    assert np.abs(_corrected(X, wild, error) - _corrected(X, y, error)).max() < 0.1
    assert np.abs(_corrected(X, wild, error) - truth).max() < 0.2


def test_noise_makes_no_new_phenotype():
    """Control cells under random labels are of no class; few cells of combinations that add up are not neomorphic."""
    adata = scpert.datasets.simulated(
        n_cells=6000, n_genes=300, n_targets=4, n_combinations=0, platform="transcriptome", control_fraction=0.9
    )
    rng = np.random.default_rng(0)
    control = adata[adata.obs["perturbation"] == "control"].copy()
    labels = np.full(control.n_obs, "control", dtype=object)
    order = rng.permutation(control.n_obs)
    names = [x for i in range(4) for x in (f"A{i}", f"B{i}", f"A{i}+B{i}")]
    for i, name in enumerate(names):
        labels[order[100 * i : 100 * (i + 1)]] = name
    control.obs["perturbation"] = labels
    genetic_interactions(control, n_boot=20)
    table = control.uns["genetic_interactions"]
    assert (table["class"] == "undetermined").all() and table["class_confidence"].isna().all()
    few = scpert.datasets.simulated(
        n_genes=300, n_targets=8, n_combinations=8, platform="transcriptome", cells_per_perturbation=50, random_state=1
    )
    genetic_interactions(few, n_boot=20)
    assert "neomorphism" not in set(few.uns["genetic_interactions"]["class"])


def test_a_true_new_phenotype_is_found():
    """Thirty genes move under the combination alone, twice as far as the singles move theirs."""
    rng = np.random.default_rng(0)
    mean = np.full((4, 200), 3.0)
    mean[1, :20] *= 2.0
    mean[2, 20:40] *= 2.0
    mean[3, 100:130] *= 4.0
    labels = np.repeat(["control", "A", "B", "A+B"], 150)
    counts = rng.poisson(np.repeat(mean, 150, axis=0)).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame({"perturbation": labels}))
    genetic_interactions(adata, n_boot=40)
    row = adata.uns["genetic_interactions"].iloc[0]
    assert row["class"] == "neomorphism" and row["class_confidence"] > 0.9


def test_combinations_of_one_cell_are_left_out(screen, caplog):
    labels = screen.obs["perturbation"].astype(str)
    combinations = sorted(x for x in labels.unique() if "+" in x)
    first = np.flatnonzero(labels == combinations[0])[0]
    adata = screen[((labels != combinations[0]) | (np.arange(screen.n_obs) == first)).to_numpy()].copy()
    genetic_interactions(adata, n_boot=0)
    assert list(adata.uns["genetic_interactions"].index) == combinations[1:]
    assert "rest on one cell" in caplog.text


def test_fallbacks_are_no_predictions(screen, caplog):
    labels = screen.obs["perturbation"].astype(str)
    combination = next(x for x in labels.unique() if "+" in x)
    predicted = ad.AnnData(
        np.ones((2, screen.n_vars)), obs=pd.DataFrame({"perturbation": [combination, "X+Y"]}, index=["a", "b"])
    )
    predicted.var_names = screen.var_names
    predicted.layers["delta"] = predicted.X.copy()
    predicted.obs["status"] = ["fallback", "fallback"]
    with pytest.raises(ScpertError, match="All predictions are fallbacks"):
        genetic_interactions(screen.copy(), predicted=predicted, n_boot=0)
    predicted.obs["status"] = ["combination", "fallback"]
    out = genetic_interactions(screen, predicted=predicted, n_boot=0, copy=True).uns["genetic_interactions"]
    assert list(out["perturbation"][out["origin"] == "predicted"]) == [combination]
    assert "1 predictions are fallbacks and left out: 'X+Y'" in caplog.text


def test_numbers_are_checked(screen):
    for options, message in (
        ({"n_boot": 1.5}, "n_boot=1.5: give a whole number"),
        ({"min_zscore": "x"}, "min_zscore='x'"),
        ({"thresholds": {"synergy_magnitude": "x"}}, "synergy_magnitude"),
    ):
        with pytest.raises(ScpertError, match=message):
            genetic_interactions(screen.copy(), **options)
    with pytest.raises(ScpertError, match="k=0.5"):
        evaluate_interactions(pd.DataFrame(), k=0.5)


def test_combinations_of_another_batch(caplog):
    """Combinations in a batch with genes of its own: within batches the coefficients are those of the truth."""
    rng = np.random.default_rng(0)
    base = rng.gamma(1.0, 3, 120) + 0.3
    effect = {t: np.where(rng.random(120) < 0.3, rng.normal(0, 0.8, 120), 0) for t in "ABCDEF"}
    truth = {"A+B": (1.0, 1.0), "C+D": (0.5, 0.5), "E+F": (1.6, 1.2)}
    other = np.where(rng.random(120) < 0.4, rng.normal(0, 1, 120), 0)
    groups = [("control", 0 * base, "x"), ("control", other, "y")]
    groups += [(t, effect[t], "x") for t in effect]
    groups += [(p, c1 * effect[p[0]] + c2 * effect[p[2]] + other, "y") for p, (c1, c2) in truth.items()]
    counts = [rng.poisson(base * np.exp(x) / (base * np.exp(x)).sum() * 3000, size=(150, 120)) for _, x, _ in groups]
    adata = ad.AnnData(
        sparse.csr_matrix(np.vstack(counts).astype(np.float32)),
        obs=pd.DataFrame(
            {k: np.repeat([g[i] for g in groups], 150) for k, i in (("perturbation", 0), ("batch", 2))},
            index=[f"c{i}" for i in range(150 * len(groups))],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(120)]),
    )
    pooled, within = (
        scpert.tl.genetic_interactions(adata, n_boot=20, covariate_keys=keys, copy=True).uns["genetic_interactions"]
        for keys in (None, "batch")
    )
    expected = pd.DataFrame(truth, index=["c1", "c2"]).T
    assert (within[["c1", "c2"]] - expected).abs().max().max() < 0.15
    assert (pooled[["c1", "c2"]] - expected).abs().max().max() > 0.5
    assert within["class"].to_dict() == {"A+B": "additive", "C+D": "suppression", "E+F": "synergy"}
    assert (within["model_fit"] > pooled["model_fit"] + 0.2).all()
    effects = scpert.tl.perturbation_effects(adata, covariate_keys="batch")
    shifts = _Shifts(Screen(adata), (adata.obs["batch"] == "y").to_numpy().astype(int), 0, 0)
    for label in effects.obs_names:
        np.testing.assert_allclose(shifts.shift(label), effects[label].X.ravel(), atol=1e-9)
    with pytest.raises(ScpertError, match="fewer than two control cells"):
        scpert.tl.genetic_interactions(adata[150:].copy(), covariate_keys="batch", n_boot=0)


@pytest.mark.parametrize("n_strata", [1, 20, 36])
def test_resampling_within_small_strata_varies_as_the_cells_do(n_strata):
    rng = np.random.default_rng(0)
    stratum = np.r_[np.arange(40) % n_strata, np.arange(2 * n_strata if n_strata > 1 else 80) % n_strata]
    labels = np.repeat(["A", "control"], [40, len(stratum) - 40])
    values = rng.normal(5, 0.5, (len(labels), 200)) + rng.normal(size=(n_strata, 200))[stratum]
    adata = ad.AnnData(
        np.abs(values), obs=pd.DataFrame({"perturbation": labels}, index=np.arange(len(labels)).astype(str))
    )
    shifts = _Shifts(Screen(adata, scale="log1p"), stratum, 400, 0)
    expected = shifts.se2[shifts.row["A"]] + shifts.shared_error("A", "A")
    assert np.mean(shifts.resampled_shift("A").var(axis=0)) == pytest.approx(expected.mean(), rel=0.05)
