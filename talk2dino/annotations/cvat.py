"""CVAT images 1.1: `annotations.xml` with masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from talk2dino.annotations.base import (
    WRITTEN_BY,
    AnnotatedPicture,
    Category,
    Mask,
    Options,
    check_file_name,
)


class CvatImages:
    """Writes an `<image>` per picture with a `<mask>` per annotation; the format has no scores.

    Args:
        options: none of them matters here.
    """

    def __init__(self, options: Options) -> None:
        self.pictures = 0

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Write the labels."""
        self.categories = categories
        path = folder / "annotations.xml"
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape")
        labels = "".join(
            f"<label><name>{escape(one.name)}</name><color>{one.hex_color}</color>"
            "<type>mask</type><attributes></attributes></label>\n"
            for one in categories
        )
        self.file.write(
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
            f"<meta><task><name>{WRITTEN_BY}</name><labels>\n{labels}</labels></task></meta>\n"
        )

    def add(self, picture: AnnotatedPicture) -> None:
        """Write its masks, each within its box (ConfigError: its name is no text)."""
        check_file_name(picture.file_name, "image")
        self.file.write(
            f'<image id="{self.pictures}" name={quoteattr(picture.file_name)} '
            f'width="{picture.width}" height="{picture.height}">\n'
        )
        for one in picture.annotations:
            mask, (left, top) = picture.cropped(one)
            height, width = mask.shape
            self.file.write(
                f'<mask label={quoteattr(self.categories[one.category].name)} source="auto" '
                f'occluded="0" rle="{runs(mask)}" left="{left}" top="{top}" width="{width}" '
                f'height="{height}" z_order="0"></mask>\n'
            )
        self.file.write("</image>\n")
        self.pictures += 1

    def close(self) -> None:
        """End the document."""
        with self.file:
            self.file.write("</annotations>\n")


def runs(mask: Mask) -> str:
    """Lengths of runs row by row, zeros first: `0, 3, 2` is 11100.

    Args:
        mask: `[H, W]` of 0 and 1.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.annotations.cvat import runs
        >>> runs(np.array([[1, 1, 1], [0, 0, 1]], dtype=np.uint8))
        '0, 3, 2, 1'
    """
    flat = mask.ravel()
    starts = np.flatnonzero(np.diff(flat.astype(np.int16), prepend=-1))
    lengths = np.diff(starts, append=flat.size).tolist()
    return ", ".join(map(str, [0, *lengths] if flat[0] else lengths))
