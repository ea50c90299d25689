"""Polygons are read back alike, however small, ragged or crowded the areas are."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from talk2dino.annotations.outlines import outline, polygons, rings
from talk2dino.inference.segmented import SegmentedImage
from tests.helpers.shared import shared_path

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
CLOSE = 0.98


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """IoU."""
    return float(np.count_nonzero(one & other) / np.count_nonzero(one | other))


def decoded(rings: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    """What pycocotools reads."""
    read = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, *shape)))
    return np.asarray(read, bool)


def filled(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What readers of YOLO labels draw."""
    return cv2.fillPoly(np.zeros(shape, np.uint8), [points.astype(np.int32)], 1).astype(bool)


def photographs() -> Iterator[SegmentedImage]:
    """Label maps of photographs."""
    for path in sorted((shared_path("realdata/coco100") / "masks").iterdir())[:5]:
        _, labels = np.unique(np.asarray(Image.open(path)), return_inverse=True)
        labels = torch.from_numpy(labels.reshape(Image.open(path).size[::-1]))
        names = [f"class {number}" for number in range(int(labels.max()) + 1)]
        image = torch.zeros(3, *labels.shape, dtype=torch.uint8)
        yield SegmentedImage(labels, names, image, torch.rand(len(names), 8, 8))


@pytest.mark.parametrize("instances", [False, True])
def test_coco_polygons_of_photographs(instances: bool) -> None:
    for segmented in photographs():
        shape = (segmented.labels.shape[0], segmented.labels.shape[1])
        found = segmented.to_coco(instances=instances, polygons=True)["annotations"]
        whole = segmented.to_coco(instances=instances)["annotations"]
        assert len(found) == len(whole) >= 3
        for one, truth in zip(found, whole, strict=True):
            mask = coco_mask.decode(truth["segmentation"]).astype(bool)
            assert alike(decoded(one["segmentation"], shape), mask) >= CLOSE, one["area"]


def test_yolo_lines_of_photographs() -> None:
    """Every connected area has its line, however readers come to whole numbers."""
    for segmented in photographs():
        height, width = segmented.labels.shape
        lines = [line.split() for line in segmented.to_yolo().splitlines()]
        for number in range(len(segmented.classes)):
            areas, count = ndimage.label((segmented.labels == number).numpy(), np.ones((3, 3)))
            places = [np.array(p, float).reshape(-1, 2) for n, *p in lines if int(n) == number]
            assert len(places) == count
            for place in places:
                points = place * (width, height)
                drawn = filled(points, (height, width))
                area = areas == np.bincount(areas[drawn])[1:].argmax() + 1
                assert alike(drawn, area) >= CLOSE
                assert (filled(points.round(), (height, width)) == drawn).all()


def test_tiny_areas_keep_their_pixels() -> None:
    """All shapes of up to 3 x 3 pixels."""
    for number in range(1, 512):
        mask = np.array([number >> bit & 1 for bit in range(9)], np.uint8).reshape(3, 3)
        found = [outline(one).ravel().tolist() for one in polygons(mask, 0.75)]
        np.testing.assert_array_equal(decoded(found, (3, 3)), mask)
        drawn = [filled(np.resize(ring, (max(len(ring), 3), 2)), (3, 3)) for ring in rings(mask, 2)]
        np.testing.assert_array_equal(np.any(drawn, 0), mask)


def test_thinned_polygons_stay_apart() -> None:
    """Together they are a valid MultiPolygon, also where islands lie close to a shore."""
    random = np.random.default_rng(1)
    for _ in range(150):
        height, width = random.integers(8, 60, 2)
        field = ndimage.gaussian_filter(random.random((height, width)), random.uniform(0.6, 3))
        mask = (field > np.quantile(field, random.uniform(0.2, 0.8))).astype(np.uint8)
        for tolerance in (1.5, 3):
            whole = shapely.MultiPolygon(polygons(mask, tolerance))
            assert whole.is_valid, shapely.is_valid_reason(whole)


def test_polygons_of_noise() -> None:
    """No shape is too odd: half the pixels at random, holes that touch corners, single pixels."""
    random = np.random.default_rng(0)
    for _ in range(40):
        height, width = random.integers(1, 25, 2)
        mask = (random.random((height, width)) < random.choice([0.2, 0.5, 0.8])).astype(np.uint8)
        found = polygons(mask, 0)
        assert all(one.is_valid for one in found)
        assert sum(one.area for one in found) == mask.sum()
        if mask.any():
            flat = [outline(one).ravel().tolist() for one in found]
            np.testing.assert_array_equal(decoded(flat, mask.shape), mask)
        for tolerance in (1, 3):
            assert all(shapely.is_valid(one) for one in polygons(mask, tolerance))
            assert all(len(one) for one in rings(mask, tolerance))
