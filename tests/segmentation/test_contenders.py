"""Labels from bounds against labels from refining every class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.segmentation import PAMR
from talk2dino.segmentation.labels import contender_labels, label_map
from talk2dino.segmentation.windows import Window
from tests.helpers.windows import stitch

WINDOWS = [Window(0, 0, 28, 28), Window(0, 14, 28, 42)]
SIZE = (33, 50)


class Refinement:
    """PAMR of two overlapping windows of a picture of 28x42; counts the maps it refines."""

    def __init__(self, compiled: bool = True) -> None:
        picture = torch.randint(0, 256, (3, 28, 42), dtype=torch.uint8)
        crops = (window.crop(picture) for window in WINDOWS)
        self.refiners = list(PAMR(4, (1, 3, 6), compiled).prepare(crops))
        self.maps = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.maps += tokens.shape[1]
        maps = (refine(one) for refine, one in zip(self.refiners, tokens, strict=True))
        return stitch(maps, WINDOWS, 28, 42)


def smooth_scores(classes: int, roughness: float) -> Tensor:
    """Class scores that vary slowly, and a little from token to token: `[2, K, 7, 7]`."""
    slow = F.interpolate(torch.rand(2, classes, 3, 3), (7, 7), mode="bilinear", align_corners=True)
    return 0.45 + 0.1 * slow + roughness * torch.rand(2, classes, 7, 7)


@pytest.mark.parametrize("threshold", [None, 0.52])
@pytest.mark.parametrize("roughness", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("classes", [1, 2, 21, 171])
def test_labels_are_those_of_refining_every_class(
    classes: int, roughness: float, threshold: float | None
) -> None:
    scores, refine = smooth_scores(classes, roughness), Refinement()
    want = label_map(refine(scores), *SIZE, threshold)
    assert torch.equal(contender_labels(scores, refine, SIZE, threshold), want)


def test_few_of_many_classes_are_refined() -> None:
    scores, refine = smooth_scores(171, 0.005), Refinement()
    scores[:, 20:] -= 0.05  # most lists hold many classes that are nowhere in a picture
    contender_labels(scores, refine, SIZE)
    assert refine.maps < 60


def test_a_class_that_leads_nowhere_and_wins_between_two_others() -> None:
    """Its bound is reached, so it is refined after all."""
    scores = torch.full((2, 40, 7, 7), 0.1)
    scores[:, 0, :, ::2], scores[:, 1, :, 1::2] = 0.60, 0.60  # each in every second column
    scores[:, 17] = 0.55  # second everywhere
    refine = Refinement()
    want = label_map(refine(scores), *SIZE)
    assert (want == 17).any()
    assert torch.equal(contender_labels(scores, refine, SIZE), want)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_of_equal_classes_the_first_wins(threshold: float | None) -> None:
    scores = smooth_scores(30, 0.01)
    scores[:, 20] = scores[:, 3]
    scores[:, 3] = scores[:, 3] - 1e-9  # rounds to the same
    scores[:, 25] = scores[:, 8]
    refine = Refinement()
    want = label_map(refine(scores), *SIZE, threshold)
    assert torch.equal(contender_labels(scores, refine, SIZE, threshold), want)


def test_everything_below_the_threshold_is_background() -> None:
    refine = Refinement()
    labels = contender_labels(smooth_scores(100, 0.01), refine, SIZE, 0.9)
    assert labels.shape == SIZE and not labels.any()
    assert refine.maps <= 20  # bounds alone


def test_library_calls_too() -> None:
    scores, refine = smooth_scores(60, 0.02), Refinement(compiled=False)
    want = label_map(refine(scores), *SIZE)
    assert (contender_labels(scores, refine, SIZE) == want).double().mean() > 0.999
