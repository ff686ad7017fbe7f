"""Baselines that every result is shown with: no change, perturbed mean, additive."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData

from ..data._perturbation import parse
from ._base import ClosedFormModel, Prediction, Reference

__all__ = ["Additive", "NoChange", "PerturbedMean"]


class NoChange(ClosedFormModel):
    """Predicts that a perturbation does nothing: the shift is zero.

    This holds of any target. A target that the data do not hold is refused like everywhere (a typo should not pass); with
    ``on_unknown="mean"`` or ``"nearest"`` it is flagged as ``fallback`` and the shift is zero, not the mean effect.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.NoChange.setup_anndata(adata)
    >>> model = scpert.model.NoChange(adata)
    >>> model.train()
    >>> float(abs(model.predict_perturbation().layers["delta"]).max())
    0.0
    """

    scope = "unseen"

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None):
        super().__init__(adata, registry)
        self._remember(locals())

    def _uninformed(self) -> np.ndarray:
        return np.zeros(self.n_genes, dtype=np.float32)

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        return Prediction(np.zeros((len(targets), self.n_genes), dtype=np.float32))


class PerturbedMean(ClosedFormModel):
    r"""Predicts the mean effect of the training perturbations, whatever is perturbed.

    .. math:: \hat\delta_p = \frac{1}{|T|} \sum_{t \in T} \delta_t

    with every training perturbation :math:`t` weighing the same. Most published networks do not beat it
    :cite:p:`Ahlmann2025`.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.PerturbedMean.setup_anndata(adata)
    >>> model = scpert.model.PerturbedMean(adata)
    >>> model.train()
    >>> model.predict_perturbation().shape[1]
    40
    """

    scope = "unseen"

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None):
        super().__init__(adata, registry)
        self._remember(locals())

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        return Prediction(np.tile(self.effects_.mean, (len(targets), 1)))


class Additive(ClosedFormModel):
    r"""Adds the effects of single perturbations.

    .. math:: \hat\delta_{ab} = s\,(\delta_a + \delta_b)

    A perturbation that was trained on is predicted by its own training mean. A combination one of whose singles was
    not measured takes the mean effect for it and has the status ``fallback``.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    shrink
        Learn the scale :math:`s` by least squares on the training combinations whose singles were measured, one
        number in [0, 1.5]; else, or if there is no such combination, :math:`s = 1`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=400, n_genes=40, n_targets=5, n_combinations=2)
    >>> scpert.model.Additive.setup_anndata(adata)
    >>> model = scpert.model.Additive(adata)
    >>> model.train()
    >>> str(model.predict_perturbation(model.targets_[0]).obs["status"].iloc[0])
    'trained'
    """

    scope = "combinations"
    _uncovered = "fallback"
    _fitted = ("scale_factor_",)

    def __init__(self, adata: AnnData | None = None, registry: dict | None = None, *, shrink: bool = False):
        super().__init__(adata, registry)
        self._remember(locals())
        self.shrink = shrink
        self.scale_factor_ = 1.0

    def _fit(self) -> None:
        e = self.effects_
        self.scale_factor_ = 1.0
        rows = [i for i, t in enumerate(e.targets) if len(t) > 1 and all(x in e.singles for x in t)]
        if self.shrink and rows:
            total = np.stack([self._sum(e.targets[i])[0] for i in rows])
            self.scale_factor_ = float(np.clip((total * e.delta[rows]).sum() / max((total**2).sum(), 1e-12), 0.0, 1.5))

    def _sum(self, targets: tuple[str, ...]) -> tuple[np.ndarray, bool]:
        e = self.effects_
        parts = [e.delta[e.singles[t]] if t in e.singles else e.mean for t in targets]
        return np.sum(parts, axis=0), not all(t in e.singles for t in targets)

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        e = self.effects_
        own = {parse(label, self.control_): i for label, i in e.row.items()}
        delta = np.empty((len(targets), self.n_genes), dtype=np.float32)
        fallback = np.zeros(len(targets), dtype=bool)
        for i, t in enumerate(targets):
            if t in own:
                delta[i] = e.delta[own[t]]
            else:
                total, fallback[i] = self._sum(t)
                delta[i] = self.scale_factor_ * total if len(t) > 1 else total
        return Prediction(delta, fallback=fallback)

    def _status(self, targets: tuple[str, ...]) -> Any:
        status = super()._status(targets)
        # the mean stands in for a missing single of a combination: informed, but flagged
        return "combination" if status == "fallback" and len(targets) > 1 else status
