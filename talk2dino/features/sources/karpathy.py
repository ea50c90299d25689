"""Karpathy's caption files (`dataset_coco.json`, `dataset_flickr30k.json`): splits by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from talk2dino.errors import DataError
from talk2dino.features.sources.base import Entry


def is_karpathy(data: Any) -> bool:
    """Whether a parsed json has the captions inside its images, as Karpathy's files do."""
    images = data.get("images") if isinstance(data, dict) else None
    return isinstance(images, list) and bool(images) and "sentences" in images[0]


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
    for number, row in enumerate(images):
        if split is not None and row.get("split") not in split:
            continue
        try:
            sub, name = str(row.get("filepath", "")), str(row["filename"])
            captions = tuple((int(s["sentid"]), str(s["raw"])) for s in row["sentences"])
            image_id = int(row.get("cocoid", row["imgid"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: images[{number}] needs filename, imgid and sentences with raw and "
                f"sentid ({error!r})"
            ) from error
        if captions:
            entries.append(
                Entry(image_id, f"{sub}/{name}" if sub and below[sub] else name, captions)
            )
    return entries


def _check_splits(path: Path, images: list[Any], split: Sequence[str] | None) -> None:
    for number, row in enumerate(images):
        if not isinstance(row, dict):
            raise DataError(f"{path}: images[{number}] is {row!r:.60}, expected an object")
    known = {str(row.get("split")) for row in images}
    for name in split or ():
        if name not in known:
            raise DataError(f"{path}: no split {name!r}; it has {', '.join(sorted(known))}")
