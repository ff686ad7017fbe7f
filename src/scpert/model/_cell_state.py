"""CellState: a deep autoencoder of expression, and virtual experiments with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.data import AnnDataManager
from torch import Tensor

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_positive, check_seed, check_unique_names, listing
from .._progress import progress
from ..errors import MissingKeyError, ScaleError, ScpertError, SplitError
from ..module._cell_state import CellStateModule
from ._base import BaseModel
from ._cell_state_data import EXPRESSION, ExpressionField, ExpressionReader, expression_scale, open_backed, row_blocks
from ._cell_state_fit import closed_form_start, fit, group_folds, pca_imputed, principal_axes
from ._cell_state_regulators import Regulators
from ._cell_state_stats import auroc, imputation_scores

__all__ = ["CellState"]

logger = logging.getLogger("scpert")

#: Training rows are kept in memory, standardised, below this size; above it they are read block by block.
MEMORY_LIMIT = 2 * 1024**3
#: From this width of the first layer on (and at least the number of genes), there is no linear path by default.
WIDE = 4096
#: Rows that the closed-form start looks at.
START_ROWS = 4000


class CellState(Regulators, BaseModel):
    r"""Deep denoising autoencoder of bulk or single-cell expression, with virtual gene manipulation.

    It learns which expression goes with which: **conditional association, not causation**. A manipulation says what
    else the model expects in a profile in which a gene is changed; it is a hypothesis to be tested at the bench.

    Parameters
    ----------
    adata
        Samples or cells by genes, set up with :meth:`setup_anndata`. No perturbation labels are needed.
    hidden
        Widths of the encoder's layers, from the genes inwards; the decoder mirrors them. Any number of them.
    n_latent
        Width of the bottleneck. Default: 64, or a quarter of the training samples if that is less.
    linear
        Whether a linear path runs beside the residual stacks; started at the principal axes. Default: unless the
        first layer is as wide as the genes and 4,096 or more.
    head
        ``"gaussian"`` (any scale) or ``"nb"`` (counts).
    mask
        Least and greatest share of the genes that are hidden from the encoder in a training batch.
    noise_floor
        The scale of a gene is :math:`\sqrt{s_g^2 + (f \bar s)^2}` with its standard deviation :math:`s_g`, the root
        mean square :math:`\bar s` over genes and this :math:`f`: genes that hardly vary are not blown up.
    dropout
        Share of hidden units dropped in training.
    checkpointing
        Recompute activations in the backward pass: less memory, a third more time.
    n_genes
        Number of genes of the sizes in :attr:`PUBLISHED`; the data decide, a difference is logged.
    adapter_rank, n_source
        Set by :meth:`fine_tune`: width of the adapter; samples that the source model was fitted to.
    random_state
        Seed of the weights.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=200, n_genes=40, n_targets=5)
    >>> scpert.model.CellState.setup_anndata(adata)
    >>> model = scpert.model.CellState(adata, hidden=(32,), n_latent=8)
    >>> model.train(max_epochs=2)
    >>> knocked = model.manipulate(adata, adata.var_names[0])
    >>> knocked.layers["delta"].shape
    (200, 40)
    """

    #: Sizes of the published network: 1.18 billion weights.
    PUBLISHED: Mapping[str, Any] = MappingProxyType(
        {"n_genes": 19383, "hidden": (20000, 8000, 4000, 2000), "n_latent": 1000}
    )
    scope = "manipulation"

    def __init__(
        self,
        adata: AnnData | None = None,
        hidden: Sequence[int] = (1024,),
        n_latent: int | None = None,
        *,
        linear: bool | None = None,
        head: str = "gaussian",
        mask: tuple[float, float] = (0.15, 0.3),
        noise_floor: float = 0.5,
        dropout: float = 0.1,
        checkpointing: bool = False,
        n_genes: int | None = None,
        adapter_rank: int | None = None,
        n_source: int = 0,
        random_state: int = 0,
        registry: dict | None = None,
    ):
        random_state = check_seed(random_state)
        super().__init__(adata, registry)
        hidden = tuple(int(check_positive("hidden", h)) for h in np.atleast_1d(np.asarray(hidden)).tolist())
        if not hidden:
            raise ScpertError("hidden=() has no layer: give at least one width, such as hidden=(1024,).")
        mask = (float(check_fraction("mask", mask[0])), float(check_fraction("mask", mask[1])))
        if mask[0] > mask[1] or mask[1] >= 1:
            raise ScpertError(
                f"mask={mask}: give the least and the greatest share of hidden genes, such as (0.15, 0.3)."
            )
        check_choice("head", head, ("gaussian", "nb"))
        check_positive("noise_floor", noise_floor)
        self._remember(locals())
        state = self.registry_["field_registries"][EXPRESSION]["state_registry"]
        self.setup_args_: dict[str, Any] = dict(self.registry_["setup_args"])
        self.genes_: list[str] = list(state["genes"])
        self.scale_: str = state["scale"]
        self.target_sum_: float = float(state["target_sum"])
        self._layer: str | None = state["layer"]
        n_train = int(state["n_train"])
        if head == "nb" and self.scale_ != K.SCALE_COUNTS:
            raise ScaleError(f"head='nb' needs counts; the model was set up with {self.scale_!r}. Use head='gaussian'.")
        if n_latent is None:
            n_latent = int(max(1, min(64, n_train // 4, len(self.genes_) // 2)))
        check_positive("n_latent", n_latent)
        if n_latent >= n_train + n_source:
            raise ScpertError(
                f"n_latent={n_latent} but there are {n_train} training samples: a bottleneck as wide as the data memorises "
                f"them. Choose n_latent below {n_train}, or leave it out."
            )
        if n_genes is not None and n_genes != len(self.genes_):
            logger.info("sizes are for %d genes, the data have %d: the data decide", n_genes, len(self.genes_))
        self.n_latent = int(n_latent)
        self.hidden = hidden
        self.mask = mask
        self.noise_floor = float(noise_floor)
        if linear is None:
            linear = hidden[0] < max(len(self.genes_), WIDE)
        with self._seeded(random_state):
            self.module = CellStateModule(
                len(self.genes_),
                hidden,
                self.n_latent,
                linear=bool(linear),
                head=head,
                dropout=dropout,
                checkpointing=checkpointing,
                adapter_rank=adapter_rank,
            )
        self.module.target_sum.fill_(self.target_sum_)
        self.module.eval()

    # ------------------------------------------------------------------------------------------ data

    open_backed = staticmethod(open_backed)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        scale: str = "auto",
        group_key: str | None = None,
        split_key: str | None = None,
    ) -> None:
        """Tell the model where the values are; no labels are needed.

        Parameters
        ----------
        adata
            Samples or cells by genes, in memory, backed or lazy.
        layer
            Where the values are; ``layers["counts"]`` if it is there, else ``X``.
        scale
            ``"counts"`` (they become ``log1p`` of counts per 10,000, of bulk samples per million), ``"linear"`` (TPM,
            RSEM, FPKM; they become ``log1p``), ``"log1p"`` (used as they are; logs of another base too) or ``"auto"``:
            decided by evidence that is logged, refused where ambiguous.
        group_key
            Column of the groups that must not be torn apart by a split: patients, studies.
        split_key
            Column with ``train``, ``val``, ``test``: only ``train`` (and ``val``) is learned from.

        Raises
        ------
        ScaleError
            If values are negative, or TPM, counts and logs are confused.
        ScpertError, MissingKeyError
            If genes are named twice, or a column is missing or unusable.
        """
        arguments: dict[str, Any] = {"layer": layer, "scale": scale, "group_key": group_key, "split_key": split_key}
        if adata.is_view:
            adata._init_as_actual(adata.copy())
        manager = AnnDataManager(
            fields=[ExpressionField(**arguments)],
            setup_method_args={
                "model_name": cls.__name__,
                "setup_method_name": "setup_anndata",
                "setup_args": arguments,
            },
        )
        cls._own_identity(adata)
        manager.register_fields(adata)
        cls.register_manager(manager)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.genes_)

    @property
    def n_weights(self) -> int:
        """Number of trainable weights."""
        return self.module.n_weights

    def _summary(self) -> str:
        return f"{self.n_genes} genes, hidden {self.hidden}, {self.n_latent} latent, {self.n_weights:,} weights"

    def get_var_names(self, legacy_mudata_format: bool = False) -> dict:
        """Names of the genes, as scvi-tools wants them."""
        return {"X": np.asarray(self.genes_, dtype=object)}

    def _attach(self, adata: AnnData) -> None:
        missing = [g for g in self.genes_ if g not in set(adata.var_names)]
        if missing:
            raise MissingKeyError(self._missing_message(missing, adata))
        if list(adata.var_names) != self.genes_:
            adata = adata[:, self.genes_].copy()
        arguments = {**self.setup_args_, "scale": self.scale_}
        for key in ("group_key", "split_key"):
            if arguments[key] is not None and arguments[key] not in adata.obs:
                arguments[key] = None
        type(self).setup_anndata(adata, **arguments)
        self._adata = adata
        self._adata_manager = self._get_most_recent_anndata_manager(adata, required=True)
        self._register_manager_for_instance(self._adata_manager)

    def _missing_message(self, missing: list[str], adata: AnnData) -> str:
        return (
            f"{len(missing)} of the model's {self.n_genes} genes are not in adata.var_names: {listing(missing, 6)}. They "
            f"are not filled with zeros; adata has genes such as {listing(adata.var_names[:3])}. Rename them, or carry "
            "the model over to these genes with model.fine_tune(adata, task='reconstruction')."
        )

    def _reader(self, adata: AnnData | None = None) -> ExpressionReader:
        """A checked view on data with the model's genes in the model's order."""
        if adata is None:
            if self.adata is None:
                raise ScpertError("This CellState was loaded without data: pass adata=.")
            return ExpressionReader(self.adata, self._layer, self.scale_, self.target_sum_)
        check_unique_names(adata)
        layer = self._layer
        if layer is not None and layer not in adata.layers:
            raise MissingKeyError(f"The model reads layers[{layer!r}], which adata does not have.")
        if list(adata.var_names) != self.genes_:
            have = set(adata.var_names)
            missing = [g for g in self.genes_ if g not in have]
            if missing:
                raise MissingKeyError(self._missing_message(missing, adata))
            adata = adata[:, self.genes_]
            adata = adata.to_memory() if adata.isbacked else adata.copy()
        X = adata.X if layer is None else adata.layers[layer]
        expression_scale(X, self.scale_, "adata.X" if layer is None else f"adata.layers[{layer!r}]")
        return ExpressionReader(adata, layer, self.scale_, self.target_sum_)

    def _split_rows(self, train_size: float, random_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of training and validation rows, and the group of each row."""
        adata = self.adata
        n = adata.n_obs
        key = self.setup_args_["group_key"]
        groups = adata.obs[key].astype(str).to_numpy() if key is not None else np.arange(n).astype(str)
        split = self.setup_args_["split_key"]
        if split is not None:
            label = adata.obs[split].astype(str).to_numpy()
            train, val = np.flatnonzero(label == K.TRAIN), np.flatnonzero(label == K.VAL)
            if key is not None:
                shared = set(groups[label == K.TEST]) & set(groups[label != K.TEST])
                if shared:
                    logger.warning(
                        "%d groups of %r are in the test rows and in the training rows: the test is not independent (%s)",
                        len(shared),
                        key,
                        listing(sorted(shared), 3),
                    )
        else:
            train, val = np.arange(n), np.array([], dtype=int)
        if len(val) == 0 and train_size < 1.0:
            rng = np.random.default_rng(random_state)
            n_folds = max(2, round(1.0 / (1.0 - train_size)))
            if len(np.unique(groups[train])) >= 3 and len(train) >= 10:
                fold = group_folds(groups[train], n_folds, rng)
                if (fold != 0).sum() > self.n_latent:
                    train, val = train[fold != 0], train[fold == 0]
        if len(train) <= self.n_latent:
            raise ScpertError(
                f"{len(train)} training samples are left for n_latent={self.n_latent}: fewer samples than the bottleneck. "
                "Choose a smaller n_latent."
            )
        return train, val, groups

    # ------------------------------------------------------------------------------------------ training

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        devices: Any = "auto",
        batch_size: int | None = None,
        early_stopping: bool = True,
        early_stopping_patience: int = 2,
        train_size: float = 0.9,
        start: str | None = None,
        refit: bool | None = None,
        lr: float | None = None,
        weight_decay: float = 1e-2,
        optimizer: str = "auto",
        precision: str = "auto",
        masked_weight: float = 1.0,
        random_state: int = 0,
    ) -> None:
        """Fit the autoencoder.

        Parameters
        ----------
        max_epochs
            Passes over the training samples. Default: as many as give 20,000 batches, between 10 and 100.
        accelerator, devices
            ``"auto"``, ``"cpu"`` or ``"gpu"``; one device is used.
        batch_size
            Samples per step; default 32 below 1,000 samples, else 256.
        early_stopping
            Stop when the error at masked genes of the validation groups no longer falls.
        early_stopping_patience
            Epochs to wait.
        train_size
            Share of the groups to train on, where the split has no ``val`` rows; the rest validates.
        start
            ``"closed_form"``: principal axes for the linear path and a ridge regression for the output layer, both from
            training rows only; ``"random"``. Default: closed form where there is a linear path.
        refit
            Fit once more on training and validation rows, for the number of epochs found. Default: where the split
            has ``test`` rows; elsewhere validation rows stay unseen for :meth:`evaluate`.
        lr
            Learning rate; default 1e-5 after a closed-form start below 2,000 samples, else 1e-4 (wide) or 1e-3.
        weight_decay
            Of AdamW.
        optimizer
            ``"adamw"``, ``"adafactor"`` or ``"auto"``: Adafactor above 200 million weights. Its state is one number a row
            and a column of each matrix instead of two a weight: 1.18 billion weights then need 4.7 GB of weights, as much
            for gradients and a few MB of state, where AdamW needs 9.4 GB more.
        precision
            ``"32"``, ``"bf16"`` or ``"auto"``: bf16 autocast on a GPU.
        masked_weight
            Weight of the masked genes in the loss; the observed ones weigh 1.
        random_state
            Seed of splits, masks and batches.
        """
        random_state = check_seed(random_state)
        if self.adata is None:
            raise ScpertError("This CellState was loaded without data: pass adata= to load().")
        check_choice("optimizer", optimizer, ("auto", "adamw", "adafactor"))
        check_choice("precision", precision, ("auto", "32", "bf16"))
        check_fraction("train_size", train_size)
        if max_epochs is not None:
            check_positive("max_epochs", max_epochs)
        start = start or ("closed_form" if self.module.linear else "random")
        check_choice("start", start, ("closed_form", "random"))
        if start == "closed_form" and not self.module.linear:
            raise ScpertError("start='closed_form' needs the linear path: make the model with linear=True.")
        device = _device(accelerator)
        train, val, groups = self._split_rows(train_size, random_state)
        split = self.setup_args_["split_key"]
        has_test = split is not None and bool((self.adata.obs[split].astype(str) == K.TEST).any())
        refit = bool(has_test and len(val)) if refit is None else bool(refit and len(val))
        initial = {k: v.detach().clone() for k, v in self.module.state_dict().items()} if refit else None
        if lr is None:
            lr = (
                (1e-5 if len(train) < 2000 else 1e-4)
                if start == "closed_form"
                else (1e-4 if self.hidden[0] > 2000 else 1e-3)
            )
        batch_size = int(check_positive("batch_size", batch_size or (32 if len(train) < 1000 else 256)))
        if max_epochs is None:
            max_epochs = int(np.clip(20_000 * batch_size // max(len(train), 1), 10, 100))
        options: dict[str, Any] = {
            "device": device,
            "lr": lr,
            "weight_decay": weight_decay,
            "optimizer": ("adafactor" if self.n_weights > 2e8 else "adamw") if optimizer == "auto" else optimizer,
            "mask": self.mask,
            "masked_weight": masked_weight,
            "patience": early_stopping_patience,
            "precision": ("bf16" if device.type == "cuda" else "32") if precision == "auto" else precision,
            "seed": random_state,
        }
        self.is_trained_ = True  # from here on the module is usable, also after an interruption
        with self._seeded(random_state):
            self.history_, self.best_epoch_ = self._fit_rows(
                train,
                val,
                groups,
                start,
                batch_size,
                max_epochs=int(max_epochs),
                early_stopping=early_stopping,
                **options,
            )
            if refit and initial is not None:
                self.module.load_state_dict(initial)
                rows = np.sort(np.concatenate([train, val]))
                self._fit_rows(
                    rows,
                    rows[:0],
                    groups,
                    start,
                    batch_size,
                    max_epochs=self.best_epoch_ + 1,
                    early_stopping=False,
                    **options,
                )
        seen = np.concatenate([train, val]) if refit else train
        self.module.to("cpu")
        self.module.eval()
        self._learn_reference(np.sort(seen), groups)

    def _fit_rows(
        self, train: np.ndarray, val: np.ndarray, groups: np.ndarray, start: str, batch_size: int, **options: Any
    ) -> tuple[dict[str, pd.DataFrame], int]:
        reader = self._reader()
        rng = np.random.default_rng(options["seed"])
        self._standardise(reader, train)
        module = self.module.to("cpu")
        in_memory = len(train) * self.n_genes * 4 <= MEMORY_LIMIT
        needs_counts = module.head == "nb"
        if start == "closed_form":
            some = train if len(train) <= START_ROWS else np.sort(rng.choice(train, START_ROWS, replace=False))
            closed_form_start(module, self._values(reader, some), groups[some], rng, self.mask)

        def load(rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
            raw = reader.raw(rows)
            y = torch.from_numpy((reader.log(raw) - self._mean) / self._scale)
            return y, torch.from_numpy(raw) if needs_counts else None

        kept = load(train) if in_memory else None
        kept_val = load(val) if len(val) and in_memory else None

        def batches(rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor | None]]:
            if kept is not None:
                for part in np.array_split(rng.permutation(len(train)), max(1, len(train) // batch_size)):
                    yield kept[0][part], None if kept[1] is None else kept[1][part]
                return
            # out of core: runs of rows in random order, shuffled within a pool of at most half the memory limit
            run = max(1, batch_size // 4)
            runs = [train[s : s + run] for s in range(0, len(train), run)]
            pool = max(1, int(MEMORY_LIMIT / 2 / (4 * self.n_genes * run)))
            order = rng.permutation(len(runs))
            for s in range(0, len(order), pool):
                y, counts = load(np.concatenate([runs[i] for i in order[s : s + pool]]))
                for part in np.array_split(rng.permutation(len(y)), max(1, len(y) // batch_size)):
                    yield y[part], None if counts is None else counts[part]

        def validation() -> Iterator[tuple[Tensor, Tensor | None]]:
            for part in row_blocks(len(val), max(batch_size, 64)):
                if kept_val is not None:
                    yield kept_val[0][part], None if kept_val[1] is None else kept_val[1][part]
                else:
                    yield load(val[part])

        if options["max_epochs"] == 0:
            module.eval()
            return {}, -1
        return fit(module, batches, validation if len(val) else None, evaluate_start=start == "closed_form", **options)

    def _standardise(self, reader: ExpressionReader, rows: np.ndarray) -> None:
        """Mean and scale of each gene over the training rows, in one pass."""
        total, square = np.zeros(self.n_genes), np.zeros(self.n_genes)
        low: Any = np.inf
        high: Any = -np.inf
        blocks = row_blocks(len(rows), 512)
        for part in progress(blocks, total=len(blocks), description="gene statistics", unit="block"):
            values = reader.rows(rows[part]).astype(np.float64)
            total += values.sum(axis=0)
            square += (values**2).sum(axis=0)
            low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
        mean = total / len(rows)
        sd = np.sqrt(np.maximum(square / len(rows) - mean**2, 0.0))
        typical = float(np.sqrt(np.mean(sd**2)))
        if typical == 0:
            raise ScpertError("All training samples are equal: there is nothing to learn.")
        constant = int((np.asarray(high) <= np.asarray(low)).sum())
        if constant:
            logger.info("%d genes are constant in the training samples: nothing is learned about them", constant)
        scale = np.sqrt(sd**2 + (self.noise_floor * typical) ** 2)
        with torch.no_grad():
            self.module.mean.copy_(torch.from_numpy(mean))
            self.module.scale.copy_(torch.from_numpy(scale))
            if self.module.head == "nb":  # zero in, the mean of the logs out: the unit of the linear path
                level = torch.from_numpy(np.maximum(np.expm1(mean), 1e-2))
                self.module.log_fraction.copy_(torch.log(level / level.sum()))
        self.__dict__.pop("_cache", None)
        self.range_ = np.stack([low, high, sd]).astype(np.float32)

    @property
    def _mean(self) -> np.ndarray:
        return self.module.mean.cpu().numpy()

    @property
    def _scale(self) -> np.ndarray:
        return self.module.scale.cpu().numpy()

    def _values(self, reader: ExpressionReader, rows: np.ndarray) -> Tensor:
        """Standardised log expression of some rows."""
        return torch.from_numpy((reader.rows(rows) - self._mean) / self._scale)

    def _learn_reference(self, rows: np.ndarray, groups: np.ndarray) -> None:
        """Remember which samples were learned from and how far they lie from their reconstructions."""
        reader = self._reader()
        names = np.asarray(self.adata.obs_names, dtype=object)
        self.train_names_ = names[rows]
        rng = np.random.default_rng(0)
        some = rows if len(rows) <= 2000 else np.sort(rng.choice(rows, 2000, replace=False))
        latent, error, total = [], [], []
        with torch.no_grad():
            for part in row_blocks(len(some), 64):
                raw = reader.raw(some[part])
                total.append(raw.sum(axis=1, dtype=np.float64))
                y = torch.from_numpy((reader.log(raw) - self._mean) / self._scale)
                z = self.module.encode(y)
                latent.append(z.numpy())
                error.append((self.module.decode(z) - y).square().mean(dim=1).sqrt().numpy())
        z = np.concatenate(latent).astype(np.float64)
        centre = z.mean(axis=0)
        cov = _shrunk_cov(z)
        at_depth = z
        if self.scale_ == K.SCALE_COUNTS:  # logs of counts depend on the total of the sample, whatever its state
            depth = np.vander(np.log(np.concatenate(total)), 3)
            at_depth = z - depth @ np.linalg.lstsq(depth, z, rcond=None)[0]
        distance = np.sqrt(np.einsum("nk,kl,nl->n", z - centre, np.linalg.inv(cov), z - centre))
        log_error = np.log(np.concatenate(error) + 1e-8)
        self.reference_ = {
            "centre": centre,
            "cov": cov,
            "cov_at_depth": _shrunk_cov(at_depth),
            "distance": np.array([np.median(distance), max(_mad(distance), 1e-3)]),
            "error": np.array([np.median(log_error), max(_mad(log_error), 0.05)]),
        }

    # ------------------------------------------------------------------------------------------ read-outs

    def _blocks(self, n: int, batch_size: int | None, description: str) -> Iterator[np.ndarray]:
        blocks = row_blocks(n, int(check_positive("batch_size", batch_size or 256)))
        return progress(blocks, total=len(blocks), description=description, unit="batch")

    def get_latent_representation(self, adata: AnnData | None = None, *, batch_size: int | None = None) -> np.ndarray:
        """Latent state of each sample, float32 ``(sample, latent)``."""
        self._check_trained()
        reader = self._reader(adata)
        with torch.no_grad():
            parts = [
                self.module.encode(self._values(reader, rows).to(self.device)).cpu().numpy()
                for rows in self._blocks(reader.shape[0], batch_size, "encode")
            ]
        return np.concatenate(parts).astype(np.float32)

    def reconstruct(
        self, adata: AnnData | None = None, *, hidden: np.ndarray | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Reconstructed log expression, float32 ``(sample, gene)``.

        Parameters
        ----------
        adata
            Samples; by default those of the model.
        hidden
            Boolean ``(sample, gene)``: entries that the encoder does not see; they are imputed.
        batch_size
            Samples per batch.
        """
        self._check_trained()
        reader = self._reader(adata)
        if hidden is not None and tuple(np.shape(hidden)) != tuple(reader.shape):
            raise ScpertError(f"hidden has the shape {np.shape(hidden)}, the data {tuple(reader.shape)}.")
        out = np.empty(reader.shape, dtype=np.float32)
        with torch.no_grad():
            for rows in self._blocks(reader.shape[0], batch_size, "reconstruct"):
                y = self._values(reader, rows).to(self.device)
                observed = None if hidden is None else torch.from_numpy(~hidden[rows]).float().to(self.device)
                out[rows] = self.module(y, observed).cpu().numpy() * self._scale + self._mean
        return out

    # ------------------------------------------------------------------------------------------ evaluation

    def _held_out(self) -> np.ndarray:
        key = self.setup_args_["split_key"]
        if key is not None:
            test = np.flatnonzero((self.adata.obs[key].astype(str) == K.TEST).to_numpy())
            if len(test):
                return test
        rest = np.flatnonzero(~np.isin(np.asarray(self.adata.obs_names, dtype=object), self.train_names_))
        if len(rest) == 0:
            raise SplitError(
                "No sample was held out, so nothing can be evaluated honestly. Train with train_size below 1, give a "
                "split_key with 'test' rows, or pass other samples to evaluate(adata)."
            )
        return rest

    def evaluate(
        self,
        adata: AnnData | None = None,
        *,
        mask_fraction: float = 0.25,
        n_neighbors: Sequence[int] = (5, 10, 20),
        n_boot: int = 500,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """How well held-out samples are reconstructed and imputed, beside methods without any network.

        Parameters
        ----------
        adata
            Samples that the model has not seen. By default the ``test`` rows, or (without a split) the validation
            groups, which have decided when to stop but were not fitted. Training samples are left out by name.
        mask_fraction
            Share of the genes hidden for the imputation.
        n_neighbors
            Numbers of neighbours; the best of them **on the held-out samples** is reported, in favour of the baseline.
        n_boot
            Bootstrap samples for the limits.
        random_state
            Seed of the masks and the bootstrap.

        Returns
        -------
        DataFrame with the rows ``model``, ``pca`` (same bottleneck), ``pca_<k>`` (smaller), ``gene_mean``,
        ``neighbours`` and the columns

        - ``r2_pooled``: over all entries around the grand mean (high for the gene mean: it says little);
        - ``r2_gene``: median over genes of the R2 around the training mean; ``r2_centred``: pooled over all entries;
        - ``r2_imputed``: pooled over hidden entries around the training mean, with 95 % limits over samples
          (``r2_imputed_lower``, ``r2_imputed_upper``); ``r2_imputed_gene``: its median over genes;
        - ``imputed_ahead_lower``: lower 95 % limit of the model's ``r2_imputed`` minus this row's, paired by sample;
        - ``sample_correlation``: mean correlation of samples, centred by the training mean;
        - ``detection_auroc``: mean over genes detected in 10-90 % of the samples, of telling detected from not;
        - ``rmse``: on the log scale.

        ``attrs["by_expression"]`` has error, share within 25 % and imputation R2 by bin of expression, each method.

        Notes
        -----
        PCA imputes by least squares on the observed genes of each sample. All baselines are fitted to the samples
        that the model was fitted to, in the same standardised unit; figures are on the log scale.
        """
        random_state = check_seed(random_state)
        self._check_trained()
        if self.adata is None:
            raise ScpertError("evaluate() compares with methods fitted to the training samples: load with adata=.")
        own = self._reader()
        train = np.flatnonzero(np.isin(np.asarray(self.adata.obs_names, dtype=object), self.train_names_))
        if adata is None:
            reader, rows = own, self._held_out()
        else:
            reader = self._reader(adata)
            rows = np.arange(adata.n_obs)
            known = np.isin(np.asarray(adata.obs_names, dtype=object), self.train_names_)
            if known.any():
                known[known] = self._same_rows(own, train, reader, rows[known], adata)
            if known.all():
                raise SplitError("All samples given were trained on: an evaluation on them would mean nothing.")
            if known.any():
                logger.warning("%d of %d samples were trained on and are left out", int(known.sum()), len(known))
                rows = rows[~known]
        if len(rows) > 2000:
            rows = np.sort(np.random.default_rng(random_state).choice(rows, 2000, replace=False))
        if len(train) > START_ROWS:
            train = np.sort(np.random.default_rng(random_state).choice(train, START_ROWS, replace=False))
        rng = np.random.default_rng(random_state)
        Z, Y = self._values(own, train), self._values(reader, rows)
        centre = Z.mean(dim=0, keepdim=True)
        hidden = rng.random(tuple(Y.shape)) < mask_fraction
        observed = torch.from_numpy(~hidden)
        full: dict[str, np.ndarray] = {}
        imputed: dict[str, np.ndarray] = {}
        with torch.no_grad():
            parts = row_blocks(len(rows), 64)
            full["model"] = np.concatenate([self.module(Y[p]).numpy() for p in parts])
            imputed["model"] = np.concatenate([self.module(Y[p], observed[p].float()).numpy() for p in parts])
            sizes = [k for k in (self.n_latent, *(self.n_latent // d for d in (2, 4, 8))) if 0 < k < len(train)]
            axes = principal_axes(Z - centre, max(sizes, default=1))
            for k in dict.fromkeys(sizes):
                name = "pca" if k == self.n_latent else f"pca_{k}"
                V = axes[:, :k]
                full[name] = ((Y - centre) @ V @ V.T + centre).numpy()
                imputed[name] = pca_imputed(V, centre[0], Y, observed).numpy()
        full["gene_mean"] = np.broadcast_to(centre.numpy(), tuple(Y.shape))
        imputed["gene_mean"] = full["gene_mean"]
        full["neighbours"] = self._best_neighbours(Z, Y, None, n_neighbors)
        imputed["neighbours"] = self._best_neighbours(Z, Y, hidden, n_neighbors)
        return self._score(full, imputed, Y.numpy(), hidden, centre.numpy(), rng, n_boot)

    @staticmethod
    def _same_rows(
        own: ExpressionReader, train: np.ndarray, other: ExpressionReader, rows: np.ndarray, adata: AnnData
    ) -> np.ndarray:
        """Whether rows of other data with a training sample's name have its values too."""
        place = pd.Index(adata.obs_names).to_numpy()[rows]
        mine = dict(zip(own.names[train], train, strict=True))
        out = np.empty(len(rows), dtype=bool)
        for part in row_blocks(len(rows), 200):
            a = own.rows(np.array([mine[name] for name in place[part]]))
            out[part] = np.abs(a - other.rows(rows[part])).max(axis=1) < 1e-3
        return out

    def _best_neighbours(self, Z: Tensor, Y: Tensor, hidden: np.ndarray | None, numbers: Sequence[int]) -> np.ndarray:
        o = torch.ones_like(Y) if hidden is None else torch.from_numpy(~hidden).float()
        distance = ((o * Y).square().sum(1)[:, None] - 2 * (o * Y) @ Z.T + o @ Z.square().T).numpy()
        order = np.argsort(distance, axis=1)
        Zn, truth = Z.numpy(), Y.numpy()
        best, error = np.zeros(tuple(Y.shape), dtype=np.float32), np.inf
        for k in numbers:
            if k > len(Zn):
                continue
            guess = np.stack([Zn[row[:k]].mean(axis=0) for row in order])
            each = (guess - truth) ** 2
            value = float(each.mean() if hidden is None else each[hidden].mean())
            if value < error:
                best, error = guess, value
        return best

    def _score(
        self,
        full: dict[str, np.ndarray],
        imputed: dict[str, np.ndarray],
        Y: np.ndarray,
        hidden: np.ndarray,
        centre: np.ndarray,
        rng: np.random.Generator,
        n_boot: int,
    ) -> pd.DataFrame:
        scale, mean = self._scale, self._mean
        truth = (Y - centre) * scale
        level = Y * scale + mean
        total = float(((level - level.mean()) ** 2).sum())
        varies = truth.std(axis=0) > 1e-6
        threshold = float(np.log1p(1.0)) if self.scale_ == "linear" else 0.0
        detected = level > threshold
        share = detected.mean(axis=0)
        low = (share >= 0.1) & (share <= 0.9)
        draws = rng.integers(0, len(Y), size=(n_boot, len(Y))) if n_boot else np.zeros((0, len(Y)), dtype=int)
        table, bins, boot = {}, [], {}
        edges = (
            np.quantile(level[level > threshold], [0.0, 0.25, 0.5, 0.75, 1.0]) if (level > threshold).any() else [0, 1]
        )
        edges = np.unique(np.concatenate([[-np.inf], edges]))
        edges[-1] = np.inf
        which = np.digitize(level, edges[1:-1])
        for name, guess in full.items():
            g = (guess - centre) * scale
            h = (imputed[name] - centre) * scale
            residual = g - truth
            with np.errstate(invalid="ignore", divide="ignore"):
                per_gene = 1.0 - (residual**2).sum(axis=0) / (truth**2).sum(axis=0)
                lost = np.where(hidden, (h - truth) ** 2, 0.0).sum(axis=0) / np.where(hidden, truth**2, 0.0).sum(axis=0)
                norm = np.linalg.norm(g - g.mean(1, keepdims=True), axis=1) * np.linalg.norm(
                    truth - truth.mean(1, keepdims=True), axis=1
                )
                correlation = ((g - g.mean(1, keepdims=True)) * (truth - truth.mean(1, keepdims=True))).sum(1) / norm
            error, base = imputation_scores(h, truth, hidden)
            boot[name] = 1.0 - error[draws].sum(axis=1) / base[draws].sum(axis=1)
            limits = np.quantile(boot[name], [0.025, 0.975]) if n_boot else [np.nan, np.nan]
            area = auroc(detected[:, low], (guess * scale + mean)[:, low]) if low.any() else np.array([np.nan])
            table[name] = {
                "r2_pooled": 1.0 - float((residual**2).sum()) / total,
                "r2_gene": float(np.nanmedian(per_gene[varies])),
                "r2_centred": 1.0 - float((residual**2).sum() / (truth**2).sum()),
                "r2_imputed": 1.0 - float(error.sum() / base.sum()),
                "r2_imputed_lower": float(limits[0]),
                "r2_imputed_upper": float(limits[1]),
                "r2_imputed_gene": float(1.0 - np.nanmedian(lost[varies])),
                "imputed_ahead_lower": float(np.quantile(boot["model"] - boot[name], 0.025)) if n_boot else np.nan,
                "sample_correlation": float(np.nanmean(correlation)) if np.isfinite(correlation).any() else 0.0,
                "detection_auroc": float(np.nanmean(area)) if np.isfinite(area).any() else np.nan,
                "rmse": float(np.sqrt((residual**2).mean())),
            }
            value = guess * scale + mean
            for b in range(len(edges) - 1):
                here = which == b
                if not here.any():
                    continue
                both = here & hidden
                bins.append(
                    {
                        "method": name,
                        "from": float(edges[b]),
                        "to": float(edges[b + 1]),
                        "n": int(here.sum()),
                        "rmse": float(np.sqrt(((value - level)[here] ** 2).mean())),
                        "within_25_percent": float(
                            (
                                np.abs(np.expm1(np.clip(value[here], 0, 50)) - np.expm1(level[here]))
                                <= 0.25 * np.expm1(level[here])
                            ).mean()
                        ),
                        "r2_imputed": 1.0
                        - float(((h - truth)[both] ** 2).sum() / max((truth[both] ** 2).sum(), 1e-12)),
                    }
                )
        out = pd.DataFrame(table).T
        out.index.name = "method"
        out.attrs["by_expression"] = pd.DataFrame(bins).to_dict("list")
        out.attrs["n_samples"] = len(Y)
        out.attrs["n_genes"] = int(varies.sum())
        return out

    # ------------------------------------------------------------------------------------------ files

    def _get_state(self) -> dict[str, Any]:
        return {
            "train_names": np.asarray(self.train_names_, dtype=object),
            "reference": self.reference_,
            "range": self.range_,
            "extra": getattr(self, "extra_", {}),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        self.train_names_ = state["train_names"]
        self.reference_ = state["reference"]
        self.range_ = state["range"]
        self.extra_ = state["extra"]


def _shrunk_cov(z: np.ndarray) -> np.ndarray:
    """Covariance of the columns, shrunken a little towards a multiple of the identity."""
    k = z.shape[1]
    cov = np.cov(z.T).reshape(k, k)
    return 0.95 * cov + 0.05 * np.eye(k) * max(float(np.trace(cov)) / k, 1e-8)


def _mad(x: np.ndarray) -> float:
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))


def _device(accelerator: str) -> torch.device:
    check_choice("accelerator", accelerator, ("auto", "cpu", "gpu", "cuda"))
    has = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has:
        raise ScpertError(f"accelerator={accelerator!r} but torch sees no GPU. Use accelerator='cpu' or 'auto'.")
    return torch.device("cuda" if has and accelerator != "cpu" else "cpu")
