"""Closed-form baselines against their formulas, sklearn and bad input."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

import scpert
from scpert.errors import ScpertError
from scpert.model._closed_form import _loo_error
from scpert.model._knowledge import read_knowledge


def effects(n=30, genes=24, seed=0, doubles=0) -> ad.AnnData:
    """Effects that follow two latent groups of genes; targets 0..n-1 are measured genes where there are as many."""
    rng = np.random.default_rng(seed)
    group = rng.normal(size=(4, genes))
    member = np.arange(n) % 4
    X = group[member] + 0.2 * rng.normal(size=(n, genes))
    labels = [f"g{i}" for i in range(n)]
    for a in range(doubles):
        labels.append(f"g{a}+g{a + 1}")
        X = np.vstack([X, X[a] + X[a + 1]])
    return ad.AnnData(
        X.astype(np.float32),
        obs=pd.DataFrame({"perturbation": labels}, index=labels),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
    )


def annotations(n=40) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gene": [f"g{i}" for i in range(n)] * 2,
            "term": [f"t{i % 4}" for i in range(n)] + [f"s{i % 7}" for i in range(n)],
        }
    )


def fit(name: str, adata: ad.AnnData, **options):
    cls = getattr(scpert.model, name)
    cls.setup_anndata(adata, scale="effects")
    model = cls(adata, **options)
    model.train()
    return model


def test_matching_mean_is_the_average_of_singles():
    adata = effects()
    out = fit("MatchingMean", adata).predict_perturbation(["g1+g2", "g3", "g1+g23"])
    np.testing.assert_allclose(out["g1+g2"].X[0], adata.X[1:3].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(out["g3"].X[0], adata.X[3], atol=1e-6)
    assert list(out.obs["status"]) == ["combination", "trained", "combination"]


def test_linear_pca_is_its_formula():
    adata = effects()
    model = fit("LinearPCA", adata[:20].copy(), n_components=5, ridge=0.1)
    Y = adata.X[:20].astype(float).T
    b = Y.mean(axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(Y - b, full_matrices=False)
    G = u[:, :5] * s[:5] / np.sqrt(19)
    P = G[:20]
    eye = 0.1 * np.eye(5)
    W = np.linalg.inv(G.T @ G + eye) @ G.T @ (Y - b) @ P @ np.linalg.inv(P.T @ P + eye)
    out = model.predict_perturbation("g22")
    np.testing.assert_allclose(out.X[0], (b + G @ W @ G[22:23].T).ravel(), atol=1e-4)
    assert out.obs["status"].iloc[0] == "unseen"


def test_linear_pca_with_an_embedding_from_elsewhere_predicts_unmeasured_targets():
    adata = effects(n=60, genes=20)
    rng = np.random.default_rng(1)
    table = pd.DataFrame(
        np.eye(4)[np.arange(60) % 4] + 0.05 * rng.normal(size=(60, 4)), index=[f"g{i}" for i in range(60)]
    )
    model = fit("LinearPCA", adata[:40].copy(), embedding=table)
    own = fit("LinearPCA", adata[:40].copy())
    labels = [f"g{i}" for i in range(40, 60)]
    error = ((model.predict_perturbation(labels).X - adata.X[40:]) ** 2).mean()
    assert error < 0.3 * ((adata.X[:40].mean(axis=0) - adata.X[40:]) ** 2).mean()
    assert (own.predict_perturbation(labels, on_unknown="mean").obs["status"] == "fallback").all()
    with pytest.raises(ScpertError, match="knows 0 of the 40"):
        fit("LinearPCA", adata[:40].copy(), embedding=table.set_axis([f"h{i}" for i in range(60)]))


@pytest.mark.parametrize("weights", ["similarity", "softmax", "uniform"])
def test_knn_averages_the_nearest(weights):
    adata = effects()
    model = fit("KNN", adata[:25].copy(), knowledge={"go": annotations()}, k=3, weights=weights, temperature=0.2)
    similarity = read_knowledge({"go": annotations()})["go"].kernel(["g25"], [f"g{i}" for i in range(25)])[0]
    order = sorted(range(25), key=lambda i: (-similarity[i], f"g{i}"))[:3]
    s = similarity[order]
    w = {"similarity": s, "softmax": np.exp(s / 0.2), "uniform": np.ones(3)}[weights]
    expected = (w / w.sum()) @ adata.X[order]
    np.testing.assert_allclose(model.predict_perturbation("g25").X[0], expected, atol=1e-5)


def test_ridge_is_sklearns_kernel_ridge():
    adata = effects()
    model = fit("Ridge", adata[:25].copy(), knowledge={"go": annotations()}, alpha=0.7)
    kernel = read_knowledge({"go": annotations()})["go"].kernel([f"g{i}" for i in range(30)])
    mean = adata.X[:25].mean(axis=0)
    oracle = KernelRidge(alpha=0.7, kernel="precomputed").fit(kernel[:25, :25], adata.X[:25] - mean)
    np.testing.assert_allclose(
        model.predict_perturbation("g27").X[0], mean + oracle.predict(kernel[27:28, :25])[0], atol=1e-4
    )


def test_leave_one_out_error_is_that_of_refitting():
    rng = np.random.default_rng(0)
    phi, y = rng.normal(size=(20, 5)), rng.normal(size=(20, 3))
    values, vectors = np.linalg.eigh(phi @ phi.T)
    refitted = cross_val_predict(KernelRidge(alpha=0.5), phi, y, cv=LeaveOneOut())
    assert _loo_error(values, vectors, vectors.T @ y, 0.5) == pytest.approx(np.mean((y - refitted) ** 2))


@pytest.mark.parametrize("name", ["KNN", "Ridge", "KnowledgeGP"])
def test_combinations_and_fallback(name):
    adata = effects()
    model = fit(name, adata[:20].copy(), knowledge={"go": annotations(22)})
    out = model.predict_perturbation(["g0+g1", "g21", "g23", "g0+g21", "g0+g23"])
    np.testing.assert_allclose(out["g0+g1"].X[0], adata.X[0] + adata.X[1], atol=1e-5)
    np.testing.assert_allclose(out["g0+g21"].X[0], out["g21"].X[0] + adata.X[0], atol=1e-5)
    np.testing.assert_allclose(out["g23"].X[0], adata.X[:20].mean(axis=0), atol=1e-6)
    assert dict(out.obs["status"]) == {
        "g0+g1": "combination", "g21": "unseen", "g23": "fallback", "g0+g21": "unseen", "g0+g23": "fallback",
    }  # fmt: skip
    table = model.coverage(["g0", "g21", "g23"])
    assert list(table["status"]) == ["trained", "in_graph", "measured"]
    assert list(table["predictable"]) == [True, True, False]


@pytest.mark.parametrize("name", ["KNN", "Ridge", "LinearPCA", "MatchingMean", "KnowledgeGP"])
def test_combinations_of_nothing_but_unknown_targets_have_the_mean_once(name):
    adata = effects()
    adata = adata[:20].copy()
    adata.obs["perturbation"] = [*adata.obs["perturbation"][:16], "x+z", "y+z", "x+g0", "v+w"]
    knowledge = {"knowledge": {"go": annotations(22)}} if name in ("KNN", "Ridge", "KnowledgeGP") else {}
    out = fit(name, adata, **knowledge).predict_perturbation(["x+y", "v+x"])
    np.testing.assert_allclose(out.X, np.tile(adata.X.mean(axis=0), (2, 1)), atol=1e-6)
    assert (out.obs["status"] == "fallback").all()


@pytest.mark.parametrize("name", ["KNN", "Ridge", "KnowledgeGP"])
def test_knowledge_without_overlap_is_ignored_with_a_warning(name, caplog):
    adata = effects()
    other = annotations().assign(gene=lambda t: "x" + t["gene"])
    with caplog.at_level(logging.WARNING, logger="scpert"):
        model = fit(name, adata[:20].copy(), knowledge={"other": other})
    assert "knows 0 of the 20 training targets" in caplog.text
    out = model.predict_perturbation("g22")
    assert out.obs["status"].iloc[0] == "fallback"
    np.testing.assert_allclose(out.X[0], adata.X[:20].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_kernels_are_symmetric_and_positive_semidefinite(seed):
    rng = np.random.default_rng(seed)
    genes = [f"g{i}" for i in range(30)]
    net = pd.DataFrame(
        {"source": rng.choice(genes, 90), "target": rng.choice(genes, 90), "weight": rng.normal(size=90)}
    )  # one-way, negative weights: an indefinite adjacency
    embedding = pd.DataFrame(rng.normal(size=(30, 4)), index=genes)
    for f in read_knowledge({"net": net, "embedding": embedding, "go": annotations(30)}).values():
        kernel = f.kernel(genes)
        np.testing.assert_allclose(kernel, kernel.T, atol=1e-12)
        assert np.linalg.eigvalsh(kernel).min() > -1e-10
        assert set(np.round(np.diag(kernel), 9)) <= {0.0, 1.0}


def test_an_edge_counts_the_same_whichever_way_it_is_written():
    one = pd.DataFrame({"source": ["a", "b"], "target": ["b", "c"], "weight": [2.0, 1.0]})
    two = pd.DataFrame({"source": ["b", "b", "a"], "target": ["a", "c", "b"], "weight": [2.0, 1.0, 0.5]})
    kernels = [read_knowledge({"n": t})["n"].kernel(["a", "b", "c"]) for t in (one, two)]
    np.testing.assert_allclose(*kernels)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "none of: annotations"),
        (pd.DataFrame({"gene": [], "term": []}), "is empty"),
        (pd.DataFrame({"a": [1.0, np.nan]}, index=["x", "y"]), "NaN or infinite"),
        (pd.DataFrame({"a": [1.0, 2.0]}, index=["x", "x"]), "more than one row"),
        (pd.DataFrame({"source": ["x", "y"], "target": ["x", "y"]}), "no edge between two different genes"),
        ([1, 2], "must be a DataFrame"),
    ],
)
def test_bad_tables(table, match):
    with pytest.raises(ScpertError, match=match):
        read_knowledge({"t": table})
    with pytest.raises(ScpertError, match="must map names to tables"):
        read_knowledge([1, 2])


@pytest.mark.parametrize("value", [-0.1, np.inf])
def test_standard_errors_that_cannot_be_are_refused(value):
    names = [f"g{i}" for i in range(6)]
    table = ad.AnnData(
        X=np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
        obs=pd.DataFrame({"perturbation": names}, index=names),
        var=pd.DataFrame(index=list("abcd")),
    )
    table.layers["std_error"] = np.full(table.shape, 0.5)
    table.layers["std_error"][0, 0] = np.nan  # not known
    scpert.model.PerturbedMean.setup_anndata(table, scale="effects")
    scpert.model.PerturbedMean(table).train()
    table.layers["std_error"][2, 1] = value
    scpert.model.PerturbedMean.setup_anndata(table, scale="effects")
    with pytest.raises(ScpertError, match="negative or infinite .*'g2', 'b'"):
        scpert.model.PerturbedMean(table).train()


@pytest.fixture(scope="module")
def screen():
    adata = scpert.datasets.simulated(n_cells=400, n_genes=25, n_targets=5, random_state=1)
    scpert.model.LinearGRN.setup_anndata(adata)
    model = scpert.model.LinearGRN(adata, ridge=0.5)
    model.train()
    return adata, model


def test_linear_grn_is_ridge_of_each_gene_on_the_others(screen):
    from sklearn.linear_model import Ridge

    adata, model = screen
    X = adata.X.toarray().astype(float)
    X = np.log1p(X / X.sum(axis=1, keepdims=True) * 1e4)
    penalty = 0.5 * X.var(axis=0, ddof=1).mean() * (len(X) - 1)
    net = model.get_grn()
    for j in (0, 7, 20):
        others = [i for i in range(25) if i != j]
        oracle = Ridge(alpha=penalty).fit(X[:, others], X[:, j]).coef_
        got = net[net["target"] == adata.var_names[j]].set_index("source")["weight"]
        assert adata.var_names[j] not in got.index
        np.testing.assert_allclose(got[adata.var_names[others]], oracle, atol=2e-4)


def test_linear_grn_clamps_the_target_and_propagates(screen):
    adata, model = screen
    gene = next(
        g for g in adata.var_names if g not in model.targets_ and model.effects_.control_mean[model._position[g]] > 0.1
    )
    out = model.predict_perturbation(gene)
    own = float(out[:, gene].layers["delta"][0, 0])
    expected = model.relative_shift_ * model.effects_.control_mean[model._position[gene]]
    assert own == pytest.approx(expected, abs=1e-4)
    assert out.obs["status"].iloc[0] == "unseen"
    assert (out.X >= 0).all() and np.abs(out.layers["delta"]).max() > 0
    net = model.get_grn().query("source != @gene").head(10)
    scpert.model.LinearGRN.setup_anndata(adata)
    silent = scpert.model.LinearGRN(adata, net=net[["source", "target"]])
    silent.train()
    assert silent.predict_perturbation(gene).obs["status"].iloc[0] == "fallback"


def test_linear_grn_refuses_effects():
    with pytest.raises(ScpertError, match="effects"):
        scpert.model.LinearGRN.setup_anndata(effects(), scale="effects")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_steps": 0.5}, "n_steps=0.5"),
        ({"max_regulators": 2.5}, "max_regulators=2.5"),
        ({"net": pd.DataFrame({"source": [], "target": []})}, "net has no edge"),
    ],
)
def test_linear_grn_bad_options(screen, options, match):
    scpert.model.LinearGRN.setup_anndata(screen[0])
    with pytest.raises(ScpertError, match=match):
        scpert.model.LinearGRN(screen[0], **options)


def test_no_change_predicts_no_change_also_of_genes_it_has_never_seen():
    adata = effects()
    still = fit("NoChange", adata).predict_perturbation(["unheard", "g1"], on_unknown="mean")
    assert not np.asarray(still.layers["delta"]).any()
    mean = fit("PerturbedMean", adata).predict_perturbation("unheard", on_unknown="mean")
    np.testing.assert_allclose(mean.layers["delta"][0], adata.X.mean(axis=0), atol=1e-6)


def test_predictions_stand_on_the_mean_of_all_training_controls(monkeypatch, tmp_path):
    adata = scpert.datasets.simulated(n_cells=400, n_genes=30, n_targets=4)
    monkeypatch.setattr("scpert.model._base.MAX_REFERENCE_CELLS", 5)
    scpert.model.PerturbedMean.setup_anndata(adata)
    model = scpert.model.PerturbedMean(adata)
    model.train()
    assert len(model.reference_) == 5
    label = model.labels_[0]
    out = model.predict_perturbation(label)
    np.testing.assert_allclose(out.X - out.layers["delta"], model.effects_.control_mean[None], atol=1e-5)
    model.save(tmp_path / "model")
    again = scpert.model.PerturbedMean.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_perturbation(label).X, out.X)


def test_effects_within_covariates(run_of_six):
    """A batch with genes of its own, and half of the perturbations in it alone: no effect of theirs."""
    adata, names, _ = run_of_six
    wanted = scpert.tl.perturbation_effects(adata, covariate_keys="run")[names[:6]].X
    for cls in (scpert.model.Additive, scpert.model.PerturbedMean):
        cls.setup_anndata(adata, covariate_keys="run")
        model = cls(adata)
        model.train()
        found = model.effects_.delta[[model.effects_.row[n] for n in names[:6]]]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    new = adata[adata.obs["perturbation"] == "control"].copy()
    del new.obs["run"]  # a shift is the same in every stratum: other controls need not say theirs
    assert model.predict_perturbation(names[0], adata=new).n_obs == 1


def test_a_target_trained_in_combinations_only_is_not_its_own_nearest():
    adata = effects(8, doubles=4)
    adata = adata[adata.obs["perturbation"] != "g0"].copy()  # "g0+g1" stays
    scpert.model.Additive.setup_anndata(adata, scale="effects")
    model = scpert.model.Additive(adata)
    model.train()
    near = model._nearest(("g0",))
    assert near is not None and model._status(near) == "trained"
