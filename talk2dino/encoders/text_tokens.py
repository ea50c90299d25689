"""Averaging the tokens of a caption."""

from __future__ import annotations

import torch
from torch import Tensor


def average_text_tokens(
    tokens: Tensor, mask: Tensor, keep_cls: bool = False, keep_end_seq: bool = False
) -> Tensor:
    """Average the embeddings of a caption's tokens (original `src/hooks.py`).

    Unlike the original, the mask is not changed, and a caption without any token left gives zeros
    instead of NaN, so one empty caption cannot spoil a batch.

    Args:
        tokens: [B, L, C].
        mask: [B, L] bool or 0/1, true for real tokens, which stand before the padding.
        keep_cls: count the first token.
        keep_end_seq: count the last real token.

    Returns:
        [B, C] in the dtype of `tokens`.

    Raises:
        ValueError: the two shapes do not belong together.
    """
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} do not belong together"
        )
    position = torch.arange(mask.shape[1], device=mask.device)
    length = mask.bool().sum(dim=1, keepdim=True)  # [B, 1]
    keep = mask.bool()
    if not keep_end_seq:
        keep = keep & (position != length - 1)
    if not keep_cls:
        keep = keep & (position != 0)
    weights = keep.to(tokens.dtype)  # [B, L]
    total = torch.einsum("bl,blc->bc", weights, tokens)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)
