"""Models that predict perturbations. Classes are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "NoChange": "_baselines",
    "PerturbedMean": "_baselines",
    "Additive": "_baselines",
    "MatchingMean": "_closed_form",
    "LinearPCA": "_closed_form",
    "KNN": "_closed_form",
    "Ridge": "_closed_form",
    "LinearGRN": "_closed_form",
    "KnowledgeGP": "_gp",
    "CPAVAE": "_factored",
    "SAMSVAE": "_factored",
    "CRADLEVAE": "_factored",
    "GPOVAE": "_gpovae",
    "GEARS": "_graph_models",
    "BioDSNN": "_graph_models",
    "ConditionalVAE": "_conditional",
    "CPA": "_conditional",
    "CellState": "_cell_state",
}

__all__ = ["MODELS", "BaseModel", "PerturbationModel", "UnknownTargetError", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name in ("BaseModel", "PerturbationModel"):
        return getattr(importlib.import_module(f"{__name__}._base"), name)
    if name == "UnknownTargetError":
        from ..errors import UnknownTargetError

        return UnknownTargetError
    if name == "MODELS":
        models = {key: getattr(importlib.import_module(f"{__name__}.{file}"), key) for key, file in _WHERE.items()}
        globals()["MODELS"] = models
        return models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
