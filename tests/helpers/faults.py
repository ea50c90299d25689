"""Real extractions in processes that are killed at random points, and started again.

python -c "from tests.helpers.faults import main; main(kills=100, seed=1)"
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from talk2dino.datasets.captions import CaptionFolder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.features import FeatureStore
from talk2dino.features.extraction.job import Extraction
from tests.helpers.encoders import HashText
from tests.helpers.pipeline import files_below
from tests.helpers.ranks import PRELOAD, forked

SIZE, BATCH, SHARD, IMAGES = 32, 2, 4, 30
# What touches the store: a kill just before one of these leaves every possible state on the disk.
FILE_EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir")


def make_images(folder: Path, count: int = IMAGES) -> Path:
    """`count` noise pictures of different shapes, two captions each; the third is damaged."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for number in range(count):
        shape = (33 + number, 70 - number, 3)
        pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}\nanother of {number}\n")
    damaged = folder / "02.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return folder


def extraction(images: Path, store: Path, **options: Any) -> Extraction:
    """An extraction that takes a tenth of a second."""
    torch.manual_seed(0)
    vision = TimmVisionEncoder("test_vit", "random", image_size=SIZE, batch_size=BATCH)
    settings = {"images_per_shard": SHARD, "num_workers": 0, "patches_per_image": 3} | options
    return Extraction(CaptionFolder(str(images)), vision, HashText(), store, **settings)


def extract(images: Path, store: Path, kill_at: int | None, **options: Any) -> None:
    """Run in a process of its own; dies by SIGKILL at the file operation number `kill_at`."""
    torch.set_num_threads(1)
    # As in a process of its own: the forkserver's workers would not notice their parent's death.
    multiprocessing.set_start_method("fork", force=True)
    job = extraction(images, store, **options)
    if kill_at is not None:
        sys.addaudithook(_Killer(store, kill_at))
    job.run()


class _Killer:
    """Counts the operations on files of the store."""

    def __init__(self, store: Path, kill_at: int) -> None:
        self.store, self.left = str(store), kill_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.store):
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def start(images: Path, store: Path, kill_at: int | None = None, **options: Any) -> BaseProcess:
    """Fork an extraction from a server that has imported everything already."""
    return forked(extract, images, store, kill_at, **options)


def start_ranks(images: Path, store: Path, world_size: int, **options: Any) -> list[BaseProcess]:
    """All ranks at once."""
    return [
        start(images, store, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def join(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes, when all have ended."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def wrong_files(store: Path, whole: Path) -> list[str]:
    """Finished files of a store, complete or not, that are not those of the whole one."""
    want = files_below(whole)
    return [
        name
        for name, content in files_below(store).items()
        if not name.startswith(".") and want.get(name) != content
    ]


def lost_rows(store: Path, whole: Path) -> int:
    """Rows of a complete store that are absent, or differ from the whole one, in any field."""
    got, want = FeatureStore(store), FeatureStore(whole)
    lost = 0
    for table in ("images", "captions"):
        mine, theirs = getattr(got, table), getattr(want, table)
        lost += abs(len(mine) - len(theirs))
        for name in theirs.fields:
            a, b = mine[name][: len(theirs)], theirs[name][: len(mine)]
            lost += int((a != b).reshape(len(b), -1).any(axis=1).sum())
    return lost


def kill_and_restart(images: Path, folder: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Extract until at least `kills` were killed; (kills, stores, wrong files and rows).

    Half of the kills come after a random time, half at a random file operation. Every start has
    one, two or three ranks, of which one or all are killed.
    """
    chance = random.Random(seed)
    whole, again = folder / "whole", folder / "again"
    assert join([start(images, whole)]) == [0]
    started = time.perf_counter()  # the first one started the server
    assert join([start(images, again)]) == [0]
    duration = time.perf_counter() - started
    killed = stores = wrong = 0
    while killed < kills:
        store = folder / f"store-{stores}"
        store.mkdir()
        stores += 1
        complete = False
        while not complete:
            killed += _one_start(images, store, chance, duration if killed < kills else None)
            wrong += len(wrong_files(store, whole))
            complete = (store / "manifest.json").exists()
        wrong += lost_rows(store, whole) + (files_below(store) != files_below(whole))
    return killed, stores, wrong


def _one_start(images: Path, store: Path, chance: random.Random, duration: float | None) -> int:
    """Start ranks and kill some of them (none without `duration`); how many were killed."""
    world_size = chance.randint(1, 3)
    victims = range(world_size) if chance.random() < 0.5 else [chance.randrange(world_size)]
    by_time = chance.random() < 0.5
    operations = 140 // world_size  # of a whole run
    processes = [
        start(
            images,
            store,
            None
            if by_time or duration is None or rank not in victims
            else chance.randint(1, operations),
            rank=rank,
            world_size=world_size,
            num_workers=chance.choice([0, 0, 1]),
        )
        for rank in range(world_size)
    ]
    if by_time and duration is not None:
        time.sleep(chance.uniform(0, duration))
        for rank in victims:
            processes[rank].kill()
    codes = join(processes)
    assert set(codes) <= {0, -signal.SIGKILL}, codes
    return codes.count(-signal.SIGKILL)


def main(kills: int, seed: int) -> None:
    """Print how many kills lost how many rows."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder) / "images")
        killed, stores, wrong = kill_and_restart(images, Path(folder), kills, seed)
    print(f"{killed} kills over {stores} stores: {wrong} wrong files or rows")
