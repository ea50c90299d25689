"""An evaluation that stops at any moment goes on where it stopped, and nothing shows it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.datasets.benchmarks.base import Sample
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.errors import ConfigError, DataError
from talk2dino.evaluation.records import Record, Records
from tests.helpers.evaluations import benchmark, evaluate, settings, write_benchmark
from tests.helpers.pipeline import files_below
from tests.helpers.ranks import forked, two_ranks


@dataclass(kw_only=True)
class Fatal(FolderBenchmark):
    """Kills the process, or raises, where image `at` is read."""

    at: int = 3
    kill: bool = False

    def sample(self, index: int) -> Sample:
        if index == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the disk is gone")
        return super().sample(index)


def fatal(root: Path, **options: Any) -> Fatal:
    ready = benchmark(root)
    fields = {key: getattr(ready, key) for key in FolderBenchmark.__dataclass_fields__}
    return Fatal(**fields | options)


def everything() -> Any:
    return settings(batch_size=2, pictures=2, label_maps=True, examples=2)


def killed(root: str, folder: str) -> None:
    torch.set_num_threads(1)
    evaluate(Path(folder), fatal(Path(root), kill=True), everything())


def names_done(folder: Path) -> set[str]:
    return set(Records(folder / "records").read())


def without_clock(folder: Path) -> dict[str, Any]:
    """All files of a run; of the results neither seconds nor config, and no records."""
    files = files_below(folder)
    results = json.loads(files.pop("results.json"))
    del results["seconds"], results["config"]  # one process or two
    kept = {name: content for name, content in files.items() if not name.startswith("records")}
    return kept | {"results": results}


def rank_resumes(rank: int, root: str, folder: str) -> None:
    config = settings(2, "ddp", batch_size=2, pictures=2, label_maps=True, examples=2)
    evaluate(Path(folder), benchmark(Path(root)), config)


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "data", 6)
    evaluate(tmp_path / "whole", benchmark(root), everything())
    for name in ("alone", "ranks"):
        process = forked(killed, str(root), str(tmp_path / name))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert names_done(tmp_path / name) == {"0", "1"}
        assert not (tmp_path / name / "results.json").exists()
    evaluate(tmp_path / "alone", benchmark(root), everything())
    two_ranks(rank_resumes, str(root), str(tmp_path / "ranks"))
    want = without_clock(tmp_path / "whole")
    assert {"confusion.npz", "images.csv", "label_maps/5.png", "overlays/5.png"} <= want.keys()
    assert without_clock(tmp_path / "alone") == want
    assert without_clock(tmp_path / "ranks") == want


def test_finished_images_are_not_segmented_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talk2dino.evaluation.module import SegmentationModule

    seen: list[str] = []
    label = SegmentationModule._label

    def counting(self: SegmentationModule, sample: Sample, encoded: Any) -> torch.Tensor:
        seen.append(sample.name)
        return label(self, sample, encoded)

    monkeypatch.setattr(SegmentationModule, "_label", counting)
    root, folder = write_benchmark(tmp_path / "data", 5), tmp_path / "run"
    with pytest.raises(RuntimeError, match="the disk is gone"):
        evaluate(folder, fatal(root))
    assert seen == ["0", "1", "2"]
    first = evaluate(folder, benchmark(root))
    assert seen == ["0", "1", "2", "3", "4"]
    again = evaluate(folder, benchmark(root))  # nothing is left to do
    assert again["per_class"] == first["per_class"]
    assert (again["images"], len(seen)) == (5, 5)
    with_maps = evaluate(folder, benchmark(root), settings(label_maps=True))
    assert len(seen) == 10  # their label maps were missing
    assert with_maps["per_class"] == first["per_class"]
    evaluate(folder, benchmark(root), settings(resume=False))
    assert len(seen) == 15


def test_a_broken_image_does_not_lose_the_others(tmp_path: Path) -> None:
    root, folder = write_benchmark(tmp_path / "data", 4), tmp_path / "run"
    whole = evaluate(tmp_path / "whole", benchmark(root))
    mask = root / "masks" / "2.png"
    good = mask.read_bytes()
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(mask)
    with pytest.raises(
        DataError, match=r"masks/2\.png.* \(2 images are finished and kept"
    ) as error:
        evaluate(folder, benchmark(root))
    assert str(error.value).endswith(
        f"run the same command with hydra.run.dir={folder}, and with resume=false "
        "if its settings change)"
    )
    mask.write_bytes(good)
    assert evaluate(folder, benchmark(root))["per_class"] == whole["per_class"]


def test_an_image_may_be_taken_away_or_added(tmp_path: Path) -> None:
    root, folder = write_benchmark(tmp_path / "data", 4), tmp_path / "run"
    evaluate(folder, benchmark(root, limit=2))
    assert evaluate(folder, benchmark(root))["images"] == 4
    for kind in ("images", "masks"):
        (root / kind / "1.png").unlink()
    got = evaluate(folder, benchmark(root))
    want = evaluate(tmp_path / "alone", benchmark(root))
    assert got["images"] == 3
    assert got["per_class"] == want["per_class"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    root, folder = write_benchmark(tmp_path / "data", 2), tmp_path / "run"
    evaluate(folder, benchmark(root))
    with pytest.raises(ConfigError, match="began with pamr=false, now it is true; choose another"):
        evaluate(folder, benchmark(root), settings(pamr=True))
    config = settings(benchmark={"window": 16, "reference": {"a": 1.0}})
    with pytest.raises(ConfigError, match=r"began with benchmark\.window=null, now it is 16"):
        evaluate(folder, benchmark(root), config)
    names = benchmark(root).class_list.names
    turned = [{"name": name, "id": number} for number, name in enumerate(names)]
    turned[0]["id"], turned[1]["id"] = 1, 0
    with pytest.raises(ConfigError, match=r"began with classes=.*choose another"):
        evaluate(folder, benchmark(root, classes=turned))
    evaluate(folder, benchmark(root), settings(resume=False, pamr=True))


def test_records_are_exact_and_small(tmp_path: Path) -> None:
    records, generator = Records(tmp_path / "records"), torch.Generator().manual_seed(0)
    records.claim({"pamr": False})
    counts = torch.zeros(171, 171, dtype=torch.int64)
    chosen = torch.randint(0, 171 * 171, (60,), generator=generator)
    counts.view(-1)[chosen] = torch.randint(1, 1 << 40, (60,), generator=generator)
    records.add(Record.of("a", counts, 1.5))
    records.add(Record.of("b", torch.zeros_like(counts), 2.5))
    records.close()
    (part,) = (tmp_path / "records").glob("part-*")
    assert part.stat().st_size < 2500
    with part.open("a") as file:
        file.write('{"name":"torn","cells":[1')
    records.add(Record.of("c", counts, 1.0))
    records.close()
    found = Records(tmp_path / "records").read()
    assert set(found) == {"a", "b", "c"}
    assert torch.equal(found["a"].confusion(171), counts)
    assert not found["b"].confusion(171).any()
    assert records.seconds() == 3.5
    records.claim({"pamr": False})
    with pytest.raises(ConfigError, match="pamr=false, now it is true"):
        records.claim({"pamr": True})
    records.claim({"pamr": True}, resume=False)
    assert not records.read()


@pytest.mark.parametrize("name", ["results.json", "report.html", "records/mine.txt"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_of_the_user_is_refused(
    tmp_path: Path, name: str, resume: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="is there and was not written by this command"):
        Records(tmp_path / "records").claim({"a": 1}, resume)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    (tmp_path / name).unlink()
    if "/" in name:
        (tmp_path / "records").rmdir()
    for again in (True, resume):
        Records(tmp_path / "records").claim({"a": 1}, again)


def test_a_kill_before_the_first_record_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, its settings are not; starting anew never lacks them."""
    records = Records(tmp_path / "records")
    records.folder.mkdir()
    (records.folder / ".settings.json.tmp").write_text("{")
    records.claim({"seed": 1})
    records.add(Record("0", [0], [1], 0.1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("talk2dino.evaluation.records.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            records.claim({"seed": 2}, resume=False)
    records.claim({"seed": 2}, resume=False)
    assert records.read() == {}
    with pytest.raises(ConfigError, match="began with seed=2, now it is 3"):
        records.claim({"seed": 3})
