"""Frozen encoders: images to patch tokens and attention, texts to embeddings."""

from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text import (
    BertTextEncoder,
    OpenClipTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
    TextFeatures,
)
from talk2dino.encoders.text.base import CachedTextEncoder, average_text_tokens
from talk2dino.encoders.vision import TimmVisionEncoder, VisionFeatures

__all__ = [
    "BertTextEncoder",
    "CachedTextEncoder",
    "OpenClipTextEncoder",
    "SentenceTransformerTextEncoder",
    "TextEncoder",
    "TextFeatures",
    "TimmVisionEncoder",
    "VisionFeatures",
    "average_text_tokens",
    "pool_attention",
]
