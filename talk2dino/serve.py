"""`python -m talk2dino.serve`: a service over HTTP, also for Label Studio's pre-annotations."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.model_and_classes import (
    build_refinement,
    embed_exemplars,
    listed,
    load_model,
    named_classes,
    require,
)
from talk2dino.errors import ConfigError, require_extra

TOKEN = "TALK2DINO_TOKEN"  # environment variables
LABEL_STUDIO_KEY = "LABEL_STUDIO_API_KEY"
SHORTEST = 16  # characters of a token


def require_all(config: DictConfig) -> None:
    """Refuse to begin without a checkpoint or without the libraries of serving (ConfigError)."""
    require(config, "checkpoint")
    require_extra("serve", "serving")


def read_token(config: DictConfig, address: str) -> str | None:
    """The token of the config or of the environment; None for this machine alone without one.

    Args:
        config: with `token` and `host`.
        address: that the host means.

    Raises:
        ConfigError: another host without a token, an empty one, or one that is easily guessed.
    """
    token, name = config.token, "token"
    if token is None:
        token, name = os.environ.get(TOKEN), TOKEN
    if token == "":  # of a file that is not there, for instance: nobody means a service without
        raise ConfigError(f"{name}: is empty; give a token, or none at all")
    if token is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"host={config.host}: others can reach it, so it needs a token: set {TOKEN} in the "
            "environment, or token=…"
        )
    if token is not None and not (
        len(token) >= SHORTEST and token.isascii() and token.isprintable() and " " not in token
    ):
        raise ConfigError(
            f"{name}: give {SHORTEST} or more ASCII characters without spaces and line breaks, of: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token


def read_key(config: DictConfig) -> str | None:
    """Label Studio's access token of the environment.

    Raises:
        ConfigError: an empty one, or one that no header can bring.
    """
    key = os.environ.get(LABEL_STUDIO_KEY)
    if config.label_studio_url is None or key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{LABEL_STUDIO_KEY}: is empty, or has a space, a line break or another character that "
            "no token has; give the token alone"
        )
    return key


def serve(config: DictConfig) -> None:
    """Load the model and answer requests."""
    from talk2dino.alignment.checkpoint import checkpoint_digest
    from talk2dino.inference.class_embeddings import ClassEmbeddings
    from talk2dino.serving.gate import LOCAL, Metrics, Rules
    from talk2dino.serving.ml_backend import MLBackend, TaskPictures
    from talk2dino.serving.server import Routes, answer_requests, bind, build_app
    from talk2dino.serving.service import Limits, Service

    limits = Limits(**{one.name: config[one.name] for one in fields(Limits)})
    given = config.classes or config.exemplars is not None
    classes = named_classes(config, brought=True) if given else None
    refinement = build_refinement(config)
    pictures = TaskPictures(
        listed(config.image_hosts),
        config.image_root,
        config.label_studio_url,
        read_key(config),
        int(limits.max_upload_mb * 1024 * 1024),
        limits.timeout,
    )
    with bind(config.host, config.port) as opened:
        token = read_token(config, opened.getsockname()[0])
        model = load_model(config, classes=classes)
        metrics = Metrics()
        size = config.short_side
        seen, weight = metrics.batches.observe, config.exemplar_weight
        service = Service(model, limits, classes, size, seen, refinement, weight)
        if isinstance(service.classes, ClassEmbeddings):
            model.embed_classes(service.classes)  # refuses those of another checkpoint
        else:
            model.encode_text([])  # builds the text encoder: its errors come before the service
            if service.classes:
                embed_exemplars(model, service.classes, size)
        name = Path(str(config.checkpoint)).name
        version = f"{name} {checkpoint_digest(config.checkpoint)[:8]}"
        routes = Routes(service, MLBackend(service, pictures, version), metrics, version)
        rules = Rules(limits.body, limits.timeout, limits.queue, token, (*LOCAL, config.host))
        answer_requests(build_app(routes, rules), opened, limits.timeout)


if __name__ == "__main__":
    command.run("serve", serve, require_all)
