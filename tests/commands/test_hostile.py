"""All commands with values that nobody means: status 0 or 2, two lines at most, no traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.config.schemas import SCHEMAS
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from tests.helpers.pipeline import run
from tests.helpers.stores import tiny_store

LONG = "x" * 5000
PATHS = ("", LONG, "a\tb", "/proc/self/mem", "~nobody/x", "ключ", "*", "..")
WORDS = (
    "[]",
    "[,]",
    "[a,,b]",
    "[[]]",
    "[[[a]]]",
    "{",
    "{}",
    "{a: {b: c}}",
    "[a",
    "'",
    "[null,null]",
)
NUMBERS = ("-1", "0", "nan", "1e400", "x", "[1]", "99999999999999999999")
# per command: what it needs to come so far, then keys with hostile values
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "extract": (
        ("source=folder", "source.images=photos", "store=new"),
        {"source.images": PATHS, "store": ("p.png", "/proc/x"), "images_per_shard": NUMBERS[:6]},
    ),
    "train": (
        ("experiment=vits_infonce", "store=store"),
        {
            "store": PATHS[:4],
            "data.batch_size": NUMBERS[:5],
            "ckpt_path": PATHS[:6],
            "seed": NUMBERS[:6],
        },
    ),
    "evaluate": (
        ("checkpoint=psi.pth", "benchmark=custom", "benchmark.root=photos"),
        {"checkpoint": PATHS, "benchmark.classes": WORDS, "benchmark.window": NUMBERS[:4]},
    ),
    "segment": (
        ("checkpoint=psi.safetensors", "image=p.png", "classes=[cat]", "output=out.png"),
        {
            **{"checkpoint": PATHS, "image": PATHS, "classes": WORDS, "short_side": NUMBERS},
            **{"formats": ("[[]]", "{a: b}", "[a", "'", "coca", "null", "[coco,coco]")},
            **{"tolerance": NUMBERS, "minimum_area": NUMBERS, "polygons": ("true", "x", "[]")},
            **{"instances": ("true", "2"), "image_root_url": ("", "x\ty", LONG)},
            **{"background": NUMBERS, "output": ("p.png", "/proc/x/y.png"), "templates": PATHS[:4]},
        },
    ),
    "calibrate": (
        ("checkpoint=psi.safetensors", "images=photos", "output=new.safetensors"),
        {"images": PATHS, "output": ("p.png", "", LONG), "tokens": NUMBERS, "seed": NUMBERS},
    ),
    "embed": (
        ("checkpoint=psi.pth", "classes=[cat]", "output=new.safetensors"),
        {"classes": WORDS, "output": ("p.png", "", LONG), "negatives": WORDS},
    ),
    "search": (
        ("checkpoint=psi.safetensors", "store=features", "query=cat", "output=found"),
        {
            **{"query": (*WORDS, *PATHS), "store": PATHS, "images": PATHS, "checkpoint": PATHS[:4]},
            **{"top": NUMBERS, "best": NUMBERS, "output": ("p.png", "/proc/x", LONG)},
        },
    ),
    "app": (("checkpoint=psi.pth",), {"classes": WORDS, "port": NUMBERS, "short_side": NUMBERS}),
    "serve": (
        ("checkpoint=psi.pth",),
        {
            **{"classes": WORDS, "port": NUMBERS[:4], "timeout": NUMBERS[:4], "queue": NUMBERS[:4]},
            **{"host": (*PATHS, "0.0.0.0", "::", "256.1.1.1"), "token": ("x", "ключ " * 9, LONG)},
            **{"image_hosts": (*WORDS, "[http://x]"), "image_root": PATHS},
            "label_studio_url": PATHS,
        },
    ),
    "export": (
        ("checkpoint=psi.pth", "output=onnx"),
        {"output": ("p.png", "/proc/x", LONG), "classes": WORDS, "image_size": NUMBERS},
    ),
    "convert": (
        ("task=weights", "input=psi.pth", "output=new.pth"),
        {"task": ("", "x", "null"), "input": PATHS, "output": ("p.png", "/proc/x.pth", LONG)},
    ),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a folder of pictures without captions, an empty checkpoint and a small one."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "photos").mkdir()
    pixels = np.zeros((8, 9, 3), np.uint8)
    for path in (folder / "p.png", folder / "photos" / "a.png"):
        Image.fromarray(pixels).save(path)
    (folder / "psi.pth").write_bytes(b"")
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain")
    projection = ProjectionLayer(text.embed_dim, vision.embed_dim)
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(projection, folder / "psi.safetensors", specs)
    patches = {"patch_tokens": (4, vision.embed_dim)}
    tiny_store(folder / "features", patches, vision=vision.describe())
    return folder


def state(folder: Path) -> dict[str, bytes]:
    files = ("p.png", "photos/a.png", "psi.pth", "psi.safetensors")
    return {name: (folder / name).read_bytes() for name in files}


def test_every_command_has_its_cases() -> None:
    assert CASES.keys() == SCHEMAS.keys()


@pytest.mark.parametrize(
    ("command", "key"), [(command, key) for command, (_, keys) in CASES.items() for key in keys]
)
def test_hostile_values(
    command: str,
    key: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(here)
    before = state(here)
    base, keys = CASES[command]
    for value in keys[key]:
        capfd.readouterr()
        kept = [one for one in base if not one.startswith(f"{key}=")]
        try:
            run(command, *kept, f"{key}={value}", f"hydra.run.dir={here / 'run'}")
        except SystemExit as stopped:
            error = capfd.readouterr().err
            assert stopped.code in (0, 2), (value[:50], error[-500:])
            lines = [line for line in error.splitlines() if line.strip()]
            assert len(lines) <= 2 and "Traceback" not in error, (value[:50], error[-500:])
        except Exception as error:
            raise AssertionError(f"{command} {key}={value[:50]}") from error
    assert state(here) == before
