"""Prompt templates, and the order of averaging and projecting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.class_names import embed_class_names
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders.text import OpenClipTextEncoder
from talk2dino.encoders.text.prompts import NAMES, prompts, templates
from talk2dino.errors import ConfigError, ResultWarning
from tests.helpers.encoders import SMALL_CLIP
from tests.helpers.parity import ParityRecord

SIZES = {
    "plain": 1,
    "identity": 1,
    "photo": 1,
    "simple": 1,
    "plural": 1,
    "subset": 7,
    "custom": 9,
    "maskclip": 5,
    "simple7": 7,
    "imagenet80": 80,
    "full": 80,
    "full+maskclip": 85,
    "subset+maskclip": 12,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sets(name: str, size: int) -> None:
    sentences = [template("{cat}") for template in templates(name)]  # braces are only text
    assert len(sentences) == len(set(sentences)) == size
    assert all("{cat}" in sentence and "{}" not in sentence for sentence in sentences)
    assert set(NAMES) <= set(SIZES)


def test_contents() -> None:
    assert prompts(["cat", "dog"], "plain") == [["a cat"], ["a dog"]]
    assert prompts(["cat"], "identity+photo+plural") == [
        ["cat", "a photo of a cat.", "a photo of cats."]
    ]
    full = prompts(["cat"], "full")[0]
    assert full == [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    subset, published = prompts(["cat"], "subset")[0], prompts(["cat"], "simple7")[0]
    assert [(a, b) for a, b in zip(subset, published, strict=True) if a != b] == [
        ("a bad photo of a cat.", "a bad photo of the cat.")
    ]
    assert set(subset) < set(full) and prompts(["cat"], "custom")[0][:7] == subset
    assert prompts([], "full") == []


@pytest.mark.parametrize("name", ["nothing", "", "plain+", "full+nothing"])
def test_an_unknown_set_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"templates='\w*' is unknown; choose one of plain"):
        templates(name)


class Stored:
    """Hands out the original's text embeddings in the order of the sentences."""

    templates = "subset"

    def __init__(self, encoded: Tensor) -> None:
        self.encoded, self.embed_dim = encoded, encoded.shape[-1]

    def encode(self, texts: Sequence[str]) -> Tensor:
        assert texts[:2] == ["itap of a c0.", "a bad photo of a c0."] and len(texts) == 35
        return self.encoded.flatten(0, 1)

    def describe(self) -> dict[str, Any]:
        return {}


def test_class_embeddings(golden, parity: ParityRecord) -> None:
    arrays = golden("text_and_encode")
    state = {
        name.removeprefix("text/proj/"): tensor
        for name, tensor in arrays.items()
        if name.startswith("text/proj/")
    }
    projection = ProjectionLayer(16, 32, hidden_layers=1, activation="tanh")
    projection.load_state_dict(state)
    encoded = arrays["text/encoded"]  # [5, 7, 16]
    names = [[f"c{number}"] for number in range(5)]
    got, rows = embed_class_names(names, Stored(encoded), projection)
    parity.check("class embeddings", "DINOText.build_text_embedding", got, arrays["text/out"], 1e-6)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad():  # the order matters: other orders give other numbers
        normalized_first = projection.project_text(F.normalize(encoded, dim=-1).mean(1))
        projected_first = projection.project_text(encoded).mean(1)
    for other in (normalized_first, projected_first):
        assert (F.normalize(other, dim=-1) - got).abs().max() > 1e-4


def test_a_name_longer_than_the_encoder_reads_is_said() -> None:
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random", templates="plain")
    projection = ProjectionLayer(text.embed_dim, 32)
    with pytest.warns(ResultWarning, match="'a red red .*'… has more tokens than the text encoder"):
        embed_class_names([["cat"], ["red " * 80]], text, projection)
