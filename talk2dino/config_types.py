"""Whether a plain config value fits an argument's annotation."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import Container


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
    if inspect.isclass(hint) and not getattr(hint, "_is_protocol", False):
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
