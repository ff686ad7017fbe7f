"""GPO-VAE on real screens, random-cell splits: against the training-cell mean and the ceiling, on test cells only.

    SCPERT_TEST_DATA=DIR python docs/scripts/gpovae_real.py [--seeds 5] [--few] [--out FILE.csv]

Prints mean delta correlation and the paired difference to the training-cell mean with bootstrap limits over
perturbations (averaged over seeds first).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import scpert
from scpert import metrics
from scpert.model import Additive, GPOVAE, PerturbedMean, SAMSVAE

SCREENS = {
    "Norman 2019 (CRISPRa, 500 genes)": ("norman2019_k562_crispra_perturbench.h5ad", "library_size"),
    "Schraivogel 2020 (TAP-seq, 72 genes)": ("schraivogel2020_k562_tapseq_crispat.h5ad", None),
}
NAMES = ("pearson_delta", "pearson_delta_centroid", "mse_delta")


def few_cells(adata: ad.AnnData, n: int, seed: int) -> None:
    """Keep ``n`` training cells per perturbation; the others are not used at all."""
    rng = np.random.default_rng(seed)
    split = adata.obs["split"].astype(str).to_numpy().copy()
    for label in adata.obs["perturbation"].unique():
        rows = np.flatnonzero((split == "train") & (adata.obs["perturbation"] == label).to_numpy())
        if label != "control" and len(rows) > n:
            split[rng.permutation(rows)[n:]] = "unused"
    adata._inplace_subset_obs(split != "unused")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--few", action="store_true", help="also with 10, 20 and 40 training cells per perturbation")
    parser.add_argument("--published", action="store_true", help="also the paper's equations")
    parser.add_argument("--screen", default="", help="part of a screen's name")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    scpert.settings.progress = False
    rows = []
    for title, (file, library) in SCREENS.items():
        if arguments.screen not in title:
            continue
        for n in [0, 10, 20, 40] if arguments.few else [0]:
            for seed in range(arguments.seeds):
                adata = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / file)
                scpert.pp.split(adata, kind="cells", fractions=(0.6, 0.1, 0.3), random_state=seed)
                if n:
                    few_cells(adata, n, seed)
                part = {p: adata[adata.obs["split"].astype(str) == p].copy() for p in ("train", "test")}
                reference = metrics.Reference(part["test"], train=part["train"], library_size_key=library)
                models = {
                    "training-cell mean": (Additive, {}),
                    "perturbed mean": (PerturbedMean, {}),
                    "GPOVAE": (GPOVAE, {}),
                }
                models["GPOVAE, network alone"] = (GPOVAE, {"shrinkage": False})
                models["SAMSVAE"] = (SAMSVAE, {})
                if arguments.published and not n:
                    models["GPOVAE, published"] = (GPOVAE, {"published": True})
                trained = None
                for name, (cls, options) in models.items():
                    if name == "GPOVAE, network alone":  # the same network, without the last step
                        trained.shrinkage_ = None
                        model = trained
                    else:
                        cls.setup_anndata(adata, split_key="split", library_size_key=library)
                        model = cls(adata, random_state=seed, **options) if cls in (GPOVAE, SAMSVAE) else cls(adata)
                        epochs = int(np.clip(round(200_000 / part["train"].n_obs), 12, 50))
                        model.train(max_epochs=epochs, random_state=seed)
                        trained = model if name == "GPOVAE" else trained
                    table = metrics.evaluate(model.predict_perturbation(), reference, metrics=NAMES)
                    for label, values in table.iterrows():
                        rows.append(
                            {"screen": title, "cells": n, "seed": seed, "model": name, "label": label, **values}
                        )
                top = metrics.ceiling(reference, metrics=NAMES, n_draws=10, random_state=seed)
                for label, values in top.iterrows():
                    rows.append(
                        {"screen": title, "cells": n, "seed": seed, "model": "ceiling", "label": label, **values}
                    )
                print(title, n or "all", "cells, seed", seed, flush=True)
    table = pd.DataFrame(rows)
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    rng = np.random.default_rng(0)
    for (title, n), part in table.groupby(["screen", "cells"], sort=False):
        print(f"\n{title}, {n or 'all (about 60 %)'} training cells per perturbation")
        mean = part.groupby(["model", "label"])[list(NAMES)].mean()
        base = mean.loc["training-cell mean"]
        draws = rng.integers(len(base), size=(2000, len(base)))
        low_end, high_end = (mean.loc[m]["pearson_delta"].mean() for m in ("perturbed mean", "ceiling"))
        for name in part["model"].unique():
            values = mean.loc[name].reindex(base.index)
            difference = (values["pearson_delta"] - base["pearson_delta"]).to_numpy()
            low, high = np.nanquantile(np.nanmean(difference[draws], axis=1), [0.025, 0.975])
            spread = part[part["model"] == name].groupby("seed")["pearson_delta"].mean().std()
            print(
                f"  {name:24s} r {values['pearson_delta'].mean():.3f} (sd over seeds {spread:.3f})  "
                f"score {(values['pearson_delta'].mean() - low_end) / (high_end - low_end):.2f}  "
                f"centroid r {values['pearson_delta_centroid'].mean():.3f}  mse {values['mse_delta'].mean():.5f}  "
                f"r - training-cell mean {np.nanmean(difference):+.3f} [{low:+.3f}, {high:+.3f}]"
            )


if __name__ == "__main__":
    main()
