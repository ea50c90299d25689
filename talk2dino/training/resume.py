"""Resuming: a training that was killed and started again equals one that was not, bit for bit.

Lightning's checkpoint holds weights, optimizer, schedule, counters, and the data module's position.
Four things are added here:

- `SeedSteps`: the random numbers of a step do not depend on what was drawn before;
- `LastCheckpoint`: `last.ckpt` is written only where no step, epoch or validation is half done;
- `AtomicCheckpointIO`: the file is complete whenever the process dies;
- `refuse_other_settings`: a run goes on with the settings that it was begun with, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.files import replacing, user_path
from talk2dino.renamed import first_difference, flatten

STOPPED, SETTINGS = "stopped_early", "settings"  # keys of a checkpoint
# Config keys that decide the weights. Not here: how long a run is, and the order of the batches,
# which `EpochBatchSampler` compares.
DECIDING = (
    *("projection", "similarity", "loss", "words", "optimizer", "scheduler", "seed", "ema"),
    *("data.captions", "data.val_fraction"),
    *("trainer.precision", "trainer.accumulate_grad_batches", "trainer.limit_train_batches"),
    *("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.overfit_batches"),
)
VALIDATION = ("val_similarity", "val_store.shards_sha256")
# Without effect if the first is 0.
MIXTURE = (
    *("words.mixture", "words.mixture_per_step", "words.mixture_patches"),
    *("words.concentration", "words.unexplained"),
)


def checkpoint_to_resume(folder: Path, resume: bool, ckpt_path: str | None) -> str | None:
    """`last.ckpt` of this run folder with `resume`, if there is one; else `ckpt_path`.

    Raises:
        ConfigError: `ckpt_path` does not exist.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if resume and last.is_file():
        return str(last)
    if resume:
        print(f"resume=true: {last} is not there, so training begins")
    if ckpt_path is None:
        return None
    if not user_path(ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file; give a run's last.ckpt")
    return str(user_path(ckpt_path))


def deciding_settings(config: Mapping[str, Any], store: FeatureStore) -> dict[str, Any]:
    """Plain values that decide the weights of a run: those of the config, and what was encoded.

    Validation decides where the best weights are kept, or training stops early.
    """
    flat = flatten(config)
    chooses = flat.get("checkpoint.monitor") or flat.get("early_stopping.patience") is not None
    validation = {key: value for key, value in flat.items() if key.startswith(VALIDATION[0])}
    other = config.get("val_store")
    validation |= {VALIDATION[1]: _digest(FeatureStore(other)) if other else None}
    chosen = {
        key: value
        for key, value in flat.items()
        if any(f"{key}.".startswith(f"{one}.") for one in DECIDING) and value != {}  # words=none
    }
    if not chosen.get("words.mixture"):  # runs of before have no such keys
        chosen = {key: value for key, value in chosen.items() if key not in MIXTURE}
    encoders = {
        f"store.{kind}": info and (info.weights_sha256 or info.name)
        for kind, info in (("vision", store.vision), ("text", store.text))
    }
    chosen |= validation if chooses else {}
    return {**chosen, **encoders, "store.shards_sha256": _digest(store)}


def _digest(store: FeatureStore) -> str:
    return sha256("".join(one.sha256 for one in store.manifest.shards).encode()).hexdigest()


def refuse_other_settings(
    file: str, settings: Mapping[str, Any], description: Mapping[str, Any]
) -> None:
    """Refuse to go on from a checkpoint of other settings, of which the first is named.

    Args:
        file: the checkpoint.
        settings: of this run, from `deciding_settings`.
        description: of the module; compared with checkpoints that hold no settings (of versions
            before they did).

    Raises:
        ConfigError: settings differ, or the file is no checkpoint of a training.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found = content.get(SETTINGS)
        old, new = (content["talk2dino"], description) if found is None else (found, settings)
        if found and found.get("ema.decay") is None:  # an average may begin at any time
            new = {**new, "ema.decay": None}
        if found and VALIDATION[1] not in found:  # of version 0.1, or nothing was chosen by it
            new = {key: value for key, value in new.items() if not key.startswith(VALIDATION)}
        content["loops"], content["optimizer_states"]
    except Exception as error:  # torch raises whatever the broken bytes lead to
        raise ConfigError(
            f"{file}: no checkpoint of a training that can be loaded ({type(error).__name__}); "
            "remove it to start anew, or give a run's last.ckpt"
        ) from error
    other = first_difference(old, new)
    if other is not None:
        key, before, now = other
        raise ConfigError(
            f"{file}: this run was begun with {key}={before!r}, now {key}={now!r}; use the old "
            "value, or start anew in another folder (hydra.run.dir=DIR)"
        )
    if found is None:
        rank_zero_info(f"{file}: an older version's; only projection and encoders were compared")


def keep_logs(folder: Path) -> None:
    """Rename an earlier run's `metrics.csv`, which the CSV logger would overwrite."""
    old = folder / "logs" / "metrics.csv"
    if old.is_file():
        names = (old.with_name(f"metrics.{number}.csv") for number in count(1))
        old.rename(next(name for name in names if not name.exists()))


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
        settings: of the run, stored in every checkpoint; see `refuse_other_settings`.

    Raises:
        ConfigError: `every_n_steps` is below 1.
    """

    def __init__(
        self,
        path: Path,
        every_n_steps: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"checkpoint.every_n_steps={every_n_steps}: use 1 or more, or null")
        self.path, self.every_n_steps, self.settings = path, every_n_steps, settings
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
        """Note whether early stopping has ended the run, and the settings."""
        checkpoint[STOPPED] = trainer.should_stop
        if self.settings is not None:
            checkpoint[SETTINGS] = dict(self.settings)

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
        with replacing(target) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


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
