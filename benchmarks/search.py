"""Search over a feature store, against reading the same bytes and against FAISS, in one run.

    python benchmarks/search.py                      # two minutes, a store of 800 MB is made
    python benchmarks/search.py --store DIR          # a store of yours with patch tokens

Once from the disk, where a store lies that is larger than the memory, and once from the page cache.
`raw read` reads the bytes of the patch tokens in order into a buffer of a megabyte. All ways are
measured in turns, so that a busy machine slows them alike; the best of several turns counts.
Texts are random unit vectors: no model is loaded. FAISS is measured if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from talk2dino.features.store.reader import FeatureStore
from talk2dino.features.store.writer import write_store
from talk2dino.finding.scan import Scan, best_pictures

PATCHES, WIDTH = 256, 384  # ViT-S/14 at 224 pixels
TOP, BEST = 10, 4
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="a feature store; none: one is made")
    parser.add_argument("--images", type=int, default=4096, help="of the store that is made")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        folder = options.store or make(Path(name) / "store", options.images)
        store = FeatureStore(folder)
        os.sync()  # pages that are not written yet cannot leave the cache
        for cold in (True, False):
            measure(store, options.queries, options.turns, cold)


def make(folder: Path, images: int) -> Path:
    """A store of random patch tokens, written shard by shard."""
    random = np.random.default_rng(0)
    tokens = random.standard_normal((images, PATCHES, WIDTH), dtype=np.float32).astype(np.float16)
    captions = {"image_row": np.arange(images), "embedding": np.zeros((images, 8), np.float32)}
    write_store(folder, {"patch_tokens": tokens}, captions, images_per_shard=512)
    return folder


def measure(store: FeatureStore, queries: list[int], turns: int, cold: bool) -> None:
    """Print the table of every number of queries."""
    field = store.images["patch_tokens"]
    size, console = len(field) * field.row_bytes, Console()
    values = size // field.dtype.itemsize
    console.print(
        f"{store.path}: {len(field)} pictures, {size / 1e6:,.0f} MB of patch tokens, "
        f"{torch.get_num_threads()} threads, from the {'disk' if cold else 'page cache'}"
    )
    runs: dict[str, Run] = {"raw read": partial(read_all, store)}
    for count in queries:
        runs |= ways(store, count)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first warms caches
        for name, run in runs.items():
            store.close()  # a new process has nothing mapped
            if cold:
                forget(store)
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    table = Table(title="one pass over the store", title_justify="left")
    for column in ("", "GB/s", "× raw read", "GFLOP/s"):
        table.add_column(column, justify="left" if not column else "right")
    raw = min(seconds["raw read"])
    for name, measured in seconds.items():
        best = min(measured)
        count = 0 if name == "raw read" else int(name.split()[0])
        operations = values * (2 * count + 2) if count else 0  # products, and the square of each
        flops = f"{operations / best / 1e9:,.0f}" if operations else ""
        table.add_row(name, f"{size / best / 1e9:.2f}", f"{raw / best:.2f}", flops)
    console.print(table)
    found = ", ".join(f"{n}: {raw / min(seconds[f'{n} queries']):.2f}" for n in queries)
    console.print(f"target ≥ 0.6 × raw read for any number of queries, found {found}")
    peak = multiply_adds()
    floors = (max(raw, values * (2 * n + 2) / peak) for n in queries)
    shown = ", ".join(f"{n}: {raw / floor:.2f}" for n, floor in zip(queries, floors, strict=True))
    console.print(f"a matrix product of 1024³ reaches {peak / 1e9:.0f} GFLOP/s here; with that, or")
    console.print(f"the raw read where it is slower, a pass of so many queries could reach {shown}")


def ways(store: FeatureStore, count: int) -> dict[str, Run]:
    """The pass of `Talk2DINO.search` for `count` queries, and others."""
    rows = F.normalize(torch.randn(count, store.images["patch_tokens"].shape[-1]), dim=-1)
    scan = Scan(store, rows, torch.arange(count))
    found: dict[str, Run] = {f"{count} queries": partial(best_pictures, scan, TOP, BEST)}
    if importlib.util.find_spec("faiss"):
        found[f"{count} queries, FAISS"] = partial(by_faiss, store, rows.numpy())
    return found


def by_faiss(store: FeatureStore, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best patches of every block by FAISS's exact search; not yet the best pictures."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    kept = []
    for first, tokens in store.images["patch_tokens"].blocks(16):
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float32)
        faiss.normalize_L2(flat)
        scores, places = faiss.knn(rows, flat, TOP * BEST, faiss.METRIC_INNER_PRODUCT)
        kept.append((scores, first + places // tokens.shape[1]))
    return kept


def places(store: FeatureStore) -> Iterator[tuple[Path, int, int]]:
    """File, offset and bytes of the patch tokens of every shard."""
    for shard in store.manifest.shards:
        path = store.path / shard.file
        with h5py.File(path, "r") as file:
            data = file["images/patch_tokens"]
            yield path, data.id.get_offset(), data.size * data.dtype.itemsize


def read_all(store: FeatureStore, size: int = 1 << 20) -> int:
    """Read the bytes of all patch tokens in order."""
    buffer, total = memoryview(bytearray(size)), 0
    for path, offset, left in places(store):
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while left:
                done = file.readinto(buffer[: min(size, left)]) or 0
                left -= done
                total += done
    return total


def forget(store: FeatureStore) -> None:
    """Empty the page cache of the store's files; their pages must not be mapped."""
    for path, _, _ in places(store):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def multiply_adds(side: int = 1024) -> float:
    """Operations a second of a large matrix product."""
    one = torch.rand(side, side)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


if __name__ == "__main__":
    main()
