"""GeoJSON: polygons in pixels from the picture's upper left corner, y downward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from talk2dino.annotations.base import WRITTEN_BY, AnnotatedPicture, Category, Options
from talk2dino.annotations.outlines import polygons


class GeoJson:
    """Writes a feature per annotation, with holes, for pictures without a georeference.

    Args:
        options: `tolerance`.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.features = 0

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Begin the collection."""
        self.categories = categories
        self.file = (folder / "annotations.geojson").open("w", encoding="utf-8")
        head = {"type": "FeatureCollection", "written_by": WRITTEN_BY}
        self.file.write(json.dumps(head)[:-1] + ', "features": [')

    def add(self, picture: AnnotatedPicture) -> None:
        """Write its features."""
        from shapely import MultiPolygon, affinity, geometry

        for one in picture.annotations:
            mask, (left, top) = picture.cropped(one)
            found = polygons(mask, self.options.tolerance)
            shape = found[0] if len(found) == 1 else MultiPolygon(found)
            feature = {
                "type": "Feature",
                "id": self.features,
                "geometry": geometry.mapping(affinity.translate(shape, left, top)),
                "properties": {
                    "image": picture.file_name,
                    "class": self.categories[one.category].name,
                    "score": one.score,
                    "area": picture.area(one),
                },
            }
            self.file.write(f"{',' if self.features else ''}\n{json.dumps(feature)}")
            self.features += 1

    def close(self) -> None:
        """End the collection."""
        with self.file:
            self.file.write("\n]}\n")
