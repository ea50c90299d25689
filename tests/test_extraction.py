"""Extraction: the encoder's numbers, whole after kills, and the same for any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from talk2dino import extract
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import ConfigError, StoreError
from talk2dino.features import FeatureStore
from talk2dino.features.extraction import EXTRACTED, Extraction, crop_square
from talk2dino.features.sources import CaptionFolder, Source
from tests.pipeline import HashText, files_below
from tests.ranks import two_ranks

SIZE, BATCH, SHARD = 32, 4, 8


def small_vit() -> TimmVisionEncoder:
    torch.manual_seed(0)
    return TimmVisionEncoder("test_vit", "random", image_size=SIZE, batch_size=BATCH)


@pytest.fixture(scope="module")
def vision() -> TimmVisionEncoder:
    return small_vit()


def make_images(folder: Path, count: int = 20) -> Path:
    """`count` noise pictures of different shapes, two captions each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        shape = (33 + number, 60 - number, 3)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}\nanother of {number}\n")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source") / "images")


def job(source: Source, vision: TimmVisionEncoder, store: Path, **options: Any) -> Extraction:
    settings: dict[str, Any] = {"num_workers": 0, "images_per_shard": SHARD} | options
    return Extraction(source, vision, HashText(), store, **settings)


@pytest.fixture(scope="module")
def whole(
    images: Path, vision: TimmVisionEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of an uninterrupted run."""
    store = tmp_path_factory.mktemp("whole")
    assert job(CaptionFolder(str(images)), vision, store).run() is not None
    return store


def test_fields_are_those_of_the_encoder(
    whole: Path, images: Path, vision: TimmVisionEncoder
) -> None:
    store = FeatureStore(whole)
    assert store.verify() == []
    names = [f"{number:02d}.png" for number in range(20)]
    assert store.images["file_name"][:].tolist() == names
    batches = [
        torch.stack([crop_square(Image.open(images / n), SIZE) for n in names[start : start + 4]])
        for start in range(0, 20, BATCH)
    ]
    direct = [vision(batch.float() / 255) for batch in batches]
    tokens, maps, cls = (
        torch.cat([getattr(part, field) for part in direct])
        for field in ("patch_tokens", "self_attn_maps", "cls_token")
    )
    weights = maps.softmax(-1)  # [B, H, P]
    mean_weights = maps.mean(1).softmax(-1)  # [B, P]
    want = {
        "patch_tokens": tokens,
        "self_attn_maps": maps,
        "cls_token": cls,
        "disentangled_self_attn": torch.einsum("bhp,bpd->bhpd", weights, tokens).mean(2),
        "avg_self_attn_out": torch.einsum("bp,bpd->bpd", mean_weights, tokens).mean(1),
    }
    for name in EXTRACTED:
        got = store.images[name][:]
        assert got.dtype == np.float16
        assert got.shape == tuple(want[name].shape)
        np.testing.assert_allclose(got, want[name].numpy(), rtol=2e-3, atol=2e-3 * tokens.std())
    np.testing.assert_array_equal(store.images["patch_tokens"][:], tokens.half().numpy())
    texts = [text for n in range(20) for text in (f"picture {n}", f"another of {n}")]
    assert store.captions["text"][:].tolist() == texts
    assert store.captions["image_row"][:].tolist() == [n for n in range(20) for _ in range(2)]
    np.testing.assert_array_equal(
        store.captions["embedding"][:], HashText().encode(texts).half().numpy()
    )
    assert store.vision is not None
    assert store.vision.spec == vision.spec
    assert store.vision.prefix_tokens == vision.num_prefix_tokens


def test_crop_keeps_the_centre() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert crop_square(Image.fromarray(pixels), 20).float().mean() == 255
    assert crop_square(Image.fromarray(pixels), 10).shape == (3, 10, 10)
    assert crop_square(Image.fromarray(pixels.transpose(1, 0, 2)), 20).float().mean() == 255


def test_float32_and_chosen_fields(images: Path, vision: TimmVisionEncoder, tmp_path: Path) -> None:
    source = CaptionFolder(str(images), limit=3)
    job(source, vision, tmp_path, image_fields=["cls_token"], dtype="float32").run()
    store = FeatureStore(tmp_path)
    assert set(store.images.fields) == {"id", "file_name", "cls_token"}
    assert store.images["cls_token"].dtype == np.float32
    with pytest.raises(ConfigError, match=r"image_fields: 'patches' is unknown; choose of patch_t"):
        job(source, vision, tmp_path, image_fields=["patches"])


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_listed(
    vision: TimmVisionEncoder, tmp_path: Path, workers: int
) -> None:
    folder = make_images(tmp_path / "images", 9)
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])  # truncated
    (folder / "05.png").write_text("not a picture")
    (folder / "06.png").write_bytes(b"")
    (folder / "08.png").unlink()  # the only one of its shard
    (folder / "08.png").mkdir()
    run = job(CaptionFolder(str(folder)), vision, tmp_path / "store", num_workers=workers)
    manifest = run.run()
    assert manifest is not None
    assert manifest.skipped == len(run.skipped) == 4
    listed = (tmp_path / "store" / "train-skipped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in listed]
    assert [row["file_name"] for row in rows] == ["03.png", "05.png", "06.png", "08.png"]
    assert "truncated" in rows[0]["reason"]
    store = FeatureStore(tmp_path / "store")
    assert store.verify() == []
    assert store.images["id"][:].tolist() == [0, 1, 2, 4, 7]
    assert store.captions["image_row"][:].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [shard.images for shard in store.manifest.shards] == [5, 0]


def test_nothing_readable_is_one_line(vision: TimmVisionEncoder, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 2)
    for path in folder.glob("*.png"):
        path.write_text("broken")
    with pytest.raises(StoreError, match="no image to store; check the source"):
        job(CaptionFolder(str(folder)), vision, tmp_path / "store").run()


def killed_run(images: str, store: str) -> None:
    """Run in a process of its own, which dies while it decodes the fourteenth picture."""
    source = CaptionFolder(images)
    decode = source.image

    def image(index: int) -> Image.Image:
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(index)

    source.image = image  # type: ignore[method-assign]
    torch.set_num_threads(1)
    job(source, small_vit(), Path(store)).run()


def test_a_killed_run_continues_to_the_same_bytes(
    images: Path, vision: TimmVisionEncoder, whole: Path, tmp_path: Path
) -> None:
    call = f"killed_run({str(images)!r}, {str(tmp_path)!r})"
    code = f"from tests.test_extraction import killed_run; {call}"
    root = Path(__file__).parents[1]
    dead = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    first = (tmp_path / "train-00000.h5").stat()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(StoreError, match=r"manifest\.json: not found"):
        FeatureStore(tmp_path)
    seen: list[int] = []
    job(CaptionFolder(str(images)), vision, tmp_path).run(seen.append)
    assert sum(seen) == 20
    assert (tmp_path / "train-00000.h5").stat().st_mtime_ns == first.st_mtime_ns  # not again
    assert files_below(tmp_path) == files_below(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_in_any_order_write_the_same_store(
    images: Path, vision: TimmVisionEncoder, whole: Path, tmp_path: Path, order: tuple[int, int]
) -> None:
    source = CaptionFolder(str(images))
    first, last = (job(source, vision, tmp_path, rank=rank, world_size=2).run() for rank in order)
    assert first is None
    assert last is not None
    assert files_below(tmp_path) == files_below(whole)


def rank_extracts(rank: int, images: str, store: str) -> None:
    job(CaptionFolder(images), small_vit(), Path(store), rank=rank, world_size=2).run()


def test_ranks_at_the_same_time_write_the_same_store(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    two_ranks(rank_extracts, str(images), str(tmp_path))
    assert files_below(tmp_path) == files_below(whole)


def test_a_finished_store_is_not_touched(
    images: Path, vision: TimmVisionEncoder, whole: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.h5")}
    job(CaptionFolder(str(images)), vision, whole).run()
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*.h5")} == before


def test_other_settings_are_refused(images: Path, vision: TimmVisionEncoder, whole: Path) -> None:
    source = CaptionFolder(str(images))
    cases: dict[str, Extraction] = {
        "dtype='float16', now dtype='float32'": job(source, vision, whole, dtype="float32"),
        "images_per_shard=8, now images_per_shard=4": job(
            source, vision, whole, images_per_shard=4
        ),
        "source.captions=40, now source.captions=10": job(
            CaptionFolder(str(images), limit=5), vision, whole
        ),
    }
    for message, run in cases.items():
        with pytest.raises(StoreError) as error:
            run.run()
        assert "\n" not in str(error.value)
        assert message in str(error.value)
        assert "use the old value or another folder" in str(error.value)


def test_a_full_disk_is_noticed_before(
    images: Path, vision: TimmVisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(CaptionFolder(str(images)), vision, tmp_path)
    patches, width, heads = 4, vision.embed_dim, vision.num_heads
    floats = patches * width + heads * patches + 2 * width + heads * width
    assert run.expected_bytes() == 2 * (20 * floats + 40 * HashText.embed_dim)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(
        StoreError, match=r"the disk has 0\.0 GB free; keep less with features=pool"
    ):
        extract.check_space(run, Console(quiet=True))


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision='fp8'; choose one of 32, bf16, 16"):
        extract.autocast("fp8", torch.device("cpu"))
