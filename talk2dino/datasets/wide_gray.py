"""Gray of 16 or 32 bits as gray of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from talk2dino.errors import say

WIDE = 65535
DARK = 4096  # values below it come out below 16 of 255


def eight_bits(image: Image.Image) -> Image.Image:
    """0..65535 as 0..255, a few rows at a time, for a picture may be large.

    Mode I also holds 8-bit values (32-bit files of small numbers): those are kept. What comes out
    nearly black, as 12 bits of a camera or microscope do in a file of 16, is said.

    Raises:
        ValueError: values outside 0..65535, whose range is unknown.
    """
    ends = [(part.min(), part.max()) for _, part in _rows(image)]  # Pillow knows not all modes' own
    low, high = int(min(low for low, _ in ends)), int(max(high for _, high in ends))
    if low < 0 or high > WIDE:
        raise ValueError(f"pixels are {low}..{high}; save it with 8 or 16 bits a channel")
    wide = image.mode.startswith("I;16") or high > 255
    if wide and 0 < high < DARK:
        name = getattr(image, "filename", "") or "image"
        bits = high.bit_length()
        say(f"{name}: uses {bits} of 16 bits, so it is nearly black; stretch its values first")
    gray = np.empty((image.height, image.width), np.uint8)
    for top, values in _rows(image):
        gray[top : top + len(values)] = values // 257 if wide else values
    return Image.fromarray(gray)


def _rows(image: Image.Image) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The first of some rows, and their values."""
    for top in range(0, image.height, 64):
        part = image.crop((0, top, image.width, min(top + 64, image.height)))
        yield top, np.asarray(part).astype(np.int64)
