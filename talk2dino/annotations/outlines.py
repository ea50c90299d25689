"""Masks as polygons with holes, and polygons with holes as one ring for formats without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from talk2dino.annotations.base import Mask

Ring: TypeAlias = npt.NDArray[np.float64]  # [N, 2] x and y, the last point is not the first


def polygons(mask: Mask, tolerance: float) -> list[Any]:
    """Valid shapely polygons along the edges of the pixels: pixel (x, y) covers x…x+1, y…y+1.

    Args:
        mask: `[H, W]` of 0 and 1.
        tolerance: pixels by which the outline may move; 0 removes nothing but points on straight
            lines, and the polygons cover the mask's pixels exactly.

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
    simple = shapely.simplify(shapely.get_parts(plain), tolerance)
    return [shapely.geometry.polygon.orient(one) for one in simple]


def rings(mask: Mask, tolerance: float) -> list[Ring]:
    """One ring per connected area, through the centers of its outermost pixels, holes joined in.

    Filled with its line, as readers of YOLO labels do with OpenCV's `fillPoly`, it is the mask
    itself if `tolerance` is 0.

    Args:
        mask: `[H, W]` of 0 and 1.
        tolerance: pixels by which the outline may move.
    """
    import cv2

    def thinned(ring: npt.NDArray[np.int32]) -> Ring:
        simple = cv2.approxPolyDP(ring.astype(np.int32), tolerance, True).reshape(-1, 2)
        return simple.astype(np.float64)  # type: ignore[no-any-return]

    return [
        joined(thinned(shell), [thinned(hole) for hole in holes]) for shell, holes in _traced(mask)
    ]


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


def _traced(mask: Mask) -> list[tuple[npt.NDArray[np.int32], list[npt.NDArray[np.int32]]]]:
    """Outer contour and holes of every connected area, `[N, 2]` each."""
    import cv2

    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    points = [contour.reshape(-1, 2) for contour in contours]
    parents = [int(node[3]) for node in tree[0]] if points else []
    return [
        (points[shell], [points[hole] for hole, above in enumerate(parents) if above == shell])
        for shell, parent in enumerate(parents)
        if parent < 0
    ]
