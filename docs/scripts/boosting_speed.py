"""Seconds per target gene: ``infer_grn(method="boosting")`` and arboreto's GRNBoost2, one after the other on the same cells.

``python boosting_speed.py ARBORETO_PYTHON [--cells 2000] [--genes 120] [--regulators 100] [--targets 20]``

``ARBORETO_PYTHON`` is an interpreter of an environment of its own that holds arboreto (``python -m venv V && V/bin/pip
install arboreto``). Its kernel is called gene by gene, without dask, in one thread, with GRNBoost2's settings (learning rate
0.01, at most 5,000 trees, window 25). Also prints the AUPRC of the simulated direct edges of both over the targets timed.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

import scpert

KERNEL = """
import sys, time
import numpy as np
from arboreto.core import EARLY_STOP_WINDOW_LENGTH, SGBM_KWARGS, infer_partial_network
data = np.load(sys.argv[1], allow_pickle=True)
out, start = [], time.perf_counter()
for gene in data["targets"]:
    table = infer_partial_network("GBM", SGBM_KWARGS, data["inputs"], list(data["regulators"]), gene,
                                  data["values"][:, list(data["genes"]).index(gene)], False, EARLY_STOP_WINDOW_LENGTH, 0)
    out.append(table)
print(time.perf_counter() - start)
import pandas as pd
pd.concat(out).to_csv(sys.argv[2], index=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    for name, value in (("cells", 2000), ("genes", 120), ("regulators", 100), ("targets", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    scpert.settings.progress = False
    adata = scpert.datasets.simulated(
        n_genes=a.genes, n_targets=a.regulators, n_combinations=0, n_cells=a.cells, strength=0.6
    )
    regulators = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    some = list(np.random.default_rng(0).permutation(adata.var_names)[: a.targets])
    values = scpert.data.Screen(adata).rows(np.arange(adata.n_obs)).toarray()
    inputs = values[:, adata.var_names.get_indexer(regulators)]

    start = time.perf_counter()
    scpert.tl.infer_grn(adata, method="boosting", threshold=0)
    ours = (time.perf_counter() - start) / adata.n_vars
    with tempfile.TemporaryDirectory() as folder:
        data, table = Path(folder) / "data.npz", Path(folder) / "net.csv"
        names = {"genes": list(adata.var_names), "regulators": regulators, "targets": some}
        np.savez(data, inputs=inputs, values=values, **{k: np.array(v, dtype=str) for k, v in names.items()})
        done = subprocess.run([a.python, "-c", KERNEL, data, table], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        theirs = float(done.stdout.split()[-1]) / len(some)
        net = pd.read_csv(table)
    print(f"{adata.n_obs} cells, {len(regulators)} regulators: seconds per target")
    print(
        f"  scpert {ours:.2f} ({adata.n_vars} targets)  arboreto {theirs:.2f} ({len(some)})  ratio {theirs / ours:.1f}"
    )
    rows, columns = pd.Index(regulators), pd.Index(some)
    truth, score = np.zeros((len(rows), len(columns)), dtype=bool), np.zeros((len(rows), len(columns)))
    edges = adata.uns["truth"]["net"]
    edges = edges[edges["source"].isin(rows) & edges["target"].isin(columns)]
    truth[rows.get_indexer(edges["source"]), columns.get_indexer(edges["target"])] = True
    score[rows.get_indexer(net["TF"]), columns.get_indexer(net["target"])] = net["importance"]
    own = np.abs(
        adata.varp["grn"][adata.var_names.get_indexer(rows)][:, adata.var_names.get_indexer(columns)].toarray()
    )
    off = rows.to_numpy()[:, None] != columns.to_numpy()[None, :]
    print(
        f"AUPRC of direct edges: scpert {average_precision_score(truth[off], own[off]):.3f}  "
        f"arboreto {average_precision_score(truth[off], score[off]):.3f}  share of edges {truth[off].mean():.3f}"
    )


if __name__ == "__main__":
    main()
