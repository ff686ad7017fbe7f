"""Genetic interactions of Norman et al. (2019): ours beside the authors' fits.

``SCPERT_TEST_DATA`` names a folder with ``norman2019_k562_crispra_perturbench.h5ad`` and
``norman2019_gi_reference/regr_fits_final.csv``. Prints the tables of ``docs/interactions.md`` and writes its figure.
"""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import scpert
from scpert.pl._figure import name_points

MEASURES = {  # ours: theirs
    "magnitude": "ts_norm2",
    "dominance": "abs_log_ts_ratio",
    "model_fit": "ts_linear_dcor",
    "similarity": "dcor",
    "similarity_singles": "dcor_singles",
}


def main() -> None:
    if "SCPERT_TEST_DATA" not in os.environ:
        raise SystemExit("Set SCPERT_TEST_DATA to the folder with the Norman files.")
    folder = Path(os.environ["SCPERT_TEST_DATA"])
    adata = ad.read_h5ad(folder / "norman2019_k562_crispra_perturbench.h5ad")
    fits = pd.read_csv(folder / "norman2019_gi_reference" / "regr_fits_final.csv", index_col=0)
    first = fits.index.str.split("_").str[0]
    second = fits.index.str.split("_").str[1]
    turned = np.asarray(first > second)  # ours are in alphabetical order
    fits["their_c1"] = np.where(turned, fits["ts_coef_second"], fits["ts_coef_first"])
    fits["their_c2"] = np.where(turned, fits["ts_coef_first"], fits["ts_coef_second"])
    fits.index = ["+".join(sorted(name.split("_"))) for name in fits.index]

    def run(n_boot: int = 0, **options) -> pd.DataFrame:
        out = scpert.tl.genetic_interactions(
            adata, library_size_key="library_size", n_boot=n_boot, copy=True, **options
        )
        return scpert.get.interactions_df(out).set_index("perturbation")

    def compare(table: pd.DataFrame) -> dict[str, float]:
        ours = table[["c1", "c2"]].to_numpy().ravel()
        theirs = fits.loc[table.index, ["their_c1", "their_c2"]].to_numpy().ravel()
        return {
            "genes": int(table["n_genes"].mean()),
            "Pearson": np.corrcoef(ours, theirs)[0, 1],
            "RMSE": np.sqrt(np.mean((ours - theirs) ** 2)),
            "mean c, ours": ours.mean(),
            "mean c, theirs": theirs.mean(),
        }

    settings = {
        "default": {},
        "plain Theil-Sen, at least 25 genes": {"weighted": False, "min_genes": 25},
        "plain Theil-Sen, at least 50 genes": {"weighted": False},
        "plain Theil-Sen, at least 100 genes": {"weighted": False, "min_genes": 100},
        "plain Theil-Sen, all genes": {"genes": list(adata.var_names), "weighted": False},
    }
    table = run(n_boot=200)
    results = pd.DataFrame({name: compare(run(**options)) for name, options in settings.items()}).T
    print(results.round(3).to_string(), "\n")

    shown = table[["c1", "c1_lower", "c1_upper", "c2", "c2_lower", "c2_upper", "class", "class_confidence"]]
    shown = shown.join(fits[["their_c1", "their_c2"]])
    print(shown.round(2).to_string(), "\n")
    inside = [
        (
            (table[f"{c}_lower"] <= fits.loc[table.index, f"their_{c}"])
            & (fits.loc[table.index, f"their_{c}"] <= table[f"{c}_upper"])
        ).sum()
        for c in ("c1", "c2")
    ]
    print(f"authors' coefficient within our 95 % limits: {sum(inside)} of {2 * len(table)}\n")
    measures = {
        ours: {
            "ours, mean": table[ours].mean(),
            "theirs, mean": fits.loc[table.index, theirs].mean(),
            "Pearson": np.corrcoef(table[ours], fits.loc[table.index, theirs])[0, 1],
        }
        for ours, theirs in MEASURES.items()
    }
    print(pd.DataFrame(measures).T.round(2).to_string())

    figure, ax = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    for c, marker in (("c1", "o"), ("c2", "s")):
        theirs = fits.loc[table.index, f"their_{c}"]
        error = np.abs(table[[f"{c}_lower", f"{c}_upper"]].to_numpy().T - table[c].to_numpy())
        ax.errorbar(theirs, table[c], yerr=error, fmt=marker, ms=5, lw=0.8, label=c)
    ax.axline((0, 0), slope=1, color="0.6", ls="--", lw=0.8)
    ax.set(xlabel="coefficient, authors (all cells and genes)", ylabel="coefficient, ours (100 cells, 500 genes)")
    ax.set_title(f"10 coefficients of 5 doubles, Pearson {results.loc['default', 'Pearson']:.2f}")
    ax.set_xlim(0, 1.15)
    ax.legend(frameon=False, loc="lower right")
    both = fits.loc[table.index, ["their_c1", "their_c2"]].to_numpy().T.ravel()
    name_points(ax, both, table[["c1", "c2"]].to_numpy().T.ravel(), [*table.index] * 2, range(2 * len(table)))
    out = Path(__file__).parents[1] / "_static" / "interactions_norman.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=130)
    print(f"\nfigure: docs/_static/{out.name}")


if __name__ == "__main__":
    scpert.settings.progress = False
    main()
