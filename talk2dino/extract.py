"""`python -m talk2dino.extract`: images and captions into a feature store."""

from __future__ import annotations

import shutil
import time

from omegaconf import DictConfig
from rich.console import Console

from talk2dino.config import command
from talk2dino.encoders.devices import choose_device, process_rank
from talk2dino.errors import StoreError
from talk2dino.features.extraction.job import Extraction
from talk2dino.features.store.schema import Manifest
from talk2dino.files import user_path


def extract(config: DictConfig) -> None:
    """Fill the store that the config describes, with a progress bar."""
    job = extraction(config)
    console = Console(markup=False, emoji=False)  # names of files have brackets
    say_left_out(job, console)
    check_space(job, console)
    counted, images = Counter(), job.num_images
    with command.progress("extract", visible=job.rank == 0) as show:

        def advance(new: int) -> None:
            counted.advance(new)
            show(counted.done, images)

        manifest = job.run(advance)
    report(job, manifest, counted, console)


def extraction(config: DictConfig) -> Extraction:
    """Build source and encoders of a config; under torchrun or srun for this rank."""
    store = command.require_output_folder(user_path(config.store), "store")
    place = process_rank()
    device = choose_device(config.accelerator)
    source = command.build(config.source)
    return Extraction(
        source=source,
        vision=command.build(config.vision).to(device),
        text=command.build(config.text).to(device) if source.caption_count() else None,
        store=store,
        split=config.split,
        image_fields=list(config.features.image_fields),
        caption_fields=list(config.features.caption_fields),
        dtype=config.features.dtype,
        patches_per_image=config.features.patches_per_image,
        images_per_shard=config.images_per_shard,
        num_workers=config.num_workers,
        precision=config.precision,
        text_precision=config.text_precision,
        compiled=config.compile,
        rank=place.rank,
        world_size=place.world_size,
    )


class Counter:
    """Images that this run encoded, and how long that took.

    The first number that is counted are the images of shards that an earlier run finished.
    """

    def __init__(self) -> None:
        self.done = 0
        self.earlier: int | None = None
        self.started = self.ended = time.perf_counter()

    def advance(self, images: int) -> None:
        """Count `images` as done now."""
        self.done += images
        self.ended = time.perf_counter()
        if self.earlier is None:
            self.earlier, self.started = images, self.ended

    def __str__(self) -> str:
        images, seconds = self.done - (self.earlier or 0), self.ended - self.started
        if not images:
            return "nothing was left to do"
        return f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s"


def report(job: Extraction, manifest: Manifest | None, counted: Counter, console: Console) -> None:
    """Print this run's figures, and those of the store once it is complete."""
    who = f"rank {job.rank} of {job.world_size}: " if job.world_size > 1 else ""
    console.print(f"{who}{counted}", highlight=False)
    if job.cut:
        console.print(
            f"{who}{job.cut} captions have more tokens than the text encoder reads; their ends are "
            "left out",
            style="yellow",
        )
    if manifest is None:
        console.print(
            f"{who}done; the last rank to finish writes the manifest. If none is running any more, "
            "start again with any number of ranks: only what is missing is done"
        )
        return
    skipped = manifest.skipped
    if skipped:
        console.print(
            f"{skipped} images could not be read and were skipped; "
            f"the list is {job.store / f'{job.split}-skipped.jsonl'}",
            style="yellow",
        )
    images = sum(shard.images for shard in manifest.shards)
    captions = sum(shard.captions for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    console.print(
        f"{job.store}: {images} images, {captions} captions, {skipped} skipped, "
        f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB"
    )


def say_left_out(job: Extraction, console: Console) -> None:
    """Count what the source leaves out; the run lists it in the store's folder."""
    left, file = job.source.left_out, job.store / f"{job.split}-left-out.jsonl"
    if not left or job.rank:
        return
    first = f"{left[0]['file_name']} ({left[0]['reason']})"
    said = f"{len(left)} files are left out, such as {first}; the list is {file}"
    console.print(said, style="yellow")


def check_space(job: Extraction, console: Console) -> None:
    """Print the store's expected size and refuse when the disk cannot hold it."""
    needed, free = job.expected_bytes(), shutil.disk_usage(job.store).free
    if job.text is None:
        console.print("no captions, so no text encoder: a store to search, not to train on")
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


if __name__ == "__main__":
    command.run("extract", extract)
