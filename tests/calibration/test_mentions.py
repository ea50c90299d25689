"""Which captions speak of a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from talk2dino.calibration.mentions import FEWEST, closeness, unmentioned, why_unknown
from talk2dino.features import FeatureStore, write_store
from tests.helpers.encoders import HashText
from tests.helpers.stores import tiny_arrays

CAPTIONS = (["a cat", "fur"], ["a cat"], ["dog"], ["a dog", "a cat"])
OF_IMAGE = [0, 0, 1, 2, 3, 3]


def store_of(folder: Path, text: dict[str, Any] | None) -> FeatureStore:
    """Four pictures, the last of five rows without a caption."""
    images, _ = tiny_arrays({"patch_tokens": (4, 6)}, images=5)
    texts = [caption for captions in CAPTIONS for caption in captions]
    captions = {
        "id": np.arange(6),
        "image_row": np.array(OF_IMAGE),
        "text": np.array(texts),
        "embedding": HashText().encode(texts).numpy(),
    }
    path = folder / "store"
    write_store(path, images, captions, text=text)
    return FeatureStore(path)


def test_the_closest_caption_of_a_picture_counts(tmp_path: Path) -> None:
    store, text = store_of(tmp_path, HashText().describe()), HashText()
    got = closeness(store, np.array([0, 2, 3, 4]), ["cat", "dog"], text)
    words = F.normalize(text.encode(["a cat", "a dog"]), dim=-1)
    for word, own in enumerate(words):
        for place, image in enumerate((0, 2, 3)):
            said = F.normalize(text.encode(list(CAPTIONS[image])), dim=-1)
            torch.testing.assert_close(got[word, place], (said @ own).max(), atol=1e-3, rtol=0)
    assert (got[:, 3] == -1).all()
    assert got[0, 0] > 0.999 and got[1, 2] > 0.999


def test_captions_of_another_encoder_say_nothing(tmp_path: Path) -> None:
    described = HashText().describe()
    assert why_unknown(store_of(tmp_path / "same", described), HashText()) == ""
    other = store_of(tmp_path / "other", described | {"weights_sha256": "1"})
    assert "another text encoder" in why_unknown(other, HashText())
    assert "another text encoder" in why_unknown(store_of(tmp_path / "none", None), HashText())


def test_words_that_all_speak_of_keep_their_tokens() -> None:
    close = torch.full((10, 200), 0.1)
    close[0, :20] = 0.8
    close[1, : 201 - FEWEST] = 0.8  # one token too few would be left
    kept = unmentioned(close, torch.arange(200))
    assert kept[0].tolist() == [False] * 20 + [True] * 180
    assert kept[1:].all()
    twice = unmentioned(close, torch.arange(200).repeat_interleave(2))
    assert twice.sum(1).tolist() == [360, 2 * (FEWEST - 1), *[400] * 8]
