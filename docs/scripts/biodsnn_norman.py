"""BioDSNN, its ablations and the other systems of its tables on the Norman subset, each perturbation predicted once.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_norman.py --seeds 0 1 2 3 4
    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_norman.py --seeds 0 1 --published
    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/biodsnn_norman.py --relatedness

Folds are over perturbations; what a fold's training cells do not hold is unseen. Predictions are kept in ``--out`` and
not made again, so that a run can be interrupted, or made seed by seed. All hyper-parameters are the defaults, or the
article's where a row says "published". A fit takes 4 to 6 seconds on one core, 5 seeds of all systems 25 minutes.
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
    "pearson_delta_no_target",
    "pearson_delta_centroid_no_target",
    "centroid_accuracy",
    "share_within_5pct",
]
SIMPLE = ["NoChange", "PerturbedMean", "MatchingMean", "Additive"]
N_FOLDS = 5


def systems(nets: dict, published: bool) -> dict:
    """Name -> (class, options, epochs)."""
    out = {name: (name, {}, None) for name in SIMPLE}
    go = {"perturbation_net": nets["go"]}
    if published:  # its learning rate is halved every epoch: after eight nothing moves
        both = {**go, "pathway_net": nets["all levels"], "published": True}
        return {
            **out,
            "GEARS, published": ("GEARS", {**go, "published": True}, 8),
            "BioDSNN, published": ("BioDSNN", both, 8),
            "BioDSNN, published, no VAE": ("BioDSNN", {**both, "use_vae": False}, 8),
            "BioDSNN, published, no attention": ("BioDSNN", {**both, "use_attention": False}, 8),
            "BioDSNN, published, no mask": ("BioDSNN", {**both, "use_mask": False}, 8),
        }
    both = {**go, "pathway_net": nets["lowest level"]}
    return {
        **out,
        "LinearGRN": ("LinearGRN", {}, None),
        "ConditionalVAE": ("ConditionalVAE", {}, 60),
        "CPA": ("CPA", {}, 60),
        "CPA, adversary": ("CPA", {"adversary_weight": 1.0, "kl_weight": 0.0}, 60),
        "GEARS": ("GEARS", go, 10),
        "BioDSNN": ("BioDSNN", both, 10),
        "BioDSNN, no VAE": ("BioDSNN", {**both, "use_vae": False}, 10),
        "BioDSNN, no attention": ("BioDSNN", {**both, "use_attention": False}, 10),
        "BioDSNN, no mask": ("BioDSNN", {**both, "use_mask": False}, 10),
    }


def stratum(label: str, train: set[str]) -> str:
    """Unseen single, or how many of a combination's targets were measured alone."""
    targets = label.split("+")
    return "single" if len(targets) == 1 else f"seen {sum(t in train for t in targets)} of {len(targets)}"


def predict(adata: AnnData, system: tuple, seed: int) -> dict[str, np.ndarray]:
    """Shifts of the test labels of ``obs["split"]``, labels sorted, and their limits; trust in the network."""
    import scpert

    name, options, epochs = system
    cls = getattr(scpert.model, name)
    cls.setup_anndata(adata, split_key="split", library_size_key="library_size")
    model = cls(adata, **options)
    extra = {} if epochs is None else {"max_epochs": epochs}
    model.train(accelerator="cpu", random_state=seed, **extra)
    labels = sorted(set(adata.obs["perturbation"][adata.obs["split"] == "test"]))
    out = model.predict_perturbation(labels, on_unknown="mean")
    base = out.X - out.layers["delta"]
    found = {side: out.layers[side] - base for side in ("lower", "upper") if side in out.layers}
    trust = getattr(model, "_trust", {})
    weights = np.array([trust.get("unseen", np.nan), trust.get("combination", np.nan)])
    return {"delta": out.layers["delta"], "trust": weights, **found}


def relatedness(adata: AnnData, nets: dict[str, pd.DataFrame], labels: list[str]) -> None:
    """Whether targets that a graph joins have like effects: all that a graph can tell of an unseen target."""
    control = _profile(adata, adata.obs["perturbation"] == "control")
    shift = np.stack([_profile(adata, adata.obs["perturbation"] == x) for x in labels]) - control
    shift -= shift.mean(axis=0)
    r = np.corrcoef(shift)
    targets = sorted({t for x in labels for t in x.split("+")})
    at = {t: i for i, t in enumerate(targets)}
    design = np.zeros((len(labels), len(targets)))
    for i, x in enumerate(labels):
        design[i, [at[t] for t in x.split("+")]] = 1
    apart = np.triu(design @ design.T == 0, 1)  # pairs of perturbations without a common target
    rng = np.random.default_rng(0)
    print(f"# correlation of the centred effects of {apart.sum()} pairs of perturbations without a common target")
    edges = {}
    for name, net in nets.items():
        link = np.zeros((len(targets), len(targets)))
        here = net[net["source"].isin(at) & net["target"].isin(at) & (net["source"] != net["target"])]
        link[here["source"].map(at), here["target"].map(at)] = 1
        link = np.maximum(link, link.T)
        edges[name] = {(targets[i], targets[j]) for i, j in np.argwhere(np.triu(link))}

        def difference(link: np.ndarray) -> tuple[float, float, int]:
            joined = (design @ link @ design.T > 0) & apart
            return r[joined].mean() - r[apart & ~joined].mean(), r[joined].mean(), int(joined.sum())

        found, mean, n = difference(link)
        orders = [rng.permutation(len(targets)) for _ in range(2000)]
        chance = np.array([difference(link[np.ix_(o, o)])[0] for o in orders])
        held, p = int((link.sum(0) > 0).sum()), (1 + (chance >= found).sum()) / (1 + len(chance))
        print(
            f"{name:<14} joins {held} of {len(targets)} targets in {len(edges[name])} pairs, {n} pairs of effects: {mean:.3f}, minus all other pairs "
            f"{found:+.3f} (targets exchanged: {chance.mean():+.3f} +- {chance.std():.3f}, p {p:.3f})"
        )
    print("# joined at the lowest level, but not by go:", sorted(edges["lowest level"] - edges["go"]))


def limits(values: np.ndarray, rng: np.random.Generator) -> str:
    """Mean and 95 % bootstrap limits over perturbations."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return f"{'-':>27}"
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
    return "{:8.4f} [{:7.4f}, {:7.4f}]".format(values.mean(), *np.quantile(means, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--published", action="store_true", help="the systems with the article's settings instead")
    parser.add_argument("--relatedness", action="store_true", help="only: do joined targets have like effects?")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("biodsnn_norman"))
    args = parser.parse_args()
    import scpert

    scpert.settings.progress = False
    data, priors = Path(os.environ["SCPERT_TEST_DATA"]), Path(os.environ["SCPERT_TEST_PRIORS"])
    adata = read_h5ad(data / "norman2019_k562_crispra_perturbench.h5ad")
    adata.obs["perturbation"] = ["+".join(sorted(x.split("+"))) for x in adata.obs["perturbation"].astype(str)]
    labels = sorted(set(adata.obs["perturbation"]) - {"control"})
    targets = sorted({t for x in labels for t in x.split("+")})
    reactome = scpert.resources.reactome(
        priors / "reactome_gene_sets_human_c2023-02.gmt.gz",
        priors / "reactome_pathway_names_human_c2023-02.tsv.gz",
        priors / "reactome_hierarchy_human_c2023-02.tsv.gz",
    )
    args.out.mkdir(exist_ok=True, parents=True)
    cache = args.out / "go.parquet"
    if not cache.exists():
        go = scpert.resources.gene_ontology(
            priors / "go_direct_allev_human_2015-07.tsv.gz", exclude_terms=["GO:0005515"]
        )
        scpert.pp.similarity_net(go).to_parquet(cache)
    nets = {"go": pd.read_parquet(cache)}
    if args.relatedness:
        for name, level in (("all levels", None), ("lowest level", 1)):
            nets[name] = scpert.pp.pathway_mask(targets, reactome, level=level)
        relatedness(adata, nets, labels)
        return
    found, strata, trust, inside = {}, {}, {}, []
    control = _profile(adata, adata.obs["perturbation"] == "control")
    for seed in args.seeds:
        order = np.random.default_rng(seed).permutation(len(labels))
        fold_of = {labels[i]: k % N_FOLDS for k, i in enumerate(order)}
        for fold in range(N_FOLDS):
            test = sorted(x for x in labels if fold_of[x] == fold)
            train = {x for x in labels if fold_of[x] != fold}
            strata.update({(seed, x): stratum(x, train) for x in test})
            adata.obs["split"] = np.where(adata.obs["perturbation"].isin(test), "test", "train")
            coexpression = scpert.pp.coexpression_net(adata, library_size_key="library_size")
            genes = [*adata.var_names, *targets]
            for name, level in (("all levels", None), ("lowest level", 1)):
                nets[name] = scpert.pp.pathway_mask(genes, reactome, fallback_net=coexpression, level=level)
            for name, system in systems(nets, args.published).items():
                if args.only and name not in args.only:
                    continue
                file = args.out / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}_{fold}.npz"
                if not file.exists():
                    np.savez(file, **predict(adata, system, seed))
                saved = np.load(file)
                trust.setdefault(name, []).append(saved["trust"])
                found.update({(name, seed, x): row for x, row in zip(test, saved["delta"], strict=True)})
                if "lower" in saved:
                    observed = np.stack([_profile(adata, adata.obs["perturbation"] == x) for x in test]) - control
                    within = np.where(
                        np.isfinite(saved["lower"]), (observed >= saved["lower"]) & (observed <= saved["upper"]), np.nan
                    )
                    inside += [(name, strata[seed, x], row.mean()) for x, row in zip(test, within, strict=True)]
    complete = len(labels) * len(args.seeds)
    names = [n for n in systems(nets, args.published) if sum(k[0] == n for k in found) == complete]
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
    result.to_csv(args.out / f"table{'_published' if args.published else ''}.csv", index=False)
    reliable = set(ceiling.index[ceiling["pearson_delta_no_target"] >= 0.8])
    n = result["stratum"].value_counts() / len(names) / len(args.seeds)
    print(f"# {len(labels)} perturbations, {N_FOLDS} folds, seeds {args.seeds}; [95 % limits] over perturbations")
    print(f"# a seed's average number of perturbations by stratum: {n.round(1).to_dict()}")
    print(f"# reliable: the shifts of two halves of the cells correlate by 0.8 or more: {len(reliable)} perturbations")
    for name in names:
        weights = np.nanmean(trust[name], axis=0) if np.isfinite(trust[name]).any() else None
        if weights is not None:
            print(f"# {name}: mean trust in the network, unseen {weights[0]:.2f}, combinations {weights[1]:.2f}")
    if inside:
        print("# share of the observed values inside the 90 % limits")
        share = pd.DataFrame(inside, columns=["model", "stratum", "share"])
        print(share.pivot_table(index="model", columns="stratum", values="share", margins=True).round(3).to_string())
    ours = "BioDSNN, published" if args.published else "BioDSNN"
    rng = np.random.default_rng(0)
    for metric in METRICS:
        value = result.pivot_table(index=["seed", "perturbation"], columns="model", values=metric, dropna=False)
        value = value.reindex(columns=names)
        for which in ("all", "reliable", *sorted(result["stratum"].unique())):
            use = [
                which == "all" or (p in reliable if which == "reliable" else strata[s, p] == which)
                for s, p in value.index
            ]
            part = value[use]
            print(f"\n## {metric}, {which} ({part.index.get_level_values(1).nunique()} distinct perturbations)")
            print(f"{'':<34} {'mean':<27}  {'minus the perturbed mean':<27}  {ours} minus it")
            for name in names:
                columns = [part[name], part[name] - part["PerturbedMean"]]
                columns += [part[ours] - part[name]] if ours in part else []
                print(f"{name:<34}", *(limits(c.groupby("perturbation").mean().to_numpy(), rng) for c in columns))
            if metric in ceiling and which in ("all", "reliable"):
                kept = ceiling.loc[[x for x in ceiling.index if which == "all" or x in reliable], metric]
                print(f"{'ceiling (half of the cells)':<34} {kept.mean():8.4f}")


def _profile(adata: AnnData, rows: pd.Series) -> np.ndarray:
    part = adata[rows.to_numpy()]
    size = part.obs["library_size"].to_numpy()[:, None]
    return np.log1p(part.X.toarray() / size * 1e4).mean(axis=0)


if __name__ == "__main__":
    main()
