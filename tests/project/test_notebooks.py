"""Every notebook runs from top to bottom after the quickstart, and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.pipeline import need

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in NOTEBOOKS])
def test_notebook_runs(file: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("nbclient", "ipykernel")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in all tests
    notebook = nbformat.read(file, as_version=4)
    folder = str(quickstart.parents[1])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures, "nothing to look at"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(file: Path) -> None:
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_there_are_four() -> None:
    assert [file.stem[0] for file in NOTEBOOKS] == ["1", "2", "3", "4"]
