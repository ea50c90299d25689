"""Class embeddings as a file: the same labels, no text encoder, one line for what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from talk2dino import ClassEmbeddings, Talk2DINO
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders.text import OpenClipTextEncoder, SentenceTransformerTextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError
from talk2dino.inference.class_embeddings import KEY
from tests.helpers.encoders import SMALL_CLIP, HashText, hash_model, noise_pixels
from tests.helpers.pipeline import fails, run

CLASSES = {"cat": ["cat", "kitten"], "sofa": ["sofa", "couch"], "dog": ["dog"]}


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return noise_pixels()


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text encoder can be built, and no library of one imported."""
    for name in ("open_clip", "sentence_transformers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a text encoder was built")

    for kind in (OpenClipTextEncoder, SentenceTransformerTextEncoder):
        monkeypatch.setattr(kind, "__init__", refuse)


def picture(path: Path) -> Path:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("background", [False, 0.5])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"negatives": ["sky", "wall"]},
        {"templates": ["one {}", "my {}"]},
        {"prompts": {"dog": ["a dog that sleeps", "a wolf"]}},
    ],
    ids=lambda given: next(iter(given), "words"),
)
def test_a_file_gives_the_same_bits(
    model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path, given: Any, background: bool | float
) -> None:
    encoded = model.encode(pixels, short_side=32)
    want = model.segment(encoded, CLASSES, background, **given)
    made = model.embed_classes(CLASSES, **given)
    file = made.save(tmp_path / "classes.safetensors")
    for classes in (made, file, str(file), ClassEmbeddings.load(file)):
        got = model.segment(encoded, classes, background)
        assert got.classes == want.classes
        assert torch.equal(got.labels, want.labels)
        assert torch.equal(got.scores, want.scores)


def test_what_the_file_says(model: Talk2DINO, tmp_path: Path) -> None:
    """Read by safetensors and json alone."""
    given: Any = {"negatives": ["sky"], "prompts": {"dog": ["a wolf", "a dog"]}}
    file = model.embed_classes(CLASSES, **given).save(tmp_path / "new" / "x.safetensors")
    with safe_open(file, framework="np") as opened:
        rows, content = opened.get_tensor("rows"), json.loads(opened.metadata()[KEY])
    assert rows.dtype == np.float32 and rows.shape == (6, 64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert content["classes"] == ["cat", "sofa", "dog"] and content["templates"] == "plain"
    assert [(row["class"], row["word"]) for row in content["rows"]] == [
        *[(None, "sky"), (0, "cat"), (0, "kitten"), (1, "sofa"), (1, "couch"), (2, "dog")]
    ]
    assert content["rows"][2]["sentences"] == ["a kitten"]
    assert content["rows"][5]["sentences"] == ["a wolf", "a dog"]
    mean = HashText().encode(["a wolf", "a dog"]).mean(0)
    want = torch.nn.functional.normalize(model.projection.project_text(mean), dim=-1)
    np.testing.assert_allclose(rows[5], want.detach().numpy(), atol=1e-6)
    made_with = content["made_with"]
    assert made_with["text"] == {"spec": {"_target_": "x"}, "weights_sha256": "0"}
    assert made_with["vision"]["spec"]["name"] == "test_vit"
    assert made_with["projection"]["spec"]["activation"] == "tanh"
    assert all(len(made_with[part]["weights_sha256"]) == 64 for part in ("vision", "projection"))


def test_some_of_the_classes(model: Talk2DINO, pixels: torch.Tensor) -> None:
    kept = model.embed_classes(CLASSES, negatives=["sky"])
    some = {name: CLASSES[name] for name in ("dog", "cat")}
    want = model.segment(pixels, some, negatives=["sky"], short_side=32)
    got = model.segment(pixels, kept.select(["dog", "cat"]), short_side=32)
    assert got.classes == want.classes and torch.equal(got.labels, want.labels)
    for names, said in ((["cow"], "'cow' is not in it"), (["cat", "cat"], "once"), ([], "once")):
        with pytest.raises(ConfigError, match=f"{said}.*its classes are cat, sofa, dog"):
            kept.select(names)


def test_no_text_encoder_is_built(
    trained_run: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The checkpoint names one; until it is asked for, and with a file at all, there is none."""
    model = Talk2DINO.from_pretrained(trained_run, device="cpu")
    image = picture(tmp_path / "a.png")
    want = model.segment(image, CLASSES, short_side=56)
    file = model.embed_classes(CLASSES).save(tmp_path / "classes.safetensors")
    model.save_pretrained(tmp_path / "saved")
    request.getfixturevalue("no_text")
    for place in (trained_run, tmp_path / "saved"):
        again = Talk2DINO.from_pretrained(place, device="cpu")
        got = again.segment(image, file, short_side=56)
        assert torch.equal(got.labels, want.labels) and torch.equal(got.scores, want.scores)
        again.save_pretrained(tmp_path / "saved")
    with pytest.raises(AssertionError, match="a text encoder was built"):
        again.segment(image, ["cat"], short_side=56)


def test_the_command_and_what_takes_its_file(
    trained_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    given = [f"checkpoint={trained_run}", "accelerator=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    words, file = "classes=[cat,[grass,lawn]]", tmp_path / "classes.safetensors"
    image = [f"image={picture(tmp_path / 'a.png')}", "short_side=56", "background=0.5"]
    run("embed", *given, words, f"output={file}")
    assert f"{file}: 2 classes, 3 rows of width 1152" in capfd.readouterr().out
    before = file.read_bytes()
    assert "is there already" in fails(capfd, "embed", *given, words, f"output={file}")
    assert "holds embeddings already" in fails(
        capfd, "embed", *given, f"classes={file}", "output=x.safetensors"
    )
    said = fails(capfd, "embed", *given, words, f"output={tmp_path / 'x.txt'}")
    assert "must end in .safetensors" in said
    assert file.read_bytes() == before
    run("segment", *given, *image, words, f"output={tmp_path / 'words.png'}")
    request.getfixturevalue("no_text")
    run("segment", *given, *image, f"classes={file}", f"output={tmp_path / 'file.png'}")
    one, other = (tmp_path / f"{name}_labels.png" for name in ("words", "file"))
    assert one.read_bytes() == other.read_bytes()
    again = [f"classes={file}", f"output={tmp_path / 'file.png'}", "resume=true"]
    run("segment", *given, *image, *again)
    assert "1 of 1 pictures were done before" in capfd.readouterr().out
    said = fails(capfd, "segment", *given, *image, f"classes={file}", "negatives=[sky]")
    assert "negatives and prompts are settled" in said
    said = fails(capfd, "segment", *given, *image, f"classes={file}", "text=clip_vitb16")
    assert "made with another text encoder (sentence-transformers/all-MiniLM-L6-v2, not" in said


def test_an_original_file_needs_no_name_of_a_text_encoder(
    model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path
) -> None:
    torch.save(model.projection.state_dict(), tmp_path / "original.pth")
    file = model.embed_classes(CLASSES).save(tmp_path / "classes.safetensors")
    original = Talk2DINO.from_pretrained(tmp_path / "original.pth", "cpu", vision=model.vision)
    got = original.segment(pixels, file, short_side=32)
    assert torch.equal(got.labels, model.segment(pixels, CLASSES, short_side=32).labels)
    for ask in (lambda: original.segment(pixels, ["cat"]), lambda: original.encode_text("a")):
        with pytest.raises(CheckpointError, match=r"original\.pth: does not name its text enc"):
            ask()
    with pytest.raises(CheckpointError, match="does not name its text encoder"):
        original.save_pretrained(tmp_path / "saved")


def other_projection(model: Talk2DINO) -> Talk2DINO:
    torch.manual_seed(1)
    return Talk2DINO(model.vision, HashText(), ProjectionLayer(8, 64))


def other_activation(model: Talk2DINO) -> Talk2DINO:
    """The same weights, another function."""
    psi = ProjectionLayer(8, 64, activation="relu")
    psi.load_state_dict(model.projection.state_dict())
    return Talk2DINO(model.vision, HashText(), psi)


def other_text(model: Talk2DINO) -> Talk2DINO:
    text = OpenClipTextEncoder(SMALL_CLIP, "random", templates="plain")
    spec = text.describe()["spec"]
    return Talk2DINO(model.vision, spec, model.projection)


def other_vision(model: Talk2DINO) -> Talk2DINO:
    vision = TimmVisionEncoder("test_vit2", "random", image_size=32)
    return Talk2DINO(vision, HashText(), model.projection)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (other_projection, "another projection"),
        (other_activation, "another projection"),
        (other_text, rf"another text encoder \(None, not {SMALL_CLIP}\)"),
        (other_vision, r"another vision encoder \(test_vit, not test_vit2\)"),
    ],
)
def test_another_checkpoint_is_refused(
    model: Talk2DINO,
    pixels: torch.Tensor,
    tmp_path: Path,
    make: Callable[[Talk2DINO], Talk2DINO],
    named: str,
) -> None:
    file = model.embed_classes(["cat"]).save(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: made with {named}"):
        make(model).segment(pixels, file, short_side=32)
    assert model.embed_classes(file).words.names == ("cat",)


def test_files_that_are_none(model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path) -> None:
    good = model.embed_classes(CLASSES).save(tmp_path / "good.safetensors")
    with safe_open(good, framework="pt") as opened:
        rows, content = opened.get_tensor("rows"), json.loads(opened.metadata()[KEY])
    bad = tmp_path / "bad.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as error:
            model.segment(pixels, bad, short_side=32)
        assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)

    refused("no such file; make it with: python -m talk2dino.embed")
    for broken in (b"", good.read_bytes()[:-9], b"\x00" + good.read_bytes()):
        bad.write_bytes(broken)
        refused("not a safetensors file")
    save_file({"rows": rows}, bad)
    refused("holds no class embeddings")
    save_file({"row": rows}, bad, {KEY: json.dumps(content)})
    refused("holds no class embeddings")
    save_file({"rows": rows}, bad, {KEY: "{"})
    refused("damaged")
    changed: list[tuple[dict[str, Any], torch.Tensor, str]] = [
        ({"version": 2}, rows, "version 2, known is 1"),
        ({"made_with": {}}, rows, "damaged"),
        ({"made_with": {key: {} for key in content["made_with"]}}, rows, "damaged"),
        ({"classes": ["cat"]}, rows, "do not belong together"),
        ({"classes": 3}, rows, "damaged"),
        ({"classes": [*content["classes"][1:], "a\x01"]}, rows, "has a control character"),
        ({"classes": [*content["classes"][1:], 3]}, rows, "a name or synonym is 3; give a text"),
        ({"rows": [row | {"word": "\uffff"} for row in content["rows"]]}, rows, "nobody sees"),
        ({"rows": content["rows"][:-2]}, rows, "do not belong together"),
        ({}, rows[:-1], r"rows \[4, 64\]"),
        ({}, rows.double(), "float64"),
        ({}, rows * 2, "unit length"),
        ({}, rows * torch.nan, "unit length"),
    ]
    for entries, tensor, message in changed:
        save_file({"rows": tensor}, bad, {KEY: json.dumps({**content, **entries})})
        refused(message)
    save_file({"rows": rows}, bad, {KEY: json.dumps(content)})
    assert torch.equal(ClassEmbeddings.load(bad).rows, rows)


def test_nothing_is_overwritten(model: Talk2DINO, tmp_path: Path) -> None:
    made = model.embed_classes(["cat"])
    file = made.save(tmp_path / "x.safetensors")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        made.save(file)
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        made.save(tmp_path / "x.pt")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
