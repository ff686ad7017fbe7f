"""Is a screen ready? A table of what is there, what is wrong, and what it can be used for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import listing, suggest
from .._docs import shared_docs
from ..data import Screen, check_labels, iter_rows, parse, scale_evidence
from ..data._perturbation import CONTROL_NAMES
from ..data._screen import _named_layers, resolve_layer
from ..errors import ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["audit"]

logger = logging.getLogger("scpert")

_FEW_CONTROLS = 50
_FEW_CELLS = 20
_ALL_SCALES = (K.SCALE_COUNTS, K.SCALE_LOG1P, K.SCALE_EFFECTS)


class _Report:
    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, check: str, value: Any, status: str = "ok", advice: str = "") -> None:
        self.rows.append((check, str(value), status, advice))

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["check", "value", "status", "advice"])


@shared_docs
def audit(
    adata: AnnData,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    library_size_key: str | None = None,
) -> pd.DataFrame:
    """Say whether a screen is ready, what is wrong with it and what it can be used for.

    Bad data are reported, not raised. ``adata`` is not changed.

    Parameters
    ----------
    adata
        Cells by genes (or perturbations by genes, for tables of effects).
    {labels}
    layer
        Layer that holds the values; by default ``"counts"`` if there is one, else ``X``.
    library_size_key
        Column with the full library size, for small panels.

    Returns
    -------
    DataFrame with a row for each check and the columns ``check``, ``value``, ``status`` (``ok``; ``warn``: works, but look;
    ``fail``: to be mended first) and ``advice``. Checked are sizes, names, the scale of X and of every layer,
    NaN, empty cells and genes, labels, control cells, cells per perturbation, the change of measured targets, existing
    and possible splits, possible models, and memory.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> table = scpert.pp.audit(adata)
    >>> "fail" in set(table["status"])
    False
    """
    report = _Report()
    report.add("cells", f"{adata.n_obs:,}", "ok" if adata.n_obs else "fail", "" if adata.n_obs else "There is no cell.")
    report.add(
        "genes", f"{adata.n_vars:,}", "ok" if adata.n_vars else "fail", "" if adata.n_vars else "There is no gene."
    )
    if adata.n_obs == 0 or adata.n_vars == 0:
        return report.table()
    _names(report, adata)
    found = _scales(report, adata)
    used: str | None = None
    try:
        used = resolve_layer(adata, layer)
    except ScpertError as error:
        report.add("values used", layer or "none", "fail", str(error))
        found = {}
    name = "X" if used is None else used
    scale = found.get(name)
    if found:
        what = scale or "neither counts nor log1p values"
        advice = (
            "" if scale else "Name the layer that holds counts or log1p values (layer=), or say which it is (scale=)."
        )
        report.add("values used", f"{name}: {what}", "ok" if scale else "fail", advice)
        _values(report, adata.X if used is None else adata.layers[used], name, scale, adata, library_size_key)

    labels, key_is_good = _labels(report, adata, perturbation_key, control, scale)
    if labels is not None:
        _perturbations(report, labels, control, scale)
        if key_is_good and scale:
            _on_target(report, adata, perturbation_key, control, layer, library_size_key, scale)
            _splits(report, adata, labels, control, scale)
    _models(report, labels if key_is_good else None, control, scale, adata.n_vars)
    _memory(report, adata, adata.X if used is None else adata.layers[used], labels)
    return report.table()


def _names(report: _Report, adata: AnnData) -> None:
    for axis, names in (("obs", adata.obs_names), ("var", adata.var_names)):
        n = int(names.duplicated().sum())
        what = "cell" if axis == "obs" else "gene"
        advice = f"Merge or rename them, or call adata.{axis}_names_make_unique()." if n else ""
        report.add(f"duplicate {what} names", n, "fail" if n else "ok", advice)


def _scales(report: _Report, adata: AnnData) -> dict[str, str | None]:
    """Scale of X and of every layer, by name."""
    out: dict[str, str | None] = {}
    for name in [None, *_named_layers(adata)]:
        X = adata.X if name is None else adata.layers[name]
        where = "X" if name is None else name
        check = f"scale of {where if name is None else f'layer {name!r}'}"
        if X is None:
            report.add(check, "absent")
            continue
        try:
            evidence = scale_evidence(X)
        except (ScpertError, TypeError, ValueError) as error:
            out[where] = None
            report.add(check, "unreadable", "fail" if name is None and not _named_layers(adata) else "warn", str(error))
            continue
        out[where] = evidence.scale
        if evidence.scale == K.SCALE_EFFECTS:
            advice = f"There are negative values: effects, or scaled data, which no cell model can use. {evidence}"
        elif not evidence.finite:
            advice = "There are NaN or infinite values."
        else:
            advice = str(evidence)
        report.add(check, evidence.scale or "cannot tell", "ok" if evidence.scale else "warn", advice)
    return out


def _chunks(X: Any) -> Iterator[tuple[int, Any]]:
    yield from iter_rows(X)


def _values(
    report: _Report, X: Any, name: str, scale: str | None, adata: AnnData, library_size_key: str | None
) -> None:
    """One pass: NaN, negative values, empty cells and genes."""
    bad = negative = empty = stored = 0
    seen = np.zeros(adata.n_vars, dtype=bool)
    sums = np.empty(adata.n_obs)
    for start, block in _chunks(X):
        bad += int((~np.isfinite(block.data)).sum())
        with np.errstate(invalid="ignore"):
            negative += int((block.data < 0).sum())
        block.eliminate_zeros()
        stored += block.nnz
        seen[block.indices] = True
        empty += int((np.diff(block.indptr) == 0).sum())
        sums[start : start + block.shape[0]] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    report.add(
        "NaN or infinite values",
        bad,
        "fail" if bad else "ok",
        f"Find their origin in {name}; scpert does not replace them." if bad else "",
    )
    if negative and scale != K.SCALE_EFFECTS:
        report.add("negative values", negative, "fail", "Counts and log1p values have none. Name the right layer=.")
    if scale != K.SCALE_EFFECTS:
        if library_size_key is None:
            advice = (
                "Drop them with sc.pp.filter_cells(adata, min_counts=1): they have no library size." if empty else ""
            )
            report.add(
                "empty cells", empty, "fail" if empty and scale == K.SCALE_COUNTS else "warn" if empty else "ok", advice
            )
        else:
            size = pd.to_numeric(adata.obs.get(library_size_key, pd.Series(dtype=float)), errors="coerce")
            n = adata.n_obs - int((size > 0).sum())
            report.add(
                f"cells without {library_size_key!r}", n, "fail" if n else "ok", "Each cell needs a size." if n else ""
            )
        gone = int((~seen).sum())
        advice = (
            "They are kept, but nothing can be learned of them: sc.pp.filter_genes(adata, min_cells=1)." if gone else ""
        )
        report.add("genes in no cell", gone, "warn" if gone else "ok", advice)
    report.add("share of zeros", f"{1 - stored / (adata.n_obs * adata.n_vars):.2f}")
    if scale == K.SCALE_COUNTS and not bad:
        small = adata.n_vars < 2000 and library_size_key is None
        others = [c for c in adata.obs.columns if "library" in c.casefold() or "total_counts" in c.casefold()]
        advice = (
            f"A small panel: pass library_size_key={others[0]!r}, if it is the full library size."
            if small and others
            else ""
        )
        report.add("median counts per cell", f"{np.median(sums):,.0f}", "warn" if advice else "ok", advice)


def _labels(
    report: _Report, adata: AnnData, key: str, control: str, scale: str | None
) -> tuple[np.ndarray | None, bool]:
    """Labels as strings (NaN left out of nothing: as ``"nan"``), and whether they are in the standard form."""
    if key not in adata.obs.columns:
        near = suggest(key, adata.obs.columns, n=1)
        hint = f"Is it {near[0]!r}? " if near else ""
        report.add(
            "perturbation labels",
            f"no column {key!r}",
            "fail",
            f"{hint}adata.obs has {listing(adata.obs.columns, 20) or '(no column)'}. Pass perturbation_key=, or call "
            "scpert.pp.annotate_perturbations(adata, key).",
        )
        return None, False
    series = pd.Series(adata.obs[key])
    missing = int(series.isna().sum())
    advice = f"Drop them: adata[adata.obs[{key!r}].notna()].copy()." if missing else ""
    report.add("NaN labels", missing, "fail" if missing else "ok", advice)
    labels = series[series.notna()].astype(str)
    if len(labels) == 0:
        return None, False
    try:
        checked = check_labels(labels, None, key=key, genes=adata.var_names)
        good = not missing
        report.add("form of the labels", f"{len(set(checked))} labels")
    except ScpertError as error:
        report.add("form of the labels", f"{labels.nunique()} labels", "fail", str(error))
        checked, good = labels.to_numpy(dtype=object), False
    n = int((checked == control).sum())
    if n == 0 and scale == K.SCALE_EFFECTS:
        report.add("control cells", 0, "ok", "None are needed: the values are effects.")
    elif n == 0:
        others = [d for d in sorted(set(checked)) if d.casefold() in CONTROL_NAMES] or suggest(
            control, sorted(set(checked))
        )
        hint = f"Are they called {listing(others, 3)}? " if others else ""
        if not others and len(set(checked)) > 0.9 * len(checked):
            hint = "If this is a table of effects, say scale='effects', and control=None to scpert.pp.split. "
        report.add(
            "control cells",
            0,
            "fail",
            f"{hint}Pass control=, or call scpert.pp.annotate_perturbations(adata, {key!r}).",
        )
        good = False
    else:
        few = n < _FEW_CONTROLS
        advice = "Effects are measured against few controls, and a split divides them further." if few else ""
        report.add("control cells", f"{n:,}", "warn" if few else "ok", advice)
    return np.asarray(checked, dtype=object), good


def _perturbations(report: _Report, labels: np.ndarray, control: str, scale: str | None) -> None:
    counts = pd.Series(labels).value_counts().drop(control, errors="ignore")
    singles = sum("+" not in name for name in counts.index)
    report.add(
        "perturbations",
        f"{len(counts):,} ({singles:,} single, {len(counts) - singles:,} combinations)",
        "ok" if len(counts) else "fail",
        "" if len(counts) else "All cells are controls.",
    )
    if len(counts) and scale != K.SCALE_EFFECTS:
        few = [f"{name} ({n})" for name, n in counts.items() if n < _FEW_CELLS]
        one = int((counts < 2).sum())
        advice = f"Fewer than {_FEW_CELLS} cells: {listing(few, 5)}. See scpert.pp.filter_perturbations." if few else ""
        if one:
            advice = f"{one} have a single cell, and no variance. {advice}"
        report.add(
            "cells per perturbation",
            f"minimum {counts.min():,}, median {counts.median():,.0f}, maximum {counts.max():,}",
            "warn" if few else "ok",
            advice,
        )


def _on_target(
    report: _Report, adata: AnnData, key: str, control: str, layer: str | None, library_size_key: str | None, scale: str
) -> None:
    """Change of the perturbed gene itself, of single perturbations whose gene is measured."""
    column = {str(g): i for i, g in enumerate(adata.var_names)}
    try:
        screen = Screen(
            adata,
            perturbation_key=key,
            control=control,
            layer=layer,
            library_size_key=library_size_key,
            allowed=_ALL_SCALES,
            require_control=scale != K.SCALE_EFFECTS,
        )
        singles = [p for p in screen.perturbations if len(parse(p, control)) == 1]
        measured = [p for p in singles if p in column]
        report.add(
            "targets measured",
            f"{len(measured)} of {len(singles)} single targets",
            "ok",
            "" if measured else "No perturbed gene is among the genes: the perturbation itself cannot be checked.",
        )
        if not measured:
            return
        moments = screen.moments()
    except ScpertError as error:
        report.add("on-target change", "not computed", "fail", str(error))
        return
    row = {str(g): i for i, g in enumerate(moments.groups)}
    base_mean = moments.mean[row[control]] if control in row else np.zeros(adata.n_vars)
    shift = np.array([moments.mean[row[p], column[p]] - base_mean[column[p]] for p in measured])
    value = f"median {np.median(shift):+.2f}, {int((shift < 0).sum())} of {len(shift)} down"
    if control in row and scale != K.SCALE_EFFECTS:
        c = row[control]
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt(
                [
                    moments.var[row[p], column[p]] / moments.n[row[p]] + moments.var[c, column[p]] / moments.n[c]
                    for p in measured
                ]
            )
            clear = np.abs(shift) > 2 * spread
        value += f", {int(clear.sum())} beyond 2 standard errors (log1p CP10k)"
        weak = [p for p, ok in zip(measured, clear, strict=True) if not ok]
        advice = f"No clear change of the target in {listing(weak, 5)}." if weak else ""
        mixed = min(int((shift[clear] < 0).sum()), int((shift[clear] > 0).sum())) > 0.2 * max(int(clear.sum()), 1)
        if mixed:
            advice += " Some targets go up and some down: are the labels right?"
        report.add(
            "on-target change", value, "warn" if len(weak) > len(measured) / 2 or mixed else "ok", advice.strip()
        )
    else:
        report.add("on-target change", value)


def _splits(report: _Report, adata: AnnData, labels: np.ndarray, control: str, scale: str) -> None:
    import anndata

    from ._split import _CONTEXT_COLUMNS, KINDS, split

    if K.SPLIT in adata.obs.columns:
        counts = adata.obs[K.SPLIT].astype(str).value_counts()
        value = ", ".join(f"{k} {n:,}" for k, n in counts.items())
        odd = sorted(set(counts.index) - {K.TRAIN, K.VAL, K.TEST})
        none = K.TRAIN not in counts.index
        advice = "No cell is 'train'." if none else f"Cells with {listing(odd)} are not used." if odd else ""
        report.add("split", value, "fail" if none else "warn" if odd else "ok", advice)
    else:
        report.add("split", "none yet", "ok", "Make one: scpert.pp.split(adata, kind=...).")
    columns = [c for c in _CONTEXT_COLUMNS if c in adata.obs.columns and adata.obs[c].notna().all()]
    light = anndata.AnnData(obs=pd.DataFrame({K.PERTURBATION: labels}, index=[str(i) for i in range(len(labels))]))
    for c in columns:
        light.obs[c] = adata.obs[c].astype(str).to_numpy()
    able, not_able = [], []
    for kind in KINDS:
        if kind == "cells" and scale == K.SCALE_EFFECTS:
            continue
        try:
            split(light, kind=kind, control=None if scale == K.SCALE_EFFECTS and control not in labels else control)
            able.append(kind)
        except ScpertError as error:
            not_able.append(f"{kind}: {error}")
    report.add("possible splits", ", ".join(able) or "none", "ok" if able else "fail", " ".join(not_able))


def _models(report: _Report, labels: np.ndarray | None, control: str, scale: str | None, n_genes: int) -> None:
    if labels is None or scale is None:
        report.add("possible models", "none", "fail", "Labels and scale must be right first.")
        return
    targets = [parse(name, control) for name in set(labels) - {control}]
    combos = sum(len(t) > 1 for t in targets)
    models = ["NoChange", "PerturbedMean"]
    if combos:
        models += ["Additive", "MatchingMean"]
    models += ["LinearPCA", "with prior knowledge: KNN, Ridge, KnowledgeGP, BioDSNN, GEARS"]
    advice = []
    if scale == K.SCALE_COUNTS:
        models += ["counts: GPOVAE, CRADLEVAE, SAMSVAE, CPAVAE, ConditionalVAE, CPA"]
    elif scale == K.SCALE_LOG1P:
        advice.append("The count models (GPOVAE and its family) want raw counts in layers['counts'].")
    else:
        advice.append("Effects: the models of cells (GPOVAE and its family) cannot be used.")
    if len(targets) < 10:
        advice.append(f"With {len(targets)} perturbations, little can be learned about unseen ones.")
    report.add("possible models", "; ".join(models), "ok", " ".join(advice))


def _memory(report: _Report, adata: AnnData, X: Any, labels: np.ndarray | None) -> None:
    from scipy import sparse

    if X is None:
        return
    dense = adata.n_obs * adata.n_vars * 4 / 1e6
    if sparse.issparse(X):
        now = (X.data.nbytes + X.indices.nbytes + X.indptr.nbytes) / 1e6
        form = f"{X.format}, {X.dtype}, {now:,.0f} MB in memory"
    elif isinstance(X, np.ndarray):
        now = X.nbytes / 1e6
        form = f"dense, {X.dtype}, {now:,.0f} MB in memory"
    else:
        now, form = 0.0, f"{type(X).__name__}, not in memory"
    n_groups = 1 if labels is None else len(set(labels))
    effects = n_groups * adata.n_vars * 8 * 6 / 1e6
    advice = ""
    if isinstance(X, np.ndarray) and dense > 500 and (X[:1000] == 0).mean() > 0.6:
        advice = "Mostly zeros: scipy.sparse.csr_matrix(adata.X) needs less."
    elif sparse.issparse(X) and X.format != "csr":
        advice = "Convert once: adata.X = adata.X.tocsr(); rows are read."
    report.add(
        "memory",
        f"{form}; {dense:,.0f} MB if dense (never made); perturbation_effects adds about {effects + 100:,.0f} MB",
        "warn" if advice else "ok",
        advice,
    )
