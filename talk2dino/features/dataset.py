"""Whole batches from the store: one gather per field instead of one read per sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from talk2dino.errors import StoreError
from talk2dino.features.finite import all_finite, nonfinite_rows
from talk2dino.features.store import FeatureStore, Table

Batch = dict[str, Tensor | list[str]]


class CaptionBatches(Dataset[Batch]):
    """Batches of captions with their images' features, by caption rows.

    `StoreLoader` iterates over them. Pickles into workers; shards open there.

    Args:
        store: the features.
        image_fields: fields of `store.images` to give, e.g. `("disentangled_self_attn",)`.
        caption_fields: fields of `store.captions` to give, e.g. `("embedding",)`.

    Raises StoreError for a field that is not stored, or whose name both tables would use.
    """

    def __init__(
        self, store: FeatureStore, image_fields: Sequence[str], caption_fields: Sequence[str]
    ) -> None:
        store.require(images=image_fields, captions=(*caption_fields, "id", "image_row"))
        taken = {"caption_row", "caption_id", "image_id", "image_row", "image_place"}
        for name in (*image_fields, *caption_fields):
            if name in taken:
                raise StoreError(f"field {name!r} is asked for twice or always given; leave it out")
            taken.add(name)
        self.store = store
        self.image_fields, self.caption_fields = tuple(image_fields), tuple(caption_fields)
        self._sound: dict[tuple[str, str], NDArray[np.bool_]] = {}

    @cached_property
    def image_row(self) -> NDArray[np.int64]:
        """Image row of every caption, [captions] int64: what the sampler needs."""
        rows: NDArray[np.int64] = self.store.captions["image_row"][:]
        return rows

    @cached_property
    def _caption_id(self) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = self.store.captions["id"][:]
        return ids

    @cached_property
    def _image_id(self) -> NDArray[np.int64]:
        ids: NDArray[np.int64] = self.store.images["id"][:]
        return ids

    def __len__(self) -> int:
        """Number of captions (an item is a batch of any of them)."""
        return len(self.store.captions)

    def __getitem__(self, rows: NDArray[np.int64] | Sequence[int]) -> Batch:
        """The batch of caption `rows` [B], in that order.

        Returns `caption_row`, `caption_id`, `image_row`, `image_id` int64 [B], and every asked
        caption field [B, ...] in its stored dtype; texts as a list. Image fields hold every image
        of the batch once, [U, ...]: where U = B they stand in the captions' order, and otherwise
        `image_place` int64 [B] tells which of them each caption belongs to (`inputs.per_caption`).
        Raises StoreError if a row that is read for the first time holds NaN or infinity.
        """
        caption_row = np.asarray(rows, dtype=np.int64)  # [B]
        image_row = self.image_row[caption_row]
        batch: Batch = {
            "caption_row": torch.from_numpy(caption_row),
            "caption_id": torch.from_numpy(self._caption_id[caption_row]),
            "image_row": torch.from_numpy(image_row),
            "image_id": torch.from_numpy(self._image_id[image_row]),
        }
        for name in self.caption_fields:
            batch[name] = _to_torch(self._read(self.store.captions, name, caption_row))
        images, place = image_row, np.arange(len(image_row))
        if not (image_row[1:] > image_row[:-1]).all():  # an image may occur twice
            different, inverse = np.unique(image_row, return_inverse=True)  # [U], [B]
            if len(different) < len(image_row):
                images, place = different, inverse
        batch["image_place"] = torch.from_numpy(place)
        for name in self.image_fields:
            batch[name] = _to_torch(self._read(self.store.images, name, images))
        return batch

    def will_need(self, first: int, last: int) -> None:
        """Have the system read images `first` … `last` - 1 ahead; returns at once."""
        for name in self.image_fields:
            self.store.images[name].will_need(first, last)

    def forget_checks(self) -> None:
        """Look for NaN and infinity again in every row that is read."""
        self._sound.clear()

    def _read(self, table: Table, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of one field; features are checked when a process reads them for the first time."""
        field = table[name]
        values: NDArray[Any] = field[rows]
        if values.dtype.kind != "f":
            return values
        sound = self._sound.get((table.name, name))
        if sound is None:
            sound = self._sound[table.name, name] = np.zeros(len(field), dtype=np.bool_)
        if not sound[rows].all():
            if not all_finite(values):
                bad = int(rows[nonfinite_rows(values)[0]])
                raise StoreError(
                    f"{self.store.path}: {table.name}/{name} row {bad} holds NaN or infinity; "
                    "verify the store and extract again"
                )
            sound[rows] = True
        return values

    def __getstate__(self) -> dict[str, Any]:
        cached = ("image_row", "_caption_id", "_image_id")  # cheaper to read than to pickle
        return {k: v for k, v in self.__dict__.items() if k not in cached} | {"_sound": {}}


def _to_torch(values: NDArray[Any]) -> Tensor | list[str]:
    return values.tolist() if values.dtype == object else torch.from_numpy(values)
