"""The LightningModule of evaluation, `trainer.predict` over a benchmark, and its progress bar."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from talk2dino.datasets.benchmarks.base import Benchmark, Sample, present_classes
from talk2dino.datasets.benchmarks.classes import ClassList, Color
from talk2dino.errors import DataError
from talk2dino.evaluation.datamodule import SampleBatch, shared_groups
from talk2dino.evaluation.images import ImageFiles, write_examples
from talk2dino.evaluation.metrics import (
    FILE,
    count_pixels,
    mean_iou,
    mean_iou_metric,
    per_class_iou,
    pixel_accuracy,
    score_image,
    write_scores,
)
from talk2dino.evaluation.records import Record, Records
from talk2dino.files import replacing, write_json
from talk2dino.segmentation.segmenter import EncodedImage, Segmenter


@dataclass(frozen=True)
class OutputOptions:
    """What an evaluation writes besides its figures, and whether it goes on with what is there.

    Attributes:
        settings: everything that decides the figures; records of others are refused.
        resume: False drops the records that the folder holds.
        pictures: number of sheets with image, truth and prediction.
        label_maps: write every image's label map and overlay.
        examples: number of best and of worst images for the report.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = True
    pictures: int = 0
    label_maps: bool = False
    examples: int = 0


class SegmentationModule(L.LightningModule):
    """Segments every image of a benchmark and counts one confusion matrix over all ranks.

    Use `trainer.predict(module, data, return_predictions=False)` with the data module's
    `finished=module.finished`, then read `results`. Every finished image is recorded in
    `folder/records`; images that are recorded there are not segmented again.

    Args:
        segmenter: vision encoder and windows; only the encoder runs in the trainer's precision.
        benchmark: classes and protocol.
        text: [N, D] unit rows of the prompted classes and their synonyms.
        row_classes: [N] int64, the index of each row's class among the prompted ones.
        folder: everything is written below it; the first rank's folder counts.
        options: what to write and whether to resume.
        batch_size: that of the data module.
        results_file: the first rank writes the results there, for a parent that started the ranks
            and does not share their memory (strategy ddp_spawn).
        besides: plain values that are written beside the results.

    Raises:
        ConfigError: in `setup`, records of other settings.
        DataError: at the end, if no pixel counts.
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
        options: OutputOptions | None = None,
        batch_size: int = 1,
        results_file: Path | None = None,
        besides: Mapping[str, Any] = {},
    ) -> None:
        super().__init__()
        self.segmenter, self.benchmark = segmenter, benchmark
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("row_classes", row_classes, persistent=False)
        self.folder, self.options = folder, options or OutputOptions()
        self.batch_size, self.results_file, self.besides = batch_size, results_file, besides
        classes = benchmark.class_list
        self.names = classes.names
        self.offset = int(classes.has_background)
        self.metric = mean_iou_metric(len(self.names), benchmark.ignore_index)
        self.files = ImageFiles(
            folder,
            self.names,
            benchmark.ignore_index,
            self.options.pictures,
            self.options.label_maps,
            _palette(classes),
        )
        self.records = Records(folder / "records")
        self.results: dict[str, Any] = {}
        self.done = self.share = 0  # images of this rank
        self._kept: dict[int, Record] = {}
        self._earlier = self._started = 0.0

    def setup(self, stage: str) -> None:
        """Take the first rank's folder, and find out what is finished."""
        strategy = self.trainer.strategy
        folder = Path(strategy.broadcast(str(self.folder)))  # a clock in its name may differ
        self.folder, self.files = folder, replace(self.files, folder=folder)
        self.records = Records(folder / "records")
        if self.trainer.is_global_zero:
            every = (self.benchmark.image_name(index) for index in range(len(self.benchmark)))
            files = [str(p) for i, name in enumerate(every) for p in self.files.paths(i, name)]
            self.records.claim(self.options.settings, self.options.resume, files)
        strategy.barrier()
        mine = self._share()
        self._kept = {
            index: record
            for index, record in self._recorded().items()
            if index in mine and all(p.is_file() for p in self.files.paths(index, record.name))
        }
        self.done, self.share = len(self._kept), len(mine)
        self._earlier = self.records.seconds()

    def _recorded(self) -> dict[int, Record]:
        """The finished images of the benchmark by index; it may have lost or gained images."""
        known = self.records.read()
        names = map(self.benchmark.image_name, range(len(self.benchmark)))
        return {index: known[name] for index, name in enumerate(names) if name in known}

    def _share(self) -> set[int]:
        trainer, length = self.trainer, len(self.benchmark)
        groups = shared_groups(length, self.batch_size, trainer.global_rank, trainer.world_size)
        return {index for group in groups for index in group}

    def finished(self) -> Collection[int]:
        """Images of this rank that an earlier run has finished."""
        return self._kept.keys()

    def on_predict_start(self) -> None:
        """Start the clock, and the count with what is finished."""
        self.metric.reset()
        ignored = torch.full((1, 1), self.benchmark.ignore_index, device=self.device)
        self.metric.update(torch.zeros_like(ignored), ignored)  # counts nothing: a metric that
        for record in self._kept.values():  # never saw an update warns
            self.metric.confmat += record.confusion(len(self.names)).to(self.device)
        self._started = time.perf_counter()

    def predict_step(self, batch: SampleBatch, batch_index: int) -> None:
        """Segment the images of a step, count their pixels, and record each."""
        with torch.no_grad():
            encoded = self.segmenter.encode_batch([sample.image for sample in batch.samples])
        for index, sample, one in zip(batch.indices, batch.samples, encoded, strict=True):
            if index in self._kept:
                continue
            labels = self._label(sample, one)
            before = self.metric.confmat.clone()
            count_pixels(self.metric, labels, sample.target)
            self.files.write(index, sample, labels)
            counts = self.metric.confmat - before
            seconds = time.perf_counter() - self._started
            self.records.add(Record.of(sample.name, counts, seconds), self.global_rank)
            self.done += 1

    def segment(self, sample: Sample) -> Tensor:
        """Return the label map [H, W] of class indices of one image."""
        return self._label(sample, self.segmenter.encode_batch([sample.image])[0])

    def _label(self, sample: Sample, encoded: EncodedImage) -> Tensor:
        """Decide the classes in float32, whatever the encoder's precision."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.benchmark.vocabulary == "full":
                return self.segmenter.labels(encoded, self.text, row_classes=self.row_classes)
            offered = present_classes(sample.target, self.benchmark.ignore_index)
            prompted = [index - self.offset for index in offered if index >= self.offset]
            if not prompted:
                return torch.zeros_like(sample.target)
            chosen = torch.tensor(prompted, device=self.text.device)
            rows = torch.isin(self.row_classes, chosen)
            local = torch.searchsorted(chosen, self.row_classes[rows])
            labels = self.segmenter.labels(encoded, self.text[rows], row_classes=local)
            back = torch.cat([torch.zeros_like(chosen[: self.offset]), chosen + self.offset])
            return back[labels]

    def running_miou(self) -> float:
        """The mIoU of what this rank has counted so far, in percent."""
        return 100 * mean_iou(self.metric.confmat.cpu())

    def on_predict_epoch_end(self) -> None:
        """Add up the ranks' confusion matrices and compute the figures."""
        self.records.close()
        with self.metric.sync_context():
            confusion = self.metric.confmat.clone()
        images = torch.tensor(float(self.done), device=confusion.device)
        total = self.trainer.strategy.reduce(images, reduce_op="sum")
        if not confusion.any():
            raise DataError(
                f"benchmark={self.benchmark.name}: all pixels of its {int(total)} images are "
                f"ignored ({self.benchmark.ignore_index}), so there is nothing to count; see "
                "benchmark.ignore_index and benchmark.label_map"
            )
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
            "seconds": self._earlier + time.perf_counter() - self._started,
        }
        if self.trainer.is_global_zero:
            self._write(confusion.cpu().numpy())

    def _write(self, confusion: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Write what the first rank writes at the end."""
        scores = [score_image(i, r, self.names) for i, r in self._recorded().items()]
        write_scores(self.folder / FILE, scores)
        with replacing(self.folder / "confusion.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, confusion=confusion, classes=np.array(self.names))
        count = self.options.examples
        write_examples(scores, count, self.benchmark, self._again, self.folder)
        if self.results_file is not None:
            write_json(self.results_file, self.results | dict(self.besides))

    def _again(self, sample: Sample) -> Tensor:
        moved = SampleBatch([0], [sample]).to(self.device).samples[0]
        return self.segment(moved)


def _palette(classes: ClassList) -> list[Color] | None:
    """The dataset's own colors, if every class has one."""
    colors = [spec.color for spec in classes.classes if spec.color is not None]
    return colors if len(colors) == len(classes.classes) else None


LOG_SECONDS = 30.0


class EvaluationProgress(ProgressBar):
    """Shows the share of the first rank; its mIoU is an estimate until all ranks are summed.

    In a log file, which cannot show a bar, a line is printed every half minute.

    Args:
        console: where to; None takes the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(markup=False, emoji=False)
        self._enabled = True
        self._bar: Progress | None = None
        self._begun = self._logged = 0.0
        self._first = 0

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning to show the bar again."""
        self._enabled = True

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how much an earlier run has left to do, and show the bar."""
        assert isinstance(pl_module, SegmentationModule)
        if not self._enabled:
            return
        self._first, total = pl_module.done, pl_module.share
        self._begun = self._logged = time.monotonic()
        if self._first:
            self.console.print(
                f"{self._first} of {total} images were finished before in this folder "
                "(resume=false starts anew)",
                highlight=False,
            )
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("mIoU {task.fields[miou]:.1f}  {task.fields[rate]:.2f} images/s"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.add_task(
            pl_module.benchmark.name, total=total, completed=self._first, miou=0.0, rate=0.0
        )
        self._bar.start()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar, or print a line now and then."""
        assert isinstance(pl_module, SegmentationModule)
        if not self._enabled:
            return
        now = time.monotonic()
        rate = (pl_module.done - self._first) / max(now - self._begun, 1e-9)
        if self._bar is not None:
            task = self._bar.tasks[0].id
            miou = pl_module.running_miou()
            self._bar.update(task, completed=pl_module.done, miou=miou, rate=rate)
        elif now - self._logged > LOG_SECONDS:
            self._logged = now
            self.console.print(
                f"{pl_module.benchmark.name}: {pl_module.done} of {pl_module.share} images, "
                f"mIoU {pl_module.running_miou():.1f}, {rate:.2f} images/s",
                highlight=False,
            )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it ended."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Free the terminal for the error."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
