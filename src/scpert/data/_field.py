"""The scvi-tools field of a screen: labels, values and covariates, checked once and remembered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import rich.table
from scvi.data.fields import BaseAnnDataField

from .. import _keys as K
from .._checks import check_obs_key, listing
from ..errors import LabelError, MissingKeyError, ScpertError
from ._perturbation import targets_of
from ._screen import Screen

__all__ = ["REGISTRY_KEY", "PerturbationField", "covariate_codes", "quality_failures"]

REGISTRY_KEY = "perturbation"


def covariate_codes(adata: Any, categories: dict[str, list[str]]) -> np.ndarray:
    """Integer codes ``(cell, covariate)`` of categorical obs columns; an unknown category raises."""
    out = np.zeros((adata.n_obs, len(categories)), dtype=np.int64)
    for j, (key, known) in enumerate(categories.items()):
        values = check_obs_key(adata, key, "covariate_keys").astype(str).to_numpy()
        position = {c: i for i, c in enumerate(known)}
        unknown = sorted(set(values) - set(position))
        if unknown:
            raise ScpertError(
                f"adata.obs[{key!r}] has categories that the model was not set up with: {listing(unknown, 5)}; "
                f"it knows {listing(known, 10)}."
            )
        out[:, j] = [position[v] for v in values]
    return out


def quality_failures(adata: Any, key: str | None) -> np.ndarray:
    """Boolean ``(cell,)``: True where the cell failed quality control."""
    if key is None:
        return np.zeros(adata.n_obs, dtype=bool)
    values = pd.to_numeric(check_obs_key(adata, key, "quality_key").astype(object), errors="coerce")
    if not values.isin([0, 1]).all():
        raise ScpertError(f"adata.obs[{key!r}] must be True (failed) or False in every cell (scpert.pp.quality_flags).")
    return values.astype(bool).to_numpy()


class PerturbationField(BaseAnnDataField):
    """Labels and values of a screen as one field of scvi-tools' registry.

    Registering reads and checks, and writes nothing but scvi-tools' own identifiers into the AnnData.
    """

    def __init__(self, *, perturbation_key: str, allowed: tuple[str, ...] = K.SCALES, **options: Any):
        self._key = perturbation_key
        self.allowed = allowed
        self.options = options

    @property
    def registry_key(self) -> str:
        return REGISTRY_KEY

    @property
    def attr_name(self) -> str:
        return "obs"

    @property
    def attr_key(self) -> str:
        return self._key

    @property
    def is_empty(self) -> bool:
        return False

    def validate_field(self, adata: Any) -> None:
        check_obs_key(adata, self._key, "perturbation_key")

    def register_field(self, adata: Any) -> dict:
        o = self.options
        screen = Screen(
            adata,
            perturbation_key=self._key,
            control=o["control"],
            layer=o["layer"],
            scale=o["scale"],
            library_size_key=o["library_size_key"],
            allowed=self.allowed,
        )
        split_key = o["split_key"]
        if split_key is not None:
            values = check_obs_key(adata, split_key, "split_key").astype(str)
            strange = sorted(set(values) - {K.TRAIN, K.VAL, K.TEST})
            if strange:
                raise ScpertError(
                    f"adata.obs[{split_key!r}] holds {listing(strange, 5)}; allowed are 'train', 'val' and 'test' "
                    "(scpert.pp.split writes them)."
                )
            if not (values == K.TRAIN).any():
                raise ScpertError(f"adata.obs[{split_key!r}] has no 'train' cell: nothing to learn from.")
        if o["matched_control_key"] is not None:
            matched = check_obs_key(adata, o["matched_control_key"], "matched_control_key").astype(str)
            absent = ~matched.isin(adata.obs_names)
            if absent.any():
                raise MissingKeyError(
                    f"adata.obs[{o['matched_control_key']!r}] names {int(absent.sum())} cells that are not in the AnnData "
                    f"(first: {matched[absent].iloc[0]!r}). Run scpert.pp.match_controls on this very AnnData."
                )
            perturbed = ~screen.is_control[adata.obs_names.get_indexer(matched)]
            if perturbed.any():
                raise ScpertError(
                    f"adata.obs[{o['matched_control_key']!r}] names {int(perturbed.sum())} cells that are perturbed (first: "
                    f"{matched[perturbed].iloc[0]!r}), not controls. Run scpert.pp.match_controls(adata)."
                )
        quality_failures(adata, o["quality_key"])
        covariates = {}
        for key in o["covariate_keys"] or ():
            values = check_obs_key(adata, key, "covariate_keys")
            if values.isna().any():
                raise LabelError(f"adata.obs[{key!r}] is NaN in {int(values.isna().sum())} cells: fill or drop them.")
            covariates[key] = sorted(set(values.astype(str)))
        labels = sorted(set(screen.labels) - {screen.control})
        if not labels:
            raise LabelError(f"adata.obs[{self._key!r}] holds no perturbation beside the control {screen.control!r}.")
        return {
            "scale": screen.scale,
            "layer": screen.layer,
            "control": screen.control,
            "genes": [str(g) for g in adata.var_names],
            "labels": labels,
            "targets": targets_of(labels, screen.control),
            "covariates": covariates,
            "n_cells": int(adata.n_obs),
        }

    def transfer_field(self, state_registry: dict, adata_target: Any, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        return dict(state_registry)

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {
            "n_cells": state_registry["n_cells"],
            "n_vars": len(state_registry["genes"]),
            "n_perturbations": len(state_registry["labels"]),
            "n_targets": len(state_registry["targets"]),
        }

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        table = rich.table.Table(title="perturbation State Registry")
        table.add_column("Perturbation")
        for label in state_registry["labels"]:
            table.add_row(label)
        return table
