"""A folder of images with a table of captions, or a text file beside each image."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talk2dino.datasets.benchmarks.classes import composed
from talk2dino.datasets.captions.base import Entry, FileSource, caption_text, image_name
from talk2dino.datasets.pictures import is_picture, picture_suffixes
from talk2dino.errors import DataError
from talk2dino.files import read_text, user_path

_TABLES = ("captions.csv", "captions.jsonl", "captions.txt")


class CaptionFolder(FileSource):
    """A folder of images with `captions.csv|jsonl|txt`, or one `.txt` beside each image.

    The csv has the columns, the jsonl the keys `file_name` and `caption`, a row per caption; a
    line of `captions.txt` is the file name, a tab and the caption (Flickr's `name.jpg#0` without
    its number). The file beside an image has a caption per line; what has no partner is listed in
    `left_out`. Names are relative to the folder.

    Args:
        images: the folder.
        limit: take only the first images, in alphabetical order.

    Raises:
        DataError: no captions, two tables, a line without file or caption, text that is not UTF-8.
    """

    def __init__(self, images: str, limit: int | None = None) -> None:
        super().__init__(user_path(images))
        grouped: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, (name, text) in enumerate(self._pairs()):
            grouped[name].append((number, text))
        entries = [
            Entry(number, name, tuple(grouped[name])) for number, name in enumerate(sorted(grouped))
        ]
        self.set_entries(entries, limit, self.images)

    def fingerprint(self) -> dict[str, Any]:
        """Name of the folder, its number of images and captions, and what these say."""
        return {
            "folder": self.folder_name(),
            "images": len(self),
            "captions": self.caption_count(),
            "content": self.content(),
        }

    def _pairs(self) -> list[tuple[str, str]]:
        tables = [self.images / name for name in _TABLES if (self.images / name).is_file()]
        if len(tables) > 1:
            raise DataError(
                f"source.images={self.images}: {tables[0].name} and {tables[1].name} are both "
                "there; keep one of them"
            )
        if tables:
            pairs = list(_table(tables[0]))
            named = {composed(name) for name, _ in pairs}
            files = (
                file.relative_to(self.images)
                for file in sorted(self.images.rglob("*"))
                if is_picture(file)
            )
            self.left_out = [
                {"file_name": str(file), "reason": f"{tables[0].name} does not name it"}
                for file in files
                if composed(file.as_posix()) not in named
            ]
            return pairs
        return self._beside()

    def _beside(self) -> list[tuple[str, str]]:
        """Captions of texts beside pictures; pictures and texts without the other are left out."""
        files = [f for f in sorted(self.images.rglob("*")) if not f.name.startswith(".")]
        texts = {f.with_suffix(""): f for f in files if f.suffix.lower() == ".txt"}
        pictures = [file for file in files if file.suffix.lower() in picture_suffixes()]
        pairs: list[tuple[str, str]] = []
        reasons = dict.fromkeys(texts.values(), "no picture of its name that can be read")
        for picture in pictures:
            text = texts.get(picture.with_suffix(""))
            if picture.parent != self.images:
                reasons[picture] = "lies in a subfolder: write a captions.csv with its path"
            elif text is None:
                reasons[picture] = "no .txt beside it"
            elif found := _lines(text):
                pairs += [(picture.name, line) for line in found]
                reasons.pop(text, None)
            else:
                reasons[picture] = f"{text.name} is empty"
        self.left_out = [
            {"file_name": str(file.relative_to(self.images)), "reason": reason}
            for file, reason in sorted(reasons.items())
        ]
        if not pairs:
            raise DataError(
                f"source.images={self.images}: no captions.csv, captions.jsonl or captions.txt and "
                "no .txt beside an image; add one of them, or use source=pictures for a store "
                "without captions, which talk2dino.search reads"
            )
        return pairs


def _lines(path: Path) -> list[str]:
    """The captions of a text beside a picture."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [_accepted(path, number, line.strip()) for number, line in lines if line.strip()]


def _accepted(path: Path, line: int, caption: object) -> str:
    try:
        return caption_text(caption)
    except ValueError as error:
        raise DataError(f"{path}: line {line}: {error}") from error


def _table(path: Path) -> Iterator[tuple[str, str]]:
    """(file name, caption) of every row."""
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".txt": _tab_rows}
    for line, row in readers[path.suffix](path, read_text(path)):
        try:
            yield image_name(row.get("file_name")), caption_text(row.get("caption"))
        except ValueError as error:
            raise DataError(f"{path}: line {line} needs file_name and caption: {error}") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        columns = list(reader.fieldnames or [])
        if not {"file_name", "caption"} <= set(columns):
            raise DataError(
                f"{path}: line 1 must name the columns file_name and caption: {columns}"
            )
        if len(set(columns)) < len(columns):
            twice = next(one for one in columns if columns.count(one) > 1)
            raise DataError(f"{path}: line 1 names {twice} twice; give a row per caption")
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path}: line {line} has more than {len(columns)} columns; put a caption with "
                    'a comma into quotes: a.jpg,"a dog, asleep"'
                )
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: line {line}: not csv ({error}); a quote that opens must close, and one "
            'within a caption is written twice: ""'
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is not json ({error})") from error
        yield number, row if isinstance(row, dict) else {}


def _tab_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise DataError(f"{path}: line {number} has no tab between file name and caption")
        head, mark, count = name.rpartition("#")
        yield (
            number,
            {"file_name": head if mark and count.isdigit() else name, "caption": caption.strip()},
        )
