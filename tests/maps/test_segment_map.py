"""Maps by windows against `Talk2DINO.segment`, another cut of the same place, and rasterio."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from talk2dino import Talk2DINO
from talk2dino.errors import ConfigError, DataError, ResultWarning, WriteError
from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.maps import blocks as blocks_module
from talk2dino.maps.blocks import Blocks, MapResult, segment_map, starts
from talk2dino.maps.geotiff import MapImage
from talk2dino.maps.polygons import _placed
from tests.helpers.encoders import hash_model

rasterio = pytest.importorskip("rasterio")
Affine, from_origin = rasterio.Affine, rasterio.transform.from_origin
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
Pixels = npt.NDArray[Any]
UTM, EAST, NORTH = "EPSG:32632", 500_000.5, 5_400_003.0  # of the first pixel's corner
CLASSES = ["road", "roof", "tree", "water"]
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


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.fixture
def vocabulary(model: Talk2DINO) -> OpenVocabulary:
    return model.open_vocabulary(CLASSES, short_side=SIDE)


def small_blocks(monkeypatch: pytest.MonkeyPatch, maps: int = 4) -> None:
    """Blocks of two strides."""
    monkeypatch.setattr(blocks_module, "SCORES", 4 * maps * SIDE**2)


def segment(vocabulary: OpenVocabulary, source: Path, target: Path, **options: Any) -> MapResult:
    keys = ("polygons", "minimum_area", "overwrite", "advance")
    own = {key: options.pop(key) for key in keys if key in options}
    with MapImage(source, **options) as image:
        return segment_map(vocabulary, image, target, **own)


def test_one_window_is_what_segment_gives(model: Talk2DINO, tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE)
    source = write(tmp_path / "map.tif", pixels)
    options: dict[str, Any] = {"background": 0.5, "pamr": True, "short_side": SIDE}
    options["negatives"] = ["sky"]
    found = segment(model.open_vocabulary(CLASSES, **options), source, tmp_path / "out.tif")
    wanted = model.segment(pixels.transpose(1, 2, 0), CLASSES, **options)
    assert np.array_equal(read(tmp_path / "out.tif"), wanted.labels.numpy())
    assert len(np.unique(wanted.labels)) > 2
    assert list(found.pixels) == wanted.classes
    assert found.pixels["road"] == int((wanted.labels == 1).sum())


def test_georeference_colors_and_names_stay(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    source = write(tmp_path / "map.tif", noise(70, 90))
    segment(vocabulary, source, tmp_path / "out.tif")
    with rasterio.open(source) as one, rasterio.open(tmp_path / "out.tif") as other:
        assert (one.crs, one.transform, one.shape) == (other.crs, other.transform, other.shape)
        assert other.profile["tiled"] and other.nodata == 255 and other.dtypes == ("uint8",)
        assert json.loads(other.tags()["classes"]) == CLASSES
        colors = other.colormap(1)
        assert len({colors[n] for n in range(len(CLASSES))}) == len(CLASSES)


@pytest.mark.parametrize(
    ("options", "ratio", "cut"),
    [({}, 1, (21, 26)), ({"meters_per_pixel": 1.0}, 2, (44, 58)), ({"scale": 1.5}, 1.5, (30, 33))],
)
def test_the_same_place_cut_differently(
    vocabulary: OpenVocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, float],
    ratio: float,
    cut: tuple[int, int],
) -> None:
    """Another extent, and blocks of another size: no label differs a window from the border."""
    size = (int(150 * ratio), int(170 * ratio))
    pixels = noise(*size)
    whole = write(tmp_path / "whole.tif", pixels)
    top, left = cut
    corner = from_origin(EAST + left / 2, NORTH - top / 2, 0.5, 0.5)
    part = write(tmp_path / "part.tif", pixels[:, top:-7, left:-11], transform=corner)
    segment(vocabulary, whole, tmp_path / "one.tif", **options)
    small_blocks(monkeypatch)
    segment(vocabulary, part, tmp_path / "other.tif", **options)
    away = int((SIDE + 1) * ratio)
    one = read(tmp_path / "one.tif")[top:-7, left:-11][away:-away, away:-away]
    other = read(tmp_path / "other.tif")[away:-away, away:-away]
    assert min(one.shape) > SIDE / 2 and len(np.unique(one)) > 1
    assert np.array_equal(one, other)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("noise_of_origin", [-1e-9, 0.0, 1e-9])
def test_pixels_around_points_are_cut_alike(
    tmp_path: Path, cut: int, noise_of_origin: float
) -> None:
    """Origins lie half a pixel beside its multiples, as Landsat's do."""
    places = []
    for top in (0, cut):
        corner = from_origin(399_985 + 30 * top + noise_of_origin, 5_399_985 - 30 * top, 30, 30)
        with MapImage(write(tmp_path / f"{top}.tif", noise(20, 20), transform=corner)) as image:
            places.append(image.first)
    assert np.subtract(*places[::-1]).tolist() == [cut, cut]


def test_windows_lie_at_multiples_of_the_stride() -> None:
    for first, cells in ((0, 32), (-5, 100), (1000, 7), (17, 333)):
        found = starts(first, cells, 32, 16)
        covered = {c for start in found for c in range(start, start + 32)}
        assert covered == set(range(first, first + max(cells, 32)))
        assert all(start % 16 == 0 for start in found[1:-1])


def test_scores_are_blended_by_tents(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    """Against the weighted mean written out for the whole map at once."""
    pixels = noise(48, 64)
    source = write(tmp_path / "map.tif", pixels, transform=from_origin(0, 0, 1, 1))
    segment(vocabulary, source, tmp_path / "out.tif")
    total, weights = np.zeros((4, 48, 64)), np.zeros((48, 64))
    tent = 1 - np.abs(np.arange(SIDE) + 0.5 - SIDE / 2) / (SIDE / 2)
    for y in (0, 16):
        for x in (0, 16, 32):
            view = pixels[:, y : y + SIDE, x : x + SIDE].transpose(1, 2, 0)
            scores = vocabulary(np.ascontiguousarray(view)).scores.numpy()
            total[:, y : y + SIDE, x : x + SIDE] += scores * tent[:, None] * tent
            weights[y : y + SIDE, x : x + SIDE] += tent[:, None] * tent
    assert np.array_equal(read(tmp_path / "out.tif"), (total / weights).argmax(0))


def test_memory_does_not_grow_with_the_map(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    seen: list[int] = []
    original = MapImage.read

    def read_and_count(self: MapImage, *given: range) -> Any:
        pixels, valid = original(self, *given)
        seen.append(pixels.size)
        return pixels, valid

    monkeypatch.setattr(MapImage, "read", read_and_count)
    largest = []
    for name, size in (("small", (90, 110)), ("large", (210, 230))):
        seen.clear()
        source = write(tmp_path / f"{name}.tif", noise(*size))
        result = segment(vocabulary, source, tmp_path / f"{name}-out.tif")
        assert result.blocks == len(seen)
        largest.append(max(seen))
    assert max(largest) <= 3 * (3 * SIDE) ** 2  # a block and a window around it
    assert largest[1] < 1.1 * largest[0]


def stop_at(step: int) -> Any:
    """For `advance`: ends a run as Ctrl-C does."""

    def advance(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return advance


def test_an_interrupted_run_goes_on(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"
    whole = segment(vocabulary, source, tmp_path / "whole.tif")

    with pytest.raises(KeyboardInterrupt):
        segment(vocabulary, source, target, advance=stop_at(4))
    assert not target.exists()
    encoded: list[Any] = []
    original = Blocks.labels
    monkeypatch.setattr(Blocks, "labels", lambda s, b: encoded.append(b) or original(s, b))
    result = segment(vocabulary, source, target)
    assert (result.before, len(encoded)) == (4, result.blocks - 4)
    assert np.array_equal(read(target), read(tmp_path / "whole.tif"))
    assert result.pixels == whole.pixels
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "out.tif", "whole.tif"]


def test_a_finished_map_is_not_done_again(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"
    first = segment(vocabulary, source, target)
    blocks: list[Any] = []
    original = Blocks.labels
    monkeypatch.setattr(Blocks, "labels", lambda s, b: blocks.append(b) or original(s, b))
    again = segment(vocabulary, source, target, polygons=True)
    assert not blocks and again.polygons
    assert again == first._replace(before=first.blocks, polygons=again.polygons)
    assert segment(vocabulary, source, target, overwrite=True).before == 0 < len(blocks)
    target.write_bytes(target.read_bytes()[:2000])  # damaged
    assert segment(vocabulary, source, target) == first
    assert segment(vocabulary, source, target, scale=2).before == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "out.tif"]


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "shape", "name"])
def test_damaged_blocks_are_done_again(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    small_blocks(monkeypatch)
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"
    segment(vocabulary, source, tmp_path / "whole.tif")
    with pytest.raises(KeyboardInterrupt):
        segment(vocabulary, source, target, advance=stop_at(4))
    block = next((tmp_path / ".out.tif.parts").glob("*.npz"))
    content = block.read_bytes()
    wrong = {"shape": {"labels": np.zeros((3, 3))}, "name": {"other": np.zeros((3, 3))}}
    if damage in wrong:
        np.savez_compressed(block, **wrong[damage])
    else:
        kept = {"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}
        block.write_bytes(kept[damage])
    assert segment(vocabulary, source, target).before == 3
    assert np.array_equal(read(target), read(tmp_path / "whole.tif"))


def test_the_files_behind_a_vrt_are_those_of_the_run(
    vocabulary: OpenVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"
    mosaic = tmp_path / "mosaic.vrt"
    bands = "".join(
        f"""<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource>
        <SourceFilename>{source}</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource>
        </VRTRasterBand>"""
        for band in (1, 2, 3)
    )
    mosaic.write_text(f'<VRTDataset rasterXSize="90" rasterYSize="100">{bands}</VRTDataset>')
    for pixels, before in ((None, 4), (noise(100, 90, seed=1), 0)):
        with pytest.raises(KeyboardInterrupt):
            segment(vocabulary, mosaic, target, advance=stop_at(4), overwrite=True)
        (tmp_path / "map.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")  # of a viewer
        if pixels is not None:
            write(source, pixels)
        assert segment(vocabulary, mosaic, target).before == before


def test_what_lies_beside_an_older_result_goes_with_it(
    vocabulary: OpenVocabulary, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "map.tif", noise(40, 40)), tmp_path / "out.tif"
    beside = [tmp_path / f"out.tif{end}" for end in (".aux.xml", ".ovr", ".msk")]
    for path in beside:
        path.write_text("<PAMDataset><SRS>EPSG:4326</SRS></PAMDataset>")
        with pytest.raises(ConfigError, match=rf"output=.*{path.name}: is there and was not"):
            segment(vocabulary, source, target)
        path.unlink()
    segment(vocabulary, source, target, polygons=True)
    for path in beside:
        path.write_text("<PAMDataset><SRS>EPSG:4326</SRS></PAMDataset>")
    segment(vocabulary, source, target, scale=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "out.tif"]
    (tmp_path / "out.geojson").write_text("{}")
    segment(vocabulary, source, target)
    assert (tmp_path / "out.geojson").read_text() == "{}"


def test_other_settings_start_anew(
    model: Talk2DINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    source, target = write(tmp_path / "map.tif", noise(100, 90)), tmp_path / "out.tif"

    stop = stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        segment(model.open_vocabulary(CLASSES[::-1], short_side=SIDE), source, target, advance=stop)
    assert segment(model.open_vocabulary(CLASSES, short_side=SIDE), source, target).before == 0
    with pytest.raises(KeyboardInterrupt):
        again = model.open_vocabulary(CLASSES, short_side=SIDE)
        segment(again, source, target, advance=stop, overwrite=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.vision.parameters()).add_(1)  # the rows of the words stay
    assert segment(other.open_vocabulary(CLASSES, short_side=SIDE), source, target).before == 0

    def meanwhile(done: int, total: int) -> None:
        segment(other.open_vocabulary(CLASSES[:2], short_side=SIDE), source, target)

    with pytest.raises(WriteError, match=r"out\.tif: another process is writing it"):
        segment(model.open_vocabulary(CLASSES, short_side=SIDE), source, target, advance=meanwhile)


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask"])
def test_pixels_without_data_are_ignored(
    vocabulary: OpenVocabulary, tmp_path: Path, kind: str
) -> None:
    pixels = noise(60, 70).clip(1)
    hole = np.zeros((60, 70), bool)
    hole[20:33, 50:] = True
    source = tmp_path / "map.tif"
    if kind == "nodata":
        write(source, np.where(hole, 0, pixels).astype(np.uint8), nodata=0)
    elif kind == "alpha":
        alpha = np.where(hole, 0, 255).astype(np.uint8)[None]
        write(source, np.concatenate([pixels, alpha]), photometric="RGB", alpha="yes")
    else:
        write(source, pixels)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as file:
            file.write_mask(~hole)
    result = segment(vocabulary, source, tmp_path / "out.tif", scale=2)
    assert np.array_equal(read(tmp_path / "out.tif") == 255, hole)
    assert result.ignored == hole.sum()
    assert sum(result.pixels.values()) == (~hole).sum()


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan"])
def test_windows_without_data_are_not_encoded(
    vocabulary: OpenVocabulary, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, hole = noise(100, 130).clip(1), np.arange(130) >= 40
    empty, source = np.where(hole, 0, pixels).astype(np.uint8), tmp_path / "map.tif"
    alpha = np.broadcast_to(np.where(hole, 0, 255).astype(np.uint8), (1, 100, 130))
    if kind == "alpha":
        write(source, np.concatenate([empty, alpha]), photometric="RGB", alpha="yes")
    elif kind == "nan":
        write(source, np.where(hole, np.nan, pixels).astype(np.float32))
    else:
        write(source, empty, nodata=0 if kind == "nodata" else None)
    if kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source, "r+") as file:
            file.write_mask(alpha[0] > 0)
    seen: list[tuple[int, int]] = []
    original = Blocks._encoded
    monkeypatch.setattr(
        Blocks,
        "_encoded",
        lambda s, places, *more: seen.extend(places) or original(s, places, *more),
    )
    assert segment(vocabulary, source, tmp_path / "out.tif").ignored == 100 * 90
    with MapImage(source) as image:
        assert max(x for _, x in seen) < image.first[1] + 40


def test_scattered_nan_leave_the_rest_of_a_coarse_pixel(tmp_path: Path) -> None:
    """Untagged, too: they made all of it black."""
    values = noise(60, 60)[:1].astype(np.float32)
    values[0, 3::10, 4::10] = np.nan
    values[0, :10, :10] = np.nan
    with MapImage(write(tmp_path / "map.tif", values), scale=10, value_range=[0, 255]) as image:
        top, left = image.first
        pixels, valid = image.read(range(top + 1, top + 6), range(left + 1, left + 6))
        assert valid.all() and (pixels > 40).all()
        found = image.read(range(top, top + 1), range(left, left + 1))[1]
        assert not found.any()


@pytest.mark.parametrize("scale", [0.5, 1, 1.5, 10])
@pytest.mark.parametrize("kind", ["nodata", "mask"])
def test_nan_beside_what_else_says_no_data(
    vocabulary: OpenVocabulary, tmp_path: Path, kind: str, scale: float
) -> None:
    """As if they were no data by the file's own word: NaN made cells of a coarse grid black."""
    values = noise(100, 120).clip(1).astype(np.float64)
    hole, nan = np.zeros((2, 100, 120), bool)
    hole[5:17, 30:60] = True
    nan[3::10, 4::10] = nan[40:60, 50:80] = True
    found = []
    for unknown in (nan & False, nan):
        file, shown = tmp_path / "a & b.tif", ~(hole | (nan & ~unknown))
        pixels = np.where(unknown, np.nan, np.where(shown, values, -9999))
        write(file, pixels, nodata=-9999 if kind == "nodata" else None)
        if kind == "mask":
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as opened:
                opened.write_mask(shown)
        options: dict[str, Any] = {"scale": scale, "value_range": [0, 255]}
        with MapImage(file, **options) as image:
            where = [range(a, a + n) for a, n in zip(image.first, image.shape, strict=True)]
            found.append(image.read(*where))
        segment(vocabulary, file, tmp_path / "out.tif", **options)
        found[-1] += (read(tmp_path / "out.tif"),)
    for other, one in zip(*found, strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(found[1][2] == 255, hole | nan)


def test_the_chosen_bands_say_what_is_empty(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    values = np.concatenate([noise(60, 60).clip(1), noise(60, 60).clip(1)[:1]])
    values[:3, 20:40, 20:40] = 0
    source = write(tmp_path / "map.tif", values, nodata=0, photometric="minisblack")
    for scale in (1, 2):
        options: dict[str, Any] = {"bands": [1, 2, 3], "scale": scale}
        assert segment(vocabulary, source, tmp_path / "out.tif", **options).ignored == 400
    assert segment(vocabulary, source, tmp_path / "out.tif", bands=[4]).ignored == 0


def test_polygons_cover_the_labels(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    from rasterio.features import rasterize
    from rasterio.warp import transform_geom

    source = write(tmp_path / "map.tif", noise(60, 70))
    result = segment(vocabulary, source, tmp_path / "out.tif", polygons=True)
    content = json.loads((tmp_path / "out.geojson").read_text())
    assert len(content["features"]) == result.polygons
    with rasterio.open(tmp_path / "out.tif") as file:
        shapes = [
            (transform_geom("EPSG:4326", UTM, one["geometry"]), CLASSES.index(name))
            for one in content["features"]
            for name in [one["properties"]["class"]]
        ]
        drawn = rasterize(shapes, file.shape, fill=99, transform=file.transform)
        assert np.array_equal(drawn, file.read(1))
    total = sum(one["properties"]["pixels"] for one in content["features"])
    assert total == 60 * 70
    few = segment(vocabulary, source, tmp_path / "out.tif", polygons=True, minimum_area=200)
    large = [one for one in content["features"] if one["properties"]["pixels"] >= 200]
    assert few.polygons == len(large) < len(content["features"])


def test_a_word_background_has_polygons(model: Talk2DINO, tmp_path: Path) -> None:
    """Unlike what no class fits."""
    source = write(tmp_path / "map.tif", noise(60, 70))
    for background in (None, 0.5):
        words = ["background", "roof"] if background is None else ["roof", "tree"]
        vocabulary = model.open_vocabulary(words, background, short_side=SIDE)
        found = segment(vocabulary, source, tmp_path / "out.tif", polygons=True)
        content = json.loads((tmp_path / "out.geojson").read_text())
        traced = dict.fromkeys(found.pixels, 0)
        for one in content["features"]:
            traced[one["properties"]["class"]] += one["properties"]["pixels"]
        assert min(found.pixels[name] for name in list(found.pixels)[:2]) > 0
        assert traced == found.pixels | ({"background": 0} if background else {})


def test_sixteen_bits_are_stretched_over_the_whole_file(tmp_path: Path) -> None:
    values = np.arange(40 * 50, dtype=np.uint16).reshape(1, 40, 50) * 7
    source = write(tmp_path / "map.tif", values)
    with MapImage(source, stretch=[0, 100]) as image:
        (y, x), (height, width) = image.first, image.shape
        pixels, _ = image.read(range(y, y + height), range(x, x + width))
        wanted = np.rint(values / values.max() * 255)
        assert np.abs(pixels - wanted).max() <= 1 and (pixels[0] == pixels[2]).all()
        corner, _ = image.read(range(y + 30, y + 40), range(x, x + 10))
        assert np.array_equal(corner, pixels[:, 30:, :10])
    with MapImage(source) as image:
        assert np.allclose(image.limits, np.percentile(values, [2, 98]))
    with MapImage(source, value_range=[0, 100]) as image:
        assert np.array_equal(image.limits, [[0, 100]])


@pytest.mark.parametrize(
    ("colors", "bands", "said"),
    [
        (["blue", "green", "red"], [3, 2, 1], None),
        (["alpha", "red", "green", "blue"], [2, 3, 4], None),
        (["gray", "undefined", "undefined"], [1, 2, 3], None),
        (["gray", "undefined", "undefined", "undefined"], [1, 2, 3], r"holds 4 bands and does not"),
        (["gray", "undefined"], [1], r"holds 2 bands .* \[1\] are taken as gray; bands=\[R,G,B\]"),
        (["gray", "alpha"], [1], None),
    ],
)
def test_bands_are_taken_by_their_colors(
    colors: list[str], bands: list[int], said: str | None, tmp_path: Path
) -> None:
    pixels = np.stack([noise(20, 20, seed)[0] for seed in range(len(colors))])
    source = write(tmp_path / "map.tif", pixels, photometric="minisblack")
    with rasterio.open(source, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in colors]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ResultWarning)
        with MapImage(source) as image:
            assert image.bands == bands
            (y, x), (height, width) = image.first, image.shape
            found, _ = image.read(range(y, y + height), range(x, x + width))
    wanted = pixels[np.array(bands) - 1]
    assert np.array_equal(found, np.broadcast_to(wanted, found.shape))
    told = [str(one.message) for one in heard if one.category is ResultWarning]
    assert len(told) == (said is not None)
    if said is not None:
        assert re.search(said, told[0])


def test_pixels_that_are_no_squares_are_said(tmp_path: Path) -> None:
    long = from_origin(EAST, NORTH, 0.5, 1)
    source = write(tmp_path / "map.tif", noise(20, 20), transform=long)
    with pytest.warns(ResultWarning, match=r"map\.tif: its pixels are 0\.5 x 1 and are taken for"):
        MapImage(source).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        MapImage(source, meters_per_pixel=1).close()


def test_a_coarser_grid_holds_means(tmp_path: Path) -> None:
    pixels = noise(40, 60).astype(np.uint8)
    source = write(tmp_path / "map.tif", pixels, transform=from_origin(10, 20, 0.5, 0.5))
    with MapImage(source, meters_per_pixel=2, bands=[3, 2, 1]) as image:
        assert (image.first, image.shape, image.ratio) == ((-10, 5), (10, 15), (4, 4))
        found, valid = image.read(range(-10, 0), range(5, 20))
        means = pixels[::-1].reshape(3, 10, 4, 15, 4).mean((2, 4))
        assert np.abs(found - means).max() <= 0.51 and valid.all()
        assert image.pixel_area == 0.25


def test_bands_of_several_types_are_refused(tmp_path: Path) -> None:
    """The type is that of the bands that are read, not that of the file's first one."""
    one = write(tmp_path / "one.tif", noise(SIDE, SIDE)[:1])
    two = write(tmp_path / "two.tif", noise(SIDE, SIDE)[:1].astype(np.uint16) * 250)
    bands = "".join(
        f"""<VRTRasterBand dataType="{kind}" band="{number}"><SimpleSource>
        <SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
        </VRTRasterBand>"""
        for number, (kind, source) in enumerate(
            [("Byte", one), ("UInt16", two), ("UInt16", two)], start=1
        )
    )
    mixed = tmp_path / "mixed.vrt"
    mixed.write_text(
        f"""<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><SRS>{UTM}</SRS>
        <GeoTransform>{EAST}, 0.5, 0, {NORTH}, 0, -0.5</GeoTransform>{bands}</VRTDataset>"""
    )
    with pytest.raises(DataError, match=r"types uint16, uint8; bring them to one"):
        MapImage(mixed, bands=[1, 2, 3])
    with MapImage(mixed, bands=[2]) as image, MapImage(two) as alone:
        where = [range(a, a + n) for a, n in zip(image.first, image.shape, strict=True)]
        assert np.array_equal(image.read(*where)[0], alone.read(*where)[0])
        assert len(np.unique(image.read(*where)[0])) > 40


@pytest.mark.parametrize(
    ("crs", "corner", "area", "meters"),
    [
        (UTM, (EAST, NORTH), 0.25, None),
        ("EPSG:32632+5773", (EAST, NORTH), 0.25, None),
        ("EPSG:2263", (1e6, 2e5), 0.25 * 0.3048006096**2, None),
        ("EPSG:6933", (1e6, 6.3e6), 0.25, "0.59 to 1.69"),  # areas are kept, lengths are not
        ("EPSG:3857", (1e6, 8.4e6), None, "0.50"),
        ("EPSG:900913", (1e6, 8.4e6), None, "0.50"),
        ("ESRI:102113", (1e6, 8.4e6), None, "0.50"),
        ("EPSG:3857+5773", (1e6, 8.4e6), None, "0.50"),
        ("EPSG:3832", (1e6, 8.4e6), None, "0.50"),
        ("EPSG:4087", (1e6, 6.68e6), None, "0.50 to 1.00"),
        ("IAU_2015:30110", (1e6, 1e5), None, None),
    ],
)
def test_the_ground_is_measured_where_meters_are_its_own(
    tmp_path: Path, crs: str, corner: tuple[float, float], area: float | None, meters: str | None
) -> None:
    place = from_origin(*corner, 0.5, 0.5)
    source = write(tmp_path / "map.tif", noise(SIDE, SIDE), crs=crs, transform=place)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ResultWarning)
        unit = 1 if crs != "EPSG:2263" else 0.3048
        with MapImage(source, meters_per_pixel=unit) as image:
            assert image.pixel_area == (area and pytest.approx(area))
    told = [str(one.message) for one in heard if one.category is ResultWarning]
    assert len(told) == (meters is not None)
    if meters is not None:
        assert f"stretches the ground; meters_per_pixel=1 is {meters} m in this file" in told[0]


def test_a_map_of_the_world_is_measured_at_its_corners_too(tmp_path: Path) -> None:
    place = from_origin(-2e7, 1e7, 5e5, 5e5)
    source = write(tmp_path / "map.tif", noise(40, 80), crs="EPSG:3857", transform=place)
    with pytest.warns(ResultWarning, match=r"meters_per_pixel=1 is 0\.40 to 1\.00 m"):
        image = MapImage(source, meters_per_pixel=5e5)
    assert image.pixel_area is None
    image.close()


def test_degrees_that_are_no_squares_on_the_ground_are_said(tmp_path: Path) -> None:
    place = from_origin(10, 60, 1e-5, 1e-5)
    source = write(tmp_path / "map.tif", noise(20, 20), crs="EPSG:4326", transform=place)
    wanted = r"pixels are 0\.558\d+ x 1\.114\d+ m and are taken .* rio warp .* EPSG:32632"
    with pytest.warns(ResultWarning, match=wanted):
        MapImage(source).close()


def test_rational_polynomials_are_refused(tmp_path: Path) -> None:
    """The label map would lie nowhere."""
    source = write(tmp_path / "map.tif", noise(20, 20), crs=None, transform=Affine.identity())
    one = [1.0, *[0.0] * 19]
    with rasterio.open(source, "r+") as file:
        file.rpcs = rasterio.rpc.RPC(
            **{"height_off": 0, "height_scale": 1, "lat_off": 48, "lat_scale": 1, "line_off": 9},
            **{"line_scale": 9, "long_off": 8, "long_scale": 1, "samp_off": 9, "samp_scale": 9},
            **{f"{side}_{part}_coeff": one for side in ("line", "samp") for part in ("num", "den")},
        )
    with pytest.raises(DataError, match=r"\(RPC\); warp it first: gdalwarp -rpc .* map\.tif"):
        MapImage(source)


def test_without_georeference(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    source = write(tmp_path / "map.tif", noise(60, 70), crs=None, transform=Affine.identity())
    segment(vocabulary, source, tmp_path / "out.tif", scale=2, polygons=True)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.crs is None and file.shape == (60, 70)
    content = json.loads((tmp_path / "out.geojson").read_text())
    rings = [ring for one in content["features"] for ring in one["geometry"]["coordinates"]]
    assert np.concatenate(rings).max(0).tolist() == [70, 60]
    with pytest.raises(DataError, match=r"no georeference.*scale=2"):
        MapImage(source, meters_per_pixel=1)


@pytest.mark.parametrize(
    ("profile", "options", "message"),
    [
        ({"transform": Affine.rotation(10)}, {}, "rotated.*rio warp map.tif"),
        ({"transform": Affine(1, 0, 3, 0, 1, 3)}, {}, "north is not up"),
        (
            {"crs": "EPSG:4326", "transform": from_origin(8, -49, 1e-5, 1e-5)},
            {"meters_per_pixel": 1},
            "degrees.*EPSG:32732",
        ),
        (
            {"crs": 'LOCAL_CS["here",UNIT["metre",1]]'},
            {"meters_per_pixel": 1},
            "coordinates are no plane's",
        ),
        ({"crs": "EPSG:4326"}, {}, "are no degrees.*gdal_edit.py"),
        ({}, {"meters_per_pixel": 100}, "200 pixels"),
        ({}, {"meters_per_pixel": float("nan")}, "positive"),
        ({}, {"meters_per_pixel": 1, "scale": 2}, "one of them"),
        ({}, {"bands": [1, 2]}, r"bands=\[1, 2\]"),
        ({}, {"bands": [1, 2, 4]}, "which has 3"),
        ({}, {"stretch": [98, 2]}, "stretch"),
        ({}, {"value_range": [0, float("nan")]}, "value_range"),
        ({}, {"value_range": [0, 1], "stretch": [0, 1]}, "not both"),
    ],
)
def test_what_cannot_be_segmented_is_said(
    tmp_path: Path, profile: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "map.tif", noise(20, 20), **profile)
    with pytest.raises((ConfigError, DataError), match=message):
        MapImage(source, **options)


def test_files_of_other_origin_stay(vocabulary: OpenVocabulary, tmp_path: Path) -> None:
    source = write(tmp_path / "map.tif", noise(40, 40))
    other = write(tmp_path / "other.tif", noise(40, 40))
    before = other.read_bytes()
    with pytest.raises(ConfigError, match=r"other.tif.*overwrite=true"):
        segment(vocabulary, source, other)
    with pytest.raises(ConfigError, match="is the input itself"):
        segment(vocabulary, source, source, overwrite=True)
    (tmp_path / ".third.tif.parts").mkdir()
    (tmp_path / ".third.tif.parts" / "mine.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"third.tif.parts"):
        segment(vocabulary, source, tmp_path / "third.tif")
    assert other.read_bytes() == before
    segment(vocabulary, source, other, overwrite=True)
    segment(vocabulary, source, other)  # it is ours now
    with pytest.raises(ConfigError, match=r"labels.png"):
        segment(vocabulary, source, tmp_path / "labels.png")


def test_a_broken_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "map.tif").write_bytes(b"II*\0 nothing")
    with pytest.raises(DataError, match=r"map.tif: cannot be read as a map"):
        MapImage(tmp_path / "map.tif")
    with pytest.raises(DataError, match="no such file"):
        MapImage(tmp_path / "absent.tif")


def test_places_that_do_not_fit_the_plane(tmp_path: Path) -> None:
    """Longitudes go on across the antimeridian; a local plane has no known area."""
    squares = [np.array([[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]])]
    places = {"EPSG:3857": 20037500, "EPSG:4326": 200}
    for crs, west in places.items():
        step = 10 if crs == "EPSG:3857" else 1e-5
        source = write(
            tmp_path / "map.tif", noise(20, 20), crs=crs, transform=from_origin(west, 0, step, step)
        )
        with rasterio.open(source) as file:
            east = np.array(_placed(file, squares)[0])[:, 0]
        assert np.abs(np.diff(east)).max() < 0.01
        assert east[0] == pytest.approx(-180 if west > 200 else -160, abs=1e-3)
    source = write(tmp_path / "map.tif", noise(20, 20), crs='LOCAL_CS["here",UNIT["metre",1]]')
    with MapImage(source) as image:
        assert image.pixel_area is None


def test_what_would_be_black_is_said(tmp_path: Path) -> None:
    values = np.full((1, 40, 50), 700, np.uint16)
    wanted = "band 1 shows little with black at"
    with pytest.warns(ResultWarning, match=f"{wanted} 700 and white at 700"):
        MapImage(write(tmp_path / "map.tif", values)).close()
    values[:, :, 9:] = np.arange(41) * 9
    source = write(tmp_path / "map.tif", values)
    with pytest.warns(ResultWarning, match=f"{wanted} 5000 and white at 6000"):
        MapImage(source, value_range=[5000, 6000]).close()
    floats = np.where(np.arange(50) < 9, -9999, np.arange(50)).astype(np.float32)
    floats = np.broadcast_to(floats, (1, 40, 50)).copy()
    with pytest.warns(ResultWarning, match=f"{wanted} -9999.*a_nodata"):
        MapImage(write(tmp_path / "map.tif", floats)).close()
    floats[0, 0, :3] = np.inf, -np.inf, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with MapImage(write(tmp_path / "map.tif", floats), value_range=[0, 49]) as image:
            (y, x), (height, width) = image.first, image.shape
            pixels, _ = image.read(range(y, y + height), range(x, x + width))
            assert (pixels[:, 0, :3] == 0).all() and pixels[0, 0, -1] == 255


def test_numbers_that_are_none_are_black_whatever_zero_is(tmp_path: Path) -> None:
    """Of decibels all are below zero, which would be white."""
    decibels = np.full((1, 20, 20), -15, np.float32)
    decibels[0, 3, 4] = np.nan
    source = write(tmp_path / "map.tif", decibels, nodata=-9999)
    with MapImage(source, value_range=[-20, -10]) as image:
        where = [range(a, a + n) for a, n in zip(image.first, image.shape, strict=True)]
        pixels = image.read(*where)[0]
    assert set(pixels[:, 3, 4].tolist()) == {0} and np.unique(pixels).tolist() == [0, 128]
