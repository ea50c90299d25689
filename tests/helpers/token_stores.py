"""A small store with every field, extracted by the real entry point with random encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pipeline import run

CLIP = "ViT-S-32-alt"  # the smallest text tower that open_clip has: C = W = 256, 4 heads, L = 77
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
