"""Comparisons without a choice: one vector per image, or all heads with all tokens.

The `AllPairs` strategies are the original's `alignment_strategy` of the same names, whose scores
are transposed there, `[image, text]`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from talk2dino.alignment.similarity.base import Similarity, TextField, as_heads, like, refuse_tokens
from talk2dino.encoders.text.base import trim_mask
from talk2dino.errors import ConfigError


class DotProduct(Similarity):
    """One vector per image, one per text (the original's `src/model.py`, 2-D inputs).

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import similarity
        >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # [T, D]
        >>> visual = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # [I, D]
        >>> similarity.DotProduct()(text, visual)  # cosines [T, I]
        tensor([[ 1.0000,  0.0000, -1.0000],
                [ 0.6000,  0.8000, -0.6000]])
    """

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


class AllPairs(Similarity):
    """Base of the strategies over all heads of an image and all tokens of a text.

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
        """Tokens `[T, S, D]`, mask `[T, S]` bool, heads `[I, H, D]` to `[T, I]`."""
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


def best_head(tokens: Tensor, mask: Tensor, heads: Tensor) -> Tensor:
    """Each token's similarity to its best head, 0 where masked.

    Tokens `[T, S, D]`, mask `[T, S]`, heads `[I, H, D]` to `[T, I, S]`.
    """
    flat = tokens.flatten(0, 1) @ heads.flatten(0, 1).T  # [T*S, I*H]
    grid = flat.view(*tokens.shape[:2], *heads.shape[:2])  # [T, S, I, H]
    return (grid.max(dim=-1).values * mask[..., None]).transpose(1, 2)
