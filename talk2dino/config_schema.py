"""Schemas of the plain config nodes and the check of everything that is built by `_target_`.

Hydra checks keys given on the command line but not those in an experiment file. Here a wrong key or
type is refused wherever it stands: dataclasses cover plain nodes, constructor signatures the rest.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf

from talk2dino.config_types import argument_types, fits, readable
from talk2dino.errors import ConfigError


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


def check_given(config: DictConfig) -> None:
    """Refuse a config that lacks a required value or has a key too many (`+key=value`).

    Raises:
        ConfigError: one line with the missing keys, or the unknown one.
    """
    _check_keys(config, "")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: required but not given; add {missing[0]}=… "
            "to the command line (--help explains the keys)"
        )


def _check_keys(node: DictConfig, path: str) -> None:
    """Compare the keys of plain nodes with their dataclass."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = [f"{path}{item.name}" for item in fields(kind)]
    for key in map(str, node):
        if f"{path}{key}" not in known:
            raise ConfigError(unknown_key(f"{path}{key}", node[key], known))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _check_keys(child, f"{path}{key}.")


def check_targets(config: DictConfig) -> None:
    """Refuse arguments that a `_target_` does not take.

    Raises:
        ConfigError: one line with the key, the value and the nearest valid key.
    """
    for path, node in _targets(config, ""):
        _check_arguments(path, node)


def _targets(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """All nodes with a `_target_`, with their dotted paths."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield path, node
    for key in node:
        name = key if isinstance(key, int) else str(key)  # an int in benchmark.label_map
        if not OmegaConf.is_interpolation(node, name):
            yield from _targets(node[key], f"{path}.{key!s}" if path else str(key))


def _check_arguments(path: str, node: DictConfig) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(
            f"{path}._target_={node['_target_']!r} cannot be imported ({error})"
        ) from error
    parameters = inspect.signature(target).parameters
    types = argument_types(target)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if str(key).startswith("_"):  # _target_, _partial_, …
            continue
        if key not in parameters:
            raise ConfigError(unknown_key(f"{path}.{key!s}", node[key], _join(path, parameters)))
        if OmegaConf.is_interpolation(node, str(key)):  # may need a running Hydra to resolve
            continue
        value, wanted = node[key], types.get(str(key), Any)
        if not fits(value, wanted):
            raise ConfigError(
                f"{path}.{key!s}={value!r} is {type(value).__name__}, expected {readable(wanted)}"
            )


def _join(path: str, parameters: Mapping[str, Any]) -> list[str]:
    return [f"{path}.{name}" for name in parameters if name != "self"]


def unknown_key(key: str, value: object, valid: Iterable[str]) -> str:
    """One line about an unknown key: its value, its type, and the nearest valid key."""
    names = list(valid)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(names)[:12])}"
    return f"unknown config key {key} (value {value!r}, {type(value).__name__}); {hint}"
