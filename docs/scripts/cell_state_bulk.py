"""Figures of docs/models/cell_state.md on the real tumours.

    SCPERT_TEST_DATA=... SCPERT_TEST_PRIORS=... python docs/scripts/cell_state_bulk.py folds|regulators|choice|patients|transfer|network|counts

Prints markdown tables. EPOCHS=1 bounds the gradient phase, FOLDS=01 names the folds, FOLD_SEED their split, N_BOOT the
bootstraps. Fit settings were chosen on two folds of FOLD_SEED=0; all four cohorts had been looked at when the virtual
evidence of a master regulator was defined.
"""

import os
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

import scpert
from scpert.model import CellState
from scpert.model._cell_state_fit import group_folds

EPOCHS = int(os.environ["EPOCHS"]) if "EPOCHS" in os.environ else None  # None: early stopping decides
FOLD_SEED = int(os.environ.get("FOLD_SEED", "0"))
N_BOOT = int(os.environ.get("N_BOOT", "30"))
FACTORS = {
    "UVM": ["MITF", "SOX10"],
    "ACC": ["NR5A1"],
    "DLBC": ["PAX5", "BCL6", "SPIB", "POU2F2"],
    "CHOL": ["HNF1B", "HNF4A", "FOXA2"],
}


def tumours() -> ad.AnnData:
    a = ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / "bulk_tcga_5cohorts_rsem.h5ad")
    a.var_names = a.var["symbol"].astype(str)
    a = a[:, (a.var_names != "?") & ~a.var_names.duplicated()].copy()
    a = a[:, :: int(os.environ.get("STEP", "1"))].copy()  # every so manyth gene: quicker
    a.obs["patient"] = [str(s)[:12] for s in a.obs_names]
    return a


def collectri() -> pd.DataFrame:
    path = Path(os.environ["SCPERT_TEST_PRIORS"]) / "collectri_human_2023.tsv.gz"
    return pd.read_csv(path, sep="\t", keep_default_na=False).astype({"weight": float})


def folds(a: ad.AnnData) -> None:
    fold = group_folds(a.obs["patient"].to_numpy(dtype=str), 5, np.random.default_rng(FOLD_SEED))
    tables = []
    wanted = [int(f) for f in os.environ.get("FOLDS", "01234")]
    for f in wanted:
        b = a.copy()
        b.obs["split"] = np.where(fold == f, "test", "train")
        CellState.setup_anndata(b, group_key="patient", split_key="split")
        model = CellState(b, n_latent=64)
        t = time.time()
        model.train(max_epochs=EPOCHS)
        print(f"fold {f}: {time.time() - t:.0f} s, best epoch {model.best_epoch_}", flush=True)
        tables.append(model.evaluate())
        print(tables[-1].round(4).T.to_markdown(), flush=True)
        if f == 0:
            print(pd.DataFrame(tables[0].attrs["by_expression"]).round(3).to_markdown(index=False), flush=True)
    stack = pd.concat(tables, keys=wanted, names=["fold"])
    mean, sd = stack.groupby("method").mean(), stack.groupby("method").std()
    print(mean.loc[tables[0].index].round(4).T.to_markdown(), flush=True)
    print("standard deviation over folds")
    print(sd.loc[tables[0].index].round(4).T.to_markdown(), flush=True)
    gap = stack["r2_imputed"].xs("model", level="method") - stack["r2_imputed"].unstack("method").T
    print("model minus method, imputation R2, by fold")
    print(gap.T.round(4).to_markdown(), flush=True)


def fitted(a: ad.AnnData) -> CellState:
    CellState.setup_anndata(a, group_key="patient")
    model = CellState(a, n_latent=64)
    model.train(max_epochs=EPOCHS)
    return model


def regulators(a: ad.AnnData) -> None:
    model, net, rows = fitted(a), collectri(), []
    for cohort, factors in FACTORS.items():
        a.obs["state"] = np.where(
            a.obs["cohort"] != cohort, "rest", np.where(a.obs["sample_type_code"].astype(str) == "01", cohort, "normal")
        )
        table = model.master_regulators(
            a, groupby="state", start="rest", goal=cohort, net=net, n_boot=N_BOOT
        ).set_index("regulator")
        names = table.index
        x = np.log1p(a[:, names].X.toarray() if hasattr(a.X, "toarray") else np.asarray(a[:, names].X))
        goal, rest = x[a.obs["state"] == cohort], x[a.obs["state"] == "rest"]
        t = (goal.mean(0) - rest.mean(0)) / np.sqrt(goal.var(0) / len(goal) + rest.var(0) / len(rest) + 1e-3)
        de = pd.Series(-t, names).rank().astype(int)
        for factor in factors:
            r = table.loc[factor]
            rows.append(
                {
                    "cohort": cohort,
                    "factor": factor,
                    "combined": int(r["rank"]),
                    "90 % limits": f"{r['rank_lower']:.0f}-{r['rank_upper']:.0f}",
                    "stability": r["stability"],
                    "regulon": int(r["rank_regulon"]),
                    "virtual": int(r["rank_virtual"]),
                    "expression alone": de[factor],
                    "random": (len(names) + 1) // 2,
                    "of": len(names),
                }
            )
        print(
            cohort,
            "best ten:",
            ", ".join(table.index[:10]),
            "| spearman of virtual with expression t, |t|:",
            round(table["virtual"].corr(pd.Series(t, names), method="spearman"), 2),
            round(table["virtual"].corr(pd.Series(t, names).abs(), method="spearman"), 2),
            flush=True,
        )
    print(pd.DataFrame(rows).to_markdown(index=False), flush=True)


def choice(a: ad.AnnData) -> None:
    """Every way of asking for virtual evidence, chosen on one cohort and read on the other three."""
    model, net = fitted(a), collectri()
    asked = {
        "set to the goal's mean": {"mode": "set"},
        "overexpressed": {"mode": "overexpress"},
        "knocked out in the cohort": {"mode": "knockout"},
    }
    rank: dict[tuple[str, str], pd.DataFrame] = {}
    for cohort in FACTORS:
        tumour = (a.obs["cohort"] == cohort) & (a.obs["sample_type_code"].astype(str) == "01")
        a.obs["state"] = np.where(a.obs["cohort"] != cohort, "rest", np.where(tumour, cohort, "normal"))
        table = model.master_regulators(a, groupby="state", start="rest", goal=cohort, net=net, n_boot=2)
        regulon = table.set_index("regulator")["rank_regulon"]
        for name, options in asked.items():
            start, goal = (cohort, "rest") if options["mode"] == "knockout" else ("rest", cohort)
            found = model.screen(
                a, groupby="state", start=start, goal=goal, genes=list(regulon.index), n_null=100, **options
            ).set_index("gene")
            for score in ("shift", "cosine", "distance", "logit"):
                virtual = found[score].reindex(regulon.index).rank(ascending=False)
                combined = np.sqrt(virtual * regulon).rank()
                rank[cohort, f"{name}, {score}"] = pd.DataFrame({"virtual": virtual, "combined": combined})
    ways = sorted({way for _, way in rank})

    def best(cohort: str, way: str, column: str) -> int:
        return int(rank[cohort, way].loc[FACTORS[cohort], column].min())

    def loss(cohort: str, way: str) -> float:
        return float(np.log(rank[cohort, way].loc[FACTORS[cohort], "virtual"]).mean())

    rows = [
        {"way": way, **{c: f"{best(c, way, 'virtual')} / {best(c, way, 'combined')}" for c in FACTORS}} for way in ways
    ]
    print(pd.DataFrame(rows).to_markdown(index=False), flush=True)
    for chosen_on in FACTORS:
        way = min(ways, key=lambda w: loss(chosen_on, w))
        others = ", ".join(
            f"{c} {best(c, way, 'virtual')} / {best(c, way, 'combined')}" for c in FACTORS if c != chosen_on
        )
        print(f"chosen on {chosen_on}: {way}; best virtual / combined rank on the others: {others}", flush=True)


def patients(a: ad.AnnData) -> None:
    model, net = fitted(a), collectri()
    chol = a[a.obs["cohort"] == "CHOL"].copy()
    chol.obs["state"] = np.where(chol.obs["sample_type_code"].astype(str) == "11", "normal", "tumour")
    for start, goal in (("normal", "tumour"), ("tumour", "normal")):
        group = model.master_regulators(chol, groupby="state", start=start, goal=goal, net=net, n_boot=N_BOOT)
        print(f"{start} to {goal}")
        print(group.head(10).round(3).to_markdown(index=False), flush=True)
    each = model.master_regulators(
        chol, groupby="state", start="normal", goal="tumour", net=net, per_sample=True, n_boot=5
    )
    wide = each.pivot(index="sample", columns="regulator", values="rank")
    top = (wide <= 25).mean().sort_values(ascending=False)
    print("share of the patients with the regulator among their first 25")
    print(top.head(10).round(2).to_markdown(), flush=True)
    print(
        "spearman between two patients, mean:",
        round(float(np.mean(wide.T.corr("spearman").to_numpy()[np.triu_indices(len(wide), 1)])), 3),
    )
    print(
        "stability of a patient's first ten under dropout masks:",
        round(float(each[each["rank"] <= 10]["stability"].mean()), 3),
        flush=True,
    )


def transfer(a: ad.AnnData) -> None:
    """Learning curve: train on n patients of a cohort that the source has not seen, impute the others."""
    from sklearn.decomposition import PCA

    rows = []
    for held in os.environ.get("HELD", "UCS DLBC CHOL ACC UVM").split():
        source = a[a.obs["cohort"] != held].copy()
        CellState.setup_anndata(source, group_key="patient")
        model = CellState(source, n_latent=16)
        model.train(max_epochs=1)
        target = a[a.obs["cohort"] == held].copy()
        x = np.log1p(target.X.toarray() if hasattr(target.X, "toarray") else np.asarray(target.X))
        patients = target.obs["patient"].to_numpy(dtype=str)
        for n in (5, 10, 20, 30):
            for repeat in range(int(os.environ.get("REPEATS", "3"))):
                rng = np.random.default_rng(repeat)
                order = np.concatenate([np.flatnonzero(patients == p) for p in rng.permutation(np.unique(patients))])
                train, test = np.sort(order[:n]), np.sort(order[n:])
                test = test[~np.isin(patients[test], patients[train])]
                hidden = rng.random((len(test), target.n_vars)) < 0.25
                few, rest = target[train].copy(), target[test].copy()
                centre = x[train].mean(0)
                base = ((x[test] - centre)[hidden] ** 2).sum()
                k = min(16, n - 1)
                scratch_data = few.copy()
                CellState.setup_anndata(scratch_data)
                scratch = CellState(scratch_data, n_latent=k)
                scratch.train(max_epochs=1, train_size=1.0, early_stopping=False, lr=1e-7)
                tuned = model.fine_tune(few, task="reconstruction", group_key="patient", compare=False)
                guesses = {
                    "fine-tuned": tuned.reconstruct(rest, hidden=hidden),
                    "from scratch": scratch.reconstruct(rest, hidden=hidden),
                    "source as it is": model.reconstruct(rest, hidden=hidden),
                }
                for name, q in (("PCA, same bottleneck", k), ("PCA, n - 1 axes", n - 1)):
                    scale = scratch._scale
                    pca = PCA(q, svd_solver="full").fit((x[train] - centre) / scale)
                    V, guess = pca.components_.T, np.empty_like(x[test])
                    for i, y in enumerate((x[test] - centre) / scale):
                        o = ~hidden[i]
                        guess[i] = V @ np.linalg.lstsq(V[o], y[o], rcond=None)[0] * scale + centre
                    guesses[name] = guess
                for name, guess in guesses.items():
                    r2 = 1 - ((guess - x[test])[hidden] ** 2).sum() / base
                    rows.append({"cohort": held, "n": n, "method": name, "r2": r2})
                rows.append(
                    {
                        "cohort": held,
                        "n": n,
                        "method": "share of the source",
                        "r2": tuned.extra_["closed_form"]["share"],
                    }
                )
        table = pd.DataFrame(rows)
        print("R2 of masked genes of the other patients, mean over the draws")
        print(
            table[table["cohort"] == held]
            .pivot_table(index="method", columns="n", values="r2", sort=False)
            .round(3)
            .to_markdown(),
            flush=True,
        )
        if held in ("DLBC", "CHOL"):
            print("3-fold report of fine_tune on the whole cohort")
            print(
                model.fine_tune(target, task="reconstruction", group_key="patient").report_.round(4).to_markdown(),
                flush=True,
            )
        if held == "CHOL":
            target.obs["state"] = np.where(target.obs["sample_type_code"].astype(str) == "11", "normal", "tumour")
            print("classification of CHOL tumour against normal")
            print(
                model.fine_tune(target, task="classification", groupby="state", group_key="patient")
                .report_.round(4)
                .to_markdown(),
                flush=True,
            )


def counts(a: ad.AnnData) -> None:
    """Negative binomial head on rounded RSEM, five folds of held-out patients."""
    a.X = np.rint(a.X.toarray() if hasattr(a.X, "toarray") else a.X)
    fold = group_folds(a.obs["patient"].to_numpy(dtype=str), 5, np.random.default_rng(FOLD_SEED))
    rows = []
    for f in range(5):
        a.obs["split"] = np.where(fold == f, "test", "train")
        for head in ("gaussian", "nb"):
            CellState.setup_anndata(a, scale="counts", group_key="patient", split_key="split")
            model = CellState(a, hidden=(128,), n_latent=16, head=head)
            model.train(max_epochs=EPOCHS or 5)
            table = model.evaluate()[["r2_imputed", "r2_imputed_lower", "r2_imputed_upper", "imputed_ahead_lower"]]
            rows.append(table.loc[["model", "pca", "neighbours"]].assign(head=head, fold=f, epoch=model.best_epoch_))
    table = pd.concat(rows).reset_index()
    print(f"R2 of masked genes, means over five folds, {a.n_vars} genes")
    print(table.groupby(["head", "method"], sort=False).mean().round(3).to_markdown(), flush=True)


def known_pairs() -> dict[str, set[tuple[str, str]]]:
    priors = Path(os.environ["SCPERT_TEST_PRIORS"])
    string = pd.read_csv(priors / "string_v12.0_human_score800.tsv.gz", sep="\t", keep_default_na=False)
    corum = pd.read_csv(priors / "corum_core_4.1_human.tsv.gz", sep="\t", keep_default_na=False)
    members = [[g for g in row.split(";") if g] for row in corum["subunits_gene_name"]]
    return {
        "STRING": set(zip(string["gene_a"], string["gene_b"], strict=True)),
        "CORUM": {(g, h) for m in members for g in m for h in m if g != h},
        "CollecTRI": set(zip(collectri()["source"], collectri()["target"], strict=True)),
    }


class Ranked:
    """Pairs of genes sorted by a score: average precision of a truth, with a weight for each gene."""

    def __init__(self, score: np.ndarray):
        self.first, self.second = np.triu_indices(len(score), 1)
        order = np.argsort(-score[self.first, self.second], kind="stable")
        self.first, self.second = self.first[order], self.second[order]

    def average_precision(self, truth: np.ndarray, times: np.ndarray | None = None) -> float:
        known = truth[self.first, self.second]
        weight = np.ones(len(known)) if times is None else (times[self.first] * times[self.second]).astype(float)
        hit = np.cumsum(weight * known)
        return float((weight[known] * hit[known] / np.cumsum(weight)[known].clip(1)).sum() / hit[-1])

    def precision(self, truth: np.ndarray, n: int) -> float:
        return float(truth[self.first[:n], self.second[:n]].mean())


def scaled(matrix: np.ndarray) -> np.ndarray:
    """Absolute values, each divided by the root of the two diagonal elements."""
    root = np.sqrt(np.diag(matrix))
    return np.abs(matrix) / np.outer(root, root)


def network(a: ad.AnnData) -> None:
    """The 8,000 genes that vary most: are known pairs ahead of the others? HALF=1: the genes that settings were chosen on."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    X = a.X.toarray() if hasattr(a.X, "toarray") else np.asarray(a.X)
    order = np.argsort(-np.log1p(X).std(axis=0), kind="stable")[:8000]
    a = a[:, order].copy()
    x = np.log1p(X[:, order])
    residual = x - pd.DataFrame(x).groupby(a.obs["cohort"].to_numpy()).transform("mean").to_numpy()
    y = (x - x.mean(axis=0)) / x.std(axis=0)
    shrinkage = ledoit_wolf_shrinkage(y)  # inverse of (1 - shrinkage) y'y / n + shrinkage, by Woodbury's identity
    inner = np.linalg.inv(np.eye(len(y)) * len(y) * shrinkage / (1 - shrinkage) + y @ y.T)
    precision = np.eye(y.shape[1], dtype=np.float32) - y.T @ inner @ y
    axes = np.linalg.svd(y, full_matrices=False)[2][:64].T
    model = fitted(a)
    half = set(a.var_names[int(os.environ.get("HALF", "0")) :: 2])
    n_boot = int(os.environ.get("N_BOOT", "200"))
    rows = []
    for resource, pairs in known_pairs().items():
        linked = {g for pair in pairs for g in pair}
        columns = [i for i, g in enumerate(a.var_names) if g in linked and g in half][:1500]
        genes = [a.var_names[i] for i in columns]
        at = {g: i for i, g in enumerate(genes)}
        truth = np.zeros((len(genes), len(genes)), dtype=bool)
        for g, h in pairs:
            if g in at and h in at and g != h:
                truth[at[g], at[h]] = truth[at[h], at[g]] = True
        scores = {
            "correlation": np.abs(np.corrcoef(x[:, columns].T)),
            "correlation within cohorts": np.abs(np.corrcoef(residual[:, columns].T)),
            "partial correlation": scaled(precision[np.ix_(columns, columns)]),
            "PCA, 64 axes, standardised": scaled(axes[columns] @ axes[columns].T),
        }
        for name, standardise in (("mean Jacobian", False), ("mean Jacobian, standardised", True)):
            net = model.gene_network(a, genes=genes, top_k=0, symmetric=True, standardise=standardise)
            scores[name] = np.zeros(truth.shape)
            place = [at[g] for g in net["source"]], [at[g] for g in net["target"]]
            scores[name][place] = net["weight"].abs()
        rng = np.random.default_rng(0)
        times = [np.bincount(rng.integers(0, len(genes), len(genes)), minlength=len(genes)) for _ in range(n_boot)]
        shuffles = [rng.permutation(len(genes)) for _ in range(20)]  # keeps the degrees of the known net
        ranking = {name: Ranked(score) for name, score in scores.items()}
        boots = {n: np.array([r.average_precision(truth, t) for t in times]) for n, r in ranking.items()}
        for name, ranked in ranking.items():
            ahead = np.quantile(boots[name] - boots["correlation within cohorts"], [0.025, 0.975])
            limits = np.quantile(boots[name], [0.025, 0.975])
            chance = np.mean([ranked.average_precision(truth[np.ix_(p, p)]) for p in shuffles])
            rows.append(
                {
                    "resource": resource,
                    "genes": len(genes),
                    "pairs": int(np.triu(truth).sum()),
                    "method": name,
                    "AUPRC": f"{ranked.average_precision(truth):.4f} ({limits[0]:.4f} to {limits[1]:.4f})",
                    "ahead of correlation within cohorts": f"{ahead[0]:.4f} to {ahead[1]:.4f}",
                    "precision in the first 500": f"{ranked.precision(truth, 500):.3f}",
                    "AUPRC, genes shuffled": f"{chance:.4f}",
                }
            )
    print("known pairs; 95 % bootstrap limits over genes")
    print(pd.DataFrame(rows).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    scpert.settings.progress = False
    for part in sys.argv[1:]:
        {
            "folds": folds,
            "regulators": regulators,
            "choice": choice,
            "patients": patients,
            "transfer": transfer,
            "network": network,
            "counts": counts,
        }[part](tumours())
