"""Simulated screens: graphs that the truth follows must help, graphs that it does not follow must not hurt.

    python docs/scripts/biodsnn_simulated.py --seeds 0 1 2 3 4 [--published]

Regulators come in modules that share what they regulate (``scpert.datasets.simulated``). The true graphs are these
modules (the graph of targets) and the genes that each regulates (pathways); for the false ones the names are shuffled.
A third of the targets is never seen alone or in a combination, and half of the other combinations is left out. All
systems see the same cells; the error is the mean squared error of the predicted shift, targets left out, over that of
the perturbed mean.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd

warnings.filterwarnings("ignore")


def screen(seed: int):
    """Cells with ``obs["split"]``, the true annotations of targets and the true pathways of genes."""
    import scpert

    adata = scpert.datasets.simulated(
        n_genes=200, n_targets=40, n_combinations=24, n_regulators=40, n_modules=8, mode="activation",
        cells_per_perturbation=50, random_state=seed,
    )  # fmt: skip
    labels = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    singles = [x for x in labels if "+" not in x]
    rng = np.random.default_rng(seed)
    unseen = set(rng.choice(singles, len(singles) // 3, replace=False))
    test = {x for x in labels if unseen & set(x.split("+"))}
    test |= set(rng.choice([x for x in labels if "+" in x and x not in test], 5, replace=False))
    adata.obs["split"] = np.where(adata.obs["perturbation"].isin(test), "test", "train")
    terms = adata.uns["truth"]["annotations"][["gene", "term"]].astype(str)
    net = adata.uns["truth"]["net"].merge(terms, left_on="source", right_on="gene")
    pathways = net[["target", "term"]].drop_duplicates()
    return adata, terms, pathways


def pairs(table: pd.DataFrame, gene: str) -> pd.DataFrame:
    """Net of all pairs that share a term."""
    both = table.merge(table, on="term")
    both = both[both[f"{gene}_x"] != both[f"{gene}_y"]]
    net = both[[f"{gene}_x", f"{gene}_y"]].drop_duplicates().set_axis(["source", "target"], axis=1)
    return net.assign(weight=1.0)


def shuffled(net: pd.DataFrame, names: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """The same graph over exchanged names."""
    other = dict(zip(names, rng.permutation(names), strict=True))
    return net.assign(source=net["source"].map(other), target=net["target"].map(other))


def kind(label: str, train: set[str]) -> str:
    """What a test perturbation asks for."""
    targets = label.split("+")
    if len(targets) == 1:
        return "unseen single"
    return f"pair, {sum(t in train for t in targets)} seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--published", action="store_true", help="also with the article's settings")
    args = parser.parse_args()
    import scpert

    scpert.settings.progress = False
    rows = []
    for seed in args.seeds:
        adata, terms, pathways = screen(seed)
        rng = np.random.default_rng(seed)
        targets = sorted({t for x in adata.obs["perturbation"].astype(str) if x != "control" for t in x.split("+")})
        known = {"true": (pairs(terms, "gene"), pairs(pathways, "target"))}
        known["false"] = (
            shuffled(known["true"][0], sorted({*targets, *terms["gene"]}), rng),
            shuffled(known["true"][1], sorted(adata.var_names), rng),
        )
        effects = scpert.tl.perturbation_effects(adata)
        observed = pd.DataFrame(np.asarray(effects.X), index=effects.obs["perturbation"], columns=effects.var_names)
        train = set(adata.obs.loc[adata.obs["split"] == "train", "perturbation"].astype(str))
        test = sorted(set(adata.obs.loc[adata.obs["split"] == "test", "perturbation"].astype(str)))
        runs: dict[str, tuple] = {name: (name, {}, None) for name in ("PerturbedMean", "Additive")}
        for truth, (graph, mask) in known.items():
            go = {"perturbation_net": graph}
            both = {**go, "pathway_net": mask}
            runs |= {f"GEARS, {truth} graphs": ("GEARS", go, 10), f"BioDSNN, {truth} graphs": ("BioDSNN", both, 10)}
            if args.published:
                for cls, options in (("GEARS", go), ("BioDSNN", both)):
                    runs[f"{cls}, published, {truth} graphs"] = (cls, {**options, "published": True}, 8)
        for name, (cls, options, epochs) in runs.items():
            model_class = getattr(scpert.model, cls)
            model_class.setup_anndata(adata, split_key="split")
            model = model_class(adata, **options)
            extra = {} if epochs is None else {"max_epochs": epochs, "accelerator": "cpu"}
            model.train(random_state=seed, **extra)
            out = model.predict_perturbation(test, on_unknown="mean")
            delta = np.asarray(out.layers["delta"])
            trust = getattr(model, "_trust", {})
            inside = np.full(delta.shape, np.nan)
            if "lower" in out.layers:
                truth = out.X - delta + observed.loc[test].to_numpy()
                inside = ((truth >= out.layers["lower"]) & (truth <= out.layers["upper"])).astype(float)
                inside[np.isnan(out.layers["lower"])] = np.nan  # substitutes have no limits
            for label, row, within in zip(test, delta, inside, strict=True):
                use = ~adata.var_names.isin(label.split("+"))
                error = ((row - observed.loc[label].to_numpy()) ** 2)[use].mean()
                shares = (
                    trust.get("unseen"),
                    trust.get("combination"),
                    np.nan if np.isnan(within[use]).all() else np.nanmean(within[use]),
                )
                rows.append((name, seed, kind(label, train), error, *shares))
    columns = ["model", "seed", "kind", "error", "trust unseen", "trust combination", "inside"]
    table = pd.DataFrame(rows, columns=columns)
    summed = table.pivot_table(index="model", columns=["kind", "seed"], values="error", sort=False)
    ratio = summed / summed.loc["PerturbedMean"]
    mean = ratio.T.groupby(level="kind").mean().T
    spread = ratio.T.groupby(level="kind").std().T
    shown = mean.round(2).astype(str) + " ± " + spread.round(2).astype(str)
    for column in ("trust unseen", "trust combination"):
        shown[column] = table.groupby("model")[column].mean().round(2)
    print(f"# squared error over that of the perturbed mean; mean ± sd of {len(args.seeds)} seeds")
    print(shown.to_string())
    print("# share of the observed values inside the 90 % limits")
    print(table.pivot_table(index="model", columns="kind", values="inside", margins=True).round(3).to_string())


if __name__ == "__main__":
    main()
