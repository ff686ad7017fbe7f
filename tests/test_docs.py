"""The documentation tells of everything that is exported, cites what is in the bibliography, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest

import scpert

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = Path(scpert.__file__).parent
PAGES = ("benchmark", "data", "datasets", "errors", "get", "metrics", "model", "pl", "pp", "resources", "tl")

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not part of this copy")


def _listed(package: str) -> list[str]:
    text = (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    summary = re.findall(rf"^   {package}\.(\w+)$", text, flags=re.M)
    return summary + re.findall(rf"^:::\{{py:data\}} scpert\.{package}\.(\w+)$", text, flags=re.M)


@pytest.mark.parametrize("package", PAGES)
def test_api_pages_list_what_is_exported(package: str):
    listed = _listed(package)
    assert sorted(listed) == sorted(importlib.import_module(f"scpert.{package}").__all__)


def test_every_package_has_a_page():
    root = set(scpert.__all__) - {"quickstart", "settings"}
    assert root <= set(PAGES)
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8").split()
    assert set(PAGES) | {"settings"} <= set(index)
    page = (DOCS / "api" / "settings.md").read_text(encoding="utf-8")
    assert "quickstart" in page and "scpert.settings" in page


def test_citations_are_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{([^,\s]+),", (DOCS / "references.bib").read_text(encoding="utf-8"), flags=re.M))
    assert known
    pattern = re.compile(r"(?::cite(?::\w+)?:|\{cite(?::\w+)?\})`([^`]+)`")
    pages = [p for p in DOCS.rglob("*.md") if "_build" not in p.parts and "generated" not in p.parts]
    cited = {
        key.strip(): path.name
        for path in [*SOURCE.rglob("*.py"), *pages]
        for keys in pattern.findall(path.read_text(encoding="utf-8"))
        for key in keys.split(",")
    }
    assert cited
    assert not {key: where for key, where in cited.items() if key not in known}


def test_readme_example_runs_on_a_small_screen(capsys: pytest.CaptureFixture):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) == 10
    small = code.replace("n_cells=2000, n_genes=200", "n_cells=400, n_genes=40").replace(
        "max_epochs=40", "max_epochs=2"
    )
    assert small != code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(small, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "pearson_delta" in printed and "source" in printed


def test_ci_calls_the_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "python3 -m pip install --quiet uv && uv run pytest"
    assert command in readme
    assert "python3 -m pip install --quiet uv && uv run scpert quickstart" in readme
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ examples


def _modules(package: str) -> list[str]:
    """Names of the files of a package, without importing any."""
    path = SOURCE / package
    if path.is_dir():
        return [f"scpert.{package}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__"]
    return [f"scpert.{package}"]


@pytest.mark.parametrize("package", ["pp", "tl", "pl", "get", "metrics", "datasets", "resources"])
def test_help_tells_of_every_parameter(package: str):
    """``help()`` is complete: every parameter is described, and shared descriptions are filled in."""
    module = importlib.import_module(f"scpert.{package}")
    for name in _public(package):
        function = getattr(module, name)
        if not inspect.isfunction(function):
            continue
        text = inspect.getdoc(function)
        assert not re.search(r"^ *\{\w+\}$", text, flags=re.MULTILINE), name
        parts = re.findall(r"^([\w*, ]+)(?: : .*)?$\n(?= {4}\S)", text, flags=re.MULTILINE)
        told = {word.strip(" *") for part in parts for word in part.split(",")}
        missing = set(inspect.signature(function).parameters) - told
        assert not missing, f"{package}.{name}: {missing}"


def _public(package: str) -> list[str]:
    exported = importlib.import_module(f"scpert.{package}").__all__
    return [name for name in exported if not name.isupper()]


@pytest.mark.parametrize("package", [*(p for p in PAGES if p != "errors"), "_settings", "_progress"])
def test_examples_run(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    import matplotlib

    monkeypatch.setattr(scpert.settings, "progress", False)
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    finder, failures, n_tried = doctest.DocTestFinder(), [], 0
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    try:
        for name in _modules(package):
            module = importlib.import_module(name)
            for test in finder.find(module):
                if not test.examples:
                    continue
                said: list[str] = []
                runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = runner.run(test, out=said.append)
                n_tried += result.attempted
                if result.failed:
                    failures.append("".join(said))
    finally:
        import matplotlib.pyplot as plt

        plt.close("all")
        matplotlib.use(backend)
    assert not failures, "\n".join(failures)
    if package not in ("_progress",):
        assert n_tried, f"scpert.{package} has no example that runs"


@pytest.mark.parametrize("package", [p for p in PAGES if p not in ("errors", "data")])
def test_public_functions_have_an_example(package: str):
    module = importlib.import_module(f"scpert.{package}")
    lacking = []
    for name in _public(package):
        thing = getattr(module, name)
        text = inspect.getdoc(thing) or ""
        assert text, f"scpert.{package}.{name} has no docstring"
        if inspect.isfunction(thing) and not name.startswith(("add_arguments", "main")) and ">>>" not in text:
            lacking.append(name)
    assert not lacking


def test_pages_of_the_api_are_read_as_what_they_are():
    text = (DOCS / "conf.py").read_text(encoding="utf-8")
    suffixes = re.search(r"^source_suffix = \{(.*)\}$", text, flags=re.M)
    assert suffixes is not None
    assert suffixes[1].startswith('".rst"'), "autosummary writes reST, in files with the first of the suffixes"
