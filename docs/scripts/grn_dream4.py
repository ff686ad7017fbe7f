"""DREAM4 networks and yeast transcription-factor knock-outs: every method against the truth.

``SCPERT_TEST_DATA`` names a folder with ``dream4_size{10,100}_{1,2,3}.h5ad``, ``kemmeren2014_yeast_tfko_623genes.h5ad`` and
``truth/``. Prints the tables of ``docs/grn/index.md``. One setting for all networks.
"""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

import scpert

DATA = Path(os.environ["SCPERT_TEST_DATA"])
METHODS = ("interventional", "sparse_inverse", "ridge", "correlation", "boosting")


def figures(score: np.ndarray, edge: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    s, y = np.abs(score)[candidate], edge[candidate]
    top = np.argsort(-s, kind="stable")[: y.sum()]
    return {"auprc": average_precision_score(y, s), "auroc": roc_auc_score(y, s), "precision": y[top].mean()}


def z_of_knockouts(adata: ad.AnnData) -> np.ndarray:
    """The reference: knock-out minus the median, over the standard deviation of the gene over knock-outs."""
    rows = adata[adata.obs["type"] == "knockout"]
    order = pd.Index(rows.obs["perturbation"].astype(str)).get_indexer(adata.var_names)
    values = np.asarray(rows.X, dtype=np.float64)[order]
    return (values - np.median(values, axis=0)) / values.std(axis=0)


def removed(z: np.ndarray, ours: np.ndarray, edge: np.ndarray, reach: np.ndarray) -> tuple[int, int]:
    """Indirect pairs (a path, no edge) among the first n (n the true number) by z, and by ours."""
    off = ~np.eye(len(edge), dtype=bool)
    out = []
    for score in (z, ours):
        flat = np.where(off, np.abs(score), -1).ravel()
        top = np.argsort(-flat, kind="stable")[: edge.sum()]
        out.append(int((reach & ~edge).ravel()[top].sum()))
    return out[0], out[1]


def main() -> None:
    scpert.settings.progress = False
    rows, indirect = [], []
    for size in (10, 100):
        for number in (1, 2, 3):
            adata = ad.read_h5ad(DATA / f"dream4_size{size}_{number}.h5ad")
            adata = adata[adata.obs["type"].isin(["wild type", "knockout", "knockdown", "multifactorial"])].copy()
            truth = pd.read_csv(DATA / "truth" / f"dream4_size{size}_{number}_truth.csv.gz")
            edge = np.zeros((size, size), dtype=bool)
            sign = np.zeros((size, size))
            at = adata.var_names.get_indexer(truth["source"]), adata.var_names.get_indexer(truth["target"])
            edge[at], sign[at] = True, np.sign(truth["weight"])
            off = ~np.eye(size, dtype=bool)
            scores = {"z of knock-outs": z_of_knockouts(adata)}
            for method in METHODS:
                scpert.tl.infer_grn(adata, method=method, observational="multifactorial", threshold=0)
                scores[method] = adata.varp["grn"].toarray()
            scpert.tl.infer_grn(adata, method="sparse_inverse", observational="multifactorial")
            scores["sparse_inverse, default edges"] = adata.varp["grn"].toarray()
            only = adata[adata.obs["type"].isin(["wild type", "knockout"])].copy()
            scpert.tl.infer_grn(only, method="sparse_inverse", threshold=0)
            scores["sparse_inverse, knock-outs only"] = only.varp["grn"].toarray()
            for name, score in scores.items():
                both = edge & (score != 0)
                rows.append(
                    {"size": size, "network": number, "method": name, **figures(score, edge, off)}
                    | {"sign": np.mean(np.sign(score)[both] == sign[both])}
                )
            reach = edge.copy()
            for _ in range(size):
                reach = reach | ((reach.astype(int) @ edge.astype(int)) > 0)
            a, b = removed(scores["z of knock-outs"], scores["sparse_inverse"], edge, reach & off)
            indirect.append(
                {"size": size, "network": number, "edges": int(edge.sum()), "by z": a, "by sparse_inverse": b}
            )
    table = pd.DataFrame(rows)
    for size, part in table.groupby("size"):
        for measure in ("auprc", "auroc", "precision", "sign"):
            wide = part.pivot(index="method", columns="network", values=measure)
            wide["mean"] = wide.mean(axis=1)
            print(f"\nsize {size}, {measure}\n{wide.loc[list(scores)].round(3).to_string()}")
    print(
        "\nindirect pairs among the first n (n the true number of edges)\n",
        pd.DataFrame(indirect).to_string(index=False),
    )
    ways_to_give_the_table()
    yeast()


def ways_to_give_the_table() -> None:
    """Natural calls on the same knock-outs: default edges and, in the last column, all pairs (``threshold=0``)."""
    rows = []
    for number in (1, 2, 3):
        adata = ad.read_h5ad(DATA / f"dream4_size100_{number}.h5ad")
        truth = pd.read_csv(DATA / "truth" / f"dream4_size100_{number}_truth.csv.gz")
        edge = np.zeros((100, 100), dtype=bool)
        edge[adata.var_names.get_indexer(truth["source"]), adata.var_names.get_indexer(truth["target"])] = True

        def of(*types: str, adata: ad.AnnData = adata) -> ad.AnnData:
            return adata[adata.obs["type"].isin(types)].copy()

        def changed(values: np.ndarray, table: ad.AnnData) -> ad.AnnData:
            return ad.AnnData(values, obs=table.obs.copy(), var=table.var.copy())

        out = of("knockout")
        x, wild = np.asarray(out.X, dtype=np.float64), np.asarray(of("wild type").X, dtype=np.float64).mean(axis=0)
        most = of("wild type", "knockout", "knockdown", "multifactorial")
        calls = {
            "all rows as they are": (adata, {}),
            "knock-outs and wild type": (of("wild type", "knockout"), {}),
            "knock-outs, scale='effects'": (out, {"scale": "effects"}),
            "knock-outs less the wild type": (changed(x - wild, out), {}),
            "knock-outs, standardised per gene": (changed((x - x.mean(axis=0)) / x.std(axis=0), out), {}),
            "log2 ratio to the wild type, 0.01 added": (changed(np.log2((x + 0.01) / (wild + 0.01)), out), {}),
            "knock-outs, knock-downs, wild type": (of("wild type", "knockout", "knockdown"), {}),
            "the same, observational= multifactorial": (most, {"observational": "multifactorial"}),
        }
        off = ~np.eye(100, dtype=bool)
        for name, (table, options) in calls.items():
            for method in ("sparse_inverse", "interventional"):
                row = {"rows": name, "method": method, "network": number}
                for column, more in (("default", {}), ("threshold=0", {"threshold": 0})):
                    scpert.tl.infer_grn(table, method=method, **options, **more)
                    row[column] = figures(table.varp["grn"].toarray(), edge, off)["auprc"]
                rows.append(row)
    table = pd.DataFrame(rows)
    wide = table.pivot_table(index=["method", "rows"], columns="network", values="default", sort=False)
    wide["mean"] = wide.mean(axis=1)
    wide["mean, threshold=0"] = table.groupby(["method", "rows"], sort=False)["threshold=0"].mean()
    print(f"\nsize 100, ways to give the table, auprc\n{wide.round(3).to_string()}")


def yeast() -> None:
    adata = ad.read_h5ad(DATA / "kemmeren2014_yeast_tfko_623genes.h5ad")
    truth = pd.read_csv(DATA / "truth" / "yeast_tf_chip_and_kemmeren_edges.csv.gz")
    truth = truth[~truth["study"].str.contains("Kemmeren", case=False)]
    truth = truth.assign(source=truth["source_symbol"])[["source", "target"]].drop_duplicates()
    names = pd.Series(adata.obs["perturbation"].astype(str).to_numpy(), index=adata.obs["orf"].astype(str))
    print("\nyeast: ChIP-supported edges that do not come from the knock-outs")
    regulators = sorted(set(truth["source"]) & set(names))
    row, column = pd.Index(regulators).get_indexer(truth["source"]), adata.var_names.get_indexer(truth["target"])
    inside = (row >= 0) & (column >= 0)
    edge = np.zeros((len(regulators), adata.n_vars), dtype=bool)
    edge[row[inside], column[inside]] = True
    own = adata.var_names.get_indexer([dict(zip(names, names.index, strict=True))[r] for r in regulators])
    candidate = np.ones_like(edge)
    candidate[np.flatnonzero(own >= 0), own[own >= 0]] = False
    # the table names its rows by symbol and its columns by open reading frame: bring the regulators to the latter
    renamed = adata.copy()
    renamed.obs["perturbation"] = renamed.obs["orf"].astype(str).to_numpy()
    out = []
    for method in ("interventional", "sparse_inverse", "ridge", "correlation"):
        scpert.tl.infer_grn(renamed, method=method, threshold=0)
        net = scpert.get.grn_df(renamed, unmeasured=True)
        net["source"] = net["source"].map(names)
        score = np.zeros(edge.shape)
        r, c = pd.Index(regulators).get_indexer(net["source"]), renamed.var_names.get_indexer(net["target"])
        ok = (r >= 0) & (c >= 0)
        score[r[ok], c[ok]] = net["weight"][ok]
        out.append({"method": method, **figures(score, edge & candidate, candidate)})
    effects = scpert.tl.perturbation_effects(adata)
    score = np.asarray(effects[regulators].X)
    out.append({"method": "absolute log fold change", **figures(score, edge & candidate, candidate)})
    out.append(
        {"method": "random", "auprc": (edge & candidate).sum() / candidate.sum(), "auroc": 0.5, "precision": np.nan}
    )
    print(f"{len(regulators)} regulators, {int(edge.sum())} edges\n", pd.DataFrame(out).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
