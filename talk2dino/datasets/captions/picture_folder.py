"""A folder of images without captions: nothing to train on, but words find them in its store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talk2dino.datasets.captions.base import Entry, FileSource, check_limit
from talk2dino.datasets.pictures import HEIF, is_picture, is_there, unread
from talk2dino.errors import DataError
from talk2dino.files import user_path

_OTHER = "is no picture"


class PictureFolder(FileSource):
    """All images of a folder and its subfolders, without captions.

    Extraction needs no text encoder for them. What else lies there is listed in `left_out`, as are
    folders that are links or cannot be read; what is hidden is not looked at.

    Args:
        images: the folder.
        limit: take only the first images, in alphabetical order of their paths.

    Raises:
        DataError: no such folder, or no image in it.
    """

    def __init__(self, images: str, limit: int | None = None) -> None:
        super().__init__(user_path(images))
        names, reasons = list[str](), dict[str, str]()
        for file, reason in _below(self.images):
            name = file.relative_to(self.images).as_posix()
            if reason is None and is_picture(file):
                names.append(name)
            elif reason is not None or is_there(file):
                ending = file.suffix.lower()
                reason = reason or (unread([ending]) if ending in HEIF else _OTHER)
                reasons[name.encode(errors="replace").decode()] = reason
        listed = sorted(reasons.items(), key=lambda one: (one[1] == _OTHER, one[0]))
        self.left_out = [{"file_name": name, "reason": reason} for name, reason in listed]
        if not names:
            first = f" ({listed[0][0]}: {listed[0][1]})" if listed else ""
            raise DataError(f"source.images={images}: no picture in this folder{first}")
        names = sorted(names)[: check_limit(limit)]
        self.entries = [Entry(number, name, ()) for number, name in enumerate(names)]

    def fingerprint(self) -> dict[str, Any]:
        """Name of the folder, its number of images, and their names."""
        return {"folder": self.folder_name(), "images": len(self), "content": self.content()}


def _below(top: Path) -> Iterator[tuple[Path, str | None]]:
    """Visible files, and folders that are not entered, with the reason if there is one."""
    errors = list[OSError]()
    for folder, folders, files in os.walk(top, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (path := Path(folder, name)).is_symlink():  # `walk` does not enter it, either
                yield path, "is a link to a folder, which is not followed"
        for name in files:
            if not name.startswith("."):
                plain = name.isascii() or name.encode(errors="replace").decode() == name
                yield Path(folder, name), None if plain else "its name is no UTF-8"
    for error in errors:
        yield Path(error.filename), f"cannot be read: {error.strerror}"
