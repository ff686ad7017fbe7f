"""``evaluate``: one prediction against real cells, perturbation by metric."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_seed
from .._progress import progress
from ..errors import ScpertError
from ._pair import Pair, Reference
from ._registry import METRICS, Metric, Undefined, resolve

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["evaluate"]

logger = logging.getLogger("scpert")


def evaluate(
    predicted: AnnData,
    observed: AnnData | Reference,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    train: AnnData | None = None,
    metrics: str | Sequence[str] | None = None,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
    covariate_keys: str | Sequence[str] | None = None,
    level: str = "auto",
    max_cells: int = 1000,
    random_state: int = 0,
) -> pd.DataFrame:
    """Compare a prediction with real cells.

    Perturbations and genes are matched by name; what only one side has is left out and reported. The observed shift is
    taken against the control cells of ``observed``; the predicted one against what the prediction was made from: its own
    control rows, else ``layers["delta"]``, else the control of ``train``, else that of ``observed``. So the noise of the
    test controls is not on both sides where it need not be.

    Parameters
    ----------
    predicted
        A prediction of either level: rows are perturbations, or cells. ``X`` log1p CP10k.
    observed
        Real cells with controls, or a table of effects (``scale="effects"``), or a prepared :class:`Reference` (then the
        arguments that describe the data are taken from it).
    perturbation_key, control
        Column of the labels, label of the control.
    train
        Training cells (or effects). Needed by metrics that refer to the perturbed centroid or choose genes; without it
        they are NaN.
    metrics
        Names from :data:`METRICS`; by default all that the level of the prediction allows.
    layer, scale, library_size_key
        Where the values of ``observed`` and ``train`` are, and what they are; the full library size for small panels.
    covariate_keys
        Columns of ``observed`` and ``train`` (batch, donor ...) within which perturbed cells are compared with control cells, as in
        :class:`Reference`.
    level
        ``"pseudobulk"``, ``"cell"`` or ``"auto"``: cells where a label has several rows.
    max_cells
        Cells drawn per group for metrics whose cost grows with the square of the cells (energy distance, MMD,
        Wasserstein). The E-distance of cell-eval and the tests use all cells.
    random_state
        Seed of these draws.

    Returns
    -------
    DataFrame ``(perturbation, metric)``, index ``"perturbation"``. ``attrs``: ``reasons`` (metric -> perturbation or
    ``"all"`` -> why NaN), ``only_predicted``, ``only_observed``, ``genes_only_predicted``, ``genes_only_observed``,
    ``n_genes``, ``level``, ``predicted_control`` (what the predicted shift is against), ``notes`` (what is odd, such as
    profiles on another level than the observed ones).

    Raises
    ------
    ScaleError
        Counts, or shifts, where log1p values are due.
    LabelError, ScpertError
        No shared perturbation or gene, no control, unknown metric.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, 0, random_state=0)
    >>> truth = scpert.metrics.pseudobulk(adata)
    >>> table = scpert.metrics.evaluate(truth, adata, metrics=["pearson_delta", "mse"])
    >>> bool((table["mse"] < 1e-9).all())
    True
    """
    random_state = check_seed(random_state)
    if not hasattr(predicted, "obs_names"):
        raise ScpertError(
            f"predicted must be an AnnData, as a model's predict_perturbation returns it; got {type(predicted).__name__}."
        )
    if isinstance(observed, Reference):
        reference = observed
    else:
        reference = Reference(
            observed,
            train,
            perturbation_key=perturbation_key,
            control=control,
            layer=layer,
            scale=scale,
            library_size_key=library_size_key,
            covariate_keys=covariate_keys,
        )
    pair = Pair(predicted, reference, level=level, random_state=random_state, max_cells=max_cells)
    return compute(pair, metrics)


def default_metrics(pair: Pair) -> list[str]:
    """All metrics that the pair's level allows."""
    cells = pair.level == "cell" and pair.reference.scale != K.SCALE_EFFECTS
    return [name for name, m in METRICS.items() if m.default and (cells or "cells" not in m.needs)]


def compute(pair: Pair, metrics: str | Sequence[str] | None = None) -> pd.DataFrame:
    """The table of a pair."""
    chosen = resolve(metrics, default_metrics(pair))
    n = len(pair.perturbations)
    columns: dict[str, np.ndarray] = {}
    reasons: dict[str, dict[str, str]] = {}
    bar = progress(chosen, total=len(chosen), description="Metrics", unit="metric") if len(chosen) > 8 else chosen
    for m in bar:
        for name, values, why in _compute_one(m, pair):
            columns[name] = values
            if why:
                reasons[name] = why
    table = pd.DataFrame(columns, index=pd.Index(pair.perturbations, name="perturbation", dtype=object), dtype=float)
    table = table.reindex(pd.Index(pair.shared, name="perturbation", dtype=object))
    for label in pair.not_finite:
        for name in table.columns:
            reasons.setdefault(name, {})[label] = "the prediction holds NaN or infinite values"
    table.index = table.index.astype(str)
    table.index.name = "perturbation"
    attrs: dict = {
        "reasons": reasons,
        **pair.report,
        "n_genes": len(pair.genes),
        "n_perturbations": n,
        "level": pair.level,
        "scale": pair.reference.scale,
        "predicted_control": pair.reference_note,
        "notes": pair.notes,
        "has_train": pair.reference.train is not None,
    }
    table.attrs = attrs
    return table


def _compute_one(m: Metric, pair: Pair) -> list[tuple[str, np.ndarray, dict[str, str]]]:
    names = m.columns or (m.name,)
    n = len(pair.perturbations)
    nothing = np.full(n, np.nan)
    if n == 0:
        return [(name, nothing, {}) for name in names]
    reason = _unavailable(m, pair)
    if reason:
        return [(name, nothing, {"all": reason}) for name in names]
    function: Any = m.function  # `_unavailable` has answered for metrics without one
    try:
        result = function(pair)
    except Undefined as undefined:
        if undefined.values is None:
            return [(name, nothing, {"all": undefined.reason}) for name in names]
        result = undefined.values
        why = {
            p: str(r)
            for p, r, value in zip(pair.perturbations, undefined.reasons, result, strict=True)  # type: ignore[arg-type]
            if np.isnan(value)
        }
        return [(names[0], np.asarray(result, dtype=float), why)]
    if not isinstance(result, tuple):
        result = (result,)
    if len(result) != len(names):
        raise ScpertError(f"The metric {m.name!r} returned {len(result)} columns, not {len(names)}.")
    return [
        (name, np.broadcast_to(np.asarray(r, dtype=float), (n,)).copy(), {})
        for name, r in zip(names, result, strict=True)
    ]


def _unavailable(m: Metric, pair: Pair) -> str:
    if "cells" in m.needs:
        if pair.reference.scale == K.SCALE_EFFECTS:
            return "needs observed cells, but observed is a table of effects"
        if pair.level != "cell":
            return "needs predicted cells: predict with level='cell'"
    if "train" in m.needs and pair.reference.train is None:
        return "needs the training data: pass train="
    return ""
