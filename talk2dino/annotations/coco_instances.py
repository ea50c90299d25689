"""COCO: `instances.json` with compressed run lengths or polygons; `score` and `synonyms` added."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talk2dino.annotations.base import WRITTEN_BY, AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.outlines import joined, polygons


class CocoInstances:
    """Writes pictures as they come and annotations beside, which are appended in the end.

    Args:
        options: `polygons` and their `tolerance`. A COCO polygon has no holes: each is joined to
            the outline by a line that is walked twice.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pictures = self.annotations = 0

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Write what comes before the pictures."""
        described = [
            {"id": number, "name": one.name, "supercategory": "", "synonyms": list(one.synonyms)}
            for number, one in enumerate(categories, 1)
        ]
        self.main = (folder / "instances.json").open("w", encoding="utf-8")
        self.aside = tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115
        head = {"info": {"description": "", "contributor": WRITTEN_BY}, "licenses": []}
        self.main.write(json.dumps(head | {"categories": described})[:-1] + ', "images": [')

    def add(self, picture: AnnotatedPicture) -> None:
        """Write the picture, and its annotations aside."""
        self.pictures += 1
        image = {"id": self.pictures, "file_name": picture.file_name}
        image |= {"width": picture.width, "height": picture.height}
        self.main.write(f"{',' if self.pictures > 1 else ''}\n{json.dumps(image)}")
        for annotation in picture.annotations:
            self.annotations += 1
            entry = {
                "id": self.annotations,
                "image_id": self.pictures,
                "category_id": annotation.category + 1,
                "segmentation": self._segmentation(picture, annotation),
                "area": picture.area(annotation),
                "bbox": list(picture.box(annotation)),
                "iscrowd": 0,
                "score": annotation.score,
            }
            self.aside.write(f"{',' if self.annotations > 1 else ''}\n{json.dumps(entry)}")

    def _segmentation(self, picture: AnnotatedPicture, annotation: Annotation) -> Any:
        if not self.options.polygons:
            return picture.rle(annotation)
        mask, corner = picture.cropped(annotation)
        found = []
        for one in polygons(mask, self.options.tolerance):
            outlines = [ring.coords[:-1] for ring in (one.exterior, *one.interiors)]
            shell, *holes = (np.asarray(ring) + corner for ring in outlines)
            found.append(joined(shell, holes).round(2).ravel().tolist())
        return found

    def close(self) -> None:
        """Append the annotations."""
        with self.main, self.aside:
            self.main.write('\n], "annotations": [')
            self.aside.seek(0)
            shutil.copyfileobj(self.aside, self.main)
            self.main.write("\n]}\n")
