"""The rows of one shard while it grows in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talk2dino.features.sources import Entry

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
        """At most `limit` texts of captions whose fields are not there yet."""
        waiting = self.captions[self._encoded : self._encoded + limit]
        return [text for _, _, text in waiting]

    def waiting(self) -> int:
        """Captions whose fields are not there yet."""
        return len(self.captions) - self._encoded

    def add_caption_fields(self, fields: Fields) -> None:
        """Append fields [m, ...] in stored types for the next captions that wait."""
        self._captions.append(fields)
        self._encoded += len(next(iter(fields.values())))

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both tables, as `write_shard` takes them."""
        images: dict[str, Any] = {"id": np.array(self.ids, np.int64), "file_name": self.file_names}
        images |= {name: values[: len(self.ids)] for name, values in self._images.items()}
        captions: dict[str, Any] = {
            "id": np.array([number for number, _, _ in self.captions], np.int64),
            "image_row": np.array([row for _, row, _ in self.captions], np.int64),
            "text": [text for _, _, text in self.captions],
        }
        for name in self._captions[0] if self._captions else ():
            captions[name] = np.concatenate([fields[name] for fields in self._captions])
        return images, captions
