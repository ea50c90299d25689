"""Any picture file as upright 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright by its EXIF tag and bring it to 8-bit RGB.

    Pillow cuts 16-bit grey off at 255, which makes nearly all of it white; here the full range
    0..65535 becomes 0..255.

    Raises:
        OSError: the file is truncated; a broken decoder may raise anything else.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        # Mode I also holds 8-bit values (32-bit files of small numbers): those are kept.
        grey = wide // 257 if image.mode.startswith("I;16") or wide.max(initial=0) > 255 else wide
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")
