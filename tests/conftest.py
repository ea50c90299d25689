"""Shared fixtures: golden arrays, the parity record, and the optional real data."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.configs import compose_quickly
from tests.helpers.encoders import released  # noqa: F401 (fixture)
from tests.helpers.goldens import Golden, golden_arrays
from tests.helpers.hub import hub  # noqa: F401 (fixture)
from tests.helpers.parity import USE, ParityRecord, differs, whole_suite
from tests.helpers.pipeline import (
    BUNDLED,
    COMMAND,
    mosaic_store,  # noqa: F401 (fixture)
    need,
    run_script,
    trained_run,  # noqa: F401 (fixture)
)
from tests.helpers.ranks import PRELOAD
from tests.helpers.shared import once
from tests.helpers.stores import pictures, token_store  # noqa: F401 (fixtures)

DESELECTED = pytest.StashKey[int]()
COMPLETE = pytest.StashKey[bool]()
STALE = pytest.StashKey[str]()
PARITY_PAGE = Path(__file__).parents[1] / "docs" / "parity.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-parity", metavar="FILE", help="write the measured parity table here")
    parser.addoption(
        "--gpu-device", default="cuda", choices=["cuda", "cpu"], help="where tests marked gpu run"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ParityRecord.KEY] = ParityRecord()
    config.stash[DESELECTED] = 0
    config.stash[COMPLETE] = False
    multiprocessing.set_forkserver_preload(PRELOAD)  # for every process that a test forks from it
    compose_quickly()
    # Tiny models gain nothing from threads, and threads that wait for a busy core stall them.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # likewise in the commands that tests start


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what needs a GPU where there is none."""
    wanted = item.get_closest_marker("gpu") and item.config.getoption("--gpu-device") == "cuda"
    if wanted and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[DESELECTED] += "parity" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, which shares its fixtures.

    All that needs the quickstart is one group and comes first, so that one process works on it
    while the others have the rest, instead of all waiting for its two minutes. Files with other
    slow tests come next: a long one at the end would leave the other processes idle.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            long = "quickstart" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("quickstart" if long else str(item.path)))
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(
            key=lambda item: (
                "quickstart" not in getattr(item, "fixturenames", ()),
                item.path not in slow,
            )
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only a session that runs everything may write or compare the table."""
    gc.collect()
    gc.freeze()  # modules and tests live to the end; no later collection goes through them
    config = session.config
    config.stash[COMPLETE] = whole_suite(session.items, config.stash[DESELECTED], config.args)
    if config.getoption("--write-parity") and not config.stash[COMPLETE] and session.items:
        raise pytest.UsageError(
            "--write-parity: only a part of the parity tests would run; name whole files, with all "
            f"that use {USE}…), and no -k, -m or ::"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in what a worker of pytest-xdist recorded."""
    config, output = node.config, getattr(node, "workeroutput", None)
    if output is None:  # it died, which pytest-xdist reports
        return
    config.stash[ParityRecord.KEY].add(output["parity"])
    config.stash[COMPLETE] = output["complete"]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write docs/parity.md, or fail if it is not what the tests measured."""
    config = session.config
    record, complete = config.stash[ParityRecord.KEY], config.stash[COMPLETE]
    if hasattr(config, "workeroutput"):
        config.workeroutput |= {"parity": record.to_plain(), "complete": complete}
        return
    if not complete or exitstatus or config.option.collectonly:
        # a part that failed or did not run would be missing
        return
    if target := config.getoption("--write-parity"):
        Path(target).write_text(record.table())
    elif wrong := differs(PARITY_PAGE.read_text(), record.table()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        config.stash[STALE] = wrong


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why the session failed if it was for the page of parity."""
    if wrong := terminalreporter.config.stash.get(STALE, ""):
        terminalreporter.line(
            f"docs/parity.md is stale ({wrong}): run pytest --write-parity docs/parity.md", red=True
        )


@pytest.fixture(scope="session")
def parity(pytestconfig: pytest.Config) -> ParityRecord:
    """`parity.check(part, original, got, want, tolerance)` asserts and records a deviation."""
    return pytestconfig.stash[ParityRecord.KEY]


@pytest.fixture(scope="session")
def golden() -> Golden:
    """`golden("loss")` loads `tests/goldens/loss.npz` as tensors, names as stored."""
    return golden_arrays


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> torch.device:
    """Where a test marked `gpu` computes."""
    return torch.device(pytestconfig.getoption("--gpu-device"))


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`outputs/quickstart` of the Makefile's own recipe, run once at a reduced size.

    `make` says the lines of the recipe; its commands run in this process.
    """
    need(*BUNDLED)
    sizes = ["SCENES=96", "HELDOUT=6", "EPOCHS=3", "HEAD_EPOCHS=3", "PICTURES=2"]
    makefile = Path(__file__).parents[1] / "Makefile"
    command = ["make", "--dry-run", "--no-print-directory", "-f", str(makefile)]
    command += ["quickstart-steps", "PY=python", *sizes]

    def make(folder: Path) -> None:
        script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert len(COMMAND.findall(script)) == 7
        with pytest.MonkeyPatch.context() as here:
            here.chdir(folder)
            run_script(script)

    return once(tmp_path_factory, "quickstart", make) / "outputs" / "quickstart"


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
