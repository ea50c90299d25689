"""Class lists: names, synonyms and label values, and their embeddings in the patch space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.texts import embed_texts
from talk2dino.encoders.prompts import prompts
from talk2dino.encoders.text import TextEncoder

BACKGROUND = "background"
Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSpec:
    """One class of a benchmark.

    Attributes:
        name: as reported.
        synonyms: what is put into the prompts; the best one counts.
        value: its pixels' value in the label files.
        color: its pixels' colour in coloured label files, 0..255 RGB; None if not known.
    """

    name: str
    synonyms: tuple[str, ...]
    value: int
    color: Color | None = None


@dataclass(frozen=True)
class ClassList:
    """The classes of a benchmark, index order.

    A first class called "background" has no prompt: it is what no class claims.

    Attributes:
        classes: in the order of the confusion matrix.
        unlabelled: label values that do not count, besides the benchmark's `ignore_index`.
    """

    classes: tuple[ClassSpec, ...]
    unlabelled: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names in index order."""
        return [spec.name for spec in self.classes]

    @property
    def has_background(self) -> bool:
        """Whether class 0 is the background."""
        return self.classes[0].name == BACKGROUND

    @property
    def prompted(self) -> tuple[ClassSpec, ...]:
        """The classes that have a prompt."""
        return self.classes[1:] if self.has_background else self.classes


@torch.no_grad()
def embed_classes(
    synonyms: Sequence[Sequence[str]],
    text: TextEncoder,
    projection: Projection,
    template_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed class names in the space of the patch tokens.

    Raw mean of the text embeddings over the templates, then ψ, then unit length (eps 1e-6), as the
    original's `build_text_embedding`; ψ is not linear, so the order matters. With `CLIPLastLayer`
    the mean is taken over the embeddings of its own last block.

    Args:
        synonyms: per class, the names that stand for it.
        text: text encoder.
        projection: ψ.
        template_set: name of the prompt templates; None takes those that suit the encoder.

    Returns:
        [N, D] unit rows, one per synonym, and [N] int64 the class of each row.
    """
    rows = [(number, name) for number, names in enumerate(synonyms) for name in names]
    groups = prompts([name for _, name in rows], template_set or text.templates)
    embeddings = embed_prompts(groups, text, projection)
    return embeddings, torch.tensor([number for number, _ in rows], device=embeddings.device)


@torch.no_grad()
def embed_prompts(
    groups: Sequence[Sequence[str]], text: TextEncoder, projection: Projection
) -> Tensor:
    """`[N, D]` unit rows of N groups of sentences: mean over a group, then ψ, then unit length."""
    sentences = [sentence for group in groups for sentence in group]
    embeddings = embed_texts(sentences, text, projection)
    parts = torch.split(embeddings, [len(group) for group in groups])
    means = [part.mean(dim=0) for part in parts]
    projected = projection.project_embedding(torch.stack(means))
    return F.normalize(projected, dim=-1, eps=1e-6)
