"""What all models share: setup, training, prediction, files. The only file that touches scvi-tools' private parts."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass
from scvi.train import TrainingPlan, TrainRunner

from .. import _keys as K
from .._checks import (
    check_choice,
    check_fraction,
    check_positive,
    check_seed,
    check_unique_names,
    check_whole,
    listing,
    suggest,
)
from .._progress import progress
from .._settings import settings
from ..data._effects import Effects, need_controls
from ..data._field import REGISTRY_KEY, PerturbationField, covariate_codes
from ..data._loader import PerturbationSplitter, ScreenTensors
from ..data._perturbation import canonical, encode, join, parse
from ..data._screen import Screen, cell_hashes, log1p_cp10k
from ..errors import FileFormatError, LabelError, MissingKeyError, NotTrainedError, ScpertError, UnknownTargetError
from ._io import load_directory, save_directory

if TYPE_CHECKING:
    import os

    from mudata import MuData

__all__ = ["BaseModel", "ClosedFormModel", "PerturbationModel", "Prediction", "Reference"]

logger = logging.getLogger("scpert")

#: A model keeps at most this many control cells, so that it can predict without its AnnData.
MAX_REFERENCE_CELLS = 1000


# ---------------------------------------------------------------------------------------------- all models


class _BestState(lightning.Callback):
    """Keeps the weights with the lowest validation loss and puts them back, also after an interruption."""

    def __init__(self, module: torch.nn.Module, monitor: str):
        self.module, self.monitor = module, monitor
        self.best, self.epoch = np.inf, -1
        self.state: dict[str, torch.Tensor] | None = None
        self.interrupted = False

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and float(value) < self.best:
            self.best, self.epoch = float(value), trainer.current_epoch
            self.state = {k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)

    def restore(self) -> None:
        if self.state is not None:
            self.module.load_state_dict(self.state)


class _Plan(TrainingPlan):
    """scvi-tools' plan with metrics summed over the epoch and logged once: logging each step cost as much as training."""

    def _start(self, mode: str) -> None:
        self._sums: dict[str, dict[str, torch.Tensor]] = {**getattr(self, "_sums", {}), mode: {}}
        self._n_cells: dict[str, int] = {**getattr(self, "_n_cells", {}), mode: 0}

    def _step(self, batch: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        if "kl_weight" in self.loss_kwargs:
            self.loss_kwargs["kl_weight"] = self.kl_weight
        output = self.module(batch, loss_kwargs=self.loss_kwargs)[2]
        n = output.n_obs_minibatch
        with torch.no_grad():
            loss = output.loss.detach()
            parts = {
                f"reconstruction_loss_{mode}": output.reconstruction_loss_sum,
                f"kl_local_{mode}": output.kl_local_sum,
                f"kl_global_{mode}": output.kl_global_sum * n / max(self.n_obs_training or 1, 1),
                f"{mode}_loss": loss * n,
                **{f"{k}_{mode}": torch.as_tensor(v).detach() * n for k, v in output.extra_metrics.items()},
            }
            sums = self._sums[mode]
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + torch.as_tensor(value).detach()
        self._n_cells[mode] += n
        return output.loss

    def _finish(self, mode: str) -> None:
        n = max(self._n_cells[mode], 1)
        means = {key: float(value) / n for key, value in self._sums[mode].items()}
        parts = ("reconstruction_loss", "kl_local", "kl_global")
        means[f"elbo_{mode}"] = sum(means.get(f"{part}_{mode}", 0.0) for part in parts)
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=n)

    def on_train_epoch_start(self) -> None:
        self._start("train")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._step(batch, "train")

    def on_train_epoch_end(self) -> None:
        self._finish("train")
        super().on_train_epoch_end()

    def on_validation_epoch_start(self) -> None:
        self._start("validation")

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self._step(batch, "validation")

    def on_validation_epoch_end(self) -> None:
        self._finish("validation")


class BaseModel(BaseModelClass):
    """An scvi-tools model whose files never run code and whose training keeps the best state.

    A subclass calls ``super().__init__(adata, registry)``, then ``self._remember(locals())`` to note its options
    (numbers, text, arrays, tables and containers of them), then builds ``self.module`` from the options and
    ``self.registry_`` alone, so that a saved model can be rebuilt without its AnnData. What training finds out beside
    the weights goes through :meth:`_get_state` and :meth:`_set_state`.
    """

    _plan_defaults: Mapping[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-6, "n_epochs_kl_warmup": None}
    _trainer_defaults: Mapping[str, Any] = {"gradient_clip_val": 100.0}
    _max_epochs = 200
    _monitor = "elbo_validation"

    module: Any = None

    @classmethod
    def _own_identity(cls, adata: AnnData) -> None:
        """Give a copy of data that was set up an identifier of its own, so that the original stays usable."""
        known = cls._setup_adata_manager_store.get(adata.uns.get("_scvi_uuid"))
        if known is not None and known.adata is not adata:
            del adata.uns["_scvi_uuid"]

    def _remember(self, local: dict[str, Any]) -> dict[str, Any]:
        """Note the options of the constructor, given its ``locals()``."""
        known = inspect.signature(type(self).__init__).parameters
        self._options = {k: v for k, v in local.items() if k in known and k not in ("self", "adata", "registry")}
        return self._options

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Make torch deterministic inside the block and leave the global generators as they were."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            torch.manual_seed(seed)
            yield

    @property
    def device(self) -> torch.device:
        """Device of the module; the CPU for models without one."""
        parameter = next(iter(self.module.parameters()), None) if self.module is not None else None
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """Training history: one data frame a metric, a row an epoch."""
        return {key: table.astype(float) for key, table in (self.history_ or {}).items()}

    def _check_trained(self) -> None:
        if not self.is_trained_:
            raise NotTrainedError(f"{type(self).__name__} is not trained: call model.train() first.")

    def _fit_module(
        self,
        splitter: Any,
        *,
        max_epochs: int | None,
        accelerator: str,
        devices: Any,
        early_stopping: bool,
        plan_kwargs: dict | None,
        random_state: int,
        **trainer_kwargs: Any,
    ) -> None:
        """Train ``self.module`` by scvi-tools' runner; ends with the best validation state, also when interrupted."""
        max_epochs = self._max_epochs if max_epochs is None else max_epochs
        check_positive("max_epochs", max_epochs)
        plan = _Plan(self.module, **{**self._plan_defaults, **(plan_kwargs or {})})
        best = _BestState(self.module, self._monitor)
        options = {**self._trainer_defaults, **trainer_kwargs}
        options["callbacks"] = [*options.get("callbacks", ()), best]
        options.setdefault("enable_progress_bar", settings.progress)
        has_validation = splitter.n_val > 0
        if has_validation:
            options.setdefault("check_val_every_n_epoch", 1)
        options.setdefault("early_stopping_monitor", self._monitor)
        options.setdefault("early_stopping_patience", 30)
        options["early_stopping"] = bool(early_stopping and has_validation)
        chatty = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
        levels = [c.level for c in chatty]
        self.module.train()
        with self._seeded(random_state), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            for c in chatty:
                c.setLevel(logging.ERROR)
            try:
                runner = TrainRunner(
                    self,
                    training_plan=plan,
                    data_splitter=splitter,
                    max_epochs=max_epochs,
                    accelerator=accelerator,
                    devices=devices,
                    **options,
                )
                runner()
            except (KeyboardInterrupt, SystemExit):
                if not best.interrupted:
                    raise
                logger.warning("training was interrupted: the best state so far is kept")
            finally:
                for c, level in zip(chatty, levels, strict=True):
                    c.setLevel(level)
        best.restore()
        self.best_epoch_ = best.epoch
        self.module.eval()
        self.is_trained_ = True

    # ------------------------------------------------------------------------------------------ files

    def _get_state(self) -> dict[str, Any]:
        """What training found out beside the weights: numbers, text, arrays, tables."""
        return {}

    def _set_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`_get_state` gave."""

    def save(self, dir_path: str | os.PathLike, *, overwrite: bool = False, save_anndata: bool = False) -> None:
        """Save the model to a directory of JSON, safetensors and parquet files.

        The directory is written beside its final place and renamed: a failed save leaves an earlier one intact.

        Parameters
        ----------
        dir_path
            Directory to make.
        overwrite
            Replace a model that is there.
        save_anndata
            Also write the AnnData to ``adata.h5ad`` in the directory.

        Raises
        ------
        ScpertError
            If the directory holds something and ``overwrite`` is not set.
        """
        content = {
            "class": type(self).__name__,
            "scpert_version": version("scpert"),
            "registry": dict(self.registry_),
            "options": self._options,
            "is_trained": bool(self.is_trained_),
            "state": self._get_state() if self.is_trained_ else {},
            "history": {k: v.reset_index() for k, v in self.history.items()},
        }
        weights = {} if self.module is None else self.module.state_dict()
        save_directory(dir_path, content, weights, overwrite=overwrite)
        if save_anndata and self.adata is not None:
            from pathlib import Path

            self.adata.write_h5ad(Path(dir_path) / "adata.h5ad")

    @classmethod
    def load(cls, dir_path: str | os.PathLike, adata: AnnData | None = None, **_: Any) -> Any:
        """Load a saved model. Nothing in the directory is ever executed.

        Parameters
        ----------
        dir_path
            Directory written by :meth:`save`.
        adata
            Data to attach; genes are aligned by name. Without it the model still predicts.

        Raises
        ------
        FileFormatError
            If the files are truncated, damaged, of another class or of a newer format.
        """
        content, weights = load_directory(dir_path)
        from . import MODELS

        name = content.get("class")
        if name not in MODELS:
            raise FileFormatError(f"{str(dir_path)!r} holds a model of the unknown class {name!r}.")
        actual = MODELS[name]
        if not issubclass(actual, cls):
            raise FileFormatError(f"{str(dir_path)!r} holds a {name}: load it with scpert.model.{name}.load.")
        model = actual(None, registry=content["registry"], **content["options"])
        if model.module is not None and weights:
            try:
                model.module.load_state_dict(weights)
            except RuntimeError as error:
                raise FileFormatError(f"The weights in {str(dir_path)!r} do not fit the model: {error}") from error
        if content["is_trained"]:
            model._set_state(content["state"])
        model.is_trained_ = content["is_trained"]
        model.history_ = {k: v.set_index(v.columns[0]) for k, v in content["history"].items()}
        if model.module is not None:
            model.module.eval()
        if adata is not None:
            model._attach(adata)
        return model

    def _attach(self, adata: AnnData) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        state = "trained" if self.is_trained_ else "not trained"
        return f"{type(self).__name__} ({state}): {self._summary()}"

    def _summary(self) -> str:
        return ""


# ---------------------------------------------------------------------------------------------- perturbation models


@dataclass
class Reference:
    """Control cells that a prediction starts from.

    Attributes
    ----------
    values
        Counts, log1p CP10k or effects as the model was set up with, CSR ``(cell, gene)``.
    library
        Total counts, float32 ``(cell,)``; 1e4 where the values are no counts.
    covariates
        Codes, ``(cell, covariate)``.
    scale
        Scale of the values.
    population
        Mean log1p CP10k of all the cells that these are drawn from, ``(gene,)``; ``None``: these are all.
    """

    values: sparse.csr_matrix
    library: np.ndarray
    covariates: np.ndarray
    scale: str
    population: np.ndarray | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    @cached_property
    def log1p(self) -> sparse.csr_matrix:
        """The cells as log1p CP10k (effects: as they are)."""
        return log1p_cp10k(self.values, self.library) if self.scale == K.SCALE_COUNTS else self.values

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean log1p CP10k of the population, float32 ``(gene,)``: a sample's own mean would add its noise to every prediction."""
        if self.population is not None:
            return np.asarray(self.population, dtype=np.float32)
        return np.asarray(self.log1p.mean(axis=0), dtype=np.float32).ravel()

    def take(self, index: np.ndarray) -> Reference:
        """Some of the cells, of the same population."""
        return replace(self, values=self.values[index], library=self.library[index], covariates=self.covariates[index])


@dataclass
class Prediction:
    """Predicted shifts, one row a perturbation.

    Attributes
    ----------
    delta
        ``(perturbation, gene)``, against the reference control.
    std
        Standard deviation of the predicted mean, or ``None``.
    lower, upper
        90 % limits of the shift where the model calibrates them, or ``None``.
    fallback
        Boolean ``(perturbation,)``: rows for which the model knew nothing and gave the mean; ``None``: none.
    """

    delta: np.ndarray
    std: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    fallback: np.ndarray | None = None


class PerturbationModel(BaseModel):
    """Base of all models that predict perturbations.

    A subclass says what it can do by ``scope`` (``"seen"``, ``"combinations"``, ``"unseen"``) and ``_covers(target)``,
    and implements :meth:`_predict_delta` (and, if it generates cells, :meth:`_predict_cells`).
    """

    scope: str = "seen"
    #: Scales that the model can learn from.
    _scales: tuple[str, ...] = (K.SCALE_COUNTS, K.SCALE_LOG1P)
    #: Partners that the loader adds to a batch (see :class:`~scpert.data._loader.PerturbationLoader`).
    _partners: tuple[str, ...] = ()
    #: What happens with a known target that the model has no information on: its mean ("fallback"), or ``on_unknown``.
    #: A model of combinations has nothing to say of a single target that was not trained.
    _uncovered: str = "raise"
    #: Arguments of setup_anndata that the model makes use of, beside labels, layer, scale and split.
    _uses: tuple[str, ...] = ("library_size_key",)
    #: Effects are measured within the strata of the covariates.
    _stratified = False
    #: Predictions depend on the covariates of the cells that they start from.
    _reads_covariates = True
    #: The validation loss is one of perturbed cells.
    _judged_by_perturbed = False
    _batch_size = 256
    _group_labels: int | None = None

    #: Hashes of the names of the training and validation cells; effects of the training cells, and control cells to predict
    #: from. ``None`` before training.
    cells_: np.ndarray
    effects_: Effects
    reference_: Reference

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str = K.PERTURBATION,
        control: str = K.CONTROL,
        layer: str | None = None,
        scale: str = K.SCALE_AUTO,
        split_key: str | None = None,
        matched_control_key: str | None = None,
        quality_key: str | None = None,
        library_size_key: str | None = None,
        covariate_keys: str | Sequence[str] | None = None,
    ) -> None:
        """Tell the model where labels and values are; the same arguments for every model.

        Nothing is written but scvi-tools' identifiers (``uns["_scvi_uuid"]``, ``uns["_scvi_manager_uuid"]``).

        Parameters
        ----------
        adata
            Cells by genes, or perturbations by genes for ``scale="effects"``.
        perturbation_key
            Column with the labels: ``control``, ``GENE``, ``GENE_A+GENE_B``.
        control
            Label of the control cells.
        layer
            Where the values are; ``layers["counts"]`` if it is there, else ``X``.
        scale
            ``"counts"``, ``"log1p"`` (natural, counts per 10,000), ``"effects"`` (already relative to control; no
            control row needed) or ``"auto"``: decided by evidence that is logged, refused where ambiguous.
        split_key
            Column with ``train``, ``val``, ``test``: only ``train`` (and ``val``) cells are learned from.
        matched_control_key
            Column with the name of each cell's matched control (:func:`scpert.pp.match_controls`).
        quality_key
            Column that is True where quality control failed (:func:`scpert.pp.quality_flags`).
        library_size_key
            Column with the full library size, for small panels.
        covariate_keys
            Categorical column or columns.

        Raises
        ------
        MissingKeyError, LabelError, ScaleError, ScpertError
            If a column is missing, labels are not in the standard form, or values are on another scale.
        """
        arguments = {k: v for k, v in locals().items() if k not in ("cls", "adata")}
        if covariate_keys is not None:
            arguments["covariate_keys"] = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys)
        unused = [
            k
            for k in ("matched_control_key", "quality_key", "covariate_keys")
            if arguments[k] is not None and k not in cls._uses
        ]
        if unused:
            logger.info("%s makes no use of %s", cls.__name__, listing(unused))
        field = PerturbationField(allowed=cls._scales, **arguments)
        if adata.is_view:
            # scvi-tools writes identifiers into uns, which would silently turn the view into a copy later.
            adata._init_as_actual(adata.copy())
        manager = AnnDataManager(
            fields=[field],
            setup_method_args={
                "model_name": cls.__name__,
                "setup_method_name": "setup_anndata",
                "setup_args": arguments,
            },
        )
        cls._own_identity(adata)
        manager.register_fields(adata)
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        modalities: Mapping[str, str] | None = None,
        perturbation_key: str = K.PERTURBATION,
        **kwargs: Any,
    ) -> None:
        """Set up from a MuData: expression in one modality, labels in obs or in a guide modality.

        Parameters
        ----------
        mdata
            Multimodal data.
        modalities
            ``{"rna": name}`` and, where the labels come from guides, ``{"guide": name}``: a cell x guide matrix of
            calls (non-zero = present) whose ``var["target"]`` (or, if missing, the part of its name before the first
            ``_``) names the target; guides whose target reads like a control name count as control. By default the
            modality called ``rna``, or the only one.
        perturbation_key
            Column of the labels, in the modality's obs or in ``mdata.obs``; with a guide modality it is written to the
            RNA modality's obs, and cells without a guide are an error.
        **kwargs
            As in :meth:`setup_anndata`.
        """
        names = dict(modalities or {})
        rna = names.get("rna") or (
            "rna" if "rna" in mdata.mod else next(iter(mdata.mod)) if len(mdata.mod) == 1 else None
        )
        if rna is None or rna not in mdata.mod:
            raise MissingKeyError(
                f"Which modality holds the expression? Pass modalities={{'rna': name}}; there are {listing(mdata.mod)}."
            )
        adata = mdata.mod[rna]
        if "guide" in names:
            if names["guide"] not in mdata.mod:
                raise MissingKeyError(f"There is no modality {names['guide']!r}; there are {listing(mdata.mod)}.")
            adata.obs[perturbation_key] = _labels_from_guides(
                mdata.mod[names["guide"]], adata.obs_names, kwargs.get("control", K.CONTROL)
            )
        elif perturbation_key not in adata.obs:
            for column in (perturbation_key, f"{rna}:{perturbation_key}"):
                if column in mdata.obs:
                    adata.obs[perturbation_key] = mdata.obs.loc[adata.obs_names, column]
                    break
        cls.setup_anndata(adata, perturbation_key=perturbation_key, **kwargs)

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None):
        if adata is not None and hasattr(adata, "mod"):
            ready = [a for a in adata.mod.values() if a.uns.get("_scvi_uuid") in self._setup_adata_manager_store]
            if len(ready) != 1:
                raise ScpertError(f"Call {type(self).__name__}.setup_mudata(mdata, ...) first.")
            adata = ready[0]
        super().__init__(adata, registry)
        self._options: dict[str, Any] = {}
        state = self.registry_["field_registries"][REGISTRY_KEY]["state_registry"]
        self.setup_args_: dict[str, Any] = dict(self.registry_["setup_args"])
        self.genes_: list[str] = list(state["genes"])
        self.targets_: list[str] = list(state["targets"])
        self.labels_: list[str] = list(state["labels"])
        self.control_: str = state["control"]
        self.scale_: str = state["scale"]
        self.covariates_: dict[str, list[str]] = dict(state["covariates"])
        self._field_state = state
        self.cells_ = self.effects_ = None  # type: ignore[assignment]
        self.reference_ = None  # type: ignore[assignment]

    # ------------------------------------------------------------------------------------------ data

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.genes_)

    def _screen_of(self, adata: AnnData | None, *, labels: bool) -> Screen:
        """Screen of new cells, of which none must be a control; without ``labels`` they need not even be labelled."""
        if adata is None:
            return self._screen
        adata, key = self._align(adata), self.setup_args_["perturbation_key"]
        if key not in adata.obs and not labels:
            adata = adata.copy()
            adata.obs[key] = self.control_
        return self._make_screen(adata, require_control=False)

    def _make_screen(self, adata: AnnData, *, require_control: bool = True) -> Screen:
        s = self.setup_args_
        return Screen(
            adata,
            perturbation_key=s["perturbation_key"],
            control=self.control_,
            layer=self._field_state["layer"],
            scale=self.scale_,
            library_size_key=s["library_size_key"],
            allowed=self._scales,
            require_control=require_control,
        )

    @cached_property
    def _screen(self) -> Screen:
        """The registered data; raises if the model was loaded without."""
        if self.adata is None:
            raise ScpertError(f"This {type(self).__name__} was loaded without data: pass adata= to load().")
        return self._make_screen(self.adata)

    def _train_mask(self) -> np.ndarray:
        """Boolean ``(cell,)``: cells to learn from."""
        key = self.setup_args_["split_key"]
        if key is None:
            return np.ones(self._screen.n_cells, dtype=bool)
        return (self._screen.adata.obs[key].astype(str) == K.TRAIN).to_numpy()

    def _learn_reference(self, random_state: int = 0) -> None:
        """Compute the effects of the training cells and keep control cells to predict from."""
        screen, mask = self._screen, self._train_mask()
        split_key = self.setup_args_["split_key"]
        seen = (
            np.ones(screen.n_cells, dtype=bool)
            if split_key is None
            else (screen.adata.obs[split_key].astype(str) != K.TEST).to_numpy()
        )
        self.cells_ = cell_hashes(screen.adata.obs_names[seen])
        strata = self._strata()
        if strata is not None:
            table = screen.adata.obs[list(self.covariates_)]
            need_controls(screen, strata, lambda cell: " / ".join(map(str, table.iloc[cell])), mask)
        self.effects_ = self._effects_of(mask)
        if len(self.effects_.labels) == 0:
            raise LabelError("No perturbed cell is among the training cells: nothing to learn from.")
        if screen.scale == K.SCALE_EFFECTS:
            self.reference_ = Reference(
                sparse.csr_matrix((1, screen.adata.n_vars), dtype=np.float32),
                np.ones(1, np.float32),
                np.zeros((1, len(self.covariates_)), np.int64),
                screen.scale,
            )
            return
        rows = np.flatnonzero(mask & screen.is_control)
        if len(rows) > MAX_REFERENCE_CELLS:
            rows = np.sort(np.random.default_rng(random_state).choice(rows, MAX_REFERENCE_CELLS, replace=False))
        self.reference_ = replace(self._reference_from(screen, rows), population=self.effects_.control_mean)

    def _strata(self) -> np.ndarray | None:
        """Stratum of the covariates of each cell, codes ``(cell,)``, for models that measure effects within them."""
        if not self._stratified or not self.covariates_ or self.scale_ == K.SCALE_EFFECTS:
            return None
        codes = covariate_codes(self._screen.adata, self.covariates_)
        strata: np.ndarray = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
        return strata

    def _effects_of(self, mask: np.ndarray) -> Effects:
        """Effects of the cells in ``mask``."""
        return Effects.from_screen(self._screen, mask, self._strata())

    def _reference_from(self, screen: Screen, rows: np.ndarray) -> Reference:
        values = screen.rows(rows, normalised=False)
        size = screen.library_size[rows] if screen.scale == K.SCALE_COUNTS else np.full(len(rows), K.TARGET_SUM)
        if self._reads_covariates:
            covariates = covariate_codes(screen.adata[rows], self.covariates_)
        else:
            covariates = np.zeros((len(rows), len(self.covariates_)), dtype=np.int64)
        return Reference(values, size.astype(np.float32), covariates, screen.scale)

    def _align(self, adata: AnnData) -> AnnData:
        """The same cells with the model's genes in the model's order; missing genes raise."""
        if not hasattr(adata, "var_names"):
            raise ScpertError(f"adata must be an AnnData of cells; got {type(adata).__name__}.")
        check_unique_names(adata)
        if list(adata.var_names) == self.genes_:
            return adata
        missing = [g for g in self.genes_ if g not in adata.var_names]
        if missing:
            raise MissingKeyError(
                f"{len(missing)} of the model's {self.n_genes} genes are not in adata.var_names: {listing(missing, 8)}. "
                "They are not filled with zeros: give data with these genes, or train the model on the shared ones."
            )
        extra = adata.n_vars - self.n_genes
        logger.info(
            "genes are aligned by name%s", f"; {extra} genes that the model does not know are left out" if extra else ""
        )
        return adata[:, self.genes_].copy()

    def _attach(self, adata: AnnData) -> None:
        adata = self._align(adata)
        type(self).setup_anndata(adata, **self.setup_args_)
        self._adata = adata
        self._adata_manager = self._get_most_recent_anndata_manager(adata, required=True)
        self._register_manager_for_instance(self._adata_manager)
        self.__dict__.pop("_screen", None)

    def _new_controls(self, adata: AnnData) -> Reference:
        """Reference cells from other data: its control cells if it has labels, else all its cells."""
        adata = self._align(adata)
        key = self.setup_args_["perturbation_key"]
        if key in adata.obs.columns:
            labels = adata.obs[key].astype(str).to_numpy()
            if (labels == self.control_).any():
                adata = adata[labels == self.control_]
            else:
                raise LabelError(
                    f"adata has no cell with obs[{key!r}] == {self.control_!r}; it has {listing(sorted(set(labels)), 3)}: predictions "
                    "start from control cells. Give these, or drop the column if all cells are unperturbed."
                )
        obs: Any = adata.obs.copy()
        labelled = AnnData(obs=obs, var=pd.DataFrame(index=adata.var_names))
        labelled.X = adata.X
        layer = self._field_state["layer"]
        if layer is not None:
            if layer not in adata.layers:
                raise MissingKeyError(f"The model reads layers[{layer!r}], which adata does not have.")
            labelled.layers[layer] = adata.layers[layer]
        labelled.obs[key] = self.control_
        return self._reference_from(self._make_screen(labelled), np.arange(labelled.n_obs))

    # ------------------------------------------------------------------------------------------ training

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        devices: Any = "auto",
        batch_size: int | None = None,
        early_stopping: bool | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        plan_kwargs: dict | None = None,
        random_state: int = 0,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model on the ``train`` cells; ``val`` cells decide when to stop and which state is kept.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        accelerator, devices
            As in scvi-tools.
        batch_size
            Cells per batch.
        early_stopping
            Stop when the validation loss no longer falls; by default whenever there are validation cells.
        train_size, validation_size
            Shares of cells to train and validate on if no ``split_key`` was given. Default: all cells train, or 90 % and
            10 % for ``early_stopping=True``; of one share the rest is the other.
        plan_kwargs
            Options of scvi-tools' :class:`~scvi.train.TrainingPlan` (``lr``, ``weight_decay`` ...).
        random_state
            Seed of batches, partners and noise.
        **trainer_kwargs
            Options of scvi-tools' :class:`~scvi.train.Trainer` (``early_stopping_patience`` ...).

        Notes
        -----
        Ctrl-C stops training and keeps the best state so far.
        """
        random_state = check_seed(random_state)
        if max_epochs is not None:
            check_whole("max_epochs", max_epochs)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        check_fraction("train_size", 1.0 if train_size is None else train_size)
        check_fraction("validation_size", 0.0 if validation_size is None else validation_size)
        if train_size == 0 or (train_size or 0.0) + (validation_size or 0.0) > 1 + 1e-9 or validation_size == 1:
            raise ScpertError(
                f"train_size={train_size!r} and validation_size={validation_size!r} are shares of the cells: the first "
                "must be above 0, and together they may not exceed 1."
            )
        self._learn_reference(random_state)
        with self._seeded(random_state):
            self._before_training(random_state)
        tensors = ScreenTensors(self._screen, self._field_state, self.setup_args_)
        splitter = PerturbationSplitter(
            tensors,
            partners=self._partners,
            batch_size=self._batch_size if batch_size is None else batch_size,
            train_size=train_size,
            validation_size=validation_size,
            random_state=random_state,
            group_labels=self._group_labels,
            need_validation=bool(early_stopping),
            judge_by_perturbed=self._judged_by_perturbed,
        )
        self._fit_module(
            splitter,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            early_stopping=splitter.n_val > 0 if early_stopping is None else early_stopping,
            plan_kwargs=plan_kwargs,
            random_state=random_state,
            **trainer_kwargs,
        )
        with self._seeded(random_state), torch.inference_mode():
            self._after_training(tensors, splitter)

    def _before_training(self, random_state: int) -> None:
        """Hook: data-dependent start values of the module. ``effects_`` and ``reference_`` are there."""

    def _after_training(self, tensors: ScreenTensors, splitter: PerturbationSplitter) -> None:
        """Hook: what is learned once the weights are fixed (calibration, shrinkage)."""

    # ------------------------------------------------------------------------------------------ what it knows

    @cached_property
    def _trained_targets(self) -> frozenset[str]:
        return frozenset(t for targets in self.effects_.targets for t in targets) if self.effects_ else frozenset()

    def _graph_targets(self) -> frozenset[str]:
        """Targets that prior knowledge given to the model holds."""
        return frozenset()

    def _covers(self, target: str) -> bool:
        """Whether the model can say something of its own about a target that it was not trained on."""
        return self.scope == "unseen"

    def _knows(self, target: str) -> bool:
        return target in self._known

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.targets_) | frozenset(self.genes_) | self._graph_targets()

    def coverage(self, targets: str | Sequence[str]) -> pd.DataFrame:
        """What the model knows of each target.

        Parameters
        ----------
        targets
            Genes; combinations are taken apart.

        Returns
        -------
        DataFrame, one row a target: ``status`` (``trained``, ``in_graph``, ``measured``, ``known``, ``alias``,
        ``unknown``), booleans ``trained``, ``in_graph``, ``measured``, ``predictable`` (its single perturbation: a model
        of combinations says nothing of a target that was trained in combinations only), ``n_cells`` (training cells of
        the single perturbation), ``alias`` (the known name meant, if another spelling) and ``suggestions``.
        """
        names = [targets] if isinstance(targets, str) else list(targets)
        genes = list(dict.fromkeys(t for name in names for t in parse(name, self.control_)))
        graph, measured = self._graph_targets(), set(self.genes_)
        rows = []
        for gene in genes:
            trained = gene in self._trained_targets
            if self.effects_:
                predictable = self._status((gene,)) not in (None, K.FALLBACK)
            else:
                predictable = self._knows(gene) and self.scope == "unseen" and self._covers(gene)
            alias = next(
                (k for k in suggest(gene, self._known, 1) if k.casefold() == gene.casefold() and k != gene), ""
            )
            status = (
                "trained"
                if trained
                else "in_graph"
                if gene in graph
                else "measured"
                if gene in measured
                else "known"
                if self._knows(gene)
                else "alias"
                if alias
                else "unknown"
            )
            single = self.effects_.singles.get(gene) if self.effects_ else None
            rows.append(
                {
                    "target": gene,
                    "status": status,
                    "trained": trained,
                    "in_graph": gene in graph,
                    "measured": gene in measured,
                    "predictable": predictable,
                    "n_cells": 0 if single is None else int(self.effects_.n_cells[single]),
                    "alias": alias,
                    "suggestions": ", ".join([] if self._knows(gene) else suggest(gene, self._known)),
                }
            )
        columns = [
            "target",
            "status",
            "trained",
            "in_graph",
            "measured",
            "predictable",
            "n_cells",
            "alias",
            "suggestions",
        ]
        return pd.DataFrame(rows, columns=columns).set_index("target")

    def _status(self, targets: tuple[str, ...]) -> str | None:
        """Status of a label, or ``None`` if the model cannot predict it."""
        if join(targets) in self.effects_.row:
            return K.TRAINED
        if not all(self._knows(t) for t in targets):
            return None
        if len(targets) > 1 and all(t in self._trained_targets for t in targets):
            if self.scope in ("combinations", "unseen"):
                return K.COMBINATION
        elif self.scope == "unseen" and all(t in self._trained_targets or self._covers(t) for t in targets):
            return K.UNSEEN
        if self._uncovered != "fallback" or (self.scope == "combinations" and len(targets) == 1):
            return None
        return K.FALLBACK

    def _refuse(self, label: str, targets: tuple[str, ...]) -> UnknownTargetError:
        unknown = [t for t in targets if not self._knows(t)]
        suggestions = {t: suggest(t, self._known) for t in unknown}
        cure = "Pass on_unknown='mean' (the mean effect) or 'nearest' to get a flagged substitute."
        if unknown:
            hints = " ".join(f"For {t!r}: {listing(s)}." for t, s in suggestions.items() if s)
            text = f"{label!r}: {type(self).__name__} does not know {listing(unknown)}. {hints and f'Did you mean? {hints} '}{cure}"
        else:
            why = {
                "seen": "it predicts only perturbations that it was trained on",
                "combinations": "it predicts trained targets and their combinations",
                "unseen": "its prior knowledge has nothing on some target",
            }[self.scope]
            missing = [t for t in targets if t not in self._trained_targets]
            about = f" ({listing(missing)} not trained)" if missing else " (trained in combinations only)"
            text = f"{type(self).__name__} cannot predict {label!r}{about}: {why}. {cure}"
            unknown = missing or list(targets)
        return UnknownTargetError(text, tuple(unknown), suggestions)

    def _nearest(self, targets: tuple[str, ...]) -> tuple[str, ...] | None:
        """A perturbation that the model can predict, nearest to one that it cannot; ``None`` if nothing is near."""
        out = []
        for t in targets:
            if self._status((t,)) is not None:
                out.append(t)
                continue
            same = sorted(
                k for k in self._trained_targets if k.casefold() == t.casefold() and self._status((k,)) is not None
            )
            if same:
                out.append(same[0])
                continue
            gene = {g: i for i, g in enumerate(self.genes_)}
            measured = [s for s in self.effects_.singles if s in gene]
            if t not in gene or not measured:
                return None
            profiles = self.effects_.delta[:, [gene[s] for s in measured]]
            own = self.effects_.delta[:, gene[t]]
            with np.errstate(invalid="ignore", divide="ignore"):
                r = np.nan_to_num(
                    (profiles - profiles.mean(0)).T @ (own - own.mean()) / (profiles.std(0) * own.std() * len(own))
                )
            if not r.any():  # a gene that does not move is near to none
                return None
            out.append(measured[int(np.argmax(r))])
        return tuple(sorted(set(out)))

    # ------------------------------------------------------------------------------------------ prediction

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        """Predicted shift of the mean for each set of targets; all of them have a status other than fallback."""
        raise NotImplementedError

    def _predict_cells(
        self,
        targets: tuple[str, ...],
        delta: np.ndarray,
        reference: Reference,
        rng: np.random.Generator,
        batch_size: int,
    ) -> np.ndarray:
        """Predicted cells, log1p CP10k ``(cell, gene)``: by default the reference cells, shifted by ``delta``.

        Where a gene falls below zero it is cut off there, and the rest of the cells is lowered so that the mean shift
        stays; a gene without any expression in the reference is raised in all cells alike.
        """
        cells = reference.log1p.toarray().astype(np.float32)
        mean = cells.mean(axis=0)
        up = np.maximum(delta, 0.0)
        keep = np.clip(1.0 + np.divide(np.minimum(delta, 0.0), mean, out=np.zeros_like(mean), where=mean > 0), 0.0, 1.0)
        return cells * keep + up

    def predict_perturbation(
        self,
        perturbations: str | Sequence[str] | None = None,
        adata: AnnData | None = None,
        *,
        level: str = "pseudobulk",
        n_samples: int | None = None,
        on_unknown: str = "raise",
        random_state: int = 0,
        batch_size: int | None = None,
    ) -> AnnData:
        """Predict the expression of perturbed cells.

        Parameters
        ----------
        perturbations
            Labels (``GENE``, ``GENE_A+GENE_B``; the order of targets does not matter); by default all labels of the
            data that the model can predict.
        adata
            Control cells to perturb (cells with the control's label, or all where there are no labels); by default
            control cells of the training data. Genes are aligned by name.
        level
            ``"pseudobulk"``: one row a perturbation; ``"cell"``: predicted cells.
        n_samples
            Control cells that a prediction starts from (``"pseudobulk"``: all that the model keeps; ``"cell"``: 100
            cells a perturbation).
        on_unknown
            What to do with targets that the model cannot predict: ``"raise"``, ``"mean"`` (the mean effect of the
            training perturbations) or ``"nearest"`` (the nearest perturbation that it can predict; the mean if there
            is none). Substitutes have ``obs["status"] == "fallback"``.
        random_state
            Seed of the draw of cells.
        batch_size
            Cells per batch.

        Returns
        -------
        AnnData, perturbation (or cell) x gene: ``X`` log1p CP10k (shift, for models of effects), ``layers["delta"]``
        the shift from the reference controls, ``layers["std"]`` its standard deviation where the model has one,
        ``layers["lower"]``, ``layers["upper"]`` 90 % limits of X where calibrated; ``obs["perturbation"]``,
        ``obs["status"]`` (``trained``, ``combination``, ``unseen``, ``fallback``); ``uns["scpert"]`` what made it.
        Nothing is registered and ``adata`` is not changed.

        Raises
        ------
        UnknownTargetError
            With suggestions, if a target cannot be predicted and ``on_unknown="raise"``.
        NotTrainedError
            Before :meth:`train`.
        """
        random_state = check_seed(random_state)
        self._check_trained()
        check_choice("level", level, ("pseudobulk", "cell"))
        check_choice("on_unknown", on_unknown, ("raise", "nearest", "mean"))
        if level == "cell" and self.scale_ == K.SCALE_EFFECTS:
            raise ScpertError("A model of effects has no cells: use level='pseudobulk'.")
        if perturbations is None:
            labels = [x for x in self.labels_ if self._status(parse(x, self.control_)) is not None]
            if left_out := len(self.labels_) - len(labels):
                logger.info("%d labels that %s cannot predict are left out", left_out, type(self).__name__)
        else:
            if hasattr(perturbations, "obs_names"):
                raise LabelError("perturbations= takes labels such as 'GENE' or 'A+B'; pass control cells as adata=.")
            if not isinstance(perturbations, Iterable):
                raise LabelError(
                    f"perturbations={perturbations!r}: give a label such as 'A' or 'A+B', or a list of them."
                )
            asked = [perturbations] if isinstance(perturbations, str) else [str(p) for p in perturbations]
            labels = list(dict.fromkeys(canonical(p, self.control_) for p in asked))
        if not labels:
            raise LabelError("No perturbation was asked for.")
        if self.control_ in labels:
            raise LabelError(
                f"{self.control_!r} is the control, not a perturbation: a prediction is a shift from it. "
                "Name genes such as " + listing(self.labels_, 3) + "."
            )
        status, targets = [], []
        for label in labels:
            wanted = parse(label, self.control_)
            state = self._status(wanted)
            if state is None:
                if on_unknown == "raise":
                    raise self._refuse(label, wanted)
                near = self._nearest(wanted) if on_unknown == "nearest" else None
                state, wanted = K.FALLBACK, near if near is not None else ()
            elif state == K.FALLBACK:
                wanted = ()
            status.append(state)
            targets.append(wanted)
        rng = np.random.default_rng(random_state)
        reference = self.reference_ if adata is None else self._new_controls(adata)
        if level == "pseudobulk" and n_samples is not None and n_samples < len(reference):
            check_positive("n_samples", n_samples)
            reference = reference.take(np.sort(rng.choice(len(reference), int(n_samples), replace=False)))
        size = self._batch_size if batch_size is None else int(check_positive("batch_size", batch_size))

        prediction = self._complete(targets, status, reference, rng, size)
        note = {
            "model": type(self).__name__,
            "scope": self.scope,
            "scale": self.scale_ if self.scale_ == K.SCALE_EFFECTS else K.SCALE_LOG1P,
            "level": level,
            "scpert_version": version("scpert"),
        }
        if level == "cell":
            return self._cells_to_anndata(labels, status, targets, prediction, reference, n_samples, rng, size, note)
        base = reference.mean
        X = base + prediction.delta
        if self.scale_ != K.SCALE_EFFECTS:
            X = np.maximum(X, 0.0)
        out = AnnData(X.astype(np.float32), obs=self._obs(labels, status), var=pd.DataFrame(index=self.genes_))
        out.layers[K.DELTA] = (X - base).astype(np.float32)
        if prediction.std is not None:
            out.layers[K.STD] = prediction.std.astype(np.float32)
        if prediction.lower is not None and prediction.upper is not None:
            floor = -np.inf if self.scale_ == K.SCALE_EFFECTS else 0.0
            out.layers[K.LOWER] = np.maximum(base + prediction.lower, floor).astype(np.float32)
            out.layers[K.UPPER] = np.maximum(base + prediction.upper, floor).astype(np.float32)
        out.uns[K.UNS] = note
        return out

    def _uninformed(self) -> np.ndarray:
        """What is predicted where nothing is known of the targets: the mean effect of the training perturbations."""
        return self.effects_.mean

    def _complete(
        self,
        targets: list[tuple[str, ...]],
        status: list[str],
        reference: Reference,
        rng: np.random.Generator,
        size: int,
    ) -> Prediction:
        """Predictions of the model, with the mean effect where it has none; updates ``status`` in place."""
        informed = [i for i, t in enumerate(targets) if t]
        n, g = len(targets), self.n_genes
        delta = np.tile(self._uninformed(), (n, 1)).astype(np.float32)
        std = lower = upper = None
        if informed:
            part = self._predict_delta([targets[i] for i in informed], reference, rng, size)
            delta[informed] = part.delta

            def spread(values: np.ndarray | None) -> np.ndarray | None:
                if values is None:
                    return None
                full = np.full((n, g), np.nan, dtype=np.float32)
                full[informed] = values
                return full

            std, lower, upper = spread(part.std), spread(part.lower), spread(part.upper)
            if part.fallback is not None:
                for i in np.flatnonzero(part.fallback):
                    status[informed[i]] = K.FALLBACK
        return Prediction(delta, std, lower, upper)

    def _cells_to_anndata(
        self,
        labels: list[str],
        status: list[str],
        targets: list[tuple[str, ...]],
        prediction: Prediction,
        reference: Reference,
        n_samples: int | None,
        rng: np.random.Generator,
        size: int,
        note: dict,
    ) -> AnnData:
        n = 100 if n_samples is None else int(check_positive("n_samples", n_samples))
        blocks = []
        for row, wanted in enumerate(progress(targets, description="predict cells", unit="perturbation")):
            draw = rng.choice(len(reference), n, replace=n > len(reference))
            start = reference.take(draw)
            cells = self._predict_cells(wanted, prediction.delta[row], start, rng, size) if wanted else None
            if cells is None:
                cells = PerturbationModel._predict_cells(self, wanted, prediction.delta[row], start, rng, size)
            blocks.append(sparse.csr_matrix(cells.astype(np.float32)))
        obs = self._obs(np.repeat(labels, n).tolist(), np.repeat(status, n).tolist())
        obs.index = [f"{label}_{i}" for label in labels for i in range(n)]
        out = AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=self.genes_))
        out.layers[K.DELTA] = out.X.toarray() - reference.mean
        out.uns[K.UNS] = note
        return out

    def _obs(self, labels: Sequence[str], status: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {K.PERTURBATION: pd.Categorical(list(labels)), K.STATUS: pd.Categorical(list(status))},
            index=pd.Index([str(x) for x in labels], dtype=str),
        )

    # ------------------------------------------------------------------------------------------ read-outs

    def get_latent_representation(self, adata: AnnData | None = None, *, batch_size: int | None = None) -> np.ndarray:
        """Latent representation of cells, float32 ``(cell, latent)``."""
        raise ScpertError(f"{type(self).__name__} has no latent space of cells.")

    def get_perturbation_embedding(self) -> pd.DataFrame:
        """Embedding of the targets ``(target, dim)``: by default principal components of the training effects.

        A target that was not perturbed alone has the mean of the combinations that it is in.
        """
        self._check_trained()
        e = self.effects_
        u, s, _ = np.linalg.svd(e.delta - e.mean, full_matrices=False)
        k = max(1, min(10, len(s) - 1))
        scores = u[:, :k] * s[:k]
        targets = sorted(self._trained_targets)
        rows = [[e.singles[t]] if t in e.singles else [i for i, x in enumerate(e.targets) if t in x] for t in targets]
        return pd.DataFrame([scores[i].mean(axis=0) for i in rows], index=pd.Index(targets, name="target"))

    def get_grn(self) -> pd.DataFrame:
        """The gene regulatory network in the model: a net ``source, target, weight``."""
        raise ScpertError(f"{type(self).__name__} holds no gene regulatory network; GPOVAE does.")

    def _codes(self, targets: Sequence[tuple[str, ...]], vocabulary: Sequence[str] | None = None) -> torch.Tensor:
        """Codes ``(row, most targets)`` of sets of targets, padded with -1."""
        names = [join(t, self.control_) for t in targets]
        return torch.from_numpy(encode(names, self.targets_ if vocabulary is None else vocabulary, self.control_))

    # ------------------------------------------------------------------------------------------ files

    def _get_state(self) -> dict[str, Any]:
        e, r = self.effects_, self.reference_
        return {
            "cells": self.cells_,
            "effects": {
                "labels": np.asarray(e.labels, dtype=object),
                "delta": e.delta,
                "std_error": e.std_error,
                "n_cells": np.asarray(e.n_cells),
                "control_mean": e.control_mean,
            },
            "reference": {
                "data": r.values.data,
                "indices": r.values.indices,
                "indptr": r.values.indptr,
                "library": r.library,
                "covariates": r.covariates,
            },
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        e, r = state["effects"], state["reference"]
        self.cells_ = state.get("cells", np.zeros(0, dtype=np.uint64))
        self.effects_ = Effects(
            e["labels"],
            e["delta"],
            e["std_error"],
            e["n_cells"],
            e["control_mean"],
            np.asarray(self.genes_, dtype=object),
            self.control_,
        )
        shape = (len(r["indptr"]) - 1, self.n_genes)
        values = sparse.csr_matrix((r["data"], r["indices"], r["indptr"]), shape=shape)
        population = None if self.scale_ == K.SCALE_EFFECTS else self.effects_.control_mean
        self.reference_ = Reference(values, r["library"], r["covariates"], self.scale_, population)

    def _summary(self) -> str:
        return f"{self.n_genes} genes, {len(self.labels_)} perturbations of {len(self.targets_)} targets, scope {self.scope!r}"

    def get_var_names(self, legacy_mudata_format: bool = False) -> dict:
        """Names of the genes, as scvi-tools wants them."""
        return {"X": np.asarray(self.genes_, dtype=object)}


class ClosedFormModel(PerturbationModel):
    """Base of models that are fitted to :class:`~scpert.data._effects.Effects` without gradient steps.

    A subclass implements ``_fit()``, which may use ``self.effects_``, and ``_predict_delta``. ``self.module`` stays
    ``None``; what is fitted is kept in attributes named by ``_fitted`` and saved.
    """

    _scales: tuple[str, ...] = K.SCALES
    _uses = ("library_size_key", "covariate_keys")
    _stratified = True
    _reads_covariates = False
    _fitted: tuple[str, ...] = ()

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        devices: Any = "auto",
        batch_size: int | None = None,
        early_stopping: bool | None = None,
        random_state: int = 0,
        **kwargs: Any,
    ) -> None:
        """Fit the model, in closed form: the arguments are those of every model and none is needed."""
        random_state = check_seed(random_state)
        self._learn_reference(random_state)
        self.__dict__.pop("_trained_targets", None)
        self.random_state_ = random_state
        self._fit()
        self.history_: dict[str, pd.DataFrame] = {}
        self.is_trained_ = True

    def _fit(self) -> None:
        """Learn from ``self.effects_``."""

    def _get_state(self) -> dict[str, Any]:
        return {**super()._get_state(), "fitted": {name: copy.copy(getattr(self, name)) for name in self._fitted}}

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        for name, value in state["fitted"].items():
            setattr(self, name, value)


def _labels_from_guides(guides: AnnData, cells: pd.Index, control: str) -> pd.Categorical:
    """Labels of cells from a cell x guide matrix of calls."""
    from ..data._perturbation import CONTROL_NAMES

    if "target" in guides.var.columns:
        target = guides.var["target"].astype(str).to_numpy()
    else:
        target = np.array([str(g).split("_")[0] for g in guides.var_names])
    is_control = np.array([t.casefold() in CONTROL_NAMES or t == control for t in target])
    missing = cells.difference(guides.obs_names)
    if len(missing):
        raise LabelError(
            f"{len(missing)} cells are not in the guide modality (first: {missing[0]!r}). Intersect them first."
        )
    calls = guides[cells].X
    calls = calls.tocsr() if sparse.issparse(calls) else sparse.csr_matrix(np.asarray(calls))
    calls.eliminate_zeros()
    labels = []
    for i in range(calls.shape[0]):
        hit = calls.indices[calls.indptr[i] : calls.indptr[i + 1]]
        if len(hit) == 0:
            raise LabelError(f"The cell {cells[i]!r} has no guide. Drop cells without a guide: they are not controls.")
        labels.append(join({str(t) for t in target[hit[~is_control[hit]]]}, control))
    out: Any = pd.Categorical(labels)
    return out
