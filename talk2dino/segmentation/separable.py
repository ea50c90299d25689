"""From token scores to the picture in two small matrices.

Without a refinement, everything between the token scores and the picture is linear, and rows and
columns never mix: the enlargement of a window (corners on corners), its place in the picture, the
average of overlapping windows (they form a grid, so the count is a product too) and the resize to
the picture's own size. One matrix a side holds all four steps, and a class is `rows @ scores @
columns.T`: no class is ever held at the size of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.segmentation.windows import Window

STRIP = 1 << 20  # scores at the size of the picture held at once: 4 MB, near what a cache holds
CHUNK = 16  # classes of a strip


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
            _axis(starts, side, cells, *lengths).to(scores)
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
        height = max(STRIP // (CHUNK * shape[1]), 16)
        for part, rows in zip(
            torch.split(labels, height), torch.split(self.rows, height), strict=True
        ):
            self._best(rows, threshold, part)
        return labels

    def _best(self, rows: Tensor, threshold: float | None, labels: Tensor) -> None:
        """Write the labels of a strip."""
        best = self.tokens.new_full(labels.shape, -torch.inf if threshold is None else threshold)
        first = 0 if threshold is None else 1
        for tokens in torch.split(self.tokens, CHUNK):
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


def _axis(starts: list[int], side: int, cells: int, working: int, size: int) -> Tensor:
    """`[size, len(starts) * cells]`: from the cells of all windows to the pixels of one side."""
    identity = torch.eye(cells)[None]
    enlarged = F.interpolate(identity, side, mode="linear", align_corners=True)[0]
    placed = torch.zeros(len(starts), cells, working)
    for block, start in zip(placed, starts, strict=True):
        block[:, start : start + side] = enlarged
    covered = (placed.sum(1) > 0).sum(0)  # windows over every pixel
    placed = (placed / covered).flatten(0, 1)[None]
    resized = F.interpolate(placed, size, mode="linear", align_corners=False)
    return resized[0].t().contiguous()
