"""What all projections share: the interface that training and checkpoints use, and argument checks.

Every projection has two sides, so that training code need not know which side learns:
`project_text` for captions and `project_visual` for image features. `forward` is the learned side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from talk2dino.errors import ConfigError

Activation = Literal["tanh", "relu", "sigmoid"]

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


class Projection(nn.Module):
    """What training, evaluation and checkpoints ask of a projection.

    Attributes:
        text_dim: width C of the text features.
        vision_dim: width D of the visual features.
        text_fields: caption fields that `project_text` takes, in order:
            `projection.project_text(*(batch[name] for name in projection.text_fields))`.
        pooled_fields: image fields that `pool_visual` takes, in order; empty if the projection has
            no pooling of its own.
        projects_visual: whether `project_visual` does anything.
    """

    text_fields: ClassVar[tuple[str, ...]] = ("embedding",)
    projects_visual: ClassVar[bool] = False
    text_dim: int
    vision_dim: int

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments as plain values (JSON)."""
        raise NotImplementedError

    @property
    def pooled_fields(self) -> tuple[str, ...]:
        """See the class."""
        return ()

    def embed_text(self, text: Tensor) -> Tensor:
        """First stage of the text side: `text_fields` to one embedding, `[..., C]`.

        Prompts of one class are averaged between the two stages.
        """
        return text

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """Second stage, `[..., C]`: what `project_text` does behind `embed_text`."""
        return self.project_text(embedding)

    def pool_visual(
        self, patch_tokens: Tensor, self_attn_maps: Tensor, cls_token: Tensor | None = None
    ) -> Tensor:
        """The image as one vector `[B, D]`, pooled with learned weights (see `pooled_fields`)."""
        raise NotImplementedError

    def project_text(self, text: Tensor) -> Tensor:
        """Text features `[..., C]` in the space where similarities are computed."""
        return text

    def project_visual(self, visual: Tensor) -> Tensor:
        """Visual features `[..., D]` in the space where similarities are computed."""
        return visual


class VisualSide(nn.Module):
    """`project_visual` as a module, which moves and saves with whatever holds it."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, visual: Tensor) -> Tensor:
        """`[..., D]` to the space where similarities are computed."""
        return self.projection.project_visual(visual)


def visual_side(projection: Projection) -> VisualSide | None:
    """The image side of a projection as a module; None where it changes nothing."""
    return VisualSide(projection) if projection.projects_visual else None


def check_width(x: Tensor, width: int, what: str, key: str) -> None:
    """Raise a ConfigError that names `key` when the last dimension of `x` is not `width`."""
    if x.shape[-1] != width:
        raise ConfigError(
            f"{key} is {width} but the {what} have shape {tuple(x.shape)}: "
            f"set {key}={x.shape[-1]} or use the encoder the projection was made for"
        )


def activate(name: Activation | None, x: Tensor) -> Tensor:
    """Apply an activation by name; None is the identity."""
    return x if name is None else _ACTIVATIONS[name](x)


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError that names `key` unless the value is one of the choices or None."""
    if value is not None and value not in choices:
        raise ConfigError(f"{key} is {value!r}: choose one of {', '.join(choices)} or null")


def original_width(config: Mapping[str, Any], key: str) -> int:
    """A width from the `model` section of an original config file."""
    if not isinstance(config.get(key), int):
        raise ConfigError(f"original config: {key} is {config.get(key)!r}: give a whole number")
    return int(config[key])


def original_activation(config: Mapping[str, Any]) -> Activation | None:
    """The activation's name from the `model` section of an original config file."""
    act: Activation | None = config.get("act")
    check_choice("original config: act", act, get_args(Activation))
    return act
