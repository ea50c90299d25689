"""Mean IoU against mmsegmentation's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import ClassList, ClassSpec
from talk2dino.datasets.benchmarks.label_values import LabelValues
from talk2dino.errors import DataError
from talk2dino.evaluation.metrics import mean_iou, mean_iou_metric, per_class_iou, pixel_accuracy
from tests.helpers.goldens import Golden
from tests.helpers.parity import ParityRecord

NAN = float("nan")


def labels(classes: int, **options: Any) -> LabelValues:
    return LabelValues(
        ClassList(tuple(ClassSpec(f"c{k}", (f"c{k}",), k) for k in range(classes))), **options
    )


def count(arrays: dict[str, Tensor], case: str) -> tuple[Tensor, Tensor]:
    """Confusion matrix over the images of a case, and the metric's own mean."""
    classes = int(arrays[f"{case}/num_classes"])
    metric = mean_iou_metric(classes, int(arrays[f"{case}/ignore_index"]))
    for i in range(2):
        table = labels(classes, reduce_zero_label=bool(arrays[f"{case}/reduce_zero_label"]))
        target = table.targets(arrays[f"{case}/gt{i}"].numpy())
        metric.update(arrays[f"{case}/pred{i}"][None], target[None])
    return metric.confmat, metric.compute()


@pytest.mark.parametrize("case", ["plain5", "absent6", "reduce5", "allignored2"])
def test_mmsegmentation(case: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("metrics")
    confusion, macro = count(arrays, case)
    classes = [NAN if value is None else value for value in per_class_iou(confusion)]
    pairs = {
        "IoU": torch.tensor(classes),
        "mIoU_nanmean": torch.tensor(mean_iou(confusion)),
        "aAcc": torch.tensor(pixel_accuracy(confusion)),
    }
    for name, got in pairs.items():
        want = arrays[f"{case}/metrics/{name}"]
        parity.check("dataset metrics", "mmseg pre_eval_to_metrics", got, want, 1e-6)
    want = arrays[f"{case}/metrics/mIoU_nanmean"]
    parity.check("mean IoU by torchmetrics", "mmseg pre_eval_to_metrics", macro, want, 1e-6)


@pytest.mark.parametrize("case", ["plain5", "absent6", "reduce5"])
def test_areas(case: str, golden: Golden, parity: ParityRecord) -> None:
    arrays = golden("metrics")
    confusion, _ = count(arrays, case)
    areas = {"intersect": confusion.diagonal(), "pred": confusion.sum(0), "label": confusion.sum(1)}
    for name, got in areas.items():
        want = arrays[f"{case}/total/{name}"]
        parity.check("pixel counts", "mmseg total_intersect_and_union", got, want, 0)


def test_foreign_values_are_refused_by_name(golden: Golden) -> None:
    target = golden("metrics")["outofrange3/gt0"]
    with pytest.raises(DataError, match=r"a\.png: label value 7, 200 is no class"):
        labels(3).targets(target.numpy(), "a.png")


def test_reducing_zero_leaves_the_file_alone() -> None:
    target = np.array([[0, 1, 3, 255]], np.uint8)
    kept = target.copy()
    assert labels(3, reduce_zero_label=True).targets(target).tolist() == [[255, 0, 2, 255]]
    assert np.array_equal(target, kept)
    with pytest.raises(DataError, match="label value 3 is no class"):
        labels(2, reduce_zero_label=True).targets(target)


def test_written_out() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert per_class_iou(confusion) == [6 / 9, 3 / 10, None, 0.0]
    assert mean_iou(confusion) == pytest.approx((6 / 9 + 3 / 10) / 3)
    assert pixel_accuracy(confusion) == 9 / 16


def test_nothing_counted_is_not_zero() -> None:
    empty = torch.zeros(3, 3, dtype=torch.int64)
    assert per_class_iou(empty) == [None] * 3
    assert mean_iou(empty) != mean_iou(empty)
    assert pixel_accuracy(empty) != pixel_accuracy(empty)
