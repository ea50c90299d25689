"""Benchmarks that are files: a folder of images, a folder of label maps, a class list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
from talk2dino.datasets.pictures import (
    is_picture,
    is_there,
    is_turned,
    picture_size,
    read_colors,
    read_image,
    read_values,
    turned_alone,
)
from talk2dino.errors import ConfigError, DataError, say
from talk2dino.files import read_text, user_path


@dataclass(frozen=True)
class Pair:
    """An image and its label map; `name` is the image's path in its folder, without suffix."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """How a dataset's folders are laid out; see the attributes of `FolderBenchmark`."""

    images: Path
    masks: Path
    image_suffix: str | None = None
    mask_suffix: str = ".png"
    split: Path | None = None
    recursive: bool = False


def find_pairs(layout: Layout, limit: int | None = None) -> list[Pair]:
    """Every image with its label map, in the order of the split file or of the names.

    Args:
        layout: of the folders.
        limit: only the first ones.

    Raises:
        DataError: a folder or the split file is missing or empty, two images of one name, an
            image without label map, a label map without image (unless a split file chooses), or a
            split file that names a missing image.
    """
    for key, folder in (("images", layout.images), ("masks", layout.masks)):
        if not folder.is_dir():
            raise DataError(
                f"benchmark.{key}={folder}: no such folder; put or link the dataset there, or say "
                "where it is with benchmark.root=DIR (data/README.md shows the layouts)"
            )
    images = _listed(layout.images, layout.image_suffix, layout.recursive, "images")
    if layout.split is None:
        names = sorted(images)
        _check_masks_have_images(layout, images)
    else:
        names = _split_names(layout.split)
        _check_names_have_images(layout, names, images)
    names = names[:limit]
    masks = {name: layout.masks / f"{name}{layout.mask_suffix}" for name in names}
    without = [name for name in names if not masks[name].is_file()]
    if without:
        first, ending = without[0], layout.mask_suffix
        raise DataError(
            f"benchmark.masks={layout.masks}: {len(without)} images have no label map, the first "
            f"is {images[first].name}; add {first}{ending}, move the image away, or say how label "
            f"maps end (benchmark.mask_suffix={ending})"
        )
    return [Pair(name, images[name], masks[name]) for name in names]


def check_pairs(
    pairs: Sequence[Pair],
    max_pixels: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compare all sizes by the files' headers, some thousand files a second.

    Args:
        pairs: images and label maps.
        max_pixels: largest image allowed.
        advance: called with (pairs checked, pairs in all).

    Raises:
        DataError: a file is no picture, a label map has another size than its image, or an image
            is too large.
    """
    turned = []
    for done, pair in enumerate(pairs, 1):
        size = picture_size(pair.image)
        check_size(picture_size(pair.mask), size, pair)
        if size[0] * size[1] > max_pixels:
            raise DataError(
                f"{pair.image}: {size[0]}x{size[1]} pixels, more than benchmark.max_pixels="
                f"{max_pixels}; scale the image and its label map down, or raise that key (a "
                "pixel takes about 70 bytes of memory)"
            )
        if turned_alone(pair.image, pair.mask):
            turned.append(pair.image.name)
        advance(done, len(pairs))
    if turned:
        say(
            f"{pairs[0].image.parent}: EXIF tags turn {len(turned)} images and not their label "
            f"maps, the first is {turned[0]}; these are taken as drawn on the upright image"
        )


def check_size(mask: tuple[int, int], image: tuple[int, int], pair: Pair) -> None:
    """Refuse a label map of another size than its image; sizes are (rows, columns).

    Raises:
        DataError: they differ.
    """
    if mask == image:
        return
    turned = "; it is turned upright by an EXIF tag" if is_turned(pair.image) else ""
    raise DataError(
        f"{pair.mask}: {mask} rows and columns, its image {pair.image.name} has {image}{turned}; "
        "export the label map at the image's size"
    )


def _listed(folder: Path, suffix: str | None, recursive: bool, key: str) -> dict[str, Path]:
    """Files by their path below the folder without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if not (_has_suffix(path, suffix) if suffix else is_picture(path)):
            continue
        relative = path.relative_to(folder).as_posix()
        name = relative[: -len(suffix or path.suffix)]
        if name in found:
            raise DataError(
                f"benchmark.{key}={folder}: {found[name].name} and {path.name} share one label "
                "map; keep one, or set benchmark.image_suffix"
            )
        found[name] = path
    if not found:
        wanted = f"no file ends in {suffix}" if suffix else "no images in this folder"
        raise DataError(f"benchmark.{key}={folder}: {wanted}")
    return found


def _has_suffix(path: Path, suffix: str) -> bool:
    named = path.name.lower().endswith(suffix.lower()) and not path.name.startswith(".")
    return named and is_there(path)


def _split_names(split: Path) -> list[str]:
    if not split.is_file():
        raise DataError(f"benchmark.split={split}: no such file; it names the images to take")
    names = [line.strip() for line in read_text(split).splitlines() if line.strip()]
    if not names:
        raise DataError(f"benchmark.split={split}: is empty; name one image per line")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"benchmark.split={split}: names {twice} twice; keep one line")
    return names


def _check_names_have_images(layout: Layout, names: Iterable[str], images: dict[str, Path]) -> None:
    missing = [name for name in names if name not in images]
    if missing:
        first = f"{missing[0]}{layout.image_suffix or ''}"
        raise DataError(
            f"benchmark.split={layout.split}: {len(missing)} of its images are missing, the first "
            f"is {first}; add it to {layout.images} or remove the line; names have no suffix"
        )


def _check_masks_have_images(layout: Layout, images: dict[str, Path]) -> None:
    files = layout.masks.rglob("*") if layout.recursive else layout.masks.iterdir()
    ending = layout.mask_suffix
    names = (
        path.relative_to(layout.masks).as_posix()[: -len(ending)]
        for path in files
        if path.name.endswith(ending) and not path.name.startswith(".")
    )
    others = sorted(name for name in names if not _belongs(name, images))
    if others and layout.images != layout.masks:
        raise DataError(
            f"benchmark.images={layout.images}: {len(others)} label maps have no image, the first "
            f"is {others[0]}{ending}; add the image, move the label map away, or name the images "
            "to take in a file: benchmark.split=FILE"
        )


def _belongs(name: str, images: Container[str]) -> bool:
    """Whether a label file is an image's, or another file of it such as `X_color.png`."""
    while name not in images:
        name, underscore, _ = name.rpartition("_")
        if not underscore:
            return False
    return True


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

    def check(self, advance: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compare the sizes of all images and label maps, see `check_pairs`.

        Masks of 0 and 255 only are refused where 255 is ignored: as good as always it stands for
        the second class. `label_map={255: 255}` says that it does not.

        Raises:
            DataError: as `check_pairs`, or such masks.
        """
        check_pairs(self._pairs, self.max_pixels, advance)
        ignored = self.ignore_index
        if self._colors is not None or ignored != 255 or ignored in (self.label_map or {}):
            return
        found: set[int] = set()
        for pair in self._pairs[:16]:
            with suppress(DataError):  # said when its turn comes, after the images before it
                found |= set(np.unique(read_values(pair.mask)).tolist())
        if found == {0, 255}:
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
