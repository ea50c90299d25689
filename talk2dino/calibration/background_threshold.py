"""The score of the background, chosen without labels.

Among a long list of common words, the best one of a patch is what it shows, as far as anybody can
tell without labels. Then half of the words are offered, drawn at random, so that neither side
outweighs the other: patches whose own word is among them are foreground, all others are what the
background is for. The threshold that tells the two apart best, on average over many such lists, is
chosen. A rule of this project, measured in docs/calibration.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import BACKGROUND, read_classes, shipped_lists
from talk2dino.errors import ConfigError

SHORT = 20  # words of a list as people give them; VOC's number
LISTS = 32
STEP = 0.001


def common_words() -> list[str]:
    """The classes of all lists that come with the package, by their first names, sorted."""
    names = {
        spec.synonyms[0]
        for name in shipped_lists()
        if name != BACKGROUND
        for spec in read_classes(name).prompted
    }
    return sorted(names)


@dataclass(frozen=True)
class Background:
    """What the background scores.

    Attributes:
        threshold: the background's score.
        lowest: the lowest score that words of a short list have anywhere, on average.
    """

    threshold: float
    lowest: float

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.lowest <= 1):
            raise ConfigError(f"background={self.threshold}, {self.lowest}: use scores within 0..1")

    def shifted(self, offset: float) -> Background:
        """The same with an offset subtracted from the log odds of the threshold."""
        value = torch.tensor(self.threshold).logit() - offset
        return Background(round(float(value.sigmoid()), 4), self.lowest)

    def after_cleaning(self, weight: float) -> float:
        """The threshold where scores were cleaned (`segmentation.scores.clean_background`).

        Cleaning replaces a score s that no attention supports by `(s + weight * lowest score) /
        (1 + weight)`, and so the threshold.
        """
        return (self.threshold + weight * self.lowest) / (1 + weight)


def choose_background(scores: Tensor, offered: int | None = None, lists: int = LISTS) -> Background:
    """The threshold between patches whose word is offered and those whose word is not.

    Args:
        scores: `[V, R]` in 0..1, of V common words on R reference patches.
        offered: words of a list, fewer than V; None for half of them.
        lists: how many are drawn, always the same ones.

    Returns:
        A threshold that is a multiple of 0.001: where the mean IoU of foreground and background,
        summed over the lists, is largest.
    """
    own = scores.argmax(0)
    low, high = int(scores.min() / STEP), int(scores.max() / STEP) + 1
    thresholds = torch.arange(low, high + 1) * STEP  # [T]
    total, lowest = torch.zeros(len(thresholds), dtype=torch.float64), 0.0
    random = torch.Generator().manual_seed(0)
    for _ in range(lists):
        words = torch.randperm(len(scores), generator=random)
        lowest += float(scores[words[:SHORT]].min()) / lists
        words = words[: len(scores) // 2 if offered is None else offered]
        total += _split_quality(scores[words].amax(0), torch.isin(own, words), thresholds)
    return Background(round(float(thresholds[total.argmax()]), 3), lowest)


def _split_quality(best: Tensor, foreground: Tensor, thresholds: Tensor) -> Tensor:
    """Mean IoU of foreground (above) and background (not above) for every threshold, `[T]`."""
    own, other = (
        # how many of them are above
        len(values) - torch.searchsorted(values, thresholds, right=True).double()
        for values in (best[kind].sort().values for kind in (foreground, ~foreground))
    )
    inside, outside = int(foreground.sum()), int((~foreground).sum())
    above = own / (inside + other).clamp(min=1)
    below = (outside - other) / (outside + inside - own).clamp(min=1)
    return (above + below) / 2
