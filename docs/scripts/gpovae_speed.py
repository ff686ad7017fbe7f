"""Training throughput of GPO-VAE, beside scvi-tools' SCVI at equal widths and batch, in one run.

python docs/scripts/gpovae_speed.py [--genes 2000] [--targets 655] [--batch 256] [--cells 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import scvi
import torch

import scpert


def rate(train, n_cells: int, epochs: int = 2) -> float:
    """Cells per second of ``epochs`` further epochs, after one that warms up."""
    train(1)
    start = time.perf_counter()
    train(epochs)
    return epochs * n_cells / (time.perf_counter() - start)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=655)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    scpert.settings.progress = False
    adata = scpert.datasets.simulated(n_cells=a.cells, n_genes=a.genes, n_targets=a.targets, n_combinations=0)
    results = {}
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=400, n_latent=100, gene_likelihood="nb")
    quiet = {"enable_progress_bar": False, "batch_size": a.batch, "accelerator": "cpu"}
    results["SCVI"] = rate(lambda n: model.train(max_epochs=n, train_size=1.0, **quiet), a.cells)
    for name, options in {
        "GPOVAE": {},
        "GPOVAE, 5 particles": {"n_particles": 5},
        "GPOVAE, published, 5 particles": {"published": True, "n_particles": 5},
    }.items():
        scpert.model.GPOVAE.setup_anndata(adata)
        ours = scpert.model.GPOVAE(adata, shrinkage=False, **options)
        results[name] = rate(lambda n, m=ours: m.train(n, **quiet), a.cells)
    print(f"{a.genes} genes, {a.targets} targets, batch {a.batch}, {a.cells} cells, {a.threads} threads")
    for name, value in results.items():
        print(f"  {name:32s} {value:8.0f} cells/s   {value / results['SCVI']:.2f} of SCVI")
    assert np.isfinite(list(results.values())).all()


if __name__ == "__main__":
    main()
