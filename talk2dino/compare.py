"""`python -m talk2dino.compare RUN …`: evaluations side by side, in the paper's form."""

from __future__ import annotations

import argparse

from talk2dino.config.command import os_message
from talk2dino.errors import UserError
from talk2dino.evaluation.report import compare
from talk2dino.evaluation.runs import read_runs
from talk2dino.files import user_path


def main() -> None:
    """Print the table of the runs given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m talk2dino.compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=user_path,
        help="run folders of talk2dino.evaluate, folders of sweeps, or results.json files",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="also write summary.md, summary.csv and report.html there",
    )
    given = parser.parse_args()
    try:
        compare(read_runs(given.runs), given.output)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(2, f"error: {os_message(error)}\n")


if __name__ == "__main__":
    main()
