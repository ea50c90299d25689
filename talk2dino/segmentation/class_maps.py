"""Scores of many classes at working size, of which only so many are held as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from talk2dino.segmentation.portions import TOGETHER

WORKING_MEMORY = 1 << 30  # bytes of scores held at once: 1,000 classes of a photograph at 448


class ClassMaps:
    """Scores of K classes at working size.

    They are computed once and kept if all of them fit into `memory`; else a block of classes at a
    time, whenever they are asked for, from token scores that are a thousand times smaller.

    Args:
        tokens: `[B, K, r, c]`, one per window.
        enlarge: from `[B, n, r, c]` to `[n, h, w]`, for any n; no map may depend on another.
        size: h and w.
        memory: bytes of scores that may be held at once.

    Examples:
        >>> import torch
        >>> from talk2dino.segmentation.class_maps import ClassMaps
        >>> tokens = torch.arange(3.0).view(1, 3, 1, 1)
        >>> maps = ClassMaps(tokens, lambda some: some[0].expand(-1, 2, 4), (2, 4), memory=64)
        >>> [tuple(block.shape) for block in maps.blocks()]
        [(2, 2, 4), (1, 2, 4)]
        >>> maps.limits
        (0.0, 2.0)
    """

    def __init__(
        self,
        tokens: Tensor,
        enlarge: Callable[[Tensor], Tensor],
        size: tuple[int, int],
        memory: int = WORKING_MEMORY,
    ) -> None:
        self.shape = (tokens.shape[1], *size)
        self.memory = memory
        fitting = memory // (4 * size[0] * size[1])
        self._block = max(1, fitting // TOGETHER * TOGETHER or fitting)
        self._kept = len(self) <= fitting
        self._tokens = enlarge(tokens)[None] if self._kept else tokens
        self._enlarge = _first if self._kept else enlarge

    @classmethod
    def of(cls, maps: Tensor) -> ClassMaps:
        """Scores `[K, h, w]` that are there already."""
        return cls(maps[None], _first, (maps.shape[1], maps.shape[2]), maps.nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory that is held between two calls."""
        return self._tokens.nbytes

    def __getitem__(self, classes: slice) -> Tensor:
        """Maps of some classes, `[n, h, w]` float32."""
        return self._enlarge(self._tokens[:, classes])

    def blocks(self) -> Iterator[Tensor]:
        """All maps in order, `[n, h, w]` at a time; let go of one before asking for the next."""
        step = len(self) if self._kept else self._block
        for start in range(0, len(self), step):
            yield self[start : start + step]

    def split(self, first: int) -> tuple[Tensor, ClassMaps]:
        """The maps of the `first` classes, and the other classes."""
        return self[:first], ClassMaps(
            self._tokens[:, first:], self._enlarge, self.shape[1:], self.memory
        )

    def cpu(self) -> ClassMaps:
        """The same on the CPU; what is computed later is computed where it was."""
        if self._kept:
            return ClassMaps.of(self[:].cpu())
        enlarge = self._enlarge
        return ClassMaps(
            self._tokens, lambda some: enlarge(some).cpu(), self.shape[1:], self.memory
        )

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest score of all classes."""
        low, high = torch.stack(list(map(_limits, self.blocks()))).unbind(1)
        return float(low.min()), float(high.max())


def _limits(maps: Tensor) -> Tensor:
    return torch.stack(maps.aminmax())


def _first(maps: Tensor) -> Tensor:
    return maps[0]
