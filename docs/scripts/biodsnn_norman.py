"""BioDSNN, its ablations and the other systems of its tables on the Norman subset, each perturbation predicted once.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_norman.py --seeds 0 1 2 3 4

Folds are over perturbations; what a fold's training cells do not hold is unseen. Predictions are kept in ``--out`` and
not made again. All hyper-parameters are the defaults (or the article's, where a row says "published").
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

METRICS = [
    "mse_top20",
    "mse_top20_no_target",
    "mse_delta_no_target",
    "pearson_delta_no_target",
    "pearson_delta_centroid_no_target",
    "centroid_accuracy",
    "share_within_5pct",
]


def systems(nets: dict) -> dict:
    """Name -> (class, options, epochs)."""
    graph = {"perturbation_net": nets["go"]}
    both = {**graph, "pathway_net": nets["mask"]}
    old = {"published": True}
    return {
        "NoChange": ("NoChange", {}, None),
        "PerturbedMean": ("PerturbedMean", {}, None),
        "Additive": ("Additive", {}, None),
        "MatchingMean": ("MatchingMean", {}, None),
        "LinearGRN": ("LinearGRN", {}, None),
        "ConditionalVAE": ("ConditionalVAE", {}, 60),
        "CPA": ("CPA", {}, 60),
        "CPA, adversary": ("CPA", {"adversary_weight": 1.0, "kl_weight": 0.0}, 60),
        # the published learning rate is halved every epoch: after eight nothing moves
        "GEARS, published": ("GEARS", {**graph, **old}, 8),
        "GEARS": ("GEARS", graph, 10),
        "BioDSNN, published": ("BioDSNN", {**both, **old}, 8),
        "BioDSNN, published, no VAE": ("BioDSNN", {**both, **old, "use_vae": False}, 8),
        "BioDSNN, published, no attention": ("BioDSNN", {**both, **old, "use_attention": False}, 8),
        "BioDSNN, published, no mask": ("BioDSNN", {**both, **old, "use_mask": False}, 8),
        "BioDSNN": ("BioDSNN", both, 10),
    }


def stratum(label: str, train: set[str]) -> str:
    """Unseen single, or how many of a combination's targets were measured alone."""
    targets = label.split("+")
    return "single" if len(targets) == 1 else f"seen {sum(t in train for t in targets)} of {len(targets)}"


def predict(adata: AnnData, system: tuple, seed: int) -> np.ndarray:
    """Shifts of the test labels of ``obs["split"]``, ``(perturbation, gene)``; labels sorted."""
    import scpert

    name, options, epochs = system
    cls = getattr(scpert.model, name)
    cls.setup_anndata(adata, split_key="split", library_size_key="library_size")
    model = cls(adata, **options)
    extra = {} if epochs is None else {"max_epochs": epochs}
    model.train(accelerator="cpu", random_state=seed, **extra)
    labels = sorted(set(adata.obs["perturbation"][adata.obs["split"] == "test"]))
    return model.predict_perturbation(labels, on_unknown="mean").layers["delta"]


def limits(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap limits over perturbations."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
    return float(values.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("biodsnn_norman"))
    args = parser.parse_args()
    import scpert

    scpert.settings.progress = False
    data, priors = Path(os.environ["SCPERT_TEST_DATA"]), Path(os.environ["SCPERT_TEST_PRIORS"])
    adata = read_h5ad(data / "norman2019_k562_crispra_perturbench.h5ad")
    adata.obs["perturbation"] = ["+".join(sorted(x.split("+"))) for x in adata.obs["perturbation"].astype(str)]
    labels = sorted(set(adata.obs["perturbation"]) - {"control"})
    go = scpert.resources.gene_ontology(priors / "go_direct_allev_human_2015-07.tsv.gz", exclude_terms=["GO:0005515"])
    reactome = scpert.resources.reactome(
        priors / "reactome_gene_sets_human_c2023-02.gmt.gz",
        priors / "reactome_pathway_names_human_c2023-02.tsv.gz",
        priors / "reactome_hierarchy_human_c2023-02.tsv.gz",
    )
    args.out.mkdir(exist_ok=True, parents=True)
    cache = args.out / "go.parquet"
    if not cache.exists():
        scpert.pp.similarity_net(go).to_parquet(cache)
    nets = {"go": pd.read_parquet(cache)}
    folds, found, strata = {}, {}, {}
    for seed in args.seeds:
        order = np.random.default_rng(seed).permutation(len(labels))
        folds[seed] = {labels[i]: k % args.folds for k, i in enumerate(order)}
        for fold in range(args.folds):
            test = sorted(x for x in labels if folds[seed][x] == fold)
            train = {x for x in labels if folds[seed][x] != fold}
            strata.update({(seed, x): stratum(x, train) for x in test})
            adata.obs["split"] = np.where(adata.obs["perturbation"].isin(test), "test", "train")
            coexpression = scpert.pp.coexpression_net(adata, library_size_key="library_size")
            nets["mask"] = scpert.pp.pathway_mask(adata, reactome, fallback_net=coexpression)
            for name, system in systems(nets).items():
                if args.only and name not in args.only:
                    continue
                file = args.out / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}_{fold}.npy"
                if not file.exists():
                    try:
                        np.save(file, predict(adata, system, seed))
                    except (ImportError, AttributeError, ModuleNotFoundError) as error:
                        print(f"{name}: left out ({error})")
                        continue
                delta = np.load(file)
                for x, row in zip(test, delta, strict=True):
                    found[name, seed, x] = row
    complete = len(labels) * len(args.seeds)
    names = [n for n in systems(nets) if sum(k[0] == n for k in found) == complete]
    control = _profile(adata, adata.obs["perturbation"] == "control")
    tables = []
    for name in names:
        for seed in args.seeds:
            delta = np.stack([found[name, seed, x] for x in labels])
            predicted = AnnData(
                np.maximum(control + delta, 0).astype(np.float32),
                obs=pd.DataFrame({"perturbation": labels}, index=labels),
                var=pd.DataFrame(index=adata.var_names),
                layers={"delta": delta.astype(np.float32)},
            )
            table = scpert.metrics.evaluate(
                predicted, adata, train=adata, metrics=METRICS, library_size_key="library_size"
            )
            table = table.reset_index(names="perturbation").assign(model=name, seed=seed)
            tables.append(table.assign(stratum=[strata[seed, x] for x in table["perturbation"]]))
    ceiling = scpert.metrics.ceiling(adata, metrics=METRICS, library_size_key="library_size")
    result = pd.concat(tables, ignore_index=True)
    result.to_csv(args.out / "table.csv", index=False)
    rng = np.random.default_rng(0)
    reference = result[result["model"] == "PerturbedMean"].set_index(["seed", "perturbation"])
    print(
        f"# {len(labels)} perturbations, {args.folds} folds, seeds {args.seeds}; mean [95 % limits] over perturbations"
    )
    for metric in METRICS:
        print(f"\n## {metric}")
        for which in ("all", *sorted(result["stratum"].unique())):
            part = result if which == "all" else result[result["stratum"] == which]
            n = part["perturbation"].nunique()
            print(f"-- {which} ({n} perturbations)")
            for name in names:
                rows = part[part["model"] == name].set_index(["seed", "perturbation"])[metric]
                mean, low, high = limits(rows.groupby("perturbation").mean().to_numpy(), rng)
                against = (rows - reference.loc[rows.index, metric]).groupby("perturbation").mean().to_numpy()
                d, dl, dh = limits(against, rng)
                print(f"{name:<34} {mean:8.4f} [{low:8.4f}, {high:8.4f}]   minus mean {d:8.4f} [{dl:8.4f}, {dh:8.4f}]")
        if metric in ceiling:
            print(f"{'ceiling (half of the cells)':<34} {ceiling[metric].mean():8.4f}")


def _profile(adata: AnnData, rows: pd.Series) -> np.ndarray:
    part = adata[rows.to_numpy()]
    size = part.obs["library_size"].to_numpy()[:, None]
    return np.log1p(part.X.toarray() / size * 1e4).mean(axis=0)


if __name__ == "__main__":
    main()
