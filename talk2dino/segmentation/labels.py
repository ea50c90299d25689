"""From scores to labels: the best class of a pixel, without refining classes that cannot win."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation.scores import resize_scores

MAPS = 1 << 25  # scores at the size of the picture held at once: 134 MB
CHUNK = 4  # classes resized at once: they stay in the cache until they are compared


def label_map(
    scores: Tensor | Iterable[Tensor],
    height: int,
    width: int,
    background_threshold: float | None = None,
) -> Tensor:
    """Resize scores and take the best class, a few classes at a time.

    The same labels as `with_background(resize_scores(...)).argmax(0)`, without ever holding all
    classes at the size of the picture. The first of equal scores wins. (The original takes a
    softmax first, which changes no argmax.)

    Args:
        scores: `[K, h, w]`, or blocks of classes `[n, h, w]` one after the other.
        height: rows of the label map.
        width: columns of the label map.
        background_threshold: score of the background, which becomes label 0 and shifts the
            classes to `1..K`; `None` for no background.

    Returns:
        `[height, width]` int64.
    """
    best, added = None, 0
    for block in [scores] if isinstance(scores, Tensor) else scores:
        best = best or BestClass(height, width, background_threshold, block.device)
        best.add(block, range(added, added + len(block)))
        added += len(block)
        del block  # the next one is computed when this one is gone
    if best is None:
        raise DataError("no scores: give at least one class")
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
        self._first = self._last = 0 if background_threshold is None else 1
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
                if label < self._last:  # of equal scores the one that came before may be later
                    better |= (values == self._best) & (self._labels > label)
                self._last = max(self._last, label)
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


LANES = 8  # the compiled PAMR fills maps up to a multiple
TOGETHER = 48  # maps refined before they compete
FEW = 16  # maps that cost less than a round more
SMOOTHING = (1, 3, 7)  # tokens a side; what a refinement may average away
FIRST, LATER = 6, 3  # this many uncertain classes a group, on average


def contender_labels(
    token_scores: Tensor,
    refine: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    background_threshold: float | None = None,
) -> Tensor:
    """The labels of `label_map(refine(token_scores), *size, background_threshold)`.

    Exactly those if `refine` rounds every class alike, else where no two classes are equal to
    rounding.

    Args:
        token_scores: `[B, K, r, c]`, one per window.
        refine: `[B, n, r, c]` to `[n, h, w]` for any n; maps of a larger input may nowhere be
            smaller, and no map may depend on another.
        size: rows and columns of the picture.
        background_threshold: see `label_map`.

    Returns:
        `[*size]` int64.
    """
    best = BestClass(*size, background_threshold, token_scores.device)
    ahead = _lead(token_scores, background_threshold)
    order = ahead.argsort(descending=True, stable=True).tolist()
    groups = _groups(order, int((ahead >= 0).sum()), FIRST)
    while groups:
        groups = _compete(groups, token_scores, refine, best)
        groups = _groups([member for group in groups for member in group], 0, LATER)
    return best.labels


def _lead(scores: Tensor, threshold: float | None) -> Tensor:
    """By how much every class is ahead of all others, where that is most: `[K]`.

    Zero for the best class of a token or of the mean around one, else negative.
    """
    lead = scores.new_full(scores.shape[1:2], -torch.inf)
    rows, columns = scores.shape[-2:]
    for side in SMOOTHING:
        smooth = _means(rows, side).to(scores) @ scores @ _means(columns, side).to(scores).t()
        best = smooth.amax(1, keepdim=True)
        if threshold is not None:
            best = best.clamp(min=threshold)
        lead = torch.maximum(lead, (smooth - best).amax((0, 2, 3)))
    return lead


def _means(cells: int, side: int) -> Tensor:
    """`[cells, cells]`: the mean of `side` cells around each; of those there are at the border."""
    place = torch.arange(cells)
    near = ((place[:, None] - place).abs() <= side // 2).float()
    return near / near.sum(1, keepdim=True)


def _groups(order: Sequence[int], alone: int, size: int) -> list[list[int]]:
    """The first `alone` classes by themselves, the rest in groups that grow along the order.

    About one group for `size` classes, at least `FEW` maps in all.
    """
    rest = len(order) - alone
    maps = min(max(alone + ceil(rest / size), FEW), len(order))
    grouped = maps - alone
    edges = [max(n, ceil(rest * (n / grouped) ** 2)) for n in range(grouped + 1)] if rest else [0]
    return [
        *([one] for one in order[:alone]),
        *(list(order[alone + start : alone + stop]) for start, stop in pairwise(edges)),
    ]


def _compete(
    groups: list[list[int]],
    scores: Tensor,
    refine: Callable[[Tensor], Tensor],
    best: BestClass,
) -> list[list[int]]:
    """Let single classes into `best`; returns the larger groups that may hold a winner."""
    single = sorted(group for group in groups if len(group) == 1)
    several = [group for group in groups if len(group) > 1]
    left: list[list[int]] = []
    groups = single + several
    size = ceil(len(groups) / ceil(len(groups) / TOGETHER))  # no part is much smaller
    size = ceil(size / LANES) * LANES
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        refined = refine(torch.stack([scores[:, group].amax(1) for group in part], 1))
        alone = [group[0] for group in part if len(group) == 1]
        best.add(refined[: len(alone)], alone)
        reached = best.reached_by(refined[len(alone) :])
        left += [group for group, one in zip(part[len(alone) :], reached, strict=True) if one]
    return left
