"""Write a feature store: one complete shard at a time, the manifest last.

Beside the shards lies a hidden folder `.parts/` with one small record per finished shard and the
settings of the run, so that a restarted extraction knows what is done without reading it again,
and ranks can write shards without talking to each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from talk2dino.atomic import create_json, file_digest, replacing, temporary_name, write_json
from talk2dino.errors import StoreError
from talk2dino.features.schema import (
    MANIFEST,
    EncoderInfo,
    FieldInfo,
    FieldTable,
    Manifest,
    ShardInfo,
    VisionInfo,
    checked,
    fields_from_json,
    read_json,
    shard_name,
)
from talk2dino.features.shard_writer import Arrays, describe, prepare, write_hdf5

PARTS = ".parts"


@dataclass(frozen=True)
class ShardRecord:
    """What `.parts/{split}-{k:05d}.json` keeps of a finished shard."""

    shard: ShardInfo
    fields: FieldTable
    skipped: int

    @classmethod
    def read(cls, file: Path) -> ShardRecord:
        """Parse a record; StoreError if it is malformed."""
        values = checked(cls, read_json(file, "delete it and extract again"), file, "")
        shard = ShardInfo(**checked(ShardInfo, values["shard"], file, "shard"))
        return cls(shard, fields_from_json(values["fields"], file), values["skipped"])


def open_for_append(folder: Path, settings: Mapping[str, Any], split: str) -> dict[int, ShardInfo]:
    """Create or resume a store in `folder`; returns the finished shards by number.

    `settings` (plain values) is everything that decides the bytes of a shard: source, encoders,
    size, dtype, images per shard. A folder begun with other settings, or holding shards of unknown
    origin, raises StoreError. The number of ranks is no setting. Safe to call from every rank.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "settings.json"
    # Looked at first: another rank writes its settings before its first shard.
    used = any(folder.glob("*.h5")) or (folder / MANIFEST).exists()
    if not file.exists():
        if used:
            raise StoreError(f"{folder}: holds shards of unknown settings; use an empty folder")
        create_json(file, dict(settings))  # of ranks that start together, the first one decides
    _refuse_other_settings(folder, read_json(file, "delete the folder"), dict(settings))
    return {k: record.shard for k, record in finished_shards(folder, split).items()}


def finished_shards(folder: Path, split: str) -> dict[int, ShardRecord]:
    """Shards that have both a record and a file of the recorded size, by number."""
    found: dict[int, ShardRecord] = {}
    for file in sorted((folder / PARTS).glob(f"{split}-*.json")):
        if (record := _record_of_whole_shard(folder, file)) is not None:
            found[int(file.stem.removeprefix(f"{split}-"))] = record
    return found


def is_finished(folder: Path, split: str, index: int) -> bool:
    """Whether shard `index` is among `finished_shards`."""
    file = (folder / PARTS / shard_name(split, index)).with_suffix(".json")
    return file.exists() and _record_of_whole_shard(folder, file) is not None


def _record_of_whole_shard(folder: Path, file: Path) -> ShardRecord | None:
    record = ShardRecord.read(file)
    shard = folder / record.shard.file
    whole = shard.is_file() and shard.stat().st_size == record.shard.bytes
    return record if whole else None


def write_shard(
    folder: Path,
    index: int,
    images: Arrays,
    captions: Arrays,
    *,
    split: str = "train",
    dtype: str = "float16",
    skipped: int = 0,
) -> ShardInfo:
    """Write shard `index` from arrays in memory; the same arrays give the same bytes.

    Raises StoreError for an unknown field, a wrong shape or dtype, a value that is not finite or
    does not fit in float16, a caption without image, a full disk.

    Args:
        folder: the store; must exist.
        index: number of the shard, from 0.
        images: fields of `schema.IMAGE_FIELDS`, each [n, ...]; `id` and `file_name` are required.
        captions: fields of `schema.CAPTION_FIELDS`, each [m, ...], or empty for a store without
            captions; `image_row` counts within this shard.
        split: first part of the file name.
        dtype: of the features, `float16` or `float32`.
        skipped: images of this shard that could not be read, kept for the manifest.
    """
    file = folder / shard_name(split, index)
    tables = prepare(images, captions, dtype, file.name)
    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    (parts / f"{file.stem}.json").unlink(missing_ok=True)  # must not vouch for other bytes
    with replacing(file) as temporary:
        write_hdf5(temporary, tables)
        digest, size = file_digest(temporary), temporary.stat().st_size
    rows = {name: len(arrays.get("id", ())) for name, arrays in tables.items()}
    info = ShardInfo(file.name, rows["images"], rows["captions"], size, digest)
    fields = {name: describe(arrays) for name, arrays in tables.items()}
    record = ShardRecord(info, fields, skipped)
    write_json(parts / f"{file.stem}.json", dataclasses.asdict(record))
    return info


def finish_manifest(
    folder: Path,
    *,
    shards: int,
    split: str = "train",
    vision: VisionInfo | None = None,
    text: EncoderInfo | None = None,
) -> Manifest:
    """Merge the records of shards 0 ... `shards` - 1 into `manifest.json`, written last.

    Raises StoreError when a shard is missing, shards disagree in fields, or no image was kept.
    """
    done = finished_shards(folder, split)
    missing = [shard_name(split, k) for k in range(shards) if k not in done]
    if missing:
        raise StoreError(f"{folder}: {missing[0]} is not written; start the extraction again")
    records = [done[k] for k in range(shards)]
    if not sum(record.shard.images for record in records):
        raise StoreError(f"{folder}: no image to store; check the source and its limit")
    for record in records[1:]:
        if record.fields != records[0].fields:
            raise StoreError(
                f"{folder}: {_field_difference(records[0], record)}; delete the folder and extract "
                "again"
            )
    manifest = Manifest(
        split=split,
        shards=tuple(record.shard for record in records),
        fields=records[0].fields,
        vision=vision,
        text=text,
        package_version=_package_version(),
        skipped=sum(record.skipped for record in records),
    )
    # Two ranks that finish at once both write it, with the same content.
    write_json(folder / MANIFEST, manifest.to_json(), shared=True)
    for index in range(shards):  # a killed run may have left these
        temporary_name(folder / shard_name(split, index)).unlink(missing_ok=True)
    return manifest


def _refuse_other_settings(folder: Path, old: object, new: dict[str, Any]) -> None:
    """Compare settings key by key after the same round through JSON."""
    before, now = _flat(old), _flat(json.loads(json.dumps(new)))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise StoreError(
                f"{folder}: was begun with {key}={before.get(key)!r}, now {key}={now.get(key)!r}; "
                "use the old value or another folder"
            )


def _flat(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _field_difference(first: ShardRecord, other: ShardRecord) -> str:
    """Name the first field in which two shards disagree, with both descriptions."""
    for table, fields in first.fields.items():
        for name in sorted(fields.keys() | other.fields[table].keys()):
            a, b = fields.get(name), other.fields[table].get(name)
            if a != b:
                return (
                    f"{other.shard.file} has {table}/{name} {_brief(b)}, "
                    f"{first.shard.file} {_brief(a)}"
                )
    return f"{other.shard.file} differs from {first.shard.file}"


def _brief(info: FieldInfo | None) -> str:
    return f"{list(info.shape)} {info.dtype}" if info else "missing"


def _package_version() -> str:
    try:
        return version("talk2dino")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
