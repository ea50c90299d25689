"""Mean IoU of a whole dataset, counted as the benchmarks count it.

Everything comes from one confusion matrix over all pixels of all images. `JaccardIndex` with
macro average leaves out classes with an empty union, which is mmsegmentation's mean over classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex


def mean_iou_metric(
    num_classes: int,
    ignore_index: int = 255,
    average: Literal["macro", "none"] = "macro",
) -> MulticlassJaccardIndex:
    """The metric of every benchmark; its `confmat` `[K, K]` (target, prediction) adds over ranks.

    Arguments are not validated by torchmetrics (it costs six times the counting); pass targets
    through `labels.LabelValues`, since a value outside `0..K-1` would be counted in a wrong cell.

    Args:
        num_classes: K, with the background if it is a class.
        ignore_index: target value whose pixels do not count.
        average: `macro` for the mean over classes, `none` for all of them (0 where undefined).
    """
    return MulticlassJaccardIndex(
        num_classes, average=average, ignore_index=ignore_index, validate_args=False
    )


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
