"""What extraction keeps of a caption: the pooled embedding, its tokens, or CLIP's last input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.errors import ConfigError
from talk2dino.features.schema import FIXED_DTYPES

EXTRACTED_CAPTIONS = (
    "embedding",
    "token_embeddings",
    "token_mask",
    "second_last_tokens",
    "eot_index",
)
# Neither is of use without the other.
_TOGETHER = (("token_embeddings", "token_mask"), ("second_last_tokens", "eot_index"))


def check_caption_fields(names: Sequence[str], text: TextEncoder) -> None:
    """Refuse caption fields that are unknown, incomplete, or that the encoder does not give.

    Raises:
        ConfigError: names the field and what to choose.
    """
    if not names:
        raise ConfigError("features.caption_fields is empty; give at least embedding")
    for name in names:
        if name not in EXTRACTED_CAPTIONS:
            raise ConfigError(
                f"features.caption_fields: {name!r} is unknown; choose of "
                f"{', '.join(EXTRACTED_CAPTIONS)}"
            )
    for pair in _TOGETHER:
        given = [name for name in pair if name in names]
        if len(given) == 1:
            raise ConfigError(
                f"features.caption_fields: {given[0]} is of no use alone; give {' and '.join(pair)}"
            )
    caption_bytes(text, names, "float32")


def caption_bytes(text: TextEncoder, names: Sequence[str], dtype: str) -> int:
    """Bytes of the named fields of one caption, stored in `dtype`.

    An empty caption tells: L is the same for all captions, so that all shards of a store agree.

    Raises:
        ConfigError: the encoder does not give one of the fields.
    """
    if list(names) == ["embedding"]:
        return text.embed_dim * np.dtype(dtype).itemsize
    return sum(
        values[0].numel() * np.dtype(FIXED_DTYPES.get(name, dtype)).itemsize
        for name, values in encode_fields(text, [""], names).items()
    )
