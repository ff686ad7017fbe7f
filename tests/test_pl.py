"""Figures: axes come back, nothing global changes, bad input is said in a sentence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scpert
from scpert import pl
from scpert.errors import LabelError, MissingKeyError, ScpertError

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")


def _empty_axes():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


class _Trained:
    """Stands for a model with a training history."""

    best_epoch_ = 1
    history = {
        "elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0, 1.5]}),
        "elbo_validation": pd.DataFrame({"elbo_validation": [3.2, 2.1, 2.2]}),
    }


@pytest.fixture(scope="module")
def world():
    adata = scpert.datasets.simulated(n_cells=400, n_genes=40, n_targets=5, random_state=0)
    effects = scpert.tl.perturbation_effects(adata)
    predicted = scpert.metrics.pseudobulk(adata)
    net = pd.DataFrame(
        {"source": ["A", "A", "B", "C"], "target": ["B", "C", "A", "D"], "weight": [1.0, -2.0, 0.5, 3.0]}
    )
    label = effects.obs["perturbation"].astype(str).iloc[0]
    table = pd.DataFrame(
        {
            "evidence": ["interventions"] * 4 + ["reference"] * 2,
            "network": ["grn", "grn", "random", "random", "grn", "random"],
            "k": [10, 100, 10, 100, 10, 10],
            "precision": [0.5, 0.4, 0.1, 0.1, 0.9, 0.2],
        }
    )
    return {"adata": adata, "effects": effects, "predicted": predicted, "net": net, "label": label, "table": table}


CALLS = {
    "training": lambda w, **kw: pl.training(_Trained(), **kw),
    "predicted_vs_observed": lambda w, **kw: pl.predicted_vs_observed(w["predicted"], w["adata"], w["label"], **kw),
    "top_genes": lambda w, **kw: pl.top_genes(w["predicted"], w["adata"], w["label"], n_genes=6, **kw),
    "effects": lambda w, **kw: pl.effects(w["effects"], n_genes=10, **kw),
    "grn": lambda w, **kw: pl.grn(w["net"], **kw),
    "grn heatmap": lambda w, **kw: pl.grn(w["net"], kind="heatmap", **kw),
    "grn_evaluation": lambda w, **kw: pl.grn_evaluation(w["table"], **kw),
}


@pytest.mark.parametrize("name", CALLS)
def test_draws_into_given_axes_and_touches_nothing_global(world, name):
    import matplotlib.pyplot as plt

    before, figures = dict(matplotlib.rcParams), plt.get_fignums()
    ax = _empty_axes()
    assert CALLS[name](world, ax=ax) is ax
    assert ax.has_data() or ax.patches or ax.images
    assert CALLS[name](world, ax=_empty_axes(), return_fig=True).axes
    assert plt.get_fignums() == figures
    assert dict(matplotlib.rcParams) == before
    ax.get_figure().canvas.draw()


@pytest.mark.parametrize("name", CALLS)
def test_makes_its_own_figure(world, name):
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    figure = CALLS[name](world, return_fig=True)
    assert isinstance(figure, Figure)
    plt.close(figure)


def test_predicted_vs_observed_draws_the_shifts(world):
    ax = pl.predicted_vs_observed(world["predicted"], world["adata"], world["label"], ax=_empty_axes())
    # the pseudobulk of the same cells predicts itself: every point is on the diagonal
    points = next(c for c in ax.collections if len(np.asarray(c.get_offsets())) == world["adata"].n_vars)
    x, y = np.asarray(points.get_offsets()).T
    np.testing.assert_allclose(x, y, atol=1e-5)
    assert "r = 1.00" in ax.get_title()


def test_top_genes_orders_by_observed_shift(world):
    ax = pl.top_genes(world["predicted"], world["adata"], world["label"], n_genes=5, ax=_empty_axes())
    effects = world["effects"]
    row = effects[effects.obs["perturbation"].astype(str) == world["label"]].to_df().iloc[0]
    expected = row.abs().sort_values(ascending=False).index[:5]
    assert [t.get_text() for t in ax.get_xticklabels()] == list(expected)


def test_training_marks_the_kept_epoch():
    ax = pl.training(_Trained(), ax=_empty_axes())
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["validation"].get_ydata()) == [3.2, 2.1, 2.2]
    assert list(lines["state kept"].get_xdata()) == [2, 2]


def test_network_keeps_the_strongest_edges_and_names_apart(world):
    ax = pl.grn(world["net"], n_edges=2, ax=_empty_axes())
    assert {t.get_text() for t in ax.texts} == {"A", "C", "D"}
    rng = np.random.default_rng(0)
    names = [f"GENE{i}" for i in range(30)]
    net = pd.DataFrame(
        {"source": rng.choice(names[:4], 40), "target": rng.choice(names[4:], 40), "weight": rng.normal(size=40)}
    )
    ax = pl.grn(net.drop_duplicates(["source", "target"]), ax=_empty_axes())
    ax.get_figure().canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    overlapping = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert overlapping <= 0.02 * len(boxes) * (len(boxes) - 1) / 2


def test_grn_evaluation_reads_what_evaluate_grn_writes(world):
    adata = world["adata"]
    train, test = adata[::2].copy(), adata[1::2].copy()
    scpert.tl.infer_grn(train, threshold=0)
    table = scpert.tl.evaluate_grn(train, observed=test, k=(5, 10, 10_000), n_permutations=2)
    ax = pl.grn_evaluation(table, ax=_empty_axes())
    drawn = {line.get_label() for line in ax.lines}
    assert {"grn", "random", "effect size", "correlation"} <= drawn
    first = next(line for line in ax.lines if line.get_label() == "grn")
    expected = table[table["network"] == "grn"].dropna(subset=["precision"]).sort_values("k")["precision"]
    np.testing.assert_allclose(first.get_ydata(), expected)
    assert first.get_xdata()[-1] == train.varp["grn"].nnz  # not the 10,000 that were asked for


def test_grn_evaluation_draws_one_evidence_at_a_time(world):
    ax = pl.grn_evaluation(world["table"], evidence="reference", ax=_empty_axes())
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.9], [0.2]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: pl.predicted_vs_observed(w["predicted"], w["adata"], "NOPE"), LabelError, "NOPE.*not among"),
        (lambda w: pl.top_genes(w["predicted"], w["adata"], "NOPE"), LabelError, "NOPE.*not among"),
        (lambda w: pl.top_genes(w["predicted"], w["adata"], w["label"], genes=["NOPE"]), MissingKeyError, "NOPE"),
        (lambda w: pl.top_genes(w["predicted"], w["adata"], w["label"], n_genes=0), ValueError, "n_genes"),
        (lambda w: pl.grn(w["net"].drop(columns="weight")), MissingKeyError, "weight"),
        (lambda w: pl.grn(w["net"], gene="NOPE"), ScpertError, "no edge of 'NOPE'"),
        (lambda w: pl.grn(w["net"], kind="circle"), ValueError, "kind"),
        (lambda w: pl.grn(w["net"], n_edges=-3), ScpertError, "n_edges=-3"),
        (lambda w: pl.grn(w["net"].assign(weight="strong")), ScpertError, "no numbers"),
        (lambda w: pl.grn(w["adata"], "none"), MissingKeyError, "none"),
        (lambda w: pl.grn_evaluation(w["table"], metric="nope"), MissingKeyError, "no metric 'nope'"),
        (lambda w: pl.grn_evaluation(w["net"]), MissingKeyError, "evaluate_grn"),
        (lambda w: pl.grn_evaluation(w["table"], evidence="hearsay"), ValueError, "evidence"),
        (lambda w: pl.training(_Trained(), metric="nope"), MissingKeyError, "no metric 'nope'"),
    ],
)
def test_bad_input_is_a_clear_error(world, call, error, message):
    with pytest.raises(error, match=message):
        call(world)


def test_a_closed_form_model_has_no_curve(world):
    with pytest.raises(ScpertError, match="closed form"):
        pl.training(type("Mean", (), {"history": {}})())


def test_an_empty_network_is_said(world):
    ax = pl.grn(world["net"].iloc[:0], ax=_empty_axes())
    assert [t.get_text() for t in ax.texts] == ["no edges"]


def test_names_of_points_do_not_overlap_and_stay_inside():
    import numpy as np
    from matplotlib.figure import Figure

    from scpert.pl._figure import name_points

    ax = Figure(figsize=(3, 3)).subplots()
    rng = np.random.default_rng(0)
    x, y = rng.random(40), rng.random(40)
    ax.plot(x, y, ".")
    name_points(ax, x, y, [f"GENE{i}+OTHER{i}" for i in range(40)], range(40))
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 3 < len(boxes) < 40
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_top_genes_title_tells_how_genes_were_chosen_and_sparse_predictions_are_read(world):
    from scipy import sparse

    predicted = world["predicted"].copy()
    predicted.layers["delta"] = sparse.csr_matrix(predicted.layers["delta"])
    genes = list(predicted.var_names[:3])
    for function, options in ((pl.top_genes, {"genes": genes}), (pl.predicted_vs_observed, {})):
        ax = function(predicted, world["adata"], world["label"], ax=_empty_axes(), **options)
        dense = function(world["predicted"], world["adata"], world["label"], ax=_empty_axes(), **options)
        assert ax.get_title() == dense.get_title()
    assert (
        pl.top_genes(predicted, world["adata"], world["label"], genes=genes, ax=_empty_axes())
        .get_title()
        .endswith("chosen genes")
    )


def test_limits_and_effects_are_drawn(world):
    """A pseudobulk with limits has bars; a table of effects stands in the place of cells."""
    predicted = world["predicted"].copy()
    bare = pl.top_genes(predicted, world["adata"], world["label"], n_genes=4, ax=_empty_axes())
    predicted.layers["lower"], predicted.layers["upper"] = predicted.X - 0.5, predicted.X + 0.25
    ax = pl.top_genes(predicted, world["adata"], world["label"], n_genes=4, ax=_empty_axes())
    assert len(ax.collections) == len(bare.collections) + 1
    bars = np.array([s[:, 1] for s in ax.collections[-1].get_segments()])
    np.testing.assert_allclose(bars[:, 1] - bars[:, 0], 0.75, rtol=1e-5)
    effects = world["effects"]
    for function in (pl.top_genes, pl.predicted_vs_observed):
        ax = function(world["predicted"], effects, world["label"], scale="effects", ax=_empty_axes())
        assert "1 row" in ax.get_title() or "1 row" in str([t.get_text() for t in ax.get_legend().get_texts()])
