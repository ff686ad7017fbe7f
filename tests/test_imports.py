"""House rules: imports run one way, ``import scpert`` is light, the public names are there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import scpert

SOURCE = Path(scpert.__file__).parent

#: A package may import from itself and from those named here.
ALLOWED = {
    "resources": {"resources"},
    "data": {"data"},
    "nn": {"nn"},
    "module": {"nn", "data"},
    "model": {"module", "nn", "data", "resources", "pp"},
    "pp": {"data", "resources"},
    "metrics": {"data"},
    "get": {"data"},
    "datasets": {"data", "resources", "pp"},
    "tl": {"model", "data", "resources", "pp", "metrics", "get"},
    "pl": {"tl", "model", "data", "metrics", "get", "pp", "resources"},
    "benchmark": {"pl", "tl", "model", "data", "metrics", "get", "pp", "datasets", "resources"},
    "cli": {"benchmark", "pl", "tl", "model", "data", "metrics", "get", "pp", "datasets", "resources", "report"},
    "quickstart": {"pl", "tl", "model", "data", "metrics", "get", "pp", "datasets", "resources"},
    "report": {"benchmark", "pl", "tl", "model", "data", "metrics", "get", "pp", "datasets", "resources"},
}
PACKAGES = set(ALLOWED)


def _imports(path: Path) -> set[str]:
    """Packages of scpert that a file imports, at any depth."""
    here = path.relative_to(SOURCE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(here[: len(here) - node.level])
                full = base + (node.module.split(".") if node.module else [])
                names = [full[0]] if full else [a.name for a in node.names]
            elif (node.module or "").split(".")[0] == "scpert":
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            else:
                continue
            found |= {n for n in names if n in PACKAGES}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path):
    where = path.relative_to(SOURCE).parts[0].removesuffix(".py").lstrip("_")
    if path == SOURCE / "__init__.py":
        return
    if where not in ALLOWED:  # base files
        assert not _imports(path)
        return
    assert _imports(path) <= ALLOWED[where] | {where}


def test_import_is_light():
    code = "import sys, json, scpert; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    )
    assert not loaded & {"torch", "scvi", "scanpy", "anndata", "lightning", "sklearn", "matplotlib", "decoupler", "ot"}


@pytest.mark.parametrize("package", ["pp", "tl", "pl", "get", "metrics", "model", "benchmark", "datasets", "resources"])
def test_public_names_exist(package: str):
    module = getattr(scpert, package)
    assert module.__all__
    for name in module.__all__:
        assert hasattr(module, name), name


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = scpert.nonsense
