"""COCO-Object labels: the original's table, resumable, in parallel, and never over its input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from talk2dino.datasets.benchmarks.public_datasets import convert_coco_object, object_labels
from talk2dino.errors import ConfigError, DataError, UserError
from tests.helpers.goldens import Golden
from tests.helpers.pipeline import files_below


def ignore(done: int, total: int) -> None:
    pass


def write_maps(root: Path, count: int = 4) -> Path:
    random = np.random.default_rng(0)
    used = np.array([0, 1, 10, 12, 24, 26, 89, 91, 150, 181, 255], np.uint8)
    for number in range(count):
        folder = root / ("val2017" if number % 2 else "train2017")
        folder.mkdir(parents=True, exist_ok=True)
        values = random.choice(used, (5, 7 + number))
        Image.fromarray(values).save(folder / f"{number:012d}.png")
        Image.new("L", (3, 3)).save(folder / f"{number:012d}_labelTrainIds.png")
    return root


def test_the_table_is_the_originals(golden: Golden) -> None:
    arrays = golden("coco_object_table")
    table = dict(zip(arrays["source_id"].tolist(), arrays["target_id"].tolist(), strict=True))
    for value in range(256):
        pixel = np.array([[value]], np.uint8)
        if value in table:
            assert object_labels(pixel).item() == table[value] == arrays["lut256"][value]
        else:  # the original let these pass unchanged
            with pytest.raises(DataError, match=f"x.png: label value {value} is no class of COCO"):
                object_labels(pixel, "x.png")


def assert_converted(golden: Golden, masks: Path, output: Path) -> None:
    table = golden("coco_object_table")["lut256"].numpy()
    for file in output.rglob("*.png"):
        source = (
            masks / file.relative_to(output).parent / file.name.replace("_instanceTrainIds", "")
        )
        assert np.array_equal(np.asarray(Image.open(file)), table[np.asarray(Image.open(source))])


def test_conversion_keeps_folders_and_resumes(golden: Golden, tmp_path: Path) -> None:
    masks, output = write_maps(tmp_path / "in"), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    assert convert_coco_object(masks, output, 1, lambda *n: seen.append(n)) == 4
    assert seen == [(n, 4) for n in range(5)]
    written = files_below(output)
    assert len(written) == 4
    assert_converted(golden, masks, output)
    lost = next(output.rglob("*.png"))
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert convert_coco_object(masks, output, 1, ignore) == 1
    assert files_below(output) == written
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert convert_coco_object(masks, output, 1, ignore) == 0


def test_the_input_stays_as_it_is(tmp_path: Path) -> None:
    masks = write_maps(tmp_path / "in")
    before = files_below(masks)
    assert convert_coco_object(masks, masks, 1, ignore) == 4
    after = files_below(masks)
    assert {name: after[name] for name in before} == before
    assert all(name.endswith("_instanceTrainIds.png") for name in after.keys() - before.keys())
    assert convert_coco_object(masks, masks, 1, ignore) == 0  # its own output is no input


def test_outputs_are_known_by_what_they_hold(tmp_path: Path) -> None:
    masks = write_maps(tmp_path / "in", 1)
    assert convert_coco_object(masks, masks, 1, ignore) == 1
    (target,) = masks.rglob("*_instanceTrainIds.png")
    labels = np.asarray(Image.open(target))
    Image.fromarray(labels).save(target)  # as a version wrote it that left no mark
    assert convert_coco_object(masks, masks, 1, ignore) == 0
    labels = labels.copy()
    labels[0, 0] = (labels[0, 0] + 1) % 81
    Image.fromarray(labels).save(target)  # somebody's, of the same size
    mine = target.read_bytes()
    with pytest.raises(DataError, match="is there already but is no conversion of"):
        convert_coco_object(masks, masks, 1, ignore)
    assert target.read_bytes() == mine
    target.unlink()
    assert convert_coco_object(masks, masks, 1, ignore) == 1
    (source,) = masks.rglob("000000000000.png")
    Image.fromarray(np.full_like(labels, 91)).save(source)  # another input of the same size
    with pytest.raises(DataError, match="is no conversion of"):
        convert_coco_object(masks, masks, 1, ignore)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_file_keeps_what_is_finished(
    golden: Golden, tmp_path: Path, num_workers: int
) -> None:
    masks = write_maps(tmp_path / "in", 3)
    bad = masks / "val2017" / "000000000009.png"
    Image.new("L", (4, 4), 65).save(bad)
    with pytest.raises(DataError, match=r"000000000009\.png: label value 65 is no class"):
        convert_coco_object(masks, tmp_path / "out", num_workers, ignore)
    assert not list(tmp_path.rglob(".*.tmp"))
    bad.unlink()
    convert_coco_object(masks, tmp_path / "out", num_workers, ignore)
    assert len(files_below(tmp_path / "out")) == 3
    assert_converted(golden, masks, tmp_path / "out")


def refuse(tmp_path: Path, message: str, **changes: object) -> None:
    arguments = {"masks": tmp_path / "in", "output": tmp_path / "out", "num_workers": 1} | changes
    with pytest.raises(UserError, match=message) as error:
        convert_coco_object(advance=ignore, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    write_maps(tmp_path / "in", 1)
    refuse(tmp_path, "input=.*none: no such folder", masks=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "input=.*empty: no label maps X.png", masks=tmp_path / "empty")
    (tmp_path / "file").write_text("")
    refuse(tmp_path, "output=.*file: is a file; give a folder", output=tmp_path / "file")
    refuse(tmp_path, "output=.*: cannot create this folder", output=tmp_path / "file" / "below")
    refuse(tmp_path, "num_workers=-1: use 0 or more", num_workers=-1)
    source = next((tmp_path / "in").rglob("*00.png"))
    Image.new("RGB", (4, 4)).save(source)
    refuse(tmp_path, "a RGB picture, not an 8-bit label map")
    source.write_text("no picture")
    refuse(tmp_path, r"000000000000\.png: cannot be read")
    there = tmp_path / "out" / "train2017" / "000000000000_instanceTrainIds.png"
    Image.new("L", (9, 9)).save(there)
    refuse(tmp_path, "is there already but is no conversion of")


def test_sixteen_bits_are_no_label_map_of_coco() -> None:
    with pytest.raises(DataError, match="label value 300"):
        object_labels(torch.tensor([[300]]).numpy())
    assert issubclass(ConfigError, UserError)
