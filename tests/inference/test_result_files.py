"""Which pictures `segment` means and what it calls them; how results are counted and gathered."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from talk2dino.errors import DataError
from talk2dino.inference.result_files import plan


def draw(*paths: Path) -> None:
    """A small picture in each file."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def test_names_do_not_depend_on_the_other_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set names a picture from the folder that the pattern begins with."""
    photos = tmp_path / "trip [2020]"
    draw(photos / "2023" / "a.png", photos / "2024" / "b.png")
    monkeypatch.chdir(tmp_path)

    def names(image: str) -> list[str]:
        return [job.name for job in plan(image, tmp_path / "out")]

    assert names(f"{photos}/**/*") == ["2023/a.png", "2024/b.png"]
    (photos / "2024" / "b.png").unlink()
    assert names(f"{photos}/**/*") == names(f"{photos}/20*/?.png") == ["2023/a.png"]
    assert names("trip [2020]/*/*.png") == ["2023/a.png"]
    assert names(f"{photos}/2023") == names(f"{photos}/2023/*") == ["a.png"]
    assert names("*/2023/*") == ["trip [2020]/2023/a.png"]
    assert names(f"{photos}/2023/a.png") == ["a.png"]


def test_an_output_that_ends_in_a_slash_is_a_folder(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.jpg")
    for output in ("out/", "out.png/", f"out{os.sep}"):
        for name in ("a.png", "b.jpg"):
            (job,) = plan(str(tmp_path / name), f"{tmp_path}/{output}")
            assert job.overlay == tmp_path / output / f"{name[0]}.png"
        assert plan(str(tmp_path), f"{tmp_path}/{output}")[0].folder == tmp_path / output


def test_equal_names_in_two_folders(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos / "2023" / "a.png", photos / "2024" / "a.jpg", photos / "b.png")
    said = r"2023/a\.png and 2024/a\.jpg would both become a\.png; subfolders=true keeps their fold"
    with pytest.raises(DataError, match=said):
        plan(f"{photos}/**/*", out)
    jobs = plan(f"{photos}/**/*", out, subfolders=True)
    assert [job.figures.relative_to(out).as_posix() for job in jobs] == [
        "2023/a.json",
        "2024/a.json",
        "b.json",
    ]
    assert {job.folder for job in jobs} == {out}
    draw(photos / "2023" / "a.jpg")
    with pytest.raises(DataError, match=r"2023/a\.jpg and 2023/a\.png would .*; rename one"):
        plan(f"{photos}/**/*", out, subfolders=True)


def test_names_that_no_format_can_write(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in (b"caf\xe9/a.png", b"a\nb.png"):
        draw(Path(os.fsdecode(bytes(photos) + b"/" + name)))
        assert plan(f"{photos}/**/*", tmp_path)  # nothing names them
        with pytest.raises(DataError, match="which formats= and subfolders= cannot write; rename"):
            plan(f"{photos}/**/*", tmp_path, formats=["coco"])
        shutil.rmtree(photos)
    draw(photos / "é" / "ö ü.png", photos / "b" / "c.png")
    assert len(plan(f"{photos}/**/*", tmp_path, formats=["coco"])) == 2
    with pytest.raises(DataError, match=r"b/\.\./b/c\.png leads back by \.\.; put no \.\."):
        plan(f"{photos}/b*/../b/*", tmp_path, formats=["coco"])
