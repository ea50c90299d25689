"""Dense alignment: every text pools every image's patches before it is compared with the image.

Not in the original, which pools each image once, by the attention of its encoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from talk2dino.alignment.similarity.base import Similarity, TextField, check_positive, refuse_tokens
from talk2dino.errors import ConfigError

_EPS = 1e-12  # of torch's normalize, for vectors of length zero


class Dense(Similarity):
    """Every text pools every image's patches by softmax(cosine / temperature) first.

    score = cos(t, sum_p w_p unit(x_p)) with w = softmax_p(cos(t, x_p) / τ).
    Text is `[T, D]`, visual `[I, P, D]` in half or single precision.

    Args:
        temperature: of the softmax over patches.
        max_patches: in training, compare with a random subset of so many patches, drawn anew for
            each image and step; None uses all.
        chunk_size: images at a time, recomputed in backward, to bound memory; None is all at once.
        field: name of the visual feature.
        generator: source of randomness of the subset; None is torch's default generator.
        text_field: what of a caption is compared.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-0.8, 0.6]]])
        >>> similarity.Dense(temperature=0.1)(text, patches)  # [T, D], [I, P, D] to [T, I]
        tensor([[1.0000, 0.6000],
                [0.8732, 1.0000]])
        >>> similarity.Dense(temperature=10.0)(text, patches)  # nearly the mean patch of each image
        tensor([[ 0.7415, -0.0721],
                [ 0.9913,  0.7415]])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        max_patches: int | None = None,
        chunk_size: int | None = None,
        field: str = "patch_tokens",
        generator: torch.Generator | None = None,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine=True, text_field=text_field)
        check_positive("similarity.temperature", temperature)
        check_positive("similarity.max_patches", max_patches)
        check_positive("similarity.chunk_size", chunk_size)
        self.temperature, self.max_patches, self.chunk_size = temperature, max_patches, chunk_size
        self.generator = generator

    def select(self, text: Tensor, visual: Tensor) -> Tensor:
        """In training a random subset of patches, `[B, P, D]` to `[B, max_patches, D]`."""
        if not self.training or self.max_patches is None:
            return visual
        return sample_patches(visual, self.max_patches, self.generator)

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text `[T, D]`, visual `[I, P, D]` to `[T, I]`."""
        refuse_tokens(self, text, text_mask)
        if visual.ndim != 3 or visual.shape[-1] != text.shape[-1]:
            raise ConfigError(
                f"similarity=Dense: text has shape {tuple(text.shape)} [T, D], {self.field} "
                f"{tuple(visual.shape)} [I, P, D]: projection.vision_dim must be their common D"
            )
        return dense_scores(text, visual, self.temperature, self.chunk_size)


def dense_scores(
    text: Tensor, patch_tokens: Tensor, temperature: float, chunk_size: int | None = None
) -> Tensor:
    """Cosine of each text with its own softmax pooling of each image's patches.

    Args:
        text: `[T, D]`.
        patch_tokens: `[I, P, D]` of any float dtype; computed in the text's dtype.
        temperature: τ.
        chunk_size: images at a time. Backward then computes each chunk again, half as much work
            more, and nothing of size `[T, I, P]` or `[T, I, D]` is kept.

    Returns:
        `[T, I]` in the text's dtype.
    """
    text = F.normalize(text, dim=-1)
    if chunk_size is None or chunk_size >= len(patch_tokens):
        return _scores(text, patch_tokens, temperature)
    columns = [
        checkpoint(_scores, text, images, temperature, use_reentrant=False)
        for images in torch.split(patch_tokens, chunk_size)
    ]
    return torch.cat(columns, dim=1)


def sample_patches(
    patch_tokens: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """A random subset of patches, drawn anew for each image: `[I, P, D]` to `[I, count, D]`.

    Images with no more than `count` patches are returned as they are.
    """
    images, patches, _ = patch_tokens.shape
    if count >= patches:
        return patch_tokens
    keys = torch.rand(images, patches, generator=generator, device=patch_tokens.device)
    chosen = keys.topk(count, dim=1).indices  # [I, count]
    rows = chosen + torch.arange(images, device=chosen.device)[:, None] * patches
    return patch_tokens.flatten(0, 1)[rows]


def _scores(text: Tensor, patch_tokens: Tensor, temperature: float) -> Tensor:
    patches = F.normalize(patch_tokens.to(text.dtype), dim=-1, eps=_EPS)  # [I, P, D]
    scores: Tensor = _PooledCosine.apply(text, patches, temperature)
    return scores


class _PooledCosine(torch.autograd.Function):
    """`[T, I]` from unit texts `[T, D]` and unit patches `[I, P, D]`."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, patches: Tensor, temperature: float) -> Tensor:
        images, count, _ = patches.shape
        cosines = (text @ patches.flatten(0, 1).T).view(len(text), images, count)  # [T, I, P]
        weights = cosines.div_(temperature).softmax(dim=-1)
        pooled = torch.bmm(weights.transpose(0, 1), patches)  # u: [I, T, D]
        length = torch.linalg.vector_norm(pooled, dim=-1).clamp_(min=_EPS)  # [I, T]
        scores = (pooled * text).sum(dim=-1) / length  # [I, T]
        ctx.save_for_backward(text, patches, weights, pooled, length, scores)
        ctx.temperature = temperature
        by_text: Tensor = scores.T.to(text.dtype)
        return by_text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        text, patches, weights, pooled, length, scores = ctx.saved_tensors
        scale = grad.T / length  # [I, T]
        # d score / du = (t - score u/|u|) / |u|, at right angles to u.
        grad_pooled = text * scale[..., None] - pooled * (scale * scores / length)[..., None]
        grad_weights = torch.bmm(grad_pooled, patches.transpose(1, 2))  # [I, T, P]
        # Softmax: w (g - sum_p w_p g_p) / τ, and the sum is grad_pooled · u = 0.
        grad_cosines = grad_weights.transpose(0, 1).mul(weights).div_(ctx.temperature)  # [T, I, P]
        grad_text = torch.bmm(scale.T[:, None], pooled.transpose(0, 1).to(scale.dtype))[:, 0]
        grad_text = grad_text + grad_cosines.flatten(1) @ patches.flatten(0, 1)
        if not ctx.needs_input_grad[1]:  # the usual case: the vision encoder is frozen
            return grad_text, None, None
        grad_patches = torch.bmm(weights.permute(1, 2, 0), grad_pooled)  # through u
        grad_patches = grad_patches + torch.bmm(
            grad_cosines.permute(1, 2, 0), text.expand(len(patches), *text.shape)
        )
        return grad_text, grad_patches, None
