"""One writer per shard, also when a restart overlaps with a rank that is still alive.

Record locks of the system: they work across machines on NFS, and vanish with a killed process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # there without locks, as on file systems that have none
    import fcntl


@contextmanager
def shard_lock(parts: Path, index: int) -> Iterator[None]:
    """Wait until no other process holds shard `index`; `parts` is the store's hidden folder."""
    if sys.platform == "win32":
        yield
        return
    with (parts / "lock").open("ab") as file:
        with suppress(OSError):  # the file system has no locks
            fcntl.lockf(file, fcntl.LOCK_EX, 1, index)  # byte k of the file stands for shard k
        yield  # closing the file lets go
