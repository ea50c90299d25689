"""Extraction: images and captions through the frozen encoders into the shards of a store.

Shard k holds the source's images k·n … (k+1)·n − 1, whoever writes it and whenever. So the store is
the same for any number of ranks, and a run that was stopped continues after its finished shards.
Images decode in worker processes while the encoder runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from talk2dino.atomic import replacing
from talk2dino.encoders.attention import pool_attention
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.encoders.vision import TimmVisionEncoder, VisionFeatures
from talk2dino.errors import ConfigError
from talk2dino.features.caption_fields import caption_bytes, check_caption_fields
from talk2dino.features.schema import EncoderInfo, Manifest, VisionInfo
from talk2dino.features.sources import Entry, Source
from talk2dino.features.writer import (
    finish_manifest,
    finished_shards,
    open_for_append,
    write_shard,
)

EXTRACTED = (
    "patch_tokens",
    "self_attn_maps",
    "cls_token",
    "avg_self_attn_out",
    "disentangled_self_attn",
)
IMAGE_CHOICES = (*EXTRACTED, "second_last_out")


@dataclass(frozen=True)
class Decoded:
    """One image on its way to the encoder; `pixels` is None when it could not be read."""

    index: int
    entry: Entry
    pixels: Tensor | None  # [3, S, S] uint8 RGB
    problem: str = ""


class DecodedImages(Dataset[Decoded]):
    """Images of a source, resized (short side, bicubic) and centre-cropped to `size` pixels."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, index: int) -> Decoded:
        entry = self.source.entry(index)
        try:
            pixels = crop_square(self.source.image(index), self.size)
        except Exception as error:  # broken files make decoders raise anything
            return Decoded(index, entry, None, f"{type(error).__name__}: {error}")
        return Decoded(index, entry, pixels)


def crop_square(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to `size` (bicubic), crop the centre: [3, size, size] uint8."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(cropped.copy()).permute(2, 0, 1)


@dataclass
class Extraction:
    """A run of feature extraction.

    Attributes:
        source: captioned images.
        vision: vision encoder on its device.
        text: text encoder.
        store: folder to fill; created if absent.
        split: first part of the shards' names.
        image_fields: what to keep of an image, out of `IMAGE_CHOICES`.
        caption_fields: what to keep of a caption, out of `EXTRACTED_CAPTIONS`.
        dtype: of the stored features, `float16` or `float32`.
        images_per_shard: images per shard.
        num_workers: processes that decode images.
        autocast: makes the context of the vision encoder's forward pass.
        rank: this process writes the shards k with k mod world_size = rank.
        world_size: number of processes.
    """

    source: Source
    vision: TimmVisionEncoder
    text: TextEncoder
    store: Path
    split: str = "train"
    image_fields: Sequence[str] = EXTRACTED
    caption_fields: Sequence[str] = ("embedding",)
    dtype: str = "float16"
    images_per_shard: int = 1024
    num_workers: int = 2
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    precision: str = "32"
    rank: int = 0
    world_size: int = 1
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.image_fields:
            if name not in IMAGE_CHOICES:
                raise ConfigError(
                    f"features.image_fields: {name!r} is unknown; choose of "
                    f"{', '.join(IMAGE_CHOICES)}"
                )
        check_caption_fields(self.caption_fields, self.text)
        if self.images_per_shard < 1:
            raise ConfigError(f"images_per_shard={self.images_per_shard}; use 1 or more")

    @property
    def num_shards(self) -> int:
        """Shards of the finished store."""
        return -(-len(self.source) // self.images_per_shard)

    def expected_bytes(self) -> int:
        """Size of the features of the whole store; ids, names and texts come on top."""
        patches = (self.vision.image_size // self.vision.patch_size) ** 2
        width, heads = self.vision.embed_dim, self.vision.num_heads
        values = {
            "patch_tokens": patches * width,
            "self_attn_maps": heads * patches,
            "cls_token": width,
            "avg_self_attn_out": width,
            "disentangled_self_attn": heads * width,
            "second_last_out": width,
        }
        size = np.dtype(self.dtype).itemsize
        images = len(self.source) * size * sum(values[name] for name in self.image_fields)
        per_caption = caption_bytes(self.text, self.caption_fields, self.dtype)
        return images + self.source.caption_count() * per_caption

    def run(self, advance: Callable[[int], None] = lambda images: None) -> Manifest | None:
        """Write this rank's missing shards, then the manifest if all shards are there.

        Args:
            advance: called with the number of images that are done, finished shards included.

        Returns:
            The manifest, or None while other ranks still write.

        Raises:
            StoreError: the folder was begun with other settings, or cannot be written.
        """
        vision, text = self.vision.describe(), self.text.describe()
        done = open_for_append(self.store, self._settings(vision, text), self.split)
        mine = [k for k in range(self.num_shards) if k % self.world_size == self.rank]
        for k in mine:
            if k in done:
                advance(len(self._images_of(k)))
        self._write([k for k in mine if k not in done], advance)
        if len(finished_shards(self.store, self.split)) < self.num_shards:
            return None
        self._merge_skipped()
        return finish_manifest(
            self.store,
            shards=self.num_shards,
            split=self.split,
            vision=VisionInfo(**vision),
            text=EncoderInfo(**text),
        )

    def _settings(self, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the bytes of a shard."""
        return {
            "source": self.source.fingerprint(),
            "vision": {k: vision[k] for k in ("name", "weights_sha256", "image_size")}
            | {"rope_in_attention": self.vision.rope_in_attention, "precision": self.precision},
            "text": {k: text[k] for k in ("name", "weights_sha256")}
            | {k: v for k, v in text["spec"].items() if k in ("pooling", "max_length")},
            "image_fields": list(self.image_fields),
            "caption_fields": list(self.caption_fields),
            "dtype": self.dtype,
            "images_per_shard": self.images_per_shard,
            # A batch of another size may sum in another order: the bytes would differ.
            "batch_size": self.vision.batch_size,
        }

    def _images_of(self, shard: int) -> range:
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, len(self.source)))

    def _write(self, shards: Sequence[int], advance: Callable[[int], None]) -> None:
        rows = _Rows()
        left = {k: len(self._images_of(k)) for k in shards}
        for batch in self._batches(shards):
            shard = batch[0].index // self.images_per_shard
            self._encode([item for item in batch if item.pixels is not None], rows)
            rows.skipped += [
                {"index": item.index, "file_name": item.entry.file_name, "reason": item.problem}
                for item in batch
                if item.pixels is None
            ]
            left[shard] -= len(batch)
            if not left[shard]:
                self._finish_shard(shard, rows)
                rows = _Rows()
            advance(len(batch))

    def _batches(self, shards: Sequence[int]) -> Iterator[list[Decoded]]:
        """Batches of decoded images in order; none crosses from one shard to the next."""
        size = self.vision.batch_size
        plan = [
            list(images[start : start + size])
            for images in map(self._images_of, shards)
            for start in range(0, len(images), size)
        ]
        dataset = DecodedImages(self.source, self.vision.image_size)
        yield from DataLoader(
            dataset, batch_sampler=plan, collate_fn=list, num_workers=self.num_workers
        )

    def _encode(self, items: Sequence[Decoded], rows: _Rows) -> None:
        """Run both encoders on a batch and keep the chosen fields in memory."""
        if not items:
            return
        device = next(self.vision.parameters()).device
        pixels = torch.stack([item.pixels for item in items if item.pixels is not None])
        with torch.inference_mode(), self.autocast():
            features = self.vision(pixels.to(device, non_blocking=True).float() / 255)
        rows.add_images(items, select_fields(features, self.image_fields), self.dtype)
        texts = [text for item in items for _, text in item.entry.captions]
        rows.add_captions(encode_fields(self.text, texts, self.caption_fields), self.dtype)

    def _encode_nothing(self, rows: _Rows) -> None:
        """Give `rows` every field with its shape and no row."""
        side = self.vision.image_size
        device = next(self.vision.parameters()).device
        with torch.inference_mode(), self.autocast():
            blank = self.vision(torch.zeros(1, 3, side, side, device=device))
        fields = select_fields(blank, self.image_fields)
        rows.add_images([], {name: values[:0] for name, values in fields.items()}, self.dtype)
        captions = encode_fields(self.text, [""], self.caption_fields)
        rows.add_captions({name: values[:0] for name, values in captions.items()}, self.dtype)

    def _finish_shard(self, shard: int, rows: _Rows) -> None:
        skipped = self.store / ".parts" / f"{self.split}-{shard:05d}.skipped"
        skipped.unlink(missing_ok=True)
        if rows.skipped:
            self.skipped += rows.skipped
            with replacing(skipped) as path:
                path.write_text("".join(json.dumps(item) + "\n" for item in rows.skipped))
        if not rows.ids:  # all unreadable: the shard has the fields of the others, and no rows
            self._encode_nothing(rows)
        images, captions = rows.arrays()
        write_shard(
            self.store,
            shard,
            images,
            captions,
            split=self.split,
            dtype=self.dtype,
            skipped=len(rows.skipped),
        )

    def _merge_skipped(self) -> None:
        """One list of all unreadable images, beside the manifest."""
        lists = sorted((self.store / ".parts").glob(f"{self.split}-*.skipped"))
        if lists:
            # Two ranks may finish at once and both write it.
            with replacing(self.store / f"{self.split}-skipped.jsonl", shared=True) as path:
                path.write_text("".join(part.read_text() for part in lists))


class _Rows:
    """The rows of one shard while it grows in memory."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.file_names: list[str] = []
        self.captions: list[tuple[int, int, str]] = []  # id, image_row, text
        self.fields: dict[str, list[np.ndarray]] = {}
        self.caption_fields: dict[str, list[np.ndarray]] = {}
        self.skipped: list[dict[str, Any]] = []

    def add_images(self, items: Sequence[Decoded], fields: dict[str, Tensor], dtype: str) -> None:
        for item in items:
            row = len(self.ids)
            self.ids.append(item.entry.image_id)
            self.file_names.append(item.entry.file_name)
            self.captions += [(number, row, text) for number, text in item.entry.captions]
        for name, values in fields.items():
            self.fields.setdefault(name, []).append(values.cpu().numpy().astype(dtype))

    def add_captions(self, fields: dict[str, Tensor], dtype: str) -> None:
        for name, values in fields.items():
            array = values.numpy()
            if array.dtype.kind == "f":
                array = array.astype(dtype)
            self.caption_fields.setdefault(name, []).append(array)

    def arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        images: dict[str, Any] = {"id": np.array(self.ids), "file_name": self.file_names}
        images |= {name: np.concatenate(parts) for name, parts in self.fields.items()}
        captions: dict[str, Any] = {
            "id": np.array([number for number, _, _ in self.captions], np.int64),
            "image_row": np.array([row for _, row, _ in self.captions], np.int64),
            "text": [text for _, _, text in self.captions],
        }
        captions |= {name: np.concatenate(parts) for name, parts in self.caption_fields.items()}
        return images, captions


def select_fields(features: VisionFeatures, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the named image fields of a batch, each [B, ...] float32."""
    tokens, maps = features.patch_tokens.float(), features.self_attn_maps.float()
    make: dict[str, Callable[[], Tensor]] = {
        "patch_tokens": lambda: tokens,
        "self_attn_maps": lambda: maps,
        "cls_token": lambda: features.cls_token.float(),
        "avg_self_attn_out": lambda: pool_attention(tokens, maps, head_average=True),
        "disentangled_self_attn": lambda: pool_attention(tokens, maps),
        "second_last_out": lambda: _second_last(features),
    }
    return {name: make[name]() for name in names}


def _second_last(features: VisionFeatures) -> Tensor:
    if features.second_last_out is None:
        raise ConfigError(
            "features.image_fields: this vision encoder does not show second_last_out; leave it out"
        )
    return features.second_last_out.float()
