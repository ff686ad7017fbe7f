"""Compare scpert.metrics with cell-eval: numbers, time and memory, in one run.

Needs cell-eval (``pip install scpert[eval]``)::

    OMP_NUM_THREADS=1 python docs/scripts/metrics_parity.py screen_a.h5ad screen_b.h5ad --out docs/tables

Each screen has counts in X and labels in ``obs["perturbation"]``; ``obs["library_size"]`` (or ``n_counts``) is used where
it is there. Three predictions per screen: no change (control cells drawn again), the mean response (control cells moved
by the average shift), and the truth with noise. Every tool runs in a process of its own, ``--repeats`` times; the best of
the warm runs counts, the peak memory is that of the process above what it held with the data loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

KEY, CONTROL = "perturbation", "control"
COMMON = [
    *("pearson_delta", "mse", "mae", "mse_delta", "mae_delta"),
    *("discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine", "pearson_edistance"),
    *(f"{kind}_at_{k}" for kind in ("overlap", "precision") for k in ("N", "50", "100", "200", "500")),
    *("de_spearman_sig", "de_direction_match", "de_spearman_lfc_sig", "de_sig_genes_recall", "de_nsig_counts"),
    *("pr_auc", "roc_auc", "clustering_agreement"),
]


def prepare(path: Path, folder: Path) -> list[str]:
    """Write the real cells and three predictions, log1p CP10k, as cell-eval wants them."""
    import anndata as ad
    from scipy import sparse

    adata = ad.read_h5ad(path)
    size = next((adata.obs[k].to_numpy(float) for k in ("library_size", "n_counts") if k in adata.obs), None)
    counts = sparse.csr_matrix(adata.X, dtype=np.float64)
    size = np.asarray(counts.sum(axis=1)).ravel() if size is None else size
    cells = sparse.diags(1e4 / size) @ counts
    cells = sparse.csr_matrix(cells.log1p())
    labels = np.array(["+".join(sorted(label.split("+"))) for label in adata.obs[KEY].astype(str)])
    rng = np.random.default_rng(0)
    control = np.flatnonzero(labels == CONTROL)
    base = np.asarray(cells[control].mean(axis=0)).ravel()
    names = sorted(set(labels) - {CONTROL})
    shift = np.mean([np.asarray(cells[labels == p].mean(axis=0)).ravel() for p in names], axis=0) - base

    def write(name: str, blocks: dict[str, object]) -> None:
        X = sparse.vstack([sparse.csr_matrix(b, dtype=np.float64) for b in blocks.values()], format="csr")
        rows = np.repeat(np.array(list(blocks), dtype=object), [b.shape[0] for b in blocks.values()])  # type: ignore[attr-defined]
        obs = pd.DataFrame({KEY: rows}, index=[f"{name}{i}" for i in range(len(rows))])
        ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=adata.var_names)).write_h5ad(folder / f"{name}.h5ad")

    real = {p: cells[labels == p] for p in names} | {CONTROL: cells[control]}
    write("real", real)
    redrawn = {p: cells[rng.choice(control, real[p].shape[0])] for p in names}
    write("no_change", redrawn | {CONTROL: cells[control]})
    write(
        "mean_response", {p: np.maximum(b.toarray() + shift, 0) for p, b in redrawn.items()} | {CONTROL: cells[control]}
    )
    noisy = {}
    for p in names:
        block = real[p][rng.integers(0, real[p].shape[0], real[p].shape[0])].toarray()
        noisy[p] = np.where(block > 0, np.maximum(block + rng.normal(0, 0.3, block.shape), 0), 0)
    write("noisy_truth", noisy | {CONTROL: cells[control]})
    return ["no_change", "mean_response", "noisy_truth"]


def run(tool: str, real: str, predicted: str, out: str, repeats: int) -> None:
    """One tool on one pair, in this process: table, times, memory."""
    import anndata as ad

    times, table = [], None
    if tool == "cell-eval":
        import logging

        from cell_eval import MetricsEvaluator

        logging.disable(logging.ERROR)
    else:
        import scanpy  # noqa: F401 - both tools then have their imports before the clock starts

        from scpert import metrics, settings

        settings.progress = False
    pairs = [(ad.read_h5ad(predicted), ad.read_h5ad(real)) for _ in range(repeats)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pred, truth in pairs:
        start = time.perf_counter()
        if tool == "cell-eval":
            evaluator = MetricsEvaluator(
                pred, truth, control_pert=CONTROL, pert_col=KEY, num_threads=1, outdir=tempfile.mkdtemp()
            )
            results, _ = evaluator.compute(profile="full", write_csv=False, break_on_error=True)
            table = results.to_pandas().set_index("perturbation")
        else:
            table = metrics.evaluate(pred, truth, metrics=COMMON, layer=None, scale="log1p")
        times.append(time.perf_counter() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert table is not None
    table.attrs = {}
    table.to_csv(out + ".csv")
    Path(out + ".json").write_text(
        json.dumps({"seconds": min(times[1:]), "first_seconds": times[0], "megabytes": peak})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*")
    parser.add_argument("--out", default=".")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tool, the first of them to warm up")
    parser.add_argument("--run", nargs=4, metavar=("TOOL", "REAL", "PREDICTED", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run, repeats=args.repeats)
        return
    differences, costs = [], []
    for screen in args.screens:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for model in prepare(Path(screen), folder):
                tables, cost = {}, {"screen": Path(screen).stem, "model": model}
                for tool in ("cell-eval", "scpert"):
                    out = str(folder / f"{tool}-{model}")
                    command = [sys.executable, __file__, "--run", tool, str(folder / "real.h5ad")]
                    command += [str(folder / f"{model}.h5ad"), out, "--repeats", str(args.repeats)]
                    subprocess.run(command, check=True, capture_output=True)
                    tables[tool] = pd.read_csv(out + ".csv", index_col=0)
                    cost |= {f"{tool} {k}": v for k, v in json.loads(Path(out + ".json").read_text()).items()}
                costs.append(cost)
                a, b = tables["cell-eval"], tables["scpert"]
                for metric in a.columns:
                    x, y = a[metric].astype(float), b[metric].reindex(a.index).astype(float)
                    both = x.notna() & y.notna()
                    off = (x - y).abs()[both]
                    differences.append(
                        {
                            "screen": Path(screen).stem,
                            "model": model,
                            "metric": metric,
                            "n": int(both.sum()),
                            "largest_difference": float(off.max()) if both.any() else np.nan,
                            "n_over_1e-6": int((off > 1e-6).sum()),
                            "nan_only_here": int((x.notna() & y.isna()).sum()),
                            "nan_only_there": int((x.isna() & y.notna()).sum()),
                            "theirs_where_nan_here": sorted(set(x[x.notna() & y.isna()].round(6))),
                        }
                    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    parity, cost = pd.DataFrame(differences), pd.DataFrame(costs)
    cost["speed-up"] = cost["cell-eval seconds"] / cost["scpert seconds"]
    parity.to_csv(out / "metrics_parity.csv", index=False)
    cost.to_csv(out / "metrics_cost.csv", index=False)
    summary = parity.groupby("metric", sort=False).agg(
        {"largest_difference": "max", "n_over_1e-6": "sum", "nan_only_here": "sum", "nan_only_there": "sum", "n": "sum"}
    )
    print(summary.to_string())
    print(cost.round(2).T.to_string())


if __name__ == "__main__":
    main()
