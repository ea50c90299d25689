"""What streams into training is what the store holds, and validation images stay out of it."""

from __future__ import annotations

from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from talk2dino.alignment.inputs import per_caption
from talk2dino.errors import ConfigError, StoreError
from talk2dino.features import FeatureDataModule, FeatureStore, write_store
from talk2dino.features.batches import StoreLoader
from tests.helpers.stores import tiny_arrays

IMAGES, PER_IMAGE, HEADS, WIDTH, TEXT = 12, 3, 2, 6, 4


def arrays(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = {"disentangled_self_attn": (HEADS, WIDTH), "avg_self_attn_out": (WIDTH,)}
    sizes = {"images": IMAGES, "captions_per_image": PER_IMAGE, "text_dim": TEXT}
    return tiny_arrays(fields, **sizes, seed=seed)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", *arrays(), images_per_shard=5, dtype="float32")
    return tmp_path / "store"


def module(store: Path, **options: Any) -> FeatureDataModule:
    settings = {"image_fields": ["disentangled_self_attn"], "batch_size": 6} | options
    return FeatureDataModule(store, **settings)


def test_batches_equal_the_store(store: Path) -> None:
    images, captions = arrays()
    data = module(store, val_fraction=0.25, caption_fields=("embedding", "text"))
    seen: list[int] = []
    for batch in data.train_dataloader():
        rows = batch["caption_row"]
        assert isinstance(rows, torch.Tensor)
        image_rows = captions["image_row"][rows]
        seen += rows.tolist()
        np.testing.assert_array_equal(batch["image_row"], image_rows)
        np.testing.assert_array_equal(batch["image_id"], images["id"][image_rows])
        assert batch["text"] == [f"caption {row}" for row in rows]
        attention = per_caption(batch["disentangled_self_attn"], batch)
        for got, table, index in (
            (batch["embedding"], captions["embedding"], rows.numpy()),
            (attention, images["disentangled_self_attn"], image_rows),
        ):
            np.testing.assert_array_equal(got, table[index].astype(np.float32))
    assert len(set(seen)) == len(seen) == 24  # of 27, the partial batch is dropped
    assert max(seen) < 27


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_gpu_gets_pinned_batches_of_the_store(store: Path, gpu: torch.device, workers: int) -> None:
    """A copy may still be under way when the loader goes on to the next batch."""
    data = module(store, val_fraction=0.25)
    want = [batch["disentangled_self_attn"] for batch in data.train_dataloader()]
    pinned = gpu.type == "cuda"
    loader = StoreLoader(
        data.train_data,
        data.train_rows,
        data.train_dataloader().sampler,
        num_workers=workers,
        prefetch=2,
        pin_memory=pinned,
    )
    got = []
    for batch in loader:
        assert batch["disentangled_self_attn"].is_pinned() == pinned
        got.append(batch["disentangled_self_attn"].to(gpu, non_blocking=True))
    loader.close()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.25, 0.5])
def test_validation_is_split_by_image(store: Path, fraction: float) -> None:
    data = module(store, val_fraction=fraction)
    train, val = data.train_data.image_row[data.train_rows], data.val_data.image_row[data.val_rows]
    assert not set(train) & set(val)
    assert len(train) + len(val) == IMAGES * PER_IMAGE
    assert len(set(val)) == round(IMAGES * fraction)
    loader = data.val_dataloader()
    if not len(val):
        assert loader == []
        return
    seen = [row for batch in loader for row in batch["caption_row"].tolist()]
    assert seen == data.val_rows.tolist()  # all of them, in order, the last batch shorter
    batch = next(iter(loader))
    assert "avg_self_attn_out" in batch
    assert "disentangled_self_attn" not in batch


def test_a_store_for_validation(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "val", *arrays(1))
    data = module(store, val_store=tmp_path / "val")
    assert len(data.train_rows) == len(data.val_rows) == IMAGES * PER_IMAGE
    first = next(iter(data.val_dataloader()))["embedding"]
    np.testing.assert_allclose(first, arrays(1)[1]["embedding"][:6], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_validation_with_other_encoders_is_refused(tmp_path: Path, kind: str) -> None:
    for name, digest in (("one", "aa"), ("other", "bb")):
        info = {kind: {"name": f"encoder {name}", "weights_sha256": digest}}
        write_store(tmp_path / name, *arrays(), **info)
    module(tmp_path / "one", val_store=tmp_path / "one")
    with pytest.raises(StoreError) as error:
        module(tmp_path / "one", val_store=tmp_path / "other")
    line = str(error.value)
    assert f"its {kind} encoder encoder other is not that of" in line
    assert "(encoder one); extract both with the same encoders" in line
    assert "\n" not in line


@pytest.mark.parametrize("digest", ["", "aa"])
def test_encoders_without_a_digest_are_compared_by_name(tmp_path: Path, digest: str) -> None:
    """Converted stores do not say which weights they come from."""
    for name, encoder, weights in (("a", "B/16", ""), ("b", "B/16", digest), ("c", "B/32", digest)):
        info = {"name": encoder, "weights_sha256": weights}
        write_store(tmp_path / name, *arrays(), text=info)
    module(tmp_path / "a", val_store=tmp_path / "b")
    with pytest.raises(StoreError, match=r"its text encoder B/32 is not that of .* \(B/16\)"):
        module(tmp_path / "a", val_store=tmp_path / "c")


def test_validation_with_texts_pooled_otherwise_is_refused(tmp_path: Path) -> None:
    for name in ("mean", "cls"):
        info = {"name": "bert", "weights_sha256": "a", "spec": {"name": "bert", "pooling": name}}
        write_store(tmp_path / name, *arrays(), text=info)
    with pytest.raises(StoreError, match=r"its text\.pooling=cls is not that of .* \(mean\)"):
        module(tmp_path / "mean", val_store=tmp_path / "cls")


def test_validation_with_tokens_of_other_blocks_is_refused(tmp_path: Path) -> None:
    for name, spec in (("last", {}), ("joined", {"layers": [7, 9]})):
        write_store(tmp_path / name, *arrays(), vision={"name": "vit", "spec": spec})
    with pytest.raises(
        StoreError, match=r"joined: its vision\.layers=\[7, 9\] is not that of .*last"
    ):
        module(tmp_path / "last", val_store=tmp_path / "joined")


def test_one_caption_per_image_and_epoch(store: Path) -> None:
    data = module(store, captions="one_per_image", batch_size=4, val_fraction=0)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert sorted(int(row) for b in batches for row in b["image_row"]) == list(range(IMAGES))
        epochs.append({int(row) for b in batches for row in b["caption_row"]})
    assert len({frozenset(rows) for rows in epochs}) == 3


def test_workers_give_the_same_batches(store: Path) -> None:
    others = set(active_children())
    sources = [module(store, num_workers=n) for n in (0, 1)]
    here, there = (
        [batch["embedding"] for batch in source.train_dataloader()] for source in sources
    )
    sources[1].teardown("fit")
    assert set(active_children()) <= others
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_errors_are_one_line(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_fraction=1\.0; use 0 ≤ value < 1"):
        module(store, val_fraction=1.0)
    with pytest.raises(StoreError, match="images have no field 'patch_tokens', only"):
        module(store, image_fields=["patch_tokens"])
    with pytest.raises(StoreError, match="not found; extract again"):
        module(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="lower batch_size"):
        module(store, batch_size=500).train_dataloader()
    images, _ = arrays()
    write_store(tmp_path / "silent", images, {})
    with pytest.raises(StoreError, match="captions"):
        module(tmp_path / "silent")
    assert FeatureStore(tmp_path / "silent").verify() == []
