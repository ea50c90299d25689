"""What a map becomes: a GeoTIFF of labels in the same place."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

import talk2dino
from talk2dino.errors import Advance, DataError, WriteError
from talk2dino.files import replacing
from talk2dino.maps.geotiff import MapImage
from talk2dino.maps.ground import reading
from talk2dino.segmentation.overlay import ignored_label, legend_colors

Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

SOFTWARE = "talk2dino.map"
TILE = 512  # pixels, of the label map
CHUNK = 4 * TILE  # side of what is written at once


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


def sidecars(target: Path) -> list[Path]:
    """Files that GDAL would take for a part of a label map: statistics, overviews and a mask."""
    return [target.with_name(target.name + end) for end in (".aux.xml", ".ovr", ".msk")]


def write_labels(
    target: Path,
    image: MapImage,
    classes: Sequence[str],
    run: str,
    labels: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Labels],
    advance: Advance,
) -> npt.NDArray[np.int64]:
    """Write a tiled GeoTIFF with the file's size and georeference.

    Pixels without data get the label that `ignored_label` names, which is the file's nodata value.

    Args:
        target: is replaced.
        image: the picture.
        classes: of the K labels; they become the tag `classes` (JSON) and, of 255 or fewer, colors.
        run: becomes the tag of this name, for `finished`.
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
            file.update_tags(**_writer(run), classes=json.dumps(list(classes)))
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


def _writer(run: str) -> dict[str, str]:
    """The tags of a run of this version."""
    return {"TIFFTAG_SOFTWARE": f"{SOFTWARE} {talk2dino.__version__}", "run": run}


def finished(target: Path, run: str) -> npt.NDArray[np.int64] | None:
    """Pixels of each class of a label map that is there already; None if it is of another run.

    Args:
        target: as in `write_labels`.
        run: likewise.
    """
    import rasterio

    with suppress(DataError), reading(target), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(target) as file:
            same = _writer(run).items() <= file.tags().items()
            nodata = int(file.nodata or 0)
        if same:
            return _counted(target, nodata)
    return None


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
