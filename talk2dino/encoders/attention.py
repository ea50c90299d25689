"""Self-attention of the last block: how a vision transformer's CLS token looks at its patches.

The logits are taken from what the model itself hands to its last attention call, so rotary
embeddings, query/key norms and relative position biases are in them without a line of code per
model family. Only the CLS row is computed: [B, H, N], never [B, H, N, N].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from talk2dino.errors import EncoderError


class LastAttention(TorchFunctionMode):
    """While active, remembers query, key and bias of the latest fused attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.query: Tensor | None = None  # [B, H, N, d]
        self.key: Tensor | None = None  # [B, H, N, d]
        self.bias: Tensor | None = None  # broadcastable to [B, H, N, N]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.query, self.key = args[0], args[1]
            self.bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        return func(*args, **kwargs)

    def cls_logits(self, num_prefix_tokens: int) -> Tensor:
        """Return the CLS→patch attention logits, before softmax, prefix tokens cut off.

        Args:
            num_prefix_tokens: CLS and register tokens before the patches. With none of them the
                first patch takes the place of CLS, as in the original's `process_self_attention`.

        Returns:
            [B, H, P] in the model's dtype.

        Raises:
            EncoderError: the model made no fused attention call.
        """
        if self.query is None or self.key is None:
            raise EncoderError(
                "the vision encoder made no scaled_dot_product_attention call, so it has no "
                "readable attention; unset TIMM_FUSED_ATTN or choose another encoder"
            )
        logits = cls_row_logits(self.query, self.key, num_prefix_tokens)
        if self.bias is not None:
            row = self.bias[..., 0, num_prefix_tokens:]
            logits = logits + row
        return logits


def cls_row_logits(query: Tensor, key: Tensor, num_prefix_tokens: int) -> Tensor:
    """Scaled dot product of the first query with every patch key: two [B, H, N, d] -> [B, H, P]."""
    first = query[..., :1, :] * query.shape[-1] ** -0.5
    return (first @ key[..., num_prefix_tokens:, :].transpose(-2, -1)).squeeze(-2)


def unrotated_cls_logits(attention: nn.Module, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """CLS→patch logits from the plain query/key projections, as the original reads them.

    The original hooks the `qkv` layer, to which timm applies the rotary embedding only later. For
    DINOv3 this is not the model's attention, but the released weights were trained with it.

    Args:
        attention: timm attention module of the last block.
        tokens: [B, N, D], the input of that module.
        num_prefix_tokens: CLS and register tokens before the patches.

    Returns:
        [B, H, P] logits.
    """
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    if getattr(attention, "qkv", None) is not None:
        weight_q, weight_k, _ = attention.qkv.weight.chunk(3)  # type: ignore[union-attr, operator]
        bias = attention.qkv.bias  # type: ignore[union-attr]
        separate = getattr(attention, "q_bias", None)
        bias_q = separate if separate is not None else None if bias is None else bias.chunk(3)[0]
        bias_k = None if bias is None else bias.chunk(3)[1]  # type: ignore[operator]
    else:
        weight_q, bias_q = attention.q_proj.weight, attention.q_proj.bias  # type: ignore[union-attr]
        weight_k, bias_k = attention.k_proj.weight, attention.k_proj.bias  # type: ignore[union-attr]
    query = F.linear(tokens[:, :1], weight_q, bias_q).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = F.linear(tokens, weight_k, bias_k).unflatten(-1, (heads, -1)).transpose(1, 2)
    return cls_row_logits(query, key, num_prefix_tokens)


def pool_attention(
    patch_tokens: Tensor, self_attn_maps: Tensor, head_average: bool = False
) -> Tensor:
    """Average the patch tokens by the CLS attention, per head or for the mean of the heads.

    Talk2DINO eq. 2, original `dino_extraction_v2.py`: a softmax over patches, then the *mean* over
    patches of weight x token, which is 1/P of the weighted average (of no effect under a cosine).

    Args:
        patch_tokens: [B, P, D].
        self_attn_maps: [B, H, P] attention logits.
        head_average: average the logits over heads before the softmax.

    Returns:
        `disentangled_self_attn` [B, H, D], or `avg_self_attn_out` [B, D] with `head_average`.
    """
    if patch_tokens.shape[-2] != self_attn_maps.shape[-1]:
        raise ValueError(
            f"patch_tokens {tuple(patch_tokens.shape)} and self_attn_maps "
            f"{tuple(self_attn_maps.shape)} differ in their number of patches"
        )
    maps = self_attn_maps.float()
    if head_average:
        maps = maps.mean(dim=-2, keepdim=True)  # [B, 1, P]
    weights = torch.softmax(maps, dim=-1)
    pooled = weights @ patch_tokens.float() / patch_tokens.shape[-2]  # [B, H or 1, D]
    return pooled.squeeze(-2) if head_average else pooled
