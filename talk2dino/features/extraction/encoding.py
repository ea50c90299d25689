"""Images and captions of a source through both encoders, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from talk2dino.datasets.captions import Source
from talk2dino.datasets.captions.base import ImageBatch, load_batches
from talk2dino.encoders.devices import autocast
from talk2dino.encoders.text import TextEncoder, encode_fields
from talk2dino.encoders.text.base import texts_cut
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import first_line
from talk2dino.errors import ConfigError
from talk2dino.features.extraction.fields import select_fields
from talk2dino.features.store.schema import FIXED_DTYPES
from talk2dino.features.store.shard_writer import ShardRows

# Captions that are encoded together; text encoders sort them by length to pad less. Counted from
# the shard's first caption, so that a shard does not depend on the rank that writes it.
CAPTIONS_PER_CALL = 1024


class CaptionEncoding:
    """The text encoder, the fields to store of a caption, and how to compute them.

    Args:
        text: the encoder.
        names: fields to store, out of `EXTRACTED_CAPTIONS`.
        dtype: of the stored features, `float16` or `float32`.
        precision: of the forward pass, a key of `PRECISIONS`.
        device: where the encoder computes.
    """

    def __init__(
        self,
        text: TextEncoder,
        names: Sequence[str],
        dtype: str,
        precision: str,
        device: torch.device,
    ) -> None:
        self.text, self.names, self.dtype = text, names, dtype
        self.precision, self.device = precision, device
        self.cut = 0  # captions whose end the encoder did not see

    def fill(self, rows: ShardRows, at_least: int = CAPTIONS_PER_CALL) -> None:
        """Encode the next captions of `rows`, until fewer than `at_least` are left."""
        while rows.waiting() >= at_least:
            texts = rows.waiting_texts(CAPTIONS_PER_CALL)
            self.cut += len(texts_cut(self.text, texts))
            rows.add_caption_fields(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Fields of at least one text, each [m, ...] in stored types."""
        with torch.inference_mode(), autocast(self.precision, self.device):
            fields = encode_fields(self.text, texts, self.names)
        with np.errstate(over="ignore"):  # the writer reports it, with the row
            return {name: self._stored(name, values.numpy()) for name, values in fields.items()}

    def empty(self) -> dict[str, NDArray[Any]]:
        """Every field with its shape and no rows."""
        return {name: values[:0] for name, values in self.encode([""]).items()}

    def _stored(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        return values if name in FIXED_DTYPES else values.astype(self.dtype)


@dataclass(frozen=True)
class HostFields:
    """Fields of a batch on the host; complete when the event `ready` has been reached."""

    tensors: dict[str, Tensor]
    ready: torch.cuda.Event | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Wait for the copies; each field [B, ...]."""
        if self.ready is not None:
            self.ready.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


class ImageEncoding:
    """The vision encoder, the fields to store of an image, and how to compute them.

    Args:
        vision: the encoder on its device.
        names: fields to store, out of `IMAGE_CHOICES`.
        dtype: of the stored features, `float16` or `float32`; the device converts, so that half as
            much travels to the host.
        precision: of the forward pass, a key of `PRECISIONS`.
        patches_per_image: number of patches to store of each image; None stores all.
        compiled: use `torch.compile`; every batch is then padded to the encoder's batch size.

    Raises:
        ConfigError: `compiled` where torch finds no compiler.
    """

    def __init__(
        self,
        vision: TimmVisionEncoder,
        names: Sequence[str],
        dtype: str,
        precision: str = "32",
        patches_per_image: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.vision, self.names, self.precision = vision, names, precision
        self.dtype = {"float16": torch.float16, "float32": torch.float32}[dtype]
        self.patches_per_image, self.compiled = patches_per_image, compiled
        self.device: torch.device = next(vision.parameters()).device
        if compiled:
            self._compile()

    def start(self, pixels: Tensor, image_ids: Sequence[int]) -> HostFields:
        """Encode [B, 3, S, S] uint8 images; a GPU may still be computing when this returns."""
        count = len(pixels)
        if self.compiled and count < self.vision.batch_size:  # every new size would compile again
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self.vision.batch_size - count))
            image_ids = [*image_ids, *[0] * (self.vision.batch_size - count)]
        with torch.inference_mode():
            images = pixels.to(self.device, non_blocking=True).float().div_(255)
            with autocast(self.precision, self.device):
                features = self.vision(images)
            fields = select_fields(features, self.names, image_ids, self.patches_per_image)
            # Copies from CUDA are asynchronous; other devices have no event to wait for.
            host = {
                name: self._stored(values[:count]).to("cpu", non_blocking=images.is_cuda)
                for name, values in fields.items()
            }
        if not images.is_cuda:
            return HostFields(host)
        return HostFields(host, torch.cuda.current_stream(self.device).record_event())

    def empty(self) -> dict[str, NDArray[Any]]:
        """Every field with its shape and no rows."""
        side = self.vision.image_size
        blank = self.start(torch.zeros(1, 3, side, side, dtype=torch.uint8), [0])
        return {name: values[:0] for name, values in blank.arrays().items()}

    def _stored(self, values: Tensor) -> Tensor:
        return values.to(self.dtype) if values.is_floating_point() else values

    def _compile(self) -> None:
        """Compile now, so that a missing compiler is reported before anything is decoded."""
        self.vision.compile_blocks()
        try:
            self.empty()
        except Exception as error:  # torch wraps whatever its compiler said
            raise ConfigError(
                f"compile=true: torch cannot compile the encoder here ({first_line(error)}); "
                "install a C++ compiler or use compile=false"
            ) from error


_Encoded = tuple[ImageBatch, HostFields | None]


def encode_shards(
    source: Source,
    shards: Sequence[range],
    images: ImageEncoding,
    captions: CaptionEncoding | None,
    num_workers: int,
    advance: Callable[[int], None],
) -> Iterator[ShardRows]:
    """Encode `shards`, given as positions in the source, and hand out each one when it is complete.

    Args:
        source: captioned images.
        shards: ascending positions of each shard's images; none is empty.
        images: the vision side.
        captions: the text side; None for images without captions.
        num_workers: processes that decode while the encoders run.
        advance: called with the number of images of every batch that is done.
    """
    size = images.vision.batch_size
    # No batch spans two shards, so that batches do not depend on the number of ranks.
    plan = [shard[at : at + size] for shard in shards for at in range(0, len(shard), size)]
    on_gpu = images.device.type != "cpu"
    batches = load_batches(source, images.vision.image_size, plan, num_workers, pin_memory=on_gpu)
    encoded = _one_ahead(_start(batches, images))
    for shard in shards:
        rows = ShardRows(len(shard))
        for batch, fields in encoded:
            if fields is not None:
                rows.add_images(batch.entries, fields.arrays())
            rows.skipped += batch.skipped
            if captions is not None:
                captions.fill(rows)
            advance(len(batch.positions))
            if batch.positions[-1] == shard[-1]:
                break
        if captions is not None:
            captions.fill(rows, at_least=1)
        # A shard without readable image, or without caption, still has the fields of the others.
        if not rows.ids:
            rows.add_images([], images.empty())
        if captions is not None and not rows.captions:
            rows.add_caption_fields(captions.empty())
        yield rows


def _start(batches: Iterator[ImageBatch], images: ImageEncoding) -> Iterator[_Encoded]:
    for batch in batches:
        ids = [entry.image_id for entry in batch.entries]
        yield batch, images.start(batch.pixels, ids) if ids else None


def _one_ahead(items: Iterator[_Encoded]) -> Iterator[_Encoded]:
    """Ask for the next item before handing out the last, so that a GPU always has work."""
    last: list[_Encoded] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
