"""What a map becomes: a GeoTIFF of labels in the same place, and its polygons as GeoJSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import talk2dino
from talk2dino.errors import Advance, WriteError
from talk2dino.files import replacing
from talk2dino.maps.geotiff import MapImage, reading
from talk2dino.segmentation.overlay import ignored_label, legend_colors

Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

SOFTWARE = "talk2dino.map"
TILE = 512  # pixels, of the label map
CHUNK = 4 * TILE  # side of what is written at once
AREA = 16 * TILE  # side of what polygons are traced in


def written_here(path: Path) -> bool:
    """Whether a file is a label map, or polygons, of this command."""
    import rasterio

    if path.suffix.lower() == ".geojson":
        with path.open("rb") as file:
            return f'"written_by": "{SOFTWARE}'.encode() in file.read(200)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                return str(file.tags().get("TIFFTAG_SOFTWARE", "")).startswith(SOFTWARE)
    except rasterio.errors.RasterioError:
        return False


def write_labels(
    target: Path,
    image: MapImage,
    classes: Sequence[str],
    labels: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Labels],
    advance: Advance,
) -> npt.NDArray[np.int64]:
    """Write a tiled GeoTIFF with the file's size and georeference.

    Pixels without data get the label that `ignored_label` names, which is the file's nodata value.

    Args:
        target: is replaced.
        image: the picture.
        classes: of the K labels; they become the tag `classes` (JSON) and, of 255 or fewer, colors.
        labels: from rows and columns of the grid, from 0, to their labels `[h, w]`.
        advance: told of chunks done, and of all.

    Returns:
        Pixels of each class, `[K]`.
    """
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    height, width = image.size
    nodata = ignored_label(len(classes))
    counts = np.zeros(len(classes), np.int64)
    dtype = "uint8" if nodata == 255 else "uint16"
    tops, lefts = range(0, height, CHUNK), range(0, width, CHUNK)
    profile = {
        **{"driver": "GTiff", "count": 1, "dtype": dtype, "nodata": nodata, "tiled": True},
        **{"blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "BIGTIFF": "IF_SAFER"},
        **image.profile(),
    }
    writing = reading(target, WriteError, "written")
    with replacing(target) as temporary, writing, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(temporary, "w", **profile) as file:
            file.update_tags(
                TIFFTAG_SOFTWARE=f"{SOFTWARE} {talk2dino.__version__}",
                classes=json.dumps(list(classes)),
            )
            if nodata == 255:
                colors = {n: (*color, 255) for n, color in enumerate(legend_colors(classes))}
                file.write_colormap(1, {**colors, nodata: (0, 0, 0, 0)})
            for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
                bottom, right = min(top + CHUNK, height), min(left + CHUNK, width)
                window = Window(left, top, right - left, bottom - top)
                part = labels(image.cells(0, top, bottom), image.cells(1, left, right))
                counts += np.bincount(part[image.valid(window)], minlength=len(classes))
                part = np.where(image.valid(window), part, nodata).astype(dtype)
                file.write(part, 1, window=window)
                advance(number + 1, len(tops) * len(lefts))
        levels = [2**n for n in range(1, 8) if max(height, width) > TILE * 2 ** (n - 1)]
        if levels:
            with rasterio.open(temporary, "r+") as file:
                file.build_overviews(levels, Resampling.nearest)
        if not np.array_equal(_counted(temporary, nodata), counts):
            raise WriteError(f"{target}: not written whole; free some space and start again")
    return counts


def _counted(path: Path, nodata: int) -> npt.NDArray[np.int64]:
    """Pixels of each class as a file holds them: GDAL does not say when the disk is full."""
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(path) as file:
        counts = np.zeros(nodata + 1, np.int64)
        for top in range(0, file.height, CHUNK):
            for left in range(0, file.width, CHUNK):
                part = file.read(1, window=Window(left, top, CHUNK, CHUNK))
                counts += np.bincount(part.ravel(), minlength=nodata + 1)
        classes = json.loads(file.tags().get("classes", "[]"))
        return counts[: len(classes)]


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
