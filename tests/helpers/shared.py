"""Optional data beside the repository, and folders that several test processes share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_path(name: str) -> Path:
    """`../shared/NAME`, or below `$TALK2DINO_SHARED`; the test is skipped if it is not there."""
    root = os.environ.get("TALK2DINO_SHARED")
    folder = Path(root) if root else Path(__file__).resolve().parents[3] / "shared"
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is not there; set TALK2DINO_SHARED to run this test")
    return folder / name


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills the first time any process of this run asks for it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # shared by all workers
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
