"""A label map's polygons as GeoJSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talk2dino.errors import Advance
from talk2dino.files import replacing
from talk2dino.maps.ground import reading
from talk2dino.maps.map_files import SOFTWARE

AREA = 8192  # pixels, side of what polygons are traced in


def write_polygons(
    source: Path, target: Path, minimum_area: int, background: bool, advance: Advance
) -> int:
    """Trace a label map into GeoJSON, in longitude and latitude; without georeference in pixels.

    Polygons follow the edges of pixels. Larger maps are traced in squares of 8192 pixels, at whose
    edges polygons end, so that memory stays flat.

    Args:
        source: a file of `write_labels`.
        target: is replaced.
        minimum_area: pixels; smaller polygons are left out.
        background: the first class is what no other fits, and is left out.
        advance: told of squares done, and of all.

    Returns:
        How many polygons were written.
    """
    import rasterio
    from rasterio.features import shapes
    from rasterio.windows import Window

    written = 0
    head = json.dumps({"type": "FeatureCollection", "written_by": SOFTWARE})
    with (
        replacing(target) as temporary,
        reading(source),
        warnings.catch_warnings(),
        temporary.open("w", encoding="utf-8") as out,
    ):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(source) as file:
            classes = json.loads(file.tags()["classes"])
            out.write(f'{head[:-1]}, "features": [')
            corners = [
                (top, left)
                for top in range(0, file.height, AREA)
                for left in range(0, file.width, AREA)
            ]
            for number, (top, left) in enumerate(corners):
                size = (min(AREA, file.width - left), min(AREA, file.height - top))
                labels = file.read(1, window=Window(left, top, *size))
                shown, corner = labels != file.nodata, np.array([left, top])
                if background:
                    shown &= labels != 0
                for shape, label in shapes(labels, mask=shown):
                    rings = [np.array(ring) for ring in shape["coordinates"]]
                    pixels = _pixels(rings)
                    if pixels < minimum_area:
                        continue
                    feature = {
                        "type": "Feature",
                        "id": written,
                        "geometry": {
                            "type": "Polygon",
                            "coordinates": _placed(file, [ring + corner for ring in rings]),
                        },
                        "properties": {"class": classes[int(label)], "pixels": pixels},
                    }
                    out.write(f"{',' if written else ''}\n{json.dumps(feature)}")
                    written += 1
                advance(number + 1, len(corners))
            out.write("\n]}\n")
    return written


def _pixels(rings: Sequence[npt.NDArray[Any]]) -> int:
    """Area of a polygon with holes (shoelace formula)."""
    areas = [
        abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
        for x, y in (ring[:-1].T for ring in rings)
    ]
    return round(areas[0] - sum(areas[1:]))


def _placed(file: Any, rings: Sequence[npt.NDArray[Any]]) -> list[list[list[float]]]:
    """Longitude and latitude of rings in pixels `[N, 2]`; pixels without georeference.

    Longitudes begin within -180..180; across the antimeridian they go on beyond, without a jump.
    """
    from rasterio.warp import transform

    if file.crs is None:
        return [ring.astype(float).tolist() for ring in rings]
    xs, ys = np.concatenate(rings).T
    there = file.transform
    xs, ys = transform(file.crs, "EPSG:4326", there.a * xs + there.c, there.e * ys + there.f)
    east = np.unwrap(xs, period=360)
    points = np.stack([east - 360 * np.round(east[0] / 360), ys], 1).round(8)
    return [part.tolist() for part in np.split(points, np.cumsum([len(r) for r in rings])[:-1])]
