"""Unseen perturbations of two tables of effects: GEARS and BioDSNN beside the mean and kernel ridge on the same nets.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_effects.py yeast k562

Ten folds over perturbations; a perturbation's own gene is left out; mean over perturbations of the correlation with the
observed effect, and of the same after the training mean is taken from both.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

warnings.filterwarnings("ignore")
FILES = {"yeast": "kemmeren2014_yeast_knockouts_194genes.h5ad", "k562": "replogle2022_k562_up_rank_sigrecon.h5ad"}


def load(name: str) -> AnnData:
    """The table with gene symbols as names."""
    adata = read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / FILES[name])
    if "symbol" in adata.var:
        adata.var_names = adata.var["symbol"].astype(str).to_numpy()
    adata.var_names_make_unique()
    return adata


def nets(name: str, which: list[str]) -> dict[str, pd.DataFrame]:
    """Nets of targets from Gene Ontology, STRING and Reactome."""
    import scpert

    priors = Path(os.environ["SCPERT_TEST_PRIORS"])
    out = {}
    if "go" in which:
        file = "go_direct_allev_yeast_2018-11.tsv.gz" if name == "yeast" else "go_direct_allev_human_2015-07.tsv.gz"
        go = scpert.resources.gene_ontology(priors / file, exclude_terms=["GO:0005515"])
        out["go"] = scpert.pp.similarity_net(go)
    if name == "k562" and "string" in which:
        out["string"] = scpert.resources.interactome(priors / "string_v12.0_human_score800.tsv.gz")
    if name == "k562" and "reactome" in which:
        reactome = scpert.resources.reactome(
            priors / "reactome_gene_sets_human_c2023-02.gmt.gz",
            priors / "reactome_pathway_names_human_c2023-02.tsv.gz",
            priors / "reactome_hierarchy_human_c2023-02.tsv.gz",
        )
        out["reactome"] = scpert.pp.similarity_net(reactome.to_annotations())
    return out


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 for a constant prediction."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=list(FILES))
    parser.add_argument("--models", nargs="*", default=["PerturbedMean", "GEARS", "BioDSNN"])
    parser.add_argument("--nets", nargs="*", default=["go", "string", "reactome"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folds", type=int, default=10, help="folds to run, of ten")
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args()
    import scpert

    scpert.settings.progress = False
    for table in args.tables:
        adata = load(table)
        known = nets(table, args.nets)
        labels = adata.obs["perturbation"].astype(str).to_numpy()
        distinct = np.unique(labels)
        fold = dict(zip(distinct, np.random.default_rng(0).permutation(len(distinct)) % 10, strict=True))
        values = pd.DataFrame(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, index=labels)
        observed = values.groupby(level=0).mean()
        gene = {g: i for i, g in enumerate(adata.var_names)}
        for name in args.models:
            plain, centred, ratio, trust = [], [], [], []
            for f in range(args.folds):
                test = [x for x in distinct if fold[x] == f]
                adata.obs["split"] = np.where(np.isin(labels, test), "test", "train")
                cls = getattr(scpert.model, name)
                cls.setup_anndata(adata, scale="effects", split_key="split")
                options: dict = {} if name == "PerturbedMean" else {"perturbation_net": known}
                if args.published and options:
                    options["published"] = True
                model = cls(adata, **options)
                model.train(**({"max_epochs": args.epochs, "accelerator": "cpu", "batch_size": 32} if options else {}))
                out = model.predict_perturbation(test, on_unknown="mean").X
                trust.append(getattr(model, "_trust", {}).get("unseen", np.nan))
                mean = model.effects_.mean
                for x, p in zip(test, out, strict=True):
                    keep = np.ones(len(p), dtype=bool)
                    keep[gene.get(x, slice(0, 0))] = False
                    o = observed.loc[x].to_numpy()
                    plain.append(correlation(p[keep], o[keep]))
                    centred.append(correlation((p - mean)[keep], (o - mean)[keep]))
                    ratio.append((((p - o)[keep] ** 2).sum(), ((mean - o)[keep] ** 2).sum()))
            error = np.sum(ratio, axis=0)
            print(
                f"{table:>6} {name:<14} {'+'.join(known):<20} r {np.mean(plain):.3f}, centred {np.mean(centred):.3f}, "
                f"squared error {error[0] / error[1]:.3f} of the mean's, trust in the network {np.mean(trust):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
