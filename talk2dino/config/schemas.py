"""Schemas of the plain config nodes: one dataclass per command, with every default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class DataConfig:
    """Node `data` of train.yaml."""

    batch_size: int = 128
    captions: str = "all"
    val_fraction: float = 0.05
    shuffle: str = "global"
    block_rows: int = 256
    mix_blocks: int = 16
    num_workers: int = 0
    prefetch: int | None = None


@dataclass
class CheckpointConfig:
    """Node `checkpoint` of train.yaml."""

    every_n_steps: int | None = None
    monitor: str | None = None
    mode: str = "max"
    save_top_k: int = 1


@dataclass
class EarlyStoppingConfig:
    """Node `early_stopping` of train.yaml."""

    patience: int | None = None
    monitor: str = "val/text_to_image/recall@1"
    mode: str = "max"
    min_delta: float = 0.0


@dataclass
class EMAConfig:
    """Node `ema` of train.yaml."""

    decay: float | None = None


@dataclass
class SampleSegmentationsConfig:
    """Node `sample_segmentations` of train.yaml."""

    images: Any = None
    classes: list[str] = field(default_factory=list)
    every_n_epochs: int = 1
    short_side: int = 448
    pamr: bool = False


@dataclass
class SweepConfig:
    """Group `sweep` of train.yaml."""

    metric: str = "val/text_to_image/recall@1"
    mode: str = "max"
    space: Any = None
    n_trials: int | None = None
    parallel: int | None = None
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    trial: int | None = None


@dataclass
class FeaturesConfig:
    """Group `features` of extract.yaml."""

    image_fields: list[str] = field(default_factory=list)
    caption_fields: list[str] = field(default_factory=lambda: ["embedding"])
    dtype: str = "float16"
    patches_per_image: int | None = None


@dataclass
class ExtractConfig:
    """extract.yaml."""

    source: Any = MISSING
    vision: Any = MISSING
    text: Any = MISSING
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    store: str = MISSING
    split: str = "train"
    images_per_shard: int = 1024
    num_workers: int = 2
    accelerator: str = "auto"
    precision: str = "32"
    text_precision: str = "32"
    compile: bool = False


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
    name: str | None = None
    store: str = MISSING
    val_store: str | None = None
    seed: int = 0
    ckpt_path: str | None = None
    resume: bool = False
    record_heads: bool = False
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
    pamr: bool = False
    pamr_whole_image: bool = False
    compare_untrained: bool = False
    pictures: int = 6
    label_maps: bool = False
    examples: int = 4
    resume: bool = True
    batch_size: int = 4
    window_batch_size: int = 8
    num_workers: int = 2
    seed: int = 0


@dataclass
class SegmentConfig:
    """segment.yaml."""

    checkpoint: str | None = None
    image: str | None = None
    classes: Any = None
    output: str = "segmented.png"
    vision: Any = None
    text: Any = None
    negatives: list[str] = field(default_factory=list)
    templates: str | None = None
    background: float | None = None
    pamr: bool = True
    short_side: int = 448
    heatmaps: bool = False
    resume: bool = False
    accelerator: str = "auto"


@dataclass
class AppConfig:
    """app.yaml."""

    checkpoint: str | None = None
    classes: list[str] = field(default_factory=list)
    vision: Any = None
    text: Any = None
    short_side: int = 448
    host: str = "127.0.0.1"
    port: int | None = None
    max_upload_mb: float = 20
    browser: bool = False
    accelerator: str = "auto"


@dataclass
class ExportConfig:
    """export.yaml."""

    checkpoint: str | None = None
    output: str = "onnx"
    classes: Any = None
    templates: str | None = None
    vision: Any = None
    text: Any = None
    image_size: int = 448
    upsample: bool = True
    tolerance: float = 1e-4


@dataclass
class ConvertConfig:
    """convert.yaml."""

    task: str = MISSING
    vision: Any = None
    text: Any = None
    input: str | None = None
    output: str | None = None
    activation: str | None = "tanh"
    store: str | None = None
    split: str = "train"
    dtype: str = "float16"
    images_per_shard: int = 1024
    embedding: str | None = None
    num_workers: int = 2


def register_schemas() -> None:
    """Make the schemas known to Hydra under `<command>_schema`."""
    store = ConfigStore.instance()
    store.store(name="extract_schema", node=ExtractConfig)
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="segment_schema", node=SegmentConfig)
    store.store(name="app_schema", node=AppConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="convert_schema", node=ConvertConfig)
