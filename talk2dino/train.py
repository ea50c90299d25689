"""`python -m talk2dino.train`: a feature store into a projection."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from talk2dino.alignment.inputs import caption_fields, check_combination, image_fields
from talk2dino.alignment.module import AlignmentModule
from talk2dino.alignment.projection import Projection
from talk2dino.config import command
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureDataModule, FeatureStore
from talk2dino.features.store.schema import IMAGE_FIELDS
from talk2dino.files import replacing
from talk2dino.sweeps.study import PRUNED, PruneTrial
from talk2dino.training.callbacks import callbacks, check_metric, check_mode
from talk2dino.training.results import refuse_foreign_files
from talk2dino.training.resume import (
    AtomicCheckpointIO,
    checkpoint_to_resume,
    deciding_settings,
    keep_logs,
    refuse_other_settings,
)
from talk2dino.training.trackers import close_loggers
from talk2dino.training.word_embeddings import caption_word_loss, stored_text_encoder


def train(config: DictConfig) -> None:
    """Train the projection that the config describes."""
    command.check_processes(config)
    check_sweep(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    refuse_foreign_files(folder, config.resume)
    L.seed_everything(config.seed, verbose=False)
    store = FeatureStore(config.store)
    module = build_module(config, store)
    data = build_data(config, store, module)
    if config.get("words"):
        options = command.build(config.words)
        module.words = caption_word_loss(
            options, store, data.train_rows, module.projection, module.similarity, config.seed
        )
    plain: Any = OmegaConf.to_container(config, resolve=True)
    checkpoint = checkpoint_to_resume(folder, config.resume, config.ckpt_path)
    if checkpoint is not None:
        refuse_other_settings(checkpoint, deciding_settings(plain, store), module.description())
    trainer: L.Trainer = command.build(
        config.trainer,
        default_root_dir=str(folder),
        plugins=AtomicCheckpointIO(),
        logger=command.build(config.logger) if config.logger else False,
        callbacks=callbacks(config, folder, store, module.similarity, len(data.val_rows) > 0),
    )
    check_learnable(config, data, trainer.world_size)
    if trainer.is_global_zero:
        if checkpoint is not None:
            keep_logs(folder)
        for name in ("metrics.json", PRUNED) if checkpoint is None else ():
            (folder / name).unlink(missing_ok=True)  # of an earlier run in this folder
        with replacing(folder / "config.yaml") as file:
            OmegaConf.save(config, file, resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    finally:
        close_loggers(trainer)
    if trainer.is_global_zero:
        report(folder, trainer)


def fill_widths(config: DictConfig) -> None:
    """Set the projection's widths and heads that the config leaves open to those of the store.

    Raises:
        ConfigError: the config's widths are not those of the store, or those of the store differ.
    """
    store = FeatureStore(config.store)
    visual = next((name for name in store.images.fields if "D" in IMAGE_FIELDS[name]), None)
    if visual is None:
        raise ConfigError(
            f"store={config.store}: holds no features of images to compare with texts, only "
            f"{', '.join(store.images.fields)}; extract again, for instance with features=pooled"
        )
    found = {"text_dim": text_width(store), "vision_dim": store.images[visual].shape[-1]}
    compared = config.similarity.get("field")
    if compared in store.images and store.images[compared].shape[-1] != found["vision_dim"]:
        raise ConfigError(
            f"similarity.field={compared}: has width {store.images[compared].shape[-1]}, the patch "
            f"tokens of {config.store} have {found['vision_dim']}; compare avg_self_attn_out, say"
        )
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
        raise ConfigError(
            f"store={store.path}: holds no captions; train on a store that was extracted from "
            "images with captions"
        )
    return store.text.embed_dim


def build_module(config: DictConfig, store: FeatureStore) -> AlignmentModule:
    """Projection, similarities, loss and optimizer of the config."""
    similarity = command.build(config.similarity)
    val_similarity = command.build(config.val_similarity)
    projection = build_projection(config, store)
    check_combination(projection, similarity)
    check_combination(projection, val_similarity, "val_similarity")
    return AlignmentModule(
        projection=projection,
        similarity=similarity,
        loss=command.build(config.loss),
        optimizer=build_optimizer(config),
        scheduler=command.build(config.scheduler) if config.scheduler else None,
        val_similarity=val_similarity,
        encoders={
            "vision": store.vision.spec if store.vision else None,
            "text": store.text.spec if store.text else None,
        },
    )


def build_projection(config: DictConfig, store: FeatureStore) -> Projection:
    """Build ψ; one that starts from the text encoder's weights gets the store's encoder."""
    target = get_object(config.projection._target_)
    needs_text = "text" in inspect.signature(target).parameters
    purpose = "whose weights this projection starts from; extract with features=clip_last_layer"
    arguments = {"text": stored_text_encoder(store, purpose)} if needs_text else {}
    projection: Projection = command.build(config.projection, **arguments)
    return projection


def build_optimizer(config: DictConfig) -> Any:
    """The optimizer's factory; `fused: null` becomes true wherever Lightning allows it.

    Lightning cannot clip the gradients of a fused optimizer in mixed precision.

    Raises:
        ConfigError: `fused: true` there.
    """
    if "fused" not in config.optimizer:
        return command.build(config.optimizer)
    precision, fused = str(config.trainer.get("precision")), config.optimizer.fused
    mixed = "mixed" in precision or precision in ("16", "bf16")
    clips_mixed = mixed and bool(config.trainer.get("gradient_clip_val"))
    if fused and clips_mixed:
        raise ConfigError(
            f"optimizer.fused=true: cannot clip gradients with trainer.precision={precision}; use "
            "optimizer.fused=null"
        )
    return command.build(config.optimizer, fused=not clips_mixed if fused is None else fused)


def build_data(
    config: DictConfig, store: FeatureStore, module: AlignmentModule
) -> FeatureDataModule:
    """The fields that projection and similarities read, streamed from the store."""
    projection, stored = module.projection, store.images.fields
    return FeatureDataModule(
        store=config.store,
        image_fields=image_fields(projection, module.similarity, stored),
        val_image_fields=image_fields(projection, module.val_similarity, stored),
        caption_fields=caption_fields(projection, module.similarity),
        val_caption_fields=caption_fields(projection, module.val_similarity),
        val_store=config.val_store,
        seed=config.seed,
        **config.data,
    )


def check_learnable(config: DictConfig, data: FeatureDataModule, world_size: int) -> None:
    """Refuse what has nothing to tell apart: its loss is 0 and its recall 100 % from the start.

    Raises:
        ConfigError: a step of one caption, or captions of one image only.
    """
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if config.trainer.get(key) == 0:
            raise ConfigError(f"trainer.{key}=0: nothing would be trained; use 1 or more")
    if config.data.batch_size * world_size < 2:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: a caption is told apart from others of its "
            "step, so use 2 or more"
        )
    for what, rows, batches in (
        ("train on", data.train_rows, data.train_data),
        ("validate on", data.val_rows, data.val_data),
    ):
        images = len(np.unique(batches.image_row[rows]))
        if images == 1:
            count = len(data.store.images)
            share = f"{3 / count:.2g} (of {count} images) or 0" if count > 5 else "0"
            where = f"store={config.store}"
            fix = f"use data.val_fraction={share}, give val_store=DIR,"
            if config.val_store and what == "validate on":
                where, fix = f"val_store={config.val_store}", "use val_store=null"
            raise ConfigError(
                f"{where}: one image with captions to {what}, so there is nothing to tell it apart "
                f"from; {fix} or add images"
            )


def check_sweep(config: DictConfig) -> None:
    """Refuse keys of a search in a grid, and in a sweep a metric that orders nothing.

    Raises:
        ConfigError: `sweep.n_trials` and the like without `sweep=optuna`, or an unknown metric.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        check_metric("sweep.metric", config.sweep.metric, validates=True)
        check_mode("sweep.mode", config.sweep.mode)
    given = [key for key in config.sweep if key not in ("metric", "mode", "trial")]
    for key in given:
        if config.sweep.sampler is None and config.sweep[key]:
            raise ConfigError(f"sweep.{key}={config.sweep[key]}: needs sweep=optuna")


def report(folder: Path, trainer: L.Trainer) -> None:
    """Print the metrics and the paths of the results."""
    if any(isinstance(c, PruneTrial) and c.pruned for c in trainer.callbacks):  # type: ignore[attr-defined]
        print(f"pruned after {trainer.current_epoch} epochs: others were better by then")
    metrics = json.loads((folder / "metrics.json").read_text())
    result = metrics["result"]
    recalls = {key: result[key] for key in result if "text_to_image/recall" in key}
    if recalls:
        shown = "  ".join(f"{k.rpartition('/')[2]} {v:.1f}" for k, v in recalls.items())
        print(f"text → image, held-out captions: {shown} (step {int(result['step'])})")
    print(f"loss: {metrics['train/loss']:.4g} after {metrics['steps']} steps")
    for name, file in (("projection", "projection.safetensors"), ("loss curve", "loss.png")):
        print(f"{name}: {folder / file}")


if __name__ == "__main__":
    command.require_common_folder()
    command.run("train", train, complete=fill_widths)
