"""Saving and loading that never executes anything from a file.

A saved model is a directory::

    model.json           format, class, options, setup arguments, registry, state: plain JSON
    weights.safetensors  the module's state dict
    arrays.safetensors   numpy arrays named in model.json
    tables/*.parquet     data frames named in model.json (nets, annotations, training history)

Nothing is ever unpickled; other files in the directory are ignored. A directory is written beside its final place
and renamed, so that an interrupted or failed save leaves an earlier one as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import FileFormatError, ScpertError

__all__ = ["FORMAT_VERSION", "load_directory", "save_directory"]

FORMAT_VERSION = 1
_MARK = "__scpert__"


class _Packer:
    """Turns options and state into JSON; arrays and tables go to their own files."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.tables: dict[str, pd.DataFrame] = {}

    def pack(self, value: Any, where: str = "value") -> Any:
        if value is None or isinstance(value, str | bool):
            return str(value) if isinstance(value, np.str_) else value
        if isinstance(value, np.bool_):
            return bool(value)
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, float | np.floating):
            value = float(value)
            return value if np.isfinite(value) else {_MARK: "float", "value": repr(value)}
        if isinstance(value, pd.DataFrame):
            name = f"table_{len(self.tables)}"
            self.tables[name] = value
            return {_MARK: "table", "name": name}
        if isinstance(value, np.ndarray):
            if value.dtype.kind in "OUS":
                return {_MARK: "strings", "value": [None if v is None else str(v) for v in value.ravel().tolist()]}
            name = f"array_{len(self.arrays)}"
            self.arrays[name] = value
            return {_MARK: "array", "name": name}
        if isinstance(value, tuple):
            return {_MARK: "tuple", "value": [self.pack(v, where) for v in value]}
        if isinstance(value, list):
            return [self.pack(v, where) for v in value]
        if isinstance(value, dict):
            if all(isinstance(k, str) for k in value) and _MARK not in value:
                return {k: self.pack(v, f"{where}[{k!r}]") for k, v in value.items()}
            return {_MARK: "dict", "value": [[self.pack(k, where), self.pack(v, where)] for k, v in value.items()]}
        raise ScpertError(
            f"{where} is a {type(value).__name__}, which cannot be saved: use numbers, text, arrays, tables."
        )


def _unpack(value: Any, arrays: dict[str, np.ndarray], tables: dict[str, pd.DataFrame]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, arrays, tables) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {k: _unpack(v, arrays, tables) for k, v in value.items()}
    if kind == "float":
        return float(value["value"])
    if kind == "table":
        return tables[value["name"]]
    if kind == "array":
        return arrays[value["name"]]
    if kind == "strings":
        return np.array(value["value"], dtype=object)
    if kind == "tuple":
        return tuple(_unpack(v, arrays, tables) for v in value["value"])
    if kind == "dict":
        return {_unpack(k, arrays, tables): _unpack(v, arrays, tables) for k, v in value["value"]}
    raise FileFormatError(f"model.json holds an entry of the unknown kind {kind!r}: the file is damaged.")


def save_directory(
    path: str | os.PathLike, content: dict[str, Any], weights: dict[str, Any], *, overwrite: bool
) -> None:
    """Write a model directory atomically.

    Parameters
    ----------
    path
        Directory to make.
    content
        Names and values for ``model.json``: numbers, text, arrays, tables and containers of them.
    weights
        State dict of torch tensors; may be empty.
    overwrite
        Whether an existing model may be replaced.
    """
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file as save_tensors

    path = Path(path)
    if path.exists():
        if not path.is_dir():
            raise ScpertError(f"{str(path)!r} is a file. Give the name of a directory.")
        occupied = any(path.iterdir())
        if occupied and not overwrite:
            raise ScpertError(
                f"The directory {str(path)!r} exists and is not empty. Pass overwrite=True to replace it."
            )
        if occupied and not (path / "model.json").exists():
            raise ScpertError(
                f"The directory {str(path)!r} holds other files than a model and is not replaced. Choose another name."
            )
    packer = _Packer()
    packed = {key: packer.pack(value, key) for key, value in content.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if weights:
            # clone: tensors that share memory cannot be written
            save_tensors(
                {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, draft / "weights.safetensors"
            )
        if packer.arrays:
            save_arrays({k: np.ascontiguousarray(v) for k, v in packer.arrays.items()}, draft / "arrays.safetensors")
        if packer.tables:
            (draft / "tables").mkdir()
            for name, table in packer.tables.items():
                table.to_parquet(draft / "tables" / f"{name}.parquet")
        document = {"format": "scpert-model", "format_version": FORMAT_VERSION, "has_weights": bool(weights), **packed}
        (draft / "model.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        os.chmod(draft, 0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            os.replace(path, old / "model")
            try:
                os.replace(draft, path)
            except OSError:
                os.replace(old / "model", path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def load_directory(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model directory: ``(content, weights)``."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file as load_arrays
    from safetensors.torch import load_file as load_tensors

    path = Path(path)
    file = path / "model.json"
    if not file.is_file():
        raise FileFormatError(f"{str(path)!r} is not a saved scpert model: it has no model.json.")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(file)!r} is truncated or damaged ({error}). Save the model again.") from error
    if not isinstance(document, dict) or document.get("format") != "scpert-model":
        raise FileFormatError(f"{str(file)!r} is not the description of a scpert model.")
    if document.get("format_version", 0) > FORMAT_VERSION:
        raise FileFormatError(
            f"{str(path)!r} was saved in format {document['format_version']} by scpert {document.get('scpert_version')}; "
            f"this version reads formats up to {FORMAT_VERSION}. Update scpert."
        )
    try:
        weights = load_tensors(path / "weights.safetensors") if document["has_weights"] else {}
        arrays = load_arrays(path / "arrays.safetensors") if (path / "arrays.safetensors").exists() else {}
        tables = {f.stem: pd.read_parquet(f) for f in sorted((path / "tables").glob("*.parquet"))}
        content = {k: _unpack(v, arrays, tables) for k, v in document.items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"The saved model {str(path)!r} is truncated or damaged ({type(error).__name__}: {error}). Save it again."
        ) from error
    return content, weights
