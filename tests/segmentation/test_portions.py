"""Labels with the portions of an accelerator, on the CPU: all at once, in few calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.labels import BestClass, contender_labels, label_map
from talk2dino.segmentation.portions import MEMORY, Portions, portions
from talk2dino.segmentation.refinement.pamr import Engine
from talk2dino.segmentation.scores import class_scores, resize_scores, upsample, with_background
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures
from talk2dino.segmentation.windows import sliding_windows

SMALL = replace(MEMORY, together=8, few=16)  # several parts and rounds
WINDOW, WORKING, SIZE = 64, (64, 96), (60, 90)


@pytest.fixture(params=[MEMORY, SMALL])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Portions:
    for module in ("labels", "windows"):
        name = f"talk2dino.segmentation.{module}.portions"
        monkeypatch.setattr(name, lambda device: request.param)
    return request.param


def test_a_cpu_has_caches_and_everything_else_memory() -> None:
    assert portions(torch.device("cpu")).in_turn
    assert portions(torch.device("meta")) is portions(torch.device("cuda", 1)) is MEMORY


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_the_first_of_equal_scores_wins_in_any_order_of_parts(
    threshold: float | None, at_once: Portions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.rand(9, 20, 31)
    scores[7] = scores[2]
    want = with_background(resize_scores(scores, 33, 50), threshold).argmax(0)
    assert torch.equal(label_map(scores, 33, 50, threshold), want)
    for most in (1 << 25, 2 * 33 * 50):  # all maps at once, two at once
        monkeypatch.setattr("talk2dino.segmentation.labels.MAPS", most)
        best = BestClass(33, 50, threshold)
        best.add(scores[4:], range(4, 9))
        best.add(scores[[0, 3]], [0, 3])
        assert best.reached_by(scores[[1, 8]] + 1) == [True, True]
        best.add(scores[1:3], range(1, 3))
        assert torch.equal(best.labels, want)


@pytest.mark.parametrize("classes", [1, 48, 171])
@pytest.mark.parametrize("threshold", [None, 0.52])
def test_labels_with_a_refinement_are_those_of_refining_every_class(
    classes: int, threshold: float | None, at_once: Portions
) -> None:
    slow = F.interpolate(torch.rand(1, classes, 3, 3), (7, 7), mode="bilinear", align_corners=True)
    scores = 0.45 + 0.1 * slow + 0.01 * torch.rand(1, classes, 7, 7)
    scores[:, -1] = scores[:, 0]
    counted: list[int] = []

    def refine(tokens: Tensor) -> Tensor:
        counted.append(tokens.shape[1])
        return upsample(tokens, 28, 28)[0]

    want = label_map(upsample(scores, 28, 28)[0], *SIZE, threshold)
    assert torch.equal(contender_labels(scores, refine, SIZE, threshold), want)
    assert sum(counted) <= max(classes, 1) and max(counted) >= min(classes, 8)
    if at_once is MEMORY and classes <= at_once.few:
        assert counted == [classes]


class Calls(TorchDispatchMode):
    """Counts what costs a call on a device: all but views and empty memory."""

    FREE = (
        "view", "expand", "permute", "aten.t.", "select", "slice", "split", "squeeze", "transpose",
        "detach", "unbind", "alias", "empty", "reshape",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += not any(name in str(function) for name in self.FREE)
        return function(*args, **(kwargs or {}))


def calls(action: Callable[[], object]) -> int:
    with Calls() as counted:
        action()
    return counted.number


class OneCall:
    """An engine without iterations."""

    def affinity(self, image: Tensor) -> Tensor:
        return image.new_empty(1)

    def refine(
        self, weights: Tensor, mask: Tensor, target: Tensor, share: Tensor, num_iter: int
    ) -> None:
        target.addcmul_(upsample(mask[None], *share.shape)[0], share)


class Unrefined(PAMR):
    def engine(self, device: torch.device) -> Engine:
        return OneCall()


def test_an_accelerator_gets_no_more_calls_than_the_usual_way_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = sliding_windows(*WORKING, WINDOW, WINDOW // 2)
    tokens, maps = torch.rand(len(windows), 64, 16), torch.rand(len(windows), 2, 64)
    image = torch.randint(0, 256, (3, *WORKING), dtype=torch.uint8)
    encoded = EncodedImage(image, windows, WindowFeatures(tokens, maps, (8, 8)), SIZE)
    sides = {"window": WINDOW, "stride": WINDOW // 2, "short_side": WINDOW, "input_size": WINDOW}

    def usual() -> Tensor:
        total, count = torch.zeros(len(text), *WORKING), torch.zeros(WORKING)
        for window, one in zip(windows, class_scores(tokens, text, (8, 8)), strict=True):
            window.crop(total).add_(upsample(one[None], WINDOW, WINDOW)[0])
            window.crop(count).add_(1)
        return resize_scores(total / count, *SIZE).softmax(0).argmax(0)

    found = {}
    for classes in (21, 171):
        text = F.normalize(torch.randn(classes, 16), dim=-1)
        for pamr in (None, Unrefined()):
            segmenter = Segmenter(torch.nn.Identity(), pamr=pamr, **sides)
            here = segmenter.labels(encoded, text)
            with monkeypatch.context() as patched:
                for module in ("labels", "windows"):
                    name = f"talk2dino.segmentation.{module}.portions"
                    patched.setattr(name, lambda device: MEMORY)
                assert (segmenter.labels(encoded, text) == here).double().mean() > 0.999
                found[classes, pamr is None] = calls(partial(segmenter.labels, encoded, text))
    least = calls(usual)
    assert found[21, True] == found[171, True] <= least
    assert found[21, False] <= 2 * least
    assert found[171, False] <= 8 * least  # bounds, then classes that may win, then a second round
