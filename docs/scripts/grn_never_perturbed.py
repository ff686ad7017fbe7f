"""Networks of regulators that were never perturbed: GPO-VAE with knowledge, in simulated screens.

    python docs/scripts/grn_never_perturbed.py [--seeds 3]

A quarter of the 48 targets is left out of the screen. Ranking of their pairs with all genes by the weight of
``infer_grn(method="gpovae", knowledge=..., regulators=...)``, with true and with shuffled annotations, beside the mean absolute weight
of the perturbed regulators (what a gene that knowledge says nothing of would have): AUPRC of total effects and of direct edges, and
the share of the right signs among the true edges.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

import scpert

warnings.filterwarnings("ignore")


def matrix(net: pd.DataFrame, regulators: list[str], genes: pd.Index) -> np.ndarray:
    out = np.zeros((len(regulators), len(genes)))
    row, column = pd.Index(regulators).get_indexer(net["source"]), genes.get_indexer(net["target"])
    inside = (row >= 0) & (column >= 0)
    out[row[inside], column[inside]] = net["weight"].to_numpy()[inside]
    return out


def one(seed: int, n: int = 48) -> list[dict]:
    adata = scpert.datasets.simulated(
        n_cells=40 * n + 600, n_genes=120, n_targets=n, n_combinations=0, effect_size=1.5, random_state=seed
    )
    truth, labels = adata.uns["truth"], adata.obs["perturbation"].astype(str)
    targets = sorted(set(labels) - {"control"})
    test = list(np.random.default_rng(seed).permutation(targets)[: n // 4])
    seen = adata[~labels.isin(test)].copy()
    pairs = np.array([[t != g for g in seen.var_names] for t in test])
    edges = {
        "direct": matrix(truth["net"], test, seen.var_names),
        "total": -matrix(truth["effects"], test, seen.var_names),  # under a knock-down; signs follow the activity
    }
    annotations = truth["annotations"][["gene", "term"]]
    shuffled = annotations.assign(gene=np.random.default_rng(1).permutation(annotations["gene"]))
    weights = {}
    for name, table in (("true", annotations), ("shuffled", shuffled)):
        scpert.tl.infer_grn(
            seen, method="gpovae", knowledge={"annotations": table}, regulators=targets, threshold=0, random_state=seed
        )
        net = matrix(scpert.get.grn_df(seen), targets, seen.var_names)
        row = np.isin(targets, test)
        order = [t for t in targets if t in test]
        weights[name] = net[row][[order.index(t) for t in test]]
        weights["mean regulator"] = np.tile(np.abs(net[~row]).mean(axis=0), (len(test), 1))
    rows = []
    for kind, values in edges.items():
        strong = np.abs(values) > 0
        for name, weight in weights.items():
            right = np.sign(weight) == np.sign(values)
            rows.append(
                {
                    "seed": seed,
                    "edges": kind,
                    "knowledge": name,
                    "auprc": average_precision_score(strong[pairs], np.abs(weight)[pairs]),
                    "base": strong[pairs].mean(),
                    "signs": right[pairs & strong].mean() if name == "true" else np.nan,
                }
            )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    scpert.settings.progress = False
    table = pd.DataFrame([row for seed in range(parser.parse_args().seeds) for row in one(seed)])
    print(table.to_string(index=False))
    print(table.groupby(["edges", "knowledge"])[["auprc", "base", "signs"]].mean().round(3))
