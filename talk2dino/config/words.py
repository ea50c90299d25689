"""Class names as a user typed them: on the command line, in a config or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from talk2dino.datasets.benchmarks.classes import read_classes, shipped_lists
from talk2dino.errors import ConfigError


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
