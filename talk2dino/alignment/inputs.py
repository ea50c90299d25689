"""From stored fields, plain text or class names to projected vectors.

Both decide the text side: a projection with fields of its own (`CLIPLastLayer`) reads those; any
other projects what the similarity's `text_field` names. On the image side `similarity.field` is
compared, except that a projection with learned head weights pools `avg_self_attn_out` itself.
Training, validation and the record of the heads all follow these rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.similarity.base import Similarity
from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.encoders.text.base import average_text_tokens
from talk2dino.encoders.text.prompts import prompts
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
        batch["patch_tokens"],
        batch["self_attn_maps"],
        head_average=wanted == "avg_self_attn_out",
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


_CHUNK = 256  # sentences; 40 MB of CLIP's token-level outputs


@torch.no_grad()
def embed_texts(texts: Sequence[str], text: TextEncoder, projection: Projection) -> Tensor:
    """`projection.embed_text` of sentences, `[N, C]` on the projection's device.

    Prompts are averaged here, before `projection.project_embedding`: ψ is not linear.

    Raises:
        ConfigError: the encoder does not give what the projection reads.
    """
    device = next(projection.parameters()).device
    size = _CHUNK if projection.text_fields != ("embedding",) else max(len(texts), 1)
    parts = []
    for start in range(0, max(len(texts), 1), size):
        fields = encode_fields(text, texts[start : start + size], projection.text_fields)
        inputs = (fields[name].to(device) for name in projection.text_fields)
        parts.append(projection.embed_text(*inputs))
    return torch.cat(parts)


@torch.no_grad()
def embed_classes(
    synonyms: Sequence[Sequence[str]],
    text: TextEncoder,
    projection: Projection,
    template_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed class names in the space of the patch tokens.

    Raw mean of the text embeddings over the templates, then ψ, then unit length (eps 1e-6), as the
    original's `build_text_embedding`; ψ is not linear, so the order matters. With `CLIPLastLayer`
    the mean is taken over the embeddings of its own last block.

    Args:
        synonyms: per class, its names.
        text: text encoder.
        projection: ψ.
        template_set: name of the prompt templates; None takes those that suit the encoder.

    Returns:
        [N, D] unit rows, one per synonym, and [N] int64 the class of each row.
    """
    rows = [(number, name) for number, names in enumerate(synonyms) for name in names]
    groups = prompts([name for _, name in rows], template_set or text.templates)
    embeddings = embed_prompts(groups, text, projection)
    return embeddings, torch.tensor([number for number, _ in rows], device=embeddings.device)


@torch.no_grad()
def embed_prompts(
    groups: Sequence[Sequence[str]], text: TextEncoder, projection: Projection
) -> Tensor:
    """`[N, D]` unit rows of N groups of sentences: mean over a group, then ψ, then unit length."""
    sentences = [sentence for group in groups for sentence in group]
    embeddings = embed_texts(sentences, text, projection)
    parts = torch.split(embeddings, [len(group) for group in groups])
    means = [part.mean(dim=0) for part in parts]
    projected = projection.project_embedding(torch.stack(means))
    return F.normalize(projected, dim=-1, eps=1e-6)
