"""Shards appear complete or not at all, in the same bytes every time; runs resume."""

from __future__ import annotations

import errno
import json
import os
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from talk2dino import files
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.errors import StoreError, UserError, WriteError
from talk2dino.features import FeatureStore, write_store
from talk2dino.features.store import shard_writer
from talk2dino.features.store.schema import Manifest
from talk2dino.features.store.writer import (
    IMAGES_PER_SHARD,
    finish_manifest,
    open_for_append,
    write_shard,
)
from talk2dino.files import put_known, write_json
from talk2dino.segmentation.overlay import save_picture
from tests.helpers.ranks import forked
from tests.helpers.stores import Arrays, shard_arrays


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_same_arrays_same_bytes(tmp_path: Path) -> None:
    infos = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        infos.append(write_shard(tmp_path / name, 0, *shard_arrays()))
    a, b = ((tmp_path / name / "train-00000.h5").read_bytes() for name in ("a", "b"))
    assert a == b
    assert infos[0] == infos[1]
    assert infos[0].bytes == len(a)


def test_layout_is_contiguous_float16(tmp_path: Path) -> None:
    images, captions = shard_arrays()
    write_shard(tmp_path, 0, images, captions)
    with h5py.File(tmp_path / "train-00000.h5") as file:
        tokens = file["images/patch_tokens"]
        assert tokens.chunks is None
        assert tokens.compression is None
        assert tokens.dtype == np.float16
        np.testing.assert_array_equal(tokens[:], images["patch_tokens"].astype(np.float16))
        assert file["captions/image_row"].dtype == np.int64
        assert file["captions/text"].asstr()[1] == "a cat, número 1"


def test_rank_order_does_not_matter(tmp_path: Path) -> None:
    texts = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        (tmp_path / name).mkdir()
        for k in order:
            write_shard(tmp_path / name, k, *shard_arrays(seed=k), skipped=k)
        manifest = finish_manifest(tmp_path / name, shards=3)
        assert manifest.skipped == 3
        texts.append((tmp_path / name / "manifest.json").read_text())
    assert texts[0] == texts[1]
    assert Manifest.read(tmp_path / "a") == manifest


def test_resume_lists_finished_shards(tmp_path: Path) -> None:
    settings = {"vision": {"name": "dinov2", "image_size": 56}, "sizes": (1, 2)}
    assert open_for_append(tmp_path, settings, "train") == {}
    infos = {k: write_shard(tmp_path, k, *shard_arrays(seed=k)) for k in (0, 2)}
    assert open_for_append(tmp_path, settings, "train") == infos
    with (tmp_path / "train-00002.h5").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(WriteError, match=r"train-00002\.h5: is there and is not what this program"):
        open_for_append(tmp_path, settings, "train")
    (tmp_path / "train-00002.h5").unlink()
    assert list(open_for_append(tmp_path, settings, "train")) == [0]


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    open_for_append(tmp_path, {"vision": {"image_size": 56}, "dtype": "float16"}, "train")
    with pytest.raises(StoreError) as error:
        open_for_append(tmp_path, {"vision": {"image_size": 448}, "dtype": "float16"}, "train")
    one_line(error, "vision.image_size=56", "vision.image_size=448", "another folder")


def test_resume_refuses_shards_of_unknown_settings(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, *shard_arrays())
    with pytest.raises(StoreError, match="unknown settings"):
        open_for_append(tmp_path, {}, "train")


def write_until(folder: Path, kill_at: int) -> None:
    """A process that dies at the renaming of its file number `kill_at`."""
    real, numbers = os.replace, count(1)

    def replace(source: Path, target: Path) -> None:
        if next(numbers) == kill_at:
            os._exit(9)  # as SIGKILL: nothing is cleaned up
        real(source, target)

    os.replace = replace
    write_shard(folder, 0, *shard_arrays())


@pytest.mark.parametrize("kill_at", [1, 2])  # of the record, then of the shard
def test_kill_before_rename_leaves_no_final_file(tmp_path: Path, kill_at: int) -> None:
    settings = {"limit": 4}
    open_for_append(tmp_path, settings, "train")
    process = forked(write_until, tmp_path, kill_at)
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "train-00000.h5").exists()
    assert open_for_append(tmp_path, settings, "train") == {}  # to be written again
    write_shard(tmp_path, 0, *shard_arrays())
    finish_manifest(tmp_path, shards=1)
    assert FeatureStore(tmp_path).verify() == []
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("begun", [False, True])
def test_files_of_other_origin_are_not_replaced(tmp_path: Path, begun: bool) -> None:
    images = {"cls_token": np.eye(3)}
    if begun:  # a run that was killed before its last shard and its manifest
        write_shard(tmp_path, 0, {"id": [0], "file_name": ["0"], "cls_token": np.eye(3)[:1]}, {})
    (tmp_path / "train-00002.h5").write_bytes(b"mine")
    with pytest.raises(WriteError, match=r"train-00002\.h5: is there and is not") as error:
        write_store(tmp_path, images, {}, images_per_shard=1)
    one_line(error, "move it away")
    assert (tmp_path / "train-00002.h5").read_bytes() == b"mine"
    assert (tmp_path / "train-00000.h5").exists() == begun
    (tmp_path / "train-00002.h5").unlink()
    write_store(tmp_path, images, {}, images_per_shard=1)
    assert FeatureStore(tmp_path).verify() == []


def test_own_shards_under_other_bytes_are_not_replaced(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, *shard_arrays())
    write_shard(tmp_path, 0, *shard_arrays(seed=1))  # its own, as it wrote it
    file = tmp_path / "train-00000.h5"
    changed = file.read_bytes()[:-1] + b"!"
    file.write_bytes(changed)
    with pytest.raises(WriteError, match=r"train-00000\.h5: is there and is not"):
        write_shard(tmp_path, 0, *shard_arrays(seed=2))
    assert file.read_bytes() == changed


def test_lists_of_other_origin_are_not_replaced(tmp_path: Path) -> None:
    target, records = tmp_path / "list.jsonl", tmp_path / ".parts"
    records.mkdir()
    put_known(target, records, "1\n")
    put_known(target, records, "2\n")
    assert target.read_text() == "2\n"
    target.write_text("mine\n")
    with pytest.raises(WriteError, match=r"list\.jsonl: is there and is not"):
        put_known(target, records, "3\n")
    assert target.read_text() == "mine\n"
    (tmp_path / "train-skipped.jsonl").write_text("mine\n")
    with pytest.raises(WriteError, match=r"train-skipped\.jsonl: is there and is not"):
        open_for_append(tmp_path, {}, "train")


def test_disk_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 0, *shard_arrays())

    def full(path: Path, tables: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "Can't write data\n(file write failed)")

    monkeypatch.setattr("talk2dino.features.store.writer.write_hdf5", full)
    with pytest.raises(WriteError) as error:
        write_shard(tmp_path, 1, *shard_arrays())
    one_line(error, "train-00001.h5", "No space left", "free some space")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".parts", "train-00000.h5"]


def write_below_a_limit(folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write_store(folder / "s", {"cls_token": np.zeros((99, 2000), "f4")}, {})
    except WriteError as error:
        (folder / "said.txt").write_text(str(error))


def test_file_size_limit_of_the_system_is_one_line(tmp_path: Path) -> None:
    """HDF5 itself meets the failed write and reports it as RuntimeError."""
    pytest.importorskip("resource")
    forked(write_below_a_limit, tmp_path).join()
    said = (tmp_path / "said.txt").read_text()
    assert "\n" not in said
    assert "File too large" in said
    assert not list((tmp_path / "s").glob("*.h5"))
    assert not list((tmp_path / "s").glob(".*.tmp"))


def test_missing_and_disagreeing_shards(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, *shard_arrays())
    with pytest.raises(StoreError, match=r"train-00001\.h5 is not written"):
        finish_manifest(tmp_path, shards=2)
    images, captions = shard_arrays()
    write_shard(tmp_path, 1, images | {"patch_tokens": np.zeros((4, 5, 9), "f4")}, captions)
    with pytest.raises(StoreError) as error:
        finish_manifest(tmp_path, shards=2)
    one_line(error, "train-00001.h5", "images/patch_tokens", "[5, 9]", "[5, 8]")
    del images["self_attn_maps"]
    write_shard(tmp_path, 1, images, captions)
    with pytest.raises(StoreError, match="images/self_attn_maps missing"):
        finish_manifest(tmp_path, shards=2)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("images", {"dino": np.zeros((4, 8))}, "unknown field images/dino"),
        ("images", {"cls_token": np.zeros((3, 8))}, "images/cls_token has shape (3, 8)"),
        ("images", {"cls_token": np.zeros((4, 7))}, "disagree on D"),
        ("images", {"cls_token": np.zeros((4, 1, 8))}, "expected [n, D]"),
        ("images", {"cls_token": np.full((4, 8), 1e6)}, "not finite in float16 for id=0 (4 rows"),
        ("images", {"cls_token": np.full((4, 8), np.nan)}, "not finite"),
        ("images", {"cls_token": np.zeros((4, 8), np.int64)}, "is int64, expected float16"),
        ("images", {"id": np.zeros(4)}, "images/id is float64, expected int64"),
        ("images", {"file_name": np.zeros(4)}, "must hold str"),
        ("captions", {"image_row": np.array([0, 0, 0, 0, 4, 0])}, "caption id=4 has image_row=4"),
        ("captions", {"image_row": np.array([-1, 0, 0, 0, 0, 0])}, "caption id=0 has image_row=-1"),
    ],
)
def test_bad_arrays(tmp_path: Path, table: str, change: Arrays, message: str) -> None:
    images, captions = shard_arrays()
    (images if table == "images" else captions).update(change)
    with pytest.raises(StoreError) as error:
        write_shard(tmp_path, 0, images, captions)
    one_line(error, "train-00000.h5", message)
    assert not list(tmp_path.glob("*.h5"))


def test_names_and_dtypes(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no plain name"):
        write_shard(tmp_path, 0, *shard_arrays(), split="../train")
    with pytest.raises(StoreError, match="no feature dtype"):
        write_shard(tmp_path, 0, *shard_arrays(), dtype="bfloat16")
    images, captions = shard_arrays()
    del captions["text"]
    with pytest.raises(StoreError, match="captions/text is missing"):
        write_shard(tmp_path, 0, images, captions)


def test_write_store_refuses(tmp_path: Path) -> None:
    images, captions = shard_arrays()
    with pytest.raises(StoreError, match="no image to store"):
        write_store(tmp_path / "a", {"cls_token": np.zeros((0, 8))}, {})
    with pytest.raises(StoreError, match="caption id=5 has image_row=9"):
        rows = np.array([0, 1, 2, 3, 0, 9])
        write_store(tmp_path / "b", images, captions | {"image_row": rows})
    with pytest.raises(StoreError, match="image_row is missing"):
        write_store(tmp_path / "c", images, {"embedding": np.zeros((2, 3))})
    with pytest.raises(StoreError, match="vision="):
        write_store(tmp_path / "d", images, captions, vision={"name": "x", "patch": 14})
    with pytest.raises(StoreError, match="images_per_shard=0"):
        write_store(tmp_path / "e", images, captions, images_per_shard=0)
    write_store(tmp_path / "f", images, captions)
    with pytest.raises(StoreError, match="already holds a store"):
        write_store(tmp_path / "f", images, captions)


def test_record_of_a_shard_is_checked(tmp_path: Path) -> None:
    open_for_append(tmp_path, {}, "train")
    write_shard(tmp_path, 0, *shard_arrays())
    file = tmp_path / ".parts" / "train-00000.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"rank": 1}))
    with pytest.raises(StoreError, match="unknown key rank"):
        open_for_append(tmp_path, {}, "train")


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "manifest.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(target, {"a": object()})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_text_lengths_count_bytes() -> None:
    stored = shard_writer.prepare(
        {"id": [0, 1], "file_name": ["", "ü" * 3]}, {}, "float16", "shard"
    )["images"]["file_name"]
    assert stored.dtype.itemsize == 6


@pytest.mark.parametrize("links", [True, False])
def test_a_created_file_appears_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Also where the file system has no hard links; there the last one wins."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "settings.json"
    assert files.create_json(target, {"a": 1})
    assert files.create_json(target, {"a": 2}) is not links
    assert json.loads(target.read_text()) == {"a": 1 if links else 2}
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("command", ["extract", "convert"])
def test_configs_state_the_default_of_images_per_shard(command: str) -> None:
    file = Path(__file__).resolve().parents[2] / "conf" / f"{command}.yaml"
    assert OmegaConf.load(file).images_per_shard == IMAGES_PER_SHARD


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_every_file_follows_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    """safetensors writes files that their owner alone may read; colleagues share a cluster."""
    before = os.umask(umask)
    try:
        save_projection(ProjectionLayer(3, 4), tmp_path / "psi.safetensors")
        save_projection(ProjectionLayer(3, 4), tmp_path / "psi.pth")
        write_json(tmp_path / "a.json", {})
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.png")
        write_store(tmp_path / "store", {"cls_token": np.eye(3)}, {})
        (tmp_path / "a.json").chmod(0o400)
        write_json(tmp_path / "a.json", {"new": 1})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: mode for path in files
    }
