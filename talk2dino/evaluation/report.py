"""Tables and pages of evaluations: `report.html` of one run, or of several side by side.

Several also get a table, in the terminal, in Markdown and as CSV: `compare`. This file collects
what a page shows; `templates/report.html.j2` and `templates/charts.html.j2` say how it looks.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.console import Console

from talk2dino.errors import DataError
from talk2dino.evaluation.images import Example, read_examples
from talk2dino.evaluation.metrics import FILE as IMAGES
from talk2dino.evaluation.metrics import read_ious
from talk2dino.evaluation.runs import Run, read_runs
from talk2dino.evaluation.tables import as_csv, as_markdown, as_table, percent, published, summarize
from talk2dino.files import read_json, refuse_foreign_run, write_text

Counts = npt.NDArray[np.int64]

LABELED = 64  # classes whose names still fit along the sides of a heat map
CELLS = 4000  # cells of a heat map at most, the largest shares
SMALLEST = 0.005  # share of a row below which a cell stays empty


@dataclass(frozen=True)
class HeatMap:
    """A confusion matrix as squares; rows are the truth.

    Attributes:
        names: of the classes that occur, in the order of rows and columns.
        cells: row, column, and share 0..1 of the row's pixels; the largest first.
    """

    names: list[str]
    cells: list[tuple[int, int, float]]

    @property
    def labeled(self) -> bool:
        """Whether the names stand along the sides."""
        return len(self.names) <= LABELED

    @property
    def size(self) -> float:
        """Side of a cell in pixels."""
        return max(min(560 / max(len(self.names), 1), 26), 3.2)

    @property
    def margin(self) -> float:
        """Pixels above and left of the cells, for the names."""
        return 6.6 * min(max(map(len, self.names), default=0), 20) + 10 if self.labeled else 24


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another.

    Attributes:
        truth: name of their class.
        taken: name of the predicted class.
        of_all: percent of all counted pixels.
        of_class: percent of the pixels of `truth`.
    """

    truth: str
    taken: str
    of_all: float
    of_class: float


def heat_map(confusion: Counts, names: Sequence[str]) -> HeatMap:
    """The confusion matrix, every row divided by its sum.

    Args:
        confusion: [K, K] pixels; classes without any are left out.
        names: of the K classes.
    """
    found = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    confusion = confusion[np.ix_(found, found)]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    cells = [(i, j, float(share[i, j])) for i, j in np.argwhere(share >= SMALLEST).tolist()]
    cells.sort(key=lambda cell: -cell[2])
    return HeatMap([names[i] for i in found.tolist()], cells[:CELLS])


def top_confusions(confusion: Counts, names: Sequence[str], count: int = 12) -> list[Confusion]:
    """The largest cells beside the diagonal of a confusion matrix [K, K], largest first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:count]
    found = []
    for i, j in (divmod(place, len(names)) for place in largest.tolist()):
        if pixels := int(wrong[i, j]):
            of_all, of_class = 100 * pixels / confusion.sum(), 100 * pixels / confusion[i].sum()
            found.append(Confusion(names[i], names[j], float(of_all), float(of_class)))
    return found


def histogram(values: Sequence[float], bins: int = 20) -> list[int]:
    """How many of the values, percent 0..100, fall into each of equal bins."""
    counts: list[int] = np.histogram(np.array(values), bins=bins, range=(0, 100))[0].tolist()
    return counts


NAME = "report.html"
ENVIRONMENT = "environment.json"
PICTURES = 16 << 20  # characters of pictures in one report; later runs of a large sweep show none


@dataclass(frozen=True)
class Section:
    """What a page shows of one run.

    Attributes:
        run: the evaluation.
        before: of the untrained projection, to compare with.
        heat_map: of the confusion matrix; None if the run left no matrix.
        confusions: its largest entries.
        ious: of the images, percent.
        examples: best and worst images, each with a data URI of its picture.
        versions: of packages, and the device.
    """

    run: Run
    before: Run | None
    heat_map: HeatMap | None
    confusions: list[Confusion]
    ious: list[float]
    examples: list[tuple[Example, str]]
    versions: Mapping[str, str]

    @property
    def speed(self) -> float:
        """Images per second."""
        return float(self.run.results["images"] / max(float(self.run.results["seconds"]), 1e-9))

    @property
    def protocol(self) -> list[tuple[str, str]]:
        """Names and values of what decides the figures."""
        run = self.run
        node = self._config.get("benchmark")
        protocol = node if isinstance(node, Mapping) else {}
        return [
            ("checkpoint", run.checkpoint),
            ("PAMR", "yes" if run.pamr else "no"),
            *(
                (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                for key, value in protocol.items()
                if key not in ("_target_", "reference", "classes")
            ),
        ]

    @property
    def config(self) -> str:
        """The whole config as JSON."""
        return json.dumps(self._config, indent=1, ensure_ascii=False)

    @property
    def _config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.run.results.get("config", {})
        return found


def write_report(folder: Path) -> Path:
    """Write `report.html` of one run folder, and return its path.

    Raises:
        DataError: the folder holds no evaluation, or an unreadable file of one.
    """
    runs = read_runs([folder])
    run = next(run for run in runs if not run.untrained)
    before = next((run for run in runs if run.untrained), None)
    title = f"{run.benchmark}: {percent(run.miou)} mIoU"
    return _write(folder, title=title, sections=[section(run, before)], summary=None)


def compare(runs: Sequence[Run], folder: Path | None) -> None:
    """Print the table of several evaluations; with a folder, write it there in three forms.

    Args:
        runs: evaluations.
        folder: `summary.md`, `summary.csv` and `report.html` go there.
    """
    summary = summarize(runs)
    console = Console(markup=False, emoji=False)
    console.print(as_table(summary, console.width))
    for run in runs:
        if run.error:
            print(f"{run.folder}: {run.error}")
    if folder is None:
        return
    names = ("summary.md", "summary.csv", NAME)
    refuse_foreign_run(folder, lambda: _is_summary(folder / "summary.md"), names)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.md", as_markdown(summary))
    write_text(folder / "summary.csv", as_csv(summary))
    print(f"report: {write_sweep_report(runs, folder)}")


def _is_summary(file: Path) -> bool:
    """Whether `compare` wrote a file: by the first line of its table."""
    with suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8").startswith("| mIoU | PAMR |")
    return False


def write_sweep_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` of several evaluations into `folder`: a summary, then every run.

    Raises:
        DataError: an unreadable file of a run.
    """
    sections: list[Section] = []
    room = PICTURES
    for run in runs:
        if run.results:
            sections.append(section(run, room=room))
            room -= sum(len(picture) for _, picture in sections[-1].examples)
    title = "Open-vocabulary segmentation"
    return _write(folder, title=title, sections=sections, summary=summarize(runs), runs=runs)


def section(run: Run, before: Run | None = None, room: int = PICTURES) -> Section:
    """Read what a run left in its folder.

    Args:
        run: with results.
        before: of the untrained projection.
        room: for pictures, in characters; those beyond are left out.

    Raises:
        DataError: an unreadable file.
    """
    folder = run.outputs
    chart, confusions = None, []
    if (file := folder / "confusion.npz").is_file():
        try:
            with np.load(file, allow_pickle=False) as arrays:
                confusion, names = arrays["confusion"], [str(name) for name in arrays["classes"]]
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{file}: is damaged ({error}); evaluate again") from error
        chart, confusions = heat_map(confusion, names), top_confusions(confusion, names)
    environment = run.folder / ENVIRONMENT
    return Section(
        run,
        before,
        chart,
        confusions,
        read_ious(folder / IMAGES) if (folder / IMAGES).is_file() else [],
        _examples(folder, room),
        read_json(environment, dict, "versions") if environment.is_file() else {},
    )


def _examples(folder: Path, room: int) -> list[tuple[Example, str]]:
    """The examples of a run and their pictures, as many as fit."""
    found = []
    for example in read_examples(folder):
        file = folder / example.file
        if not file.is_file():
            continue
        picture = f"data:image/jpeg;base64,{b64encode(file.read_bytes()).decode()}"
        room -= len(picture)
        if room < 0:
            break
        found.append((example, picture))
    return found


def report_templates(*packages: str) -> Environment:
    """The templates of these packages and of this one; they escape what they are given."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(p) for p in (*packages, "talk2dino.evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"percent": percent, "median": median, "histogram": histogram}
    found.filters |= {"published": published, "shown": _shown}
    return found


def _shown(file: Path) -> str:
    """A path relative to the working directory, if the file lies below it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _write(folder: Path, **context: Any) -> Path:
    write_text(folder / NAME, report_templates().get_template("report.html.j2").render(context))
    return folder / NAME
