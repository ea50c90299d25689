"""`python -m talk2dino.doctor`: versions, devices, weights at hand, what is missing for what."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from talk2dino.doctor_checks import Diagnosis, diagnose


def show(found: Diagnosis, console: Console) -> None:
    """Print a diagnosis as tables, problems last."""
    versions = Table(title="versions", show_header=False)
    for name, number in found.versions.items():
        versions.add_row(name, number)
    console.print(versions)
    console.print("devices", style="bold")
    for device in found.devices:
        console.print(f"  {device}", highlight=False)
    weights = Table("config", "offline", title="encoders")
    weights.add_column("weights (of the Hub, unless a package)", overflow="fold")
    for one in found.weights:
        weights.add_row(f"{one.group}={one.option}", "yes" if one.offline else "no", one.source)
    console.print(weights)
    for name in found.cached:
        console.print(f"  in the cache: {name}", highlight=False)
    tasks = Table("task", "ready", "to install", title="optional parts")
    for task in found.tasks:
        how = f"pip install 'talk2dino[{task.extra}]'" if task.missing else ""
        ready = f"no: {', '.join(task.missing)}" if task.missing else "yes"
        tasks.add_row(task.name, ready, how.replace("[", r"\["))
    console.print(tasks)
    for place, free in found.disk.items():
        console.print(f"  {free:.1f} GB free in the {place}", highlight=False)
    if not found.problems:
        console.print("no problems found", style="green")
    for problem in found.problems:
        console.print("problem:", problem, style="red", markup=False)


def main() -> None:
    """Print the diagnosis; exit status 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m talk2dino.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    found = diagnose()
    if given.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, Console())
    raise SystemExit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
