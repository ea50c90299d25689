"""Tars of captioned images in WebDataset's layout, such as CC3M written by img2dataset."""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from talk2dino.errors import DataError
from talk2dino.features.pictures import read_picture
from talk2dino.features.sources.base import Entry, Source, check_limit
from talk2dino.features.sources.webdataset_index import (
    ABSENT,
    IMAGES,
    parse_captions,
    sample_index,
)
from talk2dino.features.tar_files import TarReader, expand_tars


class WebDataset(Source):
    """Samples `key.jpg` with `key.txt` or `key.json` in plain tars, by position.

    Every tar's members are listed once (kept in the cache folder); then a sample is one read at an
    offset, in any order and any process. Samples count through the tars in the order given. A
    sample without a readable image or caption keeps its place and is listed as skipped by
    extraction. Caption ids count all captions before; image ids are positions.

    Args:
        tars: a brace range (`cc3m/{00000..00331}.tar`), a glob, a folder, a file, or a list.
        json_key: take the captions from this key of `key.json`, a text or a list of texts; None
            takes `key.txt`, and where there is none, `caption` or `captions` of `key.json`.
        limit: take only the first samples; tars behind them are not opened.

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
        self._reader = TarReader(self.tars)
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
        name = f"{self.tars[tar].name}/{sample['name'].decode(errors='replace')}"
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
            raise OSError(f"the sample has no image ({', '.join(IMAGES)})")
        if not sample["captions"]:
            try:
                self._captions(tar, sample)
            except ValueError as error:
                raise OSError(f"the sample has no caption: {error}") from error
        data = self._reader.read(tar, int(sample["image_offset"]), int(sample["image_size"]))
        return read_picture(BytesIO(data))

    def fingerprint(self) -> dict[str, Any]:
        """Number, names and sizes of the tars, where captions come from, number of samples."""
        sizes = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.tars)
        return {
            "tars": len(self.tars),
            "names_and_sizes": sha256(sizes.encode()).hexdigest()[:16],
            "json_key": self.json_key,
            "images": len(self),
            "captions": self.caption_count(),
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
        data = self._reader.read(tar, int(sample["text_offset"]), int(sample["text_size"]))
        return parse_captions(data, bool(sample["json"]), self.json_key)


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """What lies before each tar, then the total, [T + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
