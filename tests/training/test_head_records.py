"""The head that each caption chose: what is written, and that two ranks write the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from talk2dino import load_projection
from talk2dino.alignment.similarity import MaxRowSum, MaxScore
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore
from talk2dino.training.results import RecordHeads, may_be_last_epoch
from tests.helpers.pipeline import TRAIN, run
from tests.helpers.ranks import two_ranks
from tests.helpers.stores import tiny_store

IMAGES, HEADS, TEXT, WIDTH = 20, 5, 6, 8
CAPTIONS = 2 * IMAGES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(
        tmp_path_factory.mktemp("store"),
        {"avg_self_attn_out": (WIDTH,), "disentangled_self_attn": (HEADS, WIDTH)},
        images=IMAGES,
        captions_per_image=2,
        text_dim=TEXT,
        dtype="float32",
    )


def train(store: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    run(
        "train",
        "experiment=vits_infonce",
        f"projection.text_dim={TEXT}",
        f"projection.vision_dim={WIDTH}",
        f"store={store}",
        "data.batch_size=8",
        "data.val_fraction=0",
        "record_heads=true",
        *overrides,
        *TRAIN,
        f"hydra.run.dir={folder}",
    )
    file = folder / "heads.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def choices(store: Path, folder: Path) -> np.ndarray:
    """The closest head of every caption, with the final weights, by hand."""
    features = FeatureStore(store)
    psi = load_projection(folder / "projection.safetensors")
    with torch.no_grad():
        text = psi(torch.from_numpy(features.captions["embedding"][:]))
    heads = torch.from_numpy(features.images["disentangled_self_attn"][:])
    own = heads[torch.arange(CAPTIONS) // 2]  # [40, H, D]
    chosen: np.ndarray = F.cosine_similarity(text[:, None], own, dim=-1).argmax(1).numpy()
    return chosen


def test_every_caption_is_recorded_with_its_head(store: Path, tmp_path: Path) -> None:
    """At rate 0 the weights of every step are the final ones."""
    found = train(store, tmp_path, "trainer.max_epochs=3", "optimizer.lr=0.0")
    assert found["epoch"] == 2
    assert found["caption_id"] == list(range(1000, 1000 + CAPTIONS))
    assert found["image_id"] == [100 + row // 2 for row in range(CAPTIONS)]
    want = choices(store, tmp_path)
    assert found["head"] == want.tolist()
    assert found["captions_per_head"] == np.bincount(want, minlength=HEADS).tolist()
    picture = (tmp_path / "heads.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 2000


def test_the_weights_are_those_before_the_step(store: Path, tmp_path: Path) -> None:
    """One step over all captions: its choices are those of the untrained projection."""
    whole = ("data.batch_size=40", "trainer.max_epochs=1")
    moved = train(store, tmp_path / "a", *whole, "optimizer.lr=1.0")
    train(store, tmp_path / "b", *whole, "optimizer.lr=0.0")
    assert moved["head"] == choices(store, tmp_path / "b").tolist()
    assert moved["head"] != choices(store, tmp_path / "a").tolist()


@pytest.mark.parametrize(
    ("overrides", "epoch", "rows"),
    [(["trainer.max_steps=7"], 1, 16), (["similarity=soft_head", "trainer.max_epochs=1"], 0, 40)],
)
def test_a_shortened_epoch_and_other_strategies(
    overrides: list[str], epoch: int, rows: int, store: Path, tmp_path: Path
) -> None:
    found = train(store, tmp_path, *overrides)
    assert found["epoch"] == epoch
    assert len(found["head"]) == len(set(found["caption_id"])) == rows


def test_nothing_is_written_unless_asked_for(store: Path, tmp_path: Path) -> None:
    assert not train(store, tmp_path, "record_heads=false", "trainer.max_epochs=1")
    assert not (tmp_path / "heads.png").exists()


def rank(number: int, store: str, folder: str) -> None:
    train(
        Path(store),
        Path(folder),
        "trainer=ddp_cpu",
        "trainer.strategy=ddp",
        "trainer.devices=2",
        "data.batch_size=4",
        "trainer.max_epochs=1",
        "optimizer.lr=0.0",
    )


def test_two_ranks_record_the_captions_of_both(store: Path, tmp_path: Path) -> None:
    two_ranks(rank, str(store), str(tmp_path / "two"))
    one = train(store, tmp_path / "one", "trainer.max_epochs=1", "optimizer.lr=0.0")
    assert json.loads((tmp_path / "two" / "heads.json").read_text()) == one


def test_a_similarity_without_a_choice_is_refused(tmp_path: Path) -> None:
    RecordHeads(tmp_path, MaxScore())
    for similarity in (
        MaxScore(field="patch_tokens"),
        MaxRowSum(text_field="token_embeddings"),
    ):
        with pytest.raises(ConfigError, match=r"record_heads=true: similarity\.field="):
            RecordHeads(tmp_path, similarity)


def test_only_certainly_unfinished_epochs_are_left_out() -> None:
    def trainer(**options: Any) -> Any:
        usual = {"max_epochs": 5, "max_steps": -1, "early_stopping_callbacks": []}
        return SimpleNamespace(**usual | {"current_epoch": 2} | options)

    assert not may_be_last_epoch(trainer())
    assert may_be_last_epoch(trainer(current_epoch=4))
    assert may_be_last_epoch(trainer(max_epochs=-1))
    assert may_be_last_epoch(trainer(max_steps=10))
    assert may_be_last_epoch(trainer(early_stopping_callbacks=["one"]))
