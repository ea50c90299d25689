"""ONNX files: the same numbers as PyTorch, facts in the metadata, one line for what is wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from talk2dino import Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import DoubleMLP, ProjectionLayer, visual_side
from talk2dino.calibration.calibration import Calibration
from talk2dino.calibration.rules import MeanOffset
from talk2dino.encoders.text import (
    BertTextEncoder,
    OpenClipTextEncoder,
    SentenceTransformerTextEncoder,
    TextEncoder,
)
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import ConfigError, EncoderError
from talk2dino.inference import onnx_files
from talk2dino.inference.onnx_export import DensePath, export_dense, export_projection, sorted_rows
from talk2dino.inference.onnx_text import check_text
from talk2dino.segmentation.segmenter import Segmenter
from tests.helpers.encoders import SMALL_CLIP
from tests.helpers.pipeline import BUNDLED, fails, need, run
from tests.helpers.windows import window_scores


def open_onnx(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def saved(folder: Path, text: TextEncoder, layers: list[int | str] | None = None) -> Path:
    """A checkpoint of a shallow vision encoder, a text encoder and a random projection."""
    vision = TimmVisionEncoder("shallow_dinov2", "random", image_size=56, layers=layers)
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(
        ProjectionLayer(text.embed_dim, vision.embed_dim), folder / "psi.safetensors", specs
    )
    return folder / "psi.safetensors"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(*BUNDLED, "onnxscript", "onnxruntime", "tokenizers")
    return saved(tmp_path_factory.mktemp("minilm"), SentenceTransformerTextEncoder(), [0, "0.attn"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("onnx", "onnxscript", "onnxruntime", "tokenizers")
    text = OpenClipTextEncoder(SMALL_CLIP, "random", templates="plain")
    return saved(tmp_path_factory.mktemp("clip"), text)


def test_a_run_becomes_files(
    minilm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command, its metadata, and scores of a picture it did not check itself with.

    The classes come as a file, so no text encoder is needed.
    """
    model = Talk2DINO.from_pretrained(minilm, device="cpu")
    named = model.embed_classes(["cat", ["sofa", "couch"], "grass"])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sentence_transformers", None)
        run(
            "export",
            f"checkpoint={minilm}",
            f"classes={named.save(tmp_path / 'classes.safetensors')}",
            f"output={tmp_path / 'onnx'}",
            "image_size=56",
            "int8=true",
            f"hydra.run.dir={tmp_path / 'run'}",
        )
    printed = capsys.readouterr().out
    assert printed.count("deviates from PyTorch by") == 3
    file = tmp_path / "onnx" / "segmenter.onnx"
    onnx = open_onnx(file)
    facts = onnx.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == ["cat", "sofa", "grass"]
    assert json.loads(facts["patch_size"]) == 14 and json.loads(facts["window"]) == 56
    assert json.loads(facts["mean"]) == pytest.approx([0.485, 0.456, 0.406])
    assert facts["vision"] == model.vision.name
    weights = {w.name for w in importlib.import_module("onnx").load(file).graph.initializer}
    assert any("blocks.0." in name for name in weights)
    assert not any("blocks.1." in name for name in weights)  # whose tokens nobody takes
    picture = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    scores = onnx.run(["scores"], {"image": (picture[None].float() / 255).numpy()})[0]
    words = [["cat"], ["sofa", "couch"], ["grass"]]
    want = model.segment(picture, words, short_side=56)
    assert want.classes == ["cat", "sofa", "grass"]
    np.testing.assert_allclose(scores[0], want.scores.numpy(), atol=1e-4)
    small = open_onnx(tmp_path / "onnx" / "segmenter-int8.onnx")
    rough = small.run(["scores"], {"image": (picture[None].float() / 255).numpy()})[0]
    assert 0 < np.abs(rough - scores).max() < 0.05
    assert small.get_modelmeta().custom_metadata_map == {**facts, "weights": "int8"}
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "onnx").iterdir()}
    assert set(sizes) == {"projection.onnx", "segmenter.onnx", "segmenter-int8.onnx"}
    assert sizes["segmenter-int8.onnx"] < 0.35 * sizes["segmenter.onnx"]
    psi = open_onnx(tmp_path / "onnx" / "projection.onnx")
    embedding = model.text.encode(["a cat", "a dog", "grass", "a", "b"])
    rows = psi.run(None, {"embedding": embedding.numpy()})[0]
    want_rows = F.normalize(model.projection.project_text(embedding), dim=-1)
    np.testing.assert_allclose(rows, want_rows.detach().numpy(), atol=1e-4)


def embedded(folder: Path, sentences: list[str]) -> Any:
    """`text.onnx` of a folder with its tokenizer, by onnxruntime and tokenizers alone."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(sentences)
    network = open_onnx(folder / "text.onnx")
    given = {
        "input_ids": [e.ids for e in encoded],
        "attention_mask": [e.attention_mask for e in encoded],
    }
    return network.run(None, {i.name: np.array(given[i.name]) for i in network.get_inputs()})[0]


WORDS = ["a cat", "a child's toy, 3 of them!", "ein  Café\tin ZÜRICH", "", "dark-brown " * 300]


@pytest.mark.slow
def test_a_calibration_is_part_of_the_files(clip: Path, tmp_path: Path) -> None:
    """Both kinds of segmenter give the scores of the calibrated model, not of the plain one.

    The text tower is CLIP's, whose classes are means over the sentences that the file names.
    """
    plain = Talk2DINO.from_pretrained(clip, device="cpu")
    words = ["cat", "grass", "brick wall"]
    tokens = torch.randn(300, plain.vision.embed_dim, generator=torch.Generator().manual_seed(1))
    made = Calibration.of(
        tokens + 1.0,  # with a mean that is not zero
        plain.embed_classes(["sky", "road"]).rows,
        MeanOffset(),
        plain.vision,
        plain.projection,
    )
    folder = tmp_path / "calibrated"
    plain.save_pretrained(folder)
    made.save(folder / "calibration.safetensors")
    model = Talk2DINO.from_pretrained(folder, device="cpu")
    picture = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    want, raw = (
        one.segment(picture, words, templates="subset", short_side=56, refinement=None).scores
        for one in (model, plain)
    )
    assert (want - raw).abs().max() > 1e-3
    pixels = (picture[None].float() / 255).numpy()
    out = tmp_path / "onnx"
    given = [f"checkpoint={folder}", f"output={out}", f"hydra.run.dir={tmp_path / 'run'}"]
    given += ["templates=subset", "text_tower=true"]
    run("export", *given, f"classes=[{','.join(words)}]", "image_size=56")
    scores = open_onnx(out / "segmenter.onnx").run(["scores"], {"image": pixels})[0]
    np.testing.assert_allclose(scores[0], want.numpy(), atol=1e-4)

    for sentences in (WORDS, WORDS[1:2]):
        got = embedded(out, sentences)
        np.testing.assert_allclose(got, model.text.encode(sentences).numpy(), atol=1e-4)
    facts = open_onnx(out / "text.onnx").get_modelmeta().custom_metadata_map
    prompts = json.loads(facts["prompts"])
    assert prompts[0] == "itap of a {}." and facts["checkpoint"] == "projection.safetensors"
    means = [embedded(out, [p.replace("{}", word) for p in prompts]).mean(0) for word in words]
    rows = open_onnx(out / "projection.onnx").run(None, {"embedding": np.stack(means)})[0]
    assert rows.shape == (3, plain.vision.embed_dim + 1)
    network = open_onnx(out / "open_vocabulary.onnx")
    scores = network.run(["scores"], {"image": pixels, "class_embeddings": rows})[0]
    np.testing.assert_allclose(scores[0], want.numpy(), atol=1e-4)


def test_words_to_scores_without_the_model(minilm: Path, tmp_path: Path) -> None:
    """The text tower, ψ and a segmenter for any words, one after the other."""
    out = tmp_path / "onnx"
    given = [f"checkpoint={minilm}", f"output={out}", f"hydra.run.dir={tmp_path / 'run'}"]
    run("export", *given, "image_size=56", "text_tower=true", "upsample=false")
    names = ("open_vocabulary.onnx", "projection.onnx", "text.onnx", "tokenizer.json")
    assert sorted(path.name for path in out.iterdir()) == list(names)
    model = Talk2DINO.from_pretrained(minilm, device="cpu")
    for sentences in (WORDS, WORDS[:1]):
        got = embedded(out, sentences)
        np.testing.assert_allclose(got, model.text.encode(sentences).numpy(), atol=1e-5)
    facts = open_onnx(out / "text.onnx").get_modelmeta().custom_metadata_map
    prompts = json.loads(facts["prompts"])
    assert prompts == ["a {}"] and facts["tokenizer"] == "tokenizer.json"
    words = ["cat", "grass", "brick wall", "sky"]
    embedding = embedded(out, [prompts[0].replace("{}", word) for word in words])
    rows = open_onnx(out / "projection.onnx").run(None, {"embedding": embedding})[0]
    np.testing.assert_allclose(rows, model.embed_classes(words).rows.numpy(), atol=1e-5)
    picture = torch.rand(1, 3, 56, 56)
    inputs = {"image": picture.numpy(), "class_embeddings": rows}
    scores = open_onnx(out / "open_vocabulary.onnx").run(["scores"], inputs)[0]
    tokens = model.vision(picture).patch_tokens
    want = (F.normalize(tokens, dim=-1) @ torch.from_numpy(rows).T).sigmoid()
    want = want.transpose(1, 2).unflatten(2, (4, 4))
    np.testing.assert_allclose(scores, want.detach().numpy(), atol=1e-4)


def test_text_towers_that_are_not_written() -> None:
    need(*BUNDLED)
    bert = BertTextEncoder(weights="bundled", pooling="mean")
    with pytest.raises(EncoderError, match="BertTextEncoder is none of OpenClipTextEncoder, Sent"):
        check_text(bert, ProjectionLayer(384, 16))
    text = OpenClipTextEncoder(SMALL_CLIP, "random")
    psi = CLIPLastLayer.from_text_encoder(text, 16)
    with pytest.raises(EncoderError, match="CLIPLastLayer reads second_last_tokens"):
        check_text(text, psi)


def test_a_projection_with_an_image_side_per_patch(tmp_path: Path) -> None:
    """Tokens go through the image side, synonyms are merged, one score per patch."""
    need("onnx", "onnxscript", "onnxruntime")
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    projection = DoubleMLP(8, vision.embed_dim).eval()
    rows, classes = sorted_rows(F.normalize(torch.randn(4, vision.embed_dim), dim=-1), [1, 0, 1, 2])
    assert classes.tolist() == [0, 1, 1, 2]
    (done,) = export_dense(
        tmp_path / "x.onnx", vision, projection, rows, classes, {}, size=48, full_size=False
    )
    assert done.deviation < 1e-4
    image = torch.rand(1, 3, 48, 48)
    got = open_onnx(done.path).run(None, {"image": image.numpy()})[0]
    assert got.shape == (1, 3, 3, 3)
    tokens = projection.project_visual(vision(image).patch_tokens)
    cosine = (F.normalize(tokens, dim=-1) @ rows.T).sigmoid()[0].detach()  # [P, N]
    want = torch.stack([cosine[:, 0], cosine[:, 1:3].amax(1), cosine[:, 3]]).view(1, 3, 3, 3)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_the_exported_module_is_the_segmenter() -> None:
    """Without ONNX: the module that is traced against the segmenter with its hooks."""
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    projection = DoubleMLP(8, vision.embed_dim).eval()
    rows = F.normalize(torch.randn(3, vision.embed_dim), dim=-1)
    classes = torch.tensor([0, 0, 1])
    side = visual_side(projection)
    module = DensePath(vision, rows, classes, 64, side, True).eval()
    segmenter = Segmenter(vision, input_size=64, project_patches=side)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        got = module(image)
    want = window_scores(segmenter, image * 255, rows, classes)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert vision(image).patch_tokens.shape[1] == 16  # the encoder itself was left as it is


def test_a_deviation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    projection = ProjectionLayer(8, 16).eval()
    true = onnx_files.run_file
    monkeypatch.setattr(onnx_files, "run_file", lambda *given: true(*given) + 0.01)
    with pytest.raises(ConfigError, match=r"x\.onnx is 1.0e-02 away from PyTorch"):
        export_projection(tmp_path / "x.onnx", projection, {})
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    projection = ProjectionLayer(8, vision.embed_dim)
    rows = torch.ones(1, vision.embed_dim)
    for size, message in ((50, "image_size=50: no multiple of the patch size 16; use 48"),):
        with pytest.raises(ConfigError, match=message):
            export_dense(
                tmp_path / "x.onnx", vision, projection, rows, torch.zeros(1).long(), {}, size
            )


def test_a_size_is_refused_before_any_file(
    clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = (f"checkpoint={clip}", f"output={tmp_path / 'onnx'}", f"hydra.run.dir={tmp_path}")
    for what in ("classes=[cat,sofa]", "text_tower=true"):
        said = fails(capfd, "export", *given, what, "image_size=50")
        assert "image_size=50: no multiple of the patch size" in said
        assert list((tmp_path / "onnx").iterdir()) == []


def test_nothing_of_the_user_is_overwritten(
    clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    given = [f"checkpoint={clip}", f"output={folder}", f"hydra.run.dir={tmp_path}"]
    (folder / "projection.onnx").write_bytes(b"mine")
    said = fails(capfd, "export", *given)
    assert "projection.onnx: is there and was not written by talk2dino.export" in said
    (folder / "x-int8.onnx").write_bytes(b"mine")
    single = (f"output={folder / 'x.onnx'}", "classes=[cat,sofa]", "int8=true")
    assert "x-int8.onnx: is there" in fails(capfd, "export", *given, *single)
    assert (folder / "x-int8.onnx").read_bytes() == b"mine"
    (folder / "x-int8.onnx").unlink()
    (folder / "tokenizer.json").write_bytes(b"mine")
    (folder / "projection.onnx").unlink()
    assert "tokenizer.json: is there" in fails(capfd, "export", *given, "text_tower=true")
    run("export", *given)
    run("export", *given)  # its own file
    before = (folder / "projection.onnx").read_bytes()
    (folder / "projection.onnx").write_bytes(b"mine")
    run("export", *given, "overwrite=true")
    assert (folder / "projection.onnx").read_bytes() == before
    assert (folder / "tokenizer.json").read_bytes() == b"mine"


def test_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = f"hydra.run.dir={tmp_path}"
    assert "make quickstart" in fails(capfd, "export", there)
    said = fails(capfd, "export", there, "checkpoint=x", "output=x.onnx")
    assert "a single file is the dense path, which needs classes=" in said
    said = fails(capfd, "export", there, "checkpoint=x", "int8=true")
    assert said.startswith("int8=true: there is no segmenter to write in 8 bits; add classes=")
    given = ["checkpoint=x", "output=x.onnx", "classes=[cat]", "text_tower=true"]
    assert "the text tower name a folder" in fails(capfd, "export", there, *given)
