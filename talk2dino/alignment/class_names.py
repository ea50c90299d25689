"""Class names and sentences to vectors in the space of the patch tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.projection import Projection
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.encoders.text.base import texts_cut
from talk2dino.encoders.text.prompts import prompts
from talk2dino.errors import say

_CHUNK = 256  # sentences; 40 MB of CLIP's token-level outputs


@torch.no_grad()
def embed_texts(texts: Sequence[str], text: TextEncoder, projection: Projection) -> Tensor:
    """`projection.embed_text` of sentences, `[N, C]` on the projection's device.

    Prompts are averaged here, before `projection.project_embedding`: ψ is not linear.

    Raises:
        ConfigError: the encoder does not give what the projection reads.
    """
    if cut := texts_cut(text, texts):
        more = f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
        say(
            f"{cut[0][:60]!r}…{more} has more tokens than the text encoder reads; its end has no "
            "effect",
            stacklevel=2,
        )
    device = next(projection.parameters()).device
    size = _CHUNK if projection.text_fields != ("embedding",) else max(len(texts), 1)
    parts = []
    for start in range(0, max(len(texts), 1), size):
        fields = encode_fields(text, texts[start : start + size], projection.text_fields)
        inputs = (fields[name].to(device) for name in projection.text_fields)
        parts.append(projection.embed_text(*inputs))
    return torch.cat(parts)


@torch.no_grad()
def embed_class_names(
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
