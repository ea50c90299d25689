"""Keeping the mapped part of a store small: pages that were read are given back in time.

Every page of a memory map that was touched counts as resident until the system needs the room, so a
training on a store of 100 GB looks as if it needed 100 GB, and a container's limit may kill it. The
pages themselves stay in the page cache: giving them back only unmaps them, and touching one
again costs about a microsecond.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Protocol

MAX_MAPPED_BYTES = 1 << 28
_CHECK_BYTES = 1 << 26  # looking costs ten microseconds, so look once per so many bytes
_FAULT_BYTES = 1 << 17  # Linux maps about that much around a touched page


class Mapped(Protocol):
    """Something that can unmap its pages without forgetting where they belong."""

    @property
    def mapped_bytes(self) -> int:
        """Size of its memory map."""

    def release(self) -> None:
        """Give the pages back; they are mapped again when touched."""


class Residency:
    """Unmaps a process's pages of a store when they exceed `limit` bytes.

    Where the system tells nothing (no `/proc`, no `madvise`), it does nothing.
    """

    def __init__(self, limit: int = MAX_MAPPED_BYTES) -> None:
        self.limit = limit
        self._since = 0
        self._base = mapped_bytes()

    def touched(self, rows: int, row_bytes: int, maps: Collection[Mapped]) -> None:
        """Count a read of rows of some bytes; nobody may be reading from `maps` meanwhile."""
        self._since += rows * max(row_bytes, _FAULT_BYTES)
        if self._since < _CHECK_BYTES:
            return
        self._since = 0
        now = mapped_bytes()
        self._base = min(self._base, now)
        if now - self._base <= self.limit:
            return
        if sum(mapped.mapped_bytes for mapped in maps) > self.limit:  # not another library's
            for mapped in maps:
                mapped.release()


def mapped_bytes() -> int:
    """Resident bytes of this process that belong to files or shared memory; 0 if unknown."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # noqa: PTH123 (speed)
            return int(file.read(128).split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
