"""Reading the pictures and label files of a benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.features.pictures import orientation, read_picture

_SINGLE_CHANNEL = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
_SWAPS = (  # these turns exchange rows and columns
    *(Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE),
    *(Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
)


def read_image(path: Path) -> Tensor:
    """Read a picture as [3, H, W] uint8 RGB, turned upright by its EXIF tag.

    Raises:
        DataError: not a picture, or truncated.
    """
    try:
        pixels = np.array(read_picture(path))
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_values(path: Path) -> NDArray[Any]:
    """Read the values of a label file, [H, W]; of a palette file the indices, not the colours.

    An EXIF tag turns it like a picture.

    Raises:
        DataError: not a picture, truncated, or with colour channels.
    """
    with _readable(path), _open(path) as file:
        if file.mode not in _SINGLE_CHANNEL:
            raise DataError(
                f"{path}: a {file.mode} picture, not a label map; save the class values as one "
                "8-bit channel, or give the classes' colours as benchmark.palette"
            )
        return np.asarray(_upright(file))


def read_colors(path: Path) -> NDArray[np.uint8]:
    """Read a coloured label file as [H, W, 3] uint8 RGB; a palette file by its colours.

    Raises:
        DataError: not a picture, or truncated.
    """
    with _readable(path), _open(path) as file:
        return np.asarray(_upright(file).convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """Rows and columns of a picture or label file as it is read, from the header alone.

    Raises:
        DataError: not a picture.
    """
    with _readable(path), _open(path) as file:
        if file.format == "TIFF" and orientation(file) in _SWAPS:
            file.load()  # Pillow turns it by itself, and its size sooner or later, by version
        columns, rows = file.size
        swapped = orientation(file) in _SWAPS
    return (columns, rows) if swapped else (rows, columns)


def is_turned(path: Path) -> bool:
    """Whether an EXIF tag turns a picture or label file."""
    with _readable(path), _open(path) as file:
        return orientation(file) is not None


def _upright(file: Image.Image) -> Image.Image:
    file.load()  # a TIFF is turned by Pillow itself
    turn = orientation(file)
    return file if turn is None else file.transpose(turn)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():  # size is checked in pairs.py, by name and before the work
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"{path}: more than {most} pixels, which Pillow does not open; scale the image and "
            "its label map down"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
