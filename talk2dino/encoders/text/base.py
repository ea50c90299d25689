"""What the package expects of a text encoder, what those of libraries share, and a cached one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import ConfigError, WriteError
from talk2dino.files import replacing, user_path


class TextEncoder(Protocol):
    """What extraction and segmentation need of a text encoder.

    Attributes:
        embed_dim: width C of an embedding.
        templates: name of the prompt templates that suit it, see `encoders.text.prompts`.
    """

    embed_dim: int
    templates: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalized."""

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""


@dataclass(frozen=True)
class TextFeatures:
    """Everything that can be kept of N captions, float32 on the CPU.

    Attributes:
        embedding: [N, C] pooled, the same as `encode` gives.
        token_embeddings: [N, L, C] last layer; for CLIP after the final norm and the text
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


class FrozenTextEncoder(nn.Module):
    """The text encoder of a library: one frozen network, its only submodule.

    Every argument of a subclass is also an attribute, so that its spec can be read from it.
    """

    embed_dim: int

    def __init__(self, name: str, weights: str, batch_size: int, templates: str) -> None:
        super().__init__()
        self.name, self.weights = name, weights
        self.batch_size, self.templates = batch_size, templates

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalized."""
        parts = [self._embeddings(batch).float().cpu() for batch in self._batches(texts)]
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    @torch.no_grad()
    def encode_tokens(self, texts: Sequence[str]) -> TextFeatures:
        """Return pooled and token-level outputs, see the class for L and W."""
        parts = [self._features(batch) for batch in self._batches(texts or [""])]
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(TextFeatures)):
            tensors = [getattr(part, name) for part in parts]
            found[name] = None if tensors[0] is None else torch.cat(tensors)[: len(texts)]
        return TextFeatures(**found)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """Return those with more tokens than the encoder reads, whose end it does not see."""
        most = self._most_tokens()
        long = [text for text in texts if len(text.encode(errors="replace")) > most - 2]  # bytes
        counts = self._counts(long) if long else []  # some tokenizers fail for no text at all
        return [text for text, count in zip(long, counts, strict=True) if count > most]

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""
        (network,) = self.children()
        arguments = inspect.signature(type(self)).parameters
        return {
            "name": self.name,
            "weights_sha256": state_dict_digest(network),
            "embed_dim": self.embed_dim,
            "spec": {
                "_target_": f"talk2dino.encoders.text.{type(self).__name__}",
                **{name: getattr(self, name) for name in arguments},
            },
        }

    def _batches(self, texts: Sequence[str]) -> list[list[str]]:
        starts = range(0, len(texts), self.batch_size)
        return [list(texts[start : start + self.batch_size]) for start in starts]

    def _embeddings(self, texts: list[str]) -> Tensor:
        """[b, C] in any dtype, anywhere."""
        raise NotImplementedError

    def _features(self, texts: list[str]) -> TextFeatures:
        raise NotImplementedError

    def _most_tokens(self) -> int:
        """How many tokens are read, start and end included; a token is a byte at least."""
        raise NotImplementedError

    def _counts(self, texts: list[str]) -> list[int]:
        """Tokens of whole texts, start and end included."""
        raise NotImplementedError


def texts_cut(text: TextEncoder, texts: Sequence[str]) -> list[str]:
    """Those of which `text` reads the beginning only; none of an encoder that does not tell."""
    cut = getattr(text, "cut", None)
    return [] if cut is None else list(cut(texts))


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
    found = {name: getattr(features, name) for name in names}
    if missing := sorted(name for name, values in found.items() if values is None):
        raise _no_field(text, missing[0])
    return found


def _no_field(text: TextEncoder, name: str) -> ConfigError:
    return ConfigError(
        f"text: {type(text).__name__} does not give {name}; choose text=clip_vitb16, or features "
        "and a projection that need the embedding only"
    )


def average_text_tokens(
    tokens: Tensor, mask: Tensor, keep_cls: bool = False, keep_end_seq: bool = False
) -> Tensor:
    """Average the embeddings of a caption's tokens (original `src/hooks.py`).

    Unlike the original, the mask is not changed, and a caption without any token left gives zeros
    instead of NaN, so one empty caption cannot spoil a batch.

    Args:
        tokens: [B, L, C].
        mask: [B, L] bool or 0/1, true for real tokens, which stand before the padding.
        keep_cls: count the first token.
        keep_end_seq: count the last real token.

    Returns:
        [B, C] in the dtype of `tokens`.

    Raises:
        ValueError: the two shapes do not belong together.

    Examples:
        >>> import torch
        >>> from talk2dino.encoders import average_text_tokens
        >>> tokens = torch.tensor([[[9.0], [1.0], [3.0], [9.0], [0.0]]])  # start, words, end, pad
        >>> average_text_tokens(tokens, torch.tensor([[1, 1, 1, 1, 0]]))
        tensor([[2.]])
    """
    if mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} do not belong together"
        )
    weights = trim_mask(mask.bool(), keep_cls, keep_end_seq).to(tokens.dtype)  # [B, L]
    total = torch.einsum("bl,blc->bc", weights, tokens)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def trim_mask(mask: Tensor, keep_cls: bool, keep_end_seq: bool) -> Tensor:
    """A copy of `mask` `[B, S]` bool without the last True and the first position, unless kept.

    Examples:
        >>> import torch
        >>> from talk2dino.encoders.text.base import trim_mask
        >>> mask = torch.tensor([[True, True, True, True, False]])  # start, two words, end, padding
        >>> trim_mask(mask, keep_cls=False, keep_end_seq=False)
        tensor([[False,  True,  True, False, False]])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    kept = mask.clone()
    if not keep_end_seq:
        last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
        kept &= positions != last
    if not keep_cls:
        kept[:, 0] = False
    return kept


# of the spec, what cannot change an embedding of given weights
_IRRELEVANT = ("weights", "batch_size", "templates")


class CachedTextEncoder(nn.Module):
    """A text encoder that looks into a folder before it computes.

    A file's name is the digest of the encoder (class, name, weights, pooling) and of the sentences
    in their order, so another encoder or another list of classes never finds a wrong entry. An
    unreadable file is computed again, and where none can be written, all are. The encoder's spec
    and manifest are those of the encoder inside: a checkpoint does not depend on the cache.

    Args:
        encoder: does the work.
        folder: holds one `.safetensors` per list of sentences; created when needed.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path) -> None:
        super().__init__()
        self.encoder, self.folder = encoder, user_path(folder)
        self.embed_dim: int = encoder.embed_dim
        self.templates: str = encoder.templates

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalized."""
        if not texts:
            return self.encoder.encode(texts)
        path = self.folder / f"{self._key(texts)}.safetensors"
        stored = self._read(path, len(texts))
        if stored is not None:
            return stored
        embeddings = self.encoder.encode(texts)
        with suppress(OSError, WriteError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as temporary:
                save_file({"embedding": embeddings.contiguous()}, temporary)
        return embeddings

    def cut(self, texts: Sequence[str]) -> list[str]:
        """Return those whose end the encoder inside does not see."""
        return texts_cut(self.encoder, texts)

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
