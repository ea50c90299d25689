"""What training leaves in the run folder: weights without pickle, and the curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.module import AlignmentModule
from talk2dino.atomic import replacing, write_json


class SaveProjection(L.Callback):
    """Writes `projection.safetensors` when training ends, with the encoders' specs.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "projection.safetensors"

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the trained projection."""
        assert isinstance(module, AlignmentModule)
        description = module.description()
        del description["projection"]  # save_projection says it again
        save_projection(module.projection, self.path, description)


class LossCurve(L.Callback):
    """Collects the logged figures; at the end writes `metrics.json` and `loss.png`.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train: list[tuple[int, Tensor]] = []
        self.validation: list[dict[str, float]] = []

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

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write both files."""
        if not self.train:
            return
        losses = [(step, float(loss)) for step, loss in self.train]
        last = losses[-1][1]
        write_json(
            self.folder / "metrics.json",
            {"steps": trainer.global_step, "train/loss": last, "validation": self.validation},
        )
        with replacing(self.folder / "loss.png") as path:
            draw_curves(path, losses, self.validation)


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
