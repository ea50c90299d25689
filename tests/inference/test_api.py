"""`Talk2DINO` as one object: load, save, encode, segment, from any kind of picture."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import talk2dino
from talk2dino import Talk2DINO, load_projection
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.datasets.pictures import to_pixels
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError, ResultWarning, UserError
from talk2dino.inference.vocabulary import TextCache
from talk2dino.segmentation import KNN, PAMR
from tests.helpers.encoders import HashText, hash_model, noise_pixels


class CountingText(HashText):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def encode(self, texts: Any) -> torch.Tensor:
        self.seen += texts
        return super().encode(texts)


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return noise_pixels()


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_agrees(
    model: Talk2DINO, pixels: torch.Tensor, dtype: torch.dtype, gpu: torch.device
) -> None:
    want = model.segment(pixels, ["a cat", "a dog"]).scores
    vision, psi = copy.deepcopy(model.vision), copy.deepcopy(model.projection)
    moved = Talk2DINO(vision, HashText(), psi, dtype).to(gpu)
    got = moved.segment(pixels, ["a cat", "a dog"])
    assert want is not None and got.scores is not None
    assert got.labels.shape == pixels.shape[1:]
    atol = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.scores.cpu(), want.cpu(), rtol=0, atol=atol)
    torch.testing.assert_close(
        moved.encode_text(["a cat"]).cpu(), model.encode_text(["a cat"]), rtol=0, atol=1e-5
    )


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
    array = pixels.permute(1, 2, 0).numpy()
    kinds = [
        picture,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        pixels,
        pixels / 255,
        array,
        array.astype(np.float32) / 255,
        array[:, ::-1][:, ::-1],
    ]
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


def test_refinements_with_settings(model: Talk2DINO, pixels: torch.Tensor) -> None:
    def scores(**how: Any) -> torch.Tensor:
        return model.segment(pixels, ["cat", "dog"], short_side=32, **how).class_scores[:]

    plain, spread = scores(), scores(refinement=KNN())
    assert not torch.equal(spread, plain)
    assert torch.equal(scores(refinement=KNN(keep=1.0)), plain)
    assert torch.equal(scores(refinement=PAMR()), scores(pamr=True))
    both = scores(refinement=KNN(), pamr=True)
    assert not torch.equal(both, spread) and not torch.equal(both, scores(pamr=True))
    with pytest.raises(ConfigError, match="refinement='crf': give KNN"):
        model.segment(pixels, ["cat"], refinement="crf")  # type: ignore[call-overload]


def test_synonyms_stand_for_one_class(model: Talk2DINO, pixels: torch.Tensor) -> None:
    named = model.segment(pixels, {"pet": ["cat", "dog"], "seat": ["sofa"]}, short_side=32)
    apart = model.segment(pixels, ["cat", "dog", "sofa"], short_side=32)
    assert named.classes == ["pet", "seat"]
    torch.testing.assert_close(named.scores[0], apart.scores[:2].amax(0), rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(named.scores[1], apart.scores[2])


def test_the_working_size_fits_the_patches(model: Talk2DINO) -> None:
    assert model.segmenter(None, False, 40).protocol.input_size % 16 == 0
    assert model.segmenter(None, False).protocol.input_size == 448
    assert model.segmenter(None, False, 3).protocol.input_size == 16


def test_wrong_input_is_one_line(model: Talk2DINO, pixels: torch.Tensor, tmp_path: Path) -> None:
    wrong = (pixels[0], pixels.int(), pixels.float(), np.zeros((3, 4, 4)), "nowhere.png", b"no")
    for image in (*wrong, pixels[:, :0], np.zeros((4, 4, 3), np.uint16), np.full((2, 2), np.nan)):
        with pytest.raises(DataError, match="image") as error:
            model.segment(image, ["cat"])  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read as an image"):
        model.encode_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="the list is empty"):
        model.encode_image([])
    with pytest.raises(DataError, match="addresses are not opened"):
        model.segment("https://example.org/cat.jpg", ["cat"])
    for classes in (
        [],
        ["cat", " "],
        {"cat": []},
        [["cat", ""]],
        [1, 2],
        {1: "cat"},
        ["cat", None],
    ):
        with pytest.raises(ConfigError, match=r"^classes: (the list is|.* is neither a word)"):
            model.segment(pixels, classes)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("'cat' is named twice", {"classes": ["cat", "dog", "cat"]}),
        ("give a list of names", {"classes": "cat"}),
        ("classes=None: give a list of names", {"classes": None}),
        ("classes=7: give a list of names", {"classes": 7}),
        ("short_side='56': use a whole number of 1 to", {"classes": ["cat"], "short_side": "56"}),
        ("short_side=56.5: use a whole number of 1 to", {"classes": ["cat"], "short_side": 56.5}),
        ("has no {} for the name", {"classes": ["cat"], "templates": ["a cat"]}),
        ("templates='poetic' is unknown", {"classes": ["cat"], "templates": "poetic"}),
        ("'dog' is none of the classes", {"classes": ["cat"], "prompts": {"dog": "a dog"}}),
        ("'background' is also what", {"classes": ["background"], "negatives": ["sky"]}),
        ("'background' is also what", {"classes": ["cat", "background"], "background": True}),
        ("scores lie within 0..1", {"classes": ["cat"], "background": 1.5}),
        ("short_side=0", {"classes": ["cat"], "short_side": 0}),
    ]
    for message, arguments in cases:
        with pytest.raises(ConfigError, match=message):
            model.segment(pixels, **arguments)
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        Talk2DINO(model.vision, HashText(), ProjectionLayer(8, 64), dtype=torch.int8)


def test_files_are_turned_upright_once(tmp_path: Path) -> None:
    """Orientation 6: the camera lay on its side; path, bytes and PIL image agree."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255  # left half bright: on top once it is upright
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as picture:
        for kind in (path, path.read_bytes(), picture):
            found = to_pixels(kind)
            assert found.shape == (3, 16, 8)
            assert found[:, :8].min() == 255 and found[:, 8:].max() == 0


def test_pictures_of_several_sizes_and_shapes(model: Talk2DINO) -> None:
    """A list gives a list, in order, and what a single call gives; lines of pixels work too."""
    random = torch.Generator().manual_seed(1)
    pictures = [
        torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8)
        for size in ((40, 64), (1, 1), (33, 20), (3, 90))
    ]
    together = model.segment(pictures, ["cat", "dog"], short_side=32)
    assert [tuple(found.labels.shape) for found in together] == [
        tuple(picture.shape[1:]) for picture in pictures
    ]
    for picture, found in zip(pictures, together, strict=True):
        alone = model.segment(picture, ["cat", "dog"], short_side=32)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-4)
    batch = torch.stack([pictures[0], pictures[0]])
    assert len(model.segment(batch, ["cat"], short_side=32)) == 2
    gray = model.segment(np.full((8, 8), 0.5), ["cat"], short_side=32)
    assert gray.image.unique().tolist() == [128]


def test_encode_once_then_score_again(model: Talk2DINO, pixels: torch.Tensor) -> None:
    """An encoded picture gives the same for any classes and options, without the encoder."""
    encoded = model.encode(pixels, short_side=32)
    calls = []
    handle = model.vision.register_forward_hook(lambda *_: calls.append(1))
    again = [
        model.segment(encoded, classes, background=threshold, pamr=pamr)
        for classes in (["cat"], ["dog", "sofa"])
        for threshold in (False, 0.5)
        for pamr in (False, True)
    ]
    assert not calls
    handle.remove()
    whole = [
        model.segment(pixels, classes, background=threshold, pamr=pamr, short_side=32)
        for classes in (["cat"], ["dog", "sofa"])
        for threshold in (False, 0.5)
        for pamr in (False, True)
    ]
    for one, other in zip(again, whole, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0)
    mixed = model.segment([encoded, pixels], ["cat"], short_side=32)
    assert torch.equal(mixed[0].labels, mixed[1].labels)


def test_a_vocabulary_embeds_its_words_once(pixels: torch.Tensor) -> None:
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    text = CountingText()
    model = Talk2DINO(vision, text, ProjectionLayer(8, vision.embed_dim))
    vocabulary = model.open_vocabulary(["cat", "dog"], short_side=32)
    found = [vocabulary(frame) for frame in (pixels, pixels.flip(2), pixels.flip(1))]
    want = model.segment(pixels, ["cat", "dog"], short_side=32)
    assert torch.equal(found[0].scores, want.scores)
    assert text.seen == ["a cat", "a dog"]
    model.segment(pixels, ["dog", "sofa"], short_side=32)  # one new word, one old
    assert text.seen == ["a cat", "a dog", "a sofa"]
    model.segment(pixels, ["cat"], templates=["one {}"], short_side=32)
    assert text.seen[3:] == ["one cat"]
    with torch.no_grad():
        model.projection.linear_layer.weight.mul_(0.5)  # type: ignore[union-attr, operator]
    assert not torch.equal(model.segment(pixels, ["cat"], short_side=32).scores[0], want.scores[0])
    assert text.seen[4:] == ["a cat"]  # other weights, other embeddings


def test_another_projection_has_other_rows(model: Talk2DINO) -> None:
    """Both were filled once, so their tensors count as many writes."""
    first, second = hash_model(), hash_model()
    torch.nn.init.normal_(second.projection.linear_layer.weight)
    saved = [{k: v.clone() for k, v in m.projection.state_dict().items()} for m in (first, second)]
    for one, state in zip((first, second), saved, strict=True):
        one.projection = copy.deepcopy(one.projection)
        one.projection.load_state_dict(state)
    before = first.embed_classes(["cat"]).rows
    first.projection = second.projection
    after = first.embed_classes(["cat"]).rows
    assert not torch.equal(before, after)
    assert torch.equal(after, second.embed_classes(["cat"]).rows)


@pytest.mark.parametrize(
    "given",
    [
        {"classes": {"cat", "dog"}},
        {"classes": [{"cat": ["kitten"]}, "dog"]},
        {"classes": [{"sofa", "couch"}]},
        {"classes": ["cat"], "negatives": {"person": ["man"]}},
        {"classes": ["cat"], "negatives": frozenset(["sky"])},
    ],
)
def test_what_has_no_order_is_refused(
    model: Talk2DINO, pixels: torch.Tensor, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"^(classes=.*|classes: .*|negatives: .*)give a list"):
        model.segment(pixels, **given)
    keys = dict.fromkeys(["cat", "dog"]).keys()  # in order
    assert model.segment(pixels, keys, short_side=32).names == ["cat", "dog"]


def test_the_cache_forgets_the_oldest() -> None:
    cache = TextCache(size=2)
    computed: list[Any] = []

    def compute(rows: Any) -> torch.Tensor:
        computed.extend(rows)
        return torch.ones(len(rows), 3)

    for name in "abab":
        cache.get([(name,)], 0, compute)
    assert computed == [("a",), ("b",)]
    cache.get([("c",), ("c",)], 0, compute)
    cache.get([("b",)], 0, compute)
    assert computed == [("a",), ("b",), ("c",)]
    cache.get([("a",)], 0, compute)
    assert computed[3:] == [("a",)]


def test_negatives_count_as_background(model: Talk2DINO, pixels: torch.Tensor) -> None:
    """Where the best negative beats all classes is background, with and without a threshold."""
    named = {"past": ["sky", "wall"], "cat": ["cat"], "dog": ["dog"]}
    every = model.segment(pixels, named, short_side=32)
    found = model.segment(pixels, ["cat", "dog"], negatives=["sky", "wall"], short_side=32)
    assert found.classes == ["background", "cat", "dog"]
    assert torch.equal(found.labels, every.labels)
    assert torch.equal(found.labels, found.scores.argmax(0))
    torch.testing.assert_close(found.scores, every.scores)
    both = model.segment(pixels, ["cat", "dog"], 0.5, negatives=["sky"], short_side=32)
    assert torch.equal(both.labels, both.scores.argmax(0))
    assert float(both.scores[0].min()) >= 0.5


def test_prompts_replace_templates(model: Talk2DINO, pixels: torch.Tensor) -> None:
    sentences = ["my cat on the sofa", "a cat that sleeps"]
    found = model.segment(
        pixels,
        {"cat": ["cat", "kitten"], "dog": ["dog"]},
        prompts={"cat": sentences},
        short_side=32,
    )
    text = torch.stack([HashText().encode(sentences).mean(0), HashText().encode(["a dog"])[0]])
    rows = torch.nn.functional.normalize(model.projection.project_text(text), dim=-1)
    want = model.segmenter(None, False, 32)(pixels, rows, return_scores=True)
    torch.testing.assert_close(found.scores, want.scores)


def test_threshold_after_the_fact(model: Talk2DINO, pixels: torch.Tensor) -> None:
    first = model.segment(pixels, ["cat", "dog"], background=0.4, negatives=["sky"], short_side=32)
    other = model.segment(pixels, ["cat", "dog"], background=0.5, negatives=["sky"], short_side=32)
    moved = first.with_threshold(0.5)
    assert torch.equal(moved.labels, other.labels)
    assert torch.equal(moved.scores, other.scores)
    plain = model.segment(pixels, ["cat", "dog"], background=0.4, short_side=32)
    assert plain.with_threshold(None).classes == ["cat", "dog"]
    assert torch.equal(plain.with_threshold(0).labels, plain.with_threshold(0.0).labels)
    for odd in (55, True, "half", float("nan")):  # True would be no threshold of this calibration
        with pytest.raises(ConfigError, match=f"background={odd!r}: use 0 to 1"):
            first.with_threshold(odd)  # type: ignore[arg-type]


def test_figures_of_a_result(model: Talk2DINO, pixels: torch.Tensor) -> None:
    found = model.segment(pixels, ["cat", "dog"], background=0.5, short_side=32)
    areas = found.areas()
    assert list(areas) == ["background", "cat", "dog"]
    for index, share in enumerate(areas.values()):
        assert share == pytest.approx(float((found.labels == index).float().mean()))
    at = found.scores_at(3, 5)
    assert list(at.values()) == pytest.approx(found.scores[:, 3, 5].tolist(), abs=1e-6)
    for row, column, error in ((40, 0, "row=40: use 0 to 39"), (0, 1.5, "column=1.5: use a whole")):
        with pytest.raises(ConfigError, match=error):
            found.scores_at(row, column)  # type: ignore[arg-type]
    assert found._repr_png_().startswith(b"\x89PNG")
    hidden = found.overlay(alpha=1.0, legend=False, hide=["cat", "dog"])
    assert hidden.size == (64, 40)
    alone = [found.overlay(legend=False, hide=names) for names in ("cat", ["cat"])]
    assert alone[0].tobytes() == alone[1].tobytes()
    for draw in (found.overlay, lambda alpha: found.heatmap("cat", alpha)):
        with pytest.raises(ConfigError, match="alpha=3: use 0 to 1"):
            draw(alpha=3)
    for path in ("", "labels.jpg"):
        with pytest.raises(ConfigError, match=f"labels='{path}': they are a PNG"):
            found.save_labels(path)
    with pytest.raises(ConfigError, match="class 'cow': not segmented here"):
        found.overlay(hide=["cow"])


def test_scores_of_one_pixel_are_those_of_all(model: Talk2DINO, pixels: torch.Tensor) -> None:
    seg = model.segment(pixels, ["cat", "sofa"], 0.5, short_side=32, negatives=["sky"])
    height, width = seg.labels.shape
    picked = {
        (row, column): list(seg.scores_at(row, column).values())
        for row in (0, 1, height // 2, height - 1)
        for column in (0, 2, width // 3, width - 1)
    }
    assert "scores" not in vars(seg)  # 5,000 classes of a photograph would be 6 GB
    for (row, column), values in picked.items():
        torch.testing.assert_close(
            torch.tensor(values), seg.scores[:, row, column], rtol=0, atol=1e-6
        )


def test_odd_pictures_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).random((5, 6, 3)).astype(np.float32)
    assert torch.equal(to_pixels(floats.astype(">f4")), to_pixels(floats))
    Image.fromarray((255 * floats).astype(np.uint8)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-40])
    cases: list[tuple[Any, str]] = [
        (Image.new("F", (4, 4)), "PIL image cannot be read .*floating-point"),
        (Image.open(tmp_path / "cut.png"), "PIL image cannot be read"),
        (np.full((2, 2, 3), 1 + 1e-6), r"in 1\.000001\.\.1\.000001; give uint8, or 0\.\.1"),
    ]
    for image, said in cases:
        with pytest.raises(DataError, match=said):
            to_pixels(image)


def test_heat_maps_follow_the_scores(model: Talk2DINO, pixels: torch.Tensor) -> None:
    found = model.segment(pixels, ["cat", "dog"], background=0.5, short_side=32)
    picture = np.asarray(found.heatmap("dog", alpha=1.0).convert("L")).astype(float)
    scores = found.scores[2].numpy()
    assert picture.shape == scores.shape
    order = np.argsort(scores, axis=None)
    assert (np.diff(picture.flatten()[order]) >= -1).all()  # lightness never falls (one gray level)
    narrow = np.asarray(found.heatmap("dog", alpha=1.0, limits=(2.0, 3.0)))
    assert len(np.unique(narrow.reshape(-1, 3), axis=0)) == 1  # all below the limits
    with pytest.raises(ConfigError, match="the background has no map"):
        found.heatmap("background")


def test_threads_get_their_own_results(model: Talk2DINO) -> None:
    """Eight threads, each its own picture and words: the same as one after the other."""
    random = torch.Generator().manual_seed(2)
    pictures = torch.randint(0, 256, (8, 3, 32, 48), generator=random, dtype=torch.uint8)
    names = [[f"word {i}", "cat"] for i in range(8)]

    def work(index: int) -> torch.Tensor:
        found = model.segment(pictures[index], names[index], background=0.5, short_side=32)
        return torch.cat([found.scores.flatten(), model.encode_text(names[index]).flatten()])

    want = [work(index) for index in range(8)]
    model._cache.rows.clear()
    got: dict[int, list[torch.Tensor]] = {index: [] for index in range(8)}
    threads = [
        threading.Thread(target=lambda i=i: got[i].extend(work(i) for _ in range(3)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in got.items():
        assert len(results) == 3
        for result in results:
            torch.testing.assert_close(result, want[index], rtol=1e-4, atol=1e-5)


def test_short_types_stay_close(model: Talk2DINO, pixels: torch.Tensor) -> None:
    short = Talk2DINO(model.vision, HashText(), model.projection, dtype=torch.bfloat16)
    got, want = short.encode_image(pixels), model.encode_image(pixels)
    assert got.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1)
    assert float(cosine.min()) > 0.99
    assert not torch.equal(got, want)
    scores = [m.segment(pixels, ["cat"], short_side=32).scores for m in (short, model)]
    torch.testing.assert_close(*scores, rtol=0, atol=0.03)


def test_copies_and_pickles_work(model: Talk2DINO, pixels: torch.Tensor) -> None:
    # Words of this test alone: copies start without the text rows that the model remembers, and
    # rows embedded in another company may be rounded in another way.
    words = ["heron", "kite"]
    want = model.segment(pixels, words, short_side=32).scores
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.segment(pixels, words, short_side=32).scores, want)


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
    assert want.shape == (2, 1152)  # three layers of ViT-S
    for other in others:
        torch.testing.assert_close(other.encode_text(["a cat", "grass"]), want, rtol=0, atol=0)
    picture = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
    torch.testing.assert_close(others[0].encode_image(picture), first.encode_image(picture))
    assert first.encode_image(picture).shape == (1, 64, 1152)  # 112 / 14 squared
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


@pytest.mark.parametrize("device", ["gpu", "", "meter", "cuda:99"])
def test_a_device_that_is_not_here_is_one_line(device: str, trained_run: Path) -> None:
    model = hash_model()
    for move in (model.to, partial(Talk2DINO.from_pretrained, trained_run)):
        with pytest.raises(
            ConfigError, match=f"device='{device}': not usable .*; here are cpu"
        ) as e:
            move(device)
        assert "\n" not in str(e.value) and "http" not in str(e.value)
    assert model.to("cpu", torch.float32) is model


def test_a_projection_knows_the_blocks_that_it_was_trained_on(tmp_path: Path) -> None:
    last, joined = (
        TimmVisionEncoder("test_vit", weights="random", image_size=64, layers=layers)
        for layers in (None, ["-3.attn", -1])
    )
    for own, other, named in (
        (last, joined, "null, not of"),
        (joined, last, r"\['3.attn', 5\], not of"),
    ):
        projection = ProjectionLayer(8, own.embed_dim)
        file = tmp_path / f"{own.embed_dim}.safetensors"
        save_projection(projection, file, {"vision": own.spec})
        text: Any = HashText()
        model = Talk2DINO.from_pretrained(file, text=text, device="cpu")
        assert model.vision.layers == own.layers
        with pytest.raises(CheckpointError, match=f"made of the tokens of vision.layers={named}"):
            Talk2DINO.from_pretrained(file, vision=other, text=text, device="cpu")


def test_the_package_exports_what_users_import() -> None:
    assert talk2dino.Talk2DINO is Talk2DINO
    assert talk2dino.load_projection is load_projection
    with pytest.raises(AttributeError, match="no attribute 'Talk2DINo'"):
        talk2dino.Talk2DINo  # noqa: B018


WORDS: dict[str, Any] = {"classes": ["cat", "sofa"], "short_side": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": (name for name in ["cat"])}, "classes=<generator.*give a list"),
        ({"classes": b"cat"}, "classes=b'cat': give a list"),
        ({"classes": torch.zeros(2)}, "classes: tensor.*give a list"),
        ({"classes": ["cat\u200b", "sofa"]}, "one that nobody sees"),
        ({"negatives": (name for name in ["x"])}, "negatives: <generator.*neither a word"),
        ({"negatives": None}, "negatives: None is neither a word"),
        ({"negatives": ["sofa"]}, "negatives: 'sofa' is also a word of the class 'sofa'"),
        ({"templates": (t for t in ["a {}"])}, "templates=<generator.*give sentences"),
        ({"templates": [1]}, "templates: 1 has no {}"),
        ({"templates": []}, r"templates=\[\]: give sentences"),
        ({"templates": 5}, "templates=5: give sentences"),
        ({"prompts": {"cat": []}}, "prompts: the list is empty"),
        ({"prompts": ["a cat"]}, "prompts=.*give sentences by class name"),
        ({"pamr": "false"}, "pamr='false': give True or False"),
        ({"short_side": True}, "short_side=True: use a whole number of 1 to 8192"),
        ({"short_side": torch.tensor(32)}, "short_side=tensor.*use a whole number"),
    ],
)
def test_arguments_of_other_types_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        hash_model().segment(noise_pixels(), **WORDS | changes)
    assert "\n" not in str(refused.value)


def test_numpys_true_is_true_and_a_word_of_two_classes_is_said() -> None:
    model = hash_model()
    found = model.segment(noise_pixels(), **WORDS, background=np.True_)
    assert found.threshold == 0.55
    with pytest.warns(ResultWarning, match="'sofa' is a word of two classes: the first"):
        model.segment(noise_pixels(), {"seat": ["chair", "sofa"], "sofa": "sofa"}, short_side=32)


class LowerText(HashText):
    """Knows no upper case, as CLIP and the uncased encoders."""

    def encode(self, texts: Any) -> torch.Tensor:
        return super().encode([text.lower() for text in texts])


def test_words_that_the_text_encoder_takes_for_one_are_said() -> None:
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    model = Talk2DINO(vision, LowerText(), ProjectionLayer(8, vision.embed_dim))
    for classes, negatives, said in (
        (["Cat", "dog", "cat"], (), "'Cat' and 'cat' have the same vector: the first gets"),
        ({"a": ["x", "Dog"], "b": ["y", "dog"]}, (), "'Dog' and 'dog' have the same"),
        (["dog"], ["Dog"], "'Dog' and 'dog' have the same"),
    ):
        with pytest.warns(ResultWarning, match=said) as heard:
            model.open_vocabulary(classes, negatives=negatives)  # type: ignore[arg-type]
        assert len(heard) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        model.open_vocabulary([["cat", "Cat"], "dog"])  # of one class


PIXELS = np.zeros((40, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (PIXELS.astype(np.longdouble), "float128 array|longdouble"),
        (np.ma.masked_equal(PIXELS, 0), "masked array"),
        (torch.zeros(3, 40, 64).to_sparse(), "give a PIL image"),
        (torch.zeros(3, 40, 64, device="meta"), "give a PIL image"),
        (torch.zeros(3, 40, 64, dtype=torch.int32), "torch.int32; give uint8"),
        (torch.zeros(3, 40, 64, dtype=torch.bool), "torch.bool; give uint8"),
        (Image.new("RGB", (0, 5)), "holds no pixel"),
        (b"xx", r"2 bytes that are no picture \(cannot identify image file\)"),
    ],
)
def test_pictures_of_other_kinds_are_one_line(picture: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hash_model().segment(picture, **WORDS)


def test_a_matrix_is_gray() -> None:
    """NumPy ends the process where it repeats one along a new axis."""
    assert to_pixels(np.asmatrix(PIXELS[..., 0])).shape == (3, 40, 64)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 10**30, True, "x", None, [1]])
def test_refinements_take_numbers_of_their_ranges(value: Any) -> None:
    for kind, key in ((KNN, "k"), (KNN, "num_iter"), (KNN, "keep"), (PAMR, "num_iter")):
        with pytest.raises(ConfigError, match=f"{key}=.*: use .* to "):
            kind(**{key: value})
    with pytest.raises(ConfigError, match="dilations"):
        PAMR(dilations=[value])
