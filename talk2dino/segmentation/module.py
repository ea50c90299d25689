"""The LightningModule of evaluation: `trainer.predict` over a benchmark."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from talk2dino.atomic import write_json
from talk2dino.segmentation.benchmarks import Benchmark, Sample, present_classes
from talk2dino.segmentation.datamodule import Work
from talk2dino.segmentation.metrics import mean_iou_metric, per_class_iou, pixel_accuracy
from talk2dino.segmentation.report import panel, save_picture
from talk2dino.segmentation.segmenter import Segmenter


class SegmentationModule(L.LightningModule):
    """Segments every image of a benchmark and counts one confusion matrix over all ranks.

    Use `trainer.predict(module, data, return_predictions=False)`, then read `results`.

    Args:
        segmenter: vision encoder and windows.
        benchmark: classes and protocol.
        text: [N, D] unit rows of the prompted classes and their synonyms.
        row_classes: [N] int64, for every row its place among the prompted classes.
        folder: pictures go to `folder/pictures`.
        pictures: number of pictures to write.
        results_file: the first rank writes the results there, for a parent that started the ranks
            and does not share their memory (strategy ddp_spawn).
    """

    text: Tensor
    row_classes: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        benchmark: Benchmark,
        text: Tensor,
        row_classes: Tensor,
        folder: Path,
        pictures: int = 0,
        results_file: Path | None = None,
    ) -> None:
        super().__init__()
        self.segmenter, self.benchmark = segmenter, benchmark
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("row_classes", row_classes, persistent=False)
        self.folder, self.pictures, self.results_file = folder, pictures, results_file
        classes = benchmark.class_list
        self.names = classes.names
        self.offset = int(classes.has_background)
        self.metric = mean_iou_metric(len(self.names), benchmark.ignore_index)
        self.results: dict[str, Any] = {}
        self._images, self._started = 0, 0.0

    def on_predict_start(self) -> None:
        """Start the clock and the count."""
        self.metric.reset()
        self._images = 0
        self._started = time.perf_counter()

    def predict_step(self, batch: Work, batch_index: int) -> None:
        """Segment one image and count its pixels."""
        sample = batch.sample
        labels = self.segment(sample)
        if not batch.counted:
            return
        self.metric.update(labels[None], sample.target[None])
        self._images += 1
        if batch.index < self.pictures:
            picture = panel(sample, labels, self.names, self.benchmark.ignore_index)
            save_picture(picture, self.folder / "pictures" / f"{sample.name}.png")

    def segment(self, sample: Sample) -> Tensor:
        """Return the label map [H, W] of class indices."""
        if self.benchmark.vocabulary == "full":
            labels: Tensor = self.segmenter(
                sample.image, self.text, row_classes=self.row_classes
            ).labels
            return labels
        offered = present_classes(sample.target, self.benchmark.ignore_index)
        prompted = [index - self.offset for index in offered if index >= self.offset]
        if not prompted:
            return torch.zeros_like(sample.target)
        chosen = torch.tensor(prompted, device=self.text.device)
        rows = torch.isin(self.row_classes, chosen)
        local = torch.searchsorted(chosen, self.row_classes[rows])
        labels = self.segmenter(sample.image, self.text[rows], row_classes=local).labels
        back = torch.cat([torch.zeros_like(chosen[: self.offset]), chosen + self.offset])
        return back[labels]

    def on_predict_epoch_end(self) -> None:
        """Add up the ranks' confusion matrices and compute the figures."""
        with self.metric.sync_context():
            confusion = self.metric.confmat.clone()
        images = torch.tensor(float(self._images), device=confusion.device)
        total = self.trainer.strategy.reduce(images, reduce_op="sum")
        per_class = per_class_iou(confusion)
        self.results = {
            "benchmark": self.benchmark.name,
            "miou": 100 * float(self.metric.compute()),
            "pixel_accuracy": 100 * pixel_accuracy(confusion),
            "per_class": {
                name: None if iou is None else 100 * iou
                for name, iou in zip(self.names, per_class, strict=True)
            },
            "images": int(total),
            "seconds": time.perf_counter() - self._started,
        }
        if self.results_file is not None and self.trainer.is_global_zero:
            write_json(self.results_file, self.results)
