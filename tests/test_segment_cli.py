"""`python -m talk2dino.segment`: one picture, a folder, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino.errors import ConfigError, DataError
from talk2dino.segment import class_names, plan
from tests.pipeline import fails, run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a.png", (50, 70)), ("b.jpg", (64, 48)), ("c.PNG", (30, 30))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def options(trained_run: Path, tmp_path: Path) -> list[str]:
    return [
        f"checkpoint={trained_run}",
        "classes=[cat,grass,brick wall]",
        "short_side=56",
        "accelerator=cpu",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]


def test_one_picture(
    trained_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "a.png"
    run("segment", *options(trained_run, tmp_path), f"image={pictures / 'a.png'}", f"output={out}")
    labels = np.asarray(Image.open(out.with_name("a_labels.png")))
    assert labels.shape == (50, 70)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert Image.open(out).width >= 70
    printed = capsys.readouterr().out
    for name in ("cat", "grass", "brick wall", str(out)):
        assert name in printed.replace("\n", "")


def test_a_folder_of_pictures(trained_run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        "segment",
        *options(trained_run, tmp_path),
        f"image={pictures}",
        f"output={out}",
        "background=0.5",
        "pamr=false",
    )
    names = sorted(path.name for path in out.iterdir())
    assert names == ["a.png", "a_labels.png", "b.png", "b_labels.png", "c.png", "c_labels.png"]
    assert Image.open(out / "b_labels.png").size == (48, 64)
    assert np.asarray(Image.open(out / "b_labels.png")).max() <= 3


def test_errors_are_one_line(
    trained_run: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = options(trained_run, tmp_path)
    one = f"image={pictures / 'a.png'}"
    cases = {
        "image=nowhere.png: no such file or folder": [*given, "image=nowhere.png"],
        "is a folder, so output must be a folder too": [
            *given,
            f"image={pictures}",
            f"output={tmp_path / 'x.png'}",
        ],
        "classes: the list is empty": [*given, one, "classes=[]"],
        "cannot be read as an image": [*given, f"image={pictures / 'notes.txt'}"],
        "accelerator='tpu'; choose auto, ": [*given, one, "accelerator=tpu"],
        "accelerator=mps: there is none here": [*given, one, "accelerator=mps"],
        "checkpoint=none.pth: no such file": [*given, one, "checkpoint=none.pth"],
        "this would overwrite the image": [*given, one, f"output={pictures / 'a.png'}"],
        "is the folder of the images": [*given, f"image={pictures}", f"output={pictures}"],
    }
    for message, arguments in cases.items():
        if not any(item.startswith("output=") for item in arguments):
            arguments = [*arguments, f"output={tmp_path / 'out.png'}"]
        assert message in fails(capfd, "segment", *arguments)


def test_plan(pictures: Path, tmp_path: Path) -> None:
    one = pictures / "b.jpg"
    assert plan(one, tmp_path / "x.jpg") == [(one, tmp_path / "x.png")]
    (tmp_path / "there").mkdir()
    assert plan(one, tmp_path / "there") == [(one, tmp_path / "there" / "b.png")]
    assert [job[0].name for job in plan(pictures, tmp_path / "out")] == ["a.png", "b.jpg", "c.PNG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in this folder"):
        plan(tmp_path / "empty", tmp_path / "out")
    Image.new("RGB", (4, 4)).save(pictures / "b.png")
    with pytest.raises(DataError, match=r"b\.jpg and b\.png"):
        plan(pictures, tmp_path / "out")


def test_class_names() -> None:
    assert class_names("cat, sofa ,") == ["cat", "sofa"]
    with pytest.raises(ConfigError, match="list is empty"):
        class_names(" , ")
