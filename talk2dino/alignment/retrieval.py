"""Caption-image retrieval: recall at 1, 5, 10, median and mean rank, both directions.

Ranks count from 1. A wrong candidate that scores the same as the right one is ranked before it, so
a collapsed model, whose scores are all equal or NaN, gets no credit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from talk2dino.errors import DataError


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
        As `retrieval_from_scores`.

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
    found = torch.searchsorted(ordered, text_image_ids).clamp_(max=len(ordered) - 1)
    unknown = text_image_ids[ordered[found] != text_image_ids]
    if len(unknown):
        raise DataError(
            f"retrieval: image id {int(unknown[0])} of a caption is not among the images"
        )

    def score_rows(rows: slice) -> Tensor:
        masks = () if text_mask is None else (text_mask[rows],)
        return scores(texts[rows], images, *masks)

    return retrieval_from_scores(score_rows, order[found], len(images), chunk_size)


def retrieval_from_scores(
    score_rows: Callable[[slice], Tensor], text_image: Tensor, images: int, chunk_size: int = 512
) -> dict[str, float]:
    """Recall and ranks both ways: a caption looks for its image, an image for any of its captions.

    Arguments and errors as `retrieval_ranks`.

    Returns:
        `text_to_image/recall@1`, `…@5`, `…@10` in percent, `…/median_rank` (the original's rule,
        floor of the median of ranks from 0, plus 1), `…/mean_rank`, and the same for
        `image_to_text`.
    """
    flat: dict[str, float] = {}
    both = retrieval_ranks(score_rows, text_image, images, chunk_size)
    for name, ranks in zip(("text_to_image", "image_to_text"), both, strict=True):
        for k in (1, 5, 10):
            flat[f"{name}/recall@{k}"] = 100 * (ranks <= k).double().mean().item()
        # quantile averages the two middle ranks as numpy does; torch.median takes the lower
        flat[f"{name}/median_rank"] = float((ranks - 1).double().quantile(0.5).floor() + 1)
        flat[f"{name}/mean_rank"] = ranks.double().mean().item()
    return flat


def retrieval_ranks(
    score_rows: Callable[[slice], Tensor], text_image: Tensor, images: int, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Rank with any similarity, `chunk_size` captions at a time.

    Args:
        score_rows: gives the scores `[rows, images]` of a slice of captions.
        text_image: `[T]` int64, the row of each caption's image; several captions may share one.
        images: number of images I.
        chunk_size: captions per call; all scores `[T, I]` are collected on the CPU.

    Returns:
        Ranks from 1, int64: `[T]` of each caption's image, `[I]` of each image's best caption.

    Raises:
        DataError: `text_image` points outside the images, or an image has no caption.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.retrieval import retrieval_ranks
        >>> scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.9, 0.1]])
        >>> retrieval_ranks(lambda rows: scores[rows], torch.tensor([0, 1, 2]), images=3)
        (tensor([1, 1, 2]), tensor([1, 2, 2]))
    """
    text_image = text_image.cpu()
    check_owners(text_image, images)
    rows = [slice(start, start + chunk_size) for start in range(0, len(text_image), chunk_size)]
    scores = torch.cat([score_rows(part).detach().float().cpu() for part in rows])  # [T, I]
    right = scores.gather(1, text_image[:, None])[:, 0]  # [T]
    # "not below" also counts NaN; the right image itself makes the ranks count from 1
    text_ranks = (~(scores < right[:, None])).sum(dim=1)
    best = scores.new_full((images,), float("-inf"))  # [I], of an image's own captions
    best = best.scatter_reduce(0, text_image, right, "amax")
    own = text_image[~(right < best[text_image])]  # the best own caption, and any that equals it
    image_ranks = (~(scores < best)).sum(dim=0) - torch.bincount(own, minlength=images) + 1
    return text_ranks, image_ranks


def check_owners(text_image: Tensor, images: int) -> None:
    """Refuse rows of captions' images `[T]` that lie outside, or that leave an image out.

    Raises:
        DataError: with the first wrong row.
    """
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
