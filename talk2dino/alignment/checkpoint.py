"""Read a projection from any of its file formats, and write it without pickled objects.

| file | where the class and its arguments come from |
| --- | --- |
| `.ckpt` of this project (Lightning) | key `talk2dino` of the checkpoint |
| `.safetensors` | metadata key `talk2dino`, JSON |
| `.pth` of the original, `.safetensors` of others | the tensors' names and shapes |
| repository of the original, see `encoders.original` | likewise |

The `talk2dino` entry is `{"projection": {"_target_": …, arguments}, "vision": {…}, "text": {…}}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import (
    Activation,
    DoubleMLP,
    Projection,
    ProjectionLayer,
    VisualProjectionLayer,
)
from talk2dino.encoders.hub import resolve_checkpoint
from talk2dino.encoders.original import OriginalRepository, find_original
from talk2dino.encoders.weights import first_line, state_dict_digest
from talk2dino.errors import CheckpointError, ConfigError
from talk2dino.files import file_digest, replacing
from talk2dino.renamed import current

_KEY = "talk2dino"
_PREFIX = "projection."
# A checkpoint may come from anywhere: it can name these classes and nothing else.
_CLASSES: tuple[type[Projection], ...] = (
    ProjectionLayer,
    DoubleMLP,
    VisualProjectionLayer,
    CLIPLastLayer,
)
_PACKAGES = {"talk2dino.alignment"} | {kind.__module__ for kind in _CLASSES}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        projection: with its weights, on the CPU, in evaluation mode.
        vision: spec of the vision encoder; None in an original `.pth`.
        text: spec of the text encoder; None in an original `.pth`.
        extra: everything else of the metadata.
        path: the file that was read; None of an original repository on the Hub.
    """

    projection: Projection
    vision: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def load_projection(location: str | Path, activation: Activation | None = "tanh") -> Projection:
    """The projection of a checkpoint; arguments and errors as `read_checkpoint`.

    Examples:
        >>> import torch
        >>> from talk2dino import load_projection
        >>> from talk2dino.alignment import ProjectionLayer
        >>> from talk2dino.alignment.checkpoint import save_projection
        >>> save_projection(ProjectionLayer(512, 384), "projection.safetensors")
        >>> load_projection("projection.safetensors")(torch.zeros(2, 512)).shape
        torch.Size([2, 384])
    """
    return read_checkpoint(location, activation).projection


def read_checkpoint(
    location: str | Path, activation: Activation | None = "tanh", whole: bool = False
) -> Checkpoint:
    """Read a checkpoint of any format; of an original model's repository, the projection alone.

    Args:
        location: `.ckpt` of this project, `.safetensors`, an original `.pth`, a folder that holds
            one, a Hub id `org/name` or `org/name@revision`.
        activation: for files that hold tensors only. Their widths, depth and head weighting follow
            from the tensors, the activation does not; all released weights use tanh.
        whole: download all of an original Hub repository now, because its encoders come next.

    Raises:
        CheckpointError: nothing there, no checkpoint of a projection, or weights that do not fit.
    """
    original = find_original(location)
    if original is not None:
        return _read_original(original, activation, whole)
    path = resolve_checkpoint(location)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    state, metadata = read(path)
    if metadata is None:
        return Checkpoint(_fill(_infer(state, activation, path), state, path), path=path)
    spec = metadata.get("projection")
    projection = _fill(_build(spec, path), state, path)
    rest = {key: value for key, value in metadata.items() if key != "projection"}
    return Checkpoint(projection, rest.pop("vision", None), rest.pop("text", None), rest, path)


def _read_original(
    repository: OriginalRepository, activation: Activation | None, whole: bool
) -> Checkpoint:
    specs = repository.specs()
    state = repository.tensors("projection") if whole else repository.projection()
    place = Path(repository.location)
    projection = _fill(_infer(state, activation, place), state, place)
    return Checkpoint(projection, path=repository.weights_file, **specs)


def checkpoint_digest(location: str | Path) -> str:
    """What tells a checkpoint from others without building it, for records of results.

    Raises:
        CheckpointError: nothing there.
    """
    original = find_original(location)
    return file_digest(resolve_checkpoint(location)) if original is None else original.digest()


def save_projection(
    projection: Projection, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a projection, complete or not at all.

    Args:
        projection: on any device.
        path: `.safetensors` with metadata, or `.pth`, the original's plain state dict.
        metadata: plain values (JSON) beside the projection's own, such as `vision` and `text`.

    Raises:
        CheckpointError: another suffix, or metadata that is not JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().cpu().contiguous() for key, value in projection.state_dict().items()
    }
    if path.suffix == ".pth":
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        return
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a projection is saved as .safetensors or .pth")
    try:
        entry = json.dumps({**(metadata or {}), "projection": describe_projection(projection)})
    except TypeError as error:
        raise CheckpointError(f"{path}: metadata must be plain values ({error})") from error
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={_KEY: entry})


def is_projection(path: Path) -> bool:
    """Whether a file is one that `save_projection` wrote as `.safetensors`."""
    return has_entry(path, _KEY)


def has_entry(path: Path, key: str) -> bool:
    """Whether the metadata of a safetensors file have a key; False for any other file."""
    try:
        with safe_open(path, framework="pt") as opened:
            return key in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def describe_projection(projection: Projection) -> dict[str, Any]:
    """`{"_target_": class path, arguments}`: plain values, also a valid Hydra node."""
    kind = type(projection)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **projection.hyperparameters}


def identify_projection(projection: Projection) -> dict[str, Any]:
    """`spec` and `weights_sha256`, by which files made with a projection know it again."""
    spec = json.loads(json.dumps(describe_projection(projection)))  # as a file gives it back
    return {"spec": spec, "weights_sha256": state_dict_digest(projection)}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            entry = (file.metadata() or {}).get(_KEY)
        metadata = None if entry is None else json.loads(entry)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"checkpoint={path}: not a safetensors file ({error})") from error
    return state, _checked_metadata(metadata, path)


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        raise CheckpointError(
            f"checkpoint={path}: not a checkpoint that can be loaded safely "
            f"({first_line(error, 120)})"
        ) from error
    if isinstance(content, dict) and _KEY in content:
        state = content.get("state_dict")
        return _without_prefix(state, path), _checked_metadata(content[_KEY], path)
    if isinstance(content, dict) and "state_dict" in content:
        raise CheckpointError(
            f"checkpoint={path}: a training checkpoint of another project (no '{_KEY}' entry): "
            "give a .ckpt written by talk2dino.train"
        )
    if isinstance(content, dict) and content and all(map(torch.is_tensor, content.values())):
        return content, None
    raise CheckpointError(
        f"checkpoint={path}: holds {type(content).__name__}, not the tensors of a projection"
    )


def _without_prefix(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint={path}: has no state_dict")
    return {key[len(_PREFIX) :]: value for key, value in state.items() if key.startswith(_PREFIX)}


def _checked_metadata(metadata: object, path: Path) -> dict[str, Any] | None:
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"checkpoint={path}: its '{_KEY}' entry is not a dictionary")
    return metadata


def _build(spec: object, path: Path) -> Projection:
    """The projection that a checkpoint's entry names, one of this package's own classes."""
    arguments = dict(spec) if isinstance(spec, dict) else {}
    target = current(str(arguments.pop("_target_", None)))
    package, _, name = target.rpartition(".")
    known = {kind.__name__: kind for kind in _CLASSES}
    if name not in known or package not in _PACKAGES:
        raise CheckpointError(
            f"checkpoint={path}: names the projection {target!r}, known are {', '.join(known)}"
        )
    try:
        return known[name](**arguments)
    except (TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"checkpoint={path}: {name} cannot be built: {error}") from error


def _infer(state: dict[str, Tensor], activation: Activation | None, path: Path) -> Projection:
    """The projection whose tensors these are, by their names and shapes."""
    first = state.get("linear_layer.weight")
    if first is None or first.ndim != 2:
        names = ", ".join(list(state)[:3]) or "nothing"
        raise CheckpointError(
            f"checkpoint={path}: no linear_layer.weight, so not a Talk2DINO projection "
            f"(found {names})"
        )
    out_dim, in_dim = first.shape
    second = state.get("linear_layer2.weight")
    if second is not None and second.shape[0] != second.shape[1]:
        # A square second layer is ψ's, under its old name; only the image-to-text map narrows.
        return VisualProjectionLayer(
            second.shape[0], in_dim, hidden_dim=out_dim, activation=activation
        )
    hidden = {key.split(".")[1] for key in state if key.startswith("hidden_layers.")}
    kind = DoubleMLP if "visual_linear.weight" in state else ProjectionLayer
    weighting, heads = _infer_heads(state)
    return kind(
        in_dim, out_dim, len(hidden) or int(second is not None), activation, weighting, heads
    )


def _infer_heads(state: dict[str, Tensor]) -> tuple[Any, int | None]:
    if "attn_weights" in state:
        return "static", len(state["attn_weights"])
    if "weight_layer2.weight" in state:
        return "conditioned", len(state["weight_layer2.weight"])
    return None, None


def _fill(projection: Projection, state: dict[str, Tensor], path: Path) -> Projection:
    try:
        projection.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"checkpoint={path}: weights do not fit {type(projection).__name__}: {reason}"
        ) from error
    return projection.eval()
