"""`Talk2DINO` as one object: load, save, encode, segment, from any kind of picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import talk2dino
from talk2dino import Talk2DINO, load_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError
from tests.pipeline import HashText


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    """A random ViT of width 64 and the hash text encoder."""
    torch.manual_seed(0)
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    return Talk2DINO(vision, HashText(), ProjectionLayer(8, vision.embed_dim))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 40, 64), generator=random, dtype=torch.uint8)


def test_encode_text(model: Talk2DINO) -> None:
    text = model.encode_text(["a cat", "a dog"])
    assert text.shape == (2, 64)
    assert text.dtype == torch.float32
    torch.testing.assert_close(
        text, model.projection.project_text(HashText().encode(["a cat", "a dog"]))
    )
    assert not torch.allclose(text.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(model.encode_text("a cat"), text[:1])  # no list of letters
    assert model.encode_text([]).shape == (0, 64)


def test_encode_image(model: Talk2DINO, pixels: torch.Tensor) -> None:
    one = model.encode_image(pixels)
    assert one.shape == (1, 4, 64)
    two = model.encode_image([pixels, pixels.flip(2)])
    assert two.shape == (2, 4, 64)
    torch.testing.assert_close(two[:1], one, rtol=1e-4, atol=1e-4)
    assert not one.requires_grad


def test_all_kinds_of_pictures_agree(
    model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path
) -> None:
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png")
    kinds = [picture, tmp_path / "a.png", str(tmp_path / "a.png"), pixels, pixels / 255]
    tokens = [model.encode_image(kind) for kind in kinds]
    labels = [model.segment(kind, ["cat", "dog"], short_side=32).labels for kind in kinds]
    for other, found in zip(tokens, labels, strict=True):
        torch.testing.assert_close(other, tokens[0], rtol=0, atol=0)
        assert torch.equal(found, labels[0])


@pytest.mark.parametrize("background", [False, True, 0.5])
@pytest.mark.parametrize("pamr", [False, True])
def test_segment(
    model: Talk2DINO, pixels: torch.Tensor, background: bool | float, pamr: bool
) -> None:
    found = model.segment(pixels, ["cat", "dog"], background, pamr, short_side=32)
    names = ["background", "cat", "dog"] if background else ["cat", "dog"]
    assert found.classes == names
    assert found.labels.shape == (40, 64)
    assert found.labels.dtype == torch.int64
    assert set(found.labels.unique().tolist()) <= set(range(len(names)))
    assert found.scores.shape == (len(names), 40, 64)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.scores.argmax(0), found.labels)
    picture = found.overlay()
    assert picture.width >= 64  # a legend may be wider than a small picture
    assert picture.height > 40
    assert found.overlay(legend=False).size == (64, 40)


def test_synonyms_stand_for_one_class(model: Talk2DINO, pixels: torch.Tensor) -> None:
    named = model.segment(pixels, {"pet": ["cat", "dog"], "seat": ["sofa"]}, short_side=32)
    apart = model.segment(pixels, ["cat", "dog", "sofa"], short_side=32)
    assert named.classes == ["pet", "seat"]
    torch.testing.assert_close(named.scores[0], apart.scores[:2].amax(0), rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(named.scores[1], apart.scores[2])


def test_the_working_size_fits_the_patches(model: Talk2DINO) -> None:
    assert model.segmenter(None, False, 40).input_size % 16 == 0
    assert model.segmenter(None, False).input_size == 448
    assert model.segmenter(None, False, 3).input_size == 16


def test_wrong_input_is_one_line(model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path) -> None:
    for image in (pixels[0], pixels.int(), pixels.float(), np.zeros((3, 4, 4)), "nowhere.png"):
        with pytest.raises(DataError, match="image") as error:
            model.segment(image, ["cat"])  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read as an image"):
        model.encode_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="the list is empty"):
        model.encode_image([])
    for classes in ([], ["cat", " "]):
        with pytest.raises(ConfigError, match="classes: the list is empty or has an empty name"):
            model.segment(pixels, classes)


def test_widths_must_fit(model: Talk2DINO) -> None:
    with pytest.raises(CheckpointError, match="a text encoder of width 9, but hash has 8"):
        Talk2DINO(model.vision, HashText(), ProjectionLayer(9, 64))
    with pytest.raises(CheckpointError, match=r"vision encoder of width 9, but test_vit.* has 64"):
        Talk2DINO(model.vision, HashText(), ProjectionLayer(8, 9))


def test_pretrained_round_trip(trained_run: Path, tmp_path: Path) -> None:
    """Folder, `.safetensors` and `.ckpt` are the same model, also after saving it again."""
    first = Talk2DINO.from_pretrained(trained_run, device="cpu")
    file = first.save_pretrained(tmp_path / "saved")
    assert file.name == "projection.safetensors"
    encoders = {"vision": first.vision, "text": first.text}
    others = [
        Talk2DINO.from_pretrained(tmp_path / "saved", device="cpu"),  # builds its encoders
        Talk2DINO.from_pretrained(file, device="cpu", **encoders),
        Talk2DINO.from_pretrained(
            trained_run / "checkpoints" / "last.ckpt", device="cpu", **encoders
        ),
    ]
    want = first.encode_text(["a cat", "grass"])
    assert want.shape == (2, 384)
    for other in others:
        torch.testing.assert_close(other.encode_text(["a cat", "grass"]), want, rtol=0, atol=0)
    picture = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
    torch.testing.assert_close(others[0].encode_image(picture), first.encode_image(picture))
    assert first.encode_image(picture).shape == (1, 64, 384)  # 112 / 14 squared
    state = load_projection(file).state_dict()
    torch.testing.assert_close(state, dict(first.projection.state_dict()))


def test_from_pretrained_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder holds no projection\.safetensors"):
        Talk2DINO.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        Talk2DINO.from_pretrained(tmp_path / "nowhere.pth")
    torch.save(ProjectionLayer(8, 64).state_dict(), tmp_path / "original.pth")
    with pytest.raises(CheckpointError, match="does not name its vision encoder; say it with"):
        Talk2DINO.from_pretrained(tmp_path / "original.pth")


def test_the_package_exports_what_users_import() -> None:
    assert talk2dino.Talk2DINO is Talk2DINO
    assert talk2dino.load_projection is load_projection
    with pytest.raises(AttributeError, match="no attribute 'Talk2DINo'"):
        talk2dino.Talk2DINo  # noqa: B018
