"""Coefficients of interactions against those of the noise-free shifts: slope, error, coverage of the limits.

A large simulated screen (200,000 cells) stands for the noise-free truth: its coefficients are the noise-free ones.
Screens of 50, 100 and 400 cells per perturbation (and 7.5 times as many controls) are drawn from it without
replacement. Prints the first table of ``docs/interactions.md``; arguments: the kind of screen, seeds.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

import scpert

CELLS = (50, 100, 400)
SCREENS = {
    "panel": {"n_genes": 500},
    "weaker effects": {"n_genes": 1000, "effect_size": 0.6},
    "transcriptome": {"n_genes": 1000, "platform": "transcriptome"},
}


def fits(adata, n_boot: int) -> pd.DataFrame:
    scpert.tl.genetic_interactions(adata, n_boot=n_boot)
    return scpert.get.interactions_df(adata).set_index("perturbation")


def main(kind: str, seeds: tuple[int, ...]) -> None:
    parts = []
    for seed in seeds:
        pool = scpert.datasets.simulated(
            n_cells=200_000, n_targets=20, n_combinations=24, mode="activation", random_state=seed, **SCREENS[kind]
        )
        large = fits(pool, 0)
        simulated = pool.uns["truth"]["interactions"].set_index("perturbation").loc[large.index]
        turned = np.asarray(simulated["first"] > simulated["second"])
        for n in CELLS:
            rng = np.random.default_rng([seed, n])
            drawn = [
                rng.choice(index, size=int(7.5 * n) if label == "control" else n, replace=False)
                for label, index in pool.obs.groupby("perturbation", observed=True).indices.items()
            ]
            table = fits(pool[np.sort(np.concatenate(drawn))].copy(), 100)
            for own, other in (("c1", "c2"), ("c2", "c1")):
                part = table[[own, f"{own}_lower", f"{own}_upper"]].set_axis(["found", "lower", "upper"], axis=1)
                true = np.where(turned, simulated[other], simulated[own])
                parts.append(part.assign(cells=n, c=own, noise_free=large[own], simulated=true))
    table = pd.concat(parts)
    rows = []
    for n, part in table.groupby("cells"):
        for truth in ("noise_free", "simulated"):
            inside = part["lower"].le(part[truth]) & part[truth].le(part["upper"])
            rows.append(
                {
                    "cells": n,
                    "truth": truth,
                    "slope": part["found"] @ part[truth] / (part[truth] @ part[truth]),
                    "RMSE": np.sqrt(np.mean((part["found"] - part[truth]) ** 2)),
                    "coverage c1": inside[part["c"] == "c1"].mean(),
                    "coverage c2": inside[part["c"] == "c2"].mean(),
                    "width, median": (part["upper"] - part["lower"]).median(),
                }
            )
    print(f"{kind}, seeds {seeds}:\n{pd.DataFrame(rows).round(3).to_string(index=False)}\n", flush=True)


if __name__ == "__main__":
    scpert.settings.progress = False
    for name in [sys.argv[1]] if len(sys.argv) > 1 else list(SCREENS):
        main(name, tuple(int(x) for x in sys.argv[2:]) or (0, 1, 2, 3))
