"""The tests that are marked `gpu`, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_parts.rows import Row, Setting, check
from benchmarks.gpu_parts.worker import NotHere

ROOT = Path(__file__).resolve().parents[2]


def marked(setting: Setting) -> Iterator[Row]:
    """`pytest -m gpu` on the device; a row for every test that failed."""
    import pytest  # noqa: F401 (left out by name without it)

    files = [f for f in sorted(ROOT.glob("tests/*/test_*.py")) if "mark.gpu" in f.read_text()]
    files = setting.choose(files, [file for file in files if file.name == "test_windows.py"])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junit-xml={report}"]
        command += [f"--gpu-device={setting.device}", *map(str, files)]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            missing = re.search(r"No module named '([\w.]+)'", done.stdout + done.stderr)
            if missing:
                raise NotHere(f"{missing[1]} is not installed")
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stderr[-200:]}")
        summary = (done.stdout.strip().splitlines() or ["pytest printed nothing"])[-1]
        yield from outcomes(ElementTree.parse(report).getroot(), summary)


def outcomes(report: ElementTree.Element, summary: str) -> Iterator[Row]:
    """Rows of a JUnit report: what did not pass, and how many did."""
    cases = list(report.iter("testcase"))
    bad = 0
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for problem in (*case.iter("failure"), *case.iter("error")):
            text = f"{problem.get('message')} {problem.text}"
            missing = re.search(r"No module named '([\w.]+)'", text)
            if missing:
                yield Row(name, float("nan"), "", note=f"needs {missing[1]}")
                continue
            bad += 1
            yield check(name, 1, 0, "failed", note=" ".join(text.split())[:150])
    others = ("skipped", "failure", "error")
    passed = sum(all(case.find(other) is None for other in others) for case in cases)
    yield Row("tests that passed", passed, "tests", note=summary)
    yield check("tests that failed, or that none ran", bad + (not passed), 0, "tests")
