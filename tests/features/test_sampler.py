"""Every caption once per epoch, on exactly one rank; batches come whole from the store."""

from __future__ import annotations

import gc
import pickle
from multiprocessing import active_children
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from talk2dino.alignment.inputs import per_caption
from talk2dino.errors import ConfigError, StoreError
from talk2dino.features import FeatureStore
from talk2dino.features.batches import CaptionBatches, StoreLoader
from talk2dino.features.sampler import BLOCK_ROWS, MIX_BLOCKS, EpochBatchSampler
from tests.helpers.stores import tiny_store

ROWS = np.repeat(np.arange(10), 5)  # ten images of five captions


def epoch(sampler: EpochBatchSampler) -> list[list[int]]:
    return [batch.tolist() for batch in sampler]


@settings(max_examples=60, deadline=None)
@given(
    captions=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.sampled_from(["none", "global", "block"]),
    mode=st.sampled_from(["all", "one_per_image"]),
)
def test_ranks_are_disjoint_equal_and_complete(
    captions: int, batch_size: int, world: int, drop_last: bool, shuffle: str, mode: str
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
            image_row,
            batch_size,
            mode,
            shuffle,
            drop_last,
            rank=rank,
            world_size=world,
            block_rows=4,
            mix_blocks=2,
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
    plain = EpochBatchSampler(ROWS, 10, "one_per_image", shuffle="none")
    assert epoch(plain) == [list(range(0, 50, 5))]


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resume_is_exact(stop: int) -> None:
    sampler = EpochBatchSampler(ROWS, 8, seed=4)
    sampler.set_epoch(2)
    whole = epoch(sampler)
    iterator = iter(sampler)
    taken = [next(iterator).tolist() for _ in range(stop)]
    state = sampler.state_dict(consumed=stop)
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


BLOCK = {"shuffle": "block", "block_rows": 16, "mix_blocks": 4}
MANY = np.repeat(np.arange(1024), 2)  # 64 blocks of 16 images, two captions each


def test_block_shuffle_mixes() -> None:
    """Places of neighbours are as independent as the size of the buffer allows."""
    sampler = EpochBatchSampler(MANY, 32, **BLOCK)
    correlations, together, blocks = [], [], []
    for number in range(20):
        sampler.set_epoch(number)
        batches = epoch(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(2048))
        place = np.empty(2048)
        for position, batch in enumerate(batches):
            place[batch] = position
        correlations.append(np.corrcoef(np.arange(2048), place)[0, 1])
        together.append((place[::2] == place[1::2]).mean())  # both captions of an image
        blocks += [len(set(MANY[batch] // 16)) for batch in batches]
    # A buffer of 4 blocks gives 4 batches: an image's captions meet with probability 31 / 127.
    assert abs(np.mean(together) - 31 / 127) < 0.02
    assert abs(np.mean(correlations)) < 0.1  # 64 permuted blocks: standard error 1 / sqrt(64 * 20)
    assert np.mean(blocks) > 3.9  # 32 captions out of 4 blocks
    assert max(blocks) <= 4
    shift = [epoch(EpochBatchSampler(MANY, 32, seed=seed, **BLOCK))[0] for seed in range(2)]
    assert shift[0] != shift[1]


def test_block_shuffle_reads_blocks_ahead() -> None:
    """Announced images are whole runs, in time, and all that is needed."""
    for start in (0, 13):
        sampler = EpochBatchSampler(MANY, 32, **BLOCK)
        sampler.start = start
        announced: set[int] = set()
        for position, rows in enumerate(sampler, start):
            ahead = sampler.ahead(position)
            announced |= set(ahead.tolist())
            assert set(MANY[rows]) <= announced
            if len(ahead):
                assert (np.diff(ahead) == 1).sum() >= len(ahead) - 8  # runs of 16, two buffers
        assert len(announced) == 1024 if not start else 1024 - 3 * 64  # three buffers were over


def test_block_shuffle_deals_blocks_to_ranks() -> None:
    """A rank reads its own part of the store: hardly a block is read by both."""
    seen = []
    for rank in range(2):
        sampler = EpochBatchSampler(MANY, 32, rank=rank, world_size=2, **BLOCK)
        seen.append({int(MANY[row]) // 16 for batch in epoch(sampler) for row in batch})
    assert len(seen[0] & seen[1]) <= 1
    with pytest.raises(ConfigError, match="checkpoint was trained with global_batch"):
        EpochBatchSampler(MANY, 32, **BLOCK).load_state_dict(sampler.state_dict(0))


def test_stopping_early_does_not_shorten_the_next_iteration() -> None:
    sampler = EpochBatchSampler(ROWS, 8)
    next(iter(sampler))
    assert len(epoch(sampler)) == 6


@pytest.mark.parametrize(
    ("other", "key"), [({"seed": 1}, "seed"), ({"batch_size": 7}, "global_batch")]
)
def test_resume_refuses_other_settings(other: dict[str, int], key: str) -> None:
    state = EpochBatchSampler(ROWS, 8).state_dict(consumed=1)
    with pytest.raises(ConfigError, match=f"checkpoint was trained with {key}="):
        EpochBatchSampler(ROWS, **({"batch_size": 8} | other)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "shuffle": "often"}, "data.shuffle='often': choose one of none, global"),
        ({"batch_size": 2, "block_rows": 0}, "data.block_rows=0"),
        ({"batch_size": 2, "mix_blocks": -1}, "data.mix_blocks=-1"),
        (
            {"batch_size": 2, "mode": "some"},
            "data.captions='some': choose one of all",
        ),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 51}, "needs 51 rows, the store has 50"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EpochBatchSampler(ROWS, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_store(
        tmp_path / "store",
        {"disentangled_self_attn": (2, 8)},
        images=10,
        captions_per_image=5,
        text_dim=3,
        images_per_shard=4,
    )


@pytest.mark.parametrize("rows", [[7], [0, 1, 2, 30, 31], [49, 0, 25, 0], list(range(0, 50, 5))])
def test_batch_equals_samples(folder: Path, rows: list[int]) -> None:
    opened = FeatureStore(folder)
    batch = CaptionBatches(opened, ["disentangled_self_attn"], ["embedding", "text"])[rows]
    assert batch["caption_row"].tolist() == rows
    assert batch["caption_id"].tolist() == [1000 + row for row in rows]
    assert batch["image_row"].tolist() == [row // 5 for row in rows]
    assert batch["image_id"].tolist() == [100 + row // 5 for row in rows]
    assert batch["text"] == [f"caption {row}" for row in rows]
    images = len({row // 5 for row in rows})
    assert len(batch["disentangled_self_attn"]) == images  # each once
    attention = per_caption(batch["disentangled_self_attn"], batch)
    for i, row in enumerate(rows):
        image = torch.from_numpy(opened.images["disentangled_self_attn"][row // 5])
        assert torch.equal(attention[i], image)
        assert torch.equal(
            batch["embedding"][i], torch.from_numpy(opened.captions["embedding"][row])
        )
    assert batch["embedding"].dtype == torch.float16


@pytest.mark.parametrize(
    ("workers", "method", "prefetch"),
    [(0, None, 0), (0, None, 3), (2, "fork", 1), (1, "forkserver", 2)],
)
def test_loader(folder: Path, workers: int, method: str | None, prefetch: int) -> None:
    """Two epochs, the second resumed in its middle, give the batches of the sampler."""
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], ["embedding"])
    sampler = EpochBatchSampler(dataset.image_row, 8, shuffle="block", block_rows=2, mix_blocks=2)
    rows = np.arange(50)
    loader = StoreLoader(dataset, rows, sampler, workers, prefetch, start_method=method)
    want = [epoch(sampler)]
    sampler.set_epoch(1)
    want.append(epoch(sampler))
    assert len(loader) == len(want[0]) == 6
    for number in range(2):
        batches = iter(loader)  # Lightning asks for the iterator before it sets the epoch
        sampler.set_epoch(number)
        assert loader.state_dict()["position"] == 0
        first = next(batches)
        assert loader.state_dict()["position"] == 1
        got = [batch["caption_row"].tolist() for batch in [first, *batches]]
        assert got == want[number]
        assert loader.state_dict()["position"] == 6
    loader.load_state_dict(sampler.state_dict(consumed=4))
    assert loader.state_dict()["position"] == 4
    assert [batch["caption_row"].tolist() for batch in loader] == want[1][4:]
    assert [batch["caption_row"].tolist() for batch in loader] == want[1]
    loader.close()


def test_closed_loader_has_no_workers_and_can_be_used_again(folder: Path) -> None:
    dataset = CaptionBatches(FeatureStore(folder), [], ["embedding"])
    loader = StoreLoader(dataset, np.arange(50), EpochBatchSampler(dataset.image_row, 8), 2)
    others = set(active_children())
    for _ in range(2):
        batches = iter(loader)
        next(batches)
        assert len(set(active_children()) - others) == 2
        loader.close()  # in the middle of an epoch
        assert not set(active_children()) - others
    loader.close()
    gc.disable()  # nothing refers back to a loader, so its workers end with it
    try:
        assert len(list(loader)) == 6
        del loader, batches
        assert not set(active_children()) - others
    finally:
        gc.enable()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_abandoned_iteration_does_not_shorten_the_next(folder: Path, prefetch: int) -> None:
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], ["embedding"])
    loader = StoreLoader(dataset, np.arange(50), EpochBatchSampler(dataset.image_row, 8))
    next(iter(loader))
    assert len(list(loader)) == 6


def test_images_of_a_batch_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CaptionBatches(FeatureStore(folder), ["disentangled_self_attn"], [])
    read: list[int] = []
    original = CaptionBatches._read

    def counted(self, table, name, rows):
        read.append(len(rows))
        return original(self, table, name, rows)

    monkeypatch.setattr(CaptionBatches, "_read", counted)
    batch = dataset[np.arange(20)]
    assert batch["image_place"].tolist() == np.repeat(np.arange(4), 5).tolist()
    assert len(per_caption(batch["disentangled_self_attn"], batch)) == 20
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


def test_the_config_states_the_defaults_of_the_block_shuffle() -> None:
    data = OmegaConf.load(Path(__file__).resolve().parents[2] / "conf" / "train.yaml").data
    assert (data.block_rows, data.mix_blocks) == (BLOCK_ROWS, MIX_BLOCKS)
