"""Labels, checked views on screens, and the simulator."""

from ._perturbation import canonical, check_labels, encode, join, multi_hot, parse, targets_of
from ._screen import Moments, Screen, iter_rows, log1p_cp10k, read_rows, scale_evidence

__all__ = [
    "Moments",
    "Screen",
    "canonical",
    "check_labels",
    "encode",
    "iter_rows",
    "join",
    "log1p_cp10k",
    "multi_hot",
    "parse",
    "read_rows",
    "scale_evidence",
    "targets_of",
]
