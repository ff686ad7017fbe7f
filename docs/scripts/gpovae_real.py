"""GPO-VAE on real screens, random-cell splits: against the training-cell mean and the ceiling, on test cells only.

    SCPERT_TEST_DATA=DIR python docs/scripts/gpovae_real.py [--seeds 5] [--few] [--out FILE.csv]
    SCPERT_TEST_DATA=DIR SCPERT_TEST_PRIORS=DIR python docs/scripts/gpovae_real.py --unseen [--seeds 3] [--screen Norman]

Prints mean delta correlation and the paired difference to the training-cell mean with bootstrap limits over
perturbations (averaged over seeds first). ``--unseen`` holds out whole targets instead, every single once in six folds,
with all combinations that hold them, and compares with the perturbed mean.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from knowledge_gp_unseen import load
import scpert
from scpert import metrics
from scpert.model import KNN, Additive, GPOVAE, KnowledgeGP, LinearPCA, PerturbedMean, SAMSVAE

SCREENS = {
    "Norman 2019 (CRISPRa, 500 genes)": ("norman2019_k562_crispra_perturbench.h5ad", "library_size"),
    "Schraivogel 2020 (TAP-seq, 72 genes)": ("schraivogel2020_k562_tapseq_crispat.h5ad", None),
}
CELLS_UNSEEN = 60_000  # cells seen in training with --unseen, over all epochs
NAMES = ("pearson_delta", "pearson_delta_centroid", "mse_delta")
UNSEEN = ("pearson_delta", "pearson_delta_no_target", "mse_delta", "mse_delta_no_target")  # with --unseen


def few_cells(adata: ad.AnnData, n: int, seed: int) -> None:
    """Keep ``n`` training cells per perturbation; the others are not used at all."""
    rng = np.random.default_rng(seed)
    split = adata.obs["split"].astype(str).to_numpy().copy()
    for label in adata.obs["perturbation"].unique():
        rows = np.flatnonzero((split == "train") & (adata.obs["perturbation"] == label).to_numpy())
        if label != "control" and len(rows) > n:
            split[rng.permutation(rows)[n:]] = "unused"
    adata._inplace_subset_obs(split != "unused")


def unseen(adata: ad.AnnData, library: str | None, knowledge: dict, seed: int) -> list[dict]:
    """Every single perturbation predicted once by models that have not seen its target, six folds."""
    labels = adata.obs["perturbation"].astype(str)
    singles = sorted(x for x in labels.unique() if x != "control" and "+" not in x)
    rng = np.random.default_rng(seed)
    options = {
        "perturbed mean": (PerturbedMean, {}),
        "LinearPCA": (LinearPCA, {}),
        "KNN": (KNN, {"knowledge": knowledge}),
        "KnowledgeGP": (KnowledgeGP, {"knowledge": knowledge}),
        "GPOVAE": (GPOVAE, {"knowledge": knowledge, "random_state": seed}),
    }
    rows = []
    for fold in np.array_split(rng.permutation(singles), 6):
        held = labels.map(lambda x, fold=fold: bool(set(x.split("+")) & set(fold))).to_numpy()
        split = np.where(held, "test", np.where(rng.random(adata.n_obs) < 0.1, "val", "train"))
        adata.obs["split"] = split
        controls = (labels == "control").to_numpy()
        test = adata[(held & labels.isin(fold).to_numpy()) | controls].copy()
        reference = metrics.Reference(test, train=adata[~held].copy(), library_size_key=library)
        for name, (cls, settings) in options.items():
            cls.setup_anndata(adata, split_key="split", library_size_key=library)
            model = cls(adata, **settings)
            epochs = max(3, round(CELLS_UNSEEN / int((split == "train").sum())))
            model.train(**({"max_epochs": epochs, "random_state": seed} if cls is GPOVAE else {}))
            predicted = model.predict_perturbation(list(fold), on_unknown="mean")
            table = metrics.evaluate(predicted, reference, metrics=UNSEEN)
            status = dict(zip(predicted.obs["perturbation"], predicted.obs["status"], strict=True))
            rows += [
                {"seed": seed, "model": name, "label": x, "status": status[x], **values}
                for x, values in table.iterrows()
            ]
    return rows


def report_unseen(title: str, table: pd.DataFrame) -> None:
    """Means over perturbations (over seeds first) and paired differences to the perturbed mean."""
    mean = table.groupby(["model", "label"])[list(UNSEEN)].mean()
    base = mean.loc["perturbed mean"]
    draws = np.random.default_rng(0).integers(len(base), size=(4000, len(base)))
    known = table.loc[(table["model"] == "GPOVAE") & (table["status"] == "unseen"), "label"].nunique()
    print(f"\n{title}: {len(base)} singles, {known} of them in the knowledge, {table['seed'].nunique()} seeds")
    for name in table["model"].unique():
        values = mean.loc[name].reindex(base.index)
        parts = [f"{name:15s} r {values['pearson_delta'].mean():.3f}  mse {values['mse_delta'].mean():.5f}"]
        for column in UNSEEN:
            gain = (values[column] - base[column]).to_numpy()
            gain = gain / (base[column].mean() if column.startswith("mse") else 1.0)
            low, high = np.nanquantile(np.nanmean(gain[draws], axis=1), [0.025, 0.975])
            parts.append(f"{column} - mean's {np.nanmean(gain):+.3f} [{low:+.3f}, {high:+.3f}]")
        print("  " + "  ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--few", action="store_true", help="also with 10, 20 and 40 training cells per perturbation")
    parser.add_argument("--published", action="store_true", help="also the paper's equations")
    parser.add_argument("--unseen", action="store_true", help="hold out whole targets; needs SCPERT_TEST_PRIORS")
    parser.add_argument("--screen", default="", help="part of a screen's name")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    scpert.settings.progress = False
    if arguments.unseen:
        knowledge = load("k562")[1]
        for title, (file, library) in SCREENS.items():
            if arguments.screen in title:
                adata = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / file)
                found = []
                for seed in range(arguments.seeds):
                    found += unseen(adata, library, knowledge, seed)
                    if arguments.out:
                        pd.DataFrame(found).to_csv(f"{arguments.out}.{title.split()[0]}.csv", index=False)
                report_unseen(title, pd.DataFrame(found))
        return
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
