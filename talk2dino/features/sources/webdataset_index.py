"""Where the samples of a WebDataset tar lie: found once, then kept in the cache folder."""

from __future__ import annotations

import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.atomic import replacing
from talk2dino.encoders.bundled import cache_dir
from talk2dino.errors import DataError, StoreError
from talk2dino.features.tar_files import Member, tar_members

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first that a sample has is taken
ABSENT = -1  # the offset of what a sample lacks
_JSON_KEYS = ("caption", "captions")
_VERSION = 1

Parts = dict[str, Member]  # a sample's members by extension


def sample_index(path: Path, json_key: str | None) -> NDArray[Any]:
    """The samples of one tar, [n] of a structured dtype, in the order of the tar.

    Columns: `name` (bytes, of the image's member), `image_offset`, `image_size`, `text_offset`,
    `text_size` (bytes; an absent part has the offset -1), `json` (the text is json), `captions`
    (0 where they cannot be read) and `first_caption` (counted within the tar).

    The table is kept below the cache folder and made again when the tar's size or time differs.

    Raises:
        DataError: no plain tar, cut off, or the same sample twice.
    """
    status = path.stat()
    state = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    key = sha256(json.dumps([str(path.resolve()), json_key]).encode()).hexdigest()[:32]
    cached = cache_dir() / "tar-index" / f"{key}.npz"
    samples = _read_cached(cached, state)
    if samples is None:
        samples = _samples(path, json_key)
        _write_cached(cached, state, samples)
    return samples


def parse_captions(data: bytes, is_json: bool, json_key: str | None) -> list[str]:
    """Captions of a sample, at least one, white space made even.

    Args:
        data: content of the `.txt` (one caption) or the `.json`.
        is_json: which of the two.
        json_key: key of a caption or a list of captions; None is `caption`, else `captions`.

    Raises:
        ValueError: says in half a line why there is none.
    """
    text = data.decode("utf-8-sig")  # UnicodeDecodeError is a ValueError
    if not is_json:
        found: Any = text
    else:
        row = json.loads(text)
        keys = _JSON_KEYS if json_key is None else (json_key,)
        if not isinstance(row, dict):
            raise ValueError("its .json is no object")
        found = next((row[key] for key in keys if row.get(key) is not None), None)
        if found is None:
            raise ValueError(f"its .json has no {' and no '.join(keys)}")
    given = [found] if isinstance(found, str) else found
    if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
        raise ValueError("its caption is no text")
    captions = [" ".join(caption.split()) for caption in given]
    if not any(captions):
        raise ValueError("its caption is empty")
    return [caption for caption in captions if caption]


def _samples(path: Path, json_key: str | None) -> NDArray[Any]:
    groups = _grouped(path)
    wanted = ("json",) if json_key is not None else ("txt", "json")
    rows, first = [], 0
    with path.open("rb") as file:
        for parts in groups.values():
            image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
            text = next((parts[suffix] for suffix in wanted if suffix in parts), None)
            if image is None and not any(suffix in parts for suffix in ("txt", "json")):
                continue  # masks, audio and what else a tar may hold
            captions, is_json = 0, text is not None and text is parts.get("json")
            if text is not None:
                file.seek(text.offset)
                captions = _count(file.read(text.size), is_json, json_key)
            name = (image or next(iter(parts.values()))).name
            rows.append((_encoded(name), *_place(image), *_place(text), is_json, captions, first))
            first += captions
    return np.array(rows, dtype=_dtype(max((len(row[0]) for row in rows), default=1)))


def _grouped(path: Path) -> dict[str, Parts]:
    """Members by key, the path up to the first dot of its last part, and lower-case extension."""
    groups: dict[str, Parts] = {}
    for member in tar_members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem:
            continue  # hidden files, such as ._0001.jpg that macOS adds
        parts = groups.setdefault(f"{folder}{slash}{stem}", {})
        if suffix.lower() in parts:
            raise DataError(f"{path}: {member.name} is in it twice; make the keys unique")
        parts[suffix.lower()] = member
    return groups


def _count(data: bytes, is_json: bool, json_key: str | None) -> int:
    try:
        return len(parse_captions(data, is_json, json_key))
    except ValueError:  # extraction lists the image with the reason
        return 0


def _place(member: Member | None) -> tuple[int, int]:
    return (ABSENT, 0) if member is None else (member.offset, member.size)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", errors="replace")


def _dtype(name_length: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("name", f"S{name_length}"),
            ("image_offset", "<i8"),
            ("image_size", "<i8"),
            ("text_offset", "<i8"),
            ("text_size", "<i4"),
            ("json", "?"),
            ("captions", "<i4"),
            ("first_caption", "<i8"),
        ]
    )


def _read_cached(file: Path, state: NDArray[Any]) -> NDArray[Any] | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            return content["samples"] if np.array_equal(content["state"], state) else None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write_cached(file: Path, state: NDArray[Any], samples: NDArray[Any]) -> None:
    """Without a writable cache folder the index is made again by the next run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as temporary, temporary.open("wb") as opened:
            np.savez(opened, state=state, samples=samples)
    except (OSError, StoreError):
        return
