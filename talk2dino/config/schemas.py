"""Keys and types of the plain config nodes: one dataclass per command.

Values stand in `conf/`. A default here is only for what no file there states: the groups that may be
left out (`~scheduler`), and the keys that only some options of a group have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class DataConfig:
    """Node `data` of train.yaml."""

    batch_size: int = MISSING
    captions: str = MISSING
    val_fraction: float = MISSING
    shuffle: str = MISSING
    block_rows: int = MISSING
    mix_blocks: int = MISSING
    num_workers: int = MISSING
    prefetch: int | None = MISSING


@dataclass
class CheckpointConfig:
    """Node `checkpoint` of train.yaml."""

    every_n_steps: int | None = MISSING
    monitor: str | None = MISSING
    mode: str = MISSING
    save_top_k: int = MISSING


@dataclass
class EarlyStoppingConfig:
    """Node `early_stopping` of train.yaml."""

    patience: int | None = MISSING
    monitor: str = MISSING
    mode: str = MISSING
    min_delta: float = MISSING


@dataclass
class EMAConfig:
    """Node `ema` of train.yaml."""

    decay: float | None = MISSING


@dataclass
class SampleSegmentationsConfig:
    """Node `sample_segmentations` of train.yaml."""

    images: Any = MISSING
    classes: list[str] = MISSING
    every_n_epochs: int = MISSING
    short_side: int = MISSING
    pamr: bool = MISSING


@dataclass
class SweepConfig:
    """Node `sweep` of train.yaml; all but the first two keys are given by `sweep=optuna` only."""

    metric: str = MISSING
    mode: str = MISSING
    space: Any = None
    n_trials: int | None = None
    parallel: int | None = None
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    trial: int | None = None


@dataclass
class FeaturesConfig:
    """Node `features` of extract.yaml."""

    image_fields: list[str] = MISSING
    caption_fields: list[str] = MISSING
    dtype: str = MISSING
    patches_per_image: int | None = MISSING


@dataclass
class ExtractConfig:
    """extract.yaml."""

    source: Any = MISSING
    vision: Any = MISSING
    text: Any = MISSING
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    store: str = MISSING
    split: str = MISSING
    images_per_shard: int = MISSING
    num_workers: int = MISSING
    accelerator: str = MISSING
    precision: str = MISSING
    text_precision: str = MISSING
    compile: bool = MISSING


@dataclass
class TrainConfig:
    """train.yaml."""

    projection: Any = MISSING
    similarity: Any = MISSING
    val_similarity: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    trainer: Any = MISSING
    logger: Any = None
    name: str | None = MISSING
    store: str = MISSING
    val_store: str | None = MISSING
    seed: int = MISSING
    ckpt_path: str | None = MISSING
    resume: bool = MISSING
    record_heads: bool = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    sample_segmentations: SampleSegmentationsConfig = field(
        default_factory=SampleSegmentationsConfig
    )
    sweep: SweepConfig = field(default_factory=SweepConfig)


@dataclass
class EvaluateConfig:
    """evaluate.yaml."""

    checkpoint: str = MISSING
    benchmark: Any = MISSING
    trainer: Any = MISSING
    vision: Any = None
    text: Any = None
    refinement: Any = None
    pamr: bool = MISSING
    pamr_whole_image: bool = MISSING
    compare_untrained: bool = MISSING
    pictures: int = MISSING
    label_maps: bool = MISSING
    examples: int = MISSING
    resume: bool = MISSING
    batch_size: int = MISSING
    window_batch_size: int = MISSING
    num_workers: int = MISSING
    seed: int = MISSING


@dataclass
class SegmentConfig:
    """segment.yaml."""

    checkpoint: str | None = MISSING
    image: str | None = MISSING
    classes: Any = MISSING
    output: str = MISSING
    vision: Any = None
    text: Any = None
    negatives: list[str] = MISSING
    templates: str | None = MISSING
    background: float | None = MISSING
    pamr: bool = MISSING
    short_side: int = MISSING
    heatmaps: bool = MISSING
    resume: bool = MISSING
    accelerator: str = MISSING


@dataclass
class AppConfig:
    """app.yaml."""

    checkpoint: str | None = MISSING
    classes: list[str] = MISSING
    vision: Any = None
    text: Any = None
    short_side: int = MISSING
    host: str = MISSING
    port: int | None = MISSING
    max_upload_mb: float = MISSING
    browser: bool = MISSING
    accelerator: str = MISSING


@dataclass
class ExportConfig:
    """export.yaml."""

    checkpoint: str | None = MISSING
    output: str = MISSING
    classes: Any = MISSING
    templates: str | None = MISSING
    vision: Any = None
    text: Any = None
    image_size: int = MISSING
    upsample: bool = MISSING
    tolerance: float = MISSING


@dataclass
class ConvertConfig:
    """convert.yaml."""

    task: str = MISSING
    vision: Any = None
    text: Any = None
    input: str | None = MISSING
    output: str | None = MISSING
    activation: str | None = MISSING
    store: str | None = MISSING
    split: str = MISSING
    dtype: str = MISSING
    images_per_shard: int = MISSING
    embedding: str | None = MISSING
    num_workers: int = MISSING


SCHEMAS = {
    "extract": ExtractConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "segment": SegmentConfig,
    "app": AppConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra under `<command>_schema`."""
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
