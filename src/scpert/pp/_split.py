"""Splits of a screen into cells to learn from, to stop by, and to judge by: visible columns of ``obs``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_seed, check_unique_names, listing
from .._docs import shared_docs
from ..data import Screen, check_labels, parse, scale_evidence
from ..data._screen import resolve_layer
from ..errors import LabelError, ScpertError, SplitError
from ._write import record, writable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["split"]

logger = logging.getLogger("scpert")

KINDS = ("cells", "perturbations", "combinations", "contexts", "folds")
VALUES = (K.TRAIN, K.VAL, K.TEST)
_CONTEXT_COLUMNS = ("context", "cell_line", "cell_type", "celltype", "tissue", "condition", "donor", "batch")
_DRAWS = 200


def _allot(n: int, fractions: np.ndarray) -> np.ndarray:
    """Items for train, val and test: largest remainder, at least one for each positive fraction."""
    exact = n * fractions
    counts = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - counts), kind="stable")[: n - counts.sum()]:
        counts[i] += 1
    for i in np.flatnonzero((counts == 0) & (fractions > 0))[::-1]:  # test before val
        if counts.max() > 1:
            counts[np.argmax(counts)] -= 1
            counts[i] += 1
    return counts


def _deal(n: int, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes 0, 1, 2 for ``n`` ordered items in exact numbers, each spread evenly over the order.

    Items ordered by stratum are so divided within each stratum, as evenly as whole items allow.
    """
    counts = _allot(n, fractions)
    place = [(np.arange(c) + rng.random()) / c for c in counts if c]
    codes = np.repeat(np.arange(3), counts)
    return codes[np.argsort(np.concatenate(place), kind="stable")] if n else codes


def _deal_groups(groups: np.ndarray, strata: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes of cells, divided within each group, evenly over its strata."""
    out = np.full(len(groups), -1, dtype=np.int64)
    if len(groups) == 0:
        return out
    order = np.lexsort((rng.random(len(groups)), strata, groups))
    starts = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        out[order[start:end]] = _deal(end - start, fractions, rng)
    return out


def _fractions(fractions: Sequence[float]) -> np.ndarray:
    values = np.asarray(fractions, dtype=float)
    if values.shape != (3,) or not np.isfinite(values).all() or (values < 0).any() or abs(values.sum() - 1) > 1e-6:
        raise SplitError(
            f"fractions={fractions!r}: give three numbers >= 0 that sum to 1, for train, val and test, "
            "such as (0.7, 0.2, 0.1) or (0.8, 0.0, 0.2)."
        )
    if values[0] == 0:
        raise SplitError(f"fractions={fractions!r}: the first, for train, must be above 0.")
    return values / values.sum()


def _read_labels(adata: AnnData, key: str, control: str | None) -> np.ndarray:
    series = check_obs_key(adata, key, "perturbation_key")
    if control is not None and not series.isna().any() and control not in set(series.astype(str)):
        try:
            layer = resolve_layer(adata, None)
            effects = scale_evidence(adata.X if layer is None else adata.layers[layer]).scale == K.SCALE_EFFECTS
        except ScpertError:
            effects = False
        if effects:
            logger.info(
                "split: no cell is labelled %r and the values are effects: taken as a table of effects", control
            )
            control = None
    try:
        return check_labels(series, control, key=key, genes=adata.var_names)
    except LabelError as error:
        if str(error).startswith("No cell"):
            raise LabelError(f"{error} For a table of effects without control rows pass control=None.") from None
        raise


class _Plan:
    """What a kind of split decides: the codes of the labels or cells, strata, and fields to record."""

    def __init__(self, codes: np.ndarray, group: np.ndarray, fold: np.ndarray | None = None):
        self.codes = codes
        self.group = group
        self.fold = fold


class _Splitter:
    def __init__(
        self,
        labels: np.ndarray,
        control: str | None,
        fractions: np.ndarray,
        strata: np.ndarray,
        rng: np.random.Generator,
        effect: dict[str, float] | None,
    ):
        self.labels = labels
        self.is_control = labels == control if control is not None else np.zeros(len(labels), dtype=bool)
        self.names, self.position = np.unique(labels.astype(str), return_inverse=True)
        self.targets = {n: () if n == control else parse(n, control or K.CONTROL) for n in map(str, self.names)}
        self.perturbations = [n for n in map(str, self.names) if self.targets[n]]
        self.fractions = fractions
        self.strata = strata
        self.rng = rng
        self.effect = effect
        self.parts = int((fractions > 0).sum())
        if not self.perturbations:
            raise SplitError("There is no perturbation to split: all cells are controls.")

    # ------------------------------------------------------------------ helpers

    def control_codes(self) -> np.ndarray:
        """Codes of the cells, with only those of the controls set: divided by the fractions."""
        codes = np.zeros(len(self.labels), dtype=np.int64)
        n = int(self.is_control.sum())
        if 0 < n < self.parts:
            raise SplitError(
                f"There are {n} control cell(s), but {self.parts} parts (train, val, test) need one each: a split needs "
                "controls in every part. Set a fraction to 0, or add controls."
            )
        at = np.flatnonzero(self.is_control)
        codes[at] = _deal_groups(np.zeros(n, dtype=int), self.strata[at], self.fractions, self.rng)
        return codes

    def need(self, n: int, what: str, advice: str, least: int | None = None) -> None:
        least = self.parts if least is None else least
        if n < least:
            raise SplitError(f"Too few {what}: {n}, but at least {least} are needed. {advice}")

    def order(self, units: Sequence[str]) -> list[str]:
        """Units in random order or, to be stratified by effect size, in order of it."""
        shuffled = [units[i] for i in self.rng.permutation(len(units))]
        effect = self.effect
        if effect is None:
            return shuffled
        return sorted(shuffled, key=lambda u: effect.get(u, 0.0))

    def units(self) -> list[str]:
        """Targets to hold out: those perturbed alone, or all where these are too few."""
        alone = [n for n in self.perturbations if len(self.targets[n]) == 1]
        if len(alone) >= self.parts:
            return alone
        return sorted({t for targets in self.targets.values() for t in targets})

    def spread(self, of_label: dict[str, int]) -> np.ndarray:
        """Codes of the cells from codes of the labels; controls divided."""
        codes = self.control_codes()
        table = np.array([of_label.get(str(n), 0) for n in self.names])
        return np.where(self.is_control, codes, table[self.position])

    def groups(self, codes: np.ndarray) -> np.ndarray:
        """Stratum of each cell: ``control``, ``single``, or ``seen<k>``: k targets of a combination are trained alone."""
        trained = set(self.labels[codes == 0])
        stratum = {
            name: K.CONTROL
            if not targets
            else "single"
            if len(targets) == 1
            else f"seen{sum(t in trained for t in targets)}"
            for name, targets in self.targets.items()
        }
        return np.array([stratum[str(n)] for n in self.names], dtype=object)[self.position]

    @staticmethod
    def held(targets: Sequence[str], of_target: dict[str, int]) -> int:
        """A label belongs to test if one of its targets does, else to val if one does, else to train."""
        return max((of_target.get(t, 0) for t in targets), default=0)

    # ------------------------------------------------------------------ kinds

    def cells(self) -> _Plan:
        n = np.bincount(self.position, minlength=len(self.names))
        few = [f"{name} ({k})" for name, k in zip(self.names, n, strict=True) if k < self.parts]
        if few:
            raise SplitError(
                f"{len(few)} perturbation(s) have fewer cells than the {self.parts} parts (train, val, test) need: "
                f"{listing(few)}. Drop them with scpert.pp.filter_perturbations(adata, min_cells={self.parts}), or use "
                "kind='perturbations'."
            )
        codes = _deal_groups(self.position, self.strata, self.fractions, self.rng)
        return _Plan(codes, self.groups(codes))

    def held_out_perturbations(self) -> _Plan:
        units = self.units()
        self.need(len(units), "perturbations to hold some out", "Use kind='cells' or set a fraction to 0.")
        order = self.order(units)
        of_target = dict(zip(order, _deal(len(order), self.fractions, self.rng).tolist(), strict=True))
        of_label = {name: self.held(targets, of_target) for name, targets in self.targets.items()}
        codes = self.spread(of_label)
        return _Plan(codes, self.groups(codes))

    def combinations(self, seen: Collection[int]) -> _Plan:
        combos = [n for n in self.perturbations if len(self.targets[n]) > 1]
        alone = {n for n in self.perturbations if len(self.targets[n]) == 1}
        self.need(
            len(combos),
            "combinations (labels 'A+B')",
            "Use kind='perturbations' for single perturbations.",
            least=2 if self.fractions[2] > 0 or self.fractions[1] > 0 else 1,
        )
        complete = [n for n in combos if all(t in alone for t in self.targets[n])]
        if not alone:
            raise SplitError(
                f"None of the targets of the {len(combos)} combinations is perturbed alone, so that no stratum (0, 1 or 2 "
                "seen) can be told. Use kind='perturbations'."
            )
        candidates = sorted({t for n in combos for t in self.targets[n] if t in alone})
        hold_out = bool({0, 1} & set(seen)) and len(candidates) >= self.parts and (self.fractions[1:] > 0).any()
        missing = frozenset(t for n in combos for t in self.targets[n] if t not in alone)
        best: tuple[int, dict[str, int]] = (-1, {})
        for _ in range(_DRAWS):
            of_target: dict[str, int] = {}
            if hold_out:
                order = self.order(candidates)
                of_target = dict(zip(order, _deal(len(order), self.fractions, self.rng).tolist(), strict=True))
            of_label = {n: self.held((n,), of_target) for n in alone}
            rest = [
                n for n in combos if any(of_target.get(t, 0) for t in self.targets[n]) or set(self.targets[n]) & missing
            ]
            free = sorted(set(combos) - set(rest))
            incomplete = [n for n in rest if not any(of_target.get(t, 0) for t in self.targets[n])]
            for n in set(rest) - set(incomplete):
                of_label[n] = self.held(self.targets[n], of_target)
            # a combination with a target never perturbed alone is not trained on: its stratum would not hold
            later = np.r_[0.0, self.fractions[1:]]
            for group, share in (
                (incomplete, later / later.sum() if later.any() else self.fractions),
                (free, self.fractions),
            ):
                order = self.order(sorted(group))
                if len(order) == 1 and share[2] > 0:  # a single one is for the test
                    dealt = [2]
                else:
                    dealt = _deal(len(order), share, self.rng).tolist()
                of_label.update(zip(order, dealt, strict=True))
            strata = {(of_label[n], sum(of_label.get(t, 3) == 0 for t in self.targets[n])) for n in combos}
            score = (
                10 * sum(code == 2 for code, _ in strata) + sum(code == 1 for code, _ in strata) + ((0, 2) in strata)
            )
            if score > best[0]:
                best = (score, of_label)
        of_label = best[1]
        if self.fractions[2] > 0 and not any(of_label[n] == 2 for n in combos):
            raise SplitError(f"The {len(combos)} combinations leave none for test. Use other fractions.")
        codes = self.spread(of_label)
        logger.info(
            "split: %d of %d combinations have both targets perturbed alone; no training label has a held-out target",
            len(complete),
            len(combos),
        )
        return _Plan(codes, self.groups(codes))

    def contexts(self, context: np.ndarray, chosen: Sequence[str]) -> _Plan:
        by_label: dict[str, list[str]] = {}
        pairs = pd.DataFrame({"label": self.labels.astype(str), "context": context.astype(str)})[~self.is_control]
        for label, where in pairs.drop_duplicates().sort_values(["label", "context"]).itertuples(index=False):
            by_label.setdefault(label, []).append(where)
        left = {label: len(where) for label, where in by_label.items()}  # contexts still in training
        shared = [label for label, n in left.items() if n > 1]
        self.need(
            len(shared),
            "perturbations that occur in more than one context",
            "Only those can be held out in one context and learned from in another; see context_key=.",
        )
        held: dict[tuple[str, str], int] = {}
        for where in chosen:
            here = [label for label in shared if where in by_label[label]]
            if not here:
                continue
            counts = _allot(len(here), self.fractions) if len(here) >= self.parts else np.array([len(here), 0, 0])
            free = [label for label in self.order(here) if left[label] > 1]
            # spread over the order, so that effect sizes are even; those free to leave come first
            take = min(len(free), int(counts[1:].sum()))
            picked = [free[i] for i in np.linspace(0, len(free) - 1, take).astype(int)] if take else []
            n_test = min(int(counts[2]), take)
            to_test = set(self.rng.permutation(take)[:n_test].tolist())
            for i, label in enumerate(picked):
                held[label, where] = 2 if i in to_test else 1
                left[label] -= 1
        if not any(code == 2 for code in held.values()) and self.fractions[2] > 0:
            raise SplitError(
                f"No perturbation could be held out: {len(shared)} occur in more than one context, of contexts "
                f"{listing(chosen)}. Use larger fractions for test, or other contexts=."
            )
        codes = self.control_codes()
        out = np.array(
            [
                codes[i] if self.is_control[i] else held.get((label, where), 0)
                for i, (label, where) in enumerate(zip(self.labels.astype(str), context.astype(str), strict=True))
            ]
        )
        group = np.where(
            self.is_control,
            K.CONTROL,
            np.where(out > 0, "new_context", np.where(pairs_shared(self.labels, shared), "seen", "one_context")),
        ).astype(object)
        return _Plan(out, group)

    def folds(self, n_folds: int, fold: int) -> _Plan:
        units = self.units()
        self.need(len(units), f"perturbations for {n_folds} folds", "Use fewer folds (n_folds=).", least=n_folds)
        order = self.order(units)
        start = int(self.rng.integers(n_folds))
        fold_of = {u: (i + start) % n_folds for i, u in enumerate(order)}
        rest = [u for u in order if fold_of[u] != fold]
        share = np.array([self.fractions[0], self.fractions[1], 0.0])
        share /= share.sum()
        # the validation share has its own stream, so that the folds are the same whichever is the test fold
        inner = np.random.default_rng([int(self.rng.integers(2**31)), fold])
        if share[1] > 0 and len(rest) >= 2:
            dealt = [rest[i] for i in (inner.permutation(len(rest)) if self.effect is None else range(len(rest)))]
            of_target = dict(zip(dealt, _deal(len(rest), share, inner).tolist(), strict=True))
        else:
            of_target = dict.fromkeys(rest, 0)
        of_target |= {u: 2 for u in units if fold_of[u] == fold}
        codes = self.spread({name: self.held(targets, of_target) for name, targets in self.targets.items()})
        folds = {name: {fold_of[t] for t in targets if t in fold_of} for name, targets in self.targets.items()}
        number = np.array([next(iter(f)) if len(f) == 1 else -1 for f in (folds[str(n)] for n in self.names)])
        return _Plan(codes, self.groups(codes), number[self.position])


def pairs_shared(labels: np.ndarray, shared: Collection[str]) -> np.ndarray:
    """Whether the label of each cell is among ``shared``."""
    return np.isin(labels.astype(str), list(shared))


@shared_docs
def split(
    adata: AnnData,
    *,
    kind: str,
    fractions: Sequence[float] = (0.7, 0.2, 0.1),
    key_added: str = K.SPLIT,
    random_state: int | np.random.Generator | None = 0,
    perturbation_key: str = K.PERTURBATION,
    control: str | None = K.CONTROL,
    covariate_keys: str | Sequence[str] | None = None,
    context_key: str | None = None,
    contexts: Sequence[str] | None = None,
    seen: Collection[int] = (0, 1, 2),
    n_folds: int = 5,
    fold: int = 0,
    stratify_by_effect: bool = False,
    copy: bool = False,
) -> AnnData | None:
    r"""Divide a screen into training, validation and test cells.

    ============================  ===================================================================================
    ``kind``                      what is held out
    ============================  ===================================================================================
    ``"cells"``                   cells of every perturbation (all perturbations are seen in training)
    ``"perturbations"``           targets, with every combination that holds one of them
    ``"combinations"``            combinations with 0, 1 or 2 targets seen alone in training
    ``"contexts"``                a perturbation in one context (cell line, donor, ...), seen in another
    ``"folds"``                   as ``"perturbations"``, one fold of ``n_folds`` for test
    ============================  ===================================================================================

    In all kinds the controls are divided by ``fractions`` at random, so that every part has controls of its own and a
    prediction can be judged against controls that no model saw. In the kinds that hold out perturbations, all cells
    of a label have the same value, and no label of training holds a target that is held out.

    For ``"combinations"``, ``fractions`` divide the targets that occur in combinations; a combination goes to test if it
    holds a test target, else to validation if it holds a validation target; those with all targets left in training
    (two seen) are divided by ``fractions``. A combination with a target that is never perturbed alone is not trained
    on. For ``"perturbations"`` a combination goes the same way.

    Parameters
    ----------
    adata
        Cells by genes, with labels in the standard form.
    kind
        See above.
    fractions
        Shares of train, val and test; they sum to 1, train is above 0. Each positive share gets at least one item.
        For ``"folds"`` the first two divide what is not in the test fold.
    key_added
        Column to write.
    random_state
        Seed or generator. The same seed gives the same split, whatever the order of the perturbations' cells.
    perturbation_key, control
        Column of the labels, label of the control; ``control=None``: a table of effects without control rows.
    covariate_keys
        Columns (batch, replicate) over whose values cells are spread evenly, wherever cells are divided.
    context_key
        For ``"contexts"``: column of the context; by default the first that is there of ``context``, ``cell_line``,
        ``cell_type``, ``tissue``, ``condition``, ``donor``, ``batch``, which is logged.
    contexts
        For ``"contexts"``: where to hold out; by default in every context. Each perturbation stays in training in at
        least one.
    seen
        For ``"combinations"``: strata to make; ``(2,)`` keeps all single perturbations in training.
    n_folds, fold
        For ``"folds"``: number of folds, and the one to test, from 0. The folds do not depend on ``fold``.
    stratify_by_effect
        Spread perturbations evenly over the size of their effect (Euclidean norm of the mean shift of log1p CP10k).
    {copy}

    Returns
    -------
    ``None``, or the copy. Writes

    ``adata.obs[key_added]``
        Categorical ``(cell,)``: ``train``, ``val``, ``test``.
    ``adata.obs[key_added + "_group"]``
        Categorical ``(cell,)``, the stratum: ``control``; ``single``; for combinations ``seen0``, ``seen1``, ``seen2``
        (number of targets whose single perturbation is in training); for ``"contexts"`` ``new_context``, ``seen``
        (in more than one context), ``one_context``.
    ``adata.obs[key_added + "_fold"]``
        For ``"folds"``: int ``(cell,)``, the fold in which the label is tested; -1 for controls and for combinations of
        targets of several folds, which are tested in each of them.
    ``adata.uns["scpert"][key_added]``
        The arguments and the number of cells of each part.

    Raises
    ------
    SplitError
        Too few perturbations, combinations, contexts or cells, with their number.
    LabelError, MissingKeyError
        Labels that are missing, NaN or not in the standard form; columns that are not there.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.split(adata, kind="perturbations", fractions=(0.6, 0.2, 0.2))
    >>> seen = set(adata.obs["perturbation"][adata.obs["split"] == "train"])
    >>> seen & set(adata.obs["perturbation"][adata.obs["split"] == "test"])
    {'control'}
    """
    check_choice("kind", kind, KINDS)
    if not (random_state is None or isinstance(random_state, np.random.Generator)):
        random_state = check_seed(random_state)
    shares = _fractions(fractions)
    check_unique_names(adata)
    labels = _read_labels(adata, perturbation_key, control)
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or ())
    strata = _strata(adata, keys)
    rng = np.random.default_rng(random_state)
    effect = _effect_sizes(adata, labels, perturbation_key, control) if stratify_by_effect else None
    splitter = _Splitter(labels, control, shares, strata, rng, effect)
    used: dict[str, object] = {}
    if kind == "cells":
        plan = splitter.cells()
    elif kind == "perturbations":
        plan = splitter.held_out_perturbations()
    elif kind == "combinations":
        if not set(seen) <= {0, 1, 2} or not set(seen):
            raise SplitError(f"seen={seen!r}: give some of 0, 1, 2.")
        plan = splitter.combinations(seen)
        used = {"seen": sorted(seen)}
    elif kind == "contexts":
        context_key = _context_key(adata, context_key)
        context = _strata(adata, [context_key], codes=False)
        every = sorted(set(context))
        chosen = every if contexts is None else [contexts] if isinstance(contexts, str) else [str(c) for c in contexts]
        if unknown := sorted(set(chosen) - set(every)):
            raise SplitError(f"contexts={listing(unknown)} are not in adata.obs[{context_key!r}]: {listing(every)}.")
        plan = splitter.contexts(context, chosen)
        used = {"context_key": context_key, "contexts": chosen}
    else:
        if not isinstance(n_folds, int | np.integer) or n_folds < 2 or not 0 <= fold < n_folds:
            raise SplitError(
                f"n_folds={n_folds!r}, fold={fold!r}: give at least 2 folds, and a fold from 0 to n_folds - 1."
            )
        plan = splitter.folds(int(n_folds), int(fold))
        used = {"n_folds": int(n_folds), "fold": int(fold)}

    counts = {value: int((plan.codes == i).sum()) for i, value in enumerate(VALUES)}
    if control is not None and splitter.is_control.any() and not (splitter.is_control & (plan.codes == 0)).any():
        raise SplitError("No control cell is left for training. Use a larger first fraction.")
    adata = writable(adata, copy)
    adata.obs[key_added] = pd.Categorical(np.array(VALUES, dtype=object)[plan.codes], categories=list(VALUES))
    adata.obs[f"{key_added}_group"] = pd.Categorical(plan.group, categories=sorted(set(plan.group)))
    if plan.fold is not None:
        adata.obs[f"{key_added}_fold"] = plan.fold.astype(np.int64)
    elif f"{key_added}_fold" in adata.obs.columns:
        del adata.obs[f"{key_added}_fold"]
    record(
        adata,
        key_added,
        kind=kind,
        fractions=shares,
        random_state=random_state if isinstance(random_state, int | np.integer) else None,
        perturbation_key=perturbation_key,
        control="" if control is None else control,
        covariate_keys=keys or None,
        stratify_by_effect=bool(stratify_by_effect),
        n_cells=counts,
        **used,
    )
    logger.info(
        "split by %s: %s",
        kind,
        ", ".join(
            f"{value} {counts[value]} cells of {len(set(labels[(plan.codes == i) & ~splitter.is_control]))} perturbations"
            for i, value in enumerate(VALUES)
        ),
    )
    return adata if copy else None


def _strata(adata: AnnData, keys: Sequence[str], *, codes: bool = True) -> np.ndarray:
    """Combined values of the columns, per cell: integer codes in sorted order of the values, or the values as strings."""
    if not keys:
        return np.zeros(adata.n_obs, dtype=np.int64)
    columns = []
    for key in keys:
        series = check_obs_key(adata, key, "covariate_keys" if codes else "context_key")
        if series.isna().any():
            raise ScpertError(f"adata.obs[{key!r}] is NaN in {int(series.isna().sum())} cells. Fill or drop these.")
        columns.append(series.astype(str).to_numpy(dtype=object))
    values = (
        columns[0]
        if len(columns) == 1
        else np.array(["\x1f".join(row) for row in zip(*columns, strict=True)], dtype=object)
    )
    return np.unique(values.astype(str), return_inverse=True)[1].reshape(-1) if codes else values


def _context_key(adata: AnnData, key: str | None) -> str:
    if key is not None:
        return key
    there = [c for c in _CONTEXT_COLUMNS if c in adata.obs.columns and adata.obs[c].nunique() > 1]
    if not there:
        raise SplitError(
            f"kind='contexts' needs context_key=, the column of the cell line, donor or other context; adata.obs has "
            f"{listing(adata.obs.columns, 20)}."
        )
    if len(there) > 1:
        logger.warning(
            "split: context_key=%r is taken as the context; %s could be meant, too", there[0], listing(there[1:])
        )
    else:
        logger.info("split: context_key=%r", there[0])
    return there[0]


def _effect_sizes(adata: AnnData, labels: np.ndarray, key: str, control: str | None) -> dict[str, float]:
    allowed = (K.SCALE_COUNTS, K.SCALE_LOG1P, K.SCALE_EFFECTS)
    screen = Screen(
        adata, perturbation_key=key, control=control or K.CONTROL, allowed=allowed, require_control=control is not None
    )
    moments = screen.moments()
    base = moments.mean[moments.groups == control][0] if control in set(moments.groups) else 0.0
    return dict(zip(map(str, moments.groups), np.linalg.norm(moments.mean - base, axis=1).tolist(), strict=True))
