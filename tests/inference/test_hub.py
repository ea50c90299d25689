"""Model cards, and a push to and a load from a Hub: huggingface_hub's own client against a local
server (`tests/helpers/hub.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from talk2dino import Talk2DINO
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError
from tests.helpers.encoders import HashText
from tests.helpers.hub import COMMIT, Hub

RESULT = {
    "benchmark": "mosaic",
    "miou": 61.44,
    "pixel_accuracy": 80.0,
    "images": 6,
    "config": {"pamr": True},
}


class Text(HashText):
    """Names an encoder that a checkpoint may name; it is never built."""

    def describe(self) -> dict[str, Any]:
        target = "talk2dino.encoders.text.SentenceTransformerTextEncoder"
        spec = {"_target_": target, "name": "hash", "weights": "bundled", "templates": "plain"}
        return {**super().describe(), "spec": spec}


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    torch.manual_seed(0)
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    return Talk2DINO(vision, Text(), ProjectionLayer(8, vision.embed_dim))


def test_push_and_load_again(model: Talk2DINO, hub: Hub, tmp_path: Path) -> None:
    address = model.push_to_hub("me/psi", private=True, results=[RESULT])
    assert address.endswith(COMMIT)
    assert "private" in json.dumps(hub.created[0])  # a flag, or the visibility in newer clients
    assert set(hub.files) == {"projection.safetensors", "config.json", "README.md"}
    again = Talk2DINO.from_pretrained("me/psi", "cpu", vision=model.vision, text=model.text)
    texts = ["a cat", "a dog"]
    assert torch.equal(again.encode_text(texts), model.encode_text(texts))
    hub.files.clear()  # from now on the cache must do
    Talk2DINO.from_pretrained("me/psi", "cpu", vision=model.vision, text=model.text)


def test_a_refusal_is_one_line(model: Talk2DINO, hub: Hub) -> None:
    for name in ("me/refused", "not a name"):
        with pytest.raises(CheckpointError, match="the Hub did not take it") as error:
            model.push_to_hub(name)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="the Hub gives no projection"):
        Talk2DINO.from_pretrained("me/nothing-there", "cpu")


def test_the_card_states_what_was_measured(model: Talk2DINO, tmp_path: Path) -> None:
    """From files beside the checkpoint and from arguments; YAML that parses, no path of here."""
    run = tmp_path / "run"
    file = model.save_pretrained(run)
    for no_folder in ("", file):
        with pytest.raises(ConfigError, match=r"folder='.*': is no folder"):
            model.save_pretrained(no_folder)
    (run / "results.json").write_text(json.dumps({**RESULT, "benchmark": "voc", "miou": 87.06}))
    validation = [{"step": 1, "val/text_to_image/recall@5": 12.34, "val/loss": 1.0}]
    (run / "metrics.json").write_text(json.dumps({"validation": validation}))
    config = {"optimizer": {"lr": 0.001}, "trainer": {"max_epochs": 5}, "store": str(tmp_path)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = Talk2DINO.from_pretrained(run, "cpu", vision=model.vision, text=model.text)
    assert loaded.source == file
    loaded.save_pretrained(tmp_path / "copy", results=[RESULT])
    card = (tmp_path / "copy" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "talk2dino"
    assert head["license"] == "other"
    assert "open-vocabulary-segmentation" in head["tags"]
    measured = head["model-index"][0]["results"]
    found = {(r["dataset"]["type"], m["type"]): m["value"] for r in measured for m in r["metrics"]}
    assert found[("voc", "mean_iou")] == 87.06
    assert found[("mosaic", "mean_iou")] == 61.44
    for line in (
        "| voc | 87.1 | 80.0 | 6 | yes |",
        "| learning rate | 0.001 |",
        "| epochs | 5 |",
        "| validation text to image recall@5 | 12.3 |",
        "| vision encoder | test_vit |",
    ):
        assert line in card, line
    assert str(tmp_path) not in card
    content = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert content["projection"]["text_dim"] == 8
    assert content["vision"]["name"] == "test_vit"


def test_a_card_without_measurements_says_so(model: Talk2DINO, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "No measurement was given" in card
    assert "model-index" not in yaml.safe_load(card.split("---")[1])


def test_results_that_are_none(model: Talk2DINO, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("no json")
    for results in ([tmp_path / "x.json"], [tmp_path / "y.json"], ["nowhere.json"], [{"miou": 1}]):
        with pytest.raises(DataError, match="results"):
            model.save_pretrained(tmp_path / "out", results=results)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"results: miou and pixel_accuracy are .*give numbers"):
        model.save_pretrained(tmp_path / "out", results=[{**RESULT, "miou": "high"}])


def test_the_home_folder_and_one_result(
    model: Talk2DINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the results is said before anything is written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="results"):
        model.save_pretrained("~/m", results=["nowhere.json"])
    assert not list(tmp_path.rglob("*"))
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    model.save_pretrained("~/m", results="r.json")
    assert "61.4" in (tmp_path / "home" / "m" / "README.md").read_text()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["README.md", "config.json", "projection.safetensors"])
@pytest.mark.parametrize("content", ["", "# Mine\n", "---\nlibrary_name: timm\n---\n", "{}"])
def test_a_card_of_somebody_else_stays(
    model: Talk2DINO, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}: is there and was not written by talk2dino"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content
    (tmp_path / name).unlink()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # its own
