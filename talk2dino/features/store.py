"""Read a feature store: rows of any field by global row number, across shards.

`store.images["patch_tokens"][rows]` gathers rows straight from memory-mapped shards. Shards open
when first needed, separately in every process, so a store pickles into DataLoader workers.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.schema import EncoderInfo, FieldInfo, Manifest, VisionInfo
from talk2dino.features.shard_reader import ShardReader, size_problem
from talk2dino.features.verify import verify_store

# Each open shard holds a file descriptor; 1024 per process is a common limit.
MAX_OPEN_SHARDS = 512

Index = int | np.integer[Any] | slice | list[int] | NDArray[Any]


class FeatureStore:
    """A folder of features, format 1.

    Opening reads the manifest and compares the size of every shard; `verify` reads everything.

    Args:
        path: the folder with `manifest.json`.

    Attributes:
        images: fields of the images, `store.images["patch_tokens"]` [n, P, D] and so on.
        captions: fields of the captions; `image_row` counts over the whole store.
        manifest: the manifest as a dataclass; `vision` and `text` are its encoders.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        for shard in self.manifest.shards:
            if problem := size_problem(self.path, shard):
                raise StoreError(f"{self.path / shard.file}: {problem}; extract again")
        shards = self.manifest.shards
        image_starts = _starts([shard.images for shard in shards])
        caption_starts = _starts([shard.captions for shard in shards])
        fields = self.manifest.fields
        self.images = Table(self, "images", fields["images"], image_starts, image_starts)
        self.captions = Table(self, "captions", fields["captions"], caption_starts, image_starts)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
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

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read everything; problems by shard name, empty if sound. See `verify.verify_store`."""
        return verify_store(self.path, progress)

    def shard(self, index: int) -> ShardReader:
        """The open shard `index` of this process; the least recently used one makes room."""
        if self._pid != os.getpid():  # after a fork: HDF5 handles must not be shared
            self._open, self._pid = OrderedDict(), os.getpid()
        reader = self._open.get(index)
        if reader is None:
            manifest = self.manifest
            reader = ShardReader(self.path, manifest.shards[index], manifest.fields)
            self._open[index] = reader
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        elif len(self.manifest.shards) > MAX_OPEN_SHARDS:
            self._open.move_to_end(index)
        return reader

    def close(self) -> None:
        """Close all shards; they open again when needed."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

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
            key: Field(store, name, key, info, starts, image_starts if key == "image_row" else None)
            for key, info in infos.items()
        }

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


class Field:
    """One field over all shards; index it with rows to get a NumPy array."""

    def __init__(
        self,
        store: FeatureStore,
        table: str,
        name: str,
        info: FieldInfo,
        starts: NDArray[np.int64],
        added: NDArray[np.int64] | None,
    ) -> None:
        self._store, self._key = store, (table, name)
        self._starts = starts  # [S + 1], first global row of each shard, then the total
        self._added = added  # [S + 1], what a shard's values lack to be global, or None
        self.shape = (int(starts[-1]), *info.shape)
        self.dtype = np.dtype(object if info.dtype == "str" else info.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Any:
        """Rows by number; a slice or an array of rows in any order, repeats allowed.

        Returns `[len(rows), *shape[1:]]` (an int gives one row without the first axis); text comes
        as `str`. Raises IndexError outside the field.
        """
        if isinstance(index, (int, np.integer)):
            return self[np.array([index])][0]
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = self._checked(np.asarray(index))
        return self._gather(rows)

    def _checked(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        if not rows.size:
            return np.empty(0, dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise IndexError(f"rows must be a 1-D integer array, got {rows.dtype} {rows.shape}")
        low, high = int(rows.min()), int(rows.max())
        if low < -len(self) or high >= len(self):
            wrong = low if low < -len(self) else high
            raise IndexError(f"row {wrong} is outside {'/'.join(self._key)} of {len(self)} rows")
        rows = rows.astype(np.int64, copy=False)
        return rows if low >= 0 else np.where(rows < 0, rows + len(self), rows)

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read each shard's rows in one call, ascending: sorted rows go straight into place."""
        order = None
        if len(rows) > 1 and (rows[1:] < rows[:-1]).any():
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
        # A shard without rows shares its start with the next one; "right" passes over it.
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        local = rows - self._starts[shards]
        edges = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(rows)]
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for a, b in pairwise(edges):
            if a == b:
                continue  # no rows at all
            source = self._store.shard(int(shards[a])).rows[self._key]
            if order is None and self.dtype != object:
                source.read(local[a:b], out[a:b])
            else:
                part = np.empty((b - a, *out.shape[1:]), dtype=source.dtype)
                source.read(local[a:b], part)
                out[slice(a, b) if order is None else order[a:b]] = (
                    _decoded(part) if self.dtype == object else part
                )
        if self._added is not None:
            out += self._added[shards if order is None else shards[np.argsort(order)]]
        return out


def _starts(counts: list[int]) -> NDArray[np.int64]:
    """First row of each shard, then the total, [S + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _decoded(array: NDArray[Any]) -> list[str]:
    """UTF-8 bytes, of fixed or variable length, as str."""
    return [value.decode("utf-8", errors="replace") for value in array.tolist()]
