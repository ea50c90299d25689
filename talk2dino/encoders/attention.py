"""Self-attention of the last block: how a vision transformer's CLS token looks at its patches.

The logits are taken from what the model itself hands to its last attention call, so rotary
embeddings, query/key norms and relative position biases are in them without a line of code per
model family. Only the CLS row is computed: [B, H, N], never [B, H, N, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from talk2dino.errors import EncoderError


class LastAttention(TorchFunctionMode):
    """Remembers query, key, scale and bias of one module's fused attention call.

    Active inside that module only: nothing but the last block's tensors stays alive, and no other
    block pays for it or is kept from being compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Tensor | None = None  # what goes into the module, [B, N, D] or [B, h, w, D]
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, float | None]] = []
        self._inside = False

    @contextmanager
    def watch(self, attention: nn.Module) -> Iterator[LastAttention]:
        """Listen to the attention module `attention` for the duration of a forward pass."""
        begin = attention.register_forward_pre_hook(self._begin)
        end = attention.register_forward_hook(self._end)
        try:
            yield self
        finally:
            if self._inside:  # the module raised, and its closing hook did not run
                self._leave()
            begin.remove()
            end.remove()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs, self._inside, self.calls = inputs[0], True, []
        self.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside = False
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((args[0], args[1], bias, kwargs.get("scale")))
        return func(*args, **kwargs)

    def cls_logits(self, num_heads: int, num_prefix_tokens: int, num_patches: int) -> Tensor:
        """Return the CLS→patch attention logits, before softmax, prefix tokens cut off.

        Args:
            num_heads: H.
            num_prefix_tokens: CLS and register tokens before the patches. With none of them the
                first patch takes the place of CLS, as in the original's `process_self_attention`.
            num_patches: P.

        Returns:
            [B, H, P] float32.

        Raises:
            EncoderError: the module's attention is not one softmax over all tokens.
        """
        if len(self.calls) != 1:
            raise EncoderError(
                f"vision.name: the last block makes {len(self.calls)} attention calls, not one, "
                "so its CLS attention cannot be read; choose a plain vision transformer"
            )
        query, key, bias, scale = self.calls[0]
        tokens = num_prefix_tokens + num_patches
        if key.shape[-2] != tokens:
            raise EncoderError(
                f"vision.name: the last block attends to {key.shape[-2]} tokens, expected "
                f"{tokens} (whole image); choose a plain vision transformer"
            )
        leading = query.shape[:-2]  # [B, H], or [B * H] in SAM
        logits = cls_row_logits(query, key, num_prefix_tokens, scale)
        if bias is not None:
            row = bias[..., 0, num_prefix_tokens:].float()
            logits = logits + row.expand(*leading, num_patches)
        return logits.reshape(-1, num_heads, num_patches)


def cls_row_logits(
    query: Tensor, key: Tensor, num_prefix_tokens: int, scale: float | None = None
) -> Tensor:
    """Scaled dot product of the first query with every patch key.

    Args:
        query: [..., N, d].
        key: [..., N, d].
        num_prefix_tokens: tokens before the patches.
        scale: factor of the product; None is d^-0.5.

    Returns:
        [..., P] float32, under autocast too: a bfloat16 logit has three digits.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        first = query[..., :1, :].float() * scale
        return (first @ key[..., num_prefix_tokens:, :].float().transpose(-2, -1)).squeeze(-2)


def unrotated_cls_logits(attention: nn.Module, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """CLS→patch logits from the plain query/key projections, as the original reads them.

    The original hooks the `qkv` layer, to which timm applies norms and the rotary embedding only
    later. For DINOv3 this is not the model's attention, but the released weights were trained
    with it. Relative position biases are left out, too.

    Args:
        attention: timm attention module of the last block.
        tokens: [B, N, D] or [B, h, w, D], the input of that module.
        num_prefix_tokens: CLS and register tokens before the patches.

    Returns:
        [B, H, P] float32 logits.
    """
    module: Any = attention
    tokens = tokens.flatten(1, -2)  # [B, N, D]
    (weight_q, bias_q), (weight_k, bias_k) = _query_and_key_weights(module)
    heads = int(module.num_heads)
    batch, count, _ = tokens.shape
    query = F.linear(tokens[:, :1], weight_q, bias_q).view(batch, 1, heads, -1)
    key = F.linear(tokens, weight_k, bias_k).view(batch, count, heads, -1)
    return cls_row_logits(query.transpose(1, 2), key.transpose(1, 2), num_prefix_tokens)


def _query_and_key_weights(module: Any) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """Weight and bias of the query and key projections, whether stored together or apart."""
    if getattr(module, "qkv", None) is None:
        return (module.q_proj.weight, module.q_proj.bias), (
            module.k_proj.weight,
            module.k_proj.bias,
        )
    weight_q, weight_k, _ = module.qkv.weight.chunk(3)
    if module.qkv.bias is not None:
        bias_q, bias_k, _ = module.qkv.bias.chunk(3)
    else:  # BEiT and EVA keep the biases beside the layer; that of the keys is always zero
        bias_q, bias_k = getattr(module, "q_bias", None), None
    return (weight_q, bias_q), (weight_k, bias_k)


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

    Raises:
        ValueError: the two differ in their number of patches.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import pool_attention
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])  # [B=1, P=2, D=2]
        >>> logits = torch.tensor([[[9.0, -9.0], [0.0, 0.0]]])  # the second head looks at both
        >>> pool_attention(tokens, logits).round(decimals=4)  # [B, H=2, D], divided by P
        tensor([[[1.0000, 0.0000],
                 [0.5000, 1.0000]]])
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
