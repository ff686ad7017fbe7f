"""Real doubles (Norman): additive, shrunken additive and KnowledgeGP on doubles whose two singles are measured.

Each double is predicted by models that have not seen it; limits are paired bootstraps over doubles.

    SCPERT_TEST_DATA=... python docs/scripts/knowledge_gp_doubles.py
"""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np

import scpert

if __name__ == "__main__":
    scpert.settings.progress = False
    adata = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / "norman2019_k562_crispra_perturbench.h5ad")
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    kinds = set(labels)
    doubles = sorted(x for x in kinds if "+" in x and set(x.split("+")) <= kinds)
    models = {"additive": ("Additive", {}), "shrunken": ("Additive", {"shrink": True}), "gp": ("KnowledgeGP", {})}
    error: dict[str, list[float]] = {k: [] for k in models}
    r: dict[str, list[float]] = {k: [] for k in models}
    truth_of = scpert.model.NoChange
    truth_of.setup_anndata(adata, library_size_key="library_size")
    every = truth_of(adata)
    every.train()
    observed = {
        tuple(sorted(x.split("+"))): d for x, d in zip(every.effects_.labels, every.effects_.delta, strict=True)
    }
    for double in doubles:
        adata.obs["split"] = np.where(labels == double, "test", "train")
        for key, (name, option) in models.items():
            cls = getattr(scpert.model, name)
            cls.setup_anndata(adata, library_size_key="library_size", split_key="split")
            model = cls(adata, **option)
            model.train()
            delta = model._predict_delta([tuple(double.split("+"))], None, np.random.default_rng(0), 1)
            delta = np.asarray(getattr(delta, "delta", delta))[0]
            truth = observed[tuple(sorted(double.split("+")))]
            error[key].append(float(((delta - truth) ** 2).mean()))
            r[key].append(float(np.corrcoef(delta, truth)[0, 1]))
    rng = np.random.default_rng(0)
    print(f"{len(doubles)} doubles: {', '.join(doubles)}")
    base = np.array(error["additive"])
    for key in models:
        gain = np.array(error[key]) / base.mean() - base / base.mean()
        draws = gain[rng.integers(0, len(gain), (2000, len(gain)))].mean(axis=1)
        print(
            f"{key:9s} r {np.mean(r[key]):.3f}  squared error / additive's {np.mean(error[key]) / base.mean():.3f}  "
            "difference {:.3f} [{:.3f}, {:.3f}]".format(gain.mean(), *np.quantile(draws, [0.025, 0.975]))
        )
