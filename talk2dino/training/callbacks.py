"""The callbacks of a training run in the order in which they act, and the average of its weights.

`results.py`, `resume.py` and `sample_segmentations.py` have the callbacks; this file chooses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from talk2dino.alignment.similarity import Similarity
from talk2dino.config import command
from talk2dino.config.checks import unknown
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.sweeps.study import PruneTrial
from talk2dino.training.results import METRICS, RecordHeads, SaveMetrics, SaveProjection
from talk2dino.training.resume import LastCheckpoint, SeedSteps, deciding_settings
from talk2dino.training.sample_segmentations import SampleSegmentations

TRAIN_LOSS = "train/loss"


def callbacks(
    config: DictConfig, folder: Path, store: FeatureStore, similarity: Similarity, validates: bool
) -> list[L.Callback]:
    """All callbacks; their order matters where several use the same hook.

    The sample segmentations come before the average of the weights, which at the end of a
    validation gives the module its own weights back. Checkpoints are written after all others have
    acted, and the last one after the best one, whose path it stores.

    Args:
        config: of train.yaml.
        folder: run folder.
        store: names the encoders that sample segmentations need.
        similarity: of training.
        validates: whether there is anything to validate on.

    Raises:
        ConfigError: a monitored metric that does not exist, or another value out of range.
    """
    best = best_checkpoint(config, folder, validates)
    chosen: list[L.Callback] = [SeedSteps(config.seed)]
    if config.trainer.get("enable_progress_bar", True):
        chosen.append(RichProgressBar())
    if config.sample_segmentations.images:
        chosen.append(SampleSegmentations(folder, store, **config.sample_segmentations))
    if config.ema.decay is not None:
        chosen.append(AverageWeights(config.ema.decay))
    if config.early_stopping.patience is not None:
        check_metric("early_stopping.monitor", config.early_stopping.monitor, validates)
        check_mode("early_stopping.mode", config.early_stopping.mode)
        chosen.append(EarlyStopping(**config.early_stopping))
    if config.sweep.trial is not None:
        node = config.sweep
        check_metric("sweep.metric", node.metric, validates)
        pruner = command.build(node.pruner) if node.pruner else None
        chosen.append(PruneTrial(folder, node.metric, node.mode, node.storage, node.trial, pruner))
    chosen += [SaveProjection(folder, best), SaveMetrics(folder, best)]
    if config.record_heads:
        chosen.append(RecordHeads(folder, similarity))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    last = LastCheckpoint(
        folder / "checkpoints" / "last.ckpt",
        config.checkpoint.every_n_steps,
        deciding_settings(plain, store),
    )
    return [*chosen, *([best] if best else []), last]


def best_checkpoint(config: DictConfig, folder: Path, validates: bool) -> ModelCheckpoint | None:
    """`best.ckpt`, or the best k by their epochs; None without a monitored metric."""
    node = config.checkpoint
    if node.monitor is None:
        return None
    check_metric("checkpoint.monitor", node.monitor, validates)
    check_mode("checkpoint.mode", node.mode)
    if node.save_top_k < 1:
        raise ConfigError(
            f"checkpoint.save_top_k={node.save_top_k}: use 1 or more; with "
            "checkpoint.monitor=null no best checkpoint is kept"
        )
    return ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="best" if node.save_top_k == 1 else "best-epoch={epoch}-step={step}",
        auto_insert_metric_name=False,
        monitor=node.monitor,
        mode=node.mode,
        save_top_k=node.save_top_k,
        enable_version_counter=False,
    )


def check_mode(key: str, mode: str) -> None:
    """Refuse what is neither max nor min (ConfigError)."""
    if mode not in ("max", "min"):
        raise ConfigError(f"{key}={mode}: choose max or min")


def check_metric(key: str, metric: str | None, validates: bool) -> None:
    """Refuse a metric that the run will not log.

    Raises:
        ConfigError: it does not exist, or needs validation data that is not there.
    """
    names = [*METRICS, TRAIN_LOSS]
    if metric not in names:
        raise ConfigError(unknown("metric", f"{key}={metric}", [f"{key}={name}" for name in names]))
    if metric != TRAIN_LOSS and not validates:
        raise ConfigError(
            f"{key}={metric}: there is nothing to validate on; give val_store=DIR or a "
            f"data.val_fraction above 0, or use {key}={TRAIN_LOSS}"
        )


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights, a <- d a + (1 - d) w after every optimizer step.

    Lightning's callback validates the average, writes it as the `state_dict` of every checkpoint
    (the optimizer's own weights lie beside it as `current_model_state`) and leaves it in the module
    when training ends. Added here:

    - the average starts from the first weights, and d is min(decay, (1 + n) / (10 + n)) after n
      steps (the warm-up of TensorFlow's ExponentialMovingAverage), so that a short run is not
      dominated by them;
    - the average lies where the weights lie; Lightning makes it before it moves the module;
    - a run that is resumed at its end, and so does not train, ends with the average as well;
    - checkpoints of version 0.1 are read, which name the optimizer's weights `raw_state_dict`.

    Args:
        decay: largest share of the average that stays at each step, 0 < decay < 1.

    Raises:
        ConfigError: the decay is out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"ema.decay={decay}: use a value between 0 and 1, or null")
        super().__init__(use_buffers=False, avg_fn=self._moved)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the first weights and count them, so that the first step does not replace them."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged.fill_(1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the module to its device; the count stays on the CPU, where reading it is free."""
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What `on_train_end` does, also if there was nothing left to train."""
        self.on_train_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the number of the last step; version 0.1 calls it `steps`."""
        super().load_state_dict({"latest_update_step": state_dict.get("steps"), **state_dict})

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the average and the optimizer's weights out of a checkpoint."""
        if "raw_state_dict" in checkpoint:
            steps = checkpoint["callbacks"][self.state_key]["steps"]
            checkpoint["current_model_state"] = checkpoint.pop("raw_state_dict")
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(1 + steps)}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _moved(self, average: Tensor, weights: Tensor, _: Tensor | int) -> Tensor:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        return average.lerp(weights.to(average.dtype), 1 - decay)
