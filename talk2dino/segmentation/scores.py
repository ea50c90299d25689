"""From patch tokens and class embeddings to scores of a picture, and from scores to labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import DataError

MAPS = 1 << 25  # scores at the size of the picture held at once: 134 MB
CHUNK = 4  # classes resized at once: they stay in the cache until they are compared


def class_scores(patch_tokens: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sigmoid of the cosine between every patch and every class.

    Only the image side is normalised here (eps 1e-6); the text counts as given, so pass unit
    vectors, which keep the scores within 0.269..0.731. Source: the original's `DINOTextMasker`.

    Args:
        patch_tokens: `[B, P, D]`.
        text: `[K, D]` class embeddings of unit length.
        grid: patch rows and columns, `rows * columns == P`.

    Returns:
        `[B, K, rows, columns]` float32.

    Raises:
        DataError: the grid does not have P cells, or the widths differ.
    """
    batch, patches, width = patch_tokens.shape
    if text.shape[-1] != width:
        raise DataError(
            f"patch tokens {tuple(patch_tokens.shape)} and text {tuple(text.shape)} differ in "
            "width: the checkpoint belongs to another vision encoder (config key `vision`)"
        )
    if grid[0] * grid[1] != patches:
        raise DataError(f"a grid of {grid[0]}x{grid[1]} cannot hold {patches} patch tokens")
    tokens = F.normalize(patch_tokens.float(), dim=-1, eps=1e-6)
    cosine = text.to(tokens) @ tokens.transpose(1, 2)  # [B, K, P]
    return cosine.sigmoid().view(batch, -1, *grid)


def merge_synonyms(scores: Tensor, row_classes: Tensor) -> Tensor:
    """A class described by several text rows scores as its best row.

    Args:
        scores: `[B, N, h, w]`, one channel per text row.
        row_classes: `[N]` int64, the class of every row; each of `0..K-1` occurs.

    Returns:
        `[B, K, h, w]`.

    Raises:
        DataError: one class index per channel is needed, and no class may be without a row.
    """
    if len(row_classes) != scores.shape[1]:
        raise DataError(f"{len(row_classes)} row classes for {scores.shape[1]} text rows")
    classes = int(row_classes.max()) + 1
    if not row_classes.bincount(minlength=classes).all():
        raise DataError(f"every class 0..{classes - 1} needs a text row: {row_classes.tolist()}")
    index = row_classes.to(scores.device)[None, :, None, None].expand_as(scores)
    merged = scores.new_zeros(scores.shape[0], classes, *scores.shape[2:])
    return merged.scatter_reduce_(1, index, scores, reduce="amax", include_self=False)


def upsample(scores: Tensor, height: int, width: int) -> Tensor:
    """`[B, K, rows, columns]` to `[B, K, height, width]`, corners on corners (original)."""
    return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=True)


def resize_scores(scores: Tensor, height: int, width: int) -> Tensor:
    """`[K, h, w]` to `[K, height, width]`, pixel centres on pixel centres (mmsegmentation)."""
    size = (height, width)
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def with_background(scores: Tensor, threshold: float | None) -> Tensor:
    """Put a constant background channel in front: `[K, ...]` to `[K + 1, ...]`.

    `None` leaves the scores as they are.
    """
    if threshold is None:
        return scores
    return torch.cat([torch.full_like(scores[:1], threshold), scores])


def label_map(
    scores: Tensor, height: int, width: int, background_threshold: float | None = None
) -> Tensor:
    """Resize scores and take the best class, a few classes at a time.

    The same labels as `with_background(resize_scores(...)).argmax(0)`, without ever holding all
    classes at the size of the picture. The first of equal scores wins. (The original takes a
    softmax first, which changes no argmax.)

    Args:
        scores: `[K, h, w]`.
        height: rows of the label map.
        width: columns of the label map.
        background_threshold: score of the background, which becomes label 0 and shifts the
            classes to `1..K`; `None` for no background.

    Returns:
        `[height, width]` int64.
    """
    best = BestClass(height, width, background_threshold, scores.device)
    best.add(scores, range(len(scores)))
    return best.labels


class BestClass:
    """The best class of every pixel among those added so far; of equal scores the first class's.

    Args:
        height: rows of the picture.
        width: columns of the picture.
        background_threshold: score of the background, which becomes label 0 and shifts the
            classes by 1; `None` for no background.
        device: where the scores are.
    """

    def __init__(
        self,
        height: int,
        width: int,
        background_threshold: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        lowest = -torch.inf if background_threshold is None else background_threshold
        self._labels = torch.zeros(height, width, dtype=torch.int32, device=device)
        self._best = torch.full((height, width), lowest, device=device)
        self._first = 0 if background_threshold is None else 1
        self._largest = -1  # label so far
        self._chunk = max(1, min(CHUNK, MAPS // (height * width)))

    @property
    def labels(self) -> Tensor:
        """`[height, width]` int64."""
        return self._labels.long()

    def add(self, scores: Tensor, classes: Sequence[int]) -> None:
        """Let more classes compete: `[n, h, w]` and their n indices."""
        names = iter(classes)
        for part in self._resized(scores):
            for values, name in zip(part, names, strict=False):
                label = name + self._first
                better = values > self._best
                if label < self._largest:  # it may be equal to a later class
                    better |= (values == self._best) & (self._labels > label)
                torch.maximum(self._best, values, out=self._best)
                self._labels.masked_fill_(better, label)
                self._largest = max(self._largest, label)

    def reached_by(self, scores: Tensor) -> list[bool]:
        """Whether each of `[n, h, w]` is as good as the best somewhere."""
        reached: list[bool] = []
        for part in self._resized(scores):
            reached += (part >= self._best).flatten(1).any(1).tolist()
        return reached

    def _resized(self, scores: Tensor) -> Iterator[Tensor]:
        """A few of `[n, h, w]` at a time, at the size of the picture."""
        for start in range(0, len(scores), self._chunk):
            yield resize_scores(scores[start : start + self._chunk], *self._best.shape)
