"""Which cells carry their perturbation: the mixture by library, the truth of a simulation, and the weighted effects."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import average_precision_score, roc_auc_score

import scpert
from scpert.data import Screen
from scpert.tl._effects import effects_of_cells, strata_of
from scpert.tl._grn_carriers import _Mixture, carrier_weights, weighted_effects


def half_penetrant(penetrance: float = 0.5, seed: int = 100, **options) -> ad.AnnData:
    settings = {"n_genes": 100, "n_targets": 20, "cells_per_perturbation": 60, "strength": 0.6, "cycles": True}
    return scpert.datasets.simulated(
        n_combinations=0, penetrance=penetrance, random_state=seed, **{**settings, **options}
    )


def weights_of(adata: ad.AnnData, covariate_keys: str | None = None):
    screen = Screen(adata)
    regulators = sorted(set(screen.perturbations))
    strata, _ = strata_of(adata, covariate_keys)
    position = adata.var_names.get_indexer(regulators)
    return screen, regulators, strata, carrier_weights(screen, regulators, position, strata)


def test_weights_find_the_cells_that_escaped():
    adata = half_penetrant()
    screen, _, _, weights = weights_of(adata)
    cells = ~screen.is_control
    assert np.all(weights[screen.is_control] == 1)
    assert weights[cells].mean() == pytest.approx(adata.obs["perturbed"].to_numpy()[cells].mean(), abs=0.06)
    assert roc_auc_score(adata.obs["perturbed"].to_numpy()[cells], weights[cells]) > 0.75


def test_no_weights_without_evidence_or_counts():
    assert weights_of(half_penetrant(penetrance=1.0))[3] is None  # one common fold change explains the counts as well
    logs = half_penetrant()
    logs.X = logs.X.copy()
    logs.X.data = np.log1p(logs.X.data)
    screen = Screen(logs, scale="log1p")
    regulators = sorted(screen.perturbations)
    position = logs.var_names.get_indexer(regulators)
    assert carrier_weights(screen, regulators, position, np.zeros(screen.n_cells, int)) is None
    counts = Screen(half_penetrant())
    assert carrier_weights(counts, regulators, np.full(len(regulators), -1), np.zeros(counts.n_cells, int)) is None


@pytest.mark.parametrize(("fold", "down"), [(0.2, True), (4.0, False)])
def test_mixture_equals_scipy_and_finds_its_parameters(fold, down):
    rng = np.random.default_rng(0)
    theta, n, share = 2.0, 20_000, 0.6
    expected = rng.uniform(2, 20, n)
    mean = np.where(rng.random(n) < share, fold, 1.0) * expected
    x = rng.negative_binomial(theta, theta / (theta + mean)).astype(float)
    mixture = _Mixture(x, expected, np.zeros(n, int), np.array([theta]), down)
    found, found_fold = mixture.fit(mixed=True)
    assert found[0] == pytest.approx(share, abs=0.05) and found_fold[0] == pytest.approx(fold, rel=0.1)
    p = [stats.nbinom.pmf(x, theta, theta / (theta + k * expected)) for k in (fold, 1.0)]
    wanted = share * p[0] / (share * p[0] + (1 - share) * p[1])
    np.testing.assert_allclose(mixture.posterior(np.array([share]), np.array([fold])), wanted, atol=1e-9)
    both = np.log(share * p[0] + (1 - share) * p[1]).sum() - np.log(p[1]).sum()
    start = mixture.likelihood(None, np.array([1.0]))
    assert mixture.likelihood(np.array([share]), np.array([fold])) - start == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("covariate_keys", [None, "batch"])
def test_weighted_effects_by_hand(covariate_keys):
    adata = half_penetrant(cells_per_perturbation=20, n_genes=40, n_targets=4)
    screen, regulators, strata, _ = weights_of(adata, covariate_keys)
    shift, error, share = weighted_effects(screen, regulators, np.ones(screen.n_cells), strata)
    plain, plain_error, *_ = effects_of_cells(screen, regulators, covariate_keys, cautious=True)
    np.testing.assert_allclose(shift, plain, atol=1e-5)
    np.testing.assert_allclose(error, plain_error, rtol=0.15)  # variance over n
    np.testing.assert_allclose(share, 1.0)
    weight = np.random.default_rng(0).uniform(0.1, 1.0, screen.n_cells)
    weight[screen.is_control] = 1.0
    shift, error, share = weighted_effects(screen, regulators, weight, strata)
    values = screen.rows(np.arange(screen.n_cells)).toarray()
    for i, label in enumerate(regulators):
        mine = screen.labels == label
        control = sum(
            weight[mine & (strata == s)].sum() / weight[mine].sum() * values[screen.is_control & (strata == s)].mean(0)
            for s in np.unique(strata[mine])
        )
        np.testing.assert_allclose(
            shift[i], np.average(values[mine], axis=0, weights=weight[mine]) - control, atol=1e-5
        )
        assert share[i] == pytest.approx(weight[mine].mean())
        if covariate_keys is None:
            spread = np.average(
                (values[mine] - np.average(values[mine], axis=0, weights=weight[mine])) ** 2,
                axis=0,
                weights=weight[mine],
            )
            of_control = values[screen.is_control].var(axis=0, ddof=1)
            n_effective = weight[mine].sum() ** 2 / (weight[mine] ** 2).sum()
            wanted = np.maximum(spread, of_control) * (1 / n_effective + 1 / screen.is_control.sum())
            np.testing.assert_allclose(error[i] ** 2, wanted, rtol=1e-3, atol=1e-9)


def test_batches_are_no_noise_of_weighted_effects(monkeypatch):
    """Errors held the differences between batches, too: genes with strong batch effects lost their edges."""
    adata = half_penetrant(cells_per_perturbation=30, n_genes=40, n_targets=4)
    factor = np.exp(np.random.default_rng(0).normal(0, 1.5, (3, adata.n_vars)))
    adata.obs["batch"] = np.arange(adata.n_obs).astype(float) % 3
    rate = adata.X.toarray() * factor[np.arange(adata.n_obs) % 3]
    adata.X = sparse.csr_matrix(np.random.default_rng(1).poisson(rate).astype(np.float32))
    screen, regulators, strata, _ = weights_of(adata, "batch")
    whole = weighted_effects(screen, regulators, np.ones(screen.n_cells), strata)
    _, expected, *_ = effects_of_cells(screen, regulators, "batch", cautious=True)
    np.testing.assert_allclose(whole[1], expected, rtol=0.1)
    monkeypatch.setattr("scpert.tl._grn_carriers._STRATA_BYTES", 1)  # a regulator at a time
    for a, b in zip(weighted_effects(screen, regulators, np.ones(screen.n_cells), strata), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def direct_auprc(adata: ad.AnnData) -> float:
    net = adata.uns["truth"]["net"]
    regulators = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    truth = sparse.lil_matrix((adata.n_vars, adata.n_vars), dtype=bool)
    for source, target in zip(net["source"], net["target"], strict=True):
        truth[adata.var_names.get_loc(source), adata.var_names.get_loc(target)] = True
    rows = adata.var_names.get_indexer(regulators)
    off = np.ones((len(rows), adata.n_vars), dtype=bool)
    off[np.arange(len(rows)), rows] = False
    score = np.abs(adata.varp["grn"][rows].toarray())
    return float(average_precision_score(truth[rows].toarray()[off], score[off]))


def test_networks_gain_where_cells_escape_and_stay_where_none_does():
    gain = []
    for seed in (100, 101):
        adata = half_penetrant(seed=seed)
        found = []
        for carriers in (True, False):
            scpert.tl.infer_grn(adata, method="sparse_inverse", threshold=0, carriers=carriers)
            found.append(direct_auprc(adata))
        gain.append(found[0] - found[1])
    assert min(gain) > 0.02
    full = half_penetrant(penetrance=1.0)
    scpert.tl.infer_grn(full, method="sparse_inverse", key_added="with")
    scpert.tl.infer_grn(full, method="sparse_inverse", carriers=False, key_added="without")
    assert (full.varp["with"] != full.varp["without"]).nnz == 0


def test_decoded_effects_are_those_of_the_carriers():
    """The network's effect is the mean over all cells: for the carriers it is divided by their share."""
    adata = half_penetrant(n_genes=40, n_targets=6)
    options = {"method": "gpovae", "threshold": 0, "max_epochs": 5, "n_latent": 2, "n_hidden": 8}
    scpert.tl.infer_grn(adata, key_added="with", **options)
    scpert.tl.infer_grn(adata, key_added="without", carriers=False, **options)
    assert (adata.varp["with"] != adata.varp["without"]).nnz > 0
    strength = [np.abs(adata.varp[key].data).mean() for key in ("with", "without")]
    assert strength[0] > strength[1]
