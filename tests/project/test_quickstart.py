"""The quickstart itself, through its own Makefile recipe, at a reduced size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from talk2dino.features import FeatureStore

pytestmark = pytest.mark.slow


def test_store_holds_pooled_and_dense_features(quickstart: Path) -> None:
    store = FeatureStore(quickstart / "store")
    assert len(store.images) == 96 and len(store.captions) == 5 * 96
    assert store.images["patch_tokens"].shape == (96, 256, 384)
    assert store.images["disentangled_self_attn"].shape == (96, 6, 384)
    assert store.verify() == []


@pytest.mark.parametrize("run", ["dense", "max_score"])
def test_training_leaves_its_files(quickstart: Path, run: str) -> None:
    for name in ("projection.safetensors", "checkpoints/last.ckpt", "config.yaml", "loss.png"):
        assert (quickstart / run / name).stat().st_size > 0
    assert (quickstart / run / "logs" / "metrics.csv").read_text().count("\n") > 1


def test_training_helps_on_held_out_scenes(quickstart: Path) -> None:
    trained = json.loads((quickstart / "evaluate/dense/results.json").read_text())
    untrained = json.loads((quickstart / "evaluate/dense/results_untrained.json").read_text())
    assert trained["images"] == untrained["images"] == 6
    assert set(trained) >= {"benchmark", "miou", "pixel_accuracy", "per_class", "seconds", "config"}
    assert trained["miou"] > untrained["miou"] + 10


def test_segmented_photograph(quickstart: Path) -> None:
    photograph = Image.open(quickstart / "photograph.jpg")
    overlay = Image.open(quickstart / "segmented.png")
    labels = Image.open(quickstart / "segmented_labels.png")
    assert labels.size == photograph.size
    assert overlay.width == photograph.width and overlay.height > photograph.height  # the legend
    assert len(set(labels.tobytes())) > 1
