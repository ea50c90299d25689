"""BERT and its relatives as text encoders, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.identity import state_dict_digest
from talk2dino.encoders.sentence_text import local_source
from talk2dino.encoders.text_base import TextFeatures, join
from talk2dino.encoders.weights import first_line, quiet
from talk2dino.errors import ConfigError, EncoderError

Pooling = Literal["pooler", "cls", "mean"]


class BertTextEncoder(nn.Module):
    """A BERT model.

    Padding is masked. (The original's evaluation pads class names to 512 tokens and lets the
    model attend to all of them.)

    Args:
        name: model name on the Hub, used with `weights=hub` and in reports.
        weights: `hub`, `bundled` (all-MiniLM-L6-v2, which is a BERT) or a local folder.
        batch_size: captions per forward pass.
        templates: prompt templates for class names.
        pooling: `pooler` (tanh layer on the CLS token, original `pooler_output`), `cls` (the CLS
            token as it is) or `mean` (over real tokens).
        max_length: L of `encode_tokens`; longer captions are cut in both methods.

    Raises:
        ConfigError: unknown pooling.
        EncoderError: the package or the weights are not available, or the model has no pooler.
    """

    def __init__(
        self,
        name: str = "google-bert/bert-base-uncased",
        weights: str = "hub",
        batch_size: int = 256,
        templates: str = "plain",
        pooling: Pooling = "pooler",
        max_length: int = 77,
    ) -> None:
        super().__init__()
        if pooling not in ("pooler", "cls", "mean"):
            raise ConfigError(f"text.pooling={pooling!r}; choose pooler, cls or mean")
        self.name, self.weights = name, weights
        self.batch_size, self.templates = batch_size, templates
        self.pooling, self.max_length = pooling, max_length
        model, self.tokenizer = _load(name, local_source(name, weights), weights)
        self.model: Any = model.requires_grad_(False).eval()
        self.embed_dim: int = int(self.model.config.hidden_size)
        if pooling == "pooler" and getattr(self.model, "pooler", None) is None:
            raise EncoderError(f"text.pooling=pooler: {name} has no pooler; use cls or mean")

    def train(self, mode: bool = True) -> BertTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalised."""
        parts = [
            self._pool(self.model(**batch), batch["attention_mask"]).float().cpu()
            for batch in self._batches(texts, padding=True)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    @torch.no_grad()
    def encode_tokens(self, texts: Sequence[str]) -> TextFeatures:
        """Return pooled and token-level outputs; L is `max_length`, W = C."""
        parts = [self._tokens_of(batch) for batch in self._batches(texts, padding="max_length")]
        if parts:
            return join(parts)
        nothing = torch.empty(0, self.max_length, self.embed_dim)
        index = torch.empty(0, dtype=torch.int64)
        return TextFeatures(nothing[:, 0], nothing, nothing[..., 0] > 0, nothing, index)

    def _batches(self, texts: Sequence[str], padding: bool | str) -> Iterator[Any]:
        device = next(self.model.parameters()).device
        for start in range(0, len(texts), self.batch_size):
            yield self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=padding,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(device)

    def _tokens_of(self, batch: Any) -> TextFeatures:
        outputs = self.model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"]
        return TextFeatures(
            embedding=self._pool(outputs, mask).float().cpu(),
            token_embeddings=outputs.last_hidden_state.float().cpu(),
            token_mask=mask.bool().cpu(),
            second_last_tokens=outputs.hidden_states[-2].float().cpu(),
            eot_index=(mask.sum(dim=1) - 1).cpu(),
        )

    def _pool(self, outputs: Any, mask: Tensor) -> Tensor:
        """[b, C] out of the model's outputs and the padding mask [b, L]."""
        tokens: Tensor = outputs.last_hidden_state  # [b, L, C]
        if self.pooling == "pooler":
            pooled: Tensor = outputs.pooler_output
            return pooled
        if self.pooling == "cls":
            return tokens[:, 0]
        weights = mask.to(tokens.dtype)
        return torch.einsum("bl,blc->bc", weights, tokens) / weights.sum(dim=1, keepdim=True)

    def describe(self) -> dict[str, Any]:
        """Return what the feature store's manifest keeps of the encoder."""
        return {
            "name": self.name,
            "weights_sha256": state_dict_digest(self.model),
            "embed_dim": self.embed_dim,
            "spec": {
                "_target_": "talk2dino.encoders.text.BertTextEncoder",
                "name": self.name,
                "weights": self.weights,
                "batch_size": self.batch_size,
                "templates": self.templates,
                "pooling": self.pooling,
                "max_length": self.max_length,
            },
        }


def _load(name: str, source: str, weights: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise EncoderError(
            "this text encoder needs transformers; install it with: pip install 'talk2dino[text]'"
        ) from error
    transformers_logging.disable_progress_bar()
    try:
        if weights != "hub":
            model = AutoModel.from_pretrained(source, local_files_only=True)
            return model, AutoTokenizer.from_pretrained(source, local_files_only=True)
        with quiet(), cached_if_unreachable():
            return AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a folder of something else fails in any way at all
        raise EncoderError(
            f"text.weights={weights}: cannot load {name} ({first_line(error)}); without a network "
            "use text=minilm, or give a local folder with text.weights=DIR"
        ) from error
    finally:
        transformers_logging.enable_progress_bar()
