"""Keys and types of the plain config nodes: one dataclass per command.

The values stand in `conf/`; a field without one there is required. None stands here only for what
not every config has: groups that may be left out (`~scheduler`) and the keys of `sweep=optuna`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass(kw_only=True)
class DataConfig:
    """Node `data` of train.yaml."""

    batch_size: int
    captions: str
    val_fraction: float
    shuffle: str
    block_rows: int
    mix_blocks: int
    num_workers: int
    prefetch: int | None


@dataclass(kw_only=True)
class CheckpointConfig:
    """Node `checkpoint` of train.yaml."""

    every_n_steps: int | None
    monitor: str | None
    mode: str
    save_top_k: int


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """Node `early_stopping` of train.yaml."""

    patience: int | None
    monitor: str
    mode: str
    min_delta: float


@dataclass(kw_only=True)
class EMAConfig:
    """Node `ema` of train.yaml."""

    decay: float | None


@dataclass(kw_only=True)
class SampleSegmentationsConfig:
    """Node `sample_segmentations` of train.yaml."""

    images: Any
    classes: list[str]
    every_n_epochs: int
    short_side: int
    pamr: bool


@dataclass(kw_only=True)
class SweepConfig:
    """Node `sweep` of train.yaml; all but the first two keys are given by `sweep=optuna` only."""

    metric: str
    mode: str
    space: Any = None
    n_trials: int | None = None
    parallel: int | None = None
    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    trial: int | None = None


@dataclass(kw_only=True)
class FeaturesConfig:
    """Node `features` of extract.yaml."""

    image_fields: list[str]
    caption_fields: list[str]
    dtype: str
    patches_per_image: int | None


@dataclass(kw_only=True)
class ExtractConfig:
    """extract.yaml."""

    source: Any
    vision: Any
    text: Any
    features: FeaturesConfig
    store: str
    split: str
    images_per_shard: int
    num_workers: int
    accelerator: str
    precision: str
    text_precision: str
    compile: bool


@dataclass(kw_only=True)
class TrainConfig:
    """train.yaml."""

    projection: Any
    similarity: Any
    val_similarity: Any
    loss: Any
    words: Any = None
    optimizer: Any
    scheduler: Any = None
    trainer: Any
    logger: Any = None
    name: str | None
    store: str
    val_store: str | None
    seed: int
    ckpt_path: str | None
    resume: bool
    record_heads: bool
    data: DataConfig
    checkpoint: CheckpointConfig
    early_stopping: EarlyStoppingConfig
    ema: EMAConfig
    sample_segmentations: SampleSegmentationsConfig
    sweep: SweepConfig


@dataclass(kw_only=True)
class EvaluateConfig:
    """evaluate.yaml."""

    checkpoint: str
    benchmark: Any
    trainer: Any
    vision: Any = None
    text: Any = None
    refinement: Any = None
    pamr: bool
    pamr_whole_image: bool
    calibration: str | None
    compare_untrained: bool
    pictures: int
    label_maps: bool
    examples: int
    resume: bool
    batch_size: int
    window_batch_size: int
    num_workers: int
    seed: int


@dataclass(kw_only=True)
class ModelConfig:
    """What the commands share that segment with a trained model."""

    checkpoint: str | None
    vision: Any = None
    text: Any = None
    calibration: str | None
    accelerator: str


@dataclass(kw_only=True)
class SegmentConfig(ModelConfig):
    """segment.yaml."""

    image: str | None
    classes: Any
    exemplars: str | None
    exemplar_weight: float
    output: str
    negatives: list[str]
    templates: str | None
    background: Any  # a score, true, or null
    refinement: Any
    pamr: bool
    short_side: int
    heatmaps: bool
    formats: list[str]
    instances: bool
    minimum_area: int
    tolerance: float
    polygons: bool
    image_root_url: str
    subfolders: bool
    resume: bool
    overwrite: bool


@dataclass(kw_only=True)
class MapConfig(ModelConfig):
    """map.yaml."""

    image: str | None
    classes: Any
    exemplars: str | None
    exemplar_weight: float
    output: str
    negatives: list[str]
    templates: str | None
    background: Any  # a score, true, or null
    refinement: Any
    pamr: bool
    meters_per_pixel: float | None
    scale: float | None
    window: int
    bands: list[int] | None
    stretch: list[float] | None
    value_range: list[float] | None
    polygons: bool
    minimum_area: int
    overwrite: bool


@dataclass(kw_only=True)
class CalibrateConfig:
    """calibrate.yaml."""

    checkpoint: str | None
    rule: Any
    vision: Any = None
    text: Any = None
    store: str | None
    images: str | None
    masks: str | None
    classes: Any
    output: str | None
    tokens: int
    templates: str | None
    short_side: int
    seed: int
    accelerator: str


@dataclass(kw_only=True)
class EmbedConfig(ModelConfig):
    """embed.yaml."""

    classes: Any
    exemplars: str | None
    exemplar_weight: float
    output: str
    negatives: list[str]
    templates: str | None
    short_side: int


@dataclass(kw_only=True)
class SearchConfig(ModelConfig):
    """search.yaml."""

    store: str | None
    query: Any
    val_similarity: Any
    output: str
    images: str | None
    top: int
    best: int
    templates: str | None
    recall: bool
    overwrite: bool


@dataclass(kw_only=True)
class AppConfig(ModelConfig):
    """app.yaml."""

    classes: Any
    short_side: int
    host: str
    port: int | None
    max_upload_mb: float
    browser: bool


@dataclass(kw_only=True)
class ServeConfig(ModelConfig):
    """serve.yaml."""

    classes: Any
    exemplars: str | None
    exemplar_weight: float
    refinement: Any
    short_side: int
    host: str
    port: int
    token: str | None
    max_upload_mb: float
    max_megapixels: float
    max_short_side: int
    max_words: int
    max_exemplars: int
    memory_gb: float
    timeout: float
    queue: int
    batch_size: int
    batch_wait_ms: float
    label_studio_url: str | None
    image_hosts: list[str]
    image_root: str | None


@dataclass(kw_only=True)
class VideoConfig(ModelConfig):
    """video.yaml."""

    video: str | None
    classes: Any
    output: str
    smoothing: float
    negatives: list[str]
    templates: str | None
    background: Any  # a score, true, or null
    pamr: bool
    short_side: int
    overwrite: bool


@dataclass(kw_only=True)
class ExportConfig:
    """export.yaml."""

    checkpoint: str | None
    output: str
    classes: Any
    templates: str | None
    vision: Any = None
    text: Any = None
    calibration: str | None
    image_size: int
    upsample: bool
    tolerance: float
    text_tower: bool
    int8: bool
    int8_tolerance: float
    overwrite: bool


@dataclass(kw_only=True)
class ConvertConfig:
    """convert.yaml."""

    task: str
    vision: Any = None
    text: Any = None
    input: str | None
    output: str | None
    activation: str | None
    store: str | None
    split: str
    dtype: str
    images_per_shard: int
    embedding: str | None
    num_workers: int


SCHEMAS = {
    "extract": ExtractConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "segment": SegmentConfig,
    "map": MapConfig,
    "calibrate": CalibrateConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "video": VideoConfig,
    "app": AppConfig,
    "serve": ServeConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
}


@cache
def register_schema(command: str) -> None:
    """Make the schema of a command known to Hydra under `<command>_schema`.

    Only that one: Hydra copies all that it knows for every group that `--help` lists.
    """
    ConfigStore.instance().store(name=f"{command}_schema", node=SCHEMAS[command])
