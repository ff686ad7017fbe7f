"""Unseen perturbations on two real tables of effects: KnowledgeGP and the other closed-form models.

Ten folds over perturbations; the perturbed gene's own value is left out; limits are paired bootstraps over perturbations.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/knowledge_gp_unseen.py [yeast] [k562] [--seed 0]

``--perturbations`` and ``--genes`` draw so many of the table at random.
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scpert
from scpert import resources


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", keep_default_na=False, dtype=str)


def gene_sets(path: Path) -> pd.DataFrame:
    with gzip.open(path, "rt") as lines:
        rows = [
            (gene, fields[0]) for fields in (x.rstrip("\n").split("\t") for x in lines) for gene in fields[2:] if gene
        ]
    return pd.DataFrame(rows, columns=["gene", "term"])


def load(name: str) -> tuple[ad.AnnData, dict[str, pd.DataFrame]]:
    data, priors = Path(os.environ["SCPERT_TEST_DATA"]), Path(os.environ["SCPERT_TEST_PRIORS"])
    if name == "yeast":
        adata = ad.read_h5ad(data / "kemmeren2014_yeast_knockouts_194genes.h5ad")
        adata.var_names = adata.var["symbol"].astype(str)
        annotations, isa = priors / "go_direct_allev_yeast_2018-11.tsv.gz", priors / "go_isa_edges_2024-02.tsv.gz"
        go = resources.gene_ontology(annotations, organism="yeast")
        knowledge = {
            "go": go,
            "go, parents": resources.gene_ontology(annotations, organism="yeast", hierarchy=isa, levels=1),
            "go, words": resources.term_words(go, priors / "go_terms_2024-02.tsv.gz"),
        }
    else:
        adata = ad.read_h5ad(data / "replogle2022_k562_up_rank_sigrecon.h5ad")
        go = read(priors / "go_direct_allev_human_2015-07.tsv.gz").rename(columns={"symbol": "gene", "go_id": "term"})
        corum = read(priors / "corum_core_4.1_human.tsv.gz").rename(columns={"complex_id": "term"})
        corum = corum.assign(gene=corum["subunits_gene_name"].str.split(";")).explode("gene")
        net = {"gene_a": "source", "gene_b": "target"}
        knowledge = {
            "go": go[["gene", "term"]],
            "string": read(priors / "string_v12.0_human_score800.tsv.gz").rename(columns=net),
            "reactome": gene_sets(priors / "reactome_gene_sets_human_2024-04.gmt.gz"),
            "corum": corum[["gene", "term"]],
            "biogrid": read(priors / "biogrid_4.4.232_human.tsv.gz").rename(columns=net),
        }
    adata.X = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
    return adata[np.abs(adata.X).sum(axis=1) > 0].copy(), knowledge


def correlations(a: np.ndarray, b: np.ndarray, use: np.ndarray) -> np.ndarray:
    n = use.sum(axis=1, keepdims=True)
    a = np.where(use, a - np.where(use, a, 0).sum(axis=1, keepdims=True) / n, 0)
    b = np.where(use, b - np.where(use, b, 0).sum(axis=1, keepdims=True) / n, 0)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))


def most_changed(values: np.ndarray, use: np.ndarray, n: int = 20) -> np.ndarray:
    """The ``n`` largest changes of each row."""
    size = np.where(use, np.abs(values), -1.0)
    return size >= np.partition(size, -n, axis=1)[:, [-n]]


def bootstrap(values: np.ndarray, rng: np.random.Generator) -> str:
    draws = values[rng.integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return "{:.4f} [{:.4f}, {:.4f}]".format(values.mean(), *np.quantile(draws, [0.025, 0.975]))


def run(name: str, seed: int, only: list[str] | None, n_perturbations: int | None, n_genes: int | None) -> None:
    adata, knowledge = load(name)
    rng = np.random.default_rng(seed)
    rows, columns = (
        np.sort(rng.choice(n, min(n, wanted or n), replace=False))
        for n, wanted in ((adata.n_obs, n_perturbations), (adata.n_vars, n_genes))
    )
    adata = adata[rows, columns].copy()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    folds = np.array_split(np.random.default_rng(seed).permutation(adata.n_obs), 10)
    options = {
        "NoChange": {}, "PerturbedMean": {}, "LinearPCA": {}, "KNN": {"knowledge": knowledge}, "Ridge": {"knowledge": knowledge},
        "KnowledgeGP": {"knowledge": knowledge},
    }  # fmt: skip
    if only:
        options = {k: v for k, v in options.items() if k in only or k == "PerturbedMean"}
    truth = adata.X.astype(float)
    use = labels[:, None] != adata.var_names.to_numpy()[None, :]
    out = {k: np.zeros_like(truth) for k in options}
    seconds = dict.fromkeys(options, 0.0)
    lower, upper = np.full(truth.shape, np.nan), np.full(truth.shape, np.nan)
    for i, fold in enumerate(folds):
        split = np.full(adata.n_obs, "train")
        split[fold] = "test"
        adata.obs["split"] = split
        for key, option in options.items():
            start = time.time()
            cls = getattr(scpert.model, key)
            cls.setup_anndata(adata, scale="effects", split_key="split")
            model = cls(adata, **option)
            model.train()
            predicted = model.predict_perturbation(list(labels[fold]), on_unknown="mean")
            seconds[key] += time.time() - start
            predicted = predicted[list(labels[fold])]
            out[key][fold] = predicted.X
            if key == "KnowledgeGP":
                lower[fold], upper[fold] = predicted.layers["lower"], predicted.layers["upper"]
                if i == 0:
                    print(model.kernel_weights().round(3).to_string())
    rng = np.random.default_rng(0)
    mean = out["PerturbedMean"]
    table = {}
    for key, values in out.items():
        table[key] = {
            "r": correlations(values, truth, use),
            "r_centred": np.nan_to_num(correlations(values - mean, truth - mean, use)),
            "mse": np.where(use, (values - truth) ** 2, 0).sum(axis=1) / use.sum(axis=1),
        }
    base = table["PerturbedMean"]["mse"].mean()
    print(f"\n{name}: {adata.n_obs} perturbations x {adata.n_vars} genes, seed {seed}")
    for key, row in table.items():
        print(
            f"{key:14s} r {np.nan_to_num(row['r']).mean():.4f}  centred {row['r_centred'].mean():.4f}  "
            f"mse/mean's {row['mse'].mean() / base:.4f}  {seconds[key]:.0f} s"
        )
    if "KnowledgeGP" in table:
        for key in table:
            if key != "KnowledgeGP":
                gain = {
                    m: np.nan_to_num(table["KnowledgeGP"][m]) - np.nan_to_num(table[key][m]) for m in ("r", "r_centred")
                }
                gain["mse"] = (table["KnowledgeGP"]["mse"] - table[key]["mse"]) / base
                print(f"  minus {key:14s} " + "  ".join(f"{m} {bootstrap(v, rng)}" for m, v in gain.items()))
        centre = (upper + lower) / 2
        drawn = centre + (upper - lower) / (2 * 1.645) * np.random.default_rng(0).standard_normal(centre.shape)
        every, most, expected = (
            np.where(which & np.isfinite(centre), (values >= lower) & (values <= upper), np.nan)
            for values, which in ((truth, use), (truth, most_changed(truth, use)), (drawn, most_changed(drawn, use)))
        )
        each = np.nanmean(every[np.isfinite(every).any(axis=1)], axis=1)
        low, high = np.quantile(np.nanmean(every, axis=0), [0.05, 0.95])
        print(
            f"  90 % limits cover {np.nanmean(every):.3f}; {low:.2f} to {high:.2f} in nine of ten genes; between perturbations {each.std():.3f}"
        )
        print(
            "  of the 20 genes of a "
            f"perturbation that change most {np.nanmean(most):.3f}, {np.nanmean(expected):.3f} if the limits are right and errors normal"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("screens", nargs="*", default=["yeast", "k562"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--perturbations", type=int)
    parser.add_argument("--genes", type=int)
    arguments = parser.parse_args()
    scpert.settings.progress = False
    for screen in arguments.screens or ["yeast", "k562"]:
        run(screen, arguments.seed, arguments.only, arguments.perturbations, arguments.genes)
