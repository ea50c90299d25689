"""Shared fixtures: golden arrays, the parity record, and the optional real data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import USE, ParityRecord, whole_suite
from tests.pipeline import BUNDLED, mosaic_store, need, trained_run  # noqa: F401 (fixtures)
from tests.token_stores import pictures, token_store  # noqa: F401 (fixtures)

GOLDENS = Path(__file__).parent / "goldens"
DESELECTED = pytest.StashKey[int]()
COMPLETE = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", metavar="FILE", help="write the measured parity table here")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ParityRecord.KEY] = ParityRecord()
    config.stash[DESELECTED] = 0
    config.stash[COMPLETE] = False
    # Tiny models gain nothing from threads, and threads that wait for a busy core stall them.
    torch.set_num_threads(1)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[DESELECTED] += "parity" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test of the committed table sees what all others recorded."""
    items.sort(key=lambda item: item.path.name == "test_parity_table.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only a session that runs everything may write or compare the table."""
    config = session.config
    config.stash[COMPLETE] = whole_suite(session.items, config.stash[DESELECTED], config.args)
    if config.getoption("--write-parity") and not config.stash[COMPLETE]:
        raise pytest.UsageError(
            "--write-parity: only a part of the parity tests would run; name whole files, with all "
            f"that use {USE}…), and no -k, -m or ::"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.getoption("--write-parity")
    if not target or not session.config.stash[COMPLETE]:
        return
    if exitstatus:  # a part that failed would be missing
        session.config.get_terminal_writer().line(f"{target}: not written, since a test failed")
        return
    session.config.stash[ParityRecord.KEY].write(Path(target))


@pytest.fixture
def recorded(pytestconfig: pytest.Config) -> ParityRecord:
    """The whole record, at the end of a session that ran every parity test."""
    if not pytestconfig.stash[COMPLETE]:
        pytest.skip("only a part of the parity tests ran")
    return pytestconfig.stash[ParityRecord.KEY]


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
