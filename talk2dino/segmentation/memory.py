"""Large arrays that are used again: new memory costs as much as a pass over it."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE = 16  # float32 in a line of the cache

Floats = NDArray[np.float32]


class Memory:
    """Float32 arrays that nobody needs at present. Threads may share one; copies start empty."""

    def __init__(self) -> None:
        self._free: list[Floats] = []
        self._lock = Lock()

    def take(self, size: int) -> Floats:
        """`size` numbers of any value, from the start of a line on: a vector across two is slow."""
        with self._lock:
            self._free.sort(key=len)
            fits = next((n for n, kept in enumerate(self._free) if len(kept) >= size), -1)
            kept = self._free.pop(fits) if self._free else np.empty(0, np.float32)
        return kept[:size] if len(kept) >= size else _new(size)  # in place of the largest

    def give(self, array: Floats) -> None:
        """Hand back a flat array from `take` that is read and written no more."""
        whole = array.base if isinstance(array.base, np.ndarray) else array
        self._free.append(_aligned(whole))  # not only the part that was asked for

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()


def _new(size: int) -> Floats:
    # From NumPy, since it asks the system for large pages: first touch and far reads cost less.
    return _aligned(np.empty(size + LINE, np.float32))[:size]


def _aligned(memory: Floats) -> Floats:
    """From the first line of the cache on."""
    return memory[-memory.ctypes.data // 4 % LINE :]
