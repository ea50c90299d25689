"""All commands with values that nobody means: status 0 or 2, two lines at most, no traceback."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.config.command import SWEEP_FILES
from talk2dino.config.schemas import SCHEMAS
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from talk2dino.errors import ResultWarning
from talk2dino.files import user_path
from tests.helpers.encoders import SMALL_CLIP
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
NAMES = (
    *("ключ [1]", "a'b\"c", "x=y,z", "#1 50% *", "a\\b", " spaces ", "-dash", "{a,b}", "~tilde"),
    *("new\nline", "null", "1e3", "猫😀", "a;b:c", "<b>&amp;", "x" * 200),
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
            **{"exemplars": ("..", "photos"), "exemplar_weight": NUMBERS[:2]},  # see embed
        },
    ),
    "map": (
        (
            *("checkpoint=psi.safetensors", "image=p.png", "classes=[cat]", "output=new.tif"),
            *("window=32", "pamr=false"),
        ),
        {
            **{"image": PATHS, "classes": WORDS, "meters_per_pixel": NUMBERS, "scale": NUMBERS},
            **{"bands": (*NUMBERS, "[1,2]", "[[1]]"), "stretch": ("[2,98]", "[nan,1]", "[1]", "x")},
            **{"value_range": ("[0,1e400]", "[5,5]"), "minimum_area": NUMBERS, "window": NUMBERS},
            **{"output": ("p.png", "/proc/x/y.tif", f"{LONG}.tif", ""), "background": NUMBERS},
            **{"exemplars": ("..", "photos"), "exemplar_weight": NUMBERS[:2]},  # see embed
        },
    ),
    "calibrate": (
        (
            *("checkpoint=psi.safetensors", "images=photos", "output=new.safetensors"),
            "short_side=32",
        ),
        {"images": PATHS, "output": ("p.png", "", LONG), "tokens": NUMBERS, "seed": NUMBERS},
    ),
    "embed": (
        ("checkpoint=psi.pth", "classes=[cat]", "output=new.safetensors"),
        {
            **{"classes": WORDS, "output": ("p.png", "", LONG), "negatives": WORDS},
            **{"exemplars": (*PATHS, "photos"), "exemplar_weight": NUMBERS, "short_side": NUMBERS},
        },
    ),
    "search": (
        ("checkpoint=psi.safetensors", "store=features", "query=cat", "output=found"),
        {
            **{"query": (*WORDS, *PATHS[:3]), "store": PATHS, "images": PATHS, "top": NUMBERS},
            **{"checkpoint": PATHS[:4], "best": NUMBERS, "output": ("p.png", "/proc/x", LONG)},
        },
    ),
    "app": (("checkpoint=psi.pth",), {"classes": WORDS, "port": NUMBERS, "short_side": NUMBERS}),
    "video": (
        ("checkpoint=psi.safetensors", "video=p.png", "classes=[cat]", "output=new.mp4"),
        {
            **{"video": PATHS, "classes": WORDS, "smoothing": NUMBERS},
            "output": ("p.png", "/proc/x/y.mp4", LONG),
        },
    ),
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
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random", templates="plain")
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


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["hydra.run.dir=psi.pth"], "hydra.run.dir=psi.pth: File exists; give a folder"),
        ([f"image={'p' * 5000}"], f"image={'p' * 194}…: File name too long; give a shorter one"),
    ],
)
def test_what_the_system_refuses_is_named_by_its_key(
    given: list[str],
    line: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit) as stopped:
        run("segment", "checkpoint=psi.safetensors", "image=p.png", "classes=[a,b]", *given)
    assert stopped.value.code == 2
    assert capfd.readouterr().err.startswith(f"error: {line}")


def test_home_folders(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shells leave `~` in `key=~/file`; it is the home folder, never a folder of that name."""
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(tmp_path)
    psi = "checkpoint=~/psi.safetensors"
    run("search", psi, "store=~/features", "query=cat", f"output={tmp_path}", "images=~/photos")
    run("embed", psi, "classes=[cat]", "output=~/at_home.safetensors")
    (here / "at_home.safetensors").unlink()
    for arguments in (
        ("extract", "source=folder", "source.images=~/photos", "store=store"),
        ("train", "experiment=vits_infonce", "store=~/photos", "hydra.run.dir=~/run"),
        ("calibrate", psi, "images=~/photos", "short_side=32", "output=new.safetensors"),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            run(*arguments)
            raise AssertionError(arguments)
        said = capfd.readouterr().err.lstrip()  # a progress bar of earlier versions ends its line
        assert said.startswith("error: ") and str(here) in said, said
    assert not (tmp_path / "~").exists()
    assert user_path("~no-user-has-this-name/x") == Path("~no-user-has-this-name/x")


@pytest.mark.parametrize("single", [False, True])
def test_pictures_of_any_name(single: bool, here: Path, tmp_path: Path) -> None:
    """All of a folder, and each by its own path, whose folder has such a name, too."""
    folder = tmp_path / "näs [2020] 'x'"
    folder.mkdir()
    names = NAMES[:3] if single else NAMES
    for number, name in enumerate(names):
        Image.new("RGB", (9 + number, 8)).save(folder / f"{name}.png")
    given = (
        *("checkpoint=" + str(here / "psi.safetensors"), "classes=[cat,sofa]", "short_side=32"),
        *("pamr=false", "accelerator=cpu", f"output={tmp_path / 'out, 1'}"),
    )
    (tmp_path / "out, 1").mkdir()
    for image in [folder / f"{name}.png" for name in names] if single else [folder]:
        run("segment", *given, f"image={image}")
    for number, name in enumerate(names):
        figures = json.loads((tmp_path / "out, 1" / f"{name}.json").read_text())
        assert figures["size"] == [8, 9 + number]
        assert figures["overlay"] == f"{name}.png"
    assert len(list((tmp_path / "out, 1").iterdir())) == 3 * len(names)


def test_a_class_alone_is_said(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    given = [*CASES["segment"][0][:2], "short_side=32", "pamr=false", f"output={tmp_path}/o.png"]
    with pytest.warns(ResultWarning, match="'cat' is alone, so every pixel becomes it") as said:
        run("segment", *given, "classes=[cat]")
    assert json.loads((tmp_path / "o.json").read_text())["classes"][0]["share"] == 1.0
    warning = said.pop(ResultWarning)
    line = warnings.formatwarning(str(warning.message), ResultWarning, "model.py", 1)
    assert line.startswith("warning: classes: 'cat' is alone") and line.count("\n") == 1
    model = Talk2DINO.from_pretrained("psi.safetensors", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        model.open_vocabulary(["cat", "sofa"])
        model.open_vocabulary(["cat"], background=0.5)
        model.open_vocabulary(["cat"], negatives=["sofa"])


@pytest.mark.parametrize("name", SWEEP_FILES)
def test_sweeps_leave_files_of_other_origin(
    name: str, here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    given = ("-m", *CASES["evaluate"][0], f"hydra.sweep.dir={tmp_path}", "seed=0,1")
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", *given)
    assert stopped.value.code == 2
    assert f"error: {tmp_path / name}: is there and was not written by" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {name}
    assert (tmp_path / name).read_text() == "mine"
