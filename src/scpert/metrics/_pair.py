"""What is compared: a :class:`Reference` (real cells, training data) and a :class:`Pair` of it with one prediction.

Both are checked once; every metric takes the pair and trusts it. Rows and genes are matched by name, matrices are read
in chunks and never made dense as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_unique_names, listing
from ..data import Moments, Screen, check_labels, iter_rows, parse, read_rows, scale_evidence
from ..data._effects import strata_of
from ..errors import LabelError, ScaleError, ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Pair", "Reference"]

logger = logging.getLogger("scpert")

#: Root mean square (log1p units) under which a shift counts as constant: rounding, not prediction.
FLAT = 1e-6


def group_rows(labels: np.ndarray, strata: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Rows of each label; without those of stratum -1."""
    names, codes = np.unique(labels.astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
    if strata is not None:
        parts = [rows[strata[rows] >= 0] for rows in parts]
    return {str(name): rows for name, rows in zip(names, parts, strict=True) if len(rows)}


def _strata(screen: Screen, covariate_keys: str | Sequence[str] | None, name: str) -> np.ndarray | None:
    """Stratum of each cell ``(cell,)``, -1 where it has fewer than two controls; ``None``: all cells are in one."""
    if screen.scale == K.SCALE_EFFECTS or not screen.is_control.any():
        return None  # nothing to compare within
    strata, names = strata_of(screen.adata, covariate_keys)
    if len(names) == 1:
        return None
    few = np.bincount(strata[screen.is_control], minlength=len(names)) < 2
    if few.all():
        raise ScpertError(
            f"No stratum of covariate_keys has two control cells in {name} ({listing(names, 5)}): merge strata, or leave the covariate "
            "out."
        )
    if few.any():
        logger.warning(
            "%d of %d cells of %s are left out: their strata of covariate_keys (%s) have fewer than two control cells",
            int(few[strata].sum()),
            screen.n_cells,
            name,
            listing([n for n, lost in zip(names, few, strict=True) if lost], 5),
        )
        strata = np.where(few, -1, np.cumsum(~few) - 1)[strata]
    return strata


def without_strata(mean: np.ndarray, share: np.ndarray, control: np.ndarray, weight: np.ndarray) -> None:
    """Take out of mean profiles what the controls of their strata differ by from all controls, in place.

    ``mean`` ``(group, gene)``; ``share`` ``(group, stratum)``, where the cells of a group lie; ``control`` ``(stratum, gene)``,
    means of the controls; ``weight`` ``(stratum,)``, the share of the controls.
    """
    mean -= share @ (control - weight @ control)


def shares(groups: Sequence[np.ndarray], strata: np.ndarray) -> np.ndarray:
    """Share of the cells of each group in each stratum ``(group, stratum)``."""
    n = int(strata.max(initial=0)) + 1
    return np.array([np.bincount(strata[rows], minlength=n) / max(len(rows), 1) for rows in groups]).reshape(-1, n)


def _moments(screen: Screen, strata: np.ndarray | None) -> Moments:
    """Mean profiles of the perturbations within strata, and of the controls; the variances are those of the cells as they are."""
    if strata is None:
        return screen.moments()
    use = strata >= 0
    moments = screen.moments(mask=use)
    beside = screen.moments(strata, mask=use & screen.is_control)
    control = beside.mean[np.argsort(beside.groups.astype(int))]
    rows = group_rows(screen.labels, strata)
    weight = shares([rows[screen.control]], strata)[0]
    share = shares([rows[str(g)] for g in moments.groups], strata)
    without_strata(moments.mean, share, control, weight)
    return moments


class Blocks:
    """Cells of each label as they were read; beyond 32 MB in all they are read again each time."""

    def __init__(self) -> None:
        self.free = 32 * 2**20
        self.kept: dict[str, sparse.csr_matrix] = {}

    def get(self, label: str, read: Callable[[], sparse.csr_matrix]) -> sparse.csr_matrix:
        if label in self.kept:
            return self.kept[label]
        block = read()
        size = block.data.nbytes + block.indices.nbytes + block.indptr.nbytes
        if size <= self.free:
            self.free -= size
            self.kept[label] = block
        return block


def take_genes(block: sparse.csr_matrix, genes: np.ndarray) -> sparse.csr_matrix:
    """Columns of a block; no copy where they are all of them in order."""
    if len(genes) == block.shape[1] and np.array_equal(genes, np.arange(len(genes))):
        return block
    return block[:, genes]


def group_means(X: Any, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean of the rows of each group ``(group, gene)``, one pass; NaN in a row makes its group's mean NaN."""
    total = np.zeros((n_groups, X.shape[1]))
    for start, block in iter_rows(X):
        rows = codes[start : start + block.shape[0]]
        keep = np.flatnonzero(rows >= 0)
        member = sparse.csr_matrix((np.ones(len(keep)), (rows[keep], keep)), shape=(n_groups, block.shape[0]))
        total += (member @ block).toarray()
    n = np.bincount(codes[codes >= 0], minlength=n_groups)
    return total / np.maximum(n, 1)[:, None]


class Reference:
    """Real cells to compare predictions with, and the training data that baselines and references come from.

    Pass it to :func:`evaluate` in place of ``observed`` when many predictions meet the same cells: means, tests and
    principal components are then computed once.

    Parameters
    ----------
    observed
        Real cells with control cells (counts or log1p CP10k), or a table of effects (``scale="effects"``: one row per
        perturbation, already relative to control; a control row must be zero).
    train
        Training cells (or effects): origin of the perturbed centroid, of the training mean and of the components.
    perturbation_key, control, layer, scale, library_size_key
        As everywhere; they hold for ``observed`` and ``train``.
    covariate_keys
        Columns (batch, donor ...) within which profiles are compared with control cells: what the controls of a stratum differ by
        from all controls is taken out of the mean profiles of the perturbations, as
        :func:`scpert.tl.perturbation_effects` does. Cells of strata with fewer than two controls are left out. Metrics of cells
        and tests (differential expression) compare the cells as they are.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> reference = scpert.metrics.Reference(adata)
    >>> reference.mean.shape
    (5, 40)
    """

    def __init__(
        self,
        observed: AnnData,
        train: AnnData | None = None,
        *,
        perturbation_key: str = K.PERTURBATION,
        control: str = K.CONTROL,
        layer: str | None = None,
        scale: str = K.SCALE_AUTO,
        library_size_key: str | None = None,
        covariate_keys: str | Sequence[str] | None = None,
    ):
        options: dict[str, Any] = {
            "perturbation_key": perturbation_key,
            "control": control,
            "layer": layer,
            "scale": scale,
            "library_size_key": library_size_key,
            "allowed": K.SCALES,
        }
        self.perturbation_key, self.control = perturbation_key, control
        self.screen = Screen(observed, **options)
        self.scale = self.screen.scale
        self.genes = np.asarray(self.screen.genes.astype(str), dtype=object)
        if not self.screen.perturbations:
            raise LabelError(f"observed holds control cells only: nothing to compare in obs[{perturbation_key!r}].")
        self.strata = _strata(self.screen, covariate_keys, "observed")
        self.rows = group_rows(self.screen.labels, self.strata)
        self.perturbations = [p for p in self.screen.perturbations if p in self.rows]
        if not self.perturbations:
            raise ScpertError(
                "No perturbed cell of observed is in a stratum of covariate_keys with two control cells: merge strata, or leave the "
                "covariate out."
            )
        self._blocks = Blocks()
        self.n_cells = np.array([len(self.rows[p]) for p in self.perturbations])
        if self.scale == K.SCALE_EFFECTS:
            _check_effects(self.screen, "observed")
        self.train: Screen | None = None
        if train is not None:
            options["scale"] = self.scale if self.scale == K.SCALE_EFFECTS else scale
            if library_size_key is not None and self.scale != K.SCALE_EFFECTS:
                check_obs_key(train, library_size_key, "library_size_key of train")
            self.train = Screen(train, **options, require_control=False)
            if self.train.scale == K.SCALE_EFFECTS and self.scale != K.SCALE_EFFECTS:
                raise ScaleError("train holds effects but observed holds cells: give both on the same scale.")
            if self.train.scale == K.SCALE_EFFECTS:
                _check_effects(self.train, "train")
        self._train_strata = None if self.train is None else _strata(self.train, covariate_keys, "train")
        self._cache: dict[Any, Any] = {}

    # ------------------------------------------------------------------------------------------ observed

    @cached_property
    def _moments(self) -> dict[str, np.ndarray]:
        moments = _moments(self.screen, self.strata)
        where = {str(g): i for i, g in enumerate(moments.groups)}
        rows = [where[p] for p in self.perturbations]
        out = {"mean": moments.mean[rows], "var": moments.var[rows]}
        if self.scale == K.SCALE_EFFECTS:
            out["control"] = np.zeros(len(self.genes))
            out["control_var"] = np.full(len(self.genes), np.nan)
        else:
            out["control"] = moments.mean[where[self.control]]
            out["control_var"] = moments.var[where[self.control]]
        return out

    @property
    def mean(self) -> np.ndarray:
        """Mean observed profiles ``(perturbation, gene)``, log1p CP10k (or effects)."""
        return self._moments["mean"]

    @property
    def var(self) -> np.ndarray:
        """Variances between cells ``(perturbation, gene)``; NaN for one cell."""
        return self._moments["var"]

    @property
    def control_mean(self) -> np.ndarray:
        """Mean observed control ``(gene,)``; zero for effects."""
        return self._moments["control"]

    def cells(self, label: str, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Cells of a perturbation (or of the control), CSR on the log1p scale."""
        block = self._blocks.get(label, lambda: self.screen.rows(self.rows[label]))
        return block if genes is None else take_genes(block, genes)

    # ------------------------------------------------------------------------------------------ training data

    @cached_property
    def _train_moments(self) -> Any:
        train: Any = self.train
        return _moments(train, self._train_strata)

    @cached_property
    def train_effects(self) -> np.ndarray | None:
        """Training perturbations' shifts against the training control, in observed's genes; NaN for absent genes."""
        if self.train is None:
            return None
        base = self.train_control
        if base is None:
            return None
        return self._train_centroids - base

    @cached_property
    def _train_centroids(self) -> np.ndarray:
        moments = self._train_moments
        use = moments.groups != self.control
        return self._align(moments.mean[use])

    def _align(self, values: np.ndarray) -> np.ndarray:
        train: Any = self.train
        position = train.genes.astype(str).get_indexer(pd.Index(self.genes))
        out = np.full((len(values), len(self.genes)), np.nan)
        out[:, position >= 0] = values[:, position[position >= 0]]
        return out

    @cached_property
    def train_labels(self) -> list[str]:
        """Labels of the training perturbations, in the order of :attr:`train_effects`."""
        return [] if self.train is None else [str(g) for g in self._train_moments.groups if g != self.control]

    @cached_property
    def train_control(self) -> np.ndarray | None:
        """Mean training control in observed's genes; zero for effects; ``None`` where there is none."""
        if self.train is None:
            return None
        if self.train.scale == K.SCALE_EFFECTS:
            return np.zeros(len(self.genes))
        where = np.flatnonzero(self._train_moments.groups == self.control)
        return self._align(self._train_moments.mean[where])[0] if len(where) else None

    @cached_property
    def centroid(self) -> np.ndarray | None:
        """Systema's reference: the mean of the training perturbations' centroids, each with equal weight ``(gene,)``."""
        if self.train is None or not self.train_labels:
            return None
        return self._train_centroids.mean(axis=0)


def _check_effects(screen: Screen, name: str) -> None:
    controls = np.flatnonzero(screen.is_control)
    if len(controls):
        largest = np.abs(screen.rows(controls).data).max(initial=0.0)
        if largest > 1e-6:
            raise ScaleError(
                f"The control row of {name} is not zero (largest value {largest:.3g}), but a table of effects is "
                "relative to control. Subtract the control from all rows, or pass the profiles as log1p values "
                "(scale='log1p')."
            )
    doubled = [label for label, rows in group_rows(screen.labels).items() if len(rows) > 1]
    if doubled:
        raise ScaleError(
            f"{name} is a table of effects, yet {listing(doubled, 3)} has several rows. Average them "
            "(scpert.tl.perturbation_effects does), or name the scale of cells ('counts', 'log1p')."
        )


class Prediction:
    """Rows, labels and scale of a predicted AnnData, checked."""

    def __init__(self, adata: AnnData, reference: Reference, level: str = "auto"):
        check_choice("level", level, ("auto", "pseudobulk", "cell"))
        if adata.n_obs == 0 or adata.n_vars == 0:
            raise ScpertError(f"The prediction is empty: {adata.n_obs} rows, {adata.n_vars} genes.")
        check_unique_names_of_genes(adata)
        key = reference.perturbation_key
        if key not in adata.obs.columns and K.PERTURBATION in adata.obs.columns:
            key = K.PERTURBATION  # what predict_perturbation writes
        series = check_obs_key(adata, key, "perturbation_key")
        self.adata = adata
        labels = check_labels(series, None, key=key, genes=adata.var_names)
        if reference.control != K.CONTROL:
            labels = np.where(labels == K.CONTROL, reference.control, labels)
        self.labels = labels
        self.rows = group_rows(labels)
        self._blocks = Blocks()
        most = max(len(rows) for label, rows in self.rows.items() if label != reference.control or len(self.rows) == 1)
        self.level = ("cell" if most > 1 else "pseudobulk") if level == "auto" else level
        effects = reference.scale == K.SCALE_EFFECTS
        self.X = adata.layers[K.DELTA] if effects and K.DELTA in adata.layers else adata.X
        if self.X is None:
            raise ScpertError("The prediction's X is empty: a prediction holds log1p CP10k values in X.")
        if effects:
            _refuse_counts_for_effects(self.X, reference.screen.X)
        else:
            _refuse_wrong_scale(self.X, float(reference.control_mean.mean()))

    def cells(self, label: str, genes: np.ndarray) -> sparse.csr_matrix:
        """Predicted cells of a perturbation, CSR."""
        return take_genes(self._blocks.get(label, lambda: read_rows(self.X, self.rows[label])), genes)


def check_unique_names_of_genes(adata: AnnData) -> None:
    """Predicted cells may share names; genes may not."""
    if not adata.var_names.is_unique:
        check_unique_names(adata)


def _refuse_wrong_scale(X: Any, level: float) -> None:
    if not np.isfinite(_first_finite(X)):
        return
    evidence = scale_evidence(X)
    cure = "Predictions are compared on the log1p CP10k scale: sc.pp.normalize_total(target_sum=1e4), then sc.pp.log1p."
    if evidence.integers == 1.0 and evidence.maximum > 1 and evidence.minimum >= 0:
        raise ScaleError(f"The prediction's X looks like raw counts: {evidence}. {cure}")
    if evidence.maximum > 50:
        raise ScaleError(f"The prediction's X is too large for log1p values: {evidence}. {cure}")
    sample = read_rows(X, np.unique(np.linspace(0, X.shape[0] - 1, min(X.shape[0], 200)).astype(int)))
    values = sample.data[np.isfinite(sample.data)]
    negative = float(np.mean(values < -1e-3)) if len(values) else 0.0
    if negative > 0.2 and values.sum() / max(1, sample.shape[0] * sample.shape[1]) < 0.25 * level:
        raise ScaleError(
            f"{100 * negative:.0f} % of the prediction's non-zero values in X are negative, and their mean is far below "
            f"that of the control cells ({level:.3g}): X looks like shifts against control. Put control + shift in X (log1p "
            "CP10k) and the shift in layers['delta'], or compare effects with effects (scale='effects')."
        )


def _refuse_counts_for_effects(X: Any, observed: Any) -> None:
    if not np.isfinite(_first_finite(X)):
        return
    evidence = scale_evidence(X)
    if (
        evidence.integers == 1.0
        and evidence.maximum > 1
        and evidence.minimum >= 0
        and scale_evidence(observed).integers < 1
    ):
        raise ScaleError(
            f"The prediction's values look like raw counts: {evidence}. Observed is a table of effects: compare it with predicted "
            "effects, in X or in layers['delta']."
        )


def _first_finite(X: Any) -> float:
    for _, block in iter_rows(X):
        for start in range(0, len(block.data), 65536):
            values = block.data[start : start + 65536]
            found = np.flatnonzero(np.isfinite(values) & (values != 0))
            if len(found):
                return float(values[found[0]])
    return np.nan


class Pair:
    """A prediction and the reference, in the same perturbations and genes.

    Arrays have one row per perturbation in :attr:`perturbations` and one column per gene in :attr:`genes`. Perturbations
    whose prediction is not finite are set aside (:attr:`not_finite`).
    """

    def __init__(
        self,
        predicted: AnnData,
        reference: Reference,
        *,
        level: Literal["auto", "pseudobulk", "cell"] | str = "auto",
        random_state: int = 0,
        max_cells: int = 1000,
    ):
        self.reference = ref = reference
        self.prediction = pred = Prediction(predicted, reference, level)
        self.random_state, self.max_cells = random_state, max_cells
        self.level, self.control = pred.level, ref.control
        names = predicted.var_names.astype(str)
        position = names.get_indexer(pd.Index(ref.genes))
        self.gene_index = np.flatnonzero(position >= 0)  # in the reference
        self.pred_gene_index = position[self.gene_index]  # in the prediction
        if len(self.gene_index) == 0:
            raise ScpertError(
                f"The prediction and observed share no gene: {listing(names, 3)} against {listing(ref.genes, 3)}. Bring "
                "both to the same kind of gene names."
            )
        self.genes = ref.genes[self.gene_index]
        predicted_labels = set(pred.rows) - {ref.control}
        shared = [p for p in ref.perturbations if p in predicted_labels]
        if not shared:
            raise LabelError(
                f"No perturbation is both predicted and observed: predicted {listing(sorted(predicted_labels), 4)}, "
                f"observed {listing(ref.perturbations, 4)}."
            )
        self.report = {
            "only_predicted": sorted(predicted_labels - set(ref.perturbations)),
            "only_observed": [p for p in ref.perturbations if p not in predicted_labels],
            "genes_only_predicted": sorted(set(names) - set(ref.genes)),
            "genes_only_observed": [str(g) for g in ref.genes[position < 0]],
        }
        for what, names_of in self.report.items():
            if names_of:
                logger.warning(
                    "evaluate: %d %s: left out (%s)",
                    len(names_of),
                    {
                        "only_predicted": "perturbation(s) are predicted but not observed",
                        "only_observed": "perturbation(s) are observed but not predicted",
                        "genes_only_predicted": "gene(s) are in the prediction only",
                        "genes_only_observed": "gene(s) are in observed only",
                    }[what],
                    listing(names_of, 5),
                )
        self._load(shared)
        self.notes = self._level_notes()
        for note in self.notes:
            logger.warning("evaluate: %s", note)

    def _level_notes(self) -> list[str]:
        """Whether predicted and observed profiles are on one level; a wrong logarithm or another total makes them differ."""
        if self.reference.scale == K.SCALE_EFFECTS or not self.perturbations:
            return []
        predicted, observed = (
            float(np.median(np.expm1(np.clip(x, 0, 50)).sum(axis=1))) for x in (self.predicted, self.observed)
        )
        if observed <= 0 or 1 / 3 <= predicted / observed <= 3:
            return []
        return [
            f"sums of expm1 over the genes are {predicted:.4g} in predicted and {observed:.4g} in observed profiles (medians): is the "
            "prediction the natural log1p of counts per 10,000, as observed is (not log2, not another total)?"
        ]

    def _load(self, shared: list[str]) -> None:
        ref, pred = self.reference, self.prediction
        has_control = ref.control in pred.rows and ref.scale != K.SCALE_EFFECTS
        order = [*shared, ref.control] if has_control else shared
        code = {p: i for i, p in enumerate(order)}
        codes = np.array([code.get(label, -1) for label in pred.labels])
        mean = group_means(pred.X, codes, len(order))[:, self.pred_gene_index]
        finite = np.isfinite(mean[: len(shared)]).all(axis=1)
        self.not_finite = [p for p, ok in zip(shared, finite, strict=True) if not ok]
        if self.not_finite:
            logger.warning("evaluate: the prediction of %s holds NaN or infinite values", listing(self.not_finite, 5))
        self.shared = shared
        self.perturbations = [p for p, ok in zip(shared, finite, strict=True) if ok]
        keep = np.flatnonzero(finite)
        where = {p: i for i, p in enumerate(ref.perturbations)}
        self.ref_index = np.array([where[p] for p in self.perturbations], dtype=int)
        self.observed = ref.mean[np.ix_(self.ref_index, self.gene_index)]
        self.predicted = mean[keep]
        self.observed_control = ref.control_mean[self.gene_index]
        self.delta = self.observed - self.observed_control
        self.predicted_control, self.reference_note = self._predicted_control(mean, codes, keep, len(shared))
        self.predicted_delta = self.predicted - self.predicted_control

    def _predicted_control(
        self, mean: np.ndarray, codes: np.ndarray, keep: np.ndarray, n: int
    ) -> tuple[np.ndarray, str]:
        """What the predicted shift is taken against: never a test control if the prediction brings its own."""
        ref, pred = self.reference, self.prediction
        if ref.scale == K.SCALE_EFFECTS:
            return np.zeros(len(self.genes)), "effects are relative to control already"
        if len(mean) > n:
            if np.isfinite(mean[n]).all():
                return mean[n], "the prediction's own control rows"
            logger.warning("evaluate: the prediction's control rows hold NaN; another control is used")
        if K.DELTA in pred.adata.layers:
            shift = group_means(pred.adata.layers[K.DELTA], codes, max(n, len(mean)))[keep][:, self.pred_gene_index]
            implied = self.predicted - shift
            if len(implied) and np.isfinite(implied).all():
                base = np.median(implied, axis=0)
                inside = self.predicted > 1e-6  # where X is clipped at zero the difference says nothing
                off = (np.abs(implied - base) > 1e-3) & inside
                if off.sum() <= 0.05 * max(1, int(inside.sum())):
                    return self.predicted - shift, "layers['delta'] of the prediction"
                if ref.train_control is None:
                    logger.info("evaluate: layers['delta'] does not belong to X (X - delta differs between rows)")
        if ref.train_control is not None and np.isfinite(ref.train_control[self.gene_index]).all():
            return ref.train_control[self.gene_index], "the control cells of train"
        return self.observed_control, "the control cells of observed"

    # ------------------------------------------------------------------------------------------ for the metrics

    @cached_property
    def targets(self) -> list[np.ndarray]:
        """Positions of each perturbation's own targets among :attr:`genes`."""
        position = {g: i for i, g in enumerate(self.genes)}
        return [
            np.array([position[t] for t in parse(p, self.control) if t in position], dtype=int)
            for p in self.perturbations
        ]

    @cached_property
    def not_target(self) -> np.ndarray:
        """Boolean ``(perturbation, gene)``: False at a perturbation's own targets."""
        out = np.ones(self.observed.shape, dtype=bool)
        for row, own in enumerate(self.targets):
            out[row, own] = False
        return out

    @cached_property
    def centroid(self) -> np.ndarray | None:
        """The perturbed centroid of the training data in :attr:`genes`."""
        centroid = self.reference.centroid
        if centroid is None or not np.isfinite(centroid[self.gene_index]).all():
            return None
        return centroid[self.gene_index]

    @cached_property
    def train_effects(self) -> np.ndarray | None:
        """Training effects ``(training perturbation, gene)`` in :attr:`genes`."""
        effects = self.reference.train_effects
        if effects is None or not len(effects) or not np.isfinite(effects[:, self.gene_index]).all():
            return None
        return effects[:, self.gene_index]

    def top(self, k: int, *, without_targets: bool = False) -> np.ndarray:
        """Boolean ``(perturbation, gene)``: the ``k`` genes with the largest observed shift (test truth: an oracle)."""
        size = np.abs(self.delta)
        if without_targets:
            size = np.where(self.not_target, size, -1.0)
        return top_mask(size, k, self.genes)

    def observed_cells(self, label: str) -> sparse.csr_matrix:
        """Observed cells (perturbation or control) in :attr:`genes`."""
        return self.reference.cells(label, self.gene_index)

    def predicted_cells(self, label: str) -> sparse.csr_matrix:
        """Predicted cells; for the control without predicted controls: the observed ones."""
        if label == self.control and label not in self.prediction.rows:
            return self.observed_cells(label)
        return self.prediction.cells(label, self.pred_gene_index)


def top_mask(size: np.ndarray, k: int, names: Sequence[str] | np.ndarray) -> np.ndarray:
    """True at the ``k`` largest entries of each row; of equal ones at those whose gene's name comes first, in any order of genes."""
    k = min(k, size.shape[1])
    bar = np.partition(size, size.shape[1] - k, axis=1)[:, [size.shape[1] - k]]
    out, tied = size > bar, size == bar
    left = k - out.sum(axis=1, keepdims=True)
    for i in np.flatnonzero(tied.sum(axis=1) > left[:, 0]):
        at = np.flatnonzero(tied[i])
        tied[i] = False
        tied[i, at[np.argsort(np.asarray(names, dtype=str)[at], kind="stable")[: left[i, 0]]]] = True
    return out | tied


def top_share(size: np.ndarray, k: int) -> np.ndarray:
    """1 at the ``k`` largest entries of each row; equal ones at the end share the places that are left."""
    k = min(k, size.shape[1])
    bar = np.partition(size, size.shape[1] - k, axis=1)[:, [size.shape[1] - k]]
    above, tied = size > bar, size == bar
    return above + tied * (k - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
