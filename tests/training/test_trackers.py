"""Trackers: config, curves, tables, the heads' histogram and sample pictures, with every logger."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from talk2dino.errors import DataError
from talk2dino.evaluation.tables import markdown_table
from talk2dino.training.sample_segmentations import picture_files
from tests.helpers.pipeline import TRAIN, fails, need, run

EVERY_SECOND = ("sample_segmentations.every_n_epochs=2",)
PICTURES = ("00-epoch001.png", "01-epoch001.png", "00-epoch002.png", "01-epoch002.png")


def train(store: Path, pictures: Path, folder: Path, *overrides: str) -> Path:
    """Three short epochs of two batches."""
    images = ",".join(str(pictures / f"{number:02d}.png") for number in range(2))
    run(
        "train",
        "experiment=vits_infonce",
        "projection.text_dim=256",
        "projection.vision_dim=64",
        f"store={store}",
        "data.batch_size=8",
        "data.val_fraction=0.25",
        "trainer.max_epochs=3",
        "trainer.log_every_n_steps=1",
        "record_heads=true",
        f"sample_segmentations.images=[{images}]",
        "sample_segmentations.classes=[sea,number]",
        "sample_segmentations.short_side=64",
        f"hydra.run.dir={folder}",
        *TRAIN,
        *overrides,
    )
    return folder


def check_files(folder: Path) -> None:
    """What is there whichever logger was chosen."""
    for name in ("config.yaml", "metrics.json", "retrieval.md", "heads.json"):
        assert (folder / name).stat().st_size
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == sorted(PICTURES)
    for file in [folder / "loss.png", folder / "heads.png", *(folder / "pictures").iterdir()]:
        with Image.open(file) as picture:
            assert np.asarray(picture).std() > 1
    table = (folder / "retrieval.md").read_text().splitlines()
    result = json.loads((folder / "metrics.json").read_text())["result"]
    assert table[2].split("|")[2].strip() == f"{result['val/text_to_image/recall@1']:.2f}"


def test_csv(token_store: Path, pictures: Path, tmp_path: Path) -> None:
    folder = train(token_store, pictures, tmp_path, "ema.decay=0.5")
    drawn = {path.name for path in (folder / "pictures").iterdir()}
    assert drawn == {f"{n:02d}-epoch{epoch:03d}.png" for n in range(2) for epoch in range(3)}
    header, *rows = (folder / "logs" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/text_to_image/recall@1"} <= set(header.split(","))
    assert len(rows) == 6 + 3  # steps and validations


def test_tensorboard(token_store: Path, pictures: Path, tmp_path: Path) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(token_store, pictures, tmp_path, "logger=tensorboard", *EVERY_SECOND)
    check_files(folder)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    tags: dict[str, Any] = board.Tags()
    assert {"train/loss", "val/text_to_image/recall@1"} <= set(tags["scalars"])
    assert len(board.Scalars("train/loss")) == 6
    shown = {"curves", "heads", "segmentation/00", "segmentation/01"}
    assert shown == set(tags["images"])
    assert [event.step for event in board.Images("segmentation/00")] == [4, 6]
    assert "retrieval/text_summary" in tags["tensors"]
    assert "logit_scale" in (folder / "tensorboard" / "hparams.yaml").read_text()


def test_wandb_offline(
    token_store: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = train(
        token_store, pictures, tmp_path, "logger=wandb", "logger.offline=true", *EVERY_SECOND
    )
    check_files(folder)
    [offline] = (folder / "wandb").glob("offline-run-*")
    [record] = offline.glob("run-*.wandb")
    words = (b"logit_scale", b"train/loss", b"val/text_to_image/recall@1")
    for _ in range(100):  # W&B's own process writes it
        content = record.read_bytes()
        if all(word in content for word in words):
            break
        time.sleep(0.2)
    for word in (*words, b"train_loss"):
        assert (word in content) == (word != b"train_loss")
    images = [p.relative_to(offline / "files" / "media" / "images") for p in offline.rglob("*.png")]
    names = sorted(str(path).rpartition("_")[0].rpartition("_")[0] for path in images)
    assert names == ["curves", "heads"] + ["segmentation/00"] * 2 + ["segmentation/01"] * 2
    [table] = (offline / "files" / "media" / "table").rglob("retrieval*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"][:2] == ["direction", "recall@1"]
    assert [row[0] for row in rows["data"]] == ["text → image", "image → text"]
    import wandb

    assert wandb.run is None  # the next run of a sweep starts its own


def test_no_logger_and_bad_pictures(
    token_store: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(token_store, pictures, tmp_path / "none", "~logger", *EVERY_SECOND)
    check_files(tmp_path / "none")
    line = fails(
        capfd,
        "train",
        "experiment=vits_infonce",
        "projection.text_dim=256",
        "projection.vision_dim=64",
        f"store={token_store}",
        "data.batch_size=8",
        f"sample_segmentations.images=[{tmp_path / 'gone.png'}]",
        "sample_segmentations.classes=[sea]",
        f"hydra.run.dir={tmp_path / 'bad'}",
        *TRAIN,
    )
    assert "gone.png: no such picture" in line


def test_pictures_to_draw_are_looked_at_before_training(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("cat.png", "b/Cat.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "dog.jpg").write_bytes(b"no picture")
    one = str(tmp_path / "cat.png")
    assert picture_files(one) == [tmp_path / "cat.png"]
    for wrong in ([one, str(tmp_path / "b" / "Cat.png")], [str(tmp_path / "dog.jpg")]):
        with pytest.raises(DataError, match=r"another picture has this name|dog\.jpg"):
            picture_files(wrong)


def test_tables() -> None:
    text = markdown_table(["a", "b"], [["x", 1.0], ["y", 2]])
    assert text == "| a | b |\n| --- | --- |\n| x | 1.00 |\n| y | 2 |\n"
    text = markdown_table(["a", "b"], [["x|y", "two\nlines"]], "lr")
    assert text == "| a | b |\n| --- | ---: |\n| x\\|y | two lines |\n"
