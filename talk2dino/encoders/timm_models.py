"""Building timm vision transformers, and what to know of one before using it."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from talk2dino.encoders.bundled import dinov2_vits14_weights
from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.weights import first_line, load_strictly, quiet, read_state_dict, seeded
from talk2dino.errors import EncoderError

BUNDLED = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class Anatomy:
    """Facts about a model, read from the model itself.

    Attributes:
        patch_size: pixels.
        num_prefix_tokens: CLS and register tokens before the patches.
        has_cls: whether token 0 is a CLS token.
        embed_dim: width D of a patch token.
        num_heads: H of the last block.
        fixed_size: whether position embeddings fit one image size only.
    """

    patch_size: int
    num_prefix_tokens: int
    has_cls: bool
    embed_dim: int
    num_heads: int
    fixed_size: bool


def create_model(name: str, weights: str, image_size: int) -> tuple[Any, bool]:
    """Build a timm model and fill it from where `weights` says.

    Args:
        name: timm model name.
        weights: `hub`, `bundled`, `random`, or a local file in timm's or the publisher's naming.
        image_size: side of the input in pixels, for families with a fixed position grid.

    Returns:
        The model, and whether its image size is fixed.

    Raises:
        EncoderError: unknown model, or weights that are not available or belong to another model.
    """
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
        with seeded(), quiet():
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
        _load_file(model, Path(weights).expanduser(), name)
    return model, fixed


def _instantiate(name: str, pretrained: bool, image_size: int) -> tuple[Any, bool]:
    """Build with position embeddings that follow the image if the family can, else fixed ones."""
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


def _load_file(model: nn.Module, path: Path, name: str) -> None:
    """Load a local checkpoint through timm's own renaming for the model's family."""
    state: dict[str, Tensor] = read_state_dict(path, "vision.weights")
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            state = rename(state, model)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as e:
            raise EncoderError(
                f"vision.weights={str(path)!r}: these weights belong to another model than "
                f"{name} ({type(e).__name__}: {first_line(e)})"
            ) from e
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ""
    load_strictly(model, state, "vision.weights", str(path), ignore=str(classifier))


def examine(model: Any, name: str, fixed_size: bool) -> Anatomy:
    """Read prefix tokens, heads, widths and patch size from a model, never from its name.

    Raises:
        EncoderError: not a vision transformer with readable attention in its last block.
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
    return Anatomy(
        patch_size=int(rows),
        num_prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        has_cls=getattr(model, "cls_token", None) is not None,
        embed_dim=int(model.embed_dim),
        num_heads=int(attention.num_heads),
        fixed_size=fixed_size,
    )


def _unsupported(name: str, reason: str) -> EncoderError:
    return EncoderError(
        f"vision.name={name}: {reason}; choose a vision transformer such as "
        "vit_base_patch14_reg4_dinov2.lvd142m"
    )
