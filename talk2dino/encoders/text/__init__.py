"""Frozen text encoders: CLIP through open_clip, sentence-transformers, BERT."""

from talk2dino.encoders.text.base import TextEncoder, TextFeatures, encode_fields
from talk2dino.encoders.text.clip import OpenClipTextEncoder
from talk2dino.encoders.text.sentence import BertTextEncoder, SentenceTransformerTextEncoder

__all__ = [
    "BertTextEncoder",
    "OpenClipTextEncoder",
    "SentenceTransformerTextEncoder",
    "TextEncoder",
    "TextFeatures",
    "encode_fields",
]
