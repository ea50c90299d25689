"""Any picture file as upright 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

SUFFIXES = frozenset(  # of files that are taken for pictures, where only a folder is named
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff"),
        *(".bmp", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pnm"),
    )
)
_TURN = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_picture(path: Path) -> bool:
    """Whether a file of a folder is taken for a picture: by its suffix, unless it is hidden."""
    known = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return known and path.is_file()


def read_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture and bring it to upright 8-bit RGB, see `upright_rgb`.

    Pillow warns of more than 89 million pixels and refuses twice as many: large photographs are
    read without the warning, what is beyond stays refused.

    Raises:
        OSError: the file is truncated or no picture; a broken decoder may raise anything else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright by its EXIF tag and bring it to 8-bit RGB.

    Pillow cuts 16-bit grey off at 255, which makes nearly all of it white; here the full range
    0..65535 becomes 0..255. An alpha channel is dropped, as the original's `convert("RGB")` does.

    Raises:
        OSError: the file is truncated; a broken decoder may raise anything else.
        ValueError: numbers with fractions, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("pixels are numbers with fractions; save it with 8 or 16 bits a channel")
    image.load()  # a TIFF is turned by Pillow itself
    turn = orientation(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        # Mode I also holds 8-bit values (32-bit files of small numbers): those are kept.
        grey = wide // 257 if image.mode.startswith("I;16") or wide.max(initial=0) > 255 else wide
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it must drop a palette's transparency
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def middle_strip(image: Image.Image, ratio: int = 8) -> Image.Image:
    """Cut a very long picture to its middle part, at most `ratio` times as long as it is wide.

    Enlarging a line of 1 x 5000 pixels to a side of 448 would take three gigabytes, of which a
    centre crop keeps the middle square. Whole pixels are cut off, the same number (or one more) on
    both sides, so the middle stays where it was to half a pixel.
    """
    long, short = max(image.size), min(image.size)
    excess = (long - ratio * short) // 2
    if excess <= 0:
        return image
    width, height = image.size
    if width > height:
        return image.crop((excess, 0, width - excess, height))
    return image.crop((0, excess, width, height - excess))


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright by its EXIF tag; None if it is."""
    try:
        return _TURN.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags raise all sorts of errors; the picture itself may be sound
        return None
