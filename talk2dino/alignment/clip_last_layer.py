"""CLIP's last text block followed by ψ, fine-tuned together (original `CLIPLastLayer`)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talk2dino.alignment.projection import Activation, Projection, ProjectionLayer, check_width
from talk2dino.encoders.text import TextEncoder
from talk2dino.errors import ConfigError


class CLIPLastLayer(Projection):
    """Last transformer block, final norm and text projection of CLIP, then ψ; all of it learns.

    Works on stored outputs of the block before the last. With the encoder's own weights it equals
    ψ(encode_text(tokens)).

    Args:
        text_dim: width C of CLIP's text embedding.
        vision_dim: width D of the visual features.
        width: width W of CLIP's text transformer.
        num_text_heads: attention heads of that transformer.
        mlp_width: inner width of its feed-forward part; None is 4 W.
        quick_gelu: OpenAI's approximation of GELU, as in `ViT-B-16-quickgelu`.
        hidden_layers: of ψ.
        activation: of ψ.
    """

    text_fields: ClassVar[tuple[str, ...]] = ("second_last_tokens", "eot_index")

    def __init__(
        self,
        text_dim: int,
        vision_dim: int,
        width: int,
        num_text_heads: int,
        mlp_width: int | None = None,
        quick_gelu: bool = False,
        hidden_layers: int | bool = 1,
        activation: Activation | None = "tanh",
    ) -> None:
        super().__init__()
        self.text_dim, self.vision_dim, self.width = text_dim, vision_dim, width
        self.last_block = _LastBlock(width, num_text_heads, mlp_width or 4 * width, quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, text_dim))
        nn.init.normal_(self.text_projection, std=width**-0.5)  # CLIP's own initialization
        self.projection = ProjectionLayer(text_dim, vision_dim, hidden_layers, activation)

    @classmethod
    def from_text_encoder(
        cls,
        text: TextEncoder,
        vision_dim: int,
        text_dim: int | None = None,
        hidden_layers: int | bool = 1,
        activation: Activation | None = "tanh",
    ) -> CLIPLastLayer:
        """Copy the end of a text encoder; what `projection=clip_last_layer` builds.

        Args:
            text: an `OpenClipTextEncoder`, the one that the features come from; not changed.
            vision_dim: width D of the visual features.
            text_dim: width C, checked against the encoder's if it is given.
            hidden_layers: of ψ.
            activation: of ψ.

        Raises:
            ConfigError: no CLIP text tower, one that is not causal, has no plain projection matrix
                or another block than CLIP's, or another width.
        """
        tower: Any = getattr(text, "tower", None)
        if tower is None:
            raise ConfigError(
                f"projection=clip_last_layer: {type(text).__name__} has no CLIP text tower; "
                "extract with text=clip_vitb16"
            )
        matrix = getattr(tower, "text_projection", None)
        if getattr(tower, "attn_mask", None) is None or not isinstance(matrix, Tensor):
            raise ConfigError(
                "projection=CLIPLastLayer needs the causal text tower of a CLIP model with a "
                f"projection matrix, found {type(tower).__name__}: choose text=clip_vitb16"
            )
        block = tower.transformer.resblocks[-1]
        layer = cls(
            text_dim=matrix.shape[1],
            vision_dim=vision_dim,
            width=matrix.shape[0],
            num_text_heads=block.attn.num_heads,
            mlp_width=block.mlp.c_fc.out_features,
            quick_gelu=not isinstance(block.mlp.gelu, nn.GELU),
            hidden_layers=hidden_layers,
            activation=activation,
        )
        try:
            layer.last_block.load_state_dict(block.state_dict())
        except RuntimeError as error:
            raise ConfigError(
                "projection=CLIPLastLayer: the text tower's last block is not CLIP's "
                f"({str(error).splitlines()[-1].strip()}): choose text=clip_vitb16"
            ) from error
        layer.ln_final.load_state_dict(tower.ln_final.state_dict())
        with torch.no_grad():
            layer.text_projection.copy_(matrix)
        if text_dim not in (None, layer.text_dim):
            raise ConfigError(
                f"projection.text_dim={text_dim}: the text encoder has {layer.text_dim}; leave it "
                "null"
            )
        return layer

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments as plain values (JSON)."""
        return {
            "text_dim": self.text_dim,
            "vision_dim": self.vision_dim,
            "width": self.width,
            "num_text_heads": self.last_block.attn.num_heads,
            "mlp_width": self.last_block.mlp.c_fc.out_features,
            "quick_gelu": self.last_block.quick_gelu,
            "hidden_layers": self.projection.hyperparameters["hidden_layers"],
            "activation": self.projection.activation,
        }

    def embed_text(self, text: Tensor, eot_index: Tensor | None = None) -> Tensor:
        """`second_last_tokens` `[B, L, W]` and `eot_index` `[B]` to CLIP's embedding, `[B, C]`.

        Raises:
            ConfigError: `eot_index` is missing, or the tokens' width is not `width`.
        """
        if eot_index is None:
            raise ConfigError(
                "projection=CLIPLastLayer reads the caption fields second_last_tokens and "
                "eot_index: extract them, or use a projection that reads embedding"
            )
        check_width(text, self.width, "second_last_tokens", "projection.width")
        tokens = text.to(self.text_projection.dtype)
        end = self.ln_final(self.last_block(tokens, eot_index))  # [B, W]
        embedding: Tensor = end @ self.text_projection
        return embedding

    def project_embedding(self, embedding: Tensor) -> Tensor:
        """ψ of `embed_text`'s result, `[..., C]` to `[..., D]`."""
        return self.projection.project_text(embedding)

    def project_text(self, text: Tensor, eot_index: Tensor | None = None) -> Tensor:
        """Stored tokens to the vision space.

        Args:
            text: `second_last_tokens` `[B, L, W]`, the output of the block before the last.
            eot_index: `[B]` int64, position of the end-of-text token.

        Returns:
            `[B, D]`.

        Raises:
            ConfigError: `eot_index` is missing, or the tokens' width is not `width`.
        """
        return self.project_embedding(self.embed_text(text, eot_index))


class _LastBlock(nn.Module):
    """CLIP's pre-norm block, computed for the end token only; names as in open_clip."""

    def __init__(self, width: int, heads: int, mlp_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _FeedForward(width, mlp_width, quick_gelu)

    def forward(self, tokens: Tensor, eot_index: Tensor) -> Tensor:
        # Only the end token is read and no later block mixes tokens: one query is enough.
        rows = torch.arange(len(tokens), device=tokens.device)
        normed = self.ln_1(tokens)  # [B, L, W]
        query = normed[rows, eot_index][:, None]  # [B, 1, W]
        later = torch.arange(tokens.shape[1], device=tokens.device) > eot_index[:, None]  # causal
        attended, _ = self.attn(query, normed, normed, key_padding_mask=later, need_weights=False)
        x = tokens[rows, eot_index] + attended[:, 0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out  # [B, W]


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)
        out: Tensor = self.c_proj(x)
        return out
