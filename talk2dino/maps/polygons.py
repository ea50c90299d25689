"""A label map's polygons as GeoJSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from talk2dino.errors import Advance, DataError
from talk2dino.files import replacing
from talk2dino.maps.ground import degrees, reading
from talk2dino.maps.map_files import SOFTWARE

Places: TypeAlias = npt.NDArray[Any]  # pixels or degrees, `[..., 2]`

AREA = 8192  # pixels, side of what polygons are traced in


def write_polygons(
    source: Path, target: Path, minimum_area: int, background: bool, advance: Advance
) -> int:
    """Trace a label map into GeoJSON, in longitude and latitude; without georeference in pixels.

    Polygons follow the edges of pixels to a quarter of one. Larger maps are traced in squares of
    8192 pixels, at whose edges polygons end, so that memory stays flat; they end at a pole, too.

    Args:
        source: a file of `write_labels`.
        target: is replaced.
        minimum_area: pixels; smaller polygons are left out, but none that a square's edge cuts.
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
            whole, poles = np.array([file.width, file.height]), _poles(file)
            squares = list(_squares(whole, poles))
            for number, (corner, end) in enumerate(squares):
                labels = file.read(1, window=Window(*corner, *(end - corner)))
                shown, step = labels != file.nodata, _step(file, corner, end)
                if background:
                    shown &= labels != 0
                for shape, label in shapes(labels, mask=shown):
                    rings = [np.array(ring) + corner for ring in shape["coordinates"]]
                    low, high = rings[0].min(0), rings[0].max(0)
                    cut = ((low == corner) & (corner > 0)) | ((high == end) & (end < whole))
                    pixels = _pixels(rings)
                    if pixels < minimum_area and not cut.any():
                        continue
                    feature = {
                        "type": "Feature",
                        "id": written,
                        "geometry": {
                            "type": "Polygon",
                            "coordinates": _placed(file, rings, step, bool(poles)),
                        },
                        "properties": {"class": classes[int(label)], "pixels": pixels},
                    }
                    out.write(f"{',' if written else ''}\n{json.dumps(feature)}")
                    written += 1
                advance(number + 1, len(squares))
            out.write("\n]}\n")
    return written


def _pixels(rings: Sequence[npt.NDArray[Any]]) -> int:
    """Area of a polygon with holes (shoelace formula)."""
    areas = [
        abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
        for x, y in (ring[:-1].T for ring in rings)
    ]
    return round(areas[0] - sum(areas[1:]))


def _poles(file: Any) -> list[Places]:
    """Where the poles lie in a file, in its pixels (x, y); one that is a line is left out."""
    from rasterio.warp import transform

    found = []
    for latitude in (90, -90) if file.crs is not None else ():
        with suppress(DataError), reading(Path(file.name)):  # outside the projection
            x, y = transform("EPSG:4326", file.crs, [0, 90, 180, 270], [latitude] * 4)
            at = file.transform
            places = np.array([np.subtract(x, at.c) / at.a, np.subtract(y, at.f) / at.e]).T
            inside = (places >= 0) & (places <= (file.width, file.height))
            if inside.all() and np.ptp(places, axis=0).max() < 1e-3:
                found.append(places[0])
    return found


def _squares(whole: Places, poles: Sequence[Places]) -> Iterator[tuple[Places, Places]]:
    """Squares that cover a map: where each begins and ends (x, y).

    A pole lies at the corner of four, or in a pixel at a corner. So none has a ring around it.
    """
    starts = [
        sorted({*range(0, whole[axis], AREA), *(int(pole[axis]) for pole in poles), whole[axis]})
        for axis in (0, 1)
    ]
    for (top, bottom), (left, right) in product(pairwise(starts[1]), pairwise(starts[0])):
        yield np.array([left, top]), np.array([right, bottom])


def _step(file: Any, corner: Places, end: Places) -> int:
    """How long an edge may be, in pixels, to stay on its pixels where degrees make it straight.

    Measured where it bends most of 9 x 9 places of a square. Longitudes change by at most 90 along
    it, so that they can be followed.
    """
    step, fits = AREA, file.crs is None
    while step > 1 and not fits:
        fits = True
        for axis in np.eye(2):
            edge = np.minimum(step, end - corner) * axis
            sides = [np.linspace(*ends, 9) for ends in zip(corner, end - edge, strict=True)]
            begins = np.stack(np.meshgrid(*sides), -1).reshape(-1, 1, 2)
            points = begins + edge * np.array([[0], [0.5], [1]])
            places = degrees(file, points.reshape(-1, 2)).reshape(2, -1, 3)
            halves = np.diff(places)
            halves[0] = (halves[0] + 180) % 360 - 180
            far = np.abs(halves[0]).max() > 45
            halves[0] *= np.cos(np.radians(places[1, :, 1:2]))
            bend = np.hypot(*(halves[..., 0] - halves[..., 1])) / 2
            pixel = np.hypot(*halves.sum(-1)) / edge.sum()
            fits &= bool((bend <= pixel / 5).all()) and not far
        if not fits:
            step //= 2
    return step


def _dense(ring: Places, step: int) -> Places:
    """A ring `[N, 2]` with no edge longer than `step`."""
    edges = np.diff(ring, axis=0)
    parts = np.ceil(np.abs(edges).sum(1) / step).astype(int)
    if parts.max() == 1:
        return ring
    share = np.concatenate([np.arange(n) / n for n in parts])[:, None]
    return np.concatenate([ring[:-1].repeat(parts, 0) + share * edges.repeat(parts, 0), ring[-1:]])


def _placed(
    file: Any, rings: Sequence[Places], step: int = AREA, poles: bool = False
) -> list[list[list[float]]]:
    """Longitude and latitude of rings in pixels `[N, 2]`; pixels without georeference.

    The middle of the outer ring lies within -180..180; across the antimeridian longitudes go on
    beyond, without a jump. A ring around a pole goes there and back along a meridian.

    Args:
        file: the label map.
        rings: the outer one, and holes; the last point of each is its first.
        step: the longest edge, of `_step`.
        poles: whether the file has any; a ring through one then passes just beside it.
    """
    if file.crs is None:
        return [ring.astype(float).tolist() for ring in rings]
    dense = [_dense(ring, step) for ring in rings]
    places = degrees(file, np.concatenate(dense) + (1e-4 if poles else 0))
    found: list[Places] = []
    for part in np.split(places, np.cumsum([len(ring) for ring in dense])[:-1], axis=1):
        east, north = np.unwrap(part[0], period=360), part[1]
        turn = east[-1] - east[0]
        if abs(turn) > 180:
            near = int(np.abs(north).argmax())
            east = np.concatenate([east[near:-1], east[: near + 1] + turn])
            north = np.concatenate([north[near:-1], north[: near + 1]])
            east = np.append(east, [east[-1], east[0], east[0]])
            north = np.append(north, [*[np.copysign(90, north[0])] * 2, north[0]])
        if not found:
            east -= 360 * np.round((east.min() + east.max()) / 720)
        else:  # into the outer ring
            east += 360 * np.ceil((found[0][:, 0].min() - east.min()) / 360 - 1e-6)
        found.append(np.stack([east, north.clip(-90, 90)], 1).round(8))
        found[-1][-1] = found[-1][0]
    return [ring.tolist() for ring in found]
