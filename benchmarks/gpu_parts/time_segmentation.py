"""PAMR by every way, and labels from features, beside the usual way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_parts.pamr_ways import LIBRARY, TRITON, WAYS, PAMRBy
from benchmarks.gpu_parts.rows import Row, Setting, compare, deviation
from benchmarks.pamr import scene, usual
from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.scores import class_scores, upsample
from talk2dino.segmentation.segmenter import EncodedImage, WindowFeatures
from talk2dino.segmentation.windows import resize_image, short_side_size, sliding_windows

USUAL = "the usual way"
CLASSES, FEW = (21, 171), (3, 5)
Action = Callable[[], object]


def pamr(setting: Setting) -> Iterator[Row]:
    """One window, ten iterations: weights of the picture, then all of it."""
    size, num_iter = setting.choose((448, 10), (24, 2))
    for number, classes in enumerate(setting.choose(CLASSES, FEW)):
        image, mask = (part.to(setting.at) for part in scene(size, classes))
        ways: dict[str, Action] = {USUAL: partial(usual, image, mask, num_iter)}
        weights: dict[str, Action] = {}
        want = PAMR(num_iter, compiled=False)(image, mask)
        for name in WAYS:
            try:
                refine = PAMRBy(name, num_iter)
                value = deviation(refine(image, mask), want)  # compiles
            except ModuleNotFoundError as error:
                yield Row(f"PAMR, {name}", float("nan"), "", note=f"needs {error.name}")
                continue
            yield Row(f"PAMR, {classes} classes: {name}, beside library calls", value, "deviation")
            ways[name] = partial(refine, image, mask)
            weights[name] = partial(refine.way.affinity, image[0])
        title = f"PAMR {size} px, {num_iter} iterations"
        if number == 0:
            chosen = {name: weights[name] for name in (LIBRARY, TRITON) if name in weights}
            yield from compare(f"{title}, weights alone", chosen, setting, LIBRARY)
        yield from compare(f"{title}, {classes} classes", ways, setting, USUAL)


def segmentation(setting: Setting) -> Iterator[Row]:
    """Labels of a 480x640 picture from its features; the encoder's own time beside them."""
    encoded = encoded_picture(setting)
    yield from encoder(setting, encoded)
    vision = torch.nn.Identity()
    side = setting.choose(448, 64)
    num_iter = setting.choose(10, 1)
    sizes: dict[str, Any] = {
        "window": side,
        "stride": side // 2,
        "short_side": side,
        "input_size": side,
    }
    for classes in setting.choose(CLASSES, FEW):
        width = encoded.features.patch_tokens.shape[-1]
        text = F.normalize(torch.randn(classes, width, device=setting.at), dim=-1)
        for name, refinement in (("without PAMR", None), ("with PAMR", PAMR(num_iter))):
            segmenter = Segmenter(vision, pamr=refinement, **sizes)
            ways: dict[str, Action] = {
                USUAL: partial(usual_labels, encoded, text, num_iter if refinement else 0),
                "ours": partial(segmenter.labels, encoded, text),
            }
            yield from compare(f"labels {name}, {classes} classes", ways, setting, USUAL)


def encoded_picture(setting: Setting) -> EncodedImage:
    """Random tokens, smooth over the picture so that classes have regions; ViT-B/16's width."""
    side, patches, width = setting.choose((448, 28, 768), (64, 4, 16))
    rows, columns = setting.choose((480, 640), (60, 80))
    picture, _ = scene(columns, 1)
    image = picture[0, :, :rows].to(torch.uint8).to(setting.at)
    height, long = short_side_size(rows, columns, side)
    windows = sliding_windows(height, long, side, side // 2)
    coarse = torch.randn(len(windows), width, 4, 4, device=setting.at)
    tokens = upsample(coarse, patches, patches).flatten(2).transpose(1, 2)
    maps = torch.randn(len(windows), 12, patches**2, device=setting.at)
    features = WindowFeatures(tokens, maps, (patches, patches))
    return EncodedImage(resize_image(image, height, long), windows, features, (rows, columns))


def usual_labels(encoded: EncodedImage, text: Tensor, num_iter: int) -> Tensor:
    """Every class of every window at full size, refined, averaged, resized, softmax, argmax."""
    features, (height, width) = encoded.features, encoded.image.shape[-2:]
    scores = class_scores(features.patch_tokens, text, features.grid)
    total = scores.new_zeros(len(text), height, width)
    count = scores.new_zeros(height, width)
    for window, one in zip(encoded.windows, scores, strict=True):
        crop = window.crop(encoded.image).float()[None]
        large = upsample(one[None], *crop.shape[-2:])
        if num_iter:
            large = usual(crop, one[None], num_iter)
        window.crop(total).add_(large[0])
        window.crop(count).add_(1)
    resized = F.interpolate((total / count)[None], encoded.size, mode="bilinear")
    return resized.softmax(1).argmax(1)[0]


def encoder(setting: Setting, encoded: EncodedImage) -> Iterator[Row]:
    """The windows of the picture through ViT-B/16, in every precision."""
    try:
        from talk2dino.encoders.devices import autocast
        from talk2dino.encoders.vision import TimmVisionEncoder
    except ModuleNotFoundError as error:
        yield Row("encoder", float("nan"), "", note=f"needs {error.name}")
        return
    name = setting.choose("vit_base_patch16_dinov3.lvd1689m", "test_vit")
    side = setting.choose(448, 64)
    vision = TimmVisionEncoder(name, "random", side).to(setting.at)
    segmenter = Segmenter(vision, window=side, short_side=side, stride=side // 2, input_size=side)
    crops = [window.crop(encoded.image) for window in encoded.windows]

    def encode(precision: str) -> None:
        with autocast(precision, setting.at):
            segmenter.encode_windows(crops)

    ways = {precision: partial(encode, precision) for precision in ("32", "bf16", "16")}
    yield from compare(f"encoder {name}, {len(crops)} windows", ways, setting, "32")
