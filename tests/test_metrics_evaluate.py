"""Laws of the metrics, alignment, scales, bad input."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr, spearmanr

import scpert
from scpert import metrics
from scpert.errors import LabelError, ScaleError, ScpertError
from scpert.metrics import METRICS, evaluate

GENES = [f"G{i}" for i in range(60)]
PERTS = ["G0", "G1", "G2", "G3", "G4", "G0+G1", "OUTSIDE"]


def _cells(seed: int = 0, n: int = 25, effect: float = 1.0) -> ad.AnnData:
    """Log1p cells with an effect of its own for each perturbation."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99)
    base = truth.gamma(2.0, 1.0, len(GENES))
    blocks, labels = [], []
    for label in ("control", *PERTS):
        shift = effect * truth.normal(0.3, 1.0, len(GENES)) * (label != "control")
        m = rng.poisson(np.exp(np.log(base) + 0.5 * shift), (n * (3 if label == "control" else 1), len(GENES)))
        blocks.append(m)
        labels += [label] * len(m)
    counts = np.vstack(blocks).astype(float)
    X = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{seed}_{i}" for i in range(len(labels))])
    out = ad.AnnData(X=sparse.csr_matrix(X), obs=obs, var=pd.DataFrame(index=GENES))
    out.layers["counts"] = sparse.csr_matrix(counts)
    return out


@pytest.fixture(scope="module")
def truth() -> ad.AnnData:
    return _cells(0)


@pytest.fixture(scope="module")
def train() -> ad.AnnData:
    return _cells(1)


def _log(adata: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(X=adata.X.copy(), obs=adata.obs.copy(), var=adata.var.copy())


def _computable() -> list[str]:
    return [n for n, m in METRICS.items() if m.default and m.best is not None]


# ---------------------------------------------------------------------------------------------- axioms


def test_perfect_prediction_has_every_best_value(truth, train):
    table = evaluate(_log(truth), truth, train=train)
    assert set(_computable()) <= set(table.columns)
    for name in _computable():
        values = table[name].dropna()
        if name.startswith(("overlap", "precision", "de_", "pr_auc", "roc_auc")) and not len(values):
            continue
        assert len(values), name
        np.testing.assert_allclose(values, METRICS[name].best, atol=1e-6, err_msg=name)


def test_perfect_mean_profiles_have_every_best_value(truth, train):
    table = evaluate(metrics.pseudobulk(truth), truth, train=train)
    assert table.attrs["level"] == "pseudobulk"
    assert "wasserstein" not in table.columns
    for name in table.columns:
        np.testing.assert_allclose(table[name], METRICS[name].best, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["mean", "no_change", "random_constant"])
def test_constants_get_one_half_in_retrieval(truth, train, kind):
    reference = metrics.Reference(truth, train)
    constant = metrics.training_mean(reference)
    if kind == "no_change":
        constant.X = constant.X - constant.layers["delta"]
        constant.layers["delta"] = constant.layers["delta"] * 0
    if kind == "random_constant":
        row = np.random.default_rng(0).gamma(1, 1, len(GENES))
        constant.X = np.tile(row, (constant.n_obs, 1))
        del constant.layers["delta"]
    table = evaluate(constant, reference)
    for name in ("centroid_accuracy", "transposed_rank", "retrieval_l1_no_targets", "retrieval_l2_no_targets"):
        assert table[name].mean() == pytest.approx(0.5, abs=1e-9), name
    n = len(PERTS)
    for name in ("discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine"):
        # cell-eval's rank / P: by chance 0.5 + 1 / (2 P); own targets left out, which moves it a little
        assert table[name].mean() == pytest.approx(0.5 + 0.5 / n, abs=0.06), name
    if kind != "random_constant":
        assert (table["variance_ratio"] < 1e-9).all()


def test_order_of_genes_and_rows_does_not_matter(truth, train):
    predicted = _log(_cells(2))
    rng = np.random.default_rng(0)
    a = evaluate(predicted, truth, train=train)
    mixed = predicted[rng.permutation(predicted.n_obs), rng.permutation(predicted.n_vars)].copy()
    other = truth[rng.permutation(truth.n_obs), rng.permutation(truth.n_vars)].copy()
    b = evaluate(mixed, other, train=train[:, rng.permutation(train.n_vars)].copy())
    drawn = {"energy_distance", "energy_distance_normalised", "mmd", "sliced_wasserstein"}  # sign of components
    same = [c for c in a.columns if c not in drawn]
    pd.testing.assert_frame_equal(a[same], b.loc[a.index, same], check_exact=False, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        a[["energy_distance", "mmd"]], b.loc[a.index, ["energy_distance", "mmd"]], rtol=1e-4, atol=1e-6
    )


def test_noise_makes_it_worse(truth, train):
    """Mean loss over perturbations and draws rises with each step of noise."""
    reference = metrics.Reference(truth, train)
    perfect = metrics.pseudobulk(truth)
    chosen = [
        "mse",
        "mae",
        "mse_delta",
        "pearson_delta",
        "pearson_delta_centroid",
        "spearman_delta",
        "r2_delta",
        "wmse",
    ]
    chosen += ["discrimination_score_l2", "centroid_accuracy", "retrieval_l2_no_targets", "l2", "cosine_delta"]
    losses = []
    for sd in (0.0, 0.3, 1.5, 6.0):
        tables = []
        for seed in range(6):
            noise = np.random.default_rng(seed).normal(0, sd, perfect.shape)
            noisy = perfect.copy()
            noisy.X = perfect.X + noise
            noisy.layers["delta"] = perfect.layers["delta"] + noise
            if sd > 1:
                noisy.X = np.maximum(noisy.X, 0)
            tables.append(evaluate(noisy, reference, metrics=chosen).mean())
        mean = pd.concat(tables, axis=1).mean(axis=1)
        losses.append([abs(mean[c] - METRICS[c].best) for c in chosen])
    steps = np.diff(np.array(losses), axis=0)
    assert (steps > -1e-9).all(), pd.DataFrame(steps, columns=chosen)
    assert (np.array(losses)[-1] > 0.05).all()


# ---------------------------------------------------------------------------------------------- values against oracles


def test_values_against_scipy(truth, train):
    predicted = _log(_cells(2))
    table = evaluate(predicted, truth, train=train)

    def means(a):
        X = a.X.toarray()
        return {p: X[(a.obs["perturbation"] == p).to_numpy()].mean(0) for p in ("control", *PERTS)}

    m, mh, t = means(truth), means(predicted), means(train)
    r = np.mean([t[p] for p in PERTS], axis=0)
    own = {p: [GENES.index(g) for g in p.split("+") if g in GENES] for p in PERTS}
    for p in PERTS:
        d, dh = m[p] - m["control"], mh[p] - mh["control"]
        assert table.loc[p, "pearson_delta"] == pytest.approx(pearsonr(d, dh)[0])
        assert table.loc[p, "spearman_delta"] == pytest.approx(spearmanr(d, dh)[0])
        assert table.loc[p, "mse_delta"] == pytest.approx(np.mean((d - dh) ** 2))
        assert table.loc[p, "mae"] == pytest.approx(np.abs(m[p] - mh[p]).mean())
        assert table.loc[p, "pearson_delta_centroid"] == pytest.approx(pearsonr(m[p] - r, mh[p] - r)[0])
        keep = np.delete(np.arange(len(GENES)), own[p])
        assert table.loc[p, "pearson_delta_no_target"] == pytest.approx(pearsonr(d[keep], dh[keep])[0])
        top = keep[np.argsort(-np.abs(d[keep]))[:20]]
        assert table.loc[p, "pearson_delta_top20_no_target"] == pytest.approx(pearsonr(d[top], dh[top])[0])
        assert table.loc[p, "r2_delta"] == pytest.approx(1 - np.sum((d - dh) ** 2) / np.sum((d - d.mean()) ** 2))
        others = [q for q in PERTS if q != p]
        far = [np.linalg.norm(mh[p] - m[q]) > np.linalg.norm(mh[p] - m[p]) for q in others]
        assert table.loc[p, "centroid_accuracy"] == pytest.approx(np.mean(far))
        rank = sum(
            cdist([dh[keep]], [(m[q] - m["control"])[keep]], "cityblock") < cdist([dh[keep]], [d[keep]], "cityblock")
            for q in others
        )
        assert table.loc[p, "discrimination_score_l1"] == pytest.approx(1 - rank.item() / len(PERTS))
        for kind in ("cityblock", "euclidean", "cosine"):
            wins = []
            for q in others:
                both = np.delete(np.arange(len(GENES)), own[p] + own[q])
                a, b = d[both], (m[q] - m["control"])[both]
                wins.append(cdist([dh[both]], [a], kind).item() < cdist([dh[both]], [b], kind).item())
            name = {"cityblock": "l1", "euclidean": "l2", "cosine": "cosine"}[kind]
            assert table.loc[p, f"retrieval_{name}_no_targets"] == pytest.approx(np.mean(wins))
    stacked = (
        np.concatenate([m[p] - m["control"] for p in PERTS]),
        np.concatenate([mh[p] - mh["control"] for p in PERTS]),
    )
    assert table["ate_pearson"].iloc[0] == pytest.approx(pearsonr(*stacked)[0])


def test_weights_of_wmse_are_welch_t_against_the_rest(truth):
    from scipy.stats import ttest_ind

    from scpert.metrics._pair import Pair
    from scpert.metrics._profile import rest_weights

    pair = Pair(metrics.pseudobulk(truth), metrics.Reference(truth))
    weights = rest_weights(pair)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    X = truth.X.toarray()
    labels = truth.obs["perturbation"].to_numpy()
    row = pair.perturbations.index("G2")
    rest = X[(labels != "G2") & (labels != "control")]
    t = np.abs(ttest_ind(X[labels == "G2"], rest, equal_var=False).statistic)
    w = ((t - t.min()) / (t.max() - t.min())) ** 2
    np.testing.assert_allclose(weights[row], w / w.sum(), rtol=1e-5, atol=1e-8)


def test_counts_and_logs_of_one_screen_agree(truth):
    predicted = metrics.pseudobulk(_cells(3))
    by_counts = evaluate(predicted, truth)
    by_logs = evaluate(predicted, _log(truth))
    pd.testing.assert_frame_equal(by_counts, by_logs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["dense", "csc", "float32", "backed", "dask", "view"])
def test_any_matrix_gives_the_same(truth, form, tmp_path):
    predicted = _log(_cells(3))
    expected = evaluate(predicted, _log(truth), metrics=["pearson_delta", "roc_auc", "wasserstein"])
    other = _log(truth)
    if form == "dense":
        other.X = other.X.toarray()
    elif form == "csc":
        other.X = other.X.tocsc()
    elif form == "float32":
        other.X = other.X.astype(np.float32)
    elif form == "backed":
        other.write_h5ad(tmp_path / "a.h5ad")
        other = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif form == "dask":
        array = pytest.importorskip("dask.array")
        other.X = array.from_array(other.X.toarray(), chunks=(50, -1))
    else:
        other = other[:, :]
    got = evaluate(predicted, other, metrics=list(expected.columns))
    pd.testing.assert_frame_equal(got, expected, rtol=1e-4, atol=1e-6)
    if form == "backed":
        other.file.close()


def test_every_metric_is_described():
    for name, m in METRICS.items():
        assert m.name == name
        assert m.best in (0, 1, None)
        assert m.level in ("pseudobulk", "cell", "set")
        assert all((m.definition, m.formula, m.source, m.exploit)), name
        assert m.definition.endswith("."), name
    cell_eval = (
        "pearson_delta mse mae mse_delta mae_delta pearson_edistance clustering_agreement pr_auc roc_auc".split()
    )
    cell_eval += [f"discrimination_score_{d}" for d in ("l1", "l2", "cosine")]
    cell_eval += [f"{kind}_at_{k}" for kind in ("overlap", "precision") for k in ("N", 50, 100, 200, 500)]
    cell_eval += [
        "de_spearman_sig",
        "de_direction_match",
        "de_spearman_lfc_sig",
        "de_sig_genes_recall",
        "de_nsig_counts",
    ]
    assert set(cell_eval) <= set(METRICS)


# ---------------------------------------------------------------------------------------------- alignment and controls


def test_what_is_missing_is_reported(truth):
    predicted = metrics.pseudobulk(truth)
    predicted = predicted[[p for p in predicted.obs_names if p != "G4"], :50].copy()
    predicted.obs_names = predicted.obs["perturbation"] = ["NEW" if p == "G3" else p for p in predicted.obs_names]
    table = evaluate(predicted, truth, metrics=["mse"])
    assert table.attrs["only_predicted"] == ["NEW"]
    assert table.attrs["only_observed"] == ["G3", "G4"]
    assert table.attrs["genes_only_observed"] == GENES[50:]
    assert table.attrs["n_genes"] == 50
    assert "NEW" not in table.index


def test_labels_with_targets_in_another_order_are_one(truth):
    predicted = metrics.pseudobulk(truth)
    predicted.obs["perturbation"] = ["G1+G0" if p == "G0+G1" else p for p in predicted.obs["perturbation"]]
    assert evaluate(predicted, truth, metrics=["mse"]).loc["G0+G1", "mse"] < 1e-12


def test_predicted_shift_is_against_the_predictions_own_control(truth, train):
    predicted = metrics.pseudobulk(truth)
    predicted.X = predicted.X + 1.0  # a control of its own that lies one higher
    assert evaluate(predicted, truth, metrics=["mse_delta"]).attrs["predicted_control"].startswith("layers")
    np.testing.assert_allclose(evaluate(predicted, truth, metrics=["mse_delta"])["mse_delta"], 0, atol=1e-12)
    stale = metrics.pseudobulk(truth)
    stale.X = np.asarray(stale.X)[:, ::-1].copy()  # X and delta no longer belong together
    assert evaluate(stale, truth, metrics=["mse_delta"]).attrs["predicted_control"] == "the control cells of observed"
    assert evaluate(stale, truth, train=train, metrics=["mse_delta"]).attrs["predicted_control"].endswith("train")


def test_no_change_has_no_correlation_and_says_why(truth):
    flat = metrics.pseudobulk(truth)
    flat.X = flat.X - flat.layers["delta"]
    flat.layers["delta"] = flat.layers["delta"] * 0
    table = evaluate(flat, truth, metrics=["pearson_delta", "cosine_delta", "jaccard_top20", "mse"])
    assert table[["pearson_delta", "cosine_delta", "jaccard_top20"]].isna().all().all()
    assert "predicted shift" in table.attrs["reasons"]["pearson_delta"]["G0"]
    assert table["mse"].notna().all()


def test_without_training_data_the_reason_is_given(truth):
    table = evaluate(metrics.pseudobulk(truth), truth)
    assert table["pearson_delta_centroid"].isna().all()
    assert "train=" in table.attrs["reasons"]["pearson_delta_centroid"]["all"]


def test_panel_with_full_library_size(truth):
    panel = truth[:, :20].copy()
    panel.obs["total"] = np.asarray(truth.layers["counts"].sum(axis=1)).ravel()
    full = metrics.pseudobulk(truth)[:, :20].copy()
    table = evaluate(full, panel, library_size_key="total", metrics=["mse"])
    assert (table["mse"] < 1e-9).all()


# ---------------------------------------------------------------------------------------------- effects


def _effects(n: int = 12) -> ad.AnnData:
    rng = np.random.default_rng(0)
    names = [f"K{i}" for i in range(n)]
    obs = pd.DataFrame({"perturbation": names}, index=names)
    return ad.AnnData(X=rng.normal(size=(n, 30)), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(30)]))


def test_tables_of_effects():
    table = _effects()
    train, test = table[:8].copy(), table[8:].copy()
    perfect = evaluate(test, test, train=train, scale="effects")
    np.testing.assert_allclose(perfect["pearson_delta"], 1)
    np.testing.assert_allclose(perfect["pearson_delta_centroid"], 1)
    np.testing.assert_allclose(perfect["r2_weighted"], 1)
    top = metrics.ceiling(test, scale="effects", metrics=["mse"])
    assert "without standard errors has no halves" in top.attrs["reasons"]["mse"]["all"]


def test_effects_with_a_control_that_is_not_zero_are_refused():
    table = _effects()
    table.obs["perturbation"] = ["control", *table.obs["perturbation"][1:]]
    with pytest.raises(ScaleError, match="control row of observed is not zero"):
        evaluate(table, table, scale="effects")
    table.X[0] = 0
    assert len(evaluate(table, table, scale="effects")) == 11


def test_effects_with_two_rows_of_one_perturbation_are_refused():
    table = _effects()
    table.obs["perturbation"] = ["K1", *table.obs["perturbation"][1:]]
    with pytest.raises(ScaleError, match="several rows"):
        evaluate(table, table, scale="effects")


# ---------------------------------------------------------------------------------------------- bad input


def test_counts_are_refused_with_evidence(truth):
    raw = ad.AnnData(X=truth.layers["counts"].copy(), obs=truth.obs.copy(), var=truth.var.copy())
    with pytest.raises(ScaleError, match="looks like raw counts: 100 % of the non-zero values are integers"):
        evaluate(raw, truth)
    raw.X = raw.X * 1.5e3
    raw.X.data += 0.25
    with pytest.raises(ScaleError, match="too large for log1p"):
        evaluate(raw, truth)


def test_counts_are_refused_as_effects(truth):
    effects = metrics.pseudobulk(truth)
    effects.X = effects.layers.pop("delta")
    raw = ad.AnnData(X=truth.layers["counts"].copy(), obs=truth.obs.copy(), var=truth.var.copy())
    with pytest.raises(ScaleError, match="look like raw counts: 100 % .* table of effects"):
        evaluate(raw, effects, scale="effects")
    assert (evaluate(effects, effects, scale="effects", metrics=["mse"])["mse"] == 0).all()
    effects.X[:] = 0
    ones = effects.copy()
    ones.X[0, 0] = 3.0
    assert evaluate(effects, ones, scale="effects", metrics=["mse"])["mse"].notna().all()


def test_shifts_in_x_are_refused(truth):
    predicted = metrics.pseudobulk(truth)
    predicted.X = predicted.layers["delta"]
    with pytest.raises(ScaleError, match="looks like shifts"):
        evaluate(predicted, truth)


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        (lambda x: x, False),
        (lambda x: x / np.log(2), True),  # log2
        (lambda x: np.log1p(np.expm1(x) * 100), True),  # counts per million
        (lambda x: np.log1p(np.expm1(x) / 1e4), True),  # shares
    ],
)
def test_profiles_on_another_level_are_noted(truth, change, odd):
    predicted = metrics.pseudobulk(truth)
    predicted.X = change(predicted.X)
    del predicted.layers["delta"]
    notes = evaluate(predicted, truth, metrics=["mse"]).attrs["notes"]
    assert len(notes) == int(odd)
    if odd:
        assert "natural log1p of counts per 10,000" in notes[0]


def test_nan_in_a_prediction(truth):
    predicted = metrics.pseudobulk(truth)
    predicted.X[2, 5] = np.nan
    table = evaluate(predicted, truth)
    bad = predicted.obs_names[2]
    assert table.loc[bad].isna().all()
    assert "NaN" in table.attrs["reasons"]["mse"][bad]
    rest = table.drop(index=bad)[["mse", "pearson_delta", "centroid_accuracy"]]
    assert rest.notna().all().all()


def test_all_nan_prediction(truth):
    predicted = metrics.pseudobulk(truth)
    predicted.X[:] = np.nan
    table = evaluate(predicted, truth)
    assert table.isna().all().all()
    assert len(table) == len(PERTS)


def test_no_control(truth):
    with pytest.raises(LabelError, match="No cell"):
        evaluate(metrics.pseudobulk(truth), truth[truth.obs["perturbation"] != "control"].copy())
    with pytest.raises(LabelError, match="Is it called 'control' here"):
        evaluate(metrics.pseudobulk(truth), truth, control="ctrl")
    with pytest.raises(LabelError, match="control cells only"):
        evaluate(metrics.pseudobulk(truth), truth[truth.obs["perturbation"] == "control"].copy())


def test_nothing_shared(truth):
    other = metrics.pseudobulk(truth)
    other.var_names = [f"X{i}" for i in range(other.n_vars)]
    with pytest.raises(ScpertError, match="share no gene"):
        evaluate(other, truth)
    other = metrics.pseudobulk(truth)
    other.obs["perturbation"] = [f"P{i}" for i in range(other.n_obs)]
    with pytest.raises(LabelError, match="both predicted and observed"):
        evaluate(other, truth)


def test_unknown_metric(truth):
    with pytest.raises(ScpertError, match="Did you mean 'pearson_delta"):
        evaluate(metrics.pseudobulk(truth), truth, metrics=["pearson_dleta"])
    with pytest.raises(ScpertError, match="empty"):
        evaluate(metrics.pseudobulk(truth), truth, metrics=[])


def test_one_cell_per_group_and_silent_genes(truth):
    rows = [np.flatnonzero((truth.obs["perturbation"] == p).to_numpy())[0] for p in ("control", *PERTS)]
    few = truth[rows].copy()
    few = _log(few)
    few.X = few.X.toarray()
    few.X[:, 10:20] = 0
    predicted = _log(_cells(2))
    table = evaluate(predicted, few)
    assert table["mse"].notna().all()
    assert table["wasserstein"].isna().all()
    assert "two" in table.attrs["reasons"]["wasserstein"]["G0"]
    top = metrics.ceiling(few, metrics=["mse"])
    assert top["mse"].isna().all()
    assert "halved" in top.attrs["reasons"]["mse"]["all"]


def test_inputs_stay_as_they_are(truth, train):
    predicted = _log(_cells(2))
    before = [(a.X.copy(), a.obs.copy(), list(a.layers), dict(a.uns)) for a in (predicted, truth, train)]
    evaluate(predicted, truth, train=train)
    for a, (X, obs, layers, uns) in zip((predicted, truth, train), before, strict=True):
        assert (a.X != X).nnz == 0
        pd.testing.assert_frame_equal(a.obs, obs)
        assert list(a.layers) == layers and dict(a.uns) == uns


def test_table_survives_parquet(truth, tmp_path):
    table = evaluate(metrics.pseudobulk(truth), truth)
    table.to_parquet(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(back, table, check_column_type=False)
    assert back.attrs["reasons"] == table.attrs["reasons"]


def test_one_cell_of_another_perturbation_does_not_change_the_weights(truth):
    """A single-celled perturbation has no weights of its own; those of the others stay t statistics."""
    labels = truth.obs["perturbation"].astype(str)
    name = sorted(set(labels) - {"control"})[-1]
    first = np.flatnonzero(labels == name)[0]
    few = truth[((labels != name) | (np.arange(truth.n_obs) == first)).to_numpy()].copy()
    guess = metrics.pseudobulk(few)
    guess.X = guess.X + 0.1 * np.random.default_rng(0).random(guess.shape)
    del guess.layers["delta"]
    others = guess[guess.obs["perturbation"].astype(str) != name].copy()
    table = metrics.evaluate(others, few, metrics=["wmse", "mse"])
    assert not np.allclose(table["wmse"], table["mse"])
    whole = metrics.evaluate(guess, few, metrics=["wmse", "mse"])
    assert np.isnan(whole.loc[name, "wmse"]) and whole["wmse"].notna().sum() == len(whole) - 1
    np.testing.assert_allclose(whole.loc[others.obs["perturbation"], "wmse"], table["wmse"])


def test_ties_and_axes_do_not_depend_on_the_order_of_genes(truth, train):
    """A prediction of few genes ties in all others; random numbers of axes belong to genes, not to places."""
    names = ["jaccard_top20", "energy_distance", "sliced_wasserstein"]
    guess = truth.copy()
    x = _log(guess).X.toarray() if sparse.issparse(_log(guess).X) else np.asarray(_log(guess).X)
    control = x[(truth.obs["perturbation"] == "control").to_numpy()].mean(axis=0)
    guess.X = np.maximum(control + np.where(np.arange(truth.n_vars) < 5, x - control, 0.0), 0.0)
    order = np.random.default_rng(0).permutation(truth.n_vars)
    a, b = (
        metrics.evaluate(guess[:, o].copy(), truth[:, o].copy(), train=train[:, o].copy(), metrics=names)
        for o in (np.arange(truth.n_vars), order)
    )
    np.testing.assert_allclose(a[names], b[names], rtol=1e-4, atol=1e-6)


def test_entries_that_are_stored_in_parts_are_one(truth):
    """CSR with duplicate entries is legal: two halves of a count are the count."""
    whole = truth.copy()
    whole.X = sparse.csr_matrix(whole.X)
    parts = whole.copy()
    x = whole.X
    parts.X = sparse.csr_matrix((np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)
    assert not parts.X.has_canonical_format
    a, b = (scpert.tl.perturbation_effects(data, scale="counts") for data in (whole, parts))
    np.testing.assert_allclose(a.X, b.X, atol=1e-6)
    np.testing.assert_allclose(a.layers["std_error"], b.layers["std_error"], atol=1e-6)
    assert parts.X.nnz == 2 * x.nnz  # the user's matrix stays as it was


def test_truth_and_ceiling_within_covariates(run_of_six, caplog):
    """Mean profiles are shifted by what the controls of their strata differ by; halves by their own controls."""
    adata, _, _ = run_of_six
    effects = scpert.tl.perturbation_effects(adata, covariate_keys="run")
    reference = metrics.Reference(adata, adata, covariate_keys="run")
    shift = reference.mean - reference.control_mean
    np.testing.assert_allclose(shift, effects[reference.perturbations].X, atol=1e-9)
    np.testing.assert_allclose(reference.train_effects, shift, atol=1e-9)
    profiles = metrics.pseudobulk(adata, covariate_keys="run")
    assert evaluate(profiles, adata, covariate_keys="run", metrics="mse")["mse"].max() < 1e-9
    # a screen without effects whose second run holds one perturbation: nothing is left of the run
    null = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    label = np.where(np.arange(null.n_obs) % 3 == 0, np.where(null.obs["run"] == "True", "B", "A"), "control")
    null.obs["perturbation"] = label
    pooled, within = (
        metrics.ceiling(null, metrics="pearson_delta", covariate_keys=k, n_draws=10) for k in (None, "run")
    )
    assert pooled["pearson_delta"].min() > 0.6
    assert within["pearson_delta"].max() < 0.3
    null.obs.loc[null.obs["run"] == "True", "perturbation"] = "B"
    few = metrics.Reference(null, covariate_keys="run")
    assert few.perturbations == ["A"] and "are left out" in caplog.text
    null.obs["cell"] = null.obs_names
    with pytest.raises(ScpertError, match="No stratum of covariate_keys"):
        metrics.Reference(null, covariate_keys="cell")


def _null_in_runs(n_runs: int = 10) -> ad.AnnData:
    """Cells without effects, each perturbation in a run of its own, five controls in each run."""
    rng = np.random.default_rng(0)
    run = np.repeat(np.arange(n_runs), 45)
    label = np.where(np.tile(np.arange(45) < 5, n_runs), "control", np.char.add("P", run.astype(str)))
    X = 2.0 + 0.5 * (run[:, None] == np.arange(30)) + rng.normal(0, 0.3, (len(run), 30))
    obs = pd.DataFrame({"perturbation": label, "run": run.astype(str)}, index=[f"c{i}" for i in range(len(run))])
    return ad.AnnData(sparse.csr_matrix(np.maximum(X, 0)), obs=obs, var=pd.DataFrame(index=GENES[:30]))


def test_folds_within_covariates_are_those_of_the_cells_that_are_tested():
    """The observed cells themselves are a perfect prediction for all tests, with covariates as without."""
    cells = _null_in_runs()
    effect = (cells.obs["perturbation"] != "control").to_numpy()[:, None] * np.linspace(-1, 1, 30)
    cells.X = sparse.csr_matrix(np.maximum(cells.X.toarray() + effect, 0))
    names = ["de_direction_match", "de_spearman_lfc_sig", "overlap_at_N"]
    table = evaluate(cells, cells, scale="log1p", covariate_keys="run", metrics=names)
    np.testing.assert_allclose(table, 1.0)


def test_interpolated_duplicate_knows_how_few_controls_a_stratum_has():
    """Without effects its tests within strata find nothing."""
    from scpert.metrics._summary import _halve, _padj

    reference = metrics.Reference(_null_in_runs(), scale="log1p", covariate_keys="run")
    half = _halve(reference, reference.perturbations, np.random.default_rng(0)).predicting
    assert (_padj(half) < 0.05).mean() < 0.02


def test_predictions_of_own_genes_only_are_ties():
    """Without the targets nothing is left of them: no win by what rounding leaves."""
    rng = np.random.default_rng(0)
    labels = ["+".join(sorted(rng.choice(GENES, 3, replace=False))) for _ in range(25)]
    table = ad.AnnData(rng.normal(size=(25, 60)), obs=pd.DataFrame({"perturbation": labels}, index=labels))
    table.var_names = GENES
    own = table.copy()
    own.X = np.array(
        [
            [x * (g in p.split("+")) for g, x in zip(GENES, row, strict=True)]
            for p, row in zip(labels, table.X, strict=True)
        ]
    )
    assert (evaluate(own, table, scale="effects", metrics="retrieval_cosine_no_targets") == 0.5).all(axis=None)
