"""What the runs of a sweep left behind, in one table and one picture, at its end."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from talk2dino.errors import DataError
from talk2dino.files import read_json, replacing
from talk2dino.sweeps.study import PRUNED
from talk2dino.tables import markdown_table

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
    metrics, failed = _read(folder / "metrics.json"), _read(folder / "failed.json")
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


def _read(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or no JSON."""
    try:
        return read_json(file, dict, "what a run left")
    except DataError:
        return {}


def _natural(folder: Path) -> tuple[int, float, str]:
    number = folder.name.isdecimal()
    return (0 if number else 1, float(folder.name) if number else 0.0, str(folder))


PANELS = 4  # varied keys that get a panel in the picture


def write_tables(folder: Path, runs: Sequence[Run], metric: str) -> Table:
    """Write `sweep.md`, `sweep.csv` and `sweep.png`, and return the terminal's table.

    Args:
        folder: of the sweep.
        runs: in the order of the table.
        metric: its name.
    """
    columns, rows = table(runs, metric)
    short = [[_short(cell) for cell in row] for row in rows]
    with replacing(folder / "sweep.md") as path:
        path.write_text(markdown_table(columns, short), encoding="utf-8")
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


def table(runs: Sequence[Run], metric: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: run, the varied keys, the metric, seconds, state, error."""
    keys = varied(runs)
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
    columns = ["run", *keys, metric, "seconds", "state", "error"]
    if not any(run.error for run in runs):
        return columns[:-1], [row[:-1] for row in rows]
    return columns, rows


def _short(cell: Any) -> str:
    """Numbers, also those that stand as text, with four digits; the CSV has all of them."""
    try:
        return f"{float(cell):.4g}"
    except ValueError:
        return str(cell)


def draw_sweep(path: Path, runs: Sequence[Run], metric: str) -> None:
    """Draw the metric of every run, best first, and against each of the first varied keys.

    Pruned runs are hollow; runs without a value are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [run for run in runs if run.value is not None]
    keys = varied(runs)[:PANELS]
    figure = Figure(figsize=(3.6 * (1 + len(keys)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(keys), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(metric)
    panels[0].set_xlabel("run, best first")
    _points(panels[0], [run.name for run in good], good)
    for axes, key in zip(panels[1:], keys, strict=True):
        axes.set_xlabel(key)
        values = [run.overrides.get(key, "default") for run in good]
        numbers = _numbers(values)
        if numbers is not None:
            if min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
                axes.set_xscale("log")
            elif len(set(numbers)) <= 6:
                axes.set_xticks(sorted(set(numbers)))
            _points(axes, numbers, good)
        else:
            in_order = sorted(zip(values, good, strict=True), key=lambda pair: pair[0])
            _points(axes, [value for value, _ in in_order], [run for _, run in in_order])
    figure.savefig(path, format="png", dpi=110)


def _points(axes: Any, places: Sequence[Any], runs: Sequence[Run]) -> None:
    """A dot per run; a list of texts makes a categorical axis."""
    if places and isinstance(places[0], str):
        names = list(dict.fromkeys(places))
        axes.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0)
        places = [names.index(place) for place in places]
    colours = ["white" if run.state == "pruned" else "C0" for run in runs]
    axes.scatter(places, [run.value for run in runs], c=colours, edgecolors="C0")


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values] or None
    except ValueError:
        return None


class SweepTable(Callback):
    """A Hydra callback: after the last job it writes and prints the runs, the best first."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Read the run folders, whichever launcher filled them."""
        folder, sweep = Path(config.hydra.sweep.dir), config.sweep
        runs = ordered(read_runs(folder, sweep.metric), sweep.mode)
        if not runs:
            return
        Console().print(write_tables(folder, runs, sweep.metric))
        print(f"sweep: {folder / 'sweep.md'}, sweep.csv, sweep.png")


class SweepReport(Callback):
    """Hydra callback: reads the run folders of a sweep and writes the comparison beside them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; write `summary.md`, `summary.csv` and `report.html`."""
        from talk2dino.compare import report  # Hydra makes the callback before anything else
        from talk2dino.evaluation.runs import read_sweep

        folder = Path(config.hydra.sweep.dir)
        runs = read_sweep(folder)
        if runs:
            report(runs, folder)
