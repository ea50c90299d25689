"""The runs of a sweep side by side: in the terminal, as Markdown, as CSV, as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from talk2dino.alignment.trackers import markdown_table
from talk2dino.atomic import replacing
from talk2dino.sweeps.runs import Run, varied

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
