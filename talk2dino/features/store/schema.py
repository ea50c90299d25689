"""What a feature store holds, as data: field names, shapes, and the manifest.

Format 1. A store is a folder with `manifest.json` and shards `{split}-{k:05d}.h5`.
Letters: P patches, D vision width, V width of a vision block (D unless several blocks are joined),
H heads, C text width, L tokens, W text tower width.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from talk2dino.errors import StoreError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# Shape of one row; the leading row axis is left out.
IMAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "id": (),
    "file_name": (),
    "patch_tokens": ("P", "D"),
    "self_attn_maps": ("H", "P"),
    "cls_token": ("D",),
    "avg_self_attn_out": ("D",),
    "disentangled_self_attn": ("H", "D"),
    "second_last_out": ("V",),
    "patch_index": ("P",),
}
CAPTION_FIELDS: dict[str, tuple[str, ...]] = {
    "id": (),
    "image_row": (),
    "text": (),
    "embedding": ("C",),
    "token_embeddings": ("L", "C"),
    "token_mask": ("L",),
    "second_last_tokens": ("L", "W"),
    "eot_index": (),
}
TABLES: dict[str, dict[str, tuple[str, ...]]] = {"images": IMAGE_FIELDS, "captions": CAPTION_FIELDS}

# Fields that are no features; every other field is float16 or float32.
FIXED_DTYPES: dict[str, str] = {
    "id": "int64",
    "image_row": "int64",
    "patch_index": "int64",
    "eot_index": "int64",
    "token_mask": "bool",
    "file_name": "str",
    "text": "str",
}
FEATURE_DTYPES = ("float16", "float32")
DTYPES = (*FEATURE_DTYPES, "int64", "bool", "str")

_T = TypeVar("_T")
_SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9_.]+)-(?P<index>\d{5,})\.h5")


def shard_name(split: str, index: int) -> str:
    """File name of shard `index`; refuses a split name that could leave the folder."""
    name = f"{split}-{index:05d}.h5"
    if not _SHARD_NAME.fullmatch(name) or split.startswith("."):
        raise StoreError(f"split={split!r} is no plain name; use letters, digits and _, e.g. train")
    return name


def is_shard_name(name: str) -> bool:
    """Whether a file's name is one that `shard_name` gives."""
    return _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardInfo:
    """One shard: rows of both tables, size in bytes, SHA-256 of the file."""

    file: str
    images: int
    captions: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FieldInfo:
    """Shape of one row (without the row axis) and dtype (`str` for text)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EncoderInfo:
    """A frozen encoder: its name, its weights, and `spec`, the config that built it."""

    name: str
    weights_sha256: str = ""
    embed_dim: int = 0
    spec: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionInfo(EncoderInfo):
    """The vision encoder; sizes in pixels, `preprocessing` as plain values (mean, std, ...)."""

    image_size: int = 0
    preprocessing: dict[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 0
    patch_size: int = 0
    num_heads: int = 0


FieldTable = dict[str, dict[str, FieldInfo]]  # table name -> field name -> shape and dtype


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; `skipped` counts images that could not be decoded."""

    split: str
    shards: tuple[ShardInfo, ...]
    fields: FieldTable
    vision: VisionInfo | None
    text: EncoderInfo | None
    package_version: str
    skipped: int = 0
    format: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, data: object, file: Path) -> Manifest:
        """Build from parsed JSON; StoreError names `file` and the first wrong key."""
        if isinstance(data, dict) and data.get("format") != FORMAT_VERSION:
            raise StoreError(
                f"{file}: format is {data.get('format')!r}, this version reads {FORMAT_VERSION}; "
                "extract again or use a matching talk2dino"
            )
        values = checked(cls, data, file, "")
        shards = [
            _object(ShardInfo, s, file, f"shards[{i}]") for i, s in enumerate(values["shards"])
        ]
        values["shards"] = tuple(shards)
        _check_names(shards, values["split"], file)
        values["fields"] = fields_from_json(values["fields"], file)
        for key, kind in (("vision", VisionInfo), ("text", EncoderInfo)):
            if values[key] is not None:
                values[key] = _object(kind, values[key], file, key)
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`; StoreError if it is absent, no JSON, or malformed."""
        file = folder / MANIFEST
        return cls.from_json(
            read_store_json(file, "extract again, or finish the interrupted run"), file
        )


def read_store_json(file: Path, fix: str) -> object:
    """Parse a JSON file; StoreError names the file, the trouble, and `fix`."""
    try:
        parsed: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{file}: not found; {fix}") from None
    except NotADirectoryError:
        raise StoreError(f"{file.parent}: not a folder; give the folder of a store") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file}: unreadable ({error}); {fix}") from None
    return parsed


def fields_from_json(data: object, file: Path) -> FieldTable:
    """Parse the `fields` part: `{"images": {name: {shape, dtype}}, "captions": {...}}`."""
    if not isinstance(data, dict) or set(data) != set(TABLES):
        raise StoreError(f"{file}: fields must hold exactly {sorted(TABLES)}, found {data!r:.80}")
    table: FieldTable = {}
    for name, entries in data.items():
        if not isinstance(entries, dict):
            raise StoreError(f"{file}: fields.{name} must be an object, found {entries!r:.80}")
        table[name] = {}
        for key, entry in entries.items():
            values = checked(FieldInfo, entry, file, f"fields.{name}.{key}")
            if values["dtype"] not in DTYPES:
                where = f"fields.{name}.{key}.dtype"
                raise StoreError(
                    f"{file}: {where} is {values['dtype']!r}, expected one of {DTYPES}"
                )
            table[name][key] = FieldInfo(tuple(values["shape"]), values["dtype"])
    return table


def checked(cls: type[Any], data: object, file: Path, where: str) -> dict[str, Any]:
    """A copy of `data` after its keys and plain types were compared with dataclass `cls`.

    Raises StoreError naming the file and the key that is unknown, missing, or of a wrong type.
    """
    if not isinstance(data, dict):
        raise StoreError(f"{file}: {where or 'the file'} must be an object, found {data!r:.80}")
    prefix = f"{where}." if where else ""
    annotations = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for key in data:
        if key not in annotations:
            raise StoreError(f"{file}: unknown key {prefix}{key}; known are {sorted(annotations)}")
    for key, annotation in annotations.items():
        if key not in data:
            raise StoreError(f"{file}: key {prefix}{key} is missing; extract again")
        if not _fits(data[key], annotation):
            raise StoreError(f"{file}: {prefix}{key} is {data[key]!r:.80}, expected {annotation}")
    return dict(data)


def _fits(value: object, annotation: str) -> bool:
    """Whether a JSON value may stand for a field annotated so."""
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "tuple[int, ...]":
        return isinstance(value, list) and all(_fits(v, "int") for v in value)
    if annotation.startswith("tuple"):
        return isinstance(value, list)
    if annotation.endswith("| None") and value is None:
        return True
    return isinstance(value, dict)


def _object(cls: type[_T], data: object, file: Path, where: str) -> _T:
    return cls(**checked(cls, data, file, where))


def _check_names(shards: list[ShardInfo], split: str, file: Path) -> None:
    """Shards are numbered from zero without gaps and lie in the folder itself."""
    for index, shard in enumerate(shards):
        if shard.file != shard_name(split, index):
            raise StoreError(
                f"{file}: shards[{index}].file is {shard.file!r}, expected "
                f"{shard_name(split, index)!r}; extract again"
            )


def check_shapes(fields: Mapping[str, FieldInfo], table: str, file: str) -> None:
    """Refuse fields of a table that disagree on P, D, …; StoreError names both shapes."""
    owners: dict[str, str] = {}  # P, D, … -> the first field that has it
    for name, info in fields.items():
        symbols = TABLES[table][name]
        if len(symbols) != len(info.shape):
            want = "[" + ", ".join(("n", *symbols)) + "]"
            raise StoreError(f"{file}: {table}/{name} has row shape {info.shape}, expected {want}")
        for symbol, size in zip(symbols, info.shape, strict=True):
            owner = owners.setdefault(symbol, name)
            known = fields[owner].shape[TABLES[table][owner].index(symbol)]
            if known != size:
                raise StoreError(
                    f"{file}: {table}/{name} {info.shape} and {table}/{owner} "
                    f"{fields[owner].shape} disagree on {symbol} ({size} and {known})"
                )
