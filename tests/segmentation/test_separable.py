"""The two matrices of a picture against the steps that they stand for, one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from talk2dino.segmentation.portions import portions
from talk2dino.segmentation.scores import resize_scores, upsample, with_background
from talk2dino.segmentation.windows import SeparableScores, sliding_windows
from tests.helpers.windows import stitch

# working size, window, stride, size of the picture
CASES = {
    "one window": ((32, 32), 32, 16, (32, 32)),
    "row of windows, enlarged": ((32, 75), 32, 16, (61, 140)),
    "column of windows, reduced": ((90, 32), 32, 16, (31, 17)),
    "grid with a last window shifted back": ((50, 71), 32, 16, (97, 64)),
    "side shorter than a window": ((20, 45), 32, 16, (33, 50)),
    "one pixel": ((1, 40), 32, 16, (1, 100)),
}


def step_by_step(tokens: Tensor, case: str) -> Tensor:
    """Enlarge every window, average, resize: `[B, K, r, c]` to `[K, H, W]`."""
    working, window, stride, size = CASES[case]
    places = sliding_windows(*working, window, stride)
    large = [
        upsample(one[None], place.y2 - place.y1, place.x2 - place.x1)[0]
        for one, place in zip(tokens, places, strict=True)
    ]
    return resize_scores(stitch(large, places, *working), *size)


def both(case: str, classes: int = 5) -> tuple[SeparableScores, Tensor]:
    working, window, stride, size = CASES[case]
    places = sliding_windows(*working, window, stride)
    tokens = torch.rand(len(places), classes, 4, 4)
    return SeparableScores(tokens, places, working, size), step_by_step(tokens, case)


@pytest.mark.parametrize("case", CASES)
def test_two_matrices_do_what_the_steps_do(case: str) -> None:
    scores, want = both(case)
    torch.testing.assert_close(scores.full(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [None, -1.0, 0.7, 2.0])
def test_labels_are_the_argmax_in_strips_and_chunks(
    threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips = replace(portions(torch.device("cpu")), strip=5000)  # 6 strips
    monkeypatch.setattr("talk2dino.segmentation.windows.portions", lambda device: strips)
    scores, want = both("grid with a last window shifted back", classes=37)
    labels = scores.labels(threshold)
    assert labels.dtype == torch.int64
    full = with_background(want, threshold)
    best = full.gather(0, labels[None])[0]  # the same label, or an equal score but for rounding
    torch.testing.assert_close(best, full.amax(0), rtol=0, atol=1e-6)
    assert (labels == full.argmax(0)).float().mean() > 0.999


def test_the_first_of_equal_classes_wins_everywhere() -> None:
    working, window, stride, size = CASES["grid with a last window shifted back"]
    places = sliding_windows(*working, window, stride)
    tokens = torch.rand(len(places), 40, 4, 4)
    tokens[:, 33] = tokens[:, 20] = tokens[:, 2]
    labels = SeparableScores(tokens, places, working, size).labels()
    assert not torch.isin(labels, torch.tensor([20, 33])).any() and (labels == 2).any()
