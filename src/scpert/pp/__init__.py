"""Before a model: labels, audit, quality, filters, genes, splits, matched controls, nets from the data."""

from __future__ import annotations

from ._audit import audit
from ._labels import annotate_perturbations
from ._match import match_controls
from ._nets import coexpression_net, pathway_mask, similarity_net
from ._quality import filter_perturbations, quality_flags, select_genes
from ._split import split

__all__ = [
    "annotate_perturbations",
    "audit",
    "coexpression_net",
    "filter_perturbations",
    "match_controls",
    "pathway_mask",
    "quality_flags",
    "select_genes",
    "similarity_net",
    "split",
]
