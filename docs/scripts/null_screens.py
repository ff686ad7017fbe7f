"""What models and metrics claim on simulated screens without any effect::

    python docs/scripts/null_screens.py --seeds 20

Every screen (1,500 cells, 80 genes, 16 targets, no effect) is split by perturbations and by cells; eight models, with
annotations drawn at random where they take knowledge, are judged by every metric of mean profiles. Counted: calibrated
scores that are given at all, and metrics that ``dynamic_range`` believes. Metrics of cells (one split, fewer models):
``--cells``.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import numpy as np
import pandas as pd

import scpert
from scpert import metrics

MODELS = ("NoChange", "PerturbedMean", "Additive", "LinearPCA", "LinearGRN", "KNN", "Ridge", "KnowledgeGP")
CELLS = [m.name for m in metrics.METRICS.values() if "cells" in m.needs and m.default and m.best is not None]


def trained(name: str, train, seed: int):
    """A model, with annotations drawn at random where it takes knowledge."""
    genes = np.repeat(train.var_names, 3)
    terms = np.random.default_rng(seed).integers(0, 20, len(genes)).astype(str)
    options = {"knowledge": {"random": pd.DataFrame({"gene": genes, "term": terms})}}
    cls, data = scpert.model.MODELS[name], train.copy()
    cls.setup_anndata(data)
    model = cls(data, **(options if name in ("KNN", "Ridge", "KnowledgeGP") else {}))
    model.train()
    return model


def screen(seed: int, kind: str, effect_size: float):
    """The reference of one split screen, and its training cells."""
    adata = scpert.datasets.simulated(1500, 80, 16, n_combinations=0, random_state=seed, effect_size=effect_size)
    fractions = (0.5, 0.0, 0.5) if kind == "perturbations" else (0.6, 0.0, 0.4)
    scpert.pp.split(adata, kind=kind, fractions=fractions, random_state=seed)
    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    return metrics.Reference(test, train), train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--effect-size", type=float, default=0.0, help="above 0: how many scores are given then")
    parser.add_argument("--cells", action="store_true", help="metrics of cells")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows, believed = [], []
    for seed in range(args.seeds):
        for kind in ("cells",) if args.cells else ("perturbations", "cells"):
            reference, train = screen(seed, kind, args.effect_size)
            names, level = (CELLS, "cell") if args.cells else (None, "pseudobulk")
            ceiling = metrics.ceiling(reference, metrics=names, n_draws=5 if args.cells else 10, random_state=seed)
            models = ("PerturbedMean", "NoChange", "Additive") if args.cells else MODELS
            tables = {}
            for name in models:
                model = trained(name, train, seed)
                predicted = model.predict_perturbation(reference.perturbations, level=level, on_unknown="mean")
                tables[name] = metrics.evaluate(predicted, reference, metrics=names)
            if args.cells:
                base = tables["PerturbedMean"]
            else:
                base = metrics.evaluate(metrics.training_mean(reference), reference)
            spread = metrics.dynamic_range(base, ceiling, n_boot=1000)
            believed += [(kind, name) for name in spread.index[spread["believable"]]]
            for name, table in tables.items():
                scores = metrics.summarise(table, base, ceiling, n_boot=1000)
                scores = scores[[metrics.METRICS[m].higher_is_better is not None for m in scores.index]]
                rows.append(scores.reset_index().assign(split=kind, model=name, seed=seed))
    table = pd.concat(rows)
    print(f"{len(table)} scores asked for ({table['metric'].nunique()} metrics), {table['score'].notna().sum()} given")
    print(f"metrics believed: {pd.Series(believed, dtype=object).value_counts().to_dict()}")
    print(table["verdict"].str.split(":").str[0].value_counts().to_string())
    given = table[table["score"].notna()]
    print(given.groupby(["split", "metric"]).size().to_string() if len(given) else "")


if __name__ == "__main__":
    main()
