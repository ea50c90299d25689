"""Frozen encoders: images to patch tokens and attention, texts to embeddings."""

from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text import (
    OpenClipTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
)
from talk2dino.encoders.vision import TimmVisionEncoder, VisionFeatures

__all__ = [
    "OpenClipTextEncoder",
    "SentenceTransformerTextEncoder",
    "TextEncoder",
    "TimmVisionEncoder",
    "VisionFeatures",
    "pool_attention",
]
