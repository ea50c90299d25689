"""Errors of config composition as one line that names the nearest valid key or option."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from talk2dino.config.checks import unknown, unknown_key
from talk2dino.renamed import current


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
