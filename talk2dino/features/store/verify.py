"""Read a whole store and name everything that is wrong with it; find NaN and infinity quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.store.schema import FEATURE_DTYPES, Manifest, ShardInfo
from talk2dino.features.store.shard_reader import ShardReader, size_problem
from talk2dino.files import file_digest

_INFINITY = {2: 0x7C00, 4: 0x7F800000}
_SIGN = {2: 0x8000, 4: 0x80000000}
_BLOCK = 1 << 18  # bytes: the second maximum finds them in the cache


def all_finite(array: NDArray[Any]) -> bool:
    """Whether a contiguous float16 or float32 array holds no NaN and no infinity."""
    size = array.itemsize
    flat = array.reshape(-1)
    unsigned, signed = flat.view(f"u{size}"), flat.view(f"i{size}")
    step = _BLOCK // size
    infinity = _INFINITY[size]
    for start in range(0, len(flat), step):
        block = slice(start, start + step)
        if signed[block].max() >= infinity or unsigned[block].max() >= infinity | _SIGN[size]:
            return False
    return True


def nonfinite_rows(array: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of rows (first axis) of a contiguous float array that hold NaN or infinity."""
    if not array.size:
        return np.empty(0, dtype=np.int64)
    flat = array.reshape(len(array), -1)
    step = max(1, (_BLOCK << 6) // max(1, flat[:1].nbytes))  # bounds the memory of `isfinite`
    found: list[int] = []
    for start in range(0, len(flat), step):
        block = flat[start : start + step]
        if not all_finite(block):
            found += (start + np.flatnonzero(~np.isfinite(block).all(axis=1))).tolist()
    return np.array(found, dtype=np.int64)


_BLOCK_BYTES = 1 << 26


def verify_store(
    folder: str | Path, progress: Callable[[int, int], None] | None = None
) -> list[str]:
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
        return  # what is cut off need not be read
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
        row_bytes = int(np.prod(field.shape)) * rows.dtype.itemsize
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        if field.dtype not in FEATURE_DTYPES and name != "image_row":
            continue
        for start in range(0, count, step):
            wanted = np.arange(start, min(start + step, count))
            block = np.empty((len(wanted), *field.shape), dtype=rows.dtype)
            rows.read(wanted, block)
            if name == "image_row":
                bad = np.flatnonzero((block < 0) | (block >= shard.images))
                trouble = f"name no image of this shard's {shard.images}"
            else:
                bad, trouble = nonfinite_rows(block), "hold NaN or infinity"
            if len(bad):
                first = ", ".join(str(start + row) for row in bad[:5].tolist())
                yield f"{table}/{name}: {len(bad)} rows {trouble} (first: {first})"
