"""`convert weights`: a projection from one file format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talk2dino.alignment.checkpoint import Checkpoint, read_checkpoint, save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection_base import Activation
from talk2dino.cli import require_output_folder
from talk2dino.encoders.hub import resolve_checkpoint
from talk2dino.errors import ConfigError


def weights(
    input: str,
    output: str,
    activation: Activation | None = "tanh",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> None:
    """Read a projection in any format and write it as `.safetensors` or `.pth`.

    Args:
        input: `.pth`, `.safetensors`, `.ckpt`, run folder, or Hub id.
        output: file to write, never overwritten.
        activation: of a file that holds tensors only.
        vision: spec of the vision encoder; None keeps the input's.
        text: spec of the text encoder; None keeps the input's.

    Raises:
        ConfigError: the output exists or cannot hold the projection.
        CheckpointError: the input is no projection.
    """
    target = Path(output).expanduser()
    if target.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"output={target}: the name must end in .safetensors or .pth")
    if target.exists():
        raise ConfigError(f"output={target}: is there already; use another name or remove it")
    checkpoint = read_checkpoint(resolve_checkpoint(input), activation)
    if target.suffix == ".pth" and isinstance(checkpoint.projection, CLIPLastLayer):
        raise ConfigError(f"output={target}: .pth has no CLIPLastLayer; write .safetensors")
    specs = {"vision": vision or checkpoint.vision, "text": text or checkpoint.text}
    require_output_folder(target.parent, "output")
    save_projection(checkpoint.projection, target, checkpoint.extra | specs)
    print(f"projection: {type(checkpoint.projection).__name__} {described(checkpoint)}")
    for kind, spec in specs.items():
        print(f"{kind}: {spec['name'] if spec else f'not named; say it with {kind}=…'}")
    if target.suffix == ".pth":
        print("a .pth holds the weights only: its encoders and its activation are not written")
    print(f"weights: {target}")


def described(checkpoint: Checkpoint) -> str:
    """The projection's arguments in one line."""
    arguments = checkpoint.projection.hyperparameters
    return " ".join(f"{key}={value}" for key, value in arguments.items() if value is not None)
