"""Before a model: labels, audit, quality, filters, genes, splits, matched controls, nets from the data."""

from __future__ import annotations

from typing import Any

from ._labels import annotate_perturbations
from ._match import match_controls
from ._quality import filter_perturbations, quality_flags, select_genes
from ._split import split

__all__ = [
    "annotate_perturbations",
    "coexpression_net",
    "filter_perturbations",
    "match_controls",
    "pathway_mask",
    "quality_flags",
    "select_genes",
    "similarity_net",
    "split",
]

_NETS = ("coexpression_net", "pathway_mask", "similarity_net")


def __getattr__(name: str) -> Any:
    if name in _NETS:
        from . import _nets

        return getattr(_nets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
