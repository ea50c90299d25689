"""Shared fixtures: golden arrays, the parity record, and the optional real data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import ParityRecord
from tests.pipeline import BUNDLED, mosaic_store, need, trained_run  # noqa: F401 (fixtures)

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", metavar="FILE", help="write the measured parity table here")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ParityRecord.KEY] = ParityRecord()
    # Tiny models gain nothing from threads, and threads that wait for a busy core stall them.
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--write-parity")
    if target:
        session.config.stash[ParityRecord.KEY].write(Path(target))


@pytest.fixture(scope="session")
def parity(pytestconfig: pytest.Config) -> ParityRecord:
    """`parity.check(part, original, got, want, tolerance)` asserts and records a deviation."""
    return pytestconfig.stash[ParityRecord.KEY]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """`golden("loss")` loads `tests/goldens/loss.npz` as tensors, names as stored."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`outputs/quickstart` of the Makefile's own recipe, run once at a reduced size."""
    need(*BUNDLED)
    folder = tmp_path_factory.mktemp("quickstart")
    sizes = ["SCENES=96", "HELDOUT=6", "EPOCHS=3", "HEAD_EPOCHS=3", "PICTURES=2"]
    makefile = Path(__file__).parents[1] / "Makefile"
    command = ["make", "-f", str(makefile), "quickstart-steps", f"PY={sys.executable}", *sizes]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "outputs" / "quickstart"


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
