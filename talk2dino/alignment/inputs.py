"""Which stored fields a projection and a similarity read, and what they make of a batch.

The text side is decided by both: a projection with fields of its own (`CLIPLastLayer`) reads those;
any other projects what the similarity's `text_field` names. On the image side `similarity.field` is
compared, except that a projection with learned head weights pools `avg_self_attn_out` itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from talk2dino.alignment.pooling import stored_fields, visual_feature
from talk2dino.alignment.projection_base import Projection
from talk2dino.alignment.similarity_base import Similarity
from talk2dino.encoders.text_tokens import average_text_tokens
from talk2dino.errors import ConfigError

POOLED = ("embedding",)
TOKENS = ("token_embeddings", "token_mask")
IMAGE = "avg_self_attn_out"  # the image as one vector


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
    """Image fields to read, out of the stored ones or to be missed there."""
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
    """Project what of a batch's images is compared: `[B, D]`, `[B, H, D]` or `[B, P, D]`.

    An image that several captions of the batch share is pooled and projected once.
    """
    if projection.pooled_fields and similarity.field == IMAGE:
        visual = projection.pool_visual(*(batch[name] for name in projection.pooled_fields))
    else:
        visual = visual_feature(batch, similarity.field)
    return per_caption(projection.project_visual(visual), batch)


def per_caption(visual: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Features of a batch's images `[U, …]`, once for each of its captions, `[B, …]`."""
    place = batch.get("image_place")
    return visual if place is None or len(place) == len(visual) else visual[place]
