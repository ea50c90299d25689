"""Encoders and projections without weights, whose outputs a test can foresee; models with random
ones, in the layout of the original's repositories and put together by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from talk2dino import Talk2DINO
from talk2dino.alignment.projection import Projection, ProjectionLayer
from talk2dino.encoders.vision import TimmVisionEncoder
from tests.helpers.shared import once

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
RELEASED = ("vit_base_patch14_reg4_dinov2.lvd142m", "ViT-B-16-quickgelu")
IMAGENET = {"mean": MEAN.tolist(), "std": STD.tolist()}
default_cfgs = {
    "tiny_reg4_dinov2": dict(IMAGENET),
    "tiny_dinov3": dict(IMAGENET),
    "shallow_dinov2": dict(IMAGENET),
}  # timm looks here
TINY_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
SMALL_CLIP = "small-clip"  # C = W = 256, 4 heads, L = 77; of the smallest that open_clip has
open_clip.factory._MODEL_CONFIGS[SMALL_CLIP] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": 2,
    },
}


class HashText:
    """A text encoder without weights: equal texts get equal vectors [8]."""

    embed_dim, templates, name = 8, "plain", "hash"

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size

    def to(self, device: torch.device) -> HashText:
        return self

    def encode(self, texts: Sequence[str]) -> Tensor:
        rows = [np.frombuffer(sha256(text.encode()).digest()[:8], np.uint8) for text in texts]
        values = np.stack(rows).astype(np.float32) / 255 if rows else np.empty((0, 8), np.float32)
        return torch.from_numpy(values)

    def describe(self) -> dict[str, Any]:
        return {"name": "hash", "weights_sha256": "0", "embed_dim": 8, "spec": {"_target_": "x"}}


@dataclass
class Features:
    """What a vision encoder returns, as far as a segmenter reads it."""

    patch_tokens: Tensor
    self_attn_maps: Tensor
    cls_token: Tensor
    grid: tuple[int, int]


class FixedEncoder(nn.Module):
    """Gives the same features for every picture and remembers what it was shown."""

    patch_size = 14
    tokens: Tensor
    maps: Tensor

    def __init__(self, tokens: Tensor, maps: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.register_buffer("maps", maps)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Features:
        self.seen.append(images)
        side = int(self.tokens.shape[1] ** 0.5)
        tokens, maps = (part.expand(len(images), -1, -1) for part in (self.tokens, self.maps))
        return Features(tokens, maps, tokens[:, 0], (side, side))


class MeanColorEncoder(nn.Module):
    """Patch tokens are the mean colors of the patches; two heads look at red and blue."""

    patch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Features:
        self.batches.append(len(images))
        pooled = F.avg_pool2d(images, self.patch_size) - 0.5
        tokens = pooled.flatten(2).transpose(1, 2)
        maps = 3 * tokens.transpose(1, 2)[:, ::2]
        return Features(tokens, maps, tokens.mean(1), (pooled.shape[2], pooled.shape[3]))


class NamedColors(Projection):
    """ψ that puts `a NAME` where `MeanColorEncoder` puts pictures of that class's color."""

    def __init__(self, names: list[str], vectors: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.known, self.vectors = HashText().encode([f"a {n}" for n in names]), vectors

    def project_text(self, text: Tensor) -> Tensor:
        nearest = torch.cdist(text, self.known.to(text)).argmin(dim=-1)
        return self.vectors.to(text)[nearest]


def directions(count: int) -> Tensor:
    """[count, 3] unit vectors, spread over the sphere."""
    place = torch.arange(count) + 0.5
    height, turn = 1 - 2 * place / count, place * np.pi * (1 + 5**0.5)
    ring = (1 - height**2).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), height], dim=1).float()


@register_model
def tiny_reg4_dinov2(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv2 with registers in small: positions for patches alone, a 4 x 4 grid of them."""
    shape = {"patch_size": 14, "img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
    more = {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
    return build_model_with_cfg(
        VisionTransformer, "tiny_reg4_dinov2", pretrained, **shape | more | kwargs
    )


@register_model
def shallow_dinov2(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv2 ViT-S/14 with two blocks: as wide, and quickly translated."""
    shape = {"patch_size": 14, "img_size": 56, "embed_dim": 384, "depth": 2, "num_heads": 6}
    more = {"init_values": 1.0}
    return build_model_with_cfg(
        VisionTransformer, "shallow_dinov2", pretrained, **shape | more | kwargs
    )


@register_model
def tiny_dinov3(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv3 in small: rotary positions, no biases of query, key and value."""
    shape = {"patch_size": 16, "img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}
    more = {
        "init_values": 1.0,
        "qkv_bias": False,
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_type": "dinov3",
        "num_reg_tokens": 4,
        "use_fc_norm": False,
        "dynamic_img_size": True,
    }
    return build_model_with_cfg(Eva, "tiny_dinov3", pretrained, **shape | more | kwargs)


class ByHand:
    """timm's backbone, open_clip's CLIP and ψ, with weights that half precision holds exactly.

    Args:
        vision: timm's name.
        clip: open_clip's name.
    """

    def __init__(self, vision: str, clip: str) -> None:
        torch.manual_seed(0)
        self.vision = timm.create_model(vision, num_classes=0, dynamic_img_size=True).eval()
        self.clip = open_clip.create_model(clip).eval()
        self.tokenizer = open_clip.get_tokenizer(clip)
        width, out = self.clip.text_projection.shape[1], self.vision.embed_dim
        self.psi = nn.Sequential(nn.Linear(width, out), nn.Tanh(), nn.Linear(out, out))
        for module in (self.vision, self.clip, self.psi):
            for name, value in module.named_parameters():
                around = (
                    1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
                )
                value.data = (around + 0.05 * torch.randn_like(value)).half().float()
        self.position = (0.05 * torch.randn(1, 1, out)).half().float()  # of the CLS token

    def tensors(self) -> dict[str, Tensor]:
        """The file of weights."""
        found = {
            f"clip_model.{k}": v for k, v in self.clip.state_dict().items() if k != "attn_mask"
        }
        for layer, name in ((self.psi[0], "linear_layer"), (self.psi[2], "hidden_layers.0")):
            found |= {f"proj.{name}.{k}": v for k, v in layer.state_dict().items()}
        found |= {"logit_scale": torch.tensor(2.6592), "pamr.aff_x.kernel": torch.ones(1, 8, 3, 3)}
        state = dict(self.vision.state_dict())
        if "pos_embed" in state:  # DINOv2; the CLS token's position is a row of its own there
            state["register_tokens"] = state.pop("reg_token")
            state["pos_embed"] = torch.cat([self.position, state["pos_embed"]], dim=1)
            state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
        return found | {f"model.{name}": value for name, value in state.items()}

    @torch.no_grad()
    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens `[B, P, D]` and CLS→patch logits `[B, H, P]` of pixels in 0..1."""
        model, seen = self.vision, {}
        cls = model.cls_token.data
        if model.pos_embed is not None:
            model.cls_token.data = cls + self.position
        hook = model.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, o: seen.update(qkv=o))
        normalized = (pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
        tokens = model.forward_features(normalized)[:, 5:]
        hook.remove()
        model.cls_token.data = cls
        batch, count, _ = seen["qkv"].shape
        heads = model.blocks[-1].attn.num_heads
        query, key, _ = seen["qkv"].reshape(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        logits = query[:, :, :1] @ key[:, :, 5:].transpose(-1, -2) * query.shape[-1] ** -0.5
        return tokens, logits[:, :, 0]

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """ψ of CLIP's embeddings, `[N, D]`."""
        out: Tensor = self.psi(self.clip.encode_text(self.tokenizer(list(texts))))
        return out

    @torch.no_grad()
    def classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit rows: sentences of a class are averaged before ψ."""
        rows = [
            self.clip.encode_text(self.tokenizer([t.format(n) for t in templates])) for n in names
        ]
        return F.normalize(self.psi(torch.stack([row.mean(0) for row in rows])), dim=-1)


def write_repository(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """`config.json`, `model.safetensors` or its shards and index, and code that must never run."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["Talk2DINO"],
        "clip_model_name": "ViT-B/16",
        "proj_model": "ProjectionLayer",
        "proj_class": "vitb_mlp_infonce",
        "use_avg_text_token": False,
        "with_bg_clean": False,
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    for name in ("modeling_talk2dino.py", "configuration_talk2dino.py"):
        (folder / name).write_text("raise SystemExit('code of a repository was run')\n")
    stored = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(stored.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Talk2DINO ViT-B as it is on the Hub, with random weights in half precision.

    Of CLIP's image side, which nothing reads, it holds one tensor.
    """
    config = {
        "model_name": "dinov2_vitb14_reg",
        "resize_dim": 518,
        "proj_name": "vitb_mlp_infonce",
        "keep_cls": False,
        "keep_end_seq": False,
        "avg_self_attn_token": False,
        "disentangled_self_attn_token": True,
        "unfreeze_last_text_layer": False,
    }

    def make(folder: Path) -> None:
        unread = ("clip_model.visual.transformer", "clip_model.visual.conv1")
        tensors = ByHand(*RELEASED).tensors()
        left = {name: value for name, value in tensors.items() if not name.startswith(unread)}
        write_repository(folder, left, config, torch.float16)

    return once(tmp_path_factory, "released", make)


def picture(size: int) -> Image.Image:
    """A square picture of noise."""
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hash_model() -> Talk2DINO:
    """A random ViT of width 64, the hash text encoder and a random ψ between them."""
    torch.manual_seed(0)
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    return Talk2DINO(vision, HashText(), ProjectionLayer(8, vision.embed_dim))


def noise_pixels() -> torch.Tensor:
    """A picture, `[3, 40, 64]` uint8."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 40, 64), generator=random, dtype=torch.uint8)
