"""What scpert raises. Every error is a :class:`ScpertError`, which is a ``ValueError``."""

from __future__ import annotations

__all__ = [
    "DownloadError",
    "FileFormatError",
    "LabelError",
    "MissingKeyError",
    "NotTrainedError",
    "ScaleError",
    "ScpertError",
    "SplitError",
    "UnknownTargetError",
]


class ScpertError(ValueError):
    """Base of all errors that scpert raises on purpose."""


class MissingKeyError(ScpertError, KeyError):
    """A column, layer or key is not in the AnnData."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class LabelError(ScpertError):
    """Perturbation labels are missing, ambiguous or not in the standard form."""


class ScaleError(ScpertError):
    """Values are on another scale (counts, log1p, effects) than the one asked for."""


class SplitError(ScpertError):
    """A split cannot be made, or does not fit the data."""


class NotTrainedError(ScpertError, RuntimeError):
    """A model was asked to predict before it was trained."""


class FileFormatError(ScpertError, OSError):
    """A file is truncated, of another format, or of a newer version."""


class DownloadError(ScpertError, OSError):
    """A file cannot be downloaded, was cut off, or is not the one that was expected."""


class UnknownTargetError(ScpertError, KeyError):
    """A model was asked for genes that it knows nothing of.

    Attributes
    ----------
    targets
        The unknown genes.
    suggestions
        Known genes with a similar name, by unknown gene.
    """

    def __init__(self, message: str, targets: tuple[str, ...] = (), suggestions: dict[str, list[str]] | None = None):
        super().__init__(message)
        self.targets = tuple(targets)
        self.suggestions = dict(suggestions or {})

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
