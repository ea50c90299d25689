"""What training leaves behind: weights without pickle, figures, curves, and what trackers show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.alignment.module import AlignmentModule
from talk2dino.files import replacing, write_json
from talk2dino.tables import markdown_table


def boards(trainer: L.Trainer) -> list[tuple[Any, Any]]:
    """Every logger, and what it writes to."""
    loggers: list[Any] = trainer.loggers
    return [(logger, logger.experiment) for logger in loggers]


def show_picture(trainer: L.Trainer, name: str, file: Path) -> None:
    """Give the picture `file` to every logger that takes pictures, under `name`."""
    for logger, board in boards(trainer):
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(name, [str(file)])
        elif hasattr(board, "add_image"):  # TensorBoard
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            board.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def show_table(
    trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Give a table to every logger that takes tables or text."""
    for logger, board in boards(trainer):
        if hasattr(logger, "log_table"):  # Weights & Biases
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])
        elif hasattr(board, "add_text"):  # TensorBoard
            board.add_text(name, markdown_table(columns, rows), trainer.global_step)


def close_loggers(trainer: L.Trainer) -> None:
    """Write everything out; the next run of a sweep in this process then starts its own."""
    for _, board in boards(trainer):
        for name in ("finish", "close"):  # of Weights & Biases, of TensorBoard
            if hasattr(board, name):
                getattr(board, name)()
                break


TEXT_TO_IMAGE, IMAGE_TO_TEXT = "val/text_to_image/", "val/image_to_text/"
FIGURES = ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank")
METRICS = [direction + name for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT) for name in FIGURES]


class SaveProjection(L.Callback):
    """Writes `projection.safetensors` when training ends, with the encoders' specs.

    Args:
        folder: run folder.
        best: keeps the best checkpoint; its weights are written instead of the last ones.
    """

    def __init__(self, folder: Path, best: ModelCheckpoint | None = None) -> None:
        self.path, self.best = folder / "projection.safetensors", best

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the trained projection."""
        assert isinstance(module, AlignmentModule)
        description = module.description()
        del description["projection"]  # save_projection says it again
        projection = module.projection
        if self.best is not None and self.best.best_model_path:
            projection = read_checkpoint(Path(self.best.best_model_path)).projection
        save_projection(projection, self.path, description)


class LossCurve(L.Callback):
    """Collects the logged figures; at the end writes `metrics.json`, `retrieval.md`, `loss.png`.

    `metrics.json`: `steps`, `seconds` of training, the last `train/loss`, `validation` with the
    figures of every validation, and `result`, those of the weights in `projection.safetensors`.
    What it collected is part of every checkpoint, so a resumed run's curves are whole.

    Args:
        folder: run folder.
        best: keeps the best checkpoint, whose step `result` belongs to; None takes the last.
    """

    def __init__(self, folder: Path, best: ModelCheckpoint | None = None) -> None:
        self.folder, self.best = folder, best
        self.train: list[tuple[int, Tensor]] = []
        self.validation: list[dict[str, float]] = []
        self._before, self._started = 0.0, time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Remember the loss of every step."""
        self.train.append((trainer.global_step, outputs["loss"].detach()))  # no device sync

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remember the validation figures of every epoch."""
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if figures and not trainer.sanity_checking:
            self.validation.append({"step": trainer.global_step, **figures})

    def state_dict(self) -> dict[str, Any]:
        """Steps `[N]` and losses `[N]` float32 so far, the validations, and the seconds."""
        steps = torch.tensor([step for step, _ in self.train], dtype=torch.int64)
        losses = [loss.float().cpu() for _, loss in self.train]
        return {
            "steps": steps,
            "losses": torch.stack(losses) if losses else torch.empty(0),
            "validation": self.validation,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figures of a checkpoint."""
        pairs = zip(state_dict["steps"].tolist(), state_dict["losses"], strict=True)
        self.train = list(pairs)
        self.validation = list(state_dict["validation"])
        self._before = float(state_dict["seconds"])

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the files, and show them to the loggers."""
        if not self.train:
            return
        losses = [(step, float(loss)) for step, loss in self.train]
        content = {
            "steps": trainer.global_step,
            "seconds": round(self._seconds(), 2),
            "train/loss": losses[-1][1],
            "result": self.result(),
            "validation": self.validation,
        }
        write_json(self.folder / "metrics.json", content)
        with replacing(self.folder / "loss.png") as path:
            draw_curves(path, losses, self.validation)
        show_picture(trainer, "curves", self.folder / "loss.png")
        if self.validation:
            columns, rows = retrieval_table(self.result())
            with replacing(self.folder / "retrieval.md") as path:
                path.write_text(markdown_table(columns, rows), encoding="utf-8")
            show_table(trainer, "retrieval", columns, rows)

    def result(self) -> dict[str, float]:
        """The validation of the weights that are kept; empty without any."""
        if not self.validation:
            return {}
        if self.best is None or self.best.monitor not in METRICS:
            return self.validation[-1]
        choose = max if self.best.mode == "max" else min
        monitor = str(self.best.monitor)
        return choose(self.validation, key=lambda row: row[monitor])  # the first, as Lightning

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started


def retrieval_table(result: dict[str, float]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a validation: one row per direction."""
    directions = {"text → image": TEXT_TO_IMAGE, "image → text": IMAGE_TO_TEXT}
    rows = [
        [name, *(result[key + figure] for figure in FIGURES)] for name, key in directions.items()
    ]
    return ["direction", *FIGURES], rows


def draw_curves(
    path: Path, train: list[tuple[int, float]], validation: list[dict[str, float]]
) -> None:
    """Draw the loss of every step and, below it, the recalls of every validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    recalls = [
        key for key in (validation[-1] if validation else {}) if "text_to_image/recall@" in key
    ]
    rows = 2 if recalls else 1
    figure = Figure(figsize=(7, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    steps, losses = zip(*train, strict=True)
    axes[0].plot(steps, losses, linewidth=1)
    axes[0].set_ylabel("loss")
    for key in recalls:
        points = [(row["step"], row[key]) for row in validation]
        axes[1].plot(*zip(*points, strict=True), marker="o", label=key.rpartition("/")[2])
    if recalls:
        axes[1].set_ylabel("text → image, %")
        axes[1].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path, format="png", dpi=110)
