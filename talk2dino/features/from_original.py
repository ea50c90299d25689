"""Features that the original extracted, written as a feature store, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from talk2dino.datasets.captions import Entry
from talk2dino.errors import ConfigError, DataError, StoreError
from talk2dino.features.original_files import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    OriginalFields,
    OriginalSamples,
    Row,
)
from talk2dino.features.store.schema import MANIFEST, EncoderInfo, Manifest, VisionInfo
from talk2dino.features.store.shard_writer import ShardRows
from talk2dino.features.store.writer import (
    finish_manifest,
    merge_skipped,
    open_for_append,
    write_shard,
    write_skipped,
)

Spec = Mapping[str, Any]


def convert_features(
    samples: OriginalSamples,
    store: Path,
    *,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = 1024,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the original's features into `store`; started again, it continues.

    Shard k holds samples k·n … (k+1)·n − 1. An image that lacks a feature (the original leaves
    images that it could not read without) is skipped and listed in `{split}-skipped.jsonl`.

    Args:
        samples: the original's file or tars.
        store: folder to fill.
        split: first part of the shards' names.
        dtype: of the stored features, `float16` or `float32`.
        images_per_shard: images per shard; one shard is in memory at a time.
        embedding: the annotations' field that becomes `embedding`, if they have several.
        vision: spec of the vision encoder, for the manifest; its weights stay unnamed.
        text: spec of the text encoder, likewise.
        advance: called with (images done, images in all).

    Returns:
        The manifest.

    Raises:
        StoreError: `store` holds a store, was begun with other settings, or cannot be written.
        DataError: no features, or an annotation without them.
    """
    if (store / MANIFEST).exists():
        raise StoreError(f"store={store}: already holds a store; delete it or use another folder")
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard={images_per_shard}; use 1 or more")
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype={dtype!r}; choose float16 or float32")
    fields = OriginalFields(*_complete_sample(samples), dtype, embedding)
    settings = {
        "source": samples.fingerprint(),
        "dtype": dtype,
        "images_per_shard": images_per_shard,
        "embedding": embedding,
        "vision": dict(vision or {}),
        "text": dict(text or {}),
    }
    done = open_for_append(store, settings, split)
    starts = range(0, len(samples), images_per_shard)
    for index, start in enumerate(starts):
        stop = min(start + images_per_shard, len(samples))
        if index not in done:
            _write(store, index, split, dtype, _rows(samples, range(start, stop), fields))
        advance(stop, len(samples))
    merge_skipped(store, split)
    return finish_manifest(
        store,
        shards=len(starts),
        split=split,
        vision=_vision_info(vision, fields),
        text=_text_info(text, fields),
    )


def _complete_sample(samples: OriginalSamples) -> tuple[Row, Row]:
    """The first image with features and its first annotation.

    Raises:
        DataError: there is none.
    """
    for index in range(len(samples)):
        image, captions = samples[index]
        if IMAGE_NAMES.keys() & image.keys():
            if CAPTION_NAMES.keys() & captions[0].keys():
                return image, captions[0]
            raise DataError(
                f"input: annotation {captions[0]['id']} has none of "
                f"{', '.join(CAPTION_NAMES)}; run the original's text_features_extraction.py"
            )
    raise DataError(
        f"input: none of {len(samples)} images has any of {', '.join(IMAGE_NAMES)}; run the "
        "original's dino_extraction_v2.py"
    )


def _rows(samples: OriginalSamples, positions: range, fields: OriginalFields) -> ShardRows:
    rows = ShardRows(len(positions))
    no_images, no_captions = fields.nothing()
    rows.add_images([], no_images)
    rows.add_caption_fields(no_captions)  # a shard of skipped images has the others' fields too
    for index in positions:
        image, captions = samples[index]
        name = str(image["file_name"])
        try:
            values = fields.image(image)
        except ValueError as error:
            rows.skipped.append({"index": index, "file_name": name, "reason": str(error)})
            continue
        texts = tuple((_number(row["id"], index), str(row["caption"])) for row in captions)
        rows.add_images([Entry(_number(image["id"], index), name, texts)], values)
        try:
            rows.add_caption_fields(fields.captions(captions))
        except ValueError as error:
            raise DataError(f"input: an annotation of image {image['id']} {error}") from error
    return rows


def _write(store: Path, index: int, split: str, dtype: str, rows: ShardRows) -> None:
    write_skipped(store, split, index, rows.skipped)
    images, captions = rows.arrays()
    write_shard(store, index, images, captions, split=split, dtype=dtype, skipped=len(rows.skipped))


def _number(value: object, position: int) -> int:
    """An id as a number: COCO's are; keys such as `000000012` become one, others the position."""
    if isinstance(value, str) and not (value.isdecimal() and len(value) < 19):
        return position
    return int(value) if isinstance(value, (int, str)) else position


def _vision_info(spec: Spec | None, fields: OriginalFields) -> VisionInfo | None:
    if spec is None:
        return None
    shapes = fields.shapes
    width = [shape[-1] for name, shape in shapes.items() if _is_wide(name)]
    heads = [
        shapes[name][0] for name in ("disentangled_self_attn", "self_attn_maps") if name in shapes
    ]
    return VisionInfo(
        name=str(spec["name"]),
        embed_dim=next(iter(width), 0),
        spec=dict(spec),
        image_size=int(spec.get("image_size", 0)),
        num_heads=next(iter(heads), 0),
    )


def _is_wide(name: str) -> bool:
    return name in IMAGE_NAMES.values() and name != "self_attn_maps"


def _text_info(spec: Spec | None, fields: OriginalFields) -> EncoderInfo | None:
    if spec is None:
        return None
    shapes = fields.shapes
    width = next((shapes[n][-1] for n in ("embedding", "token_embeddings") if n in shapes), 0)
    return EncoderInfo(name=str(spec["name"]), embed_dim=width, spec=dict(spec))
