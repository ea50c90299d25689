"""The interface of all similarities, and the checks of their input.

A text and an image are compared in two stages:

1. `select` is local. Row i of the texts meets row i of the images, its own one: `MaxScore` picks
   the attention head that stands for the image, `Dense` draws a random subset of patches in
   training, all others leave the visual features unchanged.
2. `scores` compares any number of texts with any number of selected images and always returns
   `[text, image]`; some strategies of the original return the transpose.

With several devices every rank selects among its own pairs, gathers the *texts* of all ranks and
scores them against its own images, so that heads and patch tokens never leave their device
(`alignment/module.py`).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.errors import ConfigError

TextField = Literal["embedding", "token_average", "token_embeddings"]


class Similarity(nn.Module):
    """Base of all strategies.

    Args:
        field: name of the visual feature that is compared.
        cosine: compare directions; False compares by dot product.
        text_field: what of a caption is projected and compared: its pooled `embedding`, the
            `token_average` (original `clip_txt_out_tokens_avg`: without the first and the last
            token), or all `token_embeddings`, which only some strategies take.

    Attributes:
        takes_tokens: whether the strategy compares token by token.

    Raises:
        ConfigError: an unknown text field, or tokens for a strategy that takes one vector.
    """

    takes_tokens: ClassVar[bool] = False

    def __init__(
        self, field: str, cosine: bool = True, text_field: TextField = "embedding"
    ) -> None:
        super().__init__()
        self.field = field
        self.cosine = cosine
        self.text_field = text_field
        if text_field not in get_args(TextField):
            raise ConfigError(
                f"similarity.text_field={text_field!r}: choose one of "
                f"{', '.join(get_args(TextField))}"
            )
        if text_field == "token_embeddings" and not self.takes_tokens:
            raise ConfigError(
                f"similarity.text_field=token_embeddings: {type(self).__name__} compares one "
                "vector per caption; choose similarity=sum, mean, max_row_sum or nucleus, or "
                "text_field=token_average"
            )

    def select(self, text: Tensor, visual: Tensor) -> Tensor:
        """First stage, row i of text `[B, D]` with row i of visual: identity unless overridden."""
        return visual

    def scores(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Second stage: selected features to `[text, image]`, any number of each."""
        raise NotImplementedError

    def forward(self, text: Tensor, visual: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """`scores(text, select(text, visual), text_mask)`."""
        return self.scores(text, self.select(text, visual), text_mask)

    def extra_repr(self) -> str:
        """Options, for `print(module)`."""
        return f"field={self.field!r}, cosine={self.cosine}, text_field={self.text_field!r}"

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.cosine else x


def as_heads(visual: Tensor) -> Tensor:
    """Visual `[I, D]` as one head, `[I, 1, D]`; `[I, H, D]` unchanged."""
    return visual[:, None] if visual.ndim == 2 else visual


def like(visual: Tensor, text: Tensor) -> Tensor:
    """Visual features in the text's dtype; a ConfigError if the widths differ."""
    if visual.shape[-1] != text.shape[-1]:
        raise ConfigError(
            f"similarity: text has shape {tuple(text.shape)}, visual features "
            f"{tuple(visual.shape)}: projection.vision_dim must be their common last dimension"
        )
    return visual.to(text.dtype)


def refuse_tokens(similarity: Similarity, text: Tensor, mask: Tensor | None = None) -> None:
    """Raise a ConfigError unless text is `[T, D]` without a mask."""
    if text.ndim != 2 or mask is not None:
        raise ConfigError(
            f"similarity={type(similarity).__name__} compares one vector per caption [T, D], found "
            f"text of shape {tuple(text.shape)}{' with a token mask' if mask is not None else ''}: "
            "use SumHeads, MeanHeads, MaxRowSum or Nucleus for token embeddings"
        )


def check_positive(key: str, value: float | None) -> None:
    """Raise a ConfigError that names `key` if the value is neither positive nor None."""
    if value is not None and value <= 0:
        raise ConfigError(f"{key} is {value}: it must be positive")
