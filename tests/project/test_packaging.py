"""The wheel carries the configs, and its commands work far away from the repository."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    here = importlib.util.find_spec("hatchling") is not None
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    command += ["--no-build-isolation"] if here else ["--retries", "0", "--timeout", "10"]
    built = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    if built.returncode and not here and "hatchling" in built.stdout + built.stderr:
        pytest.skip("hatchling is not installed and cannot be downloaded")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("talk2dino-*.whl"))


def test_the_wheel_holds_code_and_configs_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"talk2dino/conf/{path.relative_to(ROOT / 'conf')}" in names
    for path in (ROOT / "talk2dino").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "talk2dino/py.typed" in names
    for kind in ("*.txt", "templates/*"):  # class lists, and what reports and cards look like
        found = list((ROOT / "talk2dino").rglob(kind))
        assert found
        for path in found:
            assert str(path.relative_to(ROOT)) in names
    folders = {name.split("/")[0] for name in names}
    info = next(f for f in folders if f.endswith(".dist-info"))
    assert folders == {"talk2dino", "hydra_plugins", info}
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "talk2dino = talk2dino.__main__:main" in scripts
    assert not [name for name in names if name.endswith((".npz", ".ipynb", ".pyc"))]


def test_the_wheel_renders_a_report(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    results = {"benchmark": "squares", "miou": 61.44, "pixel_accuracy": 80.0, "images": 6}
    results |= {"seconds": 2.0, "per_class": {"cat": 61.44, "dog": None}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    ran = subprocess.run(
        [sys.executable, "-m", "talk2dino.compare", "results.json", "--output", "both"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "<h1>Open-vocabulary segmentation</h1>" in (tmp_path / "both/report.html").read_text()


def test_commands_work_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        "import sys, talk2dino.config.checks as errors; print(errors.config_folder()); "
        "sys.argv = ['extract', '--help']; import runpy; "
        "runpy.run_module('talk2dino.extract', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == str(tmp_path / "site" / "talk2dino" / "conf")
    assert "vision: " in ran.stdout
    assert "dinov2_vits14" in ran.stdout
    assert not list((tmp_path / "empty").iterdir())
