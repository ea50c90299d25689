"""Background cleaning: class scores are mixed with where the heads that like a class look."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import DataError


def clean_background(
    mask: Tensor,
    patch_tokens: Tensor,
    self_attn_maps: Tensor,
    text: Tensor,
    lambda_bg: float = 0.2,
) -> Tensor:
    """Pull class scores towards the attention of the heads that agree with each class.

    Every head gets an embedding (patch tokens weighted by its raw logits); a class picks heads by
    softmax of its similarity to them; the picked attention, as a distribution over patches and
    rescaled to the range of `mask`, is mixed in with weight `lambda_bg`. Source: the original's
    `DINOText.similarity_assignment_weighted`, which takes minimum and maximum over the whole batch
    and so only ran with one image; here they are taken per image, so any batch size gives the
    numbers of a batch of one.

    Args:
        mask: scores `[B, K, h, w]` at token resolution, `h * w == P`.
        patch_tokens: `[B, P, D]`, as the encoder gave them (not normalised).
        self_attn_maps: `[B, H, P]` logits before softmax, prefix tokens cut.
        text: class embeddings `[K, D]`, used as given (unit length in the method).
        lambda_bg: weight of the attention; 0 returns the mask.

    Returns:
        `[B, K, h, w]`, a new tensor.

    Raises:
        DataError: the shapes do not belong together.
    """
    _check(mask, patch_tokens, self_attn_maps, text)
    tokens, logits, scores = patch_tokens.float(), self_attn_maps.float(), mask.float()
    heads = F.normalize(logits @ tokens, dim=-1)  # [B, H, D]; a mean over P would cancel here
    choice = (text.to(heads) @ heads.transpose(1, 2)).softmax(-1)  # [B, K, H]
    attention = (choice @ logits).softmax(-1)  # [B, K, P]

    low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    # The original divides by max(high, high - low), which is `high`: a softmax is not negative.
    attention = ((attention - low) / high).view_as(scores)
    bottom = scores.amin((1, 2, 3), keepdim=True)
    span = scores.amax((1, 2, 3), keepdim=True) - bottom
    return (scores + lambda_bg * (attention * span + bottom)) / (1 + lambda_bg)


def _check(mask: Tensor, patch_tokens: Tensor, self_attn_maps: Tensor, text: Tensor) -> None:
    if mask.ndim != 4:
        raise DataError(f"background_cleaning: mask {tuple(mask.shape)}: give [B, K, h, w]")
    batch, classes, height, width = mask.shape
    wanted = {
        "patch_tokens": (patch_tokens, (batch, height * width, patch_tokens.shape[-1])),
        "self_attn_maps": (self_attn_maps, (batch, self_attn_maps.shape[1], height * width)),
        "text": (text, (classes, patch_tokens.shape[-1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"background_cleaning: {name} {tuple(tensor.shape)} does not fit "
                f"mask {tuple(mask.shape)}: expected {shape}"
            )
