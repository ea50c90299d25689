"""From patch tokens and class embeddings to scores, cleaned of background, at any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.errors import DataError


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Text rows `[K, D]` and what is subtracted from their cosines `[K]`, together `[K, D + 1]`.

    A calibration gives every row its offset; as a further column it stays with its row wherever
    rows are chosen or cut into blocks.
    """
    return torch.cat([rows, offsets.to(rows)[:, None]], dim=1)


def split_offsets(text: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Rows `[K, width]` and their offsets `[K]`, or None if `text` holds rows alone."""
    if text.shape[-1] != width + 1:
        return text, None
    return text[:, :width].contiguous(), text[:, width]


def class_scores(patch_tokens: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sigmoid of the cosine between every patch and every class, minus the class's offset.

    Only the image side is normalized here (eps 1e-6); the text counts as given, so pass unit
    vectors, which keep the scores within 0.269..0.731. Source: the original's `DINOTextMasker`,
    which has no offsets.

    Args:
        patch_tokens: `[B, P, D]`.
        text: `[K, D]` class embeddings of unit length, or `[K, D + 1]` of `with_offsets`.
        grid: patch rows and columns, `rows * columns == P`.

    Returns:
        `[B, K, rows, columns]` float32.

    Raises:
        DataError: the grid does not have P cells, or the widths differ.
    """
    batch, patches, width = patch_tokens.shape
    rows, offsets = split_offsets(text, width)
    if rows.shape[-1] != width:
        raise DataError(
            f"patch tokens {tuple(patch_tokens.shape)} and text {tuple(text.shape)} differ in "
            "width: the checkpoint belongs to another vision encoder (config key `vision`)"
        )
    if grid[0] * grid[1] != patches:
        raise DataError(f"a grid of {grid[0]}x{grid[1]} cannot hold {patches} patch tokens")
    tokens = F.normalize(patch_tokens.float(), dim=-1, eps=1e-6)
    cosine = rows.to(tokens) @ tokens.transpose(1, 2)  # [B, K, P]
    if offsets is not None:
        cosine = cosine - offsets.to(tokens)[:, None]
    return cosine.sigmoid().view(batch, -1, *grid)


def merge_synonyms(scores: Tensor, row_classes: Tensor) -> Tensor:
    """A class described by several text rows scores as its best row.

    Args:
        scores: `[B, N, h, w]`, one channel per text row.
        row_classes: `[N]` int64, the class of every row; each of `0..K-1` occurs.

    Returns:
        `[B, K, h, w]`.

    Raises:
        DataError: one class index per channel is needed, and no class may be without a row.
    """
    if len(row_classes) != scores.shape[1]:
        raise DataError(f"{len(row_classes)} row classes for {scores.shape[1]} text rows")
    classes = int(row_classes.max()) + 1
    if not row_classes.bincount(minlength=classes).all():
        raise DataError(f"every class 0..{classes - 1} needs a text row: {row_classes.tolist()}")
    index = row_classes.to(scores.device)[None, :, None, None].expand_as(scores)
    merged = scores.new_zeros(scores.shape[0], classes, *scores.shape[2:])
    return merged.scatter_reduce_(1, index, scores, reduce="amax", include_self=False)


def upsample(scores: Tensor, height: int, width: int) -> Tensor:
    """`[B, K, rows, columns]` to `[B, K, height, width]`, corners on corners (original)."""
    return F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=True)


def resize_scores(scores: Tensor, height: int, width: int) -> Tensor:
    """`[K, h, w]` to `[K, height, width]`, pixel centers on pixel centers (mmsegmentation)."""
    size = (height, width)
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def score_at(scores: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """One pixel of `resize_scores(scores, height, width)`: `[K]`, without computing the others."""
    value = scores
    for place, size in ((row, height), (column, width)):
        given = value.shape[1]
        middle = max((place + 0.5) * given / size - 0.5, 0.0)
        low = min(int(middle), given - 1)
        value = torch.lerp(value[:, low], value[:, min(low + 1, given - 1)], middle - low)
    return value


def with_background(scores: Tensor, threshold: float | None) -> Tensor:
    """Put a constant background channel in front: `[K, ...]` to `[K + 1, ...]`.

    `None` leaves the scores as they are.
    """
    if threshold is None:
        return scores
    return torch.cat([torch.full_like(scores[:1], threshold), scores])


def clean_background(
    mask: Tensor, patch_tokens: Tensor, self_attn_maps: Tensor, text: Tensor, lambda_bg: float = 0.2
) -> Tensor:
    """Pull class scores towards the attention of the heads that agree with each class.

    Every head gets an embedding (patch tokens weighted by its raw logits); a class picks heads by
    softmax of its similarity to them; the picked attention, as a distribution over patches and
    rescaled to the range of `mask`, is mixed in with weight `lambda_bg`. Source: the original's
    `DINOText.similarity_assignment_weighted`, which takes minimum and maximum over the whole batch
    and so only ran with one image; here they are taken per image, so any batch size gives the
    numbers of a batch of one.

    Args:
        mask: scores `[B, K, h, w]` at token resolution, `h * w == P`.
        patch_tokens: `[B, P, D]`, as the encoder gave them (not normalized).
        self_attn_maps: `[B, H, P]` logits before softmax, prefix tokens cut.
        text: class embeddings `[K, D]`, used as given (unit length in the method).
        lambda_bg: weight of the attention; 0 returns the mask.

    Returns:
        `[B, K, h, w]`, a new tensor.

    Raises:
        DataError: the shapes do not belong together.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation import clean_background
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # [B=1, P=2, D=2]
        >>> attention = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])  # each head looks at one patch
        >>> mask = torch.tensor([[[[0.5, 0.6]]]])  # one class, 1 x 2 patches
        >>> text = torch.tensor([[1.0, 0.0]])  # the class is like patch 0
        >>> clean_background(mask, tokens, attention, text)
        tensor([[[[0.5140, 0.5833]]]])
    """
    _check(mask, patch_tokens, self_attn_maps, text)
    tokens, logits, scores = patch_tokens.float(), self_attn_maps.float(), mask.float()
    heads = F.normalize(logits @ tokens, dim=-1)  # [B, H, D]; a mean over P would cancel here
    choice = (text.to(heads) @ heads.transpose(1, 2)).softmax(-1)  # [B, K, H]
    attention = (choice @ logits).softmax(-1)  # [B, K, P]

    low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    # The original divides by max(high, high - low), which is `high`: a softmax is not negative.
    attention = ((attention - low) / high).view_as(scores)
    bottom = scores.amin((1, 2, 3), keepdim=True)
    span = scores.amax((1, 2, 3), keepdim=True) - bottom
    return (scores + lambda_bg * (attention * span + bottom)) / (1 + lambda_bg)


def _check(mask: Tensor, patch_tokens: Tensor, self_attn_maps: Tensor, text: Tensor) -> None:
    if mask.ndim != 4:
        raise DataError(f"background_cleaning: mask {tuple(mask.shape)}: give [B, K, h, w]")
    batch, classes, height, width = mask.shape
    wanted = {
        "patch_tokens": (patch_tokens, (batch, height * width, patch_tokens.shape[-1])),
        "self_attn_maps": (self_attn_maps, (batch, self_attn_maps.shape[1], height * width)),
        "text": (text, (classes, patch_tokens.shape[-1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"background_cleaning: {name} {tuple(tensor.shape)} does not fit "
                f"mask {tuple(mask.shape)}: expected {shape}"
            )
