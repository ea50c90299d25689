"""`python -m talk2dino.convert TASK …`: weights, features and label maps from one form to another.

A task is a function of plain parameters, named like the config's keys; those without a default are
required.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from talk2dino import cli
from talk2dino.conversions.labels import coco_object
from talk2dino.conversions.stores import archive, features, tars, unarchive, verify
from talk2dino.conversions.weights import weights
from talk2dino.encoders.build import check_spec
from talk2dino.errors import ConfigError

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
    cli.run("convert", convert)
