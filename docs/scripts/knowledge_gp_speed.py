"""Time and memory of KnowledgeGP on simulated low-rank effects of many perturbations.

OMP_NUM_THREADS=1 python docs/scripts/knowledge_gp_speed.py [--perturbations 10000] [--genes 10000]
"""

from __future__ import annotations

import argparse
import resource
import time

import anndata as ad
import numpy as np
import pandas as pd

import scpert
from scpert.model import KnowledgeGP


def main(n: int, genes: int, unseen: int = 500) -> None:
    rng = np.random.default_rng(0)
    total, groups, rank = n + unseen, max(n // 40, 5), 30
    member = rng.integers(0, groups, total)
    scores = rng.normal(size=(groups, rank))[member] + 0.5 * rng.normal(size=(total, rank))
    X = scores.astype(np.float32) @ (rng.normal(size=(rank, genes)) * np.geomspace(1, 0.1, rank)[:, None]).astype(
        np.float32
    )
    X += rng.standard_normal(X.shape, dtype=np.float32)
    labels = np.array([f"p{i}" for i in range(total)])
    noise = rng.integers(0, 2 * groups, total)
    go = pd.DataFrame({"gene": np.tile(labels, 2), "term": [f"t{m}" for m in member] + [f"n{m}" for m in noise]})
    near = np.argsort(member + 0.3 * rng.random(total), kind="stable")
    net = pd.DataFrame({"source": labels[near[:-1]], "target": labels[near[1:]]})
    adata = ad.AnnData(
        X[:n], obs=pd.DataFrame({"perturbation": labels[:n]}, index=labels[:n]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
    )  # fmt: skip
    start = time.time()
    KnowledgeGP.setup_anndata(adata, scale="effects")
    model = KnowledgeGP(adata, knowledge={"go": go, "net": net})
    model.train()
    trained = time.time()
    out = model.predict_perturbation(list(labels[n:]))[list(labels[n:])]
    predicted = time.time()
    truth, mean = X[n:], X[:n].mean(axis=0)
    print(
        f"{n} x {genes}: train {trained - start:.0f} s, predict {unseen} {predicted - trained:.0f} s, peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB; squared error / mean's "
        f"{((out.X - truth) ** 2).mean() / ((mean - truth) ** 2).mean():.3f}, limits cover "
        f"{np.mean((truth >= out.layers['lower']) & (truth <= out.layers['upper'])):.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--perturbations", type=int, default=10000)
    parser.add_argument("--genes", type=int, default=10000)
    a = parser.parse_args()
    scpert.settings.progress = False
    main(a.perturbations, a.genes)
