"""A folder of images without captions: nothing to train on, but words find them in its store."""

from __future__ import annotations

from typing import Any

from talk2dino.datasets.captions.base import Entry, FileSource
from talk2dino.datasets.pictures import HEIF, is_picture, is_there, unread
from talk2dino.errors import DataError
from talk2dino.files import user_path


class PictureFolder(FileSource):
    """All images of a folder and its subfolders, without captions.

    Extraction needs no text encoder for them. Other files are listed in `left_out`; hidden ones
    are not looked at.

    Args:
        images: the folder.
        limit: take only the first images, in alphabetical order of their paths.

    Raises:
        DataError: no such folder, or no image in it.
    """

    def __init__(self, images: str, limit: int | None = None) -> None:
        super().__init__(user_path(images))
        names, left_out = list[str](), list[dict[str, str]]()
        for file in self.images.rglob("*"):
            name = file.relative_to(self.images)
            if any(part.startswith(".") for part in name.parts):
                continue
            if is_picture(file):
                names.append(name.as_posix())
            elif is_there(file):
                ending = file.suffix.lower()
                reason = unread([ending]) if ending in HEIF else "is no picture"
                left_out.append({"file_name": name.as_posix(), "reason": reason})
        self.left_out = sorted(left_out, key=lambda one: one["file_name"])
        if not names:
            first = f" (its first file is {left_out[0]['file_name']})" if left_out else ""
            raise DataError(f"source.images={images}: no picture in it{first}")
        entries = [Entry(number, name, ()) for number, name in enumerate(sorted(names))]
        self.set_entries(entries, limit, self.images)

    def fingerprint(self) -> dict[str, Any]:
        """Name of the folder, its number of images, and their names."""
        return {"folder": self.images.name, "images": len(self), "content": self.content()}
