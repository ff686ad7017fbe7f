"""The runner: resumable, the same on Dask, no leaks, failures kept; the leaderboard; exchange with cell-eval."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scpert
from scpert import benchmark
from scpert.benchmark import ModelSpec, Task
from scpert.errors import ScpertError, SplitError
from scpert.model import PerturbedMean

METRICS = ("pearson_delta", "mse", "centroid_accuracy")


class Raises(PerturbedMean):
    """Fails in the middle of its training."""

    def _fit(self):
        raise RuntimeError("no convergence after 3 steps")


class Alone(PerturbedMean):
    """Draws from the random numbers of the process, as networks do."""

    def _fit(self):
        with self._seeded(self.random_state_):
            time.sleep(0.02)
            self.factor = float(torch.rand(1))

    def _predict_delta(self, targets, reference, rng, batch_size):
        out = super()._predict_delta(targets, reference, rng, batch_size)
        out.delta = out.delta * self.factor
        return out


class Scaled(PerturbedMean):
    """The mean effect times a factor: a hyper-parameter to choose."""

    def __init__(self, adata=None, registry=None, *, factor: float = 1.0, note=None):
        super().__init__(adata, registry)
        self.factor = factor
        seen = set(adata.obs["perturbation"][adata.obs["split"] != "test"])
        assert set(adata.obs["perturbation"]) <= seen, "a test cell was shown to the model"

    def _predict_delta(self, targets, reference, rng, batch_size):
        out = super()._predict_delta(targets, reference, rng, batch_size)
        out.delta = out.delta * self.factor
        return out


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return scpert.datasets.simulated(500, 40, 12, n_combinations=0, random_state=0, effect_size=2.0)


def _task(screen, name="t", **options) -> Task:
    options = {"split": "perturbations", "metrics": METRICS, "n_draws": 2, **options}
    if options["split"] == "perturbations":
        options.setdefault("split_options", {"fractions": (0.5, 0.25, 0.25)})
    return Task(name, screen, **options)


def test_table_and_files(screen, tmp_path):
    results = benchmark.run([_task(screen)], ["NoChange", ("twice", Scaled, {"factor": 2.0})], seeds=2, out=tmp_path)
    assert set(results["model"]) == {"NoChange", "twice", "training_mean", "ceiling", "mismatched"}
    assert set(results["metric"]) == set(METRICS)
    assert (results["status"] == "ok").all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "results.parquet"), results)
    spent = benchmark.costs(tmp_path)
    assert (spent["seconds"] > 0).all() and (spent["peak_megabytes"] >= 0).all()
    assert not [f for f in os.listdir(tmp_path / "cells") if f.endswith(".part")]
    before = {f: os.stat(tmp_path / "cells" / f).st_mtime_ns for f in os.listdir(tmp_path / "cells")}
    again = benchmark.run([_task(screen)], ["NoChange", ("twice", Scaled, {"factor": 2.0})], seeds=2, out=tmp_path)
    pd.testing.assert_frame_equal(again, results)
    assert before == {f: os.stat(tmp_path / "cells" / f).st_mtime_ns for f in os.listdir(tmp_path / "cells")}
    other = benchmark.run([_task(screen)], [("twice", Scaled, {"factor": 3.0})], seeds=1, out=tmp_path)
    changed = other[other["model"] == "twice"]["value"].to_numpy()
    old = results[(results["model"] == "twice") & (results["seed"] == 0)]["value"].to_numpy()
    assert not np.allclose(changed, old)


def test_numbers_are_those_of_evaluate(screen, tmp_path):
    results = benchmark.run([_task(screen)], ["PerturbedMean"], seeds=[3], out=tmp_path)
    data = screen.copy()
    scpert.pp.split(data, kind="perturbations", fractions=(0.5, 0.25, 0.25), random_state=3)
    seen = data[(data.obs["split"] != "test").to_numpy()].copy()
    test, train = (data[(data.obs["split"] == s).to_numpy()].copy() for s in ("test", "train"))
    PerturbedMean.setup_anndata(seen, split_key="split")
    model = PerturbedMean(seen)
    model.train()
    labels = sorted(set(test.obs["perturbation"]) - {"control"})
    want = scpert.metrics.evaluate(model.predict_perturbation(labels, on_unknown="mean"), test, train=train)
    got = results[(results["model"] == "PerturbedMean") & (results["metric"] == "mse")].set_index("perturbation")[
        "value"
    ]
    np.testing.assert_allclose(got.loc[labels], want.loc[labels, "mse"], rtol=1e-6)


def test_backed_data(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    there, memory = (
        benchmark.run([_task(data, metrics=("mse",))], ["PerturbedMean"], seeds=1, out=tmp_path / name)
        for name, data in (("there", backed), ("memory", screen))
    )
    pd.testing.assert_frame_equal(there, memory)


def test_no_change_is_no_change_for_targets_outside_the_panel(screen, tmp_path):
    """Held-out targets that are no genes of the panel: a stand-in of the mean effect would be another baseline."""
    targets = set(screen.obs["perturbation"])
    panel = screen[:, [g not in targets for g in screen.var_names]].copy()
    results = benchmark.run([_task(panel)], ["NoChange", "PerturbedMean"], seeds=[3], out=tmp_path)
    scpert.pp.split(panel, kind="perturbations", fractions=(0.5, 0.25, 0.25), random_state=3)
    truth = scpert.metrics.pseudobulk(panel[(panel.obs["split"] == "test").to_numpy()].copy())
    train = panel[panel.obs["split"].isin(["train", "val"]).to_numpy()].copy()
    X = np.log1p(1e4 * train.X.toarray() / train.X.toarray().sum(axis=1, keepdims=True))
    base = X[((train.obs["perturbation"] == "control") & (train.obs["split"] == "train")).to_numpy()].mean(axis=0)
    value = results[results["metric"] == "mse"].pivot(index="perturbation", columns="model", values="value")
    np.testing.assert_allclose(value["NoChange"].loc[truth.obs_names], ((truth.X - base) ** 2).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(value["PerturbedMean"], value["training_mean"], rtol=1e-4)
    assert not np.allclose(value["NoChange"], value["training_mean"], rtol=1e-2)


_KILLED = """
import sys
import scpert
from scpert.benchmark import Task, run
adata = scpert.datasets.simulated(500, 40, 12, n_combinations=0, random_state=0, effect_size=2.0)
task = Task("t", adata, "perturbations", metrics=("mse",), n_draws=2, split_options={"fractions": (0.5, 0.25, 0.25)})
print("ready", flush=True)
run([task], ["NoChange", "PerturbedMean"], seeds=3, out=sys.argv[1])
print("done", flush=True)
"""


def test_killed_runs_go_on(screen, tmp_path):
    """SIGKILL at random moments; then the table is that of a run without interruption."""
    rng = random.Random(0)
    finished: dict[str, int] = {}
    cells = tmp_path / "killed" / "cells"
    for _ in range(int(os.environ.get("SCPERT_TEST_KILLS", "1"))):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(tmp_path / "killed")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "SCPERT_PROGRESS": "0"},
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        n = len(finished)
        while process.poll() is None and (not cells.exists() or len(list(cells.glob("*[!t].parquet"))) <= n // 2):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = {f.name: f.stat().st_mtime_ns for f in cells.glob("*.parquet")}
        assert all(now[f] == t for f, t in finished.items() if f in now and not f.endswith(".cost.parquet"))
        finished = {f: t for f, t in now.items() if not f.endswith(".cost.parquet")}
    task = _task(screen, metrics=("mse",))
    killed = benchmark.run([task], ["NoChange", "PerturbedMean"], seeds=3, out=tmp_path / "killed")
    assert all((cells / f).stat().st_mtime_ns == t for f, t in finished.items())
    whole = benchmark.run([task], ["NoChange", "PerturbedMean"], seeds=3, out=tmp_path / "whole")
    pd.testing.assert_frame_equal(killed, whole, check_exact=True)


def test_dask_gives_the_same_numbers(screen, tmp_path):
    distributed = pytest.importorskip("distributed")
    serial = benchmark.run([_task(screen)], ["NoChange", "PerturbedMean"], seeds=1, out=tmp_path / "a")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        spread = benchmark.run(
            [_task(screen)], ["NoChange", "PerturbedMean"], seeds=1, out=tmp_path / "b", engine=client
        )
    pd.testing.assert_frame_equal(spread, serial, check_exact=True)


def test_dask_workers_with_threads_give_the_same_numbers(screen, tmp_path):
    distributed = pytest.importorskip("distributed")
    models = [(f"m{i}", Alone, {}) for i in range(4)]
    serial = benchmark.run([_task(screen)], models, seeds=2, out=tmp_path / "a")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        spread = benchmark.run([_task(screen)], models, seeds=2, out=tmp_path / "b", engine=client)
    pd.testing.assert_frame_equal(spread, serial, check_exact=True)


def test_a_model_that_raises_is_a_failed_row(screen, tmp_path):
    results = benchmark.run([_task(screen)], [("bad", Raises, {}), "NoChange"], seeds=1, out=tmp_path)
    row = results[results["model"] == "bad"]
    assert list(row["status"]) == ["failed"]
    assert "no convergence after 3 steps" in row["message"].iloc[0]
    assert (results[results["model"] == "NoChange"]["status"] == "ok").all()
    board = benchmark.leaderboard(results, n_boot=50, path=tmp_path / "page.html")
    assert "no convergence after 3 steps" in (tmp_path / "page.html").read_text()
    bad = board[board["model"] == "bad"]
    assert (bad["failed"] == 1).all() and bad["verdict"].str.startswith("failed: RuntimeError").all()
    again = benchmark.run([_task(screen)], [("bad", Raises, {}), "NoChange"], seeds=1, out=tmp_path, retry_failed=True)
    pd.testing.assert_frame_equal(again, results)


# ---------------------------------------------------------------------------------------------- leaks


def test_hyper_parameters_are_chosen_on_validation_perturbations(screen, tmp_path):
    spec = ModelSpec("scaled", Scaled, grid={"factor": [-3.0, 1.0]})
    results = benchmark.run([_task(screen)], [spec], seeds=1, out=tmp_path)
    assert set(results[results["model"] == "scaled"]["message"]) == {'{"factor": 1.0}'}
    with pytest.raises(SplitError, match="a leak"):
        ModelSpec("scaled", Scaled, grid={"factor": [1.0]}, select_on="test")
    no_val = _task(screen, "no_val", split_options={"fractions": (0.7, 0.0, 0.3)})
    failed = benchmark.run([no_val], [spec], seeds=1, out=tmp_path)
    assert "no val cells to choose on" in failed[failed["model"] == "scaled"]["message"].iloc[0]


def test_a_candidate_that_tells_of_few_perturbations_is_not_chosen_for_these(tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"p{i}" for i in range(120)]
    member = rng.integers(0, 12, 120)
    X = rng.normal(size=(12, 60))[member] + 0.7 * rng.normal(size=(120, 60))
    effects = ad.AnnData(X.astype(np.float32), pd.DataFrame({"perturbation": genes}, index=genes))
    all_genes = pd.DataFrame({"gene": genes, "term": [f"m{m}" for m in member]})
    few = all_genes[member < 2]
    noisy = all_genes.assign(term=np.where(rng.random(120) < 0.25, "m0", all_genes["term"]))
    options = {"fractions": (0.6, 0.2, 0.2)}
    task = Task("t", effects, split_options=options, setup={"scale": "effects"}, metrics=("mse",))
    grid = {"knowledge": [{"few": few}, {"noisy": noisy}]}
    spec = ModelSpec("KNN", grid=grid, select_by="pearson_delta_centroid")
    results = benchmark.run([task], [spec], seeds=1, out=tmp_path)
    chosen = benchmark.costs(results).query("model == 'KNN'")["chosen"]
    assert chosen.str.contains("noisy").all()


def test_validation_perturbations_that_are_tested_are_refused_whatever_the_question(screen, tmp_path):
    data = screen.copy()
    scpert.pp.split(data, kind="perturbations", fractions=(0.5, 0.25, 0.25))
    split, labels = (data.obs[k].astype(str).to_numpy() for k in ("split", "perturbation"))
    held = sorted(set(labels[split == "test"]) - {"control"})[0]
    split[np.flatnonzero(labels == held)[:3]] = "val"
    data.obs["split"] = split
    spec = ModelSpec("scaled", Scaled, grid={"factor": [1.0, 2.0]})
    results = benchmark.run([Task("leak", data, "given", metrics=METRICS, n_draws=2)], [spec], seeds=1, out=tmp_path)
    assert (results["status"] == "failed").all()
    assert results["message"].str.contains("in val and in test but not in train: a leak").all()
    scpert.pp.split(data, kind="cells")  # seen perturbations: all parts hold all of them
    results = benchmark.run([Task("seen", data, "given", metrics=METRICS, n_draws=2)], [spec], seeds=1, out=tmp_path)
    assert (results["status"] == "ok").all()


@pytest.mark.parametrize("kind", ["test_in_train", "val_in_test", "combination"])
def test_planted_leaks_are_refused(screen, tmp_path, kind):
    data = screen.copy()
    scpert.pp.split(data, kind="perturbations", fractions=(0.5, 0.25, 0.25))
    split = data.obs["split"].astype(str).to_numpy()
    labels = data.obs["perturbation"].astype(str).to_numpy()
    held = sorted(set(labels[split == "test"]) - {"control"})[0]
    if kind == "test_in_train":
        split[np.flatnonzero(labels == held)[0]] = "train"
    elif kind == "val_in_test":
        split[np.flatnonzero(labels == held)[0]] = "val"
    else:
        other = sorted(set(labels[split == "train"]) - {"control"})[0]
        labels[np.flatnonzero(labels == other)[:3]] = f"{held}+{other}"
    data.obs["split"], data.obs["perturbation"] = split, labels
    task = Task("leak", data, "given", question="unseen perturbations", metrics=METRICS, n_draws=2)
    results = benchmark.run([task], ["NoChange"], seeds=1, out=tmp_path)
    assert (results["status"] == "failed").all()
    assert results["message"].str.contains("a leak").all()


def test_options_with_test_cells_are_refused(screen, tmp_path):
    results = benchmark.run([_task(screen)], [("peeks", Scaled, {"note": screen})], seeds=1, out=tmp_path)
    assert "holds test cells" in results[results["model"] == "peeks"]["message"].iloc[0]


# ---------------------------------------------------------------------------------------------- tasks and ranking


def test_effects_folds_and_few_cells(screen, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"K{i}" for i in range(20)]
    effects = ad.AnnData(
        X=rng.normal(size=(20, 15)) + 0.5,
        obs=pd.DataFrame({"perturbation": names}, index=names),
        var=pd.DataFrame(index=[f"G{i}" for i in range(15)]),
    )
    folds = Task("effects", effects, "folds", split_options={"n_folds": 4}, setup={"scale": "effects"}, metrics=METRICS)
    few = _task(screen, "few", split="cells", max_train_cells=3)
    assert few.question == "seen with few cells"
    results = benchmark.run([folds, few], ["PerturbedMean"], seeds=4, out=tmp_path)
    assert (results["status"] == "ok").all(), results["message"].unique()
    part = results[
        (results["task"] == "effects") & (results["model"] == "PerturbedMean") & (results["metric"] == "mse")
    ]
    assert sorted(part["perturbation"]) == sorted(names)  # each in one fold
    board = benchmark.leaderboard(results, n_boot=50)
    assert "undefined for the ceiling" in set(board[board["task"] == "effects"]["verdict"])


def test_cells_of_the_training_mean_are_the_baseline_of_metrics_of_cells(screen, tmp_path):
    names = ("mse", "mmd", "roc_auc")
    task = _task(screen, level="cell", split="cells", metrics=names, split_options={"fractions": (0.5, 0.0, 0.5)})
    flat = _task(screen, "flat", split="cells", metrics=("mse",), split_options={"fractions": (0.5, 0.0, 0.5)})
    results = benchmark.run([task, flat], ["PerturbedMean"], seeds=1, out=tmp_path)
    value = results[results["status"] == "ok"].pivot_table(
        index="perturbation", columns=["task", "metric", "model"], values="value"
    )
    for name in ("mmd", "roc_auc"):  # the same cells
        np.testing.assert_allclose(value["t"][name]["training_mean"], value["t"][name]["PerturbedMean"])
    np.testing.assert_allclose(value["t"]["mse"]["training_mean"], value["flat"]["mse"]["training_mean"])
    board = benchmark.leaderboard(results[results["task"] == "t"], n_boot=50).set_index(["metric", "model"])
    assert board.loc[("mmd", "PerturbedMean"), "difference"] == 0


def test_no_model_beats_the_mean_without_effect(tmp_path):
    null = scpert.datasets.simulated(700, 40, 12, n_combinations=0, random_state=0, effect_size=0.0, quality_fail=0.0)
    task = Task("null", null, "cells", metrics=METRICS, n_draws=8, split_options={"fractions": (0.5, 0.1, 0.4)})
    results = benchmark.run([task], ["NoChange", "PerturbedMean", "Additive"], seeds=1, out=tmp_path)
    board = benchmark.leaderboard(results, n_boot=300)
    models = board[~board["model"].isin(["ceiling", "training_mean"])]
    assert models["score"].isna().all()
    assert models["verdict"].str.startswith("nothing to predict here").all()
    gains = models[models["difference"] > 0]
    assert gains["pvals"].isna().all()
    mean = board[board["model"] == "training_mean"]
    assert (mean["rank"] == 1).all()


def test_undefined_metrics_of_cells_do_not_hide_that_there_is_no_effect(tmp_path):
    null = scpert.datasets.simulated(700, 40, 12, n_combinations=0, random_state=0, effect_size=0.0, quality_fail=0.0)
    metrics = (*METRICS, "mse_delta", "de_spearman_lfc_sig")
    options = {"fractions": (0.5, 0.1, 0.4)}
    task = Task("null", null, "cells", metrics=metrics, n_draws=8, split_options=options, level="cell")
    results = benchmark.run([task], ["NoChange"], seeds=1, out=tmp_path)
    assert results.loc[results["metric"] == "de_spearman_lfc_sig", "value"].isna().all()
    board = benchmark.leaderboard(results, n_boot=300)
    assert (board.loc[board["model"] == "training_mean", "rank"] == 1).all()
    gains = board[(board["model"] == "NoChange") & (board["difference"] > 0)]
    assert "mse_delta" in set(gains["metric"]) and gains["difference_lower"].isna().all()


def test_leaderboard_ranks_and_page(screen, tmp_path):
    models = ["NoChange", ("own", Scaled, {"factor": 1.0}), ("wild", Scaled, {"factor": 30.0})]
    tasks = [_task(screen, "a"), _task(screen, "b", split="cells")]
    results = benchmark.run(tasks, models, seeds=1, out=tmp_path)
    board = benchmark.leaderboard(results, n_boot=100, path=tmp_path / "page.html")
    mse = board[(board["metric"] == "mse") & (board["task"] == "a")]
    assert mse[mse["model"] == "wild"]["rank"].iloc[0] == mse["rank"].max()
    base, own = (mse[mse["model"] == m]["value"].iloc[0] for m in ("training_mean", "own"))
    assert base == pytest.approx(own, rel=1e-5)
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and 'src="http' not in page and "wild" in page and len(page) < 300_000
    from scpert.pl._benchmark import leaderboard as draw

    for kind in ("forest", "critical_difference"):
        assert draw(board, metric="centroid_accuracy", kind=kind, show=False).get_xlabel()
    with pytest.raises(ScpertError, match="kind='pie'"):
        draw(board, kind="pie", show=False)
    with pytest.raises(ScpertError, match="not in the results"):
        benchmark.leaderboard(results, metrics=["rmse"])
    with pytest.raises(ScpertError, match="lacks the column"):
        benchmark.leaderboard(results.drop(columns="task"))


def test_calibration_of_intervals(screen):
    from scpert.pl._benchmark import calibration

    truth = scpert.metrics.pseudobulk(screen)
    predicted = truth.copy()
    predicted.X = truth.X + np.random.default_rng(0).normal(0, 0.2, truth.shape)
    predicted.layers["std"] = np.full(truth.shape, 0.2)
    predicted.layers["lower"], predicted.layers["upper"] = predicted.X - 0.329, predicted.X + 0.329
    ax = calibration(predicted, screen, show=False)
    x, y = ax.lines[1].get_data()
    np.testing.assert_allclose(x, y, atol=0.06)
    del predicted.layers["std"], predicted.layers["lower"]
    with pytest.raises(ScpertError, match="no intervals"):
        calibration(predicted, screen, show=False)


def test_exchange_with_cell_eval(screen, tmp_path):
    predicted = scpert.metrics.pseudobulk(screen)
    real, other = benchmark.export_cell_eval(predicted, screen, tmp_path)
    back, observed, table = benchmark.import_cell_eval(tmp_path)
    assert table is None and real.exists() and other.exists()
    assert list(back.var_names) == list(observed.var_names)
    assert set(back.obs["perturbation"]) == set(observed.obs["perturbation"])
    assert (scpert.metrics.evaluate(back, observed, level="pseudobulk", metrics=["mse"])["mse"] < 1e-9).all()
    with pytest.raises(ScpertError, match="holds neither"):
        benchmark.import_cell_eval(tmp_path / "nowhere")


def test_command_line(screen, tmp_path, capsys):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    arguments = [
        "--data",
        str(tmp_path / "screen.h5ad"),
        "--models",
        "nochange",
        "--split",
        "perturbations",
        "--seeds",
        "1",
    ]
    arguments += ["--out", str(tmp_path / "out"), "--metrics", "mse", "--fractions", "0.5,0.25,0.25"]
    parsed = benchmark.add_arguments(argparse.ArgumentParser()).parse_args(arguments)
    assert benchmark.main(parsed) == 0
    assert "training_mean" in capsys.readouterr().out
    assert (tmp_path / "out" / "leaderboard.html").exists()


def test_command_line_takes_knowledge(screen, tmp_path, capsys, caplog):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    genes = list(screen.var_names)
    pd.DataFrame({"gene": genes, "term": [f"t{i % 5}" for i in range(len(genes))]}).to_csv(
        tmp_path / "go.tsv.gz", sep="\t", index=False
    )
    pd.DataFrame(np.random.default_rng(0).normal(size=(len(genes), 3)), index=genes).to_csv(tmp_path / "text.csv")
    start = ["--data", str(tmp_path / "screen.h5ad"), "--models", "KNN", "NoChange", "--seeds", "1", "--metrics", "mse"]
    start += ["--fractions", "0.5,0.25,0.25"]
    tables = ["--knowledge", f"go={tmp_path / 'go.tsv.gz'}", f"text={tmp_path / 'text.csv'}"]
    assert benchmark.main([*start, "--out", str(tmp_path / "a"), *tables]) == 0
    assert "fallback" in capsys.readouterr().out and not caplog.text.count("no --knowledge")
    assert benchmark.main([*start, "--out", str(tmp_path / "b")]) == 0
    assert "KNN has no --knowledge" in caplog.text and "NoChange has no" not in caplog.text
    known = [pd.read_parquet(tmp_path / x / "results.parquet").query("model == 'KNN'")["known"] for x in "ab"]
    assert "unseen" in set(known[0]) and set(known[1]) == {"fallback"}
    graph = [x if x != "KNN" else "GEARS" for x in start] + ["--max-epochs", "1", "--out", str(tmp_path / "d")]
    assert benchmark.main([*graph, *tables]) == 0  # the annotations, not the embedding
    found = pd.read_parquet(tmp_path / "d" / "results.parquet").query("model == 'GEARS'")
    assert (found["status"] == "ok").all()
    strange = tmp_path / "strange.csv"
    pd.DataFrame({"source": ["X1"], "target": ["X2"]}).to_csv(strange, index=False)
    graph[-1] = str(tmp_path / "e")
    assert benchmark.main([*graph, "--knowledge", f"net={strange}"]) == 0
    found = pd.read_parquet(tmp_path / "e" / "results.parquet").query("model == 'GEARS'")
    assert found["message"].str.contains("perturbation_net holds none of the data's").all()
    for bad, match in (("go", "not NAME=FILE"), ("go=nowhere.csv", "no such file"), (f"go={__file__}", "not a table")):
        with pytest.raises(ScpertError, match=match):
            benchmark.main([*start, "--out", str(tmp_path / "c"), "--knowledge", bad])


def test_functions_that_differ_in_what_they_hold_are_other_data(tmp_path):
    """Results of one seed must not stand for those of another because the source of the function is the same."""
    from scpert.benchmark._task import fingerprint

    def load(seed=0):
        return scpert.datasets.simulated(300, 40, 6, n_combinations=0, random_state=seed)

    def around(seed):
        return lambda: load(seed)

    class Loader:
        def __init__(self, seed):
            self.seed = seed

        def load(self):
            return load(self.seed)

    for make in (
        lambda seed: functools.partial(load, seed),
        lambda seed: functools.partial(load, seed=seed),
        lambda seed: lambda s=seed: load(s),
        around,
        lambda seed: Loader(seed).load,
    ):
        assert fingerprint(make(0)) == fingerprint(make(0))
        assert fingerprint(make(0)) != fingerprint(make(1))

    def again(n):
        return again(n - 1) if n else load()

    assert fingerprint(again)
    cells = [
        benchmark.run([Task("t", around(s), "cells", metrics=("mse",), n_draws=2)], ["NoChange"], seeds=1, out=tmp_path)
        for s in (0, 1)
    ]
    assert not cells[0]["value"].equals(cells[1]["value"])


def test_options_that_differ_are_other_results(screen, tmp_path):
    from scpert.benchmark._task import fingerprint

    class Settings:
        def __init__(self, value):
            self.value = value

    genes = [f"g{i}" for i in range(500)]
    other = [*genes[:250], "another", *genes[251:]]
    matrix, tensor = sparse.eye_array(50, format="csr"), torch.zeros(5000)
    moved, changed = matrix[::-1].copy(), tensor.clone()
    changed[2500] = 1
    pairs = [
        ([1, 15], [11, 5]), ({"a": [1], "b": 2}, {"a": [1, 2]}), (pd.Index(genes), pd.Index(other)), (matrix, moved),
        (tensor, changed), (Settings(1), Settings(2)), ({"a", "b"}, {"a", "c"}),
    ]  # fmt: skip
    for a, b in pairs:
        assert fingerprint(a) != fingerprint(b)
        assert fingerprint({"x": [a]}) == fingerprint({"x": [a]})
    assert fingerprint(Settings(genes)) == fingerprint(Settings(list(genes)))
    for note in ([1, 15], [11, 5]):
        results = benchmark.run([_task(screen)], [ModelSpec("m", Scaled, {"note": note})], seeds=1, out=tmp_path)
    assert len(list((tmp_path / "cells").glob("t__m__*.cost.parquet"))) == 2 and (results["status"] == "ok").all()


def test_long_names(screen, tmp_path):
    task = _task(screen, "t" * 200, metrics=("mse",))
    results = benchmark.run([task], [("m" * 200 + end, PerturbedMean) for end in "ab"], seeds=1, out=tmp_path)
    assert results["model"].nunique() == 5 and (results["status"] == "ok").all()


def test_errors(screen, tmp_path):
    with pytest.raises(ScpertError, match="Task 't': metrics: 'msee' not known. Did you mean 'mse'"):
        benchmark.run([_task(screen, metrics=("msee",))], ["NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="there is no file 'nothing.h5ad'"):
        benchmark.run([_task("nothing.h5ad")], ["NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(SplitError, match="learn from the split of the task"):
        ModelSpec("mean", "PerturbedMean", setup={"split_key": "other"})
    with pytest.raises(ScpertError, match="select_by='msee' is no metric that has a best end"):
        ModelSpec("scaled", Scaled, grid={"factor": [1.0]}, select_by="msee")
    with pytest.raises(ScpertError, match="Did you mean 'PerturbedMean'"):
        benchmark.run([_task(screen)], ["PerturbedMaen"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="is not known. TASKS has"):
        benchmark.run(["nothing"], ["NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="occur twice"):
        benchmark.run([_task(screen)], ["NoChange", "NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="split='random'"):
        Task("x", screen, "random")
    with pytest.raises(ScpertError, match="max_train_cells=2.5: give a whole number"):
        Task("x", screen, "cells", max_train_cells=2.5)
    with pytest.raises(ScpertError, match="seeds is empty"):
        benchmark.run([_task(screen)], ["NoChange"], seeds=[], out=tmp_path)
    for seeds in (1.5, [1.7], [-1]):
        with pytest.raises(ScpertError, match="seed"):
            benchmark.run([_task(screen)], ["NoChange"], seeds=seeds, out=tmp_path)
    with pytest.raises(ScpertError, match="engine='dask': give a Dask client"):
        benchmark.run([_task(screen)], ["NoChange"], seeds=1, out=tmp_path, engine="dask")
    with pytest.raises(ScpertError, match="tasks is AnnData"):
        benchmark.run(screen, ["NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="models is None"):
        benchmark.run([_task(screen)], None, seeds=1, out=tmp_path)
    failed = benchmark.run([_task(screen, setup={"control": "nobody"})], ["NoChange"], seeds=1, out=tmp_path)
    with pytest.raises(ScpertError, match="Nothing to rank.*control='nobody'"):
        benchmark.leaderboard(failed)
    with pytest.raises(ScpertError, match="holds no results"):
        benchmark.leaderboard(tmp_path / "nothing")


def test_effects_of_a_context_are_relative_to_its_own_controls(tmp_path):
    """Two contexts with different genes at work: what a perturbation does in one is what it does in the other."""
    rng = np.random.default_rng(0)
    base = rng.gamma(0.6, 3, (2, 60)) + 0.05
    effect = np.where(rng.random((12, 60)) < 0.2, rng.normal(0, 0.8, (12, 60)), 0)
    rows, obs = [], []
    for c in (0, 1):
        for p in range(-1, 12):
            mean = base[c] * np.exp(effect[p] if p >= 0 else 0)
            n = 120 if p < 0 else 40
            rows.append(rng.poisson(mean / mean.sum() * 2000, size=(n, 60)))
            obs += [("AB"[c], "control" if p < 0 else f"P{p}")] * n
    adata = ad.AnnData(
        sparse.csr_matrix(np.vstack(rows).astype(np.float32)),
        obs=pd.DataFrame(obs, columns=["line", "perturbation"], index=[f"c{i}" for i in range(len(obs))]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(60)]),
    )
    task = Task(
        "lines",
        adata,
        "contexts",
        split_options={"context_key": "line", "fractions": (0.5, 0.2, 0.3)},
        metrics=("pearson_delta", "mse"),
        n_draws=2,
    )
    results = benchmark.run([task], ["Additive", "NoChange"], seeds=1, out=tmp_path)
    mean = results.groupby(["model", "metric"])["value"].mean()
    assert mean["Additive", "pearson_delta"] > 0.85
    assert mean["Additive", "mse"] < 0.4 * mean["NoChange", "mse"]
    adata.obs["batch"] = np.where(np.arange(adata.n_obs) % 2, "x", "y")
    both = dataclasses.replace(task, name="both", setup={"covariate_keys": ["batch"]})
    results = benchmark.run([both], ["Additive"], seeds=1, out=tmp_path)  # the context is a stratum beside others
    assert results[results["metric"] == "pearson_delta"].groupby("model")["value"].mean()["Additive"] > 0.85
    for question in ("unseen context", "Unseen contexts"):
        with pytest.raises(ScpertError, match="predictions would start"):
            Task("line", adata, "given", question=question)


def test_held_out_cells_are_compared_within_covariates_too(tmp_path, run_of_six):
    """Six targets in a run with genes of its own: a model of their effects is not judged by the shift of the run."""
    adata, names, _ = run_of_six
    options = {"split_options": {"fractions": (0.5, 0.1, 0.4)}, "metrics": ("pearson_delta", "mse_delta"), "n_draws": 2}
    tasks = [
        Task(name, adata, "cells", setup={"covariate_keys": keys}, **options)
        for name, keys in (("pooled", None), ("runs", ["run"]))
    ]
    results = benchmark.run(tasks, ["Additive", "PerturbedMean"], seeds=1, out=tmp_path)
    value = results[results["perturbation"].isin(names[:6])].groupby(["task", "metric", "model"])["value"].mean()
    # the run's shift is in every pooled effect; within runs a replicate has what the perturbation does
    assert value["pooled", "pearson_delta", "ceiling"] > value["runs", "pearson_delta", "ceiling"] + 0.3
    assert value["runs", "pearson_delta", "Additive"] > value["runs", "pearson_delta", "PerturbedMean"] + 0.3
    assert value["runs", "mse_delta", "Additive"] < value["runs", "mse_delta", "PerturbedMean"]


def test_leaks_are_found_at_any_depth(screen, tmp_path):
    task = Task("leak", screen, "perturbations", metrics=("mse",), n_draws=2)
    for spec in (
        ModelSpec("a", "PerturbedMean", {"tables": [{"all": (screen,)}]}),
        ModelSpec("b", "PerturbedMean", grid={"full": [[screen]]}),
        ModelSpec("c", "PerturbedMean", train={"x": [screen]}),
        ModelSpec("d", Scaled, {"note": lambda: screen}),
        ModelSpec("e", Scaled, {"note": argparse.Namespace(data={"x": screen})}),
    ):
        results = benchmark.run([task], [spec], seeds=1, out=tmp_path)
        failed = results[(results["model"] == spec.name) & (results["status"] == "failed")]
        assert len(failed) == 1 and "a leak" in failed["message"].iloc[0]
    scpert.pp.split(screen, kind="perturbations", key_added="parts", random_state=0)  # as the task does
    spec = ModelSpec(
        "f", Scaled, {"note": screen[screen.obs.pop("parts") == "train"]}
    )  # a view of all, but of no test cell
    results = benchmark.run([task], [spec], seeds=1, out=tmp_path)
    assert (results.loc[results["model"] == "f", "status"] == "ok").all()


def test_a_class_written_anew_and_another_question_are_computed_anew(screen, tmp_path):
    task = Task("t", screen, "perturbations", metrics=("mse",), n_draws=2)

    def model(name: str):
        return type("Mine", (getattr(scpert.model, name),), {"__module__": "mine"})

    first, second = (ModelSpec("mine", model(name)) for name in ("PerturbedMean", "NoChange"))
    assert first.describe() != second.describe()
    assert task.describe() != dataclasses.replace(task, question="another").describe()


def test_nobody_gains_by_silence(screen, tmp_path):
    """Without values for the perturbations that move most, a copy of the training mean is the training mean."""
    task = Task("t", screen, "perturbations", metrics=("mse",), n_draws=2)
    results = benchmark.run([task], ["PerturbedMean"], seeds=2, out=tmp_path)
    own = results[results["model"] == "PerturbedMean"]
    silent = own.assign(model="Silent")
    silent.loc[silent["value"] > silent["value"].median(), "value"] = np.nan
    board = benchmark.leaderboard(pd.concat([results, silent])).set_index("model")
    assert board.loc["Silent", "value"] == pytest.approx(board.loc["training_mean", "value"], rel=1e-3)
    assert board.loc["Silent", "n"] < board.loc["PerturbedMean", "n"]
    assert board.loc["Silent", "rank"] >= board.loc["PerturbedMean", "rank"]


class Shy(PerturbedMean):
    """Says nothing of the perturbations that are nearest to the mean."""

    def _predict_delta(self, targets, reference, rng, batch_size):
        out = super()._predict_delta(targets, reference, rng, batch_size)
        out.delta[: len(targets) // 2] = np.nan
        return out

    def _predict_cells(self, targets, delta, reference, rng, batch_size):
        return super()._predict_cells(targets, np.nan_to_num(delta), reference, rng, batch_size) + 0 * delta


@pytest.mark.parametrize("level", ["pseudobulk", "cell"])
def test_silence_does_not_thin_the_competition(screen, tmp_path, level):
    task = _task(screen, metrics=("centroid_accuracy", "mse"), level=level)
    results = benchmark.run([task], [("shy", Shy, {}), "PerturbedMean"], seeds=1, out=tmp_path)
    wide = results.pivot_table(index=["metric", "perturbation"], columns="model", values="value")
    assert wide["shy"].notna().all()
    if level == "pseudobulk":
        np.testing.assert_allclose(wide["shy"], wide["PerturbedMean"], rtol=1e-4)


def test_keys_are_the_same_in_every_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from mine import Mine\nfrom scpert.benchmark import ModelSpec\nprint(ModelSpec('m', Mine, {'genes': {'a', 'b', 'c'}}).describe()['parts'])"
    )
    source = (
        "from scpert.model import PerturbedMean\nclass Mine(PerturbedMean):\n    SHRINK = {shrink}\n"
        "    def check(self, x):\n        return x in {{'a', 'b', 'c', 'd'}}\n"
    )
    import tempfile
    from pathlib import Path

    found = []
    for shrink, seed in ((1, "0"), (1, "1"), (2, "0")):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "mine.py").write_text(source.format(shrink=shrink))
            command = [sys.executable, "-c", code, folder]
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            found.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found[0] == found[1] != found[2]


def test_metrics_of_cells_with_covariates_are_warned_of(screen, tmp_path, caplog):
    data = screen.copy()
    data.obs["run"] = "one"
    task = Task("t", data, "cells", setup={"covariate_keys": ["run"]}, metrics=("mse", "mmd"), level="cell", n_draws=2)
    benchmark.run([task], ["NoChange"], seeds=1, out=tmp_path)
    assert "'mmd' compare cells as they are" in caplog.text


def test_max_train_cells_given_as_a_float_is_a_number_of_cells(screen):
    assert isinstance(Task("few", screen, "cells", max_train_cells=3.0).max_train_cells, int)
