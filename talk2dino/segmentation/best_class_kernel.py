"""`BestClass` compiled for the CPU: resize and compare a few rows at a time, in the cache.

Numbers are those of `resize_scores` to rounding. Every result is a sum of products with weights
that are not negative, rounded step by step: no larger score gives a smaller result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from talk2dino.segmentation.compiled import RowThreads, compiled
from talk2dino.segmentation.labels import BestClass

ROWS = 4  # resized together: their columns share the places they come from
ONE = np.float32(1)


@compiled
def _resize(first: int, last: int, plane: Any, down: Any, across: Any, lines: Any) -> None:
    """Rows from `first` on, at most `last`, of the resized `plane` `[h, w]` into `[ROWS, w']`.

    `down` and `across` are what `_shares` gives for rows and columns.
    """
    above, below, lower = down
    left, right, further = across
    middle = np.empty((ROWS, plane.shape[1]), np.float32)
    for line in range(ROWS):
        y = min(first + line, last)
        upper_row, lower_row, share = plane[above[y]], plane[below[y]], lower[y]
        for x in range(plane.shape[1]):
            middle[line, x] = (ONE - share) * upper_row[x] + share * lower_row[x]
    for x in range(lines.shape[1]):
        a, b, share = left[x], right[x], further[x]
        rest = ONE - share
        for line in range(ROWS):
            lines[line, x] = rest * middle[line, a] + share * middle[line, b]


@compiled
def _add(
    top: int, bottom: int, scores: Any, names: Any, down: Any, across: Any, best: Any, labels: Any
) -> None:
    """Let `[n, h, w]` compete for rows `top..bottom` of `best` and `labels` `[H, W]`."""
    lines = np.empty((ROWS, best.shape[1]), np.float32)
    for n in range(len(scores)):
        name = names[n]
        for y in range(top, bottom, ROWS):
            _resize(y, bottom - 1, scores[n], down, across, lines)
            for line in range(min(ROWS, bottom - y)):
                values, highest, label = lines[line], best[y + line], labels[y + line]
                for x in range(len(values)):
                    value, before, old = values[x], highest[x], label[x]
                    better = (value > before) | ((value == before) & (name < old))
                    highest[x] = value if better else before
                    label[x] = name if better else old


@compiled
def _reached(
    top: int, bottom: int, scores: Any, down: Any, across: Any, best: Any, reached: Any
) -> None:
    """Set `reached` `[n]` where one of `[n, h, w]` is as good as `best` in rows `top..bottom`."""
    lines = np.empty((ROWS, best.shape[1]), np.float32)
    for n in range(len(scores)):
        for y in range(top, bottom, ROWS):
            _resize(y, bottom - 1, scores[n], down, across, lines)
            found = False
            for line in range(min(ROWS, bottom - y)):
                values, highest = lines[line], best[y + line]
                for x in range(len(values)):
                    found |= values[x] >= highest[x]
            if found:
                reached[n] = True
                break


class CompiledBestClass(BestClass):
    """`BestClass` for pictures on the CPU."""

    def __init__(self, height: int, width: int, background_threshold: float | None = None) -> None:
        super().__init__(height, width, background_threshold)
        self._in_rows = RowThreads()

    def add(self, scores: Tensor, classes: Sequence[int]) -> None:
        """See `BestClass`."""
        names = np.array(classes, np.int32) + np.int32(self._first)
        settings = (names, *self._places(scores), self._best.numpy(), self._labels.numpy())
        self._in_rows(len(self._best), _add, _array(scores), *settings)

    def reached_by(self, scores: Tensor) -> list[bool]:
        """See `BestClass`."""
        reached = np.zeros(len(scores), np.bool_)
        settings = (*self._places(scores), self._best.numpy(), reached)
        self._in_rows(len(self._best), _reached, _array(scores), *settings)
        return [bool(one) for one in reached]

    def _places(self, scores: Tensor) -> tuple[Any, Any]:
        sizes = zip(scores.shape[-2:], self._best.shape, strict=True)
        down, across = (_shares(*size) for size in sizes)
        return down, across


def _array(scores: Tensor) -> Any:
    return scores.detach().float().contiguous().numpy()


def _shares(small: int, large: int) -> tuple[Any, Any, Any]:
    """Lower and upper neighbour `[large]` and the share of the upper one, centres on centres."""
    scale = np.float32(small / large)
    half = np.float32(0.5)
    places = np.maximum((np.arange(large, dtype=np.float32) + half) * scale - half, np.float32(0))
    lower = np.minimum(np.floor(places), np.float32(small - 1))
    first = lower.astype(np.uint64)  # unsigned: no place is counted from the end
    return first, np.minimum(first + np.uint64(1), np.uint64(small - 1)), places - lower
