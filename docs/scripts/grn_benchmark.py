"""Simulated screens: AUPRC of direct edges and of total effects, and the false discovery rate, for every method.

``python grn_benchmark.py [--seeds 5] [--regulators 20 100] [--methods NAME ...] [--only TEXT] [--save rows.csv]``
prints the tables of ``docs/grn/index.md``; ``--few-controls`` that of few controls, ``--null`` the false edges among controls with random
labels; ``--load a.csv b.csv`` prints them from saved rows (the settings may run in
several processes).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import average_precision_score

import scpert
from scpert.tl._effects import benjamini_hochberg


def settings(regulators: list[int]) -> dict[str, dict]:
    return {
        f"{n} regulators, {name}, penetrance {p}, {cells} cells": {
            "n_targets": n,
            "n_genes": max(100, 2 * n),
            "strength": strength,
            "penetrance": p,
            "cells_per_perturbation": cells,
            "cycles": True,
        }
        for n in regulators
        for name, strength in (("weak", 0.25), ("strong", 0.6))
        for p in (0.5, 1.0)
        for cells in (30, 300)
    }


METHODS = {
    "interventional": {"threshold": 0},
    "rank statistics": {"threshold": 0, "statistic": "rank"},
    "sparse_inverse": {"method": "sparse_inverse", "threshold": 0},
    "ridge": {"method": "ridge", "threshold": 0},
    "correlation": {"method": "correlation", "threshold": 0},
    "gpovae": {"method": "gpovae", "threshold": 0},
    "gpovae, own weights": {"method": "gpovae", "threshold": 0, "direct": False},
    "boosting": {"method": "boosting", "threshold": 0, "max_cells": 2000},
    "boosting, 1,000 cells, 100 trees": {"method": "boosting", "threshold": 0, "max_cells": 1000, "n_estimators": 100},
    "sparse_inverse, path_cut=0": {"method": "sparse_inverse", "threshold": 0, "path_cut": 0.0},
}
#: Run unless others are named.
QUICK = ("interventional", "rank statistics", "sparse_inverse", "ridge", "correlation")


def truth(adata, which: str, regulators: list[str]) -> np.ndarray:
    table = adata.uns["truth"][which]
    row, column = pd.Index(regulators).get_indexer(table["source"]), adata.var_names.get_indexer(table["target"])
    out = np.zeros((len(regulators), adata.n_vars), dtype=bool)
    out[row[row >= 0], column[row >= 0]] = table["weight"].to_numpy()[row >= 0] != 0
    return out


def one(setting: dict, seed: int, methods: dict) -> list[dict]:
    adata = scpert.datasets.simulated(n_combinations=0, random_state=seed, **setting)
    regulators = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    own = adata.var_names.get_indexer(regulators)
    off = np.ones((len(regulators), adata.n_vars), dtype=bool)
    off[np.arange(len(own)), own] = False
    direct, total = truth(adata, "net", regulators), truth(adata, "effects", regulators)
    effects = scpert.tl.perturbation_effects(adata)
    scores = {"effect size": np.abs(effects.X), "Welch z": np.abs(np.nan_to_num(effects.layers["zscore"]))}
    scores["random"] = np.zeros_like(scores["effect size"])  # ties throughout: the share of pairs that are edges
    tested = np.where(off, effects.layers["pvals"], np.nan)
    plain = np.nan_to_num(benjamini_hochberg(tested), nan=1.0) <= 0.05
    seconds, rate = {}, {"Welch z": (int((plain & ~total).sum()), int(plain.sum()))}
    for name, options in methods.items():
        start = time.perf_counter()
        scpert.tl.infer_grn(adata, **options)
        seconds[name] = time.perf_counter() - start
        scores[name] = np.abs(adata.varp["grn"][own].toarray())
        if name in ("interventional", "rank statistics"):
            scpert.tl.infer_grn(adata, statistic=options.get("statistic", "welch"))
            edges = adata.varp["grn"][own].toarray() != 0
            rate[name] = (int((edges & ~total & off).sum()), int(edges.sum()))
    rows = []
    for name, score in scores.items():
        rows.append(
            {
                "method": name,
                "direct": average_precision_score(direct[off], score[off]),
                "total": average_precision_score(total[off], score[off]),
                "seconds": seconds.get(name, np.nan),
                "false": rate.get(name, (np.nan, np.nan))[0],
                "found": rate.get(name, (np.nan, np.nan))[1],
            }
        )
    return rows


def summary(table: pd.DataFrame) -> None:
    order = list(dict.fromkeys(table["method"]))
    print(f"seeds per setting\n{table.groupby('setting', sort=False)['seed'].nunique().to_string()}")
    for measure in ("direct", "total"):
        wide = table.pivot_table(index="setting", columns="method", values=measure, sort=False)[order]
        print(f"\nAUPRC, {measure}\n{wide.round(3).to_string()}\nmean\n{wide.mean().round(3).to_string()}")
    direct = table.pivot_table(index=["setting", "seed"], columns="method", values="direct", sort=False)
    print(
        "\ngain of direct AUPRC over the effect size: mean, 95 % limits (Student) over seeds, seeds where it is better"
    )
    settings_ = direct.index.get_level_values("setting")
    for kind in dict.fromkeys(["", *(", ".join(name.split(", ")[:2]) for name in settings_), *settings_]):
        rows = direct[settings_.str.startswith(kind)]
        for name in order[2:]:  # screens of one seed are alike: the seed is the unit
            gain = (rows[name] - rows["effect size"]).groupby("seed").mean().to_numpy()
            half = stats.t.ppf(0.975, max(len(gain) - 1, 1)) * gain.std(ddof=1) / np.sqrt(len(gain))
            low, high, better = gain.mean() - half, gain.mean() + half, int((gain > 0).sum())
            print(
                f"  {kind or 'all':48s} {name:20s} {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}] {better} of {len(gain)}"
            )
    rate = table.groupby(["method", "setting"], sort=False)[["false", "found"]].sum()
    rate = rate[rate["found"] > 0]
    rate["fdr"] = rate["false"] / rate["found"]
    print("\nfalse discovery rate at nominal 0.05, pooled over seeds\n", rate.round(3).to_string())
    pooled = rate.groupby("method", sort=False)[["false", "found"]].sum()
    print("\nover all settings\n", (pooled["false"] / pooled["found"]).round(3).to_string())
    seconds = table.pivot_table(index="setting", columns="method", values="seconds", sort=False)
    print(f"\nseconds\n{seconds.round(2).to_string()}")


def few_controls(seeds: int) -> None:
    """False discovery rate of total effects where only some of the controls are there."""
    rows = []
    for controls in (10, 20, 50, 100, None):
        found = false = 0
        for seed in range(seeds):
            adata = scpert.datasets.simulated(
                n_cells=3000, n_genes=200, n_targets=10, n_combinations=0, random_state=seed
            )
            at = np.flatnonzero(adata.obs["perturbation"] == "control")
            keep = np.ones(adata.n_obs, dtype=bool)
            if controls is not None:
                keep[at] = False
                keep[np.random.default_rng(seed).choice(at, controls, replace=False)] = True
            some = adata[keep].copy()
            scpert.tl.infer_grn(some)
            net = scpert.get.grn_df(some, unmeasured=True)
            true = set(map(tuple, adata.uns["truth"]["effects"][["source", "target"]].to_numpy()))
            found += len(net)
            false += sum(pair not in true for pair in map(tuple, net[["source", "target"]].to_numpy()))
        rows.append({"controls": controls or "all", "edges": found, "rate": false / max(found, 1)})
    print(pd.DataFrame(rows).round(3).to_string(index=False))


def null_screens(screens: int) -> None:
    """Share of screens with an edge, where there is none: controls with random labels."""
    rows = []
    for cells in (10, 30, 100):
        claimed = {"welch": 0, "rank": 0}
        for seed in range(screens):
            adata = scpert.datasets.simulated(
                n_cells=20 * cells + 400,
                n_genes=100,
                n_targets=20,
                n_combinations=0,
                effect_size=0.0,
                random_state=seed,
            )
            names = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
            labels = np.full(adata.n_obs, "control", dtype=object)
            chosen = np.random.default_rng(seed).permutation(adata.n_obs)[: 20 * cells]
            labels[chosen] = np.repeat(names, cells)
            adata.obs["perturbation"] = labels
            for statistic in claimed:
                scpert.tl.infer_grn(adata, statistic=statistic)
                claimed[statistic] += len(scpert.get.grn_df(adata, unmeasured=True)) > 0
        rows.append({"cells": cells, **{s: n / screens for s, n in claimed.items()}})
    print(pd.DataFrame(rows).to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--regulators", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--only", default="", help="part of a setting's name, e.g. 'penetrance 1.0'")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(QUICK))
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--few-controls", action="store_true", help="only: the error rate with few control cells, ten seeds"
    )
    parser.add_argument("--null", action="store_true", help="only: false edges among controls with random labels")
    parser.add_argument("--save")
    parser.add_argument("--load", nargs="+")
    arguments = parser.parse_args()
    if arguments.load:
        summary(pd.concat([pd.read_csv(file) for file in arguments.load], ignore_index=True))
        return
    scpert.settings.progress = False
    if arguments.few_controls:
        few_controls(10)
        return
    if arguments.null:
        null_screens(50)
        return
    methods = {name: METHODS[name] for name in arguments.methods}
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name, setting in settings(arguments.regulators).items():
            if arguments.only not in name:
                continue
            found = one(setting, seed, methods)
            rows += [{"setting": name, "seed": seed, **row} for row in found]
            print(seed, name, {row["method"]: round(row["direct"], 3) for row in found}, flush=True)
            if arguments.save:
                pd.DataFrame(rows).to_csv(arguments.save, index=False)
    summary(pd.DataFrame(rows))


if __name__ == "__main__":
    main()
