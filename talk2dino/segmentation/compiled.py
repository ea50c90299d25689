"""How code is compiled for the CPU with Numba, and how rows of a picture are shared by threads.

Import this module, and those that use it, only where they are needed: it imports Numba. The first
call compiles; the code is kept in `__pycache__` or the user's cache, where one of them can be
written. It is compiled anew when the file of the function has changed, but not when only a file it
takes operations from has: after working on `pamr_vectors.py`, delete `__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, without the interpreter's lock, fused multiply-adds allowed."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**options)(function)


class RowThreads:
    """As many threads as PyTorch uses, for code that does not need the interpreter's lock.

    Python's own: Numba's may not be entered by two callers at once, and a thread that has just been
    started shares its parent's core for milliseconds.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None

    def __call__(self, height: int, kernel: Any, *arguments: Any) -> None:
        """Call `kernel(top, bottom, *arguments)` for blocks of rows, one a thread.

        The caller takes the first: if it only waited, the last thread to wake would be queued
        behind another one while the caller's own core falls idle.
        """
        if self.pool is None or height < self.threads:
            kernel(0, height, *arguments)
            return
        edges = [height * block // self.threads for block in range(self.threads + 1)]
        first, *others = pairwise(edges)
        blocks = [self.pool.submit(kernel, *edge, *arguments) for edge in others]
        kernel(*first, *arguments)
        for block in blocks:
            block.result()
