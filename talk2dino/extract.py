"""`python -m talk2dino.extract`: images and captions into a feature store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from talk2dino import cli
from talk2dino.encoders.device import choose_device
from talk2dino.errors import ConfigError, StoreError
from talk2dino.features.extraction import Extraction

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def extract(config: DictConfig) -> None:
    """Fill the store that the config describes, with a progress bar."""
    store = cli.require_output_folder(Path(config.store), "store")
    device = choose_device(config.accelerator)
    source = cli.build(config.source)
    vision = cli.build(config.vision).to(device)
    text = cli.build(config.text).to(device)
    job = Extraction(
        source=source,
        vision=vision,
        text=text,
        store=store,
        split=config.split,
        image_fields=list(config.features.image_fields),
        caption_fields=list(config.features.caption_fields),
        dtype=config.features.dtype,
        images_per_shard=config.images_per_shard,
        num_workers=config.num_workers,
        autocast=autocast(config.precision, device),
        precision=config.precision,
        rank=int(os.environ.get("RANK", 0)),  # set by torchrun
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
    console = Console()
    check_space(job, console)
    with progress_bar(console) as bar:
        task = bar.add_task("extract", total=len(source))
        manifest = job.run(lambda images: bar.advance(task, images))
    if job.skipped:
        console.print(
            f"[yellow]{len(job.skipped)} images could not be read and were skipped; "
            f"the list is {store / f'{config.split}-skipped.jsonl'}"
        )
    if manifest is None:
        console.print("this rank is done; the last rank to finish writes the manifest")
        return
    images = sum(shard.images for shard in manifest.shards)
    captions = sum(shard.captions for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    console.print(
        f"{store}: {images} images, {captions} captions, {len(manifest.shards)} shards, "
        f"{size / 1e6:.1f} MB"
    )


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return the maker of the forward pass's context."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}; choose one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return nullcontext if dtype is None else partial(torch.autocast, device.type, dtype)


def check_space(job: Extraction, console: Console) -> None:
    """Print the store's expected size and refuse when the disk cannot hold it."""
    needed, free = job.expected_bytes(), shutil.disk_usage(job.store).free
    console.print(
        f"{len(job.source)} images into {job.num_shards} shards, {needed / 1e9:.2f} GB of features"
    )
    there = sum(file.stat().st_size for file in job.store.glob("*.h5"))
    if needed - there > free:
        raise StoreError(
            f"store={job.store}: needs {(needed - there) / 1e9:.1f} GB, the disk has "
            f"{free / 1e9:.1f} GB free; keep less with features=pooled or a smaller "
            "vision.image_size"
        )


def progress_bar(console: Console) -> Progress:
    """A bar with counts, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    cli.run("extract", extract)
