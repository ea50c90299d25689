"""PAMR compiled for the CPU with Numba: plain loops over the rows of a picture.

An iteration of a 448x448 window takes 9.6 million multiply-adds a class, and moves 38.5 MB of
weights once for all classes refined together and 1.8 MB of scores a class. For 21 classes the
multiply-adds fill 2 ms (two cores, two vectors of eight a cycle, 3 GHz) and 76 MB fill 3 ms at
25 GB/s: memory sets the floor, so classes share the weights and everything is read in order.

Scores are `[H, reach + W + reach, C]`: the classes of a pixel side by side, so that one weight
serves them all, and margins that repeat the first and last column, so that no loop asks where the
picture ends. Weights are `[H, len(dilations), W, 8]`, read in the order they are stored.

Import this module only where it is needed: it imports Numba. The first call compiles; the code is
kept in `__pycache__` or the user's cache, where one of them can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import factorial, log, prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from talk2dino.segmentation.portions import TOGETHER

LINE = 16  # float32 in a line of the cache
LANES, FEWEST = 8, 16  # classes are filled up to whole vectors; below 16 LLVM takes none

ZERO, ONE, TENTH, TINY = (np.float32(number) for number in (0, 1, 0.1, 1e-8))
EXPONENT = np.float32(-1 / (3 * log(2)))  # mean of three channels, exponent for 2 instead of e
SMALLEST = np.float32(-115)  # 2 to it over the number of neighbors is still a normal number
TAYLOR = tuple(np.float32(log(2) ** n / factorial(n)) for n in range(7, -1, -1))  # of 2 ** r


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the interpreter's lock, fused multiply-adds allowed."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**options)(function)


@compiled
def exp2(x: Any) -> Any:
    """2 to the power of x <= 0, within 2 units of the last place; 1 for 0 exactly.

    Of multiplications and additions alone, so that LLVM takes eight numbers at once.
    """
    x = max(x, SMALLEST)
    n = np.rint(x)
    r = x - n
    power = TAYLOR[0]
    for i in range(1, len(TAYLOR)):
        power = power * r + TAYLOR[i]
    return power * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def _neighbors(plane: Any, y: int, step: Any, width: int) -> Any:
    """Row `y` of `[H, reach + W + reach]` seen `step` rows and columns away: `[W]`."""
    left = (plane.shape[1] - width) // 2 + step[1]
    return plane[min(max(y + step[0], 0), len(plane) - 1), left : left + width]


@compiled
def _affinity(top: int, bottom: int, image: Any, steps: Any, weights: Any) -> None:
    """Rows `top..bottom` of the weights `[H, N / 8, W, 8]` (see `pamr.affinity`).

    `image` is `[3, H, reach + W + reach]`, `steps` `[N, 2]` rows and columns to the neighbors.
    """
    _, rings, width, _ = weights.shape
    samples = np.float32(9 * rings)  # the pixel itself counts once per dilation
    total, squares = np.empty(width, np.float32), np.empty(width, np.float32)
    scale, sums = np.empty(width, np.float32), np.empty(width, np.float64)
    logits = np.empty((len(steps), width), np.float32)
    for y in range(top, bottom):
        logits[:] = 0
        for channel in range(len(image)):
            plane = image[channel]
            here = _neighbors(plane, y, (0, 0), width)
            total[:] = 0
            squares[:] = 0
            for n in range(len(steps)):
                near = _neighbors(plane, y, steps[n], width)
                for x in range(width):
                    difference = near[x] - here[x]
                    total[x] += difference
                    squares[x] += difference * difference
            for x in range(width):
                deviations = max(squares[x] - total[x] * total[x] / samples, ZERO)
                deviation = np.sqrt(deviations / (samples - ONE))
                scale[x] = EXPONENT / (TENTH * deviation + TINY)
            for n in range(len(steps)):
                near, logit = _neighbors(plane, y, steps[n], width), logits[n]
                for x in range(width):
                    logit[x] += abs(near[x] - here[x]) * scale[x]
        # The best logit of a pixel is at least -32 (a deviation counts the pixel itself), so the
        # powers cannot vanish everywhere and the softmax needs no maximum.
        sums[:] = 0
        for n in range(len(steps)):
            logit = logits[n]
            for x in range(width):
                logit[x] = exp2(logit[x])
                sums[x] += logit[x]
        for x in range(width):
            scale[x] = 1 / sums[x]
        for ring in range(rings):
            for x in range(width):
                for i in range(8):
                    weights[y, ring, x, i] = logits[8 * ring + i, x] * scale[x]


@compiled
def _enlarge(top: int, bottom: int, small: Any, down: Any, across: Any, scores: Any) -> None:
    """Rows of `scores` `[H, row, C]` from `small` `[h, w, C]`, bilinear.

    `down` and `across` are what `_places` gives for rows and columns.
    """
    _, row, classes = scores.shape
    line = np.empty(small.shape[1:], np.float32)
    for y in range(top, bottom):
        above, below, share = small[down[0][y]], small[down[1][y]], down[2][y]
        for x in range(len(line)):
            for c in range(classes):
                line[x, c] = (ONE - share) * above[x, c] + share * below[x, c]
        for x in range(row):
            left, right, share = line[across[0][x]], line[across[1][x]], across[2][x]
            for c in range(classes):
                scores[y, x, c] = (ONE - share) * left[c] + share * right[c]


@compiled
def _add_ring(total: Any, weights: Any, above: Any, here: Any, below: Any, d: int) -> None:
    """Add the weighted scores of the 8 neighbors at distance `d` to `total` `[W, C]`.

    `weights` is `[W, 8]`; the three rows of scores are `[reach + W + reach, C]`. The innermost loop
    becomes one fused multiply-add per neighbor and 8 classes. For that LLVM has to check that
    `total` overlaps none of the rows; it does so up to eight times, once per call.
    """
    width, classes = total.shape
    middle = (len(here) - width) // 2
    left, right = middle - d, middle + d
    n1, n2, n3 = above[left:], above[middle:], above[right:]
    n4, n5 = here[left:], here[right:]
    n6, n7, n8 = below[left:], below[middle:], below[right:]
    for x in range(width):
        w1, w2, w3, w4 = weights[x, 0], weights[x, 1], weights[x, 2], weights[x, 3]
        w5, w6, w7, w8 = weights[x, 4], weights[x, 5], weights[x, 6], weights[x, 7]
        for c in range(classes):
            s = total[x, c] + w1 * n1[x, c] + w2 * n2[x, c] + w3 * n3[x, c]
            s = s + w4 * n4[x, c] + w5 * n5[x, c]
            total[x, c] = s + w6 * n6[x, c] + w7 * n7[x, c] + w8 * n8[x, c]


@compiled
def _iterate(top: int, bottom: int, old: Any, weights: Any, dilations: Any, new: Any) -> None:
    """Rows `top..bottom` of one iteration, `[H, row, C]` to the same."""
    height, row, classes = old.shape
    width = weights.shape[2]
    reach = (row - width) // 2
    for y in range(top, bottom):
        total = new[y, reach : reach + width]
        total[:] = 0
        for ring, d in enumerate(dilations):
            above, below = old[max(y - d, 0)], old[min(y + d, height - 1)]
            _add_ring(total, weights[y, ring], above, old[y], below, d)
        for x in range(reach):
            for c in range(classes):
                new[y, x, c] = total[0, c]
                new[y, reach + width + x, c] = total[width - 1, c]


@compiled
def _add_to_planes(top: int, bottom: int, scores: Any, share: Any, planes: Any) -> None:
    """Add `share` `[H, W]` of rows of `[H, reach + W + reach, C]` to `[K, H, W]`, K <= C."""
    classes, _, width = planes.shape
    reach = (scores.shape[1] - width) // 2
    for y in range(top, bottom):
        for c in range(classes):
            for x in range(width):
                planes[c, y, x] += share[y, x] * scores[y, reach + x, c]


class NumbaEngine:
    """The two steps of a refinement (`pamr.Engine`) for pictures on the CPU.

    Rows are shared by as many threads as PyTorch uses. They are Python's own: Numba's may not be
    entered by two callers at once.

    Args:
        dilations: distances of the neighbors in pixels.
        ring: `(dy, dx)` of the 8 neighbors at distance 1.
    """

    def __init__(self, dilations: Sequence[int], ring: Sequence[tuple[int, int]]) -> None:
        self.dilations, self.reach = np.array(dilations), max(dilations)
        self.steps = np.array([(d * dy, d * dx) for d in dilations for dy, dx in ring])
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def affinity(self, image: Tensor) -> Tensor:
        """`[3, H, W]` float to `[H, len(dilations), W, 8]`."""
        _, height, width = image.shape
        padded = F.pad(image[None], (self.reach, self.reach, 0, 0), mode="replicate")[0]
        weights = _empty(height, len(self.dilations), width, 8)
        self._in_rows(height, _affinity, padded.numpy(), self.steps, weights)
        return torch.from_numpy(weights)

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `pamr.Engine`."""
        height, width = share.shape
        down = _places(mask.shape[1], height)
        across = _places(mask.shape[2], width, self.reach)
        for part, planes in zip(
            *(torch.split(scores.detach(), _equal_lanes(len(mask))) for scores in (mask, target)),
            strict=True,
        ):
            lanes = max(-(-len(part) // LANES) * LANES, FEWEST)
            small = F.pad(part, (0, 0, 0, 0, 0, lanes - len(part))).permute(1, 2, 0).contiguous()
            old, new = (_empty(height, len(across[0]), lanes) for _ in range(2))
            self._in_rows(height, _enlarge, small.numpy(), down, across, old)
            for _ in range(num_iter):
                self._in_rows(height, _iterate, old, weights.numpy(), self.dilations, new)
                old, new = new, old
            self._in_rows(height, _add_to_planes, old, share.numpy(), planes.numpy())

    def _in_rows(self, height: int, kernel: Any, *arguments: Any) -> None:
        """Call `kernel(top, bottom, *arguments)` for blocks of rows, one a thread.

        The caller takes the first: if it only waited, the last thread to wake would be queued
        behind another one while the caller's own core falls idle.
        """
        first, *others = pairwise(height * n // self.threads for n in range(self.threads + 1))
        waiting = [self.pool.submit(kernel, *edges, *arguments) for edges in others]
        kernel(*first, *arguments)
        for block in waiting:
            block.result()


def _empty(*shape: int) -> Any:
    """Float32 from the start of a cache line on, so that no vector lies across two.

    From NumPy, since it asks the system for large pages: new memory then costs half as much.
    """
    memory = np.empty(prod(shape) + LINE, np.float32)
    return memory[-memory.ctypes.data // 4 % LINE :][: prod(shape)].reshape(shape)


def _equal_lanes(classes: int) -> int:
    """Classes of a part: as few parts as hold at most `TOGETHER`, whole vectors in all but one."""
    parts = -(-classes // TOGETHER)
    return -(-classes // (parts * LANES)) * LANES


def _places(small: int, large: int, margin: int = 0) -> tuple[Any, Any, Any]:
    """Lower and upper neighbor `[margin + large + margin]` and the share of the upper one.

    Corners on corners; the margins repeat the corners.
    """
    scale = np.float32((small - 1) / (large - 1) if large > 1 else 0)
    places = np.arange(-margin, large + margin).clip(0, large - 1).astype(np.float32) * scale
    lower = np.minimum(places.astype(np.int64), small - 1)
    return lower, np.minimum(lower + 1, small - 1), places - lower.astype(np.float32)
