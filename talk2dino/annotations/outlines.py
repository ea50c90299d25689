"""Masks as polygons with holes, and polygons with holes as one ring for formats without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from talk2dino.annotations.base import Mask

Ring: TypeAlias = npt.NDArray[np.float64]  # [N, 2] x and y, the last point is not the first
Contour: TypeAlias = npt.NDArray[np.int32]  # [N, 2] pixels
CLOSE = 0.98  # IoU that an area keeps when its outline is thinned


def polygons(mask: Mask, tolerance: float) -> list[Any]:
    """Valid shapely polygons along the edges of the pixels: pixel (x, y) covers x…x+1, y…y+1.

    Together they are valid, too: they touch at corners only.

    Args:
        mask: `[H, W]` of 0 and 1.
        tolerance: pixels by which the outline may move; 0 removes nothing but points on straight
            lines, and the polygons cover the mask's pixels exactly. It is halved for a polygon
            that pycocotools would read with less than `CLOSE` IoU.

    Returns:
        Polygons with holes; outer rings run counterclockwise as x and y are numbers.
    """
    import shapely

    # Contours run through pixels. With every pixel halved, the outermost halves tell the edge.
    traced = [
        shapely.Polygon((shell + 1) // 2, [(hole + 1) // 2 for hole in holes])
        for shell, holes in _traced(mask.repeat(2, 0).repeat(2, 1))
    ]
    parts = shapely.get_parts(shapely.make_valid(np.array(traced, dtype=object)))
    plain = [one for one in parts if one.geom_type.endswith("Polygon")]
    exact = shapely.simplify(shapely.get_parts(plain), 0)
    simple, allowed = exact.copy(), np.full(len(exact), float(tolerance))
    todo = np.flatnonzero(allowed)
    while len(todo):
        simple[todo] = shapely.simplify(exact[todo], allowed[todo])
        far = {n for n in todo if _read_alike(exact[n], simple[n], *mask.shape) < CLOSE}
        todo = np.array([n for n in sorted(far | _meeting(simple)) if allowed[n]], np.intp)
        allowed[todo] = [_smaller(one) for one in allowed[todo]]
    return [shapely.geometry.polygon.orient(one) for one in simple]


def rings(mask: Mask, tolerance: float) -> list[Ring]:
    """One ring per connected area, through the centers of its outermost pixels, holes joined in.

    Filled with its line, as readers of YOLO labels do with OpenCV's `fillPoly`, it is the mask
    itself if `tolerance` is 0.

    Args:
        mask: `[H, W]` of 0 and 1.
        tolerance: pixels by which the outline may move; halved for an area that would be read with
            less than `CLOSE` IoU.
    """
    import cv2

    found = []
    for shell, holes in _traced(mask):
        box = cv2.boundingRect(shell)
        exact = _filled([shell, *holes], box)
        ring, allowed = _ring(shell, holes, tolerance), tolerance
        while allowed and _overlap(exact, _filled([ring], box)) < CLOSE:
            allowed = _smaller(allowed)
            ring = _ring(shell, holes, allowed)
        found.append(ring)
    return found


def _ring(shell: Contour, holes: Sequence[Contour], tolerance: float) -> Ring:
    """One ring of whole numbers: readers that round and those that cut decimals off agree."""
    import cv2

    simple = [cv2.approxPolyDP(one, tolerance, True).reshape(-1, 2) for one in (shell, *holes)]
    ring: Ring = joined(simple[0].astype(np.float64), simple[1:]).round()
    return ring


def _filled(outlines: Sequence[Ring | Contour], box: Sequence[int]) -> Mask:
    """What OpenCV fills within a box of left, top, width and height; holes are left out."""
    import cv2

    left, top, width, height = box
    points = [(one - (left, top)).astype(np.int32) for one in outlines]
    drawn: Mask = cv2.fillPoly(np.zeros((height, width), np.uint8), points, 1)
    return drawn


def _overlap(one: Mask, other: Mask) -> float:
    """IoU."""
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def outline(polygon: Any) -> Ring:
    """A shapely polygon as COCO takes it: one ring with its holes joined in, to 0.01 pixels."""
    shell, *holes = (np.asarray(one.coords[:-1]) for one in (polygon.exterior, *polygon.interiors))
    ring: Ring = joined(shell, holes).round(2)
    return ring


def _smaller(tolerance: float) -> float:
    """Half, and 0 soon: outlines of pixels have hardly anything to lose by less."""
    return tolerance / 2 if tolerance >= 0.25 else 0.0


def _read_alike(exact: Any, simple: Any, height: int, width: int) -> float:
    """IoU of what pycocotools reads from two polygons."""
    from pycocotools import mask

    rings = [outline(one).ravel().tolist() for one in (exact, simple)]
    first, second = mask.frPyObjects(rings, height, width)
    return float(mask.iou([first], [second], [0])[0, 0])


def _meeting(polygons: npt.NDArray[np.object_]) -> set[Any]:
    """Indices of the polygons that are broken, or share more than corners with another."""
    import shapely

    broken = np.flatnonzero(~shapely.is_valid(polygons))
    if len(broken) or shapely.is_valid(shapely.multipolygons(polygons)):
        return {*broken}
    one, other = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    one, other = one[one < other], other[one < other]
    apart = [
        shapely.relate_pattern(polygons[one], polygons[other], f"F***{corners}****")
        for corners in "F0"  # what the boundaries share: nothing, or points
    ]
    meet = ~np.logical_or(*apart)
    return {*one[meet], *other[meet]}


def joined(shell: Ring, holes: Sequence[Ring]) -> Ring:
    """One ring that runs along the shell and, over a bridge to and fro, around each hole.

    A bridge goes left from the leftmost point of a hole to what it meets first; holes are taken
    from the left, so it meets the shell or a hole that is joined already.
    """
    ring = shell
    for hole in sorted(holes, key=lambda one: one[:, 0].min()):
        turned = np.roll(hole, -int(hole[:, 0].argmin()), axis=0)
        x, y = turned[0]
        start, end = ring, np.roll(ring, -1, axis=0)
        crossing = np.flatnonzero((start[:, 1] <= y) != (end[:, 1] <= y))
        a, b = start[crossing], end[crossing]
        reached = a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
        left = np.flatnonzero(reached <= x)
        if len(left):
            nearest = left[reached[left].argmax()]
            after, bridge = int(crossing[nearest]), np.array([[reached[nearest], y]])
        else:  # thinning has moved the shell across the hole
            after = int(np.abs(ring - turned[0]).sum(1).argmin())
            bridge = ring[after : after + 1]
        way = [bridge, turned, turned[:1], bridge]
        ring = np.concatenate([ring[: after + 1], *way, ring[after + 1 :]])
    return ring


def _traced(mask: Mask) -> list[tuple[Contour, list[Contour]]]:
    """Outer contour and holes of every connected area, `[N, 2]` each."""
    import cv2

    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    points = [contour.reshape(-1, 2) for contour in contours]
    parents = [int(node[3]) for node in tree[0]] if points else []
    areas: dict[int, tuple[Contour, list[Contour]]] = {
        shell: (points[shell], []) for shell, above in enumerate(parents) if above < 0
    }
    for hole, above in enumerate(parents):
        if above >= 0:
            areas[above][1].append(points[hole])
    return list(areas.values())
