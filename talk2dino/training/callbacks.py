"""The callbacks of a training run, chosen by its config, in the order in which they act."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig, OmegaConf

from talk2dino.alignment.similarity import Similarity
from talk2dino.config import command
from talk2dino.config.checks import unknown
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.sweeps.study import PruneTrial
from talk2dino.training.results import METRICS, RecordHeads, SaveMetrics, SaveProjection
from talk2dino.training.resume import LastCheckpoint, SeedSteps, deciding_settings
from talk2dino.training.sample_segmentations import SampleSegmentations
from talk2dino.training.weight_averaging import AverageWeights

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
