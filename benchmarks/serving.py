"""The service under load: clients at once, batched and one at a time, in the same run.

    python benchmarks/serving.py
    python benchmarks/serving.py --checkpoint RUN --seconds 120 --clients 8 --short-side 448

Two services (`batch_size=8` and `batch_size=1`) run beside each other and are asked in turns, so
that what else the machine does reaches both; only one has requests at a time. Every client sends
its next picture when the last one is answered. Latencies are what a client sees. Memory is the
process's resident set as `/metrics` says it, after the first slice and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.datasets.mosaic import MosaicScenes
from talk2dino.encoders import TimmVisionEncoder
from talk2dino.encoders.text import SentenceTransformerTextEncoder

WORDS = "person, car, dog, grass, sky; clouds, building; house, tree, water; sea, road, table"
WAYS = {"batched": 8, "one at a time": 1}


@dataclass
class Way:
    """A running service, and what its clients saw."""

    process: subprocess.Popen[str]
    address: str
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    spent: float = 0.0
    start_memory: float = 0.0


def random_checkpoint(folder: Path) -> Path:
    """The bundled encoders with an untrained projection: as fast as a trained one."""
    torch.manual_seed(0)
    vision = TimmVisionEncoder("vit_small_patch14_dinov2.lvd142m", "bundled")
    text = SentenceTransformerTextEncoder(weights="bundled")
    psi = ProjectionLayer(text.embed_dim, vision.embed_dim)
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(psi, folder / "projection.safetensors", specs)
    return folder / "projection.safetensors"


def photographs(folder: Path, count: int, into: Path) -> list[bytes]:
    """JPEG files of a folder, or composed scenes without one."""
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".jpg")
        return [path.read_bytes() for path in files[:count]]
    scenes = MosaicScenes("heldout", count, 480, 640)
    for number in range(count):
        Image.fromarray(scenes[number].image).save(into / f"{number}.jpg")
    return [(into / f"{number}.jpg").read_bytes() for number in range(count)]


def start(checkpoint: Path, batch_size: int, short_side: int) -> Way:
    command = [sys.executable, "-m", "talk2dino.serve", f"checkpoint={checkpoint}", "port=0"]
    command += [f"batch_size={batch_size}", f"short_side={short_side}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http://"):
            # the rest of what it prints, a line per request, is not read: let it go
            subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
            return Way(process, line.split()[0])
    raise SystemExit("the service did not start")


async def load(way: Way, pictures: list[bytes], clients: int, seconds: float, pamr: bool) -> None:
    end = time.perf_counter() + seconds

    async def client(number: int, http: httpx.AsyncClient) -> None:
        chance = random.Random(number)
        data = {"classes": WORDS, "pamr": str(pamr).lower()}
        while time.perf_counter() < end:
            picture = chance.choice(pictures)
            begun = time.perf_counter()
            try:
                answer = await http.post("/segment", files={"image": picture}, data=data)
                if answer.status_code != 200 or not answer.json()["annotations"]:
                    way.errors.append(f"{answer.status_code} {answer.text[:100]}")
            except httpx.HTTPError as error:
                way.errors.append(repr(error))
            way.seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=way.address, timeout=120) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    way.spent += time.perf_counter() - begun


def figure(way: Way, name: str) -> float:
    lines = httpx.get(f"{way.address}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata" / "coco100" / "images"
    parser.add_argument(
        "--checkpoint", type=Path, help="run or model; an untrained one if left out"
    )
    parser.add_argument("--images", type=Path, default=default, help="folder of photographs")
    parser.add_argument("--count", type=int, default=50, help="photographs")
    parser.add_argument("--seconds", type=float, default=120, help="of load for each way")
    parser.add_argument("--slices", type=int, default=4, help="turns of each way")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--short-side", type=int, default=448)
    parser.add_argument("--pamr", action="store_true", help="refine the edges, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = given.checkpoint or random_checkpoint(Path(folder))
        pictures = photographs(given.images, given.count, Path(folder))
        ways = {name: start(checkpoint, size, given.short_side) for name, size in WAYS.items()}
        try:
            for number in range(given.slices):
                for way in ways.values():
                    slice_ = given.seconds / given.slices
                    asyncio.run(load(way, pictures, given.clients, slice_, given.pamr))
                    if number == 0:
                        way.start_memory = figure(way, "process_resident_memory_bytes")
            print(
                f"{len(pictures)} photographs, {given.clients} clients, short_side "
                f"{given.short_side}, PAMR {'on' if given.pamr else 'off'}, "
                f"{torch.get_num_threads()} threads, torch {torch.__version__}"
            )
            print(
                f"{'':<15}{'requests':>9}{'errors':>8}{'a second':>10}{'p50 s':>8}{'p99 s':>8}"
                f"{'a batch':>9}{'MB first':>10}{'MB last':>9}"
            )
            for name, way in ways.items():
                p50, p99 = np.percentile(way.seconds, [50, 99])
                batch = figure(way, "talk2dino_batch_pictures_sum")
                batch /= figure(way, "talk2dino_batch_pictures_count")
                last = figure(way, "process_resident_memory_bytes")
                print(
                    f"{name:<15}{len(way.seconds):9}{len(way.errors):8}"
                    f"{len(way.seconds) / way.spent:10.2f}{p50:8.2f}{p99:8.2f}{batch:9.2f}"
                    f"{way.start_memory / 1e6:10.0f}{last / 1e6:9.0f}"
                )
                print("".join(f"  {error}\n" for error in way.errors[:5]), end="")
        finally:
            for name, way in ways.items():
                way.process.send_signal(signal.SIGTERM)
                print(f"{name}: ended with status {way.process.wait(60)}")


if __name__ == "__main__":
    main()
