"""From scores to labels: the best class of a pixel, without refining classes that cannot win."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.segmentation.portions import MAPS, portions
from talk2dino.segmentation.scores import resize_scores

CHUNK = 4  # classes resized to compete in turn: they stay in the cache until then


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
        self._in_turn = portions(self._best.device).in_turn
        fitting = max(MAPS // (height * width), 1)
        self._chunk = min(CHUNK, fitting) if self._in_turn else fitting

    @property
    def labels(self) -> Tensor:
        """`[height, width]` int64."""
        return self._labels.long()

    def add(self, scores: Tensor, classes: Sequence[int]) -> None:
        """Let more classes compete: `[n, h, w]` and their n indices in rising order."""
        labels = [name + self._first for name in classes]
        for number, part in enumerate(self._resized(scores)):
            some = labels[number * self._chunk :][: len(part)]
            if self._in_turn:
                for values, label in zip(part, some, strict=True):
                    self._challenge(values, label, label)
            else:
                values, index = part.max(0)
                names = torch.tensor(some, dtype=self._labels.dtype)
                names = names.to(values.device, non_blocking=True)
                self._challenge(values, names[index], some[0])
            self._last = max(self._last, some[-1])

    def _challenge(self, values: Tensor, label: int | Tensor, lowest: int) -> None:
        """Scores `[height, width]` of a class, or the best of several, whose labels are `label`."""
        better = values > self._best
        if lowest < self._last:  # of equal scores the one that came before may be later
            better |= (values == self._best) & (self._labels > label)
        torch.maximum(self._best, values, out=self._best)
        if isinstance(label, int):
            self._labels.masked_fill_(better, label)
        else:
            self._labels = torch.where(better, label, self._labels)

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
    classes, at_once = token_scores.shape[1], portions(token_scores.device)
    few, together = at_once.few, at_once.maps(size[0] * size[1])
    groups = [[name] for name in range(classes)]
    if classes > few:
        ahead = _lead(token_scores, background_threshold).tolist()
        order = sorted(range(classes), key=lambda name: -ahead[name])
        groups = _groups(order, sum(lead >= 0 for lead in ahead), FIRST, few)
    while groups:
        groups = _compete(groups, token_scores, refine, best, together)
        groups = _groups([member for group in groups for member in group], 0, LATER, few)
    return best.labels


def _lead(scores: Tensor, threshold: float | None) -> Tensor:
    """By how much every class is ahead of all others, where that is most: `[K]`.

    Zero for the best class of a token or of the mean around one, else negative.
    """
    lead = scores.new_full(scores.shape[1:2], -torch.inf)
    rows, columns = scores.shape[-2:]
    for side in SMOOTHING:
        down, across = (_means(cells, side, scores.device) for cells in (rows, columns))
        smooth = down.to(scores) @ scores @ across.to(scores).t()
        best = smooth.amax(1, keepdim=True)
        if threshold is not None:
            best = best.clamp(min=threshold)
        lead = torch.maximum(lead, (smooth - best).amax((0, 2, 3)))
    return lead


@lru_cache(maxsize=32)  # of some kB
def _means(cells: int, side: int, device: torch.device) -> Tensor:
    """`[cells, cells]`: the mean of `side` cells around each; of those there are at the border."""
    place = torch.arange(cells)
    near = ((place[:, None] - place).abs() <= side // 2).float()
    return (near / near.sum(1, keepdim=True)).to(device)


def _groups(order: Sequence[int], alone: int, size: int, few: int) -> list[list[int]]:
    """The first `alone` classes by themselves, the rest in groups that grow along the order.

    About one group for `size` classes, at least `few` maps in all.
    """
    rest = len(order) - alone
    maps = min(max(alone + ceil(rest / size), few), len(order))
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
    together: int,
) -> list[list[int]]:
    """Let single classes into `best`; returns the larger groups that may hold a winner."""
    single = sorted(group for group in groups if len(group) == 1)
    several = [group for group in groups if len(group) > 1]
    left: list[list[int]] = []
    groups = single + several
    size = ceil(len(groups) / ceil(len(groups) / together))  # no part is much smaller
    size = ceil(size / LANES) * LANES
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        refined = refine(_maxima(scores, part))
        alone = [group[0] for group in part if len(group) == 1]
        best.add(refined[: len(alone)], alone)
        reached = best.reached_by(refined[len(alone) :])
        left += [group for group, one in zip(part[len(alone) :], reached, strict=True) if one]
    return left


def _maxima(scores: Tensor, groups: list[list[int]]) -> Tensor:
    """The largest scores of every group: `[B, K, r, c]` to `[B, len(groups), r, c]`.

    Shorter groups are filled up with their first class; single classes come first.
    """
    alone = [group[0] for group in groups if len(group) == 1]
    several = groups[len(alone) :]
    longest = max(map(len, several), default=1)
    filled = [group + group[:1] * (longest - len(group)) for group in several]
    places = [name for group in filled for name in group]
    chosen = scores[:, torch.tensor(alone + places).to(scores.device, non_blocking=True)]
    shape = len(scores), len(several), longest, *scores.shape[-2:]
    maxima = chosen[:, len(alone) :].reshape(shape).amax(2)
    return torch.cat([chosen[:, : len(alone)], maxima], 1)
