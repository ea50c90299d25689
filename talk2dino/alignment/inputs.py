"""From the stored fields of a batch to projected vectors of its captions and images.

Both decide the text side: a projection with fields of its own (`CLIPLastLayer`) reads those; any
other projects what the similarity's `text_field` names. On the image side `similarity.field` is
compared, except that a projection with learned head weights pools `avg_self_attn_out` itself.
Training, validation and the record of the heads all follow these rules. Class names and sentences
that are not stored become vectors in `class_names.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.similarity.base import Similarity
from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text.base import average_text_tokens
from talk2dino.errors import ConfigError

POOLABLE = ("avg_self_attn_out", "disentangled_self_attn")
DENSE = ("patch_tokens", "self_attn_maps")
IMAGE = "avg_self_attn_out"  # the image as one vector
POOLED = ("embedding",)
TOKENS = ("token_embeddings", "token_mask")


def stored_fields(wanted: str, stored: Iterable[str]) -> tuple[str, ...]:
    """Return the fields to read for `wanted`: itself, or the dense ones it can be pooled from.

    A store with `patch_index` holds a subset of the patches, from which nothing can be pooled.
    """
    present = set(stored)
    whole = present.issuperset(DENSE) and "patch_index" not in present
    if wanted not in present and wanted in POOLABLE and whole:
        return DENSE
    return (wanted,)


def visual_feature(batch: Mapping[str, Any], wanted: str) -> Tensor:
    """Return a visual feature of a batch, `[B, …]`, pooled if only dense features were read."""
    if wanted in batch:
        feature: Tensor = batch[wanted]
        return feature
    return pool_attention(
        batch["patch_tokens"], batch["self_attn_maps"], head_average=wanted == "avg_self_attn_out"
    )


def check_combination(
    projection: Projection, similarity: Similarity, key: str = "similarity"
) -> None:
    """Refuse a projection and a similarity that do not work together.

    Args:
        projection: ψ.
        similarity: of training or validation.
        key: its config key, `similarity` or `val_similarity`.

    Raises:
        ConfigError: one line that names the key and the fix.
    """
    kind = type(projection).__name__
    if projection.text_fields != POOLED and similarity.text_field != "embedding":
        raise ConfigError(
            f"{key}.text_field={similarity.text_field}: {kind} reads "
            f"{' and '.join(projection.text_fields)} and gives one vector per caption; use "
            f"{key}.text_field=embedding"
        )
    if key == "similarity" and projection.pooled_fields and similarity.field != IMAGE:
        raise ConfigError(
            f"{key}.field={similarity.field}: projection.head_weighting pools each image to one "
            "vector, so its weights would learn nothing; choose similarity=pooled"
        )


def caption_fields(projection: Projection, similarity: Similarity) -> tuple[str, ...]:
    """Caption fields to read."""
    if projection.text_fields != POOLED or similarity.text_field == "embedding":
        return projection.text_fields
    return TOKENS


def image_fields(
    projection: Projection, similarity: Similarity, stored: Iterable[str]
) -> tuple[str, ...]:
    """Image fields to read; the data module reports those that the store does not have."""
    if projection.pooled_fields and similarity.field == IMAGE:
        return projection.pooled_fields
    return stored_fields(similarity.field, stored)


def projected_text(
    batch: Mapping[str, Any], projection: Projection, similarity: Similarity
) -> tuple[Tensor, Tensor | None]:
    """Project a batch's captions: `[B, D]`, or `[B, L, D]` with the token mask `[B, L]`."""
    fields = caption_fields(projection, similarity)
    if similarity.text_field == "token_average" and fields == TOKENS:
        dtype = next(projection.parameters()).dtype
        tokens, mask = (batch[name] for name in TOKENS)
        return projection.project_text(average_text_tokens(tokens.to(dtype), mask)), None
    text = projection.project_text(*(batch[name] for name in fields if name != "token_mask"))
    return text, batch["token_mask"] if text.ndim == 3 else None


def projected_visual(
    batch: Mapping[str, Any], projection: Projection, similarity: Similarity
) -> Tensor:
    """Project the visual feature of a batch's images: `[B, D]`, `[B, H, D]` or `[B, P, D]`.

    An image that several captions of the batch share is pooled and projected once.
    """
    if projection.pooled_fields and similarity.field == IMAGE:
        visual = projection.pool_visual(*(batch[name] for name in projection.pooled_fields))
    else:
        visual = visual_feature(batch, similarity.field)
    return per_caption(projection.project_visual(visual), batch)


def per_caption(visual: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Features of the distinct images `[U, …]` to one row per caption, `[B, …]`."""
    rows = batch.get("image_place")  # [B], the image of each caption
    return visual if rows is None or len(rows) == len(visual) else visual[rows]
