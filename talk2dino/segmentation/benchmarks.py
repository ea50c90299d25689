"""Benchmarks: images with label maps, and the whole protocol to score them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.errors import ConfigError, DataError
from talk2dino.features.mosaic import CONCEPTS, MosaicScenes
from talk2dino.features.pictures import upright_rgb
from talk2dino.features.sources import check_limit
from talk2dino.segmentation.classes import ClassList, ClassSpec, read_classes

VOCABULARIES = ("full", "present")


@dataclass(frozen=True)
class Sample:
    """One image of a benchmark.

    Attributes:
        name: unique in the benchmark, usable as a file name.
        image: [3, H, W] uint8 RGB.
        target: [H, W] int64, class index or the ignored value.
    """

    name: str
    image: Tensor
    target: Tensor


@dataclass(kw_only=True)
class Benchmark:
    """The protocol that all benchmarks share; subclasses give the images.

    Attributes:
        name: in reports.
        short_side: pixels of the short side before windows are cut.
        long_side: upper limit of the long side in pixels.
        window: side of a window in pixels.
        stride: distance of windows in pixels.
        input_size: the encoder sees every window at this size.
        ignore_index: label value that does not count.
        background_threshold: score of the background class, if the class list has one.
        background_cleaning: clean the scores by the attention maps.
        templates: prompt templates; None takes those that suit the text encoder.
        vocabulary: `full`, or `present` to offer each image only the classes it contains.
        reference: published mIoU to print beside one's own, by any key.
    """

    name: str
    short_side: int = 448
    long_side: int = 2048
    window: int = 448
    stride: int = 224
    input_size: int = 448
    ignore_index: int = 255
    background_threshold: float = 0.55
    background_cleaning: bool = False
    templates: str | None = None
    vocabulary: str = "full"
    reference: dict[str, float] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ConfigError(
                f"benchmark.vocabulary={self.vocabulary!r}; choose one of {', '.join(VOCABULARIES)}"
            )
        check_limit(self.limit, "benchmark.limit")

    @property
    def class_list(self) -> ClassList:
        """The classes in index order."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Read image and label map `index`.

        Raises:
            DataError: unreadable, sizes differ, or a label value that is no class.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class FolderBenchmark(Benchmark):
    """A folder of images, a folder of label PNGs with the same stems, and a class list.

    Attributes:
        images: folder of images.
        masks: folder of label maps; the pixel values are the classes' values.
        classes: file or names, see `read_classes`.
        root: folder that relative paths start from.

    Raises:
        DataError: a folder is missing or empty, an image has no label map, bad class list.
    """

    images: str
    masks: str
    classes: Any
    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self._folder(self.images, "images")
        masks = self._folder(self.masks, "masks")
        is_path = isinstance(self.classes, str)
        self._classes = read_classes(self._path(self.classes) if is_path else list(self.classes))
        found = sorted(
            path
            for path in images.iterdir()
            if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
        )[: self.limit]
        if not found:
            raise DataError(f"benchmark.images={images}: no images in this folder")
        self._pairs = [(path, masks / f"{path.stem}.png") for path in found]
        without = [image.name for image, mask in self._pairs if not mask.is_file()]
        if without:
            raise DataError(
                f"benchmark.masks={masks}: {len(without)} images have no label map, the first is "
                f"{without[0]}; add {Path(without[0]).stem}.png or move the image away"
            )
        self._table = _value_table(self._classes, self.ignore_index)

    def _path(self, path: str) -> Path:
        return Path(self.root or "", path).expanduser()

    def _folder(self, path: str, key: str) -> Path:
        folder = self._path(path)
        if not folder.is_dir():
            raise DataError(f"benchmark.{key}={folder}: no such folder")
        return folder

    @property
    def class_list(self) -> ClassList:
        """The classes of the file or list."""
        return self._classes

    def __len__(self) -> int:
        return len(self._pairs)

    def sample(self, index: int) -> Sample:
        """Read a picture and its label map."""
        image_path, mask_path = self._pairs[index]
        image = read_image(image_path)
        target = self._read_mask(mask_path)
        if image.shape[1:] != target.shape:
            raise DataError(
                f"{mask_path}: {tuple(target.shape)} rows and columns, its image "
                f"{image_path.name} has {tuple(image.shape[1:])}"
            )
        return Sample(image_path.stem, image, target)

    def _read_mask(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                if file.mode not in ("L", "P", "I", "I;16", "1"):
                    raise DataError(
                        f"{path}: a {file.mode} picture, not a label map; save the class values "
                        "as one 8-bit channel"
                    )
                values = np.asarray(file).astype(np.int64)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        inside = np.clip(values, 0, len(self._table) - 1)
        target = np.where(values == inside, self._table[inside], -1)
        if (target < 0).any():
            raise DataError(
                f"{path}: label value {int(values[target < 0][0])} is no class of "
                "benchmark.classes; add the class, or list it under unlabeled"
            )
        return torch.from_numpy(target)


def read_image(path: Path) -> Tensor:
    """Read a picture as [3, H, W] uint8 RGB, turned upright by its EXIF tag.

    Raises:
        DataError: not a picture, or truncated.
    """
    try:
        with Image.open(path) as file:
            pixels = np.array(upright_rgb(file))
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _value_table(classes: ClassList, ignore_index: int) -> np.ndarray:
    """From label value to class index; -1 where there is no class."""
    values = [spec.value for spec in classes.classes]
    if ignore_index in values or len(values) > ignore_index:
        raise ConfigError(
            f"benchmark.ignore_index={ignore_index} is also a class; choose a value above the "
            f"{len(values)} classes and none of their label values"
        )
    table = np.full(max(*values, *classes.unlabelled, ignore_index, 255) + 1, -1, np.int64)
    table[ignore_index] = ignore_index
    table[list(classes.unlabelled)] = ignore_index
    table[values] = np.arange(len(values))
    return table


@dataclass(kw_only=True)
class MosaicBenchmark(Benchmark):
    """Held-out mosaic scenes, see `talk2dino.features.mosaic`; label maps are exact.

    Attributes:
        count: number of scenes.
        height: of a scene in pixels.
        width: of a scene in pixels.
        seed: another seed gives other scenes.
    """

    count: int = 60
    height: int = 224
    width: int = 336
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = min(self.count, self.limit or self.count)
        self._scenes = MosaicScenes("heldout", number, self.height, self.width, seed=self.seed)

    @property
    def class_list(self) -> ClassList:
        """The concepts of the photographs."""
        return ClassList(
            tuple(ClassSpec(c.name, (c.name,), number) for number, c in enumerate(CONCEPTS))
        )

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, index: int) -> Sample:
        """Compose scene `index`."""
        scene = self._scenes[index]
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        return Sample(f"scene-{index:05d}", image, torch.from_numpy(scene.labels).long())


def present_classes(target: Tensor, ignore_index: int) -> Sequence[int]:
    """Class indices that occur in a label map, ascending."""
    return [int(value) for value in torch.unique(target) if int(value) != ignore_index]
