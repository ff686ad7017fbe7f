"""Time and peak memory of perturbation_effects and infer_grn on 100,000 cells x 2,000 genes x 500 perturbations.

``python effects_memory.py [effects|interventional|sparse_inverse] [density]``: one call per process. Memory is the largest
resident size during the call over that before it (the matrix already loaded), beside the size of the matrix.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, stats  # noqa: F401  (loaded before the measurement)

import scpert
from scpert.tl import infer_grn, perturbation_effects

N_CELLS, N_GENES, N_PERTURBATIONS = 100_000, 2_000, 500


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def screen(density: float) -> ad.AnnData:
    rng = np.random.default_rng(0)
    per_cell = int(density * N_GENES)
    some = np.concatenate([np.sort(rng.choice(N_GENES, per_cell, replace=False)) for _ in range(1000)]).astype(np.int32)
    indices = np.tile(some, N_CELLS // 1000)
    data = rng.integers(1, 6, size=len(indices)).astype(np.float32)
    matrix = sparse.csr_matrix((data, indices, np.arange(0, len(data) + 1, per_cell)), shape=(N_CELLS, N_GENES))
    labels = np.array(["control", *[f"G{i}" for i in range(N_PERTURBATIONS)]], dtype=object)
    label = labels[rng.integers(0, len(labels), N_CELLS)]
    label[:10_000] = "control"
    names = [str(i) for i in range(N_CELLS)]
    return ad.AnnData(
        matrix,
        obs=pd.DataFrame({"perturbation": label}, index=names),
        var=pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]),
    )


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "effects"
    adata = screen(float(sys.argv[2]) if len(sys.argv) > 2 else 0.2)
    scpert.settings.progress = False
    matrix = sum(part.nbytes for part in (adata.X.data, adata.X.indices, adata.X.indptr)) / 1e6
    peak, running = [resident()], [True]

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], resident())
            time.sleep(0.005)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    perturbation_effects(adata) if what == "effects" else infer_grn(adata, method=what)
    seconds = time.perf_counter() - start
    running[0] = False
    watcher.join()
    extra = peak[0] - before
    print(
        f"{what}: {seconds:.1f} s; matrix {matrix:.0f} MB, {extra:.0f} MB beside it: {1 + extra / matrix:.2f} x the matrix"
    )


if __name__ == "__main__":
    main()
