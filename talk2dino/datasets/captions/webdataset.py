"""Tars of captioned images in WebDataset's layout, such as CC3M written by img2dataset."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from talk2dino.datasets.captions.base import Entry, Source, caption_text, check_limit
from talk2dino.datasets.pictures import read_picture
from talk2dino.datasets.tars import Member, expand_tars, read_member, tar_members
from talk2dino.errors import DataError, WriteError
from talk2dino.files import cache_dir, replacing

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first that a sample has is taken
ABSENT = -1  # the offset of what a sample lacks
_JSON_KEYS = ("caption", "captions")
_VERSION = 2

Parts = dict[str, Member]  # a sample's members by extension


def sample_index(path: Path, json_key: str | None) -> NDArray[Any]:
    """The samples of one tar, [n] of a structured dtype, in the order of the tar.

    Columns: `name` (bytes, of the image's member), `image_offset`, `image_size`, `text_offset`,
    `text_size` (bytes; an absent part has the offset -1), `json` (the text is json), `captions`
    (0 where they cannot be read) and `first_caption` (counted within the tar).

    The table is cached in the cache folder and rebuilt when the tar's size or time changes.

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
    """Captions of a sample, at least one, with single spaces.

    Args:
        data: content of the `.txt` (one caption) or the `.json`.
        is_json: which of the two.
        json_key: key of a caption or a list of captions; None is `caption`, else `captions`.

    Raises:
        ValueError: the reason why there is none.
    """
    text = data.decode("utf-8-sig")  # UnicodeDecodeError is a ValueError
    if not is_json:
        found: Any = text
    else:
        try:
            row = json.loads(text)
        except RecursionError as error:
            raise ValueError("its .json is nested too deeply") from error
        keys = _JSON_KEYS if json_key is None else (json_key,)
        if not isinstance(row, dict):
            raise ValueError("its .json is no object")
        found = next((row[key] for key in keys if row.get(key) is not None), None)
        if found is None:
            raise ValueError(f"its .json has no {' and no '.join(keys)}")
    given = [found] if isinstance(found, str) else found
    if not isinstance(given, list) or not all(isinstance(caption, str) for caption in given):
        raise ValueError("its caption is no text")
    captions = [" ".join(caption_text(text).split()) for text in given if text.strip()]
    if not captions:
        raise ValueError("its caption is empty")
    return captions


def _samples(path: Path, json_key: str | None) -> NDArray[Any]:
    groups = _grouped(path)
    wanted = ("json",) if json_key is not None else ("txt", "json")
    rows, first = [], 0
    with path.open("rb") as file:
        for parts in groups.values():
            image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
            text = next((parts[suffix] for suffix in wanted if suffix in parts), None)
            ends = {suffix.rpartition(".")[2] for suffix in parts}  # also of a.b.txt, of the key a
            if image is None and not ends & {"txt", "json"}:
                continue  # masks, audio and other things that a tar may hold
            captions, is_json = 0, text is not None and text is parts.get("json")
            digest = 0
            if text is not None:
                file.seek(text.offset)
                data = file.read(text.size)
                captions = _count(data, is_json, json_key)
                digest = int.from_bytes(sha256(data).digest()[:8], "little")
            name = (image or next(iter(parts.values()))).name
            places = (*_place(image), *_place(text))
            rows.append((_encoded(name), *places, is_json, captions, first, digest))
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
            ("text_digest", "<u8"),
        ]
    )


def _read_cached(file: Path, state: NDArray[Any]) -> NDArray[Any] | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            return content["samples"] if np.array_equal(content["state"], state) else None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write_cached(file: Path, state: NDArray[Any], samples: NDArray[Any]) -> None:
    """Without a writable cache folder the next run builds the index again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as temporary, temporary.open("wb") as opened:
            np.savez(opened, state=state, samples=samples)
    except (OSError, WriteError):
        return


class WebDataset(Source):
    """Samples `key.jpg` with `key.txt` or `key.json` in plain tars, by position.

    Every tar's members are listed once (the list is cached); then a sample is one read at an
    offset, in any order and any process. Samples count through the tars in the order given. A
    sample without a readable image or caption keeps its place and is listed as skipped by
    extraction. Caption ids count all captions before; image ids are positions.

    Args:
        tars: a brace range (`cc3m/{00000..00331}.tar`), a glob, a folder, a file, or a list.
        json_key: take the captions from this key of `key.json`, a text or a list of texts; None
            takes `key.txt`, and where there is none, `caption` or `captions` of `key.json`.
        limit: take only the first samples; tars after them are not opened.

    Raises:
        DataError: a missing, compressed or cut-off tar, the same member twice in a tar, or no
            sample with both image and caption.
    """

    def __init__(
        self, tars: str | list[str], json_key: str | None = None, limit: int | None = None
    ) -> None:
        self.tars = expand_tars(tars, "source.tars")
        self.json_key = json_key
        self._tables = self._read_tables(check_limit(limit))  # one per tar
        self.tars = self.tars[: len(self._tables)]
        self._names = _names(self.tars)
        self._starts = _starts([len(table) for table in self._tables])
        self._first_captions = _starts([int(t["captions"].sum()) for t in self._tables])
        if not any(((t["captions"] > 0) & (t["image_offset"] >= 0)).any() for t in self._tables):
            hint = f"{json_key} in .json" if json_key else ".txt, or caption in .json"
            raise DataError(
                f"source.tars: no sample of {self.tars[0]} (the first of {len(self.tars)}) has an "
                f"image ({', '.join(IMAGES)}) and a caption ({hint}); set source.json_key"
            )

    def _read_tables(self, limit: int | None) -> list[NDArray[Any]]:
        console = Console(stderr=True)
        tables: list[NDArray[Any]] = []
        for path in track(
            self.tars,
            "index tars",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            table = sample_index(path, self.json_key)
            tables.append(table if limit is None else table[:limit])
            if limit is not None:
                limit -= len(tables[-1])
                if not limit:
                    break
        return tables

    def __len__(self) -> int:
        return int(self._starts[-1])

    def caption_count(self) -> int:
        """Known from the index."""
        return int(self._first_captions[-1])

    def entry(self, index: int) -> Entry:
        """Captions of sample `index`; none if they cannot be read.

        Raises:
            DataError: the tar has changed since it was listed.
        """
        tar, sample = self._place(index)
        name = f"{self._names[tar]}/{sample['name'].decode(errors='replace')}"
        if not sample["captions"]:
            return Entry(index, name, ())
        first = int(self._first_captions[tar] + sample["first_caption"])
        try:
            texts = self._captions(tar, sample)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.tars[tar]}: changed while being read ({error})") from error
        return Entry(index, name, tuple((first + k, text) for k, text in enumerate(texts)))

    def image(self, index: int) -> Image.Image:
        """Read the image of sample `index`.

        Raises:
            OSError: unreadable, absent, or without a caption; says which.
        """
        tar, sample = self._place(index)
        if sample["image_offset"] == ABSENT:
            raise OSError(
                f"the sample has no image ({', '.join(IMAGES)}); what is before the first dot of a "
                "name is its key"
            )
        if not sample["captions"]:
            try:
                self._captions(tar, sample)
            except ValueError as error:
                raise OSError(f"the sample has no caption: {error}") from error
        where = int(sample["image_offset"]), int(sample["image_size"])
        data = read_member(self.tars[tar], *where)
        name = f"{self.tars[tar]}: sample {index}"
        return read_picture(BytesIO(data), name)

    def fingerprint(self) -> dict[str, Any]:
        """Number, names and sizes of the tars, where captions come from and what they say."""
        content = sha256()
        for table in self._tables:
            for field in ("name", "image_size", "text_digest"):
                content.update(np.ascontiguousarray(table[field]).tobytes())
        sizes = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.tars)
        return {
            "tars": len(self.tars),
            "names_and_sizes": sha256(sizes.encode()).hexdigest()[:16],
            "json_key": self.json_key,
            "images": len(self),
            "captions": self.caption_count(),
            "content": content.hexdigest()[:16],
        }

    def _place(self, index: int) -> tuple[int, Any]:
        """Position of the tar and row of its table; an IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tar = int(np.searchsorted(self._starts, index, side="right")) - 1
        return tar, self._tables[tar][index - int(self._starts[tar])]

    def _captions(self, tar: int, sample: Any) -> list[str]:
        if sample["text_offset"] == ABSENT:
            raise ValueError(f"it has no {'.json' if self.json_key else '.txt and no .json'}")
        where = int(sample["text_offset"]), int(sample["text_size"])
        data = read_member(self.tars[tar], *where)
        return parse_captions(data, bool(sample["json"]), self.json_key)


def _names(tars: Sequence[Path]) -> list[str]:
    """What tars are called in a store: their names, with folders where these do not differ."""
    names = [path.name for path in tars]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(tars)
    return [path.relative_to(common).as_posix() for path in tars]


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """Number of items before each tar, then the total, [T + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
