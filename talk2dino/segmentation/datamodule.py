"""The LightningDataModule that hands benchmark images to `trainer.predict`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from talk2dino.segmentation.benchmarks import Benchmark, Sample


@dataclass(frozen=True)
class Work:
    """A sample on its way to the segmenter; `counted` is False for a rank's filler."""

    index: int
    sample: Sample
    counted: bool


class SegmentationDataModule(L.LightningDataModule):
    """Each image of a benchmark exactly once over all ranks, decoded in worker processes.

    Args:
        benchmark: images and label maps.
        num_workers: processes that decode.
    """

    def __init__(self, benchmark: Benchmark, num_workers: int = 2) -> None:
        super().__init__()
        self.benchmark, self.num_workers = benchmark, num_workers

    def predict_dataloader(self) -> DataLoader[Work]:
        """Give this rank's share: every world-size-th image, starting at its rank."""
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        return DataLoader(
            _Samples(self.benchmark),
            batch_size=None,
            sampler=_Share(len(self.benchmark), rank, world),
            num_workers=self.num_workers,
        )

    def transfer_batch_to_device(self, batch: Work, device: torch.device, _: int) -> Work:
        """Move picture and label map."""
        sample = batch.sample
        moved = Sample(sample.name, sample.image.to(device), sample.target.to(device))
        return Work(batch.index, moved, batch.counted)


class _Samples(Dataset[Work]):
    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark

    def __getitem__(self, key: tuple[int, bool]) -> Work:
        index, counted = key
        return Work(index, self.benchmark.sample(index), counted)


class _Share(Sampler[tuple[int, bool]]):
    """A rank without an image of its own gets image 0 uncounted: an idle rank would hang DDP."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.keys = [(index, True) for index in range(rank, length, world)] or [(0, False)]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        return iter(self.keys)
