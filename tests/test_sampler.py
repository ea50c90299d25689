"""Every caption once per epoch, on exactly one rank; batches come whole from the store."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from talk2dino.errors import ConfigError, StoreError
from talk2dino.features import FeatureStore, write_store
from talk2dino.features.dataset import CaptionBatches
from talk2dino.features.sampler import EpochBatchSampler

ROWS = np.repeat(np.arange(10), 5)  # ten images of five captions


def epoch(sampler: EpochBatchSampler) -> list[list[int]]:
    return [batch.tolist() for batch in sampler]


@settings(max_examples=60, deadline=None)
@given(
    captions=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    mode=st.sampled_from(["all", "one_per_image"]),
)
def test_ranks_are_disjoint_equal_and_complete(
    captions: int, batch_size: int, world: int, drop_last: bool, shuffle: bool, mode: str
) -> None:
    image_row = np.random.default_rng(captions).integers(0, 20, captions)
    total = captions if mode == "all" else len(np.unique(image_row))
    if total < (batch_size * world if drop_last else world):
        with pytest.raises(ConfigError, match="lower batch_size"):
            EpochBatchSampler(image_row, batch_size, mode, shuffle, drop_last, 0, 0, world)
        return
    ranks = []
    for rank in range(world):
        sampler = EpochBatchSampler(
            image_row, batch_size, mode, shuffle, drop_last, rank=rank, world_size=world
        )
        ranks.append(epoch(sampler))
        assert len(ranks[-1]) == len(sampler)
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1  # equal on every rank
    seen = [row for batches in ranks for batch in batches for row in batch]
    assert len(set(seen)) == len(seen)
    lost = total % (batch_size * world) if drop_last else (total % (batch_size * world)) % world
    assert len(seen) == total - lost
    if mode == "one_per_image":
        assert len(set(image_row[seen])) == len(seen)


def test_world_size_does_not_change_the_global_batches() -> None:
    whole = epoch(EpochBatchSampler(ROWS, 8))
    halves = [epoch(EpochBatchSampler(ROWS, 4, rank=r, world_size=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == whole


def test_epochs_and_seeds() -> None:
    sampler = EpochBatchSampler(ROWS, 10, drop_last=False)
    first = epoch(sampler)
    assert epoch(sampler) == first
    sampler.set_epoch(1)
    second = epoch(sampler)
    assert second != first
    assert sorted(row for batch in second for row in batch) == list(range(50))
    sampler.set_epoch(0)
    assert epoch(sampler) == first
    assert epoch(EpochBatchSampler(ROWS, 10, seed=1)) != first


def test_one_caption_per_image_changes_every_epoch() -> None:
    sampler = EpochBatchSampler(ROWS[::-1].copy(), 10, "one_per_image")
    drawn = []
    for number in range(200):
        sampler.set_epoch(number)
        (batch,) = epoch(sampler)
        drawn.append(batch)
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    assert counts.sum() == 2000
    assert counts.min() > 15  # 40 expected of each caption
    plain = EpochBatchSampler(ROWS, 10, "one_per_image", shuffle=False)
    assert epoch(plain) == [list(range(0, 50, 5))]


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resume_is_exact(stop: int) -> None:
    sampler = EpochBatchSampler(ROWS, 8, seed=4)
    sampler.set_epoch(2)
    whole = epoch(sampler)
    iterator = iter(sampler)
    taken = [next(iterator).tolist() for _ in range(stop)]
    state = sampler.state_dict() if stop else sampler.state_dict(consumed=0)
    resumed = EpochBatchSampler(ROWS, 8, seed=4)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    resumed.set_epoch(2)  # as a trainer does before it iterates
    assert taken + epoch(resumed) == whole
    assert epoch(resumed) == whole  # only the first iteration is shortened


def test_resume_counts_what_the_trainer_used() -> None:
    sampler = EpochBatchSampler(ROWS, 8)
    whole = epoch(sampler)  # a loader with workers has fetched everything
    state = sampler.state_dict(consumed=2)
    resumed = EpochBatchSampler(ROWS, 4, rank=1, world_size=2)  # same global batch, other ranks
    resumed.load_state_dict(state)
    assert [set(b) <= set(w) for b, w in zip(resumed, whole[2:], strict=True)] == [True] * 4


def test_stopping_early_does_not_shorten_the_next_iteration() -> None:
    sampler = EpochBatchSampler(ROWS, 8)
    next(iter(sampler))
    assert len(epoch(sampler)) == 6


@pytest.mark.parametrize(
    ("other", "key"), [({"seed": 1}, "seed"), ({"batch_size": 7}, "global_batch")]
)
def test_resume_refuses_other_settings(other: dict[str, int], key: str) -> None:
    state = EpochBatchSampler(ROWS, 8).state_dict()
    with pytest.raises(ConfigError, match=f"checkpoint was trained with {key}="):
        EpochBatchSampler(ROWS, **({"batch_size": 8} | other)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "mode": "some"}, "mode='some'"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 51}, "needs 51 rows, the store has 50"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EpochBatchSampler(ROWS, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    images = {
        "id": np.arange(10) + 70,
        "disentangled_self_attn": random.standard_normal((10, 2, 8), dtype=np.float32),
    }
    captions = {
        "id": np.arange(50) + 900,
        "image_row": ROWS,
        "text": np.array([f"caption {i}" for i in range(50)]),
        "embedding": random.standard_normal((50, 3), dtype=np.float32),
    }
    write_store(tmp_path / "store", images, captions, images_per_shard=4)
    return tmp_path / "store"


@pytest.mark.parametrize("rows", [[7], [0, 1, 2, 30, 31], [49, 0, 25, 0], list(range(0, 50, 5))])
def test_batch_equals_samples(folder: Path, rows: list[int]) -> None:
    opened = FeatureStore(folder)
    batch = CaptionBatches(opened, ["disentangled_self_attn"], ["embedding", "text"])[rows]
    assert batch["caption_row"].tolist() == rows
    assert batch["caption_id"].tolist() == [900 + row for row in rows]
    assert batch["image_row"].tolist() == [row // 5 for row in rows]
    assert batch["image_id"].tolist() == [70 + row // 5 for row in rows]
    assert batch["text"] == [f"caption {row}" for row in rows]
    for i, row in enumerate(rows):
        image = torch.from_numpy(opened.images["disentangled_self_attn"][row // 5])
        assert torch.equal(batch["disentangled_self_attn"][i], image)
        assert torch.equal(
            batch["embedding"][i], torch.from_numpy(opened.captions["embedding"][row])
        )
    assert batch["embedding"].dtype == torch.float16


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_with_a_data_loader(folder: Path, workers: int, method: str | None) -> None:
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], ["embedding"])
    sampler = EpochBatchSampler(dataset.image_row, 8, drop_last=False)
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert len(loader) == len(batches) == 7
    assert [batch["caption_row"].tolist() for batch in batches] == epoch(sampler)
    assert batches[0]["disentangled_self_attn"].shape == (8, 2, 8)


def test_images_of_a_batch_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], [])
    read: list[int] = []
    original = CaptionBatches._read

    def counted(self, table, name, rows):
        read.append(len(rows))
        return original(self, table, name, rows)

    monkeypatch.setattr(CaptionBatches, "_read", counted)
    assert len(dataset[np.arange(20)]["disentangled_self_attn"]) == 20
    assert read == [4]


def test_nan_is_never_trained_on(folder: Path) -> None:
    with h5py.File(folder / "train-00001.h5", "r+") as shard:
        shard["images/disentangled_self_attn"][2, 1, 3] = np.nan  # image row 6
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], ["embedding"])
    dataset[np.arange(0, 30)]
    for _ in range(2):
        with pytest.raises(StoreError, match="images/disentangled_self_attn row 6 holds NaN"):
            dataset[[3, 31]]


def test_fields_are_checked_at_once(folder: Path) -> None:
    opened = FeatureStore(folder)
    with pytest.raises(StoreError, match="no field 'patch_tokens'"):
        CaptionBatches(opened, ["patch_tokens"], [])
    with pytest.raises(StoreError, match="field 'image_row' is asked for twice"):
        CaptionBatches(opened, [], ["image_row"])
