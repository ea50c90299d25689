"""Shared fixtures: golden arrays, the parity record, and the optional real data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import ParityRecord

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", metavar="FILE", help="write the measured parity table here")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ParityRecord.KEY] = ParityRecord()


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


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
