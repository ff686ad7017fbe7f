"""What noise leaves of direct edges on simulated screens: their size in standard errors, and two oracles.

    python docs/scripts/grn_noise.py [--seeds 5] [--regulators 20]

A row is a setting of ``grn_benchmark.py``: the median total effect of a direct edge in standard errors of the screen, the share of
the direct edges above two; then the AUPRC of direct edges by the effect size of the screen, by the effect size of
the cells that truly carry the perturbation (with half penetrance every second one does not), and by the effect size of the same network
with 2,000 cells a perturbation.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
from grn_benchmark import settings, truth
from sklearn.metrics import average_precision_score

import scpert

MANY_CELLS = 2000


def one(setting: dict, seed: int) -> dict:
    adata = scpert.datasets.simulated(n_combinations=0, random_state=seed, **setting)
    many = scpert.datasets.simulated(
        n_combinations=0, random_state=seed, **{**setting, "cells_per_perturbation": MANY_CELLS}
    )
    labels = adata.obs["perturbation"].astype(str)
    regulators = sorted(set(labels) - {"control"})
    carriers = adata[adata.obs["perturbed"].to_numpy() | (labels == "control").to_numpy()].copy()
    own = adata.var_names.get_indexer(regulators)
    off = np.ones((len(regulators), adata.n_vars), dtype=bool)
    off[np.arange(len(own)), own] = False
    direct = truth(adata, "net", regulators)
    assert (direct == truth(many, "net", regulators)).all()  # the same network
    few, most, known = (scpert.tl.perturbation_effects(a)[regulators] for a in (adata, many, carriers))
    size = np.nan_to_num(np.abs(most.X) / few.layers["std_error"])[off & direct]
    auprc = {
        name: average_precision_score(direct[off], np.abs(effects.X)[off])
        for name, effects in (("screen", few), ("carriers known", known), ("many cells", most))
    }
    return {"median size": np.median(size), "above two": np.mean(size > 2), "random": direct[off].mean(), **auprc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--regulators", type=int, nargs="+", default=[20])
    parser.add_argument("--only", default="", help="part of a setting's name")
    arguments = parser.parse_args()
    scpert.settings.progress = False
    rows = {}
    for name, setting in settings(arguments.regulators).items():
        if arguments.only in name:
            rows[name] = pd.DataFrame([one(setting, seed) for seed in range(arguments.seeds)]).mean()
    print(pd.DataFrame(rows).T.round(3).to_string())


if __name__ == "__main__":
    main()
