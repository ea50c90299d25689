"""Label files: their values or colors, and what else they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from talk2dino.datasets.pictures import (
    open_quietly,
    orientation,
    readable,
    say_several,
    upright,
    upright_size,
)
from talk2dino.errors import DataError, say

_SINGLE_CHANNEL = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
_ONE_CHANNEL = (
    "save the class values as one 8-bit channel, or give the classes' colors as benchmark.palette"
)


def read_values(
    path: Path | BinaryIO, fix: str = _ONE_CHANNEL, name: str | None = None
) -> NDArray[Any]:
    """Read the values of a label file, [H, W]; of a palette file the indices, not the colors.

    An EXIF tag turns it like a picture. `fix` says what to do about color channels, `name` what
    messages call the file.

    Raises:
        DataError: not a picture, truncated, or with color channels.
    """
    name = name or str(path)
    with readable(name), open_quietly(path) as file:
        if file.mode not in _SINGLE_CHANNEL:
            raise DataError(f"{name}: a {file.mode} picture, not a label map; {fix}")
        say_several(file, name)
        return np.asarray(upright(file))


def read_colors(path: Path) -> NDArray[np.uint8]:
    """Read a colored label file as [H, W, 3] uint8 RGB; a palette file by its colors.

    Raises:
        DataError: not a picture, or truncated.
    """
    with readable(path), open_quietly(path) as file:
        say_several(file, str(path))
        return np.asarray(upright(file).convert("RGB"))


@dataclass(frozen=True)
class Header:
    """What a picture or label file says before any pixel is read."""

    format: str | None  # Pillow's name of it
    size: tuple[int, int]  # rows and columns as it is read
    stored: tuple[int, int]  # columns and rows as they lie in the file
    turned: bool  # upright by an EXIF tag


def header(file: Path | BinaryIO) -> Header:
    """Read the header of a picture or label file of any size.

    Raises:
        DataError: not a picture.
    """
    with readable(str(file)), open_quietly(file) as opened:
        stored, turned = opened.size, orientation(opened) is not None
        return Header(opened.format, upright_size(opened), stored, turned)


def say_palettes(paths: Sequence[Path]) -> None:
    """Say where the palettes of label files give one value several colors.

    Raises:
        DataError: a file that cannot be read.
    """
    known: dict[int, tuple[tuple[int, int, int], str]] = {}
    for path in paths:
        for value, color in shown_colors(path).items():
            before, first = known.setdefault(value, (color, path.name))
            if before != color:
                say(
                    f"{path.parent}: value {value} is {list(before)} in the palette of {first} and "
                    f"{list(color)} in that of {path.name}; values count: where the colors are "
                    "meant, give them as benchmark.palette"
                )
                return


def shown_colors(path: Path) -> dict[int, tuple[int, int, int]]:
    """The color of every value that a palette file holds; none of other files."""
    with readable(path), open_quietly(path) as file:
        if file.mode != "P":
            return {}
        values = np.unique(np.asarray(file)).tolist()
        palette = file.getpalette() or []
        colors = [(value, palette[3 * value : 3 * value + 3]) for value in values]
        return {value: (rgb[0], rgb[1], rgb[2]) for value, rgb in colors if len(rgb) == 3}


def turned_alone(picture: Header, mask: Header) -> bool:
    """Whether an EXIF tag turns a picture but not its mask, and their sizes fit either way.

    Then nothing tells whether the mask was drawn on the upright picture, as it is taken to be.
    """
    return picture.turned and not mask.turned and picture.stored == mask.stored
