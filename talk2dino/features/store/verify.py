"""Read a whole store and name everything that is wrong with it; find NaN and infinity quickly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import Advance, StoreError
from talk2dino.features.store.schema import FEATURE_DTYPES, Manifest, ShardInfo
from talk2dino.features.store.shard_reader import ShardReader, size_problem
from talk2dino.files import file_digest

_EXPONENT = {2: np.uint16(0x7C00), 4: np.uint32(0x7F800000)}  # all ones in NaN and infinity
_BLOCK_BYTES = 1 << 20  # of values at a time, so that the copies stay in the cache
_READ_BYTES = 1 << 26


def nonfinite_rows(array: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of rows (first axis) of a contiguous float16 or float32 array with NaN or infinity.

    By the bits of the exponent: `np.isfinite` takes twenty times as long for float16.
    """
    if not array.size:
        return np.empty(0, dtype=np.int64)
    exponent = _EXPONENT[array.itemsize]
    bits = array.reshape(len(array), -1).view(exponent.dtype)  # [n, values of a row]
    step = max(1, _BLOCK_BYTES // bits[0].nbytes)
    largest = np.concatenate(
        [(bits[start : start + step] & exponent).max(axis=1) for start in range(0, len(bits), step)]
    )
    return np.flatnonzero(largest == exponent)


def verify_store(folder: str | Path, progress: Advance | None = None) -> list[str]:
    """Problems of the store in `folder`, one line each, beginning with the shard's name.

    Checks per shard: present, size, SHA-256, fields with shape and dtype, row counts, image rows of
    captions, NaN and infinity. `progress(done, total)` is called after every shard. A manifest that
    cannot be read is the only problem reported.
    """
    folder = Path(folder)
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        return [str(error)]
    problems: list[str] = []
    for done, shard in enumerate(manifest.shards, start=1):
        problems += [f"{shard.file}: {text}" for text in _shard_problems(folder, shard, manifest)]
        if progress is not None:
            progress(done, len(manifest.shards))
    return problems


def _shard_problems(folder: Path, shard: ShardInfo, manifest: Manifest) -> Iterator[str]:
    if problem := size_problem(folder, shard):
        yield problem
        return  # reading a file that is cut off would only repeat it
    if (digest := file_digest(folder / shard.file)) != shard.sha256:
        yield f"SHA-256 is {digest[:12]}…, the manifest says {shard.sha256[:12]}…"
    try:
        reader = ShardReader(folder, shard, manifest.fields)
    except StoreError as error:
        yield str(error).removeprefix(f"{folder / shard.file}: ")
        return
    try:
        yield from _content_problems(reader, shard, manifest)
    except StoreError as error:  # damaged compressed data
        yield str(error).removeprefix(f"{reader.path}: ")
    finally:
        reader.close()


def _content_problems(reader: ShardReader, shard: ShardInfo, manifest: Manifest) -> Iterator[str]:
    counts = {"images": shard.images, "captions": shard.captions}
    for (table, name), rows in reader.rows.items():
        field, count = manifest.fields[table][name], counts[table]
        if field.dtype not in FEATURE_DTYPES and name != "image_row":
            continue
        row_bytes = int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
        step = max(1, _READ_BYTES // max(1, row_bytes))
        for start in range(0, count, step):
            block = rows.block(start, min(start + step, count))
            if name == "image_row":
                bad = np.flatnonzero((block < 0) | (block >= shard.images))
                trouble = f"name no image of this shard's {shard.images}"
            else:
                bad, trouble = nonfinite_rows(block), "hold NaN or infinity"
            if len(bad):
                first = ", ".join(str(start + row) for row in bad[:5].tolist())
                yield f"{table}/{name}: {len(bad)} rows {trouble} (first: {first})"
