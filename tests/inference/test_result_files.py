"""Which pictures `segment` means and what it calls them; how results are counted and gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

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
