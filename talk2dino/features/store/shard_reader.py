"""One shard, open for reading: memory-mapped where its layout allows."""

from __future__ import annotations

import importlib
import mmap
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.store.schema import FieldInfo, FieldTable, ShardInfo

ASKED = 1 << 19  # bytes of one request: Linux reads no more of it than the disk takes at once


class Rows(Protocol):
    """Random access to the rows of one field in one shard."""

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy ascending `rows` (repeats allowed) into `out`, [len(rows), ...]; text as `str`."""

    def block(self, first: int, last: int) -> NDArray[Any]:
        """Rows `first` … `last` - 1 of numbers, read-only; not copied where the file is mapped."""

    def will_need(self, first: int, last: int) -> None:
        """Ask the system to read rows `first` … `last` - 1 ahead; returns at once."""

    def load(self, first: int, last: int) -> None:
        """Wait until rows `first` … `last` - 1 are in memory, if they come straight from a file."""


class MappedRows:
    """Rows of a contiguous dataset, straight from the page cache."""

    def __init__(
        self, view: NDArray[Any], mapped: mmap.mmap | None = None, offset: int = 0
    ) -> None:
        self.view, self._map, self._offset = view, mapped, offset

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """See `Rows`; `mode="clip"` lets NumPy write into `out` without a buffer in between."""
        if out.dtype == object:
            out[...] = _decoded(self.view[rows])
        else:
            self.view.take(rows, axis=0, out=out, mode="clip")

    def block(self, first: int, last: int) -> NDArray[Any]:
        """See `Rows`."""
        return self.view[first:last]

    def will_need(self, first: int, last: int) -> None:
        """See `Rows`."""
        if self._map is None or first >= last or not hasattr(mmap, "MADV_WILLNEED"):
            return
        row_bytes = self.view.nbytes // len(self.view)
        start, stop = (self._offset + row * row_bytes for row in (first, last))
        for page in range(start - start % mmap.PAGESIZE, stop, ASKED):
            self._map.madvise(mmap.MADV_WILLNEED, page, min(ASKED, stop - page))

    def load(self, first: int, last: int) -> None:
        """See `Rows`."""
        if first < last:
            self.will_need(first, last)
            self.view[first:last].reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max()


class ChunkedRows:
    """Rows of a chunked or compressed dataset, read by HDF5 in runs of neighbors."""

    def __init__(self, dataset: Any, path: Path) -> None:
        self.dataset, self.path = dataset, path

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """See `Rows`; every row is decompressed once, however often it is asked for."""
        wanted, inverse = np.unique(rows, return_inverse=True)
        found = np.empty((len(wanted), *out.shape[1:]), dtype=self.dataset.dtype)
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        edges = [0, *cuts.tolist(), len(wanted)]
        for a, b in pairwise(edges):
            found[a:b] = self.block(int(wanted[a]), int(wanted[a]) + b - a)
        out[...] = (_decoded(found) if out.dtype == object else found)[inverse]

    def block(self, first: int, last: int) -> NDArray[Any]:
        """See `Rows`."""
        try:
            rows: NDArray[Any] = self.dataset[first:last]
        except OSError as error:
            reason = " ".join(str(error).split())
            raise StoreError(
                f"{self.path}: {self.dataset.name} is damaged ({reason:.120}); extract again"
            ) from None
        return rows

    def will_need(self, first: int, last: int) -> None:
        """See `Rows`; HDF5 reads chunks when it needs them."""

    def load(self, first: int, last: int) -> None:
        """See `Rows`; `block` reads and decompresses them."""


def _decoded(values: NDArray[Any]) -> NDArray[Any]:
    """UTF-8 bytes, of fixed or variable length, as an object array of str."""
    decoded = np.empty(len(values), dtype=object)
    decoded[:] = [value.decode("utf-8", errors="replace") for value in values.tolist()]
    return decoded


class ShardReader:
    """Access to all fields of one shard, by `(table, name)` in `rows`.

    Raises StoreError, naming the shard, if it cannot be opened, lacks a field of the manifest, or
    a field differs from the manifest in shape or dtype.
    """

    def __init__(self, folder: Path, info: ShardInfo, fields: FieldTable) -> None:
        path = folder / info.file
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{path}: cannot be opened ({reason:.120}); extract again") from None
        self.path = path
        self.rows: dict[tuple[str, str], Rows] = {}
        self._map: mmap.mmap | None = None
        counts = {"images": info.images, "captions": info.captions}
        try:
            for table, entries in fields.items():
                for name, field in entries.items():
                    self.rows[table, name] = self._open(table, name, field, counts[table])
        except StoreError:
            self._file.close()
            raise
        if all(isinstance(rows, MappedRows) for rows in self.rows.values()):
            self._file.close()  # the map needs no HDF5 handle

    def close(self) -> None:
        """Close the HDF5 handle, if one is still open; the map ends with its last array."""
        self._file.close()

    @property
    def mapped_bytes(self) -> int:
        """Size of the memory map."""
        return len(self._map) if self._map is not None else 0

    def release(self) -> None:
        """Unmap the pages that were read; they stay in the page cache."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _open(self, table: str, name: str, field: FieldInfo, count: int) -> Rows:
        group = self._file.get(table)
        dataset = group.get(name) if isinstance(group, h5py.Group) else None
        if not isinstance(dataset, h5py.Dataset):
            raise StoreError(f"{self.path}: field {table}/{name} is missing; extract again")
        dtype = "str" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype)
        if dataset.shape != (count, *field.shape) or dtype != field.dtype:
            raise StoreError(
                f"{self.path}: {table}/{name} is {dtype} {list(dataset.shape)}, the manifest says "
                f"{field.dtype} {[count, *field.shape]}; extract again"
            )
        if not dataset.size:
            return MappedRows(np.empty(dataset.shape, dataset.dtype))
        offset = _map_offset(dataset)
        if offset is None:
            _require_filters(dataset, self.path)
            return ChunkedRows(dataset, self.path)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if offset + dataset.nbytes > len(self._map):
            raise StoreError(f"{self.path}: {dataset.name} ends after the file; extract again")
        # A plain array over the mapped file; `np.memmap` would cost more on every index.
        view = np.ndarray(dataset.shape, dataset.dtype, buffer=self._map, offset=offset)
        return MappedRows(view, self._map, offset)


def size_problem(folder: Path, info: ShardInfo) -> str | None:
    """What is wrong if the shard's file is absent or of another size than the manifest says."""
    try:
        found = (folder / info.file).stat().st_size
    except OSError:
        return "shard is missing"
    return None if found == info.bytes else f"{found} bytes, the manifest says {info.bytes}"


def _map_offset(dataset: Any) -> int | None:
    """Where the raw bytes of `dataset` start, or None if they are not one plain block."""
    layout = dataset.id.get_create_plist().get_layout()
    plain = dataset.dtype.kind in "fiub" or h5py.check_string_dtype(dataset.dtype)
    variable = dataset.dtype.kind == "O"
    if layout != h5py.h5d.CONTIGUOUS or dataset.external or not plain or variable:
        return None
    offset: int | None = dataset.id.get_offset()
    return offset


def _require_filters(dataset: Any, path: Path) -> None:
    """Make the filters of a compressed dataset available, hdf5plugin's included."""
    properties = dataset.id.get_create_plist()
    for index in range(properties.get_nfilters()):
        code, _, _, label = properties.get_filter(index)
        if h5py.h5z.filter_avail(code):
            continue
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")  # registers its filters on import
        if not h5py.h5z.filter_avail(code):
            shown = label.decode(errors="replace") or code
            raise StoreError(
                f"{path}: {dataset.name} is compressed with {shown}; "
                "pip install 'talk2dino[archive]'"
            )
