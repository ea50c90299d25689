"""What `make.py` and `tests/project/test_compatibility.py` share: tiny encoders, a seeded picture.

The encoders' weights are not part of the folder. They are drawn from NumPy's legacy generator,
whose stream is frozen, as whole numbers divided by powers of two, so that every machine and every
version of torch gets the same bits. Evaluations and stores remember the digests of these weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2, prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
CLIP = "tiny-clip"  # C = W = 16, L = 16; its shape stands in encoders/tiny-clip.json
VISION = "test_vit"  # timm's smallest: D = 64, H = 2, patches of 16 pixels


def write_encoders(folder: Path) -> None:
    """Write `encoders/vision.safetensors` and `encoders/clip.safetensors`; make the CLIP known."""
    import open_clip
    import timm

    open_clip.add_model_config(HERE / "encoders" / f"{CLIP}.json")
    vision = timm.create_model(VISION, num_classes=0, dynamic_img_size=True)
    clip = open_clip.create_model(CLIP, force_custom_text=True)
    for name, model in (("vision", vision), ("clip", clip)):
        save_file(filled(model.state_dict()), folder / "encoders" / f"{name}.safetensors")


def write_bert(folder: Path) -> None:
    """Write `encoders/bert/model.safetensors`."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(HERE / "encoders" / "bert"))
    file = folder / "encoders" / "bert" / "model.safetensors"
    save_file(filled(model.state_dict()), file, metadata={"format": "pt"})


def filled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same names and shapes that depend on nothing but these."""
    return {name: _drawn(name, tensor) for name, tensor in state.items()}


def _drawn(name: str, like: Tensor) -> Tensor:
    """Matrices uniform with a variance near 1 / fan in; norms and gains 1, biases 0."""
    if like.ndim < 2 or not like.is_floating_point():
        return torch.zeros_like(like) if name.endswith("bias") else torch.ones_like(like)
    scale = 2.0 ** round(log2((3 / prod(like.shape[1:])) ** 0.5))
    whole = np.random.RandomState(crc32(name.encode())).randint(-(2**12), 2**12, like.shape)
    return torch.from_numpy(whole.astype(np.float32) / np.float32(2**12) * np.float32(scale))


def picture(seed: int, size: tuple[int, int] = (64, 80)) -> Image.Image:
    """Flat blocks of 16 pixels in seeded colors."""
    colors = np.random.RandomState(seed).randint(0, 256, (size[0] // 16, size[1] // 16, 3))
    return Image.fromarray(colors.repeat(16, 0).repeat(16, 1).astype(np.uint8))


def segmented(model: Any) -> dict[str, NDArray[Any]]:
    """What a `Talk2DINO` makes of texts and a picture."""
    image = picture(9)
    found = model.segment(
        image, ["red", ["blue", "azure"], "large square"], background=0.5, short_side=64
    )
    return {
        "text": model.encode_text(["a red square", "the blue picture"]).numpy(),
        "tokens": model.encode_image(image)[:, ::4].numpy(),
        "scores": found.scores[:, ::4, ::4].numpy(),
        "classes": np.array(found.classes),
    }


def batches(data: Any) -> dict[str, NDArray[Any]]:
    """The caption rows of two epochs of a `FeatureDataModule`, and the first batch's features."""
    loader = data.train_dataloader()
    found = {}
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        rows = [batch["caption_row"].numpy() for batch in loader]
        found[f"epoch{epoch}"] = np.concatenate(rows)
    loader.sampler.set_epoch(0)
    batch = next(iter(loader))
    for name in ("image_row", "image_id", "embedding", "patch_tokens"):
        found[name] = batch[name].numpy()
    found["val"] = np.concatenate([b["caption_row"].numpy() for b in data.val_dataloader()])
    return found
