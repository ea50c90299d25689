"""Plain text through encoder and projection, whatever fields the projection reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from talk2dino.alignment.projection_base import Projection
from talk2dino.encoders.text import TextEncoder, encode_fields

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
