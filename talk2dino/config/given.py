"""What a user names on the command line: a checkpoint with its encoders, and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from talk2dino.config.command import build
from talk2dino.datasets.benchmarks.classes import read_classes, shipped_lists
from talk2dino.encoders.devices import choose_device
from talk2dino.errors import ConfigError
from talk2dino.inference.model import Talk2DINO

CHECKPOINTS = (
    "a checkpoint is a run folder, a .safetensors, .ckpt or original .pth file, or a Hub id like "
    "org/name; `make quickstart` trains one in minutes: checkpoint=outputs/quickstart/dense"
)


def require(config: DictConfig, *keys: str) -> None:
    """Name all keys at once that are not given, and say where a checkpoint comes from.

    Raises:
        ConfigError: a key is null.
    """
    missing = [key for key in keys if config[key] is None]
    if missing:
        how = CHECKPOINTS if "checkpoint" in missing else "for instance classes='[cat,sofa]'"
        raise ConfigError(f"{', '.join(f'{key}=…' for key in missing)} not given; {how}")


def load_model(config: DictConfig, device: str | None = None) -> Talk2DINO:
    """Load `checkpoint` with its own encoders, or with those that `vision` and `text` choose.

    Args:
        config: of a command with these keys.
        device: where to; None takes the one that `accelerator` names.

    Raises:
        UserError: the checkpoint or an encoder cannot be loaded.
    """
    return Talk2DINO.from_pretrained(
        config.checkpoint,
        device=device or choose_device(config.accelerator),
        vision=build(config.vision) if config.vision else None,
        text=build(config.text) if config.text else None,
    )


def class_words(given: object) -> dict[str, tuple[str, ...]]:
    """Class names and the words that stand for them, from the command line or a file.

    Args:
        given: `[cat,"sofa; couch"]`, `[cat,[sofa,couch]]`, `"cat, sofa"`, a `.txt` or `.json` file
            or the name of a list that comes with the package (see `datasets.benchmarks.classes`).

    Raises:
        ConfigError: no class.
        DataError: a class file that cannot be read, or names a class twice.
    """
    if isinstance(given, str) and _is_file(given):
        specs = read_classes(given).prompted
    else:
        parts = listed(given) if isinstance(given, ListConfig) else str(given).split(",")
        named = ["; ".join(part) if isinstance(part, list) else str(part).strip() for part in parts]
        if not any(named):
            raise ConfigError("classes: the list is empty; name what to look for: [cat,sofa]")
        specs = read_classes([name for name in named if name]).prompted
    return {spec.name: spec.synonyms for spec in specs}


def _is_file(given: str) -> bool:
    shipped = all(part in shipped_lists() for part in given.split("+"))
    return shipped or Path(given).suffix.lower() in (".txt", ".json")


def listed(given: Any) -> list[Any]:
    """A config list as a plain one; a single string is one entry."""
    if isinstance(given, ListConfig):
        return list(OmegaConf.to_container(given))  # type: ignore[arg-type]
    return [given] if isinstance(given, str) else list(given or [])
