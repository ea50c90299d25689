"""Extraction: the encoder's numbers, whole after kills, and the same for any number of ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import namedtuple
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from talk2dino import extract
from talk2dino.alignment.inputs import DENSE, stored_fields
from talk2dino.datasets.captions import CaptionFolder, Source
from talk2dino.datasets.captions.base import crop_square
from talk2dino.encoders.devices import choose_device, local_rank, process_rank
from talk2dino.encoders.text import OpenClipTextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import ConfigError, StoreError, WriteError
from talk2dino.extract import Counter, report, say_left_out
from talk2dino.features import FeatureStore
from talk2dino.features.extraction.fields import EXTRACTED, patch_subset
from talk2dino.features.extraction.job import Extraction
from talk2dino.train import fill_widths
from tests.helpers.encoders import SMALL_CLIP, HashText
from tests.helpers.pipeline import TRAIN, files_below, run
from tests.helpers.ranks import two_ranks
from tests.helpers.stores import extract as extract_pictures

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


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_gpu_agrees(
    whole: Path, images: Path, tmp_path: Path, gpu: torch.device, workers: int
) -> None:
    """Pinned batches, copies while the next batch computes, and the last batch of a shard."""
    vision = small_vit().to(gpu)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert job(CaptionFolder(str(images)), vision, tmp_path, num_workers=workers).run()
    got, want = FeatureStore(tmp_path), FeatureStore(whole)
    assert got.verify() == []
    for name in EXTRACTED:
        values = want.images[name][:].astype(np.float32)
        atol = 2e-3 * np.abs(values).max()
        np.testing.assert_allclose(got.images[name][:], values, rtol=2e-3, atol=atol)
    np.testing.assert_array_equal(got.captions["text"][:], want.captions["text"][:])


def test_crop_keeps_the_center() -> None:
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


def test_a_block_is_narrower_than_joined_layers(images: Path, tmp_path: Path) -> None:
    joined = TimmVisionEncoder("test_vit", "random", image_size=SIZE, layers=[0, 1])
    names = ("second_last_out", "cls_token")
    extraction = job(CaptionFolder(str(images), limit=9), joined, tmp_path, image_fields=names)
    extraction.run()
    store = FeatureStore(tmp_path)
    assert [store.images[name].shape for name in names] == [(9, 64), (9, 128)]
    config = OmegaConf.create({"store": str(tmp_path), "projection": {}, "similarity": {}})
    fill_widths(config)
    assert config.projection.vision_dim == 128
    config.similarity.field = "second_last_out"
    with pytest.raises(ConfigError, match=r"similarity\.field=second_last_out: has width 64"):
        fill_widths(config)


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
    extraction = job(CaptionFolder(str(folder)), vision, tmp_path / "store", num_workers=workers)
    manifest = extraction.run()
    assert manifest is not None
    assert manifest.skipped == len(extraction.skipped) == 4
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
    with pytest.raises(StoreError, match=r"no image to store \({.*file_name"):
        job(CaptionFolder(str(folder)), vision, tmp_path / "store").run()


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
    for message, other in cases.items():
        with pytest.raises(StoreError) as error:
            other.run()
        assert "\n" not in str(error.value)
        assert message in str(error.value)
        assert "use the old value or another folder" in str(error.value)


def test_a_full_disk_is_noticed_before(
    images: Path, vision: TimmVisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = job(CaptionFolder(str(images)), vision, tmp_path)
    patches, width, heads = 4, vision.embed_dim, vision.num_heads
    floats = patches * width + heads * patches + 2 * width + heads * width
    assert extraction.expected_bytes() == 2 * (20 * floats + 40 * HashText.embed_dim)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(
        StoreError, match=r"the disk has 0\.0 GB free; keep less with features=pool"
    ):
        extract.check_space(extraction, Console(quiet=True))


def test_a_subset_of_patches_is_the_images_own(
    images: Path, vision: TimmVisionEncoder, whole: Path, tmp_path: Path
) -> None:
    """Against the complete store: rows picked by `patch_index`, pooled fields untouched."""
    source = CaptionFolder(str(images))
    full = FeatureStore(whole)
    extraction = job(source, vision, tmp_path / "a", patches_per_image=3)
    extraction.run()
    store = FeatureStore(tmp_path / "a")
    assert store.verify() == []
    index = store.images["patch_index"][:]  # [n, 3]
    assert index.dtype == np.int64
    assert (np.diff(index, axis=1) > 0).all() and index.min() >= 0 and index.max() < 4
    assert len(np.unique(index, axis=0)) == 4  # every subset of three occurs in twenty images
    rows = np.arange(20)[:, None]
    tokens, maps = full.images["patch_tokens"][:], full.images["self_attn_maps"][:]
    np.testing.assert_array_equal(store.images["patch_tokens"][:], tokens[rows, index])
    picked = maps.transpose(0, 2, 1)[rows, index].transpose(0, 2, 1)
    np.testing.assert_array_equal(store.images["self_attn_maps"][:], picked)
    for name in ("cls_token", "avg_self_attn_out", "disentangled_self_attn"):
        np.testing.assert_array_equal(store.images[name][:], full.images[name][:])
    fields = [store.images[name] for name in (*EXTRACTED, "patch_index")]
    fields.append(store.captions["embedding"])
    assert extraction.expected_bytes() == sum(
        int(np.prod(f.shape)) * f.dtype.itemsize for f in fields
    )
    # the same ones in other company
    job(CaptionFolder(str(images), limit=7), vision, tmp_path / "b", patches_per_image=3).run()
    np.testing.assert_array_equal(FeatureStore(tmp_path / "b").images["patch_index"][:], index[:7])
    assert stored_fields("avg_self_attn_out", {"patch_tokens", "self_attn_maps"}) == DENSE
    assert stored_fields("avg_self_attn_out", {*DENSE, "patch_index"}) == ("avg_self_attn_out",)


def test_patches_of_a_subset_are_drawn_evenly() -> None:
    chosen = patch_subset(range(-2000, 2000), 16, 4)
    counts = np.bincount(chosen.ravel(), minlength=16)
    # 1000 expected each, standard deviation 27
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)
    np.testing.assert_array_equal(patch_subset([7], 16, 16), [np.arange(16)])


def test_dense_training_takes_a_subset_of_patches(pictures: Path, tmp_path: Path) -> None:
    options = ("features=dense", "features.patches_per_image=5")
    store = extract_pictures(pictures, tmp_path / "store", *options)
    assert FeatureStore(store).images["patch_tokens"].shape[1:] == (5, 64)
    run(
        "train",
        "experiment=vits_dense",
        f"store={store}",
        "projection.vision_dim=64",
        "projection.text_dim=256",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_epochs=1",
        *TRAIN,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert (tmp_path / "run" / "projection.safetensors").is_file()


def test_the_command_prints_its_figures(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("first", "again"):
        capfd.readouterr()
        extract_pictures(pictures, tmp_path / "store", "features=pooled", "source.limit=12")
        out = " ".join(capfd.readouterr().out.split())
        if command == "first":
            assert re.search(r"12 images in \d+\.\d s, \d+\.\d images/s", out), out
        else:
            assert "nothing was left to do" in out
        assert "12 images, 12 captions, 0 skipped, 2 shards" in out


def test_captions_that_the_text_encoder_cuts_are_counted(
    vision: TimmVisionEncoder, tmp_path: Path
) -> None:
    folder = make_images(tmp_path / "images", count=3)
    (folder / "01.txt").write_text(f"{'very ' * 75}\n{'very ' * 76}")
    text = OpenClipTextEncoder(SMALL_CLIP, weights="random")
    extraction = job(CaptionFolder(str(folder)), vision, tmp_path / "store")
    extraction.text = text
    counted, console = Counter(), Console(width=500, file=StringIO())
    report(extraction, extraction.run(), counted, console)
    assert "1 captions have more tokens than the text encoder reads" in console.file.getvalue()


def test_what_the_source_leaves_out_is_counted_and_listed(
    vision: TimmVisionEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_images(tmp_path / "images", count=3)
    (folder / "01.txt").unlink()
    (folder / "[draft].txt").write_text("no picture")
    store = tmp_path / "store"
    extraction = job(CaptionFolder(str(folder)), vision, store)
    say_left_out(extraction, Console(width=500))
    extraction.run()
    assert "2 files are left out, such as 01.png (no .txt beside it)" in capsys.readouterr().out
    lines = (store / "train-left-out.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["01.png", "[draft].txt"]
    (folder / "more.txt").write_text("no picture either")
    extraction.source = CaptionFolder(str(folder))
    extraction.run()  # over its own list
    assert len((store / "train-left-out.jsonl").read_text().splitlines()) == 3
    (store / "train-left-out.jsonl").write_text("mine")
    with pytest.raises(WriteError, match=r"train-left-out\.jsonl: is there and is not what"):
        extraction.run()
    assert (store / "train-left-out.jsonl").read_text() == "mine"


def started_by(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what a launcher sets, and nothing of another one."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, (0, 1, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "2"}, (0, 2, 0)),
    ],
)
def test_rank_comes_from_the_launcher(
    environment: dict[str, str], want: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started_by(environment, monkeypatch)
    place = process_rank()
    assert (place.rank, place.world_size, local_rank()) == want


def test_impossible_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by({"RANK": "one", "WORLD_SIZE": "2"}, monkeypatch)
    with pytest.raises(ConfigError, match="RANK='one' in the environment is no number"):
        process_rank()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK=2 with WORLD_SIZE=2: a rank lies below"):
        process_rank()


def test_a_batch_script_without_srun_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sets both in the script itself; taken for rank 0 of 4 it would do a quarter."""
    started_by({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, monkeypatch)
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=4, but srun did not .* with srun, or"):
        process_rank()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("gpu").index == 0  # what shares nothing needs no srun


def rank_runs_the_command(rank: int, pictures: Path, store: Path) -> None:
    printed = store.with_name(f"printed-{rank}.txt")
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        extract_pictures(pictures, store, "features=pooled")


def test_ranks_of_torchrun_write_the_same_store(pictures: Path, tmp_path: Path) -> None:
    one = extract_pictures(pictures, tmp_path / "one", "features=pooled")
    two_ranks(rank_runs_the_command, pictures, tmp_path / "two")
    assert "rank 1 of 2" in (tmp_path / "printed-1.txt").read_text()
    assert files_below(tmp_path / "two") == files_below(one)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_give_the_same_features(images: Path, whole: Path, tmp_path: Path) -> None:
    """The last batch is not full; the names of the state stay."""
    vision = small_vit()
    names = list(vision.state_dict())
    job(CaptionFolder(str(images), limit=7), vision, tmp_path, compiled=True).run()
    assert list(vision.state_dict()) == names
    got, want = FeatureStore(tmp_path), FeatureStore(whole)
    for name in EXTRACTED:
        np.testing.assert_allclose(got.images[name][:], want.images[name][:7], rtol=2e-3, atol=2e-3)


def test_a_missing_compiler_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = small_vit()

    def broken() -> None:
        monkeypatch.setattr(vision, "forward", lambda images: 1 / 0)

    monkeypatch.setattr(vision, "compile_blocks", broken)
    with pytest.raises(
        ConfigError, match=r"^compile=true: torch cannot compile .*division by zero"
    ):
        job(CaptionFolder(str(images)), vision, tmp_path, compiled=True).run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "^precision='fp8'; choose one of 32, bf16, 16"),
        ({"text_precision": "64"}, "^text_precision='64'; choose one of 32"),
        ({"dtype": "bfloat16"}, "features.dtype='bfloat16'; choose float16 or float32"),
        ({"num_workers": -1}, "num_workers=-1; use 0 or more"),
        ({"images_per_shard": 0}, "images_per_shard=0; use 1 or more"),
        ({"image_fields": []}, "features.image_fields is empty"),
        ({"patches_per_image": 0}, "patches_per_image=0; use 1 or more"),
        ({"patches_per_image": 5}, "vision.image_size=32 gives 4 patches; use at most that"),
        (
            {"patches_per_image": 2, "image_fields": ["cls_token"]},
            "patches_per_image=2 has no effect without patch_tokens or self_attn_maps",
        ),
    ],
)
def test_settings_are_checked_first(
    options: dict[str, Any], said: str, images: Path, vision: TimmVisionEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        job(CaptionFolder(str(images)), vision, tmp_path, **options)
