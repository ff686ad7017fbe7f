"""Judge a network on interventions that it did not see and on reference nets, beside baselines of equal size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_net, check_obs_key, check_seed, check_whole, listing
from .._progress import progress
from ..data import Screen, parse
from ..data._effects import perturbation_sign, strata_of
from ..data._screen import cell_hashes
from ..errors import MissingKeyError, ScpertError
from ..get import grn_df
from ._effects import benjamini_hochberg, cells_behind, effects_of_cells, perturbation_effects, sensitivity
from ._grn import infer_grn, problem_of
from ._grn_methods import total_effects, without_composition
from ._rank_sum import rank_sums, scaled, scaled_rank_sums

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy import sparse

__all__ = ["evaluate_grn", "grn_stability", "rewire"]

logger = logging.getLogger("scpert")

#: CausalBench draws this many pairs to estimate its false omission rate.
CAUSALBENCH_PAIRS = 500
_RANDOM_DRAWS = 10


@dataclass
class Judge:
    """What is true of each candidate pair ``(regulator, gene)``."""

    evidence: str
    regulators: list[str]
    genes: pd.Index
    candidate: np.ndarray  # bool: may be an edge at all
    positive: np.ndarray  # bool
    sign: np.ndarray  # sign of the effect of the regulator's activity; 0 where unknown
    nominal: np.ndarray | None = None  # p < 0.05 without correction (CausalBench)
    distance: Any = None  # callable (rows, columns) -> Wasserstein distances
    plain_distance: Any = None  # the same, of the values as they are (CausalBench)


def evaluate_grn(
    adata: AnnData,
    *,
    key: str = K.GRN,
    observed: AnnData | None = None,
    reference: pd.DataFrame | None = None,
    k: Sequence[int] = (100, 500, 1000, 5000),
    perturbation_key: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
    fdr: float = 0.05,
    n_cells: int | None = None,
    n_permutations: int = 100,
    composition: bool = True,
    allow_same_cells: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    r"""Judge a network on held-out interventions and against a reference net, at equal numbers of edges.

    **Interventions** (cells that the inference did not use). For every perturbed regulator :math:`i` and each gene
    :math:`j \ne i` that is measured in both data sets (its own knock-down is no edge) a Mann-Whitney test of :math:`x_j`
    under :math:`i` against the controls, within the strata of ``covariate_keys``; a pair is positive at a Benjamini-Hochberg rate of ``fdr`` over all pairs. With :math:`E` the ``k``
    strongest edges and :math:`C` all candidate pairs

    * ``precision``: share of positives in :math:`E`; ``recall``: share of the positives that is in :math:`E`;
    * ``false_omission_rate``: positives in :math:`C \setminus E` over :math:`|C \setminus E|`;
    * ``mean_wasserstein``: mean over :math:`E` of the 1-Wasserstein distance of :math:`x_j` under :math:`i` and in
      controls, log1p CP10k (see ``composition``);
    * ``sign_accuracy``: share of the positive edges whose sign is that of the held-out effect;
    * ``causalbench_precision``, ``causalbench_mean_wasserstein``, ``causalbench_false_omission_rate``: as CausalBench
      defines them, of the values as they are and p < 0.05 without correction, the last over 500 random pairs outside the
      network; ``released_false_omission_rate``: as the
      released code computes it, where predicted edges are not taken out of the random pairs, so that it does not depend
      on the network (kept only to compare with published figures).

    **Reference** (a net): the same with its edges as positives, over the pairs of regulators that it knows;
    ``null_precision`` and ``null_p`` come from networks with the same in- and out-degrees.

    Parameters
    ----------
    adata
        With a network from :func:`scpert.tl.infer_grn`, and the cells that it was inferred from (for the baselines).
    key
        Name of the network.
    observed
        Held-out cells. By default the cells of ``adata`` that the inference did not use (``split_key=``).
    reference
        A net, ``source, target``.
    k
        Numbers of edges; a network with fewer counts with all it has, and the baselines with as many.
    perturbation_key, control, layer, scale, library_size_key
        Of ``observed``; by default as in the inference. The cells of the inference are read as the inference read them.
    covariate_keys
        Columns of ``observed`` (batch, donor ...) within which cells are compared with controls; by default those of the
        inference, ``[]`` for none. The tests are van Elteren's, the distances the mean of the strata's, by the cells of the
        perturbation. The measures named after CausalBench never look at them.
    fdr
        Error rate that makes a pair positive.
    n_cells
        Cells of each perturbation at most, so that power is equal; by default the median number.
    n_permutations
        Networks of the null.
    composition
        Take the factor that most genes share out of each perturbation before it is judged, as the inference does (counts are
        compositions: a perturbation that lowers strong genes raises all others in CP10k). The measures named after
        CausalBench never do.
    allow_same_cells
        Judge on cells used for the inference: an upper bound, not an evaluation.
    random_state
        Seed.

    Returns
    -------
    DataFrame with one row per ``evidence`` (``"interventions"``, ``"reference"``), ``network`` (the key; baselines
    ``"effect_size"`` and ``"zscore"`` of the training cells, ``"correlation"`` over them, ``"random"``) and ``k``, with
    ``n_edges``, ``n_candidates``, ``n_positives``, the measures above, ``auprc`` over all candidate pairs and
    ``early_precision_ratio`` (precision at the true number of edges over that of a random network).

    Raises
    ------
    MissingKeyError
        If there is no such network.
    ScpertError
        If there is nothing to judge by, held-out cells were used for the inference, no regulator is in them, or a stratum
        with perturbed cells has fewer than two controls.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=600, n_genes=40, n_targets=5)
    >>> train, test = adata[::2].copy(), adata[1::2].copy()
    >>> scpert.tl.infer_grn(train)
    >>> table = scpert.tl.evaluate_grn(train, observed=test, k=(10,))
    >>> sorted(table["network"].unique())
    ['correlation', 'effect_size', 'grn', 'random', 'zscore']
    """
    random_state = check_seed(random_state)
    net = grn_df(adata, key, unmeasured=True)
    notes = adata.uns.get(key)
    if notes is None or "cells" not in notes:
        raise MissingKeyError(
            f"adata.uns[{key!r}] does not say which cells the network comes from. Call scpert.tl.infer_grn."
        )
    check_fraction("fdr", fdr)
    sizes = _sizes(k)
    if n_cells is not None:
        check_whole("n_cells", n_cells)
    if n_permutations != 0:
        check_whole("n_permutations", n_permutations)
    parameters = notes["parameters"]
    keys = parameters["covariate_keys"] if covariate_keys is None else np.atleast_1d(np.asarray(covariate_keys))
    keys = [str(key) for key in np.atleast_1d(keys)]
    used = np.asarray(notes["cells"], dtype=np.uint64)
    own = np.isin(pd.util.hash_array(adata.obs_names.to_numpy(dtype=object)), used)
    observed = _held_out(adata, observed, own, used, reference, allow_same_cells, key)
    inferred = {name: str(parameters[name]) for name in ("perturbation_key", "control", "layer", "library_size_key")}
    arguments: dict[str, Any] = {
        "perturbation_key": perturbation_key or inferred["perturbation_key"],
        "control": control or inferred["control"],
        "layer": layer or inferred["layer"] or None,
        "scale": scale,
        "library_size_key": library_size_key or inferred["library_size_key"] or None,
    }
    # the cells of the inference are read as it read them (a model's network may have been read out without them)
    known = inferred["perturbation_key"] in adata.obs
    training = {name: value or None for name, value in inferred.items()} if known else arguments
    training = {**training, "scale": parameters["scale"] if parameters["scale"] in K.SCALES else scale}
    if observed is not None:
        if layer is None and arguments["layer"] not in observed.layers:
            arguments["layer"] = None
        # what a table of effects is like cannot be seen; one of profiles may have several rows of the control
        cells = _has_controls(observed, arguments) and not _has_controls(adata, training)
        if scale == K.SCALE_AUTO and parameters["scale"] == K.SCALE_EFFECTS and not cells:
            arguments["scale"] = K.SCALE_EFFECTS
    rng = np.random.default_rng(random_state)

    judges = []
    if observed is not None:
        labels = observed.obs.get(arguments["perturbation_key"])
        apart = {str(x) for x in np.atleast_1d(parameters.get("observational", []))}
        if apart and labels is not None and labels.astype(str).isin(apart).any():
            observed = observed[~labels.astype(str).isin(apart).to_numpy()]
        judges.append(_judge_interventions(observed, adata.var_names, arguments, keys, fdr, n_cells, composition, rng))
    baselines = _baselines(adata, own, training, parameters)
    if reference is not None:
        judges.append(_judge_reference(reference, net, baselines, adata, training))

    rows: list[dict[str, Any]] = []
    for judge in judges:
        networks = {key: _score(net, judge)}
        networks |= {name: _score(other, judge) for name, other in baselines.items()}
        available = int((networks[key] != 0).sum())
        if not available:
            logger.warning("No edge of the network is among the candidate pairs of the %s.", judge.evidence)
        order = {name: _top(score) for name, score in networks.items()}
        overall = {name: _overall(judge, score, order[name]) for name, score in networks.items()}
        for size in sizes:
            n = min(size, available)
            for name, score in networks.items():
                found = _measure(judge, score, order[name], n, rng, n_permutations if name == key else 0)
                rows.append({"evidence": judge.evidence, "network": name, "k": size, **found, **overall[name]})
            rows.append(_random_row(judge, size, n, rng))
    return pd.DataFrame(rows)


def _sizes(k: Any) -> list[int]:
    sizes = sorted({check_whole("k", value) for value in np.atleast_1d(np.asarray(k)).tolist()})
    if not sizes:
        raise ScpertError("k= is empty: give one or more numbers of edges, e.g. k=(100, 500).")
    return sizes


def _held_out(
    adata: AnnData,
    observed: AnnData | None,
    own: np.ndarray,
    used: np.ndarray,
    reference: pd.DataFrame | None,
    allow_same_cells: bool,
    key: str,
) -> AnnData | None:
    if observed is None:
        if allow_same_cells:
            return adata
        if (~own).any():
            return adata[~own]
        if reference is not None:
            return None
        raise ScpertError(
            f"Nothing to judge {key!r} by: all {adata.n_obs} cells of adata were used to infer it. Infer on some "
            "(scpert.pp.split(adata, kind='cells'); infer_grn(adata, split_key='split')), pass held-out cells as "
            "observed=, or a net as reference=. allow_same_cells=True gives an upper bound."
        )
    if not hasattr(observed, "var_names"):
        raise ScpertError(f"observed must be an AnnData of held-out cells; got {type(observed).__name__}.")
    missing = adata.var_names.difference(observed.var_names)
    if len(missing) == adata.n_vars:
        raise ScpertError(f"observed has none of the genes of adata ({listing(adata.var_names[:4])}).")
    cells = cells_behind(observed)
    seen = np.isin(cell_hashes(observed.obs_names) if cells is None else cells, used)
    if seen.any() and not allow_same_cells:
        raise ScpertError(
            f"{int(seen.sum())} of {len(seen)} cells of observed were used to infer {key!r}, by their names: the network "
            "would be judged on what it has seen. Pass other cells, give cells of another data set names of their own "
            "(obs_names), or allow_same_cells=True for an upper bound."
        )
    return observed


def _has_controls(adata: AnnData, arguments: dict[str, Any]) -> bool:
    """Whether more than one row is a control, as in cells; a table of effects has none, or its zero row, one of profiles its replicates."""
    labels = adata.obs.get(arguments["perturbation_key"])
    return labels is not None and int((labels.astype(str) == arguments["control"]).sum()) > 1


# ---------------------------------------------------------------------------------------------- what is true


def _judge_interventions(
    observed: AnnData,
    known: pd.Index,
    arguments: dict[str, Any],
    keys: list[str],
    fdr: float,
    n_cells: int | None,
    composition: bool,
    rng: np.random.Generator,
) -> Judge:
    screen = Screen(observed, allowed=K.SCALES, **arguments)
    control = arguments["control"]
    singles = {t[0]: p for p in screen.perturbations if len(t := parse(p, control)) == 1}
    genes = screen.genes
    if screen.scale == K.SCALE_EFFECTS or screen.is_control.sum() < 2:
        problem = problem_of(screen, sorted(singles))
        found, as_is = (total_effects(problem, composition=corrected) for corrected in (composition, False))
        regulators, shift, pvals, plain = sorted(singles), found.shift, found.pvals, as_is.pvals
        direction = found.sign
        distance: Any = lambda rows, columns: np.abs(shift[rows, columns])  # noqa: E731
        plain_distance: Any = lambda rows, columns: np.abs(as_is.shift[rows, columns])  # noqa: E731
    else:
        count = {t: int((screen.labels == p).sum()) for t, p in singles.items()}
        regulators = sorted(t for t in singles if count[t] >= 2)
        if not regulators:
            raise ScpertError(
                "observed has no single perturbation with two or more cells; it has "
                f"{listing(screen.perturbations, 5) or 'controls only'}. Pass held-out cells of the perturbed regulators."
            )
        limit = int(np.median([count[t] for t in regulators])) if n_cells is None else int(n_cells)
        keep, code = [np.flatnonzero(screen.is_control)], []
        code.append(np.zeros(len(keep[0]), dtype=np.int64))
        for i, target in enumerate(regulators, start=1):
            mine = np.flatnonzero(screen.labels == singles[target])
            if len(mine) > limit:
                mine = np.sort(rng.choice(mine, limit, replace=False))
            keep.append(mine)
            code.append(np.full(len(mine), i))
        groups = np.concatenate(code)
        cells = np.concatenate(keep)
        values, strata = screen.rows(cells), strata_of(screen.adata, keys)[0][cells]
        everywhere = np.zeros_like(strata)
        z, pvals = rank_sums(values, groups, len(regulators))
        plain = 2.0 * special.ndtr(-np.abs(z))  # the normal approximation, as CausalBench has it
        shift, error, _, _, _ = effects_of_cells(screen, screen.perturbations, keys, cautious=True)
        rows = pd.Index(screen.perturbations).get_indexer(pd.Index([singles[t] for t in regulators]))
        shift, error = shift[rows], error[rows]
        distance = plain_distance = _Wasserstein(values.tocsc(), groups, everywhere)
        if composition:
            offset, offset_error = without_composition(shift, error, sensitivity(screen))
            _, pvals = scaled_rank_sums(values, groups, offset, offset_error, strata)
            values = scaled(values, groups, offset)
        elif strata.any():
            _, pvals = rank_sums(values, groups, len(regulators), strata)
        if composition or strata.any():
            distance = _Wasserstein(values.tocsc(), groups, strata)
        direction = perturbation_sign(shift, error, genes.get_indexer(pd.Index(regulators)))
    position = genes.get_indexer(pd.Index(regulators))
    measured = np.flatnonzero(position >= 0)
    candidate = np.ones((len(regulators), len(genes)), dtype=bool)
    candidate[measured, position[measured]] = False
    candidate[:, ~genes.isin(known)] = False  # no network of adata has an edge to these
    tested = np.where(candidate, pvals, np.nan)
    return Judge(
        "interventions",
        regulators,
        genes,
        candidate,
        candidate & (np.nan_to_num(benjamini_hochberg(tested), nan=1.0) <= fdr),
        direction[:, None] * np.sign(shift),
        candidate & (np.nan_to_num(plain, nan=1.0) < 0.05),
        distance,
        plain_distance,
    )


class _Wasserstein:
    """1-Wasserstein distances of each gene in the groups of cells and in the controls, computed when a gene is asked for."""

    def __init__(self, values: sparse.csc_matrix, groups: np.ndarray, strata: np.ndarray):
        self.values = values
        self.known = np.full((int(groups.max()), values.shape[1]), np.nan)
        self.parts = []  # of each stratum: controls, cells, their groups without gaps, these groups, their share of all their cells
        n = np.bincount(groups)
        for s in np.unique(strata[groups > 0]):
            own, control = np.flatnonzero((strata == s) & (groups > 0)), np.flatnonzero((strata == s) & (groups == 0))
            there, dense_code = np.unique(groups[own], return_inverse=True)
            share = np.bincount(dense_code.reshape(-1)) / n[there]
            self.parts.append((control, own, dense_code.reshape(-1), there - 1, share))

    def __call__(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        for gene in np.unique(columns[np.isnan(self.known[rows, columns])]):
            dense = self.values[:, [gene]].toarray().ravel().astype(np.float64)
            self.known[:, gene] = 0.0
            for control, own, code, there, share in self.parts:
                self.known[there, gene] += share * wasserstein(dense[own], code, dense[control])
        out: np.ndarray = self.known[rows, columns]
        return out


def wasserstein(values: np.ndarray, group: np.ndarray, other: np.ndarray) -> np.ndarray:
    r"""1-Wasserstein distances of several samples and one other ``(group,)``.

    .. math:: W = \int_0^1 |Q_1(u) - Q_2(u)|\, du

    of the quantile functions. That of a sample is constant over :math:`1/n`; where the other crosses the constant is found
    by search, and the integrals beside it are differences of its cumulative sums.

    Parameters
    ----------
    values, group
        Of the cells of all samples, and the sample of each, codes from 0 without a gap ``(cell,)``.
    other
        Values of the other sample.
    """
    other = np.sort(other)
    share = np.arange(len(other) + 1) / len(other)
    integral = np.concatenate([[0.0], np.cumsum(other)]) / len(other)
    order = np.lexsort((values, group))
    values, group = values[order], group[order]
    size = np.bincount(group)
    low = (np.arange(len(values)) - (np.cumsum(size) - size)[group]) / size[group]
    high = low + 1.0 / size[group]
    cross = np.clip(np.searchsorted(other, values) / len(other), low, high)
    at_low, at_cross, at_high = (np.interp(u, share, integral) for u in (low, cross, high))
    return np.bincount(group, values * (2 * cross - low - high) + at_low + at_high - 2 * at_cross)


def _judge_reference(
    reference: pd.DataFrame,
    net: pd.DataFrame,
    baselines: dict[str, pd.DataFrame],
    adata: AnnData,
    arguments: dict[str, Any],
) -> Judge:
    tested = set(net[K.SOURCE])
    if arguments["perturbation_key"] in adata.obs:
        labels = adata.obs[arguments["perturbation_key"]].astype(str).unique()
        tested |= {label for label in labels if label != arguments["control"] and "+" not in label}
    for other in baselines.values():
        tested |= set(other[K.SOURCE])
    genes = adata.var_names
    truth = check_net(reference, "reference", known=tested | set(genes))
    regulators = sorted(tested & set(truth[K.SOURCE]))
    truth = truth[truth[K.SOURCE].isin(regulators) & truth[K.TARGET].isin(genes)]
    if not len(truth):
        raise ScpertError(
            f"reference has no edge from a regulator of the network ({listing(sorted(tested), 4)}) to a gene of adata: "
            f"its sources are {listing(reference[K.SOURCE].unique(), 4)}. Give a net of the same organism and names."
        )
    row, column = (
        pd.Index(regulators).get_indexer(pd.Index(truth[K.SOURCE])),
        genes.get_indexer(pd.Index(truth[K.TARGET])),
    )
    positive = np.zeros((len(regulators), len(genes)), dtype=bool)
    positive[row, column] = True
    sign = np.zeros(positive.shape)
    if K.WEIGHT in reference.columns:
        sign[row, column] = np.sign(truth[K.WEIGHT])
    candidate = np.ones_like(positive)
    own = genes.get_indexer(pd.Index(regulators))
    candidate[np.flatnonzero(own >= 0), own[own >= 0]] = False
    return Judge("reference", regulators, genes, candidate, positive & candidate, sign)


# ---------------------------------------------------------------------------------------------- networks


def _baselines(
    adata: AnnData, own: np.ndarray, arguments: dict[str, Any], parameters: dict[str, Any]
) -> dict[str, pd.DataFrame]:
    """Rankings of all pairs by the cells that the network was inferred from."""
    if not own.any() or arguments["perturbation_key"] not in adata.obs:
        logger.warning("adata does not hold the cells of the inference: the only baseline is a random network.")
        return {}
    train = adata if own.all() else adata[own]
    keys = [str(c) for c in np.atleast_1d(parameters["covariate_keys"])] or None
    effects = perturbation_effects(train, **arguments, covariate_keys=keys)
    apart = {str(x) for x in np.atleast_1d(parameters.get("observational", []))}  # samples, no perturbations
    single = [len(parse(p, arguments["control"])) == 1 and p not in apart for p in effects.obs_names]
    effects = effects[np.asarray(single)]
    sources = np.repeat(effects.obs_names.to_numpy(dtype=object), effects.n_vars)
    targets = np.tile(effects.var_names.to_numpy(dtype=object), effects.n_obs)

    def ranked(values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({K.SOURCE: sources, K.TARGET: targets, K.WEIGHT: np.nan_to_num(values).ravel()})

    shift = np.asarray(effects.X)
    error = np.asarray(effects.layers[K.STD_ERROR])
    if effects.uns["effects"]["statistic"] == "spread over perturbations":  # swollen by the effects themselves
        error = 1.4826 * np.median(np.abs(shift), axis=0)
    sign = perturbation_sign(shift, error, effects.var_names.get_indexer(effects.obs_names))[:, None]
    out = {"effect_size": ranked(sign * shift), "zscore": ranked(sign * np.asarray(effects.layers[K.ZSCORE]))}
    measured = [p for p in effects.obs_names if p in set(adata.var_names)]
    if measured:
        options: dict[str, Any] = {**arguments, "threshold": 0, "copy": True}
        name = "baseline_correlation"  # not the key of the network, which would be said to be overwritten
        correlated: Any = infer_grn(
            train, method="correlation", regulators=measured, key_added=name, covariate_keys=keys, **options
        )
        out["correlation"] = grn_df(correlated, name)
    return out


def _score(net: pd.DataFrame, judge: Judge) -> np.ndarray:
    score = np.zeros(judge.candidate.shape)
    row = pd.Index(judge.regulators).get_indexer(pd.Index(net[K.SOURCE].astype(str)))
    column = judge.genes.get_indexer(pd.Index(net[K.TARGET].astype(str)))
    inside = (row >= 0) & (column >= 0)
    score[row[inside], column[inside]] = net[K.WEIGHT].to_numpy(dtype=np.float64)[inside]
    score[~judge.candidate] = 0.0
    return score


def _top(score: np.ndarray, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the ``n`` strongest pairs (all that are not zero), ties by position."""
    index = np.flatnonzero(score)
    order = index[np.argsort(-np.abs(score.ravel()[index]), kind="stable")[:n]]
    return np.unravel_index(order, score.shape)  # type: ignore[return-value]


def rewire(source: np.ndarray, target: np.ndarray, rng: np.random.Generator, n_rounds: int = 100) -> np.ndarray:
    """Targets of a network with the same in- and out-degrees: shuffled until no self loop and no double edge is left.

    What cannot be resolved within ``n_rounds`` keeps its place.
    """
    shuffled = rng.permutation(target)
    for _ in range(n_rounds):
        pair = source.astype(np.int64) * (int(max(source.max(), target.max())) + 1) + shuffled
        _, first = np.unique(pair, return_index=True)
        bad = np.ones(len(pair), dtype=bool)
        bad[first] = False
        bad |= shuffled == source
        if not bad.any():
            break
        index = np.flatnonzero(bad)
        partner = rng.integers(0, len(pair), size=len(index))
        for i, j in zip(index, partner, strict=True):
            shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def _overall(judge: Judge, score: np.ndarray, order: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Measures of a ranking that do not depend on the number of edges."""
    positives = int(judge.positive.sum())
    base = positives / max(int(judge.candidate.sum()), 1)
    hits = judge.positive[order[0][:positives], order[1][:positives]].sum() / max(positives, 1)
    return {
        "auprc": _auprc(np.abs(score[judge.candidate]), judge.positive[judge.candidate]),
        "early_precision_ratio": float(hits / base) if base > 0 else np.nan,
    }


def _measure(
    judge: Judge, score: np.ndarray, order: tuple[np.ndarray, np.ndarray], n: int, rng: Any, n_permutations: int
) -> dict[str, Any]:
    rows, columns = order[0][:n], order[1][:n]
    out = _at(judge, rows, columns)
    agree = judge.positive[rows, columns] & (judge.sign[rows, columns] != 0)
    if agree.any():
        out["sign_accuracy"] = float(np.mean(np.sign(score[rows, columns])[agree] == judge.sign[rows, columns][agree]))
    if n_permutations and len(rows) > 1:
        identity = judge.genes.get_indexer(pd.Index(judge.regulators))
        # regulators and targets in one numbering, so that self loops are seen
        sources = np.where(identity[rows] >= 0, identity[rows], len(judge.genes) + rows)
        null = []
        for _ in range(n_permutations):
            shuffled = rewire(sources, columns, rng)
            null.append(judge.positive[rows, shuffled].mean())
        out["null_precision"] = float(np.mean(null))
        out["null_p"] = float((1 + np.sum(np.asarray(null) >= out["precision"])) / (1 + n_permutations))
    return out


def _at(judge: Judge, rows: np.ndarray, columns: np.ndarray) -> dict[str, Any]:
    n, candidates, positives = len(rows), int(judge.candidate.sum()), int(judge.positive.sum())
    hits = int(judge.positive[rows, columns].sum())
    out: dict[str, Any] = {
        "n_edges": n,
        "n_candidates": candidates,
        "n_positives": positives,
        "precision": hits / n if n else np.nan,
        "recall": hits / positives if positives else np.nan,
        "false_omission_rate": (positives - hits) / (candidates - n) if candidates > n else np.nan,
    }
    if judge.distance is not None:
        out["mean_wasserstein"] = float(np.mean(judge.distance(rows, columns))) if n else np.nan
    if judge.nominal is not None:
        out["causalbench_precision"] = float(judge.nominal[rows, columns].mean()) if n else np.nan
        out["causalbench_mean_wasserstein"] = float(np.mean(judge.plain_distance(rows, columns))) if n else np.nan
        outside = judge.candidate.copy()
        outside[rows, columns] = False
        for column, among in (
            ("causalbench_false_omission_rate", outside),
            ("released_false_omission_rate", judge.candidate),
        ):
            pairs = np.flatnonzero(among.ravel())
            # the same seed for every network, as the released figure is to be one number
            draw = np.random.default_rng(0).choice(pairs, min(CAUSALBENCH_PAIRS, len(pairs)), replace=False)
            out[column] = float(judge.nominal.ravel()[draw].mean()) if len(draw) else np.nan
    return out


def _random_row(judge: Judge, size: int, n: int, rng: np.random.Generator) -> dict[str, Any]:
    pairs = np.flatnonzero(judge.candidate.ravel())
    draws = []
    for _ in range(_RANDOM_DRAWS):
        rows, columns = np.unravel_index(rng.choice(pairs, min(n, len(pairs)), replace=False), judge.candidate.shape)
        draws.append(_at(judge, rows, columns))
    mean: dict[str, Any] = {str(name): value for name, value in pd.DataFrame(draws).mean().items()}
    for name in ("n_edges", "n_candidates", "n_positives"):
        mean[name] = int(mean[name])
    base = judge.positive.sum() / max(len(pairs), 1)
    return {
        "evidence": judge.evidence,
        "network": "random",
        "k": size,
        **mean,
        "auprc": float(base) if base > 0 else np.nan,
        "early_precision_ratio": 1.0 if base > 0 else np.nan,
    }


def _auprc(score: np.ndarray, truth: np.ndarray) -> float:
    """Average precision: the step integral of precision over recall, ties taken together."""
    if not truth.any():
        return np.nan
    order = np.argsort(-score)
    hits = np.cumsum(truth[order])
    ranked = score[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    precision = hits[last] / (np.flatnonzero(last) + 1)
    recall = hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def grn_stability(
    adata: AnnData,
    *,
    by: str = "bootstrap",
    n: int = 5,
    k: Sequence[int] = (100, 500, 1000),
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """How much of a network comes again with other cells or another seed.

    Parameters
    ----------
    adata
        A screen; it is not changed.
    by
        ``"bootstrap"``: cells drawn with replacement within each label; ``"seed"``: the same cells, other seeds.
    n
        Networks; all pairs of them are compared.
    k
        Numbers of edges.
    random_state
        Seed of the draws.
    **options
        Of :func:`scpert.tl.infer_grn`.

    Returns
    -------
    DataFrame ``k``, ``n_edges`` (mean), ``jaccard`` (mean over pairs of networks of shared over all edges),
    ``jaccard_sd``, ``sign_agreement`` (of the shared edges).

    Raises
    ------
    ScpertError
        If ``by`` is not known, or ``n`` or ``k`` are no numbers of networks and edges.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> list(scpert.tl.grn_stability(adata, n=2, k=(10,)).columns)
    ['k', 'n_edges', 'jaccard', 'jaccard_sd', 'sign_agreement']
    """
    random_state = check_seed(random_state)
    check_choice("by", by, ("bootstrap", "seed"))
    if check_whole("n", n) < 2:
        raise ScpertError("n=1: give two or more networks, as pairs of them are compared.")
    sizes = _sizes(k)
    labels = check_obs_key(adata, options.get("perturbation_key", K.PERTURBATION), "perturbation_key").astype(str)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if options.get("model") is not None:
        raise ScpertError("model=: a trained model has one network, whatever cells are drawn. Leave it out.")
    if by == "bootstrap" and max(map(len, groups)) < 2:
        raise ScpertError(
            "by='bootstrap' draws rows within each label, and every label has one row: all networks would be the same. Give cells, or "
            "by='seed'."
        )
    observational = options.get("observational")
    mask = np.asarray(None if hasattr(observational, "var_names") else observational)
    options = {**options, "key_added": "stability", "copy": by == "seed"}
    adata = adata.to_memory() if adata.isbacked else adata
    rng = np.random.default_rng(random_state)
    nets = []
    for run in progress(range(n), total=n, description="stability", unit="network"):
        if by == "bootstrap":
            index = np.concatenate([rng.choice(rows, len(rows)) for rows in groups])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Observation names are not unique")
                sample = adata[index].copy()
            sample.obs_names = [f"{name}-{i}" for i, name in enumerate(sample.obs_names)]
            if mask.dtype == bool and len(mask) == adata.n_obs:  # a mask of cells is drawn with them
                options["observational"] = mask[index]
            infer_grn(sample, random_state=random_state, **options)
        else:
            sample = infer_grn(adata, random_state=random_state + run, **options)  # type: ignore[assignment]
        nets.append(grn_df(sample, "stability", unmeasured=True))
    out = []
    for size in sizes:
        tops = [net.head(size).set_index([K.SOURCE, K.TARGET])[K.WEIGHT] for net in nets]
        shared, agreement = [], []
        for i in range(len(tops)):
            for j in range(i):
                both = tops[i].index.intersection(tops[j].index)
                union = len(tops[i]) + len(tops[j]) - len(both)
                shared.append(len(both) / union if union else np.nan)
                if len(both):
                    agreement.append(
                        np.mean(np.sign(tops[i].loc[both].to_numpy()) == np.sign(tops[j].loc[both].to_numpy()))
                    )
        out.append(
            {
                "k": size,
                "n_edges": float(np.mean([len(t) for t in tops])),
                "jaccard": float(np.mean(shared)) if shared else np.nan,
                "jaccard_sd": float(np.std(shared)) if shared else np.nan,
                "sign_agreement": float(np.mean(agreement)) if agreement else np.nan,
            }
        )
    return pd.DataFrame(out)
