"""What extraction expects of a source of captioned images, and its images batch by batch."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from talk2dino.datasets.pictures import STRIP, middle_strip, read_picture
from talk2dino.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """An image and its captions, before the image is read.

    Attributes:
        image_id: the dataset's number of the image.
        file_name: relative to the image folder, or to the folder of the tars.
        captions: (caption id, text) pairs.
    """

    image_id: int
    file_name: str
    captions: tuple[tuple[int, str], ...]


def caption_text(value: object) -> str:
    """A caption as a file gives it, which is what every source accepts as one.

    Raises:
        ValueError: what is wrong with it: no text, empty, or characters that cannot be stored.
    """
    if not isinstance(value, str):
        raise ValueError(f"caption is {_shown(value)}, not a text")
    if not value.strip():
        raise ValueError("caption is empty")
    if "\0" in value or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
        raise ValueError(f"caption {_shown(value)} has a NUL or half a character (lone surrogate)")
    return value


def whole_number(value: object, key: str) -> int:
    """An id: a whole number of at most 64 bits, or its digits as a text.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{key} is {_shown(value)}, not a whole number of at most 64 bits")
    return value


def image_name(value: object, key: str = "file_name") -> str:
    """The name of an image file; `./a.jpg` and `a.jpg` are one.

    Raises:
        ValueError: no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{key} is {_shown(value)}, not the name of a file")
    return posixpath.normpath(value)


def _shown(value: object) -> str:
    """A value of a file, short, as json writes it."""
    words = {None: "null", True: "true", False: "false"}
    plain = value is None or isinstance(value, bool)
    text = words[value] if plain else ascii(value)  # type: ignore[index]
    return text if len(text) <= 40 else f"{text[:40]}…"


class Source:
    """Captioned images by position.

    Reading an image happens in worker processes, so a source pickles.

    Attributes:
        left_out: what lies there but is no captioned image, as dicts with file_name and reason.
    """

    left_out: Sequence[dict[str, str]] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def entry(self, index: int) -> Entry:
        """The captions and the name of image `index`."""
        raise NotImplementedError

    def caption_count(self) -> int:
        """Number of captions of all images."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """Read image `index` as RGB.

        Raises:
            OSError: unreadable or truncated; extraction skips and lists such images.
        """
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this source from another; a resumed extraction compares them."""
        raise NotImplementedError


class FileSource(Source):
    """Images as files below one folder; a subclass calls `set_entries` with what it found.

    Attributes:
        images: the folder.
        entries: in the order of the store.
    """

    entries: Sequence[Entry]

    def __init__(self, images: Path) -> None:
        self.images = images
        if not images.is_dir():
            raise DataError(f"source.images={images}: no such folder")

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, index: int) -> Entry:
        """The captions and the name of image `index`."""
        return self.entries[index]

    def caption_count(self) -> int:
        """Number of captions of all images."""
        return sum(len(entry.captions) for entry in self.entries)

    def image(self, index: int) -> Image.Image:
        """Read image `index` as upright RGB."""
        return read_picture(self.images / self.entries[index].file_name)

    def folder_name(self) -> str:
        """What the folder is called, also where it was given as `.`."""
        name = self.images.name
        return self.images.resolve().name if name in ("", "..") else name

    def content(self) -> str:
        """A digest of all file names and captions, for `fingerprint`."""
        digest = sha256()
        for entry in self.entries:
            digest.update(repr((entry.image_id, entry.file_name, entry.captions)).encode())
        return digest.hexdigest()[:16]

    def set_entries(self, entries: Sequence[Entry], limit: int | None, origin: Path) -> None:
        """Set `entries` after the checks that every source of files needs.

        Raises:
            DataError: no entry, or none of the first sixteen files is there.
        """
        if not entries:
            raise DataError(f"{origin}: no captioned images in it")
        self.entries = entries[: check_limit(limit)]
        first = self.entries[: min(16, len(self.entries))]
        if not any((self.images / entry.file_name).is_file() for entry in first):
            raise DataError(
                f"source.images={self.images}: {first[0].file_name}, named by {origin}, is not "
                "there, nor are the next ones; point source.images at the folder of the images"
            )


def check_limit(limit: int | None, key: str = "source.limit") -> int | None:
    """Return the limit; a ConfigError that names `key` unless it is None or positive."""
    if limit is not None and limit < 1:
        raise ConfigError(f"{key}={limit}: use 1 or more, or null for all images")
    return limit


@dataclass(frozen=True)
class ImageBatch:
    """A decoded batch for the vision encoder.

    Attributes:
        positions: of all images of the batch in the source, ascending.
        entries: B readable images.
        pixels: [B, 3, S, S] uint8 RGB.
        skipped: the unreadable ones, as dicts with index, file_name and reason.
    """

    positions: Sequence[int]
    entries: Sequence[Entry]
    pixels: Tensor
    skipped: Sequence[dict[str, Any]]

    def pin_memory(self) -> ImageBatch:
        """A page-locked copy for asynchronous transfer to a GPU; called by the loader."""
        return ImageBatch(self.positions, self.entries, self.pixels.pin_memory(), self.skipped)


class ImageBatches(Dataset[ImageBatch]):
    """Batches of a source's images: short side resized to `size` pixels (bicubic), center kept."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, positions: Sequence[int]) -> ImageBatch:
        # One tensor for the whole batch: one block of shared memory instead of many.
        pixels = torch.empty((len(positions), 3, self.size, self.size), dtype=torch.uint8)
        entries: list[Entry] = []
        skipped: list[dict[str, Any]] = []
        for index in positions:
            entry = self.source.entry(index)
            try:
                pixels[len(entries)] = crop_square(self.source.image(index), self.size)
            except Exception as error:  # broken files make decoders raise anything
                reason = f"{type(error).__name__}: {error}"
                skipped.append({"index": index, "file_name": entry.file_name, "reason": reason})
            else:
                entries.append(entry)
        return ImageBatch(positions, entries, pixels[: len(entries)], skipped)


def load_batches(
    source: Source, size: int, plan: Sequence[Sequence[int]], num_workers: int, pin_memory: bool
) -> Iterator[ImageBatch]:
    """Decode the batches of `plan`, in its order, in `num_workers` processes (0: in this one)."""
    yield from DataLoader(
        ImageBatches(source, size),
        sampler=plan,  # its items are whole batches
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def crop_square(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to `size` (bicubic), crop the center: [3, size, size] uint8."""
    image = middle_strip(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1)


def from_square(
    box: tuple[float, float, float, float], size: int, picture: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a box of `crop_square`'s result lies in the picture, to the nearest pixel.

    Args:
        box: left, top, right, bottom in pixels of the square.
        size: side of the square.
        picture: height and width of the picture.

    Returns:
        Left, top, right, bottom in pixels of the picture; right and bottom are beyond the box.

    Examples:
        >>> from talk2dino.datasets.captions.base import from_square
        >>> from_square((0, 0, 112, 224), 224, picture=(448, 1000))  # the left half of the middle
        (276, 0, 500, 448)
    """
    found = []
    for low, high, length, other in ((0, 2, picture[1], picture[0]), (1, 3, *picture)):
        excess = max(0, (length - STRIP * other) // 2)  # as `middle_strip` cuts
        kept = length - 2 * excess
        resized = max(size, round(kept * size / min(kept, other)))
        ends = (((resized - size) // 2 + box[at]) * kept / resized for at in (low, high))
        found.append([min(max(round(excess + end), 0), length) for end in ends])
    (left, right), (top, bottom) = found
    return left, top, right, bottom
