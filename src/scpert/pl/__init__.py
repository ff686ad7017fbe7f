"""Figures: one function per result, each returning axes. Modules are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "effects": "_prediction",
    "explain": "_explain",
    "predicted_vs_observed": "_prediction",
    "top_genes": "_prediction",
    "training": "_prediction",
    "grn": "_grn",
    "grn_evaluation": "_grn",
    "genetic_interactions": "_interactions",
    "leaderboard": "_benchmark",
    "calibration": "_benchmark",
    "reconstruction": "_cell_state",
    "master_regulators": "_cell_state",
    "screen": "_cell_state",
    "cooperative": "_cell_state",
    "patient_regulators": "_cell_state",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
