"""Mean IoU as the benchmarks count it, of a whole dataset and of each image."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from talk2dino.evaluation.records import Record
from talk2dino.files import replacing

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassJaccardIndex


def mean_iou_metric(num_classes: int, ignore_index: int = 255) -> MulticlassJaccardIndex:
    """The metric of every benchmark; its `confmat` `[K, K]` (target, prediction) adds over ranks.

    Arguments are not validated by torchmetrics (it costs six times the counting); pass targets
    through `label_values.LabelValues`, since a value outside `0..K-1` would be counted in a wrong
    cell.

    Args:
        num_classes: K, with the background if it is a class.
        ignore_index: target value whose pixels do not count.

    Examples:
        >>> import torch
        >>> from talk2dino.evaluation.metrics import mean_iou_metric
        >>> metric = mean_iou_metric(num_classes=3)
        >>> truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 255]])
        >>> metric.update(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]]), truth)
        >>> metric.compute()
        tensor(0.7750)
    """
    from torchmetrics.classification import MulticlassJaccardIndex  # reports need no torchmetrics

    return MulticlassJaccardIndex(num_classes, ignore_index=ignore_index, validate_args=False)


STRIP = 1 << 23  # pixels counted at once: torchmetrics copies them several times


def count_pixels(metric: MulticlassJaccardIndex, labels: Tensor, target: Tensor) -> None:
    """Add a picture to the metric: `[H, W]` int64 each."""
    height = max(1, STRIP // labels.shape[1])
    for some, wanted in zip(torch.split(labels, height), torch.split(target, height), strict=True):
        metric.update(some[None], wanted[None])


def per_class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of every class; `None` for an empty union.

    Args:
        confusion: `[K, K]` pixel counts, rows are targets.

    Examples:
        >>> import torch
        >>> from talk2dino.evaluation.metrics import per_class_iou
        >>> confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # rows are targets
        >>> per_class_iou(confusion)
        [0.75, 0.8, None]
    """
    hits = confusion.diagonal().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hits
    return [h / u if u else None for h, u in zip(hits.tolist(), union.tolist(), strict=True)]


def mean_iou(confusion: Tensor) -> float:
    """Mean of `per_class_iou` over the classes that have one; NaN if none has.

    Examples:
        >>> import torch
        >>> from talk2dino.evaluation.metrics import mean_iou
        >>> confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # rows are targets
        >>> mean_iou(confusion)
        0.775
    """
    values = [value for value in per_class_iou(confusion) if value is not None]
    return sum(values) / len(values) if values else float("nan")


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of counted pixels with the right class; NaN if no pixel counts.

    Examples:
        >>> import torch
        >>> from talk2dino.evaluation.metrics import pixel_accuracy
        >>> confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # rows are targets
        >>> pixel_accuracy(confusion)
        0.875
    """
    total = int(confusion.sum())
    return int(confusion.diagonal().sum()) / total if total else float("nan")


FILE = "images.csv"
COLUMNS = ("index", "name", "iou", "pixel_accuracy", "pixels", "classes")


@dataclass(frozen=True)
class ImageScore:
    """Figures of one image, in percent.

    Attributes:
        index: of the image in the benchmark.
        name: of the image.
        iou: mean over the classes that its label map holds; NaN if it holds none.
        pixel_accuracy: share of counted pixels with the right class; NaN if none counts.
        pixels: that count.
        classes: names of the classes in the label map.
    """

    index: int
    name: str
    iou: float
    pixel_accuracy: float
    pixels: int
    classes: tuple[str, ...]


def score_image(index: int, record: Record, names: Sequence[str]) -> ImageScore:
    """Figures of image `index` from its record."""
    confusion = record.confusion(len(names))
    present = confusion.sum(1).nonzero().flatten().tolist()
    return ImageScore(
        index=index,
        name=record.name,
        iou=100 * _mean_present(confusion, present),
        pixel_accuracy=100 * pixel_accuracy(confusion),
        pixels=int(confusion.sum()),
        classes=tuple(names[k] for k in present),
    )


def _mean_present(confusion: Tensor, present: Sequence[int]) -> float:
    values = per_class_iou(confusion)
    return sum(values[k] or 0.0 for k in present) / len(present) if present else math.nan


def extremes(scores: Iterable[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """The `count` best and the `count` worst images, best and worst first; none is in both."""
    ranked = sorted(
        (score for score in scores if not math.isnan(score.iou)),
        key=lambda score: (-score.iou, score.index),
    )
    best = ranked[: min(count, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][::-1][:count]
    return best, worst


def write_scores(path: Path, scores: Iterable[ImageScore]) -> None:
    """Write `images.csv`: one row per image, percent with two digits, empty where undefined."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s in scores:
            row = (s.index, s.name, _cell(s.iou), _cell(s.pixel_accuracy), s.pixels)
            writer.writerow([*row, "; ".join(s.classes)])


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def read_ious(path: Path) -> list[float]:
    """The column `iou` of an `images.csv`, undefined ones left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row["iou"]) for row in csv.DictReader(file) if row["iou"]]
