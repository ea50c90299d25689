"""Extraction beside the bare encoders: images per second."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu_parts.rows import Row, Setting, compare
from talk2dino.datasets.captions import Source
from talk2dino.datasets.captions.base import Entry

CAPTIONS = 5  # of every image
SIZE = (500, 375)  # of a picture, as in COCO


class Noise(Source):
    """Pictures of one color each, so that resizing is all that it costs to read them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def entry(self, index: int) -> Entry:
        texts = [f"a photo of number {index}, told {time} times" for time in range(CAPTIONS)]
        names = [(CAPTIONS * index + number, text) for number, text in enumerate(texts)]
        return Entry(index, f"{index}.png", tuple(names))

    def caption_count(self) -> int:
        return CAPTIONS * self.count

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", SIZE, (index % 256, 3 * index % 256, 7 * index % 256))

    def fingerprint(self) -> dict[str, Any]:
        return {"colors": self.count}


def extraction(setting: Setting) -> Iterator[Row]:
    """Vision encoder alone, with its fields on the host, and from pictures to hashed shards."""
    from talk2dino.encoders.devices import autocast
    from talk2dino.encoders.text import OpenClipTextEncoder
    from talk2dino.encoders.vision import TimmVisionEncoder
    from talk2dino.features.extraction.encoding import CaptionEncoding, ImageEncoding
    from talk2dino.features.extraction.fields import EXTRACTED
    from talk2dino.features.extraction.job import Extraction

    name, side, size = setting.choose(
        ("vit_base_patch16_dinov3.lvd1689m", 448, 32), ("test_vit", 64, 2)
    )
    count = size * setting.choose(8, 2)
    vision = TimmVisionEncoder(name, "random", side, size).to(setting.at)
    clip = setting.choose("ViT-B-16-quickgelu", "ViT-S-32-alt")
    text = OpenClipTextEncoder(clip, "random").to(setting.at)
    pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8)
    pixels = pixels.pin_memory() if setting.device == "cuda" else pixels
    source = Noise(count)
    captions = [told for index in range(count) for _, told in source.entry(index).captions]

    def forward(precision: str) -> None:
        with torch.inference_mode(), autocast(precision, setting.at):
            for _ in range(count // size):
                images = pixels.to(setting.at, non_blocking=True).float() / 255
                vision.model.forward_features((images - vision.mean) / vision.std)

    def fields(encoding: ImageEncoding) -> None:
        waiting = None  # one batch ahead, as an extraction does it
        for _ in range(count // size):
            started = encoding.start(pixels, range(size))
            if waiting is not None:
                waiting.arrays()
            waiting = started
        if waiting is not None:
            waiting.arrays()

    def both(precision: str) -> None:
        forward(precision)
        CaptionEncoding(text, ["embedding"], "float16", precision, setting.at).encode(captions)

    def shards(precision: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Extraction(
                source, vision, text, Path(folder) / "store", images_per_shard=count // 2,
                num_workers=setting.choose(4, 0), precision=precision, text_precision=precision,
            ).run()  # fmt: skip

    for precision in setting.choose(("32", "bf16", "16"), ("bf16",)):
        encoding = ImageEncoding(vision, EXTRACTED, "float16", precision)
        ways = {
            "vision encoder": partial(forward, precision),
            "vision encoder, all fields on the host": partial(fields, encoding),
            "both encoders": partial(both, precision),
            "pictures to shards": partial(shards, precision),
        }
        title = f"{name}, {precision}"
        yield from compare(title, ways, setting, "vision encoder", per=count)
