"""The runner: every task, model and seed once; each finished cell is a file, so that a kill loses nothing."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_seed, listing, suggest
from .._files import written_whole
from .._progress import progress
from ..errors import ScpertError, SplitError
from ..pp._split import _context_key
from ._task import Prepared, Task, _unique, fingerprint, prepare, refuse_leaking_options, resolve_tasks

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ModelSpec", "costs", "run"]

logger = logging.getLogger("scpert")

#: Rows that are no models: what scores 0, what scores 1, and what another perturbation's replicate scores.
BASELINE, CEILING, MISMATCHED = "training_mean", "ceiling", "mismatched"
_FORMAT = 4
#: Random numbers of torch and the memory in use belong to the process: its threads compute one cell after the other.
_ALONE = threading.RLock()


@dataclass(frozen=True)
class ModelSpec:
    """A model of a benchmark.

    Attributes
    ----------
    name
        Name in the results.
    model
        A class, or its name in ``scpert.model.MODELS`` (by default ``name``).
    options
        Arguments of the constructor.
    train
        Arguments of ``train``.
    setup
        Further arguments of ``setup_anndata`` (``quality_key``, ``matched_control_key``, ...).
    grid
        Option -> values to try. Each candidate learns from the training perturbations; the one whose prediction of the
        *validation* perturbations has the best ``select_by`` is kept. Test perturbations cannot be asked for.
    select_by
        Metric of the choice.
    select_on
        ``"val"``; anything else is refused.

    Examples
    --------
    >>> import scpert
    >>> scpert.benchmark.ModelSpec("ridge", "Ridge", grid={"alpha": [1.0, 10.0]}).select_on
    'val'
    """

    name: str
    model: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] | None = None
    select_by: str = "mse"
    select_on: str = K.VAL

    def __post_init__(self) -> None:
        if self.select_on != K.VAL:
            raise SplitError(
                f"{self.name!r}: select_on={self.select_on!r} would choose hyper-parameters on cells that the result is "
                "measured on: a leak. They are chosen on validation perturbations only (select_on='val')."
            )
        if "split_key" in self.setup:
            raise SplitError(
                f"{self.name!r}: setup names a split_key, but all models learn from the split of the task. Drop it."
            )
        from ..metrics import METRICS

        if self.select_by not in METRICS or METRICS[self.select_by].higher_is_better is None:
            directed = [m.name for m in METRICS.values() if m.higher_is_better is not None]
            raise ScpertError(
                f"{self.name!r}: select_by={self.select_by!r} is no metric that has a best end. Choose one of "
                f"{listing(directed, 100)}."
            )
        if self.name in (BASELINE, CEILING, MISMATCHED):
            raise ScpertError(f"A model cannot be called {self.name!r}: the benchmark adds a row of this name.")

    def resolve(self) -> type:
        """The class."""
        if isinstance(self.model, type):
            return self.model
        from ..model import MODELS

        name = self.model or self.name
        if name not in MODELS:
            same = [n for n in MODELS if n.casefold() == str(name).casefold()]
            if not same:
                hint = suggest(str(name), MODELS, n=1)
                did_you_mean = f" Did you mean {hint[0]!r}?" if hint else ""
                raise ScpertError(f"The model {name!r} is not known.{did_you_mean} MODELS has {listing(MODELS, 40)}.")
            name = same[0]
        return MODELS[name]

    def describe(self) -> dict[str, Any]:
        """What tells this model from another, for the name of its results."""
        cls = self.resolve()
        parts: dict[str, Any] = {k: getattr(self, k) for k in ("options", "train", "setup", "grid")}
        # a class of the user's own may be written anew under the same name
        parts["class"] = [_code_of(c) for c in cls.__mro__]
        named = f"{cls.__module__}.{cls.__qualname__}"
        return {"name": self.name, "model": named, "parts": fingerprint(parts), "by": self.select_by}

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Options to try."""
        import itertools

        grid = self.grid or {}
        for values in itertools.product(*grid.values()):
            yield {**self.options, **dict(zip(grid, values, strict=True))}


def _code_of(cls: type) -> list[Any]:
    """Name of a class and, unless it is scpert's or a library's, what its functions do."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.split(".")[0] in ("scpert", "builtins", "scvi", "abc", "typing"):
        return [name]
    parts: dict[str, Any] = {}
    for key, value in vars(cls).items():
        inner = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if (code := getattr(inner, "__code__", None)) is not None:
            parts[key] = [code.co_code.hex(), list(code.co_names), [_constant(c) for c in code.co_consts]]
        elif isinstance(value, bool | int | float | str | tuple | frozenset | type(None)) and not key.startswith("__"):
            parts[key] = _constant(value)
    return [name, cls, parts]


def _constant(value: Any) -> str:
    """A constant in words that are the same in every process (a set has no order of its own)."""
    if hasattr(value, "co_code"):
        return str(value.co_code.hex())
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def resolve_models(models: Any) -> list[ModelSpec]:
    """Models from names, ``(name, class, options)``, ``(name, class, options, train options)`` or specs."""
    if models is None:
        raise ScpertError("models is None: give names of scpert.model.MODELS, (name, class, options), or ModelSpecs.")
    if isinstance(models, (str, ModelSpec)) or (
        isinstance(models, tuple) and len(models) > 1 and not isinstance(models[1], (str, ModelSpec, tuple))
    ):
        models = [models]
    out: list[ModelSpec] = []
    for item in models:
        if isinstance(item, ModelSpec):
            spec = item
        elif isinstance(item, str):
            spec = ModelSpec(item)
        elif isinstance(item, type):
            spec = ModelSpec(item.__name__, item)
        elif isinstance(item, (tuple, list)) and 2 <= len(item) <= 4:
            name, cls, *rest = item
            options = dict(rest[0] or {}) if rest else {}
            spec = ModelSpec(str(name), cls, options, dict(rest[1] or {}) if len(rest) > 1 else {})
        else:
            raise ScpertError(
                f"{item!r} is no model: give a name of scpert.model.MODELS, (name, class, options), or a ModelSpec."
            )
        spec.resolve()
        out.append(spec)
    if not out:
        raise ScpertError("models is empty: give at least one.")
    _unique((s.name for s in out), "models")
    return out


# ---------------------------------------------------------------------------------------------- one cell of the table


class _Memory(threading.Thread):
    """Peak resident memory of this process while it runs, sampled, above what it held before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        _give_back_memory()
        self.start_bytes = self.peak = self._now()
        self._halt = threading.Event()

    @staticmethod
    def _now() -> int:
        try:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            try:
                import resource

                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            except ImportError:
                return 0

    def run(self) -> None:
        while not self._halt.wait(0.02):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> _Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self.peak = max(self.peak, self._now())

    @property
    def megabytes(self) -> float:
        return (self.peak - self.start_bytes) / 2**20


def _give_back_memory() -> None:
    """Let glibc return what earlier cells freed; memory that is used again would not count."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


@lru_cache(maxsize=1)
def _prepared(key: tuple[str, int], holder: _Holder) -> _Ready:
    return _Ready(prepare(holder.task, key[1]))


class _Holder:
    """A task that is equal to any other of the same cell, so that the cache does not hash data."""

    def __init__(self, task: Task):
        self.task = task

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Holder)

    def __hash__(self) -> int:
        return 0


class _Ready:
    """A prepared task with its references, one for each test context."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.references = _references(prepared.task, prepared.test, prepared.part(K.TRAIN))
        if not self.references:
            raise SplitError(
                f"Task {prepared.task.name!r}, seed {prepared.seed}: no test cells with controls of their own."
            )


def _references(task: Task, held: AnnData, train: AnnData) -> dict[str, tuple[Any, AnnData | None]]:
    """What held-out cells are compared with, and the controls to predict from (``None``: the model's); one for each context."""
    from ..metrics import Reference

    options = {k: v for k, v in task.setup.items() if v is not None}
    if task.split != "contexts":
        return {"": (Reference(held, train, **options), None)}
    out: dict[str, tuple[Any, AnnData | None]] = {}
    column = _context_key(train, task.split_options.get("context_key"))
    for context in sorted(set(held.obs[column].astype(str))):
        here = held[(held.obs[column].astype(str) == context).to_numpy()].copy()
        is_control = here.obs[task.perturbation_key].astype(str) == task.control
        if is_control.all() or not is_control.any():
            continue
        known = train[(train.obs[column].astype(str) == context).to_numpy()].copy()
        base = known[(known.obs[task.perturbation_key].astype(str) == task.control).to_numpy()].copy()
        # the training mean of the same perturbations elsewhere would be the baseline of transfer; here the
        # context's own training perturbations are the reference, as everywhere
        out[f" @ {context}"] = (Reference(here, known, **options), base if base.n_obs else None)
    return out


def _table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    parts = []
    for suffix, table in tables.items():
        table = table.copy()
        table.attrs = {}
        table.index = table.index + suffix
        parts.append(table)
    return pd.concat(parts)


def _long(tables: Mapping[str, pd.DataFrame], head: Mapping[str, Any]) -> pd.DataFrame:
    table = _table(tables).rename_axis("perturbation").reset_index()
    return table.melt("perturbation", var_name="metric", value_name="value").assign(**head)


def _fit(spec: ModelSpec, options: Mapping[str, Any], task: Task, adata: AnnData, seed: int) -> Any:
    cls = spec.resolve()
    arguments = {k: v for k, v in task.setup.items() if v is not None} | dict(spec.setup)
    if task.split == "contexts" and "covariate_keys" in getattr(cls, "_uses", ()):
        # an effect is the difference to the controls of its own context, not of all
        given = arguments.get("covariate_keys") or []
        given = [given] if isinstance(given, str) else list(given)
        context = _context_key(adata, task.split_options.get("context_key"))
        arguments["covariate_keys"] = list(dict.fromkeys([*given, context]))
    cls.setup_anndata(adata, split_key=task.split_key, **arguments)  # type: ignore[attr-defined]
    model = cls(adata, **options)
    model.train(**{"random_state": seed, **spec.train})
    return model


def _predict(model: Any, labels: Sequence[str], task: Task, seed: int, adata: AnnData | None) -> AnnData:
    return model.predict_perturbation(list(labels), adata=adata, level=task.level, on_unknown="mean", random_state=seed)


def _mean_of(silent: Sequence[str], reference: Any, prepared: Prepared, seed: int, controls: AnnData | None) -> AnnData:
    """What the training mean predicts of some perturbations; as cells, control cells that are moved by it."""
    from .. import metrics

    task = prepared.task
    if task.level == "cell":
        model = _fit(ModelSpec("PerturbedMean"), {}, task, prepared.visible.copy(), seed)
        return _predict(model, silent, task, seed, controls)
    mean = metrics.training_mean(reference)
    return mean[mean.obs[K.PERTURBATION].astype(str).isin(silent).to_numpy()]


def _completed(predicted: AnnData, reference: Any, prepared: Prepared, seed: int, controls: AnnData | None) -> AnnData:
    """A prediction with the training mean for what it leaves out: silence must not thin the others' competitors."""
    labels = predicted.obs[K.PERTURBATION].astype(str).to_numpy()
    finite = np.isfinite(np.asarray(predicted.X.sum(axis=1))).ravel()
    said = set(labels) - set(labels[~finite])
    silent = [p for p in reference.perturbations if p not in said]
    if not silent or len(silent) == len(reference.perturbations) or reference.centroid is None:
        return predicted
    mean = _mean_of(silent, reference, prepared, seed, controls)
    if list(mean.var_names) != list(predicted.var_names):
        return predicted
    import anndata

    out = anndata.concat([predicted[~np.isin(labels, silent)], mean], join="inner", index_unique="-")
    out.uns.update(predicted.uns)
    return out


def _baseline(reference: Any, prepared: Prepared, seed: int, controls: AnnData | None) -> pd.DataFrame:
    """Scores of the training mean; metrics of cells get control cells that are moved by it."""
    from .. import metrics
    from ..metrics._registry import resolve

    task = prepared.task
    table = metrics.evaluate(metrics.training_mean(reference), reference, metrics=task.metrics)
    names = [m.name for m in resolve(task.metrics, ()) if "cells" in m.needs]
    if task.level == "cell" and names:
        moved = _mean_of(reference.perturbations, reference, prepared, seed, controls)
        cells = metrics.evaluate(moved, reference, metrics=names)
        table[cells.columns] = cells
        reasons = {k: v for k, v in table.attrs["reasons"].items() if k not in cells.columns}
        table.attrs["reasons"] = reasons | cells.attrs["reasons"]
    return table


def _choose(spec: ModelSpec, prepared: Prepared, seed: int) -> tuple[dict[str, Any], Any, str]:
    """The best candidate by its prediction of validation perturbations; never sees a test cell."""
    from ..metrics import METRICS, by_chance, evaluate

    task, visible = prepared.task, prepared.visible
    split = visible.obs[task.split_key].astype(str).to_numpy()
    if not (split == K.VAL).any():
        raise SplitError(
            f"{spec.name!r} has a grid, but the split of task {task.name!r} has no val cells to choose on."
        )
    references = _references(task, prepared.part(K.VAL), prepared.part(K.TRAIN))
    best: tuple[float, dict[str, Any], Any] | None = None
    sign = 1.0 if METRICS[spec.select_by].higher_is_better else -1.0
    for options in spec.candidates():
        model = _fit(spec, options, task, visible.copy(), seed)
        tables = []
        for reference, base in references.values():
            predicted = _predict(model, reference.perturbations, task, seed, base)
            # what a candidate does not tell counts as the mean, as in the results
            predicted = _completed(predicted, reference, prepared, seed, base)
            tables.append(by_chance(evaluate(predicted, reference, metrics=[spec.select_by])))
        score = sign * float(pd.concat([t[spec.select_by] for t in tables]).mean()) if tables else np.nan
        if np.isfinite(score) and (best is None or score > best[0]):
            best = (score, options, model)
    if best is None:
        raise ScpertError(
            f"{spec.name!r}: no candidate of the grid has a finite {spec.select_by} on the validation cells."
        )
    chosen = {k: best[1][k] for k in spec.grid or {}}
    return best[1], best[2], json.dumps(chosen, default=str)


def run_cell(task: Task, spec: ModelSpec | str, seed: int, key: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One cell of the table: scores in long form, and what it cost. A model that raises makes a failed row."""
    from .. import metrics

    name = spec if isinstance(spec, str) else spec.name
    cost: dict[str, Any] = {"task": task.name, "model": name, "seed": seed}
    message, status, chosen = "", "ok", ""
    tables: dict[str, pd.DataFrame] = {}
    wrong: dict[str, pd.DataFrame] = {}
    known: dict[str, str] = {}
    group: dict[str, str] = {}
    with _ALONE, _Memory() as memory:
        start = time.perf_counter()
        try:
            ready = _prepared((key, seed), _Holder(task))
            prepared, group = ready.prepared, ready.prepared.group
            start = time.perf_counter()
            model = None
            if isinstance(spec, ModelSpec):
                for part in (spec.options, spec.grid or {}, spec.train, spec.setup):
                    refuse_leaking_options(part, prepared, spec.name)
                if spec.grid:
                    _, model, chosen = _choose(spec, prepared, seed)
                else:
                    model = _fit(spec, spec.options, task, prepared.visible.copy(), seed)
                cost["train_seconds"] = time.perf_counter() - start
            for suffix, (reference, base) in ready.references.items():
                if name == CEILING:
                    table = metrics.ceiling(reference, metrics=task.metrics, n_draws=task.n_draws, random_state=seed)
                elif name == BASELINE:
                    table = _baseline(reference, prepared, seed, base)
                else:
                    begin = time.perf_counter()
                    predicted = _predict(model, reference.perturbations, task, seed, base)
                    cost["predict_seconds"] = cost.get("predict_seconds", 0.0) + time.perf_counter() - begin
                    if K.STATUS in predicted.obs:
                        rows: pd.DataFrame = predicted.obs.drop_duplicates(K.PERTURBATION)  # type: ignore[union-attr]
                        labels = rows[K.PERTURBATION].astype(str) + suffix
                        known |= dict(zip(labels, rows[K.STATUS].astype(str), strict=True))
                    predicted = _completed(predicted, reference, prepared, seed, base)
                    table = metrics.evaluate(predicted, reference, metrics=task.metrics)
                tables[suffix] = metrics.by_chance(table)
                if table.attrs.get("mismatched"):
                    wrong[suffix] = pd.DataFrame(table.attrs["mismatched"]).reindex(columns=table.columns)
        except Exception as error:  # noqa: BLE001 - a failed model must not end the run
            status, message = "failed", f"{type(error).__name__}: {error}"
            logger.warning("%s / %s / seed %d failed: %s", task.name, name, seed, message)
            logger.debug("%s", traceback.format_exc())
    cost |= {
        "seconds": time.perf_counter() - start,
        "peak_megabytes": memory.megabytes,
        "status": status,
        "chosen": chosen,
    }
    head: dict[str, Any] = {"task": task.name, "question": task.question, "model": name, "seed": seed}
    if status == "failed":
        row = {"perturbation": "", "stratum": "", "known": "", "metric": "", "value": np.nan, "status": status}
        frame = pd.DataFrame([{**head, **row, "message": message}])
    else:
        frame = _long(tables, head)
        if wrong:
            frame = pd.concat([frame, _long(wrong, head | {"model": MISMATCHED})], ignore_index=True)
        bare = frame["perturbation"].str.split(" @ ").str[0]
        frame["stratum"] = bare.map(group).fillna("")
        frame["known"] = frame["perturbation"].map(known).fillna("")
        frame["status"], frame["message"] = "ok", chosen
    frame["value"] = frame["value"].astype(float)
    return frame[list(COLUMNS)], cost


COLUMNS = (
    *("task", "question", "model", "seed", "perturbation", "stratum", "known"),
    *("metric", "value", "status", "message"),
)


# ---------------------------------------------------------------------------------------------- the run


def _write(path: Path, frame: pd.DataFrame) -> None:
    frame = frame.copy()
    frame.attrs = {}
    with written_whole(path) as draft:
        frame.to_parquet(draft, index=False)


def _store(folder: Path, name: str, frame: pd.DataFrame, cost: dict[str, Any]) -> None:
    _write(folder / f"{name}.cost.parquet", pd.DataFrame([cost]))
    _write(folder / f"{name}.parquet", frame)  # last: this file says that the cell is finished


def _file_name(task: str, model: str, seed: int, key: str) -> str:
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{task}__{model}")[
        :100
    ]  # the key tells them apart
    return f"{plain}__{seed}__{key}"


def run(
    tasks: Any,
    models: Any,
    *,
    seeds: int | Iterable[int] = (0,),
    out: str | os.PathLike,
    engine: Any = None,
    retry_failed: bool = False,
) -> pd.DataFrame:
    """Run every task, model and seed, and return one tidy table.

    Each finished cell (task, model, seed) is a parquet file under ``out/cells``, written in one step. A run that was
    killed goes on where it was: call it again with the same arguments. A cell whose task, data or options changed has
    another name and is computed anew. Besides the models there are always ``training_mean`` (which scores 0 on the
    calibrated scale), ``ceiling`` (which scores 1) and ``mismatched`` (the replicate of another perturbation: what shared
    noise alone scores).

    No model sees a test cell: they are cut off before it is made. Where the question is about unseen perturbations, a
    split that leaves one in training is refused. Hyper-parameters (:class:`ModelSpec`, ``grid``) are chosen on validation
    perturbations only.

    Parameters
    ----------
    tasks
        Names in :data:`TASKS` or :class:`Task` objects.
    models
        Names in ``scpert.model.MODELS``, ``(name, class, options)`` or :class:`ModelSpec` objects.
    seeds
        Seeds of split and model; a number ``n`` is ``range(n)``.
    out
        Folder of the results.
    engine
        ``None``: one cell after the other, in this process. A Dask client: the cells are spread over its workers; the
        numbers are the same. A worker computes one cell at a time, however many threads it has: for more at once, start more
        workers. Results are written by the calling process, so workers need not share a file system.
    retry_failed
        Compute failed cells again.

    Returns
    -------
    DataFrame, one row per task, model, seed, perturbation and metric: ``task``, ``question``, ``model``, ``seed``,
    ``perturbation``, ``stratum``, ``known`` (what the model knew of the perturbation: ``trained``, ``combination``,
    ``unseen``, ``fallback``), ``metric``, ``value``, ``status`` (``ok``, ``failed``), ``message``. Also in
    ``out/results.parquet``; times and memory of each cell in ``out/costs.parquet`` (see :func:`costs`) and
    ``attrs["costs"]``. A model that raised has one row with ``status`` ``failed``.

    Raises
    ------
    ScpertError
        Unknown tasks or models, names that occur twice.

    Examples
    --------
    >>> import tempfile
    >>> import scpert
    >>> adata = scpert.datasets.simulated(500, 40, 10, random_state=0)
    >>> task = scpert.benchmark.Task("small", adata, "perturbations", metrics=("mse",), n_draws=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = scpert.benchmark.run([task], ["NoChange"], seeds=[0], out=folder)
    >>> sorted(results["model"].unique())
    ['NoChange', 'ceiling', 'mismatched', 'training_mean']
    """
    from ..metrics._registry import resolve

    task_list, specs = resolve_tasks(tasks), resolve_models(models)
    if seeds is None or isinstance(seeds, float):
        raise ScpertError(f"seeds={seeds!r}: give a number of seeds, such as 3, or a list of them, such as [0, 1, 2].")
    given = range(seeds) if isinstance(seeds, (int, np.integer)) else dict.fromkeys(seeds)
    seed_list = [check_seed(s, "a seed of seeds") for s in given]
    if engine is not None and not hasattr(engine, "submit"):
        raise ScpertError(f"engine={engine!r}: give a Dask client (dask.distributed.Client()), or None.")
    if not seed_list:
        raise ScpertError("seeds is empty: give at least one.")
    for task in task_list:
        task.check()
        of_cells = [m.name for m in resolve(task.metrics, ()) if "cells" in m.needs]
        if of_cells and task.setup.get("covariate_keys") and task.setup.get("scale") != K.SCALE_EFFECTS:
            logger.warning(
                "task %s: %s compare cells as they are, not within covariate_keys: where a covariate goes with perturbations, its shift "
                "counts as an effect there.",
                task.name,
                listing(of_cells, 5),
            )
    folder = Path(out)
    cells = folder / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    rows: list[ModelSpec | str] = [BASELINE, CEILING, *specs]
    plan: list[tuple[Task, ModelSpec | str, int, str, str]] = []
    for task in task_list:
        described = {**task.describe(), "format": _FORMAT}
        key = fingerprint(described)
        for seed in seed_list:
            for spec in rows:
                own = spec if isinstance(spec, str) else spec.describe()
                label = spec if isinstance(spec, str) else spec.name
                plan.append((task, spec, seed, key, _file_name(task.name, label, seed, fingerprint([key, own])[:10])))
    todo = [cell for cell in plan if not _finished(cells / f"{cell[4]}.parquet", retry_failed)]
    if len(todo) < len(plan):
        logger.info("benchmark: %d of %d cells are finished already", len(plan) - len(todo), len(plan))
    if engine is None:
        for task, spec, seed, key, name in progress(todo, total=len(todo), description="Benchmark", unit="cell"):
            _store(cells, name, *run_cell(task, spec, seed, key))
        _prepared.cache_clear()
    else:
        _spread(engine, todo, cells)
    return _collect(folder, cells, [cell[4] for cell in plan])


def _finished(path: Path, retry_failed: bool) -> bool:
    if not path.exists():
        return False
    if not retry_failed:
        return True
    return "failed" not in set(pd.read_parquet(path, columns=["status"])["status"])


def _spread(client: Any, todo: Sequence[tuple[Task, ModelSpec | str, int, str, str]], cells: Path) -> None:
    from dask.distributed import as_completed

    sent: dict[str, Any] = {}
    futures = {}
    for task, spec, seed, key, name in todo:
        if key not in sent:
            sent[key] = client.scatter(task, broadcast=False, hash=False)
        futures[client.submit(run_cell, sent[key], spec, seed, key, pure=False)] = name
    try:
        done = as_completed(futures)
        for future in progress(done, total=len(futures), description="Benchmark", unit="cell"):
            _store(cells, futures[future], *future.result())
            future.release()
    except BaseException:
        client.cancel(list(futures))
        raise


def _collect(folder: Path, cells: Path, names: Sequence[str]) -> pd.DataFrame:
    results = pd.concat([pd.read_parquet(cells / f"{name}.parquet") for name in names], ignore_index=True)
    spent = pd.concat([pd.read_parquet(cells / f"{name}.cost.parquet") for name in names], ignore_index=True)
    _write(folder / "results.parquet", results)
    _write(folder / "costs.parquet", spent)
    results.attrs["costs"] = spent.to_dict("records")
    return results


def costs(results: pd.DataFrame | str | os.PathLike) -> pd.DataFrame:
    """What each cell of a benchmark cost.

    Parameters
    ----------
    results
        The table of :func:`run`, or its folder.

    Returns
    -------
    DataFrame: ``task``, ``model``, ``seed``, ``train_seconds``, ``predict_seconds``, ``seconds`` (all but reading the
    data), ``peak_megabytes`` (above what the process held before), ``status``, ``chosen`` (hyper-parameters).

    Examples
    --------
    >>> import scpert
    >>> import pandas as pd
    >>> table = pd.DataFrame({"task": ["a"]})
    >>> table.attrs["costs"] = [{"task": "a", "model": "b", "seed": 0, "seconds": 1.0}]
    >>> float(scpert.benchmark.costs(table)["seconds"].iloc[0])
    1.0
    """
    if isinstance(results, pd.DataFrame):
        return pd.DataFrame(results.attrs.get("costs", []))
    if not (Path(results) / "costs.parquet").is_file():
        raise ScpertError(
            f"{str(results)!r} holds no results of scpert.benchmark.run (costs.parquet). Give its folder out=."
        )
    return pd.read_parquet(Path(results) / "costs.parquet")
