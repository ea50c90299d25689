"""The LightningDataModule that hands benchmark images to `trainer.predict`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from talk2dino.datasets.benchmarks.base import Benchmark, Sample


@dataclass(frozen=True)
class SampleBatch:
    """Images on their way to the segmenter; empty for a rank that has nothing to do."""

    indices: list[int]
    samples: list[Sample]

    def pin_memory(self) -> SampleBatch:
        """Move the pixels to page-locked memory, from which a GPU copies faster."""
        return self._with(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> SampleBatch:
        """Move pictures and label maps."""
        return self._with(lambda pixels: pixels.to(device, non_blocking=True))

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor]) -> SampleBatch:
        samples = [replace(s, image=move(s.image), target=move(s.target)) for s in self.samples]
        return SampleBatch(self.indices, samples)


class SegmentationDataModule(L.LightningDataModule):
    """Each image of a benchmark exactly once over all ranks, decoded in worker processes.

    Images go in groups of `batch_size` neighbors, and every world-size-th group to a rank. Which
    images share a group depends neither on the ranks nor on what is finished, for an encoder may
    round differently in another batch.

    Args:
        benchmark: images and label maps.
        num_workers: processes that decode.
        batch_size: images per step.
        finished: asked once per loader for the images that need not be handed out; a group that is
            finished in part is handed out whole.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        num_workers: int = 2,
        batch_size: int = 1,
        finished: Callable[[], Collection[int]] = tuple,
    ) -> None:
        super().__init__()
        self.benchmark, self.num_workers = benchmark, num_workers
        self.batch_size, self.finished = batch_size, finished

    def predict_dataloader(self) -> DataLoader[SampleBatch]:
        """Give this rank's share: every world-size-th group, starting at its rank."""
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        groups = shared_groups(len(self.benchmark), self.batch_size, rank, world, self.finished())
        return DataLoader(
            _Samples(self.benchmark),
            batch_size=None,
            sampler=groups,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: SampleBatch, device: torch.device, _: int
    ) -> SampleBatch:
        """Move pictures and label maps."""
        return batch.to(device)


def shared_groups(
    length: int, batch_size: int, rank: int, world: int, finished: Collection[int] = ()
) -> list[list[int]]:
    """Groups of image indices for a rank; one empty group if it has nothing to do.

    The empty group keeps the rank in the loop: an idle one would not come to the sum over ranks.
    """
    starts = range(rank * batch_size, length, world * batch_size)
    groups = [list(range(start, min(start + batch_size, length))) for start in starts]
    return [group for group in groups if not all(i in finished for i in group)] or [[]]


class _Samples(Dataset[SampleBatch]):
    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark

    def __getitem__(self, indices: list[int]) -> SampleBatch:
        return SampleBatch(indices, [self.benchmark.sample(index) for index in indices])
