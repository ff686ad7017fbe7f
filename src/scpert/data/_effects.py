"""Mean shifts of perturbations against control: what closed-form models learn from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_obs_key, listing
from ..errors import LabelError, ScpertError
from ._perturbation import parse
from ._screen import Screen

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "Effects",
    "effects_in_strata",
    "need_controls",
    "perturbation_sign",
    "std_errors_of",
    "strata_of",
    "without_own",
]

logger = logging.getLogger("scpert")

#: Memory for sums of each perturbation, stratum and gene; with more of them the matrix is read more than once.
_STRATA_BYTES = 2**27


@dataclass
class Effects:
    """Effects of the perturbations of one data set.

    Attributes
    ----------
    labels
        Canonical labels, ``(perturbation,)``.
    delta
        Shift of the mean log1p CP10k against control, float32 ``(perturbation, gene)``.
    std_error
        Its standard error, float32 of the same shape; NaN where unknown (one cell, no layer).
    n_cells
        Cells behind each row, ``(perturbation,)``; 1 for tables of effects without ``obs["n_cells"]``.
    control_mean
        Mean log1p CP10k of control cells, ``(gene,)``; zero for tables of effects.
    genes
        Names of the genes, ``(gene,)``.
    control
        Label of the control.
    """

    labels: np.ndarray
    delta: np.ndarray
    std_error: np.ndarray
    n_cells: np.ndarray
    control_mean: np.ndarray
    genes: np.ndarray
    control: str = K.CONTROL

    @classmethod
    def from_screen(cls, screen: Screen, mask: np.ndarray | None = None, strata: np.ndarray | None = None) -> Effects:
        """Compute the effects of the cells in ``mask`` (all by default) in one pass.

        With ``strata``, codes ``(cell,)``, each cell is compared with the controls of its own stratum, and strata with fewer
        than two controls are left out.
        """
        if screen.scale == K.SCALE_EFFECTS:
            return cls._from_table(screen, mask)
        if strata is not None:
            return cls._in_strata(screen, mask, strata)
        moments = screen.moments(mask=mask)
        where = np.flatnonzero(moments.groups == screen.control)
        if len(where) == 0:
            raise LabelError(
                f"No cell labelled {screen.control!r} is among the cells to learn from: effects need control cells. "
                "Make a split that leaves controls in 'train' (scpert.pp.split does)."
            )
        c = int(where[0])
        rows = np.flatnonzero(moments.groups != screen.control)
        with np.errstate(invalid="ignore", divide="ignore"):
            se2 = moments.var / moments.n[:, None]
        return cls(
            labels=moments.groups[rows],
            delta=(moments.mean[rows] - moments.mean[c]).astype(np.float32),
            std_error=np.sqrt(se2[rows] + np.nan_to_num(se2[c])).astype(np.float32),
            n_cells=moments.n[rows],
            control_mean=moments.mean[c].astype(np.float32),
            genes=np.asarray(screen.genes, dtype=object),
            control=screen.control,
        )

    @classmethod
    def _in_strata(cls, screen: Screen, mask: np.ndarray | None, strata: np.ndarray) -> Effects:
        use = np.ones(screen.n_cells, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        controls = np.bincount(strata[use & screen.is_control], minlength=int(strata.max()) + 1)
        use = use & (controls > 1)[strata]
        labels = np.unique(screen.labels[use & ~screen.is_control].astype(str)).astype(object)
        delta, error, _, n, control_mean = effects_in_strata(screen, list(labels), strata, mask=use)
        return cls(
            labels=labels,
            delta=delta.astype(np.float32),
            std_error=error.astype(np.float32),
            n_cells=n,
            control_mean=control_mean.astype(np.float32),
            genes=np.asarray(screen.genes, dtype=object),
            control=screen.control,
        )

    @classmethod
    def _from_table(cls, screen: Screen, mask: np.ndarray | None) -> Effects:
        adata = screen.adata
        use = np.ones(screen.n_cells, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        rows = np.flatnonzero(use & ~screen.is_control)
        controls = np.flatnonzero(screen.is_control)
        if len(controls) and np.abs(screen.rows(controls).data).max(initial=0.0) > 1e-6:
            raise ScpertError(
                f"The table of effects has control rows ({listing(adata.obs_names[controls], 3)}) that are not zero, so "
                "its values are not relative to control. Subtract the control from every row, or drop scale='effects'."
            )
        values = screen.rows(rows).toarray().astype(np.float32)
        errors = std_errors_of(adata, rows)
        if errors is None:
            errors = np.full_like(values, np.nan)
        n = np.ones(len(rows))
        if K.N_CELLS in adata.obs.columns:
            n = pd.to_numeric(adata.obs[K.N_CELLS].iloc[rows], errors="coerce").fillna(1).to_numpy(dtype=float)
        names, inverse = np.unique(screen.labels[rows].astype(str), return_inverse=True)
        inverse = inverse.reshape(-1)
        if len(names) < len(rows):  # replicates of a perturbation: their mean
            logger.info("effects: %d rows are replicates and are averaged", len(rows) - len(names))
            count = np.bincount(inverse).astype(np.float32)[:, None]
            mean = np.zeros((len(names), values.shape[1]), dtype=np.float32)
            np.add.at(mean, inverse, values)
            se2 = np.zeros_like(mean)
            np.add.at(se2, inverse, errors**2)
            values, errors, n = mean / count, np.sqrt(se2) / count, np.bincount(inverse, weights=n)
        else:
            order = np.argsort(screen.labels[rows].astype(str))
            values, errors, n = values[order], errors[order], n[order]
        return cls(
            labels=names.astype(object),
            delta=values,
            std_error=errors,
            n_cells=n,
            control_mean=np.zeros(values.shape[1], dtype=np.float32),
            genes=np.asarray(screen.genes, dtype=object),
            control=screen.control,
        )

    @cached_property
    def targets(self) -> list[tuple[str, ...]]:
        """Targets of each row."""
        return [parse(label, self.control) for label in self.labels]

    @cached_property
    def row(self) -> dict[str, int]:
        """Row of each label."""
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def singles(self) -> dict[str, int]:
        """Row of each target that was perturbed alone."""
        return {t[0]: i for i, t in enumerate(self.targets) if len(t) == 1}

    @cached_property
    def sampling_variance(self) -> np.ndarray:
        """Squared standard errors, float32 ``(perturbation, gene)``; where one is unknown (one cell), what a cell has, over the cells.

        What a cell has is the mean over the rows where it is known of the squared error times the cells; of a gene where no row
        knows it, the mean of the other genes. Zero if no error is known at all.
        """
        known = np.isfinite(self.std_error)
        if not known.any():
            return np.zeros(self.std_error.shape, dtype=np.float32)
        square = self.std_error.astype(np.float32) ** 2
        if known.all():
            return square
        n = np.asarray(self.n_cells, dtype=np.float64)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            of_cell = np.where(known, square * n, 0.0).sum(axis=0) / known.sum(axis=0)
        of_cell = np.where(np.isfinite(of_cell), of_cell, np.nanmean(of_cell))
        return np.where(known, square, of_cell / n).astype(np.float32)

    @property
    def mean(self) -> np.ndarray:
        """Mean effect, every perturbation weighing the same, ``(gene,)``."""
        if len(self.labels) == 0:
            return np.zeros(len(self.genes), dtype=np.float32)
        return self.delta.mean(axis=0)

    def without_own(self) -> np.ndarray:
        """Effects with each target's own gene set to that gene's mean over the rows that do not target it, as ``delta``.

        What a knock-out does to its own gene says nothing of what others do: it is not to be spread to related targets.
        """
        return without_own(self.delta, self.targets, self.genes)

    @cached_property
    def own_rule(self) -> tuple[float, float, float] | None:
        """By what a target's own gene is expected to move: ``constant + slope * level`` of the control, and its standard deviation.

        The better of a constant and a share of the level, from the measured genes of single targets. ``None`` where they are fewer
        than three, or move no further under their own perturbation than under the others (two standard errors).
        """
        gene = {g: j for j, g in enumerate(self.genes)}
        row, column = np.array([(i, gene[t]) for t, i in self.singles.items() if t in gene] or np.empty((0, 2)), int).T
        if len(row) < 3:
            return None
        shift = self.delta[row, column].astype(np.float64)
        beyond = shift - self.without_own()[row, column]
        if abs(beyond.mean()) <= 2 * beyond.std(ddof=1) / np.sqrt(len(row)):
            return None
        level = self.control_mean[column].astype(np.float64)
        share = float(shift @ level / max(level @ level, 1e-12))
        rules = [(float(shift.mean()), 0.0), (0.0, share)]
        spread = [float(np.sqrt(((shift - a - b * level) ** 2).sum() / (len(row) - 1))) for a, b in rules]
        best = int(level.any() and spread[1] < spread[0])
        return (*rules[best], spread[best])

    def own_shift(self, row: int, column: int, variance: float) -> tuple[float, float]:
        """Shift of a target's own gene and its standard deviation: as measured, drawn to :attr:`own_rule` by its sampling variance.

        That counts at least what the cells of all perturbations have on average: two cells that agree in zeros are not exact.
        """
        measured = float(self.delta[row, column])
        cells, error2 = np.asarray(self.n_cells, dtype=np.float64), self.std_error[:, column].astype(np.float64) ** 2
        if np.isfinite(error2).any() and (cells > 1).any():
            variance = max(variance, float(np.nanmean(error2 * cells)) / max(float(cells[row]), 1.0))
        if self.own_rule is None or variance == 0:
            return measured, float(np.sqrt(variance))
        constant, slope, spread = self.own_rule
        weight = spread**2 / max(spread**2 + variance, 1e-12)
        expected = constant + slope * float(self.control_mean[column])
        return weight * measured + (1 - weight) * expected, float(np.sqrt(weight * variance))

    def put_own(self, targets: Sequence[tuple[str, ...]], delta: np.ndarray, std: np.ndarray | None = None) -> None:
        """Set, in rows ``(perturbation, gene)``, own genes of targets that were never perturbed alone as :attr:`own_rule` expects."""
        if self.own_rule is None:
            return
        constant, slope, spread = self.own_rule
        gene = {g: j for j, g in enumerate(self.genes)}
        for i, row in enumerate(targets):
            for j in (gene[t] for t in row if t in gene and t not in self.singles):
                delta[i, j] = constant + slope * float(self.control_mean[j])
                if std is not None:
                    std[i, j] = spread

    def subset(self, rows: np.ndarray) -> Effects:
        """The same for some rows."""
        rows = np.asarray(rows)
        return Effects(
            self.labels[rows],
            self.delta[rows],
            self.std_error[rows],
            self.n_cells[rows],
            self.control_mean,
            self.genes,
            self.control,
        )


def std_errors_of(adata: AnnData, rows: np.ndarray) -> np.ndarray | None:
    """Standard errors of rows of a table of effects, float32 ``(row, gene)``; ``None`` where the table has none."""
    if K.STD_ERROR not in adata.layers:
        return None
    layer = adata.layers[K.STD_ERROR][rows]
    errors = np.asarray(layer.toarray() if hasattr(layer, "toarray") else layer, dtype=np.float32)
    bad = (errors < 0) | np.isinf(errors)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ScpertError(
            f"layers[{K.STD_ERROR!r}] has {int(bad.sum())} value(s) that are negative or infinite (first: "
            f"{errors[row, column]:.4g} of {adata.obs_names[rows[row]]!r}, {adata.var_names[column]!r}). Standard errors are "
            "finite and not below 0; use NaN where one is not known."
        )
    return None if np.isnan(errors).all() else errors


#: Standard errors that a regulator must move itself before its own shift tells the direction of its perturbation.
_CLEAR = 3.0


def perturbation_sign(shift: np.ndarray, error: np.ndarray, position: np.ndarray) -> np.ndarray:
    """-1 for a regulator that its perturbation lowers, +1 for one that it raises ``(regulator,)``.

    A regulator that did not clearly move itself (within three standard errors ``error``, as ``shift`` ``(regulator, gene)``, or
    unmeasured, ``position`` -1: its own shift is noise) takes the direction of the majority of those that did, without any of these
    of all that moved; -1 where there is none.
    """
    own, noise = np.full(len(position), np.nan), np.full(len(position), np.nan)
    measured = np.flatnonzero(position >= 0)
    own[measured] = shift[measured, position[measured]]
    noise[measured] = np.broadcast_to(error, shift.shape)[measured, position[measured]]
    moved = np.isfinite(own) & (own != 0)
    clear = moved & (np.abs(own) > _CLEAR * noise)
    usual = 1.0 if np.sign(own[clear if clear.any() else moved]).sum() > 0 else -1.0
    return np.where(clear, np.sign(own), usual)


def without_own(delta: np.ndarray, targets: Sequence[tuple[str, ...]], genes: Sequence[str] | np.ndarray) -> np.ndarray:
    """Rows of effects ``(perturbation, gene)`` with each target's own gene at that gene's mean over the rows that do not target it."""
    gene = {g: j for j, g in enumerate(genes)}
    own = [(i, gene[t]) for i, row in enumerate(targets) for t in row if t in gene]
    if not own:
        return delta
    i, j = np.array(own).T
    out = delta.copy()
    out[i, j] = 0.0
    others = len(out) - np.bincount(j, minlength=out.shape[1])
    out[i, j] = (out.sum(axis=0, dtype=np.float64) / np.maximum(others, 1))[j]
    return out


def strata_of(adata: AnnData, covariate_keys: str | Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Integer stratum of each cell ``(cell,)`` and the names of the strata; one stratum without covariates."""
    keys = [covariate_keys] if isinstance(covariate_keys, str) else list(covariate_keys or [])
    if not keys:
        return np.zeros(adata.n_obs, dtype=np.int64), ["all"]
    columns = [check_obs_key(adata, key, "covariate_keys") for key in keys]
    for key, column in zip(keys, columns, strict=True):
        if column.isna().any():
            raise ScpertError(
                f"The covariate adata.obs[{key!r}] is NaN in {int(column.isna().sum())} cells. "
                "Give every cell a value or drop these cells."
            )
    joined = pd.Series(list(zip(*(c.astype(str) for c in columns), strict=True)))
    codes, names = pd.factorize(joined, sort=True)
    return codes.astype(np.int64), [" / ".join(n) for n in names]


def need_controls(
    screen: Screen, strata: np.ndarray, name: Callable[[int], str], mask: np.ndarray | None = None
) -> None:
    """Refuse strata with perturbed cells and fewer than two control cells, among the cells of ``mask``.

    ``strata`` holds a code for each cell; ``name`` gives the words for the stratum of a cell, by its row.
    """
    use = np.ones(len(strata), dtype=bool) if mask is None else mask
    controls = np.bincount(strata[use & screen.is_control], minlength=int(strata.max(initial=0)) + 1)
    lost = np.flatnonzero(use & ~screen.is_control & (controls < 2)[strata])
    if len(lost):
        first = lost[np.unique(strata[lost], return_index=True)[1]]
        raise ScpertError(
            f"{len(first)} stratum/strata of covariate_keys have perturbed {'' if mask is None else 'training '}cells but fewer "
            f"than two control cells: {listing(map(name, first), 5)}. Drop these cells, merge strata, or leave the covariate out."
        )


def effects_in_strata(
    screen: Screen,
    perturbations: Sequence[str],
    strata: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    cautious: bool = False,
    progress: Callable[[Any], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""Effects of perturbations, each cell beside the control cells of its own stratum.

    .. math:: d_p = \sum_s w_{ps} (m_{ps} - m_{cs}), \qquad
        s_p^2 = \frac{v_p}{n_p} + \sum_s w_{ps}^2 \frac{v_{cs}}{n_{cs}}, \qquad w_{ps} = n_{ps} / n_p

    with the variance :math:`v_p` of the perturbed cells pooled within strata. NaN where the variance of either is unknown.

    Parameters
    ----------
    screen
        Cells.
    perturbations
        Labels ``(perturbation,)``.
    strata
        Stratum of each cell, codes ``(cell,)``; 0 everywhere compares all with all. A stratum with perturbed cells needs
        controls.
    mask
        Cells that count, boolean ``(cell,)``.
    cautious
        Few cells that happen to agree are no evidence: the variance of the perturbed cells counts at least as much as that of
        their controls, and that of the controls at least as much as that of the perturbed cells. The results are float32.
    progress
        Wraps the iterator over chunks (a progress bar).

    Returns
    -------
    Shift, standard error, Welch's degrees of freedom ``(perturbation, gene)``, cells ``(perturbation,)``, and the mean of the
    controls ``(gene,)``.
    """
    n_strata = int(strata.max(initial=0)) + 1
    block = max(1, _STRATA_BYTES // (24 * n_strata * len(screen.genes)))
    if (
        n_strata > 1 and len(perturbations) > block
    ):  # a pass for each block of perturbations, in place of all sums at once
        parts = [
            effects_in_strata(
                screen, perturbations[i : i + block], strata, mask=mask, cautious=cautious, progress=progress
            )
            for i in range(0, len(perturbations), block)
        ]
        shift, error, freedom, n = (np.concatenate([part[j] for part in parts]) for j in range(4))
        return shift, error, freedom, n, parts[0][4]
    labels = [screen.control, *perturbations]
    code = pd.Index(labels).get_indexer(pd.Index(screen.labels))
    use = code >= 0 if mask is None else mask & (code >= 0)
    size = np.zeros((len(labels), n_strata), dtype=np.int64)
    np.add.at(size, (code[use], strata[use]), 1)
    moments = screen.moments(code * n_strata + strata, mask=use, progress=progress)
    group = {int(g): i for i, g in enumerate(moments.groups)}

    def rows(label: int) -> tuple[np.ndarray, list[int]]:
        present = np.flatnonzero(size[label])
        return present, [group[label * n_strata + int(s)] for s in present]

    n_genes = len(screen.genes)
    shift = np.empty((len(perturbations), n_genes), dtype=np.float32 if cautious else np.float64)
    error, freedom = np.empty_like(shift), np.empty_like(shift)
    control_row = np.full(n_strata, -1)
    present, index = rows(0)
    control_row[present] = index
    share = size[0] / max(size[0].sum(), 1)
    control_mean = share[present] @ moments.mean[index]
    with np.errstate(divide="ignore", invalid="ignore"):
        control_var = np.full((n_strata, n_genes), np.nan)
        seen = np.flatnonzero(control_row >= 0)
        control_var[seen] = moments.var[control_row[seen]] / moments.n[control_row[seen], None]
        for p in range(1, len(labels)):
            present, index = rows(p)
            own, n = moments.n[index], size[p].sum()
            weight = own / n
            c = control_row[present]
            shift[p - 1] = weight @ (moments.mean[index] - moments.mean[c])
            dof = int((own - 1).sum())
            many = own > 1
            freedom_own = max(dof, 1)
            if dof > 0:
                pooled = ((own[many] - 1)[:, None] * moments.var[np.asarray(index)[many]]).sum(axis=0) / dof / n
            else:
                pooled = np.full(n_genes, np.nan)
            beside = control_var[present]
            if cautious:
                beside = np.fmax(beside, pooled * n / moments.n[c][:, None])
                pooled = np.fmax(pooled, weight @ moments.var[c] / n)
                # the controls lend their variance to a lone cell, but its mean is no more normal for that
                freedom_own = dof if dof > 0 else max(int(n) - 1, 1)
            parts = weight[:, None] ** 2 * beside
            variance = pooled + parts.sum(axis=0)
            error[p - 1] = np.sqrt(variance)
            spread = (parts**2 / (moments.n[c] - 1)[:, None]).sum(axis=0) + pooled**2 / freedom_own
            freedom[p - 1] = variance**2 / spread
    return shift, error, freedom, size[1:].sum(axis=1), control_mean
