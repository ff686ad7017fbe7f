"""The leaderboard of the docs: closed-form models (or any others named) on the real screens and on simulated ones.

    SCPERT_TEST_DATA=... python docs/scripts/benchmark_leaderboard.py --out results [--models NoChange Additive GPOVAE ...]

A run that was stopped goes on where it was. ``results/leaderboard.html`` is the page, ``results/leaderboard.csv`` its table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from scpert import benchmark
from scpert.benchmark import TASKS, Task

SCREENS = {
    "norman": ("norman2019_k562_crispra_perturbench.h5ad", {}),
    "tapseq": ("schraivogel2020_k562_tapseq_crispat.h5ad", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--models", nargs="*", default=["NoChange", "PerturbedMean", "Additive", "LinearPCA"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    tasks = [TASKS[name] for name in TASKS]
    folder = os.environ.get("SCPERT_TEST_DATA")
    for name, (file, setup) in SCREENS.items() if folder else ():
        path = Path(folder) / file  # type: ignore[arg-type]
        for split in ("perturbations", "cells"):
            options = {"fractions": (0.5, 0.2, 0.3)}
            tasks.append(Task(f"{name}_{split}", path, split, split_options=options, setup=setup))
    results = benchmark.run(tasks, args.models, seeds=args.seeds, out=args.out)
    board = benchmark.leaderboard(results, path=Path(args.out) / "leaderboard.html")
    board.to_csv(Path(args.out) / "leaderboard.csv", index=False)
    for metric in ("pearson_delta", "centroid_accuracy"):
        part = board[board["metric"] == metric]
        print(
            part[["task", "model", "rank", "value", "score", "lower", "upper", "n", "seconds"]].to_string(index=False)
        )


if __name__ == "__main__":
    main()
