"""`python -m talk2dino.convert TASK …`: weights, features and label maps from one form to another.

A task is a function of plain parameters, named like the config's keys; those without a default are
required.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from talk2dino.alignment.checkpoint import Checkpoint, read_checkpoint, save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Activation
from talk2dino.config import command
from talk2dino.config.command import require_output_folder
from talk2dino.datasets.benchmarks.public_datasets import convert_coco_object
from talk2dino.datasets.tars import expand_tars
from talk2dino.encoders.build import check_spec
from talk2dino.encoders.hub import resolve_checkpoint
from talk2dino.errors import ConfigError
from talk2dino.features.from_original import (
    FeatureFile,
    FeatureTars,
    OriginalSamples,
    convert_features,
)
from talk2dino.features.store.archive import archive_store
from talk2dino.features.store.reader import FeatureStore
from talk2dino.features.store.schema import Manifest
from talk2dino.features.store.verify import verify_store
from talk2dino.features.store.writer import IMAGES_PER_SHARD


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives `advance(done, total)`, which moves a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


def coco_object(input: str, output: str, num_workers: int = 2) -> None:
    """Convert COCO-Stuff label maps into those of COCO-Object; see `convert_coco_object`.

    Args:
        input: folder with `train2017` and `val2017` of stuffthingmaps_trainval2017, or one of them.
        output: folder to write into; may be the same.
        num_workers: processes.
    """
    target = Path(output).expanduser()
    with progress("coco_object") as advance:
        written = convert_coco_object(Path(input).expanduser(), target, num_workers, advance)
    print(f"{target}: {written} label maps written")


Spec = dict[str, Any]


def features(
    input: str,
    store: str,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = IMAGES_PER_SHARD,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Convert the original's `.pth` of pre-extracted features; see `convert_features`."""
    samples = FeatureFile(Path(input).expanduser())
    _fill(samples, store, split, dtype, images_per_shard, embedding, vision, text)


def tars(
    input: str,
    store: str,
    split: str = "train",
    dtype: str = "float16",
    images_per_shard: int = IMAGES_PER_SHARD,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Convert the original's tars (brace range, glob or folder) of features; see `features`."""
    samples = FeatureTars(expand_tars(input, "input"))
    _fill(samples, store, split, dtype, images_per_shard, embedding, vision, text)


def archive(store: str, output: str) -> None:
    """Write a compressed copy of a store; see `archive_store`."""
    _copy(store, output, compressed=True)


def unarchive(store: str, output: str) -> None:
    """Write a contiguous copy of an archive; see `archive_store`."""
    _copy(store, output, compressed=False)


def verify(store: str) -> None:
    """Read all of a store; print every bad shard and exit with status 1 if there is one."""
    folder = Path(store).expanduser()
    with progress("verify") as advance:
        problems = verify_store(folder, advance)
    for problem in problems:
        print(problem)
    if problems:
        raise SystemExit(1)
    opened = FeatureStore(folder)
    print(
        f"{folder}: sound, {len(opened.manifest.shards)} shards, {len(opened.images)} images, "
        f"{len(opened.captions)} captions"
    )


def _fill(
    samples: OriginalSamples,
    store: str,
    split: str,
    dtype: str,
    images_per_shard: int,
    embedding: str | None,
    vision: Spec | None,
    text: Spec | None,
) -> None:
    folder = require_output_folder(Path(store).expanduser(), "store")
    with progress("convert") as advance:
        manifest = convert_features(
            samples,
            folder,
            split=split,
            dtype=dtype,
            images_per_shard=images_per_shard,
            embedding=embedding,
            vision=vision,
            text=text,
            advance=advance,
        )
    for kind, spec in (("vision", vision), ("text", text)):
        print(f"{kind}: {spec['name'] if spec else f'not named; say it with {kind}=…'}")
    for table, names in manifest.fields.items():
        print(f"{table}: {', '.join(names)}")
    if manifest.skipped:
        print(
            f"{manifest.skipped} images without features were skipped; the list is "
            f"{folder / f'{split}-skipped.jsonl'}"
        )
    print(f"{folder}: {_sizes(manifest)}")


def _copy(store: str, output: str, compressed: bool) -> None:
    source, target = Path(store).expanduser(), Path(output).expanduser()
    before = Manifest.read(source)
    require_output_folder(target, "output")
    with progress("archive" if compressed else "unarchive") as advance:
        manifest = archive_store(source, target, compressed, advance)
    print(f"{source}: {_sizes(before)}")
    print(f"{target}: {_sizes(manifest)}")


def _sizes(manifest: Manifest) -> str:
    shards = manifest.shards
    images, captions = sum(s.images for s in shards), sum(s.captions for s in shards)
    size = sum(shard.bytes for shard in shards) / 1e6
    return f"{images} images, {captions} captions, {len(shards)} shards, {size:.1f} MB"


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


TASKS: dict[str, Callable[..., None]] = {
    task.__name__: task
    for task in (weights, features, tars, archive, unarchive, verify, coco_object)
}


def convert(config: DictConfig) -> None:
    """Do the task that the config names.

    Raises:
        ConfigError: an unknown task, or a key that it needs is missing.
    """
    if config.task not in TASKS:
        raise ConfigError(
            f"task={config.task}: unknown; write python -m talk2dino.convert with one of "
            f"{', '.join(TASKS)}"
        )
    task = TASKS[config.task]
    parameters = inspect.signature(task).parameters
    for name, parameter in parameters.items():
        if config[name] is None and parameter.default is parameter.empty:
            raise ConfigError(
                f"{name}: required but not given; write python -m talk2dino.convert "
                f"{config.task} {name}=… (--help explains the keys)"
            )
    task(**{name: plain(config, name) for name in parameters})


def plain(config: DictConfig, name: str) -> Any:
    """The value of a key; an encoder as its spec.

    Raises:
        CheckpointError: a spec from which no encoder of this package can be built.
    """
    value = config[name]
    if not OmegaConf.is_config(value):
        return value
    spec = OmegaConf.to_container(value, resolve=True)
    assert isinstance(spec, dict)
    check_spec({str(key): item for key, item in spec.items()}, name)
    return spec


def task_first(arguments: list[str]) -> list[str]:
    """The command line for Hydra: a task as the first word becomes `task=…`."""
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        return [f"task={arguments[0]}", *arguments[1:]]
    return arguments


if __name__ == "__main__":
    sys.argv[1:] = task_first(sys.argv[1:])
    command.run("convert", convert)
