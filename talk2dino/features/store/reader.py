"""Read a feature store: rows of any field by global row number, across shards."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.store.schema import EncoderInfo, FieldInfo, Manifest, VisionInfo
from talk2dino.features.store.shard_reader import (
    MappedRows,
    Residency,
    Rows,
    ShardReader,
    size_problem,
)
from talk2dino.features.store.verify import verify_store

Index = int | np.integer[Any] | slice | list[int] | NDArray[Any]

# Stands for the place of rows that are nowhere in memory; adding any row to it stays far outside.
_NOWHERE = -(1 << 62)


class Shards(Protocol):
    """What a field needs of its store."""

    def reading(self) -> AbstractContextManager[Any]:
        """While this lasts no open shard is closed."""

    def shard(self, index: int) -> ShardReader:
        """The open shard; opening one tells `Field.mapped`."""

    def touched(self, rows: int, row_bytes: int) -> None:
        """So many rows of so many bytes were read."""


class Field:
    """One field over all shards; index it with rows to get a NumPy array.

    Args:
        key: table and name.
        info: shape of one row, and dtype.
        starts: `[S + 1]` int64, first global row of each shard, then the total.
        added: `[S + 1]` int64, what a shard's values lack to be global, or None.
        store: opens the shards.
    """

    def __init__(
        self,
        key: tuple[str, str],
        info: FieldInfo,
        starts: NDArray[np.int64],
        added: NDArray[np.int64] | None,
        store: Shards,
    ) -> None:
        self.key = key
        self.shape = (int(starts[-1]), *info.shape)
        self.dtype = np.dtype(object if info.dtype == "str" else info.dtype)
        self.row_bytes = int(np.prod(info.shape)) * self.dtype.itemsize
        self._starts, self._added, self._store = starts, added, store
        self.forget()

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
            rows = np.asarray(index)
        with self._store.reading():
            out = self._at_once(rows)
            if out is None:
                out = self._opening(self._checked(rows))
            self._store.touched(len(rows), self.row_bytes)
        return out

    def forget(self) -> None:
        """Forget where rows lie: no shard is open."""
        self._address = np.zeros(len(self._starts) - 1, dtype=np.int64)  # [S], 0 if nowhere
        self._place()

    def mapped(self, shard: int, rows: Rows | None) -> None:
        """Note where the rows of a shard that was just opened lie; None if it was closed."""
        self._address[shard] = 0
        if isinstance(rows, MappedRows) and rows.view.size and self.dtype != object:
            self._address[shard] = rows.view.__array_interface__["data"][0]
        self._place()

    def _place(self) -> None:
        """Lay the span over all mapped shards, and say where global row 0 would be in it.

        `_zero` has a place more on either side, for rows before the first and after the last.
        """
        self._zero = np.full(len(self._starts) + 1, _NOWHERE, dtype=np.int64)  # [S + 2]
        known = np.flatnonzero(self._address)
        if not len(known):
            self._span = np.empty(0, dtype=f"V{max(1, self.row_bytes)}")
            return
        last_rows = self._address + (np.diff(self._starts) - 1) * self.row_bytes  # [S]
        low, high = int(self._address[known].min()), int(last_rows[known].max())
        self._span = np.asarray(_Span(low, high - low + 1, self.row_bytes))
        self._zero[known + 1] = self._address[known] - low - self._starts[known] * self.row_bytes

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

    def _at_once(self, rows: NDArray[Any]) -> NDArray[Any] | None:
        """Rows of shards that are all mapped by now, or None; a row outside is such a case too."""
        if rows.ndim != 1 or rows.dtype != np.int64 or not rows.size:
            return None
        shards = self._starts.searchsorted(rows, side="right")  # from 1 on
        places = self._zero.take(shards)
        places += rows * self.row_bytes
        try:
            items = self._span[places]
        except IndexError:
            return None
        out = items.view(self.dtype).reshape(len(rows), *self.shape[1:])
        if self._added is not None:
            out += self._added[shards - 1]
        return out

    def _opening(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Open what these rows need first; then all at once if possible, else by shard."""
        if not len(rows):
            return np.empty((0, *self.shape[1:]), dtype=self.dtype)
        shards = self._shards(rows)
        for shard in np.unique(shards).tolist():
            self._store.shard(shard)
        out = self._at_once(rows)
        if out is not None:
            return out
        out = self._by_shard(rows, shards)
        if self._added is not None:
            out += self._added[shards]
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
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _by_shard(self, rows: NDArray[np.int64], shards: NDArray[np.int64]) -> NDArray[Any]:
        """One read per shard, for text and for what cannot be mapped."""
        order = np.argsort(rows, kind="stable")
        local, of = (rows - self._starts[shards])[order], shards[order]
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        edges = [0, *(np.flatnonzero(of[1:] != of[:-1]) + 1).tolist(), len(rows)]
        for a, b in pairwise(edges):
            source = self._store.shard(int(of[a])).rows[self.key]
            part = np.empty((b - a, *out.shape[1:]), dtype=source.dtype)
            source.read(local[a:b], part)
            out[order[a:b]] = _decoded(part) if self.dtype == object else part
        return out


class _Span:
    """What NumPy needs to see the memory from `low` on as overlapping items, one per byte."""

    def __init__(self, low: int, items: int, item_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (low, True),  # read-only
            "shape": (items,),
            "strides": (1,),
            "typestr": f"|V{item_bytes}",
        }


def _decoded(array: NDArray[Any]) -> list[str]:
    """UTF-8 bytes, of fixed or variable length, as str."""
    return [value.decode("utf-8", errors="replace") for value in array.tolist()]


# Each open shard holds a file descriptor; 1024 per process is a common limit, which `_room_for`
# raises as far as it may.
MAX_OPEN_SHARDS = 512
_OTHER_FILES = 512


class FeatureStore:
    """A folder of features, format 1.

    Opening reads the manifest and compares the size of every shard; `verify` reads everything.

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
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        for shard in self.manifest.shards:
            if problem := size_problem(self.path, shard):
                raise StoreError(f"{self.path / shard.file}: {problem}; extract again")
        self._arrange()

    def _arrange(self) -> None:
        shards = self.manifest.shards
        image_starts = _starts([shard.images for shard in shards])
        caption_starts = _starts([shard.captions for shard in shards])
        fields = self.manifest.fields
        self.images = Table(self, "images", fields["images"], image_starts, image_starts)
        self.captions = Table(self, "captions", fields["captions"], caption_starts, image_starts)
        self._limit = _room_for(len(shards))
        self._start()

    def _start(self) -> None:
        """Begin without open shards, as in every new process: HDF5 handles are not shared."""
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.RLock()  # a loader may read ahead in a thread
        self._residency = Residency()
        self._pid = os.getpid()
        for table in (self.images, self.captions):
            table.forget()

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

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read everything; problems by shard name, empty if sound. See `verify.verify_store`."""
        return verify_store(self.path, progress)

    def shard(self, index: int) -> ShardReader:
        """The open shard `index` of this process, inside `reading`; the oldest makes room."""
        reader = self._open.get(index)
        if reader is None:
            manifest = self.manifest
            reader = ShardReader(self.path, manifest.shards[index], manifest.fields)
            self._open[index] = reader
            self._tell(index, reader)
            if len(self._open) > self._limit:
                oldest, closed = self._open.popitem(last=False)
                self._tell(oldest, None)
                closed.close()
        return reader

    def reading(self) -> threading.RLock:
        """Lock under which no open shard is closed; `with store.reading(): …`."""
        if self._pid != os.getpid():
            self._start()
        return self._lock

    def touched(self, rows: int, row_bytes: int) -> None:
        """Count a read, inside `reading`; gives mapped pages back when they are many."""
        self._residency.touched(rows, row_bytes, self._open.values())

    def close(self) -> None:
        """Close all shards; they open again when needed."""
        with self._lock:
            while self._open:
                index, reader = self._open.popitem()
                self._tell(index, None)
                reader.close()

    def _tell(self, shard: int, reader: ShardReader | None) -> None:
        """Tell every field where the rows of a shard lie, or that it was closed."""
        for table in (self.images, self.captions):
            for name in table.fields:
                table[name].mapped(shard, reader.rows[table.name, name] if reader else None)

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
        self._fields = {
            key: Field(
                (name, key),
                info,
                starts,
                image_starts if key == "image_row" else None,
                store,
            )
            for key, info in infos.items()
        }

    def forget(self) -> None:
        """Forget where rows lie: no shard is open."""
        for field in self._fields.values():
            field.forget()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored fields."""
        return tuple(self._fields)

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Field:
        if name not in self._fields:
            raise StoreError(
                f"{self._store.path}: {self.name} have no field {name!r}, only "
                f"{', '.join(self._fields) or 'none'}; extract again with {name}"
            )
        return self._fields[name]


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """First row of each shard, then the total, [S + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


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
