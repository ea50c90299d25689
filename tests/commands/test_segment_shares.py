"""`segment` under torchrun: every picture is one rank's, and one merged result comes of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from tests.helpers.encoders import SMALL_CLIP
from tests.helpers.pipeline import files_below, run
from tests.helpers.ranks import two_ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A command line for five pictures and a broken one, without its output."""
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random", templates="plain")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    psi = ProjectionLayer(text.embed_dim, vision.embed_dim)
    save_projection(psi, tmp_path / "psi.safetensors", specs)
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in "abdef":
        pixels = random.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "c.png").write_bytes(b"\x89PNG nothing more")
    return [
        *("segment", f"checkpoint={tmp_path / 'psi.safetensors'}", "classes=[cat,grass]"),
        *(f"image={tmp_path / 'photos'}", "short_side=32", "pamr=false", "accelerator=cpu"),
        *("formats=[coco,geojson]", f"hydra.run.dir={tmp_path / 'run'}"),
    ]


def as_rank(rank: int, command: Sequence[str], said: Path) -> None:
    """Run in a process of its own; what it prints, and its status, go into files."""
    out, status = io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            run(*command)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    (said / f"{rank}.txt").write_text(f"{status}\n{out.getvalue()}")


def test_two_processes_give_the_result_of_one(given: list[str], tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    with pytest.raises(SystemExit) as stopped:
        run(*given, f"output={alone}")
    assert stopped.value.code == 1  # for the broken picture
    two_ranks(as_rank, [*given, f"output={shared}"], tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert sorted(text[0] for text in texts) == ["0", "1"]  # the last one says what is wrong
    last = next(text for text in texts if text.startswith("1"))
    assert "all ranks are done" in last and "1 of 6 pictures could not be read" in last
    counts = [int(text.split(" pictures segmented")[0].split()[-1]) for text in texts]
    assert sorted(counts) == [2, 3]  # every picture once
    assert files_below(shared) == files_below(alone)
    assert len(list((shared / ".parts").glob("*.json"))) == 2


def test_the_last_one_gathers_and_nobody_before(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A rank that died is made up for by another start, with any number of processes."""
    out = tmp_path / "out"
    command = [*given, f"output={out}", "resume=true"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for said in ("3 pictures segmented", "0 pictures segmented"):
        run(*command)
        assert f"rank 1 of 2: {said}; the last rank to finish" in capfd.readouterr().out
        assert not (out / "annotations").exists()
    assert sorted(path.stem for path in out.glob("*_labels.png")) == [
        f"{name}_labels" for name in "bdf"
    ]
    (tmp_path / "photos" / "c.png").unlink()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    run(*command)
    assert (out / "annotations" / "coco" / "instances.json").is_file()
    assert "3 of 5 pictures were done before" in capfd.readouterr().out


def test_a_record_of_an_earlier_run_does_not_count(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures are not there with these settings, so nothing is gathered without them."""
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    (out / ".parts" / "segment-00000-of-00002.json").write_text("{}")
    (out / ".parts" / "segment-00002-of-00003.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(*given, f"output={out}")
    assert not (out / "annotations").exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        run(*given, f"output={out}")
    assert stopped.value.code == 1 and (out / "annotations" / "geojson").is_dir()
    records = sorted(path.name for path in (out / ".parts").iterdir())
    assert records == ["lock", "segment-00000-of-00002.json", "segment-00001-of-00002.json"]


@pytest.fixture
def started(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Runs rank r of 2 to its end, with further keys; gives its status and what it says."""

    def start(rank: int, *more: str) -> tuple[int, str]:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        status = 0
        try:
            run(*given, f"output={tmp_path / 'out'}", *more)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        said = capfd.readouterr()
        return status, said.out + said.err

    return start


def pictured(path: Path) -> None:
    """Write a picture that no other one equals."""
    pixels = np.random.default_rng().integers(0, 255, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def gathered(tmp_path: Path) -> str:
    """First letters of the pictures in the merged result, or none."""
    file = tmp_path / "out" / "annotations" / "coco" / "instances.json"
    images = json.loads(file.read_text())["images"] if file.exists() else []
    return "".join(sorted(image["file_name"][0] for image in images))


def test_a_picture_that_was_broken_is_missed(
    started: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Rank 0 met it while it was being copied; whoever comes last does not gather without it."""
    assert started(0, "resume=true")[0] == 0
    pictured(tmp_path / "photos" / "c.png")
    status, said = started(1, "resume=true")
    assert status == 1 and "rank 1 of 2: 1 of 6 pictures are not done (c.png)" in said
    assert gathered(tmp_path) == ""
    assert started(0, "resume=true")[0] == 0
    assert gathered(tmp_path) == "abcdef"


def test_a_rank_that_comes_late_gathers_again(
    started: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    pictured(tmp_path / "photos" / "c.png")
    started(0)
    assert "all ranks are done" in started(1)[1] and gathered(tmp_path) == "abcdef"
    assert "all ranks are done" in started(1)[1]  # again, of which rank 0 knows nothing yet
    assert "all ranks are done" in started(0)[1]
    (tmp_path / "photos" / "c.png").write_bytes(b"\x89PNG nothing more")
    status, said = started(1, "resume=true")
    assert status == 0 and "the last rank to finish gathers" in said  # that is to come
    status, said = started(0, "resume=true")
    assert status == 1 and "1 of 6 pictures could not be read" in said
    assert gathered(tmp_path) == "abdef"


def test_ranks_that_saw_different_pictures_say_so(
    started: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """With a new picture in front, both take b and e, and nobody a, d and f."""
    photos = tmp_path / "photos"
    (photos / "a.png").rename(tmp_path / "a.png")
    (photos / "c.png").unlink()
    started(0)
    (tmp_path / "a.png").rename(photos / "a.png")
    status, said = started(1)
    assert status == 1 and gathered(tmp_path) == ""
    assert "rank 0 saw another list of 4 pictures, this one 5; 3 of 5 pictures are not" in said
    assert [started(rank, "resume=true")[0] for rank in (1, 0)] == [0, 0]
    assert gathered(tmp_path) == "abdef"


def test_equal_names_are_shared_and_resumed_in_their_folders(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for name, new in (("a", "2023/a"), ("b", "2024/a"), ("c", "2024/c"), ("d", "d")):
        (photos / new).parent.mkdir(exist_ok=True)
        (photos / f"{name}.png").rename(photos / f"{new}.png")
    command = [*given, f"image={photos}/**/[acd].png", f"output={out}", "subfolders=true"]
    for more in ("resume=false", "resume=true"):
        for rank in ("1", "0"):
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", rank)
            with suppress(SystemExit):
                run(*command, "heatmaps=true", more)
        said = capfd.readouterr()
        assert "1 of 4 pictures could not be read" in said.err
    assert "2 of 2 pictures were done before" in said.out
    assert (out / "2024" / "a_heat_cat.png").is_file() and (out / "d_labels.png").is_file()
    listed = json.loads((out / "annotations" / "coco" / "instances.json").read_text())["images"]
    assert [one["file_name"] for one in listed] == ["2023/a.png", "2024/a.png", "d.png"]
