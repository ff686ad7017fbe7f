"""Bring the labels of any screen to the one form: ``control``, ``GENE``, ``GENE_A+GENE_B``."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_obs_key, listing, suggest
from .._docs import shared_docs
from ..data._perturbation import CONTROL_NAMES
from ..errors import LabelError
from ._write import record, writable

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["annotate_perturbations"]

logger = logging.getLogger("scpert")

#: Delimiters that occur in no gene name: they split wherever they stand.
_STRONG = ("+", ";", "|", ",", "&", "/", ":", "__")
_UNASSIGNED = frozenset("none nan na n/a <na> unassigned unknown multiplet doublet ambiguous undetermined".split())
#: Kinds of control that are not non-targeting guides; they are not pooled with these unasked.
_OTHER_CONTROLS = {
    "safe-targeting guides": frozenset("safe-targeting safe aavs1".split()),
    "cells without a guide": frozenset("unperturbed untreated wt wild-type wildtype vehicle mock".split()),
}
_SYMBOL_COLUMNS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "feature_name", "gene")

_GUIDE_SUFFIXES = tuple(
    re.compile(pattern)
    for pattern in (
        r"_[+-]_\d+(?:\.\d+)?(?:-[\w.,;-]+)?$",  # CPQ_+_97657557.23-P1P2: strand, position, promoter
        r"[_\-.\s](?:sg|g|guide|gRNA|sgRNA|grna|sgrna)[_\-]?\d+[A-Za-z]?$",  # KLF1_sg1, KLF1-g2, KLF1_guide3
        r"(?<=[A-Z0-9])g\d+$",  # IFNGR2g1
        r"[_\-][ACGT]{15,}$",  # the spacer itself
        r"_p[A-Z]{2,3}\d{2,}$",  # SPI1_pDS255: the vector
        r"_\d{1,5}$",  # KLF1_2
    )
)
_HYPHEN_NUMBER = re.compile(r"-(\d{1,5})$")  # KLF1-2, but also NKX2-1
#: Families whose genes end in a hyphen and a number, and worm genes (lin-12).
_HYPHEN_FAMILY = re.compile(
    r"^(NKX\d+|KRTAP\d+|ERV\w*|MIR\w*|SNOR\w*|RNU\w*|RN\w*\d|TR[ABGD][VDJC]\w*|IG[HKL][VDJC]\w*|RP\d+|CT[ABCD]|KB|GS1|TR\w-\w+)$",
    re.IGNORECASE,
)
_HYPHEN_WORM = re.compile(r"^[a-z]{3,4}-\d+$")
_SYMBOL = re.compile(r"^(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9.\-]{1,}$")
_REGION = re.compile(r"chr[0-9XYMT]+:\d+(?:-\d+)?")  # the place of an enhancer
_ENSEMBL_VERSION = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+$")


def _fold(name: str) -> str:
    return re.sub(r"[\s_\-]+", "-", name.strip().casefold()).strip("-")


_CONTROLS = frozenset(map(_fold, CONTROL_NAMES)) - _UNASSIGNED
_CONTROL_HEADS = tuple(sorted({*_CONTROLS, "non-targeting-control", "negative-control", "nt-control"}, key=len)[::-1])


def _control_name(token: str) -> str | None:
    """The folded control name that a token bears (``non-targeting_00027`` -> ``non-targeting``), or None."""
    folded = _fold(token)
    folded = re.sub(r"^sg-?(?=[a-z])", "", folded) if folded not in _CONTROLS else folded
    for head in _CONTROL_HEADS:
        if folded == head:
            return head
        if folded.startswith(head):
            rest = folded[len(head) :]
            number = (
                r"(-?(sg|g|guide|grna|sgrna)?-?\d+[a-z]?)$"
                if len(head) > 4 or head == "ctrl"
                else (
                    r"((-(sg|g|guide|grna|sgrna)?-?|(sg|g))\d+[a-z]?)$"  # WT1 and NT5 may be genes, WT-1 and NTg5 are not
                )
            )
            if re.match(number, rest) or re.match(r"-[acgt]{15,}$", rest):
                return head
    return None


class _Reader:
    """Reads single labels; holds what is known of the whole column."""

    def __init__(
        self, controls: frozenset[str] | None, delimiter: str | None, genes: frozenset[str], guides: bool | None
    ):
        self.controls = controls  # exactly these labels, where the user named them
        self.delimiter = delimiter
        self.genes = genes
        self.guides = guides
        self.known: set[str] = set(genes)
        self.stems: Counter[str] = Counter()
        self.hyphen_guides = guides is True
        self.strong = False  # whether a delimiter other than "_" joins targets in this column
        self.underscore = False
        self.problems: dict[str, list[str]] = {}

    def problem(self, kind: str, label: str) -> None:
        self.problems.setdefault(kind, []).append(label)

    def is_control(self, token: str) -> bool:
        if self.controls is not None and token in self.controls:
            return True
        return token not in self.genes and _control_name(token) is not None

    def strip_guide(self, token: str, *, hyphen: bool = True) -> str:
        """The gene of a guide's name."""
        if self.guides is False or token in self.genes:
            return token
        found = _ENSEMBL_VERSION.match(token)
        if found:
            return found.group(1)
        stem = re.sub(r"^sg[_\-]?(?=[A-Z])", "", token)
        for pattern in _GUIDE_SUFFIXES:
            shorter = pattern.sub("", stem)
            if shorter and shorter != stem:
                stem = shorter
                break
        if _REGION.fullmatch(stem):
            return stem
        if hyphen and stem not in self.genes and (found := _HYPHEN_NUMBER.search(stem)):
            before = stem[: found.start()]
            if not _HYPHEN_WORM.match(stem) and not _HYPHEN_FAMILY.match(before):
                if self.hyphen_guides or before in self.known or self.stems[before] > 1:
                    return before
                if self.guides is None:
                    self.problem("hyphen", token)
        return stem

    # ------------------------------------------------------------------ pieces of a label

    def strong_parts(self, label: str) -> list[str]:
        """Split at the delimiters that no gene name holds."""
        if self.delimiter is not None:
            if label in self.genes and not all(p.strip() in self.known for p in label.split(self.delimiter)):
                return [label]
            return [p.strip() for p in label.split(self.delimiter)]
        if label in self.genes or self.is_control(label):
            return [label]
        shielded = re.sub(r"_([+-])_(?=\d)", lambda m: "_\x01_" if m.group(1) == "+" else "_\x02_", label)
        shielded = _REGION.sub(lambda m: m.group().replace(":", "\x03"), shielded)
        present = [d for d in _STRONG if d in shielded]
        if not present:
            return [label]
        if len(present) > 1:
            if set(present) == {"+", "__"}:
                present = ["+"]
            else:
                self.problem("mixed", label)
                return [label]
        parts = shielded.split(present[0])
        return [p.strip().replace("\x01", "+").replace("\x02", "-").replace("\x03", ":") for p in parts]

    def weak_parts(self, part: str) -> list[str] | None:
        """Split at ``_`` or blanks where the pieces are known genes or controls; None: cannot tell."""
        if self.delimiter is not None or self.is_control(part):
            return [part]
        gene = self.strip_guide(part, hyphen=False)
        pieces = [p for p in re.split(r"[_\s]+", gene) if p]
        if len(pieces) < 2:
            return [part]
        if part in self.genes or gene in self.genes:
            if all(p in self.known for p in pieces):
                return None
            return [part]
        if any(re.fullmatch("[a-z]+", p) and p not in self.known and not self.is_control(p) for p in pieces):
            if not self.is_control("_".join(pieces[1:])):
                return [part]  # GATA1_enh: a word, which names an element of the gene
        for cut in range(1, len(pieces)):  # A_NegCtrl0, NT_A, A_non_targeting
            left, right = "_".join(pieces[:cut]), "_".join(pieces[cut:])
            if self.is_control(left) or self.is_control(right):
                return [left, right]
        named = [self.strip_guide(p) in self.known for p in pieces]
        if all(named) or (self.underscore and all(_SYMBOL.match(p) for p in pieces)):
            return pieces
        if self.strong and not any(p in self.known for p in pieces):
            return [part]  # another delimiter joins the targets in this column, and the pieces mean nothing: one name
        return None

    def targets(self, label: str) -> tuple[str, ...] | None:
        out: set[str] = set()
        parts = self.strong_parts(label)
        if not all(parts):
            self.problem("empty", label)
            return None
        for part in parts:
            pieces = self.weak_parts(part)
            if pieces is None:
                self.problem("underscore", label)
                return None
            for piece in pieces:
                if not self.is_control(piece):
                    out.add(self.strip_guide(piece))
        if self.delimiter is None and len(out) == 1:
            (only,) = out
            halves = only.split("-")
            if (
                not _REGION.fullmatch(only)
                and only not in self.genes
                and len(halves) == 2
                and all(h in self.known for h in halves)
            ):
                self.problem("dash", label)
                return None
        return tuple(sorted(out))

    # ------------------------------------------------------------------ evidence of the column

    def learn(self, labels: Sequence[str]) -> None:
        """Collect genes that stand alone, guide numbers, and whether ``_`` joins genes in this column."""
        tokens = [p for label in labels for p in self.strong_parts(label) if p and not self.is_control(p)]
        self.strong = any(len(self.strong_parts(label)) > 1 for label in labels)
        plain = {t for t in tokens if not re.search(r"[_\s\-]", t)}
        self.known |= {t for t in plain if not re.fullmatch(r"\d+", t)}
        if self.guides is not False:
            for token in set(tokens) - self.genes:
                gene = self.strip_guide(token, hyphen=False) if not re.search(r"-\d{1,5}$", token) else token
                if gene != token and "_" not in gene and not _HYPHEN_NUMBER.search(gene):
                    self.known.add(gene)
                found = _HYPHEN_NUMBER.search(gene)
                if found and "_" not in gene[: found.start()] and not _HYPHEN_FAMILY.match(gene[: found.start()]):
                    self.stems[gene[: found.start()]] += 1
            self.problems.clear()
            alone = [t for t in set(tokens) if t not in self.genes and "_" not in t]
            numbered = [t for t in alone if (m := _HYPHEN_NUMBER.search(t)) and t[: m.start()] in self.stems]
            if len(alone) > 0 and len(numbered) > len(alone) / 2 and max(self.stems.values(), default=0) > 1:
                self.hyphen_guides = True
            self.known |= {s for s, n in self.stems.items() if n > 1 or self.hyphen_guides}
        for token in tokens:
            pieces = self.weak_parts(token)
            if pieces is not None and len(pieces) > 1 and not any(self.is_control(p) for p in pieces):
                self.underscore = True
        # genes joined to a control (A+ctrl, A_NegCtrl0) are genes, too
        for token in tokens:
            pieces = self.weak_parts(token)
            if pieces is not None and len(pieces) > 1 and any(self.is_control(p) for p in pieces):
                self.known |= {self.strip_guide(p) for p in pieces if not self.is_control(p) and "_" not in p}
        self.problems.clear()


def _complain(problems: dict[str, list[str]], key: str) -> None:
    texts = {
        "mixed": "{} hold more than one kind of delimiter. Name the one that joins targets as delimiter=.",
        "empty": "{} have an empty target. Correct or drop them.",
        "underscore": (
            "{} may be one gene, a gene with a suffix, or a combination of genes: the pieces around '_' (or a blank) are "
            "neither measured genes nor perturbed alone, or both readings fit. Pass delimiter='_' if it joins targets, "
            "delimiter='+' if it does not."
        ),
        "dash": "{} may be one gene or a combination: pass delimiter='-' or delimiter='+'.",
        "hyphen": (
            "{} may be a gene or the name of a guide: pass guides=True to drop the number, guides=False to keep it."
        ),
    }
    lines = [texts[kind].format(listing(sorted(set(labels)), 8)) for kind, labels in problems.items() if labels]
    if lines:
        raise LabelError(f"adata.obs[{key!r}] has labels that can be read in more than one way. " + " ".join(lines))


@shared_docs
def annotate_perturbations(
    adata: AnnData,
    key: str,
    *,
    control: str | Iterable[str] | None = None,
    delimiter: str | None = None,
    key_added: str = K.PERTURBATION,
    guides: bool | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Bring perturbation labels to the standard form ``control``, ``GENE``, ``GENE_A+GENE_B``.

    Recognised are: ``A+ctrl`` and ``ctrl+A`` (GEARS), ``ctrl``, ``NT``, ``NTC``, ``non-targeting``,
    ``non-targeting_00027``, ``NegCtrl0`` and their like for the control; ``+ ; | , & / : __`` between targets, and
    ``_`` or a blank where the pieces are measured genes, are perturbed alone elsewhere in the column, or are controls;
    guide names (``KLF1_sg1``, ``KLF1-2``, ``KLF1_2``, ``IFNGR2g1``, ``CPQ_+_97657557.23-P1P2``, a gene and its spacer
    sequence), which are brought to their gene; Ensembl identifiers, without their version. A measured gene of the
    label's own name is never cut (``HLA-A``, ``NKX2-1``). Two guides against one gene are one perturbation.
    What can be read in more than one way is refused, with the labels.

    Parameters
    ----------
    adata
        Cells by genes.
    key
        Column of ``adata.obs`` with the labels as they came (strings, categories).
    control
        Label or labels of the control cells; by default every label with a name usual for non-targeting controls.
        Controls of different kinds (non-targeting and safe-targeting guides, cells without a guide) are pooled only
        if all are named here.
    delimiter
        What joins the targets of a combination; by default found as above. Where it is given, nothing else joins.
    key_added
        Column to write; may be ``key`` itself.
    guides
        Whether labels are names of guides, for the reading of ``KLF1-2``; by default by evidence: the gene is
        measured or perturbed, or occurs with several numbers.
    {copy}

    Returns
    -------
    ``None``, or the copy. Writes

    ``adata.obs[key_added]``
        Categorical ``(cell,)``: ``control`` first, then the perturbations in alphabetical order.
    ``adata.uns["scpert"]["annotate_perturbations"]``
        The arguments and ``labels``, a DataFrame of each label and what it was read as.

    Raises
    ------
    LabelError
        NaN labels, no control, labels that can be read in more than one way.
    MissingKeyError
        No column ``key``.

    Examples
    --------
    >>> import anndata, numpy as np, pandas as pd, scpert
    >>> obs = pd.DataFrame({"guide": ["ctrl", "KLF1+ctrl", "CEBPA_sg2", "KLF1+CEBPA"]}, index=list("abcd"))
    >>> adata = anndata.AnnData(np.ones((4, 2), dtype="float32"), obs=obs)
    >>> scpert.pp.annotate_perturbations(adata, "guide")
    >>> list(adata.obs["perturbation"])
    ['control', 'KLF1', 'CEBPA', 'CEBPA+KLF1']
    """
    series = check_obs_key(adata, key, "key")
    if delimiter is not None and (not isinstance(delimiter, str) or not delimiter):
        raise LabelError(f"delimiter={delimiter!r}: give the characters between targets, such as '_', or None.")
    missing = series.isna().to_numpy()
    if missing.any():
        raise LabelError(
            f"adata.obs[{key!r}] is NaN in {int(missing.sum())} of {len(series)} cells. Drop these cells "
            f"(adata[adata.obs[{key!r}].notna()].copy()) or give them a label; cells without a guide are not controls."
        )
    raw = series.astype(str).str.strip().to_numpy(dtype=object)
    distinct, inverse = np.unique(raw.astype(str), return_inverse=True)
    labels = [str(d) for d in distinct]
    if "" in labels:
        raise LabelError(
            f"adata.obs[{key!r}] has {int((raw == '').sum())} empty label(s). Drop these cells or label them."
        )

    named = None if control is None else frozenset([control] if isinstance(control, str) else map(str, control))
    symbols = set(map(str, adata.var_names))
    for column in _SYMBOL_COLUMNS:
        if column in adata.var.columns:
            symbols |= {str(g) for g in adata.var[column] if not pd.isna(g)}
    reader = _Reader(named, delimiter, frozenset(symbols), guides)
    controls = _find_controls(labels, reader, named, key)
    reader.learn([label for label in labels if label not in controls])
    read: dict[str, tuple[str, ...] | None] = {
        label: () if label in controls else reader.targets(label) for label in labels
    }
    _complain(reader.problems, key)
    names = {
        label: "+".join(targets) if targets else K.CONTROL for label, targets in read.items() if targets is not None
    }
    if K.CONTROL not in names.values():
        close = suggest(K.CONTROL, labels)
        raise LabelError(
            f"No label of adata.obs[{key!r}] looks like a control (such as 'ctrl', 'NT', 'non-targeting'): "
            f"{listing(labels, 8)}. Pass the label of the unperturbed cells as control=."
            + (f" Is it {close[0]!r}?" if close else "")
        )
    odd = sorted(label for label, name in names.items() if name != K.CONTROL and K.CONTROL in name.split("+"))
    if odd:
        raise LabelError(f"{listing(odd)} of adata.obs[{key!r}] combine a gene with a gene named 'control'. Rename it.")

    perturbations = sorted(set(names.values()) - {K.CONTROL})
    new = np.array([names[label] for label in labels], dtype=object)[inverse.reshape(-1)]
    changed = [f"{label} -> {name}" for label, name in names.items() if label != name]
    logger.info(
        "annotate_perturbations: %d labels -> %d perturbations and the control; %s",
        len(labels),
        len(perturbations),
        f"changed: {listing(changed, 6)}" if changed else "all were in the standard form",
    )
    adata = writable(adata, copy)
    adata.obs[key_added] = pd.Categorical(new, categories=[K.CONTROL, *perturbations])
    table = pd.DataFrame({"label": labels, "perturbation": [names[label] for label in labels]}).astype(object)
    table.index = table.index.astype(str)
    record(
        adata,
        "annotate_perturbations",
        key=key,
        key_added=key_added,
        control=sorted(label for label in labels if names[label] == K.CONTROL),
        delimiter="" if delimiter is None else delimiter,
        labels=table,
    )
    return adata if copy else None


def _find_controls(labels: Sequence[str], reader: _Reader, named: frozenset[str] | None, key: str) -> set[str]:
    """Labels that are the control as a whole."""
    if named is not None:
        absent = sorted(named - set(labels))
        if len(absent) == len(named):
            others = [label for label in labels if reader.is_control(label)] or suggest(absent[0], labels)
            hint = f" Is it called {listing(others, 3)} here?" if others else f" The labels are {listing(labels, 8)}."
            raise LabelError(f"No cell of adata.obs[{key!r}] is labelled control={absent[0]!r}.{hint}")
        # a control of the named kind with a number of its own (NT_1, NT_2) belongs to it
        kinds = {_control_name(n) for n in named} - {None}
        found = {
            label for label in labels if label in named or _control_name(label) in kinds and label not in reader.genes
        }
        left = [label for label in labels if label not in found and reader.is_control(label)]
        if left:
            raise LabelError(
                f"{listing(left, 8)} of adata.obs[{key!r}] look like controls, too, but control={sorted(named)!r}. Name all "
                "that are controls (control=[...]), and drop or rename the others."
            )
        unassigned = [label for label in labels if label.casefold() in _UNASSIGNED and label not in named]
    else:
        found = {label for label in labels if reader.is_control(label)}
        unassigned = [label for label in labels if label.casefold() in _UNASSIGNED and label not in reader.genes]
        kinds_found: dict[str, list[str]] = {}
        for label in sorted(found):
            name = _control_name(label) or ""
            kind = next((k for k, names in _OTHER_CONTROLS.items() if name in names), "non-targeting guides")
            kinds_found.setdefault(kind, []).append(label)
        if len(kinds_found) > 1:
            raise LabelError(
                f"adata.obs[{key!r}] has more than one kind of control: "
                + "; ".join(f"{kind}: {listing(names, 5)}" for kind, names in kinds_found.items())
                + ". Name those to use, all of them or some, as control=[...], and drop or rename the others."
            )
    if unassigned:
        raise LabelError(
            f"{listing(unassigned)} of adata.obs[{key!r}] name cells without a known perturbation. Drop them; if they are "
            "the control, say so with control=."
        )
    return found
