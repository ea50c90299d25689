"""Where maps lie: grids of half pixels, what holds no data, and outlines on the Earth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from talk2dino import Talk2DINO
from talk2dino.errors import DataError, ResultWarning
from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.maps import map_files as module
from talk2dino.maps.georeference import Outlines
from talk2dino.maps.geotiff import MapImage
from tests.helpers.encoders import hash_model
from tests.helpers.geotiffs import SIDE, noise, read, segment, small_blocks, write

rasterio = pytest.importorskip("rasterio")
Affine, from_origin = rasterio.Affine, rasterio.transform.from_origin
transform = pytest.importorskip("rasterio.warp").transform
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture(scope="module")
def vocabulary() -> OpenVocabulary:
    model: Talk2DINO = hash_model()
    return model.open_vocabulary(["road", "roof", "tree"], short_side=SIDE)


@pytest.mark.parametrize("corner", [(399_975.0, 5_399_985.0), (399_990.0, 5_400_000.0)])
def test_pixels_around_points_of_a_grid(
    vocabulary: OpenVocabulary, tmp_path: Path, corner: tuple[float, float]
) -> None:
    """Landsat's origins lie in the middle of cells; cut by odd counts, no label differs."""
    pixels = noise(150, 170)
    whole = write(tmp_path / "whole.tif", pixels, transform=from_origin(*corner, 30, 30))
    segment(vocabulary, whole, tmp_path / "one.tif")
    for top, left in ((21, 27), (22, 27)):
        there = from_origin(corner[0] + 30 * left, corner[1] - 30 * top, 30, 30)
        part = write(tmp_path / "part.tif", pixels[:, top:, left:], transform=there)
        segment(vocabulary, part, tmp_path / "other.tif")
        away = SIDE + 1
        one = read(tmp_path / "one.tif")[top:, left:][away:-away, away:-away]
        assert np.array_equal(one, read(tmp_path / "other.tif")[away:-away, away:-away])
        (tmp_path / "other.tif").unlink()


def test_numbers_that_are_none_do_not_spread(tmp_path: Path) -> None:
    """A cell is the mean of what is there, and valid, though no tag says that NaN is no data."""
    values = np.full((1, 40, 40), 5, np.float32)
    values[0, ::10, ::10] = np.nan
    values[0, 20:, 20:] = np.nan
    source = write(tmp_path / "map.tif", values, transform=from_origin(500_000, 5_400_000, 1, 1))
    with MapImage(source, scale=10, value_range=[0, 10]) as image:
        where = [range(a, a + n) for a, n in zip(image.first, image.shape, strict=True)]
        pixels, valid = image.read(*where)
        assert valid.tolist() == [[True] * 4] * 2 + [[True, True, False, False]] * 2
        assert set(pixels[:, valid].ravel().tolist()) == {128}


def test_only_the_chosen_bands_say_what_is_there(tmp_path: Path) -> None:
    values = np.ones((4, 20, 20), np.int16)
    values[:3, :, 10:] = -9999
    source = write(tmp_path / "map.tif", values, nodata=-9999)
    with MapImage(source, bands=[1, 2, 3], value_range=[0, 2]) as image:
        window = rasterio.windows.Window(0, 0, 20, 20)
        assert image.valid(window).sum() == 200
        where = [range(a, a + n) for a, n in zip(image.first, image.shape, strict=True)]
        assert image.read(*where)[1].sum() == 200


def test_meters_that_are_none_of_the_ground(tmp_path: Path) -> None:
    """At 60 degrees north; two axes of one projection may differ (EPSG:4087)."""
    for crs, known in (
        ("EPSG:3857", False),
        ("EPSG:3395", False),
        ("EPSG:4087", False),
        ("EPSG:3857+5773", False),
        ("EPSG:32632", True),
        ("EPSG:3035", True),
    ):
        east, north = transform("EPSG:4326", crs.partition("+")[0], [9.0], [60.0])
        there = from_origin(east[0], north[0], 0.5, 0.5)
        source = write(tmp_path / "map.tif", noise(20, 20), crs=crs, transform=there)
        with MapImage(source) as image:
            assert (image.pixel_area is not None) == known, crs
        if not known:
            with pytest.warns(ResultWarning, match="stretches the ground; at this place"):
                MapImage(source, meters_per_pixel=1).close()
    degrees = from_origin(9, 60, 1e-5, 1e-5)
    source = write(tmp_path / "map.tif", noise(20, 20), crs="EPSG:4326", transform=degrees)
    with pytest.warns(ResultWarning, match=r"pixels are 0\.558\d* x 1\.114\d* m on the ground"):
        MapImage(source).close()


SQUARE = np.array([[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]])


def test_long_edges_follow_the_pixels(tmp_path: Path) -> None:
    """The middle of an edge of 80 km in longitude and latitude lies on it in the file."""
    there = from_origin(500_000, 6_000_000, 10, 10)
    source = tmp_path / "map.tif"
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "width": 8000, "height": 40}
    with rasterio.open(source, "w", **profile, crs="EPSG:32633", transform=there):
        pass
    with rasterio.open(source) as file:
        outlines = Outlines(file, "map")
        [ring] = outlines.placed([SQUARE * (8000, 40)])
        points = np.array(ring)
        assert ring[0] == ring[-1] and len(points) > 8
        halves = (points[1:] + points[:-1]) / 2
        xs, ys = transform("EPSG:4326", file.crs, *halves.T)
    columns, rows = (np.array(xs) - 500_000) / 10, (6_000_000 - np.array(ys)) / 10
    beside = np.min([abs(columns), abs(columns - 8000), abs(rows), abs(rows - 40)], axis=0)
    assert beside.max() < 0.3


def test_the_whole_world_is_no_line(tmp_path: Path) -> None:
    world = from_origin(-180, 90, 9, 9)
    source = write(tmp_path / "map.tif", noise(20, 40), crs="EPSG:4326", transform=world)
    with rasterio.open(source) as file:
        [ring] = Outlines(file, "map").placed([SQUARE * (40, 20)])
    assert ring == [[-180, 90], [-180, -90], [180, -90], [180, 90], [-180, 90]]


@pytest.mark.parametrize(
    ("crs", "corner", "message"),
    [
        ("EPSG:3413", (-10_000, 10_000), "covers a pole"),
        ('LOCAL_CS["here",UNIT["metre",1]]', (0, 0), "longitude and latitude, which not all"),
        ("+proj=geos +h=35785831 +sweep=x", (-5_500_000, 5_500_000), "which not all"),
        ("+proj=ortho", (-7_000_000, 7_000_000), "which not all"),
    ],
)
def test_outlines_that_cannot_be_placed(
    vocabulary: OpenVocabulary,
    tmp_path: Path,
    crs: str,
    corner: tuple[float, float],
    message: str,
) -> None:
    """In one line, before anything is done; the labels alone can be had."""
    step = max(1000, abs(corner[0]) / 20)
    there = from_origin(*corner, step, step)
    source = write(tmp_path / "map.tif", noise(40, 40), crs=crs, transform=there)
    with pytest.raises(DataError, match=rf"^image=.*{message}.*polygons=false"):
        segment(vocabulary, source, tmp_path / "out.tif", polygons=True)
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"]
    segment(vocabulary, source, tmp_path / "out.tif")


def test_pieces_at_the_edge_of_a_square_are_kept(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large area that ends there leaves a small piece in the next square."""
    monkeypatch.setattr(module, "AREA", 16)
    labels = np.zeros((1, 32, 32), np.uint8)
    labels[0, 4:12, 4:18] = 1  # 16 pixels lie in the next square
    labels[0, 25, 25] = 1  # one alone
    source = write(tmp_path / "labels.tif", labels, nodata=255)
    with rasterio.open(source, "r+") as file:
        file.update_tags(classes=json.dumps(["none", "field"]))
    module.write_polygons(source, tmp_path / "out.geojson", 20, True, lambda done, total: None)
    features = json.loads((tmp_path / "out.geojson").read_text())["features"]
    assert sorted(one["properties"]["pixels"] for one in features) == [16, 96]


def test_damaged_blocks_are_done_again(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"
    whole = segment(vocabulary, source, tmp_path / "whole.tif")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(vocabulary, source, target, advance=stop)
    one, two, three, _ = sorted((tmp_path / ".out.tif.parts").glob("*.npz"))
    one.write_bytes(one.read_bytes()[:-40])
    two.write_bytes(b"")
    np.savez(three, labels=np.zeros((2, 2), np.uint8))
    assert segment(vocabulary, source, target).before == 1
    assert np.array_equal(read(target), read(tmp_path / "whole.tif"))
    assert whole.before == 0


def test_sources_of_a_virtual_file_count(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    source = write(tmp_path / "one.tif", noise(SIDE, SIDE)[:1])
    virtual = tmp_path / "map.vrt"
    virtual.write_text(
        f"""<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><VRTRasterBand dataType="Byte"
        band="1"><SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand>
        </SimpleSource></VRTRasterBand></VRTDataset>"""
    )

    def described() -> dict[str, Any]:
        with MapImage(virtual) as image:
            return image.describe()

    before = described()
    assert described() == before
    write(source, noise(SIDE, SIDE, seed=1)[:1])
    assert described() != before


def test_a_camera_model_is_no_place(tmp_path: Path) -> None:
    names = "line_off samp_off lat_off long_off height_off line_scale samp_scale lat_scale"
    values: dict[str, Any] = dict.fromkeys(f"{names} long_scale height_scale".split(), 1.0)
    many = ("line_num_coeff", "line_den_coeff", "samp_num_coeff", "samp_den_coeff")
    rpcs = rasterio.rpc.RPC(**values, **{name: [1.0] * 20 for name in many})
    source = write(tmp_path / "map.tif", noise(20, 20), crs=None, transform=Affine.identity())
    with rasterio.open(source, "r+") as file:
        file.rpcs = rpcs
    with pytest.raises(DataError, match=r"camera model .RPC.; warp it first: gdalwarp -rpc"):
        MapImage(source)
