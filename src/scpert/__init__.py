"""scpert: genetic-perturbation screens in single cells, on AnnData.

Sub-packages are imported on first use, so that ``import scpert`` itself loads
neither torch nor scvi-tools nor scanpy.
"""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("scpert")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "benchmark",
    "datasets",
    "errors",
    "get",
    "metrics",
    "model",
    "pl",
    "pp",
    "quickstart",
    "resources",
    "settings",
    "tl",
]

if TYPE_CHECKING:
    from . import benchmark, datasets, errors, get, metrics, model, pl, pp, resources, tl
    from ._quickstart import quickstart
    from ._settings import settings

logging.getLogger("scpert").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "settings":
        from ._settings import settings

        return settings
    if name == "quickstart":
        from ._quickstart import quickstart

        return quickstart
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
