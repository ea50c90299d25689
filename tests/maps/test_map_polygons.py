"""Polygons of label maps against the pixels that they outline, wherever these lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from talk2dino.errors import DataError
from talk2dino.maps import polygons
from talk2dino.maps.geotiff import MapImage
from talk2dino.maps.polygons import write_polygons

rasterio = pytest.importorskip("rasterio")
from_origin = rasterio.transform.from_origin
Labels = npt.NDArray[np.uint8]


def label_map(path: Path, labels: Labels, crs: str, transform: Any) -> Path:
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": 255, "crs": crs}
    height, width = labels.shape
    with rasterio.open(
        path, "w", **profile, height=height, width=width, transform=transform
    ) as file:
        file.update_tags(classes=json.dumps(["a", "b"]))
        file.write(labels, 1)
    return path


def traced(source: Path, minimum_area: int = 1) -> list[dict[str, Any]]:
    target = source.with_suffix(".geojson")
    write_polygons(source, target, minimum_area, False, lambda done, total: None)
    found: list[dict[str, Any]] = json.loads(target.read_text())["features"]
    return found


def test_long_edges_stay_on_their_pixels(tmp_path: Path) -> None:
    """A straight line of UTM is none in degrees: over 80 km it lay 24 pixels beside itself."""
    labels = np.zeros((40, 8000), np.uint8)
    labels[20:] = 1
    place = from_origin(399_960, 6_900_000, 10, 10)
    source = label_map(tmp_path / "labels.tif", labels, "EPSG:32633", place)
    for one in traced(source):
        ring = np.array(one["geometry"]["coordinates"][0])
        share = np.linspace(0, 1, 9)[:, None, None]
        along = (ring[:-1] * (1 - share) + ring[1:] * share).reshape(-1, 2)
        there = rasterio.warp.transform("EPSG:4326", "EPSG:32633", *along.T)
        x, y = ~place * np.array(there)
        beside = np.min([abs(x), abs(x - 8000), abs(y), abs(y - 20), abs(y - 40)], axis=0)
        assert beside.max() < 0.25
        assert len(ring) < 100


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ("EPSG:4326", from_origin(-180, 90, 4.5, 4.5)),
        ("EPSG:4326", from_origin(0, 90, 4.5, 4.5)),
        ("EPSG:4087", from_origin(-20037508, 10018754, 500937.7, 500937.7)),
        ("EPSG:3857", from_origin(-20037508, 10018754, 500937.7, 500937.7)),
        ("EPSG:3413", from_origin(-4e6, 2e6, 1e5, 1e5)),  # the pole at a corner of pixels
        ("EPSG:3413", from_origin(-4.05e6, 2.05e6, 1e5, 1e5)),  # and in one's middle
        ("EPSG:3413", from_origin(-4e6, 2.03e6, 1e5, 1e5)),  # and on the edge of one
        ("EPSG:3031", from_origin(-4e6, 2e6, 1e5, 1e5)),
        ("EPSG:3832", from_origin(0, 2e6, 1e5, 1e5)),  # over the antimeridian
    ],
)
def test_polygons_hold_their_pixels_all_over_the_earth(
    tmp_path: Path, crs: str, place: Any
) -> None:
    """Of rings around the earth and around poles, too."""
    labels = np.zeros((40, 80), np.uint8)
    labels[5:35, 13:67] = 1
    labels[10:30, 20:60] = 0
    labels[19:21, 39:41] = 1
    features = traced(label_map(tmp_path / "labels.tif", labels, crs, place))
    for one in features:
        for ring in one["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert np.abs(np.diff(np.array(ring)[:, 0])).max() <= 360
    shapes = [(one["geometry"], "ab".index(one["properties"]["class"])) for one in features]
    grid = from_origin(-540, 90, 0.25, 0.25)
    drawn = [rasterio.features.rasterize([one], (720, 4320), 99, transform=grid) for one in shapes]
    found = np.min(drawn, axis=0).reshape(720, 3, 1440).min(1)
    east, north = np.meshgrid(np.arange(1440) / 4 - 179.875, 89.875 - np.arange(720) / 4)
    there = np.array(rasterio.warp.transform("EPSG:4326", crs, east.ravel(), north.ravel()))
    wanted = np.full(720 * 1440, 99)
    for turn in (0, 360) if crs == "EPSG:4326" else (0,):
        x, y = np.floor(~place * (there + np.array([[turn], [0]])))
        inside = (x >= 0) & (x < 80) & (y >= 0) & (y < 40)
        wanted[inside] = labels[y[inside].astype(int), x[inside].astype(int)]
    assert len(np.unique(wanted)) > 1
    assert (found.ravel() != wanted).mean() < 0.003


def test_pieces_at_the_edges_of_squares_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a field that one cuts would have a hole there."""
    monkeypatch.setattr(polygons, "AREA", 32)
    labels = np.zeros((40, 60), np.uint8)
    labels[4:14, 20:34] = 1  # 20 of its 140 pixels lie beyond
    labels[20:22, 40:45] = 1
    source = label_map(tmp_path / "labels.tif", labels, "EPSG:32633", from_origin(4e5, 5e6, 10, 10))
    found = [one["properties"] for one in traced(source, minimum_area=50)]
    assert sorted(one["pixels"] for one in found if one["class"] == "b") == [20, 120]


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ('LOCAL_CS["here",UNIT["metre",1]]', from_origin(10, 0, 1, 1)),
        ("IAU_2015:30110", from_origin(5e5, 5e6, 1000, 1000)),
        ("+proj=geos +h=35785831 +lon_0=0 +datum=WGS84", from_origin(-5.5e6, 5.5e6, 3e5, 3e5)),
        ("ESRI:54030", from_origin(-1.7e7, 8.6e6, 1e6, 1e6)),
        ("+proj=ortho +lat_0=40 +lon_0=0", from_origin(6.3e6, 5e6, 1e5, 1e5)),
        ("EPSG:4978", from_origin(5e5, 5e6, 1000, 1000)),
    ],
)
def test_files_without_degrees_have_no_polygons(tmp_path: Path, crs: str, place: Any) -> None:
    source = label_map(tmp_path / "map.tif", np.zeros((40, 40), np.uint8), crs, place)
    wanted = r"polygons=true: .*map\.tif has places without .*use polygons=false, or cut and warp"
    with MapImage(source) as image, pytest.raises(DataError, match=wanted):
        image.require_degrees()
