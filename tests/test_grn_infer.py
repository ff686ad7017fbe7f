"""tl.infer_grn: oracles of every method, error rate, recovery of simulated networks, round trips and bad input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.metrics import average_precision_score

import scpert
from scpert.errors import ScpertError, UnknownTargetError
from scpert.tl._grn import weighted_bh
from scpert.tl._grn_inverse import chance_path, direct_effects, indirect_discount, strongest_path
from scpert.tl._rank_sum import rank_sums

SIMPLE = ["interventional", "sparse_inverse", "ridge", "correlation", "boosting"]


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5, random_state=2)


def truth(adata: ad.AnnData, which: str) -> np.ndarray:
    """(gene, gene) matrix of the simulator's truth."""
    table = adata.uns["truth"][which]
    table = table[~table["source"].str.contains("+", regex=False)]
    out = np.zeros((adata.n_vars, adata.n_vars))
    out[adata.var_names.get_indexer(table["source"]), adata.var_names.get_indexer(table["target"])] = table["weight"]
    return out


def targets(adata: ad.AnnData) -> list[str]:
    return sorted(p for p in adata.obs["perturbation"].astype(str).unique() if p != "control" and "+" not in p)


def same(a, b) -> None:
    """Two values of uns are equal, to any depth."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(
            a.reset_index(drop=True), b.reset_index(drop=True), check_dtype=False, check_column_type=False
        )
    else:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def round_trip(adata: ad.AnnData, folder: Path, key: str = "grn") -> None:
    """The network and all that is noted beside it come back from h5ad and zarr."""
    adata.write_h5ad(folder / "a.h5ad")
    adata.write_zarr(folder / "a.zarr")
    for back in (ad.read_h5ad(folder / "a.h5ad"), ad.read_zarr(folder / "a.zarr")):
        assert sparse.issparse(back.varp[key])
        pd.testing.assert_frame_equal(scpert.get.grn_df(back, key), scpert.get.grn_df(adata, key), check_dtype=False)
        same(adata.uns[key], back.uns[key])


@pytest.mark.parametrize("method", SIMPLE)
def test_any_annotated_screen(screen, method, tmp_path):
    """No other argument; csr; no self loop; written as documented; the same again; survives both file formats."""
    adata = screen.copy()
    options = {"n_estimators": 10} if method == "boosting" else {}
    assert scpert.tl.infer_grn(adata, method=method, **options) is None
    matrix, notes = adata.varp["grn"], adata.uns["grn"]
    assert isinstance(matrix, sparse.csr_matrix | sparse.csr_array)
    assert matrix.shape == (40, 40)
    assert matrix.diagonal().sum() == 0
    assert notes["method"] == method
    assert set(np.flatnonzero(np.diff(matrix.indptr))) <= set(adata.var_names.get_indexer(targets(adata)))
    assert matrix.nnz <= 5 * 39 // 2 or method == "interventional"
    again = scpert.tl.infer_grn(screen, method=method, copy=True, **options)
    np.testing.assert_array_equal(again.varp["grn"].toarray(), matrix.toarray())
    assert "grn" not in screen.varp
    round_trip(adata, tmp_path)


@pytest.mark.parametrize("method", ["interventional", "sparse_inverse"])
def test_all_that_may_be_written_comes_back(screen, method, tmp_path):
    """Edges of unmeasured regulators, a prior, strata, a chosen number of edges."""
    adata = screen[:, [g for g in screen.var_names if g not in targets(screen)[:2]]].copy()
    prior = pd.DataFrame({"source": targets(screen)[2:3], "target": adata.var_names[:1].to_list()})
    scpert.tl.infer_grn(adata, method=method, prior=prior, n_edges=30, covariate_keys="batch", key_added="net")
    notes = adata.uns["net"]
    net, beside = scpert.get.grn_df(adata, "net"), notes["unmeasured_edges"]
    assert notes["method"] == method and len(net) == 30  # of measured regulators; the others are no fewer for it
    assert beside["weight"].abs().min() >= net["weight"].abs().min()
    assert set(notes["unmeasured_regulators"]) == set(targets(screen)[:2]) and len(notes["unmeasured_edges"])
    round_trip(adata, tmp_path, key="net")


def test_error_rate_is_controlled():
    """Nominal 0.05: the share of edges without a true total effect, pooled over screens, stays at or below it."""
    false = found = 0
    for seed in range(6):
        adata = scpert.datasets.simulated(
            n_genes=100, n_targets=20, n_combinations=0, cells_per_perturbation=60, strength=0.6, random_state=seed
        )
        scpert.tl.infer_grn(adata)
        edges = adata.varp["grn"].toarray() != 0
        false += int((edges & (truth(adata, "effects") == 0)).sum())
        found += int(edges.sum())
    assert found > 100
    assert false / found <= 0.07


def test_no_effect_no_edges():
    edges = 0
    for seed in range(5):
        adata = scpert.datasets.simulated(
            n_genes=60, n_targets=10, n_combinations=0, cells_per_perturbation=40, effect_size=0.0, random_state=seed
        )
        scpert.tl.infer_grn(adata)
        edges += adata.varp["grn"].nnz
    assert edges <= 2


def direct_auprc(adata: ad.AnnData, score: np.ndarray) -> float:
    """Average precision of the simulator's direct edges by the size of a score ``(target, gene)``."""
    rows = adata.var_names.get_indexer(targets(adata))
    edge = truth(adata, "net")[rows] != 0
    off = np.ones(edge.shape, dtype=bool)
    off[np.arange(len(rows)), rows] = False
    return average_precision_score(edge[off], np.abs(score)[off])


def network(adata: ad.AnnData) -> np.ndarray:
    """Weights ``(target, gene)``."""
    return adata.varp["grn"][adata.var_names.get_indexer(targets(adata))].toarray()


def test_direct_edges_beat_effect_size():
    """Over seeds sparse_inverse ranks direct edges better than the size of the effect and than its z-score."""
    for seed in range(4):
        adata = scpert.datasets.simulated(
            n_genes=100, n_targets=40, n_combinations=0, cells_per_perturbation=150, random_state=seed
        )
        effects = scpert.tl.perturbation_effects(adata)
        scpert.tl.infer_grn(adata, method="sparse_inverse", threshold=0)
        ours = direct_auprc(adata, network(adata))
        assert ours > direct_auprc(adata, effects.X) and ours > direct_auprc(adata, effects.layers["zscore"])


def test_signs_follow_the_activity_of_the_regulator():
    for mode in ("knockdown", "activation"):
        adata = scpert.datasets.simulated(
            n_genes=60,
            n_targets=10,
            n_combinations=0,
            cells_per_perturbation=150,
            mode=mode,
            strength=0.6,
            random_state=3,
        )
        scpert.tl.infer_grn(adata)
        table = adata.uns["truth"]["effects"]
        held = truth(adata, "effects")
        own = np.sign(np.diag(held))[:, None]
        edges = adata.varp["grn"].toarray()
        known = (edges != 0) & (held != 0)
        assert len(table) and known.sum() > 20
        assert np.mean(np.sign(edges)[known] == np.sign(held * own)[known]) > 0.95


# ---------------------------------------------------------------------------------------------- sparse inverse


def linear_total_effects(direct: np.ndarray, regulators: np.ndarray) -> np.ndarray:
    """Shift of every gene when one regulator is held at -1: solved exactly, one regulator at a time."""
    n = len(direct)
    out = np.zeros((len(regulators), n))
    for row, target in enumerate(regulators):
        others = np.setdiff1d(np.arange(n), target)
        system = np.eye(n - 1) - direct[np.ix_(others, others)].T
        out[row, others] = np.linalg.solve(system, -direct[target, others])
        out[row, target] = -1.0
    return out


def random_direct(rng: np.random.Generator, n: int) -> np.ndarray:
    direct = np.where(rng.random((n, n)) < 0.15, rng.uniform(0.2, 0.6, (n, n)) * rng.choice([-1, 1], (n, n)), 0.0)
    np.fill_diagonal(direct, 0.0)
    return direct * 0.6 / max(np.abs(np.linalg.eigvals(direct)).max(), 0.6)  # cycles, but stable


def test_sparse_inverse_is_the_inverse_without_noise():
    """All genes perturbed, no noise, no penalty: exactly the direct effects, which are those of the matrix inverse."""
    rng = np.random.default_rng(0)
    direct = random_direct(rng, 12)
    shift = linear_total_effects(direct, np.arange(12))
    error = np.full(shift.shape, 1e-9)
    found = direct_effects(shift, error, np.arange(12), penalty=0.0, n_iter=20_000, tolerance=0.0)
    np.testing.assert_allclose(-found, direct, atol=1e-3)
    slope = -shift
    inverse = np.linalg.inv(slope)
    np.testing.assert_allclose(np.eye(12) - inverse / np.diag(inverse)[None, :], direct, atol=1e-8)


def test_sparse_inverse_with_missing_interventions():
    """Regulators that no perturbation hits have no row; a chain through a perturbed one is still taken apart."""
    direct = np.zeros((4, 4))
    direct[0, 1], direct[1, 2], direct[3, 2] = 0.8, 0.8, 0.5  # 0 -> 1 -> 2, and 3 -> 2 not perturbed
    shift = linear_total_effects(direct, np.array([0, 1]))
    found = direct_effects(shift, np.full(shift.shape, 0.01), np.array([0, 1]), penalty=3.0)
    assert abs(found[0, 2]) < 0.05 * abs(shift[0, 2])
    assert -found[1, 2] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("cut", [0.0, 2.0])
def test_strongest_path_by_brute_force(cut):
    rng = np.random.default_rng(1)
    position = np.array([0, 3, -1, 5])
    z = rng.normal(size=(4, 7)) * 4
    found = strongest_path(z, position, cut)
    clean = z.copy()
    for r, p in enumerate(position):
        if p >= 0:
            clean[r, p] = 0.0
    for i in range(4):
        for j in range(7):
            if clean[i, j] == 0:
                continue
            best = 0.0
            for k, p in enumerate(position):
                if p >= 0 and np.sign(clean[i, p] * clean[k, j]) == np.sign(clean[i, j]):
                    best = max(best, min(abs(clean[i, p]), abs(clean[k, j])) - cut)
            assert found[i, j] == pytest.approx(best, rel=1e-5)


def test_discount_leaves_noise_in_its_order():
    """The best path over noise is noise: it must not reorder evidence that is hardly more."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20, 100))
    position = np.arange(20)
    sign, error = np.full(20, -1.0), np.ones(z.shape)
    z[position, position] = -10.0
    off = np.ones(z.shape, dtype=bool)
    off[position, position] = False
    spread = []
    for path_cut in (None, 0.0):
        factor, _ = indirect_discount(z, error, sign, position, path_cut=path_cut)
        spread.append(factor[off].std() / factor[off].mean())
    assert spread[0] < 0.1 < spread[1]


@pytest.mark.parametrize("n", [20, 300])
def test_chance_path_is_the_best_of_paths_over_noise(n):
    first, second = np.abs(np.random.default_rng(0).normal(size=(2, 2000, n)))
    right_sign = np.random.default_rng(1).random((2000, n)) < 0.5
    above = (np.minimum(first, second) > chance_path(n)) & right_sign
    assert above.sum(axis=1).mean() == pytest.approx(1.0, abs=0.1)
    assert chance_path(1) == 0.0


# ---------------------------------------------------------------------------------------------- over cells


def log1p_screen() -> ad.AnnData:
    rng = np.random.default_rng(5)
    x = np.maximum(rng.normal(1.0, 0.4, size=(200, 8)) @ (np.eye(8) + 0.3 * rng.normal(size=(8, 8))) + 3.0, 0.01)
    labels = np.array(["control", "G0", "G1", "G2"])[rng.integers(0, 4, 200)]
    return ad.AnnData(
        x,
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(200)]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(8)]),
    )


def test_ridge_equals_sklearn():
    """Closed form for all genes at once, also for regulators as targets, against one sklearn fit per gene."""
    from sklearn.linear_model import Ridge

    adata = log1p_screen()
    scpert.tl.infer_grn(adata, method="ridge", scale="log1p", alpha=0.3, threshold=0)
    x = adata.X - adata.X.mean(0)
    x = x / np.sqrt((x**2).sum(0))
    found = adata.varp["grn"].toarray()
    for gene in range(8):
        inputs = [r for r in range(3) if r != gene]
        expected = Ridge(alpha=0.3, fit_intercept=False).fit(x[:, inputs], x[:, gene]).coef_
        np.testing.assert_allclose(found[inputs, gene], expected, rtol=1e-3, atol=1e-5)


def test_correlation_equals_numpy():
    adata = log1p_screen()
    scpert.tl.infer_grn(adata, method="correlation", scale="log1p", threshold=0)
    expected = np.corrcoef(adata.X.T)
    np.fill_diagonal(expected, 0.0)
    np.testing.assert_allclose(adata.varp["grn"].toarray()[:3], expected[:3], rtol=1e-4, atol=1e-6)
    assert adata.varp["grn"][3:].nnz == 0


def boosted_by(trees: str) -> dict:
    """Options of ``boosting``; skips where LightGBM cannot be imported."""
    if trees == "lightgbm":
        try:
            import lightgbm  # noqa: F401
        except (ImportError, OSError) as error:
            pytest.skip(f"LightGBM cannot be imported: {error}")
    return {"trees": trees}


def test_boosting_refuses_what_it_cannot_grow(screen, monkeypatch):
    with pytest.raises(ScpertError, match="trees='oak' is not known. Choose one of 'scikit-learn', 'lightgbm'"):
        scpert.tl.infer_grn(screen.copy(), method="boosting", trees="oak")
    monkeypatch.setitem(sys.modules, "lightgbm", None)  # as if it were not installed
    with pytest.raises(ScpertError, match="needs LightGBM.*pip install 'scpert\\[boost\\]'"):
        scpert.tl.infer_grn(screen.copy(), method="boosting", trees="lightgbm")


@pytest.mark.parametrize("trees", ["scikit-learn", "lightgbm"])
def test_boosting_finds_a_nonlinear_regulator(trees):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 2, size=(400, 6))
    x[:, 5] = np.maximum(1.0 + np.where(x[:, 1] > 1.2, 1.5, 0.0) + rng.normal(0, 0.1, 400), 0.01)
    labels = np.array(["control", *[f"G{i}" for i in range(5)]])[rng.integers(0, 6, 400)]
    adata = ad.AnnData(
        x, obs=pd.DataFrame({"perturbation": labels}), var=pd.DataFrame(index=[f"G{i}" for i in range(6)])
    )
    adata.obs_names = [str(i) for i in range(400)]
    scpert.tl.infer_grn(adata, method="boosting", scale="log1p", threshold=0, max_features=0.5, **boosted_by(trees))
    column = np.abs(adata.varp["grn"].toarray()[:5, 5])
    assert column.argmax() == 1 and column[1] > 3 * np.delete(column, 1).max()


@pytest.mark.parametrize("trees", ["scikit-learn", "lightgbm"])
def test_boosting_is_not_led_by_rare_large_values(trees):
    """Genes with four large values that nothing explains stay behind a real edge."""
    rng = np.random.default_rng(0)
    x, y = rng.gamma(2, 1, (1000, 6)), np.zeros((1000, 6))
    y[:, 0] = 0.5 * x[:, 0] + rng.gamma(2, 1, 1000)
    for gene in range(1, 6):
        y[rng.choice(1000, 4, replace=False), gene] = rng.gamma(5, 1, 4)
    regulators = [f"R{i}" for i in range(6)]
    obs = pd.DataFrame({"perturbation": ["control", "R0"] * 500}, index=[f"c{i}" for i in range(1000)])
    var = pd.DataFrame(index=regulators + [f"T{i}" for i in range(6)])
    adata = ad.AnnData(np.hstack([x, y]), obs=obs, var=var)
    options = {"scale": "log1p", "threshold": 0, "regulators": regulators, **boosted_by(trees)}
    scpert.tl.infer_grn(adata, method="boosting", **options)
    net = scpert.get.grn_df(adata)
    assert tuple(net.loc[0, ["source", "target"]]) == ("R0", "T0")
    assert net.loc[0, "weight"] > 4 * net["weight"].abs()[1:].max()


def test_boosting_looks_within_the_strata_of_covariates():
    """A gene that differs between batches as a regulator does, and not within them, is no target of it."""
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], 400)
    x = rng.uniform(0, 1, (800, 4))
    x[:, 0] += batch
    x[:, 2] += batch
    x[:, 3] += x[:, 1]
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 400, "batch": batch.astype(str)})
    adata = ad.AnnData(x, obs=obs.set_axis(obs.index.astype(str)), var=pd.DataFrame(index=list("ABCD")))
    options = {"method": "boosting", "scale": "log1p", "threshold": 0, "regulators": ["A", "B"], "max_features": 1.0}
    scpert.tl.infer_grn(adata, **options)
    assert adata.varp["grn"][0, 2] > 0.3
    scpert.tl.infer_grn(adata, covariate_keys="batch", **options)
    assert abs(adata.varp["grn"][0, 2]) < 0.05 and adata.varp["grn"][1, 3] > 0.1


def test_rank_sums_equal_scipy():
    """z is scipy's; so is p on the side to which the rank sum is not skewed, and nearly so where it is not far out."""
    rng = np.random.default_rng(0)
    values = sparse.csr_matrix(np.c_[rng.poisson(0.7, size=(150, 6)), np.arange(150) < 3, np.zeros(150)].astype(float))
    code = np.r_[np.zeros(70, int), np.ones(50, int), np.full(30, 2)]
    z, p = rank_sums(values, code, 2)
    dense = values.toarray()
    for group in (1, 2):
        assert p[group - 1, 7] == 1.0  # nowhere expressed
        for gene in range(7):
            expected = stats.mannwhitneyu(dense[code == group, gene], dense[code == 0, gene], method="asymptotic")
            assert 2 * stats.norm.sf(abs(z[group - 1, gene])) == pytest.approx(expected.pvalue, rel=1e-6)
            assert p[group - 1, gene] == pytest.approx(expected.pvalue, rel=0.15 if gene < 6 else 0.5)


def test_rank_sums_of_rare_genes_by_permutation():
    """The normal tail is wrong by orders of magnitude where 25 of 1,030 cells express a gene; that of the cumulants is not."""
    rng = np.random.default_rng(0)
    x = np.zeros(1030)
    x[rng.choice(1030, 25, replace=False)] = 0.5 + rng.random(25)
    ranks = stats.rankdata(x)
    drawn = np.array([np.sort(rng.choice(ranks, 30, replace=False)).sum() for _ in range(20_000)])
    for share in (0.99, 0.999):
        best = np.flatnonzero(drawn >= np.quantile(drawn, share))
        # cells whose rank sum is at this quantile: those that the draw would have to give
        wanted = np.quantile(drawn, share)
        own = next(s for s in (rng.choice(1030, 30, replace=False) for _ in range(10**6)) if ranks[s].sum() >= wanted)
        code = np.zeros(1030, int)
        code[own] = 1
        z, p = rank_sums(sparse.csr_matrix(x[:, None]), code, 1)
        exact = 2 * np.mean(drawn >= ranks[own].sum() - 1e-9)
        assert len(best) and exact / 3 < p[0, 0] < 5 * max(exact, 1e-4)
        assert 2 * stats.norm.sf(z[0, 0]) < exact / 3


def test_rank_sums_within_strata_by_hand():
    """Van Elteren's test: sums over strata of U less its expectation, by 1 / (N + 1)."""
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1], [60, 90])
    code = (rng.random(150) < np.where(strata == 0, 0.7, 0.2)).astype(int)
    x = rng.random(150) + 2.0 * strata
    top = below = 0.0
    for s in (0, 1):
        own, control = x[(strata == s) & (code == 1)], x[(strata == s) & (code == 0)]
        n, m = len(own), len(control)
        top += (stats.mannwhitneyu(own, control).statistic - n * m / 2) / (n + m + 1)
        below += n * m * (n + m + 1) / 12 / (n + m + 1) ** 2
    z, p = rank_sums(sparse.csr_matrix(x[:, None]), code, 1, strata)
    assert z[0, 0] == pytest.approx(top / np.sqrt(below)) and p[0, 0] == pytest.approx(2 * stats.norm.sf(abs(z[0, 0])))
    assert abs(rank_sums(sparse.csr_matrix(x[:, None]), code, 1)[0][0, 0]) > 4 > abs(z[0, 0])


def test_rank_statistics_of_cells_of_one_depth_stay_null():
    """Counts of cells of one depth tie with the controls; a factor near zero must not break these ties to one side."""
    rng = np.random.default_rng(0)
    share = rng.gamma(0.6, size=100)
    labels = np.repeat(["control", *(f"g{i}" for i in range(10))], [300] + [60] * 10)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    counts = rng.multinomial(300, share / share.sum(), size=len(labels)).astype(np.float32)
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(100)]))
    scpert.tl.infer_grn(adata, statistic="rank", threshold=0)
    pvals = scpert.get.grn_df(adata)["pvals"]
    assert (pvals < 0.01).mean() < 0.02  # before: 0.13


def test_rank_statistic_finds_the_same(screen):
    adata = scpert.datasets.simulated(n_genes=60, n_targets=8, cells_per_perturbation=100, strength=0.6)
    welch = scpert.tl.infer_grn(adata, copy=True).varp["grn"].toarray() != 0
    rank = scpert.tl.infer_grn(adata, statistic="rank", copy=True).varp["grn"].toarray() != 0
    assert (welch & rank).sum() > 0.7 * welch.sum()


# ---------------------------------------------------------------------------------------------- arguments


def test_prior_edges_need_less_evidence():
    p = np.array([[0.001, 0.02, 0.03, 0.9]])
    weights = np.array([[0.0, 3.0, 0.0, 0.0]])
    np.testing.assert_allclose(weighted_bh(p, None), stats.false_discovery_control(p.ravel())[None])
    factor = (1 + weights) / (1 + weights).mean()
    np.testing.assert_allclose(
        weighted_bh(p, weights), stats.false_discovery_control((p / factor).clip(0, 1).ravel())[None]
    )


def test_prior_raises_its_edges(screen):
    source, target = targets(screen)[0], screen.var_names[1]
    prior = pd.DataFrame({"source": [source], "target": [target]})
    for method in ("sparse_inverse", "ridge", "correlation"):
        plain = scpert.tl.infer_grn(screen, method=method, threshold=0, copy=True)
        with_prior = scpert.tl.infer_grn(screen, method=method, threshold=0, prior=prior, copy=True)
        i, j = screen.var_names.get_loc(source), screen.var_names.get_loc(target)
        assert abs(with_prior.varp["grn"][i, j]) > abs(plain.varp["grn"][i, j])


def test_regulators_n_edges_threshold_and_key(screen, caplog):
    adata = screen.copy()
    two = targets(adata)[:2]
    scpert.tl.infer_grn(adata, method="correlation", regulators=two, n_edges=7, key_added="other")
    assert adata.varp["other"].nnz == 7
    assert set(scpert.get.grn_df(adata, "other")["source"]) <= set(two)
    with caplog.at_level("WARNING", logger="scpert"):
        scpert.tl.infer_grn(adata, method="correlation", threshold=0.1, key_added="other")
    assert "overwritten" in caplog.text
    assert np.abs(adata.varp["other"].data).min() > 0.1


def test_a_view_becomes_an_object_of_its_own(screen, recwarn):
    view = screen[::2]
    scpert.tl.infer_grn(view)
    assert not view.is_view and "grn" in view.varp and "grn" not in screen.varp
    assert not [w for w in recwarn if "view" in str(w.message)]


def test_split_and_observational(screen):
    adata = screen.copy()
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 2, "train", "test")
    scpert.tl.infer_grn(adata, split_key="split", key_added="a")
    half = adata[adata.obs["split"] == "train"].copy()
    scpert.tl.infer_grn(half, key_added="a")
    np.testing.assert_array_equal(adata.varp["a"].toarray(), half.varp["a"].toarray())
    assert len(adata.uns["a"]["cells"]) == half.n_obs
    adata.obs["free"] = adata.obs["perturbation"].astype(str) == targets(adata)[0]
    scpert.tl.infer_grn(adata, method="ridge", observational="free", threshold=0)
    assert targets(adata)[0] not in set(scpert.get.grn_df(adata)["source"])


def test_unmeasured_regulators_lose_nothing(screen):
    gene = targets(screen)[0]
    adata = screen[:, [g for g in screen.var_names if g != gene]].copy()
    scpert.tl.infer_grn(adata, method="sparse_inverse", threshold=0)
    assert list(adata.uns["grn"]["unmeasured_regulators"]) == [gene]
    assert set(adata.uns["grn"]["unmeasured_edges"]["source"]) == {gene}
    assert gene in set(scpert.get.grn_df(adata, unmeasured=True)["source"])
    assert gene not in set(scpert.get.grn_df(adata)["source"])


@pytest.mark.parametrize("method", ["ridge", "correlation"])
def test_methods_over_cells_name_the_regulators_that_they_leave_out(screen, method, caplog):
    gene = targets(screen)[0]
    adata = screen[:, [g for g in screen.var_names if g != gene]].copy()
    with caplog.at_level("WARNING", logger="scpert"):
        scpert.tl.infer_grn(adata, method=method)
    assert "left out" in caplog.text and gene in caplog.text
    assert list(adata.uns["grn"]["unmeasured_regulators"]) == [gene] and not len(adata.uns["grn"]["unmeasured_edges"])
    with pytest.raises(ScpertError, match="is a measured gene, and this method regresses"):
        scpert.tl.infer_grn(adata, method=method, regulators=[gene])
    other = next(g for g in adata.var_names if g not in targets(screen))
    with pytest.raises(ScpertError, match=f"{other}.* was perturbed singly; these were"):
        scpert.tl.infer_grn(adata, regulators=[other])


def test_tables_and_profiles_without_replicates():
    """Effects of single rows, and log profiles with one control: the spread over perturbations is the error."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(30)]
    direct = np.zeros((30, 30))
    direct[0, 1] = direct[1, 2] = 1.0
    shift = linear_total_effects(direct, np.arange(30)) + 0.02 * rng.normal(size=(30, 30))
    table = ad.AnnData(shift, obs=pd.DataFrame({"perturbation": genes}, index=genes), var=pd.DataFrame(index=genes))
    scpert.tl.infer_grn(table, method="sparse_inverse")
    net = scpert.get.grn_df(table)
    assert [tuple(e) for e in net[["source", "target"]].head(2).to_numpy()] in (
        [("G0", "G1"), ("G1", "G2")],
        [("G1", "G2"), ("G0", "G1")],
    )
    assert net.loc[net["source"].eq("G0") & net["target"].eq("G2"), "weight"].abs().max() < net["weight"].iloc[1] / 2
    profiles = ad.AnnData(
        np.vstack([np.full(30, 3.0), 3.0 + shift]),
        obs=pd.DataFrame({"perturbation": ["control", *genes]}, index=["wild", *genes]),
        var=pd.DataFrame(index=genes),
    )
    scpert.tl.infer_grn(profiles, scale="log1p")
    assert {("G0", "G1"), ("G1", "G2"), ("G0", "G2")} == set(
        map(tuple, scpert.get.grn_df(profiles)[["source", "target"]].head(3).to_numpy())
    )


def test_error_rate_with_few_controls():
    """Twenty controls that happen to agree are no evidence: the rate was 0.9 when only perturbed cells were looked at twice."""
    found = false = 0
    for seed in range(6):
        adata = scpert.datasets.simulated(n_cells=3000, n_genes=200, n_targets=10, n_combinations=0, random_state=seed)
        keep = (adata.obs["perturbation"] != "control").to_numpy(copy=True)
        keep[np.flatnonzero(~keep)[:20]] = True
        few = adata[keep].copy()
        scpert.tl.infer_grn(few)
        edges = few.varp["grn"].toarray() != 0
        found += int(edges.sum())
        false += int((edges & (truth(adata, "effects") == 0)).sum())
    assert found >= 5 and false <= 0.1 * found


@pytest.mark.parametrize("n_strata", [1, 3])
def test_a_lone_cell_is_no_evidence(n_strata):
    """One cell, or one in each stratum, was held against a normal distribution: 10 to 20 edges in screens without any effect."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(1.0, 1.0, 80) * 10
    labels = ["control"] * 150 + [f"G{i}" for i in range(20) for _ in range(n_strata)]
    edges = 0
    for _ in range(3):
        adata = ad.AnnData(rng.negative_binomial(2, 2 / (2 + mean), (len(labels), 80)).astype(np.float32))
        adata.var_names = [f"G{i}" for i in range(80)]
        adata.obs = pd.DataFrame(
            {"perturbation": labels, "batch": (np.arange(len(labels)) % n_strata).astype(str)},
            index=[f"c{i}" for i in range(len(labels))],
        )
        scpert.tl.infer_grn(adata, covariate_keys="batch" if n_strata > 1 else None)
        edges += adata.varp["grn"].nnz
    assert edges == 0


def test_the_order_of_many_controls_does_not_matter():
    """The common factor was measured in 2,000 of the controls, drawn by their place."""
    adata = scpert.datasets.simulated(n_cells=5000, n_genes=40, n_targets=3, n_combinations=0, random_state=0)
    adata.obs["perturbation"] = np.where(
        np.arange(adata.n_obs) < 4000, "control", adata.obs["perturbation"].astype(str)
    )
    expected = scpert.tl.infer_grn(adata, threshold=0, copy=True).varp["grn"].toarray()
    found = scpert.tl.infer_grn(adata[::-1].copy(), threshold=0, copy=True).varp["grn"].toarray()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_effects_are_taken_as_they_are():
    """A chain A -> B -> C without noise: what is already relative to control has nothing to be subtracted from."""
    genes = ["A", "B", "C"]
    shift = np.array([[-2.0, -1.6, -1.28], [0.0, -2.0, -1.6], [0.0, 0.0, -2.0]])
    table = ad.AnnData(shift, obs=pd.DataFrame({"perturbation": genes}, index=genes), var=pd.DataFrame(index=genes))
    for method in ("interventional", "sparse_inverse"):
        scpert.tl.infer_grn(table, method=method, scale="effects", threshold=0)
        net = scpert.get.grn_df(table).set_index(["source", "target"])["weight"]
        assert set(net.index) == {("A", "B"), ("B", "C"), ("A", "C")} and (net > 0).all()
    assert net["A", "C"] < min(net["A", "B"], net["B", "C"])
    with_control = ad.AnnData(
        np.vstack([np.zeros(3), shift]),
        obs=pd.DataFrame({"perturbation": ["control", *genes]}, index=["wild", *genes]),
        var=pd.DataFrame(index=genes),
    )
    scpert.tl.infer_grn(with_control, method="sparse_inverse", scale="effects", threshold=0)
    pd.testing.assert_series_equal(scpert.get.grn_df(with_control).set_index(["source", "target"])["weight"], net)


def test_a_table_with_standard_errors_is_as_good_as_its_cells():
    total = []
    for seed in range(3):
        adata = scpert.datasets.simulated(
            n_cells=3000, n_genes=100, n_targets=10, n_combinations=0, strength=0.6, random_state=seed
        )
        table = scpert.tl.perturbation_effects(adata)
        bare = table.copy()
        del bare.layers["std_error"]
        row = []
        for data, scale in ((adata, "counts"), (table, "effects"), (bare, "effects")):
            scpert.tl.infer_grn(data, scale=scale, threshold=0)
            row.append(direct_auprc(adata, network(data)))
        total.append(row)
    cells, told, spread = np.mean(total, axis=0)
    assert told > cells - 0.05 and told > spread
    again = scpert.tl.perturbation_effects(table, scale="effects")
    np.testing.assert_allclose(again.layers["zscore"], table.X / table.layers["std_error"], rtol=1e-4)


def test_noise_of_one_control_is_taken_out_of_a_table():
    """Forty rows less one noisy control: its error is in every row, and hides what a row does; of many controls none is found."""
    from scpert.tl._grn_methods import _reference_error

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 200))
    control = rng.normal(size=200)
    found = _reference_error(noise - control)
    assert np.corrcoef(found, -control)[0, 1] > 0.95 and 0.8 < np.polyfit(-control, found, 1)[0] < 1.1
    assert np.abs(_reference_error(noise - control / 20)).max() < 0.3
    moved = noise.copy()
    moved[:, 0] -= 20.0  # moved by every perturbation: an effect
    assert _reference_error(moved)[0] == 0
    assert not _reference_error((noise - control)[:10]).any()  # too few to tell


def test_signs_do_not_follow_noise():
    """Regulators of which next to nothing is detected: what their own transcript does is noise, and the others are knocked down."""
    adata = scpert.datasets.simulated(
        n_cells=3000, n_genes=100, n_targets=10, n_combinations=0, strength=0.8, random_state=0
    )
    x = adata.X.toarray()
    names = targets(adata)
    rng = np.random.default_rng(0)
    for gene in names[:4]:  # a count in a few cells, by chance more often in its own
        at = adata.var_names.get_loc(gene)
        x[:, at] = rng.random(len(x)) < 0.004
        own = np.flatnonzero(adata.obs["perturbation"] == gene)
        x[own[:2], at] = 1
    adata.X = x
    scpert.tl.infer_grn(adata)
    net = scpert.get.grn_df(adata)
    total = truth(adata, "effects")  # of the knock-down: activity has the other sign
    rare = net[net["source"].isin(names[:4])]
    want = -np.sign(total[adata.var_names.get_indexer(rare["source"]), adata.var_names.get_indexer(rare["target"])])
    assert len(rare) > 10 and np.mean(np.sign(rare["weight"]) == want) > 0.9


def composed_screen(n_genes: int, n_regulators: int = 10) -> tuple[ad.AnnData, set[tuple[str, str]]]:
    """Counts of constant depth: a knocked-down regulator lowers a third of the genes, so that the shares of all others rise."""
    rng = np.random.default_rng(0)
    base = rng.gamma(1.0, 1.0, n_genes) + 0.2
    rows, labels, true = [], [], set()
    for r in range(-1, n_regulators):
        log = np.zeros(n_genes)
        if r >= 0:
            hit = rng.random(n_genes) < 0.3
            log[hit], log[r] = -1.0, -2.5
            true |= {(f"G{r}", f"G{j}") for j in np.flatnonzero(hit) if j != r}
        mean = base * np.exp(log)
        rows.append(rng.poisson(mean / mean.sum() * 2000, size=(600 if r < 0 else 200, n_genes)))
        labels += ["control" if r < 0 else f"G{r}"] * len(rows[-1])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    genes = pd.DataFrame(index=[f"G{j}" for j in range(n_genes)])
    return ad.AnnData(sparse.csr_matrix(np.vstack(rows).astype(np.float32)), obs=obs, var=genes), true


def test_tables_of_effects_are_corrected_for_composition(caplog):
    """As the cells that they come from: in a table the shares of all other genes that rise are no effects, either."""
    adata, true = composed_screen(80)
    rate = {}
    table = scpert.tl.perturbation_effects(adata)
    bare = table.copy()
    del bare.var["sensitivity"]
    for name, data in (("cells", adata.copy()), ("table", table), ("bare", bare)):
        scpert.tl.infer_grn(data, **({} if name == "cells" else {"scale": "effects"}))
        net = scpert.get.grn_df(data)
        rate[name] = np.mean([pair not in true for pair in zip(net["source"], net["target"], strict=True)])
    assert rate["cells"] < 0.08 and rate["table"] < 0.08 < rate["bare"]
    assert "Fewer than 10 genes" not in caplog.text
    scpert.tl.infer_grn(composed_screen(8, 3)[0])
    assert "Fewer than 10 genes" in caplog.text


def test_tables_of_noise_have_no_edges():
    """Few rows, or few cells behind a row: the scale of the noise is uncertain itself."""
    found = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for n in (8, 30):
            x = rng.normal(0, rng.gamma(2, 0.2, 100), (n, 100))
            x[np.arange(n), np.arange(n)] = -4
            names = [f"g{i}" for i in range(n)]
            table = ad.AnnData(
                x,
                obs=pd.DataFrame({"perturbation": names}, index=names),
                var=pd.DataFrame(index=[f"g{i}" for i in range(100)]),
            )
            scpert.tl.infer_grn(table, scale="effects")
            found += table.varp["grn"].nnz
        adata = scpert.datasets.simulated(
            n_cells=900, n_genes=80, n_targets=30, n_combinations=0, effect_size=0.0, random_state=seed
        )
        effects = scpert.tl.perturbation_effects(adata)
        scpert.tl.infer_grn(effects, scale="effects")
        found += effects.varp["grn"].nnz
    assert found <= 2


def test_noise_and_direction_do_not_depend_on_who_is_asked_for():
    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(60)]
    x = rng.normal(size=(60, 100))
    x[np.arange(60), np.arange(60)] = -6
    x[3, 70] = 9.0
    table = ad.AnnData(
        x, obs=pd.DataFrame({"perturbation": names}, index=names), var=pd.DataFrame(index=[f"g{i}" for i in range(100)])
    )
    scpert.tl.infer_grn(table, scale="effects", threshold=0)
    whole = scpert.get.grn_df(table).set_index(["source", "target"])["weight"]
    scpert.tl.infer_grn(table, scale="effects", threshold=0, regulators=["g3", "g7"])
    some = scpert.get.grn_df(table).set_index(["source", "target"])["weight"]
    pd.testing.assert_series_equal(
        some.sort_index(), whole[whole.index.get_level_values(0).isin(["g3", "g7"])].sort_index()
    )
    active = scpert.datasets.simulated(
        n_genes=40, n_targets=5, n_combinations=0, mode="activation", cells_per_perturbation=80, strength=0.8
    )
    hidden = targets(active)[0]
    panel = active[:, active.var_names != hidden].copy()
    scpert.tl.infer_grn(panel, threshold=0)
    net = scpert.get.grn_df(panel, unmeasured=True).query("source == @hidden").set_index("target")["weight"]
    scpert.tl.infer_grn(panel, threshold=0, regulators=[hidden])
    alone = scpert.get.grn_df(panel, unmeasured=True).set_index("target")["weight"]
    pd.testing.assert_series_equal(alone.sort_index(), net.sort_index(), check_index_type=False)


def test_edges_of_unmeasured_labels_are_not_counted():
    """DREAM4 as it is: labels such as 'multifactorial' are no genes and must not take the edges that were asked for."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(20)]
    rows = np.vstack([linear_total_effects(random_direct(rng, 20), np.arange(20)), rng.normal(size=(30, 20))])
    labels = [*genes, *["series_1"] * 30]
    table = ad.AnnData(
        rows,
        obs=pd.DataFrame({"perturbation": labels}, index=[f"r{i}" for i in range(50)]),
        var=pd.DataFrame(index=genes),
    )
    scpert.tl.infer_grn(table, scale="effects", n_edges=25)
    assert table.varp["grn"].nnz == 25


def test_observational_samples_are_read_as_the_screen_is(screen):
    adata = screen.copy()
    adata.layers["raw"] = adata.X.copy()
    adata.X = np.full(adata.shape, np.nan)
    other = adata[:50].copy()
    options = {"method": "correlation", "layer": "raw", "scale": "counts", "threshold": 0}
    scpert.tl.infer_grn(adata, observational=other, **options)
    double = adata.varp["grn"].toarray()
    mask = np.zeros(adata.n_obs, dtype=bool)
    scpert.tl.infer_grn(adata, observational=mask, **options)
    assert np.abs(double - adata.varp["grn"].toarray()).max() > 1e-4
    del other.layers["raw"]
    with pytest.raises(scpert.errors.MissingKeyError, match="observational=, which is read as adata is"):
        scpert.tl.infer_grn(adata, observational=other, **options)
    nullable = adata.copy()
    nullable.obs["seen"] = pd.array(np.arange(adata.n_obs) < 40, dtype="boolean")
    scpert.tl.infer_grn(nullable, observational="seen", **options)
    with pytest.raises(ScpertError, match="observational= is all of the 300 cells"):
        scpert.tl.infer_grn(adata, observational=~mask, **options)


def test_what_a_model_cannot_use_is_refused_and_nothing_else_overwritten(screen):
    adata = screen.copy()
    reader = type("Reader", (), {"get_grn": lambda self: adata.uns["truth"]["net"]})()
    for options, message in (
        ({"model": reader, "method": "ridge"}, "'method': with model=Reader"),
        ({"model": reader, "covariate_keys": "nosuch"}, "nosuch"),
        ({"model": scpert.model.GPOVAE}, "model=GPOVAE is a class; give a trained model"),
        ({"key_added": "truth"}, "is there and no network"),
    ):
        with pytest.raises(ScpertError, match=message):
            scpert.tl.infer_grn(adata, **options)
    assert isinstance(adata.uns["truth"], dict) and "net" in adata.uns["truth"]


def test_prior_changes_the_ranking_of_total_effects(screen):
    adata = screen.copy()
    scpert.tl.infer_grn(adata, threshold=0)
    plain = scpert.get.grn_df(adata)
    weak = plain.iloc[[len(plain) // 3]]
    scpert.tl.infer_grn(adata, threshold=0, prior=weak[["source", "target"]], prior_strength=50)
    net = scpert.get.grn_df(adata)

    def rank(table: pd.DataFrame) -> int:
        edge = (table["source"] == weak["source"].iloc[0]) & (table["target"] == weak["target"].iloc[0])
        return int(np.flatnonzero(edge)[0])

    assert rank(net) < rank(plain) - 5
    np.testing.assert_allclose(np.sign(net["weight"].sum()), np.sign(plain["weight"].sum()))


def test_rank_statistics_within_batches():
    """A quarter of the genes differs between batches, and so do the shares of the perturbations: no edge of that within batches."""
    adata = scpert.datasets.simulated(n_genes=60, n_targets=8, n_combinations=0, cells_per_perturbation=100)
    rng = np.random.default_rng(0)
    names = targets(adata)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    late = rng.random(len(labels)) < np.where(np.isin(labels, names[:4]), 0.8, 0.3)
    x = adata.X.toarray()
    x[:, 45:] = np.where(late[:, None], rng.poisson(x[:, 45:] * 2 + 2), x[:, 45:])
    adata.X = x
    adata.obs["run"] = late.astype(str)
    total = truth(adata, "effects")
    false = []
    for keys in (None, "run"):
        scpert.tl.infer_grn(adata, statistic="rank", covariate_keys=keys)
        edges = adata.varp["grn"].toarray() != 0
        false.append(int((edges & (total == 0))[:, 45:].sum()))
    assert false[0] > 20 and false[1] <= 3


def test_network_stays_sparse(screen):
    """2,000 genes, 20,000 edges: nothing dense of that size is written."""
    rng = np.random.default_rng(0)
    n = 2000
    genes = [f"G{i}" for i in range(n)]

    class Model:
        def get_grn(self) -> pd.DataFrame:
            pairs = rng.choice(n * n, 20_500, replace=False)
            net = pd.DataFrame({"source": np.array(genes)[pairs // n], "target": np.array(genes)[pairs % n]})
            return net[net["source"] != net["target"]].head(20_000).assign(weight=1.0)

    adata = ad.AnnData(
        sparse.csr_matrix((3, n), dtype=np.float32),
        obs=pd.DataFrame({"perturbation": ["control", "G0", "G1"]}, index=list("abc")),
        var=pd.DataFrame(index=genes),
    )
    scpert.tl.infer_grn(adata, model=Model())
    matrix = adata.varp["grn"]
    assert sparse.issparse(matrix) and matrix.nnz == 20_000
    assert matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes < 400_000
    assert adata.uns["grn"]["method"] == "model Model"
    assert len(scpert.get.grn_df(adata)) == 20_000


def test_goes_through_decoupler_and_back(screen):
    dc = pytest.importorskip("decoupler")
    import scanpy as sc

    adata = scpert.datasets.simulated(n_genes=80, n_targets=8, cells_per_perturbation=60, strength=0.6)
    scpert.tl.infer_grn(adata, method="sparse_inverse")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    net = scpert.get.grn_df(adata)
    dc.mt.ulm(adata, net, tmin=3)
    activity = adata.obsm["score_ulm"]
    assert set(activity.columns) <= set(net["source"]) and activity.shape[0] == adata.n_obs
    # a knocked-down regulator is less active in its own cells
    lower = [
        activity.loc[adata.obs["perturbation"] == r, r].mean()
        < activity.loc[adata.obs["perturbation"] == "control", r].mean()
        for r in activity.columns
    ]
    assert np.mean(lower) > 0.7


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_arguments(screen):
    adata = screen.copy()
    with pytest.raises(ScpertError, match="Did you mean 'ridge'"):
        scpert.tl.infer_grn(adata, method="rigde")
    with pytest.raises(UnknownTargetError, match="neither perturbed nor measured"):
        scpert.tl.infer_grn(adata, regulators=["NOT_A_GENE"])
    with pytest.raises(ScpertError, match="does not know the option"):
        scpert.tl.infer_grn(adata, method="ridge", alhpa=1.0)
    with pytest.raises(ScpertError, match="not both"):
        scpert.tl.infer_grn(adata, n_edges=5, threshold=1.0)
    with pytest.raises(ScpertError, match="shares no edge"):
        scpert.tl.infer_grn(adata, prior=pd.DataFrame({"source": ["ENSG1"], "target": ["ENSG2"]}))
    with pytest.raises(ScpertError, match="it has genes such as 'ENSG2', the data"):
        scpert.tl.infer_grn(adata, prior=pd.DataFrame({"source": targets(adata)[:1], "target": ["ENSG2"]}))
    with pytest.raises(ScpertError, match="fewer than two control cells"):
        adata.obs["donor_of"] = np.where(adata.obs["perturbation"] == "control", "x", "y")
        scpert.tl.infer_grn(adata, covariate_keys="donor_of")
    with pytest.raises(ScpertError, match="get_grn"):
        scpert.tl.infer_grn(adata, model=object())
    reader = type("Reader", (), {"get_grn": lambda self: adata.uns["truth"]["net"]})()
    for options, message in (
        ({"n_edges": 2.5}, "n_edges=2.5: give a whole number"),
        ({"n_edges": "5"}, "n_edges=.5.: give a number"),
        ({"fdr": "0.1"}, "fdr=.0.1.: give a number"),
        ({"key_added": None}, "key_added=None"),
        ({"model": reader, "regulators": targets(adata)[:1], "alpha": 1.0}, "taken as the model has it"),
    ):
        with pytest.raises(ScpertError, match=message):
            scpert.tl.infer_grn(adata, **options)
    with pytest.raises(ScpertError, match="no 'train' cell"):
        scpert.tl.infer_grn(adata, split_key="batch")
    with pytest.raises(ScpertError, match="neither a boolean column"):
        scpert.tl.infer_grn(adata, observational="multifactorial")
    doubles = adata[
        adata.obs["perturbation"].astype(str).str.contains("+", regex=False) | (adata.obs["perturbation"] == "control")
    ]
    with pytest.raises(ScpertError, match="no regulator"):
        scpert.tl.infer_grn(doubles.copy())
    assert "grn" not in adata.varp and "grn" not in adata.uns


def test_gpovae_refuses_what_it_cannot_use(screen):
    with pytest.raises(ScpertError, match="max_epochs, direct, carriers and those of GPOVAE: n_latent"):
        scpert.tl.infer_grn(screen, method="gpovae", max_epoch=1)
    logs = log1p_screen()
    with pytest.raises(scpert.errors.ScaleError, match="layer of raw counts"):
        scpert.tl.infer_grn(logs, method="gpovae", scale="log1p")


def test_scaled_cells_are_not_taken_for_a_table_of_effects(screen):
    scaled = log1p_screen()
    scaled.X = (scaled.X - scaled.X.mean(axis=0)) / np.maximum(scaled.X.std(axis=0), 1e-6)
    for use in (
        scpert.tl.infer_grn,
        scpert.tl.perturbation_effects,
        scpert.model.KNN.setup_anndata,
        lambda x: scpert.metrics.evaluate(x, x),
    ):
        with pytest.raises(scpert.errors.ScaleError, match="control rows are not zero: scaled or corrected cells"):
            use(scaled)
    scpert.tl.infer_grn(scaled, scale="effects")
    assert "grn" in scaled.varp


def test_gpovae_trains_on_a_backed_screen(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    scpert.tl.infer_grn(backed, method="gpovae", max_epochs=1, threshold=0, n_latent=2, n_hidden=4)
    assert backed.isbacked and backed.varp["grn"].nnz


def test_natural_calls_on_knock_outs_agree(caplog):
    """A table of one row a knock-out: raw with its wild type, less it, standardised, or alone, hardly another ranking."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(30)]
    profiles = 0.5 + 0.1 * linear_total_effects(random_direct(rng, 30), np.arange(30)) + 0.01 * rng.random((30, 30))

    def table(x, names) -> ad.AnnData:
        obs = pd.DataFrame({"perturbation": names}, index=[f"r{i}" for i in range(len(x))])
        return ad.AnnData(np.asarray(x), obs=obs, var=pd.DataFrame(index=genes))

    alone = table(profiles, genes)
    with pytest.raises(scpert.errors.LabelError, match="scale='effects'"):
        scpert.tl.infer_grn(alone, method="sparse_inverse")
    wild = np.full((1, 30), 0.5)
    calls = [
        (alone, {"scale": "effects"}),
        (table(np.vstack([wild, profiles]), ["control", *genes]), {}),
        (table(profiles - wild, genes), {}),
        (table((profiles - profiles.mean(0)) / profiles.std(0), genes), {}),
    ]
    found = []
    for adata, options in calls:
        scpert.tl.infer_grn(adata, method="sparse_inverse", **options)
        found.append(scpert.get.grn_df(adata)[["source", "target"]].head(20).apply(tuple, axis=1).tolist())
    assert all(len(set(f) & set(found[0])) >= 18 for f in found)


def test_one_perturbation_constant_targets_and_zero_effects(screen, caplog):
    one = screen[screen.obs["perturbation"].isin(["control", targets(screen)[0]])].copy()
    for method in SIMPLE[:4]:
        scpert.tl.infer_grn(one, method=method)
        assert set(scpert.get.grn_df(one)["source"]) <= {targets(screen)[0]}
    flat = log1p_screen()
    flat.X[:, 4] = 2.0
    for method in SIMPLE[:4]:
        scpert.tl.infer_grn(flat, method=method, scale="log1p", threshold=0)
        assert flat.varp["grn"].toarray()[:, 4].any() == False  # noqa: E712
    same = log1p_screen()
    same.X[:] = np.linspace(1, 2, 8)[None, :]
    with caplog.at_level("WARNING", logger="scpert"):
        scpert.tl.infer_grn(same, scale="log1p")
    assert same.varp["grn"].nnz == 0 and "found no edge" in caplog.text


def test_no_measured_target_still_works(screen):
    adata = screen[:, [g for g in screen.var_names if g not in targets(screen)]].copy()
    for method in SIMPLE[:4]:
        scpert.tl.infer_grn(adata, method=method)
        assert adata.varp["grn"].shape == (adata.n_vars, adata.n_vars)
    with pytest.raises(scpert.errors.MissingKeyError, match="no network 'nothing'"):
        scpert.get.grn_df(adata, "nothing")


# ---------------------------------------------------------------------------------------------- networks of models


def knock_down_and_raise(seed: int = 3) -> ad.AnnData:
    """A screen of knock-downs in which the last regulator is raised by its perturbation."""
    adata = scpert.datasets.simulated(
        n_genes=30, n_targets=4, cells_per_perturbation=60, n_combinations=0, random_state=seed
    )
    raised = targets(adata)[-1]
    cells = (adata.obs["perturbation"] == raised).to_numpy()
    dense = np.asarray(adata.X.toarray() if sparse.issparse(adata.X) else adata.X).copy()
    dense[cells, adata.var_names.get_loc(raised)] += 20
    adata.X = sparse.csr_matrix(dense)
    return adata


def sign_of_activity(adata: ad.AnnData) -> pd.Series:
    """-1 where the perturbation lowers its target, from means by hand."""
    dense = adata.X.toarray()
    log = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    label = adata.obs["perturbation"].astype(str).to_numpy()
    shift = {
        r: np.sign(
            log[label == r, adata.var_names.get_loc(r)].mean()
            - log[label == "control", adata.var_names.get_loc(r)].mean()
        )
        for r in targets(adata)
    }
    return pd.Series(shift)


@pytest.fixture(scope="module")
def trained():
    from scpert.model import GPOVAE

    adata = knock_down_and_raise()
    GPOVAE.setup_anndata(adata)
    model = GPOVAE(adata, n_latent=4, n_hidden=8)
    model.train(max_epochs=2, batch_size=64)
    return adata, model


def test_network_of_a_trained_gpovae(trained, tmp_path):
    """The net is the model's own; signs are those of the regulator's activity, whichever way the perturbation goes."""
    adata, model = trained
    adata = adata.copy()
    sign = sign_of_activity(adata)
    assert sorted(sign.unique()) == [-1.0, 1.0]
    own = model.get_grn(threshold=0.0)
    reader = type("Reader", (), {"grn_sign": "perturbation", "get_grn": lambda self: own})()
    for source, expected in ((model, model.get_grn()), (reader, own)):
        scpert.tl.infer_grn(adata, model=source)
        found = scpert.get.grn_df(adata).set_index(["source", "target"])["weight"]
        wanted = expected.set_index(["source", "target"])["weight"]
        wanted = wanted * sign[wanted.index.get_level_values("source")].to_numpy()
        pd.testing.assert_series_equal(found.sort_index(), wanted.sort_index(), rtol=1e-5, check_dtype=False)
    assert len(own) and adata.uns["grn"]["method"] == "model Reader"
    assert "probability" in adata.uns["grn"]["edges"]
    round_trip(adata, tmp_path)
    # a model that already speaks of activity is taken as it is; what else it may say is refused
    scpert.tl.infer_grn(adata, model=type("Plain", (), {"get_grn": lambda self: own})())
    kept = scpert.get.grn_df(adata).set_index(["source", "target"])["weight"].sort_index()
    pd.testing.assert_series_equal(
        kept, own.set_index(["source", "target"])["weight"].sort_index(), rtol=1e-5, check_dtype=False
    )
    with pytest.raises(ScpertError, match=r"model.grn_sign='up' is not known"):
        scpert.tl.infer_grn(adata, model=type("Odd", (), {"grn_sign": "up", "get_grn": lambda self: own})())


def test_gpovae_trains_and_is_read(tmp_path):
    """The method is the model trained in the call: the same edges, signs and probabilities; the screen as it was."""
    from scpert.model import GPOVAE

    adata = knock_down_and_raise()
    before = adata.copy()
    options = {"n_latent": 4, "n_hidden": 8}
    scpert.tl.infer_grn(adata, method="gpovae", max_epochs=2, threshold=0, direct=False, **options)
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    assert list(adata.obs.columns) == list(before.obs.columns) and set(adata.uns) == {*before.uns, "grn"}
    again = scpert.tl.infer_grn(before, method="gpovae", max_epochs=2, threshold=0, direct=False, copy=True, **options)
    np.testing.assert_array_equal(again.varp["grn"].toarray(), adata.varp["grn"].toarray())
    net = scpert.get.grn_df(adata)
    assert set(net["source"]) <= set(targets(adata)) and not (net["source"] == net["target"]).any()
    edges = adata.uns["grn"]["edges"]
    assert edges["probability"].between(0, 1).all()
    GPOVAE.setup_anndata(before)
    model = GPOVAE(before, **options)
    model.train(max_epochs=2)
    own = model.get_grn(threshold=0.0).set_index(["source", "target"])["weight"]
    own = own * sign_of_activity(adata)[own.index.get_level_values("source")].to_numpy()
    found = net.set_index(["source", "target"])["weight"]
    assert set(found.index) == set(own.index)
    pd.testing.assert_series_equal(found.sort_index(), own.sort_index(), rtol=1e-4, atol=1e-6, check_dtype=False)
    some = targets(adata)[:2]
    scpert.tl.infer_grn(adata, method="gpovae", max_epochs=2, threshold=0, regulators=[*some, "G29"], **options)
    edges = adata.uns["grn"]["edges"].set_index(["source", "target"])
    assert set(edges.index.get_level_values("source")) == set(some)  # one that was never perturbed is left out
    activity = edges["effect"] * sign_of_activity(adata)[edges.index.get_level_values("source")].to_numpy()
    pd.testing.assert_series_equal(activity, own.loc[edges.index], rtol=1e-4, atol=1e-6, check_names=False)
    assert (edges["std"] > 0).all()
    round_trip(adata, tmp_path)


def test_gpovae_reads_measured_and_decoded_effects_together(monkeypatch):
    """A network that decodes what was measured gives sparse_inverse; one that decodes nothing halves the evidence."""
    from scpert.tl import _grn_methods

    adata = knock_down_and_raise()
    scpert.tl.infer_grn(adata, method="sparse_inverse", threshold=0)
    expected = adata.varp["grn"].toarray()
    options = {"method": "gpovae", "threshold": 0, "max_epochs": 1, "n_latent": 4, "n_hidden": 8}

    def measured(trained, problem, columns, error):
        found = _grn_methods.total_effects(problem, carriers=True)
        return found.shift * found.share[:, None]  # of all cells, carriers or not

    monkeypatch.setattr(_grn_methods, "_decoded_effects", measured)
    scpert.tl.infer_grn(adata, **options)
    np.testing.assert_allclose(adata.varp["grn"].toarray(), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(_grn_methods, "_decoded_effects", lambda *a: 0.0)
    scpert.tl.infer_grn(adata, **options)
    alone = adata.varp["grn"].toarray()
    assert ((alone != 0) == (expected != 0)).all() and (np.sign(alone) == np.sign(expected)).all()


def test_gpovae_beats_the_effect_size_where_evidence_is_weak():
    """Weak effects, thirty cells: the network must not fall behind the evidence that it was given."""
    gain = []
    for seed in (200, 201):
        adata = scpert.datasets.simulated(
            n_genes=100,
            n_targets=20,
            n_combinations=0,
            cells_per_perturbation=30,
            strength=0.25,
            penetrance=1.0,
            cycles=True,
            random_state=seed,
        )
        effects = scpert.tl.perturbation_effects(adata)
        scpert.tl.infer_grn(adata, method="gpovae", max_epochs=50, threshold=0)
        gain.append(direct_auprc(adata, network(adata)) - direct_auprc(adata, effects.X))
    assert min(gain) > 0


def test_network_is_read_from_a_trained_gpovae_without_training():
    from scpert.model import GPOVAE

    adata = scpert.datasets.simulated(n_genes=30, n_targets=5, n_combinations=0, cells_per_perturbation=30)
    size = {"n_latent": 4, "n_hidden": 16}
    trained = scpert.tl.infer_grn(adata, method="gpovae", max_epochs=2, threshold=0, copy=True, **size)
    data = adata.copy()
    GPOVAE.setup_anndata(data)
    model = GPOVAE(data, random_state=0, **size)
    model.train(2, random_state=0)
    scpert.tl.infer_grn(adata, method="gpovae", model=model, threshold=0)
    np.testing.assert_allclose(network(adata), network(trained), rtol=1e-5)
    assert adata.uns["grn"]["method"] == "gpovae"
    with pytest.raises(ScpertError, match="max_epochs"):
        scpert.tl.infer_grn(adata, method="gpovae", model=model, max_epochs=3)
    GPOVAE.setup_anndata(part := data[:, :20].copy())
    small = GPOVAE(part, **size)
    with pytest.raises(scpert.errors.NotTrainedError):
        scpert.tl.infer_grn(adata, method="gpovae", model=small)
    small.train(1)
    with pytest.raises(ScpertError, match="not trained on"):
        scpert.tl.infer_grn(adata, method="gpovae", model=small)


def test_unmeasured_regulators_of_a_model_follow_all_measured_ones():
    """Also those without an edge in the model's network: in a screen of activation nothing is turned round."""
    adata = knock_down_and_raise()
    raised = targets(adata)[-1]
    adata = adata[adata.obs["perturbation"].isin(["control", raised, targets(adata)[0]])].copy()
    adata = adata[:, adata.var_names != targets(adata)[0]].copy()  # an enhancer, say
    enhancer, gene = targets(adata)[0], next(g for g in adata.var_names if g != raised)
    net = pd.DataFrame({"source": [enhancer], "target": [gene], "weight": [2.0]})
    model = type("Reader", (), {"grn_sign": "perturbation", "get_grn": lambda self: net})()
    scpert.tl.infer_grn(adata, model=model)
    assert scpert.get.grn_df(adata, unmeasured=True)["weight"].item() == 2.0


def test_network_of_a_linear_model_is_taken_as_it_is(tmp_path):
    from scpert.model import LinearGRN

    adata = scpert.datasets.simulated(n_genes=40, n_targets=8, n_combinations=0, cells_per_perturbation=40)
    LinearGRN.setup_anndata(adata)
    model = LinearGRN(adata)
    model.train()
    own = model.get_grn()
    own = own[own["source"] != own["target"]]
    scpert.tl.infer_grn(adata, model=model)
    found = scpert.get.grn_df(adata)
    assert adata.uns["grn"]["method"] == "model LinearGRN" and len(own)
    pd.testing.assert_series_equal(
        found.set_index(["source", "target"])["weight"].sort_index(),
        own.set_index(["source", "target"])["weight"].sort_index(),
        rtol=1e-5,
        check_dtype=False,
    )
    round_trip(adata, tmp_path)


# ---------------------------------------------------------------------------------------------- real data


DATA = os.environ.get("SCPERT_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="SCPERT_TEST_DATA is not set")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_dream4_above_the_z_score(number):
    adata = ad.read_h5ad(Path(DATA) / f"dream4_size100_{number}.h5ad")
    net = pd.read_csv(Path(DATA) / "truth" / f"dream4_size100_{number}_truth.csv.gz")
    adata = adata[adata.obs["type"].isin(["wild type", "knockout", "knockdown", "multifactorial"])].copy()
    scpert.tl.infer_grn(adata, method="sparse_inverse", observational="multifactorial", threshold=0)
    edge = np.zeros((100, 100), dtype=bool)
    edge[adata.var_names.get_indexer(net["source"]), adata.var_names.get_indexer(net["target"])] = True
    off = ~np.eye(100, dtype=bool)
    knockouts = adata[adata.obs["type"] == "knockout"]
    order = pd.Index(knockouts.obs["perturbation"].astype(str)).get_indexer(adata.var_names)
    values = np.asarray(knockouts.X, dtype=float)[order]
    z = np.abs(values - np.median(values, axis=0)) / values.std(axis=0)
    ours = average_precision_score(edge[off], np.abs(adata.varp["grn"].toarray())[off])
    assert ours > average_precision_score(edge[off], z[off])


@pytest.mark.skipif(not DATA, reason="SCPERT_TEST_DATA is not set")
def test_known_biology_of_enhancers():
    adata = ad.read_h5ad(Path(DATA) / "schraivogel2020_k562_tapseq_crispat.h5ad")
    scpert.tl.infer_grn(adata)
    net = scpert.get.grn_df(adata, unmeasured=True)
    edges = set(map(tuple, net[["source", "target"]].to_numpy()))
    assert {("GATA1_enh", "GATA1"), ("HS2_enh", "HBE1"), ("MYC_enh", "MYC"), ("ZFPM2_enh", "ZFPM2")} <= edges


@pytest.mark.skipif(not DATA, reason="SCPERT_TEST_DATA is not set")
@pytest.mark.parametrize("method", ["interventional", "sparse_inverse", "ridge", "correlation", "boosting"])
@pytest.mark.parametrize(
    "file", ["schraivogel2020_k562_tapseq_crispat.h5ad", "norman2019_k562_crispra_perturbench.h5ad"]
)
def test_real_screens(file, method, tmp_path):
    """Every method on a targeted CRISPRi panel and on a CRISPRa screen: regulators, signs and files."""
    adata = ad.read_h5ad(Path(DATA) / file)
    rng = np.random.default_rng(0)
    adata = adata[np.sort(rng.permutation(adata.n_obs)[:4000])].copy()
    if method == "boosting" and adata.n_vars > 100:
        adata = adata[:, adata.var_names.isin(targets(adata)) | (np.arange(adata.n_vars) < 20)].copy()
    size = "library_size" if "library_size" in adata.obs else None
    options = {"n_estimators": 20, "max_cells": 500} if method == "boosting" else {}
    scpert.tl.infer_grn(adata, method=method, library_size_key=size, **options)
    net = scpert.get.grn_df(adata, unmeasured=True)
    assert len(net) and set(net["source"]) <= set(targets(adata))
    assert not (net["source"] == net["target"]).any() and np.isfinite(net["weight"]).all()
    round_trip(adata, tmp_path)
    if method == "interventional":  # the sign by hand: cells of the perturbation against controls
        effects = scpert.tl.perturbation_effects(adata, library_size_key=size)
        raises = "norman" in file
        for source, target, weight in net[["source", "target", "weight"]].head(5).to_numpy():
            shift = effects[source, target].X.item()
            assert np.sign(weight) == (np.sign(shift) if raises else -np.sign(shift))
