"""Tools: effects, gene regulatory networks, interactions, rankings."""

from ._effects import perturbation_effects
from ._evaluate_grn import evaluate_grn, grn_stability
from ._grn import infer_grn
from ._interactions import INTERACTION_THRESHOLDS, evaluate_interactions, genetic_interactions
from ._master_regulators import master_regulators
from ._rank import rank_perturbations

__all__ = [
    "INTERACTION_THRESHOLDS",
    "evaluate_grn",
    "evaluate_interactions",
    "genetic_interactions",
    "grn_stability",
    "infer_grn",
    "master_regulators",
    "perturbation_effects",
    "rank_perturbations",
]
