"""Shards of a source through both encoders, one after the other, each as rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from talk2dino.features.caption_encoding import CaptionEncoding
from talk2dino.features.image_batches import ImageBatch, load_batches
from talk2dino.features.image_encoding import HostFields, ImageEncoding
from talk2dino.features.shard_rows import ShardRows
from talk2dino.features.sources import Source

_Encoded = tuple[ImageBatch, HostFields | None]


def encode_shards(
    source: Source,
    shards: Sequence[range],
    images: ImageEncoding,
    captions: CaptionEncoding,
    num_workers: int,
    advance: Callable[[int], None],
) -> Iterator[ShardRows]:
    """Encode `shards`, given as positions in the source, and hand out each one when it is complete.

    Args:
        source: captioned images.
        shards: ascending positions of each shard's images; none is empty.
        images: the vision side.
        captions: the text side.
        num_workers: processes that decode while the encoders run.
        advance: called with the number of images of every batch that is done.
    """
    size = images.vision.batch_size
    # No batch crosses from one shard to the next, so that batches do not depend on the ranks.
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
            captions.fill(rows)
            advance(len(batch.positions))
            if batch.positions[-1] == shard[-1]:
                break
        captions.fill(rows, at_least=1)
        # A shard without readable image, or without caption, has the fields of the others.
        if not rows.ids:
            rows.add_images([], images.nothing())
        if not rows.captions:
            rows.add_caption_fields(captions.nothing())
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
