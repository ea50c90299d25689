"""Miniature datasets in the layouts of the eight benchmarks, written from the meaning of pixels.

`write_layout` draws what every pixel means (a class of the benchmark, or nothing that counts) and
stores it the way the dataset does; nothing of the package takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IGNORED = 255
VOC_PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128] + [7] * 753
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
COCO_HOLES = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCO_THINGS = [value for value in range(90) if value not in COCO_HOLES]


@dataclass(frozen=True)
class Layout:
    """A benchmark as the goldens describe it, and where its files lie."""

    golden: str  # key in classes.json
    images: str
    masks: str
    image_suffix: str
    mask_suffix: str
    split: str | None = None
    cleaning: bool = False


LAYOUTS = {
    "voc": Layout(
        "voc20", "JPEGImages", "SegmentationClass", ".jpg", ".png",
        "ImageSets/Segmentation/val.txt",
    ),
    "voc_bg": Layout(
        "voc21", "JPEGImages", "SegmentationClass", ".jpg", ".png",
        "ImageSets/Segmentation/val.txt", cleaning=True,
    ),
    "context": Layout(
        "context59", "JPEGImages", "SegmentationClassContext", ".jpg", ".png",
        "ImageSets/SegmentationContext/val.txt",
    ),
    "context_bg": Layout(
        "context60", "JPEGImages", "SegmentationClassContext", ".jpg", ".png",
        "ImageSets/SegmentationContext/val.txt",
    ),
    "stuff": Layout(
        "coco_stuff171", "images/val2017", "annotations/val2017", ".jpg", "_labelTrainIds.png"
    ),
    "coco_object": Layout(
        "coco_object81", "images/val2017", "annotations/val2017", ".jpg",
        "_instanceTrainIds.png", cleaning=True,
    ),
    "stuff_raw": Layout(
        "coco_stuff171", "images/val2017", "annotations/val2017", ".jpg", ".png"
    ),
    "coco_object_raw": Layout(
        "coco_object81", "images/val2017", "annotations/val2017", ".jpg", ".png", cleaning=True
    ),
    "cityscapes": Layout(
        "cityscapes19", "leftImg8bit/val", "gtFine/val", "_leftImg8bit.png",
        "_gtFine_labelTrainIds.png",
    ),
    "cityscapes_raw": Layout(
        "cityscapes19", "leftImg8bit/val", "gtFine/val", "_leftImg8bit.png",
        "_gtFine_labelIds.png",
    ),
    "ade": Layout("ade150", "images/validation", "annotations/validation", ".jpg", ".png"),
}  # fmt: skip
NAMES = {"cityscapes": ["bonn/a_1", "ulm/b_1"], "cityscapes_raw": ["bonn/a_1", "ulm/b_1"]}


def stored(name: str, meaning: NDArray[np.int64], random: np.random.Generator) -> Image.Image:
    """The label file that says `meaning`: class index, or `IGNORED`."""
    ignored = meaning == IGNORED
    if name in ("voc", "context", "ade"):  # 0 is what does not count, besides 255
        values = np.where(ignored, random.choice([0, 255], meaning.shape), meaning + 1)
    elif name == "cityscapes_raw":
        others = [0, 1, 4, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255]
        ids = np.array([*CITYSCAPES, *[0] * 237])
        values = np.where(ignored, random.choice(others, meaning.shape), ids[meaning])
    elif name == "stuff_raw":
        used = np.array([*COCO_THINGS, *range(91, 182), *[255] * 85])
        values = used[meaning]
    elif name.startswith("coco_object"):  # nothing is ignored, the rest is background
        things = np.array([0, *COCO_THINGS])
        rest = random.choice([91, 120, 181, 255], meaning.shape)
        values = np.where(meaning == 0, rest, things[np.where(ignored, 0, meaning)])
    else:
        values = meaning
    image = Image.fromarray(values.astype(np.uint8))
    if name.startswith("voc"):
        image.putpalette(VOC_PALETTE)
        assert image.mode == "P"
    return image


def write_layout(
    name: str, root: Path, colors: NDArray[np.float32], size: tuple[int, int] = (40, 56)
) -> dict[str, NDArray[np.int64]]:
    """Write two images; return what their pixels mean, by the name of the sample.

    Args:
        name: key of `LAYOUTS`.
        root: folder of the dataset.
        colors: [K, 3] in 0..255, a color for every class.
        size: rows and columns, multiples of 8.
    """
    layout, random = LAYOUTS[name], np.random.default_rng(len(name))
    names = NAMES.get(name, ["000001", "000002"])
    found = {}
    for path in names:
        blocks = random.integers(0, len(colors), (size[0] // 8, size[1] // 8))
        if not name.startswith("coco_object"):
            blocks[random.random(blocks.shape) < 0.15] = IGNORED
        meaning = blocks.repeat(8, 0).repeat(8, 1)
        shown = np.where(random.random(blocks.shape) < 0.25, 0, blocks).repeat(8, 0).repeat(8, 1)
        pixels = np.concatenate([colors, np.zeros((256 - len(colors), 3))])[shown]
        pixels = (pixels + random.integers(-9, 10, pixels.shape)).clip(0, 255)
        image = root / layout.images / f"{path}{layout.image_suffix}"
        mask = root / layout.masks / f"{path}{layout.mask_suffix}"
        if name == "coco_object":
            mask = mask.with_name(f"{path}.png")
        for file in (image, mask):
            file.parent.mkdir(parents=True, exist_ok=True)
        quality = {} if image.suffix == ".png" else {"quality": 95, "subsampling": 0}
        Image.fromarray(pixels.astype(np.uint8)).save(image, **quality)
        stored(name, meaning, random).save(mask)
        found[path] = meaning
    if name.endswith("_raw"):
        # a file besides the label map, as the downloads have them
        mask.with_name(f"{mask.stem}_color.png").write_text("")
    if layout.split:
        # an image besides the split, without label map: as in the real download
        Image.new("RGB", (9, 9)).save(root / layout.images / f"extra{layout.image_suffix}")
        split = root / layout.split
        split.parent.mkdir(parents=True)
        split.write_text("".join(f"{path}\n" for path in names))
    return found
