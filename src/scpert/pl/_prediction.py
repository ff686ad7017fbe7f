"""Figures of training, of predictions against cells, and of effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_positive, listing
from .._docs import shared_docs
from ..data._effects import Effects
from ..data._perturbation import canonical, parse
from ..data._screen import Screen
from ..errors import LabelError, MissingKeyError, ScpertError
from ._figure import COLOURS, finish, name_points, new_axes

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["effects", "predicted_vs_observed", "top_genes", "training"]


@shared_docs
def training(
    model: Any,
    *,
    metric: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Training curve: loss over epochs, on training and validation cells, with the epoch whose state was kept.

    Parameters
    ----------
    model
        A trained model.
    metric
        Stem of a metric in ``model.history`` (``"elbo"``, ``"reconstruction_loss"`` ...); by default the loss that
        decides about early stopping.
    {axes}

    Returns
    -------
    Axes, or the figure.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.pp.split(adata, kind="cells")
    >>> scpert.model.GPOVAE.setup_anndata(adata, split_key="split")
    >>> model = scpert.model.GPOVAE(adata, n_latent=4, n_hidden=8)
    >>> model.train(max_epochs=2)
    >>> scpert.pl.training(model).get_xlabel()
    'epoch'
    """
    history = model.history
    if not history:
        raise ScpertError(f"{type(model).__name__} has no training history: it is fitted in closed form.")
    stem = metric or getattr(model, "_monitor", "elbo_validation").removesuffix("_validation")
    found = {part: history[f"{stem}_{part}"] for part in ("train", "validation") if f"{stem}_{part}" in history}
    if not found and stem in history:
        found = {"train": history[stem]}
    if not found:
        raise MissingKeyError(f"history has no metric {stem!r}; it has {listing(history, 30)}.")
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax, (4.5, 3.2))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for part, colour in (("train", COLOURS["blue"]), ("validation", COLOURS["orange"])):
        if part in found:
            values = found[part].iloc[:, 0].to_numpy(dtype=float)
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, label=part)
    best = getattr(model, "best_epoch_", -1)
    if best >= 0:
        ax.axvline(best + 1, color=COLOURS["grey"], ls=":", lw=1, label="state kept")
    ax.set_xlabel("epoch")
    ax.set_ylabel({"elbo": "negative ELBO per cell"}.get(stem, stem.replace("_", " ")))
    ax.legend(frameon=False)
    return finish(ax, show, return_fig)


def _pair(
    predicted: AnnData, observed: AnnData, perturbation: str, perturbation_key: str, control: str, **values: Any
) -> tuple[Screen, str, np.ndarray]:
    """The observed screen, the perturbation's label in its usual form, and the rows that predict it."""
    screen = Screen(observed, perturbation_key=perturbation_key, control=control, allowed=K.SCALES, **values)
    label = canonical(perturbation, control)
    if label not in screen.perturbations:
        raise LabelError(
            f"{perturbation!r} is not among the observed perturbations: {listing(screen.perturbations, 8)}."
        )
    labels = np.array([canonical(x, control) for x in predicted.obs[K.PERTURBATION].astype(str)])
    rows = np.flatnonzero(labels == label)
    if len(rows) == 0:
        raise LabelError(f"{label!r} is not among the predicted perturbations: {listing(sorted(set(labels)), 8)}.")
    return screen, label, rows


def _observed(screen: Screen, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Shift of the label, its standard error (0: unknown), the mean of the controls ``(gene,)``, and how much was observed."""
    if screen.scale == K.SCALE_EFFECTS:
        found = Effects.from_screen(screen)
        row, n = found.row[label], int((screen.labels == label).sum())
        return found.delta[row], np.nan_to_num(found.std_error[row]), found.control_mean, f"{n} row{'s' * (n > 1)}"
    m = screen.moments(np.where(screen.labels == label, "p", "c"), mask=(screen.labels == label) | screen.is_control)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(np.nan_to_num(m.var[1] / m.n[1]) + np.nan_to_num(m.var[0] / m.n[0]))
    return m.mean[1] - m.mean[0], error, m.mean[0], f"{m.n[1]} cells"


def _dense(values: Any) -> np.ndarray:
    return values.toarray() if hasattr(values, "toarray") else np.asarray(values)


@shared_docs
def predicted_vs_observed(
    predicted: AnnData,
    observed: AnnData,
    perturbation: str,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = "auto",
    library_size_key: str | None = None,
    n_labels: int = 8,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Predicted against observed shift of every gene, for one perturbation.

    Parameters
    ----------
    predicted
        Prediction of a model (either level).
    observed
        Real cells with controls; best cells that the model did not see.
    perturbation
        Label.
    {labels}
    {values}
    n_labels
        Of so many genes with the largest observed shift those are named whose names do not overlap; targets are drawn as
        rings.
    {axes}

    Returns
    -------
    Axes, or the figure. Bars are standard errors of the observed shift.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.PerturbedMean.setup_anndata(adata)
    >>> model = scpert.model.PerturbedMean(adata)
    >>> model.train()
    >>> prediction = model.predict_perturbation()
    >>> ax = scpert.pl.predicted_vs_observed(prediction, adata, model.labels_[0])
    """
    values: dict[str, Any] = {"layer": layer, "scale": scale, "library_size_key": library_size_key}
    screen, label, rows = _pair(predicted, observed, perturbation, perturbation_key, control, **values)
    shift, error, control_mean, much = _observed(screen, label)
    if K.DELTA in predicted.layers:
        guess = _dense(predicted.layers[K.DELTA][rows]).mean(axis=0)
    else:
        X = predicted.X[rows]
        guess = np.asarray(X.mean(axis=0)).ravel()
        own = predicted.obs[K.PERTURBATION].astype(str) == control
        base = np.asarray(predicted.X[own.to_numpy()].mean(axis=0)).ravel() if own.any() else None
        if base is None:
            position = predicted.var_names.get_indexer(screen.genes)
            base = np.zeros(predicted.n_vars)
            base[position[position >= 0]] = control_mean[position >= 0]
        guess = guess - base
    position = predicted.var_names.get_indexer(screen.genes)
    shared = np.flatnonzero(position >= 0)
    x, y = shift[shared], guess[position[shared]]
    r = np.corrcoef(x, y)[0, 1] if np.std(x) > 0 and np.std(y) > 0 else np.nan
    ax = new_axes(ax, (4, 4))
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.axvline(0, color="0.85", lw=0.8, zorder=0)
    span = max(np.abs(x).max(initial=0.1), np.abs(y).max(initial=0.1)) * 1.08
    ax.plot([-span, span], [-span, span], color=COLOURS["grey"], lw=0.8, ls="--", zorder=0)
    ax.errorbar(x, y, xerr=error[shared], fmt="none", ecolor="0.8", lw=0.6, zorder=1)
    ax.scatter(x, y, s=9, color=COLOURS["blue"], alpha=0.8, linewidths=0, zorder=2)
    genes = np.asarray(screen.genes, dtype=object)[shared]
    own_genes = set(parse(label, control))
    for i in np.flatnonzero([g in own_genes for g in genes]):
        ax.scatter(x[i], y[i], s=45, facecolors="none", edgecolors=COLOURS["red"], zorder=3)
    ax.set_xlim(-span, span)
    ax.set_ylim(-span, span)
    ax.set_xlabel("observed effect" if screen.scale == K.SCALE_EFFECTS else "observed shift (log1p CP10k)")
    ax.set_ylabel("predicted shift")
    status = f", {predicted.obs[K.STATUS].iloc[rows[0]]}" if K.STATUS in predicted.obs else ""
    ax.set_title(f"{label}: r = {r:.2f}, {much}{status}", fontsize="medium")
    name_points(ax, x, y, genes, np.argsort(-np.abs(x), kind="stable")[:n_labels])
    return finish(ax, show, return_fig)


@shared_docs
def top_genes(
    predicted: AnnData,
    observed: AnnData,
    perturbation: str,
    *,
    n_genes: int = 20,
    genes: Sequence[str] | None = None,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = "auto",
    library_size_key: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Box plots of the genes that a perturbation shifts most: observed cells, and the prediction.

    Values are relative to the mean of the control cells (the line at zero). A prediction of cells is drawn as boxes
    beside the observed ones, a pseudobulk as a diamond with its limits (``layers["lower"]``, ``["upper"]``) where it has them.
    Of a table of effects the observed mean stands alone, with 90 % limits where it has standard errors.

    Parameters
    ----------
    predicted, observed, perturbation
        As in :func:`predicted_vs_observed`.
    n_genes
        Genes with the largest absolute observed shift.
    genes
        Show these instead.
    {labels}
    {values}
    {axes}

    Returns
    -------
    Axes, or the figure.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.PerturbedMean.setup_anndata(adata)
    >>> model = scpert.model.PerturbedMean(adata)
    >>> model.train()
    >>> ax = scpert.pl.top_genes(model.predict_perturbation(), adata, model.labels_[0], n_genes=5)
    """
    check_positive("n_genes", n_genes)
    values: dict[str, Any] = {"layer": layer, "scale": scale, "library_size_key": library_size_key}
    screen, label, rows = _pair(predicted, observed, perturbation, perturbation_key, control, **values)
    cells = screen.rows(screen.labels == label).toarray()
    shift, error, base, much = _observed(screen, label)
    shared = screen.genes.intersection(predicted.var_names)
    title = f"{label}: chosen genes"
    if genes is None:
        order = np.argsort(-np.abs(shift), kind="stable")
        genes = [screen.genes[i] for i in order if screen.genes[i] in shared][: int(n_genes)]
        title = f"{label}: {len(genes)} genes with the largest shift"
    unknown = [g for g in genes if g not in shared]
    if unknown:
        raise MissingKeyError(f"Not measured or not predicted: {listing(unknown)}.")
    mine = screen.genes.get_indexer(pd.Index(genes))
    theirs = predicted.var_names.get_indexer(pd.Index(genes))
    ax = new_axes(ax, (max(5, 0.42 * len(genes)), 3.4))
    place = np.arange(len(genes))
    style: dict[str, Any] = {"patch_artist": True, "showfliers": False, "manage_ticks": False}

    def boxes(values: np.ndarray, where: np.ndarray, colour: str) -> None:
        drawn = ax.boxplot(values, positions=where, widths=0.32, medianprops={"color": "black"}, **style)
        for box in drawn["boxes"]:
            box.set(facecolor=colour, alpha=0.6, linewidth=0.7)

    ax.axhline(0, color=COLOURS["black"], lw=0.8)
    many = len(rows) > 1
    handles = []
    if screen.scale == K.SCALE_EFFECTS:
        bars: dict[str, Any] = {"fmt": "none", "ecolor": COLOURS["black"], "lw": 1.2, "capsize": 2, "zorder": 3}
        ax.errorbar(place, shift[mine], yerr=1.645 * error[mine], **bars)
    else:
        boxes(cells[:, mine] - base[mine], place - (0.19 if many else 0), COLOURS["blue"])
        handles.append(_patch(COLOURS["blue"], f"observed ({much})"))
    if many:
        boxes(_dense(predicted.X[rows][:, theirs]) - base[mine], place + 0.19, COLOURS["orange"])
        handles.append(_patch(COLOURS["orange"], f"predicted ({len(rows)} cells)"))
    else:
        if K.DELTA in predicted.layers:
            value = _dense(predicted.layers[K.DELTA][rows]).ravel()[theirs]
        else:
            value = _dense(predicted.X[rows]).ravel()[theirs] - base[mine]
        if K.LOWER in predicted.layers and K.UPPER in predicted.layers:  # of X: relative to the model's own control
            at = _dense(predicted.X[rows]).ravel()[theirs]
            below, above = (_dense(predicted.layers[name][rows]).ravel()[theirs] for name in (K.LOWER, K.UPPER))
            reach = np.clip(np.stack([at - below, above - at]), 0.0, None)
            ax.errorbar(place, value, yerr=reach, fmt="none", ecolor=COLOURS["red"], lw=1.2, capsize=2, zorder=3.5)
        ax.plot(place, value, "D", ms=5, color=COLOURS["red"], mec="white", mew=0.6, zorder=4)
        handles.append(_marker(COLOURS["red"], "predicted mean"))
    ax.plot(place - (0.19 if many else 0), shift[mine], "_", ms=12, mew=2, color=COLOURS["black"], zorder=3)
    what = f"observed ({much})" if screen.scale == K.SCALE_EFFECTS else "observed mean"
    handles.append(_marker(COLOURS["black"], what, "_"))
    ax.set_xticks(place, genes, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_ylabel("effect" if screen.scale == K.SCALE_EFFECTS else "log1p CP10k minus control mean")
    ax.set_title(title, fontsize="medium")
    ax.legend(handles=handles, frameon=False, fontsize="small", loc="best")
    return finish(ax, show, return_fig)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.6, label=label)


def _marker(colour: str, label: str, marker: str = "D") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, ls="", label=label)


@shared_docs
def effects(
    effects: AnnData,
    *,
    n_genes: int = 40,
    n_perturbations: int = 40,
    cluster: bool = True,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Heat map of effects: perturbations by the genes that vary most, signed, ordered by similarity.

    Parameters
    ----------
    effects
        From :func:`scpert.tl.perturbation_effects`, a prediction, or a table of effects.
    n_genes, n_perturbations
        Show the genes (perturbations) with the largest sum of squared shifts.
    cluster
        Order rows and columns by average-linkage clustering.
    {axes}

    Returns
    -------
    Axes, or the figure.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> ax = scpert.pl.effects(scpert.tl.perturbation_effects(adata))
    """
    check_positive("n_genes", n_genes)
    check_positive("n_perturbations", n_perturbations)
    values = effects.layers[K.DELTA] if K.DELTA in effects.layers else effects.X
    values = np.nan_to_num(_dense(values))
    names = effects.obs[K.PERTURBATION].astype(str).to_numpy() if K.PERTURBATION in effects.obs else effects.obs_names
    keep = np.flatnonzero(np.asarray(names) != K.CONTROL)
    rows = keep[np.argsort(-(values[keep] ** 2).sum(1), kind="stable")[: int(n_perturbations)]]
    columns = np.argsort(-(values[rows] ** 2).sum(0), kind="stable")[: int(n_genes)]
    block = values[np.ix_(rows, columns)]
    if cluster and min(block.shape) > 2:
        from scipy.cluster.hierarchy import leaves_list, linkage

        order = leaves_list(linkage(block, "average"))
        rows, block = rows[order], block[order]
        order = leaves_list(linkage(block.T, "average"))
        columns, block = columns[order], block[:, order]
    ax = new_axes(ax, (2.2 + 0.17 * len(columns), 1.4 + 0.17 * len(rows)))
    limit = float(np.quantile(np.abs(block), 0.99)) or 1.0
    image = ax.imshow(block, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    ax.set_yticks(np.arange(len(rows)), np.asarray(names, dtype=object)[rows], fontsize=7)
    ax.set_xticks(np.arange(len(columns)), effects.var_names[columns], rotation=90, fontsize=7)
    ax.get_figure().colorbar(image, ax=ax, shrink=0.6, label="shift (log1p CP10k)")
    return finish(ax, show, return_fig)
