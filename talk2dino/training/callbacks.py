"""The callbacks of a training run, as its config wants them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig

from talk2dino import cli
from talk2dino.alignment.callbacks import METRICS, LossCurve, SaveProjection
from talk2dino.alignment.ema import AverageWeights
from talk2dino.alignment.exact_resume import LastCheckpoint, SeedSteps
from talk2dino.alignment.head_records import RecordHeads
from talk2dino.alignment.similarity import Similarity
from talk2dino.config_schema import unknown_key
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.sweeps.pruning import PruneTrial
from talk2dino.training.sample_segmentations import SampleSegmentations

TRAIN_LOSS = "train/loss"


def callbacks(
    config: DictConfig, folder: Path, store: FeatureStore, similarity: Similarity, validates: bool
) -> list[L.Callback]:
    """All callbacks; their order matters where several hooks meet.

    The sample segmentations come before the average, so that they see its weights during
    validation. Checkpoints are written when all others are done, and the last one after the best
    one, whose place it holds.

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
    last = last_checkpoint(config, folder)
    chosen: list[L.Callback] = [SeedSteps(config.seed)]
    if config.trainer.get("enable_progress_bar", True):
        chosen.append(RichProgressBar())
    if config.sample_segmentations.images:
        chosen.append(SampleSegmentations(folder, store, **config.sample_segmentations))
    if config.ema.decay is not None:
        if not 0 < config.ema.decay < 1:
            raise ConfigError(f"ema.decay={config.ema.decay}: use a value between 0 and 1, or null")
        chosen.append(AverageWeights(config.ema.decay))
    if config.early_stopping.patience is not None:
        check_metric("early_stopping.monitor", config.early_stopping.monitor, validates)
        check_mode("early_stopping.mode", config.early_stopping.mode)
        chosen.append(EarlyStopping(**config.early_stopping))
    if config.sweep.trial is not None:
        check_metric("sweep.metric", config.sweep.metric, validates)
        node = config.sweep
        pruner = cli.build(node.pruner) if node.pruner else None
        chosen.append(PruneTrial(folder, node.metric, node.mode, node.storage, node.trial, pruner))
    chosen += [SaveProjection(folder, best), LossCurve(folder, best)]
    if config.record_heads:
        chosen.append(RecordHeads(folder, similarity))
    return [*chosen, *([best] if best else []), last]


def last_checkpoint(config: DictConfig, folder: Path) -> LastCheckpoint:
    """`last.ckpt` at the end of every epoch, and every so many steps if that is asked for."""
    every = config.checkpoint.every_n_steps
    if every is not None and every < 1:
        raise ConfigError(f"checkpoint.every_n_steps={every}: use 1 or more, or null")
    return LastCheckpoint(folder / "checkpoints" / "last.ckpt", every)


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
    """Refuse what is neither max nor min.

    Raises:
        ConfigError: one line that names the key.
    """
    if mode not in ("max", "min"):
        raise ConfigError(f"{key}={mode}: choose max or min")


def check_metric(key: str, metric: str | None, validates: bool) -> None:
    """Refuse a metric that the run will not log.

    Raises:
        ConfigError: it does not exist, or needs validation data that is not there.
    """
    names = [*METRICS, TRAIN_LOSS]
    if metric not in names:
        line = unknown_key(f"{key}={metric}", metric, [f"{key}={name}" for name in names])
        raise ConfigError(line.replace("unknown config key", "unknown metric"))
    if metric != TRAIN_LOSS and not validates:
        raise ConfigError(
            f"{key}={metric}: there is nothing to validate on; give val_store=DIR or a "
            f"data.val_fraction above 0, or use {key}={TRAIN_LOSS}"
        )
