"""Cells per second of training: scpert's GEARS and BioDSNN beside cell-gears 0.1.2, in one run, on simulated data.

The peer lives in its own environment::

    uv venv peer && uv pip install --python peer/bin/python cell-gears==0.1.2 torch torch-geometric
    python docs/scripts/biodsnn_speed.py --peer peer/bin/python

Both sides see the same sizes, the same numbers of edges and the same number of threads (``OMP_NUM_THREADS``). The peer's
figure is its own training step (batches of 32 cells, as it is shipped; collated before the clock starts); scpert's is
``model.train``, loader included. Rounds of the two sides alternate. Cells per second of the processor are given beside
cells per second of the clock: on a busy machine only the former compare.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SIZES = {"2000x100": (2000, 100, 60_000), "5000x1000": (5000, 1000, 300_000)}
CELLS_PER_PERTURBATION = 100


def peer(size: str, seconds: float) -> dict:
    """Training steps of cell-gears; runs in the peer's environment."""
    import warnings

    warnings.filterwarnings("ignore")
    import numpy as np
    import torch
    from gears.model import GEARS_Model
    from gears.utils import loss_fct
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader

    n_genes, n_perts, _ = SIZES[size]
    rng = np.random.default_rng(0)

    def graph(n: int) -> tuple:
        return (
            torch.as_tensor(np.stack([rng.integers(n, size=20 * n), np.repeat(np.arange(n), 20)])),
            torch.as_tensor(rng.random(20 * n), dtype=torch.float32),
        )

    gene, gene_w = graph(n_genes)
    go, go_w = graph(n_perts)
    model = GEARS_Model(
        {
            "num_genes": n_genes, "num_perts": n_perts, "hidden_size": 64, "uncertainty": False,
            "num_go_gnn_layers": 1, "decoder_hidden_size": 16, "num_gene_gnn_layers": 1, "no_perturb": False,
            "G_coexpress": gene, "G_coexpress_weight": gene_w, "G_go": go, "G_go_weight": go_w, "device": "cpu",
        }
    )  # fmt: skip
    cells = [
        Data(
            x=torch.rand(n_genes, 1), y=torch.rand(1, n_genes), pert=f"P{p}+ctrl", pert_idx=[int(p)]
        )
        for p in rng.integers(n_perts, size=64)
    ]  # fmt: skip
    batches = list(DataLoader(cells, batch_size=32))
    keep = {c.pert: np.arange(n_genes) for c in cells}
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-4)
    control = torch.rand(n_genes)
    done, start, processor = -1, 0.0, 0.0
    while done < 1 or time.perf_counter() - start < seconds:
        batch = batches[done % 2]
        if done == 0:
            start, processor = time.perf_counter(), time.process_time()
        optimiser.zero_grad()
        loss_fct(model(batch), batch.y, batch.pert, ctrl=control, dict_filter=keep, direction_lambda=0.1).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), clip_value=1.0)
        optimiser.step()
        done += 1
    return {
        "cells_per_s": 32 * done / (time.perf_counter() - start),
        "cells_per_cpu_s": 32 * done / (time.process_time() - processor),
        "peak_GB": _peak(),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def screen(n_genes: int, n_perts: int, n_edges: int, cells_per_perturbation: int):
    """A screen of Poisson counts with random graphs of the sizes that the articles use."""
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    rng = np.random.default_rng(0)
    n_cells = n_perts * cells_per_perturbation
    genes = [f"G{i:05d}" for i in range(n_genes)]
    labels = np.repeat(genes[:n_perts], cells_per_perturbation)
    labels = np.concatenate([labels, np.repeat("control", max(100, n_cells // 10))])
    per_cell = n_genes // 10
    indptr = np.arange(len(labels) + 1) * per_cell
    indices = rng.integers(n_genes, size=indptr[-1]).astype(np.int32)
    X = sparse.csr_matrix((np.ones(indptr[-1], np.float32), indices, indptr), shape=(len(labels), n_genes))
    X.sum_duplicates()
    adata = AnnData(X, obs=pd.DataFrame({"perturbation": labels}), var=pd.DataFrame(index=genes))

    def net(names: list[str], n: int) -> pd.DataFrame:
        s, t = rng.integers(len(names), size=n), rng.integers(len(names), size=n)
        out = pd.DataFrame({"source": np.array(names)[s], "target": np.array(names)[t], "weight": rng.random(n) + 0.1})
        return out[out.source != out.target].drop_duplicates(["source", "target"])

    half = net(genes, n_edges // 2)
    mask = pd.concat([half, half.rename(columns={"source": "target", "target": "source"})])
    return (
        adata,
        net(genes, 20 * n_genes),
        net(genes[:n_perts], 20 * n_perts),
        mask.drop_duplicates(["source", "target"]),
    )


def ours(name: str, n_genes: int, n_perts: int, n_edges: int, cells: int, batches: int | None, batch_size: int) -> dict:
    """One timed epoch (or its first ``batches``) of a model of scpert."""
    import warnings

    warnings.filterwarnings("ignore")
    import lightning.pytorch as lightning

    import scpert

    scpert.settings.progress = False
    adata, gene_net, perturbation_net, mask = screen(n_genes, n_perts, n_edges, cells)

    class Clock(lightning.Callback):
        seconds, processor, seen, start, begun = 0.0, 0.0, 0, 0.0, 0.0

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            now, used = time.perf_counter(), time.process_time()
            if index > 0:  # the first batch warms up
                self.seconds += now - self.start
                self.processor += used - self.begun
                self.seen += len(batch["x"])
            self.start, self.begun = now, used

    cls = getattr(scpert.model, name)
    cls.setup_anndata(adata)
    options = {"pathway_net": mask} if name == "BioDSNN" else {}
    # "none": the clock is on the network; the linear graph model is solved once, before the first epoch
    model = cls(adata, gene_net=gene_net, perturbation_net=perturbation_net, anchor="none", **options)
    clock = Clock()
    extra = {} if batches is None else {"limit_train_batches": batches}
    model.train(max_epochs=1, accelerator="cpu", batch_size=batch_size, callbacks=[clock], **extra)
    return {
        "cells_per_s": clock.seen / clock.seconds,
        "cells_per_cpu_s": clock.seen / clock.processor,
        "peak_GB": _peak(),
        "cpu_s": clock.processor,
    }


def _call(python: str, task: dict) -> dict:
    out = subprocess.run([python, __file__, "--task", json.dumps(task)], capture_output=True, text=True, check=False)
    lines = [line for line in out.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of the environment with cell-gears")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--curve", action="store_true", help="cost of an epoch by cells and by perturbations")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        print(json.dumps(peer(**task["peer"]) if "peer" in task else ours(**task["ours"])))
        return
    for size in args.sizes:
        n_genes, n_perts, n_edges = SIZES[size]
        found: dict[str, list[dict]] = {"cell-gears": [], "GEARS": [], "BioDSNN": []}
        for _ in range(args.rounds):
            if args.peer:
                found["cell-gears"].append(_call(args.peer, {"peer": {"size": size, "seconds": 20}}))
            for name in ("GEARS", "BioDSNN"):
                task = {
                    "name": name, "n_genes": n_genes, "n_perts": n_perts, "n_edges": n_edges,
                    "cells": CELLS_PER_PERTURBATION, "batches": 5 if n_genes > 2000 else 25, "batch_size": 256,
                }  # fmt: skip
                found[name].append(_call(sys.executable, {"ours": task}))
        base = max((r["cells_per_cpu_s"] for r in found["cell-gears"]), default=float("nan"))
        for name, rounds in found.items():
            if rounds:
                speeds = ", ".join(f"{r['cells_per_s']:.0f}" for r in rounds)
                used = ", ".join(f"{r['cells_per_cpu_s']:.0f}" for r in rounds)
                worst = min(r["cells_per_cpu_s"] for r in rounds) / base
                peak = max(r["peak_GB"] for r in rounds)
                print(
                    f"{size:>10} {name:>10}: {used} cells per processor second ({speeds} by the clock); "
                    f"at least {worst:.1f} x the peer's best; peak {peak:.2f} GB",
                    flush=True,
                )
    if args.curve:
        print("processor seconds of an epoch, 1,000 genes, BioDSNN, 12,000 mask edges")
        for n_perts, cells in ((50, 100), (100, 100), (200, 100), (100, 50), (100, 200), (100, 400)):
            task = {
                "name": "BioDSNN",
                "n_genes": 1000,
                "n_perts": n_perts,
                "n_edges": 12_000,
                "cells": cells,
                "batches": None,
                "batch_size": 256,
            }
            r = _call(sys.executable, {"ours": task})
            print(
                f"{n_perts:>5} perturbations x {cells:>4} cells = {n_perts * cells:>6} cells: {r['cpu_s']:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
