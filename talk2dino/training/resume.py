"""Resuming: a training that was killed and started again equals one that was not, bit for bit.

Lightning's checkpoint holds weights, optimizer, schedule, counters, and the data module's position.
Three things are added here:

- `SeedSteps`: the random numbers of a step do not depend on what was drawn before;
- `LastCheckpoint`: `last.ckpt` is written only where no step, epoch or validation is half done;
- `AtomicCheckpointIO`: the file is complete whenever the process dies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from talk2dino.errors import ConfigError
from talk2dino.files import replacing

STOPPED = "stopped_early"  # key of a checkpoint


def checkpoint_to_resume(folder: Path, resume: bool, ckpt_path: str | None) -> str | None:
    """`last.ckpt` of this run folder with `resume`, if there is one; else `ckpt_path`.

    Raises:
        ConfigError: `ckpt_path` does not exist.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if resume and last.is_file():
        return str(last)
    if ckpt_path is not None and not Path(ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file; give a run's last.ckpt")
    return ckpt_path


def keep_logs(folder: Path) -> None:
    """Rename an earlier run's `metrics.csv`, which the CSV logger would overwrite."""
    old = folder / "logs" / "metrics.csv"
    if old.is_file():
        number = len(list(old.parent.glob("metrics.*.csv"))) + 1
        old.rename(old.with_name(f"metrics.{number}.csv"))


class SeedSteps(L.Callback):
    """Seeds torch's generators at every training step from (seed, rank, epoch, batch).

    What a step draws (patches of `Dense`, heads of `SampledHead`) then depends neither on what was
    drawn before nor on whether the run was resumed.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int
    ) -> None:
        """Seed the CPU's and every GPU's generator."""
        # `trainer.current_epoch` lags behind in a resumed run that `max_steps` ends.
        progress: Any = trainer.fit_loop.epoch_progress.current
        entropy = [self.seed, trainer.global_rank, progress.processed, batch_index]
        words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]) >> 1)  # torch wants a signed number


class LastCheckpoint(Checkpoint):
    """Writes the checkpoint to resume from, at the end of every epoch and every so many steps.

    It is never written between two batches of one optimizer step, whose gradients a checkpoint does
    not hold, and never between a batch and the validation that follows it, which Lightning would
    skip on resuming: it is written after that validation instead.

    Args:
        path: of the checkpoint, overwritten each time.
        every_n_steps: optimizer steps between two of them within an epoch; None for none.

    Raises:
        ConfigError: `every_n_steps` is below 1.
    """

    def __init__(self, path: Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps={every_n_steps}: use 1 or more, or null")
        self.path, self.every_n_steps = path, every_n_steps
        self._step = 0
        self._due = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remember the step from which this run goes on."""
        self._step, self._due = trainer.global_step, False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_index: int,
    ) -> None:
        """Save after an optimizer step, or note that it is due after the validation."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not stepped or not self.every_n_steps or self._step % self.every_n_steps:
            return
        if trainer.is_last_batch:
            return  # the end of the epoch follows
        if validates_after(trainer, batch_index):
            self._due = True
        else:
            trainer.save_checkpoint(self.path, False)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save what became due before this validation."""
        if self._due:
            self._due = False
            trainer.save_checkpoint(self.path, False)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save; the epoch's validation is over."""
        trainer.save_checkpoint(self.path, False)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether early stopping has ended the run."""
        checkpoint[STOPPED] = trainer.should_stop

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Do not train a run again that early stopping has ended; see `_begin_next_epoch`."""
        trainer.should_stop = bool(checkpoint.get(STOPPED))
        if trainer.max_steps != -1:
            _begin_next_epoch(checkpoint["loops"]["fit_loop"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints under another name first, so that none is ever half written.

    Lightning renames too, but from the system's folder for temporary files, which is a copy if that
    folder is on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save with `torch.save`; Lightning saves to paths with a protocol (`s3://`)."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            torch.save(checkpoint, temporary)


def validates_after(trainer: L.Trainer, batch_index: int) -> bool:
    """Whether a validation follows this batch within the epoch (`val_check_interval`)."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    if trainer.check_val_every_n_epoch is None:  # the interval counts across epochs
        return (trainer.fit_loop.total_batch_idx + 1) % int(every) == 0
    this_epoch = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
    return this_epoch and (batch_index + 1) % int(every) == 0


def _begin_next_epoch(loop: dict[str, Any]) -> None:
    """Turn the state of a finished epoch into that of an epoch that is about to begin.

    Lightning does so itself, except with `max_steps`: there it passes through the finished epoch
    once more, without a batch, and counts it twice.
    """
    epoch, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epoch["current"]["completed"] == epoch["current"]["processed"]:
        return  # in the middle of an epoch
    for counts in (epoch["current"], epoch["total"]):
        counts["completed"] = counts["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    # The step that the loggers show: Lightning adds one in its first pass, which trains nothing.
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
