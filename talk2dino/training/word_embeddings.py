"""Words of a store's captions, embedded by its text encoder, as a loss of their own."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.similarity import Dense, Similarity
from talk2dino.alignment.word_loss import WordLoss, WordOptions
from talk2dino.encoders.build import build_text
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.text.base import CachedTextEncoder
from talk2dino.encoders.text.prompts import prompts
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.features.caption_words import caption_words, with_synonyms
from talk2dino.files import cache_dir


def stored_text_encoder(store: FeatureStore, purpose: str) -> TextEncoder:
    """The text encoder that the store's features come from.

    Args:
        store: names it.
        purpose: what it is needed for and what else to do, for the error's one line.

    Raises:
        ConfigError: the store does not name it, or its weights are others now.
    """
    info = store.text
    if info is None or not info.spec:
        raise ConfigError(f"store={store.path}: does not name its text encoder, {purpose}")
    encoder = build_text(info.spec)
    if info.weights_sha256 and encoder.describe()["weights_sha256"] != info.weights_sha256:
        raise ConfigError(
            f"store={store.path}: its text encoder {info.name} has other weights now than at "
            "extraction; extract again"
        )
    return encoder


def caption_word_loss(
    options: WordOptions,
    store: FeatureStore,
    caption_rows: NDArray[np.int64],
    projection: Projection,
    similarity: Similarity,
    seed: int,
) -> WordLoss:
    """The loss of the words that a store's captions contain.

    Args:
        options: of the config's `words`.
        store: holds the captions' texts, and names its text encoder.
        caption_rows: `[n]` int64, the captions to train on; others give no words.
        projection: ψ.
        similarity: of the run.
        seed: of the run.

    Raises:
        ConfigError: no word is frequent enough, the store has no texts or does not name its text
            encoder, the similarity lacks what an option needs, or the projection reads more than
            one embedding of a text.
    """
    if projection.text_fields != ("embedding",):
        raise ConfigError(
            f"words=captions: {type(projection).__name__} changes the embeddings of texts in "
            "training, and those of words are computed once; use projection=mlp, or words=none"
        )
    texts = store.captions["text"][caption_rows].tolist() if "text" in store.captions else []
    if not any(texts):
        raise ConfigError(
            f"words=captions: store={store.path} holds no texts of its captions; extract again, "
            "or use words=none"
        )
    similarity = at_temperature(similarity, options.temperature)
    found = caption_words(
        texts, store.captions["image_row"][caption_rows], len(store.images), options.min_count
    )
    embeddings = embed_words(found.words, store, options.templates)
    if options.synonym is not None:
        found = with_synonyms(found, embeddings.numpy(), options.synonym)
    of_image = from_numpy(found.of_image)
    return WordLoss(embeddings, of_image, similarity, options, seed, found.digest)


def embed_words(words: tuple[str, ...], store: FeatureStore, templates: str) -> Tensor:
    """`[V, C]` mean over the prompts of each word, by the store's text encoder or from the cache.

    The cache is the folder `text` of `files.cache_dir`, as in an evaluation.
    """
    groups = prompts(words, templates)
    encoder = stored_text_encoder(store, "which words=captions needs; extract again")
    cached = CachedTextEncoder(encoder, cache_dir() / "text")
    embeddings = cached.encode([prompt for group in groups for prompt in group])
    return embeddings.view(len(words), -1, embeddings.shape[-1]).mean(dim=1)


def at_temperature(similarity: Similarity, temperature: float | None) -> Similarity:
    """A dense similarity with another temperature.

    Raises:
        ConfigError: it has none.
    """
    if temperature is None:
        return similarity
    if not isinstance(similarity, Dense):
        raise ConfigError(
            f"words.temperature={temperature}: {type(similarity).__name__} pools no patches; use "
            "similarity=dense, or words.temperature=null"
        )
    other = copy.copy(similarity)
    other.temperature = temperature
    return other
