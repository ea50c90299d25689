"""Checks of a config, and errors of its composition as one line.

Hydra checks keys given on the command line but not those in an experiment file. Here a wrong key or
type is refused wherever it stands: dataclasses cover plain nodes, constructor signatures the rest.
Numbers are held against one table of ranges before any work begins.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_object
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from talk2dino.errors import ConfigError, check_number
from talk2dino.renamed import TARGET, current

# The range of every number. A key means the same in every command, so it stands here by its own
# name, and by `node.name` where that node differs. Classes check what they are given themselves,
# for callers in Python; some ranges only keep out what nobody means, as `num_workers=10000000000`.
Range = tuple[int, int] | tuple[float, float]  # both ends count; of whole numbers, if they are

_MANY = 1_000_000
_GROUPS: list[tuple[Range, str]] = [
    ((1, 8192), "short_side window stride input_size image_size max_short_side height width"),
    (
        (1, _MANY),
        "batch_size window_batch_size block_rows mix_blocks save_top_k every_n_epochs n_trials "
        "parallel patches_per_image queue max_words k per_step mixture_per_step mixture_patches "
        "max_patches chunk_size min_count max_length hidden_dim text_dim vision_dim num_heads "
        "captions_per_scene long_side",
    ),
    ((0, _MANY), "pictures examples patience trial max_exemplars"),
    ((1, 10**9), "images_per_shard every_n_steps limit count total_steps steps_per_epoch"),
    ((0, 10**9), "warmup_steps"),
    ((0, 1024), "num_workers prefetch"),
    ((0, 1000), "num_iter hidden_layers"),
    ((0, 10**12), "minimum_area"),
    ((1, 10**12), "max_pixels"),
    ((0, 2**32 - 1), "seed"),
    ((0, 65535), "port ignore_index"),
    ((1, 10_000), "top"),
    ((1, 4096), "best"),
    ((100, 65_536), "tokens"),
    (
        (0.0, 1.0),
        "exemplar_weight keep share quantile alpha lambda_bg near_synonym synonym unexplained "
        "val_fraction decay",
    ),
    ((0.0, 0.99), "smoothing"),
    ((0.0, 1e6), "weight caption_weight mixture tolerance int8_tolerance warmup_epochs margin"),
    ((0.0, 1e3), "power lr weight_decay"),
    ((0.0, 6e4), "batch_wait_ms"),
    ((-1e9, 1e9), "min_delta"),
    ((1e-6, 1e6), "temperature logit_scale concentration scale meters_per_pixel"),
    ((1e-3, 1e6), "max_upload_mb max_megapixels memory_gb timeout"),
]
RANGES = {name: limits for limits, names in _GROUPS for name in names.split()}


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


def type_name(hint: Any) -> str:
    """An annotation as a user would say it."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def check_given(config: DictConfig) -> None:
    """Refuse a config that lacks a required value, or has a key too many or a number out of range.

    Raises:
        ConfigError: one line with the missing keys, the unknown one, or the number.
    """
    _check_keys(config, "")
    check_ranges(config)
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


def range_of(key: str) -> Range | None:
    """The range of a dotted key, if it has one."""
    return RANGES.get(key) or RANGES.get(key.rpartition(".")[2])


def check_ranges(config: DictConfig) -> None:
    """Refuse numbers out of their range, elsewhere infinity, NaN and endless ones (ConfigError)."""
    for key, value in _numbers(config, ""):
        limits = range_of(key)
        if limits is not None:
            check_number(key, value, *limits)
        elif not (math.isfinite(value) and abs(value) < 2**63):
            raise ConfigError(f"{key}={value}: no number that can be worked with")


def expected(key: str) -> str:
    """What a number must be, for a value that is none."""
    limits = range_of(key)
    if limits is None:
        return "a number"
    kind = "a whole number" if isinstance(limits[0], int) else "a number"
    return f"{kind} of {limits[0]:g} to {limits[1]:.12g}"


def _numbers(node: Any, path: str) -> Iterator[tuple[str, int | float]]:
    """All numbers of a config that stand there themselves, with their dotted keys."""
    names = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        inner = f"{path}.{name!s}" if isinstance(node, DictConfig) and path else path or str(name)
        child = node._get_node(name)
        if isinstance(child, (DictConfig, ListConfig)):
            if not child._is_none() and not child._is_missing() and not child._is_interpolation():
                yield from _numbers(child, inner)
        elif isinstance(value := child._value(), (int, float)) and not isinstance(value, bool):
            yield inner, value


def use_current_names(config: DictConfig) -> None:
    """Give every `_target_` the present name of its class, for configs of earlier versions."""
    for _, node in _targets(config, ""):
        if not OmegaConf.is_interpolation(node, TARGET):
            node[TARGET] = current(str(node[TARGET]))


def check_targets(config: DictConfig) -> None:
    """Refuse arguments that a `_target_` does not take (ConfigError)."""
    for path, node in _targets(config, ""):
        _check_arguments(path, node)


def _targets(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """All nodes with a `_target_`, with their dotted paths."""
    if not isinstance(node, DictConfig):
        return
    if TARGET in node:
        yield path, node
    for key in node:
        name = key if isinstance(key, int) else str(key)  # an int in benchmark.label_map
        if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
            yield from _targets(node[key], f"{path}.{key!s}" if path else str(key))


def _check_arguments(path: str, node: DictConfig) -> None:
    try:
        target = get_object(node[TARGET])
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(
            f"{path}.{TARGET}={node[TARGET]!r} cannot be imported ({error})"
        ) from error
    parameters = inspect.signature(target).parameters
    types = argument_types(target)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in node:
        if str(key).startswith("_"):  # _target_, _partial_, …
            continue
        if key not in parameters:
            valid = [f"{path}.{name}" for name in parameters if name != "self"]
            raise ConfigError(unknown_key(f"{path}.{key!s}", node[key], valid))
        if OmegaConf.is_interpolation(node, str(key)):  # may need a running Hydra to resolve
            continue
        value, wanted = node[key], types.get(str(key), Any)
        if not fits(value, wanted):
            raise ConfigError(
                f"{path}.{key!s}={value!r} is {type(value).__name__}, expected {type_name(wanted)}"
            )


def unknown(what: str, name: str, valid: Iterable[str], value: str = "") -> str:
    """One line about a key or an option that does not exist, with the nearest one that does."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(names)[:12])}"
    return f"unknown {what} {name}{value}; {hint}"


def unknown_key(key: str, value: object, valid: Iterable[str]) -> str:
    """One line about an unknown key: its value, its type, and the nearest valid key."""
    return unknown("config key", key, valid, f" (value {value!r}, {type(value).__name__})")


def config_folder() -> Path:
    """Return the folder `conf`: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def config_groups() -> set[str]:
    """Names of the config groups."""
    return {folder.name for folder in config_folder().iterdir() if folder.is_dir()}


def explain(error: Exception, command: str) -> str:
    """Turn an error of config composition into one line that names the nearest valid key."""
    text = str(error)
    causes = [str(error.__cause__)] if error.__cause__ else []
    if isinstance(error, OverrideParseException):
        reason = _first_line(text.rpartition(f"'{error.override}'")[2].strip() or text)
        return (
            f"{error.override}: not of the form key=value ({reason}); "
            "put quotes around values with special characters: 'key=\"value\"'"
        )
    number = re.match(r"Error merging override ([^=]+)=", text)
    if number and re.search("Integer|Float", text + "".join(causes)):
        key = number.group(1).lstrip("+~")
        return f"{key}={_given_value(key)}: give {expected(key)}"
    override = re.match(r"Could not override '([^']+)'", text)
    if override:
        key = override.group(1)
        value = _given_value(key)
        typed = next((c for c in causes if "could not be converted" in c or "Invalid" in c), None)
        if typed:
            return f"{key}={value}: {_first_line(typed)}"
        return unknown_key(key, value, valid_keys(command))
    group = re.search(
        r"Could not find '([^']+)/([^'/]+)'.*?Available options[^\n]*\n(.*)", text, re.S
    )
    if group:
        name, option, options = group.groups()
        if name.startswith("hydra/"):  # a plugin of Hydra, chosen by a group of ours
            return f"{option}: not installed; pip install 'talk2dino[sweep]'"
        return unknown("option", f"{name}={option}", [f"{name}={one}" for one in options.split()])
    absent = re.search(r"Error locating target '([^']+)'", text)
    if absent and current(absent.group(1)) != absent.group(1):  # Hydra builds callbacks on its own
        return f"_target_={absent.group(1)}: is called {current(absent.group(1))} now"
    nested = re.search(r"Key '([^']+)' not in '([^']+)'", text)
    full = re.search(r"full_key: (\S+)", text)
    if nested and full:
        return unknown("config key", full.group(1), valid_keys(command))
    lines = [line.strip() for line in [*text.splitlines(), *causes[:1]] if line.strip()]
    return "; ".join(map(_first_line, lines[:3])) if lines else type(error).__name__


def valid_keys(command: str) -> list[str]:
    """All dotted keys of a command's default config, and its groups."""
    groups = config_groups()
    choices = [item for item in sys.argv[1:] if item.partition("=")[0] in groups]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            config = hydra.compose(command, choices)
        except (HydraException, OmegaConfBaseException):
            config = hydra.compose(command)
    keys: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                inner = f"{path}.{key}" if path else str(key)
                keys.append(inner)
                walk(value, inner)

    walk(OmegaConf.to_container(config, resolve=False), "")
    return keys + sorted(groups)


def _given_value(key: str) -> str:
    """What the command line says for a key."""
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name.lstrip("+~") == key:
            return value
    return ""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
