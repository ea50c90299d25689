"""What evaluations left in their run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from talk2dino.errors import DataError
from talk2dino.evaluation.settings import compared
from talk2dino.files import read_json

_KINDS = {
    **{"miou": float, "pixel_accuracy": float, "seconds": float},
    **{"images": int, "per_class": dict, "config": dict},
}
RESULTS, UNTRAINED, FAILED = "results.json", "results_untrained.json", "failed.json"


@dataclass(frozen=True)
class Run:
    """An evaluation.

    Attributes:
        folder: its run folder.
        benchmark: name.
        checkpoint: as it was given.
        pamr: whether the windows were refined.
        results: contents of `results.json`; empty if the run has none.
        error: why it has none.
        settings: the other values that decide its figures, by dotted keys.
        reference: published figures of the benchmark.
        untrained: whether this is the freshly initialized projection beside the checkpoint.
    """

    folder: Path
    benchmark: str
    checkpoint: str
    pamr: bool
    results: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False

    @property
    def miou(self) -> float | None:
        """In percent; None without results."""
        return float(self.results["miou"]) if self.results else None

    @property
    def file(self) -> Path:
        """Where its results are, or would be."""
        return self.folder / (UNTRAINED if self.untrained else RESULTS)

    @property
    def outputs(self) -> Path:
        """Folder of its confusion matrix, figures per image and examples."""
        return self.folder / "untrained" if self.untrained else self.folder


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read run folders, sweep folders (with a run folder per job), and `results.json` files.

    Raises:
        DataError: a path holds no evaluation, or an unreadable one.
    """
    found: list[Run] = []
    for path in paths:
        runs = [_from_file(path)] if path.is_file() else _from_folder(path) or read_sweep(path)
        if not runs:
            raise DataError(f"{path}: no {RESULTS}; give the run folder of talk2dino.evaluate")
        found += runs
    return found


def _from_folder(folder: Path) -> list[Run]:
    runs = [_from_file(folder / n) for n in (UNTRAINED, RESULTS) if (folder / n).is_file()]
    if (folder / RESULTS).is_file():
        return runs
    config = read_config(folder / ".hydra" / "config.yaml")  # noted before the job began
    if (folder / FAILED).is_file():
        error = read_json(folder / FAILED, dict, "the error of a job").get("error", "failed")
        return [*runs, _run(folder, config, {}, str(error))]
    if config and (folder / "records").is_dir():
        return [*runs, _run(folder, config, {}, "unfinished")]
    return runs


def read_sweep(folder: Path) -> list[Run]:
    """The evaluations of a sweep folder in the order of its jobs; failed ones have no results."""
    jobs = sorted(
        (path for path in folder.glob("*/") if not path.name.startswith(".")),
        key=lambda path: (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0),
    )
    return [run for job in jobs for run in _from_folder(job)]


def _from_file(file: Path) -> Run:
    results = read_json(file, dict, "results of talk2dino.evaluate")
    needed = ("benchmark", *(key for key in _KINDS if key != "config"))
    absent = [key for key in needed if key not in results]
    if absent:
        raise DataError(f"{file}: has no {absent[0]}; give results of talk2dino.evaluate")
    for key, kind in _KINDS.items():
        value = results.get(key, kind())
        if not isinstance(value, kind | int if kind is float else kind) or value != value:
            shown = f"{value!r:.60}"
            raise DataError(f"{file}: {key} is {shown}; give results of talk2dino.evaluate")
    return _run(file.parent, results.get("config", {}), results, None, file.name == UNTRAINED)


def _run(
    folder: Path,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    error: str | None,
    untrained: bool = False,
) -> Run:
    node = config.get("benchmark")
    protocol: Mapping[str, Any] = node if isinstance(node, Mapping) else {}
    return Run(
        folder,
        benchmark=str(results.get("benchmark") or protocol.get("name") or "?"),
        checkpoint=str(config.get("checkpoint") or folder.name),
        pamr=bool(config.get("pamr")),
        results=results,
        error=error,
        settings=compared(config),
        reference=protocol.get("reference") or {},
        untrained=untrained,
    )


def read_config(file: Path) -> dict[str, Any]:
    """A run's config; empty if there is none or it is no YAML mapping."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
