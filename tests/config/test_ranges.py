"""The range of every number of the configs: a new key without one fails here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from talk2dino.config.checks import argument_types, check_ranges, config_folder, range_of
from talk2dino.config.schemas import SCHEMAS
from talk2dino.errors import ConfigError
from tests.helpers.pipeline import fails

NEVER: tuple[float, ...] = (math.nan, math.inf, -math.inf, 10**30, -(10**30))


def _is_number(hint: Any) -> bool:
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return int in arms or float in arms


def of_schemas(schema: type, path: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield from of_schemas(hint, f"{path}{name}.")  # type: ignore[arg-type]
        elif _is_number(hint):
            yield f"{path}{name}"


def of_groups() -> Iterator[str]:
    for file in sorted(config_folder().glob("*/*.yaml")):
        content = OmegaConf.load(file)
        target = str(content.get("_target_", "")) if isinstance(content, DictConfig) else ""
        if target.startswith("talk2dino."):
            types = argument_types(get_object(target))
            yield from (f"{file.parent.name}.{n}" for n, hint in types.items() if _is_number(hint))


KEYS = sorted({*(key for one in SCHEMAS.values() for key in of_schemas(one)), *of_groups()})


def node(key: str, value: object) -> DictConfig:
    first, _, rest = key.partition(".")
    return OmegaConf.create({first: {rest: value} if rest else value})


@pytest.mark.parametrize("key", KEYS)
def test_every_number_has_its_range(key: str) -> None:
    limits = range_of(key)
    assert limits is not None, f"give {key} a range in config/checks.py"
    low, high = limits
    for value in (low, high):
        check_ranges(node(key, value))
    step = 1 if isinstance(low, int) else max(1e-9, abs(low) / 100)
    for wrong in (*NEVER, low - step, high * 2 + 1):
        with pytest.raises(ConfigError, match=rf"^{key}=.*: use .*\d to \d"):
            check_ranges(node(key, wrong))


def test_the_configs_lie_within() -> None:
    for file in sorted(config_folder().rglob("*.yaml")):
        content = OmegaConf.load(file)
        content.pop("hydra", None)
        content.pop("defaults", None)
        check_ranges(OmegaConf.create({file.parent.name: content}))


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("search", "top=nan", "top=nan: give a whole number of 1 to 10000"),
        ("search", "top=", "top=: give a whole number of 1 to 10000"),
        ("app", "port=[1]", "port=[1]: give a whole number of 0 to 65535"),
        ("video", "smoothing=true", "smoothing=true: give a number of 0 to 0.99"),
        ("serve", f"queue={10**30}", f"queue={10**30}: use 1 to 1000000"),
        ("map", "stretch=[nan,1]", "stretch=nan: no number that can be worked with"),
    ],
)
def test_a_number_that_is_none_is_said_with_its_range(
    command: str, given: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fails(capfd, command, given) == said
