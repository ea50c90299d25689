"""What a file says of the ground: where it lies, and how long its meters are there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from talk2dino.errors import DataError, UserError, say

if TYPE_CHECKING:
    Places = npt.NDArray[np.float64]

CACHE = 128  # megabytes of blocks that GDAL keeps; its own default grows with the machine
STRETCHED = 0.02  # of a length, from which on meters are said to be none of the ground
NEAR = 50  # meters, over which lengths are measured
RADIUS, FLAT = 6378137.0, 0.00669437999014  # of WGS 84: equator, and square of the eccentricity


@contextmanager
def reading(path: Path, kind: type[UserError] = DataError, how: str = "read") -> Iterator[None]:
    """A library's error as one line, with a block cache of bounded size.

    Args:
        path: for the line.
        kind: of the error.
        how: `written`, for a file that is.
    """
    import rasterio
    from rasterio._err import CPLE_BaseError  # what PROJ refuses

    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE):
            yield
    except (rasterio.errors.RasterioError, CPLE_BaseError) as error:
        line = " ".join(str(error.__cause__ or error).split())
        raise kind(f"{path}: cannot be {how} as a map ({line:.200})") from error


def open_map(path: Path) -> Any:
    """The file, open, if it is of a kind that can be segmented."""
    import rasterio

    name = f"image={path}"
    if not path.is_file():
        raise DataError(f"{name}: no such file; give a GeoTIFF or another picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        file = rasterio.open(path)
    transform = file.transform
    if file.gcps[0] or (transform.b, transform.d) != (0, 0):
        raise DataError(
            f"{name}: rotated, or placed by control points; warp it first: {_warp(file)}"
        )
    if file.rpcs is not None and transform.is_identity:
        raise DataError(
            f"{name}: placed by rational polynomials (RPC); warp it first: "
            f"gdalwarp -rpc -t_srs EPSG:… {path.name} north-up.tif"
        )
    if not transform.is_identity and (transform.a <= 0 or transform.e >= 0):
        raise DataError(f"{name}: north is not up; warp it first: {_warp(file)}")
    if file.crs is not None and file.crs.is_geographic and not transform.is_identity:
        west, south, east, north = file.bounds
        if not (-360 <= west < east <= 360 and -91 <= south < north <= 91):
            wrong = f"{west:.6g}, {south:.6g} are no degrees, as its coordinate system says"
            raise DataError(f"{name}: {wrong}; assign the right one: gdal_edit.py -a_srs EPSG:…")
    if file.count and len(file.subdatasets) > 1:
        say(f"{name}: holds {len(file.subdatasets)} pictures; the first is taken", stacklevel=2)
    if not file.count:
        raise DataError(
            f"{name}: holds several pictures or none; name one that gdal_translate cut out"
        )
    return file


def _warp(file: Any, crs: str | None = None) -> str:
    return f"rio warp {Path(file.name).name} north-up.tif --dst-crs {crs or file.crs or 'EPSG:…'}"


def unit_meters(file: Any, name: str) -> float:
    """Meters of the unit of a file's coordinates."""
    if file.crs is None or file.transform.is_identity:
        raise DataError(
            f"{name}: has no georeference, so meters_per_pixel means nothing; give "
            "scale=PIXELS, for instance scale=2 for half the resolution"
        )
    if file.crs.is_projected:
        unit = float(file.crs.linear_units_factor[1])
        sides = ground_sides(file)
        if sides is not None:
            meters = sides / (file.transform.a * unit, -file.transform.e * unit)
            if np.abs(meters - 1).max() > STRETCHED:
                ends = dict.fromkeys(f"{end:.2f}" for end in (meters.min(), meters.max()))
                said = f"meters_per_pixel=1 is {' to '.join(ends)} m in this file"
                crs = f"{file.crs.to_string():.40}"
                say(f"{name}: {crs} stretches the ground; {said}", stacklevel=2)
        return unit
    if not file.crs.is_geographic:
        raise DataError(f"{name}: coordinates are no plane's; reproject it, or give scale=PIXELS")
    raise DataError(
        f"{name}: its coordinates are degrees, not meters; reproject first: "
        f"{warp_to_meters(file)}; or give scale=PIXELS"
    )


def warp_to_meters(file: Any) -> str:
    """The command that makes the coordinates of a file in degrees meters."""
    west, south, east, north = file.bounds
    zone = min(max(int(((west + east) / 2 + 180) // 6) + 1, 1), 60)
    return _warp(file, f"EPSG:{(32700 if (south + north) / 2 < 0 else 32600) + zone}")


def pixel_area(file: Any) -> float | None:
    """Square meters of a pixel of an open file; None where they are unknown or differ within it."""
    if file.crs is None or file.transform.is_identity or not file.crs.is_projected:
        return None
    area = abs(float(file.transform.a * file.transform.e))
    area *= float(file.crs.linear_units_factor[1]) ** 2
    sides = ground_sides(file)
    if sides is None or np.abs(sides.prod(1) / area - 1).max() > 2 * STRETCHED:
        return None
    return area


def ground_sides(file: Any) -> Places | None:
    """Meters of a pixel's width and height on the ground: `[N, 2]`, first at the file's center.

    Then at its corners, where they lie on the earth. None: nowhere on it.
    """
    crs, there = file.crs, file.transform
    unit = float(crs.linear_units_factor[1]) if crs.is_projected else math.inf
    step = max(1.0, NEAR / (there.a * unit))  # shorter ones would measure PROJ's rounding
    size = np.array([file.width, file.height])
    centers = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]]) * size
    cross = np.array([[-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]]) * step
    for points in (centers[:, None] + cross, centers[:1, None] + cross):
        with suppress(DataError), reading(Path(file.name)):
            places = np.radians(degrees(file, points.reshape(-1, 2))).reshape(2, -1, 2, 2)
            moved = np.diff(places)[..., 0]
            moved[0] = (moved[0] + math.pi) % math.tau - math.pi
            sine = np.sin(places[1].mean(-1))
            bent = 1 - FLAT * sine**2
            east = moved[0] * np.sqrt((1 - sine**2) / bent)
            north = moved[1] * (1 - FLAT) / bent**1.5
            sides: Places = np.hypot(east, north) * RADIUS / step
            if np.isfinite(sides).all():
                return sides
    return None


def degrees(file: Any, points: Places) -> Places:
    """Longitudes and latitudes `[2, N]` of places in pixels of an open file, `[N, 2]` (x, y).

    What PROJ refuses is an error that `reading` says.
    """
    from rasterio.warp import transform

    there, (x, y) = file.transform, points.T
    return np.array(transform(file.crs, "EPSG:4326", there.a * x + there.c, there.e * y + there.f))


def require_degrees(file: Any) -> None:
    """Refuse polygons of a file that has no longitudes and latitudes (DataError)."""
    sides = [np.linspace(0, side, 33) for side in (file.width, file.height)]
    crs = file.crs
    try:
        with reading(Path(file.name)):
            found = degrees(file, np.stack(np.meshgrid(*sides), -1).reshape(-1, 2))
        fits = (crs.is_projected or crs.is_geographic) and np.isfinite(found).all()
    except DataError:
        fits = False
    if not fits:
        raise DataError(
            f"polygons=true: {file.name} has places without longitude and latitude "
            f"({crs.to_string():.60}); use polygons=false, or cut and warp it first: "
            f"{_warp(file, 'EPSG:…')}"
        )
