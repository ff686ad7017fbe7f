"""``infer_grn``: one call for every way to read a gene regulatory network out of a screen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import (
    as_mask,
    check_choice,
    check_fraction,
    check_net,
    check_obs_key,
    check_positive,
    check_seed,
    check_whole,
    listing,
    suggest,
)
from ..data import Screen, parse
from ..data._effects import strata_of
from ..data._screen import cell_hashes
from ..errors import LabelError, ScpertError, UnknownTargetError
from ..pp._write import writable
from ._effects import benjamini_hochberg, cells_behind

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["METHODS", "infer_grn"]

logger = logging.getLogger("scpert")

METHODS = ("interventional", "sparse_inverse", "gpovae", "ridge", "boosting", "correlation")

#: Methods that rank write this many edges per measured gene by default (at most half of the candidates).
EDGES_PER_GENE = 10
#: Above this number of edges no further columns are kept beside the weights.
_MAX_TABLE = 200_000
#: What a positive weight of a model's ``get_grn()`` means (its attribute ``grn_sign``): more of the target with more of
#: the regulator, or more of the target under the perturbation of the regulator.
_SIGNS = ("activity", "perturbation")


@dataclass
class Problem:
    """What every method gets: the screen, the candidate regulators and what is known of them before."""

    screen: Screen
    regulators: list[str]  # rows of the score matrix; may hold regulators that are not measured
    genes: pd.Index
    cells: np.ndarray  # boolean (cell,): cells to learn from
    observational: np.ndarray | sparse.csr_matrix | None  # (sample, gene), scale of the screen
    covariate_keys: list[str]
    prior: np.ndarray | None  # (regulator, gene), >= 0, 0 where nothing is known
    statistic: str
    fdr: float
    n_jobs: int | None
    random_state: int
    options: dict[str, Any]
    unmeasured: list[str] = field(default_factory=list)  # regulators of which the method can say nothing
    inferred: list[str] = field(
        default_factory=list
    )  # among the regulators: never perturbed, but knowledge tells of them

    @property
    def position(self) -> np.ndarray:
        """Column of each regulator among the genes, -1 where it is not measured ``(regulator,)``."""
        return self.genes.get_indexer(pd.Index(self.regulators))


@dataclass
class Scores:
    """What every method gives back.

    ``weight`` ``(regulator, gene)`` is signed and its absolute value ranks the edges; ``keep`` are the edges the
    method itself stands for (``None``: it only ranks); ``columns`` are further numbers of each edge.
    """

    weight: np.ndarray
    keep: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def infer_grn(
    adata: AnnData,
    *,
    method: str = "interventional",
    model: Any = None,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    key_added: str = K.GRN,
    n_jobs: int | None = None,
    random_state: int = 0,
    copy: bool = False,
    covariate_keys: str | Sequence[str] | None = None,
    regulators: Sequence[str] | None = None,
    prior: pd.DataFrame | None = None,
    prior_strength: float = 3.0,
    observational: Any = None,
    split_key: str | None = None,
    fdr: float = 0.05,
    n_edges: int | None = None,
    threshold: float | None = None,
    statistic: str = "welch",
    **options: Any,
) -> AnnData | None:
    """Infer a signed gene regulatory network from a perturbation screen.

    Parameters
    ----------
    adata
        Cells by genes with labels in the standard form, or a table of effects (rows are perturbations).
    method
        ``"interventional"``: total effects, Welch (or rank) statistics against controls, error rate ``fdr`` over
        the whole screen. ``"sparse_inverse"``: direct edges, by a sparse inverse of the matrix of total effects.
        ``"ridge"``, ``"boosting"``, ``"correlation"``: regression or correlation of targets on regulators over
        cells. ``"gpovae"``: direct edges out of measured effects and those that a trained
        :class:`scpert.model.GPOVAE` decodes, together.
    model
        A trained model. With ``method="gpovae"`` and a :class:`~scpert.model.GPOVAE`, the network is read out of it as that
        method does, without training another. Otherwise its ``get_grn()`` is taken as it is. Where the model's attribute
        ``grn_sign`` is ``"perturbation"`` (:class:`~scpert.model.GPOVAE`), its weights are changes under the
        perturbation, and those of a regulator that its perturbation lowers in ``adata`` are turned round; by default
        (``"activity"``) they are taken as they are.
    perturbation_key, control, layer, scale, library_size_key
        As in :func:`scpert.tl.perturbation_effects`.
    key_added
        Where the network goes; one that is there is overwritten, with a log line.
    n_jobs
        Processes for ``"boosting"``; ``None`` is one.
    random_state
        Seed of the methods that draw.
    copy
        Return a changed copy instead of changing ``adata``.
    covariate_keys
        Columns (batch, donor ...) within which cells are compared with controls.
    regulators
        Candidate regulators; by default every target of a single perturbation. ``"gpovae"`` with ``knowledge=`` (or a model
        trained with it) takes genes that were never perturbed, too.
    prior
        A net (``source, target`` and optional ``weight``) as soft weights: its edges need less evidence,
        none is excluded.
    prior_strength
        How much: an edge of the prior counts ``1 + prior_strength * |weight| / max |weight|`` times: its weight, or, with
        ``"interventional"``, its p-value (relative to the mean over all pairs, in the error rate and in the ranking).
    observational
        Samples without a known perturbation, used by ``"sparse_inverse"``, ``"ridge"``, ``"boosting"`` and
        ``"correlation"``: labels of ``adata.obs[perturbation_key]``, a boolean column of obs, a boolean mask, or
        another AnnData with the same genes on the same scale (``layer`` and ``library_size_key`` are read in it, too).
        They are never taken for a perturbation.
    split_key
        Column of the split: only ``train`` cells (and ``val``) are used.
    fdr
        Error rate of ``"interventional"``; other methods rank, and write their strongest edges.
    n_edges
        Write exactly so many edges of measured regulators, the strongest (fewer, if fewer are not zero); edges of regulators
        that are not measured (enhancers) stand beside them if they are as strong. Default: for
        ``"interventional"`` all that pass ``fdr``, for ``"gpovae"`` those with a mask probability above 0.5, for the
        others 10 per measured gene and at most half of the candidate pairs.
    threshold
        Write all edges with ``|weight|`` above it; 0 writes every candidate that has a score.
    statistic
        ``"welch"`` or ``"rank"`` (Mann-Whitney) for ``"interventional"``.
    **options
        Of the method; see its page in the documentation.

    Returns
    -------
    None, or the copy. Written are ``varp[key_added]`` (csr, gene x gene, row regulates column; the sign is the
    regulator's: positive where less of it means less of the target in a knock-down screen, i.e. signs follow the
    *activity* of the regulator; the absolute weight ranks the edges) and ``uns[key_added]``: ``method``,
    ``parameters``, ``unmeasured_regulators``, ``unmeasured_edges`` (their edges, a net), ``edges`` (further
    columns of the edges), ``cells`` (hashes of the cells used, of ``model`` those that it was trained on, so that
    :func:`scpert.tl.evaluate_grn` can refuse to judge on them).

    Raises
    ------
    MissingKeyError, LabelError, ScaleError
        As :func:`scpert.tl.perturbation_effects`.
    UnknownTargetError
        If ``regulators`` holds a name that is neither perturbed nor measured.
    ScpertError
        If there is no regulator, no perturbation, an option is unknown, the prior shares no gene with the data, or
        ``uns[key_added]`` holds something else than a network.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.tl.infer_grn(adata)
    >>> adata.varp["grn"].shape
    (40, 40)
    """
    random_state = check_seed(random_state)
    check_choice("method", method, METHODS)
    check_choice("statistic", statistic, ("welch", "rank"))
    check_fraction("fdr", fdr)
    if n_edges is not None:
        check_whole("n_edges", n_edges)
    if threshold is not None:
        check_positive("threshold", threshold, zero=True)
    if n_edges is not None and threshold is not None:
        raise ScpertError("Give n_edges= or threshold=, not both.")
    if not isinstance(key_added, str) or not key_added:
        raise ScpertError(f"key_added={key_added!r}: give the name of a network, such as 'grn'.")
    there = adata.uns.get(key_added)
    if there is not None and key_added not in adata.varp and not (isinstance(there, Mapping) and "cells" in there):
        raise ScpertError(
            f"adata.uns[{key_added!r}] is there and no network: key_added= would overwrite it. Choose another name, or delete it."
        )
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or [])

    parameters: dict[str, Any] = {
        "perturbation_key": perturbation_key,
        "control": control,
        "layer": layer or "",
        "library_size_key": library_size_key or "",
        "covariate_keys": np.asarray(keys, dtype=object).astype(str),
        "split_key": split_key or "",
        "random_state": int(random_state),
        "statistic": statistic,
        "fdr": float(fdr),
        "n_edges": -1 if n_edges is None else int(n_edges),
        "threshold": float("nan") if threshold is None else float(threshold),
        "prior_strength": float(prior_strength) if prior is not None else 0.0,
        **{name: value for name, value in options.items() if isinstance(value, str | int | float | bool)},
    }
    used = np.ones(adata.n_obs, dtype=bool) if split_key is None else _training_cells(adata, split_key)
    if isinstance(model, type):
        raise ScpertError(
            f"model={model.__name__} is a class; give a trained model, {model.__name__}(adata) after train()."
        )
    read_out = method == "gpovae" and type(model).__name__ == "GPOVAE"
    if read_out:
        options = {**options, "model": model}
    seen = cell_hashes(adata.obs_names[used])
    if model is not None and not read_out:
        given = {
            "prior": prior,
            "observational": observational,
            "regulators": regulators,
            "method": None if method == METHODS[0] else method,
            "n_jobs": n_jobs,
            **options,
        }
        if ignored := [name for name, value in given.items() if value is not None]:
            raise ScpertError(
                f"{listing(ignored)}: with model={type(model).__name__} the network is taken as the model has it. Leave them "
                "out, or leave model= out."
            )
        strata_of(adata, keys)  # says what is wrong with them
        net, found_scale = _net_of_model(model, adata), "model"
        turned = check_choice("model.grn_sign", getattr(model, "grn_sign", "activity"), _SIGNS) == "perturbation"
        if turned:
            screen = Screen(
                adata if used.all() else adata[used],
                perturbation_key=perturbation_key,
                control=control,
                layer=layer,
                scale=scale,
                library_size_key=library_size_key,
                allowed=K.SCALES,
            )
            net = _by_activity(net, screen, keys)
        learned = getattr(model, "cells_", None)
        if learned is not None:  # the cells that it was trained on, and these if they gave the signs
            seen = np.union1d(learned, seen) if turned else learned
        method = f"model {type(model).__name__}"
        names, columns, notes = _net_to_arrays(net), {}, {}
        source, target, weight = names
        extra = [c for c in net.columns if c not in K.NET and pd.api.types.is_numeric_dtype(net[c])]
        columns = {c: net[c].to_numpy() for c in extra}
        source, target, weight, columns = _select(source, target, weight, columns, None, n_edges, threshold, adata)
    else:
        observed, extra_samples = _observational(adata, observational, perturbation_key, control)
        if (used & ~observed).sum() == 0:
            raise ScpertError(
                f"observational= is all of the {int(used.sum())} cells used: none is left with a perturbation or as a control."
            )
        if observed.any() and perturbation_key in adata.obs:  # labels that are samples, and no perturbations
            of = adata.obs[perturbation_key].astype(str)
            parameters["observational"] = np.asarray(
                sorted(set(of[observed]) - set(of[~observed])), dtype=object
            ).astype(str)
        if read_out and getattr(model, "cells_", None) is not None:
            seen = np.union1d(seen, model.cells_)
        problem = _problem(
            adata,
            used & ~observed,
            observed & used,
            extra_samples,
            method=method,
            perturbation_key=perturbation_key,
            control=control,
            layer=layer,
            scale=scale,
            library_size_key=library_size_key,
            keys=keys,
            regulators=regulators,
            prior=prior,
            prior_strength=prior_strength,
            statistic=statistic,
            fdr=fdr,
            n_jobs=n_jobs,
            random_state=random_state,
            options=options,
        )
        found_scale = problem.screen.scale
        if found_scale == K.SCALE_EFFECTS and (behind := cells_behind(adata)) is not None:
            seen = np.union1d(seen, behind)
        scores = _run(method, problem)
        notes = scores.notes
        source, target, weight, columns = _edges(problem, scores, n_edges, threshold)
        del scores, problem  # dense (regulator, gene) arrays

    out = writable(adata, copy)
    _write(out, key_added, method, {**parameters, "scale": found_scale}, notes, source, target, weight, columns, seen)
    return out if copy else None


# ---------------------------------------------------------------------------------------------- input


def _training_cells(adata: AnnData, split_key: str) -> np.ndarray:
    split = check_obs_key(adata, split_key, "split_key").astype(str).to_numpy()
    used = np.isin(split, [K.TRAIN, K.VAL])
    if not used.any():
        raise ScpertError(
            f"adata.obs[{split_key!r}] has no {K.TRAIN!r} cell; its values are {listing(np.unique(split), 5)}. "
            "Make a split with scpert.pp.split(adata, kind='cells')."
        )
    return used


def _observational(
    adata: AnnData, observational: Any, perturbation_key: str, control: str
) -> tuple[np.ndarray, AnnData | None]:
    """Mask of the rows of ``adata`` that are observational, and samples from elsewhere."""
    none = np.zeros(adata.n_obs, dtype=bool)
    if observational is None:
        return none, None
    if hasattr(observational, "var_names"):
        missing = adata.var_names.difference(observational.var_names)
        if len(missing):
            raise ScpertError(
                f"observational= lacks {len(missing)} gene(s) of adata: {listing(missing, 5)}. "
                "Give samples with the same genes."
            )
        return none, observational[:, adata.var_names]
    if isinstance(observational, str) and observational in adata.obs.columns:
        column = adata.obs[observational]
        if (mask := as_mask(column, f"observational={observational!r}")) is None:
            raise ScpertError(f"observational={observational!r}: adata.obs has that column, but it is not boolean.")
        return mask, None
    mask = as_mask(observational, "observational=")
    values = np.asarray([observational] if isinstance(observational, str) else observational) if mask is None else mask
    if values.dtype == bool:
        if values.shape != (adata.n_obs,):
            raise ScpertError(f"observational=: the mask has shape {values.shape}, adata has {adata.n_obs} rows.")
        return values, None
    labels = check_obs_key(adata, perturbation_key, "perturbation_key").astype(str).to_numpy()
    absent = [v for v in values if v not in set(labels)]
    if absent:
        raise ScpertError(
            f"observational=: {listing(absent)} is neither a boolean column of adata.obs nor a label of "
            f"adata.obs[{perturbation_key!r}] ({listing(np.unique(labels), 5)})."
        )
    return np.isin(labels, values.astype(str)), None


def _problem(
    adata: AnnData,
    cells: np.ndarray,
    observed: np.ndarray,
    extra: AnnData | None,
    *,
    method: str,
    perturbation_key: str,
    control: str,
    layer: str | None,
    scale: str,
    library_size_key: str | None,
    keys: list[str],
    regulators: Sequence[str] | None,
    prior: pd.DataFrame | None,
    prior_strength: float,
    statistic: str,
    fdr: float,
    n_jobs: int | None,
    random_state: int,
    options: dict[str, Any],
) -> Problem:
    view = adata if cells.all() else adata[cells]
    arguments: dict[str, Any] = {
        "perturbation_key": perturbation_key,
        "layer": layer,
        "library_size_key": library_size_key,
    }
    try:
        screen = Screen(view, control=control, scale=scale, allowed=K.SCALES, **arguments)
    except LabelError as error:
        labels = view.obs[perturbation_key] if perturbation_key in view.obs else pd.Series(dtype=object)
        if control in set(labels.astype(str)) or labels.isna().any():
            raise
        raise LabelError(
            f"{error} If no row is a control because each row is the effect of one perturbation, say scale='effects' (of profiles, "
            "the reference of a gene is then its median over the rows; better give the profile of a control as a row, too)."
        ) from error
    samples = []
    if observed.any():
        rows = Screen(
            adata[observed], control=control, scale=screen.scale, allowed=K.SCALES, require_control=False, **arguments
        )
        samples.append(rows.rows(np.arange(rows.n_cells)))
    if extra is not None:
        labelled = extra.copy()
        labelled.obs[perturbation_key] = control
        try:
            rows = Screen(labelled, control=control, scale=screen.scale, allowed=K.SCALES, **arguments)
        except ScpertError as error:
            raise type(error)(f"observational=, which is read as adata is: {error}") from error
        samples.append(rows.rows(np.arange(rows.n_cells)))

    if not screen.perturbations:
        raise ScpertError(
            f"All {screen.n_cells} cells used are labelled {control!r}: there is no perturbation. "
            f"Is {perturbation_key!r} the right column (perturbation_key=)?"
        )
    perturbed = sorted({t[0] for p in screen.perturbations if len(t := parse(p, control)) == 1})
    measured = set(screen.genes)
    unmeasured: list[str] = []  # of methods over cells: nothing can be said of them
    inferred: list[str] = []
    if regulators is not None:
        names = list(dict.fromkeys([regulators] if isinstance(regulators, str) else map(str, regulators)))
        known = measured | set(perturbed)
        unknown = [r for r in names if r not in known]
        if unknown or not names:
            hints = {r: suggest(r, known) for r in unknown}
            first = next((f" Did you mean {listing(s)}?" for s in hints.values() if s), "")
            raise UnknownTargetError(
                f"regulators= holds {listing(unknown) or 'nothing'}: neither perturbed nor measured.{first}",
                tuple(unknown),
                hints,
            )
        if method in ("interventional", "sparse_inverse", "gpovae"):
            if method == "gpovae":
                never = set(names) - {t for p in screen.perturbations for t in parse(p, control)}
                inferred = [r for r in names if r in never & _known_to_gpovae(options)]
            lost = [r for r in names if r not in {*perturbed, *inferred}]
            if lost:
                logger.warning("%s: %s never perturbed singly, left out.", method, listing(lost))
            names = [r for r in names if r not in set(lost)]
        else:
            unmeasured = [r for r in names if r not in measured]
            names = [r for r in names if r in measured]
    elif method in ("interventional", "sparse_inverse", "gpovae"):
        names = perturbed
    else:
        names = [r for r in perturbed if r in measured]
        unmeasured = [r for r in perturbed if r not in measured]
        if not names:
            names = list(screen.genes)
            logger.warning("%s: no perturbed gene is measured; all %d genes are candidates.", method, len(names))
    if not names:
        raise ScpertError(
            f"method={method!r} has no regulator: {_why_none(method, regulators, perturbed, screen.perturbations)}"
        )
    weights = None
    if prior is not None:
        net = check_net(prior, "prior", known=measured | set(names))
        check_positive("prior_strength", prior_strength, zero=True)
        row, column = (
            pd.Index(names).get_indexer(pd.Index(net[K.SOURCE])),
            screen.genes.get_indexer(pd.Index(net[K.TARGET])),
        )
        inside = (row >= 0) & (column >= 0)
        if not inside.any():
            raise ScpertError(
                f"prior has no edge from a regulator ({listing(names, 4)}) to a measured gene: its sources are "
                f"{listing(net[K.SOURCE].unique(), 4) or 'none'}. Give a net of these regulators."
            )
        strength = np.abs(net[K.WEIGHT].to_numpy()[inside])
        weights = np.zeros((len(names), len(screen.genes)), dtype=np.float32)
        weights[row[inside], column[inside]] = prior_strength * strength / max(strength.max(), 1e-12)
    return Problem(
        screen=screen,
        regulators=names,
        genes=screen.genes,
        cells=cells,
        observational=sparse.vstack(samples, format="csr") if samples else None,
        covariate_keys=keys,
        prior=weights,
        statistic=statistic,
        fdr=fdr,
        n_jobs=n_jobs,
        random_state=random_state,
        options=dict(options),
        unmeasured=unmeasured,
        inferred=inferred,
    )


def _known_to_gpovae(options: dict[str, Any]) -> set[str]:
    """Genes that the knowledge of a GPO-VAE, trained or to be trained, says something of."""
    from ..model._knowledge import read_knowledge

    model = options.get("model")
    tables = read_knowledge(options.get("knowledge")) if model is None else model._features
    return set().union(*(f.known for f in tables.values()))


def _why_none(method: str, asked: Sequence[str] | None, perturbed: list[str], perturbations: Sequence[str]) -> str:
    """Why there is no candidate regulator, and what to do."""
    if asked is None:
        return (
            f"the perturbations ({listing(perturbations, 5)}) hold no single one, and total effects are those of single "
            "perturbations. Use a method over cells: 'ridge', 'boosting' or 'correlation'."
        )
    names = [asked] if isinstance(asked, str) else list(asked)
    if method in ("ridge", "boosting", "correlation"):
        return (
            f"none of regulators= ({listing(names, 5)}) is a measured gene, and this method regresses on measured values. "
            "Give measured genes, or use 'interventional' or 'sparse_inverse'."
        )
    return (
        f"none of regulators= ({listing(names, 5)}) was perturbed singly; these were: {listing(perturbed, 5) or 'none'}. "
        "Give some of them, or use 'ridge', 'boosting' or 'correlation'."
    )


def problem_of(screen: Screen, regulators: list[str], covariate_keys: Sequence[str] = ()) -> Problem:
    """The problem of measuring effects only."""
    return Problem(
        screen=screen,
        regulators=regulators,
        genes=screen.genes,
        cells=np.ones(screen.n_cells, dtype=bool),
        observational=None,
        covariate_keys=list(covariate_keys),
        prior=None,
        statistic="welch",
        fdr=0.05,
        n_jobs=None,
        random_state=0,
        options={},
    )


def _run(method: str, problem: Problem) -> Scores:
    from . import _grn_inverse, _grn_methods

    module = _grn_inverse if method == "sparse_inverse" else _grn_methods
    scores: Scores = getattr(module, method)(problem)
    if problem.unmeasured:
        logger.warning(
            "%s: %d regulator(s) are not among the measured genes and left out, as the method regresses on measured values: %s.",
            method,
            len(problem.unmeasured),
            listing(problem.unmeasured, 5),
        )
        scores.notes["without_edges"] = problem.unmeasured
    return scores


# ---------------------------------------------------------------------------------------------- output


def _net_of_model(model: Any, adata: AnnData) -> pd.DataFrame:
    if not hasattr(model, "get_grn"):
        raise ScpertError(
            f"model= must be a trained model with get_grn(); {type(model).__name__} has none. "
            "GPOVAE and LinearGRN have one."
        )
    net = model.get_grn()
    if not len(net):
        logger.warning("The model's network has no edge.")
        return net
    check_net(net, "model.get_grn()")
    if not net[K.TARGET].astype(str).isin(adata.var_names).any():
        raise ScpertError(
            f"No target of the model's network ({listing(net[K.TARGET].unique(), 4)}) is a gene of adata "
            f"({listing(adata.var_names[:4])}). Give the AnnData the model was trained on."
        )
    return net


def _by_activity(net: pd.DataFrame, screen: Screen, covariate_keys: list[str]) -> pd.DataFrame:
    """Weights under the perturbation turned into signs of the regulator's activity."""
    from ._grn_methods import total_effects

    # all single perturbations vote on the direction of those that are not measured, whether they have edges or not
    singles = sorted({t[0] for p in screen.perturbations if len(t := parse(p, screen.control)) == 1})
    measured = total_effects(problem_of(screen, singles, covariate_keys)).sign if singles else np.zeros(0)
    usual = 1.0 if measured.sum() > 0 else -1.0
    sign = pd.Series(measured, index=singles).reindex(net[K.SOURCE].astype(str)).fillna(usual)
    return net.assign(**{K.WEIGHT: net[K.WEIGHT].to_numpy() * sign.to_numpy()})


def _net_to_arrays(net: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        net[K.SOURCE].astype(str).to_numpy(dtype=object),
        net[K.TARGET].astype(str).to_numpy(dtype=object),
        net[K.WEIGHT].to_numpy(dtype=np.float64),
    )


def _strongest(weight: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest absolute weights, ties by position: deterministic."""
    strength = np.abs(weight)
    if count >= len(strength):
        return np.arange(len(strength))
    bar = np.partition(strength, len(strength) - count)[len(strength) - count]
    above = np.flatnonzero(strength > bar)
    return np.sort(np.concatenate([above, np.flatnonzero(strength == bar)[: count - len(above)]]))


def _select(
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    columns: dict[str, np.ndarray],
    keep: np.ndarray | None,
    n_edges: int | None,
    threshold: float | None,
    adata: AnnData,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    valid = np.isfinite(weight) & (weight != 0) & (source != target) & np.isin(target, adata.var_names.to_numpy())
    if threshold is not None:
        valid &= np.abs(weight) > threshold
    index = np.flatnonzero(valid)
    if n_edges is not None:
        index = index[_strongest(weight[index], int(n_edges))]
    return source[index], target[index], weight[index], {c: v[index] for c, v in columns.items()}


def _edges(
    problem: Problem, scores: Scores, n_edges: int | None, threshold: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    weight = scores.weight
    position = problem.position
    measured = np.flatnonzero(position >= 0)
    valid = np.isfinite(weight) & (weight != 0)
    valid[measured, position[measured]] = False  # no self loops: the target's own knock-down is no edge
    candidates = weight.size - len(measured)
    if threshold is not None:
        valid &= np.abs(np.where(valid, weight, 0)) > threshold
    elif n_edges is None and scores.keep is not None:
        valid &= scores.keep
    row, column = np.nonzero(valid)
    strength = weight[row, column]
    limit = n_edges
    if limit is None and threshold is None and scores.keep is None:
        limit = max(1, min(candidates // 2, EDGES_PER_GENE * len(problem.genes)))
    if limit is not None:
        # edges of measured regulators are counted; those of others as strong as these stand beside them
        own = position[row] >= 0
        counted = np.flatnonzero(own) if own.any() else np.arange(len(row))
        chosen = counted[_strongest(strength[counted], int(limit))]
        if own.any():
            bar = np.abs(strength[chosen]).min(initial=np.inf) if len(counted) > int(limit) else 0.0
            chosen = np.sort(np.concatenate([chosen, np.flatnonzero(~own & (np.abs(strength) >= bar))]))
        row, column = row[chosen], column[chosen]
    names, genes = np.asarray(problem.regulators, dtype=object), problem.genes.to_numpy(dtype=object)
    columns = {name: values[row, column] for name, values in scores.columns.items()}
    return names[row], genes[column], weight[row, column], columns


def _write(
    adata: AnnData,
    key: str,
    method: str,
    parameters: dict[str, Any],
    notes: dict[str, Any],
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    columns: dict[str, np.ndarray],
    seen: np.ndarray,
) -> None:
    row, column = adata.var_names.get_indexer(pd.Index(source)), adata.var_names.get_indexer(pd.Index(target))
    inside = row >= 0
    matrix = sparse.csr_matrix(
        (weight[inside].astype(np.float32), (row[inside], column[inside])), shape=(adata.n_vars, adata.n_vars)
    )
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    table = pd.DataFrame({K.SOURCE: source.astype(str), K.TARGET: target.astype(str), K.WEIGHT: weight, **columns})
    unmeasured = sorted({s for s, i in zip(source, inside, strict=True) if not i} | set(notes.pop("unmeasured", ())))
    without_edges = notes.pop("without_edges", [])
    if unmeasured:
        logger.warning(
            "%d regulator(s) are not among the measured genes: %s. Their edges are in uns[%r]['unmeasured_edges'].",
            len(unmeasured),
            listing(unmeasured, 5),
            key,
        )
    if not len(source):
        logger.warning("%s found no edge.", method)
    if key in adata.varp:
        logger.warning("varp[%r] and uns[%r] are overwritten.", key, key)
    result = {
        "method": method,
        "parameters": parameters,
        "unmeasured_regulators": np.asarray([*unmeasured, *without_edges], dtype=object).astype(str),
        "unmeasured_edges": table[~inside].reset_index(drop=True),
        "n_edges": int(matrix.nnz),
        "cells": seen,
        **notes,
    }
    if columns and len(table) <= _MAX_TABLE:
        result["edges"] = table[inside].drop(columns=K.WEIGHT).reset_index(drop=True)
    adata.varp[key] = matrix
    adata.uns[key] = result


# ---------------------------------------------------------------------------------------------- error rate


def weighted_bh(pvals: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Benjamini-Hochberg; with prior weights that of Genovese, Roeder and Wasserman (2006): p / w, mean w = 1."""
    if weights is None:
        return benjamini_hochberg(pvals)
    return benjamini_hochberg(np.minimum(pvals / prior_factor(pvals, weights), 1.0))


def prior_factor(pvals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How many times each p-value counts, 1 in the mean of those tested."""
    factor = 1.0 + weights
    scaled: np.ndarray = factor / factor[np.isfinite(pvals)].mean()
    return scaled
