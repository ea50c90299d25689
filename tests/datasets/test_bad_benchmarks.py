"""Bad datasets: refused by name in one line, as early as it can be told, or read as they are."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.datasets.benchmarks.classes import read_classes
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.datasets.benchmarks.public_datasets import CityscapesBenchmark, CocoStuffBenchmark
from talk2dino.datasets.label_files import header, read_colors, read_values
from talk2dino.datasets.pictures import read_image
from talk2dino.errors import ResultWarning, UserError
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation import Segmenter
from tests.helpers.encoders import HashText, MeanColorEncoder, NamedColors, directions
from tests.helpers.pipeline import TRAIN, fails

CLASSES = ["background", "cat", "dog"]
EXIF_ORIENTATION = 0x0112


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images [24, 32] with label maps."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        pixels = random.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.jpg")
        labels = random.integers(0, 3, (24, 32)).astype(np.uint8)
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def build(root: Path, **options: Any) -> FolderBenchmark:
    settings: dict[str, Any] = {"name": "bad", "images": "images", "masks": "masks"}
    settings |= {"classes": CLASSES, "root": str(root)} | options
    made = FolderBenchmark(**settings)
    made.check()
    return made


def refused(message: str, act: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


def large_png(path: Path, width: int, height: int) -> None:
    """A grey PNG whose header says its size; the pixels are missing, for nobody should ask."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(width + 1)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))


# --- found before the work starts -----------------------------------------------------------------


def lone_image(root: Path) -> None:
    (root / "masks" / "1.png").unlink()


def lone_mask(root: Path) -> None:
    (root / "images" / "1.jpg").unlink()


def two_images_of_one_name(root: Path) -> None:
    Image.new("L", (32, 24)).save(root / "images" / "1.PNG", format="PNG")


def other_size(root: Path) -> None:
    Image.new("L", (33, 24)).save(root / "masks" / "1.png")


def rotated_image(root: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.open(root / "images" / "1.jpg").save(root / "images" / "1.jpg", exif=exif)


def dead_link(root: Path) -> None:
    (root / "images" / "1.jpg").unlink()
    (root / "images" / "1.jpg").symlink_to(root / "nowhere.jpg")


def no_picture(root: Path) -> None:
    (root / "images" / "1.jpg").write_text("text")


def jpeg_mask(root: Path) -> None:
    Image.open(root / "masks" / "1.png").save(root / "masks" / "1.png", format="JPEG")


def ignored_alone(root: Path) -> None:
    for number in range(3):
        Image.new("L", (32, 24), 255).save(root / "masks" / f"{number}.png")


def no_label_map(root: Path) -> None:
    (root / "masks" / "1.png").write_bytes(b"")


def huge_image(root: Path) -> None:
    for file in ("images/1.png", "masks/1.png"):
        large_png(root / file, 12000, 9000)
    (root / "images" / "1.jpg").unlink()


def monstrous_image(root: Path) -> None:
    for file in ("images/1.png", "masks/1.png"):
        large_png(root / file, 20000, 9000)
    (root / "images" / "1.jpg").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lone_image, r"masks: 1 images have no label map, the first is 1\.jpg; add 1\.png, move"),
        (lone_mask, r"images: 1 label maps have no image, the first is 1\.png; add the image"),
        (two_images_of_one_name, r"images: 1\.PNG and 1\.jpg share one label map; keep one"),
        (other_size, r"masks/1\.png: \(24, 33\) rows and columns, its image 1\.jpg has \(24, 32\)"),
        (rotated_image, r"1\.png: \(24, 32\) .* has \(32, 24\); it is turned upright by"),
        (dead_link, r"images/1\.jpg: cannot be read"),
        (no_picture, r"images/1\.jpg: cannot be read"),
        (jpeg_mask, r"masks/1\.png: JPEG changes values; save the label map as PNG"),
        (ignored_alone, r"masks: the label maps hold 255 only, which is ignored, so there is"),
        (no_label_map, r"masks/1\.png: cannot be read"),
        (
            huge_image,
            r"images/1\.png: 9000x12000 pixels, more than benchmark\.max_pixels=100000000",
        ),
        (monstrous_image, r"images/1\.png: more than 178956970 pixels, .*; scale the"),
    ],
)
def test_found_before_the_work(root: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(root)
    refused(message, lambda: build(root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"benchmark\.split=.*val\.txt: no such file"),
        (b"", r"val\.txt: is empty; name one image per line"),
        (b"\n \n", r"val\.txt: is empty"),
        (b"0\n7\n8\n", r"2 of its images are missing, the first is 7\.jpg; add it to .*images"),
        (b"0.jpg\n", r"the first is 0\.jpg\.jpg; .* names have no suffix"),
        (b"0\n1\n0\n", r"val\.txt: names 0 twice; keep one line"),
        (b"\xff\xfe0", r"val\.txt: not a text file"),
    ],
)
def test_split_files(root: Path, text: bytes | None, message: str) -> None:
    if text is not None:
        (root / "val.txt").write_bytes(text)
    refused(message, lambda: build(root, split="val.txt", image_suffix=".jpg"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "none"}, r"benchmark\.images=.*none: no such folder; .* benchmark\.root=DIR"),
        ({"masks": "none"}, r"benchmark\.masks=.*none: no such folder"),
        ({"image_suffix": ".png"}, r"benchmark\.images=.*: no file ends in \.png"),
        ({"short_side": 0}, r"benchmark\.short_side=0: use 1 or more pixels"),
        ({"stride": 500}, r"benchmark\.stride=500 leaves gaps between windows of 448"),
        ({"ignore_index": 1}, r"benchmark\.ignore_index=1 is also a class"),
        ({"ignore_index": -1}, r"benchmark\.ignore_index=-1 is also a class"),
        ({"label_map": {"a": 1}}, r"benchmark\.label_map holds 'a'; give whole numbers 0\.\.65535"),
        ({"label_map": {1: 70000}}, r"benchmark\.label_map holds 70000"),
        ({"palette": "classes"}, r"palette=classes: 3 classes have no color, the first is back"),
        ({"palette": [[0, 0, 0]]}, r"benchmark\.palette: 1 colors for 3 classes"),
        ({"palette": 5}, r"benchmark\.palette=5: give a list of colors"),
        ({"palette": [[0, 0, 0]] * 3}, r"the color \[0, 0, 0\] stands for two classes"),
        ({"palette": [[0, 0]] * 3}, r"palette: entry 0 is \[0, 0\]; give a color as \[r, g, b\]"),
        ({"palette": ["#12345"] * 3}, r"palette: entry 0 is '#12345'"),
        ({"ignore_colors": [[1, 2, 3]]}, r"ignore_colors: counts with benchmark\.palette only"),
        (
            {"palette": ["#000000", "#000001", "#000002"], "reduce_zero_label": True},
            r"benchmark\.reduce_zero_label: changes label values, but with benchmark\.palette",
        ),
        ({"classes": "voc+cats"}, r"classes=.*voc\+cats: no such file; .* comes with the package"),
        ({"classes": ["cat", "cat"]}, r"benchmark\.classes: two classes are called 'cat'"),
        ({"classes": ["cat", "background"]}, r"background is class 1; only the first class may be"),
        ({"classes": [{"name": "cat", "id": 1 << 20}]}, r"id is 1048576; give a label value"),
        ({"classes": [{"name": "cat", "id": True}]}, r"id is True"),
        (
            {"classes": [{"name": "cat", "synonyms": "kitten"}]},
            r"synonyms is 'kitten'; give a list",
        ),
        ({"classes": [{"name": "cat", "synonyms": [" "]}]}, r"a synonym is empty"),
        ({"classes": ["cat; #00"]}, r"color is '#00'; give a color"),
        ({"classes": [7]}, r"class 0 is 7; give it a name"),
    ],
)
def test_settings(root: Path, options: dict[str, Any], message: str) -> None:
    refused(message, lambda: build(root, **options))


def test_class_files_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("löwe\n".encode("latin-1"))
    refused(r"a\.txt: not a text file in UTF-8", lambda: read_classes(tmp_path / "a.txt"))


def test_checking_reports_its_progress(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(root).check(lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- found while reading --------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-90])


def foreign_label(root: Path) -> None:
    values = np.zeros((24, 32), np.uint8)
    values[0, :3] = (9, 7, 9)
    Image.fromarray(values).save(root / "masks" / "1.png")


def coloured_mask(root: Path) -> None:
    Image.new("RGB", (32, 24)).save(root / "masks" / "1.png")


def negative_label(root: Path) -> None:
    Image.fromarray(np.full((24, 32), -3, np.int32)).save(root / "masks" / "1.png", format="TIFF")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: truncate(root / "images" / "1.jpg"), r"images/1\.jpg: cannot be read as an"),
        (lambda root: truncate(root / "masks" / "1.png"), r"masks/1\.png: cannot be read"),
        (foreign_label, r"masks/1\.png: label value 7, 9 is no class of benchmark\.classes"),
        (coloured_mask, r"masks/1\.png: a RGB picture, not a label map; .* benchmark\.palette"),
        (negative_label, r"masks/1\.png: label value -3 is no class"),
    ],
)
def test_found_while_reading(root: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(root)
    bench = build(root)
    bench.sample(0)
    refused(message, lambda: bench.sample(1))


def test_a_foreign_colour(root: Path) -> None:
    for number in range(3):
        Image.new("RGB", (32, 24), (1, 2, 3)).save(root / "masks" / f"{number}.png")
    bench = build(root, palette=["#000000", "#000001", "#000002"])
    refused(r"0\.png: the color \[1, 2, 3\] is no class", lambda: bench.sample(0))


def test_foreign_ids_of_cityscapes(tmp_path: Path) -> None:
    for name, mode in (("images/a_leftImg8bit.png", "RGB"), ("masks/a_gtFine_labelIds.png", "L")):
        (tmp_path / name).parent.mkdir()
        Image.new(mode, (4, 4), 34 if mode == "L" else 0).save(tmp_path / name)
    bench = CityscapesBenchmark(
        name="cityscapes",
        root=str(tmp_path),
        images="images",
        masks="masks",
        classes="cityscapes",
        image_suffix="_leftImg8bit.png",
        mask_suffix="_gtFine_labelTrainIds.png",
    )
    refused(r"a_gtFine_labelIds\.png: label value 34 is no class", lambda: bench.sample(0))


def test_unused_ids_of_coco(tmp_path: Path) -> None:
    for name, mode in (("images/139.jpg", "RGB"), ("masks/139.png", "L")):
        (tmp_path / name).parent.mkdir()
        Image.new(mode, (4, 4), 11 if mode == "L" else 0).save(tmp_path / name)
    bench = CocoStuffBenchmark(
        name="stuff",
        root=str(tmp_path),
        images="images",
        masks="masks",
        classes="coco_things+coco_stuff",
        image_suffix=".jpg",
        mask_suffix="_labelTrainIds.png",
    )
    refused(r"139\.png: label value 11 is no class", lambda: bench.sample(0))


def test_the_command_says_it_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = SimpleNamespace(
        calibration=None,
        vision=MeanColorEncoder(),
        text=HashText(),
        projection=NamedColors(CLASSES[1:], directions(2)),
    )
    monkeypatch.setattr(Talk2DINO, "from_pretrained", lambda *_, **__: model)
    command = ["evaluate", "checkpoint=stub", "benchmark=custom", f"benchmark.root={root}"]
    command += ["benchmark.images=images", "benchmark.masks=masks", "num_workers=0", "pictures=0"]
    command += [f"benchmark.{k}=32" for k in ("short_side", "window", "stride", "input_size")]
    command += [f"benchmark.classes=[{','.join(CLASSES)}]", *TRAIN]
    other_size(root)
    folder = tmp_path / "run"
    line = fails(capfd, *command, f"hydra.run.dir={folder}")
    assert line.startswith(f"{root}/masks/1.png: (24, 33) rows and columns")
    line = fails(capfd, *command, "batch_size=0", f"hydra.run.dir={folder}")
    assert line == "batch_size=0: use 1 to 1000000"
    foreign_label(root)
    line = fails(capfd, *command, f"hydra.run.dir={folder}")
    assert line.startswith(f"{root}/masks/1.png: label value 7, 9 is no class")


# --- read as they are -----------------------------------------------------------------------------


def test_pictures_of_all_kinds_evaluate(root: Path) -> None:
    """16-bit, CMYK, grey, palette, transparent and turned images beside their label maps."""
    grey = (np.arange(24 * 32) % 256).astype(np.uint8).reshape(24, 32)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    kinds = {
        "wide.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "cmyk.jpg": Image.fromarray(grey).convert("CMYK"),
        "grey.png": Image.fromarray(grey),
        "bits.png": Image.new("1", (32, 24), 1),
        "palette.png": Image.fromarray(grey).convert("P"),
        "alpha.png": Image.new("RGBA", (32, 24), (1, 2, 3, 4)),
        "turned.jpg": Image.new("RGB", (24, 32)),
    }
    for name, image in kinds.items():
        image.save(root / "images" / name, **({"exif": exif} if name == "turned.jpg" else {}))
        Image.new("L", (32, 24), 1).save(root / "masks" / f"{name[:-4]}.png")
    bench = build(root)
    assert len(bench) == 10
    for index in range(len(bench)):
        sample = bench.sample(index)
        assert sample.image.shape == (3, 24, 32) and sample.image.dtype == torch.uint8
        assert sample.target.shape == (24, 32)


def test_label_files_of_all_depths(root: Path) -> None:
    values = np.asarray(Image.open(root / "masks" / "0.png"))
    want = build(root).sample(0).target
    palette = Image.fromarray(values)
    palette.putpalette([200, 0, 0, 0, 200, 0] * 128)  # colours that mean nothing
    for image in (
        palette,
        Image.fromarray(values.astype(np.uint16)),
        Image.fromarray(values.astype(np.int32)),
    ):
        # Pillow reads by content, and writes 32 bits as TIFF only
        image.save(root / "masks" / "0.png", format="TIFF")
        assert torch.equal(build(root).sample(0).target, want)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_very_thin_images_are_segmented(root: Path, size: tuple[int, int]) -> None:
    columns, rows = size
    Image.new("RGB", size, (255, 0, 0)).save(root / "images" / "0.jpg")
    Image.new("L", size, 1).save(root / "masks" / "0.png")
    sample = build(root).sample(0)
    segmenter = Segmenter(MeanColorEncoder(), window=448, stride=224, input_size=16)
    labels = segmenter(sample.image, torch.eye(3)).labels
    assert labels.shape == sample.target.shape == (rows, columns)
    assert (labels == 0).all()


def test_a_large_image_is_taken_when_allowed(root: Path) -> None:
    """Above Pillow's warning (89 million pixels), which would end a run under -W error."""
    for file in ("images/1.png", "masks/1.png"):
        large_png(root / file, 10000, 9000)
    (root / "images" / "1.jpg").unlink()
    assert header(root / "images" / "1.png").size == (9000, 10000)
    assert len(build(root)) == 3
    refused("more than benchmark.max_pixels=1000;", lambda: build(root, max_pixels=1000))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_overlooked(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert header(tmp_path / "a.jpg").size == (4, 6)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 6)


def test_images_that_are_turned_alone_are_said(root: Path) -> None:
    """Upside down, a size tells nothing of how the label map was drawn."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 3
    for name in ("0.jpg", "2.jpg"):
        Image.open(root / "images" / name).save(root / "images" / name, exif=exif)
    with pytest.warns(ResultWarning, match=r"turn 2 images and not their label maps, the first is"):
        build(root)


def palettes_that_differ(root: Path) -> None:
    """As programs write them that number the colors of each file anew."""
    for number, colors in enumerate(((0, 0, 0, 200, 0, 0), (200, 0, 0, 0, 0, 0))):
        picture = Image.open(root / "masks" / f"{number}.png")
        picture.putpalette([*colors, 0, 200, 0])
        picture.save(root / "masks" / f"{number}.png")


def images_below(root: Path) -> None:
    (root / "images" / "more").mkdir()
    Image.new("RGB", (32, 24)).save(root / "images" / "more" / "9.jpg")


def several_pages(root: Path) -> None:
    with Image.open(root / "masks" / "1.png") as page:
        page.save(root / "masks" / "1.png", "TIFF", save_all=True, append_images=[page])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            palettes_that_differ,
            r"0 is \[0, 0, 0\] in the palette of 0\.png and \[200, 0, 0\]",
        ),
        (
            images_below,
            r"more/9\.jpg and what else lies in subfolders is left out; bench",
        ),
        (several_pages, r"masks/1\.png: holds several pictures; the first is taken"),
    ],
)
def test_what_is_taken_and_said(root: Path, spoil: Callable[[Path], None], message: str) -> None:
    want = [build(root).sample(index).target for index in range(3)]
    spoil(root)
    with pytest.warns(ResultWarning, match=message):
        bench = build(root)
    assert len(bench) == 3
    for index, target in enumerate(want):
        assert torch.equal(bench.sample(index).target, target)


def test_names_that_differ_in_case_or_accents_are_pairs(root: Path) -> None:
    want = build(root).sample(1).target
    (root / "masks" / "1.png").rename(root / "masks" / "E\u0301.PNG")
    (root / "images" / "1.jpg").rename(root / "images" / "\u00e9.JPG")
    bench = build(root)
    assert [bench.image_name(index) for index in range(3)] == ["0", "2", "\u00e9"]
    assert torch.equal(bench.sample(2).target, want)
    Image.new("L", (32, 24)).save(root / "masks" / "E\u0301.png")  # two that it may be
    refused("1 images have no label map", lambda: build(root))


@pytest.mark.parametrize("first", ["Background", "__background__", "void"])
def test_a_first_class_that_may_be_the_background_is_said(first: str) -> None:
    with pytest.warns(ResultWarning, match=f"first class, '{first}', is looked for as a word"):
        read_classes([first, "cat"])


def test_label_files_are_turned_like_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # a quarter turn to the right makes it upright
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert header(tmp_path / "a.png").size == (6, 4)
    assert np.array_equal(read_values(tmp_path / "a.png"), np.rot90(stored, -1))
    for kind in ("png", "tif"):
        coloured = np.stack([stored] * 3, -1)
        Image.fromarray(coloured).save(tmp_path / f"b.{kind}", exif=exif)
        upright = np.rot90(coloured, -1)
        assert header(tmp_path / f"b.{kind}").size == (6, 4)
        assert np.array_equal(read_colors(tmp_path / f"b.{kind}"), upright)
        assert np.array_equal(read_image(tmp_path / f"b.{kind}").permute(1, 2, 0), upright)


def test_numbers_with_fractions_are_no_picture(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "a.tif")
    refused("a.tif: .*floating-point numbers; save it", lambda: read_image(tmp_path / "a.tif"))


def test_hidden_files_and_folders_are_no_images(root: Path) -> None:
    (root / "images" / "._1.jpg").write_bytes(b"")
    (root / "images" / "folder.jpg").mkdir()
    (root / "images" / "notes.pdf").write_bytes(b"")
    assert len(build(root)) == 3


def test_json_from_a_browser_keeps_its_line(root: Path) -> None:
    (root / "c.json").write_text(json.dumps({"classes": [{"name": "cat"}, {"name": " "}]}))
    refused(r"c\.json: class 1 is .*; give it a name", lambda: build(root, classes="c.json"))
