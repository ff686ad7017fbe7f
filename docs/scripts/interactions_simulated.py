"""Recovery of simulated interactions: coefficients, classes, limits, by cells per perturbation and estimator.

Prints the tables of ``docs/interactions.md``.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

import scpert

CLASS = {"additive": "additive", "synergistic": "synergy", "suppressive": "suppression", "epistatic": "epistasis"}
CELLS = (50, 100, 400)
SEEDS = range(5)
SETTINGS = {
    "default": {},
    "plain Theil-Sen": {"weighted": False},
    "all genes, plain Theil-Sen": {"min_zscore": 0.0, "weighted": False},
}


def main() -> None:
    parts = []
    for cells in CELLS:
        for seed in SEEDS:
            adata = scpert.datasets.simulated(
                n_cells=cells * 50, n_genes=500, n_targets=20, n_combinations=24, mode="activation", random_state=seed
            )
            truth = adata.uns["truth"]["interactions"].set_index("perturbation")
            for name, options in SETTINGS.items():
                n_boot = 100 if name == "default" and cells == 100 else 0
                out = scpert.tl.genetic_interactions(adata, n_boot=n_boot, copy=True, **options)
                table = scpert.get.interactions_df(out).set_index("perturbation")
                true = truth.loc[table.index]
                turned = np.asarray(true["first"] > true["second"])
                parts.append(
                    table.assign(
                        setting=name,
                        cells=cells,
                        seed=seed,
                        true_c1=np.where(turned, true["c2"], true["c1"]),
                        true_c2=np.where(turned, true["c1"], true["c2"]),
                        truth=true["class"].map(CLASS),
                    )
                )
    table = pd.concat(parts)
    rows = []
    for (cells, name), part in table.groupby(["cells", "setting"], sort=False):
        found, true = part[["c1", "c2"]].to_numpy().ravel(), part[["true_c1", "true_c2"]].to_numpy().ravel()
        rows.append(
            {
                "cells per perturbation": cells,
                "setting": name,
                "Pearson": np.corrcoef(found, true)[0, 1],
                "RMSE": np.sqrt(np.mean((found - true) ** 2)),
                "slope": float(found @ true / (true @ true)),
                "class right": (part["class"] == part["truth"]).mean(),
            }
        )
    print(pd.DataFrame(rows).round(2).to_string(index=False), "\n")
    default = table[(table["setting"] == "default") & (table["cells"] == 100)]
    print(pd.crosstab(default["truth"], default["class"]).to_string(), "\n")
    for c in ("c1", "c2"):
        inside = (default[f"{c}_lower"] <= default[f"true_{c}"]) & (default[f"true_{c}"] <= default[f"{c}_upper"])
        print(f"{c}: true value within the 95 % limits in {100 * inside.mean():.0f} % of {len(inside)}")
    right = default["class"] == default["truth"]
    print(f"class confidence: {default.loc[right, 'class_confidence'].mean():.2f} where right, "
          f"{default.loc[~right, 'class_confidence'].mean():.2f} where wrong")  # fmt: skip


if __name__ == "__main__":
    scpert.settings.progress = False
    main()
