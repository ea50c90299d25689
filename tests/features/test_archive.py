"""Compressed copies of a store: readable, smaller, and back to the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from talk2dino.errors import ConfigError, StoreError
from talk2dino.features import FeatureStore, write_store
from talk2dino.features.store import archive
from talk2dino.features.store.archive import archive_store
from tests.helpers.pipeline import fails, files_below, need, run

IMAGES = 10


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three shards with every kind of field; the middle one has no captions."""
    random = np.random.default_rng(0)
    steps = np.linspace(-1, 1, 4, dtype=np.float32)  # few values: compressible
    rows = np.array([0, 0, 1, 9, 8, 9])
    write_store(
        tmp_path / "store",
        {
            "id": np.arange(IMAGES) + 7,
            "file_name": np.array([f"bild-ä{n}.jpg" for n in range(IMAGES)]),
            "patch_tokens": random.choice(steps, (IMAGES, 300, 64)),
            "patch_index": np.tile(np.arange(300), (IMAGES, 1)),
            "cls_token": random.choice(steps, (IMAGES, 64)),
        },
        {
            "image_row": rows,
            "text": np.array(["a", "eine Straße", "", "b", "c", "d"]),
            "embedding": random.normal(size=(6, 5)).astype(np.float32),
            "token_mask": random.random((6, 4)) < 0.5,
        },
        images_per_shard=4,
        split="val",
        vision={"name": "vit", "embed_dim": 64},
        text={"name": "minilm", "embed_dim": 5},
    )
    (tmp_path / "store" / "val-skipped.jsonl").write_text('{"index": 3}\n')
    (tmp_path / "store" / "val-left-out.jsonl").write_text('{"file_name": "a"}\n')
    return tmp_path / "store"


@pytest.fixture(params=["zstd", "gzip"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With hdf5plugin where it is installed; gzip stands for it where it is not."""
    if request.param == "zstd":
        need("hdf5plugin")
    else:
        small = {"compression": "gzip", "shuffle": True}
        monkeypatch.setattr(
            archive,
            "zstd_layout",
            lambda: lambda data: {"chunks": (1, *data.shape[1:]), **small} if data.size else {},
        )
    yield request.param


def same(one: FeatureStore, other: FeatureStore) -> None:
    for a, b in ((one.images, other.images), (one.captions, other.captions)):
        assert a.fields == b.fields
        for name in a.fields:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name][:], b[name][:])
            rows = np.array([3, 0, 5, 5, 2])
            np.testing.assert_array_equal(a[name][rows], b[name][rows])


def test_there_and_back(store: Path, layout: str, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    steps: list[tuple[int, int]] = []
    archive_store(store, packed, True, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert FeatureStore(packed).verify() == []
    same(FeatureStore(packed), FeatureStore(store))
    assert FeatureStore(packed).manifest.vision == FeatureStore(store).manifest.vision
    tokens = "val-00000.h5"
    assert (packed / tokens).stat().st_size < 0.5 * (store / tokens).stat().st_size
    archive_store(packed, back, False)
    assert files_below(back) == files_below(store)  # byte for byte, the manifest too


def test_large_rows_stand_alone_and_small_ones_share_a_chunk(tmp_path: Path) -> None:
    need("hdf5plugin")
    images = {
        "cls_token": np.zeros((3000, 8), "f4"),
        "patch_tokens": np.zeros((3, 20_000, 8), "f4"),
    }
    write_store(tmp_path / "a", {"cls_token": images["cls_token"]}, {}, images_per_shard=3000)
    write_store(tmp_path / "b", {"patch_tokens": images["patch_tokens"]}, {})
    for name, field, rows in (("a", "cls_token", 3000), ("b", "patch_tokens", 1)):
        archive_store(tmp_path / name, tmp_path / f"{name}-packed", True)
        with h5py.File(tmp_path / f"{name}-packed" / "train-00000.h5") as file:
            assert file[f"images/{field}"].chunks[0] == rows


def test_a_stopped_copy_continues(store: Path, layout: str, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise StopError

    packed = tmp_path / "packed"
    with pytest.raises(StopError):
        archive_store(store, packed, True, stop)
    assert not (packed / "manifest.json").exists()
    before = (packed / "val-00001.h5").stat().st_mtime_ns
    with pytest.raises(StoreError, match="was begun with compression='zstd 9', now compression=No"):
        archive_store(store, packed, False)
    archive_store(store, packed, True)
    assert (packed / "val-00001.h5").stat().st_mtime_ns == before
    same(FeatureStore(packed), FeatureStore(store))
    with pytest.raises(StoreError, match="already holds a store"):
        archive_store(store, packed, True)


@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_damage_is_never_copied(store: Path, damage: str, tmp_path: Path) -> None:
    file = store / "val-00001.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "bit" else content[:-9])
    if damage == "missing":
        file.unlink()
    said = {"bit": "SHA-256 is not that", "cut": "the manifest says", "missing": "is missing"}
    with pytest.raises(StoreError, match=rf"val-00001\.h5: .*{said[damage]}"):
        archive_store(store, tmp_path / "copy", False)
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_without_hdf5plugin(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"needs the package hdf5plugin; pip install .*\[archive\]"
    ):
        archive_store(store, tmp_path / "packed", True)
    said = fails(capfd, "convert", "archive", f"store={store}", f"output={tmp_path / 'packed'}")
    assert "talk2dino[archive]" in said


def test_the_commands(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("hdf5plugin")
    run("convert", "archive", f"store={store}", f"output={tmp_path / 'packed'}")
    run("convert", "unarchive", f"store={tmp_path / 'packed'}", f"output={tmp_path / 'back'}")
    out = capfd.readouterr().out
    assert f"{tmp_path / 'back'}: 10 images, 6 captions, 3 shards" in out
    assert files_below(tmp_path / "back") == files_below(store)
