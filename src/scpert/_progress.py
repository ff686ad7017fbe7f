"""One progress bar for the whole package; hidden by ``scpert.settings.progress = False``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ._settings import settings

__all__ = ["progress"]


def progress(iterable: Iterable[Any], *, total: int | None = None, description: str = "", unit: str = "it") -> Iterator:
    """Wrap an iterable in a tqdm bar that shows only after half a second."""
    from tqdm.auto import tqdm

    return iter(
        tqdm(iterable, total=total, desc=description, unit=unit, disable=not settings.progress, delay=0.5, leave=False)
    )
