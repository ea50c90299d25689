"""A captions json and its image folder: COCO 2014 and 2017, Flickr8k, Karpathy's splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from talk2dino.datasets.captions.base import (
    Entry,
    FileSource,
    caption_text,
    image_name,
    whole_number,
)
from talk2dino.errors import ConfigError, DataError
from talk2dino.files import read_json, user_path


def is_karpathy(data: Any) -> bool:
    """Whether a parsed json has the captions inside its images, as Karpathy's files do."""
    images = data.get("images") if isinstance(data, dict) else None
    first = images[0] if isinstance(images, list) and images else None
    return isinstance(first, dict) and "sentences" in first


def karpathy_entries(
    path: Path, images: list[Any], split: Sequence[str] | None, folder: Path
) -> list[Entry]:
    """Entries of the images of the named splits, in the order of the file.

    Args:
        path: the file, for messages.
        images: its rows with `filename`, `filepath` (COCO only), `imgid`, `cocoid` (COCO only),
            `split` and `sentences` (`raw`, `sentid`).
        split: `train`, `restval`, `val`, `test`; None for all.
        folder: of the images; `filepath` is a sub-folder of it, if that is there.

    Raises:
        DataError: a row lacks a key; no image is of a named split.
    """
    _check_splits(path, images, split)
    below = {
        sub: (folder / sub).is_dir() for sub in {str(row.get("filepath", "")) for row in images}
    }
    entries: list[Entry] = []
    images_known: set[int] = set()
    captions_known: set[int] = set()
    for number, row in enumerate(images):
        if split is not None and row.get("split") not in split:
            continue
        keys = "filename, imgid and sentences with raw and sentid"
        with _row(f"{path}: images[{number}]", keys):
            sub, name = str(row.get("filepath", "")), image_name(row["filename"], "filename")
            captions = tuple(
                (whole_number(s["sentid"], "sentid"), caption_text(s["raw"]))
                for s in row["sentences"]
            )
            image_id = whole_number(row.get("cocoid", row["imgid"]), "imgid")
            for key, known, ids in (
                ("imgid", images_known, [image_id]),
                ("sentid", captions_known, [caption for caption, _ in captions]),
            ):
                twice = next((one for one in ids if one in known), None)
                if twice is not None:
                    raise ValueError(f"{key} {twice} is also that of a row before")
                known.update(ids)
        entries.append(Entry(image_id, f"{sub}/{name}" if sub and below[sub] else name, captions))
    return entries


@contextmanager
def _row(where: str, keys: str) -> Iterator[None]:
    """A row that lacks a key, or holds something else there, is a DataError of one line."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} needs {keys} ({error!r})") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}; correct or remove it") from error


def _check_splits(path: Path, images: list[Any], split: Sequence[str] | None) -> None:
    for number, row in enumerate(images):
        if not isinstance(row, dict):
            raise DataError(f"{path}: images[{number}] is {row!r:.60}, expected an object")
    known = {str(row.get("split")) for row in images}
    for name in split or ():
        if name not in known:
            raise DataError(f"{path}: no split {name!r}; it has {', '.join(sorted(known))}")


_SPLIT_2014 = re.compile(r"COCO_((?:train|val|test)20\d\d)_")


class CocoCaptions(FileSource):
    """A COCO captions json and its image folder (2014 and 2017 layouts, Flickr8k and alike).

    `images` is the folder of the files, or the one above it: `coco` with `train2014` and
    `val2014`, or with `train2017`, in it. The sub-folder comes from the name
    (`COCO_train2014_…`) or from the json's `coco_url`. Images without a caption are listed in
    `left_out`.

    Args:
        annotations: json with `images` (id, file_name) and `annotations` (id, image_id, caption),
            or Karpathy's `dataset_coco.json`.
        images: folder of the image files, or the one above.
        split: of Karpathy's file, one of its names or a list of them; None for all its images.
        limit: take only the first images, in the order of the json.

    Raises:
        DataError: missing file or folder, no json, a missing key, a value that is no id, name or
            caption, an id that occurs twice, a caption without its image, an unknown split.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        split: str | list[str] | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(user_path(images))
        self.annotations = user_path(annotations)
        self.split = [split] if isinstance(split, str) else split
        if not self.annotations.is_file():
            raise DataError(f"source.annotations={annotations}: no such file")
        data: Any = read_json(self.annotations, object, "COCO captions")
        if is_karpathy(data):
            entries = karpathy_entries(self.annotations, data["images"], self.split, self.images)
        elif self.split is not None:
            raise ConfigError(
                f"source.split={split}: {self.annotations} has no splits; write source.split=null, "
                "or give Karpathy's dataset_coco.json"
            )
        else:
            entries = self._coco_entries(data)
        self.left_out = [
            {"file_name": entry.file_name, "reason": "has no caption"}
            for entry in entries
            if not entry.captions
        ]
        self.set_entries([e for e in entries if e.captions], limit, self.annotations)

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and content of the annotation file, its split if it has any, and images."""
        plain = {
            "annotations": self.annotations.name,
            "bytes": self.annotations.stat().st_size,
            "images": len(self),
            "content": self.content(),
        }
        return plain if self.split is None else plain | {"split": self.split}

    def _coco_entries(self, data: Any) -> list[Entry]:
        path = self.annotations
        for key in ("images", "annotations"):
            if not isinstance(data, dict) or not isinstance(data.get(key), list):
                raise DataError(f"{path}: no list {key!r}; expected a COCO captions json")
        captions = _captions_by_image(path, data["annotations"])
        names = _file_names(path, data["images"], self.images)
        for image_id, texts in captions.items():
            if image_id not in names:
                raise DataError(
                    f"{path}: caption {texts[0][0]} names image {image_id}, which is not in its "
                    "images; remove the caption or add the image"
                )
        return [
            Entry(image_id, name, tuple(captions.get(image_id, ())))
            for image_id, name in names.items()
        ]


def _file_names(path: Path, images: list[Any], folder: Path) -> dict[int, str]:
    """File name below `folder` by image id."""
    names: dict[int, str] = {}
    below: dict[str, bool] = {}  # sub-folder -> whether it is there; a stat per image is too slow
    for number, row in enumerate(images):
        with _row(f"{path}: images[{number}]", "id and file_name"):
            image_id, name = whole_number(row["id"], "id"), image_name(row["file_name"])
        if image_id in names:
            raise DataError(f"{path}: images[{number}] has id {image_id}, as an image before it")
        sub = _sub_folder(name, row)
        if sub not in below:
            below[sub] = bool(sub) and (folder / sub).is_dir()
        names[image_id] = f"{sub}/{name}" if below[sub] else name
    return names


def _sub_folder(name: str, row: dict[str, Any]) -> str:
    """`train2014`, `val2017`, …: where COCO's own zip files put this image; empty if unknown."""
    if found := _SPLIT_2014.match(name):
        return found.group(1)
    url = row.get("coco_url")  # http://images.cocodataset.org/train2017/000000391895.jpg
    return PurePosixPath(url).parent.name if isinstance(url, str) and "/" not in name else ""


def _captions_by_image(path: Path, annotations: list[Any]) -> dict[int, list[tuple[int, str]]]:
    grouped: dict[int, list[tuple[int, str]]] = defaultdict(list)
    seen: set[int] = set()
    for number, row in enumerate(annotations):
        with _row(f"{path}: annotations[{number}]", "id, image_id and caption"):
            caption_id, text = whole_number(row["id"], "id"), caption_text(row["caption"])
            grouped[whole_number(row["image_id"], "image_id")].append((caption_id, text))
        if caption_id in seen:
            raise DataError(
                f"{path}: annotations[{number}] has id {caption_id}, as a caption before it"
            )
        seen.add(caption_id)
    return grouped
