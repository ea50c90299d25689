"""`SegmentedImage`: the result for one picture, as arrays, pictures and figures."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.annotations.base import (
    AnnotatedPicture,
    Annotation,
    Category,
    Options,
    annotate,
    check_file_name,
)
from talk2dino.annotations.data_sets import check_formats, write_data_sets
from talk2dino.datasets.benchmarks.classes import BACKGROUND, Color
from talk2dino.datasets.pictures import to_picture
from talk2dino.errors import ConfigError, check_number
from talk2dino.files import user_path
from talk2dino.segmentation.class_maps import ClassMaps
from talk2dino.segmentation.labels import label_map
from talk2dino.segmentation.overlay import (
    heat_overlay,
    ignored_label,
    legend_colors,
    overlay,
    save_label_map,
)
from talk2dino.segmentation.scores import resize_scores, score_at


@dataclass(frozen=True, eq=False)
class SegmentedImage:
    """A segmented picture.

    Attributes:
        labels: `[H, W]` int64, index into `classes`.
        classes: names; the first is "background" if there is a threshold, or negatives.
        image: `[3, H, W]` uint8, the picture.
        class_scores: `[K, h, w]` float32 at working size, without the background; scores are
            enlarged from it when asked for, since a large picture holds K times its pixels. More
            than a gigabyte is not held, either, but computed in blocks of classes.
        negative_scores: `[1, h, w]`, the best of the negatives, or None without negatives.
        threshold: score of the background, or None.
        synonyms: words that stood for each class, where they are known.
    """

    labels: Tensor = field(repr=False)
    classes: list[str]
    image: Tensor = field(repr=False)
    class_scores: ClassMaps = field(repr=False)
    negative_scores: Tensor | None = field(default=None, repr=False)
    threshold: float | None = None
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_scores(
        cls,
        image: Tensor,
        names: Sequence[str],
        class_scores: ClassMaps | Tensor,
        negative_scores: Tensor | None,
        threshold: float | None,
        synonyms: Mapping[str, tuple[str, ...]] = {},
    ) -> SegmentedImage:
        """The best class wins; where that is a negative or the threshold, it is background.

        Args:
            image: `[3, H, W]` uint8, the picture.
            names: of the K classes.
            class_scores: `[K, h, w]`.
            negative_scores: `[1, h, w]`, or None.
            threshold: score of the background, or None.
            synonyms: words that stood for each class.
        """
        back = threshold is not None or negative_scores is not None
        maps = ClassMaps.of(class_scores) if isinstance(class_scores, Tensor) else class_scores
        before = [] if negative_scores is None else [negative_scores]
        height, width = image.shape[-2:]
        labels = label_map(chain(before, maps.blocks()), height, width, threshold).cpu()
        if threshold is not None and negative_scores is not None:  # 0 and 1 are both background
            labels = (labels - 1).clamp_min_(0)
        return cls(
            labels,
            [BACKGROUND, *names] if back else list(names),
            image,
            maps.cpu(),
            None if negative_scores is None else negative_scores.cpu(),
            threshold,
            synonyms,
        )

    @cached_property
    def scores(self) -> Tensor:
        """`[N, H, W]` float32, a map per entry of `classes`; computed on first use.

        That of the background is the threshold, or the best negative where that is higher.
        """
        size = self.image.shape[-2:]
        full = resize_scores(self.class_scores[:], *size)
        if not self.has_background:
            return full
        floor = float("-inf") if self.threshold is None else self.threshold
        back = full.new_full((1, *size), floor)
        if self.negative_scores is not None:
            back = torch.maximum(back, resize_scores(self.negative_scores, *size))
        return torch.cat([back, full])

    @property
    def names(self) -> list[str]:
        """The classes that were asked for, without the background."""
        return self.classes[self.has_background :]

    @property
    def has_background(self) -> bool:
        """Whether the first class is what no other class fits; a word "background" is not."""
        return self.threshold is not None or self.negative_scores is not None

    def with_threshold(self, threshold: float | None) -> SegmentedImage:
        """The same scores with another background threshold, None for none; takes milliseconds.

        Cleaning by attention stays as it was when the picture was segmented.

        Raises:
            ConfigError: no number in 0..1, or a class is called background.
        """
        if threshold is not None:
            check_number("background", threshold, 0.0, 1.0)
            threshold = float(threshold)
            refuse_background(self.names)
        return self.from_scores(
            self.image,
            self.names,
            self.class_scores,
            self.negative_scores,
            threshold,
            self.synonyms,
        )

    def overlay(
        self,
        alpha: float = 0.55,
        legend: bool = True,
        palette: Sequence[Color] | None = None,
        hide: Sequence[str] = (),
    ) -> Image.Image:
        """The picture with the classes in color and a legend.

        Args:
            alpha: opacity of the colors, 0..1.
            legend: add the strip with names and shares.
            palette: one RGB triple 0..255 per entry of `classes`.
            hide: names of classes to leave uncolored; the others keep their colors.

        Raises:
            ConfigError: `hide` names no class of this picture, or `alpha` is no opacity.
        """
        check_number("alpha", alpha, 0.0, 1.0)
        labels = self.labels
        for name in [hide] if isinstance(hide, str) else hide:
            unseen = ignored_label(len(self.classes))
            labels = labels.masked_fill(self.labels == self.index(name), unseen)
        return overlay(to_picture(self.image), labels, self.classes, palette, alpha, legend)

    def heatmap(
        self, name: str, alpha: float = 0.6, limits: tuple[float, float] | None = None
    ) -> Image.Image:
        """The picture under the scores of one class, dark blue (low) to yellow (high).

        Args:
            name: one of `classes`.
            alpha: opacity of the colors, 0..1.
            limits: scores of the two ends; None takes the lowest and highest of all classes here,
                so that maps of one picture compare.

        Raises:
            ConfigError: no such class, or the background, which has no map of its own; `alpha`
                is no opacity.
        """
        check_number("alpha", alpha, 0.0, 1.0)
        index = self.index(name) - self.has_background
        if index < 0:
            raise ConfigError(f"heatmap={name!r}: the background has no map; name a class")
        low, high = limits or self.class_scores.limits
        one = resize_scores(self.class_scores[index : index + 1], *self.image.shape[-2:])[0]
        return heat_overlay(to_picture(self.image), one, low, high, alpha)

    def areas(self) -> dict[str, float]:
        """Share of the picture that each class holds, 0..1, in the order of `classes`."""
        counts = self.labels.flatten().bincount(minlength=len(self.classes)).double()
        return dict(zip(self.classes, (counts / self.labels.numel()).tolist(), strict=True))

    def scores_at(self, row: int, column: int) -> dict[str, float]:
        """Score of every class at one pixel.

        Raises:
            ConfigError: outside the picture, or no whole numbers.
        """
        height, width = self.labels.shape
        check_number("row", row, 0, height - 1)
        check_number("column", column, 0, width - 1)
        at = partial(score_at, row=row, column=column, height=height, width=width)
        values = list(map(at, self.class_scores.blocks()))
        if self.has_background:
            back = torch.tensor([float("-inf") if self.threshold is None else self.threshold])
            if self.negative_scores is not None:
                negative = score_at(self.negative_scores, row, column, height, width)
                back = torch.maximum(back, negative)
            values.insert(0, back)
        return dict(zip(self.classes, torch.cat(values).tolist(), strict=True))

    def save_labels(self, path: str | Path) -> None:
        """Write the labels as a PNG whose pixel values are the indices of `classes`.

        It is indexed, with colors; more than 255 classes make it one of 16 bits, without.

        Raises:
            ConfigError: a name that does not end in `.png`.
            WriteError: it cannot be written there.
        """
        if Path(path).suffix.lower() != ".png":
            raise ConfigError(f"labels={str(path)!r}: they are a PNG; give a name such as seg.png")
        save_label_map(self.labels, user_path(path), classes=len(self.classes))

    def annotations(self, options: Options | None = None) -> list[Annotation]:
        """The masks of the classes with their mean scores; the background is no annotation.

        Args:
            options: whether connected areas count one by one, and from which size.
        """
        first = int(self.has_background)
        size = self.image.shape[-2:]
        return annotate(
            self.labels.numpy(),
            {index + first: index for index in range(len(self.names))},
            lambda index: resize_scores(self.class_scores[index : index + 1], *size)[0].numpy(),
            options or Options(),
        )

    def save_annotations(
        self,
        folder: str | Path,
        formats: Sequence[str],
        file_name: str | Path = "image.png",
        **options: Any,
    ) -> list[Path]:
        """Write one data set of this picture per format.

        Args:
            folder: gets a folder for each format.
            formats: of `coco`, `yolo`, `labelstudio`, `cvat`, `geojson`.
            file_name: of the picture, as the data sets name it.
            **options: of `talk2dino.annotations.base.Options`.

        Returns:
            The folders.

        Raises:
            ConfigError: an unknown format or a wrong option, a library that is missing, or files
                in the way that were not written by this program.
        """
        chosen = Options.of(options)
        check_formats(formats)
        file_name = _named(file_name)
        picture, categories = self.annotated(file_name, chosen)
        return write_data_sets([picture], categories, user_path(folder), formats, chosen)

    def annotated(
        self, file_name: str = "image.png", options: Options | None = None
    ) -> tuple[AnnotatedPicture, list[Category]]:
        """The picture with its masks, and their categories, as the formats take them."""
        height, width = self.labels.shape
        colors = dict(zip(self.classes, legend_colors(self.classes), strict=True))
        categories = [Category(n, self.synonyms.get(n, (n,)), colors[n]) for n in self.names]
        return AnnotatedPicture(file_name, height, width, self.annotations(options)), categories

    def to_coco(self, file_name: str | Path = "image.png", **options: Any) -> dict[str, Any]:
        """A COCO data set of this picture; `polygons=True` in place of run lengths.

        Args and errors as in `save_annotations`.
        """
        return dict(json.loads(self._written("coco/instances.json", file_name, options)))

    def to_yolo(self, file_name: str | Path = "image.png", **options: Any) -> str:
        """The label file of this picture, a line per connected area: class and polygon."""
        _named(file_name)
        return self._written("yolo/labels/image.txt", "image.png", options)

    def to_labelstudio(self, file_name: str | Path = "image.png", **options: Any) -> dict[str, Any]:
        """A Label Studio task with brush masks as its prediction."""
        text = self._written("labelstudio/tasks.json", file_name, options)
        return dict(json.loads(text)[0])

    def to_cvat(self, file_name: str | Path = "image.png", **options: Any) -> str:
        """CVAT's XML for images, 1.1, with masks."""
        return self._written("cvat/annotations.xml", file_name, options)

    def to_geojson(self, file_name: str | Path = "image.png", **options: Any) -> dict[str, Any]:
        """A GeoJSON FeatureCollection of polygons in pixels, y downward."""
        text = self._written("geojson/annotations.geojson", file_name, options)
        return dict(json.loads(text))

    def _written(self, path: str, file_name: str | Path, options: Mapping[str, Any]) -> str:
        """The text of one file of `save_annotations`."""
        with TemporaryDirectory() as folder:
            self.save_annotations(folder, [path.partition("/")[0]], file_name, **options)
            return Path(folder, path).read_text(encoding="utf-8")

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = BytesIO()
        self.overlay().save(buffer, format="PNG")
        return buffer.getvalue()

    def index(self, name: str) -> int:
        """Index of a class name.

        Raises:
            ConfigError: no such class.
        """
        if name not in self.classes:
            raise ConfigError(f"class {name!r}: not segmented here; there are {self.classes}")
        return self.classes.index(name)


def _named(file_name: str | Path) -> str:
    """A picture's name in a data set, which lies below its folder (ConfigError)."""
    text = file_name.as_posix() if isinstance(file_name, PurePath) else file_name
    if not isinstance(text, str):
        raise ConfigError(f"file_name={text!r:.200}: give a text or a path, such as 'image.png'")
    check_file_name(text, "file_name")
    name = PurePosixPath(text)
    if not name.name or name.is_absolute() or ".." in name.parts:
        raise ConfigError(
            f"file_name={text!r:.200}: a data set names its pictures from its own folder; "
            f"give {name.name or 'image.png'!r}"
        )
    return text


BACKGROUND_SCORE = 0.55  # the original's for ViT-B (evaluation configs)


def refuse_background(names: Container[str]) -> None:
    """Refuse a class called background beside what is left over (ConfigError)."""
    if BACKGROUND in names:
        raise ConfigError(
            f"classes: {BACKGROUND!r} is also what is left over; leave out one of the two"
        )


def background_threshold(
    background: bool | float | None, default: float = BACKGROUND_SCORE
) -> float | None:
    """The threshold that an argument `background` stands for.

    Args:
        background: None or False for none, True for `default`, or the threshold itself.
        default: what a calibration chose, or the original's.

    Raises:
        ConfigError: outside 0..1, where every score lies, or no number.
    """
    if background is None or isinstance(background, (bool, np.bool_)):
        return default if background else None
    try:
        threshold = float(background)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"background={background}: give a score 0..1, or true") from error
    if not 0 <= threshold <= 1:
        raise ConfigError(f"background={background}: scores lie within 0..1; try 0.55")
    return threshold
