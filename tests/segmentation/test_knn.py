"""Label propagation between alike patches: a twin written out, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import UserError
from talk2dino.segmentation import KNN


def written_out(tokens: Tensor, scores: Tensor, knn: KNN) -> Tensor:
    """Patch by patch in double precision: `[P, D]`, `[K, P]`."""
    tokens, start = F.normalize(tokens.double(), dim=-1), scores.double()
    values = start
    for _ in range(knn.num_iter):
        spread = torch.empty_like(values)
        for p in range(len(tokens)):
            others = [q for q in range(len(tokens)) if q != p]
            others.sort(key=lambda q: -float(tokens[p] @ tokens[q]))
            near = others[: knn.k]
            cosines = torch.stack([tokens[p] @ tokens[q] for q in near])
            spread[:, p] = values[:, near] @ (cosines / knn.temperature).softmax(0)
        values = (1 - knn.keep) * spread + knn.keep * start
    return values.float()


@pytest.mark.parametrize("knn", [KNN(4, 3, 0.2, 0.1), KNN(1, 2, 0.0, 1.0), KNN(99, 1, 0.5, 0.3)])
def test_twin_and_independent_windows(knn: KNN) -> None:
    tokens, scores = torch.randn(2, 12, 5), torch.rand(2, 3, 3, 4)
    got = knn(tokens, scores)
    for one, picture, values in zip(got, tokens, scores, strict=True):
        want = written_out(picture, values.flatten(1), knn).view(3, 3, 4)
        torch.testing.assert_close(one, want, rtol=0, atol=1e-6)


def test_a_noisy_patch_takes_the_scores_of_its_kind_wherever_they_lie() -> None:
    kind = torch.arange(36) % 2  # alternating patches of two kinds
    tokens = F.one_hot(kind, 2).float()[None] + 0.01 * torch.randn(1, 36, 2)
    clean = F.one_hot(kind, 2).float().t().view(1, 2, 6, 6)
    noisy = clean.clone()
    noisy[0, :, 2, 3] = torch.tensor([1.0, 0.0])  # a patch of kind 1 that looks like class 0
    assert noisy.argmax(1)[0, 2, 3] != clean.argmax(1)[0, 2, 3]
    assert torch.equal(KNN(8, 3)(tokens, noisy).argmax(1), clean.argmax(1))


def test_nothing_to_do_and_the_range_never_grows() -> None:
    tokens, scores = torch.randn(1, 20, 6), torch.rand(1, 4, 4, 5)
    assert torch.equal(KNN(num_iter=0)(tokens, scores), scores)
    torch.testing.assert_close(KNN(keep=1.0)(tokens, scores), scores)
    assert torch.equal(KNN()(tokens[:, :1], scores[..., :1, :1]), scores[..., :1, :1])
    out = KNN(4, 10, 0.0)(tokens, scores)
    assert out.min() >= scores.min() - 1e-6 and out.max() <= scores.max() + 1e-6
    assert not KNN().state_dict()


def test_half_precision_is_refined_in_float32() -> None:
    tokens, scores = torch.randn(1, 20, 6).half(), torch.rand(1, 4, 4, 5).half()
    got = KNN(4)(tokens, scores)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, KNN(4)(tokens.float(), scores.float()))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: KNN(k=0), "knn.k=0"),
        (lambda: KNN(num_iter=-1), "knn.num_iter=-1"),
        (lambda: KNN(keep=1.5), "knn.keep=1.5"),
        (lambda: KNN(temperature=0), "knn.temperature=0"),
        (lambda: KNN()(torch.rand(1, 9, 4), torch.rand(1, 2, 3, 4)), "h \\* w == P"),
        (lambda: KNN()(torch.rand(2, 12, 4), torch.rand(1, 2, 3, 4)), "h \\* w == P"),
    ],
)
def test_bad_input(action: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        action()
