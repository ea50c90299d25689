"""The background's score against a search over all patches, lists and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from talk2dino.calibration.background_threshold import choose_background, common_words


@pytest.mark.parametrize("offered", [2, 7, None])
def test_threshold_is_that_of_a_search(offered: int | None) -> None:
    scores = torch.rand(12, 300, generator=torch.Generator().manual_seed(3)) * 0.1 + 0.45
    random = torch.Generator().manual_seed(0)
    lists = [torch.randperm(12, generator=random)[: offered or 6].numpy() for _ in range(5)]
    values, own = scores.numpy(), scores.numpy().argmax(0)
    quality = {}
    for step in range(440, 560):
        threshold, total = np.float32(step * np.float32(0.001)), 0.0
        for words in lists:
            above, front = values[words].max(0) > threshold, np.isin(own, words)
            for kind in (True, False):
                shown, true = above == kind, front == kind
                total += (shown & true).sum() / max((shown | true).sum(), 1)
        quality[step] = total
    best = max(quality.values())
    got = choose_background(scores, offered, lists=5)
    assert quality[round(got.threshold * 1000)] == pytest.approx(best)
    assert got.lowest == pytest.approx(values.min())  # of twelve words, fewer than a short list


def test_two_kinds_of_patches_are_told_apart() -> None:
    """Every patch has one word that fits, at 0.6; all others score below 0.5."""
    random = torch.Generator().manual_seed(1)
    scores = 0.4 + 0.1 * torch.rand(40, 2000, generator=random)
    scores[torch.randint(40, (2000,), generator=random), torch.arange(2000)] = 0.6
    assert 0.498 <= choose_background(scores).threshold < 0.6


def test_common_words() -> None:
    words = common_words()
    assert len(words) == len(set(words)) > 200
    assert {"person", "sky", "traffic light"} <= set(words)
    assert "background" not in words
