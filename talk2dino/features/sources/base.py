"""What extraction expects of a source of captioned images, and what image files have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from talk2dino.errors import ConfigError, DataError
from talk2dino.features.pictures import read_picture


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


class Source:
    """Captioned images by position.

    Reading an image happens in worker processes, so a source pickles.
    """

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
    """Images as files below one folder; a subclass calls `keep` with what it found.

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

    def keep(self, entries: Sequence[Entry], limit: int | None, origin: Path) -> None:
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
