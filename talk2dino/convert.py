"""`python -m talk2dino.convert TASK …`: weights, features and label maps from one form to another.

A task is a function whose parameters are keys of the config; those without a default must not be
null.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from talk2dino.alignment.checkpoint import read_checkpoint, save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Activation, Projection
from talk2dino.config import command
from talk2dino.config.command import progress, require_output_folder
from talk2dino.datasets.benchmarks.public_datasets import convert_coco_object
from talk2dino.datasets.tars import expand_tars
from talk2dino.encoders.build import build_text, build_vision, check_spec
from talk2dino.encoders.original import published_names, write_original
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
from talk2dino.files import user_path

Spec = dict[str, Any]  # of an encoder


def convert(config: DictConfig) -> None:
    """Do the task that the config names.

    Raises:
        ConfigError: an unknown task, a key that it needs is missing, or one that it does not take
            is given.
    """
    if config.task not in TASKS:
        raise ConfigError(
            f"task={config.task}: unknown; write python -m talk2dino.convert with one of "
            f"{', '.join(TASKS)}"
        )
    task = TASKS[config.task]
    parameters = inspect.signature(task).parameters
    refuse_idle(config.task, list(parameters))
    for name, parameter in parameters.items():
        if config[name] is None and parameter.default is parameter.empty:
            raise ConfigError(
                f"{name}: required but not given; write python -m talk2dino.convert "
                f"{config.task} {name}=… (--help explains the keys)"
            )
    task(**{name: plain(config, name) for name in parameters})


def refuse_idle(task: str, taken: Sequence[str]) -> None:
    """Refuse a key of another task on the command line, as it would do nothing.

    Raises:
        ConfigError: the first one.
    """
    known = {name for one in TASKS.values() for name in inspect.signature(one).parameters}
    for override in HydraConfig.get().overrides.task:
        key = re.split("[=.@]", override.lstrip("+~"))[0]
        if key in known and key not in taken:
            raise ConfigError(
                f"{key}: does nothing for {task}, which takes {', '.join(taken)}; leave it out"
            )


def plain(config: DictConfig, name: str) -> Any:
    """The value of a key; an encoder as its spec.

    Raises:
        CheckpointError: a spec from which no encoder of this package can be built.
    """
    value = config[name]
    if not OmegaConf.is_config(value):
        return value
    spec: Any = OmegaConf.to_container(value, resolve=True)
    check_spec(spec, name)
    return spec


def weights(
    input: str,
    output: str,
    activation: Activation | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Read a projection in any format; write it as `.safetensors`, `.pth` or a whole model.

    Args:
        input: `.pth`, `.safetensors`, `.ckpt`, run folder, Hub id, the original's or not.
        output: file to write, or a folder for a model in the layout of the original's repositories
            on the Hub; never overwritten.
        activation: of a file that holds tensors only; None for no activation.
        vision: spec of the vision encoder; None keeps the input's.
        text: spec of the text encoder; None keeps the input's.

    Raises:
        ConfigError: the output exists or cannot hold the projection.
        CheckpointError: the input is no projection.
    """
    target = user_path(output)
    if target.suffix not in (".safetensors", ".pth", ""):
        raise ConfigError(
            f"output={target}: the name must end in .safetensors or .pth, or have no ending for a "
            "folder in the original's layout"
        )
    if target.exists():
        raise ConfigError(f"output={target}: is there already; use another name or remove it")
    checkpoint = read_checkpoint(input, activation, whole=not target.suffix)
    projection = checkpoint.projection
    if target.suffix == ".pth" and isinstance(projection, CLIPLastLayer):
        raise ConfigError(f"output={target}: .pth has no CLIPLastLayer; write .safetensors")
    specs = {"vision": vision or checkpoint.vision, "text": text or checkpoint.text}
    require_output_folder(target.parent, "output")
    if target.suffix:
        save_projection(projection, target, checkpoint.extra | specs)
    else:
        write_model(projection, specs, target)
    arguments = (f"{k}={v}" for k, v in projection.hyperparameters.items() if v is not None)
    print(f"projection: {type(projection).__name__} {' '.join(arguments)}")
    print_encoders(specs)
    if target.suffix == ".pth":
        print("a .pth holds the weights only: its encoders and its activation are not written")
    print(f"weights: {target}")


def write_model(projection: Projection, specs: Mapping[str, Spec | None], folder: Path) -> None:
    """Write encoders and projection as the original's repositories hold them.

    Raises:
        ConfigError: an encoder is not named, or a part that the layout or the original lacks.
    """
    vision, text = specs["vision"], specs["text"]
    if vision is None or text is None:
        raise ConfigError(f"output={folder}: a whole model needs its encoders; add vision=… text=…")
    if getattr(projection, "activation", None) != "tanh":
        raise ConfigError(
            f"output={folder}: the original's layout means ψ with the activation tanh"
        )
    names = published_names(vision, text)
    encoders = build_vision(vision), build_text(text)
    states = {
        "vision": encoders[0].model.state_dict(),
        "text": encoders[1].tower.state_dict(),  # type: ignore[attr-defined]  # CLIP, by its name
        "projection": projection.state_dict(),
    }
    write_original(folder, names, encoders[0].image_size, states)


def fill_store(
    open_samples: Callable[[str], OriginalSamples],
    input: str,
    store: str,
    split: str,
    dtype: str,
    images_per_shard: int,
    embedding: str | None = None,
    vision: Spec | None = None,
    text: Spec | None = None,
) -> None:
    """Convert features that the original extracted; see `convert_features`."""
    samples = open_samples(input)
    folder = require_output_folder(user_path(store), "store")
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
    print_encoders({"vision": vision, "text": text})
    for table, names in manifest.fields.items():
        print(f"{table}: {', '.join(names)}")
    if manifest.skipped:
        print(
            f"{manifest.skipped} images without features were skipped; the list is "
            f"{folder / f'{split}-skipped.jsonl'}"
        )
    print(f"{folder}: {sizes(manifest)}")


def feature_file(path: str) -> FeatureFile:
    """The original's `.pth` of pre-extracted features."""
    return FeatureFile(user_path(path))


def feature_tars(pattern: str) -> FeatureTars:
    """The original's tars of features, by a brace range, a glob or a folder."""
    return FeatureTars(expand_tars(pattern, "input"))


def copy_store(compressed: bool, store: str, output: str) -> None:
    """Write a compressed or a contiguous copy of a store; see `archive_store`."""
    source, target = user_path(store), user_path(output)
    before = Manifest.read(source)
    require_output_folder(target, "output")
    with progress("archive" if compressed else "unarchive") as advance:
        manifest = archive_store(source, target, compressed, advance)
    print(f"{source}: {sizes(before)}")
    print(f"{target}: {sizes(manifest)}")


def verify(store: str) -> None:
    """Read all of a store; print every bad shard and exit with status 1 if there is one."""
    folder = user_path(store)
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


def coco_object(input: str, output: str, num_workers: int) -> None:
    """Convert COCO-Stuff label maps into those of COCO-Object; see `convert_coco_object`.

    Args:
        input: folder with `train2017` and `val2017` of stuffthingmaps_trainval2017, or one of them.
        output: folder to write into; may be the same.
        num_workers: processes.
    """
    target = user_path(output)
    with progress("coco_object") as advance:
        written = convert_coco_object(user_path(input), target, num_workers, advance)
    print(f"{target}: {written} label maps written")


TASKS: Mapping[str, Callable[..., None]] = {
    "weights": weights,
    "features": partial(fill_store, feature_file),
    "tars": partial(fill_store, feature_tars),
    "archive": partial(copy_store, True),
    "unarchive": partial(copy_store, False),
    "verify": verify,
    "coco_object": coco_object,
}


def print_encoders(specs: Mapping[str, Spec | None]) -> None:
    """Say which encoders the result names, and how to name one."""
    for kind, spec in specs.items():
        print(f"{kind}: {spec['name'] if spec else f'not named; say it with {kind}=…'}")


def sizes(manifest: Manifest) -> str:
    """Counts and bytes of a store in one line."""
    shards = manifest.shards
    images, captions = sum(s.images for s in shards), sum(s.captions for s in shards)
    size = sum(shard.bytes for shard in shards) / 1e6
    return f"{images} images, {captions} captions, {len(shards)} shards, {size:.1f} MB"


def task_first(arguments: list[str]) -> list[str]:
    """The command line for Hydra: a task as the first word becomes `task=…`."""
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        return [f"task={arguments[0]}", *arguments[1:]]
    return arguments


if __name__ == "__main__":
    sys.argv[1:] = task_first(sys.argv[1:])
    command.run("convert", convert)
