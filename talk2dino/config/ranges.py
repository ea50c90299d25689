"""The range of every number of a config, in one table that is looked at before any work begins.

A key means the same in every command, so it stands here by its own name, and by `node.name` where
that node differs. Classes check what they are given themselves, for callers in Python; some of
these ranges only keep out what nobody means, as `num_workers=10000000000`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from talk2dino.errors import ConfigError, check_number

Range = tuple[int, int] | tuple[float, float]  # both ends count; of whole numbers, if they are

_MANY = 1_000_000
_GROUPS: list[tuple[Range, str]] = [
    ((1, 8192), "short_side window stride input_size image_size max_short_side height width"),
    (
        (1, _MANY),
        "batch_size window_batch_size block_rows mix_blocks save_top_k every_n_epochs n_trials "
        "parallel patches_per_image queue max_words k per_step mixture_per_step mixture_patches "
        "max_patches chunk_size min_count max_length hidden_dim text_dim vision_dim num_heads "
        "captions_per_scene long_side",
    ),
    ((0, _MANY), "pictures examples patience trial max_exemplars"),
    ((1, 10**9), "images_per_shard every_n_steps limit count total_steps steps_per_epoch"),
    ((0, 10**9), "warmup_steps"),
    ((0, 1024), "num_workers prefetch"),
    ((0, 1000), "num_iter hidden_layers"),
    ((0, 10**12), "minimum_area"),
    ((1, 10**12), "max_pixels"),
    ((0, 2**32 - 1), "seed"),
    ((0, 65535), "port ignore_index"),
    ((1, 10_000), "top"),
    ((1, 4096), "best"),
    ((100, 65_536), "tokens"),
    (
        (0.0, 1.0),
        "exemplar_weight keep share quantile alpha lambda_bg near_synonym synonym unexplained "
        "val_fraction decay",
    ),
    ((0.0, 0.99), "smoothing"),
    ((0.0, 1e6), "weight caption_weight mixture tolerance int8_tolerance warmup_epochs margin"),
    ((0.0, 1e3), "power lr weight_decay"),
    ((0.0, 6e4), "batch_wait_ms"),
    ((-1e9, 1e9), "min_delta"),
    ((1e-6, 1e6), "temperature logit_scale concentration scale meters_per_pixel"),
    ((1e-3, 1e6), "max_upload_mb max_megapixels memory_gb timeout"),
]
RANGES = {name: limits for limits, names in _GROUPS for name in names.split()}


def range_of(key: str) -> Range | None:
    """The range of a dotted key, if it has one."""
    return RANGES.get(key) or RANGES.get(key.rpartition(".")[2])


def check_ranges(config: DictConfig) -> None:
    """Refuse numbers out of their range, and in other places infinity, NaN and endless ones.

    Raises:
        ConfigError: the first of them, with its range.
    """
    for key, value in _numbers(config, ""):
        limits = range_of(key)
        if limits is not None:
            check_number(key, value, *limits)
        elif not (math.isfinite(value) and abs(value) < 2**63):
            raise ConfigError(f"{key}={value}: no number that can be worked with")


def expected(key: str) -> str:
    """What a number must be, for a value that is none."""
    limits = range_of(key)
    if limits is None:
        return "a number"
    kind = "a whole number" if isinstance(limits[0], int) else "a number"
    return f"{kind} of {limits[0]:g} to {limits[1]:.12g}"


def _numbers(node: Any, path: str) -> Iterator[tuple[str, int | float]]:
    """All numbers of a config that stand there themselves, with their dotted keys."""
    names = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        inner = f"{path}.{name!s}" if isinstance(node, DictConfig) and path else path or str(name)
        child = node._get_node(name)
        if isinstance(child, (DictConfig, ListConfig)):
            if not child._is_none() and not child._is_missing() and not child._is_interpolation():
                yield from _numbers(child, inner)
        elif isinstance(value := child._value(), (int, float)) and not isinstance(value, bool):
            yield inner, value
