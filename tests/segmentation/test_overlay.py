"""Pictures: colours where they belong, a legend that tells the truth, label maps that survive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import read_classes
from talk2dino.datasets.benchmarks.label_values import LabelValues
from talk2dino.datasets.label_files import read_values
from talk2dino.errors import DataError
from talk2dino.segmentation.overlay import (
    HEAT,
    INK,
    PAPER,
    SWATCH,
    default_palette,
    heat_overlay,
    legend_colors,
    overlay,
    save_label_map,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def scene() -> tuple[Image.Image, Tensor]:
    """A grey picture, left half class 0, right half class 1, an ignored corner."""
    labels = torch.zeros(60, 80, dtype=torch.int64)
    labels[:, 40:] = 1
    labels[:10, :10] = 255
    return Image.new("RGB", (80, 60), (100, 100, 100)), labels


def test_colours_are_mixed_with_the_picture() -> None:
    image, labels = scene()
    picture = overlay(image, labels, ["a", "b"], [RED, BLUE], alpha=0.5, legend=False)
    assert picture.size == (80, 60) and picture.mode == "RGB"
    assert picture.getpixel((20, 30)) == (178, 50, 50)
    assert picture.getpixel((60, 30)) == (50, 50, 178)
    assert picture.getpixel((3, 3)) == (100, 100, 100)  # ignored
    assert picture.getpixel((39, 30)) > (200, 200, 200)  # outline
    assert image.getpixel((20, 30)) == (100, 100, 100)


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    labels = torch.randint(0, 3, (60, 80))
    whole = overlay(image, labels, ["a", "background", "c"])
    monkeypatch.setattr("talk2dino.segmentation.overlay.STRIP", 500)
    assert np.array_equal(overlay(image, labels, ["a", "background", "c"]), whole)


def test_no_opacity_is_the_picture() -> None:
    image, labels = scene()
    picture = overlay(image.convert("L"), labels, ["a", "b"], alpha=0.0, legend=False)
    assert np.array_equal(np.asarray(picture), np.asarray(image))


def test_legend_lists_what_appears() -> None:
    image, labels = scene()
    palette = [RED, BLUE, (0, 255, 0)]
    picture = overlay(image, labels, ["a", "b", "absent"], palette)
    strip = np.asarray(picture)[60:].reshape(-1, 3)
    assert picture.width >= 80 and picture.height > 60
    for colour, expected in ((RED, True), (BLUE, True), ((0, 255, 0), False), (PAPER, True)):
        assert (strip == colour).all(1).any() == expected
    alone = overlay(image, torch.zeros_like(labels), ["a", "b", "absent"], palette)
    assert alone.height < picture.height


def test_more_classes_take_more_columns_in_a_wide_picture() -> None:
    labels = torch.arange(12).repeat_interleave(100).repeat(20, 1)
    names = [f"c{i}" for i in range(12)]
    wide = overlay(Image.new("RGB", (1200, 20)), labels, names)
    narrow = overlay(Image.new("RGB", (20, 1200)), labels.T, names)
    assert wide.width == 1200 and wide.height - 20 < narrow.height - 1200


def test_background_stays_uncoloured_unless_a_palette_says_so() -> None:
    image, labels = scene()
    names = ["background", "cat"]
    picture = overlay(image, labels, names)
    left = (picture.width - 80) // 2
    assert picture.getpixel((left + 20, 30)) == (100, 100, 100)
    assert (np.asarray(picture)[60:].reshape(-1, 3) == SWATCH).all(1).any()
    assert overlay(image, labels, names, [RED, BLUE], legend=False).getpixel((20, 30)) != (
        100,
        100,
        100,
    )


def test_the_colours_of_the_legend_are_told() -> None:
    """What tables and JSON show is what the picture shows."""
    image, labels = scene()
    names = ["background", "cat"]
    strip = np.asarray(overlay(image, labels, names))[60:].reshape(-1, 3)
    for colour in legend_colors(names):
        assert (strip == colour).all(1).any()
    assert legend_colors(["a", "b"], [RED, BLUE]) == [RED, BLUE]


def test_the_legend_reads_on_any_picture() -> None:
    """Its own paper: the strip is the same below a black, a white and a noisy picture."""
    labels = scene()[1]
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    pictures = [Image.new("RGB", (80, 60), c) for c in ("black", "white")] + [
        Image.fromarray(noise)
    ]
    strips = [np.asarray(overlay(p, labels, ["a", "b"]))[60:] for p in pictures]
    assert all(np.array_equal(strip, strips[0]) for strip in strips)
    light, dark = (_luminance(c) for c in (PAPER, INK))
    assert (light + 0.05) / (dark + 0.05) > 12  # WCAG asks 7 for small text


def _luminance(colour: tuple[int, int, int]) -> float:
    part = np.array(colour) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_heat_runs_from_dark_to_bright_between_its_limits() -> None:
    image = Image.new("RGB", (5, 1), (100, 100, 100))
    scores = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 9.0]])
    picture = heat_overlay(image, scores, 0.0, 1.0, alpha=1.0)
    colours = [picture.getpixel((x, 0)) for x in range(5)]
    assert colours == [HEAT[0], HEAT[0], HEAT[2], HEAT[4], HEAT[4]]
    assert heat_overlay(image, scores, 0.0, 1.0, alpha=0.0).getpixel((3, 0)) == (100, 100, 100)
    same = heat_overlay(image, torch.ones(1, 5), 1.0, 1.0, alpha=1.0)  # equal limits
    assert len({same.getpixel((x, 0)) for x in range(5)}) == 1


def test_all_ignored_needs_no_legend() -> None:
    image, labels = scene()
    assert overlay(image, torch.full_like(labels, 255), ["a"]).size == image.size


@pytest.mark.parametrize("count", [0, 1, 20, 171])
def test_palettes_are_distinct_and_grow_at_the_end(count: int) -> None:
    palette = default_palette(count)
    assert len(palette) == len(set(palette)) == count
    assert default_palette(200)[:count] == palette
    assert all(0 <= channel <= 255 for colour in palette for channel in colour)


def test_first_colours_are_far_apart() -> None:
    palette = np.array(default_palette(21))
    distance = np.abs(palette[:, None] - palette).sum(2) + 1000 * np.eye(21)
    assert distance.min() > 60


def test_label_map_file_holds_the_labels(tmp_path: Path) -> None:
    labels = torch.randint(0, 256, (13, 17))
    save_label_map(labels, tmp_path / "map.png", [RED, BLUE])
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels.numpy())
        assert picture.getpalette()[:6] == [*RED, *BLUE]
    save_label_map(labels, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.getpalette()[765:] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    """Sixteen bits, read back by the reader of benchmarks; class 255 is one like any other."""
    names = [f"class {k}" for k in range(300)]
    labels = torch.arange(300).view(15, 20)
    save_label_map(labels, tmp_path / "map.png", classes=300)
    assert np.array_equal(read_values(tmp_path / "map.png"), labels.numpy())
    save_label_map(labels.clamp(max=9), tmp_path / "few.png", classes=300)  # one form for all
    assert read_values(tmp_path / "few.png").max() == 9
    assert (tmp_path / "few.png").read_bytes()[24] == 16  # bits, in the header of a PNG
    values = LabelValues(read_classes(names), ignore_index=65535)
    assert torch.equal(values.targets(read_values(tmp_path / "map.png")), labels)
    gray = Image.new("RGB", (20, 15), (120, 120, 120))
    drawn = np.array(overlay(gray, labels, names, alpha=1.0, legend=False)).reshape(-1, 3)
    assert (drawn[255] != 120).any()
    shown = torch.full_like(labels, 7)
    shown[2:7, 2:7] = 65535
    hidden = np.array(overlay(gray, shown, names, alpha=0.5, legend=False))
    assert (hidden[4, 4] == 120).all() and (hidden[9, 9] != 120).any()
    assert overlay(gray, labels, names).height > 15 * 20  # a legend of three hundred entries


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: overlay(scene()[0], torch.zeros(2, 3), ["a"]), r"\(2, 3\).*60x80"),
        (lambda: overlay(*scene(), ["a"]), "0..1"),
        (lambda: heat_overlay(scene()[0], torch.zeros(2, 3), 0, 1), r"\(2, 3\).*60x80"),
        (lambda: overlay(scene()[0], scene()[1] - 1, ["a", "b"]), "-1"),
        (lambda: overlay(*scene(), ["a", "b"], [RED]), "palette of 1"),
        (lambda: save_label_map(torch.full((2, 2), 65536), "x.png"), "0..65535"),
        (lambda: save_label_map(torch.zeros(2, 2, 2), "x.png"), "x.png"),
    ],
)
def test_bad_input(action: Callable[[], object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        action()
