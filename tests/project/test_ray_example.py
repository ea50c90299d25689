"""`examples/ray_segment.py` on two processes, where Ray is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_segment.py"


@pytest.mark.slow
def test_every_picture_once_and_the_labels_of_segment(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'talk2dino[ray]'")
    torch_model = Talk2DINO(
        TimmVisionEncoder("test_vit", weights="random", image_size=32),
        OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain"),
        ProjectionLayer(256, 64),
    )
    text = torch_model.text.describe()["spec"]
    specs = {"vision": torch_model.vision.spec, "text": text}
    save_projection(torch_model.projection, tmp_path / "psi.safetensors", specs)
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
    assert done.returncode == 0, done.stderr[-3000:]
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
