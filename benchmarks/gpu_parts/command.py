"""The command `python benchmarks/gpu.py`: which parts there are, their order, table and JSON."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.rows import Row, Setting
from benchmarks.gpu_parts.worker import Outcome, Worker
from talk2dino.files import create_json

ROOT = Path(__file__).resolve().parents[2]
PARTS = {  # in their order: first whether it is right
    name: f"benchmarks.gpu_parts.{target}"
    for name, target in {
        "encoders beside the CPU": "check_encoders:encoders",
        "PAMR beside the original": "check_segmentation:pamr",
        "window scores beside the original": "check_segmentation:window_scores",
        "labels beside the CPU": "check_segmentation:labels",
        "training steps beside the CPU": "check_training:steps",
        "precisions through the Trainer": "check_training:precisions",
        "resume": "check_training:resume",
        "two ranks": "check_training:two_ranks",
        "tests marked gpu": "marked_tests:marked",
        "time of PAMR": "time_segmentation:pamr",
        "time of training steps": "time_training:steps",
        "time of segmentation": "time_segmentation:segmentation",
        "time of extraction": "time_extraction:extraction",
    }.items()
}
NOT_A_MEASUREMENT = "NOT A GPU MEASUREMENT"


def main(description: str | None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(description)
    if wrong := refused(options):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    began, setting = time.monotonic(), Setting(options.device, options.tiny)
    facts = machine(setting)
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    chosen = {name: PARTS[name] for name in options.parts}
    outcomes = run(chosen, setting, began + 60 * options.minutes)
    verdict, status = report(outcomes)
    plain = {name: {**asdict(one), "rows": rows(one)} for name, one in outcomes.items()}
    content = {**facts, "seconds": round(time.monotonic() - began, 1), "parts": plain}
    if not create_json(options.output, content):
        print(f"error: {options.output} has appeared meanwhile and is kept", file=sys.stderr)
        return 2
    label = "" if setting.device == "cuda" and not setting.tiny else f" ({NOT_A_MEASUREMENT})"
    print(f"{verdict}{label}\nwritten: {options.output}")
    return status


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    default = Path(time.strftime("gpu-%Y%m%d-%H%M%S.json"))
    parser.add_argument("--output", type=Path, default=default, help="a new JSON file")
    return parser.parse_args()


def refused(options: argparse.Namespace) -> str:
    """What is wrong with the command line, before minutes are spent; empty if nothing is."""
    folder = options.output.resolve().parent
    if options.output.exists():
        return f"--output {options.output} is there already; name another file"
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return f"--output {options.output}: {folder} is no folder to write to; name another file"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU; --device cpu --tiny shows that the script itself runs"
    return ""


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = setting.device == "cuda"
    commit = None
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {
        "measurement": "GPU" if on_gpu and not setting.tiny else NOT_A_MEASUREMENT,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "devices": torch.cuda.device_count() if on_gpu else 0,
        "memory GB": round(torch.cuda.mem_get_info()[1] / 1e9, 1) if on_gpu else None,
        "sizes": "tiny" if setting.tiny else "full",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
    }


def run(parts: dict[str, str], setting: Setting, deadline: float) -> dict[str, Outcome]:
    """All parts in order; one that hangs takes half of the time, not all of it."""
    worker, outcomes = Worker(setting), {name: Outcome("did not fit") for name in parts}
    limit = (deadline - time.monotonic()) / 2
    try:
        for number, (name, target) in enumerate(parts.items(), 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            print(f"[{number}/{len(parts)}, {left:.0f} s left] {name} ", end="", flush=True)
            outcomes[name] = one = worker.run(target, min(left, limit))
            if one.status == "did not fit" and left > limit:
                one.status, one.reason = "failed", f"not through after {limit:.0f} s"
            failed = sum(row.passed is False for row in one.rows)
            facts = f"{one.status}, {one.seconds:.1f} s, {len(one.rows)} rows, {failed} failed"
            print(facts + (f": {one.reason}" if one.reason else ""), flush=True)
    except KeyboardInterrupt:
        print("stopped: what is known by now follows")
    finally:
        worker.close()
    return outcomes


def line(row: Row) -> str:
    """A row as text in columns."""
    verdict = {True: "ok", False: "FAILED", None: ""}[row.passed]
    bound = f"<= {row.bound:.3g}" if row.bound is not None else ""
    ratio = f"{row.ratio:.2f} x {row.beside}" if row.ratio is not None else ""
    text = f"{row.name:<58} {row.value:>10.4g} {row.unit:<9} {bound:<10} {verdict:<6} {ratio}"
    return f"{text.rstrip()}  {row.note}".rstrip()


def report(outcomes: dict[str, Outcome]) -> tuple[str, int]:
    """Print one table of all rows and the parts that are not in it; a last line and a status.

    What was left out or did not fit is no failure, but that nothing was checked is one.
    """
    print("\n" + "=" * 100)
    for name, outcome in outcomes.items():
        print(name)
        for row in outcome.rows:
            print(f"  {line(row)}")
    print("=" * 100)
    for status in ("failed", "left out", "did not fit"):
        for name, outcome in outcomes.items():
            if outcome.status == status:
                print(f"{status}: {name}" + (f" ({outcome.reason})" if outcome.reason else ""))
    checks = [row for outcome in outcomes.values() for row in outcome.rows if row.bound is not None]
    failed = [row.name for row in checks if not row.passed]
    for name in failed:
        print(f"check failed: {name}")
    states = [outcome.status for outcome in outcomes.values()]
    verdict = (
        f"{len(checks) - len(failed)} of {len(checks)} checks passed, "
        f"{states.count('done')} of {len(states)} parts done"
    )
    return verdict, int(bool(failed) or "failed" in states or not checks)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Rows as JSON has them: no NaN and no infinity, and whether they passed."""
    found = []
    for row in outcome.rows:
        fields = asdict(row) | {"passed": row.passed}
        infinite = {k for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
        found.append(fields | dict.fromkeys(infinite))
    return found
