"""Any picture to pixels: files, bytes, PIL images, arrays and tensors as upright 8-bit RGB."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from talk2dino.errors import DataError, say
from talk2dino.files import user_path

_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff"),
        *(".bmp", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pnm"),
    )
)
_PAGES = ("GIF", "PNG", "TIFF", "WEBP")  # of JPEG, the pictures behind the first are previews
HEIF = (".heic", ".heif", ".hif")  # photographs of telephones
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
_WIDE = 65535  # of gray with more than 8 bits
_DARK = 4096  # values below it come out below 16 of 255


@cache
def picture_suffixes() -> frozenset[str]:
    """Endings of files that are taken for pictures, where only a folder is named.

    Those of HEIC are among them with the extra `heic`, whose decoder this registers with Pillow.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return _SUFFIXES
    register_heif_opener()
    return _SUFFIXES | set(HEIF)


def unread(endings: Sequence[str]) -> str:
    """Why files with these endings are not read, and what would help."""
    wanted = [ending for ending in endings if ending in HEIF]
    if wanted and not picture_suffixes().issuperset(HEIF):
        return f"{', '.join(wanted)} needs: pip install 'talk2dino[heic]'"
    return (
        f"found {', '.join(endings[:5])}; pictures end in {', '.join(sorted(picture_suffixes()))}"
    )


def is_picture(path: Path) -> bool:
    """Whether a file of a folder is taken for a picture: by its suffix, unless it is hidden.

    A link that leads nowhere is one, too: whoever reads it says so, instead of leaving it out.
    """
    known = path.suffix.lower() in picture_suffixes() and not path.name.startswith(".")
    return known and is_there(path)


def is_there(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def read_picture(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Open a picture and bring it to upright 8-bit RGB, see `upright_rgb`.

    Pillow warns of more than 89 million pixels and refuses twice as many before it decodes any:
    large photographs are read without the warning, those that it refuses stay refused. Of an
    animation, or a file of several pages, the first picture is read, with a `ResultWarning`, which
    calls the file by `name` where it has no path, and is not given without either.

    Raises:
        OSError: the file is truncated or no picture; a broken decoder may raise anything else.
    """
    ending = file.suffix.lower() if isinstance(file, Path) else ""
    if ending not in picture_suffixes() and ending in HEIF:
        raise OSError(unread([ending]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                rgb = upright_rgb(image)
                if name or isinstance(file, Path):
                    say_several(image, name or str(file))
        except Image.DecompressionBombError as error:
            fix = "scale it down, or cut it into tiles"
            raise Image.DecompressionBombError(f"{too_large()}; {fix}") from error
    return rgb


def say_several(image: Image.Image, name: str) -> None:
    """Say that only the first of several pictures of a file is taken."""
    if image.format in _PAGES and getattr(image, "is_animated", False):
        say(f"{name}: holds several pictures; the first is taken", stacklevel=3)


def too_large() -> str:
    """What pictures are never opened, in words."""
    return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, which Pillow does not open"


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright by its EXIF tag and bring it to 8-bit RGB.

    Pillow cuts 16-bit gray off at 255, which makes nearly all of it white; here the full range
    0..65535 becomes 0..255. An alpha channel is dropped, as the original's `convert("RGB")` does.

    Raises:
        OSError: the file is truncated; a broken decoder may raise anything else.
        ValueError: floating-point pixels, or values beyond 16 bits, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers; save it with 8 or 16 bits a channel")
    image.load()  # Pillow turns a TIFF upright while loading it
    turn = orientation(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "L":
        counts = image.histogram()
        if sum(map(bool, counts[:32])) > 1 and not any(counts[32:255]):  # classes and void
            name = getattr(image, "filename", "") or "image"
            say(f"{name}: its gray is below 32 of 255, as in a label map; is it the photograph?")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it must drop a palette's transparency
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


STRIP = 8  # length of the longest strip that is kept of a picture, in its widths


def middle_strip(image: Image.Image) -> Image.Image:
    """Cut a very long picture to its middle part, at most `STRIP` times as long as it is wide.

    Enlarging a line of 1 x 5000 pixels to a side of 448 would take three gigabytes, of which a
    center crop keeps the middle square. Whole pixels are cut off, the same number (or one more) on
    both sides, so the middle stays where it was to half a pixel.
    """
    long, short = max(image.size), min(image.size)
    excess = (long - STRIP * short) // 2
    if excess <= 0:
        return image
    width, height = image.size
    if width > height:
        return image.crop((excess, 0, width - excess, height))
    return image.crop((0, excess, width, height - excess))


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


def upright_size(file: Image.Image) -> tuple[int, int]:
    """Rows and columns of an opened picture as it is read, from the header alone."""
    if file.format == "TIFF" and orientation(file) in SWAPS:
        file.load()  # Pillow turns it while loading; when `size` follows differs by version
    columns, rows = file.size
    return (columns, rows) if orientation(file) in SWAPS else (rows, columns)


def orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright by its EXIF tag; None if it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged tags
            return _TURN.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags raise all sorts of errors; the picture itself may be sound
        return None


def upright(file: Image.Image) -> Image.Image:
    """A picture as its EXIF tag says it stands."""
    file.load()  # Pillow turns a TIFF upright while loading it
    turn = orientation(file)
    return file if turn is None else file.transpose(turn)


@contextmanager
def open_quietly(path: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open a picture of any size; no pixel is read."""
    with warnings.catch_warnings():  # `check_pairs` checks the size, with a message of its own
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            yield file


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """What a broken or huge file raises as one line.

    Raises:
        DataError: in place of it.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {too_large()}; scale the image and its label map down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


ImageLike: TypeAlias = "Image.Image | str | Path | bytes | Tensor | np.ndarray[Any, Any]"


def to_pixels(image: ImageLike) -> Tensor:
    """Bring a picture to `[3, H, W]` uint8 RGB on the CPU.

    Args:
        image: PIL image; path; bytes of a picture file; tensor `[3, H, W]`; array `[H, W, 3]` or
            `[H, W]`. Tensors and arrays are RGB, uint8 or float within 0..1. Files and PIL images
            are turned upright by their EXIF tag.

    Raises:
        DataError: unreadable file, or another shape, type or range. Addresses are not opened.
    """
    if isinstance(image, (str, Path)):
        return _from_path(str(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(image))
    if isinstance(image, Image.Image):
        try:
            return _from_upright(upright_rgb(image))
        except Exception as error:  # read on first use: broken files make decoders raise anything
            raise DataError(f"image: this PIL image cannot be read ({error})") from error
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor) and is_plain(image) and image.ndim == 3 and len(image) == 3:
        return _to_bytes(image.detach().cpu(), image.numel())
    shape = tuple(getattr(image, "shape", ()))
    raise DataError(
        f"image: {type(image).__name__} {shape}; give a PIL image, a path, bytes of a file, "
        "a tensor [3, H, W] or an array [H, W, 3]"
    )


def size_of(image: ImageLike) -> tuple[int, int] | None:
    """Rows and columns of what `to_pixels` takes, without decoding it.

    None for what it refuses: its message says why.
    """
    try:
        if isinstance(image, (bytes, bytearray, memoryview)):
            with Image.open(BytesIO(image)) as opened:
                return opened.height, opened.width
        if isinstance(image, (str, Path)):
            with open_quietly(user_path(image)) as opened:
                return upright_size(opened)
    except Exception:  # broken files make decoders raise anything
        return None
    if isinstance(image, Image.Image):
        return (image.height, image.width) if image.height and image.width else None
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) not in (2, 3) or not all(shape):
        return None
    return (shape[-2], shape[-1]) if isinstance(image, Tensor) else (shape[0], shape[1])


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike] | None:
    """The pictures of a list, tuple or `[B, 3, H, W]` tensor; None if it is a single picture.

    Raises:
        DataError: an empty list.
    """
    batch = isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4
    if not batch and not isinstance(images, (list, tuple)):
        return None
    several: list[ImageLike] = list(images)  # type: ignore[arg-type]
    if not several:
        raise DataError("images: the list is empty; give at least one picture")
    return several


def to_picture(pixels: Tensor) -> Image.Image:
    """`[3, H, W]` uint8 as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _from_path(path: str) -> Tensor:
    if path.startswith(("http://", "https://")):
        raise DataError(f"image={path}: addresses are not opened; download the picture first")
    if not user_path(path).is_file():
        raise DataError(f"image={path}: no such file")
    try:
        return _from_upright(read_picture(user_path(path)))
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"image={path}: cannot be read as an image ({error})") from error


def _from_bytes(content: bytes) -> Tensor:
    try:
        return _from_upright(read_picture(BytesIO(content), "image"))
    except Exception as error:  # broken files make decoders raise anything
        why = str(error).partition(" <")[0]  # without the name of a Python object
        raise DataError(f"image: {len(content)} bytes that are no picture ({why})") from error


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds values of its own: not a sparse one, nor one on `meta`."""
    return tensor.layout == torch.strided and not tensor.is_meta


def _from_upright(image: Image.Image) -> Tensor:
    if not image.width or not image.height:
        raise ValueError("it holds no pixel")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _from_array(image: np.ndarray[Any, Any]) -> Tensor:
    """`[H, W, 3]` or `[H, W]`; a channel axis in front would be a tensor's."""
    if np.ma.is_masked(image):
        raise DataError("image: a masked array; say what its masked pixels are: filled(0)")
    image = np.asarray(image)  # no matrix, which NumPy may crash on
    image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"image: array {image.shape}; give [H, W, 3] RGB or [H, W] gray")
    if image.dtype != np.uint8 and (image.dtype.kind != "f" or image.dtype.itemsize > 8):
        raise DataError(f"image: {image.dtype} array; give uint8, or float within 0..1")
    # copied: a tensor needs positive strides (unlike a flipped view) and writable memory
    pixels = np.array(image, dtype=image.dtype.newbyteorder("="), order="C")
    return _to_bytes(torch.from_numpy(pixels).permute(2, 0, 1), image.size)


def _to_bytes(image: Tensor, count: int) -> Tensor:
    """uint8 as it is, floats 0..1 times 255; `count` values, at least one."""
    if not count:
        raise DataError(f"image: {tuple(image.shape)} holds no pixel")
    if image.dtype == torch.uint8:
        return image.clone()
    if not image.is_floating_point():
        raise DataError(f"image: {image.dtype}; give uint8, or float within 0..1")
    lowest, highest = map(float, image.aminmax())
    if not 0 <= lowest <= highest <= 1:  # NaN fails too
        raise DataError(
            f"image: {image.dtype} in {lowest:.9g}..{highest:.9g}; give uint8, or 0..1 (clip it)"
        )
    return (image.float() * 255).round().to(torch.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """0..65535 as 0..255, a few rows at a time, for a picture may be large.

    Mode I also holds 8-bit values (32-bit files of small numbers): those are kept. What comes out
    nearly black, as 12 bits of a camera or microscope do in a file of 16, is said.

    Raises:
        ValueError: values outside 0..65535, whose range is unknown.
    """
    ends = [(part.min(), part.max()) for _, part in _rows_of(image)]  # not all modes know them
    low, high = int(min(low for low, _ in ends)), int(max(high for _, high in ends))
    if low < 0 or high > _WIDE:
        raise ValueError(f"pixels are {low}..{high}; save it with 8 or 16 bits a channel")
    wide = image.mode.startswith("I;16") or high > 255
    if wide and 0 < high < _DARK:
        name = getattr(image, "filename", "") or "image"
        bits = high.bit_length()
        say(f"{name}: uses {bits} of 16 bits, so it is nearly black; stretch its values first")
    gray = np.empty((image.height, image.width), np.uint8)
    for top, values in _rows_of(image):
        gray[top : top + len(values)] = values // 257 if wide else values
    return Image.fromarray(gray)


def _rows_of(image: Image.Image) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The first of some rows, and their values."""
    for top in range(0, image.height, 64):
        part = image.crop((0, top, image.width, min(top + 64, image.height)))
        yield top, np.asarray(part).astype(np.int64)
