"""`report.html` of an evaluation, or of several side by side, from the files of the run folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from talk2dino.evaluation.images import Example, read_examples
from talk2dino.evaluation.metrics import FILE as IMAGES
from talk2dino.evaluation.metrics import read_ious
from talk2dino.files import replacing
from talk2dino.segmentation import page
from talk2dino.segmentation.charts import class_bars, heat_map, histogram, top_confusions
from talk2dino.segmentation.runs import RESULTS, Run, read_runs
from talk2dino.segmentation.summary import FAILED, Row, Summary, published, summarise

NAME = "report.html"
ENVIRONMENT = "environment.json"
IMAGE_BYTES = 12 << 20  # of pictures in one report; later runs of a large sweep show none


def write_report(folder: Path) -> Path:
    """Write `report.html` of one run folder, and return its path.

    Raises:
        DataError: the folder holds no evaluation.
    """
    runs = read_runs([folder])
    run = next(run for run in runs if not run.untrained)
    before = next((run for run in runs if run.untrained), None)
    head = f"<h1>Evaluation on {escape(run.benchmark)}</h1>{_subtitle(run)}"
    body = head + run_sections(run, before, IMAGE_BYTES)[0]
    return _write(folder / NAME, page.page(f"{run.benchmark}: {_percent(run.miou)} mIoU", body))


def write_sweep_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` of several evaluations into `folder`: a summary, then every run."""
    summary = summarise(runs)
    parts = [
        "<h1>Open-vocabulary segmentation</h1>",
        f'<p class="sub">{len(runs)} evaluations, mIoU in percent</p>',
        page.card("Summary", summary_table(summary)),
    ]
    failed = [run for run in runs if run.error]
    if failed:
        rows = [(str(run.folder), run.error or "") for run in failed]
        parts.append(page.card("Failed", page.text_table(rows)))
    room = IMAGE_BYTES
    parts.append("<h2>Runs</h2>")
    for run in runs:
        if run.results:
            sections, used = run_sections(run, None, room)
            room -= used
            parts.append(
                f'<details class="run"><summary>{escape(_title(run))}</summary>'
                f"{_subtitle(run)}{sections}</details>"
            )
    return _write(folder / NAME, page.page("Open-vocabulary segmentation", "".join(parts)))


def summary_table(summary: Summary) -> str:
    """The table in the paper's form; the best own figure of a column is bold."""
    own = [row for row in summary.rows if not row.published]
    best = {
        name: max((v for r in own if (v := r.cells.get(name)) is not None), default=None)
        for name in summary.benchmarks
    }
    rows, shown_published = [], False
    for entry in summary.rows:
        style = "published" if entry.published else ""
        if entry.published and not shown_published:
            style, shown_published = "published first", True
        rows.append(page.row(summary.text(entry), style, _cell_styles(summary, entry, best)))
    header = ["", *summary.header()[1:]]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in summary.notes())
    return page.grid(header, rows) + notes


def _cell_styles(summary: Summary, row: Row, best: Mapping[str, float | None]) -> list[str]:
    styles = ["", ""]
    for name, text in zip(summary.benchmarks, summary.text(row)[2:], strict=False):
        value = row.cells.get(name)
        is_best = not row.published and value is not None and value == best[name]
        styles.append("failed" if text == FAILED else "best" if is_best else "")
    return styles


def run_sections(run: Run, before: Run | None, room: int) -> tuple[str, int]:
    """Everything about one run; with the bytes of its pictures, at most `room`."""
    results = run.results
    parts = [page.tiles(_figures(run, before))]
    if run.reference:
        rows = [
            page.row([name, {True: "yes", False: "no", None: ""}[pamr], f"{value:.1f}"])
            for name, pamr, value in published(run.reference)
        ]
        parts.append(page.card("Published", page.grid(["", "PAMR", "mIoU"], rows)))
    bars = class_bars(
        results["per_class"], before.results["per_class"] if before else None, run.miou
    )
    legend = "Dashed: the mean." + (" Tick: the untrained projection." if before else "")
    parts.append(page.card("IoU per class", f'{bars}<p class="note">{legend}</p>'))
    parts += [_confusion(run.folder), _images(run.folder)]
    examples, used = _examples(run.folder, room)
    parts += [examples, _protocol(run)]
    return "".join(parts), used


def _figures(run: Run, before: Run | None) -> list[tuple[str, str]]:
    results = run.results
    figures = [(_percent(run.miou), "mIoU, percent")]
    if before:
        figures.append((_percent(before.miou), "mIoU, untrained projection"))
    figures.append((_percent(results["pixel_accuracy"]), "pixel accuracy, percent"))
    figures.append((f"{results['images']:,}", "images"))
    seconds = float(results["seconds"])
    figures.append((f"{results['images'] / max(seconds, 1e-9):.2f}", "images per second"))
    return figures


def _confusion(folder: Path) -> str:
    file = folder / "confusion.npz"
    if not file.is_file():
        return ""
    with np.load(file, allow_pickle=False) as arrays:
        confusion, names = arrays["confusion"], [str(name) for name in arrays["classes"]]
    rows = [
        page.row([f"{truth} → {taken}", f"{of_class:.1f}", f"{of_all:.1f}"])
        for truth, taken, of_all, of_class in top_confusions(confusion, names)
    ]
    table = page.grid(["truth → prediction", "% of class", "% of all"], rows)
    return (
        f'<div class="two">{page.card("Confusion: rows are the truth", heat_map(confusion, names))}'
        f"{page.card('Most frequent confusions', table)}</div>"
    )


def _images(folder: Path) -> str:
    file = folder / IMAGES
    values = read_ious(file) if file.is_file() else []
    if not values:
        return ""
    middle = float(np.median(values))
    note = f"Mean over the classes of each image; median {middle:.1f}. All figures: {IMAGES}."
    return page.card("IoU per image", f'{histogram(values)}<p class="note">{note}</p>')


def _examples(folder: Path, room: int) -> tuple[str, int]:
    parts: list[str] = []
    used = 0
    for kind, heading in (("best", "Best images"), ("worst", "Worst images")):
        figures = []
        for example in read_examples(folder):
            file = folder / example.file
            if example.kind != kind or not file.is_file():
                continue
            used += (size := file.stat().st_size)
            if used > room:
                return "".join(parts), used - size
            figures.append(_figure(example, file))
        if figures:
            parts.append(page.card(heading, f'<div class="examples">{"".join(figures)}</div>'))
    return "".join(parts), used


def _figure(example: Example, file: Path) -> str:
    chips = "".join(
        f'<span class="chip" title="truth {truth:.1f} %, prediction {taken:.1f} %">'
        f'<i style="background:rgb({",".join(map(str, colour))})"></i>{escape(name)} '
        f"<small>{truth:.0f} → {taken:.0f} %</small></span>"
        for name, colour, truth, taken in example.classes[:8]
    )
    return (
        '<figure><div class="three"><span>image</span><span>truth</span><span>prediction</span>'
        f"</div>{page.picture(file, example.name)}<figcaption><b>{example.iou:.1f}</b> "
        f"{escape(example.name)}<br>{chips}</figcaption></figure>"
    )


def _protocol(run: Run) -> str:
    config: Mapping[str, Any] = run.results.get("config", {})
    node = config.get("benchmark")
    protocol = node if isinstance(node, Mapping) else {}
    rows = [("checkpoint", run.checkpoint), ("PAMR", "yes" if run.pamr else "no")]
    rows += [
        (key, json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)
        for key, value in protocol.items()
        if key not in ("_target_", "reference", "classes")
    ]
    file = run.folder / ENVIRONMENT
    versions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    whole = escape(json.dumps(config, indent=1, ensure_ascii=False))
    return (
        page.card("Protocol", page.text_table(rows))
        + (page.card("Versions", page.text_table(versions.items())) if versions else "")
        + f"<details><summary>Whole config</summary><pre>{whole}</pre></details>"
    )


def _title(run: Run) -> str:
    refined = ", PAMR" if run.pamr else ""
    untrained = ", untrained" if run.untrained else ""
    return f"{run.benchmark}{refined}{untrained}: {_percent(run.miou)} — {run.checkpoint}"


def _subtitle(run: Run) -> str:
    return (
        f'<p class="sub">{escape(run.checkpoint)}, {"with" if run.pamr else "without"} PAMR '
        f"· {escape(str(run.folder / RESULTS))}</p>"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1f}"


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
