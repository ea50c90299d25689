"""Which fields extraction stores of an image and of a caption, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.encoders.vision import TimmVisionEncoder, VisionFeatures
from talk2dino.errors import ConfigError
from talk2dino.features.store.schema import FIXED_DTYPES

_SEED = 0x7A1D  # part of the format: another seed would choose other patches
_64_BITS = (1 << 64) - 1


def patch_subset(image_ids: Sequence[int], patches: int, count: int) -> NDArray[np.int64]:
    """Choose `count` of `patches` patches of each image, uniformly: [B, count], ascending.

    Depends on the image's id only, so ranks, batches and restarts agree; drawn from raw bits,
    which NumPy keeps the same in all versions.
    """
    chosen = np.empty((len(image_ids), count), np.int64)
    for row, image_id in enumerate(image_ids):
        keys = np.random.PCG64([_SEED, image_id & _64_BITS]).random_raw(patches)
        chosen[row] = np.sort(np.argsort(keys, kind="stable")[:count])
    return chosen


EXTRACTED = (
    "patch_tokens",
    "self_attn_maps",
    "cls_token",
    "avg_self_attn_out",
    "disentangled_self_attn",
)
IMAGE_CHOICES = (*EXTRACTED, "second_last_out")
_PER_PATCH = ("patch_tokens", "self_attn_maps")


def check_image_fields(names: Sequence[str], patches_per_image: int | None) -> None:
    """Refuse unknown fields, and a subset of patches where no field has patches (ConfigError)."""
    if not names:
        raise ConfigError("features.image_fields is empty; give at least avg_self_attn_out")
    for name in names:
        if name not in IMAGE_CHOICES:
            raise ConfigError(
                f"features.image_fields: {name!r} is unknown; choose of {', '.join(IMAGE_CHOICES)}"
            )
    if patches_per_image is None:
        return
    if patches_per_image < 1:
        raise ConfigError(
            f"features.patches_per_image={patches_per_image}; use 1 or more, or null for all"
        )
    if not set(names) & set(_PER_PATCH):
        raise ConfigError(
            f"features.patches_per_image={patches_per_image} has no effect without patch_tokens or "
            "self_attn_maps in features.image_fields; use null or features=dense"
        )


def stored_patches(vision: TimmVisionEncoder, patches_per_image: int | None) -> int:
    """Patches kept of an image; ConfigError if the encoder makes fewer than were asked for."""
    patches = int((vision.image_size // vision.patch_size) ** 2)
    if patches_per_image is None:
        return patches
    if patches_per_image > patches:
        raise ConfigError(
            f"features.patches_per_image={patches_per_image}: vision.image_size="
            f"{vision.image_size} gives {patches} patches; use at most that, or null"
        )
    return patches_per_image


def image_bytes(
    vision: TimmVisionEncoder, names: Sequence[str], dtype: str, patches_per_image: int | None
) -> int:
    """Bytes of the named fields of one image, stored in `dtype`."""
    width, heads = vision.embed_dim, vision.num_heads
    patches = stored_patches(vision, patches_per_image)
    values = {
        "patch_tokens": patches * width,
        "self_attn_maps": heads * patches,
        "cls_token": width,
        "avg_self_attn_out": width,
        "disentangled_self_attn": heads * width,
        "second_last_out": vision.block_dim,
    }
    index = 0 if patches_per_image is None else patches * np.dtype(np.int64).itemsize
    return np.dtype(dtype).itemsize * sum(values[name] for name in names) + index


def select_fields(
    features: VisionFeatures,
    names: Sequence[str],
    image_ids: Sequence[int] = (),
    patches_per_image: int | None = None,
) -> dict[str, Tensor]:
    """Return the named fields of a batch, each [B, ...], and `patch_index` with a subset.

    Pooled fields are computed in float32 from all patches, whatever subset is kept.
    """
    kept = features
    extra: dict[str, Tensor] = {}
    if patches_per_image is not None:
        patches = features.patch_tokens.shape[1]
        index = torch.from_numpy(patch_subset(image_ids, patches, patches_per_image))
        extra = {"patch_index": index}
        kept = _at(features, index.to(features.patch_tokens.device))
    make: dict[str, Callable[[], Tensor]] = {
        "patch_tokens": lambda: kept.patch_tokens,
        "self_attn_maps": lambda: kept.self_attn_maps,
        "cls_token": lambda: features.cls_token,
        "avg_self_attn_out": lambda: pool_attention(
            features.patch_tokens, features.self_attn_maps, head_average=True
        ),
        "disentangled_self_attn": lambda: pool_attention(
            features.patch_tokens, features.self_attn_maps
        ),
        "second_last_out": lambda: features.second_last_out,
    }
    return {name: make[name]() for name in names} | extra


def _at(features: VisionFeatures, index: Tensor) -> VisionFeatures:
    """Tokens [B, P', D] and maps [B, H, P'] of the patches `index` [B, P']."""
    tokens, maps = features.patch_tokens, features.self_attn_maps
    return VisionFeatures(
        tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2])),
        maps.gather(2, index[:, None].expand(-1, maps.shape[1], -1)),
        features.cls_token,
        features.grid,
        features.second_last_out,
    )


EXTRACTED_CAPTIONS = (
    "embedding",
    "token_embeddings",
    "token_mask",
    "second_last_tokens",
    "eot_index",
)
# Both of a pair, or neither.
_TOGETHER = (("token_embeddings", "token_mask"), ("second_last_tokens", "eot_index"))


def check_caption_fields(names: Sequence[str], text: TextEncoder) -> None:
    """Refuse caption fields that are unknown, incomplete or not the encoder's (ConfigError)."""
    if not names:
        raise ConfigError("features.caption_fields is empty; give at least embedding")
    for name in names:
        if name not in EXTRACTED_CAPTIONS:
            raise ConfigError(
                f"features.caption_fields: {name!r} is unknown; choose of "
                f"{', '.join(EXTRACTED_CAPTIONS)}"
            )
    for pair in _TOGETHER:
        given = [name for name in pair if name in names]
        if len(given) == 1:
            raise ConfigError(
                f"features.caption_fields: {given[0]} is of no use alone; give {' and '.join(pair)}"
            )
    caption_bytes(text, names, "float32")


def caption_bytes(text: TextEncoder, names: Sequence[str], dtype: str) -> int:
    """Bytes of the named fields of one caption, stored in `dtype`.

    Computed from an empty caption: L is the same for all captions, so that all shards agree.

    Raises:
        ConfigError: the encoder does not give one of the fields.
    """
    if list(names) == ["embedding"]:
        return text.embed_dim * np.dtype(dtype).itemsize
    return sum(
        values[0].numel() * np.dtype(FIXED_DTYPES.get(name, dtype)).itemsize
        for name, values in encode_fields(text, [""], names).items()
    )
