"""Frozen text encoders: CLIP through open_clip, sentence-transformers, BERT."""

from __future__ import annotations

from talk2dino.encoders.bert_text import BertTextEncoder
from talk2dino.encoders.open_clip_text import OpenClipTextEncoder
from talk2dino.encoders.sentence_text import SentenceTransformerTextEncoder
from talk2dino.encoders.text_base import TextEncoder, TextFeatures, TokenTextEncoder, encode_fields

__all__ = [
    "BertTextEncoder",
    "OpenClipTextEncoder",
    "SentenceTransformerTextEncoder",
    "TextEncoder",
    "TextFeatures",
    "TokenTextEncoder",
    "encode_fields",
]
