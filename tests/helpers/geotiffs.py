"""Small GeoTIFFs, and maps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.maps import blocks as blocks_module
from talk2dino.maps.blocks import MapResult, segment_map
from talk2dino.maps.geotiff import MapImage

rasterio = pytest.importorskip("rasterio")
from_origin = rasterio.transform.from_origin
Pixels = npt.NDArray[Any]
UTM, EAST, NORTH = "EPSG:32632", 500_000.5, 5_400_003.0  # of the first pixel's corner
SIDE = 32  # of a window; the stride is half of it


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth noise `[3, height, width]` uint8: places differ, so classes do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, height // 4 + 1, width // 4 + 1))
    return coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width].astype(np.uint8)


def write(path: Path, pixels: Pixels, **options: Any) -> Path:
    """A tiled GeoTIFF of half a meter a pixel."""
    profile = {
        **{"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, "crs": UTM},
        **{"height": pixels.shape[1], "width": pixels.shape[2], "tiled": True},
        **{"blockxsize": 16, "blockysize": 16, "transform": from_origin(EAST, NORTH, 0.5, 0.5)},
    }
    with rasterio.open(path, "w", **{**profile, **options}) as file:
        file.write(pixels)
    return path


def read(path: Path) -> Pixels:
    with rasterio.open(path) as file:
        found: Pixels = file.read(1)
        return found


def small_blocks(monkeypatch: pytest.MonkeyPatch, maps: int = 4) -> None:
    """Blocks of two strides."""
    monkeypatch.setattr(blocks_module, "SCORES", 4 * maps * SIDE**2)


def segment(vocabulary: OpenVocabulary, source: Path, target: Path, **options: Any) -> MapResult:
    keys = ("polygons", "minimum_area", "overwrite", "advance")
    own = {key: options.pop(key) for key in keys if key in options}
    with MapImage(source, **options) as image:
        return segment_map(vocabulary, image, target, **own)
