"""GPO-VAE on targets that were never perturbed, in simulated screens: with true and with shuffled annotations.

    python docs/scripts/gpovae_unseen_simulated.py

A quarter of the targets is held out. Mean correlation of the predicted with the measured shift, the target's own gene left out, and the share with which
GPO-VAE follows what knowledge says of its network's rows.
"""

import warnings

import numpy as np

import scpert
from scpert.model import GPOVAE, KnowledgeGP

warnings.filterwarnings("ignore")


def correlation(predicted: np.ndarray, truth: np.ndarray, own: np.ndarray) -> float:
    """Mean over perturbations; ``own`` is the column of each target's own gene."""
    rows = zip(predicted, truth, own, strict=True)
    return float(np.mean([np.corrcoef(np.delete(a, j), np.delete(b, j))[0, 1] for a, b, j in rows]))


def one(n: int, seed: int) -> None:
    adata = scpert.datasets.simulated(
        n_cells=40 * n + 600, n_genes=120, n_targets=n, n_combinations=0, effect_size=1.5, random_state=seed
    )
    annotations = adata.uns["truth"]["annotations"][["gene", "term"]]
    labels = adata.obs["perturbation"].astype(str)
    targets = sorted(set(labels) - {"control"})
    test = list(np.random.default_rng(seed).permutation(targets)[: n // 4])
    adata.obs["split"] = np.where(labels.isin(test), "test", "train")
    truth, own = scpert.tl.perturbation_effects(adata)[test].X, adata.var_names.get_indexer(test)
    shuffled = annotations.assign(gene=np.random.default_rng(1).permutation(annotations["gene"]))
    out = []
    for table in (annotations, shuffled):
        options = {"knowledge": {"annotations": table}}
        GPOVAE.setup_anndata(adata, split_key="split")
        model = GPOVAE(adata, n_latent=20, n_hidden=64, **options)
        model.train(max_epochs=30, accelerator="cpu")
        KnowledgeGP.setup_anndata(adata, split_key="split")
        process = KnowledgeGP(adata, **options)
        process.train()
        ours, theirs = (m.predict_perturbation(test)[test].layers["delta"] for m in (model, process))
        share = model._rows_from_knowledge[2]
        out.append(f"{correlation(ours, truth, own):.3f} ({share:.2f}) | {correlation(theirs, truth, own):.3f}")
    mean = np.tile(model.effects_.mean, (len(test), 1))
    print(f"| {n}, {seed} | {correlation(mean, truth, own):.3f} | " + " | ".join(out) + " |", flush=True)


if __name__ == "__main__":
    scpert.settings.progress = False
    print(
        "| targets, seed | perturbed mean | GPOVAE, true (share) | KnowledgeGP, true | GPOVAE, shuffled (share) | KnowledgeGP, shuffled |"
    )
    for n, seed in ((16, 0), (16, 1), (16, 2), (48, 0), (48, 1)):
        one(n, seed)
