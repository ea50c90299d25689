"""What all commands share: where the configs are, and errors as one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from talk2dino.config_schema import check_given, check_targets, register_schemas, unknown_key
from talk2dino.errors import ConfigError, UserError


def config_folder() -> Path:
    """Return the folder `conf`: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run(
    command: str,
    task: Callable[[DictConfig], Any],
    complete: Callable[[DictConfig], None] = lambda config: None,
) -> None:
    """Compose `<command>.yaml` from the command line and call `task` with the checked config.

    `complete` fills in the values that the config leaves to the data, before they are checked.
    An error that is the user's to mend is printed as one line and exits with status 2.
    """
    register_schemas()

    def guarded(config: DictConfig) -> Any:
        quiet_libraries()
        try:
            check_given(config)
            complete(config)
            check_targets(config)
            return task(config)
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            _stop(message)

    for group in config_groups():
        if f"{group}=null" in sys.argv[1:]:  # Hydra answers with a ValueError
            _stop(f"{group}=null: to leave out a group, write ~{group}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them
    main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=command)
    try:
        main(guarded)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _stop(explain(error, command))


def user_message(error: Exception) -> str | None:
    """Return the line for the user; None if the error is not his to mend.

    A loader worker or a spawned rank hands its error over as the text of a traceback.
    """
    relayed = re.findall(r"^talk2dino\.errors\.\w+: (.*)$", str(error), re.M)
    if relayed:
        return str(relayed[-1])
    return str(error) if isinstance(error, UserError) else None


def quiet_libraries() -> None:
    """Keep advertisements and inner affairs of libraries out of the terminal."""
    for name in ("sentence_transformers", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 asks torch's pytree in a way that torch 2.14 no longer likes: not ours to mend.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Memory-mapped features need no loader processes, and short runs log rarely: both are chosen.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # Results are written as they come and counted in a metric.
    warnings.filterwarnings("ignore", message=".*predict returned None.*")
    # Every rank validates on everything, so its figures are already those of all ranks.
    warnings.filterwarnings("ignore", message=".*It is recommended to use .self.log.*sync_dist.*")
    # Evaluation counts into one confusion matrix and hands out nothing per image.
    warnings.filterwarnings("ignore", message=".*predict returned None.*")
    # The val loader's length is known; batches have their own sizes.
    warnings.filterwarnings("ignore", message=".*Trying to infer the `batch_size`.*")


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a node; a UserError from inside comes out as itself."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _stop(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


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
        options = group.group(3).split()
        return unknown_option(group.group(1), group.group(2), options)
    nested = re.search(r"Key '([^']+)' not in '([^']+)'", text)
    full = re.search(r"full_key: (\S+)", text)
    if nested and full:
        return unknown_key(full.group(1), "", valid_keys(command)).replace(" (value '', str)", "")
    lines = [line.strip() for line in [*text.splitlines(), *causes[:1]] if line.strip()]
    return "; ".join(map(_first_line, lines[:3])) if lines else type(error).__name__


def config_groups() -> set[str]:
    """Names of the config groups."""
    return {folder.name for folder in config_folder().iterdir() if folder.is_dir()}


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


def unknown_option(group: str, option: str, options: list[str]) -> str:
    """One line about a group option that does not exist."""
    line = unknown_key(f"{group}={option}", option, [f"{group}={name}" for name in options])
    return line.replace("unknown config key", "unknown option").replace(
        f" (value {option!r}, str)", ""
    )


def _given_value(key: str) -> str:
    """What the command line says for a key."""
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name.lstrip("+~") == key:
            return value
    return ""


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def require_output_folder(path: Path, key: str) -> Path:
    """Create a folder to write into, or say why that is impossible.

    Raises:
        ConfigError: the path is a file or cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot create this folder ({error.strerror})") from error
    return path
