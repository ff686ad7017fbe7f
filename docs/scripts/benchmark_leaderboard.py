"""The leaderboard of the docs: all models on the real screens and on simulated ones, made by one command.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/benchmark_leaderboard.py --out results

Closed-form models run on every task; models trained by gradients run ``--epochs`` epochs each with default sizes (a smoke
test of what they reach at once, no tuned result). A run that was stopped goes on where it was. ``results/leaderboard.html``
is the page, ``results/leaderboard.csv`` its table, ``results/costs.csv`` the times.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd

from scpert import benchmark
from scpert.benchmark import TASKS, ModelSpec, Task

SCREENS = {
    "norman": "norman2019_k562_crispra_perturbench.h5ad",
    "tapseq": "schraivogel2020_k562_tapseq_crispat.h5ad",
}
CLOSED = ["NoChange", "PerturbedMean", "Additive", "MatchingMean", "LinearPCA", "LinearGRN", "KnowledgeGP"]
INFORMED = ["KNN", "Ridge", "KnowledgeGP"]  # with knowledge of genes
DEEP = ["CPAVAE", "SAMSVAE", "CRADLEVAE", "GPOVAE", "GEARS", "BioDSNN", "ConditionalVAE", "CPA"]


def specs(models: list[str], epochs: int, priors: str | None) -> list[ModelSpec]:
    """A specification per model; those that need knowledge are left out without it."""
    out = [ModelSpec(name) for name in CLOSED if name in models]
    out.append(ModelSpec("AdditiveShrunken", "Additive", {"shrink": True}))
    if priors:
        file = Path(priors) / "go_direct_allev_human_2015-07.tsv.gz"
        go = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
        go = go.rename(columns={"symbol": "gene", "go_id": "term"})[["gene", "term"]]
        out += [ModelSpec(f"{name}+GO", name, {"knowledge": {"go": go}}) for name in INFORMED if name in models]
    train = {"max_epochs": epochs}
    return out + [ModelSpec(name, train=train) for name in DEEP if name in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", nargs="*", default=[*CLOSED, "KNN", "Ridge", *DEEP])
    parser.add_argument("--tasks", nargs="*", help="names of tasks; by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    tasks = []
    folder = os.environ.get("SCPERT_TEST_DATA")
    for name, file in SCREENS.items() if folder else ():
        for split in ("perturbations", "cells"):
            options = {"fractions": (0.5, 0.2, 0.3)}
            tasks.append(Task(f"{name}_{split}", Path(str(folder)) / file, split, split_options=options))
    tasks += TASKS.values()
    if args.tasks:
        tasks = [task for task in tasks if task.name in args.tasks]
    models = specs(args.models, args.epochs, os.environ.get("SCPERT_TEST_PRIORS"))
    results = benchmark.run(tasks, models, seeds=args.seeds, out=args.out)
    board = benchmark.leaderboard(results, path=Path(args.out) / "leaderboard.html")
    board.to_csv(Path(args.out) / "leaderboard.csv", index=False)
    benchmark.costs(args.out).to_csv(Path(args.out) / "costs.csv", index=False)
    for metric in ("pearson_delta", "centroid_accuracy"):
        part = board[board["metric"] == metric]
        columns = ["task", "model", "rank", "value", "score", "lower", "upper", "n", "seconds"]
        print(part[columns].to_string(index=False))


if __name__ == "__main__":
    main()
