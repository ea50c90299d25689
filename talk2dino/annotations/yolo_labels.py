"""YOLO segmentation: a text file per picture in `labels`, the pictures in `images`, `data.yaml`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import yaml  # type: ignore[import-untyped]

from talk2dino.annotations.base import AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.outlines import rings

# Points lie a quarter of a pixel beyond its corner: readers that round and those that cut off
# decimals find the same pixel.
WITHIN = 0.25


class YoloLabels:
    """Writes a line per connected area, as the format has no class in several pieces.

    Args:
        options: `tolerance`. Holes are joined to the outline by a line that is walked twice.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Write the names of the classes."""
        self.folder = folder
        content = {
            "train": "images",
            "val": "images",
            "names": {number: one.name for number, one in enumerate(categories)},
        }
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        (folder / "data.yaml").write_text(text, encoding="utf-8")
        (folder / "labels").mkdir()
        (folder / "images").mkdir()

    def add(self, picture: AnnotatedPicture) -> None:
        """Write its file, and link the picture: trainers look for both side by side."""
        name = named(picture.file_name)
        target = self.folder / "labels" / name.with_suffix(".txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for one in picture.annotations for line in self._lines(picture, one)]
        target.write_text("".join(lines), encoding="ascii")
        if picture.path is not None:
            linked = self.folder / "images" / name
            linked.parent.mkdir(parents=True, exist_ok=True)
            try:
                linked.symlink_to(picture.path.resolve())
            except OSError:  # a file system without links
                shutil.copyfile(picture.path, linked)

    def _lines(self, picture: AnnotatedPicture, annotation: Annotation) -> list[str]:
        mask, corner = picture.cropped(annotation)
        lines = []
        for ring in rings(mask, self.options.tolerance):
            points = np.resize(ring, (max(len(ring), 3), 2))  # a pixel alone is a triangle, too
            places = (points + corner + WITHIN) / (picture.width, picture.height)
            numbers = " ".join(f"{place:.6f}" for place in places.ravel())
            lines.append(f"{annotation.category} {numbers}\n")
        return lines

    def close(self) -> None:
        """Nothing is left to write."""


def named(file_name: str) -> PurePosixPath:
    """A picture's name in this data set: its folder `images` is `images_`, `images_` `images__`.

    Ultralytics finds a label by putting `labels` for the last folder called `images`, which has to
    be the data set's own.
    """
    *folders, last = PurePosixPath(file_name).parts
    return PurePosixPath(*(re.sub("^images_*$", r"\g<0>_", one) for one in folders), last)
