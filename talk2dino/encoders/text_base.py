"""What the package expects of a text encoder, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from talk2dino.errors import ConfigError


class TextEncoder(Protocol):
    """What extraction and segmentation need of a text encoder.

    Attributes:
        embed_dim: width C of an embedding.
        templates: name of the prompt templates that suit it, see `encoders.prompts`.
    """

    embed_dim: int
    templates: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""


@dataclass(frozen=True)
class TextFeatures:
    """Everything that can be kept of N captions, float32 on the CPU.

    Attributes:
        embedding: [N, C] pooled, the same as `encode` gives.
        token_embeddings: [N, L, C] last layer; for CLIP behind the final norm and the text
            projection, token by token (original `clip_txt_out_tokens`).
        token_mask: [N, L] bool, true for everything but padding, start and end tokens included.
        second_last_tokens: [N, L, W] output of the block before the last (original
            `clip_second_last_out`), or None if the library does not show it.
        eot_index: [N] int64, position of the token that CLIP reads, or of the last real token.
    """

    embedding: Tensor
    token_embeddings: Tensor
    token_mask: Tensor
    second_last_tokens: Tensor | None
    eot_index: Tensor


class TokenTextEncoder(TextEncoder, Protocol):
    """A text encoder that also gives token-level outputs."""

    def encode_tokens(self, texts: Sequence[str]) -> TextFeatures:
        """Return pooled and token-level outputs; all texts are padded to the same L."""


def join(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Put batches of features, at least one, behind each other."""
    earlier = [part.second_last_tokens for part in parts if part.second_last_tokens is not None]
    return TextFeatures(
        embedding=torch.cat([part.embedding for part in parts]),
        token_embeddings=torch.cat([part.token_embeddings for part in parts]),
        token_mask=torch.cat([part.token_mask for part in parts]),
        second_last_tokens=torch.cat(earlier) if earlier else None,
        eot_index=torch.cat([part.eot_index for part in parts]),
    )


def encode_fields(
    text: TextEncoder, texts: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """The named fields of `TextFeatures`, each [N, ...] on the CPU.

    Asks for the pooled embedding alone if that is all, since token-level outputs cost memory.

    Raises:
        ConfigError: the encoder does not give one of them.
    """
    if list(names) == ["embedding"]:
        return {"embedding": text.encode(texts)}
    encode_tokens = getattr(text, "encode_tokens", None)
    if encode_tokens is None:
        raise _no_field(text, next(name for name in names if name != "embedding"))
    features: TextFeatures = encode_tokens(texts)
    fields: dict[str, Tensor | None] = {name: getattr(features, name) for name in names}
    found = {name: values for name, values in fields.items() if values is not None}
    if missing := sorted(fields.keys() - found.keys()):
        raise _no_field(text, missing[0])
    return found


def _no_field(text: TextEncoder, name: str) -> ConfigError:
    return ConfigError(
        f"text: {type(text).__name__} does not give {name}; choose text=clip_vitb16, or features "
        "and a projection that need the embedding only"
    )
