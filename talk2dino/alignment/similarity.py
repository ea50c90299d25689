"""How a caption and an image are compared: one class per strategy, always `[text, image]`.

A strategy works in two stages. `select` is local: it pairs row i of the text with row i of the
image, as in choosing the head that an image's own caption likes best. `scores` then compares any
number of texts with any number of images. Under DDP texts are gathered between the two stages.

"Cosine" is division by the L2 norm over the last dimension with epsilon 1e-12, on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from talk2dino.alignment.all_pairs import MaxRowSum, MeanHeads, Nucleus, SumHeads, trim_mask
from talk2dino.alignment.dense import dense_scores, sample_patches
from talk2dino.alignment.paired_heads import (
    MaxScore,
    SampledHead,
    SoftHead,
    WeightedAverage,
    head_choice,
    take_head,
)
from talk2dino.alignment.similarity_base import (
    Similarity,
    TextField,
    like,
    positive,
    positive_or_none,
    refuse_tokens,
)
from talk2dino.errors import ConfigError

__all__ = [
    "Dense",
    "DotProduct",
    "MaxRowSum",
    "MaxScore",
    "MeanHeads",
    "Nucleus",
    "SampledHead",
    "Similarity",
    "SoftHead",
    "SumHeads",
    "WeightedAverage",
    "head_choice",
    "take_head",
    "trim_mask",
]


class DotProduct(Similarity):
    """One vector per image, one per text (the original's comparison of 2-D inputs)."""

    def __init__(
        self,
        field: str = "avg_self_attn_out",
        cosine: bool = True,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, text_field)

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text `[T, D]`, visual `[I, D]` to `[T, I]`."""
        refuse_tokens(self, text, text_mask)
        return self._unit(text) @ self._unit(like(visual, text)).T


class Dense(Similarity):
    """Every text pools every image's patches by softmax(cosine / temperature) first.

    score = cos(t, sum_p w_p unit(x_p)). Text is `[T, D]`, visual `[I, P, D]` in half or single
    precision. Not in the original, which pools each image once, by attention.

    Args:
        temperature: of the softmax over patches.
        max_patches: in training, compare with a random subset of so many patches, drawn anew for
            each image and step; None uses all.
        chunk_size: images at a time, recomputed in backward, to bound memory; None is all at once.
        field: name of the visual feature.
        generator: source of randomness of the subset; None is torch's default generator.
        text_field: what of a caption is compared.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        max_patches: int | None = None,
        chunk_size: int | None = None,
        field: str = "patch_tokens",
        generator: torch.Generator | None = None,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine=True, text_field=text_field)
        self.temperature = positive("similarity.temperature", temperature)
        self.max_patches = positive_or_none("similarity.max_patches", max_patches)
        self.chunk_size = positive_or_none("similarity.chunk_size", chunk_size)
        self.generator = generator

    def select(self, text: Tensor, visual: Tensor) -> Tensor:
        """In training a random subset of patches, `[B, P, D]` to `[B, max_patches, D]`."""
        if not self.training or self.max_patches is None:
            return visual
        return sample_patches(visual, self.max_patches, self.generator)

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text `[T, D]`, visual `[I, P, D]` to `[T, I]`."""
        refuse_tokens(self, text, text_mask)
        if visual.ndim != 3 or visual.shape[-1] != text.shape[-1]:
            raise ConfigError(
                f"similarity=Dense: text has shape {tuple(text.shape)} [T, D], {self.field} "
                f"{tuple(visual.shape)} [I, P, D]: projection.vision_dim must be their common D"
            )
        return dense_scores(text, visual, self.temperature, self.chunk_size)
