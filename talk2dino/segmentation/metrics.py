"""Mean IoU of a whole dataset, counted as the benchmarks count it.

Everything comes from one confusion matrix over all pixels of all images. `JaccardIndex` with
macro average leaves out classes with an empty union, which is mmsegmentation's mean over classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from talk2dino.errors import DataError


def mean_iou_metric(
    num_classes: int,
    ignore_index: int = 255,
    average: Literal["macro", "none"] = "macro",
) -> MulticlassJaccardIndex:
    """The metric of every benchmark; its `confmat` `[K, K]` (target, prediction) adds over ranks.

    Arguments are not validated by torchmetrics (it costs six times the counting); pass targets
    through `prepare_target`, since a value outside `0..K-1` would be counted in a wrong cell.

    Args:
        num_classes: K, with the background if it is a class.
        ignore_index: target value whose pixels do not count.
        average: `macro` for the mean over classes, `none` for all of them (0 where undefined).
    """
    return MulticlassJaccardIndex(
        num_classes, average=average, ignore_index=ignore_index, validate_args=False
    )


def prepare_target(
    target: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    name: str = "label map",
) -> Tensor:
    """Bring a label map as read from disk to `0..K-1` and `ignore_index`.

    mmsegmentation silently lets other values add to the union of what was predicted there; here
    they are refused, for they mean a wrong class list or an unconverted file.

    Args:
        target: `[..., H, W]` of any integer type; not written to.
        num_classes: K.
        ignore_index: value of pixels that do not count.
        reduce_zero_label: 0 becomes ignored and the others move down by one (ADE20K,
            Pascal Context 59, VOC 20).
        name: file, for the message.

    Returns:
        `[..., H, W]` int64.

    Raises:
        DataError: a value is neither a class nor ignored.
    """
    result = target.long()
    if reduce_zero_label:
        ignored = (result == 0) | (result == ignore_index)
        result = torch.where(ignored, ignore_index, result - 1)
    foreign = (result != ignore_index) & ((result < 0) | (result >= num_classes))
    if foreign.any():
        values = torch.unique(target[foreign]).tolist()
        raise DataError(
            f"{name}: holds {values[:5]}, outside the {num_classes} classes and the ignored "
            f"value {ignore_index}: check benchmark.classes, or convert the label maps"
        )
    return result


def per_class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of every class; `None` for an empty union.

    Args:
        confusion: `[K, K]` pixel counts, rows are targets.
    """
    hits = confusion.diagonal().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hits
    return [h / u if u else None for h, u in zip(hits.tolist(), union.tolist(), strict=True)]


def mean_iou(confusion: Tensor) -> float:
    """Mean of `per_class_iou` over the classes that have one; NaN if none has."""
    values = [value for value in per_class_iou(confusion) if value is not None]
    return sum(values) / len(values) if values else float("nan")


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of counted pixels with the right class; NaN if no pixel counts."""
    total = int(confusion.sum())
    return int(confusion.diagonal().sum()) / total if total else float("nan")
