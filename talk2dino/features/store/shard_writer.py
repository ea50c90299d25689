"""The rows of one shard while it grows in memory, and their bytes as an HDF5 file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from talk2dino.datasets.captions import Entry
from talk2dino.errors import StoreError
from talk2dino.features.store.schema import (
    FEATURE_DTYPES,
    FIXED_DTYPES,
    TABLES,
    FieldInfo,
    check_shapes,
)
from talk2dino.features.store.verify import nonfinite_rows


class GuardedFile(FileIO):
    """A file that remembers its first error instead of raising it.

    HDF5 can crash the whole process when it closes a file after a write failed (a full disk). So
    it is told that writing succeeded, nothing more is written, and the error is raised afterwards.

    Attributes:
        error: what the operating system said, if anything.
    """

    error: OSError | None = None

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        """Write all of `data`; the operating system may take it in pieces."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size in bytes."""
        try:
            if self.error is None:
                super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0


Arrays = Mapping[str, ArrayLike]
_Prepared = dict[str, NDArray[Any]]

_REQUIRED = {"images": ("id", "file_name"), "captions": ("id", "image_row", "text")}
_PAGE = 4096  # large datasets start on a page, so that mapped rows are aligned


def prepare(images: Arrays, captions: Arrays, dtype: str, file: str) -> dict[str, _Prepared]:
    """Both tables of a shard in stored types; StoreError names `file` and the wrong field."""
    if dtype not in FEATURE_DTYPES:
        raise StoreError(f"dtype={dtype!r} is no feature dtype; use one of {FEATURE_DTYPES}")
    tables = {"images": _table("images", images, dtype, file)}
    tables["captions"] = _table("captions", captions, dtype, file) if captions else {}
    if captions:
        check_image_rows(tables["captions"], len(tables["images"]["id"]), file)
    return tables


def describe(arrays: Mapping[str, NDArray[Any]]) -> dict[str, FieldInfo]:
    """Row shape and dtype of each array, as the manifest names them."""
    return {
        name: FieldInfo(array.shape[1:], FIXED_DTYPES.get(name, str(array.dtype)))
        for name, array in arrays.items()
    }


def write_hdf5(
    path: Path,
    tables: Mapping[str, Mapping[str, Any]],
    layout: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """Write tables as groups of contiguous datasets; the same arrays give the same bytes.

    An array may be a dataset of another file, which is then in memory while it is written. `layout`
    gives the options of an array's dataset, for archives that are chunked and compressed.

    The oldest file layout and no time stamps keep the bytes independent of clock and machine.
    Raises the operating system's OSError for a full disk and the like.
    """
    with GuardedFile(path, "w+") as raw:
        with h5py.File(
            raw,
            "w",
            libver=("earliest", "v110"),
            alignment_threshold=_PAGE,
            alignment_interval=_PAGE,
        ) as file:
            for table, arrays in sorted(tables.items()):
                group = file.create_group(table)
                for name, array in sorted(arrays.items()):
                    options = layout(array) if layout is not None else {}
                    group.create_dataset(name, data=array[...], track_times=False, **options)
                    if raw.error is not None:
                        raise raw.error
        if raw.error is not None:
            raise raw.error


def check_lengths(table: str, arrays: Mapping[str, NDArray[Any]], file: str = "") -> None:
    """Every field of a table has the same number of rows."""
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(arrays[first]):
            raise StoreError(
                f"{file or 'arrays'}: {table}/{name} has shape {array.shape}, {table}/{first} "
                f"{arrays[first].shape}; all fields need the same rows"
            )


def check_image_rows(captions: Mapping[str, NDArray[Any]], images: int, file: str) -> None:
    """Every caption's `image_row` names one of `images` rows."""
    rows = captions["image_row"]
    if rows.dtype.kind not in "iu":
        raise StoreError(f"{file}: captions/image_row is {rows.dtype}, expected int64 rows")
    wrong = np.flatnonzero((rows < 0) | (rows >= images))
    if len(wrong):
        row = int(wrong[0])
        raise StoreError(
            f"{file}: caption id={captions['id'][row]} has image_row={rows[row]}, but there are "
            f"{images} images; give every caption its image"
        )


def _table(table: str, given: Arrays, dtype: str, file: str) -> _Prepared:
    """Known fields only, equal lengths, stored types, shapes that agree with each other."""
    known = TABLES[table]
    for name in given:
        if name not in known:
            raise StoreError(f"{file}: unknown field {table}/{name}; known are {sorted(known)}")
    for name in _REQUIRED[table]:
        if name not in given:
            raise StoreError(f"{file}: field {table}/{name} is missing; give one value per row")
    arrays = {name: np.asarray(value) for name, value in given.items()}
    check_lengths(table, arrays, file)
    ids = arrays["id"]
    stored = {
        name: _stored(array, FIXED_DTYPES.get(name, dtype), f"{file}: {table}/{name}", ids)
        for name, array in arrays.items()
    }
    check_shapes(describe(stored), table, file)
    return stored


def _stored(array: NDArray[Any], dtype: str, where: str, ids: NDArray[Any]) -> NDArray[Any]:
    """`array` in its stored type, or StoreError if that would change its meaning."""
    if dtype == "str":
        return _fixed_length(array, where)
    kinds = {"int64": "iu", "bool": "b"}.get(dtype, "f")
    # An empty Python list arrives as float64 and holds no value that could be wrong.
    if array.dtype.kind not in kinds and array.size:
        raise StoreError(f"{where} is {array.dtype}, expected {dtype}; convert it first")
    with np.errstate(over="ignore"):  # reported below, with the row
        stored = np.ascontiguousarray(array, dtype=dtype)
    if kinds == "f" and len(bad := nonfinite_rows(stored)):
        raise StoreError(
            f"{where} is not finite in {dtype} for id={ids[bad[0]]} ({len(bad)} rows in all); "
            "extract in float32, or leave these rows out"
        )
    return stored


def _fixed_length(array: NDArray[Any], where: str) -> NDArray[Any]:
    """Text as UTF-8 of one length, since text of variable length is not contiguous in HDF5."""
    values = array.tolist()
    if not all(isinstance(value, str) for value in values):
        raise StoreError(f"{where} must hold str values, found {array.dtype}")
    encoded = [value.encode("utf-8", errors="replace") for value in values]
    length = max(map(len, encoded), default=1) or 1
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", length=length))


Fields = Mapping[str, NDArray[Any]]


class ShardRows:
    """Images, captions and skipped images of a shard, in order.

    Args:
        capacity: images that the shard may hold; their fields are copied once, into one array.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids: list[int] = []
        self.file_names: list[str] = []
        self.captions: list[tuple[int, int, str]] = []  # id, image_row, text
        self.skipped: list[dict[str, Any]] = []
        self._images: dict[str, NDArray[Any]] = {}
        self._captions: list[Fields] = []
        self._encoded = 0

    def add_images(self, entries: Sequence[Entry], fields: Fields) -> None:
        """Append images with their fields [B, ...] in stored types, and their captions' texts."""
        first = len(self.ids)
        for row, entry in enumerate(entries, start=first):
            self.ids.append(entry.image_id)
            self.file_names.append(entry.file_name)
            self.captions += [(number, row, text) for number, text in entry.captions]
        for name, values in fields.items():
            if name not in self._images:
                self._images[name] = np.empty((self.capacity, *values.shape[1:]), values.dtype)
            self._images[name][first : len(self.ids)] = values

    def waiting_texts(self, limit: int) -> list[str]:
        """At most `limit` texts of captions that are not encoded yet."""
        waiting = self.captions[self._encoded : self._encoded + limit]
        return [text for _, _, text in waiting]

    def waiting(self) -> int:
        """Number of captions that are not encoded yet."""
        return len(self.captions) - self._encoded

    def add_caption_fields(self, fields: Fields) -> None:
        """Append fields [m, ...] in stored types for the next m captions."""
        self._captions.append(fields)
        self._encoded += len(next(iter(fields.values())))

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both tables, as `write_shard` takes them; the second is empty without text encoder."""
        images: dict[str, Any] = {"id": np.array(self.ids, np.int64), "file_name": self.file_names}
        images |= {name: values[: len(self.ids)] for name, values in self._images.items()}
        if not self._captions:
            return images, {}
        captions: dict[str, Any] = {
            "id": np.array([number for number, _, _ in self.captions], np.int64),
            "image_row": np.array([row for _, row, _ in self.captions], np.int64),
            "text": [text for _, _, text in self.captions],
        }
        for name in self._captions[0]:
            captions[name] = np.concatenate([fields[name] for fields in self._captions])
        return images, captions
