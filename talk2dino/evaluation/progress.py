"""The progress bar of an evaluation: images, the mIoU so far, images per second, time left."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from talk2dino.evaluation.module import SegmentationModule

LOG_SECONDS = 30.0


class EvaluationProgress(ProgressBar):
    """Shows the share of the first rank; its mIoU is an estimate until all ranks are summed.

    In a log file, which cannot show a bar, a line is printed every half minute.

    Args:
        console: where to; None takes the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
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
            TextColumn("{task.description}"),
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
