"""PAMR compiled for the CPU with Numba: affinity, enlarging and iterations.

Classes lie side by side (`[H, row, width]`, `width` a multiple of 8), so that a neighbour is whole
vectors at an aligned address and its weight one number for all of them; the sums stay in registers
over all neighbours. Rows beyond the border are the nearest row (an index), columns are copied
(margins), so the inner loop has no branch. Columns go through in tiles whose rows within reach of
the largest dilation fit a core's second cache, and weights are asked for ahead of their use.

Import this module only where it is needed: it imports Numba. The first call with a width compiles
it; the code is kept in `__pycache__` or the user's cache, where one of them can be written. Threads
take blocks of rows in code without the interpreter's lock, from a pool of Python threads that every
`Compiled` holds: Numba's own may not be entered by two callers at once, and a thread that has just
been started shares its parent's core for milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from talk2dino.segmentation.pamr_vectors import (
    add_scaled,
    load,
    power_of_two,
    prefetch,
    store,
    zeros,
)

GROUP = 8  # classes are filled up to a multiple: the lanes of a vector
WIDEST = 48  # classes refined together; more overflow the first cache
REACH_BYTES = 3 << 19  # scores within reach of a tile: they stay in a second cache of 2 MB
AHEAD = 16  # pixels whose weights are asked for before they are needed
LINE = 16  # numbers in a line of the cache
STRIP = 64  # columns worked on at once elsewhere: their logits or scores stay in the first cache

LOG2E, LN2_HIGH, LN2_LOW = (np.float32(x) for x in (1.44269504, 0.693359375, -2.12194440e-4))
HALF, ONE = np.float32(0.5), np.float32(1)
TENTH, TINY = np.float32(0.1), np.float32(1e-8)
SMALLEST = np.float32(-80)  # exp of it over 48 is still a normal number
EXP = tuple(1 / np.float32(x) for x in (5040, 720, 120, 24, 6, 2))  # Taylor, |r| <= ln(2) / 2


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the interpreter's lock, fused multiply-adds allowed."""
    options = {"nogil": True, "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**options)(function)


@compiled
def _exp(x: Any) -> Any:
    """Within 2 units of the last place for x <= 0, without a branch; 1 for 0 exactly."""
    x = max(x, SMALLEST)
    n = np.floor(x * LOG2E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = EXP[0]
    p = p * r + EXP[1]
    p = p * r + EXP[2]
    p = p * r + EXP[3]
    p = p * r + EXP[4]
    p = p * r + EXP[5]
    return (p * r * r + r + ONE) * power_of_two(n)


@compiled
def _affinity(top: int, bottom: int, image: Any, steps: Any, result: Any) -> None:
    """Rows `top..bottom` of `[H, W, N]`; `image` `[3, H, margin + W + margin]`."""
    channels, height, padded = image.shape
    width, taps = result.shape[1:]
    margin = (padded - width) // 2
    samples = np.float32(taps // 8 * 9)
    logits = np.empty((taps, STRIP), np.float32)
    scale = np.empty((channels, STRIP), np.float32)
    total, squares = np.empty(STRIP, np.float32), np.empty(STRIP, np.float32)
    exact = np.empty(STRIP)  # rows must sum to 1: an error is multiplied in every iteration
    for y in range(top, bottom):
        for left in range(0, width, STRIP):
            n = min(STRIP, width - left)
            for c in range(channels):
                centre = image[c, y, margin + left :][:n]
                total[:] = 0
                squares[:] = 0
                for t in range(taps):
                    row = min(max(y + steps[t, 0], 0), height - 1)
                    other = image[c, row, margin + left + steps[t, 1] :][:n]
                    for x in range(n):
                        difference = other[x] - centre[x]
                        total[x] += difference
                        squares[x] += difference * difference
                for x in range(n):
                    mean = total[x] / samples
                    variance = max(squares[x] - samples * mean * mean, np.float32(0))
                    deviation = np.sqrt(variance / (samples - ONE))
                    scale[c, x] = -ONE / (np.float32(channels) * (TINY + TENTH * deviation))
            # The best logit of a pixel is at least -32 (a deviation counts the pixel itself), so
            # exp cannot vanish everywhere and the softmax needs no maximum.
            exact[:] = 0
            for t in range(taps):
                row = min(max(y + steps[t, 0], 0), height - 1)
                logit = logits[t]
                logit[:] = 0
                for c in range(channels):
                    centre = image[c, y, margin + left :][:n]
                    other = image[c, row, margin + left + steps[t, 1] :][:n]
                    factor = scale[c]
                    for x in range(n):
                        logit[x] += abs(other[x] - centre[x]) * factor[x]
                for x in range(n):
                    logit[x] = _exp(logit[x])
                for x in range(n):
                    exact[x] += logit[x]
            for x in range(n):
                inverse = np.float32(1 / exact[x])
                for t in range(taps):
                    result[y, left + x, t] = logits[t, x] * inverse


@compiled
def _enlarge(
    top: int, bottom: int, groups: Any, small: Any, down: Any, across: Any, result: Any, margin: int
) -> None:
    """Rows of `result` `[H, row, width]` from `small` `[h, w, width]`, bilinear.

    `down` `[2, H]` and `across` `[2, W]` hold the lower neighbour and the share of the upper one.
    """
    _, columns, width = small.shape
    for y in range(top, bottom):
        above = int(down[0, y])
        below = min(above + 1, small.shape[0] - 1)
        for x in range(across.shape[1]):
            left = int(across[0, x])
            right = min(left + 1, columns - 1)
            lower, right_share = down[1, y], across[1, x]
            upper, left_share = ONE - lower, ONE - right_share
            total = zeros(groups)
            for row, share in ((above, upper), (below, lower)):
                start = row * columns * width
                total = add_scaled(
                    total, share * left_share, load(groups, small, start + left * width)
                )
                total = add_scaled(
                    total, share * right_share, load(groups, small, start + right * width)
                )
            store(result, (y * result.shape[1] + margin + x) * width, total)
        _fill_margins(result[y], margin, across.shape[1])


@compiled
def _fill_margins(row: Any, margin: int, columns: int) -> None:
    """Copy the first and the last column outwards in `[margin + columns + ..., width]`."""
    for x in range(margin):
        row[x] = row[margin]
    for x in range(margin + columns, row.shape[0]):
        row[x] = row[margin + columns - 1]


@compiled
def _iterate(
    top: int,
    bottom: int,
    groups: Any,
    old: Any,
    weights: Any,
    steps: Any,
    new: Any,
    margin: int,
    columns: int,
    tile: int,
) -> None:
    """Rows `top..bottom` of one iteration, `[H, row, width]` to the same.

    Two columns at a time, so that enough sums are under way to hide the time of one addition.
    """
    height, row, width = old.shape
    taps = len(steps)
    offsets = np.empty(taps, np.int64)
    lines = 2 * width * (tile + 2 * margin) // (tile * LINE) + 1  # of a tile's row, per step
    for left in range(0, columns, tile):
        for y in range(top, bottom):
            for t in range(taps):
                beyond = min(max(y + steps[t, 0], 0), height - 1)
                offsets[t] = ((beyond - y) * row + steps[t, 1]) * width
            next_row = ((y + margin + 1) * row + left) * width
            for x in range(left, min(left + tile, columns), 2):
                here = (y * row + margin + x) * width
                first = (y * columns + x) * taps
                second = first + taps
                for line in range(lines):
                    prefetch(old, next_row + line * LINE)
                next_row += lines * LINE
                for line in range(0, 2 * taps, LINE):
                    prefetch(weights, first + AHEAD * taps + line)
                one, two = zeros(groups), zeros(groups)
                for t in range(taps):
                    place = here + offsets[t]
                    one = add_scaled(one, weights[first + t], load(groups, old, place))
                    two = add_scaled(two, weights[second + t], load(groups, old, place + width))
                store(new, here, one)
                store(new, here + width, two)
    for y in range(top, bottom):
        _fill_margins(new[y], margin, columns)


@compiled
def _to_planes(top: int, bottom: int, scores: Any, margin: int, result: Any) -> None:
    """Rows of `[H, row, width]` without margins to `[C, H, W]`, in cached blocks."""
    classes, _, columns = result.shape
    for y in range(top, bottom):
        for left in range(0, columns, STRIP):
            count = min(STRIP, columns - left)
            block = scores[y, margin + left :][:count]
            for c in range(classes):
                line = result[c, y, left:][:count]
                for x in range(count):
                    line[x] = block[x, c]


class Compiled:
    """The two steps of a refinement (`pamr.Engine`) for pictures on the CPU.

    Args:
        dilations: distances of the neighbours in pixels.
        ring: `(dy, dx)` of the neighbours at distance 1.
    """

    def __init__(self, dilations: Sequence[int], ring: Sequence[tuple[int, int]]) -> None:
        self.steps = np.array([(d * dy, d * dx) for d in dilations for dy, dx in ring], np.int64)
        self.reach = max(dilations)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None

    def affinity(self, image: Tensor) -> Tensor:
        """`[3, H, W]` float to `[H*W + 1, N]`; the last row is for a column beyond the last."""
        _, height, width = image.shape
        padded = F.pad(image[None], (self.reach, self.reach, 0, 0), mode="replicate")[0]
        taps = len(self.steps)
        weights = _empty((height * width + 1) * taps).reshape(-1, taps)
        weights[-1] = 0
        grid = weights[:-1].reshape(height, width, -1)
        self._in_rows(height, _affinity, padded.numpy(), self.steps, grid)
        return torch.from_numpy(weights)

    def refine(self, weights: Tensor, mask: Tensor, size: tuple[int, int], num_iter: int) -> Tensor:
        """`[C, h, w]` float32, enlarged to `size` and averaged `num_iter >= 1` times."""
        (height, width), classes = size, len(mask)
        result = _empty(classes * height * width).reshape(classes, height, width)
        # The last pair of columns may begin with the last one; every row begins with a line.
        row = -(-(width + 2 * self.reach + 1) // GROUP) * GROUP
        lanes = -(-min(classes, WIDEST) // GROUP) * GROUP
        buffers = [_empty(height * row * lanes) for _ in range(2)]
        for start in range(0, classes, WIDEST):
            part = mask.detach()[start : start + WIDEST]
            lanes = -(-len(part) // GROUP) * GROUP
            old, new = (
                buffer[: height * row * lanes].reshape(height, row, lanes) for buffer in buffers
            )
            self._enlarge(part, old, width)
            for _ in range(num_iter):
                self._iterate(weights.view(-1).numpy(), old, new, width)
                old, new = new, old
            self._in_rows(height, _to_planes, old, self.reach, result[start : start + WIDEST])
        return torch.from_numpy(result)

    def _enlarge(self, mask: Tensor, old: Any, width: int) -> None:
        height, _, lanes = old.shape
        small = F.pad(mask, (0, 0, 0, 0, 0, lanes - len(mask))).permute(1, 2, 0).contiguous()
        down, across = _shares(mask.shape[1], height), _shares(mask.shape[2], width)
        groups = (0,) * (lanes // GROUP)
        self._in_rows(height, _enlarge, groups, small.numpy(), down, across, old, self.reach)

    def _iterate(self, weights: Any, old: Any, new: Any, width: int) -> None:
        height, _, lanes = old.shape
        tile = REACH_BYTES // ((2 * self.reach + 1) * lanes * 4) - 2 * self.reach
        tile = max(tile // 2 * 2, 32)
        groups = (0,) * (lanes // GROUP)
        settings = (self.steps, new, self.reach, width, tile)
        self._in_rows(height, _iterate, groups, old, weights, *settings)

    def _in_rows(self, height: int, kernel: Any, *arguments: Any) -> None:
        """Call `kernel(top, bottom, *arguments)` for blocks of rows, one a thread.

        The caller takes the first: if it only waited, the last thread to wake would be queued
        behind another one while the caller's own core falls idle.
        """
        if self.pool is None or height < self.threads:
            kernel(0, height, *arguments)
            return
        edges = [height * block // self.threads for block in range(self.threads + 1)]
        first, *others = pairwise(edges)
        blocks = [self.pool.submit(kernel, *edge, *arguments) for edge in others]
        kernel(*first, *arguments)
        for block in blocks:
            block.result()


def _empty(size: int) -> Any:
    """Float32 that begins with a line of the cache; a vector across two lines costs twice.

    From NumPy, since it asks the system for large pages: first touch and far reads cost less.
    """
    memory = np.empty(size + LINE, np.float32)
    return memory[-memory.ctypes.data // 4 % LINE :][:size]


def _shares(small: int, large: int) -> Any:
    """`[2, large]` float32: lower neighbour and share of the upper one, corners on corners."""
    scale = np.float32((small - 1) / (large - 1) if large > 1 else 0)
    places = np.arange(large, dtype=np.float32) * scale
    lower = np.minimum(np.floor(places), np.float32(small - 1))
    return np.stack([lower, places - lower])
