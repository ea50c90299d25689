"""Streaming speed of the feature store against a raw NumPy memory map of the same rows.

    python benchmarks/streaming.py --rows 20000 --batch 128

Pooled features [rows, 6, 384] float16, warm page cache, best of several passes over the same
random batches. The batches ascend, as `EpochBatchSampler` gives them; the last line shuffles them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from talk2dino.features.dataset import CaptionBatches
from talk2dino.features.from_arrays import write_store
from talk2dino.features.sampler import EpochBatchSampler
from talk2dino.features.store import FeatureStore

FIELD = "disentangled_self_attn"
SHAPE = (6, 384)

Rows = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images-per-shard", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.rows, options.batch, options.images_per_shard, options.passes)


def run(folder: Path, rows: int, batch: int, images_per_shard: int, passes: int) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((rows, *SHAPE), dtype=np.float32).astype(np.float16)
    np.save(folder / "raw.npy", features)
    captions = {
        "image_row": np.arange(rows),
        "embedding": random.standard_normal((rows, 384), dtype=np.float32),
    }
    write_store(folder / "store", {FIELD: features}, captions, images_per_shard=images_per_shard)
    store = FeatureStore(folder / "store")
    raw = np.load(folder / "raw.npy", mmap_mode="r")
    field = store.images[FIELD]
    shuffled = [random.permutation(rows)[:batch] for _ in range(rows // batch)]
    batches = [np.sort(rows_) for rows_ in shuffled]
    assert np.array_equal(field[shuffled[0]], raw[shuffled[0]])

    print(
        f"{rows} rows of {raw[0].nbytes} bytes, {len(store.manifest.shards)} shards, batch {batch}"
    )
    compare("sorted rows", passes, lambda r: raw[r], lambda r: field[r], batches)
    compare("shuffled rows", passes, lambda r: raw[r], lambda r: field[r], shuffled)
    dataset = CaptionBatches(store, (FIELD,), ("embedding",))
    loader = DataLoader(
        dataset, sampler=EpochBatchSampler(dataset.image_row, batch), batch_size=None
    )
    seconds = min(_seconds(lambda: [None for _ in loader]) for _ in range(3))
    print(
        f"whole batches, DataLoader without workers: {len(loader) * batch / seconds:,.0f} samples/s"
    )


def compare(
    name: str,
    passes: int,
    baseline: Callable[[Rows], object],
    ours: Callable[[Rows], object],
    batches: Sequence[Rows],
) -> None:
    """Interleave both, so that a busy machine slows them alike; print the ratio of the best."""
    times: dict[str, list[float]] = {"raw": [], "ours": []}
    for _ in range(passes):
        for key, read in (("raw", baseline), ("ours", ours)):
            times[key].append(_seconds(lambda read=read: [read(rows) for rows in batches] and None))
    raw, own = (min(times[key]) / len(batches) for key in ("raw", "ours"))
    print(
        f"{name}: raw memory map {raw * 1e6:.0f} us/batch, store {own * 1e6:.0f} us/batch, "
        f"ratio {raw / own:.2f}"
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
