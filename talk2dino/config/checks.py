"""Checks of everything in a config that is built by `_target_`, and of keys and types anywhere.

Hydra checks keys given on the command line but not those in an experiment file. Here a wrong key or
type is refused wherever it stands: dataclasses cover plain nodes, constructor signatures the rest.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import Container, DictConfig, OmegaConf

from talk2dino.errors import ConfigError


def argument_types(target: Any) -> dict[str, Any]:
    """Annotations of a class's or function's arguments; empty where they cannot be resolved."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that a foreign library imports for type checkers only
        return {}


def fits(value: object, hint: Any) -> bool:
    """Whether a config value may stand for an argument annotated so; in doubt it may."""
    origin = get_origin(hint)
    if hint is Any:  # a class since Python 3.11
        return True
    if origin in (Union, UnionType):
        return any(fits(value, arm) for arm in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if isinstance(value, Container):  # a node of its own, or a list
        return hint not in (int, float, str, bool, type(None))
    if hint is Path:
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # list[int] is a class as well on Python 3.10
    if origin is None and inspect.isclass(hint) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    if inspect.isclass(origin):  # Sequence[str] and alike: a plain value is none
        return not issubclass(origin, Collection)
    return hint is not None or value is None  # a TypeVar or a Protocol takes anything


def readable(hint: Any) -> str:
    """An annotation as a user would say it."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(readable, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def check_given(config: DictConfig) -> None:
    """Refuse a config that lacks a required value or has a key too many (`+key=value`).

    Raises:
        ConfigError: one line with the missing keys, or the unknown one.
    """
    _check_keys(config, "")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: required but not given; add {missing[0]}=… "
            "to the command line (--help explains the keys)"
        )


def _check_keys(node: DictConfig, path: str) -> None:
    """Compare the keys of plain nodes with their dataclass."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = [f"{path}{item.name}" for item in fields(kind)]
    for key in map(str, node):
        if f"{path}{key}" not in known:
            raise ConfigError(unknown_key(f"{path}{key}", node[key], known))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _check_keys(child, f"{path}{key}.")


def check_targets(config: DictConfig) -> None:
    """Refuse arguments that a `_target_` does not take.

    Raises:
        ConfigError: one line with the key, the value and the nearest valid key.
    """
    for path, node in _targets(config, ""):
        _check_arguments(path, node)


def _targets(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """All nodes with a `_target_`, with their dotted paths."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield path, node
    for key in node:
        name = key if isinstance(key, int) else str(key)  # an int in benchmark.label_map
        if not OmegaConf.is_interpolation(node, name):
            yield from _targets(node[key], f"{path}.{key!s}" if path else str(key))


def _check_arguments(path: str, node: DictConfig) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(
            f"{path}._target_={node['_target_']!r} cannot be imported ({error})"
        ) from error
    parameters = inspect.signature(target).parameters
    types = argument_types(target)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if str(key).startswith("_"):  # _target_, _partial_, …
            continue
        if key not in parameters:
            raise ConfigError(unknown_key(f"{path}.{key!s}", node[key], _join(path, parameters)))
        if OmegaConf.is_interpolation(node, str(key)):  # may need a running Hydra to resolve
            continue
        value, wanted = node[key], types.get(str(key), Any)
        if not fits(value, wanted):
            raise ConfigError(
                f"{path}.{key!s}={value!r} is {type(value).__name__}, expected {readable(wanted)}"
            )


def _join(path: str, parameters: Mapping[str, Any]) -> list[str]:
    return [f"{path}.{name}" for name in parameters if name != "self"]


def unknown_key(key: str, value: object, valid: Iterable[str]) -> str:
    """One line about an unknown key: its value, its type, and the nearest valid key."""
    names = list(valid)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(names)[:12])}"
    return f"unknown config key {key} (value {value!r}, {type(value).__name__}); {hint}"
