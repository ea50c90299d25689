"""`python -m talk2dino.compare RUN …`: evaluations side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from talk2dino.errors import DataError, UserError

FILES = ("results_untrained.json", "results.json")


def read_results(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the results of an evaluation folder, or one `results.json`; pairs of label and result.

    Raises:
        DataError: no results there.
    """
    files = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
    if not files:
        raise DataError(f"{path}: no results.json; give the run folder of talk2dino.evaluate")
    found = []
    for file in files:
        untrained = " (untrained)" if file.name == FILES[0] else ""
        try:
            found.append((f"{file.parent.name}{untrained}", json.loads(file.read_text())))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: not a json file ({error})") from error
    return found


def comparison(results: list[tuple[str, dict[str, Any]]]) -> Table:
    """A row per evaluation."""
    table = Table(title="comparison")
    for heading in ("run", "benchmark", "PAMR"):
        table.add_column(heading)
    for heading in ("mIoU", "pixel accuracy", "images", "seconds"):
        table.add_column(heading, justify="right")
    for label, result in results:
        table.add_row(
            label,
            result["benchmark"],
            "yes" if result.get("config", {}).get("pamr") else "no",
            f"{result['miou']:.1f}",
            f"{result['pixel_accuracy']:.1f}",
            str(result["images"]),
            f"{result['seconds']:.0f}",
        )
    return table


def main() -> None:
    """Print the table of the runs given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m talk2dino.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of talk2dino.evaluate")
    try:
        results = [pair for run in parser.parse_args().runs for pair in read_results(run)]
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    Console().print(comparison(results))


if __name__ == "__main__":
    main()
