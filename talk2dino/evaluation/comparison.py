"""Evaluations side by side: the table in the terminal, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from talk2dino.evaluation.report import write_sweep_report
from talk2dino.evaluation.runs import Run
from talk2dino.evaluation.summary import as_csv, as_markdown, as_table, summarize
from talk2dino.files import replacing


def report(runs: Sequence[Run], folder: Path | None) -> None:
    """Print the table of the runs; with a folder, write it there in three forms.

    Args:
        runs: evaluations.
        folder: `summary.md`, `summary.csv` and `report.html` go there.
    """
    summary = summarize(runs)
    console = Console()
    console.print(as_table(summary, console.width))
    for run in runs:
        if run.error:
            print(f"{run.folder}: {run.error}")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("summary.md", as_markdown(summary)), ("summary.csv", as_csv(summary))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"report: {write_sweep_report(runs, folder)}")
