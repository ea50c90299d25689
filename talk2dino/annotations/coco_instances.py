"""COCO: `instances.json` with compressed run lengths or polygons; `score` and `synonyms` added."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from talk2dino.annotations.base import WRITTEN_BY, AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.outlines import outline, polygons


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
        described = coco_categories(categories)
        self.main = (folder / "instances.json").open("w", encoding="utf-8")
        self.aside = tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115
        head = {"info": {"description": "", "contributor": WRITTEN_BY}, "licenses": []}
        self.main.write(json.dumps(head | {"categories": described})[:-1] + ', "images": [')

    def add(self, picture: AnnotatedPicture) -> None:
        """Write the picture, and its annotations aside."""
        self.pictures += 1
        image = coco_image(picture, self.pictures)
        self.main.write(f"{',' if self.pictures > 1 else ''}\n{json.dumps(image)}")
        for annotation in picture.annotations:
            self.annotations += 1
            entry = coco_annotation(
                picture, annotation, self.annotations, self.pictures, self.options
            )
            self.aside.write(f"{',' if self.annotations > 1 else ''}\n{json.dumps(entry)}")

    def close(self) -> None:
        """Append the annotations."""
        with self.main, self.aside:
            self.main.write('\n], "annotations": [')
            self.aside.seek(0)
            shutil.copyfileobj(self.aside, self.main)
            self.main.write("\n]}\n")


def coco_categories(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """The entries of `categories`, numbered from 1."""
    return [
        {"id": number, "name": one.name, "supercategory": "", "synonyms": list(one.synonyms)}
        for number, one in enumerate(categories, 1)
    ]


def coco_image(picture: AnnotatedPicture, number: int) -> dict[str, Any]:
    """The entry of `images` with this id."""
    size = {"width": picture.width, "height": picture.height}
    return {"id": number, "file_name": picture.file_name, **size}


def coco_annotation(
    picture: AnnotatedPicture, annotation: Annotation, number: int, image: int, options: Options
) -> dict[str, Any]:
    """An entry of `annotations`.

    Args:
        picture: whose annotation it is.
        annotation: the mask.
        number: its id.
        image: id of the picture.
        options: `polygons` and their `tolerance`.
    """
    return {
        "id": number,
        "image_id": image,
        "category_id": annotation.category + 1,
        "segmentation": _segmentation(picture, annotation, options),
        "area": picture.area(annotation),
        "bbox": list(picture.box(annotation)),
        "iscrowd": 0,
        "score": annotation.score,
    }


def _segmentation(picture: AnnotatedPicture, annotation: Annotation, options: Options) -> Any:
    if not options.polygons:
        return picture.rle(annotation)
    mask, corner = picture.cropped(annotation)
    found = [outline(one) + corner for one in polygons(mask, options.tolerance)]
    return [ring.round(2).ravel().tolist() for ring in found]
