"""Labels after a refinement, without refining classes that cannot win.

PAMR, the average of windows and the resize to the picture are averages with weights that are never
negative: larger scores give larger results. So the maximum of several classes, taken token by
token and refined once, bounds the result of each of them: where it stays below the best class so
far at every pixel, none of them wins anywhere. First the classes that are best at some token
compete, beside the maxima of a few groups of all others; then the members of groups that reached
the best, in smaller groups, until no group is left. The labels are those of refining all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from talk2dino.segmentation.best_class import BestClass, best_class
from talk2dino.segmentation.parts import equal_parts

LANES = 4  # maps refined together in any case: up to 4 are as fast as one
TOGETHER = 32  # maps refined before they compete: they and the buffers stay in a shared cache
FEW = 16  # maps that cost less than a round more
SMOOTHING = (1, 3, 7)  # tokens a side; what a refinement may average away
FIRST, LATER = 6, 3  # this many uncertain classes a group, on average


def contender_labels(
    token_scores: Tensor,
    refine: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    background_threshold: float | None = None,
    compiled: bool = False,
) -> Tensor:
    """The labels of `label_map(refine(token_scores), *size, background_threshold, compiled)`.

    Exactly those if `refine` rounds every class alike, else where no two classes are equal to
    rounding.

    Args:
        token_scores: `[B, K, r, c]`, one per window.
        refine: `[B, n, r, c]` to `[n, h, w]` for any n; maps of a larger input may nowhere be
            smaller, and no map may depend on another.
        size: rows and columns of the picture.
        background_threshold: see `label_map`.
        compiled: see `best_class`.

    Returns:
        `[*size]` int64.
    """
    best = best_class(*size, background_threshold, token_scores.device, compiled)
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

    About one group for `size` classes, at least `FEW` maps in all, as many as fill the lanes.
    """
    rest = len(order) - alone
    maps = max(alone + ceil(rest / size), FEW)
    maps = min(-(-maps // LANES) * LANES, len(order))
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
    for start, stop in equal_parts(len(groups), TOGETHER):
        part = groups[start:stop]
        refined = refine(torch.stack([scores[:, group].amax(1) for group in part], 1))
        alone = [group[0] for group in part if len(group) == 1]
        best.add(refined[: len(alone)], alone)
        reached = best.reached_by(refined[len(alone) :])
        left += [group for group, one in zip(part[len(alone) :], reached, strict=True) if one]
    return left
