"""Labels of perturbations: ``"A+B"`` <-> ``("A", "B")``, vocabulary, integer codes. Pure numpy."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import listing, suggest
from ..errors import LabelError, UnknownTargetError

__all__ = [
    "CONTROL_NAMES",
    "canonical",
    "check_labels",
    "encode",
    "join",
    "multi_hot",
    "parse",
    "targets_of",
]

SEPARATOR = "+"
_OTHER_DELIMITERS = re.compile(r"[;|,/&\s]|__|_")

#: Names that screens give to their unperturbed or non-targeting cells, in lower case.
CONTROL_NAMES = frozenset(
    "control ctrl controls ctl nt ntc non-targeting non_targeting nontargeting non-target non_target negctrl neg_ctrl "
    "neg-ctrl negative_control negative-control negative safe-targeting safe_targeting safe scramble scrambled "
    "unperturbed untreated wt wild-type wildtype wild_type vehicle mock none aavs1 unassigned_control".split()
)


def parse(label: str, control: str = K.CONTROL) -> tuple[str, ...]:
    """Targets of a label, sorted; the control has none.

    Examples
    --------
    >>> parse("KLF1+CBL"), parse("control")
    (('CBL', 'KLF1'), ())
    """
    label = str(label).strip()
    if label == control:
        return ()
    parts = [part.strip() for part in label.split(SEPARATOR)]
    if not all(parts):
        raise LabelError(f"The label {label!r} has an empty target. Write combinations as 'GENE_A+GENE_B'.")
    if control in parts:
        raise LabelError(
            f"The label {label!r} combines a gene with the control {control!r}. Bring the labels to the standard form "
            "('GENE', 'GENE_A+GENE_B', 'control') with scpert.pp.annotate_perturbations(adata, key)."
        )
    if len(set(parts)) < len(parts):
        raise LabelError(f"The label {label!r} names a target twice. Write each target once.")
    return tuple(sorted(parts))


def join(targets: Iterable[str], control: str = K.CONTROL) -> str:
    """Label of a set of targets: the inverse of :func:`parse`."""
    targets = sorted(targets)
    return SEPARATOR.join(targets) if targets else control


def canonical(label: str, control: str = K.CONTROL) -> str:
    """The label with its targets in alphabetical order: ``B+A`` and ``A+B`` are one perturbation."""
    return join(parse(label, control), control)


def targets_of(labels: Iterable[str], control: str = K.CONTROL) -> list[str]:
    """All targets that occur in the labels, sorted."""
    return sorted({t for label in set(labels) for t in parse(label, control)})


def encode(
    labels: Sequence[str] | np.ndarray, vocabulary: Sequence[str], control: str = K.CONTROL, width: int | None = None
) -> np.ndarray:
    """Integer codes of the labels' targets, padded with -1.

    Parameters
    ----------
    labels
        Labels, ``(cell,)``.
    vocabulary
        Known targets, ``(n_targets,)``.
    control
        Label of the control: all codes -1.
    width
        Number of columns; by default the most targets of any label (at least 1).

    Returns
    -------
    int64 array ``(cell, width)``.

    Raises
    ------
    UnknownTargetError
        If a target is not in the vocabulary.
    """
    position = {t: i for i, t in enumerate(vocabulary)}
    distinct, inverse = np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)
    parsed = [parse(label, control) for label in distinct]
    unknown = sorted({t for targets in parsed for t in targets if t not in position})
    if unknown:
        suggestions = {t: suggest(t, position) for t in unknown}
        hints = "; ".join(f"{t!r}: did you mean {listing(s)}?" for t, s in suggestions.items() if s)
        raise UnknownTargetError(
            f"Unknown target(s) {listing(unknown)}. {hints or 'No known target has a similar name.'}",
            tuple(unknown),
            suggestions,
        )
    most = max((len(t) for t in parsed), default=0)
    if width is not None and most > width:
        raise LabelError(f"A label has {most} targets, but at most {width} fit here.")
    width = max(1, most) if width is None else width
    codes = np.full((len(distinct), width), -1, dtype=np.int64)
    for row, targets in enumerate(parsed):
        codes[row, : len(targets)] = [position[t] for t in targets]
    return codes[inverse.reshape(-1)]


def multi_hot(codes: np.ndarray, n_targets: int) -> np.ndarray:
    """Dense 0/1 matrix ``(row, n_targets)`` from padded codes; for distinct perturbations, not for all cells."""
    out = np.zeros((len(codes), n_targets), dtype=np.float32)
    rows, columns = np.nonzero(codes >= 0)
    out[rows, codes[rows, columns]] = 1.0
    return out


def check_labels(
    series: pd.Series, control: str | None = K.CONTROL, *, key: str = K.PERTURBATION, genes: Collection[str] = ()
) -> np.ndarray:
    """Return canonical labels as an object array; refuse what is not in the standard form.

    Parameters
    ----------
    series
        ``adata.obs[key]``.
    control
        Label of the control, which must occur; ``None``: no control needed (tables of effects).
    key
        Name of the column, for messages.
    genes
        Measured genes: they tell a gene named ``A_B`` from two genes with another delimiter.
    """
    missing = series.isna().to_numpy()
    if missing.any():
        raise LabelError(
            f"adata.obs[{key!r}] is NaN in {int(missing.sum())} of {len(series)} cells. Drop these cells "
            f"(adata[adata.obs[{key!r}].notna()].copy()) or give them a label; cells without a guide are not controls."
        )
    raw = series.astype(str).to_numpy(dtype=object)
    distinct, inverse = np.unique(raw.astype(str), return_inverse=True)
    if any(not label.strip() for label in distinct):
        raise LabelError(f"adata.obs[{key!r}] has empty labels. Drop these cells or label them.")
    if control is not None and control not in set(distinct):
        others = [str(d) for d in distinct if d.casefold() in CONTROL_NAMES] or suggest(control, distinct)
        hint = (
            f"Is it called {listing(others, 3)} here? Pass control={others[0]!r}."
            if others
            else "Pass the label of the unperturbed cells as control=."
        )
        raise LabelError(f"No cell of adata.obs[{key!r}] is labelled control={control!r}. {hint}")
    name = K.CONTROL if control is None else control
    measured = set(genes)
    known = measured | {part for label in distinct for part in label.split(SEPARATOR)}
    suspicious = [
        label
        for label in distinct
        if label != name
        and label not in measured
        and len(parts := [p for p in _OTHER_DELIMITERS.split(label) if p]) > 1
        and all(p in known or p.casefold() in CONTROL_NAMES for p in parts)
    ]
    if suspicious:
        raise LabelError(
            f"The label(s) {listing(suspicious, 5)} of adata.obs[{key!r}] look like combinations with another delimiter "
            "than '+'. Call scpert.pp.annotate_perturbations(adata, key, delimiter=...) first."
        )
    out = np.array([canonical(label, name) for label in distinct], dtype=object)
    return out[inverse.reshape(-1)]
