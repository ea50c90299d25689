"""Label propagation between alike patches: a twin written out, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import UserError
from talk2dino.segmentation import KNN
from talk2dino.segmentation.refinement.knn import LEAST_COSINE


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
            if knn.power is None:
                weights = (cosines / knn.temperature).softmax(0)
            else:
                weights = cosines.clamp(min=LEAST_COSINE) ** knn.power
            spread[:, p] = values[:, near] @ (weights / weights.sum())
        values = (1 - knn.keep) * spread + knn.keep * start
    return values.float()


@pytest.mark.parametrize(
    "knn",
    [
        KNN(4, 3, 0.2, 0.1),
        KNN(1, 2, 0.0, 1.0),
        KNN(99, 1, 0.5, 0.3),
        KNN(4, 3, 0.2, power=3),
        KNN(99, 2, 0.1, power=0.5),  # some cosines are negative
    ],
)
def test_twin_and_independent_windows(knn: KNN) -> None:
    tokens, scores = torch.randn(2, 12, 5), torch.rand(2, 3, 3, 4)
    got = knn(tokens, scores)
    for one, picture, values in zip(got, tokens, scores, strict=True):
        want = written_out(picture, values.flatten(1), knn).view(3, 3, 4)
        torch.testing.assert_close(one, want, rtol=0, atol=1e-6)


def before_scopes(patch_tokens: Tensor, scores: Tensor, knn: KNN) -> Tensor:
    """The refinement as it was before there were scopes and powers, with the library's calls."""
    k = min(knn.k, patch_tokens.shape[1] - 1)
    results = []
    for tokens, start in zip(
        F.normalize(patch_tokens, dim=-1), scores.flatten(2).transpose(1, 2), strict=True
    ):
        nearest, index = (tokens @ tokens.t()).fill_diagonal_(-2.0).topk(k, sorted=False)
        weights = (nearest / knn.temperature).softmax(-1) * (1 - knn.keep)
        values = start = start.contiguous()
        for _ in range(knn.num_iter):
            mean = F.embedding_bag(index, values, per_sample_weights=weights, mode="sum")
            values = mean.add_(start, alpha=knn.keep)
        results.append(values)
    return torch.stack(results).transpose(1, 2).reshape(scores.shape)


@pytest.mark.parametrize("knn", [KNN(32, 10, 0.05, 0.05), KNN(8, 3, 0.2, 0.1)])
def test_settings_of_earlier_versions_give_the_same_bits(knn: KNN) -> None:
    tokens, scores = torch.randn(2, 400, 48), torch.rand(2, 5, 20, 20)
    assert torch.equal(knn(tokens, scores), before_scopes(tokens, scores, knn))


@pytest.mark.parametrize("power", [None, 3.0])
def test_one_graph_of_a_picture(power: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, scores = torch.randn(3, 12, 5), torch.rand(3, 2, 3, 4)
    knn = KNN(4, 3, 0.2, 0.1, scope="picture", power=power)
    got = knn(tokens, scores)
    flat = written_out(tokens.view(36, 5), scores.transpose(0, 1).reshape(2, 36), knn)
    want = flat.view(2, 3, 3, 4).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (got - KNN(4, 3, 0.2, 0.1, power=power)(tokens, scores)).abs().max() > 0.01
    alone = KNN(4, 3, 0.2, 0.1, power=power)(tokens[:1], scores[:1])
    assert torch.equal(knn(tokens[:1], scores[:1]), alone)  # one window is the picture
    monkeypatch.setattr("talk2dino.segmentation.refinement.knn.HELD", 5 * 36)  # 5 rows a block
    torch.testing.assert_close(knn(tokens, scores), got, rtol=0, atol=1e-6)


def test_many_iterations_reach_the_closed_form() -> None:
    """x = (1 - a) (I - a W)⁻¹ x₀, with W from one iteration that keeps nothing."""
    tokens, scores = torch.randn(2, 12, 5), torch.rand(2, 3, 3, 4)
    settings = {"k": 4, "scope": "picture", "power": 3}
    identity = torch.eye(24).view(24, 2, 3, 4).transpose(0, 1)  # a class for every patch
    once = KNN(num_iter=1, keep=0.0, **settings)(tokens, identity)  # type: ignore[arg-type]
    graph = once.transpose(0, 1).reshape(24, 24).t().double()
    start = scores.transpose(0, 1).reshape(3, 24).double()
    want = 0.2 * torch.linalg.solve(torch.eye(24).double() - 0.8 * graph, start.t()).t()
    got = KNN(num_iter=80, keep=0.2, **settings)(tokens, scores)  # type: ignore[arg-type]
    torch.testing.assert_close(got.transpose(0, 1).reshape(3, 24), want.float(), rtol=0, atol=1e-6)


def test_an_offset_of_a_class_passes_through_and_no_class_depends_on_another() -> None:
    tokens, scores = torch.randn(2, 12, 5), torch.rand(2, 3, 3, 4)
    knn = KNN(4, 5, scope="picture", power=3)
    want = knn(tokens, scores)
    for number in range(3):
        got = knn(tokens, scores[:, [number]] - 0.3)
        torch.testing.assert_close(got, want[:, [number]] - 0.3, rtol=0, atol=1e-6)


def test_a_patch_with_no_like_takes_the_plain_mean() -> None:
    corners = torch.tensor([[[1.0, 0], [-1, 0], [-0.5, 0.9], [-0.5, -0.9]]])
    scores = torch.tensor([[[[0.0, 0.2, 0.4, 0.9]]]])
    got = KNN(3, 1, 0.0, power=50)(corners, scores)
    assert got[0, 0, 0, 0] == pytest.approx(0.5)


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
        (lambda: KNN(scope="image"), "knn.scope='image'"),
        (lambda: KNN(power=-1), "knn.power=-1"),
        (lambda: KNN()(torch.rand(1, 9, 4), torch.rand(1, 2, 3, 4)), "h \\* w == P"),
        (lambda: KNN()(torch.rand(2, 12, 4), torch.rand(1, 2, 3, 4)), "h \\* w == P"),
    ],
)
def test_bad_input(action: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        action()
