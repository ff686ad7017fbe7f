"""Shared data: small simulated screens, and the real ones where the environment names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("SCPERT_PROGRESS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "NUMBA_NUM_THREADS", "1"
)  # numba sets the threads of OpenMP, which torch shares, for the rest of the process


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"set {variable} to the folder of real files to run this test")
    return Path(value)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real screens."""
    return _folder("SCPERT_TEST_DATA")


@pytest.fixture(scope="session")
def real_priors() -> Path:
    """Folder of the real prior knowledge."""
    return _folder("SCPERT_TEST_PRIORS")


@pytest.fixture(scope="session")
def _small_screen():
    import scpert

    adata = scpert.datasets.simulated(n_cells=240, n_genes=12, n_targets=5, n_combinations=2, random_state=0)
    adata.obs["quality_fail"] = [i % 7 == 0 for i in range(adata.n_obs)]
    scpert.pp.split(adata, kind="cells", random_state=0)
    return adata


@pytest.fixture
def small_screen(_small_screen):
    """240 cells x 12 genes, 5 targets, 2 combinations, split by cells; a fresh copy."""
    return _small_screen.copy()


@pytest.fixture
def run_of_six():
    """2,000 cells x 50 genes, 12 targets; six of them (named) only in a run (``late``, half of the controls) with 20 genes of its own."""
    import numpy as np

    import scpert

    adata = scpert.datasets.simulated(n_cells=2000, n_genes=50, n_targets=12, n_combinations=0, random_state=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    names = sorted(set(labels) - {"control"})
    rng = np.random.default_rng(0)
    late = np.where(labels == "control", rng.random(len(labels)) < 0.5, np.isin(labels, names[:6]))
    x = adata.X.toarray()
    x[:, 20:40] = np.where(late[:, None], rng.poisson(x[:, 20:40] * 3 + 2), x[:, 20:40])
    adata.X = x
    adata.obs["run"] = late.astype(str)
    return adata, names, late
