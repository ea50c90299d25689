"""Iterate over batches of a store: read ahead, and continue where a training stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from talk2dino.features.dataset import Batch, CaptionBatches
from talk2dino.features.sampler import EpochBatchSampler


class StoreLoader:
    """Batches of some captions of a store, in the order of a sampler.

    Iterating begins when the first batch is asked for, so that the epoch can be set until then. An
    iteration that `load_state_dict` prepared begins in the middle of its epoch. `state_dict` counts
    the batches that were handed over, not those read ahead.

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

        Else they end with the loader, and where it is part of a cycle of references, Python closes
        their queues first and PyTorch then waits 5 seconds for each of them.
        """
        iterator = None if self._workers is None else self._workers._iterator
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._workers = None

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches of it that were handed over, and all that decides the batches."""
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
                _Rows(self.data, self.rows),
                sampler=_Announcing(self.data, self.sampler),
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
            yield from map(self._read, _Announcing(self.data, self.sampler))
            return
        pending: deque[Future[Batch]] = deque()
        thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            for positions in _Announcing(self.data, self.sampler):
                pending.append(thread.submit(self._read, positions))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, positions: NDArray[np.int64]) -> Batch:
        batch = self.data[self.rows[positions]]
        if not self.pin_memory:
            return batch
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


class _Announcing:
    """A sampler that has the store read ahead what it is about to ask for."""

    def __init__(self, data: CaptionBatches, sampler: EpochBatchSampler) -> None:
        self.data, self.sampler = data, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for position, rows in enumerate(self.sampler, self.sampler.start):
            for images in _runs(self.sampler.ahead(position)):
                self.data.will_need(*images)
            yield rows


class _Rows(Dataset[Batch]):
    """Some of the captions of a store, counted from zero."""

    def __init__(self, data: CaptionBatches, rows: NDArray[np.int64]) -> None:
        self.data, self.rows = data, rows

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        return self.data[self.rows[positions]]


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and last + 1 of every run of neighbours in ascending rows."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    return [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(edges)]
