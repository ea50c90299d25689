"""Every way in which a shard can go bad is named, with the shard, and only that shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from talk2dino.features.store.verify import verify_store
from tests.helpers.stores import tiny_store

BAD = "train-00001.h5"


def make(folder: Path, seed: int = 0, images: int = 12, width: int = 8) -> Path:
    vision = {"name": f"vit-{seed}", "weights_sha256": str(seed)}
    return tiny_store(
        folder,
        {"cls_token": (width,)},
        images=images,
        text_dim=3,
        seed=seed,
        images_per_shard=4,
        vision=vision,
    )


def flip(file: Path, position: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


def of_other(store: Path, **other: int) -> None:
    """A shard of a store that another encoder (or another source) filled."""
    shutil.copy(make(store.parent / "other", **other) / BAD, store / BAD)


def not_a_number(file: Path) -> None:
    with h5py.File(file, "r+") as shard:
        shard["images/cls_token"][2, 1] = np.nan


def lose_a_row(file: Path) -> None:
    with h5py.File(file, "r+") as shard:
        rows = shard["captions/embedding"][:-1]
        del shard["captions/embedding"]
        shard["captions"].create_dataset("embedding", data=rows)
        shard.flush()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: flip(s / BAD, 5000), "SHA-256 is"),
        (lambda s: flip(s / BAD, -1, 128), "SHA-256 is"),
        (lambda s: flip(s / BAD, 0), "SHA-256 is"),  # HDF5's own signature
        (lambda s: (s / BAD).write_bytes((s / BAD).read_bytes()[:-1]), "the manifest says"),
        (lambda s: (s / BAD).write_bytes(b""), "0 bytes, the manifest says"),
        (lambda s: (s / BAD).unlink(), "shard is missing"),
        (lambda s: not_a_number(s / BAD), "images/cls_token: 1 rows hold NaN or infinity"),
        (lambda s: lose_a_row(s / BAD), "the manifest says"),
        (lambda s: of_other(s, seed=1), "SHA-256 is"),  # same shapes, other encoder
        (lambda s: of_other(s, seed=1, width=9), "the manifest says"),
        (lambda s: of_other(s, images=7), "the manifest says"),  # three rows instead of four
        (lambda s: shutil.copy(s / "train-00000.h5", s / BAD), "SHA-256 is"),
    ],
)
def test_the_bad_shard_is_named(
    damage: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    store = make(tmp_path / "store")
    assert verify_store(store) == []
    damage(store)
    problems = verify_store(store)
    assert problems
    assert {problem.partition(":")[0] for problem in problems} == {BAD}
    assert any(said in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Anywhere in the file: in HDF5's own tables, in padding, in the data."""
    store = make(tmp_path / "store")
    whole = (store / BAD).read_bytes()
    for position in np.random.default_rng(0).choice(len(whole), 40, replace=False).tolist():
        flip(store / BAD, position, 1 << position % 8)
        assert {problem.partition(":")[0] for problem in verify_store(store)} == {BAD}, position
        (store / BAD).write_bytes(whole)
    assert verify_store(store) == []
