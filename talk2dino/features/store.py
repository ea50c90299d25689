"""Read a feature store: rows of any field by global row number, across shards.

`store.images["patch_tokens"][rows]` gathers rows straight from memory-mapped shards. Shards open
when first needed, separately in every process, so a store pickles into DataLoader workers.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import StoreError
from talk2dino.features.field import Field
from talk2dino.features.residency import Residency
from talk2dino.features.schema import EncoderInfo, FieldInfo, Manifest, VisionInfo
from talk2dino.features.shard_reader import ShardReader, size_problem
from talk2dino.features.verify import verify_store

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
