"""Finding optional data that lies beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_path(name: str) -> Path:
    """`../shared/NAME`, or below `$TALK2DINO_SHARED`; the test is skipped if it is not there."""
    root = os.environ.get("TALK2DINO_SHARED")
    folder = Path(root) if root else Path(__file__).resolve().parents[3] / "shared"
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is not there; set TALK2DINO_SHARED to run this test")
    return folder / name
