"""Blocks of classes: the same scores and labels as of all classes at once, in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from talk2dino.errors import DataError
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.class_maps import ClassMaps
from talk2dino.segmentation.labels import label_map
from tests.helpers.encoders import MeanColorEncoder

CLASSES = 150
NAMES = [f"class {index}" for index in range(CLASSES)]


def both(
    monkeypatch: pytest.MonkeyPatch, segmenter: Segmenter, memory: int
) -> tuple[ClassMaps, ClassMaps]:
    """All classes at once, and blocks of as many as fit into `memory`; the first is a negative."""
    torch.manual_seed(0)
    encoded = segmenter.encode(torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8))
    text = F.normalize(torch.randn(CLASSES + 1, 3), dim=-1)
    whole = segmenter.class_maps(encoded, text)
    monkeypatch.setattr(ClassMaps.__init__, "__defaults__", (memory,))
    return whole, segmenter.class_maps(encoded, text)


@pytest.mark.parametrize("pamr", [None, PAMR(2, (1, 2)), PAMR(2, (1, 2), whole_image=True)])
@pytest.mark.parametrize("threshold", [None, 0.55])
def test_blocks_give_the_bits_of_all_classes_at_once(
    monkeypatch: pytest.MonkeyPatch, pamr: PAMR | None, threshold: float | None
) -> None:
    segmenter = Segmenter(
        MeanColorEncoder(), window=32, stride=16, short_side=32, input_size=32, pamr=pamr
    )
    whole, blocks = both(monkeypatch, segmenter, 50 * 4 * 32 * 45)
    assert [len(block) for block in blocks.blocks()] == [48, 48, 48, 7]
    assert torch.equal(torch.cat(list(blocks.blocks())), whole[:])
    assert blocks.limits == whole.limits == tuple(float(end) for end in whole[:].aminmax())
    image = torch.zeros(3, 40, 56, dtype=torch.uint8)
    found = []
    for maps in (whole, blocks):
        negative, rest = maps.split(1)
        found.append(SegmentedImage.from_scores(image, NAMES, rest, negative, threshold))
    for one in found:
        assert torch.equal(one.labels, one.scores.argmax(0))
    assert torch.equal(found[0].labels, found[1].labels)
    assert found[0].scores_at(3, 50) == found[1].scores_at(3, 50)
    assert found[0].heatmap(NAMES[60]).tobytes() == found[1].heatmap(NAMES[60]).tobytes()
    moved = [one.with_threshold(0.6) for one in found]
    assert torch.equal(moved[0].labels, moved[1].labels)
    # the labels of before: all scores in one tensor
    stacked = label_map(whole[:], 40, 56, threshold)
    if threshold is not None:
        stacked = (stacked - 1).clamp_min_(0)
    assert torch.equal(found[1].labels, stacked)


def test_no_more_than_the_memory_is_asked_for_at_once() -> None:
    asked: list[int] = []

    def enlarge(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tokens.shape[1])
        return tokens[0].expand(-1, 8, 8)

    maps = ClassMaps(torch.rand(1, 20, 1, 1), enlarge, (8, 8), memory=7 * 4 * 64)
    assert asked == []  # nothing before it is wanted
    result = SegmentedImage.from_scores(
        torch.zeros(3, 8, 8, dtype=torch.uint8), NAMES[:20], maps, None, None
    )
    result.scores_at(0, 0)
    result.heatmap(NAMES[3])
    assert max(asked) == 7
    held = len(asked)
    ClassMaps(torch.rand(1, 7, 1, 1), enlarge, (8, 8), memory=7 * 4 * 64).cpu()[2:4]
    assert len(asked) == held + 1  # what fits is computed once


def test_labels_need_a_class() -> None:
    with pytest.raises(DataError, match="at least one class"):
        label_map([], 4, 4)
