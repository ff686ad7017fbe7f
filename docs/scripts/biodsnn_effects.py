"""Unseen perturbations of two tables of effects: GEARS and BioDSNN beside the mean, KNN and ridge on the same knowledge.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_effects.py yeast
    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_effects.py k562 --linear
    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_effects.py k562 --genes 1000

Ten folds over perturbations; a perturbation's own gene is left out; mean over perturbations of the correlation with the
observed effect, of the same after the training mean is taken from both, and the squared error over that of the mean; then the
differences between the last model and the others, with limits.
``--linear`` gives the network one batch and no say: what is left is the linear graph model. ``--genes`` keeps the genes
that vary most, so that the networks can be trained in minutes; the other models then see the same genes. Predictions
are kept in ``--out``.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

warnings.filterwarnings("ignore")
FILES = {"yeast": "kemmeren2014_yeast_knockouts_194genes.h5ad", "k562": "replogle2022_k562_up_rank_sigrecon.h5ad"}
#: Knowledge by table: "go" are annotations, "go net" is their similarity net (20 neighbours).
SETS = {
    "yeast": [["go net"], ["go"]],
    "k562": [["go net"], ["go"], ["go net", "string"], ["go", "string", "reactome"]],
}
EPOCHS = {"GEARS": {"yeast": 5, "k562": 5}, "BioDSNN": {"yeast": 3, "k562": 3}}


def load(name: str, n_genes: int | None) -> AnnData:
    """The table with gene symbols as names; only the ``n_genes`` that vary most."""
    adata = read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / FILES[name])
    if "symbol" in adata.var:
        adata.var_names = adata.var["symbol"].astype(str).to_numpy()
    adata.var_names_make_unique()
    values = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    if n_genes is not None and n_genes < adata.n_vars:
        adata = adata[:, np.sort(np.argsort(-values.var(axis=0), kind="stable")[:n_genes])].copy()
    return adata


def knowledge(name: str) -> dict[str, pd.DataFrame]:
    """Annotations and nets of targets from Gene Ontology, STRING and Reactome; pathways for the mask."""
    import scpert

    priors = Path(os.environ["SCPERT_TEST_PRIORS"])
    file = "go_direct_allev_yeast_2018-11.tsv.gz" if name == "yeast" else "go_direct_allev_human_2015-07.tsv.gz"
    go = scpert.resources.gene_ontology(priors / file, exclude_terms=["GO:0005515"])[["gene", "term"]]
    out = {"go": go, "go net": scpert.pp.similarity_net(go)}
    if name == "k562":
        out["string"] = scpert.resources.interactome(priors / "string_v12.0_human_score800.tsv.gz")
        reactome = scpert.resources.reactome(
            priors / "reactome_gene_sets_human_c2023-02.gmt.gz",
            priors / "reactome_pathway_names_human_c2023-02.tsv.gz",
            priors / "reactome_hierarchy_human_c2023-02.tsv.gz",
        )
        out["reactome"] = reactome.to_annotations()[["gene", "term"]]
        out["pathways"] = reactome  # type: ignore[assignment]
    return out


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; 0 for a constant prediction."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


def difference(gain: np.ndarray) -> str:
    """Paired differences with bootstrap limits over perturbations."""
    draws = gain[np.random.default_rng(0).integers(0, len(gain), (2000, len(gain)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    names = ("r", "centred", "squared error over the mean's")
    return ", ".join(
        f"{n} {g:.4f} [{a:.4f}, {b:.4f}]" for n, g, a, b in zip(names, gain.mean(axis=0), low, high, strict=True)
    )


def predict(adata: AnnData, name: str, known: dict, mask, test: list[str], epochs: int, form: str) -> dict:
    """Predictions of the test perturbations, with the network's part and without it."""
    import scpert

    linear = form == "linear"
    cls = getattr(scpert.model, name)
    cls.setup_anndata(adata, scale="effects", split_key="split")
    if name in ("GEARS", "BioDSNN"):
        options: dict = {"pathway_net": mask} if name == "BioDSNN" else {}
        extra = {}
        if linear:  # the least network that there can be
            extra = {"limit_train_batches": 1}
            edge = pd.DataFrame({"source": adata.var_names[:1], "target": adata.var_names[1:2], "weight": 1.0})
            options |= {"gene_net": edge, "n_hidden": 2} | ({"n_feedforward": 2} if name == "BioDSNN" else {})
        if form == "published":
            options["published"] = True
        model = cls(adata, perturbation_net=known, **options)
        model.train(max_epochs=1 if linear else epochs, accelerator="cpu", batch_size=32, **extra)
    else:
        model = cls(adata, **({} if name == "PerturbedMean" else {"knowledge": known}))
        model.train()
    trust = getattr(model, "_trust", {"unseen": np.nan})
    out = {"trust": trust["unseen"], "mean": model.effects_.mean}
    for key, weight in (("full", trust["unseen"]), ("linear", 0.0)):
        trust["unseen"] = 0.0 if linear and np.isfinite(weight) else weight
        predicted = model.predict_perturbation(test, on_unknown="mean")
        out[key] = predicted.layers["delta"]
        if key == "full" and "lower" in predicted.layers:
            out |= {"lower": predicted.layers["lower"], "upper": predicted.layers["upper"]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=list(FILES))
    parser.add_argument("--models", nargs="*", default=["PerturbedMean", "KNN", "Ridge", "GEARS", "BioDSNN"])
    parser.add_argument("--sets", nargs="*", help="knowledge, such as 'go' or 'go+string'; default: all")
    parser.add_argument("--linear", action="store_true", help="without the network")
    parser.add_argument("--published", action="store_true", help="the published form: the network alone, 20 epochs")
    parser.add_argument("--genes", type=int)
    parser.add_argument("--folds", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=Path("biodsnn_effects"))
    args = parser.parse_args()
    import scpert

    scpert.settings.progress = False
    args.out.mkdir(exist_ok=True, parents=True)
    adata = load(args.table, args.genes)
    tables = knowledge(args.table)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    mask = None
    if "pathways" in tables and "BioDSNN" in args.models:
        mask = scpert.pp.pathway_mask(list(dict.fromkeys([*adata.var_names, *labels])), tables["pathways"], level=1)
    distinct = np.unique(labels)
    fold = dict(zip(distinct, np.random.default_rng(0).permutation(len(distinct)) % 10, strict=True))
    values = pd.DataFrame(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, index=labels)
    observed = values.groupby(level=0).mean()
    gene = {g: i for i, g in enumerate(adata.var_names)}
    form = "linear" if args.linear else "published" if args.published else ""
    for which in [s.split("+") for s in args.sets] if args.sets else SETS[args.table]:
        known = {k: tables[k] for k in which}
        by_model: dict[str, np.ndarray] = {}
        for name in args.models:
            epochs = args.epochs or (20 if args.published else EPOCHS.get(name, {}).get(args.table, 0))
            scores: dict[str, list] = {"full": [], "linear": []}
            error: dict[str, list] = {"full": [], "linear": []}
            trust, inside, start = [], [], time.process_time()
            for f in args.folds:
                test = [x for x in distinct if fold[x] == f]
                tag = "-".join(
                    [args.table, name, *which, str(args.genes), "linear" if args.linear else f"{form}{epochs}"]
                )
                file = args.out / f"{tag.replace(' ', '_')}-{f}.npz"
                if not file.exists():
                    adata.obs["split"] = np.where(np.isin(labels, test), "test", "train")
                    np.savez(file, **predict(adata, name, known, mask, test, epochs, form))
                saved = np.load(file)
                mean = saved["mean"]
                trust.append(float(saved["trust"]))
                if "lower" in saved:
                    truth = observed.loc[test].to_numpy()
                    inside.append((truth >= saved["lower"]) & (truth <= saved["upper"]))
                for key in scores:
                    for x, p in zip(test, saved[key], strict=True):
                        keep = np.ones(len(p), dtype=bool)
                        keep[gene.get(x, slice(0, 0))] = False
                        o = observed.loc[x].to_numpy()
                        scores[key].append(
                            (correlation(p[keep], o[keep]), correlation((p - mean)[keep], (o - mean)[keep]))
                        )
                        error[key].append((((p - o)[keep] ** 2).sum(), ((mean - o)[keep] ** 2).sum()))
            both = np.array(error["full"])
            by_model[name] = np.column_stack([np.array(scores["full"]), both[:, 0] / both[:, 1].mean()])
            network = name in ("GEARS", "BioDSNN") and not form
            for key in ("full", "linear") if network else ("full",):
                r, c = np.mean(scores[key], axis=0)
                e = np.sum(error[key], axis=0)
                note = f", trust in the network {np.mean(trust):.2f}" if network and key == "full" else ""
                if inside and key == "full":
                    held = 100 * np.concatenate(inside).mean(axis=0)  # of each gene
                    low, high = np.quantile(held, [0.05, 0.95])
                    note += (
                        f", {held.mean():.0f} % inside the 90 % limits ({low:.0f} to {high:.0f} % in nine of ten genes)"
                    )
                shown = f"{name}{', its linear graph model' if key == 'linear' or (args.linear and np.isfinite(trust[0])) else ''}"
                shown += ", published" if args.published else ""
                print(
                    f"{args.table:>6} {adata.n_vars} genes {'+'.join(which):<20} {shown:<34} r {r:.3f}, centred {c:.3f}, "
                    f"squared error {e[0] / e[1]:.3f} of the mean's{note} ({time.process_time() - start:.0f} s)",
                    flush=True,
                )
        *others, last = by_model
        for name in others:
            print(f"       {last} minus {name}: {difference(by_model[last] - by_model[name])}", flush=True)


if __name__ == "__main__":
    main()
