"""Offsets from labeled patches: against known offsets, a condition of the optimum, and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from talk2dino.calibration.labeled import (
    LabeledPatches,
    cross_fit,
    fit_offsets,
    label_patches,
)
from talk2dino.datasets.benchmarks.base import Sample
from talk2dino.datasets.benchmarks.classes import read_classes
from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation import Segmenter
from talk2dino.segmentation.segmenter import WindowFeatures

SHIFTS = torch.tensor([0.1, -0.05, 0.0, 0.02, -0.07])


def patches(shifts: torch.Tensor = SHIFTS, count: int = 4000) -> LabeledPatches:
    """Noisy scores, 0.15 higher for the right class; each class has its shift besides."""
    random = torch.Generator().manual_seed(0)
    labels = (torch.rand(count, generator=random) ** 2 * len(shifts)).long()  # unequally frequent
    scores = 0.08 * torch.randn(count, len(shifts), generator=random)
    scores[torch.arange(count), labels] += 0.15
    picture = torch.arange(count) % 10
    return LabeledPatches(scores + shifts, labels, picture, pictures=10)


def test_known_offsets_are_found_again() -> None:
    offsets = fit_offsets(patches(), ridge=1e-4)
    torch.testing.assert_close(offsets - offsets.mean(), SHIFTS - SHIFTS.mean(), atol=0.01, rtol=0)
    fitted = cross_fit(patches(), seed=0)
    right = patches(torch.zeros(5)).mean_iou(torch.zeros(5))
    assert fitted.before < right - 0.05 and abs(fitted.crossed - right) < 0.02
    assert fitted.folds == 5


def test_without_a_ridge_every_class_gets_its_share() -> None:
    """The offsets' gradient is zero where every class has 1/K of the weight in the mean."""
    given = patches()
    weight = given.labels.bincount().float().reciprocal()[given.labels] / 5
    slope = 0.15 / 0.08**2  # of the two densities' log ratio; the fit finds nearly this
    chances = (slope * (given.scores - fit_offsets(given, ridge=0.0))).softmax(1)
    torch.testing.assert_close(weight @ chances, torch.full((5,), 0.2), atol=0.005, rtol=0)


def test_offsets_for_nothing_do_not_look_good() -> None:
    """Labels that have nothing to do with the scores: no gain on pictures left out."""
    given = patches(torch.zeros(5))
    random = torch.Generator().manual_seed(1)
    shuffled = given.labels[torch.randperm(len(given.labels), generator=random)]
    fitted = cross_fit(LabeledPatches(given.scores, shuffled, given.picture, 10), seed=0)
    assert fitted.crossed < fitted.before + 0.01


def test_classes_without_a_patch_keep_their_scores() -> None:
    given = patches()
    chosen = given.of((given.labels == 0) | (given.labels == 3))
    offsets = fit_offsets(chosen)
    assert offsets[[1, 2, 4]].tolist() == [0, 0, 0] and offsets[0] - offsets[3] > 0.05
    wanted = MulticlassJaccardIndex(5, average="none")(chosen.scores, chosen.labels)
    union = torch.bincount(chosen.labels, minlength=5) + torch.bincount(
        chosen.scores.argmax(1), minlength=5
    )
    assert chosen.mean_iou(torch.zeros(5)) == pytest.approx(float(wanted[union > 0].mean()))


class MeanColor(torch.nn.Module):
    """An encoder whose tokens are the colors of 4 x 4 pixels."""

    patch_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> WindowFeatures:
        side = images.shape[-1] // 4
        tokens = torch.nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return WindowFeatures(tokens, torch.zeros(len(images), 1, side**2), (side, side))


@dataclass
class Halves:
    """Pictures that are red on the left and green on the right, the right half labeled `right`."""

    classes: list[str]
    right: int
    ignore_index: int = 255

    def __post_init__(self) -> None:
        self.class_list = read_classes(self.classes)

    def __len__(self) -> int:
        return 2

    def sample(self, index: int) -> Sample:
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        image[0, :, :8], image[1, :, 8:] = 255, 255
        target = torch.full((16, 16), self.right)
        target[:, :8] = len(self.class_list.classes) - 1
        target[:4] = 255
        return Sample(str(index), image, target)


def labeled(pictures: Any) -> LabeledPatches:
    segmenter = Segmenter(MeanColor(), window=16, stride=16, short_side=16, input_size=16)
    text = torch.tensor([[1.0, 0, 0, 0.25], [0, 1.0, 0, 0.0]])  # red minus 0.25, and green
    return label_patches(pictures, segmenter, text, torch.tensor([0, 1]), background=0.6)


def test_patches_carry_their_most_frequent_label() -> None:
    found = labeled(Halves(["green", "red"], right=0))
    assert found.pictures == 2 and len(found.labels) == 2 * 3 * 4  # without the ignored row
    assert found.labels[:4].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(found.scores[0], torch.tensor([0.75, 0.0]), atol=1e-5, rtol=0)
    assert found.picture.tolist() == [0] * 12 + [1] * 12


def test_a_background_is_a_class_of_one_score() -> None:
    found = labeled(Halves(["background", "red", "green"], right=0))
    assert found.labels[:4].tolist() == [2, 2, 0, 0]
    wanted = torch.tensor([0.6]).logit().expand(len(found.scores))
    torch.testing.assert_close(found.scores[:, 0], wanted)
    torch.testing.assert_close(found.scores[0, 1:], torch.tensor([0.75, 0.0]), atol=1e-5, rtol=0)


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="2 pictures show 1 of the classes"):
        labeled(Halves(["green", "red"], right=1))
    alone = LabeledPatches(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.zeros(4), 1)
    with pytest.raises(ConfigError, match="a single picture"):
        cross_fit(alone, seed=0)
