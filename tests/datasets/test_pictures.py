"""Pictures of every mode become upright 8-bit RGB; huge and very long ones do not fill memory."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.datasets.captions.base import crop_square
from talk2dino.datasets.pictures import middle_strip, read_picture, to_pixels
from talk2dino.errors import ResultWarning

RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17  # 0, 17, ... 255
GRAY = np.repeat(RAMP[..., None], 3, axis=2)
COLORS = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def reread(folder: Path, image: Image.Image, name: str, **options: object) -> np.ndarray:
    image.save(folder / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_picture(folder / name)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("array", "mode", "name"),
    [
        (RAMP, None, "gray.png"),
        (RAMP.astype(np.uint16) * 257, None, "wide.png"),  # 16 bits
        (RAMP.astype(np.uint16) * 257, None, "wide.tif"),
        ((RAMP.astype(np.uint16) * 257).astype(">u2"), None, "big-endian.tif"),
        (RAMP.astype(np.int32) * 257, None, "wide-32.tif"),
        (RAMP.astype(np.int32), None, "small-32.tif"),  # 8-bit values in 32 bits
        (RAMP, "P", "palette.png"),
        (RAMP, "P", "palette.gif"),
        (RAMP, "LA", "alpha.png"),
        (RAMP, "RGBA", "alpha.webp"),
        (RAMP, "RGB", "color.bmp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gray_values_survive_every_mode(
    array: np.ndarray, mode: str | None, name: str, tmp_path: Path
) -> None:
    image = Image.fromarray(array)
    options = {"lossless": True} if name.endswith("webp") else {}
    got = reread(tmp_path, image.convert(mode) if mode else image, name, **options)
    np.testing.assert_array_equal(got, GRAY)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = Image.fromarray(np.concatenate([COLORS, RAMP[..., None]], axis=2), "RGBA")
    np.testing.assert_array_equal(reread(tmp_path, rgba, "alpha.png"), COLORS)
    palette = Image.fromarray(RAMP).convert("P")
    got = reread(tmp_path, palette, "palette.png", transparency=3)
    np.testing.assert_array_equal(got, GRAY)


def test_cmyk(tmp_path: Path) -> None:
    for ink, want in (
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        got = reread(tmp_path, Image.new("CMYK", (8, 8), ink), "cmyk.jpg", quality=95)
        assert np.abs(got.astype(int) - want).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int, tmp_path: Path) -> None:
    """What a camera stores for an upright scene, per EXIF 2.3: row 0 and column 0 of the file."""
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = reread(tmp_path, Image.fromarray(np.ascontiguousarray(turned)), "turned.png", exif=exif)
    np.testing.assert_array_equal(got[..., 0], upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_tags_do_not_cost_the_picture() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GRAY).save(buffer, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\xff rubbish")
    np.testing.assert_array_equal(np.asarray(read_picture(buffer)), GRAY)


def test_large_photographs_are_read_and_bombs_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """12,000 x 9,000 pixels are 1.2 times Pillow's limit: here the limit is small instead."""
    buffer = io.BytesIO()
    Image.new("L", (120, 90), 7).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(buffer).size == (120, 90)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    with pytest.raises(Image.DecompressionBombError):
        read_picture(buffer)


@pytest.mark.parametrize("cut", [20, 60])
def test_truncated_pictures_are_refused(cut: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        buffer, "JPEG"
    )
    with pytest.raises(OSError, match=r"."):
        read_picture(io.BytesIO(buffer.getvalue()[:-cut]))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (4000, 1), (1, 4001), (3, 5000)])
def test_lines_become_squares(size: tuple[int, int], tmp_path: Path) -> None:
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    array = np.broadcast_to(ramp[:, None] if height > width else ramp[None], (height, width))
    pixels = reread(tmp_path, Image.fromarray(np.ascontiguousarray(array)), "line.png")
    assert pixels.shape == (height, width, 3)
    square = crop_square(Image.fromarray(pixels), 28).float()
    assert square.shape == (3, 28, 28)
    if max(size) > 100:
        assert abs(float(square.mean()) - 127.5) < 2  # the middle of the ramp


def test_only_long_pictures_are_cut() -> None:
    assert middle_strip(Image.new("L", (80, 10))).size == (80, 10)
    assert middle_strip(Image.new("L", (83, 10))).size == (81, 10)
    assert middle_strip(Image.new("L", (10, 90))).size == (10, 80)
    random = np.random.default_rng(1).integers(0, 256, (20, 400, 3), dtype=np.uint8)
    cut = crop_square(Image.fromarray(random), 20)
    np.testing.assert_array_equal(cut.permute(1, 2, 0), random[:, 190:210])


def test_label_maps_that_are_opened_as_photographs_are_said(tmp_path: Path) -> None:
    """Gray of class values and void; gray with anything brighter is nobody's label map."""
    labels = np.array([[0, 1, 20], [5, 255, 0]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    with pytest.warns(
        ResultWarning, match=r"labels\.png: its gray is below 32 of 255, as in a lab"
    ):
        assert to_pixels(tmp_path / "labels.png")[0].tolist() == labels.tolist()
    with pytest.warns(ResultWarning, match="image: its gray is below 32"):
        to_pixels(Image.fromarray(labels))
    for pixels in (labels * 0, np.where(labels == 5, 32, labels), (labels > 4) * 255):
        reread(tmp_path, Image.fromarray(pixels.astype(np.uint8)), "other.png")
    reread(tmp_path, Image.fromarray(labels).convert("RGB"), "night.png")


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_the_first_of_several_pictures_is_said(name: str, tmp_path: Path) -> None:
    first, *others = (Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    with pytest.warns(ResultWarning, match=f"{name}: holds several pictures; the first is taken"):
        pixels = to_pixels(tmp_path / name)
    assert (pixels.float().mean((1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 3
    first.save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        to_pixels(tmp_path / name)
