"""Georeferenced files: pixels at a ground scale, read by windows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from talk2dino.errors import ConfigError, DataError, require_extra, say
from talk2dino.files import user_path
from talk2dino.maps.bands import chosen_bands
from talk2dino.maps.ground import (
    ground_sides,
    open_map,
    pixel_area,
    reading,
    require_degrees,
    unit_meters,
    warp_to_meters,
)

if TYPE_CHECKING:
    from rasterio.windows import Window

OVERVIEW = 1024  # pixels a side, from which percentiles are taken
UNFLAGGED = (-9999.0, -32768.0, -99999.0)  # usual for no data, where the file does not say so
COARSEST = 32  # pixels of the file to one; a block of GDAL's then takes 200 MB
STRETCH = (2.0, 98.0)  # percentiles, of what has more than eight bits


class MapImage:
    """A picture of any size on a grid of square ground pixels that does not depend on its extent.

    The grid is that of all multiples of `meters_per_pixel` in the file's coordinates, so two files
    of the same place share it. Rows and columns of the grid are counted southward and eastward from
    the origin of the coordinates, and may be negative.

    Args:
        path: a file that GDAL reads.
        meters_per_pixel: side of a pixel of the grid on the ground; None takes `scale`.
        scale: side in pixels of the file; None is 1.
        bands: three for red, green and blue, or one; counted from 1. None takes those that the file
            calls so, else the first three, or the first.
        stretch: percentiles of a band that become black and white, measured over an overview of the
            whole file. None: 2 and 98, unless the file has eight bits.
        value_range: the values that become black and white, in place of percentiles.

    Attributes:
        first: row and column of the grid in which the file begins.
        shape: rows and columns of the grid that it covers.
        ratio: pixels of the file to one of the grid, along rows and columns.
        limits: `[n, 2]` values of each band that become black and white, or None.

    Raises:
        ConfigError: an argument that does not fit the file, or no rasterio.
        DataError: a file that cannot be read, or is rotated, in degrees, or of an unfit kind.
    """

    def __init__(
        self,
        path: str | Path,
        meters_per_pixel: float | None = None,
        scale: float | None = None,
        bands: Sequence[int] | None = None,
        stretch: Sequence[float] | None = None,
        value_range: Sequence[float] | None = None,
    ) -> None:
        require_extra("geo", "map")
        _check_range("stretch", stretch, 0, 100)
        _check_range("value_range", value_range, -math.inf, math.inf)
        if stretch and value_range:
            raise ConfigError("stretch, value_range: give percentiles or values, not both")
        self.path = user_path(path)
        with reading(self.path):
            self._file = open_map(self.path)
        self.bands = chosen_bands(self._file, bands)
        self.first, self.shape, self.ratio, offset = self._grid(meters_per_pixel, scale)
        self._offset = offset
        self.limits = self._limits(stretch, value_range)
        self._source = self._with_nan() if self._kind.startswith("float") else self._file
        self._grid_file = self._resampled()

    def _grid(
        self, meters_per_pixel: float | None, scale: float | None
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[float, float], tuple[float, float]]:
        """First cell, cells, pixels of the file to a cell, and where the first cell begins."""
        file, name = self._file, f"image={self.path}"
        for key, value in (("meters_per_pixel", meters_per_pixel), ("scale", scale)):
            if value is not None and not 0 < value < 1e9:
                raise ConfigError(f"{key}={value}: give a positive number")
        if scale is not None and meters_per_pixel is not None:
            raise ConfigError("meters_per_pixel, scale: give one of them")
        transform = file.transform
        if meters_per_pixel is not None:
            unit = unit_meters(file, name)
            sides = (-transform.e * unit, transform.a * unit)
            ratio = (meters_per_pixel / sides[0], meters_per_pixel / sides[1])
        else:
            ratio = (scale or 1.0, scale or 1.0)
            (width, height), more = (transform.a, -transform.e), ("", "")
            on_earth = self.referenced and file.crs.is_geographic
            if on_earth and (ground := ground_sides(file)) is not None:
                width, height = ground[0].tolist()
                more = " m", f": {warp_to_meters(file)}"
            unlike = abs(width - height) / width > (0.1 if more else 0.01)
            if not transform.is_identity and unlike:
                shown = f"{width:.6g} x {height:.6g}{more[0]}"
                said = f"{name}: its pixels are {shown} and are taken for squares; warp it first"
                say(said + more[1])
        for key, value in (("meters_per_pixel", meters_per_pixel), ("scale", scale or 1.0)):
            if value is not None and not 1 / COARSEST <= max(ratio) <= COARSEST:
                raise ConfigError(
                    f"{key}={value}: {max(ratio):.3g} pixels of {self.path} become one; between "
                    f"1/{COARSEST} and {COARSEST} work; scale the file first"
                )
        origins = (0.0, 0.0)
        if not transform.is_identity:
            origins = (transform.f / transform.e, transform.c / transform.a)
        axes = [
            _axis(*values) for values in zip(origins, (file.height, file.width), ratio, strict=True)
        ]
        first, shape, offset = zip(*axes, strict=True)
        return (first[0], first[1]), (shape[0], shape[1]), ratio, (offset[0], offset[1])

    def _resampled(self) -> Any:
        """The file on the grid; GDAL resamples, from pixels of the file as coordinates."""
        from rasterio import Affine
        from rasterio.crs import CRS
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT

        (rows, columns), (top, left) = self.ratio, self._offset
        exact = (rows, columns) == (1.0, 1.0)
        kind = Resampling.average if max(rows, columns) > 1 else Resampling.bilinear
        plane = CRS.from_epsg(3857)  # any; nothing is reprojected
        return WarpedVRT(
            self._source,
            src_crs=plane,
            crs=plane,
            src_transform=Affine(1, 0, 0, 0, -1, 0),
            transform=Affine(columns, 0, left, 0, -rows, -top),
            height=self.shape[0],
            width=self.shape[1],
            resampling=Resampling.nearest if exact else kind,
            **self._masks(),
        )

    def _with_nan(self) -> Any:
        """The file with NaN for all that holds nothing: GDAL leaves out one value, not two."""
        import rasterio

        name, kind = escape(self._file.name), self._kind.title()
        bands = "".join(
            f"""<VRTRasterBand dataType="{kind}" band="{number}"><NoDataValue>nan</NoDataValue>
            <ComplexSource><SourceFilename>{name}</SourceFilename><SourceBand>{number}</SourceBand>
            <UseMaskBand>true</UseMaskBand></ComplexSource></VRTRasterBand>"""
            for number in range(1, max(self.bands) + 1)
        )
        size = f'rasterXSize="{self._file.width}" rasterYSize="{self._file.height}"'
        with reading(self.path), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            return rasterio.open(f"<VRTDataset {size}>{bands}</VRTDataset>")

    def _masks(self) -> dict[str, Any]:
        """What tells GDAL which pixels hold nothing, where it would not look itself."""
        from rasterio.enums import MaskFlags

        flags = self._source.mask_flag_enums[self.bands[0] - 1]
        unsaid = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
        return {"add_alpha": True} if unsaid else {}

    def _limits(
        self, stretch: Sequence[float] | None, value_range: Sequence[float] | None
    ) -> npt.NDArray[np.float64] | None:
        if value_range is None and stretch is None and self._kind == "uint8":
            return None
        shape = (min(self._file.height, OVERVIEW), min(self._file.width, OVERVIEW))
        with reading(self.path):
            seen = self._file.read(self.bands, out_shape=(len(self.bands), *shape), masked=True)
        limits = []
        for number, band in zip(self.bands, seen, strict=True):
            values = band.compressed().astype(float)
            values = values[np.isfinite(values)]
            if not len(values) and value_range is None:
                raise DataError(
                    f"image={self.path}: band {number} has no valid pixel to stretch; "
                    "give value_range=[LOW,HIGH]"
                )
            limits.append(value_range or np.percentile(values, stretch or STRETCH))
            black, white = limits[-1]
            if (values <= black).all() or (values >= white).all() or black in UNFLAGGED:
                said = (
                    f"image={self.path}: band {number} shows little with black at {black:g} and "
                    f"white at {white:g}; give value_range=[LOW,HIGH], or gdal_edit.py -a_nodata"
                )
                say(said, stacklevel=2)
        return np.array(limits, float)

    @property
    def _kind(self) -> str:
        """The type of the bands that are read."""
        return str(self._file.dtypes[self.bands[0] - 1])

    @property
    def referenced(self) -> bool:
        """Whether the file says where it lies."""
        return self._file.crs is not None and not self._file.transform.is_identity

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the file."""
        return self._file.height, self._file.width

    @property
    def pixel_area(self) -> float | None:
        """Square meters of a pixel of the file, or None where they are unknown.

        Neither Mercator's meters nor others that differ from the ground's by 2 % are counted.
        """
        return pixel_area(self._file)

    def read(self, rows: range, columns: range) -> tuple[npt.NDArray[np.uint8], Any]:
        """Pixels of the grid, and which of them show anything.

        Args:
            rows: of the grid, consecutive.
            columns: likewise; what lies outside the file mirrors what lies inside.

        Returns:
            `[3, h, w]` uint8, and `[h, w]` bool.
        """
        from rasterio.windows import Window

        (y1, y2), (x1, x2) = (
            (max(want.start - first, 0), min(want.stop - first, cells))
            for want, first, cells in zip((rows, columns), self.first, self.shape, strict=True)
        )
        window = Window(x1, y1, x2 - x1, y2 - y1)
        with reading(self.path):
            values = self._grid_file.read(self.bands, window=window)
            valid = self._grid_file.read_masks(self.bands, window=window).any(0)
        pixels = np.broadcast_to(self._eight_bits(values), (3, *valid.shape))
        pad = (
            (y1 + self.first[0] - rows.start, rows.stop - y2 - self.first[0]),
            (x1 + self.first[1] - columns.start, columns.stop - x2 - self.first[1]),
        )
        return np.pad(pixels, ((0, 0), *pad), "symmetric"), np.pad(valid, pad)

    def _eight_bits(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        if self.limits is None:
            return values.astype(np.uint8, copy=False)
        low, high = self.limits.T[:, :, None, None].astype(np.float32)
        known = np.where(np.isfinite(values), values, low)  # black, whatever 0 would be
        scaled = (known - low) / np.maximum(high - low, 1e-12)
        whole: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
        return whole

    def valid(self, window: Window) -> npt.NDArray[np.bool_]:
        """Which pixels of the file hold anything in its chosen bands: `[h, w]`.

        By nodata, alpha or mask; of floating-point numbers, all must be finite.
        """
        with reading(self.path):
            found: npt.NDArray[np.bool_] = self._file.read_masks(self.bands, window=window).any(0)
            if self._kind.startswith("float"):
                found &= np.isfinite(self._file.read(self.bands, window=window)).all(0)
        return found

    def cells(self, axis: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The cell of the grid, from 0, in which the center of each row (or column) lies."""
        places = np.arange(start, stop) + 0.5 - self._offset[axis]
        cells = np.floor(places / self.ratio[axis]).clip(0, self.shape[axis] - 1)
        found: npt.NDArray[np.int64] = cells.astype(np.int64)
        return found

    def require_degrees(self) -> None:
        """Refuse a file of which polygons cannot be written (DataError)."""
        if self.referenced:
            require_degrees(self._file)

    def profile(self) -> dict[str, Any]:
        """Size and georeference of the file, for another one."""
        file = self._file
        return {
            **{"height": file.height, "width": file.width},
            **({} if file.transform.is_identity else {"transform": file.transform}),
            **({"crs": file.crs} if self.referenced else {}),
        }

    def describe(self) -> dict[str, Any]:
        """Plain values that decide what `read` gives; with those of the files behind a VRT.

        Statistics beside the file, which viewers write, do not.
        """
        parts = [Path(name) for name in self._file.files if not name.endswith(".aux.xml")]
        known = [(path.absolute(), path.stat()) for path in parts if path.is_file()]
        return {
            "image": str(self.path.absolute()),
            "files": [[str(path), about.st_size, about.st_mtime_ns] for path, about in known],
            **{"bands": list(self.bands), "nodata": repr(self._file.nodatavals)},
            **{"first": list(self.first), "shape": list(self.shape), "ratio": list(self.ratio)},
            "limits": None if self.limits is None else self.limits.tolist(),
        }

    def close(self) -> None:
        """Close the file."""
        for file in (self._grid_file, self._source, self._file):
            file.close()

    def __enter__(self) -> MapImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _axis(origin: float, size: int, ratio: float) -> tuple[int, int, float]:
    """One side: the first cell, how many there are, and where the first begins, in file pixels.

    Args:
        origin: pixels of the file from the origin of its coordinates to its edge.
        size: of the file, pixels.
        ratio: pixels to a cell.
    """
    place = origin / ratio
    if abs(ratio - 1) < 1e-9:  # the file's own pixels, wherever they lie
        return math.floor(place + 0.501), size, 0.0  # far from 0 and 0.5, where origins lie
    first = math.floor(place + 1e-6)
    last = math.ceil(place + size / ratio - 1e-6)
    return first, last - first, round((first - place) * ratio, 6)


def _check_range(key: str, given: Sequence[float] | None, low: float, high: float) -> None:
    if given is None:
        return
    fitting = len(given) == 2 and all(isinstance(v, (int, float)) for v in given)
    if not fitting or not low <= given[0] < given[1] <= high or math.inf in map(abs, given):
        raise ConfigError(f"{key}={list(given)}: give two numbers, the lower first")
