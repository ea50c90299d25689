"""Write a whole feature store from arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.schema import MANIFEST, EncoderInfo, Manifest, VisionInfo
from talk2dino.features.shard_writer import Arrays, check_image_rows, check_lengths
from talk2dino.features.writer import finish_manifest, write_shard

_Info = TypeVar("_Info", bound=EncoderInfo)


def write_store(
    folder: str | Path,
    images: Arrays,
    captions: Arrays,
    *,
    split: str = "train",
    images_per_shard: int = 1024,
    dtype: str = "float16",
    vision: VisionInfo | Mapping[str, Any] | None = None,
    text: EncoderInfo | Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a whole store from arrays.

    Raises StoreError as `write_shard` does; also for no images, or a folder that holds a store.

    Args:
        folder: created if needed; must not hold a store yet.
        images: fields [n, ...]; `id` defaults to 0 ... n - 1, `file_name` to the id.
        captions: fields [m, ...], or empty; `image_row` counts over all images. Captions live with
            their image and keep their order within its shard.
        split: name of the split.
        images_per_shard: images in each shard but the last.
        dtype: of the features, `float16` or `float32`.
        vision: the vision encoder, or its fields as a dict.
        text: the text encoder, or its fields as a dict.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise StoreError(f"{folder}: already holds a store; delete it or use another folder")
    if images_per_shard < 1:
        raise StoreError(f"images_per_shard={images_per_shard} must be at least 1")
    vision_info = _encoder(VisionInfo, vision, "vision")
    text_info = _encoder(EncoderInfo, text, "text")
    image_arrays, caption_arrays = _with_defaults(images, captions)
    n = len(image_arrays["id"])
    if not n:
        raise StoreError(f"{folder}: no image to store; give at least one row in images")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, n, images_per_shard)
    for index, start in enumerate(starts):
        stop = min(start + images_per_shard, n)
        part = {name: array[start:stop] for name, array in image_arrays.items()}
        write_shard(
            folder,
            index,
            part,
            _captions_between(caption_arrays, start, stop),
            split=split,
            dtype=dtype,
        )
    return finish_manifest(
        folder, shards=len(starts), split=split, vision=vision_info, text=text_info
    )


def _with_defaults(
    images: Arrays, captions: Arrays
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Arrays with the ids, names and texts that were left out; image rows checked."""
    image_arrays = {name: np.asarray(value) for name, value in images.items()}
    caption_arrays = {name: np.asarray(value) for name, value in captions.items()}
    n = min((len(array) for array in image_arrays.values()), default=0)
    image_arrays.setdefault("id", np.arange(n))
    image_arrays.setdefault("file_name", image_arrays["id"].astype(str))
    if not caption_arrays:
        return image_arrays, caption_arrays
    if "image_row" not in caption_arrays:
        raise StoreError("captions: field image_row is missing; give the image's row per caption")
    m = len(caption_arrays["image_row"])
    caption_arrays.setdefault("id", np.arange(m))
    caption_arrays.setdefault("text", np.full(m, ""))
    check_lengths("images", image_arrays)
    check_lengths("captions", caption_arrays)
    check_image_rows(caption_arrays, n, "captions")
    return image_arrays, caption_arrays


def _captions_between(
    captions: Mapping[str, NDArray[Any]], start: int, stop: int
) -> dict[str, NDArray[Any]]:
    """Captions of images `start` ... `stop` - 1, in order, with rows counted from `start`."""
    if not captions:
        return {}
    rows = captions["image_row"]
    chosen = np.flatnonzero((rows >= start) & (rows < stop))
    part = {name: array[chosen] for name, array in captions.items()}
    return part | {"image_row": part["image_row"] - start}


def _encoder(kind: type[_Info], value: _Info | Mapping[str, Any] | None, key: str) -> _Info | None:
    """An encoder record from a dict, its other fields at their defaults."""
    if value is None or type(value) is kind:
        return value
    known = set(kind.__dataclass_fields__)
    if not isinstance(value, Mapping) or "name" not in value or set(value) - known:
        raise StoreError(f"{key}={value!r:.80} must be a dict with name and any of {sorted(known)}")
    return kind(**value)
