"""The best class of every pixel against the plain way: resize all scores, take the argmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talk2dino.segmentation.labels import BestClass, label_map
from talk2dino.segmentation.scores import resize_scores, with_background

SIZES = [  # of the scores, of the picture
    ((20, 31), (33, 50)),
    ((20, 31), (20, 31)),
    ((64, 48), (11, 9)),
    ((1, 1), (5, 3)),
    ((7, 1), (2, 1)),
    ((3, 40), (1, 41)),
]


def argmax(scores: Tensor, size: tuple[int, int], threshold: float | None = None) -> Tensor:
    return with_background(resize_scores(scores, *size), threshold).argmax(0)


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize(("small", "size"), SIZES)
def test_labels(small: tuple[int, int], size: tuple[int, int], threshold: float | None) -> None:
    scores = torch.rand(9, *small)
    best = BestClass(*size, threshold)
    best.add(scores[4:], range(4, 9))
    best.add(scores[:4], range(4))
    want = argmax(scores, size, threshold)
    assert best.labels.dtype == torch.int64
    assert torch.equal(best.labels, want)
    assert torch.equal(label_map(scores, *size, threshold), want)


@pytest.mark.parametrize(("small", "size"), SIZES)
def test_scores_are_those_of_resizing_all(small: tuple[int, int], size: tuple[int, int]) -> None:
    scores = torch.rand(1, *small)
    best = BestClass(*size)
    best.add(scores, [0])
    torch.testing.assert_close(best._best, resize_scores(scores, *size)[0], rtol=0, atol=2e-6)


def test_the_first_of_equal_scores_wins_whenever_it_comes() -> None:
    scores = torch.rand(1, 6, 7)
    best = BestClass(13, 17, 0.5)
    best.add(scores, [5])
    best.add(scores, [2])
    best.add(scores, [3])
    assert set(best.labels.flatten().tolist()) == {0, 3}  # the background, and class 2


def test_nothing_but_numbers_wins() -> None:
    scores = torch.rand(2, 6, 7)
    scores[1] = torch.nan
    best = BestClass(13, 17)
    best.add(scores, range(2))
    assert not best.labels.any()


def test_reached_by() -> None:
    scores = torch.rand(1, 40, 30)
    one_pixel_above, below = scores[0] - 0.2, scores[0] - 0.2
    one_pixel_above[39, 29] += 0.3
    best = BestClass(40, 30)
    best.add(scores, [0])
    maps = torch.stack([below, scores[0], one_pixel_above, below])
    assert best.reached_by(maps) == [False, True, True, False]
    assert best.reached_by(maps[:0]) == []
    background = BestClass(40, 30, 0.9)
    assert background.reached_by(torch.full((1, 4, 4), 0.8)) == [False]
    assert background.reached_by(torch.full((1, 4, 4), 0.9)) == [True]


def test_scores_in_any_order_of_memory_and_in_half_precision() -> None:
    scores = torch.rand(6, 7, 4).permute(2, 0, 1).bfloat16()
    best = BestClass(13, 17)
    best.add(scores, range(4))
    assert torch.equal(best.labels, argmax(scores.float(), (13, 17)))
