"""Which captions make up each batch of an epoch: exact, seeded, and the same for any rank count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from talk2dino.errors import ConfigError

Mode = Literal["all", "one_per_image"]
Shuffle = Literal["none", "global", "block"]
BLOCK_ROWS = 256
MIX_BLOCKS = 16


class EpochBatchSampler(Sampler[NDArray[np.int64]]):
    """Batches of caption rows, one array [batch_size] int64 per step of this rank.

    Every epoch's order is drawn from (seed, epoch), the same on every rank; ranks are disjoint
    and equally long. Within a batch rows ascend, since a contrastive loss ignores their order and
    sorted rows read fastest.

    `shuffle="global"` is one permutation of all rows. It is cut into global batches of
    `batch_size * world_size` rows, and each rank takes its own slice of every one: the global
    batches stay the same when the number of ranks changes but `batch_size * world_size` does not. A
    partial global batch at the end is dropped with `drop_last`; otherwise it is divided equally
    and the at most `world_size - 1` rows that are left over are dropped.

    `shuffle="block"` is for disks that read neighbors faster. Captions lie in the order of their
    images; `block_rows` images and all their captions are a block. Blocks are permuted and divided
    among the ranks, each of which reads its own part of the store only. A mixing buffer holds
    `mix_blocks` blocks at a time; batches are drawn from it at random until it is empty.
    `ahead` tells which images to read, in order, before it is filled again. What is left over at
    the end is dropped as above.

    Args:
        image_row: image row of every caption, [captions] int64 (`store.captions["image_row"][:]`).
        batch_size: captions per rank and step.
        mode: `all` captions, or `one_per_image`: a random caption of each image, drawn again every
            epoch (always the first one without a shuffle).
        shuffle: `global`, `block`, or `none`: rows in order, the same every epoch.
        drop_last: leave out the last global batch if it is not full.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.
        block_rows: images per block.
        mix_blocks: blocks in the mixing buffer.

    Raises ConfigError for values out of range and for a store smaller than one global batch.
    """

    def __init__(
        self,
        image_row: NDArray[np.int64],
        batch_size: int,
        mode: Mode = "all",
        shuffle: Shuffle = "global",
        drop_last: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        block_rows: int = BLOCK_ROWS,
        mix_blocks: int = MIX_BLOCKS,
    ) -> None:
        for key, value, known in (("captions", mode, Mode), ("shuffle", shuffle, Shuffle)):
            if value not in get_args(known):
                raise ConfigError(
                    f"data.{key}={value!r}: choose one of {', '.join(get_args(known))}"
                )
        for key, count in (
            ("batch_size", batch_size),
            ("block_rows", block_rows),
            ("mix_blocks", mix_blocks),
        ):
            if count < 1:
                raise ConfigError(f"data.{key}={count} must be at least 1")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must lie in 0 ... world_size - 1 = {world_size - 1}")
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.mode, self.shuffle, self.drop_last, self.seed = mode, shuffle, drop_last, seed
        self.block_rows, self.mix_blocks = block_rows, mix_blocks
        self.epoch = 0
        self.start = 0  # batch at which the next iteration begins, and only that one
        self._image_row = np.asarray(image_row, dtype=np.int64)
        nothing = np.empty(0, dtype=np.int64)
        self._by_image = self._first = self._count = nothing
        if mode == "one_per_image" or shuffle == "block":  # a global permutation needs none of it
            self._by_image, self._first, self._count = _group(self._image_row)
        self._rows = len(self._image_row) if mode == "all" else len(self._first)
        self._fills: dict[int, NDArray[np.int64]] = {}
        if not len(self):
            least = self.global_batch if drop_last else world_size
            raise ConfigError(
                f"data.batch_size={batch_size} on {world_size} ranks needs {least} rows, the store "
                f"has {self._rows} ({mode}); lower batch_size"
            )

    @property
    def global_batch(self) -> int:
        """Rows of one step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch of every rank, whatever `start` is."""
        full, rest = divmod(self._rows, self.global_batch)
        return full + (not self.drop_last and rest >= self.world_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        start, self.start = self.start, 0
        cut = self._cut_blocks(start) if self.shuffle == "block" else self._cut_globally()
        return (batch for position, batch in enumerate(cut) if position >= start)

    def ahead(self, position: int) -> NDArray[np.int64]:
        """Images to read ahead before batch `position` of the running epoch, ascending; or none.

        With `block`, before the first batch of every filling of the mixing buffer: the images of
        the next one, and at the epoch's beginning those of the first one too.
        """
        rows = self._fills.get(position)
        return np.unique(self._image_row[rows]) if rows is not None else np.empty(0, np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; another epoch than the present one begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """The position in the epoch, as plain values.

        Args:
            consumed: batches of it that the trainer has used; what was read ahead does not count.
        """
        return {"epoch": self.epoch, "position": consumed} | self._identity()

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
        self.epoch, self.start = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        """All settings that decide the batches."""
        plain: dict[str, Any] = {
            "global_batch": self.global_batch,
            "captions": len(self._image_row),
            "mode": self.mode,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
        }
        if self.shuffle == "block":
            plain |= {
                "world_size": self.world_size,
                "block_rows": self.block_rows,
                "mix_blocks": self.mix_blocks,
            }
        return plain

    def _random(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch]))

    def _chosen(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Caption rows of this epoch, in the order of their images."""
        if self.mode == "all":
            return self._by_image
        if self.shuffle == "none":
            return self._by_image[self._first]
        chosen: NDArray[np.int64] = self._by_image[self._first + random.integers(0, self._count)]
        return chosen

    def _cut_globally(self) -> Iterator[NDArray[np.int64]]:
        """Each global batch's slice of this rank."""
        random = self._random()
        order = np.arange(self._rows) if self.mode == "all" else self._chosen(random)
        if self.shuffle == "global":
            order = random.permutation(order)
        for position in range(len(self)):
            start = position * self.global_batch
            share = min(self.global_batch, len(order) - start) // self.world_size
            start += self.rank * share
            yield np.sort(order[start : start + share])

    def _cut_blocks(self, begin: int) -> Iterator[NDArray[np.int64]]:
        """Batches of this rank's blocks, mixed in the buffer."""
        random = self._random()
        rows = self._chosen(random)
        blocks = self._image_row[rows] // self.block_rows  # ascending
        turn = random.permutation(blocks[-1] + 1)[blocks]
        order = rows[np.argsort(turn, kind="stable")]  # block after block, captions by image
        share = self._rows // self.world_size
        if self.drop_last:
            share -= share % self.batch_size
        own = order[self.rank * share : (self.rank + 1) * share]
        fills = self._buffer_fills(own)
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch, self.rank]))
        mixed = np.concatenate([random.permutation(fill) for fill in fills])
        self._fills = self._announce(fills, begin)
        for start in range(0, len(mixed), self.batch_size):
            yield np.sort(mixed[start : start + self.batch_size])

    def _buffer_fills(self, own: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut this rank's rows after every `mix_blocks` blocks."""
        block = self._image_row[own] // self.block_rows
        edges = np.flatnonzero(block[1:] != block[:-1]) + 1  # where a new block begins
        return np.split(own, edges[self.mix_blocks - 1 :: self.mix_blocks])

    def _announce(self, fills: list[NDArray[np.int64]], begin: int) -> dict[int, NDArray[np.int64]]:
        """Rows to read ahead, by batch: each filling when the one before it begins to be used.

        The first two are announced at the beginning, unless the iteration begins after them.
        """
        edges = np.cumsum([0, *(len(fill) for fill in fills)]) // self.batch_size
        due: dict[int, NDArray[np.int64]] = {}
        for number, fill in enumerate(fills):
            if edges[number + 1] < begin:
                continue  # the iteration begins after it
            at = max(begin, int(edges[max(0, number - 1)]))
            due[at] = np.concatenate([due[at], fill]) if at in due else fill
        return due


def _group(
    image_row: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Caption rows sorted by image; per captioned image, the first place in them and the count."""
    by_image = np.argsort(image_row, kind="stable")
    _, first, count = np.unique(image_row[by_image], return_index=True, return_counts=True)
    return by_image, first, count
