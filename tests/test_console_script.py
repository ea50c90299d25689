"""`talk2dino COMMAND …` is `python -m talk2dino.COMMAND …`, wherever it is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from talk2dino import __main__ as entry
from talk2dino.features import write_store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that pip makes of the entry point in pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2]
    found = re.match(r'\s*talk2dino = "([\w.]+):(\w+)"', section)
    assert found
    path = tmp_path_factory.mktemp("bin") / "talk2dino"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {found[1]} import {found[2]}\n"
        f'if __name__ == "__main__":\n    sys.exit({found[2]}())\n'
    )
    path.chmod(0o755)
    return path


def start(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
    )


def test_the_script_lists_and_names_the_nearest(script: Path, tmp_path: Path) -> None:
    alone = start(script, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert re.search(r"^  train +a feature store into a projection$", alone.stdout, re.M)
    wrong = start(script, "trian", "store=x", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: talk2dino trian: no such command; did you mean train?\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    entry.main([])
    alone = capsys.readouterr().out
    for flag in ("-h", "--help"):
        entry.main([flag])
        assert capsys.readouterr().out == alone
    entry.main(["--version"])
    assert capsys.readouterr().out == f"talk2dino {version('talk2dino')}\n"
    for word in ("xyzzy", "--cfg"):
        with pytest.raises(SystemExit) as stopped:
            entry.main([word])
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: talk2dino {word}: no such command; commands are extract, ")
        assert line.count("\n") == 1


@pytest.mark.parametrize("command", entry.commands())
def test_a_command_gets_its_arguments_as_they_are(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's flags, sweeps and quotes belong to the command; `--help` behind it as well."""
    started = []
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    words = ["-m", "a=1,2", "b='x y'", "--help", "--version", ""]
    monkeypatch.setattr(sys, "argv", ["talk2dino", command, *words])
    entry.main()
    python = sys.executable
    assert started == [(python, [python, "-m", f"talk2dino.{command}", *words])]


@pytest.mark.slow
def test_ranks_that_lightning_starts_are_this_command_again(script: Path, tmp_path: Path) -> None:
    """`strategy=ddp` outside torchrun: rank 1 is started from `__main__` and `sys.argv`."""
    heads = np.random.default_rng(0).normal(size=(40, 2, 6))
    images = {"disentangled_self_attn": heads, "avg_self_attn_out": heads.mean(1)}
    captions = {"image_row": np.arange(40), "embedding": heads.mean(1)[:, :4]}
    write_store(tmp_path / "store", images, captions, dtype="float32")
    done = start(
        script,
        "train",
        "trainer=ddp_cpu",
        "trainer.strategy=ddp",
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        "projection.text_dim=4",
        "projection.vision_dim=6",
        "data.batch_size=4",
        "data.val_fraction=0.4",
        "store=store",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "GLOBAL_RANK: 0, MEMBER: 1/2" in done.stderr
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr
    steps = json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"]
    assert steps == 24 / (2 * 4)  # captions in training over those of a step
    assert (tmp_path / "run" / "projection.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"store", "run"}
