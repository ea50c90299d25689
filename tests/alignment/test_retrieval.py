"""Ranks against the original's numbers and against sorting one query at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talk2dino.alignment.retrieval import (
    DirectionReport,
    retrieval,
    retrieval_from_scores,
    retrieval_metrics,
)
from talk2dino.alignment.similarity import DotProduct
from talk2dino.errors import DataError


@pytest.mark.parametrize("chunk_size", [4, 512])
def test_feature_normalization_matches_original(golden, parity, chunk_size) -> None:
    arrays = golden("retrieval")
    images, captions = arrays["in/images"][::5], arrays["in/captions"]
    owners = torch.arange(30) // 5
    report = retrieval(captions, images, owners, normalize="feature", chunk_size=chunk_size)
    for name, got in (("t2i", report.text_to_image), ("i2t", report.image_to_text)):
        want = torch.stack(
            [arrays[f"{name}/{key}"] for key in ("r1", "r5", "r10", "medr", "meanr")]
        )
        values = [got.recall[1], got.recall[5], got.recall[10], got.median_rank, got.mean_rank]
        parity.check(
            "retrieval", f"src/metrics.py {name}", torch.tensor(values), want.float(), 1e-5
        )
        assert torch.equal(got.ranks - 1, arrays[f"{name}/ranks"])


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
    report = retrieval_from_scores(lambda rows: scores[rows], owners, images, chunk_size)
    t2i, i2t = sorted_ranks(scores, owners)
    assert report.text_to_image.ranks.tolist() == t2i
    assert report.image_to_text.ranks.tolist() == i2t


def test_perfect_embeddings_and_collapsed_ones() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    perfect = retrieval(torch.eye(3)[owners], torch.eye(3), owners).as_dict()
    assert perfect["text_to_image/recall@1"] == perfect["image_to_text/recall@1"] == 100
    assert perfect["text_to_image/mean_rank"] == perfect["image_to_text/median_rank"] == 1
    collapsed = retrieval(torch.ones(4, 3), torch.ones(3, 3), owners)
    assert collapsed.text_to_image.recall[1] == collapsed.image_to_text.recall[1] == 0
    assert collapsed.text_to_image.ranks.tolist() == [3, 3, 3, 3]


def test_a_diverged_model_gets_no_credit() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    report = retrieval(torch.full((4, 3), float("nan")), torch.ones(3, 3), owners)
    assert report.text_to_image.ranks.tolist() == [3, 3, 3, 3]
    assert report.image_to_text.ranks.tolist() == [4, 3, 4]


def test_metrics_take_ids_in_any_order() -> None:
    texts, images = torch.randn(7, 4), torch.randn(4, 4)
    owners = torch.tensor([3, 0, 1, 2, 2, 0, 3])
    ids = torch.tensor([40, 7, 99, 12])
    got = retrieval_metrics(DotProduct().scores, texts, images, ids[owners], ids, chunk_size=3)
    assert got == retrieval(texts, images, owners).as_dict()
    with pytest.raises(DataError, match=r"image id \d+ of a caption"):
        retrieval_metrics(DotProduct().scores, texts, images, ids[owners] + 1, ids)


def test_vector_normalization_ignores_length() -> None:
    texts, images = torch.randn(6, 4), torch.randn(3, 4)
    owners = torch.arange(6) // 2
    one = retrieval(texts, images, owners)
    two = retrieval(texts * torch.rand(6, 1).add(0.1), images, owners)
    assert torch.equal(one.text_to_image.ranks, two.text_to_image.ranks)


def test_median_of_an_even_number_of_ranks() -> None:
    assert DirectionReport.from_ranks(torch.tensor([1, 2])).median_rank == 1  # floor(0.5) + 1
    assert DirectionReport.from_ranks(torch.tensor([1, 4, 9])).median_rank == 4


def test_bad_pairs_are_named() -> None:
    texts, images = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(DataError, match=r"images 0 to 2.*\[0, 3\]"):
        retrieval(texts, images, torch.tensor([0, 3]))
    with pytest.raises(DataError, match="image row 1 has no caption"):
        retrieval(texts, images, torch.tensor([0, 2]))
    with pytest.raises(DataError, match="choose vector or feature"):
        retrieval(texts, images, torch.tensor([0, 2]), normalize="row")
