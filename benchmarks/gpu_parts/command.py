"""The command `python benchmarks/gpu.py`: which parts there are, their order, table and JSON."""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.rows import Row, Setting
from benchmarks.gpu_parts.worker import Outcome, Worker
from talk2dino.files import create_json

ROOT = Path(__file__).resolve().parents[2]
Part = Callable[[Setting], Iterable[Row]]
PARTS = {  # in their order: what is known last costs most or matters least
    "encoders beside the CPU": "check_encoders:encoders",
    "PAMR beside the original": "check_segmentation:pamr",
    "window scores beside the original": "check_segmentation:window_scores",
    "labels beside the CPU": "check_segmentation:labels",
    "training steps beside the CPU": "check_training:steps",
    "precisions through the Trainer": "check_training:precisions",
    "resume": "check_training:resume",
    "two ranks": "check_training:two_ranks",
    "PAMR": "time_segmentation:pamr",
    "training steps": "time_training:steps",
    "segmentation": "time_segmentation:segmentation",
    "extraction": "time_extraction:extraction",
    "tests marked gpu": "marked_tests:marked",
}
NOT_A_MEASUREMENT = "NOT A GPU MEASUREMENT"


def find_part(target: str) -> Part:
    """The function `module:function` of this folder."""
    module, _, name = target.partition(":")
    part: Part = getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), name)
    return part


def main(description: str | None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(description)
    if options.output.exists():
        print(f"error: --output {options.output} is there already; name another file")
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU; --device cpu --tiny shows that the script itself runs")
        return 2
    began, setting = time.monotonic(), Setting(options.device, options.tiny)
    facts = machine(setting)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    outcomes = run(options.parts, setting, began + 60 * options.minutes)
    verdict = report(outcomes)
    plain = {name: {**asdict(one), "rows": rows(one)} for name, one in outcomes.items()}
    content = {**facts, "seconds": round(time.monotonic() - began, 1), "parts": plain}
    if not create_json(options.output, content):
        print(f"error: {options.output} has appeared meanwhile and is kept; nothing written")
        return 2
    label = "" if setting.device == "cuda" and not setting.tiny else f" ({NOT_A_MEASUREMENT})"
    print(f"{verdict}{label}\nwritten: {options.output}")
    return 0 if all(good(one) for one in outcomes.values()) else 1


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    default = Path(time.strftime("gpu-%Y%m%d-%H%M%S.json"))
    parser.add_argument("--output", type=Path, default=default, help="a new JSON file")
    return parser.parse_args()


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = setting.device == "cuda"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "measurement": "GPU" if on_gpu and not setting.tiny else NOT_A_MEASUREMENT,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "devices": torch.cuda.device_count() if on_gpu else 0,
        "memory GB": round(torch.cuda.mem_get_info()[1] / 1e9, 1) if on_gpu else None,
        "sizes": "tiny" if setting.tiny else "full",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or None,
    }


def run(names: list[str], setting: Setting, deadline: float) -> dict[str, Outcome]:
    """All parts in order; one that hangs takes a third of the time, not all of it."""
    worker, outcomes = Worker(setting), {}
    limit = (deadline - time.monotonic()) / 3
    try:
        for number, name in enumerate(names, 1):
            left = deadline - time.monotonic()
            print(f"\n[{number}/{len(names)}] {name} ({max(left, 0):.0f} s left)", flush=True)
            most = min(left, limit)
            one = worker.run(PARTS[name], most, show) if left > 0 else Outcome("did not fit")
            if one.status == "did not fit" and most == limit:
                one.status, one.reason = "failed", f"not through after {limit:.0f} s"
            outcomes[name] = one
            reason = f": {one.reason}" if one.reason else ""
            print(f"  {one.status} in {one.seconds:.1f} s{reason}", flush=True)
    finally:
        worker.close()
    return outcomes


def show(row: Row) -> None:
    print(f"  {line(row)}", flush=True)


def line(row: Row) -> str:
    """A row as text in columns."""
    verdict = {True: "ok", False: "FAILED", None: ""}[row.passed]
    bound = f"<= {row.bound:.3g}" if row.bound is not None else ""
    ratio = f"{row.ratio:.2f} x {row.beside}" if row.ratio is not None else ""
    text = f"{row.name:<58} {row.value:>10.4g} {row.unit:<9} {bound:<10} {verdict:<6} {ratio}"
    return f"{text.rstrip()}  {row.note}".rstrip()


def good(outcome: Outcome) -> bool:
    """Whether nothing failed: what was left out or did not fit says nothing about the device."""
    return outcome.status != "failed" and all(row.passed is not False for row in outcome.rows)


def report(outcomes: dict[str, Outcome]) -> str:
    """Print one table of all rows and the parts that are not in it; returns a line to end with."""
    print("\n" + "=" * 100)
    for name, outcome in outcomes.items():
        print(name)
        for row in outcome.rows:
            show(row)
    print("=" * 100)
    for status in ("failed", "left out", "did not fit"):
        for name, outcome in outcomes.items():
            if outcome.status == status:
                print(f"{status}: {name}" + (f" ({outcome.reason})" if outcome.reason else ""))
    checks = [row for outcome in outcomes.values() for row in outcome.rows if row.bound is not None]
    failed = [row.name for row in checks if not row.passed]
    for name in failed:
        print(f"check failed: {name}")
    parts = sum(outcome.status == "done" for outcome in outcomes.values())
    return (
        f"{len(checks) - len(failed)} of {len(checks)} checks passed, "
        f"{parts} of {len(outcomes)} parts done"
    )


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows as JSON has them: no NaN and no infinity, and whether they passed."""
    found = []
    for row in outcome.rows:
        fields = asdict(row) | {"passed": row.passed}
        infinite = {k for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
        found.append(fields | dict.fromkeys(infinite))
    return found
