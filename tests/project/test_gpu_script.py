"""`benchmarks/gpu.py` on the CPU: all its code at tiny sizes, and parts that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.gpu_parts.command import PARTS, main, report, rows, run
from benchmarks.gpu_parts.marked_tests import outcomes
from benchmarks.gpu_parts.rows import Row, Setting, check, compare, deviation, relative
from talk2dino.segmentation import PAMR

ROOT = Path(__file__).parents[2]
TINY = Setting("cpu", True)


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """The command from a checkout that is not installed, wherever it is called from."""
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_all_of_it_runs_at_tiny_sizes(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = command("--device", "cpu", "--tiny", "--output", file)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["measurement"] == "NOT A GPU MEASUREMENT" and found["sizes"] == "tiny"
    assert found["measurement"] in done.stdout.splitlines()[0]
    assert found["measurement"] in done.stdout.splitlines()[-2]
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(
        PARTS, "done"
    )
    for name, part in found["parts"].items():
        assert part["rows"], name
        for row in part["rows"]:
            assert row["passed"] in (True, None), row
            assert row["value"] is not None or row["name"] == "16-mixed", row
    timed = [row for part in found["parts"].values() for row in part["rows"] if row["ratio"]]
    assert {"the usual way", "vision encoder", "in memory"} <= {row["beside"] for row in timed}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_file_that_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    file.write_text("mine")
    for output, said in ((file, "is there already"), (tmp_path / "no" / "a", "no folder to write")):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", f"--output={output}"])
        assert main(None) == 2
        assert said in capsys.readouterr().err
    assert file.read_text() == "mine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--output={tmp_path / 'new'}"])
    assert main(None) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


# Parts that a worker finds by name.


def fine(setting: Setting) -> Iterator[Row]:
    yield check("fine", 0.5, 1)


def too_far(setting: Setting) -> Iterator[Row]:
    yield check("near", 0.5, 1)
    yield check("not a number", float("nan"), 1)


def raises(setting: Setting) -> Iterator[Row]:
    yield check("before", 0, 1)
    raise RuntimeError("CUDA error: an illegal access\nand what torch advises")


def dies(setting: Setting) -> Iterator[Row]:
    yield check("before", 0, 1)
    os._exit(9)


def lacks(setting: Setting) -> Iterator[Row]:
    import a_package_that_nobody_has  # noqa: F401

    yield check("never", 0, 1)


def hangs(setting: Setting) -> Iterator[Row]:
    yield check("before", 0, 1)
    time.sleep(600)


def part(function: str) -> str:
    return f"{__name__}:{function}"


def test_a_part_that_fails_is_one_line_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("fine", "raises", "dies", "lacks", "too_far")
    found = run({name: part(name) for name in names}, TINY, time.monotonic() + 300)
    assert {name: one.status for name, one in found.items()} == {
        "fine": "done",
        "raises": "failed",
        "dies": "failed",
        "lacks": "left out",
        "too_far": "done",
    }
    assert found["raises"].reason == (
        "RuntimeError: CUDA error: an illegal access … and what torch advises"
    )
    assert found["dies"].reason == "its process ended with status 9"
    assert found["lacks"].reason == "a_package_that_nobody_has is not installed"
    assert [len(one.rows) for one in found.values()] == [1, 1, 1, 0, 2]
    assert [row["value"] for row in rows(found["too_far"])] == [0.5, None]
    assert [row["passed"] for row in rows(found["too_far"])] == [True, False]
    assert report(found) == ("4 of 5 checks passed, 2 of 5 parts done", 1)
    printed = capsys.readouterr().out
    assert "left out: lacks (a_package_that_nobody_has is not installed)" in printed
    assert "check failed: not a number" in printed
    assert report({"fine": found["fine"]}) == ("1 of 1 checks passed, 1 of 1 parts done", 0)
    assert report({"lacks": found["lacks"]}) == ("0 of 0 checks passed, 0 of 1 parts done", 1)


def test_a_part_that_hangs_is_ended_and_what_does_not_fit_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names, start = ("fine", "hangs"), time.monotonic()
    found = run({"hangs": part("hangs")}, TINY, start + 10)
    assert time.monotonic() - start < 10
    assert (found["hangs"].status, found["hangs"].reason) == ("failed", "not through after 5 s")
    late = run({name: part(name) for name in names}, TINY, time.monotonic())
    assert [late[name].status for name in names] == ["did not fit"] * 2
    report(late)
    assert "did not fit: hangs" in capsys.readouterr().out


def ways(setting: Setting) -> Iterator[Row]:
    """Every way where neighbors lie beyond the border and blocks are not full."""
    from benchmarks.gpu_parts.pamr_ways import WAYS, PAMRBy

    image, mask = torch.rand(1, 3, 9, 14) * 255, torch.rand(1, 33, 5, 6)
    want = PAMR(2, (1, 20), compiled=False)(image, mask)
    large = torch.rand(1, 33, 9, 14)  # on the CPU resizing itself rounds equal planes differently
    for way in WAYS:
        refine = PAMRBy(way, 2, (1, 20))
        yield check(way, deviation(refine(image, mask), want), 2e-6)
        whole = refine(image, large[:, :1].expand_as(large))
        yield check(f"{way}, equal", deviation(whole, whole[:, :1].expand_as(whole)), 0)


def test_the_ways_of_pamr_agree() -> None:
    """Triton in its interpreter, which has to be asked for before the first import."""
    pytest.importorskip("triton")
    [found] = run({"ways": part("ways")}, TINY, time.monotonic() + 600).values()
    assert found.status == "done", found.reason
    assert len(found.rows) == 2 * 2
    assert [row.name for row in found.rows if not row.passed] == []


def test_a_way_without_memory_has_no_ratio() -> None:
    def hungry() -> None:
        raise torch.cuda.OutOfMemoryError

    found = compare("step", {"usual": hungry, "ours": lambda: None}, TINY, "usual", per=8)
    assert found[0].note == "out of memory"
    assert found[1].ratio is None and found[1].value > 0
    assert [row.passed for row in found] == [None, None]


def test_deviations() -> None:
    one = torch.tensor([1.0, 2.0])
    assert deviation(one, one + 0.5) == 0.5 and relative(one, 2 * one) == 0.5
    assert deviation(one, one[:1]) == float("inf")
    assert not check("nan", deviation(one, one * float("nan")), 1).passed


def test_what_pytest_reports() -> None:
    report = ElementTree.fromstring(
        "<suite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure message='assert 1 == 2'/></testcase>"
        "<testcase classname='a' name='idle'><skipped message='two GPUs'/></testcase>"
        "<testcase classname='b' name=''><error>No module named 'timm'</error></testcase></suite>"
    )
    found = {row.name: row for row in outcomes(report, "1 passed")}
    assert found["a::bad"].passed is False and found["a::bad"].note == "assert 1 == 2 None"
    assert found["b::"].passed is None and found["b::"].note == "needs timm"
    assert (found["tests that passed"].value, found["tests that passed"].note) == (1, "1 passed")
    assert found["tests that failed, or that none ran"].value == 1
    *_, last = outcomes(ElementTree.fromstring("<suite/>"), "")
    assert last.passed is False
