"""Captions through the text encoder, in blocks that a shard decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from talk2dino.encoders.precision import autocast
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.features.schema import FIXED_DTYPES
from talk2dino.features.shard_rows import ShardRows

# Captions that are encoded together: text encoders sort them by length, so that little is padding.
# Counted from the shard's first caption, so that the same ones meet whoever writes the shard.
BLOCK = 1024


class CaptionEncoding:
    """The text encoder with everything that decides what is kept of a caption.

    Args:
        text: the encoder.
        names: fields to keep, out of `EXTRACTED_CAPTIONS`.
        dtype: of the kept features, `float16` or `float32`.
        precision: of the forward pass, a key of `PRECISIONS`.
        device: where the encoder computes.
    """

    def __init__(
        self,
        text: TextEncoder,
        names: Sequence[str],
        dtype: str,
        precision: str,
        device: torch.device,
    ) -> None:
        self.text, self.names, self.dtype = text, names, dtype
        self.precision, self.device = precision, device

    def fill(self, rows: ShardRows, at_least: int = BLOCK) -> None:
        """Encode the captions that wait in `rows` until fewer than `at_least` are left."""
        while rows.waiting() >= at_least:
            rows.add_caption_fields(self.encode(rows.waiting_texts(BLOCK)))

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Fields of at least one text, each [m, ...] in stored types."""
        with torch.inference_mode(), autocast(self.precision, self.device):
            fields = encode_fields(self.text, texts, self.names)
        with np.errstate(over="ignore"):  # reported when the shard is written, with the row
            return {name: self._stored(name, values.numpy()) for name, values in fields.items()}

    def nothing(self) -> dict[str, NDArray[Any]]:
        """Every field with its shape and no row."""
        return {name: values[:0] for name, values in self.encode([""]).items()}

    def _stored(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        return values if name in FIXED_DTYPES else values.astype(self.dtype)
