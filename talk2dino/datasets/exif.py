"""How a picture is turned upright by its EXIF tag."""

from __future__ import annotations

import warnings

from PIL import ExifTags, Image

_TURN = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS = (  # these turns exchange rows and columns
    *(Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE),
    *(Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright by its EXIF tag; None if it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged tags
            return _TURN.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags raise all sorts of errors; the picture itself may be sound
        return None
