"""Every notebook runs from top to bottom after the quickstart, and is committed without outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pipeline import need

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One kernel for all notebooks, so that the libraries are imported once."""
    need("nbclient", "ipykernel")
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import run_sync

    manager = AsyncKernelManager()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in NOTEBOOKS])
def test_notebook_runs(
    file: Path, quickstart: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in all tests
    notebook = nbformat.read(file, as_version=4)
    folder = str(quickstart.parents[1])
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # nothing of another notebook
    place = {"metadata": {"path": folder}}
    NotebookClient(notebook, km=kernel, timeout=300, resources=place).execute()
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
