"""What a file says of the ground: where it lies, and how long its meters are there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from talk2dino.errors import DataError, UserError, say

if TYPE_CHECKING:
    Places = npt.NDArray[np.float64]

CACHE = 128  # megabytes of blocks that GDAL keeps; its own default grows with the machine


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
    from rasterio.warp import transform_bounds

    if file.crs is None or file.transform.is_identity:
        raise DataError(
            f"{name}: has no georeference, so meters_per_pixel means nothing; give "
            "scale=PIXELS, for instance scale=2 for half the resolution"
        )
    if file.crs.is_projected:
        if file.crs.to_epsg() == 3857:
            west, south, east, north = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
            latitude = math.radians((south + north) / 2)
            say(
                f"{name}: EPSG:3857 stretches the ground; at this place meters_per_pixel=1 is "
                f"{math.cos(latitude):.2f} m",
                stacklevel=2,
            )
        return float(file.crs.linear_units_factor[1])
    if not file.crs.is_geographic:
        raise DataError(f"{name}: coordinates are no plane's; reproject it, or give scale=PIXELS")
    west, south, east, north = file.bounds
    zone = min(max(int(((west + east) / 2 + 180) // 6) + 1, 1), 60)
    code = (32700 if (south + north) / 2 < 0 else 32600) + zone
    raise DataError(
        f"{name}: its coordinates are degrees, not meters; reproject first: "
        f"{_warp(file, f'EPSG:{code}')}; or give scale=PIXELS"
    )


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
