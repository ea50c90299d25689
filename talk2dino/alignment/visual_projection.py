"""The other direction: image features to the text encoder's space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from talk2dino.alignment.projection import (
    Activation,
    Projection,
    activate,
    check_choice,
    check_width,
    original_activation,
    original_width,
)


class VisualProjectionLayer(Projection):
    """Image features to the text space; text passes unchanged (original `VisualProjectionLayer`).

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

    @classmethod
    def from_original_config(cls, config: Mapping[str, Any]) -> VisualProjectionLayer:
        """Build from the `model` section of an original config file.

        Raises:
            ConfigError: a width is missing or an option has an unknown value.
        """
        hidden = original_width(config, "hidden_embed_dim") if config.get("hidden_layer") else None
        return cls(
            text_dim=original_width(config, "clip_embed_dim"),
            vision_dim=original_width(config, "dino_embed_dim"),
            hidden_dim=hidden,
            activation=original_activation(config),
        )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments as plain values (JSON)."""
        return {
            "text_dim": self.text_dim,
            "vision_dim": self.vision_dim,
            "hidden_dim": self.hidden_dim,
            "activation": self.activation,
        }

    def forward(self, visual: Tensor) -> Tensor:
        """`[..., D]` of any float dtype to `[..., C]` in the parameters' dtype."""
        check_width(visual, self.vision_dim, "visual features", "projection.vision_dim")
        x = self.linear_layer(visual.to(self.linear_layer.weight.dtype))
        x = activate(self.activation, x)
        return x if self.linear_layer2 is None else self.linear_layer2(x)

    def project_visual(self, visual: Tensor) -> Tensor:
        """The same as calling the module: `[..., D]` to `[..., C]`."""
        projected: Tensor = self(visual)
        return projected
