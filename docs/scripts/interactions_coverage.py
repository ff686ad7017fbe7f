"""Coefficients of interactions against those of the noise-free shifts: slope, error, coverage of the limits.

A large simulated screen stands for the noise-free truth; screens of 50, 100 and 400 cells per perturbation (and 7.5
times as many controls) are drawn from it with replacement. Prints the first table of ``docs/interactions.md``.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

import scpert

CELLS = (50, 100, 400)
SEEDS = range(3)


def fits(adata, n_boot: int) -> pd.DataFrame:
    scpert.tl.genetic_interactions(adata, n_boot=n_boot)
    return scpert.get.interactions_df(adata).set_index("perturbation")


def main(cells: tuple[int, ...]) -> None:
    parts = []
    for seed in SEEDS:
        pool = scpert.datasets.simulated(
            n_cells=60_000, n_genes=500, n_targets=20, n_combinations=24, mode="activation", random_state=seed
        )
        large = fits(pool, 0)
        simulated = pool.uns["truth"]["interactions"].set_index("perturbation").loc[large.index]
        turned = np.asarray(simulated["first"] > simulated["second"])
        for n in cells:
            rng = np.random.default_rng([seed, n])
            drawn = [
                rng.choice(index, size=int(7.5 * n) if label == "control" else n)
                for label, index in pool.obs.groupby("perturbation", observed=True).indices.items()
            ]
            screen = pool[np.concatenate(drawn)].copy()
            screen.obs_names_make_unique()
            table = fits(screen, 100)
            for j, (own, other) in enumerate((("c1", "c2"), ("c2", "c1")), 1):
                part = table[[own, f"{own}_lower", f"{own}_upper"]].set_axis(["found", "lower", "upper"], axis=1)
                true = np.where(turned, simulated[other], simulated[own])
                parts.append(part.assign(cells=n, c=j, noise_free=large[own], simulated=true))
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
                    "coverage c1": inside[part["c"] == 1].mean(),
                    "coverage c2": inside[part["c"] == 2].mean(),
                }
            )
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    scpert.settings.progress = False
    main(tuple(int(x) for x in sys.argv[1:]) or CELLS)
