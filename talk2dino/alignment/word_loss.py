"""Words of the captions as texts of their own: a second loss beside that of whole captions.

Not in the original. A caption pools the patches of everything it mentions; at inference ψ is asked
for single things. So a step also compares single words with the images of the batch, each image
with several right words and each word with several right images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.alignment.similarity import Dense, Similarity
from talk2dino.alignment.similarity.base import check_positive
from talk2dino.alignment.similarity.dense import sample_patches
from talk2dino.errors import ConfigError


@dataclass(frozen=True)
class WordOptions:
    """The options of training on words, `conf/words/*.yaml`.

    Attributes:
        weight: of the words' loss.
        caption_weight: of the loss of whole captions beside it; 0 trains on words alone.
        min_count: captions that a word or a pair of words must occur in.
        per_step: words of a step at most, drawn from those of its images.
        templates: prompts of a word, see `encoders.text.prompts`; their embeddings are averaged.
        temperature: with which a word pools patches; None takes that of the similarity.
        logit_scale: factor on the scores, 1/temperature of the cross-entropies.
        near_synonym: cosine of two embeddings from which on two words may mean the same: an image
            with one of them is no wrong image for the other. None takes every word at its letter.
        synonym: cosine from which on a word is right wherever the other is; None for never.
        mixture: weight of the loss in which the words of an image compete for its patches, see
            `patch_mixture`; 0 goes without.
        mixture_per_step: words of a step that compete at most; an image that lacks some of its
            words has others explain too much.
        mixture_patches: random patches of every image that they compete for.
        concentration: of the words there, see `patch_mixture`.
        unexplained: share of the patches that no word explains there.

    Raises:
        ConfigError: a value out of range.
    """

    weight: float = 1.0
    caption_weight: float = 1.0
    min_count: int = 30
    per_step: int = 160
    templates: str = "plain"
    temperature: float | None = None
    logit_scale: float = 30.0
    near_synonym: float | None = None
    synonym: float | None = None
    mixture: float = 0.0
    mixture_per_step: int = 1024
    mixture_patches: int = 32
    concentration: float = 30.0
    unexplained: float = 0.1

    def __post_init__(self) -> None:
        positive = ("weight", "logit_scale", "concentration", "mixture_per_step", "mixture_patches")
        for name in (*positive, *(() if self.temperature is None else ("temperature",))):
            check_positive(f"words.{name}", getattr(self, name))
        for name in ("caption_weight", "mixture"):
            if getattr(self, name) < 0:
                raise ConfigError(f"words.{name}={getattr(self, name)}: use 0 or more")
        if not 0 < self.unexplained < 1:
            raise ConfigError(f"words.unexplained={self.unexplained}: use a share between 0 and 1")
        if self.per_step < 2:
            raise ConfigError(
                f"words.per_step={self.per_step}: a word is told apart from others of its step, so "
                "use 2 or more"
            )
        for name in ("near_synonym", "synonym"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"words.{name}={value}: a cosine above 0 and up to 1, or null")


@dataclass(frozen=True)
class StepWords:
    """The words of one step, beside the N images of its batch.

    Attributes:
        index: `[M]` int64, the words; some are none if the images have fewer than M.
        positive: `[M, N]` bool, true pairs of a word and an image.
        compared: `[K, N]` bool of the first K words, which are told apart: pairs that count at all,
            as true or as wrong ones. The mixture takes all M.
    """

    index: Tensor
    positive: Tensor
    compared: Tensor


class WordLoss(nn.Module):
    """Cross-entropies between the words and the images of a batch, both ways.

    A word that any caption of an image contains is right for it, whichever caption was drawn. The
    loss is the mean of two: for every word, minus the mean over its images of log softmax over all
    images; for every image, minus the mean over its words of log softmax over all words.

    What it holds are constants: no part of the state dict, and no buffers, which DDP would send
    from rank to rank at every step.

    Args:
        embeddings: `[V, C]` text embeddings of the words, in the space that ψ takes.
        of_image: `[I, W]` int, the words of every image of the store, filled up with V.
        similarity: compares words with images.
        options: weights, sizes and scales.
        seed: of the choice of words.
        digest: of the words and of which image has which, which all ranks must agree on.

    Raises:
        ConfigError: a mixture without a similarity that compares patches.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.similarity import DotProduct
        >>> from talk2dino.alignment.word_loss import WordLoss, WordOptions
        >>> of_image = torch.tensor([[0, 2], [1, 2]])  # image 0 has words 0 and 2, image 1 1 and 2
        >>> options = WordOptions(logit_scale=1.0)
        >>> words = WordLoss(torch.eye(3), of_image, DotProduct(), options)
        >>> step = words.choose(torch.tensor([1, 0, 1]), step=(0, 0))  # image 1 twice
        >>> order = step.index.argsort()
        >>> step.positive[order].int()  # [word, image]; an image counts once
        tensor([[0, 1, 0],
                [1, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
        >>> float(words(torch.zeros(3, 3), step))  # (log 2 + log 3) / 2: nothing is told apart
        0.8958797454833984
    """

    def __init__(
        self,
        embeddings: Tensor,
        of_image: Tensor,
        similarity: Similarity,
        options: WordOptions = WordOptions(),
        seed: int = 0,
        digest: str = "",
    ) -> None:
        super().__init__()
        if options.mixture and not isinstance(similarity, Dense):
            raise ConfigError(
                f"words.mixture={options.mixture}: {type(similarity).__name__} compares no "
                "patches; use similarity=dense, or words.mixture=0"
            )
        self.embeddings, self.of_image = embeddings, of_image
        self.similarity, self.options = similarity, options
        self.seed, self.digest = seed, digest

    def choose(self, image_row: Tensor, step: Sequence[int]) -> StepWords:
        """Draw the words of a step: the same ones on all ranks, and again after resuming.

        Args:
            image_row: `[N]` int64, the image of each column of the scores; one that occurs again
                counts where it occurs first.
            step: numbers that tell this step from all others.
        """
        count = len(self.embeddings)
        has = torch.zeros(len(image_row), count + 1, dtype=torch.bool, device=image_row.device)
        has = has.scatter(1, self.of_image[image_row].long(), True)[:, :count]  # [N, V]
        entropy = np.random.SeedSequence([self.seed, *step]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]) >> 1)
        keys = torch.rand(count, generator=generator, dtype=torch.float64).to(image_row.device)
        # Always as many rows, some of them without a word, so that no device is waited for.
        keys = keys.masked_fill(~has.any(dim=0), -1)
        compare = self.options.per_step
        largest = max(compare, self.options.mixture_per_step) if self.options.mixture else compare
        values, index = keys.topk(min(largest, count))
        again = (image_row[:, None] == image_row[None, :]).tril(-1).any(dim=1)
        counted = (values >= 0)[:, None] & ~again  # [K, N]
        positive = has[:, index].T & counted
        compared = counted[:compare]
        if self.options.near_synonym is not None:
            unit = F.normalize(self.embeddings, dim=-1)
            first = index[:compare]
            near = (unit[first] @ unit.T >= self.options.near_synonym).to(unit.dtype)  # [K, V]
            other = near @ has.T.to(unit.dtype) == 0
            compared = compared & (positive[:compare] | other)
        return StepWords(index, positive, compared)

    def forward(self, scores: Tensor, words: StepWords) -> Tensor:
        """Scalar loss of scores `[K, N]` of the step's words with its images.

        It is 0 if no image has a word.
        """
        positive = words.positive[: len(words.compared)]
        logits = scores * self.options.logit_scale
        logits = logits.masked_fill(~words.compared, torch.finfo(logits.dtype).min)
        parts = []
        for dim in (0, 1):
            chances = logits.log_softmax(dim).masked_fill(~positive, 0)
            right = positive.sum(dim)
            each = chances.sum(dim) / right.clamp(min=1)
            parts.append(-each.sum() / (right > 0).sum().clamp(min=1))
        return (parts[0] + parts[1]) / 2

    def few_patches(self, patch_tokens: Tensor) -> Tensor:
        """Those of a mixture: `[B, P, D]` to `[B, mixture_patches, D]`, drawn anew."""
        generator = self.similarity.generator if isinstance(self.similarity, Dense) else None
        return sample_patches(patch_tokens, self.options.mixture_patches, generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WordLoss:
        """Move and convert the constants as if they were buffers."""
        self.embeddings, self.of_image = fn(self.embeddings), fn(self.of_image)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
