"""Real screens: half of the cells infer, the other half judge, every method and baseline at K = 50, 100, 200.

``SCPERT_TEST_DATA`` names a folder with ``schraivogel2020_k562_tapseq_crispat.h5ad`` and
``norman2019_k562_crispra_perturbench.h5ad``. ``python grn_real.py [--splits 3] [--methods NAME ...]`` prints the tables
of ``docs/grn/index.md``. A target's own change is never an edge.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import scpert

DATA = Path(os.environ["SCPERT_TEST_DATA"])
METHODS = {
    "interventional": {"threshold": 0},
    "rank statistics": {"threshold": 0, "statistic": "rank"},
    "sparse_inverse": {"method": "sparse_inverse", "threshold": 0},
    "ridge": {"method": "ridge", "threshold": 0},
    "gpovae": {"method": "gpovae", "threshold": 0},
    "boosting": {"method": "boosting", "threshold": 0},
}
COLUMNS = ["precision", "false_omission_rate", "mean_wasserstein", "causalbench_precision", "sign_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    scpert.settings.progress = False
    methods = {name: METHODS[name] for name in arguments.methods}
    for name, file in (
        ("TAP-seq", "schraivogel2020_k562_tapseq_crispat.h5ad"),
        ("Norman", "norman2019_k562_crispra_perturbench.h5ad"),
    ):
        adata = ad.read_h5ad(DATA / file)
        size = "library_size" if "library_size" in adata.obs else None
        tables = []
        for seed in range(arguments.splits):
            order = np.random.default_rng(seed).permutation(adata.n_obs)
            half = adata.n_obs // 2
            train, test = adata[np.sort(order[:half])].copy(), adata[np.sort(order[half:])].copy()
            for method, options in methods.items():
                scpert.tl.infer_grn(train, library_size_key=size, key_added=method, **options)
                table = scpert.tl.evaluate_grn(train, key=method, observed=test, k=(50, 100, 200), n_permutations=0)
                first = not tables or tables[-1]["seed"].iloc[0] != seed
                table = table if first else table[table["network"] == method]
                tables.append(table.assign(seed=seed))
        table = pd.concat(tables)
        mean = table.groupby(["k", "network"], sort=False)[["n_edges", *COLUMNS]].mean()
        print(f"\n{name}: mean over {arguments.splits} splits\n{mean.round(3).to_string()}")
        positives, candidates = table["n_positives"].mean(), table["n_candidates"].mean()
        print(f"positives {positives:.0f} of {candidates:.0f} pairs")
        scpert.tl.infer_grn(adata, library_size_key=size)
        net = scpert.get.grn_df(adata, unmeasured=True)
        print(f"{name}, all cells, {len(net)} edges at FDR 0.05\n{net.head(25).round(4).to_string(index=False)}")
        stable = scpert.tl.grn_stability(adata, n=4, k=(50, 100), library_size_key=size, threshold=0)
        print(stable.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
