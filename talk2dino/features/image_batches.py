"""Images of a source, decoded, resized and cropped in worker processes, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from talk2dino.features.pictures import middle_strip
from talk2dino.features.sources import Entry, Source


@dataclass(frozen=True)
class ImageBatch:
    """Images on their way to the encoder.

    Attributes:
        positions: of all images of the batch in the source, ascending.
        entries: B readable images.
        pixels: [B, 3, S, S] uint8 RGB.
        skipped: the unreadable ones, as dicts with index, file_name and reason.
    """

    positions: Sequence[int]
    entries: Sequence[Entry]
    pixels: Tensor
    skipped: Sequence[dict[str, Any]]

    def pin_memory(self) -> ImageBatch:
        """Called by the loader: a copy from which a GPU reads while it computes."""
        return ImageBatch(self.positions, self.entries, self.pixels.pin_memory(), self.skipped)


class ImageBatches(Dataset[ImageBatch]):
    """Batches of a source's images: short side resized to `size` pixels (bicubic), centre kept."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, positions: Sequence[int]) -> ImageBatch:
        # One tensor for the whole batch: one block of shared memory instead of many.
        pixels = torch.empty((len(positions), 3, self.size, self.size), dtype=torch.uint8)
        entries: list[Entry] = []
        skipped: list[dict[str, Any]] = []
        for index in positions:
            entry = self.source.entry(index)
            try:
                pixels[len(entries)] = crop_square(self.source.image(index), self.size)
            except Exception as error:  # broken files make decoders raise anything
                reason = f"{type(error).__name__}: {error}"
                skipped.append({"index": index, "file_name": entry.file_name, "reason": reason})
            else:
                entries.append(entry)
        return ImageBatch(positions, entries, pixels[: len(entries)], skipped)


def load_batches(
    source: Source, size: int, plan: Sequence[Sequence[int]], num_workers: int, pin_memory: bool
) -> Iterator[ImageBatch]:
    """Decode the batches of `plan`, in its order, in `num_workers` processes (0: in this one)."""
    yield from DataLoader(
        ImageBatches(source, size),
        sampler=plan,  # its items are whole batches
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def crop_square(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to `size` (bicubic), crop the centre: [3, size, size] uint8."""
    image = middle_strip(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1)
