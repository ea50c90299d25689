"""Throughput of extraction against the bare encoder's forward pass on the same images in memory.

    python benchmarks/extraction.py
    python benchmarks/extraction.py --images 512 --features dense --device gpu

Real captioned photographs (Flickr8k, five captions each) if they are there, else mosaic scenes. For
float32 and bfloat16: images/s of the forward pass alone, of both encoders' forward passes, and of
the whole extraction from files to hashed shards; each round measures all of them, so that a busy
machine slows them alike. Then what an image costs, part by part, and the floor: on a CPU captions
and decoding need the cores that the encoder could use.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from talk2dino.datasets.captions import CocoCaptions, Source
from talk2dino.datasets.captions.base import Entry, ImageBatches
from talk2dino.datasets.mosaic import Mosaic
from talk2dino.encoders.devices import autocast, choose_device
from talk2dino.encoders.text import SentenceTransformerTextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.features.extraction.encoding import CaptionEncoding, ImageEncoding
from talk2dino.features.extraction.fields import EXTRACTED, select_fields
from talk2dino.features.extraction.job import Extraction
from talk2dino.features.store.shard_writer import ShardRows, prepare, write_hdf5
from talk2dino.files import file_digest

FIELDS = {
    "all": EXTRACTED,
    "pooled": ("avg_self_attn_out", "disentangled_self_attn"),
    "dense": ("patch_tokens", "avg_self_attn_out"),
}


@dataclass
class Bench:
    """What is measured: a source, both encoders, and the options of the command line."""

    source: Source
    vision: TimmVisionEncoder
    text: SentenceTransformerTextEncoder
    options: argparse.Namespace

    def __post_init__(self) -> None:
        size, batches = self.vision.batch_size, ImageBatches(self.source, self.vision.image_size)
        count = len(self.source)
        self.plan = [range(at, min(at + size, count)) for at in range(0, count, size)]
        self.batches = [batches[positions] for positions in self.plan]
        self.texts = [
            text for batch in self.batches for entry in batch.entries for _, text in entry.captions
        ]
        self.device: torch.device = next(self.vision.parameters()).device

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def forward(self, precision: str) -> None:
        """The model alone: no attention maps, no pooling, nothing kept."""
        vision = self.vision
        with torch.inference_mode(), autocast(precision, self.device):
            for batch in self.batches:
                pixels = batch.pixels.to(self.device).float() / 255
                vision.model.forward_features((pixels - vision.mean) / vision.std)
        self.wait()

    def warm_up(self, precision: str, text_precision: str) -> None:
        """Let the libraries allocate, and compile where that was asked for."""
        batches, texts = self.batches, self.texts
        self.batches, self.texts = batches[:2], texts[:256]
        self.forward(precision)
        self.captions(text_precision)
        self.batches, self.texts = batches, texts

    def captions(self, precision: str) -> None:
        """The text encoder alone, in the blocks of an extraction."""
        encoding = CaptionEncoding(self.text, ["embedding"], "float16", precision, self.device)
        for at in range(0, len(self.texts), 1024):
            encoding.encode(self.texts[at : at + 1024])

    def extraction(self, precision: str, text_precision: str) -> None:
        """From files to a complete store with its manifest."""
        folder = Path(tempfile.mkdtemp(dir=self.options.out))
        try:
            manifest = Extraction(
                self.source,
                self.vision,
                self.text,
                folder / "store",
                image_fields=FIELDS[self.options.features],
                images_per_shard=self.options.images_per_shard,
                num_workers=self.options.workers,
                precision=precision,
                text_precision=text_precision,
            ).run()
            assert manifest is not None
        finally:
            shutil.rmtree(folder)

    def parts(self, precision: str) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds of the other parts, each for itself in this process, all images."""
        images = ImageBatches(self.source, self.vision.image_size)
        names = FIELDS[self.options.features]
        costs = {"decode": timed(lambda: [images[positions] for positions in self.plan])}
        encoding = ImageEncoding(self.vision, names, "float16", precision)
        sample, rows = self.batches[0], ShardRows(len(self.source))
        with torch.inference_mode():
            features = self.vision(sample.pixels.to(self.device).float() / 255)
        scale = len(self.batches)
        costs["pool"] = _times(timed(lambda: select_fields(features, names)), scale)
        arrays = encoding.start(sample.pixels, range(len(sample.entries))).arrays()
        for batch in self.batches:
            rows.add_images(batch.entries, {k: v[: len(batch.entries)] for k, v in arrays.items()})
        tables, captions = rows.arrays()
        captions["embedding"] = torch.zeros(len(self.texts), self.text.embed_dim).numpy()
        with tempfile.TemporaryDirectory(dir=self.options.out) as folder:
            file = Path(folder) / "shard.h5"
            costs["write"] = timed(
                lambda: write_hdf5(file, prepare(tables, captions, "float16", "shard"))
            )
            costs["SHA-256"] = timed(lambda: file_digest(file))
        return costs


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of this process's cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _times(cost: tuple[float, float], factor: float) -> tuple[float, float]:
    return cost[0] * factor, cost[1] * factor


def measure(bench: Bench, precision: str, text_precision: str, console: Console) -> None:
    """Interleaved rounds of one setting, the best of each, and the accounting."""
    runs: dict[str, Callable[[], None]] = {
        "vision": lambda: bench.forward(precision),
        "text": lambda: bench.captions(text_precision),
        "extraction": lambda: bench.extraction(precision, text_precision),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    bench.warm_up(precision, text_precision)
    for _ in range(bench.options.rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    images = len(bench.source)
    best = {name: min(wall for wall, _ in seconds) for name, seconds in times.items()}
    both = best["vision"] + best["text"]
    table = Table(title=f"vision {precision}, text {text_precision}", title_justify="left")
    for column in ("", "images/s", "extraction / this"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in (
        ("vision encoder's forward, images in memory", best["vision"]),
        ("both encoders' forward, images and captions in memory", both),
        ("extraction: decode … hashed shards", best["extraction"]),
    ):
        table.add_row(name, f"{images / seconds:.1f}", f"{seconds / best['extraction']:.2f}")
    console.print(table)
    accounting(bench, precision, times, best, console)


def accounting(
    bench: Bench,
    precision: str,
    times: dict[str, list[tuple[float, float]]],
    best: dict[str, float],
    console: Console,
) -> None:
    """Print what an image costs, and the ratio that no program could exceed on these cores."""
    images, cores = len(bench.source), torch.get_num_threads()
    cpu = {name: statistics.median(c for _, c in times[name]) for name in ("vision", "text")}
    costs = {name: cost for name, (_, cost) in bench.parts(precision).items()}
    per_image = {name: 1e3 * cost / images for name, cost in (cpu | costs).items()}
    console.print(
        "CPU ms per image: " + ", ".join(f"{name} {ms:.2f}" for name, ms in per_image.items()),
        highlight=False,
    )
    if bench.device.type != "cpu":
        return
    needed = sum(per_image.values())
    console.print(
        f"floor on {cores} cores, all of it in parallel without a gap: {needed / cores:.1f} ms per "
        f"image, measured {1e3 * best['extraction'] / images:.1f} ms; no extraction can exceed "
        f"{per_image['vision'] / needed:.2f} of the vision encoder alone",
        highlight=False,
    )


@dataclass
class FewerCaptions(Source):
    """A source with at most `most` captions an image."""

    source: Source
    most: int

    def __len__(self) -> int:
        return len(self.source)

    def entry(self, index: int) -> Entry:
        entry = self.source.entry(index)
        return replace(entry, captions=entry.captions[: self.most])

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def caption_count(self) -> int:
        return sum(len(self.entry(index).captions) for index in range(len(self)))

    def fingerprint(self) -> dict[str, Any]:
        return self.source.fingerprint() | {"captions": self.most}


def find_source(data: Path, images: int) -> Source:
    flickr = data / "flickr8k"
    if flickr.is_dir():
        return CocoCaptions(
            str(flickr / "annotations" / "captions_train.json"),
            str(flickr / "images" / "train"),
            limit=images,
        )
    print(f"{flickr} is not there: mosaic scenes instead (composing them costs more than decoding)")
    return Mosaic(count=images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata"
    parser.add_argument("--data", type=Path, default=default, help="folder with flickr8k")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--captions", type=int, default=5, help="of each image, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--features", choices=list(FIELDS), default="all")
    parser.add_argument("--vision", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument(
        "--weights", default="bundled", help="of the vision encoder; or hub, random"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images-per-shard", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu")
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["32,32", "32,bf16", "bf16,bf16"],
        help="pairs for the vision and the text encoder",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the vision encoder")
    parser.add_argument("--out", type=Path, default=None, help="where the stores are written")
    options = parser.parse_args()
    device = choose_device(options.device)
    vision = TimmVisionEncoder(
        options.vision, options.weights, options.image_size, options.batch_size
    ).to(device)
    if options.compile:
        vision.compile_blocks()
    text = SentenceTransformerTextEncoder().to(device)
    source = FewerCaptions(find_source(options.data, options.images), options.captions)
    bench = Bench(source, vision, text, options)
    console = Console(width=100)
    captions = len(bench.texts) / len(bench.source)
    console.print(
        f"{len(bench.source)} images, {captions:.1f} captions each, {options.vision} at "
        f"{options.image_size} px on {device}, {torch.get_num_threads()} threads, features="
        f"{options.features}",
        highlight=False,
    )
    for pair in options.precisions:
        precision, _, text_precision = pair.partition(",")
        measure(bench, precision, text_precision or precision, console)


if __name__ == "__main__":
    main()
