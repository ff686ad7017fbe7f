"""Memory and time of CellState; run one part per process.

    python docs/scripts/cell_state_scale.py laptop|predict|steps

``predict`` and ``steps`` build the published size (1.18 billion weights).
"""

import resource
import sys
import time

import anndata as ad
import numpy as np
import torch

from scpert.model import CellState
from scpert.model._cell_state_fit import make_optimizer
from scpert.module._cell_state import CellStateModule


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def published(checkpointing: bool) -> CellStateModule:
    size = CellState.PUBLISHED
    with torch.device("meta"):
        module = CellStateModule(
            size["n_genes"], size["hidden"], size["n_latent"], linear=False, checkpointing=checkpointing
        )
    module.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.01) if p.dim() > 1 else p.zero_()
        for name, b in module.named_buffers():
            b.zero_() if name == "mean" else b.fill_(1.0)
        for norm in (*module.encoder.norms, *module.decoder.norms, module.norm):
            norm.weight.fill_(1.0)
    return module


def laptop() -> None:
    rng = np.random.default_rng(0)
    X = np.expm1(
        np.maximum(
            4 + rng.normal(size=(300, 12)) @ rng.normal(size=(12, 20000)) * 0.4 + rng.normal(size=(300, 20000)) * 0.3, 0
        )
    )
    adata = ad.AnnData(X.astype(np.float32))
    CellState.setup_anndata(adata)
    t, c = time.time(), time.process_time()
    CellState(adata).train()
    print(
        f"300 x 20,000, default, {torch.get_num_threads()} threads: {time.time() - t:.0f} s wall, {time.process_time() - c:.0f} s of CPU, {peak():.1f} GB"
    )


def predict() -> None:
    module = published(False).eval()
    with torch.no_grad():
        t = time.time()
        out = module(torch.randn(64, module.n_genes))
    print(
        f"{module.n_weights:,} weights; batch of 64 predicted in {time.time() - t:.0f} s, finite {bool(torch.isfinite(out).all())}, peak {peak():.1f} GB"
    )


def steps() -> None:
    module = published(True).train()
    optimizer = make_optimizer("adafactor", module, 1e-4, 0.0)
    device = next(module.parameters()).device
    y = torch.randn(32, module.n_genes, device=device)
    for _ in range(2):
        t = time.time()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, _ = module.loss(y, (torch.rand_like(y) > 0.2).float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(
            f"step of 32 samples {time.time() - t:.0f} s, loss {float(loss.detach()):.3f}, peak {peak():.1f} GB",
            flush=True,
        )
    if device.type == "cuda":
        print(f"device memory {torch.cuda.max_memory_allocated() / 1024**3:.1f} GB")


if __name__ == "__main__":
    {"laptop": laptop, "predict": predict, "steps": steps}[sys.argv[1]]()
