"""What a training run is made of besides its module: what the store decides, and the callbacks."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import get_object
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.similarity import Similarity
from talk2dino.config import command
from talk2dino.config.checks import unknown_key
from talk2dino.encoders.build import build_text
from talk2dino.encoders.text import TextEncoder
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.sweeps.study import PruneTrial
from talk2dino.training.head_records import RecordHeads
from talk2dino.training.results import METRICS, LossCurve, SaveProjection
from talk2dino.training.resume import LastCheckpoint, SeedSteps
from talk2dino.training.sample_segmentations import SampleSegmentations
from talk2dino.training.weight_average import AverageWeights


def fill_widths(config: DictConfig) -> None:
    """Set the projection's widths and heads that the config leaves open to those of the store.

    Raises:
        ConfigError: the config's widths are not those of the store.
    """
    store = FeatureStore(config.store)
    other = ("id", "file_name", "patch_index", "self_attn_maps")  # not of the vision width
    visual = next(name for name in store.images.fields if name not in other)
    found = {
        "text_dim": text_width(store),
        "vision_dim": store.images[visual].shape[-1],
    }
    for key, width in found.items():
        wanted = config.projection.get(key)
        if wanted is None:
            config.projection[key] = width
        elif wanted != width:
            encoder = store.text if key == "text_dim" else store.vision
            raise ConfigError(
                f"projection.{key}={wanted} but {config.store} holds features of width {width}"
                + (f" ({encoder.name})" if encoder else "")
                + f"; set projection.{key}={width} or choose the experiment of these encoders"
            )
    if config.projection.get("head_weighting") and config.projection.get("num_heads") is None:
        config.projection.num_heads = store.images["self_attn_maps"].shape[1]


def text_width(store: FeatureStore) -> int:
    """Width C of the text features, whichever of them the store holds."""
    for name in ("embedding", "token_embeddings"):
        if name in store.captions:
            return store.captions[name].shape[-1]
    if store.text is None or not store.text.embed_dim:
        raise ConfigError(f"store={store.path}: has neither embedding nor the width of its text")
    return store.text.embed_dim


def build_projection(config: DictConfig, store: FeatureStore) -> Projection:
    """Build ψ; one that starts from the text encoder's weights gets the store's encoder."""
    target = get_object(config.projection._target_)
    needs_text = "text" in inspect.signature(target).parameters
    arguments = {"text": stored_text_encoder(store)} if needs_text else {}
    projection: Projection = command.build(config.projection, **arguments)
    return projection


def stored_text_encoder(store: FeatureStore) -> TextEncoder:
    """The text encoder that the store's features come from.

    Raises:
        ConfigError: the store does not name it, or its weights are others now.
    """
    info = store.text
    if info is None or not info.spec:
        raise ConfigError(
            f"store={store.path}: does not name its text encoder, whose weights this projection "
            "starts from; extract with features=clip_last_layer"
        )
    encoder = build_text(info.spec)
    if encoder.describe()["weights_sha256"] != info.weights_sha256:
        raise ConfigError(
            f"store={store.path}: its text encoder {info.name} has other weights now than at "
            "extraction; extract again"
        )
    return encoder


def encoder_specs(store: FeatureStore) -> dict[str, Any]:
    """The specs of the store's encoders, for the checkpoint."""
    return {
        "vision": store.vision.spec if store.vision else None,
        "text": store.text.spec if store.text else None,
    }


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
        pruner = command.build(node.pruner) if node.pruner else None
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
