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
from PIL import ExifTags, Image
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.features.pictures import read_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_SINGLE_CHANNEL = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
_SWAPPED = 5  # EXIF orientations from here on swap rows and columns


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
    """Read a label file as stored: [H, W] values; of a palette file the indices, not the colours.

    Raises:
        DataError: not a picture, truncated, or with colour channels.
    """
    with _readable(path), _open(path) as file:
        if file.mode not in _SINGLE_CHANNEL:
            raise DataError(
                f"{path}: a {file.mode} picture, not a label map; save the class values as one "
                "8-bit channel, or give the classes' colours as benchmark.palette"
            )
        return np.asarray(file)


def read_colors(path: Path) -> NDArray[np.uint8]:
    """Read a coloured label file as [H, W, 3] uint8 RGB; a palette file by its colours.

    Raises:
        DataError: not a picture, or truncated.
    """
    with _readable(path), _open(path) as file:
        return np.asarray(file.convert("RGB"))


def picture_size(path: Path) -> tuple[int, int]:
    """Rows and columns of a picture as `read_image` gives it, from the header alone.

    Raises:
        DataError: not a picture.
    """
    with _readable(path), _open(path) as file:
        columns, rows = file.size
        turned = _orientation(file) >= _SWAPPED
    return (columns, rows) if turned else (rows, columns)


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags raise all sorts of errors; `upright_rgb` overlooks them too
        return 1


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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
