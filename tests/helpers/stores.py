"""Small feature stores: random arrays, and what the extraction command makes of noise pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from talk2dino.features import write_store
from tests.helpers.encoders import SMALL_CLIP
from tests.helpers.pipeline import run

CLIP = SMALL_CLIP
IMAGES = 24
ENCODERS = (
    "vision=timm",
    "vision.name=test_vit",  # D = 64, 2 heads
    "vision.weights=random",
    "vision.image_size=64",
    "text=clip_vitb16",
    f"text.name={CLIP}",
    "text.weights=random",
    "text.templates=plain",
)
IMAGE_FIELDS = (
    "patch_tokens",
    "self_attn_maps",
    "cls_token",
    "avg_self_attn_out",
    "disentangled_self_attn",
    "second_last_out",
)
CAPTION_FIELDS = (
    "embedding",
    "token_embeddings",
    "token_mask",
    "second_last_tokens",
    "eot_index",
)
Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]  # of one image: {"patch_tokens": (P, D)}


def tiny_arrays(
    fields: Shapes,
    *,
    images: int = 12,
    captions_per_image: int = 1,
    text_dim: int = 4,
    seed: int = 0,
    learnable: bool = False,
) -> tuple[Arrays, Arrays]:
    """Random tables of images and captions, as `write_store` takes them.

    Ids start at 100 and 1000, so that none is a row. `avg_self_attn_out` is the mean over the heads
    of `disentangled_self_attn` where both are asked for. With `learnable` the captions' embeddings
    are the beginning of the image's mean feature with a little noise, instead of noise alone.
    """
    random = np.random.default_rng(seed)
    count = images * captions_per_image
    image_row = np.repeat(np.arange(images), captions_per_image)
    table: Arrays = {
        name: random.standard_normal((images, *shape), dtype=np.float32)
        for name, shape in fields.items()
    }
    if {"avg_self_attn_out", "disentangled_self_attn"} <= table.keys():
        table["avg_self_attn_out"] = table["disentangled_self_attn"].mean(1)
    embedding = random.standard_normal((count, text_dim), dtype=np.float32)
    if learnable:
        first = table[next(iter(fields))].reshape(images, -1, next(iter(fields.values()))[-1])
        embedding = first.mean(1)[image_row, :text_dim] + 0.01 * embedding
    captions = {
        "id": 1000 + np.arange(count),
        "image_row": image_row,
        "text": np.array([f"caption {number}" for number in range(count)]),
        "embedding": embedding,
    }
    return {"id": 100 + np.arange(images), **table}, captions


def tiny_store(
    path: Path,
    fields: Shapes,
    *,
    images_per_shard: int = 5,
    dtype: str = "float16",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **drawn: Any,
) -> Path:
    """A store of `tiny_arrays(fields, **drawn)`."""
    write_store(
        path,
        *tiny_arrays(fields, **drawn),
        images_per_shard=images_per_shard,
        dtype=dtype,
        vision=vision,
        text=text,
    )
    return path


def shard_arrays(seed: int = 0, images: int = 4, captions: int = 6) -> tuple[Arrays, Arrays]:
    """One shard's tables: ids that say the seed, captions at random images, texts not in ASCII."""
    random = np.random.default_rng(seed)
    return (
        {
            "id": np.arange(images) + 100 * seed,
            "file_name": np.array([f"{i}.jpg" for i in range(images)]),
            "patch_tokens": random.standard_normal((images, 5, 8), dtype=np.float32),
            "self_attn_maps": random.standard_normal((images, 2, 5), dtype=np.float32),
        },
        {
            "id": np.arange(captions),
            "image_row": np.sort(random.integers(0, images, captions)),
            "text": np.array([f"a cat, número {i}" for i in range(captions)]),
            "embedding": random.standard_normal((captions, 3), dtype=np.float32),
        },
    )


def caption(number: int) -> str:
    return "a photograph " + "of the sea " * (number % 4) + f"number {number}"


def write_pictures(folder: Path) -> Path:
    """Noise pictures with one caption each, of different lengths."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption(number))
    return folder


def extract(pictures: Path, store: Path, *overrides: str) -> Path:
    run(
        "extract",
        "source=folder",
        f"source.images={pictures}",
        *ENCODERS,
        f"store={store}",
        "images_per_shard=10",
        "num_workers=0",
        "accelerator=cpu",
        *overrides,
        f"hydra.run.dir={store.parent / 'extract-run'}",
    )
    return store


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("tokens") / "pictures")


@pytest.fixture(scope="session")
def token_store(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All image and caption fields of `pictures`, float32, three shards."""
    return extract(
        pictures,
        tmp_path_factory.mktemp("token_store") / "store",
        f"features.image_fields=[{','.join(IMAGE_FIELDS)}]",
        f"features.caption_fields=[{','.join(CAPTION_FIELDS)}]",
        "features.dtype=float32",
    )
