"""Whole batches from a store, read ahead; an epoch can continue where a training stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from talk2dino.errors import StoreError
from talk2dino.features.sampler import EpochBatchSampler
from talk2dino.features.store.reader import FeatureStore, Table
from talk2dino.features.store.verify import nonfinite_rows

Batch = dict[str, Tensor | list[str]]


class CaptionBatches(Dataset[Batch]):
    """Batches of captions with their images' features, by caption rows.

    `StoreLoader` iterates over them. Pickles into workers; shards open there.

    Args:
        store: the features.
        image_fields: fields of `store.images` to give, e.g. `("disentangled_self_attn",)`.
        caption_fields: fields of `store.captions` to give, e.g. `("embedding",)`.

    Raises StoreError for a field that is not stored, or whose name both tables would use.
    """

    def __init__(
        self, store: FeatureStore, image_fields: Sequence[str], caption_fields: Sequence[str]
    ) -> None:
        store.require(images=image_fields, captions=(*caption_fields, "id", "image_row"))
        taken = {"caption_row", "caption_id", "image_id", "image_row", "image_place"}
        for name in (*image_fields, *caption_fields):
            if name in taken:
                raise StoreError(f"field {name!r} is asked for twice or always given; leave it out")
            taken.add(name)
        self.store = store
        self.image_fields, self.caption_fields = tuple(image_fields), tuple(caption_fields)
        self.checked: dict[tuple[str, str], NDArray[np.bool_]] = {}  # rows without NaN, by field

    @cached_property
    def image_row(self) -> NDArray[np.int64]:
        """Image row of every caption, [captions] int64: what the sampler needs."""
        rows: NDArray[np.int64] = self.store.captions["image_row"][:]
        return rows

    @cached_property
    def _caption_id(self) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = self.store.captions["id"][:]
        return ids

    @cached_property
    def _image_id(self) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = self.store.images["id"][:]
        return ids

    def __len__(self) -> int:
        """Number of captions (an item is a batch of any of them)."""
        return len(self.store.captions)

    def __getitem__(self, rows: NDArray[np.int64] | Sequence[int]) -> Batch:
        """The batch of caption `rows` [B], in that order.

        Returns `caption_row`, `caption_id`, `image_row`, `image_id` int64 [B], and every asked
        caption field [B, ...] in its stored dtype; texts as a list. Image fields hold every image
        of the batch once, [U, ...]: where U = B they are in the captions' order, and otherwise
        `image_place` int64 [B] tells which of them each caption belongs to (`inputs.per_caption`).
        Raises StoreError if a row that is read for the first time holds NaN or infinity.
        """
        caption_row = np.asarray(rows, dtype=np.int64)  # [B]
        image_row = self.image_row[caption_row]
        batch: Batch = {
            "caption_row": torch.from_numpy(caption_row),
            "caption_id": torch.from_numpy(self._caption_id[caption_row]),
            "image_row": torch.from_numpy(image_row),
            "image_id": torch.from_numpy(self._image_id[image_row]),
        }
        for name in self.caption_fields:
            batch[name] = _to_torch(self._read(self.store.captions, name, caption_row))
        images, place = image_row, np.arange(len(image_row))
        if not (image_row[1:] > image_row[:-1]).all():  # an image may occur twice
            different, inverse = np.unique(image_row, return_inverse=True)  # [U], [B]
            if len(different) < len(image_row):
                images, place = different, inverse
        batch["image_place"] = torch.from_numpy(place)
        for name in self.image_fields:
            batch[name] = _to_torch(self._read(self.store.images, name, images))
        return batch

    def will_need(self, first: int, last: int) -> None:
        """Ask the system to read images `first` … `last` - 1 ahead; returns at once."""
        for name in self.image_fields:
            self.store.images[name].will_need(first, last)

    def _read(self, table: Table, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of one field; features are checked when a process reads them for the first time.

        The check takes about as long as reading, so later epochs go without.
        """
        field = table[name]
        values: NDArray[Any] = field[rows]
        if values.dtype.kind != "f":
            return values
        if field.key not in self.checked:
            self.checked[field.key] = np.zeros(len(field), dtype=np.bool_)
        checked = self.checked[field.key]
        if not checked[rows].all():
            if len(bad := nonfinite_rows(values)):
                raise StoreError(
                    f"{self.store.path}: {table.name}/{name} row {rows[bad[0]]} holds NaN or "
                    "infinity; verify the store and extract again"
                )
            checked[rows] = True
        return values

    def __getstate__(self) -> dict[str, Any]:
        cached = ("image_row", "_caption_id", "_image_id")  # cheaper to read than to pickle
        return {k: v for k, v in self.__dict__.items() if k not in cached} | {"checked": {}}


def _to_torch(values: NDArray[Any]) -> Tensor | list[str]:
    return values.tolist() if values.dtype == object else torch.from_numpy(values)


class StoreLoader:
    """Batches of some captions of a store, in the order of a sampler.

    An iteration begins when its first batch is asked for; until then the epoch can be set. After
    `load_state_dict` the next iteration begins in the middle of its epoch. `state_dict` counts the
    batches that were yielded, not those read ahead.

    Args:
        data: the batches of the store.
        rows: caption rows that the sampler numbers from zero, [n] int64.
        sampler: gives the positions in `rows` of each batch.
        num_workers: processes that read; 0 reads in this process.
        prefetch: batches read ahead, by each worker, or by a thread if there are none; 0 reads
            when a batch is asked for.
        pin_memory: copy batches to page-locked memory, from which a GPU fetches them while it
            computes.
        start_method: of the workers: `fork`, `spawn` or `forkserver`; None takes Python's default.
    """

    def __init__(
        self,
        data: CaptionBatches,
        rows: NDArray[np.int64],
        sampler: EpochBatchSampler,
        num_workers: int = 0,
        prefetch: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        self.data, self.rows, self.sampler = data, rows, sampler
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self.batch_sampler = None  # Lightning looks for it where it finds `sampler`
        self._epoch, self._consumed = sampler.epoch, 0
        self.start_method = start_method
        self._workers: DataLoader[Batch] | None = None

    def __len__(self) -> int:
        """Batches per epoch, wherever an iteration begins."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._epoch, self._consumed = self.sampler.epoch, self.sampler.start
        for batch in self._read_by_workers() if self.num_workers else self._read_here():
            self._consumed += 1
            yield batch

    def close(self) -> None:
        """End the workers; the next iteration starts new ones.

        Without this they end with the loader; if it is part of a cycle of references, Python closes
        their queues first, and PyTorch then waits 5 seconds for each worker.
        """
        iterator = None if self._workers is None else self._workers._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._workers = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, its batches that were yielded, and all settings that decide the batches."""
        running = self._epoch == self.sampler.epoch
        return self.sampler.state_dict(self._consumed if running else 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where `state` was taken.

        Raises ConfigError if that is impossible with the present settings.
        """
        self.sampler.load_state_dict(state)
        self._epoch, self._consumed = self.sampler.epoch, self.sampler.start

    def _read_by_workers(self) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = DataLoader(
                self.data,
                sampler=_Announcing(self.data, self.rows, self.sampler),
                batch_size=None,  # the sampler gives whole batches
                num_workers=self.num_workers,
                prefetch_factor=max(1, self.prefetch),
                persistent_workers=True,
                pin_memory=self.pin_memory,
                multiprocessing_context=self.start_method,
            )
        return iter(self._workers)

    def _read_here(self) -> Iterator[Batch]:
        if not self.prefetch:
            yield from map(self._read, _Announcing(self.data, self.rows, self.sampler))
            return
        pending: deque[Future[Batch]] = deque()
        thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            for rows in _Announcing(self.data, self.rows, self.sampler):
                pending.append(thread.submit(self._read, rows))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, rows: NDArray[np.int64]) -> Batch:
        batch = self.data[rows]
        if not self.pin_memory:
            return batch
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


class _Announcing:
    """Caption rows of the batches of a sampler; asks for read-ahead of the images of the next."""

    def __init__(
        self, data: CaptionBatches, rows: NDArray[np.int64], sampler: EpochBatchSampler
    ) -> None:
        self.data, self.rows, self.sampler = data, rows, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for position, chosen in enumerate(self.sampler, self.sampler.start):
            for images in _runs(self.sampler.ahead(position)):
                self.data.will_need(*images)
            yield self.rows[chosen]


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and last + 1 of every run of neighbors in ascending rows."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    return [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges)]
