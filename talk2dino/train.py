"""`python -m talk2dino.train`: a feature store into a projection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from talk2dino.alignment.inputs import caption_fields, check_combination, image_fields
from talk2dino.alignment.module import AlignmentModule
from talk2dino.config import command
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureDataModule, FeatureStore
from talk2dino.sweeps.study import PruneTrial
from talk2dino.training.results import close_loggers
from talk2dino.training.resume import AtomicCheckpointIO
from talk2dino.training.setup import (
    build_projection,
    callbacks,
    check_metric,
    check_mode,
    encoder_specs,
    fill_widths,
)


def train(config: DictConfig) -> None:
    """Train the projection that the config describes."""
    command.refuse_ddp_in_sweep(config)
    check_sweep(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    store = FeatureStore(config.store)
    module = build_module(config, store)
    data = build_data(config, store, module)
    checkpoint = checkpoint_to_resume(config, folder)
    if checkpoint is not None:
        keep_logs(folder)
    trainer: L.Trainer = command.build(
        config.trainer,
        default_root_dir=str(folder),
        plugins=AtomicCheckpointIO(),
        logger=command.build(config.logger) if config.logger else False,
        callbacks=callbacks(config, folder, store, module.similarity, len(data.val_rows) > 0),
    )
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(_plain(config))
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    finally:
        close_loggers(trainer)
    if trainer.is_global_zero:
        report(folder, trainer)


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
        encoders=encoder_specs(store),
    )


def build_data(
    config: DictConfig, store: FeatureStore, module: AlignmentModule
) -> FeatureDataModule:
    """The fields that projection and similarities read, streamed from the store."""
    stored = store.images.fields
    projection, similarity, val_similarity = (
        module.projection,
        module.similarity,
        module.val_similarity,
    )
    return FeatureDataModule(
        store=config.store,
        image_fields=image_fields(projection, similarity, stored),
        val_image_fields=image_fields(projection, val_similarity, stored),
        caption_fields=caption_fields(projection, similarity),
        val_caption_fields=caption_fields(projection, val_similarity),
        val_store=config.val_store,
        seed=config.seed,
        **config.data,
    )


def checkpoint_to_resume(config: DictConfig, folder: Path) -> str | None:
    """`last.ckpt` of this run folder with `resume`, if there is one; else `ckpt_path`.

    Raises:
        ConfigError: `ckpt_path` does not exist.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if config.resume and last.is_file():
        return str(last)
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise ConfigError(f"ckpt_path={config.ckpt_path}: no such file; give a run's last.ckpt")
    return config.ckpt_path and str(config.ckpt_path)


def keep_logs(folder: Path) -> None:
    """Move a former run's `metrics.csv` aside, which the CSV logger would overwrite."""
    old = folder / "logs" / "metrics.csv"
    if old.is_file():
        number = len(list(old.parent.glob("metrics.*.csv"))) + 1
        old.rename(old.with_name(f"metrics.{number}.csv"))


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
    """Say where things are, and what came out."""
    if any(isinstance(c, PruneTrial) and c.pruned for c in trainer.callbacks):  # type: ignore[attr-defined]
        print(f"pruned after {trainer.current_epoch} epochs: others were better by then")
    metrics = json.loads((folder / "metrics.json").read_text())
    result = metrics["result"]
    shown = {key: result[key] for key in result if "text_to_image/recall" in key}
    if shown:
        figures = "  ".join(f"{k.rpartition('/')[2]} {v:.1f}" for k, v in shown.items())
        print(f"text → image, held-out captions: {figures} (step {int(result['step'])})")
    print(f"loss: {metrics['train/loss']:.4g} after {metrics['steps']} steps")
    for name, file in (("projection", "projection.safetensors"), ("loss curve", "loss.png")):
        print(f"{name}: {folder / file}")


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return dict(plain)


if __name__ == "__main__":
    command.require_common_folder()
    command.run("train", train, complete=fill_widths)
