"""Benchmarks that are files: a folder of images, a folder of label maps, a class list."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from talk2dino.datasets.benchmarks.base import Benchmark, Sample
from talk2dino.datasets.benchmarks.classes import ClassList, read_classes, shipped_lists
from talk2dino.datasets.benchmarks.label_values import (
    LabelColors,
    LabelValues,
    class_colors,
    list_colors,
)
from talk2dino.datasets.benchmarks.pairs import Layout, check_pairs, check_size, find_pairs
from talk2dino.datasets.label_files import read_colors, read_values, say_palettes
from talk2dino.datasets.pictures import read_image
from talk2dino.errors import Advance, ConfigError, DataError
from talk2dino.files import user_path


@dataclass(kw_only=True)
class FolderBenchmark(Benchmark):
    """Images and label maps in folders, laid out as mmsegmentation expects its datasets.

    Attributes:
        images: folder of images.
        masks: folder of label maps.
        classes: names, file or shipped list, see `read_classes`.
        root: folder that the relative paths of images, masks, classes and split start from.
        image_suffix: end of an image's file name; None takes any picture.
        mask_suffix: end of a label map's file name, in place of the image's suffix.
        split: file that names the images to take, one per line, without suffix; None takes all.
        recursive: look into subfolders, the same ones in both folders.
        reduce_zero_label: stored 0 does not count and other values are one higher than in the
            class list.
        label_map: stored value to the value meant, applied before everything else; None refuses.
        palette: for colored label maps: a color per class, or `classes` for the class list's own.
        ignore_colors: colors that do not count, with a palette.
        max_pixels: an image with more is refused before the work starts.

    Raises:
        DataError: folders, split file or class list, see `find_pairs` and `read_classes`.
        ConfigError: settings that contradict each other.
    """

    images: str
    masks: str
    classes: Any
    root: str | None = None
    image_suffix: str | None = None
    mask_suffix: str = ".png"
    split: str | None = None
    recursive: bool = False
    reduce_zero_label: bool = False
    label_map: Mapping[int, int | None] | None = None
    palette: Any = None
    ignore_colors: Any = ()
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        self._classes = self._read_classes()
        super().__post_init__()
        self._labels = None if self.palette is not None else self._label_values()
        self._colors = None if self.palette is None else self._label_colors()
        self._pairs = find_pairs(self._layout(), self.limit)

    def _read_classes(self) -> ClassList:
        if not isinstance(self.classes, str):
            return read_classes(list(self.classes))
        shipped = set(self.classes.split("+")) <= set(shipped_lists())
        return read_classes(self.classes if shipped else self._path(self.classes))

    def _layout(self) -> Layout:
        return Layout(
            self._path(self.images),
            self._path(self.masks),
            self.image_suffix,
            self.mask_suffix,
            None if self.split is None else self._path(self.split),
            self.recursive,
        )

    def _path(self, path: str) -> Path:
        return user_path(self.root or "") / user_path(path)

    def _label_values(self) -> LabelValues:
        if self.ignore_colors:
            raise ConfigError("benchmark.ignore_colors: counts with benchmark.palette only")
        return LabelValues(self._classes, self.ignore_index, self.reduce_zero_label, self.label_map)

    def _label_colors(self) -> LabelColors:
        for key in ("reduce_zero_label", "label_map"):
            if getattr(self, key):
                raise ConfigError(
                    f"benchmark.{key}: changes label values, but with benchmark.palette colors "
                    "decide; remove one of the two"
                )
        if not len(self._classes.classes) <= self.ignore_index:
            raise ConfigError(
                f"benchmark.ignore_index={self.ignore_index} is also a class; use "
                f"{max(255, len(self._classes.classes))}"
            )
        return LabelColors(
            class_colors(self._classes, self.palette),
            list_colors(self.ignore_colors, "benchmark.ignore_colors"),
            self.ignore_index,
        )

    @property
    def class_list(self) -> ClassList:
        """The classes of the file or list."""
        return self._classes

    def __len__(self) -> int:
        return len(self._pairs)

    def check(self, advance: Advance = lambda done, total: None) -> None:
        """Compare the sizes of all images and label maps, see `check_pairs`.

        Masks of 0 and 255 only are refused where 255 is ignored: as good as always it stands for
        the second class. `label_map={255: 255}` says that it does not. Palettes that give a value
        several colors are said. Both are looked for in the first 16 label maps.

        Raises:
            DataError: as `check_pairs`, or such masks.
        """
        check_pairs(self._pairs, self.max_pixels, advance)
        if self._colors is not None:
            return
        some = [pair.mask for pair in self._pairs[:16]]
        ignored = self.ignore_index
        found: set[int] = set()
        with suppress(DataError):  # said when its turn comes, after the images before it
            say_palettes(some)
        for path in some:
            with suppress(DataError):
                found |= set(np.unique(read_values(path)).tolist())
        if ignored in (self.label_map or {}):
            return
        if found == {ignored} and len(self._pairs) <= 16:
            raise DataError(
                f"benchmark.masks={self._layout().masks}: the label maps hold {ignored} only, "
                "which is ignored, so there is nothing to count; see benchmark.ignore_index"
            )
        if found == {0, 255} and ignored == 255:
            raise DataError(
                f"benchmark.masks={self._layout().masks}: the label maps hold 0 and 255 only, and "
                "255 is ignored; if it is the second class, say 'benchmark.label_map={255:1}', if "
                "it is really to be ignored, 'benchmark.label_map={255:255}'"
            )

    def image_name(self, index: int) -> str:
        """Path of the image's file below the folder, without suffix."""
        return self._pairs[index].name

    def sample(self, index: int) -> Sample:
        """Read a picture and its label map.

        Raises:
            DataError: unreadable, sizes differ, or a value or color that is no class.
        """
        pair = self._pairs[index]
        image, target = read_image(pair.image), self._target(pair.mask)
        rows, columns = target.shape
        check_size((rows, columns), (image.shape[1], image.shape[2]), pair)
        return Sample(pair.name, image, target)

    def _target(self, path: Path) -> Tensor:
        if self._colors is not None:
            return self._colors.targets(read_colors(path), str(path))
        assert self._labels is not None
        return self._labels.targets(read_values(path), str(path))
