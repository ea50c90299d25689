"""PAMR compiled for the CPU with Numba: affinity, enlarging and iterations.

Scores are blocks of 4 columns (`[H, row, groups, 4 classes, 4 columns]`), so that a neighbour 4, 8,
12 or 24 columns away is whole vectors at an aligned address, one 1 or 2 away is cut out of two, and
4 weights serve all classes; the sums stay in registers over all neighbours. Rows beyond the border
are the nearest row (an index), columns are copied (margins), so the inner loop has no branch.
Columns go through in tiles whose rows within reach of the largest dilation fit a core's second
cache, and weights are asked for ahead of their use.

The first call with a number of groups compiles it. Threads take blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.segmentation.compiled import RowThreads, compiled
from talk2dino.segmentation.memory import LINE, Memory
from talk2dino.segmentation.pamr_affinity import NARROWEST, affinity
from talk2dino.segmentation.pamr_vectors import (
    add_around,
    add_weighted,
    around,
    prefetch,
    store,
    zeros,
)
from talk2dino.segmentation.parts import equal_parts

WIDEST = 32  # classes refined together; more overflow the first cache
REACH_BYTES = 1 << 20  # scores within reach of a tile: half of a second cache of 2 MB
AHEAD = 4  # blocks whose weights are asked for before they are needed

add0, add1, add2, add3 = map(add_weighted, range(4))
row1, row2, row3 = (add_weighted(-distance, 0, distance) for distance in (1, 2, 3))

ONE = np.float32(1)


@compiled
def _enlarge(
    top: int,
    bottom: int,
    groups: Any,
    small: Any,
    down: Any,
    cells: Any,
    shares: Any,
    columns: int,
    margin: int,
    result: Any,
) -> None:
    """Rows of `result` `[H, row, C, 4]` from `small` `[h, w, C]`, bilinear.

    `down` `[2, H]` holds the lower neighbour of a row and the share of the upper one. The 4 columns
    of a block need the cells from `cells` `[Q]` on, with `shares` `[Q, n, 4]`.
    """
    rows, width, classes = small.shape
    blocks, span, _ = shares.shape
    size = 4 * classes
    line = np.empty((width, classes, 4), np.float32)  # a cell is the same in 4 columns
    for y in range(top, bottom):
        above = int(down[0, y])
        below = min(above + 1, rows - 1)
        lower, upper = down[1, y], ONE - down[1, y]
        for x in range(width):
            for c in range(classes):
                value = upper * small[above, x, c] + lower * small[below, x, c]
                for i in range(4):
                    line[x, c, i] = value
        for x in range(blocks):
            total = zeros(groups)
            for n in range(min(span, width - cells[x])):
                share = (x * span + n) * 4
                total = add0(total, shares, share, line, (cells[x] + n) * size)
            store(result, ((y * result.shape[1]) + margin + x) * size, total)
        _fill_margins(result[y], margin, columns)


@compiled
def _fill_margins(row: Any, margin: int, columns: int) -> None:
    """Copy the first and the last column outwards in a row `[row, C, 4]` of blocks."""
    last = columns - 1
    for c in range(row.shape[1]):
        first, final = row[margin, c, 0], row[margin + last // 4, c, last % 4]
        for x in range(margin):
            for i in range(4):
                row[x, c, i] = first
        for i in range(last % 4 + 1, 4):
            row[margin + last // 4, c, i] = final
        for x in range(margin + last // 4 + 1, row.shape[0]):
            for i in range(4):
                row[x, c, i] = final


@compiled
def _iterate(
    top: int,
    bottom: int,
    groups: Any,
    near: Any,
    old: Any,
    weights: Any,
    steps: Any,
    starts: Any,
    new: Any,
    margin: int,
    columns: int,
    tile: int,
) -> None:
    """Rows `top..bottom` of one iteration, `[H, row, C, 4]` to the same.

    `steps` hold rows and whole blocks to every neighbour. Until `starts[0]` neighbours are at the
    same place in their block, until `starts[1]` one column further, and so on. From `starts[3]` on
    come those in the pixel's own row and a block beside it at most (`near`, see `add_around`), from
    `starts[4]` on whole rows of three at distances 1, 2 and 3.
    """
    height, row, classes, _ = old.shape
    width, taps = classes * 4, len(steps)
    blocks = (columns + 3) // 4
    offsets = np.empty(taps, np.int64)
    lines = width * (tile + 2 * margin) // (tile * LINE) + 1  # of a tile's row, per step
    for left in range(0, blocks, tile):
        for y in range(top, bottom):
            for t in range(taps):
                beyond = min(max(y + steps[t, 0], 0), height - 1)
                offsets[t] = ((beyond - y) * row + steps[t, 1]) * width
            next_row = ((y + 4 * margin + 1) * row + left) * width
            for x in range(left, min(left + tile, blocks)):
                here = (y * row + margin + x) * width
                first = (y * blocks + x) * taps * 4
                for line in range(lines):
                    prefetch(old, next_row + line * LINE)
                next_row += lines * LINE
                for line in range(0, 4 * taps, LINE):
                    prefetch(weights, first + AHEAD * taps * 4 + line)
                total = zeros(groups)
                for t in range(starts[0]):
                    total = add0(total, weights, first + 4 * t, old, here + offsets[t])
                for t in range(starts[0], starts[1]):
                    total = add1(total, weights, first + 4 * t, old, here + offsets[t])
                for t in range(starts[1], starts[2]):
                    total = add2(total, weights, first + 4 * t, old, here + offsets[t])
                for t in range(starts[2], starts[3]):
                    total = add3(total, weights, first + 4 * t, old, here + offsets[t])
                total = add_around(total, weights, first + 4 * starts[3], old, here, near)
                for t in range(starts[4], starts[5], 3):
                    total = row1(total, weights, first + 4 * t, old, here + offsets[t])
                for t in range(starts[5], starts[6], 3):
                    total = row2(total, weights, first + 4 * t, old, here + offsets[t])
                for t in range(starts[6], taps, 3):
                    total = row3(total, weights, first + 4 * t, old, here + offsets[t])
                store(new, here, total)
    for y in range(top, bottom):
        _fill_margins(new[y], margin, columns)


@compiled
def _add_to_planes(
    top: int, bottom: int, scores: Any, margin: int, share: Any, result: Any
) -> None:
    """Add `share` `[H, W]` of rows of `[H, row, C, 4]` without margins to `[C, H, W]`."""
    classes, _, columns = result.shape
    whole = columns // 4
    for y in range(top, bottom):
        for c in range(classes):
            line, part = result[c, y], share[y]
            for x in range(whole):
                for i in range(4):
                    line[4 * x + i] += part[4 * x + i] * scores[y, margin + x, c, i]
            for x in range(4 * whole, columns):
                line[x] += part[x] * scores[y, margin + whole, c, x - 4 * whole]


class Compiled:
    """The two steps of a refinement (`pamr.Engine`) for pictures on the CPU.

    Args:
        dilations: distances of the neighbours in pixels.
        ring: `(dy, dx)` of the neighbours at distance 1.
        memory: where large arrays come from.
    """

    def __init__(
        self, dilations: Sequence[int], ring: Sequence[tuple[int, int]], memory: Memory
    ) -> None:
        far = [(d * dy, d * dx) for d in dilations for dy, dx in ring]
        close = [distance for distance in (1, 2, 3, 4) if distance in dilations]
        parts = [[(0, shift) for shift in around(close)]]
        for d in (1, 2, 3):
            parts.append([(y, x) for y in (-d, d) for x in (-d, 0, d)] if d in close else [])
        for step in chain.from_iterable(parts):
            far.remove(step)
        parts = [[step for step in far if step[1] % 4 == shift] for shift in range(4)] + parts
        self.starts = np.cumsum([len(part) for part in parts])
        self.steps = np.array(list(chain.from_iterable(parts)), np.int64)
        self.blocks = np.stack([self.steps[:, 0], self.steps[:, 1] // 4], 1)
        self.blocks[self.starts[3] :, 1] = 0  # counted from the pixel's own block
        self.near = (0,) * sum(1 << (distance - 1) for distance in close)
        self.margin = -(-max(dilations) // 4)  # in blocks
        self._in_rows = RowThreads()
        self.memory = memory

    def affinity(self, image: Tensor) -> Tensor:
        """`[3, H, W]` float to `[H, ceil(W / 4), N, 4]`, neighbours in the order of `steps`."""
        _, height, width = image.shape
        blocks, margin = -(-max(width, NARROWEST) // 4), 4 * self.margin
        right = margin + 4 * blocks - width
        padded = F.pad(image[None], (margin, right, 0, 0), mode="replicate")[0]
        taps = len(self.steps)
        weights = self.memory.take(height * blocks * taps * 4).reshape(height, blocks, taps, 4)
        self._in_rows(height, affinity, padded.numpy(), self.steps, margin, weights)
        return torch.from_numpy(weights[:, : -(-width // 4)]).contiguous()

    def release(self, weights: Tensor) -> None:
        """See `pamr.Engine`."""
        self.memory.give(weights.view(-1).numpy())

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        """See `pamr.Engine`."""
        classes, height, width = target.shape
        row = -(-width // 4) + 2 * self.margin
        parts = equal_parts(classes, WIDEST)
        lanes = -(-max(stop - start for start, stop in parts) // 4) * 4
        buffers = [self.memory.take(height * row * lanes * 4) for _ in range(2)]
        for start, stop in parts:
            lanes = -(-(stop - start) // 4) * 4
            old, new = (
                buffer[: height * row * lanes * 4].reshape(height, row, lanes, 4)
                for buffer in buffers
            )
            self._enlarge(mask.detach()[start:stop], old, width)
            for _ in range(num_iter):
                self._iterate(weights.view(-1).numpy(), old, new, width)
                old, new = new, old
            part = target.detach()[start:stop].numpy()
            self._in_rows(height, _add_to_planes, old, self.margin, share.numpy(), part)
        for buffer in buffers:
            self.memory.give(buffer)

    def _enlarge(self, mask: Tensor, old: Any, width: int) -> None:
        height, _, lanes, _ = old.shape
        small = F.pad(mask, (0, 0, 0, 0, 0, lanes - len(mask))).permute(1, 2, 0).contiguous()
        down, across = _shares(mask.shape[1], height), _shares(mask.shape[2], width)
        cells, shares = _per_block(across)
        groups = (0,) * (lanes // 4)
        settings = (down, cells, shares, width, self.margin, old)
        self._in_rows(height, _enlarge, groups, small.numpy(), *settings)

    def _iterate(self, weights: Any, old: Any, new: Any, width: int) -> None:
        height, _, lanes, _ = old.shape
        blocks = -(-width // 4)
        tile = max(REACH_BYTES // ((8 * self.margin + 1) * lanes * 16) - 2 * self.margin, 8)
        tile = -(-blocks // -(-blocks // tile))  # no narrow one at the end
        groups, settings = (0,) * (lanes // 4), (self.margin, width, tile)
        self._in_rows(
            *(height, _iterate, groups, self.near, old, weights),
            *(self.blocks, self.starts, new, *settings),
        )


def _shares(small: int, large: int) -> Any:
    """`[2, large]` float32: lower neighbour and share of the upper one, corners on corners."""
    scale = np.float32((small - 1) / (large - 1) if large > 1 else 0)
    places = np.arange(large, dtype=np.float32) * scale
    lower = np.minimum(np.floor(places), np.float32(small - 1))
    return np.stack([lower, places - lower])


def _per_block(across: Any) -> tuple[Any, Any]:
    """First cell `[Q]` and shares of cells `[Q, n, 4]` of blocks of 4 columns, from `_shares`."""
    columns = across.shape[1]
    places = np.minimum(np.arange(-(-columns // 4) * 4), columns - 1).reshape(-1, 4)
    left, upper = across[0].astype(np.int64)[places], across[1][places]
    cells = left[:, 0]
    inside = left - cells[:, None]  # [Q, 4]
    shares = np.zeros((len(cells), int(inside.max()) + 2, 4), np.float32)
    blocks, column = np.indices(inside.shape)
    shares[blocks, inside, column] = np.float32(1) - upper
    shares[blocks, inside + 1, column] = upper
    return cells, shares
