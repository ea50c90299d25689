"""What the runs of a sweep left in their folders: overrides, state, time and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from talk2dino.sweeps.pruning import PRUNED

OVERRIDES = ".hydra/overrides.yaml"


@dataclass(frozen=True)
class Run:
    """One job of a sweep.

    Attributes:
        name: of its folder below the sweep's.
        overrides: config key to value, as text, as the command line or the search gave them.
        state: ok, failed, pruned, or unfinished (it was killed).
        value: of the metric; None if the run has none.
        seconds: of training; None if it did not end.
        error: the line of a failed run.
    """

    name: str
    overrides: dict[str, str] = field(default_factory=dict)
    state: str = "ok"
    value: float | None = None
    seconds: float | None = None
    error: str = ""


def read_runs(sweep: Path, metric: str) -> list[Run]:
    """All runs of a sweep folder, in the order of their names (numbers as numbers)."""
    folders = [path.parent.parent for path in sweep.rglob(OVERRIDES)]
    return [read_run(sweep, folder, metric) for folder in sorted(folders, key=_natural)]


def read_run(sweep: Path, folder: Path, metric: str) -> Run:
    """One run, by the files in its folder."""
    metrics, failed = _json(folder / "metrics.json"), _json(folder / "failed.json")
    state = "ok" if metrics else "unfinished"
    if failed:
        state = "failed"
    elif (folder / PRUNED).is_file():
        state = "pruned"
    value = metrics.get("result", {}).get(metric, metrics.get(metric))
    usable = isinstance(value, (int, float)) and math.isfinite(value) and not failed
    return Run(
        name=str(folder.relative_to(sweep)),
        overrides=_overrides(folder / OVERRIDES),
        state=state,
        value=float(value) if usable else None,
        seconds=None if failed else metrics.get("seconds"),
        error=str(failed.get("error", "")),
    )


def ordered(runs: Iterable[Run], mode: str) -> list[Run]:
    """The best first; pruned runs after finished ones, runs without a value last."""
    sign = -1.0 if mode == "max" else 1.0

    def key(run: Run) -> tuple[bool, bool, float]:
        return run.value is None, run.state != "ok", sign * (run.value or 0.0)

    return sorted(runs, key=key)


def varied(runs: Iterable[Run]) -> list[str]:
    """The overridden keys whose values differ between runs, without those of the search."""
    seen: dict[str, set[str | None]] = {}
    every = list(runs)
    for run in every:
        for name in run.overrides:
            seen.setdefault(name, set())
    for name, values in seen.items():
        values.update(run.overrides.get(name) for run in every)
    return [
        name for name, values in seen.items() if len(values) > 1 and not name.startswith("sweep")
    ]


def _overrides(file: Path) -> dict[str, str]:
    pairs = [str(line).partition("=") for line in yaml.safe_load(file.read_text()) or []]
    return {name.lstrip("+~"): value.strip("'\"") for name, _, value in pairs}


def _json(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or half."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _natural(folder: Path) -> tuple[int, float, str]:
    number = folder.name.isdecimal()
    return (0 if number else 1, float(folder.name) if number else 0.0, str(folder))
