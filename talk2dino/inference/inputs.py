"""Pictures of any kind as `[3, H, W]` uint8 RGB: what `Talk2DINO` takes as an image."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.errors import DataError
from talk2dino.features.pictures import read_picture, upright_rgb

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
        return _from_upright(upright_rgb(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3:
        return _to_bytes(image.detach().cpu(), image.numel())
    shape = tuple(getattr(image, "shape", ()))
    raise DataError(
        f"image: {type(image).__name__} {shape}; give a PIL image, a path, bytes of a file, "
        "a tensor [3, H, W] or an array [H, W, 3]"
    )


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
    if not Path(path).expanduser().is_file():
        raise DataError(f"image={path}: no such file")
    try:
        return _from_upright(read_picture(Path(path).expanduser()))
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"image={path}: cannot be read as an image ({error})") from error


def _from_bytes(content: bytes) -> Tensor:
    try:
        return _from_upright(read_picture(BytesIO(content)))
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"image: {len(content)} bytes that are no picture ({error})") from error


def _from_upright(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _from_array(image: np.ndarray[Any, Any]) -> Tensor:
    """`[H, W, 3]` or `[H, W]`; a channel axis in front would be a tensor's."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"image: array {image.shape}; give [H, W, 3] RGB or [H, W] grey")
    if image.dtype.kind not in "uf":
        raise DataError(f"image: {image.dtype} array; give uint8, or float within 0..1")
    if image.dtype.kind == "u" and image.dtype != np.uint8:
        raise DataError(f"image: {image.dtype} array; give uint8, or float within 0..1")
    # a tensor has no negative strides (a flipped view) and may be written to
    pixels = np.array(image, order="C")
    return _to_bytes(torch.from_numpy(pixels).permute(2, 0, 1), image.size)


def _to_bytes(image: Tensor, count: int) -> Tensor:
    """uint8 as it is, floats 0..1 times 255; `count` values, at least one."""
    if not count:
        raise DataError(f"image: {tuple(image.shape)} holds no pixel")
    if image.dtype == torch.uint8:
        return image.clone()
    lowest, highest = (float(x) for x in image.aminmax()) if image.is_floating_point() else (0, 2)
    if not 0 <= lowest <= highest <= 1:  # NaN fails too
        raise DataError(f"image: {image.dtype} in {lowest:.3g}..{highest:.3g}; give uint8, or 0..1")
    return (image.float() * 255).round().to(torch.uint8)
