"""From scores to labels: the best class of every pixel, at the size of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from talk2dino.segmentation.scores import resize_scores

MAPS = 1 << 25  # scores at the size of the picture held at once: 134 MB
CHUNK = 4  # classes resized at once: they stay in the cache until they are compared


def label_map(
    scores: Tensor,
    height: int,
    width: int,
    background_threshold: float | None = None,
    compiled: bool = False,
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
        compiled: see `best_class`.

    Returns:
        `[height, width]` int64.
    """
    best = best_class(height, width, background_threshold, scores.device, compiled)
    best.add(scores, range(len(scores)))
    return best.labels


def best_class(
    height: int,
    width: int,
    background_threshold: float | None = None,
    device: torch.device | None = None,
    compiled: bool = False,
) -> BestClass:
    """A `BestClass`.

    Args:
        height: rows of the picture.
        width: columns of the picture.
        background_threshold: see `BestClass`.
        device: where the scores are.
        compiled: use the compiled code on the CPU where Numba is installed (the extra `fast`):
            about three times as fast, but ready half a second later; scores agree to 1e-6.
    """
    if compiled and (device is None or device.type == "cpu"):
        try:
            from talk2dino.segmentation.best_class_kernel import CompiledBestClass

            return CompiledBestClass(height, width, background_threshold)
        except ImportError:  # without Numba
            pass
    return BestClass(height, width, background_threshold, device)


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
                better |= (values == self._best) & (self._labels > label)
                torch.maximum(self._best, values, out=self._best)
                self._labels.masked_fill_(better, label)

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
