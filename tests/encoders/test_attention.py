"""Attention pooling and token averaging against the original's arrays and naive loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from talk2dino.encoders.attention import cls_row_logits, pool_attention
from talk2dino.encoders.text.base import average_text_tokens
from tests.helpers.parity import ParityRecord

HEADS = 4
SCALE = 0.125  # whatever the head dim, as the original has it


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Query and key [B, H, N, d] of a stored qkv [B, N, 3 * D]."""
    batch, count, _ = qkv.shape
    query, key, _ = qkv.view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return query, key


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_hooks(golden, parity: ParityRecord, prefix: int) -> None:
    arrays = golden("hooks")
    group = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"g{prefix}/")}
    query, key = split(group["qkv"], HEADS)
    logits = cls_row_logits(query, key, prefix, SCALE)
    tokens = group["patch_tokens"]
    checks = {
        "self_attn_maps_raw": ("process_self_attention (maps)", logits),
        "self_attn": ("process_self_attention (mean)", logits.mean(1).softmax(-1)),
        "avg_self_attn_out": ("avg_self_attn_token", pool_attention(tokens, logits, True)),
        "disentangled_self_attn": ("disentangled_self_attn", pool_attention(tokens, logits)),
    }
    for array, (original, got) in checks.items():
        parity.check("attention pooling", original, got, group[array], 1e-6)


def test_head_dim_64(golden, parity: ParityRecord) -> None:
    arrays = golden("hooks")
    query, key = split(arrays["hd64/qkv"], 2)
    logits = cls_row_logits(query, key, 5)  # the model's own scale is the original's here
    original = "process_self_attention (maps)"
    part = "attention pooling"
    parity.check(part, original, logits, arrays["hd64/self_attn_maps_raw"], 2e-6)
    mean = logits.mean(1).softmax(-1)
    parity.check(part, "process_self_attention (mean)", mean, arrays["hd64/self_attn"], 1e-6)


def test_encode_image(golden, parity: ParityRecord) -> None:
    arrays = golden("text_and_encode")
    query, key = split(arrays["encode_image/qkv"], HEADS)
    logits = cls_row_logits(query, key, 5, SCALE)
    tokens = arrays["encode_image/patch_tokens"]
    part, original = "encode_image", "DINOText.encode_image"
    pooled = pool_attention(tokens, logits)
    parity.check(part, original, pooled, arrays["encode_image/disentangled/out"], 1e-6)
    average = pool_attention(tokens, logits, head_average=True)
    parity.check(part, original, average, arrays["encode_image/avg/out"], 1e-6)
    parity.check(part, original, logits, arrays["encode_image/avg/self_attn_maps"], 1e-6)
    soft = logits.softmax(-1)  # the original hands out softmaxed maps in this case only
    parity.check(part, original, soft, arrays["encode_image/disentangled/self_attn_maps"], 1e-6)


@pytest.mark.parametrize("keep_cls", [False, True])
@pytest.mark.parametrize("keep_end", [False, True])
def test_average_text_tokens(golden, parity: ParityRecord, keep_cls: bool, keep_end: bool) -> None:
    arrays = golden("hooks")
    mask = arrays["avg_text/mask"].bool()
    before = mask.clone()
    got = average_text_tokens(arrays["avg_text/tokens"], mask, keep_cls, keep_end)
    want = arrays[f"avg_text/kc{int(keep_cls)}_ke{int(keep_end)}/out"]
    assert torch.equal(mask, before)
    filled = ~want.isnan().any(dim=1)
    assert filled.sum() == (4 if not (keep_cls or keep_end) else 5)
    parity.check("average of text tokens", "average_text_tokens", got[filled], want[filled], 1e-6)
    assert not got[~filled].any()  # where the original divides zero by zero


def test_average_text_tokens_of_the_dataset(golden, parity: ParityRecord) -> None:
    """An integer mask does as well, and a row does not depend on the others."""
    arrays = golden("hooks")
    tokens, mask = arrays["avg_text/tokens"], arrays["avg_text/mask"]
    together = average_text_tokens(tokens, mask)
    for row in range(4):
        alone = average_text_tokens(tokens[row : row + 1], mask[row : row + 1])
        length = int(mask[row].sum())
        torch.testing.assert_close(alone[0], tokens[row, 1 : length - 1].mean(0))
        torch.testing.assert_close(alone[0], together[row])
    with pytest.raises(ValueError, match=r"\(5, 7, 16\) and mask \(5, 6\)"):
        average_text_tokens(tokens, mask[:, :6])


def test_pool_attention_is_a_mean_of_weighted_tokens() -> None:
    tokens, maps = torch.randn(2, 6, 8), torch.randn(2, 3, 6)
    pooled = pool_attention(tokens, maps)
    for image in range(2):
        for head in range(3):
            weights = torch.exp(maps[image, head])
            weights = weights / weights.sum()
            naive = sum(weights[p] * tokens[image, p] for p in range(6)) / 6
            torch.testing.assert_close(pooled[image, head], naive)
    torch.testing.assert_close(pool_attention(tokens, maps + 7.5), pooled)  # softmax shift
    one = pool_attention(tokens, maps[:, :1])
    torch.testing.assert_close(one[:, 0], pool_attention(tokens, maps[:, :1], head_average=True))
    order = torch.randperm(6)
    torch.testing.assert_close(pool_attention(tokens[:, order], maps[..., order]), pooled)
    with pytest.raises(ValueError, match=r"\(2, 6, 8\) and self_attn_maps \(2, 3, 5\)"):
        pool_attention(tokens, maps[..., :5])
