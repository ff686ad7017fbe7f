"""Tools: effects, gene regulatory networks, interactions, rankings."""

from ._effects import perturbation_effects
from ._grn import infer_grn

__all__ = ["infer_grn", "perturbation_effects"]
