"""Every format is read back by the library of its own ecosystem and gives the same pixels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from talk2dino.annotations.base import _NO_TEXT, AnnotatedPicture, Category, Options
from talk2dino.annotations.data_sets import write_data_sets
from talk2dino.annotations.labelstudio import brush
from talk2dino.datasets.benchmarks.classes import check_word
from talk2dino.errors import ConfigError, DataError
from talk2dino.inference.segmented import SegmentedImage

HEIGHT, WIDTH = 150, 200
NAMES = ["cat", 'sofa & "couch"', "brick wall", "nowhere"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
CATEGORIES = [Category(name, (name, "one"), (250, 10, 160)) for name in NAMES]
POLYGONS = 0.98  # IoU at the default tolerance


@pytest.fixture(scope="module")
def segmented() -> SegmentedImage:
    """Blobs with holes, islands in holes, lines, dots and diagonals; background around."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 6, 8, generator=random)
    smooth = torch.nn.functional.interpolate(coarse[None], (HEIGHT, WIDTH), mode="bicubic")[0]
    labels = 1 + smooth.argmax(0)
    labels[smooth.amax(0) < 0.62] = 0
    labels[40:90, 50:110] = 1  # a frame with a frame in its hole
    labels[48:82, 58:102] = 3
    labels[56:74, 66:94] = 1
    labels[60:70, 72:84] = 0
    labels[120, 20:60] = 2  # a line, dots that touch at corners, a dot in the corner
    labels[100:104, 5:9] = torch.eye(4, dtype=torch.long)
    labels[-1, -1] = 1
    scores = torch.rand(4, HEIGHT // 2, WIDTH // 2, generator=random)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    words = {name: (name, "one") for name in NAMES}
    return SegmentedImage(labels, ["background", *NAMES], image, scores, None, 0.5, words)


def truth(segmented: SegmentedImage) -> dict[str, np.ndarray]:
    """The pixels of every class that is there."""
    masks = {n: (segmented.labels == i + 1).numpy() for i, n in enumerate(NAMES)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], at_least: float) -> None:
    """The same classes; the same pixels, or nearly."""
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        if at_least == 1:
            np.testing.assert_array_equal(found[name], mask)
        else:
            assert (found[name] & mask).sum() / (found[name] | mask).sum() >= at_least, name


def united(masks: Iterator[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The pixels of every class, of all its masks."""
    found: dict[str, np.ndarray] = {}
    for name, mask in masks:
        found[name] = found.get(name, np.zeros((HEIGHT, WIDTH), bool)) | mask.astype(bool)
    return found


@pytest.mark.parametrize("name", ["", "/photos/cat.jpg", "../cat.jpg", "a/../../cat.jpg"])
def test_a_picture_lies_below_its_data_set(
    segmented: SegmentedImage, tmp_path: Path, name: str
) -> None:
    """The label file of another name would land beside the user's own picture."""
    name = name.replace("/photos", str(tmp_path))
    for formats in (["yolo"], ["coco"]):
        with pytest.raises(ConfigError, match=r"^file_name=.*give '(cat\.jpg|image\.png)'$"):
            segmented.save_annotations(tmp_path / "out", formats, name)
    with pytest.raises(ConfigError, match="file_name="):
        segmented.to_yolo(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"foo": 1}, "foo: no such option; choose among instances, minimum_area"),
        ({"instances": "yes"}, "instances='yes': use true or false"),
        ({"polygons": 1}, "polygons=1: use true or false"),
        ({"image_root_url": 5}, "image_root_url=5: use a text"),
        ({"file_name": 5}, "file_name=5: give a text or a path"),
        ({"file_name": "a\0b.png"}, r"file_name='a\x00b.png': '\x00' is no character"),
        ({"file_name": "a\udce9.png"}, r"file_name='a\udce9.png': '\udce9' is no character"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    segmented: SegmentedImage, given: dict[str, Any], said: str
) -> None:
    for call in (segmented.to_coco, segmented.to_yolo):
        with pytest.raises(ConfigError) as caught:
            call(**given)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_path_names_the_picture(segmented: SegmentedImage) -> None:
    path = Path("q") / "images" / "z.png"
    assert segmented.to_coco(path)["images"][0]["file_name"] == "q/images/z.png"
    assert segmented.to_coco(PurePosixPath(path)) == segmented.to_coco(path)
    assert segmented.to_yolo(path) == segmented.to_yolo()


def test_small_areas_are_left_out_of_masks_per_class() -> None:
    """In every format: YOLO has a line per area, and COCO's polygons are the same areas."""
    labels = torch.zeros(40, 60, dtype=torch.long)
    labels[5:20, 5:20] = labels[30, 10:19] = labels[35:38, 40:43] = 1
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    segmented = SegmentedImage(labels, ["sky", "bolt"], image, torch.rand(2, 4, 6))
    for least, kept in ((1, 225 + 9 + 9), (9, 225 + 9 + 9), (10, 225), (226, 0)):
        options = {"minimum_area": least}
        found = segmented.to_coco(**options)["annotations"]
        assert sum(one["area"] for one in found if one["category_id"] == 2) == kept
        lines = [one for one in segmented.to_yolo(**options).splitlines() if one[0] == "1"]
        assert len(lines) == {243: 3, 225: 1, 0: 0}[kept]


def test_coco_masks(segmented: SegmentedImage, tmp_path: Path) -> None:
    segmented.save_annotations(tmp_path, ["coco"], "pictures/a.png")
    coco = COCO(str(tmp_path / "coco" / "instances.json"))
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == NAMES
    assert coco.cats[2]["synonyms"] == [NAMES[1], "one"]
    (image,) = coco.loadImgs(coco.getImgIds())
    assert image == {"id": 1, "file_name": "pictures/a.png", "width": WIDTH, "height": HEIGHT}
    entries = coco.loadAnns(coco.getAnnIds())
    read = [(coco.cats[one["category_id"]]["name"], coco.annToMask(one)) for one in entries]
    assert len(read) == 3  # one per class that is there
    same(united(iter(read)), truth(segmented), 1)
    for entry, (name, mask) in zip(entries, read, strict=True):
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert entry["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert entry["area"] == mask.sum()
        scores = segmented.scores[segmented.index(name)].numpy()
        assert entry["score"] == pytest.approx(scores[mask == 1].mean(), abs=1e-5)


def test_coco_instances(segmented: SegmentedImage) -> None:
    """Connected areas as SciPy finds them, those below the smallest size left out."""
    for smallest in (1, 3):
        found = segmented.to_coco(instances=True, minimum_area=smallest)["annotations"]
        for number, (name, mask) in enumerate(truth(segmented).items(), 1):
            parts, _ = ndimage.label(mask, np.ones((3, 3)))
            areas = np.bincount(parts.ravel())[1:]
            mine = [one for one in found if one["category_id"] == number]
            assert [one["area"] for one in mine] == sorted(areas[areas >= smallest], reverse=True)
            for one in mine:
                decoded = coco_mask.decode(one["segmentation"])
                (part,) = np.unique(parts[decoded == 1])
                np.testing.assert_array_equal(decoded, parts == part, err_msg=name)
    assert segmented.to_coco(minimum_area=10**6)["annotations"] == []


@pytest.mark.parametrize(("tolerance", "at_least"), [(0, 1), (Options().tolerance, POLYGONS)])
@pytest.mark.parametrize("instances", [False, True])
def test_coco_polygons(
    segmented: SegmentedImage, tmp_path: Path, tolerance: float, at_least: float, instances: bool
) -> None:
    segmented.save_annotations(
        tmp_path, ["coco"], polygons=True, tolerance=tolerance, instances=instances
    )
    coco = COCO(str(tmp_path / "coco" / "instances.json"))
    entries = coco.loadAnns(coco.getAnnIds())
    assert all(isinstance(one["segmentation"], list) for one in entries)
    read = ((coco.cats[one["category_id"]]["name"], coco.annToMask(one)) for one in entries)
    same(united(read), truth(segmented), at_least)


@pytest.mark.parametrize(("tolerance", "at_least"), [(0, 1), (Options().tolerance, POLYGONS)])
def test_yolo(segmented: SegmentedImage, tmp_path: Path, tolerance: float, at_least: float) -> None:
    """Read by supervision, which rounds places; Ultralytics cuts their decimals off."""
    supervision = pytest.importorskip("supervision")
    segmented.save_annotations(tmp_path, ["yolo"], "a.png", tolerance=tolerance)
    folder = tmp_path / "yolo"
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "a.png")
    read = supervision.DetectionDataset.from_yolo(
        str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml")
    )
    assert read.classes == NAMES
    ((_, _, found),) = list(read)
    masks = zip(found.class_id, found.mask, strict=True)
    same(united((NAMES[number], mask) for number, mask in masks), truth(segmented), at_least)

    import cv2

    def drawn() -> Iterator[tuple[str, np.ndarray]]:
        for line in (folder / "labels" / "a.txt").read_text().splitlines():
            number, *places = line.split()
            points = np.array(places, np.float32).reshape(-1, 2) * (WIDTH, HEIGHT)
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            yield NAMES[int(number)], cv2.fillPoly(mask, [points.astype(np.int32)], 1)

    same(united(drawn()), truth(segmented), at_least)


def test_yolo_in_ultralytics(segmented: SegmentedImage, tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask

    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(photo)
    picture = AnnotatedPicture("a.png", HEIGHT, WIDTH, segmented.annotations(), photo)
    write_data_sets([picture], CATEGORIES, tmp_path, ["yolo"], Options(tolerance=0))
    data = check_det_dataset(str(tmp_path / "yolo" / "data.yaml"))
    (label,) = YOLODataset(data["train"], data=data, task="segment", imgsz=WIDTH).labels
    numbers = label["cls"].ravel().astype(int)
    polygons = (one * (WIDTH, HEIGHT) for one in label["segments"])
    masks = (polygon2mask((HEIGHT, WIDTH), [one.reshape(-1)]) for one in polygons)
    read = ((NAMES[number], mask) for number, mask in zip(numbers, masks, strict=True))
    same(united(read), truth(segmented), 1)


def unpacked(rle: list[int]) -> np.ndarray:
    """The values of a brush, bit by bit as the format is described."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    count, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    return np.array(values)


def test_labelstudio(segmented: SegmentedImage, tmp_path: Path) -> None:
    segmented.save_annotations(tmp_path, ["labelstudio"], "a.png", instances=True)
    config = ElementTree.parse(tmp_path / "labelstudio" / "label_config.xml")
    assert [one.get("value") for one in config.iter("Label")] == NAMES
    task = segmented.to_labelstudio("a.png", instances=True)
    assert [task] == json.loads((tmp_path / "labelstudio" / "tasks.json").read_text())
    assert task["data"] == {"image": "/data/local-files/?d=a.png"}
    (prediction,) = task["predictions"]
    result = prediction["result"]
    assert all((one["from_name"], one["to_name"]) == ("label", "image") for one in result)
    assert all(0 < one["score"] < 1 for one in result) and 0 < prediction["score"] < 1

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for one in result:
            pixels = unpacked(one["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)
            assert (pixels == pixels[..., :1]).all() and set(np.unique(pixels)) <= {0, 255}
            yield one["value"]["brushlabels"][0], pixels[..., 3] > 0

    same(united(masks()), truth(segmented), 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70000), (300, 257), (3, 5)])
@pytest.mark.parametrize("value", [0, 1, None])
def test_brushes_of_all_lengths(shape: tuple[int, int], value: int | None) -> None:
    mask = np.full(shape, value or 0, np.uint8)
    if value is None:
        mask[0, :: shape[1] // 2 + 1] = 1
    np.testing.assert_array_equal(unpacked(list(brush(mask))), 255 * mask.ravel().repeat(4))


def test_brushes_of_cut_out_masks() -> None:
    """A part of the picture and its place give the bytes of the whole."""
    random = np.random.default_rng(0)
    for _ in range(300):
        whole = np.zeros(random.integers(1, 8, 2), np.uint8)
        top, left = (int(random.integers(0, side)) for side in whole.shape)
        part = whole[top:, left:][: random.integers(1, 8), : random.integers(1, 8)]
        part[:] = random.random(part.shape) < random.choice([0.5, 0.9, 1])
        assert brush(part, (left, top), whole.shape) == brush(whole)
        np.testing.assert_array_equal(unpacked(list(brush(whole))), 255 * whole.ravel().repeat(4))


def test_a_brush_costs_what_its_mask_has(
    segmented: SegmentedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of masks of a large photograph are not gone through pixel by pixel."""
    seen = []
    monkeypatch.setattr(
        "talk2dino.annotations.labelstudio.brush", lambda mask, *_: seen.append(mask.size) or b""
    )
    found = segmented.to_coco(instances=True)["annotations"]
    segmented.to_labelstudio(instances=True)
    assert seen == [one["bbox"][2] * one["bbox"][3] for one in found]


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("/data/local-files/?d=", "a%20b%23.png"),
        ("https://x.org/", "a%20b%23.png"),
        ("s3://bucket/", "a b#.png"),
    ],
)
def test_keys_of_a_cloud_storage_are_not_quoted(
    segmented: SegmentedImage, root: str, name: str
) -> None:
    task = segmented.to_labelstudio("a b#.png", image_root_url=root)
    assert task["data"]["image"] == root + name


def test_labelstudio_in_its_sdk(segmented: SegmentedImage, tmp_path: Path) -> None:
    pytest.importorskip("label_studio_sdk", minversion="2.1")  # before, it takes no brush for valid
    from label_studio_sdk.converter.brush import decode_from_annotation
    from label_studio_sdk.label_interface import LabelInterface

    segmented.save_annotations(tmp_path, ["labelstudio"])
    interface = LabelInterface((tmp_path / "labelstudio" / "label_config.xml").read_text())
    (prediction,) = segmented.to_labelstudio()["predictions"]
    assert interface.validate_prediction(prediction)
    results = [one | one["value"] for one in prediction["result"]]
    layers = decode_from_annotation("label", results)
    read = {key.removeprefix("label-").removesuffix("-0"): m > 0 for key, m in layers.items()}
    same(read, truth(segmented), 1)


def test_cvat(segmented: SegmentedImage) -> None:
    """Run lengths unrolled by hand: rows within the box, zeros first."""
    tree = ElementTree.fromstring(segmented.to_cvat("a & b.png"))
    assert [one.text for one in tree.iterfind("meta/task/labels/label/name")] == NAMES
    (image,) = tree.iterfind("image")
    size = {"width": str(WIDTH), "height": str(HEIGHT)}
    assert image.attrib == {"id": "0", "name": "a & b.png", **size}

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for one in image.iterfind("mask"):
            values = [number % 2 for number, length in enumerate(one.attrib["rle"].split(", "))
                      for _ in range(int(length))]  # fmt: skip
            left, top, width, height = (
                int(one.attrib[key]) for key in ("left", "top", "width", "height")
            )
            mask = np.zeros((HEIGHT, WIDTH), bool)
            part = np.array(values, bool).reshape(height, width)
            mask[top : top + height, left : left + width] = part
            yield one.attrib["label"], mask

    same(united(masks()), truth(segmented), 1)


def test_what_xml_cannot_hold_is_no_word() -> None:
    for letter in _NO_TEXT.findall("".join(map(chr, range(sys.maxunicode + 1)))):
        with pytest.raises(DataError, match="control character"):
            check_word(f"a{letter}b", "classes")


def test_cvat_in_datumaro(segmented: SegmentedImage, tmp_path: Path) -> None:
    datumaro = pytest.importorskip("datumaro", minversion="1.13")  # 0.5 reads no masks
    segmented.save_annotations(tmp_path, ["cvat"], "a.png")
    (tmp_path / "cvat" / "images").mkdir()  # where it wants the pictures
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "cvat" / "images" / "a.png")
    read = datumaro.Dataset.import_from(str(tmp_path / "cvat" / "annotations.xml"), "cvat")
    names = [one.name for one in read.categories()[datumaro.AnnotationType.label]]
    assert names == NAMES
    (item,) = list(read)
    masks = ((names[one.label], one.image) for one in item.annotations)
    same(united(masks), truth(segmented), 1)


@pytest.mark.parametrize(("tolerance", "at_least"), [(0, 1), (Options().tolerance, POLYGONS)])
def test_geojson(segmented: SegmentedImage, tolerance: float, at_least: float) -> None:
    """Valid polygons for shapely, which hold the centers of the class's pixels."""
    import shapely

    found = segmented.to_geojson("a.png", tolerance=tolerance)
    assert found["type"] == "FeatureCollection"
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for feature in found["features"]:
            shape = shapely.geometry.shape(feature["geometry"])
            assert shape.is_valid, shapely.is_valid_reason(shape)
            for part in shapely.get_parts(shape):
                assert part.exterior.is_ccw and not any(one.is_ccw for one in part.interiors)
            given = feature["properties"]
            assert given["image"] == "a.png" and 0 < given["score"] < 1
            if tolerance == 0:
                assert shape.area == given["area"]
            yield given["class"], shapely.contains_xy(shape, columns, rows)

    same(united(masks()), truth(segmented), at_least)
