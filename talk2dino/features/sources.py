"""Where captioned images come from: COCO captions, a plain folder, generated mosaic scenes."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from talk2dino.errors import ConfigError, DataError
from talk2dino.features.mosaic import MosaicScenes
from talk2dino.features.pictures import upright_rgb


@dataclass(frozen=True)
class Entry:
    """An image and its captions, before the image is read.

    Attributes:
        image_id: the dataset's number of the image.
        file_name: relative to the image folder.
        captions: (caption id, text) pairs.
    """

    image_id: int
    file_name: str
    captions: tuple[tuple[int, str], ...]


class Source:
    """Captioned images by position.

    Subclasses fill `entries`; reading an image happens in worker processes, so a source pickles.
    """

    entries: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, index: int) -> Entry:
        """The captions and the name of image `index`."""
        return self.entries[index]

    def caption_count(self) -> int:
        """Number of captions of all images."""
        return sum(len(self.entry(index).captions) for index in range(len(self)))

    def image(self, index: int) -> Image.Image:
        """Read image `index` as RGB.

        Raises:
            OSError: unreadable or truncated; extraction skips and lists such images.
        """
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this source from another; a resumed extraction compares them."""
        raise NotImplementedError


class _Files(Source):
    """Images as files below one folder."""

    def __init__(self, images: Path) -> None:
        self.images = images
        if not images.is_dir():
            raise DataError(f"source.images={images}: no such folder")

    def image(self, index: int) -> Image.Image:
        with Image.open(self.images / self.entries[index].file_name) as file:
            return upright_rgb(file)

    def _keep(self, entries: Sequence[Entry], limit: int | None, origin: Path) -> None:
        """Set `entries` after the checks that every source of files needs."""
        if not entries:
            raise DataError(f"{origin}: no captioned images in it")
        self.entries = entries[: check_limit(limit)]
        first = self.entries[: min(16, len(self.entries))]
        if not any((self.images / entry.file_name).is_file() for entry in first):
            raise DataError(
                f"source.images={self.images}: {first[0].file_name}, named by {origin}, is not "
                "there, nor are the next ones; point source.images at the folder of the images"
            )


class CocoCaptions(_Files):
    """A COCO captions json and its image folder (2014 and 2017 layouts, Flickr8k and alike).

    Args:
        annotations: json with `images` (id, file_name) and `annotations` (id, image_id, caption).
        images: folder of the image files.
        limit: take only the first images, in the order of the json.

    Raises:
        DataError: missing file or folder, no json, a missing key, a caption without its image.
    """

    def __init__(self, annotations: str, images: str, limit: int | None = None) -> None:
        super().__init__(Path(images))
        path = Path(annotations)
        data = _read_json(path, "source.annotations")
        for key in ("images", "annotations"):
            if not isinstance(data, dict) or not isinstance(data.get(key), list):
                raise DataError(f"{path}: no list {key!r}; expected a COCO captions json")
        captions = _captions_by_image(path, data["annotations"])
        known = _file_names(path, data["images"])
        for image_id, texts in captions.items():
            if image_id not in known:
                raise DataError(
                    f"{path}: caption {texts[0][0]} names image {image_id}, which is not in its "
                    "images; remove the caption or add the image"
                )
        entries = [
            Entry(image_id, name, tuple(captions[image_id]))
            for image_id, name in known.items()
            if image_id in captions
        ]
        self.annotations = path
        self._keep(entries, limit, path)

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and number of images of the annotation file."""
        return {
            "annotations": self.annotations.name,
            "bytes": self.annotations.stat().st_size,
            "images": len(self),
        }


class CaptionFolder(_Files):
    """A folder of images with `captions.csv`, `captions.jsonl` or one `.txt` beside each image.

    The table has the columns (or keys) `file_name` and `caption`, a row per caption; a text file
    has a caption per line.

    Args:
        images: the folder.
        limit: take only the first images, in alphabetical order.

    Raises:
        DataError: no captions, a row without file or caption.
    """

    def __init__(self, images: str, limit: int | None = None) -> None:
        super().__init__(Path(images))
        pairs = self._pairs()
        grouped: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, (name, text) in enumerate(pairs):
            grouped[name].append((number, text))
        entries = [
            Entry(number, name, tuple(grouped[name])) for number, name in enumerate(sorted(grouped))
        ]
        self._keep(entries, limit, self.images)

    def _pairs(self) -> list[tuple[str, str]]:
        for name in ("captions.csv", "captions.jsonl"):
            path = self.images / name
            if path.is_file():
                return _table(path)
        pairs = [
            (image.name, line.strip())
            for image in sorted(self.images.iterdir())
            if image.suffix.lower() in Image.registered_extensions()
            and image.with_suffix(".txt").is_file()
            for line in _read_text(image.with_suffix(".txt")).splitlines()
            if line.strip()
        ]
        if not pairs:
            raise DataError(
                f"source.images={self.images}: no captions.csv, no captions.jsonl and no .txt "
                "beside an image; add one of them"
            )
        return pairs

    def fingerprint(self) -> dict[str, Any]:
        """Name of the folder and its number of images and captions."""
        return {
            "folder": self.images.name,
            "images": len(self),
            "captions": sum(len(entry.captions) for entry in self.entries),
        }


class Mosaic(Source):
    """Generated scenes of real photographs; see `talk2dino.features.mosaic`.

    Args:
        split: `train` or `heldout`.
        count: number of scenes.
        image_size: side of the square scenes in pixels.
        captions_per_scene: captions per scene.
        seed: another seed gives other scenes.
        limit: take only the first scenes.
    """

    def __init__(
        self,
        split: str = "train",
        count: int = 600,
        image_size: int = 224,
        captions_per_scene: int = 5,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.count = min(count, check_limit(limit) or count)
        self.scenes = MosaicScenes(
            split, self.count, image_size, image_size, 4, captions_per_scene, seed
        )

    def __len__(self) -> int:
        return self.count

    def caption_count(self) -> int:
        """Known without composing the scenes."""
        return self.count * self.scenes.captions_per_scene

    def entry(self, index: int) -> Entry:
        """Captions of scene `index`."""
        captions = self.scenes[index].captions
        first = index * self.scenes.captions_per_scene
        return Entry(
            index,
            f"{self.scenes.split}-{index:05d}.png",
            tuple((first + k, text) for k, text in enumerate(captions)),
        )

    def image(self, index: int) -> Image.Image:
        """Compose scene `index`."""
        return Image.fromarray(self.scenes[index].image)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the scenes."""
        scenes = self.scenes
        return {
            "split": scenes.split,
            "seed": scenes.seed,
            "count": self.count,
            "image_size": scenes.height,
            "captions_per_scene": scenes.captions_per_scene,
        }


def check_limit(limit: int | None, key: str = "source.limit") -> int | None:
    """Return the limit; a ConfigError that names `key` unless it is None or positive."""
    if limit is not None and limit < 1:
        raise ConfigError(f"{key}={limit}: use 1 or more, or null for all images")
    return limit


def _read_json(path: Path, key: str) -> Any:
    if not path.is_file():
        raise DataError(f"{key}={path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a json file ({error})") from error


def _file_names(path: Path, images: list[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, row in enumerate(images):
        try:
            names[int(row["id"])] = str(row["file_name"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: images[{number}] needs id and file_name ({error!r})"
            ) from error
    return names


def _captions_by_image(path: Path, annotations: list[Any]) -> dict[int, list[tuple[int, str]]]:
    grouped: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for number, row in enumerate(annotations):
        try:
            grouped[int(row["image_id"])].append((int(row["id"]), str(row["caption"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: annotations[{number}] needs id, image_id and caption ({error!r})"
            ) from error
    return grouped


def _table(path: Path) -> list[tuple[str, str]]:
    text = _read_text(path)
    pairs = []
    for number, row in enumerate(_rows(path, text), start=1):
        named = isinstance(row, dict) and row.get("file_name") and row.get("caption")
        if not named:
            raise DataError(f"{path}: row {number} needs file_name and caption")
        pairs.append((str(row["file_name"]), str(row["caption"])))
    return pairs


def _rows(path: Path, text: str) -> Iterator[Any]:
    if path.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not json ({error})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
