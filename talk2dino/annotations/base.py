"""What is annotated: a picture's masks with class and score; and what a format does with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from talk2dino.errors import ConfigError, check_number

Mask: TypeAlias = npt.NDArray[np.uint8]
WRITTEN_BY = "talk2dino"
# Half a UTF-16 pair is how Python shows a byte that is no UTF-8; XML has none of the others.
_NO_TEXT = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_file_name(name: str, key: str) -> None:
    """Refuse a picture's name that no address and no XML can hold.

    Args:
        name: in a data set.
        key: that named the picture, for the message.

    Raises:
        ConfigError: bytes that are no UTF-8, or control characters.
    """
    if found := _NO_TEXT.search(name):
        raise ConfigError(
            f"{key}={name!r:.200}: {found[0]!r} is no character of a text; rename the picture"
        )


@dataclass(frozen=True)
class Options:
    """How annotations are cut out of a label map, and how formats write them.

    Attributes:
        instances: an annotation per connected area (pixels that touch at a corner are connected),
            not one per class.
        minimum_area: pixels; smaller connected areas are left out, of masks per class, too.
        tolerance: pixels by which a polygon may stray from the outline, less where it would be
            read with an IoU below 0.98; 0 keeps every corner.
        polygons: COCO holds polygons in place of masks.
        image_root_url: Label Studio fetches `image_root_url` + name of the picture, which is
            quoted behind `http(s)://` and `/data/`.

    Raises:
        ConfigError: a negative area or tolerance, or a value of another type.
    """

    instances: bool = False
    minimum_area: int = 1
    tolerance: float = 0.75
    polygons: bool = False
    image_root_url: str = "/data/local-files/?d="

    def __post_init__(self) -> None:
        check_number("minimum_area", self.minimum_area, 0, 10**12)
        check_number("tolerance", self.tolerance, 0.0, 1e6)
        for key in ("instances", "polygons"):
            if not isinstance(value := getattr(self, key), (bool, np.bool_)):
                raise ConfigError(f"{key}={value!r:.60}: use true or false")
        if not isinstance(self.image_root_url, str):
            raise ConfigError(f"image_root_url={self.image_root_url!r:.60}: use a text")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options by name (ConfigError for a name that none has)."""
        names = [item.name for item in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"{name}: no such option; choose among {', '.join(names)}")
        return cls(**given)

    def refuse_idle(self, formats: Collection[str]) -> None:
        """Refuse a setting, not at its default, that no format takes (ConfigError)."""
        takers: dict[str, set[str]] = {  # others are for all formats
            "tolerance": {"yolo", "geojson", *(["coco"] if self.polygons else [])},
            "polygons": {"coco"},
            "image_root_url": {"labelstudio"},
        }
        for item in fields(self):
            value, for_ = getattr(self, item.name), takers.get(item.name, set(formats))
            if value == item.default or for_ & set(formats):
                continue
            shown = str(value).lower() if isinstance(value, bool) else value
            fix = f"formats='[{','.join([*formats, sorted(for_ or {'coco'})[0]])}]'"
            if item.name == "tolerance" and "coco" in formats:
                fix = "polygons=true"
            raise ConfigError(
                f"{item.name}={shown}: does nothing with formats=[{','.join(formats)}]; "
                f"add {fix} or leave {item.name} out"
            )

    @property
    def cut(self) -> dict[str, Any]:
        """What decides the masks; the rest decides how they are written."""
        return {"instances": self.instances, "minimum_area": self.minimum_area}


@dataclass(frozen=True)
class Category:
    """A class: its name, the words that stood for it, and its color (RGB 0..255)."""

    name: str
    synonyms: tuple[str, ...]
    color: tuple[int, int, int]

    @property
    def hex_color(self) -> str:
        """`#rrggbb`."""
        return "#{:02x}{:02x}{:02x}".format(*self.color)


@dataclass(frozen=True)
class Annotation:
    """One mask.

    Attributes:
        category: index into the categories.
        counts: run lengths as COCO compresses them; columns first.
        score: mean score of its pixels.
    """

    category: int
    counts: str
    score: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"class": self.category, "score": self.score, "counts": self.counts}


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and its masks.

    Attributes:
        file_name: as a data set names it, with `/` between folders.
        height: in pixels.
        width: in pixels.
        annotations: masks that do not overlap.
        path: the file, or None.
    """

    file_name: str
    height: int
    width: int
    annotations: Sequence[Annotation]
    path: Path | None = None

    def rle(self, annotation: Annotation) -> dict[str, Any]:
        """What pycocotools takes for a mask."""
        return {"size": [self.height, self.width], "counts": annotation.counts}

    def area(self, annotation: Annotation) -> int:
        """Pixels of a mask."""
        from pycocotools import mask

        return int(mask.area(self.rle(annotation)))

    def box(self, annotation: Annotation) -> tuple[int, int, int, int]:
        """Left, top, width and height of a mask, in pixels."""
        from pycocotools import mask

        left, top, width, height = (int(one) for one in mask.toBbox(self.rle(annotation)))
        return left, top, width, height

    def mask(self, annotation: Annotation) -> Mask:
        """`[H, W]` of 0 and 1."""
        from pycocotools import mask

        decoded: Mask = mask.decode(self.rle(annotation))
        return decoded

    def cropped(self, annotation: Annotation) -> tuple[Mask, tuple[int, int]]:
        """The mask within its box, C order, and the box's left and top."""
        left, top, width, height = self.box(annotation)
        part = self.mask(annotation)[top : top + height, left : left + width]
        return np.ascontiguousarray(part), (left, top)


class Writer(Protocol):
    """A format: fills an empty folder with one data set, picture by picture."""

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Begin in an empty folder."""

    def add(self, picture: AnnotatedPicture) -> None:
        """Take the next picture."""

    def close(self) -> None:
        """Finish all files; not called after an error."""


def annotate(
    labels: npt.NDArray[np.int64],
    classes: Mapping[int, int],
    scores: Callable[[int], npt.NDArray[np.float32]],
    options: Options,
) -> list[Annotation]:
    """Cut a label map into annotations, in the order of `classes`, then of size.

    Args:
        labels: `[H, W]`.
        classes: category of each label; pixels of other labels get no annotation.
        scores: `[H, W]` of a category.
        options: instances and smallest area.
    """
    found = []
    for label, category in classes.items():
        inside = labels == label
        if options.minimum_area > 1 and not options.instances:
            inside = _large(inside, options.minimum_area)
        if not inside.any():
            continue
        parts = _connected(inside) if options.instances else inside.astype(np.int32)
        values = parts[inside]
        areas = np.bincount(values)
        means = np.bincount(values, weights=scores(category)[inside]) / np.maximum(areas, 1)
        runs = _compressed(parts)
        for part in sorted(runs, key=lambda one: -areas[one]):
            if areas[part] >= options.minimum_area:
                found.append(Annotation(category, runs[part], round(float(means[part]), 6)))
    return found


def _connected(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """`[H, W]`: 0 outside, 1 … n in each connected area."""
    import cv2

    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    return parts  # type: ignore[no-any-return]


def _large(mask: npt.NDArray[np.bool_], least: int) -> npt.NDArray[np.bool_]:
    """A mask without its connected areas of fewer pixels."""
    parts = _connected(mask)
    large = np.bincount(parts.ravel()) >= least
    return mask & large[parts]


def _compressed(parts: npt.NDArray[np.int32]) -> dict[int, str]:
    """Compressed run lengths of every part 1 … n, all from one pass over the pixels."""
    from pycocotools import mask

    height, width = parts.shape
    flat = parts.ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    bounds = np.flatnonzero(np.diff(values[order], prepend=-1))
    compressed = {}
    for chosen in np.split(order, bounds[1:]):
        if values[chosen[0]] == 0:
            continue
        edges = np.stack([starts[chosen], ends[chosen]], 1).ravel()
        counts = np.diff(edges, prepend=0, append=flat.size)
        plain = {"size": [height, width], "counts": counts.tolist()}
        compressed[int(values[chosen[0]])] = mask.frPyObjects(plain, height, width)[
            "counts"
        ].decode("ascii")
    return compressed
