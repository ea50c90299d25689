"""`python -m talk2dino.convert TASK …`: weights from one format to another, and sound stores.

`weights` copies a projection between the original's `.pth` and `.safetensors`; `verify` reads a
whole feature store and names what is damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from talk2dino import cli
from talk2dino.alignment.checkpoint import Checkpoint, read_checkpoint, save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.encoders.build import check_spec
from talk2dino.encoders.hub import resolve_checkpoint
from talk2dino.errors import ConfigError
from talk2dino.features.store import FeatureStore
from talk2dino.features.verify import verify_store


def convert(config: DictConfig) -> None:
    """Do the task that the config names.

    Raises:
        ConfigError: an unknown task.
    """
    if config.task not in TASKS:
        raise ConfigError(
            f"task={config.task}: unknown; write python -m talk2dino.convert with one of "
            f"{', '.join(TASKS)}"
        )
    TASKS[config.task](config)


def weights(config: DictConfig) -> None:
    """Read a projection in any format and write it as `.safetensors` or `.pth`.

    Raises:
        ConfigError: a key is missing, or the output exists or cannot hold the projection.
        CheckpointError: the input is no projection.
    """
    source, output = required(config, "input"), Path(required(config, "output")).expanduser()
    if output.suffix not in (".safetensors", ".pth"):
        raise ConfigError(f"output={output}: the name must end in .safetensors or .pth")
    if output.exists():
        raise ConfigError(f"output={output}: is there already; use another name or remove it")
    checkpoint = read_checkpoint(resolve_checkpoint(source), config.activation)
    if output.suffix == ".pth" and isinstance(checkpoint.projection, CLIPLastLayer):
        raise ConfigError(f"output={output}: .pth has no CLIPLastLayer; write .safetensors")
    specs = encoder_specs(config, checkpoint)
    cli.require_output_folder(output.parent, "output")
    save_projection(checkpoint.projection, output, checkpoint.extra | specs)
    print(f"projection: {type(checkpoint.projection).__name__} {described(checkpoint)}")
    for kind, spec in specs.items():
        print(f"{kind}: {spec['name'] if spec else f'not named; say it with {kind}=…'}")
    if output.suffix == ".pth":
        print("a .pth holds the weights only: its encoders and its activation are not written")
    print(f"weights: {output}")


def encoder_specs(config: DictConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Specs of both encoders: those the config chooses, else those of the file."""
    specs: dict[str, Any] = {"vision": checkpoint.vision, "text": checkpoint.text}
    for kind in specs:
        if config[kind]:
            specs[kind] = OmegaConf.to_container(config[kind], resolve=True)
            check_spec(specs[kind], kind)
    return specs


def described(checkpoint: Checkpoint) -> str:
    """The projection's arguments in one line."""
    arguments = checkpoint.projection.hyperparameters
    return " ".join(f"{key}={value}" for key, value in arguments.items() if value is not None)


def verify(config: DictConfig) -> None:
    """Read all of a store; print every bad shard and exit with status 1 if there is one.

    Raises:
        ConfigError: `store` is missing.
    """
    folder = Path(required(config, "store")).expanduser()
    console = Console(stderr=True)
    problems = verify_store(folder, progress(console))
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(1)
    store = FeatureStore(folder)
    print(
        f"{folder}: sound, {len(store.manifest.shards)} shards, {len(store.images)} images, "
        f"{len(store.captions)} captions"
    )


def progress(console: Console) -> Callable[[int, int], None] | None:
    """Shows how far verification is, on a terminal only."""
    if not console.is_terminal:
        return None
    return lambda done, total: console.print(f"{done}/{total} shards", end="\r")


def required(config: DictConfig, key: str) -> str:
    """The value of a key that the task needs.

    Raises:
        ConfigError: it is not given.
    """
    if config[key] is None:
        raise ConfigError(
            f"{key}: required but not given; write python -m talk2dino.convert {config.task} "
            f"{key}=… (--help explains the keys)"
        )
    return str(config[key])


def task_first(arguments: list[str]) -> list[str]:
    """The command line for Hydra: a task as the first word becomes `task=…`."""
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        return [f"task={arguments[0]}", *arguments[1:]]
    return arguments


TASKS: dict[str, Callable[[DictConfig], None]] = {"weights": weights, "verify": verify}


if __name__ == "__main__":
    sys.argv[1:] = task_first(sys.argv[1:])
    cli.run("convert", convert)
