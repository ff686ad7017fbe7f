"""Settings of the session: where files are cached, how much is said."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Settings", "settings"]


def _default_cache() -> Path:
    if "SCPERT_CACHE" in os.environ:
        return Path(os.environ["SCPERT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scpert"


@dataclass
class Settings:
    """Settings of the session.

    Attributes
    ----------
    cache_dir
        Downloaded screens and knowledge are kept here (environment variable ``SCPERT_CACHE``).
    progress
        Whether progress bars are shown (environment variable ``SCPERT_PROGRESS=0`` hides them).

    Examples
    --------
    >>> import scpert
    >>> scpert.settings.progress = False
    """

    cache_dir: Path = field(default_factory=_default_cache)
    progress: bool = field(default_factory=lambda: os.environ.get("SCPERT_PROGRESS", "1") != "0")

    @property
    def verbosity(self) -> int:
        """Level of the ``scpert`` logger (:mod:`logging`); setting it also prints the messages."""
        return logging.getLogger("scpert").getEffectiveLevel()

    @verbosity.setter
    def verbosity(self, level: int | str) -> None:
        logger = logging.getLogger("scpert")
        logger.setLevel(level)
        if not any(type(h) is logging.StreamHandler for h in logger.handlers):
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("scpert: %(message)s"))
            logger.addHandler(handler)


settings = Settings()
