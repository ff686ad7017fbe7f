"""Which perturbations move cells towards a goal state."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, stats

from .. import _keys as K
from .._checks import as_mask, check_obs_key, check_seed, check_whole, listing
from .._docs import shared_docs
from .._progress import progress
from ..data import Screen, canonical, join, parse
from ..data._effects import strata_of
from ..errors import ScpertError, UnknownTargetError
from ._effects import benjamini_hochberg, perturbation_effects

__all__ = ["rank_perturbations"]

logger = logging.getLogger("scpert")

#: So many control cells that a model did not learn from are enough to start from.
_HELD_OUT = 100


@shared_docs
def rank_perturbations(
    adata: Any,
    model: Any = None,
    *,
    goal: Any,
    start: Any = None,
    groupby: str | None = None,
    perturbations: Sequence[str] | None = None,
    doubles: bool = True,
    n_doubles: int = 20,
    exclude_targets: bool = True,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
    random_state: int = 0,
) -> pd.DataFrame:
    r"""Rank single and double perturbations by how close to a goal state they bring cells from a start.

    With :math:`d` the difference of the mean profiles of goal and start and :math:`\delta_p` the effect of a
    perturbation (log1p CP10k, over the genes other than its own targets),

    .. math:: \text{progress}_p = \frac{\delta_p \cdot d - \sum_g c_{pg}}{d \cdot d - \sum_g s_g^2},\quad
              \text{cosine}_p = \frac{\delta_p \cdot d - \sum_g c_{pg}}{|\delta_p||d|},\quad
              \text{remaining}_p = \frac{|d - \delta_p|}{|d|}.

    where :math:`s_g` is the standard error of :math:`d_g` (noise lengthens the way; at least a tenth of it is kept). A
    progress of 1 covers the whole way along :math:`d`; what a perturbation does beside, and what it does too much,
    shows in ``remaining``, by which the table is sorted. The standard error of the progress follows from those of
    :math:`\delta_p` (the model's predictive standard deviation, or Welch's) and of :math:`d` by the delta method, genes
    taken as independent.

    :math:`c_{pg}` is the covariance of the errors of :math:`\delta_{pg}` and :math:`d_g`. If both are relative to the
    mean of the same control cells, its error is in both, and a perturbation without any effect would seem to come
    nearer. It is known for effects that were measured in the cells of ``adata``, from the cells that goal and start share
    with the perturbation and its controls, and zero for effects of other cells. What a model made of its control cells is
    not known: the way then starts from controls that the model did not learn from, if its ``split_key`` leaves 100 or more.

    Parameters
    ----------
    adata
        Cells that hold start and goal, or a table of effects (``scale="effects"``). A trained model may be given
        instead (its AnnData is used). The AnnData of a model is read as its ``setup_anndata`` was told, if nothing else
        is said.
    model
        A trained model with ``predict_perturbation``; or effects of :func:`scpert.tl.perturbation_effects`; ``None``
        measures the effects in ``adata``. Doubles come from the model, and from effects as the sum of two singles.
    goal
        The state to reach: a value of ``obs[groupby]``, a boolean mask over cells, an AnnData of (other) goal cells with
        the same genes and scale, or a Series (gene -> wanted shift).
    start
        Where to start: as ``goal`` (no shifts); by default the control cells, for a model with a ``split_key`` its test
        controls if there are 100.
    groupby
        Column of obs for ``goal`` and ``start``; by default ``perturbation_key``.
    perturbations
        Candidates; by default all that the model was trained on.
    doubles
        Whether to add pairs of the best ``n_doubles`` single targets.
    n_doubles
        See above.
    exclude_targets
        Leave each perturbation's own targets out of its measures: that they move is its definition. A perturbation
        that moves nothing else cannot be told apart then, and the measures of different perturbations are over genes
        that differ by their targets; ``False`` where the state of the targets is itself part of the goal.
    {labels}
    {values}
    covariate_keys
        Columns of obs (batch, donor ...): goal cells are compared with start cells of their own stratum, and measured effects
        likewise. Without a start cell in the stratum of a goal cell there is no such comparison (an error).
    random_state
        Seed of the model's prediction.

    Returns
    -------
    DataFrame, best first: ``perturbation``, ``n_targets``, ``progress``, ``std_error``, ``lower``, ``upper`` (95 %),
    ``pvals`` (of no progress), ``pvals_adj``, ``cosine``, ``remaining``, ``status`` (``trained``, ``combination``,
    ``unseen``, ``measured``, ``sum``). ``std_error`` and what follows from it are NaN where the effect has no standard
    deviation.

    Raises
    ------
    ScpertError
        If goal and start are the same, empty, or share no gene with the predictions.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=400, n_genes=40, n_targets=5)
    >>> goal = str(adata.obs["perturbation"].drop_duplicates().iloc[0])
    >>> table = scpert.tl.rank_perturbations(
    ...     adata, goal=goal if goal != "control" else adata.uns["truth"]["net"].iloc[0, 0]
    ... )
    >>> list(table.columns[:3])
    ['perturbation', 'n_targets', 'progress']
    """
    random_state = check_seed(random_state)
    if model is None and hasattr(adata, "predict_perturbation"):
        model, adata = adata, adata.adata
        if adata is None:
            raise ScpertError(
                "The model was loaded without data: give cells too, rank_perturbations(adata, model, ...)."
            )
    check_whole("n_doubles", n_doubles)
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or [])
    arguments: dict[str, Any] = {"layer": layer, "scale": scale, "library_size_key": library_size_key}
    if model is not None and getattr(model, "adata", None) is adata and hasattr(model, "setup_args_"):
        # its own data are read as it was told to; what is said here comes first
        setup, said = model.setup_args_, {"layer": None, "scale": K.SCALE_AUTO, "library_size_key": None}
        arguments = {name: setup[name] if value == said[name] else value for name, value in arguments.items()}
        perturbation_key = setup["perturbation_key"] if perturbation_key == K.PERTURBATION else perturbation_key
        control = setup["control"] if control == K.CONTROL else control
    screen = Screen(
        adata,
        perturbation_key=perturbation_key,
        control=control,
        allowed=K.SCALES,
        require_control=start is None and not _is_shift(goal),
        **arguments,
    )
    source: _Measured | _Predicted
    if model is None or hasattr(model, "var_names"):
        source = _Measured(screen, model, arguments, keys)
    else:
        source = _Predicted(model, control, random_state)
        if start is None and not _is_shift(goal):
            start = _held_out_controls(screen, model)
    way = _direction(screen, goal, start, groupby or perturbation_key, strata_of(screen.adata, keys)[0])
    if isinstance(source, _Predicted) and start is None:
        _warn_of_shared_controls(way, type(model).__name__)
    genes = screen.genes.intersection(source.genes, sort=False)
    if not len(genes):
        raise ScpertError(
            f"The predictions share no gene with adata ({listing(screen.genes[:4])} against {listing(source.genes[:4])})."
        )
    way = way.take(screen.genes.get_indexer(genes))
    if not np.any(way.shift):
        raise ScpertError("goal and start have the same mean profile: there is no way to go. Choose other cells.")

    asked = [perturbations] if isinstance(perturbations, str) else perturbations
    labels = source.known() if asked is None else [canonical(str(p), control) for p in asked]
    labels = [p for p in dict.fromkeys(labels) if p != control]
    if not labels:
        raise ScpertError("There is no candidate: pass perturbations=, or a model that was trained on some.")
    table = _rank(source, labels, genes, way, control, exclude_targets)
    if doubles:
        singles = table[(table["n_targets"] == 1) & (table["progress"] > 0)]
        best = singles.sort_values("progress", ascending=False, kind="stable")[K.PERTURBATION].head(int(n_doubles))
        pairs = [join(pair, control) for pair in itertools.combinations(sorted(best), 2)]
        pairs = [p for p in pairs if p not in set(labels)]
        if pairs and source.combines:
            more = _rank(source, pairs, genes, way, control, exclude_targets)
            table = pd.concat([table, more], ignore_index=True)
        elif pairs:
            logger.warning("%s predicts no combinations (scope 'seen'): doubles are left out.", type(model).__name__)
    table["pvals_adj"] = benjamini_hochberg(table["pvals"].to_numpy())
    columns = [K.PERTURBATION, "n_targets", "progress", K.STD_ERROR, K.LOWER, K.UPPER, K.PVALS, K.PVALS_ADJ]
    table = table[[*columns, "cosine", "remaining", K.STATUS]]
    return table.sort_values("remaining", kind="stable").reset_index(drop=True)


@dataclass
class _Way:
    """From the mean of the start to that of the goal."""

    shift: np.ndarray  # (gene,)
    variance: np.ndarray  # of the means of goal and start (2, gene)
    weights: tuple[np.ndarray, np.ndarray] | None = None  # of the screen's cells in the two means (cell,)

    def take(self, index: np.ndarray) -> _Way:
        return replace(self, shift=self.shift[index], variance=self.variance[:, index])

    def shared(self, effect: np.ndarray) -> np.ndarray:
        """Covariance of the errors of the way and of an effect, which is the sum of the cells times ``effect`` ``(gene,)``.

        Two weighted means of cells with the variance v have the covariance v times the sum of the products of their weights; for
        n and m cells, k of them the same, v k / (n m).
        """
        out = np.zeros_like(self.shift)
        if self.weights is not None:
            for weight, variance, sign in zip(self.weights, self.variance, (1, -1), strict=True):
                if power := float(weight @ weight):
                    out += sign * float(weight @ effect) / power * variance
        return out


def _is_shift(goal: Any) -> bool:
    """A Series of genes; a boolean one is a mask of cells, as ``adata.obs[...] == value`` gives it."""
    return isinstance(goal, pd.Series) and not pd.api.types.is_bool_dtype(goal.dtype)


def _direction(screen: Screen, goal: Any, start: Any, groupby: str, strata: np.ndarray) -> _Way:
    if _is_shift(goal):
        known = goal.index.intersection(screen.genes)
        if not len(known):
            raise ScpertError(f"goal= names no gene of adata ({listing(goal.index[:4])}).")
        if not goal.index.is_unique:
            raise ScpertError(f"goal= names genes more than once: {listing(goal.index[goal.index.duplicated()], 4)}.")
        values = pd.to_numeric(goal, errors="coerce")
        if not np.isfinite(values).all():
            raise ScpertError(f"goal= has no finite shift for {listing(goal.index[~np.isfinite(values)], 4)}.")
        if len(known) < len(goal):
            logger.warning("goal=: %d of %d genes are not measured.", len(goal) - len(known), len(goal))
        wanted = values.reindex(screen.genes).fillna(0.0).to_numpy(dtype=np.float64)  # what is not named is to stay
        return _Way(wanted, np.zeros((2, len(wanted))))
    (goal_cells, goal_mask), (start_cells, start_mask) = (
        _cells(screen, name, what, groupby) for name, what in (("goal", goal), ("start", start))
    )
    if strata.any() and not (goal_mask.any() and start_mask.any()):
        raise ScpertError("covariate_keys= compares cells of adata: goal= and start= must be among them.")
    goal_strata = strata[goal_mask] if strata.any() else np.zeros(goal_cells.shape[0], dtype=np.int64)
    start_strata = strata[start_mask] if strata.any() else np.zeros(start_cells.shape[0], dtype=np.int64)
    # each goal cell beside the start cells of its stratum
    share = np.bincount(goal_strata, minlength=int(strata.max(initial=0)) + 1) / len(goal_strata)
    there = np.bincount(start_strata, minlength=len(share))
    if lost := np.flatnonzero((share > 0) & (there == 0)).tolist():
        raise ScpertError(
            f"{len(lost)} stratum/strata of covariate_keys= hold goal cells but no cell to start from: drop these cells, give other "
            "start= cells, or leave the covariate out."
        )
    start_weight = (share / np.maximum(there, 1))[start_strata]
    goal_weight = np.full(len(goal_strata), 1 / len(goal_strata))
    shift, variance, weights = np.zeros(len(screen.genes)), [], []
    for values, mask, weight, stratum, sign in (
        (goal_cells, goal_mask, goal_weight, goal_strata, 1.0),
        (start_cells, start_mask, start_weight, start_strata, -1.0),
    ):
        shift += sign * (weight @ values)
        variance.append(_spread(values, stratum) * float(weight @ weight))
        weights.append(np.zeros(screen.n_cells))
        if mask.any():
            weights[-1][mask] = weight
    return _Way(shift, np.stack(variance), (weights[0], weights[1]))


def _spread(values: sparse.csr_matrix, stratum: np.ndarray) -> np.ndarray:
    """Variance of each gene over cells, pooled within strata ``(gene,)``."""
    total, freedom = np.zeros(values.shape[1]), 0
    for s in np.unique(stratum):
        some = values[stratum == s].astype(np.float64)
        mean = np.asarray(some.mean(axis=0)).ravel()
        total += np.asarray(some.multiply(some).sum(axis=0)).ravel() - some.shape[0] * mean**2
        freedom += some.shape[0] - 1
    out: np.ndarray = np.maximum(total, 0.0) / max(freedom, 1)
    return out


def _held_out_controls(screen: Screen, model: Any) -> np.ndarray | None:
    """Control cells that a model did not learn from, boolean ``(cell,)``; ``None`` if they are few."""
    key = getattr(model, "setup_args_", {}).get("split_key")
    if key is None or key not in screen.adata.obs:
        return None
    held = screen.is_control & (screen.adata.obs[key].astype(str) == K.TEST).to_numpy()
    if held.sum() < _HELD_OUT:  # their own noise would be the greater evil
        return None
    logger.info("start: the %d control cells that the model did not learn from (obs[%r])", held.sum(), key)
    return held


def _warn_of_shared_controls(way: _Way, name: str) -> None:
    length = float(way.shift @ way.shift) - float(way.variance.sum())
    noise = float(way.variance[1].sum()) / max(length, 1e-12)
    if noise > 0.05:
        logger.warning(
            "%s may have learned from the control cells that the way starts from: their noise alone can make a progress of "
            "up to %.2f. Train it with a split_key whose test cells hold controls, or give other controls as start=.",
            name,
            noise,
        )


def _cells(screen: Screen, name: str, what: Any, groupby: str) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Values of the cells that are meant, and which of those of the screen they are, boolean ``(cell,)``."""
    none = np.zeros(screen.n_cells, dtype=bool)
    if what is None:
        if screen.scale == K.SCALE_EFFECTS and not screen.is_control.any():
            return sparse.csr_matrix((1, screen.adata.n_vars)), none  # effects are relative to the control: it is zero
        return screen.rows(screen.is_control), screen.is_control
    if hasattr(what, "var_names"):
        missing = screen.genes.difference(what.var_names)
        if len(missing):
            raise ScpertError(f"{name}= lacks {len(missing)} gene(s) of adata: {listing(missing, 5)}.")
        other = what[:, screen.genes].copy()
        other.obs[screen.perturbation_key] = screen.control
        rows = Screen(
            other,
            perturbation_key=screen.perturbation_key,
            control=screen.control,
            scale=screen.scale,
            layer=screen.layer,
            allowed=K.SCALES,
            library_size_key=screen.library_size_key,
        )
        return rows.rows(np.arange(rows.n_cells)), none
    mask = as_mask(what, f"{name}=")
    if mask is not None:
        if mask.shape != (screen.n_cells,):
            raise ScpertError(f"{name}=: the mask has shape {mask.shape}, adata has {screen.n_cells} cells.")
    else:
        labels = check_obs_key(screen.adata, groupby, "groupby").astype(str).to_numpy()
        if groupby == screen.perturbation_key:
            labels, what = screen.labels, canonical(str(what), screen.control)
        mask = labels == str(what)
        if not mask.any():
            raise ScpertError(
                f"{name}={what!r} is no value of adata.obs[{groupby!r}]: it has {listing(np.unique(labels.astype(str)))}."
            )
    if not mask.any():
        raise ScpertError(f"{name}= selects no cell.")
    return screen.rows(mask), mask


class _Measured:
    """Effects that were measured; a combination that was not is the sum of its singles."""

    combines = True

    def __init__(self, screen: Screen, effects: Any, arguments: dict[str, Any], keys: list[str]):
        control = screen.control
        if effects is None:
            effects = perturbation_effects(
                screen.adata,
                perturbation_key=screen.perturbation_key,
                control=control,
                covariate_keys=keys or None,
                **arguments,
            )
            self.same_cells = True
        else:  # effects say which controls they are relative to by their mean
            keys = [str(k) for k in np.atleast_1d(effects.uns.get("effects", {}).get("covariate_keys", []))]
            keys = keys if set(keys) <= set(screen.adata.obs) else []
            mean = effects.var["control_mean"].reindex(screen.genes) if "control_mean" in effects.var else None
            self.same_cells = (
                mean is not None
                and bool(screen.is_control.any())
                and np.allclose(screen.rows(screen.is_control).mean(axis=0), mean, rtol=1e-4, atol=1e-6)
            )
        self.same_cells = self.same_cells and screen.scale != K.SCALE_EFFECTS
        self.control_variance = np.zeros(effects.n_vars)  # of a control cell
        self.code, names = pd.factorize(screen.labels)
        self.codes = {str(name): i for i, name in enumerate(names)}
        self.is_control, self.strata = screen.is_control, np.zeros(screen.n_cells, np.int64)
        if self.same_cells:
            self.strata = strata_of(screen.adata, keys)[0]
            spread = _spread(screen.rows(screen.is_control), self.strata[screen.is_control])
            self.control_variance = spread[screen.genes.get_indexer(effects.var_names)]
        self.control = control
        self.genes = effects.var_names
        labels = effects.obs[K.PERTURBATION] if K.PERTURBATION in effects.obs else effects.obs_names.to_series()
        self.row = {canonical(str(p), control): i for i, p in enumerate(labels)}
        values = effects.layers[K.DELTA] if K.DELTA in effects.layers else effects.X
        self.shift = values.toarray() if sparse.issparse(values) else np.asarray(values)
        error = next((effects.layers[name] for name in (K.STD_ERROR, K.STD) if name in effects.layers), None)
        self.error = np.full(self.shift.shape, np.nan) if error is None else np.asarray(error)

    def parts(self, label: str) -> list[str]:
        """Measured effects that are added for a label."""
        return [label] if label in self.row else list(parse(label, self.control))

    def _cells(self, part: str) -> np.ndarray:
        cells: np.ndarray = self.code == self.codes.get(part, -1)
        return cells

    def controls(self, part: str) -> np.ndarray:
        """Weights of the control cells in a measured effect, by the strata of its cells ``(cell,)``."""
        mine = np.bincount(self.strata[self._cells(part)], minlength=int(self.strata.max(initial=0)) + 1)
        there = np.bincount(self.strata[self.is_control], minlength=len(mine))
        out: np.ndarray = self.is_control * (mine / max(mine.sum(), 1) / np.maximum(there, 1))[self.strata]
        return out

    def weights(self, label: str) -> np.ndarray:
        """Of each cell in the effect of a label ``(cell,)``; zero if it was measured elsewhere."""
        out = np.zeros(len(self.code))
        if self.same_cells:
            for part in self.parts(label):
                mine = self._cells(part)
                out += mine / max(mine.sum(), 1) - self.controls(part)
        return out

    def known(self) -> list[str]:
        return list(self.row)

    def __call__(self, labels: list[str], genes: pd.Index) -> tuple[np.ndarray, np.ndarray, list[str]]:
        at = self.genes.get_indexer(genes)
        shift, variance = np.zeros((len(labels), len(genes))), np.zeros((len(labels), len(genes)))
        status = []
        for i, label in enumerate(labels):
            parts = self.parts(label)
            missing = [p for p in parts if p not in self.row]
            if missing:
                raise ScpertError(f"No effect of {listing(missing)} was measured; measured are {listing(self.row)}.")
            for part in parts:
                shift[i] += self.shift[self.row[part], at]
                variance[i] += self.error[self.row[part], at] ** 2
            if self.same_cells and len(parts) > 1:  # the same controls in each part
                controls = [self.controls(part) for part in parts]
                common = sum(2.0 * float(a @ b) for a, b in itertools.combinations(controls, 2))
                variance[i] += common * self.control_variance[at]
            status.append("measured" if len(parts) == 1 else "sum")
        return shift, np.sqrt(variance), status


class _Predicted:
    """Effects that a model predicts."""

    def __init__(self, model: Any, control: str, random_state: int):
        if not hasattr(model, "predict_perturbation"):
            raise ScpertError(
                f"model= must be a trained model or effects of tl.perturbation_effects; got {type(model).__name__}."
            )
        self.model, self.control, self.random_state = model, control, random_state
        self.combines = getattr(model, "scope", "combinations") != "seen"
        self._all = model.predict_perturbation(None, random_state=random_state)
        self.genes = self._all.var_names

    def known(self) -> list[str]:
        return [canonical(str(p), self.control) for p in self._all.obs[K.PERTURBATION]]

    def __call__(self, labels: list[str], genes: pd.Index) -> tuple[np.ndarray, np.ndarray, list[str]]:
        at = self.genes.get_indexer(genes)
        shift, error, status = [], [], []
        row = {label: i for i, label in enumerate(self.known())}
        for block in progress(
            [labels[s : s + 100] for s in range(0, len(labels), 100)], description="predict", unit="block"
        ):
            if all(label in row for label in block):
                found = self._all[[row[label] for label in block]]
            else:
                try:
                    found = self.model.predict_perturbation(block, random_state=self.random_state)
                except UnknownTargetError as unknown:
                    what = str(unknown).partition(" Pass on_unknown=")[0]
                    text = f"perturbations=: {what} Leave it out, or give effects that hold it as model=."
                    raise UnknownTargetError(text, unknown.targets, unknown.suggestions) from None
                order = {canonical(str(p), self.control): i for i, p in enumerate(found.obs[K.PERTURBATION])}
                found = found[[order[label] for label in block]]
            delta = found.layers[K.DELTA]
            delta = delta.toarray() if sparse.issparse(delta) else np.asarray(delta)
            std = np.asarray(found.layers[K.STD]) if K.STD in found.layers else np.full(delta.shape, np.nan)
            shift.append(delta[:, at])
            error.append(std[:, at])
            status += [str(s) for s in found.obs[K.STATUS]] if K.STATUS in found.obs else [K.TRAINED] * len(block)
        return np.vstack(shift).astype(np.float64), np.vstack(error).astype(np.float64), status


def _rank(
    source: _Measured | _Predicted,
    labels: list[str],
    genes: pd.Index,
    way: _Way,
    control: str,
    exclude_targets: bool,
) -> pd.DataFrame:
    shift, error, status = source(labels, genes)
    rows = []
    for label, delta, std, state in zip(labels, shift, error, status, strict=True):
        targets = parse(label, control)
        use = ~genes.isin(targets) if exclude_targets else np.ones(len(genes), dtype=bool)
        shared = (way.shared(source.weights(label)) if isinstance(source, _Measured) else np.zeros(len(genes)))[use]
        d, x, vd, vx = way.shift[use], delta[use], way.variance.sum(axis=0)[use], std[use] ** 2
        length = float(d @ d)
        if length == 0:
            done = cosine = left = spread = np.nan
        else:
            far = max(length - float(vd.sum()), 0.1 * length)  # the noise of the profiles lengthens the way
            along = float(x @ d - shared.sum())
            done = along / far
            size = float(np.sqrt(x @ x))
            cosine = along / np.sqrt(length) / size if size > 0 else 0.0
            left = float(np.sqrt(((d - x) ** 2).sum() / length))
            slope = x - 2 * done * d  # of the progress, with respect to the way
            spread = float(np.sqrt(max((d**2 * vx + slope**2 * vd + 2 * d * slope * shared).sum(), 0.0))) / far
        exact = done != 0 and spread <= 1e-7 * abs(done)  # the goal's own cells
        z = np.inf if exact else done / spread if spread > 0 else np.nan
        rows.append(
            {
                K.PERTURBATION: label,
                "n_targets": len(targets),
                "progress": done,
                K.STD_ERROR: spread,
                K.LOWER: done - 1.96 * spread,
                K.UPPER: done + 1.96 * spread,
                K.PVALS: 2 * stats.norm.sf(abs(z)),
                "cosine": cosine,
                "remaining": left,
                K.STATUS: state,
            }
        )
    return pd.DataFrame(rows)
