"""Every tutorial runs from top to bottom, in an empty folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("SCPERT_PROGRESS", "0")
    monkeypatch.setenv("SCPERT_TUTORIAL_FAST", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # The kernel of the interpreter that runs the tests, whatever name the notebook was saved under.
    client = nbclient.NotebookClient(
        notebook,
        timeout=int(os.environ.get("SCPERT_TUTORIAL_TIMEOUT", "300")),
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_is_fit_for_the_documentation(path: Path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# "), "the first cell is the title"
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert any(cell.get("outputs") for cell in code), "a tutorial is stored with its outputs"
    for cell in code:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"an error is stored: {output.get('evalue')}"
