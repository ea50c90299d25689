"""Caption-image retrieval: recall at 1, 5, 10, median and mean rank, both directions.

Ranks count from 1. A wrong candidate that scores the same as the right one is placed before it, so
a collapsed model that scores everything alike gets no credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import DataError


@dataclass(frozen=True)
class DirectionReport:
    """Retrieval in one direction.

    Attributes:
        recall: percent of queries whose right answer is among the first 1, 5, 10.
        median_rank: the original's rule, floor of the median of ranks from 0, plus 1.
        mean_rank: mean of ranks from 1.
        ranks: `[queries]` int64, from 1.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    ranks: Tensor

    @classmethod
    def from_ranks(cls, ranks: Tensor) -> DirectionReport:
        """Summarise ranks `[queries]` int64 that count from 1."""
        return cls(
            recall={k: 100 * (ranks <= k).double().mean().item() for k in (1, 5, 10)},
            # quantile averages the two middle ranks as numpy does; torch.median takes the lower
            median_rank=float((ranks - 1).double().quantile(0.5).floor() + 1),
            mean_rank=ranks.double().mean().item(),
            ranks=ranks,
        )


@dataclass(frozen=True)
class RetrievalReport:
    """Both directions: a caption looks for its image, an image for any of its captions."""

    text_to_image: DirectionReport
    image_to_text: DirectionReport

    def as_dict(self) -> dict[str, float]:
        """Flat numbers for a logger: `text_to_image/recall@1`, …, `image_to_text/mean_rank`."""
        flat: dict[str, float] = {}
        for name in ("text_to_image", "image_to_text"):
            report: DirectionReport = getattr(self, name)
            flat |= {f"{name}/recall@{k}": value for k, value in report.recall.items()}
            flat |= {f"{name}/median_rank": report.median_rank}
            flat |= {f"{name}/mean_rank": report.mean_rank}
        return flat


@torch.no_grad()
def retrieval_metrics(
    scores: Callable[..., Tensor],
    texts: Tensor,
    images: Tensor,
    text_image_ids: Tensor,
    image_ids: Tensor,
    chunk_size: int = 512,
    text_mask: Tensor | None = None,
) -> dict[str, float]:
    """Recall and ranks of any similarity, for a logger.

    Args:
        scores: the similarity's `scores`, texts `[t, ...]` and images `[I, ...]` to `[t, I]`;
            called with the rows of the mask as well if there is one.
        texts: `[T, ...]` projected captions.
        images: `[I, ...]` visual features, one row per image.
        text_image_ids: `[T]` int64, the id of each caption's image.
        image_ids: `[I]` int64, all different.
        chunk_size: captions per call of `scores`.
        text_mask: `[T, L]` bool, for token-level texts.

    Returns:
        `text_to_image/recall@1`, `…@5`, `…@10` in percent, `…/median_rank`, `…/mean_rank`, and the
        same for `image_to_text`.

    Raises:
        DataError: a caption's image is not among the images, or an image has no caption.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.retrieval import retrieval_metrics
        >>> from talk2dino.alignment.similarity import DotProduct
        >>> images, ids = torch.eye(4), torch.arange(4)
        >>> texts = images[[0, 1, 2, 0]]  # caption 3 describes image 0
        >>> found = retrieval_metrics(DotProduct().scores, texts, images, ids, ids)
        >>> found["text_to_image/recall@1"], found["text_to_image/mean_rank"]
        (75.0, 1.75)
    """
    ordered, order = image_ids.sort()
    place = torch.searchsorted(ordered, text_image_ids).clamp_(max=len(ordered) - 1)
    unknown = text_image_ids[ordered[place] != text_image_ids]
    if len(unknown):
        raise DataError(
            f"retrieval: image id {int(unknown[0])} of a caption is not among the images"
        )

    def score_rows(rows: slice) -> Tensor:
        masks = () if text_mask is None else (text_mask[rows],)
        return scores(texts[rows], images, *masks)

    report = retrieval_from_scores(score_rows, order[place], len(images), chunk_size)
    return report.as_dict()


def retrieval_from_scores(
    score_rows: Callable[[slice], Tensor], text_image: Tensor, images: int, chunk_size: int = 512
) -> RetrievalReport:
    """Rank with any similarity, `chunk_size` captions at a time.

    Args:
        score_rows: gives the scores `[rows, images]` of a slice of captions.
        text_image: `[T]` int64, the row of each caption's image.
        images: number of images I.
        chunk_size: captions per call; all scores `[T, I]` are kept in the CPU's memory.

    Raises:
        DataError: `text_image` points outside the images, or an image has no caption.
    """
    text_image = text_image.cpu()
    _check_pairs(text_image, images)
    rows = [slice(start, start + chunk_size) for start in range(0, len(text_image), chunk_size)]
    scores = torch.cat([score_rows(part).detach().float().cpu() for part in rows])  # [T, I]
    return RetrievalReport(
        DirectionReport.from_ranks(_text_ranks(scores, text_image, chunk_size)),
        DirectionReport.from_ranks(_image_ranks(scores, text_image, chunk_size)),
    )


@torch.no_grad()
def retrieval(
    texts: Tensor,
    images: Tensor,
    text_image: Tensor,
    normalize: Literal["vector", "feature"] = "vector",
    chunk_size: int = 512,
) -> RetrievalReport:
    """Rank embeddings by cosine.

    Args:
        texts: `[T, D]`, already projected.
        images: `[I, D]`.
        text_image: `[T]` int64, the row of each caption's image; several captions may share one.
        normalize: "vector" divides each vector by its norm. "feature" is the original's
            `src/metrics.py`, which normalises over axis 0: each component over the rows that are
            compared together, where the rows of a query are the captions of one image.
        chunk_size: captions at a time.

    Raises:
        DataError: as `retrieval_from_scores`, or `normalize` is unknown.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.retrieval import retrieval
        >>> images = torch.eye(3)
        >>> texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.9, 0.1]])
        >>> report = retrieval(texts, images, text_image=torch.tensor([0, 1, 2]))
        >>> report.text_to_image.ranks, round(report.text_to_image.recall[1], 1)
        (tensor([1, 1, 2]), 66.7)
    """
    if normalize == "vector":
        texts, images = F.normalize(texts, dim=-1), F.normalize(images, dim=-1)
        return retrieval_from_scores(
            lambda rows: texts[rows] @ images.T, text_image, len(images), chunk_size
        )
    if normalize != "feature":
        raise DataError(f"retrieval: normalize is {normalize!r}: choose vector or feature")
    text_image = text_image.to(texts.device)
    _check_pairs(text_image, len(images))
    queries = texts / _group_norms(texts, text_image, len(images))[text_image]
    gallery = F.normalize(images, dim=0)
    by_text = retrieval_from_scores(
        lambda rows: queries[rows] @ gallery.T, text_image, len(images), chunk_size
    )
    # A single image query over axis 0 is ±1 in every component.
    signs, captions = F.normalize(images[None], dim=0)[0], F.normalize(texts, dim=0)
    by_image = retrieval_from_scores(
        lambda rows: captions[rows] @ signs.T, text_image, len(images), chunk_size
    )
    return RetrievalReport(by_text.text_to_image, by_image.image_to_text)


def _text_ranks(scores: Tensor, text_image: Tensor, chunk_size: int) -> Tensor:
    ranks = []
    parts = zip(torch.split(scores, chunk_size), torch.split(text_image, chunk_size), strict=True)
    for part, owner in parts:
        right = part.gather(1, owner[:, None])
        ranks.append((part >= right).sum(dim=1))  # the right image itself makes it count from 1
    return torch.cat(ranks)


def _image_ranks(scores: Tensor, text_image: Tensor, chunk_size: int) -> Tensor:
    ranks = []
    for start in range(0, scores.shape[1], chunk_size):
        part = scores[:, start : start + chunk_size]  # [T, i]
        columns = torch.arange(start, start + part.shape[1])
        own = text_image[:, None] == columns  # [T, i]
        best = part.masked_fill(~own, float("-inf")).amax(dim=0)
        ranks.append(((part >= best) & ~own).sum(dim=0) + 1)
    return torch.cat(ranks)


def _group_norms(texts: Tensor, text_image: Tensor, images: int) -> Tensor:
    squares = texts.new_zeros(images, texts.shape[1]).index_add_(0, text_image, texts.square())
    return squares.sqrt().clamp_(min=1e-12)  # [I, D]


def _check_pairs(text_image: Tensor, images: int) -> None:
    if len(text_image) == 0 or int(text_image.min()) < 0 or int(text_image.max()) >= images:
        raise DataError(
            f"retrieval: caption rows must name images 0 to {images - 1}, found "
            f"{text_image.tolist()[:5]}"
        )
    missing = torch.bincount(text_image, minlength=images).eq(0).nonzero()
    if len(missing):
        raise DataError(
            f"retrieval: image row {int(missing[0])} has no caption ({len(missing)} such images): "
            "leave them out"
        )
