"""Sliding windows over one image: cut, and put together again.

The protocol is mmsegmentation's `slide_inference`, which the original evaluates with: resize the
short side, cut overlapping windows, average what they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation.portions import portions

SHORT_SIDE = 448  # pixels, of a picture when nothing else is asked for


class Window(NamedTuple):
    """A half-open rectangle in pixels: rows `y1:y2`, columns `x1:x2`."""

    y1: int
    x1: int
    y2: int
    x2: int

    def crop(self, image: Tensor) -> Tensor:
        """The part of `image` `[..., H, W]` inside this window, as a view."""
        return image[..., self.y1 : self.y2, self.x1 : self.x2]


def sliding_windows(height: int, width: int, window: int = 448, stride: int = 224) -> list[Window]:
    """Cover a picture with square windows, row by row.

    The last window of a row or column is shifted back to end at the border; a side shorter than
    `window` is taken whole, without padding. All windows of a picture have the same size.

    Args:
        height: rows of the picture, in pixels.
        width: columns of the picture, in pixels.
        window: side of a window, in pixels.
        stride: distance between neighboring windows, in pixels; at most `window`.

    Raises:
        ConfigError: `window` or `stride` is not positive, or the stride leaves gaps.
        DataError: the picture is empty.

    Examples:
        >>> from talk2dino.segmentation import sliding_windows
        >>> len(sliding_windows(448, 672))
        2
        >>> [tuple(window) for window in sliding_windows(4, 7, window=4, stride=2)]
        [(0, 0, 4, 4), (0, 2, 4, 6), (0, 3, 4, 7)]
    """
    if not 0 < stride <= window:
        raise ConfigError(f"stride={stride}, window={window}: use 0 < stride <= window (no gaps)")
    if height < 1 or width < 1:
        raise DataError(f"image of {height}x{width} pixels: give one of at least 1x1")
    return [
        Window(y, x, min(y + window, height), min(x + window, width))
        for y in _starts(height, window, stride)
        for x in _starts(width, window, stride)
    ]


def _starts(size: int, window: int, stride: int) -> list[int]:
    count = max(size - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - window), 0) for i in range(count)]


def coverage(windows: Iterable[Window], height: int, width: int) -> Tensor:
    """How many windows lie over each pixel: `[height, width]` float32."""
    count = torch.zeros(height, width)
    for window in windows:
        window.crop(count).add_(1)
    return count


def short_side_size(
    height: int, width: int, short: int = SHORT_SIDE, long: int = 2048
) -> tuple[int, int]:
    """The size `(h, w)` with short side `short`, unless the long side would exceed `long`.

    Proportions are kept; halves round up (mmcv `rescale_size`), and at least one pixel is left.

    Examples:
        >>> from talk2dino.segmentation.windows import short_side_size
        >>> short_side_size(375, 500), short_side_size(100, 1000)  # the long side is 2048 at most
        ((448, 597), (205, 2048))
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize in eight-bit fixed point, the same bits as OpenCV's `INTER_LINEAR`.

    The benchmarks were always measured through this rounding; it takes about 10 ms, so there is
    no approximate twin. No antialiasing, half-pixel centers.

    Args:
        image: `[..., H, W]` uint8.
        height: rows of the result.
        width: columns of the result.

    Returns:
        `[..., height, width]` uint8, on the image's device.

    Raises:
        DataError: the image is not uint8.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation.windows import resize_image
        >>> resize_image(torch.tensor([[0, 100, 200]], dtype=torch.uint8), height=1, width=6)
        tensor([[  0,  25,  75, 125, 175, 200]], dtype=torch.uint8)
    """
    if image.dtype != torch.uint8:
        raise DataError(f"image dtype {image.dtype}: give uint8 pixels 0..255")
    rows, columns = image.shape[-2:]
    if (rows, columns) == (height, width):
        return image
    (top, bottom), row_weights = _taps(rows, height, image.device, clamp_fraction=False)
    (left, right), weights = _taps(columns, width, image.device, clamp_fraction=True)

    needed, line = torch.unique(torch.cat([top, bottom]), return_inverse=True)
    pixels = image.index_select(-2, needed).int()  # [..., lines, W]
    lines = pixels.index_select(-1, left).mul_(weights[0])
    lines.add_(pixels.index_select(-1, right).mul_(weights[1])).bitwise_right_shift_(4)

    upper = lines.index_select(-2, line[:height]).mul_(row_weights[0][:, None])
    lower = lines.index_select(-2, line[height:]).mul_(row_weights[1][:, None])
    total = upper.bitwise_right_shift_(16).add_(lower.bitwise_right_shift_(16))
    return total.add_(2).bitwise_right_shift_(2).to(torch.uint8)


def _taps(
    source: int, target: int, device: torch.device, clamp_fraction: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two source indices and the two weights (in 1/2048) of every target coordinate."""
    place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    index = np.floor(place).astype(np.int64)
    fraction = place - index.astype(np.float32)
    if clamp_fraction:  # OpenCV clamps it for columns only; rows just repeat the border line
        fraction[(index < 0) | (index >= source - 1)] = 0.0
    weights = [np.rint(part * np.float32(2048)) for part in (np.float32(1) - fraction, fraction)]
    indices = [np.clip(index + step, 0, source - 1) for step in (0, 1)]
    first, second = (torch.from_numpy(array).to(device) for array in indices)
    one, two = (torch.from_numpy(array.astype(np.int32)).to(device) for array in weights)
    return (first, second), (one, two)


class SeparableScores:
    """Scores of a picture as `rows @ tokens @ columns.T` per class.

    Args:
        token_scores: `[B, K, r, c]`, one per window.
        windows: the B rectangles as `sliding_windows` lists them, at working size.
        working: rows and columns that the windows cover.
        size: rows and columns of the picture.
    """

    def __init__(
        self,
        token_scores: Tensor,
        windows: Sequence[Window],
        working: tuple[int, int],
        size: tuple[int, int],
    ) -> None:
        tops = list(dict.fromkeys(window.y1 for window in windows))
        lefts = list(dict.fromkeys(window.x1 for window in windows))
        first = windows[0]
        sides = (first.y2 - first.y1, first.x2 - first.x1)
        scores = token_scores.float()
        self.rows, self.columns = (  # [H, len(tops) * r], [W, len(lefts) * c]
            _axis(tuple(starts), side, cells, *lengths, scores.device)
            for starts, side, cells, *lengths in zip(
                (tops, lefts), sides, scores.shape[-2:], working, size, strict=True
            )
        )
        _, classes, r, c = scores.shape
        grid = scores.view(len(tops), len(lefts), classes, r, c)
        self.tokens = grid.permute(2, 0, 3, 1, 4).reshape(classes, len(tops) * r, -1)

    def full(self) -> Tensor:
        """All scores, `[K, H, W]` float32."""
        return self._part(self.tokens, self.rows)

    def labels(self, threshold: float | None = None) -> Tensor:
        """The best class everywhere, `[H, W]` int64; the first of equal scores wins.

        Args:
            threshold: score of the background, which becomes label 0 and shifts the classes to
                `1..K`; None for no background.
        """
        shape = (len(self.rows), len(self.columns))
        labels = torch.zeros(shape, dtype=torch.int64, device=self.tokens.device)
        at_once = portions(labels.device)
        height = max(at_once.strip // (at_once.classes * shape[1]), 16)
        for part, rows in zip(
            torch.split(labels, height), torch.split(self.rows, height), strict=True
        ):
            self._best(rows, threshold, part, at_once.classes)
        return labels

    def _best(self, rows: Tensor, threshold: float | None, labels: Tensor, chunk: int) -> None:
        """Write the labels of a strip, from `chunk` classes at a time."""
        best = self.tokens.new_full(labels.shape, -torch.inf if threshold is None else threshold)
        first = 0 if threshold is None else 1
        for tokens in torch.split(self.tokens, chunk):
            values, index = self._part(tokens, rows).max(0)
            labels.copy_(torch.where(values > best, index + first, labels))
            best = torch.maximum(values, best)
            first += len(tokens)

    def _part(self, tokens: Tensor, rows: Tensor) -> Tensor:
        # A batched product, not one of stacked rows: equal classes must get equal bits, so that
        # the first of them wins everywhere.
        classes = len(tokens)
        left = torch.bmm(rows.expand(classes, -1, -1), tokens)
        return torch.bmm(left, self.columns.t().expand(classes, -1, -1))


@lru_cache(maxsize=32)  # of 0.1 MB for a photograph
def _axis(
    starts: tuple[int, ...], side: int, cells: int, working: int, size: int, device: torch.device
) -> Tensor:
    """`[size, len(starts) * cells]`: from the cells of all windows to the pixels of one side.

    Many pictures have one size, and these small steps cost as much as all that follows on a GPU.
    """
    identity = torch.eye(cells)[None]
    enlarged = F.interpolate(identity, side, mode="linear", align_corners=True)[0]
    placed = torch.zeros(len(starts), cells, working)
    for block, start in zip(placed, starts, strict=True):
        block[:, start : start + side] = enlarged
    covered = (placed.sum(1) > 0).sum(0)  # windows over every pixel
    placed = (placed / covered).flatten(0, 1)[None]
    resized = F.interpolate(placed, size, mode="linear", align_corners=False)
    return resized[0].t().contiguous().to(device)
