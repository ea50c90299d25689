"""A word "background" is a class like any other; what no class fits is another thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from talk2dino import Talk2DINO
from talk2dino.errors import ConfigError
from tests.helpers.encoders import hash_model, noise_pixels

TWICE = "'background' is also what is left over; leave out one of the two"


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.mark.parametrize("pamr", [False, True])
def test_it_has_its_own_scores(model: Talk2DINO, pamr: bool) -> None:
    """All is that of the same words under another name."""
    pixels = noise_pixels()
    wanted = model.segment(pixels, {"b": "background", "c": "cat"}, pamr=pamr, short_side=32)
    found = model.segment(pixels, ["background", "cat"], pamr=pamr, short_side=32)
    assert found.classes == found.names == ["background", "cat"]
    assert torch.equal(found.labels, wanted.labels) and torch.equal(found.scores, wanted.scores)
    for one, other in (("background", "b"), ("cat", "c")):
        assert np.array_equal(found.heatmap(one), wanted.heatmap(other))
        assert found.scores_at(3, 5)[one] == wanted.scores_at(3, 5)[other]
    assert found.annotations() == wanted.annotations()
    ids = {entry["name"]: entry["id"] for entry in found.to_coco()["categories"]}
    assert list(ids) == ["background", "cat"]


def test_it_is_not_also_what_is_left_over(model: Talk2DINO) -> None:
    pixels = noise_pixels()
    found = model.segment(pixels, ["background", "cat"], short_side=32)
    with pytest.raises(ConfigError, match=TWICE):
        found.with_threshold(0.5)
    with pytest.raises(ConfigError, match=TWICE):
        model.embed_classes(["background", "cat"], negatives=["sky"])
    with pytest.raises(ConfigError, match=TWICE):
        model.segment(pixels, ["background", "cat"], background=0.5, short_side=32)
    assert found.with_threshold(None).names == ["background", "cat"]
