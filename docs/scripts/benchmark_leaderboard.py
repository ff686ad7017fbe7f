"""The leaderboard of the docs: all models on two real screens and three simulated ones, made by one command.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/benchmark_leaderboard.py --out results

Every model runs with its default settings; models trained by gradients for ``--epochs`` passes over the training cells, or
fewer if the validation loss stops falling. Nothing is tuned. A run that was stopped goes on where it was; pieces of it
(``--tasks``, ``--models``) may be run one after another into the same folder. ``results/leaderboard.html`` is the page,
``leaderboard.csv`` its table, ``leaderboard.md`` and ``leaderboard.png`` what the documentation shows.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd

from scpert import benchmark, pl
from scpert.benchmark import TASKS, ModelSpec, Task
from scpert.benchmark._run import BASELINE, CEILING

SCREENS = {
    "norman": "norman2019_k562_crispra_perturbench.h5ad",
    "tapseq": "schraivogel2020_k562_tapseq_crispat.h5ad",
}
CLOSED = ["NoChange", "PerturbedMean", "Additive", "MatchingMean", "LinearPCA", "LinearGRN"]
INFORMED = ["KNN", "Ridge", "KnowledgeGP"]  # with knowledge of genes
DEEP = ["CPAVAE", "SAMSVAE", "CRADLEVAE", "GPOVAE", "GEARS", "BioDSNN", "ConditionalVAE", "CPA"]
SHOWN = ("pearson_delta", "pearson_delta_centroid_no_target", "mse", "retrieval_cosine_no_targets")


def all_tasks() -> list[Task]:
    """Two questions to each real screen, and the simulated tasks that need no more than a split."""
    folder = os.environ.get("SCPERT_TEST_DATA")
    real = []
    for name, file in SCREENS.items() if folder else ():
        for split in ("perturbations", "combinations" if name == "norman" else "cells"):
            options = {"fractions": (0.5, 0.2, 0.3)}
            # a small panel is normalised by the whole transcriptome where its size is known
            setup = {"library_size_key": "library_size"} if name == "norman" else {}
            real.append(Task(f"{name}_{split}", Path(str(folder)) / file, split, split_options=options, setup=setup))
    return real + [TASKS[name] for name in ("simulated_unseen", "simulated_combinations", "simulated_null")]


def all_models(epochs: int) -> list[ModelSpec]:
    """A specification per model; all that take knowledge of genes get annotations (GO, simulated) and STRING."""
    out = [ModelSpec(name) for name in CLOSED]
    informed: dict[str, dict] = {}  # options of deep models that take knowledge
    out.insert(3, ModelSpec("Additive, shrunken", "Additive", {"shrink": True}))
    folder = os.environ.get("SCPERT_TEST_PRIORS")
    if folder:
        go = pd.read_csv(
            Path(folder) / "go_direct_allev_human_2015-07.tsv.gz", sep="\t", dtype=str, keep_default_na=False
        )
        go = go.rename(columns={"symbol": "gene", "go_id": "term"})[["gene", "term"]]
        simulated = TASKS["simulated_unseen"].load().uns["truth"]["annotations"][["gene", "term"]]
        go = pd.concat(
            [go, simulated], ignore_index=True
        )  # the simulated genes have annotations and names of their own
        string = pd.read_csv(Path(folder) / "string_v12.0_human_score800.tsv.gz", sep="\t", keep_default_na=False).iloc[
            :, :2
        ]
        string.columns = ["source", "target"]
        knowledge = {"knowledge": {"go": go, "string": string}}
        out += [ModelSpec(name, options=knowledge) for name in INFORMED]
        graph = {"perturbation_net": knowledge["knowledge"]}  # the same tables
        informed = {"GPOVAE": knowledge, "GEARS": graph, "BioDSNN": graph}
    return out + [ModelSpec(name, options=informed.get(name, {}), train={"max_epochs": epochs}) for name in DEEP]


def tables(board: pd.DataFrame) -> str:
    """The leaderboard as Markdown: one table a task, models sorted by the first shown metric, the best of each in bold."""
    parts = []
    for task, part in board.groupby("task", sort=False):
        metrics = [m for m in SHOWN if m in set(part["metric"])]
        wide = part.pivot(index="model", columns="metric", values="value")
        rank = part.pivot(index="model", columns="metric", values="rank")
        one = part.drop_duplicates("model").set_index("model")
        first = part[part["metric"] == metrics[1]].set_index("model")
        models = [CEILING, *rank.drop(index=CEILING)[metrics].mean(axis=1).sort_values(kind="stable").index]
        verdicts = {
            m: part.loc[part["metric"] == m, "verdict"].astype(str).str.startswith("nothing").any() for m in metrics
        }
        best = rank.drop(index=[CEILING, BASELINE]).min()
        lines = [
            f"### {task}: {one['n'].max():.0f} perturbations",
            "",
            "| model | " + " | ".join(f"`{m}`" for m in metrics) + f" | score of `{metrics[1]}` | fallback | s | MB |",
            "|---|" + "---|" * (len(metrics) + 4),
        ]
        for model in models:
            row = [model if model not in (CEILING, BASELINE) else f"*{model}*"]
            for m in metrics:
                value = wide.loc[model, m]
                text = "" if np.isnan(value) else f"{value:.3g}" if m == "mse" else f"{value:.3f}"
                won = model not in (CEILING, BASELINE) and rank.loc[model, m] == best[m] < rank.loc[BASELINE, m]
                won = won and not verdicts[m]
                row.append(f"**{text}**" if won and text else text)
            s = first.loc[model]
            row.append("" if np.isnan(s["score"]) else f"{s['score']:.2f} [{s['lower']:.2f}, {s['upper']:.2f}]")
            known = model not in (CEILING, BASELINE) and np.isfinite(s["fallback"])
            row += [
                f"{100 * s['fallback']:.0f} %" if known else "",
                f"{s['seconds']:.1f}",
                f"{s['peak_megabytes']:.0f}",
            ]
            lines.append("| " + " | ".join(row) + " |")
        for m in metrics:
            if verdicts[m]:
                lines.append(f"\n`{m}`: nothing to predict here.")
        failed = part[part["verdict"].astype(str).str.startswith("failed")].drop_duplicates("model")
        lines += [f"\n{row.model}: {row.verdict}" for row in failed.itertuples()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def figure(board: pd.DataFrame, path: Path) -> None:
    """Scores with limits on the tasks that can be scored, and mean ranks over all tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    *left, right = figure.subplots(1, 3)
    scored = [t for t, part in board.groupby("task", sort=False) if part["score"].notna().any()]
    wanted = [t for t in ("norman_perturbations", "simulated_unseen") if t in scored] or scored[:2]
    for ax, task in zip(left, wanted, strict=False):
        pl.leaderboard(board[board["task"] == task], metric="pearson_delta_centroid_no_target", ax=ax, show=False)
        ax.set_title(task)
        ax.set_xlabel("calibrated score: 0 training mean, 1 replicate")
    pl.leaderboard(board, metric="pearson_delta_centroid_no_target", kind="critical_difference", ax=right, show=False)
    right.set_title("all tasks")
    right.set_xlabel("mean rank; a bar joins what does not differ")
    figure.savefig(path, dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", nargs="*", help="names of models; by default all")
    parser.add_argument("--tasks", nargs="*", help="names of tasks; by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    tasks = [task for task in all_tasks() if args.tasks is None or task.name in args.tasks]
    models = [spec for spec in all_models(args.epochs) if args.models is None or spec.name in args.models]
    out = Path(args.out)
    results = benchmark.run(tasks, models, seeds=args.seeds, out=out)
    board = benchmark.leaderboard(results, path=out / "leaderboard.html")
    board.to_csv(out / "leaderboard.csv", index=False)
    (out / "leaderboard.md").write_text(tables(board), encoding="utf-8")
    if board["task"].nunique() > 1:
        figure(board, out / "leaderboard.png")
    print(tables(board))


if __name__ == "__main__":
    main()
