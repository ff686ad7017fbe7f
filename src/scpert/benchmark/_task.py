"""A task: data, a split and the question it asks; what a model may see of it, and what it is judged by."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CellType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_obs_key, check_whole, listing
from ..data import canonical, parse
from ..errors import ScpertError, SplitError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["TASKS", "Task"]

logger = logging.getLogger("scpert")

#: Kinds of split in which no test perturbation may be in training.
UNSEEN = ("perturbations", "combinations", "folds")

#: Metrics of a benchmark by default: what can be believed, with the targets left out where a target gives the answer away.
METRICS = (
    "pearson_delta",
    "pearson_delta_no_target",
    "pearson_delta_centroid",
    "pearson_delta_centroid_no_target",
    "mse",
    "mse_delta_no_target",
    "wmse",
    "centroid_accuracy",
    "retrieval_cosine_no_targets",
    "discrimination_score_l1",
    "variance_ratio",
)


@dataclass(frozen=True)
class Task:
    """Data, split and question.

    Attributes
    ----------
    name
        Unique name.
    data
        An AnnData, the path of an h5ad file, or a function without arguments that returns an AnnData.
    split
        A kind of :func:`scpert.pp.split`, or ``"given"``: the column ``split_key`` is there already.
    question
        What is asked, in a few words.
    split_options
        Further arguments of :func:`scpert.pp.split`. With ``kind="folds"`` the seed ``s`` tests fold ``s % n_folds``.
    setup
        Arguments of ``setup_anndata`` that describe the data: ``perturbation_key``, ``control``, ``layer``, ``scale``,
        ``library_size_key``, ``covariate_keys``.
    split_key
        Column of the split.
    max_train_cells
        At most this many training cells of each perturbation: "seen with few cells".
    metrics
        Metrics to compute.
    level
        Level of the predictions: ``"pseudobulk"`` or ``"cell"``.
    n_draws
        Halvings of the ceiling.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(400, 40, 8, random_state=0)
    >>> scpert.benchmark.Task("mine", adata, "perturbations").question
    'unseen perturbations'
    """

    name: str
    data: Any
    split: str = "perturbations"
    question: str = ""
    split_options: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    split_key: str = K.SPLIT
    max_train_cells: int | None = None
    metrics: tuple[str, ...] = METRICS
    level: str = "pseudobulk"
    n_draws: int = 10

    def __post_init__(self) -> None:
        kinds = ("perturbations", "combinations", "cells", "contexts", "folds", "given")
        if self.split not in kinds:
            raise ScpertError(f"Task {self.name!r}: split={self.split!r} is not known. Choose one of {listing(kinds)}.")
        allowed = ("perturbation_key", "control", "layer", "scale", "library_size_key", "covariate_keys")
        unknown = [k for k in self.setup if k not in allowed]
        if unknown:
            raise ScpertError(f"Task {self.name!r}: setup has {listing(unknown)}; allowed are {listing(allowed)}.")
        if (
            self.split == "given"
            and "context" in self.question.casefold()
            and self.setup.get("scale") != K.SCALE_EFFECTS
        ):
            raise ScpertError(
                f"Task {self.name!r}: with a given split nothing says which cells are of which context, and predictions would start "
                "from the controls of the training contexts. Use split='contexts' with split_options={'context_key': ...}, which "
                "starts from each context's own; or call model.predict_perturbation(adata=controls) and metrics.evaluate yourself."
            )
        if self.max_train_cells is not None:
            object.__setattr__(self, "max_train_cells", check_whole("max_train_cells", self.max_train_cells))
        if not self.question:
            few = self.max_train_cells is not None
            text = {
                "perturbations": "unseen perturbations",
                "folds": "unseen perturbations",
                "combinations": "unseen combinations",
                "contexts": "unseen context",
                "cells": "seen with few cells" if few else "seen perturbations, new cells",
                "given": "given split",
            }
            object.__setattr__(self, "question", text[self.split])

    @property
    def perturbation_key(self) -> str:
        """Column of the labels."""
        return self.setup.get("perturbation_key", K.PERTURBATION)

    @property
    def control(self) -> str:
        """Label of the control."""
        return self.setup.get("control", K.CONTROL)

    def describe(self) -> dict[str, Any]:
        """What tells this task from another, for the name of its results."""
        return {
            "name": self.name,
            "data": fingerprint(self.data),
            "question": self.question,
            "split": self.split,
            "split_options": dict(self.split_options),
            "setup": dict(self.setup),
            "split_key": self.split_key,
            "max_train_cells": self.max_train_cells,
            "metrics": list(self.metrics),
            "level": self.level,
            "n_draws": self.n_draws,
        }

    def check(self) -> None:
        """Raise before anything is computed if a metric is not known or the file is not there."""
        from ..metrics._registry import resolve

        try:
            resolve(self.metrics, ())
        except ScpertError as error:
            raise ScpertError(f"Task {self.name!r}: {error}") from None
        if isinstance(self.data, (str, Path)) and not Path(self.data).is_file():
            raise ScpertError(
                f"Task {self.name!r}: there is no file {str(self.data)!r}. Give the path of an h5ad file."
            )

    def load(self) -> AnnData:
        """The data, as a copy of its own."""
        if isinstance(self.data, (str, Path)):
            import anndata

            return anndata.read_h5ad(self.data)
        if callable(self.data):
            return self.data()
        return self.data.to_memory() if self.data.isbacked else self.data.copy()


def fingerprint(value: Any) -> str:
    """A short hash of anything an option can hold: tables, arrays, files, functions."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any, seen: tuple[int, ...] = ()) -> None:
    if id(value) in seen:  # a function that calls itself
        return
    if isinstance(value, Path) or isinstance(value, str) and value.endswith(".h5ad"):
        digest.update(b"file")
        with open(value, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    elif hasattr(value, "obs_names") and hasattr(value, "var_names"):
        from ..data import iter_rows

        digest.update(b"anndata")
        for names in (value.obs_names, value.var_names):
            digest.update("\0".join(map(str, names)).encode())
        _feed(digest, value.obs.astype(str))
        matrices = [value.X, *(value.layers[k] for k in sorted(k for k in value.layers if k is not None))]
        for matrix in matrices:
            if matrix is not None:
                for _, block in iter_rows(matrix):
                    for part in (block.data, block.indices, block.indptr):
                        digest.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(value, (pd.DataFrame, pd.Series)):
        digest.update(value.to_csv().encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes() if value.dtype != object else repr(value.tolist()).encode())
    elif sparse.issparse(value):
        matrix = value.tocsr()
        digest.update(f"sparse{matrix.shape}".encode())
        _feed(digest, [matrix.data, matrix.indices, matrix.indptr])
    elif isinstance(value, Mapping):
        digest.update(f"map{len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"\0{key}\0".encode())
            _feed(digest, value[key], seen)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list{len(value)}".encode())
        for item in value:
            digest.update(b"\0")  # [1, 23] is not [12, 3]
            _feed(digest, item, seen)
    elif isinstance(value, (set, frozenset)):  # it has no order of its own
        _feed(digest, ["set", *sorted(map(fingerprint, value))])
    elif is_dataclass(value) and not isinstance(value, type):
        digest.update(type(value).__qualname__.encode())
        _feed(digest, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, functools.partial):
        digest.update(b"partial")
        _feed(digest, [value.func, list(value.args), value.keywords])
    elif callable(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(type(value)))}"
        try:
            name += inspect.getsource(value)
        except (OSError, TypeError):
            pass
        digest.update(name.encode())
        for part in _around(value):
            _feed(digest, part, (*seen, id(value)))
    elif hasattr(value, "__array__") and not np.isscalar(value):  # an index, a tensor: their text is cut
        _feed(digest, np.asarray(value.detach().cpu() if hasattr(value, "detach") else value))
    elif type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):  # its text is an address
        digest.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())
        _feed(digest, vars(value), (*seen, id(value)))
    else:
        digest.update(json.dumps(value, default=repr).encode())


def _around(value: Any) -> list[Any]:
    """What two callables of the same source differ in: defaults, values from around them, the object they belong to."""
    cells = [cell for cell in getattr(value, "__closure__", None) or () if cell != CellType()]  # but for empty ones
    owner = getattr(value, "__self__", None)
    state = () if isinstance(owner, ModuleType) else getattr(owner, "__dict__", ())
    own = () if isinstance(value, (type, FunctionType)) else getattr(value, "__dict__", ())
    parts = (
        getattr(value, "__defaults__", None),
        getattr(value, "__kwdefaults__", None),
        *(cell.cell_contents for cell in cells),
        dict(state),
        dict(own),
    )
    return [part for part in parts if part is not None and not (isinstance(part, dict) and not part)]


# ---------------------------------------------------------------------------------------------- what a model may see


@dataclass
class Prepared:
    """A task with one seed: what a model may see, and what it is judged by."""

    task: Task
    seed: int
    visible: AnnData  # train and val cells only; the test cells are not in it
    test: AnnData
    group: dict[str, str]  # stratum of each test perturbation

    def part(self, name: str) -> AnnData:
        """The train or val cells."""
        return self.visible[(self.visible.obs[self.task.split_key].astype(str) == name).to_numpy()].copy()


def prepare(task: Task, seed: int) -> Prepared:
    """Load, split, refuse leaks, and cut the test cells off."""
    adata = task.load()
    key = task.split_key
    effects = task.setup.get("scale") == K.SCALE_EFFECTS
    if task.split != "given":
        from .. import pp

        options: dict[str, Any] = {
            "kind": task.split,
            "key_added": key,
            "perturbation_key": task.perturbation_key,
            "control": None if effects else task.control,
            "random_state": seed,
            **task.split_options,
        }
        if effects:
            adata = adata[(adata.obs[task.perturbation_key].astype(str) != task.control).to_numpy()].copy()
        if task.split == "folds":
            n_folds = int(options.get("n_folds", 5))
            options |= {"n_folds": n_folds, "fold": seed % n_folds, "random_state": seed // n_folds}
        pp.split(adata, **options)
    split = check_obs_key(adata, key, "split_key").astype(str).to_numpy()
    refuse_leaks(adata, task, split)
    group_key = f"{key}_group"
    labels = adata.obs[task.perturbation_key].astype(str).to_numpy()
    test = split == K.TEST
    group: dict[str, str] = {}
    if group_key in adata.obs:
        for label, value in zip(labels[test], adata.obs[group_key].astype(str).to_numpy()[test], strict=True):
            group.setdefault(canonical(label, task.control), value)
    visible = np.isin(split, (K.TRAIN, K.VAL))
    if task.max_train_cells is not None:
        rng = np.random.default_rng(seed)
        for label in np.unique(labels[split == K.TRAIN]):
            if label != task.control:
                rows = np.flatnonzero((labels == label) & (split == K.TRAIN))
                visible[rng.permutation(rows)[task.max_train_cells :]] = False
    seen = adata[visible].copy()
    for place in ("uns", "obsm", "varm", "obsp", "varp"):  # results over all cells, a simulation's truth
        for name in list(getattr(seen, place)):
            del getattr(seen, place)[name]
    return Prepared(task, seed, seen, adata[test].copy(), group)


def refuse_leaks(adata: AnnData, task: Task, split: np.ndarray) -> None:
    """Raise if test (or validation) perturbations are in training where the question is about unseen ones."""
    unknown = sorted(set(split) - {K.TRAIN, K.VAL, K.TEST})
    if len(unknown) == len(set(split)):
        raise SplitError(
            f"Task {task.name!r}: obs[{task.split_key!r}] holds {listing(unknown, 5)}, not train, val, test."
        )
    if not (split == K.TEST).any() or not (split == K.TRAIN).any():
        raise SplitError(f"Task {task.name!r}: the split leaves no cells in train or in test.")
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()]
        parts = pd.Series(split, index=adata.obs_names)[twice.unique()]
        if parts.groupby(level=0).nunique().max() > 1:
            raise SplitError(f"Task {task.name!r}: cell {twice[0]!r} is in two parts of the split: a leak.")
    given = task.split == "given" and "context" not in task.question.casefold()
    unseen = task.split in UNSEEN or (given and "unseen" in task.question)
    if not (unseen or given):
        return
    labels = [canonical(x, task.control) for x in adata.obs[task.perturbation_key].astype(str)]
    of_part = {
        part: {x for x, s in zip(labels, split, strict=True) if s == part} - {task.control}
        for part in (K.TRAIN, K.VAL, K.TEST)
    }
    if not unseen:  # nothing is said of the question: what no model learns from may not be chosen on, either
        both = (of_part[K.VAL] & of_part[K.TEST]) - of_part[K.TRAIN]
        if both:
            raise SplitError(
                f"Task {task.name!r}: {listing(sorted(both), 4)} {'is' if len(both) == 1 else 'are'} in val and in test but not "
                "in train: a leak, hyper-parameters would be chosen on tested perturbations. Give every perturbation one part."
            )
        return
    for part, other in ((K.TRAIN, K.TEST), (K.VAL, K.TEST), (K.TRAIN, K.VAL)):
        both = of_part[part] & of_part[other]
        if both:
            raise SplitError(
                f"Task {task.name!r} asks about {task.question}, but {listing(sorted(both), 4)} "
                f"{'is' if len(both) == 1 else 'are'} in {part} and in {other}: a leak. Give every perturbation one part."
            )
    singles = {x for x in of_part[K.TEST] if len(parse(x, task.control)) == 1}
    inside = {
        x
        for x in of_part[K.TRAIN] | of_part[K.VAL]
        if set(parse(x, task.control)) & singles and len(parse(x, task.control)) > 1
    }
    if inside:
        raise SplitError(
            f"Task {task.name!r}: the training combination(s) {listing(sorted(inside), 4)} hold a target that is tested "
            "alone: a leak. Hold them out too (scpert.pp.split does)."
        )


def refuse_leaking_options(options: Mapping[str, Any], prepared: Prepared, where: str) -> None:
    """Raise if an option holds, at any depth, an AnnData with cells of test perturbations (from the test data themselves)."""
    names = set(prepared.test.obs_names.astype(str))
    seen: dict[int, Any] = {}  # the objects are kept, so that no other one gets their id

    def look(key: str, value: Any) -> None:
        if id(value) in seen:
            return
        seen[id(value)] = value
        if hasattr(value, "obs_names"):
            if names & set(value.obs_names.astype(str)):
                raise SplitError(
                    f"{where}: the option {key!r} holds test cells of task {prepared.task.name!r}: a leak."
                )
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                look(f"{key}.{name}", inner)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                look(key, inner)
        elif isinstance(value, functools.partial):
            look(key, [value.func, *value.args, *value.keywords.values()])
        elif callable(value):
            look(key, _around(value))
        elif hasattr(value, "__dict__") and not hasattr(value, "__array__") and not isinstance(value, ModuleType):
            look(key, vars(value))

    for key, value in options.items():
        look(str(key), value)


# ---------------------------------------------------------------------------------------------- tasks that need no file


def _simulated(**options: Any) -> Callable[[], AnnData]:
    return _Simulated(options)


@dataclass(frozen=True)
class _Simulated:
    """A simulated screen, as data of a task; picklable."""

    options: dict[str, Any]

    def __call__(self) -> AnnData:
        from .. import datasets

        return datasets.simulated(**self.options)


def _tasks() -> dict[str, Task]:
    screen = _simulated(n_cells=4000, n_genes=300, n_targets=30, n_combinations=20, random_state=1)
    null = _simulated(n_cells=3000, n_genes=200, n_targets=24, n_combinations=0, effect_size=0.0, random_state=2)
    out = [
        Task("simulated_unseen", screen, "perturbations", split_options={"fractions": (0.6, 0.2, 0.2)}),
        Task("simulated_combinations", screen, "combinations", split_options={"fractions": (0.6, 0.2, 0.2)}),
        Task("simulated_cells", screen, "cells", split_options={"fractions": (0.5, 0.2, 0.3)}),
        Task("simulated_few_cells", screen, "cells", split_options={"fractions": (0.5, 0.2, 0.3)}, max_train_cells=10),
        Task(
            "simulated_context",
            screen,
            "contexts",
            split_options={"context_key": "donor", "fractions": (0.5, 0.2, 0.3)},
        ),
        Task(
            "simulated_null", null, "cells", question="no effect at all", split_options={"fractions": (0.5, 0.2, 0.3)}
        ),
    ]
    return {task.name: task for task in out}


#: Tasks that need no file, by name.
TASKS: dict[str, Task] = _tasks()


def resolve_tasks(tasks: Any) -> list[Task]:
    """Tasks by name, or as they are."""
    if isinstance(tasks, (str, Task)):
        tasks = [tasks]
    elif isinstance(tasks, Mapping):
        tasks = list(tasks.values())
    elif tasks is None or hasattr(tasks, "obs_names"):
        raise ScpertError(f"tasks is {type(tasks).__name__}: give names of TASKS, or Task(name, data, split).")
    out = []
    for task in tasks:
        if isinstance(task, Task):
            out.append(task)
        elif task in TASKS:
            out.append(TASKS[task])
        else:
            raise ScpertError(
                f"The task {task!r} is not known. TASKS has {listing(TASKS, 30)}; or give a Task(name, data, ...)."
            )
    if not out:
        raise ScpertError("tasks is empty: give at least one.")
    _unique((t.name for t in out), "tasks")
    return out


def _unique(names: Iterable[str], what: str) -> None:
    names = list(names)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ScpertError(f"{what}: the name(s) {listing(twice)} occur twice. Names tell results apart: choose others.")
