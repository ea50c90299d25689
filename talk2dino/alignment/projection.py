"""Projections between the text encoder's space and the vision encoder's.

| class | text side | image side |
| --- | --- | --- |
| `ProjectionLayer`: ψ, Talk2DINO's | C to D | unchanged |
| `DoubleMLP` | C to D | D to D |
| `VisualProjectionLayer` | unchanged | D to C |

Classes and parameter names are those of the original's `src/model.py`, so its weights load.
`clip_last_layer.py` has ψ with the end of CLIP's text encoder before it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from talk2dino.errors import ConfigError

Activation = Literal["tanh", "relu", "sigmoid"]
HeadWeighting = Literal["static", "conditioned"]

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


class Projection(nn.Module):
    """What training, evaluation and checkpoints ask of a projection.

    Attributes:
        text_dim: width C of the text features.
        vision_dim: width D of the visual features.
        text_fields: caption fields that `project_text` takes, in order:
            `projection.project_text(*(batch[name] for name in projection.text_fields))`.
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
        """Image fields that `pool_visual` takes, in order; empty without a pooling of its own."""
        return ()

    def forward(self, *features: Tensor) -> Tensor:
        """The same as `project_text`."""
        return self.project_text(*features)

    def embed_text(self, text: Tensor) -> Tensor:
        """First stage of the text side: `text_fields` to one embedding, `[..., C]`.

        Prompts of one class are averaged between the two stages.
        """
        return text

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """Second stage, `[..., C]`: what `project_text` does after `embed_text`."""
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


class ProjectionLayer(Projection):
    """ψ of Talk2DINO (eq. 1): text features to the vision encoder's space.

    `hidden_layers=1` is the published model, ψ(t) = W_b tanh(W_a t + b_a) + b_b. The activation
    stands between linear layers only, so with `hidden_layers=0` it is never applied
    (original `src/model.py ProjectionLayer`).

    Args:
        text_dim: width C of the text features.
        vision_dim: width D of the visual features.
        hidden_layers: number of D to D layers after the first; True is 1, False is 0.
        activation: "tanh", "relu", "sigmoid" or None.
        head_weighting: how `pool_visual` weighs the attention heads: "static" learns one weight per
            head, "conditioned" predicts the weights from the CLS token, None has no weights.
        num_heads: number of attention heads H; needed with `head_weighting`.

    Raises:
        ConfigError: an option has an unknown value, or `num_heads` is missing.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import ProjectionLayer
        >>> psi = ProjectionLayer(text_dim=512, vision_dim=768)
        >>> psi(torch.zeros(4, 512)).shape
        torch.Size([4, 768])
        >>> sum(parameter.numel() for parameter in psi.parameters())  # 513 x 768 + 769 x 768
        984576
        >>> [name for name in psi.state_dict() if name.endswith("weight")]
        ['linear_layer.weight', 'hidden_layers.0.weight']
    """

    def __init__(
        self,
        text_dim: int,
        vision_dim: int,
        hidden_layers: int | bool = 1,
        activation: Activation | None = "tanh",
        head_weighting: HeadWeighting | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("projection.activation", activation, get_args(Activation))
        check_choice("projection.head_weighting", head_weighting, get_args(HeadWeighting))
        if int(hidden_layers) < 0:
            raise ConfigError(f"projection.hidden_layers is {hidden_layers}: give 0 or more")
        if head_weighting and not num_heads:
            raise ConfigError(
                f"projection.num_heads is {num_heads}: head_weighting={head_weighting} needs the "
                "vision encoder's number of attention heads"
            )
        if head_weighting == "conditioned" and activation is None:
            raise ConfigError(
                "projection.activation is null: head_weighting=conditioned needs tanh, relu or "
                "sigmoid"
            )
        self.text_dim, self.vision_dim = text_dim, vision_dim
        self.activation, self.head_weighting, self.num_heads = activation, head_weighting, num_heads
        self.linear_layer = nn.Linear(text_dim, vision_dim)
        self.hidden_layers = _square_layers(vision_dim, int(hidden_layers))
        if head_weighting == "static":
            # Zeros are equal weights: training starts from the plain mean over heads.
            self.attn_weights = nn.Parameter(torch.zeros(num_heads or 0))
        elif head_weighting == "conditioned":
            self.weight_layer1 = nn.Linear(vision_dim, vision_dim)
            self.weight_layer2 = nn.Linear(vision_dim, num_heads or 0)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments as plain values (JSON)."""
        return {
            "text_dim": self.text_dim,
            "vision_dim": self.vision_dim,
            "hidden_layers": len(self.hidden_layers),
            "activation": self.activation,
            "head_weighting": self.head_weighting,
            "num_heads": self.num_heads,
        }

    def project_text(self, text: Tensor) -> Tensor:
        """ψ(text): `[..., C]` of any float dtype to `[..., D]` in the parameters' dtype.

        Raises:
            ConfigError: the last dimension is not `text_dim`.
        """
        check_width(text, self.text_dim, "text features", "projection.text_dim")
        return self._mlp(text, self.linear_layer, self.hidden_layers)

    @property
    def pooled_fields(self) -> tuple[str, ...]:
        """Patch tokens and attention, and for "conditioned" the CLS token."""
        dense = ("patch_tokens", "self_attn_maps")
        return {"static": dense, "conditioned": (*dense, "cls_token")}.get(
            self.head_weighting or "", ()
        )

    def pool_visual(
        self, patch_tokens: Tensor, self_attn_maps: Tensor, cls_token: Tensor | None = None
    ) -> Tensor:
        """Pool patches by a weighted mean of the heads' attention (original `get_visual_embed`).

        Args:
            patch_tokens: `[B, P, D]`.
            self_attn_maps: `[B, H, P]` logits before softmax.
            cls_token: `[B, D]`; read by "conditioned" only.

        Returns:
            `[B, D]`: the mean over patches of attention times token.

        Raises:
            ConfigError: built without `head_weighting`, or another number of heads.
        """
        if self.head_weighting is None:
            raise ConfigError(
                "projection.head_weighting is null: pool_visual needs static or conditioned"
            )
        if self_attn_maps.shape[1] != self.num_heads:
            raise ConfigError(
                f"projection.num_heads is {self.num_heads} but self_attn_maps has shape "
                f"{tuple(self_attn_maps.shape)} [B, H, P]: set it to {self_attn_maps.shape[1]}"
            )
        dtype = self.linear_layer.weight.dtype
        weights = self._head_logits(cls_token).softmax(dim=-1)  # [B, H] or [H]
        logits = (self_attn_maps.to(dtype) * weights[..., None]).mean(dim=1)  # [B, P]
        attention = logits.softmax(dim=-1)
        return (attention[..., None] * patch_tokens.to(dtype)).mean(dim=1)  # [B, D]

    def _head_logits(self, cls_token: Tensor | None) -> Tensor:
        if self.head_weighting == "static":
            return self.attn_weights
        if cls_token is None:
            raise ConfigError("projection.head_weighting=conditioned needs the field cls_token")
        cls_token = cls_token.to(self.weight_layer1.weight.dtype)
        hidden = activate(self.activation, self.weight_layer1(cls_token))
        logits: Tensor = self.weight_layer2(hidden)
        return logits

    def _mlp(self, x: Tensor, first: nn.Linear, rest: nn.ModuleList) -> Tensor:
        # Stored features are half precision; ψ always runs in its own dtype, as the original does.
        x = first(x.to(first.weight.dtype))
        for layer in rest:
            x = layer(activate(self.activation, x))
        return x

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # First releases called the hidden layer `linear_layer2`. `load_state_dict` hands a copy
        # to this method, so the caller's dict keeps its names.
        for name in ("weight", "bias"):
            legacy = f"{prefix}linear_layer2.{name}"
            if legacy in state_dict:
                state_dict[f"{prefix}hidden_layers.0.{name}"] = state_dict.pop(legacy)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class DoubleMLP(ProjectionLayer):
    """ψ for the text and a second network of the same depth, D to D, for the image.

    Arguments are those of `ProjectionLayer`. Parameters of the image side are `visual_linear` and
    `visual_hidden_layers.N`. With `hidden_layers=0` both sides are one linear layer; the original
    `DoubleMLP` raises there.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import DoubleMLP
        >>> both = DoubleMLP(text_dim=512, vision_dim=768)
        >>> both.project_text(torch.zeros(4, 512)).shape
        torch.Size([4, 768])
        >>> both.project_visual(torch.zeros(9, 768)).shape
        torch.Size([9, 768])
    """

    projects_visual: ClassVar[bool] = True

    def __init__(
        self,
        text_dim: int,
        vision_dim: int,
        hidden_layers: int | bool = 1,
        activation: Activation | None = "tanh",
        head_weighting: HeadWeighting | None = None,
        num_heads: int | None = None,
    ) -> None:
        super().__init__(text_dim, vision_dim, hidden_layers, activation, head_weighting, num_heads)
        self.visual_linear = nn.Linear(vision_dim, vision_dim)
        self.visual_hidden_layers = _square_layers(vision_dim, int(hidden_layers))

    def project_visual(self, visual: Tensor) -> Tensor:
        """Image side: `[..., D]` of any float dtype to `[..., D]` in the parameters' dtype."""
        check_width(visual, self.vision_dim, "visual features", "projection.vision_dim")
        return self._mlp(visual, self.visual_linear, self.visual_hidden_layers)


class VisualProjectionLayer(Projection):
    """The other direction: image features to the text space; text passes unchanged.

    Unlike in `ProjectionLayer`, the activation follows the first layer even if it is the only one.

    Args:
        text_dim: width C of the text features.
        vision_dim: width D of the visual features.
        hidden_dim: width between two layers (`linear_layer`, `linear_layer2`); None has one layer.
        activation: "tanh", "relu", "sigmoid" or None.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment import VisualProjectionLayer
        >>> back = VisualProjectionLayer(text_dim=512, vision_dim=768)
        >>> back.project_visual(torch.zeros(9, 768)).shape
        torch.Size([9, 512])
        >>> text = torch.zeros(4, 512)
        >>> back.project_text(text) is text  # only the image side learns
        True
    """

    projects_visual: ClassVar[bool] = True

    def __init__(
        self,
        text_dim: int,
        vision_dim: int,
        hidden_dim: int | None = None,
        activation: Activation | None = "tanh",
    ) -> None:
        super().__init__()
        check_choice("projection.activation", activation, get_args(Activation))
        self.text_dim, self.vision_dim = text_dim, vision_dim
        self.hidden_dim, self.activation = hidden_dim, activation
        self.linear_layer = nn.Linear(vision_dim, hidden_dim or text_dim)
        self.linear_layer2 = nn.Linear(hidden_dim, text_dim) if hidden_dim else None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments as plain values (JSON)."""
        return {
            "text_dim": self.text_dim,
            "vision_dim": self.vision_dim,
            "hidden_dim": self.hidden_dim,
            "activation": self.activation,
        }

    def forward(self, *features: Tensor) -> Tensor:
        """The same as `project_visual`."""
        return self.project_visual(*features)

    def project_visual(self, visual: Tensor) -> Tensor:
        """`[..., D]` of any float dtype to `[..., C]` in the parameters' dtype."""
        check_width(visual, self.vision_dim, "visual features", "projection.vision_dim")
        x = self.linear_layer(visual.to(self.linear_layer.weight.dtype))
        x = activate(self.activation, x)
        return x if self.linear_layer2 is None else self.linear_layer2(x)


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


def projection_state(projection: Projection) -> tuple[object, ...]:
    """Changes with the projection, when it moves to another device or is written to."""
    parameters = list(projection.parameters())
    versions = (0 if p.is_inference() else p._version for p in parameters)
    return (projection, parameters[0].device, *versions)  # held, so its id is no other's


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


def _square_layers(width: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))
