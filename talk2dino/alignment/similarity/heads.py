"""The head choice: an image's own caption decides which attention head stands for the image.

What is of the original is an `alignment_strategy` of its `src/model.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.similarity.base import (
    Similarity,
    TextField,
    as_heads,
    check_positive,
    like,
    refuse_tokens,
)
from talk2dino.errors import ConfigError


class PairedHead(Similarity):
    """Base of the strategies that choose; `select` chooses, `scores` is a plain comparison.

    `select` needs as many texts as images: visual `[B, H, D]` to `[B, D]`. A visual feature
    `[B, D]` is one head and thus no choice, as in the original. The choice of the true pair is then
    compared with every text; it is not a choice per pair.
    """

    def __init__(
        self,
        field: str = "disentangled_self_attn",
        cosine: bool = True,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, text_field)

    def select(self, text: Tensor, visual: Tensor) -> Tensor:
        """Text `[B, D]`, visual `[B, H, D]` to what stands for each image, `[B, D]`."""
        refuse_tokens(self, text)
        if text.shape[0] != visual.shape[0]:
            raise ConfigError(
                f"similarity={type(self).__name__} pairs text i with image i, but text has shape "
                f"{tuple(text.shape)} and {self.field} {tuple(visual.shape)}"
            )
        heads = self._unit(like(as_heads(visual), text))  # [B, H, D]
        return self._choose(self._unit(text), heads)

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text `[T, D]`, selected visual `[I, D]` to `[T, I]`; `select` did the image's norm."""
        refuse_tokens(self, text, text_mask)
        return self._unit(text) @ like(visual, text).T

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        """Text `[B, D]`, heads `[B, H, D]`, both of unit length with `cosine`, to `[B, D]`."""
        raise NotImplementedError


class MaxScore(PairedHead):
    """The head most similar to the image's own caption (Talk2DINO; original `max_score`).

    The choice has no gradient; the chosen head's vector has one.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> chosen = similarity.MaxScore().select(text, heads)
        >>> chosen  # caption i chooses a head of image i
        tensor([[1., 0.],
                [0., 1.]])
        >>> similarity.MaxScore().scores(text, chosen)
        tensor([[1.0000, 0.0000],
                [0.6000, 0.8000]])
    """

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        return take_head(heads, head_choice(text, heads, cosine=False))  # unit rows already


class WeightedAverage(PairedHead):
    """Mean over heads of softmax(similarity) times head (original `weighted_avg`).

    The mean makes it 1/H of a weighted average, and it is not normalized again.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.WeightedAverage()(text, heads)
        tensor([[ 0.3655, -0.0989],
                [ 0.3269,  0.2615]])
    """

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        weights = _head_logits(text, heads).softmax(dim=-1)
        return (weights[..., None] * heads).mean(dim=1)


class SampledHead(PairedHead):
    """A head drawn with probability softmax(similarity) (original `sampled_attn_map`).

    Args:
        field: name of the visual feature.
        cosine: compare directions.
        generator: source of randomness; None is torch's default generator.
        text_field: what of a caption is compared.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> draw = similarity.SampledHead(generator=torch.Generator().manual_seed(0))
        >>> draw.select(text, heads).shape  # one head of each image
        torch.Size([2, 2])
    """

    def __init__(
        self,
        field: str = "disentangled_self_attn",
        cosine: bool = True,
        generator: torch.Generator | None = None,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, text_field)
        self.generator = generator

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        probabilities = _head_logits(text, heads).softmax(dim=-1)
        index = torch.multinomial(probabilities.detach(), 1, generator=self.generator)
        return take_head(heads, index[:, 0])


class SoftHead(PairedHead):
    """Weighted sum of heads, weights softmax(similarity / temperature), at unit length if cosine.

    Between `MaxScore` (temperature towards 0) and the plain mean (towards infinity), with a
    gradient through the choice. Not in the original. For a choice per text-image pair use
    `Dense(field="disentangled_self_attn")`.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.SoftHead(temperature=1.0)(text, heads)
        tensor([[ 0.9385, -0.2394],
                [ 0.8393,  0.6331]])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        field: str = "disentangled_self_attn",
        cosine: bool = True,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, text_field)
        check_positive("similarity.temperature", temperature)
        self.temperature = temperature

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        weights = (_head_logits(text, heads) / self.temperature).softmax(dim=-1)
        return self._unit((weights[..., None] * heads).sum(dim=1))


def head_choice(text: Tensor, heads: Tensor, cosine: bool = True) -> Tensor:
    """Index `[B]` int64 of the head that `MaxScore` takes; text `[B, D]`, heads `[B, H, D]`.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.similarity.heads import head_choice
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> head_choice(text, heads)
        tensor([0, 0])
    """
    heads = heads.to(text.dtype)
    if cosine:
        text, heads = F.normalize(text, dim=-1), F.normalize(heads, dim=-1)
    return _head_logits(text, heads).argmax(dim=-1)


def take_head(heads: Tensor, index: Tensor) -> Tensor:
    """Row-wise `heads[b, index[b]]`: `[B, H, D]` and `[B]` to `[B, D]`."""
    return heads[torch.arange(len(heads), device=heads.device), index]


def _head_logits(text: Tensor, heads: Tensor) -> Tensor:
    return torch.bmm(heads, text[:, :, None])[..., 0]  # [B, H]
