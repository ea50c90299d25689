"""Ranks against the original's numbers and against sorting one query at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talk2dino.alignment.retrieval import (
    retrieval_from_scores,
    retrieval_metrics,
    retrieval_ranks,
)
from talk2dino.alignment.similarity import DotProduct
from talk2dino.errors import DataError


def cosines(texts: Tensor, images: Tensor) -> Callable[[slice], Tensor]:
    texts, images = F.normalize(texts, dim=-1), F.normalize(images, dim=-1)
    return lambda rows: texts[rows] @ images.T


@pytest.mark.parametrize("chunk_size", [4, 512])
def test_ranks_match_original(golden, parity, chunk_size) -> None:
    """Its `src/metrics.py` normalizes over axis 0: each component over the rows of a comparison."""
    arrays = golden("retrieval")
    images, captions = arrays["in/images"][::5], arrays["in/captions"]
    owners = torch.arange(30) // 5
    queries = F.normalize(captions.reshape(6, 5, -1), dim=1).flatten(0, 1)  # of one image each
    gallery, candidates = F.normalize(images, dim=0), F.normalize(captions, dim=0)
    for place, name, texts, pictures in (
        ("text_to_image", "t2i", queries, gallery),
        ("image_to_text", "i2t", candidates, images.sign()),  # a single row over axis 0 is ±1
    ):
        arguments = (lambda rows, t=texts, p=pictures: t[rows] @ p.T, owners, 6, chunk_size)
        want = torch.stack(
            [arrays[f"{name}/{key}"] for key in ("r1", "r5", "r10", "medr", "meanr")]
        )
        found = retrieval_from_scores(*arguments)
        keys = ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank")
        got = torch.tensor([found[f"{place}/{key}"] for key in keys])
        parity.check("retrieval", f"src/metrics.py {name}", got, want.float(), 1e-5)
        ranks = dict(zip(("t2i", "i2t"), retrieval_ranks(*arguments), strict=True))[name]
        assert torch.equal(ranks - 1, arrays[f"{name}/ranks"])


def sorted_ranks(scores: Tensor, owners: Tensor) -> tuple[list[int], list[int]]:
    t2i = [
        scores[t].argsort(descending=True).tolist().index(owners[t]) + 1 for t in range(len(owners))
    ]
    i2t = []
    for image in range(scores.shape[1]):
        order = scores[:, image].argsort(descending=True).tolist()
        i2t.append(min(order.index(t) for t in range(len(owners)) if owners[t] == image) + 1)
    return t2i, i2t


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 8), st.integers(1, 9), st.integers(0, 2**16))
def test_ranks_equal_sorting(images, extra, chunk_size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    spare = torch.randint(images, (extra,), generator=generator)
    owners = torch.cat([torch.arange(images), spare])
    owners = owners[torch.randperm(len(owners), generator=generator)]
    scores = torch.randn(len(owners), images, generator=generator)
    by_text, by_image = retrieval_ranks(lambda rows: scores[rows], owners, images, chunk_size)
    t2i, i2t = sorted_ranks(scores, owners)
    assert by_text.tolist() == t2i
    assert by_image.tolist() == i2t


def test_perfect_embeddings_and_collapsed_ones() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    perfect = retrieval_from_scores(cosines(torch.eye(3)[owners], torch.eye(3)), owners, 3)
    assert perfect["text_to_image/recall@1"] == perfect["image_to_text/recall@1"] == 100
    assert perfect["text_to_image/mean_rank"] == perfect["image_to_text/median_rank"] == 1
    equal = cosines(torch.ones(4, 3), torch.ones(3, 3))
    collapsed = retrieval_from_scores(equal, owners, 3)
    assert collapsed["text_to_image/recall@1"] == collapsed["image_to_text/recall@1"] == 0
    assert retrieval_ranks(equal, owners, 3)[0].tolist() == [3, 3, 3, 3]


def test_a_diverged_model_gets_no_credit() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    scores = cosines(torch.full((4, 3), float("nan")), torch.ones(3, 3))
    by_text, by_image = retrieval_ranks(scores, owners, 3)
    assert by_text.tolist() == [3, 3, 3, 3]
    assert by_image.tolist() == [4, 3, 4]


def test_metrics_take_ids_in_any_order() -> None:
    texts, images = torch.randn(7, 4), torch.randn(4, 4)
    owners = torch.tensor([3, 0, 1, 2, 2, 0, 3])
    ids = torch.tensor([40, 7, 99, 12])
    got = retrieval_metrics(DotProduct().scores, texts, images, ids[owners], ids, chunk_size=3)
    assert got == retrieval_from_scores(cosines(texts, images), owners, 4)
    with pytest.raises(DataError, match=r"image id \d+ of a caption"):
        retrieval_metrics(DotProduct().scores, texts, images, ids[owners] + 1, ids)


def test_median_of_an_even_number_of_ranks() -> None:
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0]])  # ranks 1 and 2 of the captions
    found = retrieval_from_scores(lambda rows: scores[rows], torch.arange(2), 2)
    assert found["text_to_image/median_rank"] == 1  # floor(0.5) + 1
    assert found["text_to_image/mean_rank"] == 1.5


def test_bad_pairs_are_named() -> None:
    scores = cosines(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(DataError, match=r"images 0 to 2.*\[0, 3\]"):
        retrieval_ranks(scores, torch.tensor([0, 3]), 3)
    with pytest.raises(DataError, match="image row 1 has no caption"):
        retrieval_ranks(scores, torch.tensor([0, 2]), 3)
