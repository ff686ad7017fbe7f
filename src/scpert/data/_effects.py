"""Mean shifts of perturbations against control: what closed-form models learn from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import listing
from ..errors import LabelError, ScpertError
from ._perturbation import parse
from ._screen import Screen

__all__ = ["Effects"]

logger = logging.getLogger("scpert")


@dataclass
class Effects:
    """Effects of the perturbations of one data set.

    Attributes
    ----------
    labels
        Canonical labels, ``(perturbation,)``.
    delta
        Shift of the mean log1p CP10k against control, float32 ``(perturbation, gene)``.
    std_error
        Its standard error, float32 of the same shape; NaN where unknown (one cell, no layer).
    n_cells
        Cells behind each row, ``(perturbation,)``; 1 for tables of effects without ``obs["n_cells"]``.
    control_mean
        Mean log1p CP10k of control cells, ``(gene,)``; zero for tables of effects.
    genes
        Names of the genes, ``(gene,)``.
    control
        Label of the control.
    """

    labels: np.ndarray
    delta: np.ndarray
    std_error: np.ndarray
    n_cells: np.ndarray
    control_mean: np.ndarray
    genes: np.ndarray
    control: str = K.CONTROL

    @classmethod
    def from_screen(cls, screen: Screen, mask: np.ndarray | None = None) -> Effects:
        """Compute the effects of the cells in ``mask`` (all by default) in one pass."""
        if screen.scale == K.SCALE_EFFECTS:
            return cls._from_table(screen, mask)
        moments = screen.moments(mask=mask)
        where = np.flatnonzero(moments.groups == screen.control)
        if len(where) == 0:
            raise LabelError(
                f"No cell labelled {screen.control!r} is among the cells to learn from: effects need control cells. "
                "Make a split that leaves controls in 'train' (scpert.pp.split does)."
            )
        c = int(where[0])
        rows = np.flatnonzero(moments.groups != screen.control)
        with np.errstate(invalid="ignore", divide="ignore"):
            se2 = moments.var / moments.n[:, None]
        return cls(
            labels=moments.groups[rows],
            delta=(moments.mean[rows] - moments.mean[c]).astype(np.float32),
            std_error=np.sqrt(se2[rows] + np.nan_to_num(se2[c])).astype(np.float32),
            n_cells=moments.n[rows],
            control_mean=moments.mean[c].astype(np.float32),
            genes=np.asarray(screen.genes, dtype=object),
            control=screen.control,
        )

    @classmethod
    def _from_table(cls, screen: Screen, mask: np.ndarray | None) -> Effects:
        adata = screen.adata
        use = np.ones(screen.n_cells, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        rows = np.flatnonzero(use & ~screen.is_control)
        controls = np.flatnonzero(screen.is_control)
        if len(controls) and np.abs(screen.rows(controls).data).max(initial=0.0) > 1e-6:
            raise ScpertError(
                f"The table of effects has control rows ({listing(adata.obs_names[controls], 3)}) that are not zero, so "
                "its values are not relative to control. Subtract the control from every row, or drop scale='effects'."
            )
        values = screen.rows(rows).toarray().astype(np.float32)
        errors = np.full_like(values, np.nan)
        if K.STD_ERROR in adata.layers:
            layer = adata.layers[K.STD_ERROR][rows]
            errors = np.asarray(layer.toarray() if hasattr(layer, "toarray") else layer, dtype=np.float32)
            bad = (errors < 0) | np.isinf(errors)
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise ScpertError(
                    f"layers[{K.STD_ERROR!r}] has {int(bad.sum())} value(s) that are negative or infinite (first: "
                    f"{errors[row, column]:.4g} of {adata.obs_names[rows[row]]!r}, {adata.var_names[column]!r}). Standard errors are "
                    "finite and not below 0; use NaN where one is not known."
                )
        n = np.ones(len(rows))
        if K.N_CELLS in adata.obs.columns:
            n = pd.to_numeric(adata.obs[K.N_CELLS].iloc[rows], errors="coerce").fillna(1).to_numpy(dtype=float)
        names, inverse = np.unique(screen.labels[rows].astype(str), return_inverse=True)
        inverse = inverse.reshape(-1)
        if len(names) < len(rows):  # replicates of a perturbation: their mean
            logger.info("effects: %d rows are replicates and are averaged", len(rows) - len(names))
            count = np.bincount(inverse).astype(np.float32)[:, None]
            mean = np.zeros((len(names), values.shape[1]), dtype=np.float32)
            np.add.at(mean, inverse, values)
            se2 = np.zeros_like(mean)
            np.add.at(se2, inverse, errors**2)
            values, errors, n = mean / count, np.sqrt(se2) / count, np.bincount(inverse, weights=n)
        else:
            order = np.argsort(screen.labels[rows].astype(str))
            values, errors, n = values[order], errors[order], n[order]
        return cls(
            labels=names.astype(object),
            delta=values,
            std_error=errors,
            n_cells=n,
            control_mean=np.zeros(values.shape[1], dtype=np.float32),
            genes=np.asarray(screen.genes, dtype=object),
            control=screen.control,
        )

    @cached_property
    def targets(self) -> list[tuple[str, ...]]:
        """Targets of each row."""
        return [parse(label, self.control) for label in self.labels]

    @cached_property
    def row(self) -> dict[str, int]:
        """Row of each label."""
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def singles(self) -> dict[str, int]:
        """Row of each target that was perturbed alone."""
        return {t[0]: i for i, t in enumerate(self.targets) if len(t) == 1}

    @property
    def mean(self) -> np.ndarray:
        """Mean effect, every perturbation weighing the same, ``(gene,)``."""
        if len(self.labels) == 0:
            return np.zeros(len(self.genes), dtype=np.float32)
        return self.delta.mean(axis=0)

    def subset(self, rows: np.ndarray) -> Effects:
        """The same for some rows."""
        rows = np.asarray(rows)
        return Effects(
            self.labels[rows],
            self.delta[rows],
            self.std_error[rows],
            self.n_cells[rows],
            self.control_mean,
            self.genes,
            self.control,
        )
