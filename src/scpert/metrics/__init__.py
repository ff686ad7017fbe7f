"""Compare predictions with real cells: trusted metrics, the noise ceiling, calibrated scores."""

from . import _de, _distribution, _profile, _retrieval  # noqa: F401 - they fill METRICS
from ._de import wilcoxon
from ._evaluate import evaluate
from ._pair import Reference
from ._registry import METRICS, Metric
from ._summary import by_chance, ceiling, compare, dynamic_range, pseudobulk, summarise, training_mean

__all__ = [
    "METRICS",
    "Metric",
    "Reference",
    "by_chance",
    "ceiling",
    "compare",
    "dynamic_range",
    "evaluate",
    "pseudobulk",
    "summarise",
    "training_mean",
    "wilcoxon",
]
