"""Dense similarity against a brute-force twin: values, gradients, chunks, subsets of patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from talk2dino.alignment.similarity import Dense, DotProduct
from talk2dino.alignment.similarity.dense import dense_scores, sample_patches
from talk2dino.errors import ConfigError


def brute_force(text: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """The definition, one pair at a time."""
    rows = []
    for t in text:
        row = []
        for image in patches.to(text.dtype):
            unit = image / image.norm(dim=-1, keepdim=True)
            cosines = (unit @ t) / t.norm()
            weights = torch.exp(cosines / temperature)
            pooled = (unit * (weights / weights.sum())[:, None]).sum(dim=0)
            row.append((pooled @ t) / (pooled.norm() * t.norm()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def inputs(texts: int = 4, images: int = 5) -> tuple[Tensor, Tensor]:
    text = torch.randn(texts, 8, dtype=torch.float64, requires_grad=True)
    patches = torch.randn(images, 7, 8, dtype=torch.float64, requires_grad=True)
    return text, patches


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_values_and_gradients_equal_brute_force(temperature, chunk_size) -> None:
    text, patches = inputs()
    weights = torch.randn(4, 5, dtype=torch.float64)
    got = dense_scores(text, patches, temperature, chunk_size)
    want = brute_force(text, patches, temperature)
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad((got * weights).sum(), (text, patches))
    want_grads = torch.autograd.grad((want * weights).sum(), (text, patches))
    torch.testing.assert_close(got_grads, want_grads)


def test_gradcheck() -> None:
    text, patches = inputs(2, 3)
    assert torch.autograd.gradcheck(lambda t, x: dense_scores(t, x, 0.2), (text, patches))


def test_frozen_half_precision_patches() -> None:
    text = torch.randn(6, 8, requires_grad=True)
    patches = torch.randn(5, 7, 8).half()
    got = Dense(temperature=0.1)(text, patches)
    assert got.dtype == torch.float32
    want = brute_force(text, patches.float(), 0.1)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), text)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), text)[0], atol=1e-6, rtol=1e-4)


def test_bfloat16_autocast_stays_close() -> None:
    text, patches = torch.randn(6, 32, requires_grad=True), torch.randn(5, 9, 32)
    want = dense_scores(text, patches, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dense_scores(text, patches, 0.1)
    assert (got - want).abs().max() < 0.02
    (grad,) = torch.autograd.grad(got.sum(), text)
    assert F.cosine_similarity(grad, torch.autograd.grad(want.sum(), text)[0]).min() > 0.99


def test_no_kept_tensor_has_patches_when_chunked() -> None:
    text, patches = torch.randn(4, 8, requires_grad=True), torch.randn(6, 7, 8)
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() != patches.untyped_storage().data_ptr():
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dense_scores(text, patches, 0.1, chunk_size=2)
    assert max(sizes) <= text.numel()  # one [T, I, P] would be 168 numbers, a text 32


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**16))
def test_one_patch_is_the_plain_cosine(texts, images, width, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(texts, width, generator=generator, dtype=torch.float64)
    visual = torch.randn(images, width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(Dense()(text, visual[:, None]), DotProduct()(text, visual))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 4))
def test_rectangle_is_part_of_the_square_and_patches_have_no_order(seed, rows, columns) -> None:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    patches = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    square = Dense()(text, patches)
    torch.testing.assert_close(Dense()(text[:rows], patches[:columns]), square[:rows, :columns])
    shuffled = patches[:, torch.randperm(5, generator=generator)]
    torch.testing.assert_close(Dense()(text, shuffled), square)
    torch.testing.assert_close(Dense()(3 * text, 0.5 * patches), square)


def test_infinite_temperature_is_the_mean_of_unit_patches() -> None:
    text, patches = torch.randn(3, 6), torch.randn(4, 5, 6)
    mean = F.normalize(patches, dim=-1).mean(dim=1)
    torch.testing.assert_close(Dense(temperature=1e6)(text, patches), DotProduct()(text, mean))


def test_random_patches_are_distinct_rows_of_their_own_image() -> None:
    tokens = torch.arange(3 * 10, dtype=torch.float32).reshape(3, 10, 1)
    chosen = sample_patches(tokens, 4, torch.Generator().manual_seed(1))[..., 0]
    assert chosen.shape == (3, 4)
    for image, row in enumerate(chosen.tolist()):
        assert len(set(row)) == 4
        assert all(10 * image <= value < 10 * (image + 1) for value in row)
    again = sample_patches(tokens, 4, torch.Generator().manual_seed(1))[..., 0]
    assert torch.equal(chosen, again)
    assert len({tuple(sorted(v % 10 for v in row)) for row in chosen.tolist()}) > 1
    assert sample_patches(tokens, 10) is tokens


def test_every_patch_is_drawn_equally_often() -> None:
    tokens = torch.arange(8.0).expand(4000, 8)[..., None]
    counts = sample_patches(tokens, 2).flatten().long().bincount(minlength=8)
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_max_patches_counts_in_training_only() -> None:
    similarity = Dense(max_patches=3)
    text, patches = torch.randn(4, 6), torch.randn(4, 5, 6)
    assert similarity.select(text, patches).shape == (4, 3, 6)
    similarity.eval()
    assert similarity.select(text, patches) is patches


@pytest.mark.parametrize("options", [{"temperature": 0}, {"max_patches": 0}, {"chunk_size": -1}])
def test_options_must_be_positive(options) -> None:
    with pytest.raises(ConfigError, match=f"similarity.{next(iter(options))}.*positive"):
        Dense(**options)


def test_wrong_shapes_name_both() -> None:
    with pytest.raises(ConfigError, match=r"\(4, 6\).*\(4, 5, 7\).*vision_dim"):
        Dense()(torch.randn(4, 6), torch.randn(4, 5, 7))
    with pytest.raises(ConfigError, match=r"\(4, 6\)"):
        Dense()(torch.randn(4, 6), torch.randn(4, 6))
    with pytest.raises(ConfigError, match="token"):
        Dense()(torch.randn(4, 3, 6), torch.randn(4, 5, 6))
