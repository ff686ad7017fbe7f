"""Laws of the factored family: divergences, K-hop sums, expected logs, presets, recovery."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

import scpert
from scpert.data._effects import Effects
from scpert.errors import ScpertError
from scpert.model import CPAVAE, CRADLEVAE, GPOVAE, SAMSVAE
from scpert.model._factored import signed_evidence
from scpert.model._gpovae import knowledge_share
from scpert.nn._layers import SplitLinear
from scpert.nn._stats import (
    ExpectedLog1p,
    bernoulli_kl,
    k_hop,
    k_hop_scale,
    nb_log_prob,
    normal_kl,
    normal_kl_pair,
    straight_through_bernoulli,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_divergences_equal_torch(generator):
    loc, scale = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    q = torch.distributions.Normal(loc, scale.exp())
    p = torch.distributions.Normal(torch.zeros(50), torch.full((50,), 0.7))
    torch.testing.assert_close(normal_kl(loc, scale, 0.7), torch.distributions.kl_divergence(q, p))
    loc2, scale2 = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    other = torch.distributions.Normal(loc2, scale2.exp())
    torch.testing.assert_close(normal_kl_pair(loc, scale, loc2, scale2), torch.distributions.kl_divergence(q, other))
    logits = 3 * torch.randn(50, generator=generator)
    torch.testing.assert_close(
        bernoulli_kl(logits, 0.3),
        torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=logits), torch.distributions.Bernoulli(torch.full((50,), 0.3))
        ),
    )
    assert (normal_kl(loc, scale) >= 0).all() and (bernoulli_kl(logits, 0.3) >= -1e-6).all()


def test_negative_binomial_equals_scipy():
    rng = np.random.default_rng(0)
    mean, theta = rng.gamma(2, 3, (20, 5)), rng.gamma(2, 1, 5)
    x = rng.poisson(mean)
    ours = nb_log_prob(torch.tensor(x).double(), torch.tensor(np.log(mean)), torch.tensor(np.log(theta)))
    np.testing.assert_allclose(ours.numpy(), stats.nbinom.logpmf(x, theta, theta / (theta + mean)).sum(1), rtol=1e-8)


def test_straight_through_mask_is_binary_and_has_the_right_mean():
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat(20000, 1).requires_grad_()
    draw = straight_through_bernoulli(logits)
    assert set(np.unique(draw.detach().numpy().round(6))) <= {0.0, 1.0}
    np.testing.assert_allclose(draw.mean(0).detach(), torch.sigmoid(logits[0]).detach(), atol=0.015)
    draw.sum().backward()
    assert (logits.grad > 0).all()


def _square(n_targets=6, n_genes=9, seed=0, sign=False):
    rng = np.random.default_rng(seed)
    A = rng.uniform(0, 1, (n_targets, n_genes)) * (rng.random((n_targets, n_genes)) < 0.5)
    if sign:
        A *= rng.choice([-1, 1], A.shape)
    return torch.tensor(A), torch.arange(n_targets)


def test_k_hop_equals_matrix_powers_and_converges():
    A, columns = _square(sign=True)
    square = A[:, columns]
    scale = k_hop_scale(square) / 0.5
    dense = A.numpy()
    step = dense[:, :6] / float(scale)
    wanted = sum(np.linalg.matrix_power(step, k) @ dense for k in range(4))
    np.testing.assert_allclose(k_hop(A, A, square, columns, 3, scale).numpy(), wanted, rtol=1e-10)
    assert np.abs(np.linalg.eigvals(step)).max() < 0.5 + 1e-9
    limit = np.linalg.solve(np.eye(6) - step, dense)
    np.testing.assert_allclose(k_hop(A, A, square, columns, 60, scale).numpy(), limit, rtol=1e-9)


def test_k_hop_is_monotone_in_every_edge():
    A, columns = _square()
    scale = k_hop_scale(A[:, columns]) / 0.5
    before = k_hop(A, A, A[:, columns], columns, 5, scale)
    for i, j in [(0, 3), (2, 8), (5, 1)]:
        more = A.clone()
        more[i, j] += 0.2
        after = k_hop(more, more, more[:, columns], columns, 5, scale)
        assert (after >= before - 1e-12).all() and after[i, j] > before[i, j]


def test_split_linear_equals_one_linear_layer():
    torch.manual_seed(0)
    layer = SplitLinear([3, 4, 0], 5)
    a, rows, index = torch.randn(7, 3), torch.randn(2, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    weight = torch.cat([layer.parts[0].weight, layer.parts[1].weight], dim=1)
    wanted = torch.cat([a, rows[index]], dim=1) @ weight.T + layer.bias
    torch.testing.assert_close(layer(a, (rows, index), None), wanted)


def test_expected_log1p_equals_sampling():
    theta, library = np.array([0.3, 2.0, 50.0]), np.full(50, 3000.0)
    expected = ExpectedLog1p(theta, library)
    rho = np.array([2e-4, 3e-3, 0.05])
    rng = np.random.default_rng(0)
    draws = rng.negative_binomial(theta, theta / (theta + 3000 * rho), (400_000, 3))
    wanted = np.log1p(draws / 3000 * 1e4).mean(0)
    ours = expected(torch.tensor(np.log(rho))[None].float()).numpy()[0]
    np.testing.assert_allclose(ours, wanted, rtol=0.02)
    np.testing.assert_allclose(np.exp(expected.inverse(ours)), rho, rtol=1e-3)
    assert (np.diff(expected.table, axis=1) >= -1e-6).all()


def test_signed_evidence_finds_the_effects_and_their_signs():
    rng = np.random.default_rng(0)
    truth = np.zeros((20, 200))
    truth[:, :10] = rng.choice([-1, 1], (20, 10)) * 6
    z = truth + rng.standard_normal(truth.shape)
    evidence, _ = signed_evidence(z, np.ones_like(z))
    assert (np.sign(evidence[:, :10]) == np.sign(truth[:, :10])).mean() > 0.99
    assert np.abs(evidence[:, :10]).mean() > 0.9 and np.abs(evidence[:, 10:]).mean() < 0.05
    none, _ = signed_evidence(rng.standard_normal((20, 200)), np.ones((20, 200)))
    assert np.abs(none).mean() < 0.05
    unknown, _ = signed_evidence(np.ones((2, 3)), np.full((2, 3), np.nan))
    assert (unknown == 0).all()


def test_global_terms_sum_to_every_kl_once(small_screen):
    """Over all cells, the per-cell share of the rows' KL is each row's KL exactly once."""
    GPOVAE.setup_anndata(small_screen)
    model = GPOVAE(small_screen, n_latent=3, n_hidden=8)
    model.train(max_epochs=1)
    m = model.module.train()
    codes = model._codes([scpert.data.parse(x) for x in small_screen.obs["perturbation"]])
    targets = m.distinct(codes)
    kl = torch.rand(len(targets.rows))
    shares = targets.add_up(kl / m.cells_per_target[targets.rows])[targets.which]
    torch.testing.assert_close(shares.sum(), kl.sum(), rtol=1e-5, atol=1e-5)


def test_presets_nest():
    """Without a mask SAMS-VAE's module is CPA-VAE's; without quality CRADLE-VAE's is SAMS-VAE's."""
    adata = scpert.datasets.simulated(n_cells=240, n_genes=12, n_targets=4)

    def parameters(cls, **options):
        cls.setup_anndata(adata)
        return {k: tuple(v.shape) for k, v in cls(adata, n_latent=3, n_hidden=8, **options).module.named_parameters()}

    sams, cpa, cradle = parameters(SAMSVAE), parameters(CPAVAE), parameters(CRADLEVAE)
    assert set(sams) - set(cpa) == {"mask_logits"} and set(cpa) <= set(sams)
    assert cradle == sams
    adata.obs["bad"] = np.arange(240) % 5 == 0
    CRADLEVAE.setup_anndata(adata, quality_key="bad")
    full = {k for k, _ in CRADLEVAE(adata, n_latent=3, n_hidden=8).module.named_parameters()}
    assert full - set(sams) == {"quality_loc", "quality_log_scale", "encoder.first.parts.2.weight"}


@pytest.mark.parametrize("options", [{}, {"published": True, "n_particles": 2}])
def test_gpovae_faces_train(options, small_screen):
    scpert.pp.match_controls(small_screen, method="random")
    GPOVAE.setup_anndata(
        small_screen, split_key="split", quality_key="quality_fail", matched_control_key="matched_control"
    )
    model = GPOVAE(small_screen, n_latent=4, n_hidden=8, **options)
    model.train(max_epochs=3, batch_size=64)
    names = {"grn_train", "sparsity_train", "counterfactual_train", "elbo_validation"}
    assert names <= set(model.history)
    net = model.get_grn(threshold=0.0)
    assert list(net.columns[:3]) == ["source", "target", "weight"]
    assert not (net["source"] == net["target"]).any()
    assert set(net["target"]) <= set(small_screen.var_names)


def test_unknown_options_and_wrong_numbers(small_screen):
    GPOVAE.setup_anndata(small_screen)
    with pytest.raises(ScpertError, match="mask_prior=2"):
        GPOVAE(small_screen, mask_prior=2)
    with pytest.raises(ScpertError, match="n_hops=-1"):
        GPOVAE(small_screen, n_hops=-1)
    with pytest.raises(TypeError):
        GPOVAE(small_screen, n_latents=3)
    with pytest.raises(ScpertError, match="mask_prior=0: give a probability"):
        GPOVAE(small_screen, mask_prior=0)
    wrong = {"n_hops": 1.5, "n_hidden": 8.5, "n_latent": 0, "n_hidden_basal": 0, "n_particles": 0, "effect_scale": 0}
    for name, value in wrong.items():
        with pytest.raises(ScpertError, match=f"{name}={value}"):
            GPOVAE(small_screen, **{name: value})
    assert GPOVAE(small_screen, n_latent=3, n_hidden=8, n_hops=0).module.n_hops == 0


def confounded(seed: int = 0):
    """A screen in two batches that differ in half of the genes; half of the perturbations are mostly in one of them."""
    adata = scpert.datasets.simulated(
        n_genes=60, n_targets=8, n_combinations=0, cells_per_perturbation=80, random_state=seed
    )
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    rng = np.random.default_rng(seed)
    share = {t: 0.9 if i < 4 else 0.1 for i, t in enumerate(sorted(set(labels) - {"control"}))}
    second = rng.random(adata.n_obs) < np.array([share.get(x, 0.5) for x in labels])
    counts = adata.X.toarray().astype(int)
    counts[second] = rng.binomial(counts[second], np.where(np.arange(adata.n_vars) < 30, 1.0, 0.4))
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    adata.obs["batch"] = np.where(second, "b2", "b1")
    return adata


def test_evidence_compares_cells_within_the_strata_of_the_covariates():
    """A batch effect that is confounded with perturbations is no edge where the batch is a covariate."""
    adata = confounded()
    truth = adata.uns["truth"]["effects"]
    real = set(zip(truth["source"], truth["target"], strict=True))
    false = []
    for keys in (None, "batch"):
        GPOVAE.setup_anndata(adata, covariate_keys=keys)
        model = GPOVAE(adata, n_latent=4, n_hidden=16)
        model.train(max_epochs=10)
        net = model.get_grn()
        false.append(sum(pair not in real for pair in zip(net["source"], net["target"], strict=True)))
    assert false[1] < 0.2 * false[0]
    within = scpert.tl.perturbation_effects(adata, covariate_keys="batch")[list(model.effects_.labels)]
    np.testing.assert_allclose(model.effects_.delta, within.X, atol=1e-5)
    np.testing.assert_allclose(model.effects_.std_error, within.layers["std_error"], rtol=1e-4)


def test_a_stratum_without_controls_is_refused():
    adata = confounded()
    first = sorted(set(adata.obs["perturbation"]) - {"control"})[0]
    adata.obs["donor"] = np.where(adata.obs["perturbation"] == first, "d2", "d1")
    GPOVAE.setup_anndata(adata, covariate_keys="donor")
    with pytest.raises(ScpertError, match="fewer than two control cells: 'd2'"):
        GPOVAE(adata, n_latent=3, n_hidden=8).train(max_epochs=1)


def test_effects_within_strata_where_validation_cells_are_few():
    """Strata without two controls are left out, and perturbations that are only there with them."""
    adata = confounded()
    screen = scpert.data.Screen(adata)
    strata = (adata.obs["batch"] == "b2").to_numpy().astype(int)
    lost = sorted(set(adata.obs["perturbation"]) - {"control"})[0]
    mask = ~(screen.is_control & (strata == 1)) & ~((screen.labels == lost) & (strata == 0))
    found = Effects.from_screen(screen, mask, strata)
    alone = Effects.from_screen(screen, mask & (strata == 0))
    assert list(found.labels) == list(alone.labels) and lost not in found.labels
    np.testing.assert_allclose(found.delta, alone.delta, atol=1e-6)
    np.testing.assert_allclose(found.std_error, alone.std_error, rtol=1e-5)
    np.testing.assert_allclose(found.control_mean, alone.control_mean, atol=1e-6)
    one = Effects.from_screen(screen, mask, np.zeros(len(strata), dtype=int))  # a single stratum is no stratum
    pooled = Effects.from_screen(screen, mask)
    np.testing.assert_allclose(one.delta, pooled.delta, atol=1e-6)
    np.testing.assert_allclose(one.std_error, pooled.std_error, rtol=1e-5)


def test_gpovae_recovers_effects_and_beats_few_noisy_cells():
    """On simulated screens the prediction is nearer to the true test mean than the training-cell mean is."""
    better = []
    for seed in range(3):
        adata = scpert.datasets.simulated(
            n_cells=900, n_genes=60, n_targets=10, n_combinations=0, platform="targeted", random_state=seed
        )
        scpert.pp.split(adata, kind="cells", fractions=(0.4, 0.1, 0.5), random_state=seed)
        GPOVAE.setup_anndata(adata, split_key="split")
        model = GPOVAE(adata, n_latent=8, n_hidden=32)
        model.train(max_epochs=15, batch_size=64)
        test = scpert.data.Screen(adata).moments(mask=(adata.obs["split"] == "test").to_numpy())
        row = {g: i for i, g in enumerate(test.groups)}
        truth = np.stack([test.mean[row[x]] - test.mean[row["control"]] for x in model.effects_.labels])
        ours = model.predict_perturbation(list(model.effects_.labels)).layers["delta"]
        better.append(((model.effects_.delta - truth) ** 2).mean() - ((ours - truth) ** 2).mean())
    assert np.mean(better) > 0


def test_unseen_targets_need_knowledge_and_use_it():
    """Effects shared within modules: the rows of a held-out gene come from its module; without knowledge it is refused."""
    adata = scpert.datasets.simulated(
        n_cells=2400,
        n_genes=80,
        n_targets=30,
        n_combinations=0,
        n_modules=3,
        n_regulators=36,
        mean_out_degree=10,
        effect_size=1.5,
        platform="targeted",
        random_state=0,
    )
    knowledge = {"modules": adata.uns["truth"]["annotations"]}
    held = sorted(set(adata.obs["perturbation"]) - {"control"})[::4]
    adata.obs["split"] = np.where(adata.obs["perturbation"].isin(held), "test", "train")
    GPOVAE.setup_anndata(adata, split_key="split")
    plain = GPOVAE(adata, n_latent=4, n_hidden=16)
    plain.train(max_epochs=4, batch_size=64)
    assert plain.scope == "combinations"
    with pytest.raises(scpert.errors.UnknownTargetError, match="cannot predict"):
        plain.predict_perturbation(held[0])
    model = GPOVAE(adata, n_latent=4, n_hidden=16, knowledge=knowledge)
    model.train(max_epochs=4, batch_size=64)
    out = model.predict_perturbation(held)
    assert set(out.obs["status"]) == {"unseen"} and model.scope == "unseen"
    moments = scpert.data.Screen(adata).moments()
    row = {g: i for i, g in enumerate(moments.groups)}
    truth = np.stack([moments.mean[row[x]] - moments.mean[row["control"]] for x in held])
    mean = np.tile(model.effects_.mean, (len(held), 1))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(out.layers["delta"], truth, strict=True)]
    base = [np.corrcoef(a, b)[0, 1] for a, b in zip(mean, truth, strict=True)]
    assert np.mean(r) > np.mean(base) + 0.05  # followed, not just the mean

    # the network of genes that were never perturbed: by knowledge, on request, and nearer to the truth than the mean row
    assert not model.get_grn(threshold=0.0)["inferred"].any()
    net = model.get_grn(threshold=0.0, regulators=[held[0], model.effects_.labels[0]])
    assert net.groupby("source")["inferred"].agg(["min", "max"]).loc[held[0]].all() and not net["inferred"].all()
    assert net["probability"].between(0, 1).all() and (net["std"] > 0).all()
    with pytest.raises(scpert.errors.UnknownTargetError, match="never perturbed, and knowledge= says nothing"):
        model.get_grn(regulators=["NOSUCHGENE"])
    with pytest.raises(scpert.errors.UnknownTargetError, match="never perturbed"):
        plain.get_grn(regulators=held[:1])
    seen = adata[adata.obs["split"] == "train"].copy()
    for regulators in (held, [*held, *model.effects_.labels]):
        scpert.tl.infer_grn(seen, method="gpovae", model=model, regulators=regulators, threshold=0)
        found = scpert.get.grn_df(seen)
        assert set(found["source"]) == set(regulators)
    weight = found.pivot(index="source", columns="target", values="weight").reindex(columns=seen.var_names).fillna(0)
    under = -truth  # a knock-down: signs follow the activity
    r = [np.corrcoef(weight.loc[x], row)[0, 1] for x, row in zip(held, under, strict=True)]
    assert np.mean(r) > 0.2
    scpert.tl.infer_grn(seen, method="gpovae", model=plain, regulators=[held[0], model.effects_.labels[0]], threshold=0)
    assert held[0] not in set(scpert.get.grn_df(seen)["source"])


def test_explain_and_iwelbo(small_screen):
    GPOVAE.setup_anndata(small_screen, split_key="split")
    model = GPOVAE(small_screen, n_latent=4, n_hidden=8)
    model.train(max_epochs=3, batch_size=64)
    label = model.effects_.labels[0]
    paths = model.explain(label, n_edges=10)
    assert list(paths.columns) == ["hop", "source", "target", "weight"]
    assert set(paths.loc[paths["hop"] == 0, "source"]) <= set(label.split("+"))
    few, many = (model.get_iwelbo(split="test", n_samples=n) for n in (1, 50))
    assert few < many < 0  # the bound tightens with the number of draws
    with pytest.raises(
        scpert.errors.UnknownTargetError, match="not trained on 'NOSUCHGENE'.*Name targets such as"
    ) as caught:
        model.explain("NOSUCHGENE")
    assert "on_unknown" not in str(caught.value)  # which explain() does not have
    with pytest.raises(scpert.errors.LabelError, match="is the control"):
        model.explain("control")


def test_knowledge_is_followed_only_where_it_predicts_held_out_targets():
    rng = np.random.default_rng(0)
    own = rng.standard_normal((30, 50))
    measured = 1.0 + own + 0.3 * rng.standard_normal(own.shape)
    mean = np.ones_like(measured)
    assert 0.4 < knowledge_share(2 * own, mean, measured) < 0.6  # twice too large: half is followed
    assert knowledge_share(own, mean, measured) > 0.9
    assert knowledge_share(-own, mean, measured) == 0
    assert knowledge_share(np.zeros_like(own), mean, measured) == 0
    noise = [knowledge_share(rng.standard_normal(own.shape), mean, measured) for _ in range(40)]
    assert np.mean(np.asarray(noise) > 0) < 0.25 and np.max(noise) < 0.1


def test_knowledge_that_says_nothing_leaves_the_mean(caplog):
    adata = scpert.datasets.simulated(n_cells=600, n_genes=40, n_targets=10, n_combinations=0, random_state=1)
    held = sorted(set(adata.obs["perturbation"]) - {"control"})[:2]
    adata.obs["split"] = np.where(adata.obs["perturbation"].isin(held), "test", "train")
    GPOVAE.setup_anndata(adata, split_key="split")
    go = scpert.data.Screen(adata).genes
    model = GPOVAE(adata, n_latent=3, n_hidden=8, knowledge={"all": pd.DataFrame({"gene": go, "term": "one"})})
    model.train(max_epochs=1)
    with caplog.at_level("INFO", logger="scpert"):
        out = model.predict_perturbation(held)
    assert "no better than the mean" in caplog.text
    mean = np.tile(np.maximum(model.reference_.mean + model.effects_.mean, 0), (2, 1))
    own = out.var_names.get_indexer(held)
    rest = np.ones(mean.shape, dtype=bool)
    rest[[0, 1], own] = False
    np.testing.assert_allclose(out[held].X[rest], mean[rest], rtol=1e-4, atol=1e-5)
    constant, slope, _ = model.effects_.own_rule  # but for the own gene, which every perturbation moves
    wanted = constant + slope * model.effects_.control_mean[own]
    assert (wanted < -0.1).all()
    np.testing.assert_allclose(out[held].layers["delta"][[0, 1], own], wanted, rtol=1e-4)
    pair = model.predict_perturbation("+".join(held)).layers["delta"][0]  # one mean, not two
    np.testing.assert_allclose(np.delete(pair, own), np.delete(model.effects_.mean, own), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pair[own], wanted, rtol=1e-4)
    assert model.get_grn(threshold=0.0, regulators=held).empty and "get no edges" in caplog.text


def test_knowledge_is_judged_beside_the_mean_that_it_would_replace(monkeypatch):
    """The mean effect is that of all perturbations: that of the singles alone is easier to beat where doubles are strong."""
    import scpert.model._gpovae as module

    adata = scpert.datasets.simulated(n_cells=1500, n_genes=40, n_targets=10, n_combinations=12, random_state=3)
    GPOVAE.setup_anndata(adata)
    model = GPOVAE(adata, n_latent=3, n_hidden=8, knowledge={"truth": adata.uns["truth"]["annotations"]})
    model.train(max_epochs=1)
    seen = {}

    def share(deviation, mean, measured):
        seen.update(mean=mean, measured=measured)
        return 0.0

    monkeypatch.setattr(module, "knowledge_share", share)
    assert model._rows_from_knowledge[2] == 0
    effects = model.effects_
    singles = [t for t in model.targets_ if t in effects.singles]
    assert len(singles) < len(effects.labels)
    for fold in np.array_split(np.random.default_rng(0).permutation(len(singles)), 5):
        left = {singles[i] for i in fold}
        rest = [i for i, label in enumerate(effects.labels) if not left & set(label.split("+"))]
        assert any("+" in effects.labels[i] for i in rest)
        np.testing.assert_allclose(
            seen["mean"][fold], np.tile(effects.delta[rest].mean(axis=0), (len(fold), 1)), rtol=1e-5
        )


def test_knowledge_of_other_genes_covers_nothing(caplog):
    """A table that knows no training target says nothing of any other: one warning, and its genes are refused."""
    adata = scpert.datasets.simulated(n_cells=600, n_genes=40, n_targets=10, n_combinations=0, random_state=1)
    GPOVAE.setup_anndata(adata)
    strange = pd.DataFrame({"source": ["X1", "X2"], "target": ["Y1", "Y2"]})
    model = GPOVAE(adata, n_latent=3, n_hidden=8, knowledge={"other": strange})
    assert bool(model.coverage("X1")["predictable"].iloc[0])  # before training nothing speaks against it
    with caplog.at_level("WARNING", logger="scpert"):
        model.train(max_epochs=1)
        with pytest.raises(scpert.errors.UnknownTargetError, match="does not know 'X1'"):
            model.predict_perturbation("X1")
    assert caplog.text.count("it is ignored") == 1
    assert not bool(model.coverage("X1")["predictable"].iloc[0])


@pytest.mark.parametrize("name", ["k562", "rpe1", "adamson"])
def test_published_hyperparameters_are_arguments(name, small_screen):
    GPOVAE.setup_anndata(small_screen)
    model = GPOVAE(small_screen, **GPOVAE.PUBLISHED[name])
    wanted = GPOVAE.PUBLISHED[name]
    m = model.module
    assert m.published and m.n_particles == 5 and m.n_hops == 5 and m.mask_prior == 0.3
    assert m.n_latent == wanted["n_latent"] and m.sparsity_weight == wanted["sparsity_weight"]
    assert m.fold_change_threshold == {"k562": 0.8, "rpe1": 0.5, "adamson": 0.4}[name]
    assert m.encoder_head.in_features == {"k562": 200, "rpe1": 200, "adamson": 400}[name]
    assert m.decoder_head.in_features == 400


def test_quality_ratio(small_screen):
    """Thresholds by hand; wider is laxer; a decoder that halves the counts fails more often; held-out cells only."""
    CRADLEVAE.setup_anndata(small_screen, split_key="split", quality_key="quality_fail")
    model = CRADLEVAE(small_screen, n_latent=3, n_hidden=8)
    model.train(max_epochs=2, batch_size=64)
    options = {"criteria": ["counts_low", "genes_low"], "n_cells": 1000}
    table = model.get_quality_ratio(n_mads=(1, 3, 5), **options)
    assert list(table.columns) == ["real", "generated", "generated_failed"]
    assert table.stack().between(0, 1).all() and (np.diff(table, axis=0) >= 0).all()
    test = small_screen[(small_screen.obs["split"] == "test").to_numpy()]
    trained = test.obs["perturbation"].isin([*model.effects_.labels, "control"]).to_numpy()
    test = test[trained]
    counts = np.asarray(test.X.toarray())
    good = ~test.obs["quality_fail"].to_numpy()
    passes = np.ones(len(counts), dtype=bool)
    for x in (counts.sum(1), (counts > 0).sum(1)):
        median = np.median(x[good])
        passes &= x >= median - 3 * np.median(np.abs(x[good] - median))
    assert table.loc[3, "real"] == pytest.approx(passes.mean())
    model.module.decoder_head.bias.data[: small_screen.n_vars // 2] -= 20  # half of the genes are never drawn
    assert model.get_quality_ratio(n_mads=(1, 3, 5), **options).loc[3, "generated"] < table.loc[3, "generated"]
    with pytest.raises(ScpertError, match="not known"):
        model.get_quality_ratio(split="tests")
    with pytest.raises(ScpertError, match="not known"):
        model.get_quality_ratio(criteria=["doublet"])
    CRADLEVAE.setup_anndata(small_screen)
    free = CRADLEVAE(small_screen, n_latent=3, n_hidden=8)
    free.train(max_epochs=1)
    with pytest.raises(ScpertError, match="no split_key"):
        free.get_quality_ratio()
    assert free.get_iwelbo(split="train", n_samples=2) < 0


def test_matched_controls_are_controls_and_counts_are_whole(small_screen):
    adata = small_screen
    adata.obs["matched"] = adata.obs_names[adata.obs["perturbation"] != "control"][0]
    with pytest.raises(ScpertError, match="cells that are perturbed"):
        GPOVAE.setup_anndata(adata, matched_control_key="matched")
    GPOVAE.setup_anndata(adata, split_key="split")
    model = GPOVAE(adata, n_latent=2, n_hidden=4)
    model.train(max_epochs=1)
    for call in (
        lambda: model.get_iwelbo(n_samples=0),
        lambda: model.get_iwelbo(batch_size=2.5),
        lambda: model.explain(model.targets_[0], n_edges=2.5),
        lambda: GPOVAE(adata, fold_change_threshold="a"),
    ):
        with pytest.raises(ScpertError, match="give a"):
            call()


def test_standard_deviation_of_a_combination_is_that_of_its_singles():
    adata = scpert.datasets.simulated(n_genes=30, n_targets=4, n_combinations=0, cells_per_perturbation=40)
    scpert.model.SAMSVAE.setup_anndata(adata)
    model = scpert.model.SAMSVAE(adata, n_latent=4, n_hidden=8)
    model.train(max_epochs=1)
    a, b = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})[:2]
    std = model.predict_perturbation([a, b, f"{a}+{b}"]).layers["std"]
    np.testing.assert_allclose(std[2], np.hypot(std[0], std[1]), rtol=1e-5)


def test_failed_cells_do_not_come_back_as_effects():
    """Failed cells bear an artefact and are common under one perturbation: with quality control it is no effect of it."""
    adata = scpert.datasets.simulated(n_cells=3000, n_genes=60, n_targets=6, n_combinations=0, random_state=2)
    rng = np.random.default_rng(0)
    label = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})[0]
    failed = rng.random(adata.n_obs) < np.where(adata.obs["perturbation"] == label, 0.6, 0.15)
    x = adata.X.toarray()
    true = np.asarray(scpert.tl.perturbation_effects(adata)[label].X).ravel()[30:45].mean()
    x[failed, 30:45] = rng.poisson(x[failed, 30:45] * 4 + 2)
    adata.X = x
    adata.obs["failed"] = failed
    assert np.asarray(scpert.tl.perturbation_effects(adata)[label].X).ravel()[30:45].mean() > true + 0.5
    for model_class in (CRADLEVAE, GPOVAE):
        model_class.setup_anndata(adata, quality_key="failed")
        model = model_class(adata, n_latent=8, n_hidden=24)
        model.train(max_epochs=8)
        passing = scpert.tl.perturbation_effects(adata[~failed].copy())
        np.testing.assert_allclose(model.effects_.delta[model.effects_.row[label]], passing[label].X.ravel(), atol=1e-4)
        assert abs(model.predict_perturbation([label]).layers["delta"].ravel()[30:45].mean() - true) < 0.2
    adata.obs.loc[adata.obs["perturbation"] == label, "failed"] = True
    CRADLEVAE.setup_anndata(adata, quality_key="failed")
    model = CRADLEVAE(adata, n_latent=3, n_hidden=8)
    model.train(max_epochs=1)
    assert label not in model.effects_.labels


def test_standard_deviations_are_never_zero():
    """Where the network has fitted the noise its excess error is estimated as zero, which does not make it exact."""
    adata = scpert.datasets.simulated(n_cells=1500, n_genes=60, n_targets=10, n_combinations=0, random_state=1)
    many = scpert.datasets.simulated(
        n_genes=60, n_targets=10, n_combinations=0, random_state=1, cells_per_perturbation=1500
    )
    GPOVAE.setup_anndata(adata)
    model = GPOVAE(adata, n_latent=8, n_hidden=24)
    model.train(max_epochs=20)
    found = model.predict_perturbation()
    std = found.layers["std"]
    true = scpert.tl.perturbation_effects(many)[found.obs["perturbation"].astype(str)].X
    assert (std > 0).mean() > 0.99
    assert np.mean(np.abs(found.layers["delta"] - true) <= 1.645 * std) > 0.65


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_paths_have_the_sign_of_what_they_do(direction):
    """A chain of two activating edges, knocked down or activated: the path over the middle moves the last gene as it is measured."""
    rng = np.random.default_rng(0)
    effects = {"control": {}, "g0": {0: 1.5, 1: 1.2, 2: 1.0}, "g1": {1: 1.5, 2: 1.3}, "g5": {5: 1.5, 6: -1.2}}
    counts, labels = [], []
    for label, shifts in effects.items():
        n = 400 if label == "control" else 150
        mean = np.full(20, 8.0)
        for gene, shift in shifts.items():
            mean[gene] *= np.exp(direction * shift)
        counts.append(rng.poisson(mean * rng.gamma(10, 0.1, (n, 20))))
        labels += [label] * n
    adata = ad.AnnData(
        sparse.csr_matrix(np.vstack(counts).astype(np.float32)),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(20)]),
    )
    GPOVAE.setup_anndata(adata)
    model = GPOVAE(adata, n_latent=4, n_hidden=16)
    model.train(max_epochs=5)
    table = model.explain("g0", n_edges=1000)
    path = table[(table["hop"] == 1) & (table["source"] == "g1") & (table["target"] == "g2")]["weight"].item()
    assert np.sign(path) == direction and abs(path) > 0.1
    assert (model.module.direction == direction).all()
    assert not (table["source"] == table["target"]).any()
