"""Similarities over the attention heads of an image: one chosen by a caption, or all of them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.similarity.base import (
    Similarity,
    TextField,
    as_heads,
    like,
    positive,
    refuse_tokens,
)
from talk2dino.errors import ConfigError


class PairedHead(Similarity):
    """Strategies that let an image's own caption decide what stands for the image.

    `select` needs as many texts as images: visual `[B, H, D]` to `[B, D]`. A visual feature
    `[B, D]` is one head and thus no choice, as in the original. The pick for the true pair is then
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
        refuse_tokens(self, text, None)
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
        raise NotImplementedError


class MaxScore(PairedHead):
    """The head closest to the image's own caption (Talk2DINO; original `max_score`).

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
        return take_head(heads, _head_logits(text, heads).argmax(dim=-1))


class WeightedAverage(PairedHead):
    """Mean over heads of softmax(similarity) times head (original `weighted_avg`).

    The mean makes it 1/H of a weighted average, and it is not normalised again.

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
        self.temperature = positive("similarity.temperature", temperature)

    def _choose(self, text: Tensor, heads: Tensor) -> Tensor:
        weights = (_head_logits(text, heads) / self.temperature).softmax(dim=-1)
        return self._unit((weights[..., None] * heads).sum(dim=1))


def head_choice(text: Tensor, heads: Tensor, cosine: bool = True) -> Tensor:
    """Index `[B]` int64 of the head that `MaxScore` takes; text `[B, D]`, heads `[B, H, D]`.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.head_choice(text, heads)
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


class AllPairs(Similarity):
    """Strategies over all heads of an image and all tokens of a text.

    Text is `[T, D]`, or `[T, S, D]` with a bool mask `[T, S]` (True is a token). Masked tokens
    have alignment 0 and still count as entries, as in the original; the mask is not modified.

    Args:
        field: name of the visual feature, `[I, H, D]` or `[I, D]` (one head).
        cosine: compare directions.
        keep_cls: the start token takes part.
        keep_end_seq: the last unmasked token takes part.
        text_field: what of a caption is compared.
    """

    takes_tokens: ClassVar[bool] = True

    def __init__(
        self,
        field: str = "disentangled_self_attn",
        cosine: bool = True,
        keep_cls: bool = False,
        keep_end_seq: bool = False,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, text_field)
        self.keep_cls = keep_cls
        self.keep_end_seq = keep_end_seq

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text `[T, D]` or `[T, S, D]` with mask, visual `[I, H, D]` or `[I, D]` to `[T, I]`."""
        tokens, mask = self._tokens(text, text_mask)
        return self._compare(self._unit(tokens), mask, self._unit(like(as_heads(visual), text)))

    def _tokens(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        name = f"similarity={type(self).__name__}"
        if text.ndim == 2:
            if mask is not None:
                raise ConfigError(
                    f"{name}: text of shape {tuple(text.shape)} is one vector per caption, but a "
                    f"token mask {tuple(mask.shape)} was given: store token_embeddings or drop it"
                )
            return text[:, None], torch.ones(len(text), 1, dtype=torch.bool, device=text.device)
        if mask is None or mask.shape != text.shape[:2]:
            found = "none" if mask is None else str(tuple(mask.shape))
            raise ConfigError(
                f"{name}: token text of shape {tuple(text.shape)} needs a token mask of shape "
                f"{tuple(text.shape[:2])}, found {found}"
            )
        return text, trim_mask(mask.bool(), self.keep_cls, self.keep_end_seq)

    def _compare(self, tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        raise NotImplementedError


class SumHeads(AllPairs):
    """Sum over heads and tokens of the similarities (original `sum`).

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.SumHeads()(text, heads)
        tensor([[ 1.0000, -1.0000],
                [ 1.4000,  0.2000]])
    """

    def _compare(self, tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        # A sum of dot products is the dot product of the sums.
        return (tokens * mask[..., None]).sum(dim=1) @ heads.sum(dim=1).T


class MeanHeads(AllPairs):
    """Mean over heads and tokens; masked tokens count in the divisor (original `mean`).

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.MeanHeads()(text, heads)
        tensor([[ 0.5000, -0.5000],
                [ 0.7000,  0.1000]])
    """

    def _compare(self, tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        return (tokens * mask[..., None]).mean(dim=1) @ heads.mean(dim=1).T


class MaxRowSum(AllPairs):
    """Each token's best head, summed over tokens (original `max-row_sum`).

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> heads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])  # [I, H, D]
        >>> similarity.MaxRowSum()(text, heads)
        tensor([[1.0000, 0.0000],
                [0.8000, 0.8000]])
    """

    def _compare(self, tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        return best_head(tokens, mask, heads).sum(dim=-1)


class Nucleus(AllPairs):
    """Sum of the best tokens that hold the share `alpha` of a pair (original `nucleus-sampling`).

    Per pair: each token's best head, sorted, scaled to [0, 1] and to sum one; the tokens up to the
    first whose cumulative share exceeds `alpha` are summed at their unscaled value. If no share
    exceeds `alpha` (from 1 on), only the best token counts.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> words = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # [S, D]
        >>> mask, heads = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[[1.0, 0.0]]])
        >>> for alpha in (0.5, 0.6):  # start, end cut; the first word holds 1 / 1.8
        ...     strategy = similarity.Nucleus(alpha, text_field="token_embeddings")
        ...     print(strategy(words[None], heads, mask))
        tensor([[1.]])
        tensor([[1.8000]])
    """

    def __init__(
        self,
        alpha: float = 0.6,
        field: str = "disentangled_self_attn",
        cosine: bool = True,
        keep_cls: bool = False,
        keep_end_seq: bool = False,
        text_field: TextField = "embedding",
    ) -> None:
        super().__init__(field, cosine, keep_cls, keep_end_seq, text_field)
        self.alpha = alpha

    def _compare(self, tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
        values = best_head(tokens, mask, heads).sort(dim=-1, descending=True).values  # [T, I, S]
        low, high = values[..., -1:], values[..., :1]
        share = (values.detach() - low) / (high - low)  # 0/0 with equal values: no share exceeds
        share = (share / share.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
        # argmax finds the first True, and 0 if there is none.
        last = (share > self.alpha).to(torch.uint8).argmax(dim=-1, keepdim=True)
        positions = torch.arange(values.shape[-1], device=values.device)
        return (values * (positions <= last)).sum(dim=-1)


def trim_mask(mask: Tensor, keep_cls: bool, keep_end_seq: bool) -> Tensor:
    """A copy of `mask` `[B, S]` bool without the last True and the first position, unless kept.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> mask = torch.tensor([[True, True, True, True, False]])  # start, two words, end, padding
        >>> similarity.trim_mask(mask, keep_cls=False, keep_end_seq=False)
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


def best_head(tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
    """Each token's similarity to its best head, 0 where masked.

    Tokens `[T, S, D]`, mask `[T, S]`, heads `[I, H, D]` to `[T, I, S]`.
    """
    flat = tokens.flatten(0, 1) @ heads.flatten(0, 1).T  # [T*S, I*H]
    grid = flat.view(*tokens.shape[:2], *heads.shape[:2])  # [T, S, I, H]
    return (grid.max(dim=-1).values * mask[..., None]).transpose(1, 2)
