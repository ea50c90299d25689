"""What the feature store decides of a training: widths, heads, the encoders' names."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig

from talk2dino import cli
from talk2dino.alignment.projection import Projection
from talk2dino.encoders.build import build_text
from talk2dino.encoders.text import TextEncoder
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore


def fill_widths(config: DictConfig) -> None:
    """Set the projection's widths and heads that the config leaves open to those of the store.

    Raises:
        ConfigError: the config's widths are not those of the store.
    """
    store = FeatureStore(config.store)
    other = ("id", "file_name", "patch_index", "self_attn_maps")  # not of the vision width
    visual = next(name for name in store.images.fields if name not in other)
    found = {
        "text_dim": text_width(store),
        "vision_dim": store.images[visual].shape[-1],
    }
    for key, width in found.items():
        wanted = config.projection.get(key)
        if wanted is None:
            config.projection[key] = width
        elif wanted != width:
            encoder = store.text if key == "text_dim" else store.vision
            raise ConfigError(
                f"projection.{key}={wanted} but {config.store} holds features of width {width}"
                + (f" ({encoder.name})" if encoder else "")
                + f"; set projection.{key}={width} or choose the experiment of these encoders"
            )
    if config.projection.get("head_weighting") and config.projection.get("num_heads") is None:
        config.projection.num_heads = store.images["self_attn_maps"].shape[1]


def text_width(store: FeatureStore) -> int:
    """Width C of the text features, whichever of them the store holds."""
    for name in ("embedding", "token_embeddings"):
        if name in store.captions:
            return store.captions[name].shape[-1]
    if store.text is None or not store.text.embed_dim:
        raise ConfigError(f"store={store.path}: has neither embedding nor the width of its text")
    return store.text.embed_dim


def build_projection(config: DictConfig, store: FeatureStore) -> Projection:
    """Build ψ; one that starts from the text encoder's weights gets the store's encoder."""
    target = get_object(config.projection._target_)
    needs_text = "text" in inspect.signature(target).parameters
    arguments = {"text": stored_text_encoder(store)} if needs_text else {}
    projection: Projection = cli.build(config.projection, **arguments)
    return projection


def stored_text_encoder(store: FeatureStore) -> TextEncoder:
    """The text encoder that the store's features come from.

    Raises:
        ConfigError: the store does not name it, or its weights are others now.
    """
    info = store.text
    if info is None or not info.spec:
        raise ConfigError(
            f"store={store.path}: does not name its text encoder, whose weights this projection "
            "starts from; extract with features=clip_last_layer"
        )
    encoder = build_text(info.spec)
    if encoder.describe()["weights_sha256"] != info.weights_sha256:
        raise ConfigError(
            f"store={store.path}: its text encoder {info.name} has other weights now than at "
            "extraction; extract again"
        )
    return encoder


def encoder_specs(store: FeatureStore) -> dict[str, Any]:
    """The specs of the store's encoders, for the checkpoint."""
    return {
        "vision": store.vision.spec if store.vision else None,
        "text": store.text.spec if store.text else None,
    }
