"""KnowledgeGP where knowledge says nothing or little: squared error relative to the mean's, with trust learned and without.

python docs/scripts/knowledge_gp_trust.py
"""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd

from scpert.model import KnowledgeGP, _gp


def table(n: int, signal: float, seed: int) -> tuple[ad.AnnData, pd.DataFrame]:
    """Effects on 40 genes that follow six hidden groups, and annotations that name these and eight others."""
    rng = np.random.default_rng(seed)
    member, noise = rng.integers(0, 6, n), rng.integers(0, 8, n)
    X = 0.3 + signal * rng.normal(size=(6, 40))[member] + 0.5 * rng.normal(size=(n, 40))
    labels = [f"p{i}" for i in range(n)]
    adata = ad.AnnData(X.astype(np.float32), obs=pd.DataFrame({"perturbation": labels}, index=labels))
    terms = [f"t{m}" for m in member] + [f"n{m}" for m in noise]
    return adata, pd.DataFrame({"gene": labels * 2, "term": terms})


def relative_error(n: int, signal: float, seed: int) -> float:
    adata, go = table(n + 30, signal, seed)
    train = adata[:n].copy()
    KnowledgeGP.setup_anndata(train, scale="effects")
    model = KnowledgeGP(train, knowledge={"go": go})
    model.train()
    out = model.predict_perturbation(list(adata.obs_names[n:]), on_unknown="mean")
    truth = adata[out.obs_names].X
    return float(((out.X - truth) ** 2).mean() / ((model.effects_.mean - truth) ** 2).mean())


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    learned = _gp._trust
    print(
        "| training targets | signal / noise | trusted wholly: mean, worst | trust learned: mean, worst |\n|---|---|---|---|"
    )
    for n, signal in ((15, 0), (25, 0), (60, 0), (200, 0), (15, 0.3), (25, 0.15), (60, 0.1), (60, 0.3)):
        row = []
        for trust in (lambda folds, deviations, centres: 1.0, learned):
            _gp._trust = trust
            values = [relative_error(n, signal, seed) for seed in range(20)]
            row.append(f"{np.mean(values):.3f}, {np.max(values):.3f}")
        print(f"| {n} | {signal / 0.5:g} | {row[0]} | {row[1]} |", flush=True)
