"""How close simulated counts are to those of two real screens.

    SCPERT_TEST_DATA=folder python docs/scripts/simulator_vs_real.py

The folder holds norman2019_k562_crispra_perturbench.h5ad (500 genes of a whole-transcriptome screen) and
schraivogel2020_k562_tapseq_crispat.h5ad (a targeted panel of 72 genes). For each, a simulated screen with as many
cells and genes is drawn, and quantiles over genes (or cells) are printed side by side.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import scpert

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NORMAN = "norman2019_k562_crispra_perturbench.h5ad"
TAPSEQ = "schraivogel2020_k562_tapseq_crispat.h5ad"


def describe(X: np.ndarray) -> dict[str, np.ndarray]:
    """Quantiles of per-gene mean, variance / mean and zero fraction and of the counts per cell."""
    mean, var = X.mean(axis=0), X.var(axis=0, ddof=1)
    seen = mean > 0
    return {
        "gene mean": np.quantile(mean, QUANTILES),
        "variance / mean": np.quantile(var[seen] / mean[seen], QUANTILES),
        "zero fraction of a gene": np.quantile((X == 0).mean(axis=0), QUANTILES),
        "counts of a cell": np.quantile(X.sum(axis=1), QUANTILES),
    }


def compare(name: str, real: np.ndarray, simulated: np.ndarray) -> pd.DataFrame:
    """One row per quantity and origin."""
    rows = []
    for origin, X in (("real", real), ("simulated", simulated)):
        for quantity, values in describe(X).items():
            rows.append([name, quantity, origin, *values])
        rows.append([name, "zeros in all", origin, *([np.nan] * 2), (X == 0).mean(), *([np.nan] * 2)])
    table = pd.DataFrame(rows, columns=["screen", "quantity", "origin", *(f"{q:.0%}" for q in QUANTILES)])
    return table.sort_values(["screen", "quantity", "origin"], kind="stable").reset_index(drop=True)


def controls(adata: ad.AnnData) -> np.ndarray:
    return adata[(adata.obs["perturbation"] == "control").to_numpy()].X.toarray()


def main(folder: Path) -> None:
    norman, tapseq = ad.read_h5ad(folder / NORMAN), ad.read_h5ad(folder / TAPSEQ)
    kinds = [
        (
            "norman2019, all 500 genes",
            norman.X.toarray(),
            {"platform": "transcriptome", "mode": "activation", "n_cells": 3375, "n_genes": 500, "n_targets": 18},
        ),
        (
            "tapseq, controls",
            controls(tapseq),
            {"platform": "targeted", "n_cells": 19_465, "n_genes": 72, "n_targets": 14, "control_fraction": 0.417},
        ),
    ]
    tables = []
    for name, real, arguments in kinds:
        adata = scpert.datasets.simulated(random_state=0, **arguments)
        tables.append(compare(name, real, controls(adata) if name.endswith("controls") else adata.X.toarray()))
    selected = norman.X.toarray()
    selected = selected[:, (selected > 0).mean(axis=0) > 0.05]
    default = scpert.datasets.simulated().X.toarray()
    tables.append(compare("norman2019, genes seen in > 5 % of cells", selected, default))
    tables.append(compare("tapseq, against the default", tapseq.X.toarray(), default))
    with pd.option_context("display.max_rows", None, "display.width", 200, "display.float_format", "{:.4g}".format):
        print(pd.concat(tables).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    root = os.environ.get("SCPERT_TEST_DATA")
    if not root:
        sys.exit("Set SCPERT_TEST_DATA to the folder with the two real screens (see the docstring).")
    main(Path(root))
