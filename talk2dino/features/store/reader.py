"""Read a feature store: rows of any field by global row number, across shards."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import Advance, StoreError
from talk2dino.features.store.schema import EncoderInfo, FieldInfo, Manifest, VisionInfo
from talk2dino.features.store.shard_reader import ShardReader, size_problem
from talk2dino.features.store.verify import verify_store
from talk2dino.files import user_path

Index = int | np.integer[Any] | slice | list[int] | NDArray[Any]

# An open shard holds a file descriptor. 1024 per process is a common limit, which `_room_for`
# raises as far as it may.
MAX_OPEN_SHARDS = 512
_OTHER_FILES = 512

# Pages of mapped files that were read count as memory of the process, although the system may take
# them back at any time. Beyond so many bytes they are unmapped (and stay in the page cache): a
# process that reads a large store then looks no larger than one that reads a small store. How much
# is mapped is asked, not estimated: around a touched page the system maps 64 KB or megabytes.
MAX_MAPPED_BYTES = 1 << 28
_CHECK_BYTES = 1 << 26  # asking costs twenty microseconds, so once for so many bytes
_FAULT_BYTES = 1 << 17  # a row counts as this much at least


class FeatureStore:
    """A folder of features, format 1.

    Opening reads the manifest and compares the size of every shard; `verify` reads everything.
    Shards open when they are first read, in every process anew, so a store pickles.

    Args:
        path: the folder with `manifest.json`.

    Attributes:
        images: fields of the images, `store.images["patch_tokens"]` [n, P, D] and so on.
        captions: fields of the captions; `image_row` counts over the whole store.
        manifest: the manifest as a dataclass; `vision` and `text` are its encoders.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.features import FeatureStore, write_store
        >>> _ = write_store("store", {"cls_token": np.eye(3)}, {"image_row": [0, 0, 2]})
        >>> store = FeatureStore("store")
        >>> len(store.images), len(store.captions), store.verify()
        (3, 3, [])
        >>> store.images["cls_token"][[2, 0]]
        array([[0., 0., 1.],
               [1., 0., 0.]], dtype=float16)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.manifest = Manifest.read(self.path)
        for shard in self.manifest.shards:
            if problem := size_problem(self.path, shard):
                raise StoreError(f"{self.path / shard.file}: {problem}; extract again")
        self._arrange()
        if not len(self.images):
            raise StoreError(f"{self.path}: holds no image; extract again")

    def _arrange(self) -> None:
        shards, fields = self.manifest.shards, self.manifest.fields
        image_starts = _starts([shard.images for shard in shards])
        caption_starts = _starts([shard.captions for shard in shards])
        self.images = Table(self, "images", fields["images"], image_starts, image_starts)
        self.captions = Table(self, "captions", fields["captions"], caption_starts, image_starts)
        self._limit = _room_for(len(shards))
        self._start()

    def _start(self) -> None:
        """Begin without open shards, as in every new process: HDF5 handles are not shared."""
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.RLock()  # a loader may read ahead in a thread
        self._read_bytes, self._mapped_before = 0, _mapped_bytes()
        self._pid = os.getpid()

    @property
    def vision(self) -> VisionInfo | None:
        """The vision encoder, if the manifest names one."""
        return self.manifest.vision

    @property
    def text(self) -> EncoderInfo | None:
        """The text encoder, if the manifest names one."""
        return self.manifest.text

    def require(self, images: Iterable[str] = (), captions: Iterable[str] = ()) -> None:
        """Raise StoreError unless all named fields are stored."""
        for table, names in ((self.images, images), (self.captions, captions)):
            for name in names:
                table[name]

    def verify(self, progress: Advance | None = None) -> list[str]:
        """Read everything; problems by shard name, empty if sound. See `verify.verify_store`."""
        return verify_store(self.path, progress)

    def reading(self) -> threading.RLock:
        """Lock under which no open shard is closed: `with store.reading(): …`."""
        if self._pid != os.getpid():
            self._start()
        return self._lock

    def shard(self, index: int) -> ShardReader:
        """Shard `index`, opened if need be, inside `reading`; the oldest one makes room."""
        reader = self._open.get(index)
        if reader is None:
            manifest = self.manifest
            reader = ShardReader(self.path, manifest.shards[index], manifest.fields)
            self._open[index] = reader
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        return reader

    def count(self, rows: int, row_bytes: int) -> None:
        """Count rows that were read, inside `reading`; unmap the shards when much is mapped."""
        self._read_bytes += rows * max(row_bytes, _FAULT_BYTES)
        if self._read_bytes < _CHECK_BYTES:
            return
        self._read_bytes, now = 0, _mapped_bytes()
        self._mapped_before = min(self._mapped_before, now)
        ours = sum(reader.mapped_bytes for reader in self._open.values())  # others map files, too
        if min(now - self._mapped_before, ours) > MAX_MAPPED_BYTES:
            for reader in self._open.values():
                reader.release()

    def close(self) -> None:
        """Close all shards; they open again when needed."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("path", "manifest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._arrange()

    def __repr__(self) -> str:
        rows = f"images={len(self.images)}, captions={len(self.captions)}"
        return f"FeatureStore({str(self.path)!r}, {rows})"


class Table:
    """`store.images` or `store.captions`: its fields by name, and its number of rows."""

    def __init__(
        self,
        store: FeatureStore,
        name: str,
        infos: dict[str, FieldInfo],
        starts: NDArray[np.int64],
        image_starts: NDArray[np.int64],
    ) -> None:
        self.name = name
        self._store = store
        self._rows = int(starts[-1])
        self._fields = {key: Field(store, (name, key), info, starts) for key, info in infos.items()}
        if "image_row" in self._fields:  # a shard counts its images from zero
            self._fields["image_row"].added = image_starts

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored fields."""
        return tuple(self._fields)

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Field:
        if not self._fields:
            raise StoreError(
                f"{self._store.path}: holds no {self.name}, only pictures to search; give a store "
                "of pictures with captions"
            )
        if name not in self._fields:
            raise StoreError(
                f"{self._store.path}: {self.name} have no field {name!r}, only "
                f"{', '.join(self._fields)}; extract again with {name}"
            )
        return self._fields[name]


class Field:
    """One field over all shards; index it with rows to get a NumPy array.

    Args:
        store: opens the shards.
        key: table and name.
        info: shape of one row, and dtype.
        starts: `[S + 1]` int64, first global row of each shard, then the total.

    Attributes:
        shape: of all rows together; `dtype` of the values, `object` for text.
        added: `[S + 1]` int64, what is added to a shard's values to make them global, or None.
    """

    def __init__(
        self, store: FeatureStore, key: tuple[str, str], info: FieldInfo, starts: NDArray[np.int64]
    ) -> None:
        self.key = key
        self.shape = (int(starts[-1]), *info.shape)
        self.dtype = np.dtype(object if info.dtype == "str" else info.dtype)
        self.row_bytes = int(np.prod(info.shape)) * self.dtype.itemsize
        self.added: NDArray[np.int64] | None = None
        self._store, self._starts = store, starts

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Any:
        """Rows by number; a slice or an array of rows in any order, repeats allowed.

        Returns `[len(rows), *shape[1:]]` (an int gives one row without the first axis), a copy;
        text comes as `str`. Raises IndexError outside the field.
        """
        if isinstance(index, (int, np.integer)):
            return self[np.array([index])][0]
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = self._checked(np.asarray(index))
        if (rows[1:] >= rows[:-1]).all():
            return self._gather(rows)
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        out[order] = self._gather(rows[order])
        return out

    def will_need(self, first: int, last: int) -> None:
        """Ask the system to read global rows `first` … `last` - 1 ahead, in order, and return."""
        if first >= last:
            return
        low, high = self._shards(np.array([first, last - 1])).tolist()
        for shard in range(low, high + 1):
            start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
            with self._store.reading():
                rows = self._store.shard(shard).rows[self.key]
                rows.will_need(max(first, start) - start, min(last, stop) - start)

    def blocks(self, size: int, ahead: int = 1 << 25) -> Iterator[tuple[int, NDArray[Any]]]:
        """All rows in their order, once: the first row of each block, and its numbers.

        Mapped rows are not copied: a block is a read-only view of the file, which stays valid.
        While one is used, a thread waits for the disk to bring the next.

        Args:
            size: rows of a block at most; a block ends with its shard.
            ahead: bytes of the blocks that are read in advance; at least one is.
        """
        waiting: deque[tuple[int, int, int]] = deque()
        many = max(1, ahead // max(1, size * self.row_bytes))
        with ThreadPoolExecutor(1, "read ahead") as pool:
            for shard, (start, stop) in enumerate(pairwise(self._starts.tolist())):
                for first in range(start, stop, size):
                    place = (shard, first - start, min(first + size, stop) - start)
                    with self._store.reading():
                        rows = self._store.shard(shard).rows[self.key]
                    pool.submit(rows.load, *place[1:])
                    waiting.append(place)
                    if len(waiting) > many:
                        yield self._block(*waiting.popleft())
            while waiting:
                yield self._block(*waiting.popleft())

    def _block(self, shard: int, first: int, last: int) -> tuple[int, NDArray[Any]]:
        """Local rows `first` … `last` - 1 of a shard, and the global row of the first."""
        with self._store.reading():
            found = self._store.shard(shard).rows[self.key].block(first, last)
            self._store.count(last - first, self.row_bytes)
        return int(self._starts[shard]) + first, found

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Ascending rows, with one read for all that lie in the same shard."""
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        if not len(rows):
            return out
        shards = self._shards(rows)
        local = rows - self._starts[shards]
        edges = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(rows)]
        with self._store.reading():
            for a, b in pairwise(edges):
                self._store.shard(int(shards[a])).rows[self.key].read(local[a:b], out[a:b])
            self._store.count(len(rows), self.row_bytes)
        if self.added is not None:
            out += self.added[shards]
        return out

    def _checked(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        if not rows.size:
            return np.empty(0, dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise IndexError(f"rows must be a 1-D integer array, got {rows.dtype} {rows.shape}")
        low, high = int(rows.min()), int(rows.max())
        if low < -len(self) or high >= len(self):
            wrong = low if low < -len(self) else high
            raise IndexError(f"row {wrong} is outside {'/'.join(self.key)} of {len(self)} rows")
        rows = rows.astype(np.int64, copy=False)
        return rows if low >= 0 else np.where(rows < 0, rows + len(self), rows)

    def _shards(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # A shard without rows shares its start with the next one; "right" passes over it.
        return self._starts.searchsorted(rows, side="right") - 1


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """First row of each shard, then the total, [S + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _mapped_bytes() -> int:
    """Resident bytes of this process that belong to files or shared memory; 0 if unknown."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _room_for(shards: int) -> int:
    """How many shards may be open at once, after asking the system for one file each."""
    if shards <= MAX_OPEN_SHARDS:
        return MAX_OPEN_SHARDS
    with suppress(ImportError, OSError, ValueError):  # absent on Windows; the system may refuse
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = shards + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        return max(MAX_OPEN_SHARDS, min(shards, soft - _OTHER_FILES))
    return MAX_OPEN_SHARDS
