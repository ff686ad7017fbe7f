"""Figures of docs/models/cell_state.md on simulated states and the real screens.

    SCPERT_TEST_DATA=... python docs/scripts/cell_state_simulated.py planted null cooperation screens

``screens`` fits on control cells alone and compares predicted with measured shifts.
"""

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score

import scpert
from scpert.model import CellState

SEEDS = range(int(os.environ.get("SEEDS", "5")))
FIRST_SEED = int(
    os.environ.get("FIRST_SEED", "200")
)  # of the cooperation; seeds below 200 were looked at when it was designed


def states(
    seed: int, planted: int = 4, n: int = 160, n_tf: int = 30, per_tf: int = 8, extra: int = 60
) -> tuple[ad.AnnData, list[str]]:
    rng = np.random.default_rng(seed)
    goal = np.arange(n) % 2 == 1
    tf = rng.normal(size=(n, n_tf))
    tf[:, :planted] += 1.0 * goal[:, None]
    sign = rng.choice([1.0, -1.0], size=(n_tf, per_tf))
    targets = (tf[:, :, None] * sign[None] * 0.7 + 0.5 * rng.normal(size=(n, n_tf, per_tf))).reshape(n, -1)
    log = 5 + np.hstack([tf * 0.6, targets, rng.normal(size=(n, extra))])
    names = [f"TF{i}" for i in range(n_tf)] + [f"T{i}_{j}" for i in range(n_tf) for j in range(per_tf)]
    adata = ad.AnnData(
        np.maximum(log, 0).astype(np.float32), var=pd.DataFrame(index=[*names, *[f"N{i}" for i in range(extra)]])
    )
    adata.obs["state"] = np.where(goal, "goal", "start")
    return adata, [f"TF{i}" for i in range(planted)]


def fit(adata: ad.AnnData, n_latent: int, scale: str = "log1p") -> CellState:
    CellState.setup_anndata(adata, scale=scale)
    model = CellState(adata, hidden=(128,), n_latent=n_latent)
    model.train(max_epochs=3)
    return model


def planted() -> None:
    rows = []
    for seed in SEEDS:
        adata, truth = states(seed)
        model = fit(adata, 20)
        factors = [g for g in adata.var_names if g.startswith("TF")]
        table = model.screen(adata, groupby="state", start="start", goal="goal", genes=factors, mode="set", n_null=200)
        goal = (adata.obs["state"] == "goal").to_numpy()
        x = adata[:, factors].X
        t = np.abs(x[goal].mean(0) - x[~goal].mean(0)) / np.sqrt(x[goal].var(0) + x[~goal].var(0))
        rows.append(
            {
                "virtual": average_precision_score(table["gene"].isin(truth), table["zscore"]),
                "expression alone": average_precision_score([f in truth for f in factors], t),
                "random": len(truth) / len(factors),
            }
        )
    print("planted single regulators, AUPRC")
    print(pd.DataFrame(rows).agg(["mean", "std"]).round(3).to_markdown(), flush=True)


def null() -> None:
    rows = []
    for seed in SEEDS:
        adata, _ = states(100 + seed, planted=0)
        model = fit(adata, 20)
        for mode in ("set", "knockout"):
            table = model.screen(adata, groupby="state", start="start", goal="goal", mode=mode, n_null=300)
            rows.append(
                {
                    "mode": mode,
                    "discoveries": int((table["pvals_adj"] < 0.1).sum()),
                    "any": (table["pvals_adj"] < 0.1).any(),
                    "p < 0.05": (table["pvals"] < 0.05).mean(),
                }
            )
    print("no planted state: discoveries at FDR 0.1 among 330 genes")
    print(pd.DataFrame(rows).groupby("mode").mean().round(3).to_markdown(), flush=True)


def pairs(kind: str, seed: int, n: int = 300, n_regulators: int = 8) -> ad.AnnData:
    """Regulators, a module that follows two of them in some way, and genes that follow none."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, n_regulators))
    if "together" in kind:  # three regulators go together over the samples
        latent[:, :3] = 0.77 * latent[:, :3] + 0.63 * rng.normal(size=(n, 1))
    if "levels" in kind:  # graded levels
        level = latent + 0.3 * rng.normal(size=latent.shape)
        a, b = latent[:, 0], latent[:, 1]
        module = (
            0.7 * np.clip(a, 0, 2) * np.clip(b, 0, 2)
            if "needs both" in kind
            else 0.5 * (np.tanh(2 * a) + 0.5 * b * np.abs(b))
        )
        low, high = np.quantile(module, [0.3, 0.7])
    else:  # on or off
        on = latent > 0
        level = 2.0 * on + 0.3 * rng.normal(size=on.shape)
        a, b = on[:, 0] * 1.0, on[:, 1] * 1.0
        module = {"needs both": a * b, "sum": (a + b) / 2, "A alone": a, "neither": rng.normal(size=n)}[
            kind.split(",")[0]
        ]
        low, high = (0.1, 0.9) if kind.split(",")[0] != "neither" else np.quantile(module, [0.3, 0.7])
    X = 5 + np.hstack([level, 2.0 * module[:, None] + 0.4 * rng.normal(size=(n, 30)), rng.normal(size=(n, 40))])
    names = [*"ABCDEFGHIJKLMNOPQRST"[:n_regulators], *[f"M{i}" for i in range(30)], *[f"N{i}" for i in range(40)]]
    adata = ad.AnnData(np.maximum(X, 0).astype(np.float32), var=pd.DataFrame(index=names))
    start = (a + b == 0) if kind.startswith(("needs both", "sum")) and "levels" not in kind else module < low
    adata.obs["state"] = np.select([module > high, start], ["goal", "start"], "between")
    return adata


COOPERATION = [
    ("needs both", 300),
    ("needs both", 100),
    ("needs both, together", 300),
    ("needs both, levels", 300),
    ("sum", 300),
    ("sum", 100),
    ("sum, together", 300),
    ("sum, levels", 300),
    ("sum, levels, together", 300),
    ("A alone", 300),
    ("neither", 300),
]


def cooperation() -> None:
    rows = []
    for kind, n in COOPERATION:
        planted = kind.startswith("needs both")
        for seed in SEEDS:
            adata = pairs(kind, FIRST_SEED + seed, n)
            table = fit(adata, 8).cooperative_regulators(
                adata, groupby="state", start="start", goal="goal", regulators=list("ABCDEFGH")
            )
            known = (table["regulators"] == "A+B") & planted
            called = table["pvals_adj"] < 0.1
            rows.append(
                {
                    "module": kind,
                    "samples": n,
                    "rank of A+B": int(np.flatnonzero(table["regulators"] == "A+B")[0]) + 1,
                    "AUPRC of A+B": average_precision_score(known, table["zscore"]) if planted else np.nan,
                    "A+B called": bool((called & (table["regulators"] == "A+B")).any()),
                    "false pairs": int((called & ~known).sum()),
                    "false share of the called": (called & ~known).sum() / max(called.sum(), 1),
                    "p < 0.05 of the others": (table["pvals"][~known] < 0.05).mean(),
                }
            )
        print(pd.DataFrame(rows[-len(SEEDS) :]).mean(numeric_only=True).round(3).to_dict(), kind, n, flush=True)
    print(f"cooperation: 28 pairs (random AUPRC 0.036), FDR 0.1, means over {len(SEEDS)} seeds")
    print(
        pd.DataFrame(rows)
        .groupby(["module", "samples"], sort=False)
        .mean()
        .round(3)
        .reset_index()
        .to_markdown(index=False),
        flush=True,
    )


def compare(adata: ad.AnnData, up: bool, scale: str = "counts") -> pd.DataFrame:
    """Predicted against measured shift of the perturbed and measured genes; fitted on controls alone."""
    labels = adata.obs["perturbation"].astype(str)
    control = adata[labels == "control"].copy()
    model = fit(control, min(32, control.n_vars // 3), scale)
    log = model._reader(control).rows(np.arange(control.n_obs))
    varies = np.flatnonzero(log.std(axis=0) > 0)
    correlation = np.zeros((adata.n_vars, adata.n_vars))
    correlation[np.ix_(varies, varies)] = np.corrcoef(log[:, varies].T)
    rng = np.random.default_rng(0)
    some = control[rng.choice(control.n_obs, min(300, control.n_obs), replace=False)].copy()
    mode = "overexpress" if up else "knockout"
    rows = []
    for gene in sorted(set(labels) & set(adata.var_names[varies])):
        j = adata.var_names.get_loc(gene)
        cells = model._reader(adata[labels == gene].copy()).rows(np.arange(int((labels == gene).sum())))
        truth = cells.mean(0) - log.mean(0)
        error = np.sqrt(cells.var(0) / len(cells) + log.var(0) / len(log)) + 1e-9
        use = (np.arange(adata.n_vars) != j) & (np.abs(truth / error) > 3)
        if use.sum() < 3:
            continue
        others = adata.var_names[rng.choice(varies[varies != j], 20, replace=False)]
        guesses = {
            "paired": [model.manipulate(some, gene, mode=mode).layers["delta"].mean(0)],
            "fixed point": [model.manipulate(some, gene, mode=mode, method="fixed_point").layers["delta"].mean(0)],
            "co-expression": [correlation[j] * (1 if up else -1)],
            "20 random genes": [model.manipulate(some, g, mode=mode).layers["delta"].mean(0) for g in others],
            "all genes fall" if not up else "all genes rise": [np.full(adata.n_vars, 1.0 if up else -1.0)],
        }
        for method, each in guesses.items():
            sign = np.mean([np.mean(np.sign(g[use]) == np.sign(truth[use])) for g in each])
            r = np.mean([np.corrcoef(g[use], truth[use])[0, 1] if g[use].std() > 0 else 0.0 for g in each])
            rows.append({"method": method, "gene": gene, "moved": int(use.sum()), "sign": sign, "r": r})
    return pd.DataFrame(rows)


def screens() -> None:
    sets = [("simulated", None, False)]
    if "SCPERT_TEST_DATA" in os.environ:
        sets = [
            ("Schraivogel (CRISPRi)", "schraivogel2020_k562_tapseq_crispat.h5ad", False),
            ("Norman (CRISPRa)", "norman2019_k562_crispra_perturbench.h5ad", True),
            *sets,
        ]
    for name, file, up in sets:
        data = (
            scpert.datasets.simulated(n_cells=2000, n_genes=100, n_targets=20, random_state=0)
            if file is None
            else ad.read_h5ad(Path(os.environ["SCPERT_TEST_DATA"]) / file)
        )
        table = compare(data, up)
        if table.empty:
            print(name, ": no perturbed gene is measured and moves three others")
            continue
        one = table[table["method"] == "paired"]
        print(f"{name}: {len(one)} perturbed and measured genes, each moves {one['moved'].median():.0f} (|z| > 3)")
        print(
            table.groupby("method", sort=False)[["sign", "r"]].agg(["mean", "sem"]).round(3).to_markdown(), flush=True
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:]:
        {"planted": planted, "null": null, "cooperation": cooperation, "screens": screens}[part]()
