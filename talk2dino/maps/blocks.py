"""A map's windows, at places that its extent does not move; blocks of them done one by one."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import BACKGROUND
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import Advance, ConfigError
from talk2dino.files import (
    foreign,
    read_json,
    refuse_foreign,
    replacing,
    sole_writer,
    user_path,
    write_json,
)
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.inference.vocabulary import EncodedPicture, OpenVocabulary
from talk2dino.maps.geotiff import MapImage
from talk2dino.maps.map_files import (
    SOFTWARE,
    Labels,
    finished,
    sidecars,
    write_labels,
    written_here,
)
from talk2dino.maps.polygons import write_polygons
from talk2dino.segmentation.overlay import ignored_label

SCORES = 1 << 28  # bytes of scores that a block holds
STRIDES = 8  # a block's side, at most; windows across its upper edge are encoded twice
PARTS = 16  # blocks held while labels are written: 50 MB
SETTINGS = "settings.json"


class MapResult(NamedTuple):
    """What was written.

    Attributes:
        pixels: of each class, by name.
        ignored: pixels without data.
        blocks: how many there are.
        before: how many of them an earlier run had done.
        polygons: how many, or None if there is no such file.
    """

    pixels: dict[str, int]
    ignored: int
    blocks: int
    before: int
    polygons: int | None


def starts(first: int, cells: int, window: int, stride: int) -> list[int]:
    """Where the windows of one side begin.

    At all multiples of `stride`, whatever the extent, and besides at both borders.

    Args:
        first: of the extent.
        cells: how many it has.
        window: side of a window.
        stride: distance of windows.

    Examples:
        >>> from talk2dino.maps.blocks import starts
        >>> starts(3, 20, window=8, stride=4), starts(-6, 29, window=8, stride=4)
        ([3, 4, 8, 12, 15], [-6, -4, 0, 4, 8, 12, 15])
    """
    end = max(first + cells, first + window)
    inner = range(math.ceil(first / stride) * stride, end - window + 1, stride)
    return sorted({first, *inner, end - window})


def output_files(output: Path, polygons: bool) -> list[Path]:
    """The files of a result; the first is the label map.

    Raises:
        ConfigError: `output` is no name of a GeoTIFF.
    """
    if output.suffix.lower() not in (".tif", ".tiff"):
        raise ConfigError(f"output={output}: labels become a GeoTIFF; give a name like labels.tif")
    return [output, *([output.with_suffix(".geojson")] if polygons else [])]


def refuse_foreign_maps(files: Sequence[Path], image: Path, overwrite: bool) -> None:
    """Refuse to write over the picture, or what is no result of this command (ConfigError)."""
    refuse_foreign(files, written_here, SOFTWARE, overwrite, image)
    ours = files[0].exists()
    refuse_foreign(sidecars(files[0]), lambda _: ours, SOFTWARE, overwrite, image)


def segment_map(
    vocabulary: OpenVocabulary,
    image: MapImage,
    output: str | Path,
    *,
    polygons: bool = False,
    minimum_area: int = 1,
    overwrite: bool = False,
    advance: Advance = lambda done, total: None,
) -> MapResult:
    """Segment a map of any size with flat memory; an interrupted run goes on where it was.

    Labels that a run with the same settings has finished stay; only polygons are written anew.

    Windows lie at multiples of their stride in the map's coordinates and are blended with weights
    that fall towards their edges. So away from the border, by one window, the labels of a place do
    not depend on the extent of the file.

    Args:
        vocabulary: of `Talk2DINO.open_vocabulary`; its working size is the side of a window, in
            pixels of the map's grid.
        image: the map, open, with its ground scale.
        output: GeoTIFF of labels, in the pixels of the file.
        polygons: write a GeoJSON beside it, too.
        minimum_area: pixels; smaller polygons are left out.
        overwrite: replace files that were not written here, too, and finished ones.
        advance: told of steps done, and of all.

    Raises:
        ConfigError: a file of other origin in the way, or a name that is no GeoTIFF's.
        DataError: the map cannot be read, or has no degrees for polygons.
        WriteError: the disk is full, or the results cannot be written.
    """
    if polygons:
        image.require_degrees()
    target, *others = output_files(user_path(output), polygons)
    refuse_foreign_maps([target, *others], image.path, overwrite)
    blocks = Blocks(vocabulary, image)
    settings = {"written_by": SOFTWARE, **blocks.describe()}
    run = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    parts, traced = target.with_name(f".{target.name}.parts"), None
    if parts.is_symlink() or (parts.exists() and not parts.is_dir()):
        raise foreign(parts)
    parts.mkdir(parents=True, exist_ok=True)
    with sole_writer(parts, target):
        counts, before = None if overwrite else finished(target, run), len(blocks)
        if counts is None:
            before = _prepare(parts, blocks, settings)
            counts = _segment(blocks, parts, target, run, advance)
        if polygons:
            shown = (minimum_area, blocks.has_background)
            traced = write_polygons(target, others[0], *shown, advance)
        if not any(parts.iterdir()):  # else of another run, which may go on
            parts.rmdir()
    pixels = dict(zip(blocks.classes, counts.tolist(), strict=True))
    ignored = image.size[0] * image.size[1] - int(counts.sum())
    return MapResult(pixels, ignored, len(blocks), before, traced)


def _segment(
    blocks: Blocks, parts: Path, target: Path, run: str, advance: Advance
) -> npt.NDArray[np.int64]:
    """The blocks one by one into `parts`, and from there into the label map; its pixels `[K]`."""
    image = blocks.image
    for number, block in enumerate(blocks):
        path = parts / block.name
        if not path.exists():
            labels = blocks.labels(block)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, labels=labels)
        advance(number + 1, len(blocks))

    @lru_cache(PARTS)
    def part(name: str) -> Labels:
        with np.load(parts / name) as file:
            found: Labels = file["labels"]
            return found

    def gather(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Labels:
        return blocks.gather(rows + image.first[0], columns + image.first[1], part)

    counts = write_labels(target, image, blocks.classes, run, gather, advance)
    older = target.with_suffix(".geojson")
    for path in (*sidecars(target), *([older] if older.exists() and written_here(older) else [])):
        path.unlink(missing_ok=True)
    for path in parts.iterdir():
        path.unlink()
    return counts


def _prepare(parts: Path, blocks: Blocks, settings: dict[str, Any]) -> int:
    """Empty the folder of blocks unless it is of the same run; how many are done, and whole."""
    noted = parts / SETTINGS
    old = read_json(noted, dict, f"settings of {SOFTWARE}") if noted.is_file() else {}
    if old.get("written_by") != SOFTWARE and any(
        not p.name.startswith(".") for p in parts.iterdir()
    ):
        raise foreign(parts)
    if old != settings:
        for path in parts.iterdir():
            if path != noted:  # which says whose the others are
                path.unlink()
        write_json(parts / SETTINGS, settings)
    for block in blocks:
        if not _whole(parts / block.name, block):
            (parts / block.name).unlink(missing_ok=True)
    return sum((parts / block.name).exists() for block in blocks)


def _whole(path: Path, block: Block) -> bool:
    """Whether a file holds the labels of a block; a full disk or a crash may damage it."""
    try:
        with np.load(path) as file:
            shape: tuple[int, ...] = file["labels"].shape
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return False
    return shape == (block.y2 - block.y1, block.x2 - block.x1)


class Block(NamedTuple):
    """A rectangle of the grid, half open."""

    y1: int
    x1: int
    y2: int
    x2: int

    @property
    def name(self) -> str:
        """Of the file that holds its labels."""
        return f"{self.y1}_{self.x1}.npz"


class Blocks:
    """The blocks of a map in order, and the labels of each.

    Args:
        vocabulary: scores windows.
        image: the map.
    """

    def __init__(self, vocabulary: OpenVocabulary, image: MapImage) -> None:
        self.vocabulary, self.image = vocabulary, image
        words, protocol = vocabulary.words, vocabulary.segmenter.protocol
        self.window, self.stride = protocol.window, protocol.stride
        self.has_background = words.has_negatives or vocabulary.threshold is not None
        self.classes = [*([BACKGROUND] if self.has_background else []), *words.names]
        self.maps = len(words.names) + words.has_negatives
        strides = int(math.sqrt(SCORES / 4 / self.maps) // self.stride)
        self.side = min(max(strides, 1), STRIDES) * self.stride
        self._dtype = np.uint8 if ignored_label(len(self.classes)) == 255 else np.uint16
        self._tops, self._lefts = (
            starts(first, cells, self.window, self.stride)
            for first, cells in zip(image.first, image.shape, strict=True)
        )
        near = torch.arange(self.window) + 0.5
        tent = torch.minimum(near, self.window - near) / (self.window / 2)
        self._weights = tent[:, None] * tent
        self._kept: dict[tuple[int, int], EncodedPicture] = {}

    def __len__(self) -> int:
        return len(self._edges(0)) * len(self._edges(1))

    def __iter__(self) -> Iterator[Block]:
        for y1, y2 in self._edges(0):
            for x1, x2 in self._edges(1):
                yield Block(y1, x1, y2, x2)

    def _edges(self, axis: int) -> list[tuple[int, int]]:
        """Where the blocks of a side begin and end, in the grid."""
        first, last = self.image.first[axis], self.image.first[axis] + self.image.shape[axis]
        begin = range(first // self.side * self.side, last, self.side)
        return [(max(start, first), min(start + self.side, last)) for start in begin]

    @torch.no_grad()
    def labels(self, block: Block) -> Labels:
        """The labels of a block, `[h, w]`; what shows nothing counts as the first class."""
        size = self.window
        tops = [y for y in self._tops if y < block.y2 and y + size > block.y1]
        lefts = [x for x in self._lefts if x < block.x2 and x + size > block.x1]
        pixels, valid = self.image.read(
            range(tops[0], tops[-1] + size), range(lefts[0], lefts[-1] + size)
        )
        corner = (tops[0], lefts[0])
        places = [
            (y, x)
            for y in tops
            for x in lefts
            if valid[y - corner[0] :, x - corner[1] :][:size, :size].any()
        ]
        shape = (block.y2 - block.y1, block.x2 - block.x1)
        total, weight = torch.zeros(self.maps, *shape), torch.zeros(shape)
        together = self.vocabulary.segmenter.window_batch_size
        kept: dict[tuple[int, int], EncodedPicture] = {}
        for begin in range(0, len(places), together):
            batch = places[begin : begin + together]
            for place, encoded in zip(batch, self._encoded(batch, pixels, corner), strict=True):
                if place[1] + size > block.x2:
                    kept[place] = encoded
                self._add(total, weight, block, place, encoded)
        self._kept = kept
        total /= weight.clamp(min=torch.finfo(weight.dtype).tiny)
        negative, scores = None, total
        if self.vocabulary.words.has_negatives:
            negative, scores = total[:1], total[1:]
        y, x = block.y1 - corner[0], block.x1 - corner[1]
        seen = torch.from_numpy(pixels[:, y : y + shape[0], x : x + shape[1]])
        found = SegmentedImage.from_scores(
            seen, self.vocabulary.words.names, scores, negative, self.vocabulary.threshold
        )
        return found.labels.numpy().astype(self._dtype)

    def _encoded(
        self,
        places: Sequence[tuple[int, int]],
        pixels: npt.NDArray[np.uint8],
        corner: tuple[int, int],
    ) -> list[EncodedPicture]:
        """The windows that begin at `places`; those that the block before had are known."""
        new = [place for place in places if place not in self._kept]
        views = [
            torch.from_numpy(
                pixels[:, y - corner[0] :, x - corner[1] :][:, : self.window, : self.window].copy()
            )
            for y, x in new
        ]
        found = dict(zip(new, self.vocabulary.encode(views) if views else [], strict=True))
        return [found.get(place) or self._kept[place] for place in places]

    def _add(
        self,
        total: Tensor,
        weight: Tensor,
        block: Block,
        place: tuple[int, int],
        encoded: EncodedPicture,
    ) -> None:
        """Add a window's scores, weighted, where it lies over the block."""
        y, x = place
        y1, x1 = max(y, block.y1), max(x, block.x1)
        y2, x2 = min(y + self.window, block.y2), min(x + self.window, block.x2)
        inside = (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))
        there = (slice(y1 - block.y1, y2 - block.y1), slice(x1 - block.x1, x2 - block.x1))
        share = self._weights[inside]
        scores = self.vocabulary.scores(encoded)
        for number in range(self.maps):
            one = scores[number : number + 1][0].cpu()
            total[number][there] += one[inside] * share
        weight[there] += share

    def gather(
        self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], part: Any
    ) -> Labels:
        """Labels at rows and columns of the grid, each ascending, `[h, w]`.

        Args:
            rows: of the grid.
            columns: likewise.
            part: from the name of a block to its labels.
        """
        found: Labels = np.zeros((len(rows), len(columns)), self._dtype)
        for y1, y2 in self._edges(0):
            top, bottom = np.searchsorted(rows, (y1, y2))
            for x1, x2 in self._edges(1):
                left, right = np.searchsorted(columns, (x1, x2))
                if top < bottom and left < right:
                    labels = part(Block(y1, x1, y2, x2).name)
                    near = np.ix_(rows[top:bottom] - y1, columns[left:right] - x1)
                    found[top:bottom, left:right] = labels[near]
        return found

    def describe(self) -> dict[str, Any]:
        """Plain values that decide the labels; a run with the same ones may go on."""
        words, segmenter = self.vocabulary.words, self.vocabulary.segmenter
        project = segmenter.project_patches
        rows = self.vocabulary.rows.cpu().float().contiguous().numpy()
        return {
            **self.image.describe(),
            **{"classes": self.classes, "row_classes": list(words.row_classes)},
            **{"rows": hashlib.sha256(rows.tobytes()).hexdigest(), "side": self.side},
            **{"threshold": self.vocabulary.threshold, "window": self.window},
            **{
                "pamr": repr(segmenter.pamr),
                "knn": repr(segmenter.knn),
                "encoder": state_dict_digest(segmenter.vision),
                "image_side": project and state_dict_digest(project),
            },
        }
