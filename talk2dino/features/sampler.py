"""Which captions make up each batch of an epoch: exact, seeded, and the same for any rank count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from talk2dino.errors import ConfigError

Mode = Literal["all", "one_per_image"]
_MODES = ("all", "one_per_image")


class EpochBatchSampler(Sampler[NDArray[np.int64]]):
    """Batches of caption rows, one array [batch_size] int64 per step of this rank.

    The epoch's order is one permutation of all rows, seeded by (seed, epoch). It is cut into global
    batches of `batch_size * world_size` rows, and each rank takes its own slice of every global
    batch: ranks are disjoint and equally long, and the global batches stay the same when the number
    of ranks changes but `batch_size * world_size` does not. Within a batch rows ascend, since a
    contrastive loss ignores their order and sorted rows read fastest.

    A partial global batch at the end is dropped with `drop_last`; otherwise it is dealt out equally
    and the at most `world_size - 1` rows that are left over are dropped.

    Args:
        image_row: image row of every caption, [captions] int64 (`store.captions["image_row"][:]`).
        batch_size: captions per rank and step.
        mode: `all` captions, or `one_per_image`: a random caption of each image, drawn anew every
            epoch (always the first one without `shuffle`).
        shuffle: permute; otherwise rows come in order, the same every epoch.
        drop_last: leave out the last global batch if it is not full.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.

    Raises ConfigError for values out of range and for a store smaller than one global batch.
    """

    def __init__(
        self,
        image_row: NDArray[np.int64],
        batch_size: int,
        mode: Mode = "all",
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(f"mode={mode!r} is unknown; use one of {_MODES}")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must lie in 0 ... world_size - 1 = {world_size - 1}")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.mode, self.shuffle, self.drop_last, self.seed = mode, shuffle, drop_last, seed
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out
        self._resume_at = 0  # set by load_state_dict for one iteration
        image_row = np.asarray(image_row, dtype=np.int64)
        self._captions = len(image_row)
        self._by_image, self._first, self._count = _group(image_row, mode)
        self._rows = self._captions if mode == "all" else len(self._first)
        if not len(self):
            least = self.global_batch if drop_last else world_size
            raise ConfigError(
                f"batch_size={batch_size} on {world_size} ranks needs {least} rows, the store has "
                f"{self._rows} ({mode}); lower batch_size"
            )

    @property
    def global_batch(self) -> int:
        """Rows of one step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch of every rank, whatever the position."""
        full, rest = divmod(self._rows, self.global_batch)
        return full + (not self.drop_last and rest >= self.world_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = self._order()
        self.position, self._resume_at = self._resume_at, 0
        while self.position < len(self):
            start = self.position * self.global_batch
            share = min(self.global_batch, len(order) - start) // self.world_size
            start += self.rank * share
            self.position += 1
            yield np.sort(order[start : start + share])

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; another epoch than the present one begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume_at = epoch, 0, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, as plain values.

        Args:
            consumed: batches the trainer has used. Loader workers fetch ahead, so with workers the
                sampler's own count (the default) runs ahead of training.
        """
        position = self.position if consumed is None else consumed
        return {"epoch": self.epoch, "position": position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the next iteration starts at that batch.

        Raises ConfigError if another setting, or another global batch, makes that impossible.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ConfigError(
                    f"checkpoint was trained with {key}={state.get(key)!r}, now {key}={value!r}; "
                    "resume with the old value"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._resume_at = self.position

    def _identity(self) -> dict[str, Any]:
        """All that decides the global batches."""
        return {
            "global_batch": self.global_batch,
            "captions": self._captions,
            "mode": self.mode,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
        }

    def _order(self) -> NDArray[np.int64]:
        """All rows of this epoch, the same on every rank."""
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
        if self.mode == "all":
            return random.permutation(self._rows) if self.shuffle else np.arange(self._rows)
        if not self.shuffle:
            return self._by_image[self._first]
        chosen = self._first + random.integers(0, self._count)
        return random.permutation(self._by_image[chosen])


def _group(
    image_row: NDArray[np.int64], mode: Mode
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Caption rows sorted by image; per captioned image, the first place in them and the count."""
    if mode == "all":
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing, nothing
    by_image = np.argsort(image_row, kind="stable")
    _, first, count = np.unique(image_row[by_image], return_index=True, return_counts=True)
    return by_image, first, count
