"""What all commands share: compose, check, run, and report errors as one line."""

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
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from talk2dino.config_errors import config_folder, config_groups, explain
from talk2dino.config_schema import check_given, check_targets, register_schemas
from talk2dino.errors import ConfigError, UserError


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
