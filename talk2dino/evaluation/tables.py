"""Figures as text, and evaluations side by side in the paper's form.

That table has a row per checkpoint and PAMR, a column per benchmark, and their mean.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from talk2dino.errors import ConfigError
from talk2dino.evaluation.runs import Run

# the columns of the paper's table: without a background class, then with one
PAPER_ORDER = (
    "voc",
    "context",
    "stuff",
    "cityscapes",
    "ade",
    "voc_bg",
    "context_bg",
    "coco_object",
)
CELL_FAILED = "failed"
_RULES = {"l": "---", "r": "---:"}


def percent(value: float | None) -> str:
    """A figure in percent with one digit; a dash for None and NaN.

    >>> from talk2dino.evaluation.tables import percent
    >>> percent(87.06), percent(None)
    ('87.1', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """A Markdown table; floats with two digits, other cells by `str`.

    Args:
        columns: the header.
        rows: as many cells each.
        align: a letter per column, `l` for left and `r` for right; empty means left everywhere.
    """
    rules = [_RULES[letter] for letter in align or "l" * len(columns)]
    lines = [columns, rules, *([_as_text(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _as_text(value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").splitlines())


@dataclass(frozen=True)
class Row:
    """A row of the summary.

    Attributes:
        label: checkpoint, with the settings in which the runs differ; or a publication.
        pamr: whether the windows were refined; None where a publication does not say.
        cells: mIoU in percent by benchmark; None for a run without result.
        published: whether the numbers are a publication's.
    """

    label: str
    pamr: bool | None
    cells: Mapping[str, float | None]
    published: bool = False

    def mean(self, benchmarks: Sequence[str]) -> float | None:
        """Mean over the benchmarks; None unless the row has them all."""
        values = [self.cells.get(name) for name in benchmarks]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class Summary:
    """The table.

    Attributes:
        benchmarks: columns, the paper's first and in its order.
        rows: the own ones in the order of the runs, then the published ones.
        images: by benchmark, how many images were evaluated; a set if the runs differ.
    """

    benchmarks: list[str]
    rows: list[Row]
    images: Mapping[str, set[int]]

    def header(self) -> list[str]:
        """Names of the columns."""
        mean = ["mean"] if len(self.benchmarks) > 1 else []
        return ["mIoU", "PAMR", *self.benchmarks, *mean]

    def text(self, row: Row) -> list[str]:
        """A row as text, one digit."""
        pamr = {True: "yes", False: "no", None: ""}[row.pamr]
        cells = [_cell(row, name) for name in self.benchmarks]
        mean = row.mean(self.benchmarks) if len(self.benchmarks) > 1 else None
        last = ["" if mean is None else percent(mean)] if len(self.benchmarks) > 1 else []
        return [row.label, pamr, *cells, *last]

    def is_best(self, row: Row, benchmark: str) -> bool:
        """Whether a row has the highest figure of its column among the own ones."""
        own = [other.cells.get(benchmark) for other in self.rows if not other.published]
        best = max((value for value in own if value is not None), default=None)
        return best is not None and not row.published and row.cells.get(benchmark) == best

    def notes(self) -> list[str]:
        """How many images the columns rest on."""
        counts = {name: " or ".join(map(str, sorted(found))) for name, found in self.images.items()}
        if not counts:
            return []
        return ["Images: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + "."]


def _cell(row: Row, benchmark: str) -> str:
    if benchmark not in row.cells:
        return ""
    value = row.cells[benchmark]
    return CELL_FAILED if value is None else percent(value)


def summarize(runs: Sequence[Run]) -> Summary:
    """Arrange runs in the paper's form; a later run replaces an earlier one of the same cell."""
    found = list(dict.fromkeys(run.benchmark for run in runs))
    known = [name for name in PAPER_ORDER if name in found]
    benchmarks = known + [name for name in found if name not in known]
    labels = run_labels(runs)
    cells: dict[tuple[str, bool], dict[str, float | None]] = {}
    images: dict[str, set[int]] = {}
    for run, label in zip(runs, labels, strict=True):
        cells.setdefault((label, run.pamr), {})[run.benchmark] = run.miou
        if run.results:
            images.setdefault(run.benchmark, set()).add(int(run.results["images"]))
    own = [Row(label, pamr, row) for (label, pamr), row in cells.items()]
    return Summary(benchmarks, own + published_rows(runs), images)


def published_rows(runs: Iterable[Run]) -> list[Row]:
    """The numbers that the runs' benchmarks carry as `reference`."""
    rows: dict[tuple[str, bool | None], dict[str, float | None]] = {}
    for run in runs:
        for name, pamr, value in published(run.reference):
            rows.setdefault((name, pamr), {})[run.benchmark] = value
    return [Row(name, pamr, cells, published=True) for (name, pamr), cells in rows.items()]


def published(reference: Mapping[str, Any]) -> list[tuple[str, bool | None, float]]:
    """Triples of publication, PAMR and mIoU of a benchmark's `reference`.

    Args:
        reference: `{"name": 40.0}`, or `{"name": {"plain": 39.8, "pamr": 42.4}}`.

    Raises:
        ConfigError: anything else.
    """
    kinds = {"plain": False, "pamr": True, None: None}
    found: list[tuple[str, bool | None, float]] = []
    for name, value in reference.items():
        for kind, figure in (value if isinstance(value, Mapping) else {None: value}).items():
            number = isinstance(figure, (int, float)) and not isinstance(figure, bool)
            if kind not in kinds or not number or not 0 <= figure <= 100:
                raise ConfigError(
                    f"benchmark.reference.{name}={value}: give the mIoU in percent, or two as in "
                    "{plain: 39.8, pamr: 42.4}"
                )
            found.append((name, kinds[kind], float(figure)))
    return found


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Label each run by its checkpoint and the settings that differ among runs of a benchmark."""
    differing: set[str] = set()
    for benchmark in {run.benchmark for run in runs}:
        same = [run.settings for run in runs if run.benchmark == benchmark]
        keys = {key for settings in same for key in settings}
        differing |= {key for key in keys if _differs(key, same)}
    names = _short_names([run.checkpoint for run in runs])
    labels = []
    for run, name in zip(runs, names, strict=True):
        parts = [_setting(key, run.settings[key]) for key in sorted(differing & set(run.settings))]
        labels.append(" ".join([name, *parts, *(["(untrained)"] if run.untrained else [])]))
    return labels


def _differs(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs disagree on a key; arguments of a part that only some have do not count."""
    has = [key in one for one in settings]
    values = {repr(one[key]) for one in settings if key in one}
    return len(values) > 1 or (key.endswith("._target_") and not all(has))


def _setting(key: str, value: Any) -> str:
    """`key=value`, and the class's own name for a `_target_`."""
    if key.endswith("._target_"):
        return f"{key.removesuffix('._target_')}={str(value).rpartition('.')[2]}"
    return f"{key}={value}"


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as keep different ones apart."""
    parts = [tuple(part for part in path.split("/") if part) or (path,) for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = {path: path[-depth:] for path in parts}
        if len(set(short.values())) == len(short):
            break
    return ["/".join(short[path]) for path in parts]


def as_markdown(summary: Summary) -> str:
    """The table as Markdown; published rows are in italics."""
    rows = []
    for row in summary.rows:
        mark = "*" if row.published else ""
        rows.append([cell and f"{mark}{cell}{mark}" for cell in summary.text(row)])
    head = summary.header()
    table = markdown_table(head, rows, "ll" + "r" * (len(head) - 2))
    return "\n".join([table, *summary.notes()]).rstrip() + "\n"


def as_csv(summary: Summary) -> str:
    """The table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(summary.header())
    writer.writerows(summary.text(row) for row in summary.rows)
    return text.getvalue()


def as_table(summary: Summary, width: int) -> Table:
    """The table for a terminal of `width` columns: turned on its side where it would not fit."""
    lines = [[name.replace("mIoU", "").strip() for name in summary.header()]]
    lines += [summary.text(row) for row in summary.rows]
    own = sum(not row.published for row in summary.rows)
    needed = sum(max(len(line[i]) for line in lines) + 3 for i in range(len(lines[0]))) + 1
    table = Table(title="mIoU in percent", caption=" ".join(summary.notes()) or None)
    if needed > width:
        for number, (name, pamr, *_) in enumerate(lines):
            heading = f"{name} PAMR" if pamr == "yes" else name
            dim = "dim" if number > own else None
            side = "right" if number else "left"
            table.add_column(heading, justify=side, style=dim)  # type: ignore[arg-type]
        for column in range(2, len(lines[0])):
            table.add_row(*(line[column] for line in lines))
        return table
    for number, name in enumerate(lines[0]):
        table.add_column(name, justify="left" if number < 2 else "right")
    for number, line in enumerate(lines[1:]):
        if number == own:
            table.add_section()
        table.add_row(*line, style="dim" if number >= own else None)
    return table


def class_table(columns: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Any]) -> Table:
    """IoU per class, mIoU and pixel accuracy of one benchmark for a terminal, a column per result.

    Args:
        columns: results (see `SegmentationModule`) by heading.
        reference: published mIoU, see `published`; printed below one's own.
    """
    first = next(iter(columns.values()))
    out = Table(title=f"{first['benchmark']}: IoU in percent, {first['images']} images")
    out.add_column("class")
    for heading in columns:
        out.add_column(heading, justify="right")
    for name in first["per_class"]:
        out.add_row(name, *(percent(result["per_class"][name]) for result in columns.values()))
    out.add_section()
    for key, label in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        out.add_row(label, *(percent(result[key]) for result in columns.values()), style="bold")
    for name, pamr, value in published(reference):
        label = f"published: {name}" + {True: ", PAMR", False: "", None: ""}[pamr]
        out.add_row(label, *[""] * (len(columns) - 1), percent(value), style="dim")
    return out
