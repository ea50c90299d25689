"""Extraction: images and captions through the frozen encoders into the shards of a store.

Shard k holds the source's images k·n … (k+1)·n − 1, whichever rank writes it. So the store is the
same for any number of ranks, and a run that was stopped continues after its finished shards.
Images decode in worker processes and shards are written by a thread while the encoder runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talk2dino.datasets.captions import Source
from talk2dino.encoders.devices import check_precision
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import ConfigError
from talk2dino.features.extraction.encoding import CaptionEncoding, ImageEncoding, encode_shards
from talk2dino.features.extraction.fields import (
    EXTRACTED,
    caption_bytes,
    check_caption_fields,
    check_image_fields,
    image_bytes,
    stored_patches,
)
from talk2dino.features.store.schema import EncoderInfo, Manifest, VisionInfo, shard_name
from talk2dino.features.store.shard_writer import ShardRows
from talk2dino.features.store.writer import (
    IMAGES_PER_SHARD,
    finish_manifest,
    finished_shards,
    is_finished,
    open_for_append,
    write_rows,
)
from talk2dino.files import PARTS, in_turn, json_lines, put_known


@dataclass
class Extraction:
    """A run of feature extraction.

    Attributes:
        source: captioned images.
        vision: vision encoder on its device.
        text: text encoder, or None where the source has no captions; the store then names none.
        store: folder to fill; created if absent.
        split: first part of the shards' names.
        image_fields: what to store of an image, out of `IMAGE_CHOICES`.
        caption_fields: what to store of a caption, out of `EXTRACTED_CAPTIONS`.
        dtype: of the stored features, `float16` or `float32`.
        patches_per_image: store a random subset of so many patches of each image; None stores all.
        images_per_shard: images per shard; two shards are in memory at a time.
        num_workers: processes that decode images.
        precision: of the vision encoder's forward pass, a key of `PRECISIONS`.
        text_precision: of the text encoder's.
        compiled: use `torch.compile` for the vision encoder.
        rank: this process writes the shards k with k mod world_size = rank.
        world_size: number of processes.
        skipped: images that this run could not read, filled by `run`.
        cut: captions of this run whose end the text encoder does not see, filled by `run`.
    """

    source: Source
    vision: TimmVisionEncoder
    text: TextEncoder | None
    store: Path
    split: str = "train"
    image_fields: Sequence[str] = EXTRACTED
    caption_fields: Sequence[str] = ("embedding",)
    dtype: str = "float16"
    patches_per_image: int | None = None
    images_per_shard: int = IMAGES_PER_SHARD
    num_workers: int = 2
    precision: str = "32"
    text_precision: str = "32"
    compiled: bool = False
    rank: int = 0
    world_size: int = 1
    skipped: list[dict[str, Any]] = field(default_factory=list)
    cut: int = 0

    def __post_init__(self) -> None:
        check_image_fields(self.image_fields, self.patches_per_image)
        if self.text is not None:
            check_caption_fields(self.caption_fields, self.text)
        elif self.source.caption_count():
            raise ConfigError(
                "text=null: the source has captions; give the encoder that reads them"
            )
        check_precision(self.precision)
        check_precision(self.text_precision, "text_precision")
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"features.dtype={self.dtype!r}; choose float16 or float32")
        if self.images_per_shard < 1:
            raise ConfigError(f"images_per_shard={self.images_per_shard}; use 1 or more")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers}; use 0 or more")
        if self.patches_per_image is not None:
            stored_patches(self.vision, self.patches_per_image)

    @property
    def num_shards(self) -> int:
        """Shards of the finished store."""
        return -(-len(self.source) // self.images_per_shard)

    @property
    def num_images(self) -> int:
        """Images of this rank's shards."""
        return sum(len(self._images_of(k)) for k in self._own_shards())

    def expected_bytes(self) -> int:
        """Size of the features of the whole store; ids, names and texts come on top."""
        per_image = image_bytes(self.vision, self.image_fields, self.dtype, self.patches_per_image)
        needed = len(self.source) * per_image
        if self.text is None:
            return needed
        per_caption = caption_bytes(self.text, self.caption_fields, self.dtype)
        return needed + self.source.caption_count() * per_caption

    def run(self, advance: Callable[[int], None] = lambda images: None) -> Manifest | None:
        """Write this rank's missing shards, then the manifest if all shards are there.

        The first rank also lists what the source leaves out, in `{split}-left-out.jsonl`.

        Args:
            advance: called with numbers of images that are done: once with those of all finished
                shards (0 in a new store), then after every batch.

        Returns:
            The manifest, or None while other ranks still write.

        Raises:
            StoreError: the folder was begun with other settings.
            WriteError: it holds files of other origin under a store's names, or cannot be written.
            ConfigError: `compiled` where torch finds no compiler.
        """
        vision = self.vision.describe()
        text = None if self.text is None else self.text.describe()
        done = open_for_append(self.store, self._settings(vision, text), self.split)
        if self.source.left_out and not self.rank:
            listed = self.store / f"{self.split}-left-out.jsonl"
            put_known(listed, self.store / PARTS, json_lines(self.source.left_out))
        advance(sum(len(self._images_of(k)) for k in self._own_shards() if k in done))
        missing = [k for k in self._own_shards() if k not in done]
        if missing:
            self._write(self._encode(missing, advance))
        if len(finished_shards(self.store, self.split)) < self.num_shards:
            return None
        return finish_manifest(
            self.store,
            shards=self.num_shards,
            split=self.split,
            vision=VisionInfo(**vision),
            text=None if text is None else EncoderInfo(**text),
        )

    def _settings(self, vision: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that decides the bytes of a shard.

        They include the batch sizes: a batch of another size may sum in another order.
        """
        return {
            "source": self.source.fingerprint(),
            "vision": {k: vision[k] for k in ("name", "weights_sha256", "image_size")}
            | {"rope_in_attention": self.vision.rope_in_attention, "precision": self.precision}
            | {"batch_size": self.vision.batch_size, "compile": self.compiled}
            | {k: v for k, v in vision["spec"].items() if k == "layers"},
            "text": text
            and {k: text[k] for k in ("name", "weights_sha256")}
            | {k: v for k, v in text["spec"].items() if k in ("pooling", "max_length")}
            | {"precision": self.text_precision, "batch_size": text["spec"].get("batch_size")},
            "image_fields": list(self.image_fields),
            "caption_fields": list(self.caption_fields) if text else [],
            "dtype": self.dtype,
            "patches_per_image": self.patches_per_image,
            "images_per_shard": self.images_per_shard,
        }

    def _own_shards(self) -> range:
        return range(self.rank, self.num_shards, self.world_size)

    def _images_of(self, shard: int) -> range:
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, len(self.source)))

    def _encode(
        self, shards: Sequence[int], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, ShardRows]]:
        """The rows of `shards`, one shard after the other."""
        images = ImageEncoding(
            self.vision,
            self.image_fields,
            self.dtype,
            self.precision,
            self.patches_per_image,
            self.compiled,
        )
        captions = None
        if self.text is not None:
            captions = CaptionEncoding(
                self.text, self.caption_fields, self.dtype, self.text_precision, images.device
            )
        positions = [self._images_of(k) for k in shards]
        yield from zip(
            shards,
            encode_shards(self.source, positions, images, captions, self.num_workers, advance),
            strict=True,
        )
        self.cut += captions.cut if captions else 0

    def _write(self, shards: Iterator[tuple[int, ShardRows]]) -> None:
        """Write each shard in a thread while the next one grows; at most two are in memory."""
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as pool:
            writing: Future[None] | None = None
            for k, rows in shards:
                if writing is not None:
                    writing.result()
                writing = pool.submit(self._finish_shard, k, rows)
            if writing is not None:
                writing.result()

    def _finish_shard(self, shard: int, rows: ShardRows) -> None:
        self.skipped += rows.skipped
        with in_turn(self.store / PARTS, shard):
            if is_finished(
                self.store, shard_name(self.split, shard)
            ):  # by a rank of an earlier start
                return
            write_rows(self.store, shard, rows, self.split, self.dtype)
