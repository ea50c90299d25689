"""Encoders and projections without weights, whose outputs a test can foresee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.alignment.projection import Projection


class HashText:
    """A text encoder without weights: equal texts get equal vectors [8]."""

    embed_dim, templates, name = 8, "plain", "hash"

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size

    def to(self, device: torch.device) -> HashText:
        return self

    def encode(self, texts: Sequence[str]) -> Tensor:
        rows = [np.frombuffer(sha256(text.encode()).digest()[:8], np.uint8) for text in texts]
        values = np.stack(rows).astype(np.float32) / 255 if rows else np.empty((0, 8), np.float32)
        return torch.from_numpy(values)

    def describe(self) -> dict[str, Any]:
        return {"name": "hash", "weights_sha256": "0", "embed_dim": 8, "spec": {"_target_": "x"}}


@dataclass
class Features:
    """What a vision encoder returns, as far as a segmenter reads it."""

    patch_tokens: Tensor
    self_attn_maps: Tensor
    cls_token: Tensor
    grid: tuple[int, int]


class FixedEncoder(nn.Module):
    """Gives the same features for every picture and remembers what it was shown."""

    patch_size = 14
    tokens: Tensor
    maps: Tensor

    def __init__(self, tokens: Tensor, maps: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.register_buffer("maps", maps)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Features:
        self.seen.append(images)
        side = int(self.tokens.shape[1] ** 0.5)
        tokens, maps = (part.expand(len(images), -1, -1) for part in (self.tokens, self.maps))
        return Features(tokens, maps, tokens[:, 0], (side, side))


class MeanColorEncoder(nn.Module):
    """Patch tokens are the mean colors of the patches; two heads look at red and blue."""

    patch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        pooled = F.avg_pool2d(images, self.patch_size) - 0.5
        tokens = pooled.flatten(2).transpose(1, 2)
        maps = 3 * tokens.transpose(1, 2)[:, ::2]
        return Features(tokens, maps, tokens.mean(1), (pooled.shape[2], pooled.shape[3]))


class NamedColors(Projection):
    """ψ that puts `a NAME` where `MeanColorEncoder` puts pictures of that class's color."""

    def __init__(self, names: list[str], vectors: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.known, self.vectors = HashText().encode([f"a {n}" for n in names]), vectors

    def project_text(self, text: Tensor) -> Tensor:
        nearest = torch.cdist(text, self.known.to(text)).argmin(dim=-1)
        return self.vectors.to(text)[nearest]


def directions(count: int) -> Tensor:
    """[count, 3] unit vectors, spread over the sphere."""
    place = torch.arange(count) + 0.5
    height, turn = 1 - 2 * place / count, place * np.pi * (1 + 5**0.5)
    ring = (1 - height**2).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), height], dim=1).float()
