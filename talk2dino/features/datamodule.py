"""The LightningDataModule that streams a feature store into training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import ConfigError, StoreError
from talk2dino.features.batches import CaptionBatches, StoreLoader
from talk2dino.features.sampler import BLOCK_ROWS, MIX_BLOCKS, EpochBatchSampler, Mode, Shuffle
from talk2dino.features.store.reader import FeatureStore


class FeatureDataModule(L.LightningDataModule):
    """Batches of captions with their images' features.

    Validation uses `val_store` if it is given, else the last `val_fraction` of the images of
    `store`. Every rank validates on all of it, so that metrics need no reduction.

    Args:
        store: feature store to train on.
        image_fields: image features of a training batch.
        val_image_fields: image features of a validation batch.
        caption_fields: caption features of a training batch.
        val_caption_fields: caption features of a validation batch; None takes the same.
        val_store: feature store to validate on.
        val_fraction: share of the images of `store` held out when there is no `val_store`.
        batch_size: captions per rank and step.
        captions: `all` captions per epoch, or `one_per_image`, drawn again each epoch.
        shuffle: `global`, a permutation of all captions, or `block` for slow disks.
        block_rows: images of a block, with `shuffle="block"`.
        mix_blocks: blocks among which captions are mixed, with `shuffle="block"`.
        num_workers: loader processes; 0 reads in the training process.
        prefetch: batches read ahead of the training, by each worker or by a thread; 0 for none.
            None takes 2 with a GPU or workers, and 0 on the CPU, where a thread would compete with
            the training.
        seed: of the shuffling.

    Raises:
        StoreError: a store is missing, damaged, or lacks a field.
        ConfigError: a value out of range.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.features import FeatureDataModule, write_store
        >>> captions = {"image_row": [0, 0, 1, 2, 3], "embedding": np.ones((5, 8))}
        >>> _ = write_store("train", {"cls_token": np.eye(4)}, captions)
        >>> field = ["cls_token"]
        >>> data = FeatureDataModule("train", field, field, val_fraction=0.25, batch_size=2)
        >>> [tuple(batch["embedding"].shape) for batch in data.train_dataloader()]
        [(2, 8), (2, 8)]
        >>> next(iter(data.val_dataloader()))["cls_token"]
        tensor([[0., 0., 0., 1.]], dtype=torch.float16)
    """

    def __init__(
        self,
        store: str | Path,
        image_fields: Sequence[str],
        val_image_fields: Sequence[str] = ("avg_self_attn_out",),
        caption_fields: Sequence[str] = ("embedding",),
        val_caption_fields: Sequence[str] | None = None,
        val_store: str | Path | None = None,
        val_fraction: float = 0.05,
        batch_size: int = 128,
        captions: Mode = "all",
        shuffle: Shuffle = "global",
        block_rows: int = BLOCK_ROWS,
        mix_blocks: int = MIX_BLOCKS,
        num_workers: int = 0,
        prefetch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ConfigError(f"data.val_fraction={val_fraction}; use 0 ≤ value < 1")
        self.batch_size, self.captions = batch_size, captions
        for key, count in (("num_workers", num_workers), ("prefetch", prefetch)):
            if count is not None and count < 0:
                raise ConfigError(f"data.{key}={count} must be at least 0")
        self.shuffle, self.block_rows, self.mix_blocks = shuffle, block_rows, mix_blocks
        self.num_workers, self.prefetch, self.seed = num_workers, prefetch, seed
        self._train: StoreLoader | None = None
        self._val: StoreLoader | None = None
        self._resume: dict[str, Any] = {}
        self.store = FeatureStore(store)
        held_out = FeatureStore(val_store) if val_store else self.store
        self.train_data = CaptionBatches(self.store, image_fields, caption_fields)
        val_captions = caption_fields if val_caption_fields is None else val_caption_fields
        self.val_data = CaptionBatches(held_out, val_image_fields, val_captions)
        rows = self.train_data.image_row
        if not len(rows):
            raise StoreError(f"{store}: holds no captions; nothing to train on")
        if val_store:
            _same_encoders(self.store, held_out)
            self.train_rows = np.arange(len(rows))
            self.val_rows = np.arange(len(self.val_data.image_row))
        else:
            first_held_out = round(len(self.store.images) * (1 - val_fraction))
            self.train_rows = np.flatnonzero(rows < first_held_out)
            self.val_rows = np.flatnonzero(rows >= first_held_out)

    def train_dataloader(self) -> StoreLoader:
        """Shuffled batches of this rank; Lightning sets the epoch of the sampler."""
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        sampler = EpochBatchSampler(
            self.train_data.image_row[self.train_rows],
            self.batch_size,
            mode=self.captions,
            shuffle=self.shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            block_rows=self.block_rows,
            mix_blocks=self.mix_blocks,
        )
        self._train = self._loader(self.train_data, self.train_rows, sampler)
        if self._resume:
            self._train.load_state_dict(self._resume)
            self._resume = {}
        return self._train

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch; part of every checkpoint.

        Lightning restores a loader's own state only if nobody asked for the loader before it reads
        the checkpoint's loops, and a schedule that wants to know the number of steps does.
        """
        return self._train.state_dict() if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next `train_dataloader` continue there; see `EpochBatchSampler`."""
        self._resume = state_dict

    def val_dataloader(self) -> StoreLoader | list[Any]:
        """All held-out captions in order, the same on every rank; empty without any."""
        if not len(self.val_rows):
            return []
        sampler = EpochBatchSampler(
            self.val_data.image_row[self.val_rows], self.batch_size, shuffle="none", drop_last=False
        )
        self._val = self._loader(self.val_data, self.val_rows, sampler)
        return self._val

    def _loader(
        self, data: CaptionBatches, rows: NDArray[np.int64], sampler: EpochBatchSampler
    ) -> StoreLoader:
        trainer = self.trainer
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        ahead = 2 if on_gpu or self.num_workers else 0
        return StoreLoader(
            data,
            rows,
            sampler,
            num_workers=self.num_workers,
            prefetch=ahead if self.prefetch is None else self.prefetch,
            pin_memory=on_gpu,
        )

    def teardown(self, stage: str) -> None:
        """End the loaders' workers."""
        for loader in (self._train, self._val):
            if loader is not None:
                loader.close()


def _same_encoders(train: FeatureStore, val: FeatureStore) -> None:
    for kind in ("vision", "text"):
        one, other = getattr(train, kind), getattr(val, kind)
        if one is None or other is None:
            continue
        for key in ("layers",) if kind == "vision" else ("pooling", "max_length"):
            known = kind == "vision" or (one.spec and other.spec)
            if known and one.spec.get(key) != other.spec.get(key):
                raise StoreError(
                    f"{val.path}: its {kind}.{key}={other.spec.get(key)} is not that of "
                    f"{train.path} ({one.spec.get(key)}); extract both alike"
                )
        named = one.weights_sha256 and other.weights_sha256  # converted stores do not name them
        if one.weights_sha256 == other.weights_sha256 if named else one.name == other.name:
            continue
        raise StoreError(
            f"{val.path}: its {kind} encoder {other.name} is not that of {train.path} "
            f"({one.name}); extract both with the same encoders"
        )
