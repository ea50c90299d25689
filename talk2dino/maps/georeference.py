"""Where a georeferenced file lies, and what its units are on the ground."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talk2dino.errors import DataError, say

STRETCHED = 0.02  # share by which the meters of a projection may differ from the ground's
EQUATOR, ECCENTRICITY = 6378137.0, 0.00669438  # of WGS 84: radius in meters, and squared


def opened(path: Path) -> Any:
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
            f"{name}: rotated, or placed by control points; warp it first: {warp_command(file)}"
        )
    if file.rpcs is not None and transform.is_identity:
        warp = f"gdalwarp -rpc -t_srs EPSG:… {path.name} north-up.tif"
        raise DataError(f"{name}: placed by a camera model (RPC); warp it first: {warp}")
    if not transform.is_identity and (transform.a <= 0 or transform.e >= 0):
        raise DataError(f"{name}: north is not up; warp it first: {warp_command(file)}")
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


def warp_command(file: Any, crs: str | None = None) -> str:
    """What makes of a file one that works."""
    return f"rio warp {Path(file.name).name} north-up.tif --dst-crs {crs or file.crs or 'EPSG:…'}"


def meters(file: Any, name: str) -> float:
    """Meters of the unit of a file's coordinates."""
    if file.crs is None or file.transform.is_identity:
        raise DataError(
            f"{name}: has no georeference, so meters_per_pixel means nothing; give "
            "scale=PIXELS, for instance scale=2 for half the resolution"
        )
    if file.crs.is_projected:
        unit, ground = float(file.crs.linear_units_factor[1]), ground_size(file)
        sides = (-file.transform.e * unit, file.transform.a * unit)
        stretch = [g / side for g, side in zip(ground, sides, strict=True)] if ground else [1.0]
        if max(abs(one - 1) for one in stretch) > STRETCHED:
            epsg = file.crs.to_epsg()
            say(
                f"{name}: {f'EPSG:{epsg}' if epsg else 'its projection'} stretches the ground; at "
                f"this place meters_per_pixel=1 is {sum(stretch) / len(stretch):.2f} m",
                stacklevel=2,
            )
        return unit
    if not file.crs.is_geographic:
        raise DataError(f"{name}: coordinates are no plane's; reproject it, or give scale=PIXELS")
    west, south, east, north = file.bounds
    zone = min(max(int(((west + east) / 2 + 180) // 6) + 1, 1), 60)
    code = (32700 if (south + north) / 2 < 0 else 32600) + zone
    raise DataError(
        f"{name}: its coordinates are degrees, not meters; reproject first: "
        f"{warp_command(file, f'EPSG:{code}')}; or give scale=PIXELS"
    )


def ground_size(file: Any) -> tuple[float, float] | None:
    """Meters on the ground of a pixel's height and width in the middle of a file; None if unknown.

    From longitude and latitude of that pixel and its neighbors, on the ellipsoid of WGS 84.
    """
    from rasterio.warp import transform

    if file.crs is None or file.transform.is_identity:
        return None
    x, y = file.width / 2, file.height / 2
    there = file.transform
    xs, ys = (
        there.c + there.a * np.array([x, x, x + 1]),
        there.f + there.e * np.array([y, y + 1, y]),
    )
    try:
        lon, lat = map(np.radians, transform(file.crs, "EPSG:4326", xs, ys))
    except gdal_errors():  # coordinates of no place on Earth
        return None
    curved = 1 - ECCENTRICITY * math.sin(lat[0]) ** 2
    across = EQUATOR / math.sqrt(curved)  # radius of curvature; the other is along the meridian
    along = across * (1 - ECCENTRICITY) / curved
    east = across * np.cos(lat[0]) * (lon[1:] - lon[0])
    height, width = np.hypot(along * (lat[1:] - lat[0]), east)
    return (float(height), float(width)) if 0 < height * width < math.inf else None


def gdal_errors() -> tuple[type[Exception], ...]:
    """What GDAL raises; rasterio does not turn all of it into its own errors."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError


class Outlines:
    """Places rings of pixels in longitude and latitude, as closely as a quarter of a pixel.

    An edge that is straight in the file is not in longitude and latitude, so edges are cut.

    Args:
        file: open; without georeference rings stay in pixels.
        name: of the file, for errors.

    Raises:
        DataError: places that have no longitude and latitude, or a pole among them.
    """

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self.step, self._east = math.inf, 0.0
        if file.crs is None:
            return
        refused = f"{name}: polygons are in longitude and latitude, "
        how = f"go without (polygons=false), or warp it first: {warp_command(file, 'EPSG:4326')}"
        width, height = file.width, file.height
        xs, ys = (np.linspace(0, side, 9) for side in (width, height))
        grid = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
        try:
            found = self._degrees(grid)
        except gdal_errors():
            found = np.full_like(grid, math.inf)
        if not np.isfinite(found).all():
            raise DataError(f"{refused}which not all of its places have; {how}")
        if file.crs.is_geographic:
            self._east = 360 * round(float(found[:, 0].mean()) / 360)
            return
        if self._covers_a_pole():
            raise DataError(f"{refused}and it covers a pole; {how}")
        side = float(max(width, height))
        for start in grid:  # the deviation of a line grows with the square of its length
            for end in start + np.array([[side / 8, 0], [0, side / 8]]):
                if (end <= (width, height)).all():
                    bent = self._deviation(start, end)
                    self.step = min(self.step, side / 8 * math.sqrt(0.25 / max(bent, 1e-9)))
        self.step = max(self.step, 1.0)

    def _degrees(self, points: Any) -> Any:
        """Longitude and latitude `[N, 2]` of pixels `[N, 2]`."""
        from rasterio.warp import transform

        there = self._file.transform
        xs, ys = there.a * points[:, 0] + there.c, there.e * points[:, 1] + there.f
        return np.stack(transform(self._file.crs, "EPSG:4326", xs, ys), 1)

    def _pixels(self, degrees: Any) -> Any:
        from rasterio.warp import transform

        there = self._file.transform
        xs, ys = map(np.array, transform("EPSG:4326", self._file.crs, *degrees.T))
        return np.stack([(xs - there.c) / there.a, (ys - there.f) / there.e], 1)

    def _deviation(self, start: Any, end: Any) -> float:
        """Pixels between the middle of a line and that of its ends in longitude and latitude."""
        ends = self._degrees(np.stack([start, end]))
        ends[:, 0] = np.unwrap(ends[:, 0], period=360)
        there = self._pixels(ends.mean(0, keepdims=True))[0]
        return float(np.hypot(*(there - (start + end) / 2)))

    def _covers_a_pole(self) -> bool:
        for latitude in (90.0, -90.0):
            try:
                x, y = self._pixels(np.array([[0.0, latitude]]))[0]
            except gdal_errors():
                continue
            if 0 <= x <= self._file.width and 0 <= y <= self._file.height:
                return True
        return False

    def placed(self, rings: Sequence[Any]) -> list[list[list[float]]]:
        """Closed rings of pixels `[N, 2]`, the outer one first, in longitude and latitude.

        Longitudes begin within -180..180, of a file in degrees as its own do; across the
        antimeridian they go on beyond, without a jump.
        """
        if self._file.crs is None:
            return [ring.astype(float).tolist() for ring in rings]
        found: list[Any] = []
        for ring in rings:
            points = self._degrees(self._cut(ring.astype(float)))
            if self._file.crs.is_geographic:
                points[:, 0] -= self._east
            else:
                points[:, 0] = np.unwrap(points[:, 0], period=360)
                away = points[:, 0].mean() - found[0][:, 0].mean() if found else points[0, 0]
                points[:, 0] -= 360 * np.round(away / 360)
            points[-1] = points[0]
            found.append(points)
        return [points.round(8).tolist() for points in found]

    def _cut(self, ring: Any) -> Any:
        """Further points on edges that are longer than the step."""
        lengths = np.abs(np.diff(ring, axis=0)).max(1)
        parts = np.ceil(lengths / self.step).clip(1).astype(int)
        if (parts == 1).all():
            return ring
        ends = [
            np.linspace(start, end, count, endpoint=False)
            for start, end, count in zip(ring[:-1], ring[1:], parts, strict=True)
        ]
        return np.concatenate([*ends, ring[-1:]])
