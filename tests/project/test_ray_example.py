"""`examples/ray_segment.py`: in one process, and on two, where Ray is installed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_segment.py"


def save_model(folder: Path) -> Path:
    """A checkpoint that names its small encoders."""
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(ProjectionLayer(256, 64), folder / "psi.safetensors", specs)
    return folder / "psi.safetensors"


class OneProcess:
    """What the script calls of Ray Data, here and now."""

    data = property(lambda self: self)

    def from_items(self, rows: list[dict[str, str]], **_: Any) -> OneProcess:
        self.rows = rows
        return self

    def ActorPoolStrategy(self, **_: Any) -> None:
        pass

    def map_batches(
        self, worker: type, fn_constructor_args: tuple[Any, ...], **_: Any
    ) -> OneProcess:
        lines = worker(*fn_constructor_args)({"image": [row["image"] for row in self.rows]})["line"]
        self.rows = [{"line": line} for line in lines]
        return self

    def iter_rows(self) -> list[dict[str, str]]:
        return self.rows


def script(monkeypatch: pytest.MonkeyPatch, *options: object) -> object:
    """Run the script without Ray; what it exits with."""
    monkeypatch.setitem(sys.modules, "ray", OneProcess())
    monkeypatch.setattr(sys, "argv", ["ray_segment.py", "--short-side", "32", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stopped.value.code


def test_faults_are_told_in_one_line_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (52, 40)).save(photos / "b.png")
    given = ("--images", photos, "--output", out, "--classes")
    said = script(monkeypatch, "--checkpoint", "nowhere", *given, "cat")
    assert str(said).startswith("checkpoint=nowhere: no such file") and "\n" not in str(said)
    checkpoint = ("--checkpoint", save_model(tmp_path))
    said = script(monkeypatch, *checkpoint, *given, "cat", "cat")
    assert "--classes" in str(said) and "\n" not in str(said)
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "b.png.png").write_text("mine")
    said = script(monkeypatch, *checkpoint, *given, "cat")
    assert "b.png.png: is there and was not written by this script" in str(said)
    assert (out / "labels" / "b.png.png").read_text() == "mine"


def test_a_killed_run_within_the_folder_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its label maps are no pictures; one that cannot be read makes the status 1."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (52, 40)).save(photos / "b.png")
    result = photos / "out" / "segmented.jsonl"
    given = ("--checkpoint", save_model(tmp_path), "--images", photos, "--output", result.parent)
    for _ in range(2):
        assert script(monkeypatch, *given, "--classes", "cat", "sofa") == 0
        assert [json.loads(line)["image"] for line in result.read_text().splitlines()] == ["b.png"]
        result.unlink()
    (photos / "c.png").write_bytes(b"\x89PNG nothing more")
    assert script(monkeypatch, *given, "--classes", "cat", "sofa") == 1
    assert '"error"' in result.read_text()


@pytest.mark.slow
def test_every_picture_once_and_the_labels_of_segment(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'talk2dino[ray]'")
    save_model(tmp_path)
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    names = ["a.png", "b.png", "c.png", "deep/a.png", "deep/d.png"]
    for name in names:
        pixels = random.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG nothing more")
    command = [sys.executable, SCRIPT, "--checkpoint", tmp_path / "psi.safetensors"]
    command += ["--images", tmp_path / "photos", "--output", tmp_path / "out", "--batch", "2"]
    command += ["--classes", "cat", "sofa; couch", "--short-side", "32", "--actors", "2"]
    paths = [str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]  # for the broken picture
    assert "6 of 6 pictures, 1 broken" in done.stdout
    lines = (tmp_path / "out" / "segmented.jsonl").read_text().splitlines()
    rows = {row["image"]: row for row in map(json.loads, lines)}
    assert len(lines) == 6 and rows.keys() == {*names, "broken.png"}
    assert "cannot be read" in rows["broken.png"]["error"]
    model = Talk2DINO.from_pretrained(tmp_path / "psi.safetensors", "cpu")
    for name in names:
        seg = model.segment(tmp_path / "photos" / name, ["cat", ["sofa", "couch"]], short_side=32)
        with Image.open(tmp_path / "out" / rows[name]["label_map"]) as labels:
            np.testing.assert_array_equal(np.asarray(labels), seg.labels.numpy())
        assert rows[name]["shares"] == pytest.approx(seg.areas())
    again = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is there already" in again.stderr
