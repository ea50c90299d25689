"""What the runs of a sweep left in their folders, as one table and one picture at its end."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from talk2dino.config.command import FAILED
from talk2dino.errors import DataError
from talk2dino.evaluation.report import compare
from talk2dino.evaluation.runs import read_sweep
from talk2dino.evaluation.tables import markdown_table
from talk2dino.files import read_json, replacing, write_text
from talk2dino.sweeps.study import PRUNED

_FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

OVERRIDES = ".hydra/overrides.yaml"
PANELS = 4  # varied keys that get a panel in the picture


class SweepTable(Callback):
    """A Hydra callback of training: at the end of a sweep it writes and prints its runs."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Read the run folders, whichever launcher filled them; the best run comes first."""
        folder, sweep = Path(config.hydra.sweep.dir), config.sweep
        runs = ordered(read_sweep_runs(folder, sweep.metric), sweep.mode)
        if runs:
            Console(markup=False, emoji=False).print(write_tables(folder, runs, sweep.metric))
            print(f"sweep: {folder / 'sweep.md'}, sweep.csv, sweep.png")


class SweepReport(Callback):
    """A Hydra callback of evaluation: at the end of a sweep it compares its runs."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table; write `summary.md`, `summary.csv` and `report.html`."""
        folder = Path(config.hydra.sweep.dir)
        runs = read_sweep(folder)
        if runs:
            compare(runs, folder)


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

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


def read_sweep_runs(sweep: Path, metric: str) -> list[SweepRun]:
    """All runs of a sweep folder, in the order of their names (numbers as numbers)."""
    folders = [path.parent.parent for path in sweep.rglob(OVERRIDES)]
    return [read_sweep_run(sweep, folder, metric) for folder in sorted(folders, key=_natural)]


def read_sweep_run(sweep: Path, folder: Path, metric: str) -> SweepRun:
    """One run, by the files in its folder."""
    metrics, failed = _read(folder / "metrics.json"), _read(folder / FAILED)
    state = "ok" if metrics else "unfinished"
    if failed:
        state = "failed"
    elif (folder / PRUNED).is_file():
        state = "pruned"
    value = metrics.get("result", {}).get(metric, metrics.get(metric))
    usable = isinstance(value, (int, float)) and math.isfinite(value) and not failed
    noted = folder / OVERRIDES  # absent if the job never began
    given = (yaml.safe_load(noted.read_text(encoding="utf-8")) if noted.is_file() else None) or []
    pairs = [str(line).partition("=") for line in given]
    return SweepRun(
        name=str(folder.relative_to(sweep)),
        overrides={key.lstrip("+~"): text.strip("'\"") for key, _, text in pairs},
        state=state,
        value=float(value) if usable else None,
        seconds=None if failed else metrics.get("seconds"),
        error=str(failed.get("error", "")),
    )


def _natural(folder: Path) -> tuple[float, str]:
    return float(folder.name) if folder.name.isdecimal() else math.inf, str(folder)


def _read(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or half written."""
    try:
        return read_json(file, dict, "what a run left")
    except DataError:
        return {}


def ordered(runs: Iterable[SweepRun], mode: str) -> list[SweepRun]:
    """The best first; pruned runs after finished ones, runs without a value last."""
    sign = -1.0 if mode == "max" else 1.0

    def key(run: SweepRun) -> tuple[bool, bool, float]:
        return run.value is None, run.state != "ok", sign * (run.value or 0.0)

    return sorted(runs, key=key)


def varied(runs: Sequence[SweepRun]) -> list[str]:
    """The overridden keys whose values differ between runs, without those of the search."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [
        key
        for key in keys
        if not key.startswith("sweep") and len({run.overrides.get(key) for run in runs}) > 1
    ]


def write_tables(folder: Path, runs: Sequence[SweepRun], metric: str) -> Table:
    """Write `sweep.md`, `sweep.csv` and `sweep.png`, and return the terminal's table.

    Args:
        folder: of the sweep.
        runs: in the order of the table.
        metric: its name.
    """
    columns, rows = table(runs, metric)
    short = [[_short(cell) for cell in row] for row in rows]
    write_text(folder / "sweep.md", markdown_table(columns, short))
    with (
        replacing(folder / "sweep.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows([columns, *rows])
    with replacing(folder / "sweep.png") as path:
        draw_sweep(path, runs, metric)
    shown = Table()
    for column in columns:
        right = column in (metric, "seconds")
        shown.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in short:
        shown.add_row(*row)
    return shown


def table(runs: Sequence[SweepRun], metric: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: run, the varied keys, the metric, seconds, state, and errors if any."""
    keys = varied(runs)
    columns = ["run", *keys, metric, "seconds", "state", "error"]
    rows = [
        [
            run.name,
            *(run.overrides.get(key, "") for key in keys),
            "" if run.value is None else run.value,
            "" if run.seconds is None else run.seconds,
            run.state,
            run.error,
        ]
        for run in runs
    ]
    used = len(columns) if any(run.error for run in runs) else -1
    return columns[:used], [row[:used] for row in rows]


def _short(cell: Any) -> str:
    """Fractions, also those that stand as text, with four digits; the CSV has all of them."""
    text = str(cell)
    if not _FRACTION.fullmatch(text):
        return text
    return f"{float(text):.0f}" if 1e4 <= abs(float(text)) < 1e9 else f"{float(text):.4g}"


def draw_sweep(path: Path, runs: Sequence[SweepRun], metric: str) -> None:
    """Draw the metric of every run, best first, and against each of the first varied keys.

    Pruned runs are hollow; runs without a value are left out.
    """
    from matplotlib.figure import Figure

    good = [run for run in runs if run.value is not None]
    keys = varied(runs)[:PANELS]
    figure = Figure(figsize=(3.6 * (1 + len(keys)), 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(keys), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(metric)
    _panel(panels[0], "run, best first", [run.name for run in good], good)
    for axes, key in zip(panels[1:], keys, strict=True):
        values = [run.overrides.get(key, "default") for run in good]
        numbers = _numbers(values)
        if numbers is None:
            by_name = sorted(zip(values, good, strict=True), key=lambda pair: pair[0])
            _panel(axes, key, [value for value, _ in by_name], [run for _, run in by_name])
            continue
        if min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
            axes.set_xscale("log")
        elif len(set(numbers)) <= 6:
            axes.set_xticks(sorted(set(numbers)))
        _panel(axes, key, numbers, good)
    figure.savefig(path, format="png", dpi=110)


def _panel(axes: Any, label: str, places: Sequence[Any], runs: Sequence[SweepRun]) -> None:
    """A dot per run at its place on the horizontal axis; texts make a categorical axis."""
    axes.set_xlabel(label)
    if places and isinstance(places[0], str):
        names = list(dict.fromkeys(places))
        axes.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0)
        places = [names.index(place) for place in places]
    colors = ["white" if run.state == "pruned" else "C0" for run in runs]
    axes.scatter(places, [run.value for run in runs], c=colors, edgecolors="C0")


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values] or None
    except ValueError:
        return None
