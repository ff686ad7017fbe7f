"""KnowledgeGP against brute force, on tables with and without structure, and with bad kernels."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scpert
from scpert.data._effects import Effects
from scpert.errors import ScpertError, UnknownTargetError
from scpert.model import KnowledgeGP
from scpert.model import _gp as gp
from scpert.model._response import fit_response, limit_widths


def table(n=90, genes=40, n_groups=6, signal=1.0, seed=0) -> tuple[ad.AnnData, pd.DataFrame]:
    """Effects that follow hidden groups, and annotations that name most of them right."""
    rng = np.random.default_rng(seed)
    member = rng.integers(0, n_groups, n)
    X = 0.3 + signal * rng.normal(size=(n_groups, genes))[member] + 0.5 * rng.normal(size=(n, genes))
    labels = [f"p{i}" for i in range(n)]
    adata = ad.AnnData(
        X.astype(np.float32),
        obs=pd.DataFrame({"perturbation": labels}, index=labels),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
    )
    noise = rng.integers(0, 8, n)
    go = pd.DataFrame({"gene": labels * 2, "term": [f"t{m}" for m in member] + [f"n{m}" for m in noise]})
    return adata, go


def fit(adata, **options):
    KnowledgeGP.setup_anndata(adata, scale="effects")
    model = KnowledgeGP(adata, **options)
    model.train()
    return model


@pytest.fixture(scope="module")
def fitted():
    adata, go = table()
    return adata, go, fit(adata[:60].copy(), knowledge={"go": go})


def test_beats_the_mean_on_unseen_and_its_limits_cover(fitted):
    adata, _, model = fitted
    labels = list(adata.obs_names[60:])
    out = model.predict_perturbation(labels)[labels]
    mean = adata.X[:60].mean(axis=0)
    assert ((out.X - adata.X[60:]) ** 2).mean() < 0.6 * ((mean - adata.X[60:]) ** 2).mean()
    assert (out.obs["status"] == "unseen").all()
    inside = (adata.X[60:] >= out.layers["lower"]) & (adata.X[60:] <= out.layers["upper"])
    assert 0.82 < inside.mean() < 0.96
    assert (out.layers["std"] > 0).all()


def test_dual_coefficients_solve_the_kernel_system(fitted):
    adata, _, model = fitted
    names = list(model.singles_)
    kernel = model._process_kernel(model._kernels(names, names))
    scores = (adata[names].X / model.scale_row_[:, None] - model.centre_) @ model.axes_.T
    for k in (0, 3, 20):
        A = kernel + model.noise_component_[k] * np.diag(model.noise_row_)
        np.testing.assert_allclose(model.alpha_[:, k], np.linalg.solve(A, scores[:, k]), atol=1e-6)


def folds_of(model, rows):
    """Folds of a fitted model on other rows of effects."""
    return model._folds(list(model.singles_), rows, np.random.default_rng(0))


@pytest.fixture
def rows(fitted):
    adata, _, model = fitted
    return adata[list(model.singles_)].X / model.scale_row_[:, None]


def test_a_fold_has_not_seen_what_it_holds_out(fitted, rows):
    model = fitted[2]
    folds = folds_of(model, rows)
    assert sorted(np.concatenate([f.test for f in folds])) == list(range(len(rows)))
    changed = rows.copy()
    changed[folds[0].test] += np.random.default_rng(1).normal(size=changed[folds[0].test].shape)
    again = folds_of(model, changed)
    for name in ("centre", "axes", "scores", "among", "across", "near"):
        np.testing.assert_array_equal(getattr(folds[0], name), getattr(again[0], name))
        assert not np.array_equal(getattr(folds[1], name), getattr(again[1], name))  # the others have seen it


def test_held_out_scores_are_those_of_solving_each_fold(fitted, rows):
    model = fitted[2]
    folds = folds_of(model, rows)
    process, average, _ = model._held_out_scores(folds, len(gp._NOISE))
    f = folds[2]
    A, across = np.tensordot(model.theta_, f.among, 1), np.tensordot(model.theta_, f.across, 1)
    for k in (0, 5):
        noisy = A + model.noise_component_[k] * np.diag(f.noise)
        np.testing.assert_allclose(process[2][:, k], across @ np.linalg.solve(noisy, f.scores[:, k]), atol=1e-7)
    S = np.tensordot(model.similarity_weights_, f.near, 1)[4]
    by_hand = sum(s * row for s, row in zip(S, f.scores, strict=True)) / (S.sum() + model.floor_)
    np.testing.assert_allclose(average[2][4], by_hand, atol=1e-10)


@pytest.mark.parametrize("loss", [gp.process_loss, gp.average_loss], ids=["process", "average"])
def test_gradient_of_the_losses(fitted, rows, loss):
    folds = folds_of(fitted[2], rows)
    size = len(folds[0].across) if loss is gp.process_loss else len(folds[0].near) + 1
    at = np.random.default_rng(3).normal(-1, 0.5, size)
    _, gradient = loss(at, folds)
    for i in range(size):
        step = np.zeros(size)
        step[i] = 1e-5
        numeric = (loss(at + step, folds)[0] - loss(at - step, folds)[0]) / 2e-5
        assert numeric == pytest.approx(gradient[i], rel=1e-3, abs=1e-7)


def test_learning_finds_the_informative_kernel(fitted):
    adata, go, _ = fitted
    rng = np.random.default_rng(99)
    junk = pd.DataFrame({"gene": adata.obs_names, "term": [f"x{i}" for i in rng.integers(0, 6, 90)]})
    good = go[go["term"].str.startswith("t")]
    share = fit(adata[:60].copy(), knowledge={"good": good, "junk": junk}).kernel_weights()["share"]
    assert share["good"] > 5 * share["junk"]


def test_a_gene_without_knowledge_has_exactly_the_mean(fitted):
    adata, go, _ = fitted
    model = fit(adata[:60].copy(), knowledge={"go": go[go["gene"] != "p70"]})
    out = model.predict_perturbation(["p61", "p70"], on_unknown="mean")
    np.testing.assert_array_equal(out["p70"].X[0], model.effects_.mean)
    assert list(out.obs["status"]) == ["unseen", "fallback"]
    alone = fit(adata[:60].copy())
    measured = alone.predict_perturbation("g1")
    assert measured.obs["status"].iloc[0] == "fallback"
    np.testing.assert_array_equal(measured.X[0], alone.effects_.mean)


def test_noise_alone_is_not_sold_as_signal():
    adata, go = table(signal=0.0, seed=3)
    out = fit(adata[:60].copy(), knowledge={"go": go}).predict_perturbation(list(adata.obs_names[60:]))
    mean = adata.X[:60].mean(axis=0)
    truth = adata[out.obs_names].X
    assert ((out.X - truth) ** 2).mean() < 1.05 * ((mean - truth) ** 2).mean()


def test_knowledge_that_says_nothing_leaves_exactly_the_mean(fitted):
    adata = fitted[0]
    alike = pd.DataFrame({"gene": adata.obs_names, "term": "one"})
    model = fit(adata[:60].copy(), knowledge={"all": alike})
    out = model.predict_perturbation(list(adata.obs_names[60:]))
    np.testing.assert_allclose(out.X, np.tile(model.effects_.mean, (30, 1)), atol=1e-6)
    assert (out.layers["upper"] > out.X).all()


def test_shuffled_annotations_are_not_worse_than_the_mean():
    adata, go = table(seed=5)
    shuffled = go.assign(gene=np.random.default_rng(0).permutation(go["gene"]))
    out = fit(adata[:60].copy(), knowledge={"go": shuffled}).predict_perturbation(list(adata.obs_names[60:]))
    mean = adata.X[:60].mean(axis=0)
    truth = adata[out.obs_names].X
    assert ((out.X - truth) ** 2).mean() < 1.03 * ((mean - truth) ** 2).mean()


def test_explanation_adds_up_and_names_the_group(fitted):
    _, go, model = fitted
    table_ = model.explain("p65", n_top=None)
    assert table_["share"].sum() == pytest.approx(1.0)
    group = go[go["term"].str.startswith("t")].set_index("gene")["term"]
    top = table_[table_["kernel"] == "go"].head(5)
    assert (group[top["training"]] == group["p65"]).mean() >= 0.8
    with pytest.raises(UnknownTargetError, match="no table of knowledge"):
        model.explain("nothing")


def test_more_perturbations_than_are_learned_on(monkeypatch, fitted):
    adata, go, full = fitted
    monkeypatch.setattr(gp, "MAX_LEARN", 45)
    part = fit(adata[:60].copy(), knowledge={"go": go})
    labels = list(adata.obs_names[60:])
    a, b = full.predict_perturbation(labels).X, part.predict_perturbation(labels).X
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97
    names = list(part.singles_)
    assert len(part.learn_) == 45 < len(names)
    kernel = part._process_kernel(part._kernels(names, names))
    scores = (adata[names].X / part.scale_row_[:, None] - part.centre_) @ part.axes_.T
    assert len(np.unique(part.noise_component_)) <= gp.MAX_LEVELS
    for k, noise in enumerate(part.noise_component_):
        exact = np.linalg.solve(kernel + noise * np.diag(part.noise_row_), scores[:, k])
        np.testing.assert_allclose(part.alpha_[:, k], exact, atol=1e-4 * np.abs(exact).max())


def test_indefinite_one_way_net_and_no_overlap(fitted, caplog):
    adata, go, _ = fitted
    rng = np.random.default_rng(0)
    net = pd.DataFrame(
        {
            "source": rng.choice(adata.obs_names, 200),
            "target": rng.choice(adata.obs_names, 200),
            "weight": rng.normal(size=200),
        }
    )
    other = pd.DataFrame({"source": ["a"], "target": ["b"]})
    with caplog.at_level(logging.WARNING, logger="scpert"):
        model = fit(adata[:60].copy(), knowledge={"net": net, "go": go, "other": other})
    assert "knowledge['other'] knows 0" in caplog.text
    assert np.isfinite(model.predict_perturbation("p65").X).all()
    with pytest.raises(ScpertError, match="rank"):
        fit(adata[:60].copy(), knowledge={"go": go}, rank=0)


def test_combinations_learn_saturation():
    rng = np.random.default_rng(0)
    n, genes = 20, 30
    singles = rng.normal(size=(n, genes))
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)][::4]
    X = np.vstack([singles, [0.6 * (singles[i] + singles[j]) + 0.1 * rng.normal(size=genes) for i, j in pairs]])
    labels = [f"p{i}" for i in range(n)] + [f"p{min(a, b, key=str)}+p{max(a, b, key=str)}" for a, b in pairs]
    adata = ad.AnnData(X.astype(np.float32), obs=pd.DataFrame({"perturbation": labels}, index=labels))
    adata.var_names = [f"g{i}" for i in range(genes)]
    train = np.arange(len(labels)) % 3 != 2
    train[:n] = True
    model = fit(adata[train].copy())
    additive = scpert.model.Additive
    additive.setup_anndata(adata_ := adata[train].copy(), scale="effects")
    plain = additive(adata_)
    plain.train()
    held = adata[~train]
    ours = model.predict_perturbation(list(held.obs_names))
    theirs = plain.predict_perturbation(list(held.obs_names))
    truth = {tuple(sorted(x.split("+"))): row for x, row in zip(held.obs_names, held.X, strict=True)}

    def error(out):
        return np.mean(
            [(truth[tuple(sorted(x.split("+")))] - row) ** 2 for x, row in zip(out.obs_names, out.X, strict=True)]
        )

    assert error(ours) < 0.3 * error(theirs)


def test_what_knock_outs_do_to_their_own_genes_is_not_spread_to_relatives(fitted):
    adata, go, _ = fitted
    train, models = adata[:60].copy(), []
    train.var_names = [f"p{i}" for i in range(train.n_vars)]
    own = np.arange(train.n_vars)
    for shift in (-3.0, -9.0):
        train.X[own, own] = shift
        models.append(fit(train.copy(), knowledge={"go": go}))
    np.testing.assert_allclose(models[1].alpha_, models[0].alpha_, atol=1e-5)
    unseen = [model.predict_perturbation(list(adata.obs_names[60:])).X for model in models]
    np.testing.assert_allclose(unseen[1], unseen[0], atol=0.02)  # the mean has own genes, with the rest of the trust
    assert models[1].predict_perturbation(["p3"]).X[0, 3] == -9.0


def test_own_gene_of_an_unseen_target_moves_as_those_of_trained_ones(fitted):
    adata, go, model = fitted
    train = adata[:60].copy()
    names = [f"p{i}" for i in range(train.n_vars)]
    names[5], names[6] = "p70", "p71"  # measured, and perturbed in no training row
    train.var_names = names
    own = [i for i in range(train.n_vars) if names[i] in set(train.obs_names)]
    rng = np.random.default_rng(0)
    train.X[own, own] = rng.normal(-3.0, 0.2, len(own))
    model = fit(train, knowledge={"go": go})
    out = model.predict_perturbation(["p70", "p71", "p70+p71"])
    wanted = train.X[own, own].mean()
    assert model.trust_ > 0.5
    np.testing.assert_allclose([out["p70"].X[0, 5], out["p71"].X[0, 6]], wanted, rtol=1e-5)
    np.testing.assert_allclose(out["p70"].layers["std"][0, 5], train.X[own, own].std(ddof=1), rtol=1e-4)
    other = out["p71"].X[0, 5]
    assert abs(other) < 1.5
    both = wanted + other - (1 - model.trust_) * model.effects_.mean[5]  # the untrusted part is one mean, not two
    np.testing.assert_allclose(out["p70+p71"].X[0, 5], both, rtol=1e-5)
    mixed = go.assign(term=np.random.default_rng(2).permutation(go["term"]))  # knowledge that says nothing
    blind = fit(train, knowledge={"go": mixed})
    assert blind.trust_ < 0.5
    np.testing.assert_allclose(blind.predict_perturbation("p70").X[0, 5], wanted, rtol=1e-5)
    stranger = model.predict_perturbation(["p70", "nobody"], on_unknown="mean")
    np.testing.assert_allclose(stranger["nobody"].X[0], model.effects_.mean, rtol=1e-6)


@pytest.mark.parametrize("how", ["constant", "share", "noise", "few"])
def test_rule_of_own_genes(how):
    rng = np.random.default_rng(1)
    n = 2 if how == "few" else 12
    genes = [f"g{i}" for i in range(20)]
    level = rng.uniform(0.2, 4.0, 20).astype(np.float32)
    delta = rng.normal(0, 0.1, (n, 20)).astype(np.float32)
    at = np.arange(n)
    own = {"constant": -1.5 + 0 * level, "share": -0.8 * level, "few": -0.8 * level, "noise": 0 * level}[how][:n]
    delta[at, at] += own
    labels = np.array(genes[:n], dtype=object)
    rule = Effects(labels, delta, np.full_like(delta, np.nan), np.ones(n), level, genes, "control").own_rule
    if how in ("noise", "few"):
        assert rule is None
        return
    shift = delta[at, at].astype(float)
    if how == "constant":
        wanted = (shift.mean(), 0.0, shift.std(ddof=1))
    else:
        share = np.linalg.lstsq(level[:n, None].astype(float), shift, rcond=None)[0][0]
        wanted = (0.0, share, np.sqrt(((shift - share * level[:n]) ** 2).sum() / (n - 1)))
    np.testing.assert_allclose(rule, wanted, rtol=1e-5)


def test_known_errors_shrink_a_trained_effect(fitted):
    adata, go, _ = fitted
    noisy = adata[:60].copy()
    noisy.layers["std_error"] = np.full(noisy.shape, 0.05, dtype=np.float32)
    noisy.layers["std_error"][3] = 3.0
    noisy.var_names = ["p3" if i == 3 else x for i, x in enumerate(noisy.var_names)]
    noisy.X[3, 3] = -9.0
    model = fit(noisy, knowledge={"go": go})
    out = model.predict_perturbation(["p3", "p4"])
    moved = np.abs(out.X - noisy[["p3", "p4"]].X).mean(axis=1)
    assert moved[0] > 10 * moved[1]
    assert out.X[0, 3] == -9.0  # of its own gene the others tell nothing
    assert model.noise_row_[list(model.singles_).index("p3")] > 3 * np.median(model.noise_row_)


def test_save_and_load(fitted, tmp_path):
    adata, _, model = fitted
    model.save(tmp_path / "m")
    loaded = KnowledgeGP.load(tmp_path / "m")
    labels = list(adata.obs_names[58:64])
    a, b = model.predict_perturbation(labels), loaded.predict_perturbation(labels)
    np.testing.assert_allclose(a.X, b.X, atol=1e-6)
    np.testing.assert_allclose(a.layers["lower"], b.layers["lower"], atol=1e-5)
    pd.testing.assert_frame_equal(model.explain("p65"), loaded.explain("p65"))


def test_axes_of_few_rows_are_those_of_the_svd():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20, 120)) * np.geomspace(1, 0.05, 20)[:, None]
    axes = gp._principal_axes(X, 12, rng)
    exact = np.linalg.svd(X, full_matrices=False)[2][:12]
    np.testing.assert_allclose(np.abs(np.sum(axes * exact, axis=1)), 1.0, atol=1e-8)
    np.testing.assert_allclose(axes @ axes.T, np.eye(12), atol=1e-8)
    flat = np.outer(
        rng.normal(size=5), rng.normal(size=100)
    )  # rank 1: the rest of the axes is arbitrary, but orthonormal
    np.testing.assert_allclose(
        gp._principal_axes(flat, 4, rng) @ gp._principal_axes(flat, 4, rng).T, np.eye(4), atol=1e-8
    )


def test_coexpression_needs_no_table_and_a_fold_has_not_seen_what_it_holds_out(tmp_path):
    rng = np.random.default_rng(0)
    member = np.arange(60) % 4  # genes of a module do the same and respond alike
    pattern = rng.normal(size=(4, 4))
    genes = [f"g{i}" for i in range(60)]
    X = pattern[member][:, member] + 0.5 * rng.normal(size=(60, 60))
    adata = ad.AnnData(X.astype(np.float32), obs=pd.DataFrame({"perturbation": genes}, index=genes))
    adata.var_names = genes
    model = fit(adata[:45].copy(), coexpression=True)
    labels = genes[45:]
    out = model.predict_perturbation(labels)[labels]
    mean = adata.X[:45].mean(axis=0)
    assert ((out.X - adata.X[45:]) ** 2).mean() < 0.6 * ((mean - adata.X[45:]) ** 2).mean()
    assert (out.obs["status"] == "unseen").all()
    rows = adata[list(model.singles_)].X / model.scale_row_[:, None]
    fold = folds_of(model, rows)[0]
    changed = rows.copy()
    changed[fold.test] = 0
    np.testing.assert_allclose(folds_of(model, changed)[0].across, fold.across, atol=1e-8)
    model.save(tmp_path / "m")
    np.testing.assert_allclose(
        KnowledgeGP.load(tmp_path / "m").predict_perturbation(labels)[labels].X, out.X, atol=1e-5
    )


def test_unconfirmed_knowledge_hardly_moves_the_mean_and_a_weak_signal_is_kept():
    ratio = {}
    for signal in (0.0, 0.3):
        for seed in range(5):
            adata, go = table(n=40, signal=signal, seed=seed)
            model = fit(adata[:25].copy(), knowledge={"go": go})
            out = model.predict_perturbation(list(adata.obs_names[25:]), on_unknown="mean")
            truth, mean = adata[out.obs_names].X, model.effects_.mean
            if model.trust_ == 0:
                np.testing.assert_array_equal(out.X, np.tile(mean, (len(out), 1)))
            ratio[signal, seed] = ((out.X - truth) ** 2).mean() / ((mean - truth) ** 2).mean()
    null = [r for (signal, _), r in ratio.items() if signal == 0]
    assert 0.985 < min(null) and max(null) < 1.015
    assert np.mean([r for (signal, _), r in ratio.items() if signal > 0]) < 0.95


def test_response_finds_a_bend_and_leaves_a_straight_line_alone():
    rng = np.random.default_rng(0)
    truth = {"straight": lambda x: 0.7 * x, "bent": lambda x: 0.7 * x + 0.25 * x**2 * np.sign(x)}
    for name, curve in truth.items():
        predicted = [rng.normal(size=(40, 50)) for _ in range(4)]
        rest = [curve(x) + 0.3 * rng.normal(size=x.shape) for x in predicted]
        training = [np.vstack(rest[:i] + rest[i + 1 :]) for i in range(4)]
        response, apart = fit_response(predicted, rest, [np.zeros(50)] * 4, training)
        x = np.linspace(-2, 2, 50)[None, :]
        np.testing.assert_allclose(response(x, np.zeros(50)), curve(x), atol=0.25)
        assert np.mean([((a - curve(p)) ** 2).mean() for a, p in zip(apart, predicted, strict=True)]) < 0.01, name
    noise = [rng.normal(size=(40, 50)) for _ in range(4)]
    response, apart = fit_response(noise, [1.0 * x for x in noise], [np.zeros(50)] * 4, noise)
    np.testing.assert_allclose(apart[0], noise[0], atol=0.1)


def test_unseen_combinations_of_untrusted_targets_are_the_mean_once(fitted):
    adata = fitted[0]
    alike = pd.DataFrame({"gene": adata.obs_names, "term": "one"})
    model = fit(adata[:60].copy(), knowledge={"all": alike})
    assert model.trust_ == 0
    out = model.predict_perturbation(["p70+p71", "p1+p70"])
    np.testing.assert_allclose(out["p70+p71"].X[0], model.effects_.mean, atol=1e-6)
    own = model.predict_perturbation("p1").X[0]
    np.testing.assert_allclose(out["p1+p70"].X[0], own + model.effects_.mean, atol=1e-5)


def test_limits_hold_every_gene_alike_where_rows_can_tell():
    """Genes with tails of different weight get limits of their own, equal genes a common one."""
    rng = np.random.default_rng(0)
    genes = np.arange(400)
    freedom = np.where(genes % 2, 2.5, 30.0)

    def draw(rows, df):
        return np.abs(rng.standard_t(df, size=(rows, 400)) / np.sqrt(df / (df - 2)))

    for rows in (20, 60, 300):
        width = limit_widths(draw(rows, freedom))
        new = (draw(4000, freedom) <= width).mean(axis=0)
        pooled = (draw(4000, freedom) <= np.quantile(draw(rows, freedom), 0.9)).mean(axis=0)
        assert abs(new.mean() - 0.9 * (rows + 1) / rows) < 0.02
        assert new.std() < pooled.std() + 0.002 if rows == 20 else new.std() < 0.9 * pooled.std()
    alike = limit_widths(draw(60, np.full(400, 5.0)))
    assert alike.std() < 0.05 * alike.mean()


def test_genes_that_are_not_expressed_do_not_narrow_the_limits_of_the_others(fitted):
    rng = np.random.default_rng(0)
    ratio = np.abs(rng.normal(size=(25, 40)))
    silent = np.hstack([ratio, np.zeros((25, 360))])
    np.testing.assert_allclose(limit_widths(silent)[:40], limit_widths(ratio))
    assert not limit_widths(np.zeros((5, 3))).any()

    adata, go = fitted[0][:60], fitted[1]
    names = [*adata.var_names, *(f"silent{i}" for i in range(120))]
    padded = ad.AnnData(np.hstack([adata.X, np.zeros((60, 120), np.float32)]), adata.obs, pd.DataFrame(index=names))
    out = fit(padded, knowledge={"go": go}).predict_perturbation(list(fitted[0].obs_names[60:]))[:, :40]
    expected = fitted[2].predict_perturbation(list(fitted[0].obs_names[60:]))
    np.testing.assert_allclose(out.layers["std"], expected.layers["std"], rtol=0.1)
    width = [x.layers["upper"] - x.layers["lower"] for x in (out, expected)]
    np.testing.assert_allclose(*width, rtol=0.1)


def test_limits_of_trained_perturbations_hold_new_measurements():
    adata = scpert.datasets.simulated(12_000, 60, 25, 0, random_state=1)
    rng = np.random.default_rng(0)
    half = rng.random(adata.n_obs) < 0.5
    knowledge = pd.DataFrame(rng.normal(size=(60, 5)), index=adata.var_names)
    train, test = adata[half].copy(), adata[~half].copy()
    KnowledgeGP.setup_anndata(train)
    model = KnowledgeGP(train, knowledge={"noise": knowledge})
    model.train()
    out = model.predict_perturbation()
    seen = scpert.metrics.pseudobulk(test)[out.obs_names].layers["delta"] + (out.X - out.layers["delta"])
    inside = (out.layers["lower"] <= seen) & (seen <= out.layers["upper"])
    assert 0.85 < inside.mean() < 0.95


def test_limits_of_doubles_come_from_doubles():
    adata = scpert.datasets.simulated(12_000, 60, 30, 24, random_state=1)
    labels = adata.obs["perturbation"].astype(str)
    doubles = sorted(x for x in labels.unique() if "+" in x)
    rng = np.random.default_rng(0)
    knowledge = pd.DataFrame(rng.normal(size=(60, 5)), index=adata.var_names)
    held = doubles[:8]
    coverage = {}
    for kept in (doubles[8:], doubles[8:11]):
        train = adata[labels.isin(["control", *kept]) | ~labels.str.contains("+", regex=False)].copy()
        KnowledgeGP.setup_anndata(train)
        model = KnowledgeGP(train, knowledge={"noise": knowledge})
        model.train()
        out = model.predict_perturbation(held)
        seen = scpert.metrics.pseudobulk(adata)[held].layers["delta"] + (out.X - out.layers["delta"])
        coverage[len(kept)] = ((out.layers["lower"] <= seen) & (seen <= out.layers["upper"])).mean()
        assert np.isfinite(out.layers["lower"]).all() == (len(kept) >= 4)
        assert np.isfinite(out.layers["std"]).all()
    assert coverage[len(doubles) - 8] > 0.85


def test_one_cell_counts_for_little():
    adata = scpert.datasets.simulated(4000, 60, 20, 0, random_state=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    name = sorted(set(labels) - {"control"})[0]
    truth = scpert.tl.perturbation_effects(adata)[name].X.ravel()
    few = adata[np.sort(np.r_[np.flatnonzero(labels != name), np.flatnonzero(labels == name)[:1]])].copy()
    KnowledgeGP.setup_anndata(few)
    knowledge = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 5)), index=adata.var_names)
    model = KnowledgeGP(few, knowledge={"noise": knowledge})
    model.train()
    off = np.asarray(model.genes_) != name
    error = np.mean((model.predict_perturbation(name).layers["delta"].ravel() - truth)[off] ** 2)
    assert error < 0.2 * np.mean((model.effects_.delta[model.effects_.row[name]] - truth)[off] ** 2)


def test_two_known_targets_teach_nothing():
    adata = scpert.datasets.simulated(600, 40, 6, 0, random_state=0)
    effects = scpert.tl.perturbation_effects(adata)
    few = effects[:2].copy()
    knowledge = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 4)), index=adata.var_names)
    KnowledgeGP.setup_anndata(few, scale="effects")
    model = KnowledgeGP(few, knowledge={"k": knowledge})
    model.train()
    other = next(g for g in adata.var_names if g not in set(effects.obs_names))
    assert model.predict_perturbation(other).obs["status"].iloc[0] == "fallback"
    assert not model.coverage(other)["predictable"].any()
