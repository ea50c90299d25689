"""What a training leaves in its run folder.

| file | callback |
| --- | --- |
| `projection.safetensors` | `SaveProjection` |
| `metrics.json`, `retrieval.md`, `loss.png` | `SaveMetrics` |
| `heads.json`, `heads.png` | `RecordHeads` |
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.alignment.inputs import projected_text, projected_visual
from talk2dino.alignment.module import AlignmentModule, gather_rows
from talk2dino.alignment.similarity import Similarity, head_choice
from talk2dino.errors import ConfigError
from talk2dino.evaluation.runs import read_config
from talk2dino.evaluation.tables import markdown_table
from talk2dino.files import refuse_foreign_run, replacing, write_json, write_text
from talk2dino.training.trackers import show_picture, show_table

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "val/text_to_image/", "val/image_to_text/"
RETRIEVAL = ("recall@1", "recall@5", "recall@10", "median_rank", "mean_rank")
METRICS = [direction + name for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT) for name in RETRIEVAL]


def refuse_foreign_files(folder: Path, resume: bool) -> None:
    """Refuse to overwrite what no training wrote; one is known by its `config.yaml`.

    A checkpoint to go on from may lie there alone.

    Raises:
        ConfigError: the first such file.
    """
    known = {"projection", "similarity", "loss", "optimizer", "store"}
    refuse_foreign_run(
        folder,
        lambda: known <= read_config(folder / "config.yaml").keys(),
        (
            *("config.yaml", "projection.safetensors", "metrics.json", "retrieval.md"),
            *("loss.png", "heads.json", "heads.png", "logs/metrics.csv", "logs/hparams.yaml"),
            *(() if resume else ("checkpoints/last.ckpt", "checkpoints/best.ckpt")),
        ),
    )


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
        projection = module.projection
        if self.best is not None and self.best.best_model_path:
            projection = read_checkpoint(Path(self.best.best_model_path)).projection
        save_projection(projection, self.path, module.encoders)


class SaveMetrics(L.Callback):
    """Collects the logged metrics; at the end writes `metrics.json`, `retrieval.md`, `loss.png`.

    `metrics.json`: `steps`, `seconds` of training, the last `train/loss`, `validation` with the
    metrics of every validation, and `result`, those of the weights in `projection.safetensors`.
    What it collected is part of every checkpoint, so a resumed run's curves are complete.

    Args:
        folder: run folder.
        best: keeps the best checkpoint, whose step `result` belongs to; None takes the last.
    """

    state_key = "LossCurve"  # in checkpoints, the name of this class in version 0.1

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
        """Remember the metrics of every validation."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if metrics and not trainer.sanity_checking:
            self.validation.append({"step": trainer.global_step, **metrics})

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
        """Go on with the metrics of a checkpoint."""
        self.train = list(zip(state_dict["steps"].tolist(), state_dict["losses"], strict=True))
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
            write_text(self.folder / "retrieval.md", markdown_table(columns, rows))
            show_table(trainer, "retrieval", columns, rows)

    def result(self) -> dict[str, float]:
        """The validation of the weights that are kept; empty without any."""
        if not self.validation:
            return {}
        if self.best is None:
            return self.validation[-1]
        if self.best.monitor in METRICS:
            choose = max if self.best.mode == "max" else min
            monitor = str(self.best.monitor)
            return choose(self.validation, key=lambda row: row[monitor])  # the first, as Lightning
        if not self.best.best_model_path:
            return self.validation[-1]
        kept = torch.load(self.best.best_model_path, mmap=True, weights_only=True)
        before = [row for row in self.validation if row["step"] <= kept["global_step"]]
        return before[-1] if before else {}

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started


class RecordHeads(L.Callback):
    """Writes `heads.json` and `heads.png`: which attention head each caption chose.

    The choice is that of `max_score` in the last epoch, with the weights that the training step
    uses, before its update. An epoch that was resumed in its middle, or that `trainer.max_steps`
    cut short, is recorded as far as it ran. `heads.json` holds the number of the `epoch` (from 0),
    how many captions chose each head (`captions_per_head`), and columns with one entry per
    caption: `caption_id`, `image_id` and `head`.

    Args:
        folder: run folder.
        similarity: of training.

    Raises:
        ConfigError: the similarity does not compare one vector per caption with heads.
    """

    def __init__(self, folder: Path, similarity: Similarity) -> None:
        if (
            similarity.field != "disentangled_self_attn"
            or similarity.text_field == "token_embeddings"
        ):
            raise ConfigError(
                f"record_heads=true: similarity.field={similarity.field} with "
                f"similarity.text_field={similarity.text_field} has no choice of a head; use "
                "similarity=max_score or record_heads=false"
            )
        self.folder = folder
        self.similarity = similarity
        self._rows: list[Tensor] = []  # [B, 3]: caption id, image id, head
        self._epoch, self._heads = 0, 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Forget the epoch before."""
        self._rows.clear()
        self._epoch = trainer.current_epoch

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Any], *_: Any
    ) -> None:
        """Remember the choices of this rank's batch."""
        if not may_be_last_epoch(trainer):
            return
        assert isinstance(module, AlignmentModule)
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            text = projected_text(batch, module.projection, self.similarity)[0]
            heads = projected_visual(batch, module.projection, self.similarity)
            choice = head_choice(text, heads, self.similarity.cosine)
        self._heads = heads.shape[1]
        self._rows.append(torch.stack([batch["caption_id"], batch["image_id"], choice], dim=1))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Bring all ranks' choices together; the first rank writes both files."""
        if not self._rows:
            return
        rows = gather_rows(torch.cat(self._rows)).cpu()  # ranks have equally many
        if not trainer.is_global_zero:
            return
        rows = rows[rows[:, 0].argsort(stable=True)]
        counts = torch.bincount(rows[:, 2], minlength=self._heads).tolist()
        columns = dict(zip(("caption_id", "image_id", "head"), rows.T.tolist(), strict=True))
        content = {"epoch": self._epoch, "captions_per_head": counts, **columns}
        write_text(self.folder / "heads.json", json.dumps(content) + "\n")
        with replacing(self.folder / "heads.png") as path:
            draw_histogram(path, counts)
        show_picture(trainer, "heads", self.folder / "heads.png")


def may_be_last_epoch(trainer: L.Trainer) -> bool:
    """False only if another epoch is certain to follow."""
    last = trainer.max_epochs
    stops_early = trainer.max_steps != -1 or trainer.early_stopping_callbacks
    return last is None or last == -1 or bool(stops_early) or trainer.current_epoch == last - 1


def retrieval_table(result: dict[str, float]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a validation: one row per direction."""
    directions = {"text → image": TEXT_TO_IMAGE, "image → text": IMAGE_TO_TEXT}
    rows = [[name, *(result[key + m] for m in RETRIEVAL)] for name, key in directions.items()]
    return ["direction", *RETRIEVAL], rows


def draw_curves(
    path: Path, train: list[tuple[int, float]], validation: list[dict[str, float]]
) -> None:
    """Draw the loss of every step and, below it, the recalls of every validation."""
    from matplotlib.figure import Figure

    recalls = [
        key for key in (validation[-1] if validation else {}) if "text_to_image/recall@" in key
    ]
    rows = 2 if recalls else 1
    figure = Figure(figsize=(7, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(*zip(*train, strict=True), linewidth=1)
    axes[0].set_ylabel("loss")
    for key in recalls:
        points = [(row["step"], row[key]) for row in validation]
        axes[1].plot(*zip(*points, strict=True), marker="o", label=key.rpartition("/")[2])
    if recalls:
        axes[1].set_ylabel("text → image, %")
        axes[1].legend()
    axes[-1].set_xlabel("step")
    figure.savefig(path, format="png", dpi=110)


def draw_histogram(path: Path, counts: list[int]) -> None:
    """Draw a bar per head: the share of the captions that chose it, in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    total = sum(counts)
    axes.bar(range(len(counts)), [100 * count / total for count in counts])
    axes.axhline(100 / len(counts), linestyle="--", linewidth=1, color="gray")  # no preference
    axes.set_xticks(range(len(counts)))
    axes.set_xlabel("head")
    axes.set_ylabel(f"% of {total} captions")
    figure.savefig(path, format="png", dpi=110)
