"""Evaluations side by side, and the report that a browser opens."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from talk2dino.errors import ConfigError, DataError
from talk2dino.evaluation.metrics import extremes, read_ious, score_image, write_scores
from talk2dino.evaluation.records import Record
from talk2dino.evaluation.report import (
    compare,
    heat_map,
    histogram,
    report_templates,
    top_confusions,
    write_report,
    write_sweep_report,
)
from talk2dino.evaluation.runs import Run, read_runs
from talk2dino.evaluation.tables import (
    PAPER_ORDER,
    as_csv,
    as_markdown,
    published,
    summarize,
)
from tests.helpers.evaluations import (
    benchmark,
    evaluate,
    evaluate_mosaic,
    settings,
    write_benchmark,
)
from tests.helpers.pipeline import fails, run

BENCHMARKS = Path(__file__).parents[2] / "conf" / "benchmark"


def reference(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())["reference"]
    return found


def a_run(name: str, miou: float | None, pamr: bool = False, **changes: Any) -> Run:
    results = {"benchmark": name, "miou": miou, "images": 7, "per_class": {}} if miou else {}
    values = {"folder": Path(name), "checkpoint": "runs/a", "results": results}
    values |= {"error": None if miou else "no such file"}
    return Run(benchmark=name, pamr=pamr, **values | changes)


def test_the_table_has_the_papers_form_and_numbers() -> None:
    runs = [
        a_run(name, 30.0 + place, pamr, reference=reference(name))
        for pamr in (False, True)
        for place, name in enumerate(reversed(PAPER_ORDER))
    ]
    summary = summarize(runs)
    assert summary.benchmarks == list(PAPER_ORDER)
    texts = [summary.text(row) for row in summary.rows]
    assert texts[0] == ["a", "no", *(f"{value:.1f}" for value in range(37, 29, -1)), "33.5"]
    means = {(row[0], row[1]): row[-1] for row in texts[2:]}
    assert means == {  # of the paper's table
        ("Talk2DINO ViT-B", "no"): "43.8",
        ("Talk2DINO ViT-B", "yes"): "46.3",
        ("Talk2DINO ViT-L", "no"): "42.8",
        ("Talk2DINO ViT-L", "yes"): "46.1",
    }
    lines = as_markdown(summary).splitlines()
    assert lines[0] == "| mIoU | PAMR | " + " | ".join(PAPER_ORDER) + " | mean |"
    assert lines[4].startswith("| *Talk2DINO ViT-B* | *no* | *87.1* | *39.8* | *28.1* | *36.6* |")
    assert lines[-1] == "Images: " + ", ".join(f"{n} 7" for n in reversed(PAPER_ORDER)) + "."
    rows = list(csv.reader(as_csv(summary).splitlines()))
    assert rows[0] == ["mIoU", "PAMR", *PAPER_ORDER, "mean"]
    assert rows[4][:3] == ["Talk2DINO ViT-B", "yes", "88.5"]


def test_failed_and_missing_runs_have_no_mean() -> None:
    runs = [a_run("voc", 80.0), a_run("context", None), a_run("voc", 81.0, checkpoint="runs/b")]
    summary = summarize(runs)
    assert [summary.text(row) for row in summary.rows] == [
        ["a", "no", "80.0", "failed", ""],
        ["b", "no", "81.0", "", ""],
    ]


def test_runs_are_labeled_by_what_differs() -> None:
    first = a_run("voc", 80.0, settings={"seed": 0, "benchmark.limit": 5})
    second = a_run("voc", 81.0, settings={"seed": 1, "benchmark.limit": 5})
    other = a_run("context", 40.0, settings={"seed": 0, "benchmark.limit": 9})
    far = a_run("voc", 9.0, checkpoint="other/a", settings={"seed": 0, "benchmark.limit": 5})
    labels = [row.label for row in summarize([first, second, other, far]).rows]
    assert labels == ["runs/a seed=0", "runs/a seed=1", "other/a seed=0"]
    knn = {"refinement._target_": "x.y.KNN", "refinement.k": 8}
    runs = [a_run("voc", 80.0, settings={"refinement": None}), a_run("voc", 81.0, settings=knn)]
    assert [row.label for row in summarize(runs).rows] == ["a", "a refinement=KNN"]


def test_references_of_both_shapes() -> None:
    assert published({"A": 40, "B": {"plain": 1.5, "pamr": 2}}) == [
        ("A", None, 40.0),
        ("B", False, 1.5),
        ("B", True, 2.0),
    ]


@pytest.mark.parametrize("wrong", ["A", {"plain": 1, "pamP": 2}, {"plain": "x"}, 140, True, None])
def test_a_reference_that_is_no_figure(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.reference\.paper=.*give the mIoU"):
        published({"paper": wrong})


def test_per_image_figures(tmp_path: Path) -> None:
    confusion = torch.tensor([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    names = ["cat", "dog", "cow"]
    scores = [
        score_image(i, Record.of(name, counts, 0.0), names)
        for i, (name, counts) in enumerate(
            [("x", confusion), ("y", nothing), ("z", torch.tensor([[0, 0, 5], [0] * 3, [0] * 3]))]
        )
    ]
    assert scores[0].iou == pytest.approx(100 * (6 / 8 + 4 / 6) / 2)
    assert scores[0].pixel_accuracy == pytest.approx(100 * 10 / 12)
    assert scores[0].classes == ("cat", "dog")
    assert scores[2].iou == 0  # cow is predicted, but is not in the label map
    best, worst = extremes(scores, 4)
    assert [s.name for s in best] == ["x"]
    assert [s.name for s in worst] == ["z"]
    write_scores(tmp_path / "images.csv", scores)
    assert (tmp_path / "images.csv").read_text().splitlines()[1:3] == [
        "0,x,70.83,83.33,12,cat; dog",
        "1,y,,,0,",
    ]
    assert read_ious(tmp_path / "images.csv") == [70.83, 0.0]


def draw(chart: str, *values: Any) -> str:
    """A chart as the page shows it."""
    return str(getattr(report_templates().get_template("charts.html.j2").module, chart)(*values))


def test_charts_hold_the_numbers() -> None:
    confusion = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    names = ["cat", "dog<b>", "cow"]
    assert top_confusions(confusion, names) == [
        ("dog<b>", "cat", 25.0, 50.0),
        ("cat", "dog<b>", 10.0, 20.0),
    ]
    heat = draw("heat_map", heat_map(confusion, names))
    assert "<title>cat → dog&lt;b&gt;: 20.0 %</title>" in heat
    assert "cow" not in heat  # is neither there nor predicted
    assert heat.count("<rect") == 1 + 4
    percents = {"cat": 10.0, "dog<b>": 90.0, "cow": None}
    bars = draw("class_bars", percents, {"cat": 5.0}, 50.0)
    assert bars.index("dog&lt;b&gt;") < bars.index("cat") < bars.index("cow")
    assert "width:90.0%" in bars and 'title="5.0"' in bars
    assert draw("histogram", histogram([0.0, 3.0, 100.0])).count("2 images") == 1
    many = draw("heat_map", heat_map(np.ones((171, 171), np.int64), [str(i) for i in range(171)]))
    assert len(many) < 1_000_000


class Checker(HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "href"):
                assert value is not None and value.startswith("data:"), value
        assert tag != "script"
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> str:
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not re.search(r"https?://|url\(|@import", text)
    return text


def small_run(folder: Path, root: Path) -> Path:
    """A run folder as the entry point leaves it."""
    results = evaluate(folder, benchmark(root), settings(examples=1))
    config = {"checkpoint": "some/run", "pamr": False, "benchmark": {"name": "squares"}}
    (folder / "results.json").write_text(json.dumps(results | {"config": config}))
    return folder


def test_the_report_is_one_file(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data", 3)
    folder = small_run(tmp_path / "run", root)
    results = json.loads((folder / "results.json").read_text())
    with np.load(folder / "confusion.npz", allow_pickle=False) as arrays:
        confusion = arrays["confusion"]
    assert confusion.trace() / confusion.sum() == pytest.approx(results["pixel_accuracy"] / 100)
    text = check_page(write_report(folder))
    assert f"{results['miou']:.1f}" in text
    for part in ("IoU per class", "Confusion", "Best images", "Worst images", "Protocol"):
        assert part in text
    assert text.count("data:image/jpeg") == 2
    assert "prefers-color-scheme:dark" in text
    (tmp_path / "both").mkdir()
    sweep = write_sweep_report(read_runs([folder, folder]), tmp_path / "both")
    assert check_page(sweep).count("<details") > 2


def test_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    """Of classes, images, checkpoints, publications and packages."""
    folder = small_run(tmp_path / "run", write_benchmark(tmp_path / "data", 3))
    evil = '<script>alert("&")</script>'
    results = json.loads((folder / "results.json").read_text())
    results["per_class"] = {f"{evil}{name}": v for name, v in results["per_class"].items()}
    results["per_class"] |= {f"{evil}absent": None}
    protocol = {"name": evil, "note": evil, "reference": {evil: {"plain": 39.8, "pamr": 42.4}}}
    results |= {"benchmark": evil, "config": {"checkpoint": evil, "benchmark": protocol}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    with np.load(folder / "confusion.npz", allow_pickle=False) as arrays:
        confusion, names = arrays["confusion"], [f"{evil}{name}" for name in arrays["classes"]]
    np.savez(folder / "confusion.npz", confusion=confusion, classes=np.array(names))
    examples = json.loads((folder / "examples.json").read_text())
    for example in examples:
        example["name"] = evil
        example["classes"] = [[evil, *rest] for _, *rest in example["classes"]]
    (folder / "examples.json").write_text(json.dumps(examples))
    failed = a_run("voc", None, error=evil)
    single = check_page(write_report(folder))
    both = check_page(write_sweep_report([*read_runs([folder]), failed], tmp_path))
    for text in (single, both):
        assert text.count("&lt;script&gt;") > 20
    for place in ("Published", "Versions", "Confusion", "absent\n</details>"):
        assert place in single
    assert "Failed" in both


def test_the_untrained_run_shows_its_own_files(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data", 3)
    folder = small_run(tmp_path / "run", root)
    small_run(folder / "untrained", root)
    (folder / "untrained" / "results.json").rename(folder / "results_untrained.json")
    (folder / "untrained" / "confusion.npz").unlink()
    trained, sweep = write_report(folder), write_sweep_report(read_runs([folder]), tmp_path)
    assert "untrained projection" in check_page(trained)
    first, second = check_page(sweep).split('<details class="run">')[1:]
    assert "results_untrained.json" in first and "Confusion" not in first
    assert "results.json" in second and "Confusion" in second


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", write_benchmark(tmp_path / "data", 3))
    (folder / "environment.json").write_text("[]")
    with pytest.raises(DataError, match=r"environment\.json: holds list, not versions"):
        write_report(folder)
    (folder / "environment.json").unlink()
    (folder / "examples.json").write_text("{")
    with pytest.raises(DataError, match=r"examples\.json: not a json file"):
        write_report(folder)


def test_a_damaged_matrix_is_named(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", write_benchmark(tmp_path / "data", 3))
    matrix = folder / "confusion.npz"
    for content in (matrix.read_bytes()[:100], b"", b"hello"):
        matrix.write_bytes(content)
        with pytest.raises(DataError, match=r"confusion\.npz: is damaged"):
            write_report(folder)


def test_folders_without_an_evaluation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results\.json; give the run folder"):
        read_runs([tmp_path])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="not a json file"):
        read_runs([tmp_path])
    (tmp_path / "results.json").write_text('{"benchmark": "voc"}')
    with pytest.raises(DataError, match="has no miou"):
        read_runs([tmp_path])
    sound = {"benchmark": "voc", "miou": 12.5, "images": 3, "per_class": {}, "config": {}}
    sound |= {"pixel_accuracy": 50.0, "seconds": 1.5}
    for key in sound.keys() - {"config"}:
        left = {name: value for name, value in sound.items() if name != key}
        (tmp_path / "results.json").write_text(json.dumps(left))
        with pytest.raises(DataError, match=f"has no {key}"):
            read_runs([tmp_path])
    for key, value in (("miou", "a"), ("miou", math.nan), ("images", "many"), ("config", [1])):
        (tmp_path / "results.json").write_text(json.dumps(sound | {key: value}))
        with pytest.raises(DataError, match=rf"results\.json: {key} is .*; give results of"):
            read_runs([tmp_path])


def test_a_sweep_ends_with_one_table(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluate_mosaic(trained_run, tmp_path / "unused", "pictures=0", "examples=1")
    sweep = [item for item in command if not item.startswith(("checkpoint=", "hydra.run.dir"))]
    with pytest.raises(SystemExit) as stopped:
        run(
            "evaluate",
            "-m",
            *sweep[1:],
            f"checkpoint={trained_run},{tmp_path / 'none'}",
            "+benchmark.reference.paper=12.5",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
        )
    assert stopped.value.code == 1  # one of two failed
    rows = list(csv.reader((tmp_path / "sweep" / "summary.csv").open()))
    results = json.loads((tmp_path / "sweep" / "0" / "results.json").read_text())
    assert rows == [
        ["mIoU", "PAMR", "mosaic"],
        [trained_run.name, "no", f"{results['miou']:.1f}"],
        ["none", "no", "failed"],
        ["paper", "", "12.5"],
    ]
    text = check_page(tmp_path / "sweep" / "report.html")
    assert "none: no such file" in text
    assert (tmp_path / "sweep" / "summary.md").read_text().count("\n") == 7
    check_page(tmp_path / "sweep" / "0" / "report.html")
    shown = capsys.readouterr().out
    assert "failed" in shown and "report: " in shown

    run("compare", tmp_path / "sweep", tmp_path / "sweep" / "0", "--output", tmp_path / "both")
    assert "12.5" in (tmp_path / "both" / "summary.csv").read_text()


def test_where_a_comparison_goes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `~` alone after `=`; what cannot be a folder is one line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    source = small_run(tmp_path / "run", write_benchmark(tmp_path / "data", 3))
    run("compare", source, "--output=~/reports")
    assert (tmp_path / "reports" / "report.html").is_file() and not Path("~").exists()
    assert "file" in fails(capfd, "compare", source, "--output=file")


def test_a_summary_replaces_only_a_summary(tmp_path: Path) -> None:
    runs = [dataclasses.replace(a_run("voc", 80.0), results={}, error="stopped")]
    (tmp_path / "summary.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"summary\.md: is there and was not written"):
        compare(runs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]
    (tmp_path / "summary.md").unlink()
    compare(runs, tmp_path)
    compare(runs, tmp_path)
