"""Effects, metrics, network inference, knowledge and training on simulated screens of growing size."""

from __future__ import annotations

import os
import time

os.environ.setdefault("SCPERT_PROGRESS", "0")

import scpert

SIZES = {
    "small": {"n_cells": 2_000, "n_genes": 200, "n_targets": 20},
    "medium": {"n_cells": 20_000, "n_genes": 1_000, "n_targets": 100},
    "large": {"n_cells": 100_000, "n_genes": 2_000, "n_targets": 200},
}


def _screen(size: str):
    return scpert.datasets.simulated(**SIZES[size], n_combinations=0, random_state=0)


class Effects:
    """``tl.perturbation_effects``: one pass over the cells."""

    params = list(SIZES)
    param_names = ["size"]
    timeout = 900

    def setup(self, size: str) -> None:
        self.adata = _screen(size)
        scpert.tl.perturbation_effects  # noqa: B018 - the import is not to be timed

    def time_effects(self, size: str) -> None:
        scpert.tl.perturbation_effects(self.adata)

    def peakmem_effects(self, size: str) -> None:
        scpert.tl.perturbation_effects(self.adata)


class Networks:
    """``tl.infer_grn`` by method."""

    params = [["interventional", "correlation", "ridge", "sparse_inverse"], ["small", "medium"]]
    param_names = ["method", "size"]
    timeout = 900

    def setup(self, method: str, size: str) -> None:
        self.adata = _screen(size)
        scpert.tl.infer_grn  # noqa: B018

    def time_infer_grn(self, method: str, size: str) -> None:
        scpert.tl.infer_grn(self.adata, method=method)


class Metrics:
    """All metrics of profiles and cells that a screen allows, of the training mean."""

    params = ["small", "medium"]
    param_names = ["size"]
    timeout = 900

    def setup(self, size: str) -> None:
        self.adata = _screen(size)
        scpert.model.PerturbedMean.setup_anndata(self.adata)
        model = scpert.model.PerturbedMean(self.adata)
        model.train()
        self.predicted = model.predict_perturbation()
        scpert.metrics.evaluate  # noqa: B018

    def time_evaluate(self, size: str) -> None:
        scpert.metrics.evaluate(self.predicted, self.adata)


class Knowledge:
    """Fit of the models that learn from annotations in closed form, on a screen's effects."""

    params = ["KNN", "Ridge", "KnowledgeGP"]
    param_names = ["model"]
    timeout = 900

    def setup(self, model: str) -> None:
        screen = _screen("medium")
        self.effects = scpert.tl.perturbation_effects(screen)
        self.cls = getattr(scpert.model, model)
        self.cls.setup_anndata(self.effects, scale="effects")
        self.knowledge = {"annotations": screen.uns["truth"]["annotations"][["gene", "term"]]}

    def time_train(self, model: str) -> None:
        self.cls(self.effects, knowledge=self.knowledge).train()


class Training:
    """Cells a second in training, after one epoch to warm up."""

    params = ["SAMSVAE", "GPOVAE", "GEARS", "BioDSNN"]
    param_names = ["model"]
    timeout = 900
    n_epochs = 3

    def setup(self, model: str) -> None:
        self.adata = _screen("small")
        self.cls = getattr(scpert.model, model)
        self.cls.setup_anndata(self.adata)
        self.cls(self.adata).train(max_epochs=1)

    def track_throughput(self, model: str) -> float:
        trained = self.cls(self.adata)
        start = time.perf_counter()
        trained.train(max_epochs=self.n_epochs)
        return self.adata.n_obs * self.n_epochs / (time.perf_counter() - start)

    track_throughput.unit = "cells/s"
