"""Streaming speed of the feature store, against named baselines in the same run.

    python benchmarks/streaming.py            # a minute; sizes that fit any machine
    python benchmarks/streaming.py --full     # memory at 1 GB and 10 GB too (needs 11 GB of disk)

All figures of a table are measured in turns over the same captions, so that a busy machine slows
them alike; each is the best of several turns, with the page cache warm; training steps alternate
one by one. Ratios are what counts: a `target` is met or missed. LitData and WebDataset are measured
if they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from talk2dino.alignment.inputs import projected_text, projected_visual
from talk2dino.alignment.losses import InfoNCE
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.alignment.similarity import MaxScore
from talk2dino.features.batches import CaptionBatches, StoreLoader
from talk2dino.features.sampler import EpochBatchSampler
from talk2dino.features.store.reader import FeatureStore
from talk2dino.features.store.writer import write_store

FIELD, TEXT = "disentangled_self_attn", "embedding"
HEADS, WIDTH, TEXT_WIDTH = 12, 768, 512  # ViT-B and CLIP
PATCHES = 256
Run = Callable[[], object]
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="images, one caption each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="of the loaders that have some")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--full", action="store_true", help="1 GB and 10 GB stores instead of small"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streaming-") as name:
        folder = Path(name)
        features = make(folder, options.rows)
        report = Report(options.turns)
        gather(report, folder, options.rows, options.batch)
        loaders(report, folder, features, options.batch, options.workers)
        dense(report, folder)
        steps(report, folder, features, options.batch)
        memory(report, folder, (1000, 10_000 if options.full else 2000))
    report.close()


class Report:
    """Measures in turns, and prints one table per comparison."""

    def __init__(self, turns: int) -> None:
        self.turns, self.console = turns, Console()
        self.verdicts: list[tuple[str, str]] = []

    def compare(
        self, title: str, unit: str, amount: float, runs: dict[str, Run | None], baseline: str
    ) -> dict[str, float]:
        """Print `amount` per second of every run; returns ratios to the baseline."""
        seconds: dict[str, list[float]] = {name: [] for name, run in runs.items() if run}
        for name in seconds:
            runs[name]()  # type: ignore[misc]  # warm caches, start workers
        for _ in range(self.turns):
            for name in seconds:
                start = time.perf_counter()
                runs[name]()  # type: ignore[misc]
                seconds[name].append(time.perf_counter() - start)
        best = {name: min(values) for name, values in seconds.items()}
        table = Table(title=title, title_justify="left")
        for column in ("", unit, f"times {baseline}"):
            table.add_column(column, justify="left" if not column else "right")
        ratios = {name: best[baseline] / value for name, value in best.items()}
        for name in runs:
            if name in best:
                table.add_row(name, f"{amount / best[name]:,.0f}", f"{ratios[name]:.2f}")
            else:
                table.add_row(name, "not installed", "")
        self.console.print(table)
        return ratios

    def alternate(
        self,
        title: str,
        count: int,
        sources: dict[str, Callable[[], Iterator[T]]],
        use: Callable[[T], object],
    ) -> dict[str, float]:
        """Use `count` items of every source in turn, one by one.

        Returns the median of a step's time beside the first source's step of the same round, so
        that a machine that slows down slows both.
        """
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(self.turns + 1):  # the first warms caches
            running = {name: source() for name, source in sources.items()}
            for number in range(count):
                shift = number % len(running)
                for name in [*running][shift:] + [*running][:shift]:
                    start = time.perf_counter()
                    use(next(running[name]))
                    if turn:
                        seconds[name].append(time.perf_counter() - start)
        baseline = next(iter(seconds))
        table = Table(title=title, title_justify="left")
        for column in ("", "median ms", f"times {baseline}"):
            table.add_column(column, justify="left" if not column else "right")
        ratios = {}
        for name, values in seconds.items():
            pairs = zip(values, seconds[baseline], strict=True)
            ratios[name] = statistics.median(own / other for own, other in pairs)
            table.add_row(name, f"{statistics.median(values) * 1e3:.2f}", f"{ratios[name]:.2f}")
        self.console.print(table)
        return ratios

    def target(self, text: str, value: float, met: bool) -> None:
        """Note a target and whether it is met."""
        self.verdicts.append((f"{text}: {value:.2f}", "met" if met else "missed"))

    def close(self) -> None:
        """Print all targets."""
        table = Table(title="targets", title_justify="left")
        table.add_column("target: measured")
        table.add_column("")
        for row in self.verdicts:
            table.add_row(*row)
        self.console.print(table)


def make(folder: Path, rows: int) -> dict[str, NDArray[np.float16]]:
    """The same pooled features as raw arrays and as stores of 1 and 20 shards."""
    random = np.random.default_rng(0)
    features = {
        FIELD: random.standard_normal((rows, HEADS, WIDTH), dtype=np.float32).astype(np.float16),
        TEXT: random.standard_normal((rows, TEXT_WIDTH), dtype=np.float32).astype(np.float16),
    }
    np.save(folder / "raw.npy", features[FIELD])
    captions = {"image_row": np.arange(rows), TEXT: features[TEXT]}
    for shards in (1, 20):
        size = -(-rows // shards)
        write_store(folder / f"{shards}", {FIELD: features[FIELD]}, captions, images_per_shard=size)
    return features


def gather(report: Report, folder: Path, rows: int, batch: int) -> None:
    """Random rows, ascending within a batch, as the sampler gives them."""
    raw = np.load(folder / "raw.npy", mmap_mode="r")
    random = np.random.default_rng(1)
    batches = [np.sort(random.permutation(rows)[:batch]) for _ in range(200)]
    fields = {n: FeatureStore(folder / f"{n}").images[FIELD] for n in (1, 20)}
    ratios = report.compare(
        f"pooled features [{HEADS}, {WIDTH}] float16: gathers of {batch} rows",
        "rows/s",
        len(batches) * batch,
        {
            "np.memmap": lambda: consume(raw[b] for b in batches),
            "store, 1 shard": lambda: consume(fields[1][b] for b in batches),
            "store, 20 shards": lambda: consume(fields[20][b] for b in batches),
        },
        "np.memmap",
    )
    for name in ("store, 1 shard", "store, 20 shards"):
        report.target(
            f"gather of pooled rows ({name}) ≥ 0.7 np.memmap", ratios[name], ratios[name] >= 0.7
        )


def loaders(
    report: Report, folder: Path, features: dict[str, NDArray[np.float16]], batch: int, workers: int
) -> None:
    """Whole epochs of batches with both features and ids."""
    samples = Samples({k: torch.from_numpy(v) for k, v in features.items()})
    usual, many = "dict of tensors, default collate", f"the same, {workers} workers"
    runs: dict[str, Run | None] = {
        usual: epochs(DataLoader(samples, batch, shuffle=True, drop_last=True)),
        many: epochs(
            DataLoader(
                samples,
                batch,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=True,
            )
        ),
        "LitData, no workers": litdata_loader(folder, features, batch),
        "WebDataset, no workers": webdataset_loader(folder, features, batch),
    }
    for shards in (1, 20):
        for shuffle in ("global", "block"):
            runs[f"store, {shuffle}, {shards} shards"] = epochs(
                loader(folder, shards, shuffle, batch)
            )
    runs[f"store, global, {workers} workers"] = epochs(loader(folder, 20, "global", batch, workers))
    rows = len(samples) // batch * batch
    ratios = report.compare(f"epochs of batches of {batch}", "samples/s", rows, runs, many)
    own = ratios["store, global, 20 shards"]
    report.target("samples/s ≥ 5 × the usual way with workers", own, own >= 5)
    without = own / ratios[usual]
    report.target("samples/s, × the usual way without workers (no target)", without, True)


def loader(folder: Path, shards: int, shuffle: Any, batch: int, workers: int = 0) -> StoreLoader:
    data = CaptionBatches(FeatureStore(folder / f"{shards}"), (FIELD,), (TEXT,))
    sampler = EpochBatchSampler(data.image_row, batch, shuffle=shuffle)
    return StoreLoader(data, np.arange(len(data)), sampler, num_workers=workers)


class Samples(Dataset[dict[str, Any]]):
    """The usual way: one dict per sample."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features[FIELD])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": row} | {name: tensor[row] for name, tensor in self.features.items()}


def litdata_loader(
    folder: Path, features: dict[str, NDArray[np.float16]], batch: int
) -> Run | None:
    """LitData: chunks of 64 MB, written by `optimize`, read by its own loader without workers."""
    if importlib.util.find_spec("litdata") is None:
        return None
    from litdata.streaming import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    target = folder / "litdata"
    writer = BinaryWriter(str(target), chunk_bytes="64MB")
    for row in range(len(features[FIELD])):
        sample = {name: torch.from_numpy(values[row]) for name, values in features.items()}
        writer.add_item(row, sample | {"id": row})
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(target), shuffle=True, drop_last=True)
    return epochs(StreamingDataLoader(dataset, batch_size=batch, drop_last=True))


def webdataset_loader(
    folder: Path, features: dict[str, NDArray[np.float16]], batch: int
) -> Run | None:
    """WebDataset: tars of 1,000 samples, a shuffle buffer of 1,000, its own collation."""
    if importlib.util.find_spec("webdataset") is None:
        return None
    import webdataset

    target = folder / "webdataset"
    target.mkdir()
    with webdataset.ShardWriter(str(target / "%05d.tar"), maxcount=1000, verbose=0) as writer:
        for row in range(len(features[FIELD])):
            sample = {f"{name}.npy": saved(values[row]) for name, values in features.items()}
            writer.write({"__key__": f"{row:08d}", **sample})
    shards = [str(path) for path in sorted(target.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode()
        .to_tuple("__key__", f"{FIELD}.npy", f"{TEXT}.npy")
        .batched(batch, partial=False)
    )
    return epochs(webdataset.WebLoader(dataset, batch_size=None, num_workers=0))


def saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def dense(report: Report, folder: Path, images: int = 512, batch: int = 64) -> None:
    """Dense patch tokens: bytes per second."""
    random = np.random.default_rng(2)
    tokens = random.standard_normal((images, PATCHES, 384), dtype=np.float32).astype(np.float16)
    np.save(folder / "dense.npy", tokens)
    captions = {"image_row": np.arange(images), TEXT: np.zeros((images, 8), np.float32)}
    write_store(folder / "dense", {"patch_tokens": tokens}, captions, images_per_shard=64)
    raw = np.load(folder / "dense.npy", mmap_mode="r")
    field = FeatureStore(folder / "dense").images["patch_tokens"]
    data, unread = (
        CaptionBatches(FeatureStore(folder / "dense"), ("patch_tokens",), (TEXT,)) for _ in range(2)
    )
    batches = np.sort(random.permutation(images).reshape(-1, batch), axis=1)
    ratios = report.compare(
        f"dense patch tokens [{PATCHES}, 384] float16: gathers of {batch} images",
        "MB/s",
        tokens.nbytes / 1e6,
        {
            "np.memmap": lambda: consume(raw[b] for b in batches),
            "store": lambda: consume(field[b] for b in batches),
            "store, first epoch (looks for NaN)": lambda: consume(
                fresh(unread)[b] for b in batches
            ),
            "store, later epochs": lambda: consume(data[b] for b in batches),
        },
        "np.memmap",
    )
    for name in ("store", "store, later epochs"):
        report.target(
            f"dense bandwidth ({name}) ≥ 0.8 np.memmap", ratios[name], ratios[name] >= 0.8
        )


def fresh(data: CaptionBatches) -> CaptionBatches:
    """The same as in the first epoch, when no row has been checked for NaN."""
    data.checked.clear()
    return data


def steps(
    report: Report, folder: Path, features: dict[str, NDArray[np.float16]], batch: int
) -> None:
    """A training step of the published recipe, fed from memory and from the store."""
    torch.manual_seed(0)
    projection = ProjectionLayer(TEXT_WIDTH, WIDTH)
    similarity, loss = MaxScore(), InfoNCE()
    optimizer = torch.optim.Adam(projection.parameters(), lr=1e-4)
    tensors = {name: torch.from_numpy(values) for name, values in features.items()}
    rows = len(tensors[FIELD])
    place = {"image_place": torch.arange(batch), "image_id": torch.arange(batch)}
    in_memory = [
        {k: v[start : start + batch] for k, v in tensors.items()} | place
        for start in range(0, rows - batch + 1, batch)
    ]

    def step(data: dict[str, Any]) -> None:
        data = data | {TEXT: data[TEXT].float()}
        text, _ = projected_text(data, projection, similarity)
        chosen = similarity.select(text, projected_visual(data, projection, similarity))
        optimizer.zero_grad()
        loss(similarity.scores(text, chosen), data["image_id"]).backward()
        optimizer.step()

    usual = DataLoader(Samples(tensors), batch, shuffle=True, drop_last=True)
    fed = {
        f"store, {shuffle}": loader(folder, 20, shuffle, batch) for shuffle in ("global", "block")
    }
    ratios = report.alternate(
        f"a training step, [{HEADS}, {WIDTH}], batch {batch}, {torch.get_num_threads()} threads",
        len(in_memory),
        {
            "tensors in memory": lambda: iter(in_memory),
            "dict of tensors, default collate": lambda: (data | place for data in usual),
            **{name: partial(iter, source) for name, source in fed.items()},
        },
        step,
    )
    for name in fed:
        slower = ratios[name]
        report.target(f"training step ({name}) ≤ 1.15 × tensors in memory", slower, slower <= 1.15)


def memory(report: Report, folder: Path, megabytes: tuple[int, int]) -> None:
    """Resident memory after reading random rows of a small and a ten times larger store.

    RSS is all that the process has mapped and touched, page cache included; RssAnon is its own.
    """
    table = Table(title="resident memory of a reading process, MB", title_justify="left")
    for column in ("store", "RSS", "of it private (RssAnon)"):
        table.add_column(column, justify="right")
    found = []
    for size in megabytes:
        target = folder / "memory"
        write_sparse(target, size)
        context = multiprocessing.get_context("spawn")
        queue: Any = context.Queue()
        process = context.Process(target=read_all, args=(target, queue))
        process.start()
        found.append(queue.get())
        process.join()
        table.add_row(f"{size:,} MB", *(f"{value:,.0f}" for value in found[-1]))
        shutil.rmtree(target)
    report.console.print(table)
    for number, name in enumerate(("RSS", "RssAnon")):
        ratio = found[1][number] / found[0][number]
        text = f"{name} at {megabytes[1]:,} MB ≤ 1.1 × at {megabytes[0]:,} MB"
        report.target(text, ratio, ratio <= 1.1)


def write_sparse(folder: Path, megabytes: int) -> None:
    """A store of pooled features of about that size, 128 MB per shard."""
    from talk2dino.features.store.writer import finish_manifest, write_shard

    per_shard = 128_000_000 // (HEADS * WIDTH * 2)
    random = np.random.default_rng(0)
    folder.mkdir()
    values = random.standard_normal((per_shard, HEADS, WIDTH), dtype=np.float32).astype(np.float16)
    shards = max(1, round(megabytes / 128))
    for index in range(shards):
        ids = np.arange(index * per_shard, (index + 1) * per_shard)
        images = {"id": ids, "file_name": ids.astype(str), FIELD: values}
        captions = {
            "id": ids,
            "image_row": np.arange(per_shard),
            "text": np.full(per_shard, ""),
            TEXT: values[:, 0, :TEXT_WIDTH],
        }
        write_shard(folder, index, images, captions, split="train", dtype="float16")
    finish_manifest(folder, shards=shards, split="train", vision=None, text=None)


def read_all(folder: Path, queue: Any) -> None:
    """One epoch; the largest RSS and RssAnon of samples taken on the way, MB."""
    torch.set_num_threads(1)
    store = FeatureStore(folder)
    data = CaptionBatches(store, (FIELD,), (TEXT,))
    fed = StoreLoader(data, np.arange(len(data)), EpochBatchSampler(data.image_row, 128))
    peak = [0.0, 0.0]
    for number, _ in enumerate(fed):
        if number % 16 == 0:
            peak = [max(pair) for pair in zip(peak, resident(), strict=True)]
    queue.put([max(pair) for pair in zip(peak, resident(), strict=True)])


def resident() -> tuple[float, float]:
    """RSS and RssAnon of this process, MB."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    values = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Rss"))
    }
    return int(values["VmRSS"]) / 1024, int(values["RssAnon"]) / 1024


def epochs(batches: Iterable[Any]) -> Run:
    return lambda: consume(batches)


def consume(items: Iterable[Any]) -> None:
    for _ in items:
        pass


if __name__ == "__main__":
    main()
