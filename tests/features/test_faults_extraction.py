"""Extraction under fire: SIGKILL anywhere, dying ranks, overlapping starts, full disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from talk2dino.errors import StoreError, WriteError
from talk2dino.features import FeatureStore
from talk2dino.features.store.writer import finished_shards, open_for_append
from tests.helpers.faults import (
    SHARD,
    extraction,
    join,
    kill_and_restart,
    lost_rows,
    make_images,
    start,
    start_ranks,
    wrong_files,
)
from tests.helpers.pipeline import files_below

KILLS = int(os.environ.get("TALK2DINO_KILLS", "12"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source") / "images")


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted run of one process."""
    store = tmp_path_factory.mktemp("whole")
    assert extraction(images, store).run() is not None
    assert FeatureStore(store).verify() == []
    return store


def test_no_kill_loses_or_changes_a_row(images: Path, tmp_path: Path) -> None:
    killed, stores, wrong = kill_and_restart(images, tmp_path, KILLS, seed=0)
    print(f"{killed} kills over {stores} stores")
    assert killed >= KILLS
    assert wrong == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_store(
    images: Path, whole: Path, tmp_path: Path, world_size: int
) -> None:
    assert join(start_ranks(images, tmp_path, world_size)) == [0] * world_size
    assert files_below(tmp_path) == files_below(whole)
    assert lost_rows(tmp_path, whole) == 0


def test_a_dead_rank_leaves_the_others_to_finish(images: Path, whole: Path, tmp_path: Path) -> None:
    ranks = [
        start(images, tmp_path, 12 if rank == 1 else None, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert join(ranks) == [0, -signal.SIGKILL, 0]
    with pytest.raises(StoreError, match=r"manifest\.json: not found"):
        FeatureStore(tmp_path)
    done = set(finished_shards(tmp_path, "train"))
    assert done >= {k for k in range(8) if k % 3 != 1}
    assert wrong_files(tmp_path, whole) == []
    finished = [tmp_path / f"train-{k:05d}.h5" for k in done]
    times = [path.stat().st_mtime_ns for path in finished]
    assert join(start_ranks(images, tmp_path, 2)) == [0, 0]  # another number of them
    assert files_below(tmp_path) == files_below(whole)
    assert [path.stat().st_mtime_ns for path in finished] == times  # nothing done twice


def test_starts_that_overlap_do_no_harm(images: Path, whole: Path, tmp_path: Path) -> None:
    """A restart while ranks of the first start still run: both want the same shards."""
    processes = [
        *start_ranks(images, tmp_path, 2),
        start(images, tmp_path),
        start(images, tmp_path),
    ]
    assert join(processes) == [0] * 4
    assert files_below(tmp_path) == files_below(whole)
    assert not [path for path in tmp_path.rglob(".*.tmp") if path.is_file()]


def test_of_ranks_that_begin_a_store_together_one_decides(tmp_path: Path) -> None:
    gate = threading.Barrier(8)
    results: list[str] = []

    def begin(number: int, folder: Path) -> None:
        gate.wait()
        try:
            open_for_append(folder, {"dtype": f"float{number}"}, "train")
            results.append("begun")
        except StoreError as error:
            results.append(str(error))

    for attempt in range(5):
        results.clear()
        folder = tmp_path / str(attempt)
        threads = [threading.Thread(target=begin, args=(n, folder)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count("begun") == 1, results
        assert sum("was begun with dtype=" in text for text in results) == 7
        assert [path.name for path in (folder / ".parts").iterdir()] == ["settings.json"]


def test_a_file_that_cannot_grow_is_one_line_and_keeps_the_others(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    """The first shard has an image less than the second, so a limit between them stops there."""
    resource = pytest.importorskip("resource")
    first, second = ((whole / f"train-{k:05d}.h5").stat().st_size for k in (0, 1))
    assert first < second
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (second - 1, before[1]))
    try:
        with pytest.raises(WriteError) as error:
            extraction(images, tmp_path).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _one_line(error, "train-00001.h5: not written (File too large)")
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["train-00000.h5"]
    assert not list(tmp_path.glob(".*.tmp"))
    assert extraction(images, tmp_path).run() is not None
    assert files_below(tmp_path) == files_below(whole)


@pytest.fixture
def small_disk(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two thirds of the store."""
    size = sum(path.stat().st_size for path in whole.glob("*.h5")) * 2 // 3
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_finished_shards(
    images: Path, whole: Path, small_disk: Path
) -> None:
    with pytest.raises(WriteError) as error:
        extraction(images, small_disk).run()
    _one_line(error, "not written (No space left on device); free some space and start again")
    kept = finished_shards(small_disk, "train")
    assert 2 <= len(kept) < len(finished_shards(whole, "train"))
    assert wrong_files(small_disk, whole) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert extraction(images, small_disk).run() is not None
    assert files_below(small_disk) == files_below(whole)


def _one_line(error: pytest.ExceptionInfo[WriteError], part: str) -> None:
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_damaged_picture_is_in_the_stores(whole: Path) -> None:
    """The tests above would say nothing about skipped images otherwise."""
    store = FeatureStore(whole)
    assert store.manifest.skipped == 1
    assert [shard.images for shard in store.manifest.shards][:2] == [SHARD - 1, SHARD]
    assert store.images["patch_index"].shape[1:] == (3,)
