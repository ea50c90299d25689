"""Text embeddings that are computed once: class prompts are the same for every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from talk2dino.atomic import replacing
from talk2dino.encoders.text_base import TextEncoder

# of the spec, what cannot change an embedding of given weights
_IRRELEVANT = ("weights", "batch_size", "templates")


class CachedTextEncoder(nn.Module):
    """A text encoder that looks into a folder before it computes.

    A file's name is the digest of the encoder (class, name, weights, pooling) and of the sentences
    in their order, so another encoder or another list of classes never finds a wrong entry. An
    unreadable file is computed again. The encoder's spec and manifest are those of the encoder
    inside: a checkpoint does not depend on the cache.

    Args:
        encoder: does the work.
        folder: holds one `.safetensors` per list of sentences; created when needed.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path) -> None:
        super().__init__()
        self.encoder, self.folder = encoder, Path(folder).expanduser()
        self.embed_dim: int = encoder.embed_dim
        self.templates: str = encoder.templates

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""
        if not texts:
            return self.encoder.encode(texts)
        path = self.folder / f"{self._key(texts)}.safetensors"
        stored = self._read(path, len(texts))
        if stored is not None:
            return stored
        embeddings = self.encoder.encode(texts)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as temporary:
            save_file({"embedding": embeddings.contiguous()}, temporary)
        return embeddings

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder inside."""
        return self.encoder.describe()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        described = self.encoder.describe()
        spec = {k: v for k, v in described["spec"].items() if k not in _IRRELEVANT}
        return {"weights_sha256": described["weights_sha256"], "spec": spec}

    def _key(self, texts: Sequence[str]) -> str:
        content = json.dumps([self._identity, list(texts)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _read(self, path: Path, count: int) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            embeddings = load_file(path).get("embedding")
        except (SafetensorError, OSError):
            return None
        fits = embeddings is not None and embeddings.shape == torch.Size((count, self.embed_dim))
        return embeddings if fits else None
