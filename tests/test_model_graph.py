"""GEARS and BioDSNN as users hold them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scpert
from scpert.errors import ScpertError, UnknownTargetError
from scpert.model import GEARS, BioDSNN

SMALL = {"n_hidden": 8}
WIDE = {"n_hidden": 8, "n_feedforward": 16, "n_latent": 4}


def _options(cls):
    return WIDE if cls is BioDSNN else SMALL


@pytest.fixture(scope="module")
def screen():
    return scpert.datasets.simulated(n_cells=700, n_genes=30, n_targets=18, n_combinations=4, random_state=0)


@pytest.fixture(scope="module")
def nets(screen):
    rng = np.random.default_rng(0)
    names = sorted({t for x in screen.obs["perturbation"].astype(str) if x != "control" for t in x.split("+")})
    names = [*names, "NEW1", "NEW2"]
    s, t = rng.integers(len(names), size=60), rng.integers(len(names), size=60)
    go = pd.DataFrame({"source": np.array(names)[s], "target": np.array(names)[t], "weight": 0.5})
    go = pd.concat(
        [go[go.source != go.target], pd.DataFrame({"source": [names[0]], "target": ["NEW1"], "weight": [0.9]})]
    )
    genes = screen.var_names.to_numpy()
    s, t = rng.integers(len(genes), size=80), rng.integers(len(genes), size=80)
    mask = pd.DataFrame({"source": genes[s], "target": genes[t], "weight": 1.0})
    return go, mask[mask.source != mask.target]


def _trained(cls, adata, nets, epochs=2, **options):
    cls.setup_anndata(adata)
    extra = {"pathway_net": nets[1]} if cls is BioDSNN else {}
    model = cls(adata, perturbation_net=nets[0], **{**_options(cls), **extra, **options})
    start = {k: v.detach().clone() for k, v in model.module.named_parameters()}
    model.train(max_epochs=epochs, accelerator="cpu", batch_size=128)
    return model, start


@pytest.mark.parametrize("cls", [GEARS, BioDSNN])
@pytest.mark.parametrize("anchor", ["graph", "none"])
def test_every_parameter_moves_and_prediction_repeats(cls, anchor, screen, nets, tmp_path):
    model, start = _trained(cls, screen, nets, anchor=anchor)
    still = [k for k, v in model.module.named_parameters() if torch.equal(v, start[k])]
    assert not still
    model._trust = {"unseen": 0.7, "combination": 0.3}  # let the network speak
    labels = [*model.labels_, "NEW1", f"NEW1+{model.targets_[0]}"]
    a, b = model.predict_perturbation(labels), model.predict_perturbation(labels)
    assert np.array_equal(a.X, b.X)
    assert np.isfinite(a.X).all()
    assert (a.obs["status"].iloc[:-2] == "trained").all()
    assert list(a.obs["status"].iloc[-2:]) == ["unseen", "unseen"]
    model.save(tmp_path / "m")
    again = cls.load(tmp_path / "m")
    assert np.array_equal(again.predict_perturbation(labels).X, a.X)
    pd.testing.assert_frame_equal(again.explain(labels[0]), model.explain(labels[0]))


def test_order_of_targets_and_of_genes_is_nothing(screen, nets):
    model, _ = _trained(BioDSNN, screen, nets, anchor="none")
    order = np.random.default_rng(0).permutation(screen.n_vars)
    other, _ = _trained(BioDSNN, screen[:, order].copy(), nets, anchor="none")
    labels = ["NEW1", model.labels_[0]]
    a, b = model.predict_perturbation(labels), other.predict_perturbation(labels)
    np.testing.assert_allclose(b[:, a.var_names].X, a.X, atol=1e-3)
    one, two = model.targets_[:2]
    np.testing.assert_array_equal(
        model.predict_perturbation(f"{one}+{two}").X, model.predict_perturbation(f"{two}+{one}").X
    )


def test_every_cell_of_a_batch_feels_the_graph(screen, nets):
    """The shift of each cell depends on a neighbour of its target and on the gene graph, not that of the first alone."""
    model, _ = _trained(GEARS, screen, nets, epochs=1, anchor="none")
    module = model.module.eval()
    codes = torch.tensor([[0], [1], [1], [0], [2]])
    x = torch.zeros(5, screen.n_vars)

    def shifts() -> torch.Tensor:
        out = module.generative(codes, torch.ones(5, dtype=torch.bool))
        return out["shift"][out["group"]].detach()

    before = shifts()
    with torch.no_grad():
        module.knowledge.gene_position += torch.randn_like(module.knowledge.gene_position)
    after = shifts()
    assert ((before - after).abs().amax(1) > 1e-6).all()
    assert torch.equal(after[0], after[3])
    assert (
        len(module.generative(codes, torch.ones(5, dtype=torch.bool))["shift"]) == 3
    )  # once per distinct perturbation
    assert module.inference(x)["base"].shape == (5, screen.n_vars)


def test_few_perturbations_meet_many_cells_and_every_cell_is_visited_once(screen):
    from scpert.data._loader import PerturbationLoader, ScreenTensors

    GEARS.setup_anndata(screen)
    model = GEARS(screen, **SMALL)
    tensors = ScreenTensors(model._screen, model._field_state, model.setup_args_)
    rows = np.arange(screen.n_obs)
    loader = PerturbationLoader(tensors, rows, rows, partners=("control",), batch_size=64, group_labels=2)
    plain = PerturbationLoader(tensors, rows, rows, partners=("control",), batch_size=64)
    epochs = []
    for batches in (list(loader), list(loader), list(plain)):
        seen = np.concatenate([b["index"].numpy() for b in batches])
        np.testing.assert_array_equal(np.sort(seen), rows)
        epochs.append((seen, np.mean([len(b["label"].unique()) for b in batches])))
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert epochs[0][1] < 0.4 * epochs[2][1]


def test_data_stream_learns_and_ablations(screen, nets):
    model, _ = _trained(BioDSNN, screen, nets, epochs=15)
    reconstruction = model.history["reconstruction_train"].iloc[:, 0].to_numpy(dtype=float)
    assert reconstruction[-1] < 0.7 * reconstruction[0]
    assert model.get_latent_representation().shape == (screen.n_obs, 4)
    cells = model.predict_perturbation(model.labels_[0], level="cell", n_samples=7)
    assert cells.shape == (7, screen.n_vars)
    assert cells.X.min() >= 0
    assert model.module.knowledge.encoder is not None
    without = BioDSNN(screen, perturbation_net=nets[0], use_attention=False, use_vae=False, **WIDE)
    assert without.module.knowledge.encoder is None
    assert without.module.cell is None
    open_ = BioDSNN(screen, perturbation_net=nets[0], use_mask=False, **WIDE)
    assert open_.module.knowledge.encoder[0].attention.n_edges == screen.n_vars**2


def test_mask_by_name_symmetric_with_fallback(screen):
    genes = list(screen.var_names)
    BioDSNN.setup_anndata(screen)
    pathway = pd.DataFrame({"source": [genes[0]], "target": [genes[5]], "weight": [1.0]})
    gene_net = pd.DataFrame({"source": [genes[0], genes[2]], "target": [genes[7], genes[9]], "weight": [0.5, 0.5]})
    model = BioDSNN(screen, gene_net=gene_net, pathway_net=pathway, **WIDE)
    mask = model._mask(gene_net, pathway, True).toarray()
    expected = np.zeros_like(mask)
    for a, b in ((0, 5), (0, 7), (2, 9)):  # 7, 2 and 9 are in no pathway: co-expression decides
        expected[a, b] = expected[b, a] = 1
    np.testing.assert_array_equal(mask, expected)


def test_unknown_targets_and_coverage(screen, nets):
    model, _ = _trained(GEARS, screen, nets)
    with pytest.raises(UnknownTargetError, match="NEWX"):
        model.predict_perturbation("NEWX")
    table = model.coverage(["NEW1", "NEWX", model.targets_[0], screen.var_names[-1]])
    assert list(table["status"][:3]) == ["in_graph", "unknown", "trained"]
    out = model.predict_perturbation(["NEWX", "NEW1"], on_unknown="mean")
    assert list(out.obs["status"]) == ["fallback", "unseen"]
    np.testing.assert_allclose(out.layers["delta"][0], np.maximum(model.reference_.mean + model.effects_.mean, 0) - model.reference_.mean, atol=1e-5)  # fmt: skip
    GEARS.setup_anndata(screen)
    plain = GEARS(screen, **SMALL)
    plain.train(max_epochs=1, accelerator="cpu")
    unseen = [g for g in screen.var_names if g not in plain.targets_ and g not in plain._in_graph][0]
    assert plain.predict_perturbation(unseen).obs["status"].iloc[0] == "fallback"


def test_explain_shares_add_up(screen, nets):
    model, _ = _trained(BioDSNN, screen, nets)
    net = model.explain("NEW1", top_edges=1000)
    assert {"source", "target", "weight", "kind"} == set(net.columns)
    assert {"evidence", "effect", "pathway", "graph"} <= set(net["kind"])
    assert net.loc[net["kind"] == "evidence", "weight"].sum() == pytest.approx(1.0, abs=1e-3)
    delta = model.predict_perturbation("NEW1").layers["delta"][0]
    top = net[net["kind"] == "effect"].set_index("target")["weight"]
    np.testing.assert_allclose(top, delta[model_index(model, top.index)], rtol=1e-5)


def model_index(model, genes):
    return [model.genes_.index(g) for g in genes]


def test_effects_and_recovery_where_the_graph_carries_them():
    rng = np.random.default_rng(0)
    block = np.repeat(np.arange(10), 5)
    centre = rng.normal(size=(10, 20))
    X = centre[block] + 0.2 * rng.normal(size=(50, 20))
    names = [f"T{i:02d}" for i in range(50)]
    adata = scpert_effects(X, names)
    i, j = np.nonzero((block[:, None] == block[None, :]) & ~np.eye(50, dtype=bool))
    net = pd.DataFrame({"source": np.array(names)[i], "target": np.array(names)[j], "weight": 1.0})
    for cls in (GEARS, BioDSNN):
        cls.setup_anndata(adata, scale="effects", split_key="split")
        model = cls(adata, perturbation_net=net, **_options(cls))
        model.train(max_epochs=2, accelerator="cpu")
        out = model.predict_perturbation(names[::5])
        assert (out.obs["status"] == "unseen").all()
        truth = X[::5]
        mean = model.effects_.mean
        assert np.mean((out.X - truth) ** 2) < 0.3 * np.mean((mean - truth) ** 2)
        inside = (truth >= out.layers["lower"]) & (truth <= out.layers["upper"])
        assert 0.8 < inside.mean() < 0.98


def test_pathways_join_targets():
    """What no graph of targets holds, pairs of targets in the pathway net do; GEARS has no such net."""
    rng = np.random.default_rng(0)
    block = np.repeat(np.arange(10), 5)
    X = rng.normal(size=(10, 20))[block] + 0.2 * rng.normal(size=(50, 20))
    names = np.array([f"T{i:02d}" for i in range(50)])
    adata = scpert_effects(X, list(names))
    i, j = np.nonzero((block[:, None] == block[None, :]) & ~np.eye(50, dtype=bool))
    pathway = pd.DataFrame({"source": [*names[i], "G0"], "target": [*names[j], "G1"], "weight": 1.0})
    other = pd.DataFrame({"source": names, "target": rng.permutation(names), "weight": 1.0})
    error = {}
    for cls, extra in ((GEARS, {}), (BioDSNN, {"pathway_net": pathway})):
        cls.setup_anndata(adata, scale="effects", split_key="split")
        model = cls(adata, perturbation_net=other, **extra, **_options(cls))
        model.train(max_epochs=1, accelerator="cpu")
        error[cls] = np.mean((model.predict_perturbation(list(names[::5])).X - X[::5]) ** 2)
    assert error[BioDSNN] < 0.4 * error[GEARS]
    mask = model._mask(model._options["gene_net"], pathway, True)
    assert mask[0, 1] == mask[1, 0] == 1


def test_annotations_in_the_place_of_a_net(screen, tmp_path):
    targets = sorted({t for x in screen.obs["perturbation"].astype(str) if x != "control" for t in x.split("+")})
    gene = [*targets, *targets, "NEW1", "NEW1"]
    term = [*(f"a{i % 4}" for i in range(len(targets))), *(f"b{i % 3}" for i in range(len(targets))), "a0", "b0"]
    go = pd.DataFrame({"gene": gene, "term": term, "evidence": "IDA"})
    GEARS.setup_anndata(screen)
    model = GEARS(screen, perturbation_net={"go": go}, **SMALL)
    assert list(model._relations) == ["go", "go, terms"]
    terms = model._relations["go, terms"]
    kernel = (terms @ terms.T).toarray()
    a, b, new = (model._node[t] for t in (targets[0], targets[12], "NEW1"))  # 0 and 12 share both terms
    np.testing.assert_allclose([kernel[a, b], kernel[a, new]], 1.0)
    model.train(max_epochs=1, accelerator="cpu")
    out = model.predict_perturbation(["NEW1", f"NEW1+{targets[1]}"])
    assert list(out.obs["status"]) == ["unseen", "unseen"]
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(GEARS.load(tmp_path / "m").predict_perturbation(list(out.obs_names)).X, out.X)
    net = GEARS(screen, perturbation_net={"go": scpert.pp.similarity_net(go)}, **SMALL)
    assert (net._target_adjacencies["go"] != model._target_adjacencies["go"]).nnz == 0


def test_untidy_nets_are_cleaned(screen, nets):
    """Self loops, duplicates, genes that are not there and isolated genes change nothing."""
    tidy = nets[0].groupby(["source", "target"], as_index=False)["weight"].mean()
    loops = pd.DataFrame({"source": tidy["source"].unique(), "target": tidy["source"].unique(), "weight": 3.0})
    untidy = pd.concat([tidy, tidy, loops]).sample(frac=1.0, random_state=0).assign(note="x")
    genes = list(screen.var_names[:4])
    one = pd.DataFrame({"source": [genes[0]], "target": [genes[1]], "weight": [0.5]})
    strange = pd.concat([one, pd.DataFrame({"source": ["ZZZ"], "target": [genes[0]], "weight": [1.0]})])
    out = []
    for net, gene_net in ((tidy, one), (untidy, strange)):  # all other genes are isolated in the graph of genes
        BioDSNN.setup_anndata(screen)
        model = BioDSNN(screen, perturbation_net=net, gene_net=gene_net, **WIDE)
        model.train(max_epochs=1, accelerator="cpu")
        out.append(model.predict_perturbation(["NEW1", "NEW2"]))
    np.testing.assert_array_equal(out[0].X, out[1].X)
    spaced = tidy.assign(source=" " + tidy["source"] + " ")
    pd.testing.assert_frame_equal(BioDSNN(screen, perturbation_net=spaced, **WIDE)._nets["graph"], tidy)
    with pytest.raises(ScpertError, match="names a target twice"):
        model.predict_perturbation("NEW1+NEW1")


def test_limits_allow_for_few_perturbations():
    """Of the errors on left-out perturbations the limits hold 90 % of one more than there are: split conformal."""
    n = 16
    X = np.random.default_rng(0).standard_t(3, size=(n, 400))
    names = [f"T{i:02}" for i in range(n)]
    adata = scpert_effects(X, names)
    GEARS.setup_anndata(adata, scale="effects")
    model = GEARS(adata, perturbation_net=pd.DataFrame({"source": names, "target": names[1:] + names[:1]}), **SMALL)
    model.train(max_epochs=1, accelerator="cpu")
    sd = np.sqrt(1 / np.diag(model._prior.inverse))[:, None] * model._calibration["gene_sd"]
    inside = np.abs(X - model._prior.loo) <= model._calibration["width"] * sd
    assert inside.mean() == pytest.approx(0.9 * (n + 1) / n, abs=0.01)


def scpert_effects(X, names):
    from anndata import AnnData

    split = np.where(np.arange(len(names)) % 5 == 0, "test", "train")
    obs = pd.DataFrame({"perturbation": names, "split": split}, index=names)
    return AnnData(X.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(X.shape[1])]))


def test_published_preset_halves_the_rate(screen, nets):
    model, _ = _trained(GEARS, screen, nets, published=True)
    assert not model._anchored
    assert np.isfinite(model.predict_perturbation("NEW1").X).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_hidden": 9, "n_heads": 2}, "divisor"),
        ({"n_latent": 0}, "n_latent"),
        ({"cell_output": "relu"}, "cell_output"),
        ({"anchor": "mean"}, "anchor"),
        ({"autofocus": -1.0}, "autofocus"),
        ({"gene_weight": np.ones(3)}, "gene_weight"),
        ({"gene_net": pd.DataFrame({"a": [1], "b": [2]})}, "source"),
        ({"gene_net": pd.DataFrame({"source": ["x"], "target": ["y"], "weight": [1.0]})}, "shares no edge"),
        ({"perturbation_net": {}}, "empty dict"),
        ({"perturbation_net": pd.DataFrame({"source": ["x"], "target": ["x"], "weight": [1.0]})}, "no edge"),
        ({"perturbation_net": pd.DataFrame({"source": ["x"], "target": ["y"], "weight": [1.0]})}, "none of the data's"),
        ({"perturbation_net": pd.DataFrame({"source": ["x"], "target": ["y"], "weight": [np.nan]})}, "NaN"),
        (
            {"perturbation_net": pd.DataFrame({"source": ["x", None], "target": ["y", "z"]})},
            "without a source or target",
        ),
        ({"pathway_net": pd.DataFrame({"source": ["G"], "target": ["H"], "weight": [1.0]})}, "shares no edge"),
    ],
)
def test_bad_options(screen, options, match):
    BioDSNN.setup_anndata(screen)
    with pytest.raises(ScpertError, match=match):
        BioDSNN(screen, **options)


def test_pathway_net_of_self_pairs_only(screen):
    BioDSNN.setup_anndata(screen)
    own = pd.DataFrame({"source": screen.var_names[:3], "target": screen.var_names[:3], "weight": 1.0})
    with pytest.raises(ScpertError, match="mask would be empty"):
        BioDSNN(screen, pathway_net=own)


def test_explain_figure(screen, nets):
    import matplotlib

    matplotlib.use("Agg")
    model, _ = _trained(BioDSNN, screen, nets, epochs=1)
    net = model.explain("NEW1")
    ax = scpert.pl.explain(net, n_genes=5)
    texts = [t.get_text() for t in ax.texts]
    assert "NEW1" in texts
    assert sum("(" in t for t in texts) == 5
    with pytest.raises(ScpertError, match="kind"):
        scpert.pl.explain(net.drop(columns="kind"))


def test_validation_perturbations_stop_training(screen, nets):
    adata = screen.copy()
    labels = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    adata.obs["split"] = np.where(adata.obs["perturbation"].isin(labels[:3]), "val", "train")
    GEARS.setup_anndata(adata, split_key="split")
    model = GEARS(adata, perturbation_net=nets[0], **SMALL)
    model.train(max_epochs=3, accelerator="cpu")
    assert "reconstruction_loss_validation" in model.history
    assert 0 <= model.best_epoch_ < 3


def test_control_cells_alone_do_not_say_when_to_stop(screen, caplog):
    """Their error is that of no perturbation: the state after the first epoch was taken for the best."""
    adata = screen.copy()
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["split"] = np.where(is_control & (np.arange(adata.n_obs) % 3 == 0), "val", "train")
    GEARS.setup_anndata(adata, split_key="split")
    model = GEARS(adata, anchor="none", **SMALL)
    model.train(max_epochs=3, accelerator="cpu", batch_size=256)
    assert model.best_epoch_ == -1  # no validation: the last state
    assert "controls only" in caplog.text


@pytest.mark.parametrize("cls", [GEARS, BioDSNN])
def test_effects_of_the_linear_model_are_within_covariates(cls, run_of_six):
    """Half of the perturbations are measured in a batch with a shift of its own: it is no effect of theirs."""
    adata, names, late = run_of_six
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    wanted = scpert.tl.perturbation_effects(adata, covariate_keys="run")[names[:6]].X
    error = {}
    for keys in (None, "run"):
        cls.setup_anndata(adata, covariate_keys=keys)
        model = cls(adata, **_options(cls))
        model.train(max_epochs=1, accelerator="cpu")
        error[keys] = np.mean((model.predict_perturbation(names[:6]).layers["delta"] - wanted) ** 2)
    assert error["run"] < 0.2 * error[None]
    lost = adata[~((labels == "control") & late)].copy()
    cls.setup_anndata(lost, covariate_keys="run")
    with pytest.raises(ScpertError, match="fewer than two control cells"):
        cls(lost, **_options(cls)).train(max_epochs=1, accelerator="cpu")


def test_one_cell_is_not_the_most_exact_measurement():
    adata = scpert.datasets.simulated(n_cells=3000, n_genes=60, n_targets=20, n_combinations=0, random_state=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    name = sorted(set(labels) - {"control"})[0]
    mine = np.flatnonzero(labels == name)
    truth = scpert.tl.perturbation_effects(adata)[name].X.ravel()
    few = adata[np.sort(np.r_[np.flatnonzero(labels != name), mine[:1]])].copy()
    raw = np.asarray(few[few.obs["perturbation"] == name].X.todense()).ravel()
    GEARS.setup_anndata(few)
    model = GEARS(few, **SMALL)
    model.train(max_epochs=1, accelerator="cpu")
    row = model.effects_.row[name]
    off = np.asarray(model.genes_) != name
    assert raw.any() and np.isnan(model.effects_.std_error[row]).all()
    assert model._prior.noise[row] > 10 * np.median(model._prior.noise)
    error = np.mean((model.predict_perturbation(name).layers["delta"].ravel() - truth)[off] ** 2)
    assert error < 0.1 * np.mean((model.effects_.delta[row] - truth)[off] ** 2)


def test_limits_of_own_genes():
    """A target's own gene moves as others' own genes do, and by as much more or less: so wide are its limits."""
    rng = np.random.default_rng(0)
    n = 80
    X = 0.1 * rng.normal(size=(n, n))
    X[np.arange(n), np.arange(n)] = -2.0 + rng.normal(size=n)
    names = [f"G{i}" for i in range(n)]
    adata = scpert_effects(X, names)
    net = pd.DataFrame({"source": names, "target": np.roll(names, 1), "weight": 1.0})
    GEARS.setup_anndata(adata, scale="effects", split_key="split")
    model = GEARS(adata, perturbation_net=net, **SMALL)
    model.train(max_epochs=1, accelerator="cpu")
    test = adata[adata.obs["split"] == "test"]
    out = model.predict_perturbation(list(test.obs_names))
    own = np.flatnonzero(out.obs["status"] == "unseen")
    at = [names.index(out.obs_names[i]) for i in own]
    low, high = out.layers["lower"][own, at], out.layers["upper"][own, at]
    seen = np.asarray(test.X)[own, at]
    assert len(own) >= 8 and np.mean((low <= seen) & (seen <= high)) > 0.7
    np.testing.assert_allclose(out.layers["std"][own, at], model.effects_.own_rule[2], rtol=1e-5)


def _ring_and_a_pair() -> GEARS:
    """Twenty measured targets in a ring, and two others that are joined to each other alone."""
    rng = np.random.default_rng(0)
    names = [f"T{i}" for i in range(20)]
    adata = scpert_effects(rng.normal(size=(20, 15)), names)
    net = pd.DataFrame({"source": [*names, "Z1"], "target": [*np.roll(names, 1), "Z2"], "weight": 1.0})
    GEARS.setup_anndata(adata, scale="effects")
    model = GEARS(adata, perturbation_net=net, **SMALL)
    model.train(max_epochs=1, accelerator="cpu")
    return model


def test_what_no_measured_target_is_joined_to_is_said():
    model = _ring_and_a_pair()
    table = model.coverage(["Z1", "T0"])
    assert list(table["in_graph"]) == [True, True] and list(table["predictable"]) == [False, True]
    out = model.predict_perturbation("Z1")
    assert out.obs["status"].iloc[0] == "fallback"
    assert "evidence" not in set(model.explain("Z1")["kind"])
    for bad in (["T0", "T1"], 3):
        with pytest.raises(ScpertError, match="give one label"):
            model.explain(bad)
    with pytest.raises(ScpertError, match="top_edges=-1"):
        model.explain("T0", top_edges=-1)
    with pytest.raises(scpert.errors.LabelError, match="perturbations=5"):
        model.predict_perturbation(5)


def test_coexpression_only_where_reactome_holds_no_gene():
    """Also of genes that it holds without a partner, as ``pathway_mask`` says which it does not."""
    adata = scpert.datasets.simulated(n_cells=400, n_genes=12, n_targets=3, n_combinations=0)
    g = list(adata.var_names)
    reactome = scpert.resources.Reactome({"P": g[:3], "Q": [g[3]]})
    mask = scpert.pp.pathway_mask(adata, reactome)
    assert mask.attrs["outside"] == g[4:]
    net = pd.DataFrame({"source": [g[3], g[5]], "target": [g[0], g[6]], "weight": 1.0})
    BioDSNN.setup_anndata(adata)
    model = BioDSNN(adata, gene_net=net, pathway_net=mask, **_options(BioDSNN))
    allowed = model._mask(model._options["gene_net"], model._options["pathway_net"], True).toarray()
    assert allowed[0, 1] and allowed[5, 6] and not allowed[3, 0] and not allowed[0, 3]


def test_latent_space_of_cells_without_controls_or_labels(screen):
    BioDSNN.setup_anndata(screen)
    model = BioDSNN(screen, **_options(BioDSNN))
    model.train(max_epochs=1, accelerator="cpu")
    whole = model.get_latent_representation()
    perturbed = np.flatnonzero((screen.obs["perturbation"] != "control").to_numpy())[:7]
    some = screen[perturbed].copy()
    np.testing.assert_allclose(model.get_latent_representation(some), whole[perturbed], rtol=1e-5, atol=1e-6)
    del some.obs["perturbation"]
    np.testing.assert_allclose(model.get_latent_representation(some), whole[perturbed], rtol=1e-5, atol=1e-6)


def test_sizes_and_temperatures_are_checked(screen):
    BioDSNN.setup_anndata(screen)
    for options, message in (
        ({"direction_temperature": 0}, "direction_temperature=0"),
        ({"cell_hidden": (0,)}, "cell_hidden=0"),
    ):
        with pytest.raises(ScpertError, match=message):
            BioDSNN(screen, **{**_options(BioDSNN), **options})
    assert BioDSNN(screen, **{**_options(BioDSNN), "cell_hidden": 8})._options["cell_hidden"] == (8,)


def test_noisy_rows_do_not_spoil_the_others():
    """Three perturbations of one cell beside seventeen of many: which genes are noise is told by the latter."""
    adata = scpert.datasets.simulated(n_cells=3000, n_genes=60, n_targets=20, n_combinations=0, random_state=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    names = sorted(set(labels) - {"control"})
    keep = ~np.isin(labels, names[:3])
    lone = [np.flatnonzero(labels == n)[0] for n in names[:3]]
    error = []
    for rows in (np.flatnonzero(keep), np.sort(np.r_[np.flatnonzero(keep), lone])):
        some = adata[rows].copy()
        GEARS.setup_anndata(some)
        model = GEARS(some, **SMALL)
        model.train(max_epochs=1, accelerator="cpu")
        truth = scpert.tl.perturbation_effects(adata)[names[3:]].X
        error.append(np.mean((model.predict_perturbation(names[3:]).layers["delta"] - truth) ** 2))
    assert error[1] < 1.02 * error[0]


def test_a_trained_target_beside_one_that_is_not_joined():
    model = _ring_and_a_pair()
    out = model.predict_perturbation(["T0+Z1", "Z1+Z2"])
    assert list(out.obs["status"]) == ["unseen", "fallback"]
    assert not np.allclose(out.X[0], out.X[1])


def test_new_controls_need_no_covariates_but_must_be_controls(screen):
    adata = screen.copy()
    adata.obs["run"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    GEARS.setup_anndata(adata, covariate_keys="run")
    model = GEARS(adata, **SMALL)
    model.train(max_epochs=1, accelerator="cpu")
    new = adata[adata.obs["perturbation"] == "control"].copy()
    new.obs["run"] = "c"
    assert model.predict_perturbation(model.labels_[0], adata=new).n_obs == 1
    new.obs["perturbation"] = "non-targeting"
    with pytest.raises(scpert.errors.LabelError, match="predictions start from control cells"):
        model.predict_perturbation(model.labels_[0], adata=new)


def test_strong_targets_outside_a_wrong_graph_do_not_make_it_speak():
    """A target that no graph joins has no part in a graph's strength: strong ones raised that of a graph that is wrong."""
    names = [f"p{i}" for i in range(40)]
    net = pd.DataFrame([(a, b) for i, a in enumerate(names) for b in names[i // 5 * 5 : i // 5 * 5 + 5] if a != b])
    net.columns = ["source", "target"]
    told, mean = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = 0.5 * np.repeat(rng.normal(size=(8, 60)), 5, axis=0) + 0.2 * rng.normal(size=(40, 60))
        truth = 0.3 * rng.normal(size=60) + rng.permutation(truth)
        train = np.arange(40) % 5 < 4
        labels = [*np.array(names)[train], "s0", "s1", "s2"]
        X = np.vstack([truth[train], 3 * rng.normal(size=(3, 60))]) + 0.3 * rng.normal(size=(35, 60))
        adata = ad.AnnData(X.astype(np.float32), obs=pd.DataFrame({"perturbation": labels}, index=labels))
        adata.layers["std_error"] = np.full(X.shape, 0.3, dtype=np.float32)
        GEARS.setup_anndata(adata, scale="effects")
        model = GEARS(adata, perturbation_net=net, n_hidden=2)
        model.train(max_epochs=1, accelerator="cpu")
        model._trust = {"unseen": 0.0, "combination": 0.0}
        out = model.predict_perturbation(list(np.array(names)[~train]))
        told.append(((out.X - truth[~train]) ** 2).mean())
        mean.append(((X.mean(axis=0) - truth[~train]) ** 2).mean())
    assert np.mean(told) < 1.03 * np.mean(mean)
