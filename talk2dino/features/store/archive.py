"""Stores compressed with zstd to save disk space, and back to the contiguous form for training."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from talk2dino.errors import Advance, ConfigError, StoreError
from talk2dino.features.store.schema import MANIFEST, FieldTable, Manifest, ShardInfo
from talk2dino.features.store.shard_reader import ShardReader, size_problem
from talk2dino.features.store.shard_writer import write_hdf5
from talk2dino.features.store.writer import finish_manifest, open_for_append, put_shard
from talk2dino.files import PARTS, file_digest, put_known, read_text, replacing

_CHUNK_BYTES = 1 << 18  # reading a row reads its whole chunk; HDF5 caches one megabyte of them
_LEVEL = 9


def archive_store(
    store: Path, output: Path, compressed: bool, advance: Advance = lambda done, total: None
) -> Manifest:
    """Copy a store, its datasets compressed or contiguous; started again, it continues.

    Compressed: zstd after a byte shuffle, in chunks of rows of about 256 KB; a `FeatureStore`
    reads it too, slower. Contiguous: the copy of an archive has the bytes of the store that was
    archived (with the same HDF5 library). Every shard's SHA-256 is compared before it is copied.
    One field of one shard is in memory at a time.

    Args:
        store: a complete store.
        output: folder for the copy.
        compressed: whether to compress, or to write contiguous datasets.
        advance: called with (shards done, shards in all).

    Returns:
        The copy's manifest.

    Raises:
        StoreError: `store` is damaged; `output` holds a store or one of another kind.
        WriteError: `output` cannot be written.
        ConfigError: compression without the package hdf5plugin.
    """
    manifest = Manifest.read(store)
    if (output / MANIFEST).exists():
        raise StoreError(f"output={output}: already holds a store; use another folder")
    layout = zstd_layout() if compressed else None
    settings = {
        "manifest_sha256": file_digest(store / MANIFEST),
        "compression": f"zstd {_LEVEL}" if compressed else None,
    }
    done = open_for_append(output, settings, manifest.split)
    listed = store / f"{manifest.split}-skipped.jsonl"
    if listed.is_file():
        with replacing(output / PARTS / f"{manifest.split}-00000.skipped") as temporary:
            shutil.copyfile(listed, temporary)
    left_out = store / f"{manifest.split}-left-out.jsonl"
    if left_out.is_file():
        put_known(output / left_out.name, output / PARTS, read_text(left_out))
    for index, shard in enumerate(manifest.shards):
        if index not in done:
            # The manifest has one number of skipped images: it is counted with the first shard.
            skipped = manifest.skipped if index == 0 else 0
            _copy_shard(store, output, shard, manifest.fields, skipped, layout)
        advance(index + 1, len(manifest.shards))
    return finish_manifest(
        output,
        shards=len(manifest.shards),
        split=manifest.split,
        vision=manifest.vision,
        text=manifest.text,
    )


def zstd_layout() -> Callable[[Any], dict[str, Any]]:
    """Options of a compressed dataset, by its data.

    Raises:
        ConfigError: hdf5plugin is not installed.
    """
    try:
        plugin = importlib.import_module("hdf5plugin")
    except ImportError as error:
        raise ConfigError(
            "archive: needs the package hdf5plugin; pip install 'talk2dino[archive]'"
        ) from error
    zstd = plugin.Zstd(clevel=_LEVEL)

    def layout(data: Any) -> dict[str, Any]:
        if not data.size:
            return {}
        row_bytes = max(1, data.dtype.itemsize * data.size // len(data))
        rows = min(len(data), max(1, _CHUNK_BYTES // row_bytes))
        return {"chunks": (rows, *data.shape[1:]), "shuffle": True, **zstd}

    return layout


def _copy_shard(
    store: Path,
    output: Path,
    shard: ShardInfo,
    fields: FieldTable,
    skipped: int,
    layout: Callable[[Any], dict[str, Any]] | None,
) -> None:
    rows = {"images": shard.images, "captions": shard.captions}
    with _tables(store, shard, fields) as tables:
        put_shard(
            output, shard.file, lambda path: write_hdf5(path, tables, layout), rows, fields, skipped
        )


@contextmanager
def _tables(
    store: Path, shard: ShardInfo, fields: FieldTable
) -> Iterator[dict[str, dict[str, h5py.Dataset]]]:
    """The datasets of a shard that equals its manifest entry, by table and name."""
    path = store / shard.file
    problem = size_problem(store, shard)
    if problem is None and file_digest(path) != shard.sha256:
        problem = "its SHA-256 is not that of the manifest"
    if problem is not None:
        raise StoreError(f"{path}: {problem}; extract again")
    ShardReader(store, shard, fields).close()  # compares fields, and finds the filters
    with h5py.File(path, "r", locking=False) as file:
        yield {
            table: {name: file[table][name] for name in entries}
            for table, entries in fields.items()
        }
