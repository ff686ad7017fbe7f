"""Batches of cells with their partners, and the splitter that reads ``obs["split"]``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from scipy import sparse

from .. import _keys as K
from ..errors import SplitError
from ._field import covariate_codes, quality_failures
from ._perturbation import encode
from ._screen import Screen, read_rows

__all__ = ["Batch", "PerturbationLoader", "PerturbationSplitter", "ScreenTensors"]

logger = logging.getLogger("scpert")

Batch = dict[str, torch.Tensor]


class ScreenTensors:
    """Everything a batch is made of: the values stay the CSR matrix they are, the rest are short vectors.

    A batch is a dict of tensors:

    ============== ========================== ==================================================================
    key            shape                      meaning
    ============== ========================== ==================================================================
    ``x``          ``(cell, gene)``           counts (``scale="counts"``) or log1p values / effects
    ``library``    ``(cell, 1)``              total counts (1e4 where the values are no counts)
    ``codes``      ``(cell, most targets)``   targets, padded with -1; the control has none
    ``label``      ``(cell,)``                index of the label; -1 for the control
    ``quality``    ``(cell, 1)``              1 where quality control failed
    ``covariates`` ``(cell, covariate)``      codes of the covariates
    ``index``      ``(cell,)``                row in the AnnData
    ``control_*``  as above                   the partner control: ``control_x``, ``control_library``
    ``other_*``    as above                   partner of the same perturbation and the other quality, if there is one
    ``has_other``  ``(cell, 1)``              1 where there is one
    ============== ========================== ==================================================================
    """

    def __init__(self, screen: Screen, state: dict[str, Any], setup: dict[str, Any]):
        adata = screen.adata
        X = screen.X
        if not (sparse.issparse(X) or isinstance(X, np.ndarray)):
            logger.info("the backed or lazy matrix is read into memory once, as CSR, for training")
            X = read_rows(X, np.arange(adata.n_obs))
        self.X = X.tocsr() if sparse.issparse(X) else X
        for _ in screen.chunks(normalised=False):  # every value is finite and not negative
            pass
        self.n_cells, self.n_genes = self.X.shape
        self.labels = screen.labels
        self.is_control = screen.is_control
        counts = screen.scale == K.SCALE_COUNTS
        size = screen.library_size if counts else np.full(self.n_cells, K.TARGET_SUM)
        self.library = size.astype(np.float32)[:, None]
        self.codes = encode(screen.labels, state["targets"], screen.control)
        position = {label: i for i, label in enumerate(state["labels"])}
        self.label = np.array([position.get(label, -1) for label in screen.labels], dtype=np.int64)
        self.quality = quality_failures(adata, setup.get("quality_key"))
        self.covariates = covariate_codes(adata, state["covariates"])
        key = setup.get("matched_control_key")
        self.matched = adata.obs_names.get_indexer(adata.obs[key].astype(str)) if key else None
        split_key = setup.get("split_key")
        self.split = adata.obs[split_key].astype(str).to_numpy() if split_key else None

    def dense(self, index: np.ndarray) -> torch.Tensor:
        """Rows as a dense float32 tensor."""
        rows = self.X[index]
        rows = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))

    def batch(self, index: np.ndarray) -> Batch:
        """The cells ``index`` without partners."""
        return {
            "x": self.dense(index),
            "library": torch.from_numpy(self.library[index]),
            "codes": torch.from_numpy(self.codes[index]),
            "label": torch.from_numpy(self.label[index]),
            "quality": torch.from_numpy(self.quality[index].astype(np.float32)[:, None]),
            "covariates": torch.from_numpy(self.covariates[index]),
            "index": torch.from_numpy(np.asarray(index, dtype=np.int64)),
        }


class PerturbationLoader:
    """Iterates once over ``index`` in batches; draws a partner for each cell from ``pool``.

    Parameters
    ----------
    tensors
        The screen.
    index
        Rows to visit, each exactly once an epoch.
    pool
        Rows that partners may come from (training cells).
    partners
        Any of ``"control"`` (the matched control if there is one in the pool, else a random control of the same
        covariates, else any control) and ``"quality"`` (same perturbation, other quality).
    batch_size, shuffle, random_state
        As usual; every epoch has its own order, the same for the same ``random_state``.
    group_labels
        If given, a batch holds at most this many distinct labels, so that work that is done once per perturbation is
        shared by many cells.
    """

    def __init__(
        self,
        tensors: ScreenTensors,
        index: np.ndarray,
        pool: np.ndarray,
        *,
        partners: tuple[str, ...] = (),
        batch_size: int = 256,
        shuffle: bool = True,
        random_state: int = 0,
        group_labels: int | None = None,
    ):
        self.tensors = tensors
        self.index = np.asarray(index)
        self.batch_size = int(batch_size)
        self.shuffle = shuffle
        self.random_state = random_state
        self.group_labels = group_labels
        self.epoch = 0
        self.partners = partners
        t = tensors
        pool_mask = np.zeros(t.n_cells, dtype=bool)
        pool_mask[pool] = True
        self._stratum = np.zeros(t.n_cells, dtype=np.int64)
        if t.covariates.shape[1]:
            _, inverse = np.unique(t.covariates, axis=0, return_inverse=True)
            self._stratum = inverse.reshape(-1)
        if "control" in partners:
            controls = np.flatnonzero(pool_mask & t.is_control)
            if len(controls) == 0:
                raise SplitError("No control cell is among the training cells: partners cannot be drawn.")
            self._controls = {int(s): controls[self._stratum[controls] == s] for s in np.unique(self._stratum)}
            self._any_control = controls
            self._matched = None if t.matched is None else np.where(pool_mask[t.matched], t.matched, -1)
        if "quality" in partners:
            key = (t.label + 1) * 2 + t.quality
            rows = np.flatnonzero(pool_mask)
            rows = rows[np.argsort(key[rows], kind="stable")]
            self._quality_rows = rows
            wanted = (t.label + 1) * 2 + (~t.quality)
            self._quality_first = np.searchsorted(key[rows], wanted, "left")
            self._quality_count = np.searchsorted(key[rows], wanted, "right") - self._quality_first

    def __len__(self) -> int:
        return max(1, -(-len(self.index) // self.batch_size))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        if not self.shuffle:
            return self.index
        order = rng.permutation(self.index)
        if self.group_labels is None:
            return order
        # Shuffle cells within labels, cut each label into pieces of one batch share, shuffle the pieces: a batch then
        # holds about `group_labels` labels and every cell is still visited exactly once.
        share = max(1, self.batch_size // self.group_labels)
        order = order[np.argsort(self.tensors.label[order], kind="stable")]
        label = self.tensors.label[order]
        start = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
        within = np.arange(len(order)) - np.repeat(start, np.diff(np.r_[start, len(order)]))
        piece = np.cumsum(np.r_[True, (label[1:] != label[:-1]) | (within[1:] % share == 0)]) - 1
        rank = rng.permutation(piece[-1] + 1)
        return order[np.argsort(rank[piece], kind="stable")]

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self.random_state, self.epoch if self.shuffle else 0])
        self.epoch += 1
        order = self._order(rng)
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            batch = self.tensors.batch(index)
            if "control" in self.partners:
                partner = self._control_partners(index, rng)
                batch["control_x"] = self.tensors.dense(partner)
                batch["control_library"] = torch.from_numpy(self.tensors.library[partner])
            if "quality" in self.partners:
                count = self._quality_count[index]
                pick = self._quality_first[index] + (rng.random(len(index)) * np.maximum(count, 1)).astype(np.int64)
                has = count > 0
                partner = np.where(has, self._quality_rows[np.minimum(pick, len(self._quality_rows) - 1)], index)
                batch["has_other"] = torch.from_numpy(has.astype(np.float32)[:, None])
                batch["other_x"] = self.tensors.dense(partner)
                batch["other_library"] = torch.from_numpy(self.tensors.library[partner])
            yield batch

    def _control_partners(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        partner = np.full(len(index), -1)
        if self._matched is not None:
            partner = self._matched[index].copy()
        for i in np.flatnonzero(partner < 0):
            pool = self._controls.get(int(self._stratum[index[i]]))
            pool = self._any_control if pool is None or len(pool) == 0 else pool
            partner[i] = pool[rng.integers(len(pool))]
        return partner


class PerturbationSplitter(lightning.LightningDataModule):
    """Training and validation loaders from ``obs["split"]``, or a random split of the cells where there is none."""

    def __init__(
        self,
        tensors: ScreenTensors,
        *,
        partners: tuple[str, ...] = (),
        batch_size: int = 256,
        train_size: float | None = None,
        validation_size: float | None = None,
        random_state: int = 0,
        group_labels: int | None = None,
        need_validation: bool = False,
        judge_by_perturbed: bool = False,
    ):
        super().__init__()
        rows = np.arange(tensors.n_cells)
        if tensors.split is not None:
            self.train_idx = rows[tensors.split == K.TRAIN]
            self.val_idx = rows[tensors.split == K.VAL]
            self.test_idx = rows[tensors.split == K.TEST]
        else:
            if train_size is None:
                train_size = 1.0 - (validation_size or 0.0) if validation_size or not need_validation else 0.9
            if validation_size is None:
                validation_size = 1.0 - train_size
            order = np.random.default_rng(random_state).permutation(rows)
            cut = max(1, round(train_size * len(rows)))
            end = round((train_size + validation_size) * len(rows))
            self.train_idx, self.val_idx, self.test_idx = map(np.sort, (order[:cut], order[cut:end], order[end:]))
        if judge_by_perturbed and len(self.val_idx) and tensors.is_control[self.val_idx].all():
            logger.warning("the validation cells are controls only, which do not tell when to stop: they are left out")
            self.val_idx = self.val_idx[:0]
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)
        options: dict[str, Any] = {
            "partners": partners,
            "batch_size": batch_size,
            "random_state": random_state,
            "group_labels": group_labels,
        }
        self._train = PerturbationLoader(tensors, self.train_idx, self.train_idx, shuffle=True, **options)
        self._val = (
            PerturbationLoader(tensors, self.val_idx, self.train_idx, shuffle=False, **options) if self.n_val else None
        )

    def train_dataloader(self) -> PerturbationLoader:
        """Training batches."""
        return self._train

    def val_dataloader(self) -> PerturbationLoader | list:
        """Validation batches; none without validation cells."""
        return self._val if self._val is not None else []
