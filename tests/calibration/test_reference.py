"""Which patches make up a reference: the same every time, of many pictures, of the same encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talk2dino.calibration.reference import draw_from_pictures, draw_from_store
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError, StoreError
from talk2dino.features import FeatureStore
from talk2dino.segmentation import Segmenter
from tests.helpers.stores import tiny_store, write_pictures

SHAPE = {"patch_tokens": (16, 64)}


@pytest.fixture(scope="module")
def vision() -> TimmVisionEncoder:
    return TimmVisionEncoder("test_vit", "random", image_size=64)


def store_of(folder: Path, vision: Any, shapes: Any = SHAPE, images: int = 40) -> FeatureStore:
    described = None if vision is None else vision.describe()
    return FeatureStore(tiny_store(folder / "store", shapes, images=images, vision=described))


def test_patches_of_a_store(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    store = store_of(tmp_path, vision, images=80)
    seen: list[tuple[int, int]] = []
    drawn = draw_from_store(store, vision, 130, 0, lambda *done: seen.append(done))
    again = draw_from_store(store, vision, 130, 0)
    other = draw_from_store(store, vision, 130, 1)
    assert torch.equal(drawn.tokens, again.tokens) and not torch.equal(drawn.tokens, other.tokens)
    assert drawn.tokens.shape == (130, 64) and drawn.tokens.dtype == torch.float16
    assert drawn.pictures == 65 and seen[-1] == (65, 65)  # two patches of each
    every = store.images["patch_tokens"][:].reshape(-1, 64)
    places = [np.flatnonzero((every == row).all(1)) for row in drawn.tokens.numpy()]
    assert all(len(place) == 1 for place in places)
    found = np.concatenate(places)
    assert len(set(found)) == 130  # none twice
    assert set(np.bincount(found // 16)) == {0, 2}


def test_few_pictures_give_more_patches_and_small_ones_fewer(
    vision: TimmVisionEncoder, tmp_path: Path
) -> None:
    for patches, images, pictures in ((4, 40, 40), (1, 120, 100)):
        store = store_of(tmp_path / str(patches), vision, {"patch_tokens": (patches, 64)}, images)
        drawn = draw_from_store(store, vision, 100, 0)
        assert drawn.tokens.shape == (100, 64) and drawn.pictures == pictures


def test_a_store_of_other_blocks_is_refused(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    store = store_of(tmp_path, TimmVisionEncoder("test_vit", "random", 64, layers=[-1]))
    with pytest.raises(CheckpointError, match=r"store=.*vision\.layers=\[5\], not of null"):
        draw_from_store(store, vision, 130, 0)


def test_all_patches_there_are(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    store = store_of(tmp_path, vision, images=10)
    drawn = draw_from_store(store, vision, 160, 0)
    np.testing.assert_array_equal(drawn.tokens, store.images["patch_tokens"][:].reshape(-1, 64))
    with pytest.raises(ConfigError, match=r"tokens=161: store=.* 10 pictures with 160 patches"):
        draw_from_store(store, vision, 161, 0)
    with pytest.raises(ConfigError, match=r"tokens=99: use 100 to 65536"):
        draw_from_store(store, vision, 99, 0)
    with pytest.raises(ConfigError, match=r"seed=-1"):
        draw_from_store(store, vision, 100, -1)


def test_stores_that_do_not_fit(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    pooled = store_of(tmp_path / "pooled", vision, {"cls_token": (64,)})
    with pytest.raises(StoreError, match=r"no field 'patch_tokens', only"):
        draw_from_store(pooled, vision, 100, 0)
    nameless = store_of(tmp_path / "nameless", None)
    with pytest.raises(CheckpointError, match="an encoder that it does not name"):
        draw_from_store(nameless, vision, 100, 0)
    changed = TimmVisionEncoder("test_vit", "random", image_size=64)
    changed.model.norm.weight.data += 1
    with pytest.raises(CheckpointError, match="features are of test_vit, not of this"):
        draw_from_store(store_of(tmp_path, vision), changed, 100, 0)


def test_patches_of_pictures(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    (folder / "deeper").mkdir()
    (folder / "23.png").rename(folder / "deeper" / "x.png")
    segmenter = Segmenter(vision, short_side=64, window=64, stride=32, input_size=64)
    drawn = draw_from_pictures(folder, segmenter, 24 * 16, 0)
    encoded = [
        segmenter.encode(torch.from_numpy(pixels).permute(2, 0, 1)).features.patch_tokens[0]
        for pixels in map(read, [*sorted(folder.glob("*.png")), folder / "deeper" / "x.png"])
    ]
    assert drawn.pictures == 24
    torch.testing.assert_close(drawn.tokens, torch.cat(encoded).half(), rtol=1e-2, atol=1e-3)
    with pytest.raises(ConfigError, match="24 pictures with 384 patches"):
        draw_from_pictures(folder, segmenter, 385, 0)


def read(path: Path) -> Any:
    from PIL import Image

    return np.array(Image.open(path))


def test_folders_without_pictures(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    segmenter = Segmenter(vision, short_side=64, window=64, stride=32, input_size=64)
    with pytest.raises(DataError, match="no such folder"):
        draw_from_pictures(tmp_path / "absent", segmenter, 100, 0)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"no pictures in this folder \(found .txt"):
        draw_from_pictures(tmp_path, segmenter, 100, 0)
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cannot be read as an image"):
        draw_from_pictures(tmp_path, segmenter, 100, 0)
