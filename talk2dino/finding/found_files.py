"""What a search leaves: `found.json` with all results, and `found.html` with thumbnails."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import talk2dino
from talk2dino.datasets.captions.base import from_square
from talk2dino.datasets.pictures import (
    open_quietly,
    picture_suffixes,
    upright_rgb,
    upright_size,
)
from talk2dino.datasets.tars import Member, read_member, tar_members
from talk2dino.errors import Advance, DataError
from talk2dino.evaluation.report import report_templates
from talk2dino.files import read_json, refuse_foreign_run, replacing, write_text
from talk2dino.finding.scan import Found
from talk2dino.segmentation.overlay import heat_overlay

JSON, PAGE = "found.json", "found.html"
WRITTEN_BY = "talk2dino.search"
HEIGHT = 200  # of a thumbnail, pixels
WIDEST = 3  # a longer thumbnail is cut to its middle, in its heights
PICTURES = 16 << 20  # characters of pictures on the page
QUERIES = 200  # on the page; all are in the JSON
SHOWN, FIRST = 10, 3  # queries and results of each in the terminal


@dataclass
class Written:
    """What was written, and what was not found on the way.

    Attributes:
        queries: how many were answered.
        first: entries of the first results of the first queries, for the terminal.
        missing: pictures that could not be read, with the reason.
    """

    queries: int = 0
    first: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A result on the page: what it says, and a data URI of its thumbnail or None."""

    entry: Mapping[str, Any]
    thumbnail: str | None


def refuse_foreign_results(folder: Path) -> None:
    """Refuse to write over what a search did not write (ConfigError)."""

    def ours() -> bool:
        with suppress(DataError):
            if (folder / PAGE).is_dir():
                return False
            found = read_json(folder / JSON, dict, "results of a search")
            return str(found.get("written_by", "")).startswith(WRITTEN_BY)
        return False

    refuse_foreign_run(folder, ours, (PAGE, JSON))


def write_found(
    results: Iterable[Found],
    folder: Path,
    facts: Mapping[str, Any],
    images: Path | None = None,
    advance: Advance = lambda done, total: None,
    total: int = 0,
) -> Written:
    """Write both files, each complete or not at all; results go through one by one.

    Args:
        results: query after query, the best first.
        folder: where to.
        facts: plain values that stand before the results, and on the page.
        images: folder of the pictures, or of their tars, for boxes in their pixels and thumbnails.
        advance: gets (results written, total).
        total: number of results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, sections = Written(), list[tuple[str, list[Shown]]]()
    pictures = None if images is None else Pictures(images)
    room, done = PICTURES, 0
    head = json.dumps({"written_by": f"{WRITTEN_BY} {talk2dino.__version__}", **facts}, indent=1)
    with replacing(folder / JSON) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{head.removesuffix("}").rstrip()},\n "queries": [')
        for number, (query, found) in enumerate(groupby(results, lambda one: one.query)):
            kept, shown = list(found), list[Shown]()
            limits = _limits(kept)
            for rank, one in enumerate(kept):
                drawn, size = number < QUERIES and room > 0, None
                picture = None
                if pictures is not None:
                    picture, size = pictures.read(one, written.missing, drawn)
                entry = _entry(one, size)
                separator = "," if rank else f"{',' if number else ''}\n  {_opened(query)}"
                file.write(f"{separator} {json.dumps(entry, ensure_ascii=False)}")
                del entry["grid"]  # of all results they would fill the memory
                if number < SHOWN and rank < FIRST:
                    written.first.setdefault(query, []).append(entry)
                if number < QUERIES:
                    thumbnail = _thumbnail(one, picture, limits) if drawn else None
                    room -= len(thumbnail or "")
                    shown.append(Shown(entry, thumbnail))
                done += 1
                advance(done, total)
            file.write("]}")
            written.queries += 1
            if number < QUERIES:
                sections.append((query, shown))
        file.write("\n ]\n}\n")
    context: dict[str, Any] = {"title": "Pictures found", "facts": facts, "sections": sections}
    context |= {"missing": written.missing, "queries": written.queries}
    context |= {"without": sum(one.thumbnail is None for _, shown in sections for one in shown)}
    page = report_templates("talk2dino.finding").get_template("found.html.j2")
    write_text(folder / PAGE, page.render(context))
    return written


def _opened(query: str) -> str:
    """The JSON of a query up to its first result."""
    return f'{{"query": {json.dumps(query, ensure_ascii=False)}, "found": ['


def _entry(found: Found, size: tuple[int, int] | None) -> dict[str, Any]:
    """A result as plain values; `size` is height and width of its picture."""
    entry: dict[str, Any] = {
        "rank": found.rank,
        "score": round(found.score, 6),
        "row": found.row,
        "id": found.id,
        "file_name": found.file_name,
        "patch": None,
        "square": None,
        "box": None,
        "grid": None,
    }
    if found.grid is not None and found.box is not None:
        entry |= {"patch": found.patch, "square": found.box, "grid": _plain(found.grid)}
        if size is not None:
            entry["box"] = from_square(found.box, found.side, size)
    return entry


def _plain(grid: Tensor) -> list[list[float | None]]:
    """Four digits a score; None where no patch was kept."""
    return [[None if v != v else round(v, 4) for v in row] for row in grid.tolist()]


def _limits(found: Sequence[Found]) -> tuple[float, float]:
    """The lowest and the highest score of all maps of a query, which share their colors."""
    grids = [one.grid[~one.grid.isnan()] for one in found if one.grid is not None]
    if not grids:
        return 0.0, 1.0
    return min(float(g.min()) for g in grids), max(float(g.max()) for g in grids)


class Pictures:
    """The pictures of results, in a folder of files or of tars."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tars: dict[Path, dict[str, Member]] = {}
        picture_suffixes()  # HEIC is known from here on

    def read(
        self, found: Found, missing: dict[str, str], drawn: bool
    ) -> tuple[Image.Image | None, tuple[int, int] | None]:
        """The picture of a result, upright, and its height and width.

        Args:
            found: the result.
            missing: gets the reason where there is none; both are None then.
            drawn: whether the picture is needed; of a large JPEG a smaller one is decoded.
        """
        name = found.file_name
        if name is None:
            missing[f"row {found.row}"] = "the store has no names of pictures"
            return None, None
        try:
            with open_quietly(self._file(name)) as image:
                size = upright_size(image)
                if drawn:
                    image.draft(None, (2 * HEIGHT, 2 * HEIGHT))
                return upright_rgb(image) if drawn else None, size
        except Exception as error:  # broken files make decoders raise anything
            absent = "not in this folder" if isinstance(error, FileNotFoundError) else str(error)
            missing[name] = " ".join(absent.split())
            return None, None

    def _file(self, name: str) -> Path | BytesIO:
        """A picture's file, or its bytes in a tar, which sources call `0.tar/0001.jpg`."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise OSError("lies outside of the folder")
        tar = next((one for one in path.parents[:-1] if (self.folder / one).is_file()), None)
        if tar is None:
            return self.folder / path
        file, member = self.folder / tar, str(path.relative_to(tar))
        if file not in self._tars:
            self._tars[file] = {str(PurePosixPath(one.name)): one for one in tar_members(file)}
        place = self._tars[file].get(member)
        if place is None:
            raise OSError(f"not in {tar}")
        return BytesIO(read_member(file, place.offset, place.size))


def _thumbnail(
    found: Found, picture: Image.Image | None, limits: tuple[float, float]
) -> str | None:
    """Data URI of a picture with the best patch framed, and beside it the map of scores."""
    if picture is None and found.grid is None:
        return None
    if picture is None:
        empty = Image.new("RGB", (HEIGHT, HEIGHT), (128, 128, 128))
        return _uri(_with_heat(empty, found, (0, 0, HEIGHT, HEIGHT), limits, 1.0))
    excess = (picture.width - WIDEST * picture.height) // 2
    if excess > 0:  # as much on both sides: the square that was encoded stays in the middle
        picture = picture.crop((excess, 0, picture.width - excess, picture.height))
    width = max(1, round(picture.width * HEIGHT / picture.height))
    small = picture.resize((width, HEIGHT))
    if found.grid is None or found.box is None:
        return _uri(small)

    def place(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        left, top, right, bottom = from_square(box, found.side, (picture.height, picture.width))
        across, down = width / picture.width, HEIGHT / picture.height
        ends = (left * across, top * down, right * across, bottom * down)
        return tuple(round(end) for end in ends)  # type: ignore[return-value]

    square = place((0, 0, found.side, found.side))
    heat = _with_heat(small, found, square, limits, 0.65)
    left, top, right, bottom = place(found.box)
    for one in (small, heat):
        draw = ImageDraw.Draw(one)
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=(0, 0, 0), width=1)
        draw.rectangle((left - 1, top - 1, right, bottom), outline=(255, 255, 255), width=1)
    sheet = Image.new("RGB", (2 * width + 4, HEIGHT), (255, 255, 255))
    sheet.paste(small, (0, 0))
    sheet.paste(heat, (width + 4, 0))
    return _uri(sheet)


def _with_heat(
    picture: Image.Image,
    found: Found,
    square: tuple[int, int, int, int],
    limits: tuple[float, float],
    alpha: float,
) -> Image.Image:
    """A copy with the scores laid over the square that was encoded."""
    if found.grid is None:
        return picture
    left, top, right, bottom = square
    grid = found.grid.nan_to_num(limits[0])[None, None]
    scores = F.interpolate(grid, size=(max(1, bottom - top), max(1, right - left)))[0, 0]
    shown = picture.copy()
    part = picture.crop((left, top, left + scores.shape[1], top + scores.shape[0]))
    shown.paste(heat_overlay(part, scores, *limits, alpha), (left, top))
    return shown


def _uri(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
