"""Write a feature store: one complete shard at a time, the manifest last; or all from arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

import talk2dino
from talk2dino.errors import StoreError
from talk2dino.features.store.schema import (
    MANIFEST,
    EncoderInfo,
    FieldInfo,
    FieldTable,
    Manifest,
    ShardInfo,
    VisionInfo,
    checked,
    fields_from_json,
    is_shard_name,
    read_store_json,
    shard_name,
)
from talk2dino.features.store.shard_writer import (
    Arrays,
    ShardRows,
    check_image_rows,
    check_lengths,
    describe,
    prepare,
    write_hdf5,
)
from talk2dino.files import (
    PARTS,
    check_known,
    create_json,
    file_digest,
    foreign,
    json_lines,
    put_known,
    replacing,
    temporary_name,
    write_json,
    write_text,
)
from talk2dino.renamed import first_difference

IMAGES_PER_SHARD = 1024  # a stopped extraction loses at most one shard


@dataclass(frozen=True)
class ShardRecord:
    """The record of a finished shard, `.parts/{split}-{k:05d}.json`."""

    shard: ShardInfo
    fields: FieldTable
    skipped: int

    @classmethod
    def read(cls, file: Path) -> ShardRecord:
        """Parse a record; StoreError if it is malformed."""
        values = checked(cls, read_store_json(file, "delete it and extract again"), file, "")
        shard = ShardInfo(**checked(ShardInfo, values["shard"], file, "shard"))
        return cls(shard, fields_from_json(values["fields"], file), values["skipped"])


def open_for_append(folder: Path, settings: Mapping[str, Any], split: str) -> dict[int, ShardInfo]:
    """Create or resume a store in `folder`; returns the finished shards by number.

    `settings` (plain values) is everything that decides the bytes of a shard: source, encoders,
    size, dtype, images per shard. A folder begun with other settings, or holding shards without
    any, raises StoreError, files of other origin under a store's names WriteError. The number of
    ranks is no setting. Safe to call from every rank.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "settings.json"
    shards = [path for path in folder.glob(f"{split}-*.h5") if is_shard_name(path.name)]
    # Before settings.json is looked for: another rank writes it before its first shard.
    used = any(folder.glob("*.h5")) or (folder / MANIFEST).exists()
    if not file.exists():
        if used:
            raise StoreError(f"{folder}: holds shards of unknown settings; use an empty folder")
        create_json(file, dict(settings))  # if ranks start together, the first one's settings count
    noted, source = cast(Any, read_store_json(file, "delete the folder")), settings.get("source")
    if isinstance(source, Mapping) and "content" not in noted.get("source", {}):  # of version 0.1
        settings = {**settings, "source": {**source, "content": None}}
    if (other := first_difference(noted, dict(settings))) is not None:
        key, before, now = other
        raise StoreError(
            f"{folder}: was begun with {key}={before!r}, now {key}={now!r}; use the old value or "
            "another folder"
        )
    for shard in shards:
        if not is_finished(folder, shard.name):
            raise foreign(shard)
    check_known(folder / f"{split}-skipped.jsonl", folder / PARTS, _skipped(folder, split))
    return {k: record.shard for k, record in finished_shards(folder, split).items()}


def finished_shards(folder: Path, split: str) -> dict[int, ShardRecord]:
    """Shards that have both a record and a file of the recorded size, by number."""
    found: dict[int, ShardRecord] = {}
    for file in sorted((folder / PARTS).glob(f"{split}-*.json")):
        if (record := _record_of_whole_shard(folder, file)) is not None:
            found[int(file.stem.removeprefix(f"{split}-"))] = record
    return found


def is_finished(folder: Path, shard: str) -> bool:
    """Whether the shard of this file name is among `finished_shards`."""
    file = (folder / PARTS / shard).with_suffix(".json")
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
    does not fit in float16, a caption without image; WriteError for a full disk.

    Args:
        folder: the store; must exist.
        index: number of the shard, from 0.
        images: fields of `schema.IMAGE_FIELDS`, each [n, ...]; `id` and `file_name` are required.
        captions: fields of `schema.CAPTION_FIELDS`, each [m, ...], or empty for a store without
            captions; `image_row` counts within this shard.
        split: first part of the file name.
        dtype: of the features, `float16` or `float32`.
        skipped: number of images of this shard that could not be read.
    """
    file = shard_name(split, index)
    tables = prepare(images, captions, dtype, file)
    rows = {name: len(arrays.get("id", ())) for name, arrays in tables.items()}
    fields = {name: describe(arrays) for name, arrays in tables.items()}
    return put_shard(folder, file, lambda path: write_hdf5(path, tables), rows, fields, skipped)


def put_shard(
    folder: Path,
    name: str,
    write: Callable[[Path], None],
    rows: Mapping[str, int],
    fields: FieldTable,
    skipped: int,
) -> ShardInfo:
    """Put the file that `write` makes in its place, after its record.

    So a file without a record is of other origin, whenever a run was killed; it is not replaced.

    Args:
        folder: the store.
        name: of the shard's file.
        write: fills the file at a path.
        rows: number of images and of captions.
        fields: of both tables.
        skipped: number of images of this shard that could not be read.

    Raises:
        WriteError: such a file, or a full disk.
    """
    target, record = folder / name, (folder / PARTS / name).with_suffix(".json")
    refuse_foreign_shards(folder, [name])
    record.parent.mkdir(exist_ok=True)
    with replacing(target) as temporary:
        write(temporary)
        size, digest = temporary.stat().st_size, file_digest(temporary)
        info = ShardInfo(name, rows["images"], rows["captions"], size, digest)
        target.unlink(missing_ok=True)  # the new record describes other bytes
        write_json(record, dataclasses.asdict(ShardRecord(info, fields, skipped)))
    return info


def refuse_foreign_shards(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace files that are not, byte for byte, what the records say (WriteError)."""
    for target in (folder / name for name in names):
        record = (folder / PARTS / target.name).with_suffix(".json")
        if target.exists() and not (
            target.is_file()
            and record.exists()
            and ShardRecord.read(record).shard.sha256 == file_digest(target)
        ):
            raise foreign(target)


def _skipped(folder: Path, split: str) -> str:
    """The images that the shards leave out, a JSON object a line."""
    return "".join(part.read_text() for part in sorted((folder / PARTS).glob(f"{split}-*.skipped")))


def write_rows(folder: Path, index: int, rows: ShardRows, split: str, dtype: str) -> None:
    """Write shard `index` from grown rows, and the list of the images that it leaves out."""
    skipped = folder / PARTS / f"{split}-{index:05d}.skipped"
    skipped.unlink(missing_ok=True)
    if rows.skipped:
        write_text(skipped, json_lines(rows.skipped))
    images, captions = rows.arrays()
    number = len(rows.skipped)
    write_shard(folder, index, images, captions, split=split, dtype=dtype, skipped=number)


def finish_manifest(
    folder: Path,
    *,
    shards: int,
    split: str = "train",
    vision: VisionInfo | None = None,
    text: EncoderInfo | None = None,
) -> Manifest:
    """Merge the records of shards 0 ... `shards` - 1 into `manifest.json`, written last.

    Skipped images are listed beside it in `{split}-skipped.jsonl`, if there are any.

    Raises StoreError when a shard is missing, shards disagree in fields, or no image was kept.
    """
    done = finished_shards(folder, split)
    missing = [shard_name(split, k) for k in range(shards) if k not in done]
    if missing:
        raise StoreError(f"{folder}: {missing[0]} is not written; start the extraction again")
    records = [done[k] for k in range(shards)]
    listed = _skipped(folder, split)
    if listed:  # two ranks that finish at once both write it, with the same content
        put_known(folder / f"{split}-skipped.jsonl", folder / PARTS, listed)
    if not sum(record.shard.images for record in records):
        why = f" ({listed.splitlines()[0]})" if listed else ""
        raise StoreError(
            f"{folder}: no image to store{why}; check source and limit, and start anew"
        )
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
        package_version=talk2dino.__version__,
        skipped=sum(record.skipped for record in records),
    )
    write_json(folder / MANIFEST, dataclasses.asdict(manifest), shared=True)
    for index in range(shards):  # a killed run may have left these
        temporary_name(folder / shard_name(split, index)).unlink(missing_ok=True)
    return manifest


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


_Info = TypeVar("_Info", bound=EncoderInfo)


def write_store(
    folder: str | Path,
    images: Arrays,
    captions: Arrays,
    *,
    split: str = "train",
    images_per_shard: int = IMAGES_PER_SHARD,
    dtype: str = "float16",
    vision: VisionInfo | Mapping[str, Any] | None = None,
    text: EncoderInfo | Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a whole store from arrays.

    Raises StoreError and WriteError as `write_shard` does; also for no images, a folder that holds
    a store, or files of other origin under its names.

    Args:
        folder: created if needed; must not hold a store yet.
        images: fields [n, ...]; `id` defaults to 0 ... n - 1, `file_name` to the id.
        captions: fields [m, ...], or empty; `image_row` counts over all images. Captions are stored
            in the shard of their image, in the given order.
        split: name of the split.
        images_per_shard: images in each shard but the last.
        dtype: of the features, `float16` or `float32`.
        vision: the vision encoder, or its fields as a dict.
        text: the text encoder, or its fields as a dict.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.features import write_store
        >>> images = {"cls_token": np.eye(3), "file_name": ["a.jpg", "b.jpg", "c.jpg"]}
        >>> captions = {"image_row": [0, 0, 1, 2], "embedding": np.ones((4, 8))}
        >>> manifest = write_store("features", images, captions, images_per_shard=2)
        >>> [(shard.file, shard.images, shard.captions) for shard in manifest.shards]
        [('train-00000.h5', 2, 3), ('train-00001.h5', 1, 1)]
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise StoreError(f"{folder}: already holds a store; delete it or use another folder")
    if images_per_shard < 1:
        raise StoreError(f"images_per_shard={images_per_shard} must be at least 1")
    vision_info = _encoder(VisionInfo, vision, "vision")
    text_info = _encoder(EncoderInfo, text, "text")
    image_arrays, caption_arrays = _with_defaults(images, captions)
    n = len(image_arrays["id"])
    if not n:
        raise StoreError(f"{folder}: no image to store; give at least one row in images")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, n, images_per_shard)
    refuse_foreign_shards(folder, (shard_name(split, index) for index in range(len(starts))))
    for index, start in enumerate(starts):
        stop = min(start + images_per_shard, n)
        part = {name: array[start:stop] for name, array in image_arrays.items()}
        write_shard(
            folder,
            index,
            part,
            _captions_between(caption_arrays, start, stop),
            split=split,
            dtype=dtype,
        )
    return finish_manifest(
        folder, shards=len(starts), split=split, vision=vision_info, text=text_info
    )


def _with_defaults(
    images: Arrays, captions: Arrays
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Arrays with the ids, names and texts that were left out; image rows checked."""
    image_arrays = {name: np.asarray(value) for name, value in images.items()}
    caption_arrays = {name: np.asarray(value) for name, value in captions.items()}
    n = min((len(array) for array in image_arrays.values()), default=0)
    image_arrays.setdefault("id", np.arange(n))
    image_arrays.setdefault("file_name", image_arrays["id"].astype(str))
    if not caption_arrays:
        return image_arrays, caption_arrays
    if "image_row" not in caption_arrays:
        raise StoreError("captions: field image_row is missing; give the image's row per caption")
    m = len(caption_arrays["image_row"])
    caption_arrays.setdefault("id", np.arange(m))
    caption_arrays.setdefault("text", np.full(m, ""))
    check_lengths("images", image_arrays)
    check_lengths("captions", caption_arrays)
    check_image_rows(caption_arrays, n, "captions")
    return image_arrays, caption_arrays


def _captions_between(
    captions: Mapping[str, NDArray[Any]], start: int, stop: int
) -> dict[str, NDArray[Any]]:
    """Captions of images `start` ... `stop` - 1, in order, with rows counted from `start`."""
    if not captions:
        return {}
    rows = captions["image_row"]
    chosen = np.flatnonzero((rows >= start) & (rows < stop))
    part = {name: array[chosen] for name, array in captions.items()}
    return part | {"image_row": part["image_row"] - start}


def _encoder(kind: type[_Info], value: _Info | Mapping[str, Any] | None, key: str) -> _Info | None:
    """An encoder record from a dict, its other fields at their defaults."""
    if value is None or type(value) is kind:
        return value
    known = set(kind.__dataclass_fields__)
    if not isinstance(value, Mapping) or "name" not in value or set(value) - known:
        raise StoreError(f"{key}={value!r:.80} must be a dict with name and any of {sorted(known)}")
    return kind(**value)
