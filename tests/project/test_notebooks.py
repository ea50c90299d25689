"""Every notebook runs from top to bottom after the quickstart, and is committed without outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pipeline import need

REPOSITORY = Path(__file__).parents[2]
# Before the cells of a notebook: nothing of another one, and commands run in this process, too,
# which has imported everything already.
BEFORE = """
%reset -f
import contextlib, io, subprocess, sys
from pathlib import Path

sys.path.insert(0, {repository!r})
from tests.helpers.pipeline import run

by_a_process = subprocess.run

def run_here(line, *, cwd=None, **options):
    if line[:2] != [sys.executable, "-m"]:  # a library looks at the machine
        return by_a_process(line, cwd=cwd, **options)
    assert cwd == Path.cwd()
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            run(line[2].removeprefix("talk2dino."), *line[3:])
        except SystemExit as stopped:
            status = stopped.code or 0
    return subprocess.CompletedProcess(line, status, printed.getvalue(), "")

subprocess.run = run_here
"""
SMALLER = {  # sizes that show that it runs
    "3_train_on_your_own_captions": {
        'MosaicScenes("train", 96,': 'MosaicScenes("train", 32,',
        "trainer.max_epochs=6": "trainer.max_epochs=2",
    },
    "4_evaluate": {"benchmark.count=6": "benchmark.count=2"},
}
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
    text = file.read_text()
    for size, smaller in SMALLER.get(file.stem, {}).items():
        size, smaller = (json.dumps(part)[1:-1] for part in (size, smaller))
        assert size in text, f"{file.name}: {size}"
        text = text.replace(size, smaller)
    notebook = nbformat.reads(text, as_version=4)
    folder = str(quickstart.parents[1])
    before = BEFORE.format(repository=str(REPOSITORY))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
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
