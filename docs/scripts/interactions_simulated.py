"""Recovery of simulated interactions: coefficients, classes, limits, by cells per perturbation and estimator.

Prints the tables of ``docs/interactions.md``; ``--batches``: combinations in another batch than the singles, pooled and within batches.
"""

from __future__ import annotations

import sys

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scpert

CLASS = {"additive": "additive", "synergistic": "synergy", "suppressive": "suppression", "epistatic": "epistasis"}
CELLS = (50, 100, 400)
SEEDS = range(5)
SETTINGS = {
    "default": {},
    "plain Theil-Sen": {"weighted": False},
    "all genes, plain Theil-Sen": {"min_zscore": 0.0, "weighted": False},
}


def two_batches(seed: int, n_genes: int = 150, n_cells: int = 150) -> tuple[ad.AnnData, pd.DataFrame]:
    """Six singles in one batch, three combinations in another that shifts 0.4 of the genes; controls in both."""
    rng = np.random.default_rng(seed)

    def shift(share: float, sd: float) -> np.ndarray:
        return np.where(rng.random(n_genes) < share, rng.normal(0, sd, n_genes), 0)

    base = rng.gamma(1.0, 3, n_genes) + 0.3
    effect = {t: shift(0.3, 0.8) for t in "ABCDEF"}
    batch = shift(0.4, 1.0)
    truth = {"A+B": (1.0, 1.0, "additive"), "C+D": (0.5, 0.5, "suppression"), "E+F": (1.6, 1.2, "synergy")}
    groups = [("control", 0 * base, "x"), ("control", batch, "y"), *((t, effect[t], "x") for t in effect)]
    groups += [(p, c1 * effect[p[0]] + c2 * effect[p[2]] + batch, "y") for p, (c1, c2, _) in truth.items()]
    counts = []
    for _, change, _ in groups:
        mean = base * np.exp(change)
        counts.append(rng.poisson(mean / mean.sum() * 3000, size=(n_cells, n_genes)))
    obs = {k: np.repeat([g[i] for g in groups], n_cells) for k, i in (("perturbation", 0), ("batch", 2))}
    names = [f"cell{i}" for i in range(n_cells * len(groups))]
    return ad.AnnData(sparse.csr_matrix(np.vstack(counts)), obs=pd.DataFrame(obs, index=names)), pd.DataFrame(
        truth, index=["c1", "c2", "class"]
    ).T


def batches() -> None:
    rows = []
    for seed in range(10):
        adata, truth = two_batches(seed)
        for name, keys in (("pooled", None), ("within batches", "batch")):
            scpert.tl.genetic_interactions(adata, n_boot=0, covariate_keys=keys)
            table = adata.uns["genetic_interactions"].loc[truth.index]
            error = (table[["c1", "c2"]] - truth[["c1", "c2"]].astype(float)).to_numpy()
            found = pd.DataFrame({"class": table["class"], "right": table["class"] == truth["class"]})
            rows.append(found.assign(controls=name, square=(error**2).mean(axis=1)))
    table = pd.concat(rows)
    for name, part in table.groupby("controls", sort=False):
        print(f"{name}: class right {part['right'].sum()} of {len(part)}, neomorphism {(part['class'] == 'neomorphism').sum()}, "
              f"RMSE of the coefficients {np.sqrt(part['square'].mean()):.2f}")  # fmt: skip


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
    batches() if "--batches" in sys.argv else main()
