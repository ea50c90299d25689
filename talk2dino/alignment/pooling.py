"""Visual features of a batch: read from the store, or pooled on the device from dense ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from talk2dino.encoders.attention import pool_attention

POOLED = ("avg_self_attn_out", "disentangled_self_attn")
DENSE = ("patch_tokens", "self_attn_maps")


def stored_fields(wanted: str, stored: Iterable[str]) -> tuple[str, ...]:
    """Return the fields to read for `wanted`: itself, or the dense ones it can be pooled from.

    A store with `patch_index` holds some patches only, and nothing is pooled from those.
    """
    present = set(stored)
    whole = present.issuperset(DENSE) and "patch_index" not in present
    if wanted not in present and wanted in POOLED and whole:
        return DENSE
    return (wanted,)


def visual_feature(batch: Mapping[str, Any], wanted: str) -> Tensor:
    """Return a visual feature of a batch, [B, …]; pools it where only dense features were read."""
    if wanted in batch:
        feature: Tensor = batch[wanted]
        return feature
    return pool_attention(
        batch["patch_tokens"],
        batch["self_attn_maps"],
        head_average=wanted == "avg_self_attn_out",
    )
