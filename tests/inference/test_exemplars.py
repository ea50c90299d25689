"""Classes that are shown: rows as counted by NumPy, without words and with them, kept in files."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from talk2dino import ClassEmbeddings, Exemplar, Talk2DINO
from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import DoubleMLP, ProjectionLayer
from talk2dino.calibration.calibration import Calibration
from talk2dino.calibration.rules import MeanOffset
from talk2dino.calibration.shown_classes import PATCHES, Seen, Spread, class_rows, see
from talk2dino.encoders.text import OpenClipTextEncoder
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError, DataError, ResultWarning
from talk2dino.inference.class_embeddings import KEY
from talk2dino.inference.exemplars import read_folder
from talk2dino.segmentation.scores import with_offsets
from tests.helpers.encoders import HashText, hash_model, noise_pixels
from tests.helpers.pipeline import fails, need, run
from tests.helpers.stores import CLIP

SIDE = 32  # pixels; four patches of test_vit in a window


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


@pytest.fixture(scope="module")
def wordless() -> Talk2DINO:
    """The same, but no text encoder."""
    made = hash_model()
    return Talk2DINO(made.vision, None, made.projection)


def half(pixels: torch.Tensor, right: bool = False) -> torch.Tensor:
    """A mask of the left or right half."""
    columns = torch.arange(pixels.shape[-1]) < pixels.shape[-1] // 2
    return (columns ^ right).expand(pixels.shape[-2:])


def halves(seed: int = 0) -> torch.Tensor:
    """Dark noise beside bright noise, `[3, 48, 96]` uint8."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 90, (3, 48, 96), generator=random, dtype=torch.uint8)
    pixels[:, :, 48:] += 160
    return pixels


def calibrated(model: Talk2DINO) -> Talk2DINO:
    tokens = torch.randn(300, model.vision.embed_dim, generator=torch.Generator().manual_seed(1))
    made = Talk2DINO(model.vision, model.text, model.projection)
    rows = model.embed_classes(["sky", "road"]).rows
    made.calibration = Calibration.of(
        tokens + 0.5, rows, MeanOffset(), model.vision, model.projection
    )
    return made


def test_a_patch_counts_by_its_share_inside(model: Talk2DINO) -> None:
    """Pixel by pixel, where the picture keeps its size."""
    pixels = torch.randint(0, 256, (3, SIDE, 48), dtype=torch.uint8)
    inside = torch.zeros(SIDE, 48, dtype=torch.bool)
    inside[5:20, 10:37] = True
    encoded = model.encode(pixels, SIDE).windows
    patch = model.vision.patch_size
    want = [
        inside[w.y1 + y : w.y1 + y + patch, w.x1 + x : w.x1 + x + patch].numpy().mean()
        for w in encoded.windows
        for y in range(0, SIDE, patch)
        for x in range(0, SIDE, patch)
    ]
    seen = see(encoded, inside, None)
    tokens = F.normalize(encoded.features.patch_tokens.flatten(0, 1), dim=-1)
    for mean, share in ((seen.inside, want), (seen.outside, 1 - np.array(want))):
        np.testing.assert_allclose(mean, np.average(tokens, 0, share), atol=1e-6)
    torch.testing.assert_close(seen.patches, tokens)
    one = torch.zeros_like(inside)
    one[3, 40] = True  # a single pixel of many
    shown = Exemplar(pixels, one)
    row = model.embed_exemplars(shown, SIDE)
    assert torch.equal(row, model.embed_exemplars([shown], SIDE))
    assert row.norm() == pytest.approx(1, abs=1e-5)
    for wrong in ([], [pixels], pixels, "crack", None):
        with pytest.raises(ConfigError, match=r"^exemplars=.*at least one Exemplar"):
            model.embed_exemplars(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("reference", [False, True])
def test_the_rows_are_numpys(pictures: int, reference: bool) -> None:
    """Two classes; without a reference all pictures are it, and their mean gives offsets."""
    random = np.random.default_rng(0)
    tokens = random.standard_normal((2, pictures, 20, 6)) + 1
    shares = random.random((2, pictures, 20))
    shares[1] = 1  # whole pictures: nothing is outside
    others = random.standard_normal((50, 6)) + 0.3 if reference else tokens.reshape(-1, 6)
    covariance = np.cov(others.T, bias=True)
    covariance += np.trace(covariance) / 6 * np.eye(6)
    inside = np.einsum("kpn,kpnd->kd", shares / shares.sum(-1, keepdims=True), tokens) / pictures
    rest = (1 - shares[0]) / (1 - shares[0]).sum(-1, keepdims=True)
    outside = np.einsum("pn,pnd->d", rest, tokens[0]) / pictures
    mean = others.mean(0)
    want = np.linalg.solve(covariance, (inside - [(outside + mean) / 2, mean]).T).T
    pairs = zip(torch.tensor(tokens), torch.tensor(shares), strict=True)
    seen = [[Seen.of(t, s) for t, s in zip(*pair, strict=True)] for pair in pairs]
    got, center = class_rows(seen, Spread.of(torch.tensor(others)) if reference else None)
    np.testing.assert_allclose(got, want / np.linalg.norm(want, axis=1)[:, None], atol=1e-8)
    if reference:
        assert center is None
    else:
        np.testing.assert_allclose(center, mean, atol=1e-8)


def test_a_large_picture_counts_by_some_of_its_patches() -> None:
    tokens, share = torch.randn(5 * PATCHES, 3), torch.rand(5 * PATCHES)
    seen = Seen.of(tokens, share)
    assert len(seen.patches) == PATCHES
    assert torch.equal(seen.patches[[0, -1]], tokens[[0, -1]])
    again = Seen.unpacked(seen.packed)
    assert torch.equal(again.packed, seen.packed)
    assert Seen.of(tokens, torch.ones_like(share)).outside.isnan().all()


def test_the_direction_is_that_of_a_discriminant_analysis() -> None:
    """With as many patches of either kind, and the same shrinkage of the same covariance."""
    random = np.random.default_rng(0)
    spread = np.diag([3.0, 1.0, 0.3, 0.1])
    patches = np.concatenate([random.standard_normal((200, 4)) @ spread + m for m in (0.0, 0.5)])
    labels = np.repeat([0, 1], 200)
    within = np.concatenate([patches[labels == k] - patches[labels == k].mean(0) for k in (0, 1)])
    by = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5).fit(patches, labels)
    seen = Seen.of(torch.tensor(patches), torch.tensor(labels).double())
    # (cov + trace/D) / 2 is half of each; a reference of the spread within, around the mean outside
    reference = torch.tensor(within + patches[labels == 0].mean(0))
    got = class_rows([[seen]], Spread.of(reference))[0][0].numpy()
    want = by.coef_[0] / np.linalg.norm(by.coef_[0])
    assert got @ want == pytest.approx(1, abs=1e-4)


def test_shown_classes_are_found_in_another_picture(wordless: Talk2DINO) -> None:
    shown = [halves(seed) for seed in (0, 1)]
    classes = {
        "dark": [Exemplar(pixels, half(pixels)) for pixels in shown],
        "bright": Exemplar(shown[0], half(shown[0], right=True)),
    }
    seg = wordless.segment(halves(2), classes, short_side=48)
    assert seg.classes == ["dark", "bright"]
    truth = half(seg.image, right=True).long()
    assert (seg.labels == truth).float().mean() > 0.9
    assert seg.synonyms == {"dark": (), "bright": ()}
    turned = wordless.segment(halves(2).flip(-1), classes, short_side=48)
    assert (turned.labels == 1 - truth).float().mean() > 0.9
    with pytest.raises(CheckpointError, match="does not name its text encoder"):
        wordless.segment(halves(2), {**classes, "words": "words"}, short_side=48)


def test_words_and_exemplars_are_mixed_by_weight(model: Talk2DINO) -> None:
    pixels = halves()
    given = {"none": 0.0, "some": 0.3, "all": 1.0}
    classes: dict[str, Any] = {
        name: [name, "thing", Exemplar(pixels, half(pixels), weight)]
        for name, weight in given.items()
    }
    made = model.embed_classes({"word": "word", **classes}, negatives=["sky"], short_side=SIDE)
    text = model.embed_classes(
        {"word": "word", **{name: [name, "thing"] for name in given}}, negatives=["sky"]
    )
    assert made.words == text.words and made.words.synonyms["some"] == ("some", "thing")
    shown = model.embed_exemplars([Exemplar(pixels, half(pixels))], SIDE)
    assert torch.equal(made.rows[:2], text.rows[:2])  # sky, word
    torch.testing.assert_close(made.rows[2:4], text.rows[2:4])
    torch.testing.assert_close(made.rows[6:], shown.expand(2, -1))
    want = 0.7 * text.rows[4:6] + 0.3 * shown
    torch.testing.assert_close(made.rows[4:6], want / want.norm(dim=1, keepdim=True))
    two = model.embed_classes(
        {"x": ["x", Exemplar(pixels, half(pixels), 0.2), Exemplar(pixels, half(pixels), 0.6)]},
        short_side=SIDE,
    )
    want = 0.6 * model.embed_classes(["x"]).rows[0] + 0.4 * shown
    torch.testing.assert_close(two.rows[0], want / want.norm())


def test_a_calibration_is_compared_with_and_gives_offsets(model: Talk2DINO) -> None:
    pixels = halves()
    other, exemplar = calibrated(model), Exemplar(pixels, half(pixels))
    assert other.calibration is not None
    row = other.embed_exemplars([exemplar], SIDE)
    assert not torch.allclose(row, model.embed_exemplars([exemplar], SIDE), atol=1e-2)
    vocabulary = other.open_vocabulary({"dark": exemplar, "cat": "cat"}, short_side=SIDE)
    tokens = F.normalize(other.calibration.tokens.float(), dim=-1)
    torch.testing.assert_close(vocabulary.rows[0, :-1], row)
    assert float(vocabulary.rows[0, -1]) == pytest.approx(float(row @ tokens.mean(0)), abs=1e-6)
    whole = Exemplar(pixels, torch.ones(48, 96))
    assert other.embed_exemplars([whole], SIDE).norm() == pytest.approx(1, abs=1e-5)
    with pytest.raises(DataError, match="masks cover their pictures whole"):
        model.embed_exemplars([whole], SIDE)
    flat = torch.full((3, 40, 40), 7, dtype=torch.uint8)
    same = Seen.of(F.normalize(torch.ones(4, 3), dim=1), torch.tensor([1.0, 0, 0, 1]))
    with pytest.raises(DataError, match="like all others"):
        class_rows([[same]], None)
    assert Exemplar(flat, flat[0]).read()[1].all()


def test_without_a_calibration_the_pictures_give_offsets(model: Talk2DINO, tmp_path: Path) -> None:
    """Words and shown classes less what they score there on average; a calibration's win."""
    pixels = [halves(seed) for seed in (0, 1)]
    classes: dict[str, Any] = {
        "dark": [Exemplar(one, half(one)) for one in pixels],
        "bright": ["bright", Exemplar(pixels[0], half(pixels[0], right=True))],
        "cat": "cat",
    }
    made = model.embed_classes(classes, short_side=48)
    every = [pixels[0], pixels[1], pixels[0]]  # a picture counts as often as it shows a class
    tokens = torch.cat([model.encode(one, 48).windows.features.patch_tokens for one in every])
    mean = F.normalize(tokens.flatten(0, 1), dim=-1).mean(0)
    assert made.offsets is not None
    torch.testing.assert_close(made.offsets, 2 / 3 * made.rows @ mean, atol=1e-6, rtol=0)
    alone = model.embed_classes({"dark": classes["dark"]}, short_side=48)
    mean = F.normalize(tokens[: 2 * len(tokens) // 3].flatten(0, 1), dim=-1).mean(0)
    torch.testing.assert_close(alone.offsets, alone.rows @ mean, atol=1e-6, rtol=0)
    vocabulary = model.open_vocabulary(classes, short_side=48)
    assert torch.equal(vocabulary.rows, with_offsets(made.rows, made.offsets))
    file = made.save(tmp_path / "shown.safetensors")
    assert torch.equal(model.open_vocabulary(file, short_side=48).rows, vocabulary.rows)
    chosen = ClassEmbeddings.load(file).select(["cat", "dark"]).offsets
    assert chosen is not None and torch.equal(chosen, made.offsets[[2, 0]])
    assert model.embed_classes(["cat"]).offsets is None
    other = calibrated(model)
    assert other.embed_classes(classes, short_side=48).offsets is None
    with pytest.warns(ResultWarning, match="compared with another calibration"):
        given = other.open_vocabulary(file, short_side=48).rows
    assert other.calibration is not None
    assert torch.equal(given, other.calibration.score_rows(made.rows, made.words.row_names))
    parts = load_file(file)
    for wrong in (parts["offsets"][:2], parts["offsets"].double(), parts["offsets"] / 0):
        save_file(parts | {"offsets": wrong}, tmp_path / "bad.safetensors", metadata(file))
        with pytest.raises(DataError, match=r"damaged \(offsets"):
            ClassEmbeddings.load(tmp_path / "bad.safetensors")


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_whole_pictures_are_told_from_each_other(wordless: Talk2DINO) -> None:
    """Swatches: nothing lies outside a mask, but there is another class."""
    dark, bright = halves()[:, :, :48], halves()[:, :, 48:]
    classes = {"dark": Exemplar(dark, dark[0] >= 0), "bright": Exemplar(bright, bright[0] >= 0)}
    seg = wordless.segment(halves(2), classes, short_side=48)
    truth = half(seg.image, right=True).long()
    assert (seg.labels == truth).float().mean() > 0.9
    with pytest.raises(DataError, match="masks cover their pictures whole"):
        wordless.segment(halves(2), {"dark": classes["dark"]}, short_side=48)


def test_an_image_side_is_passed(model: Talk2DINO) -> None:
    torch.manual_seed(0)
    both = Talk2DINO(model.vision, HashText(), DoubleMLP(8, 64))
    pixels = halves()
    encoded = both.encode(pixels, SIDE).windows
    with torch.no_grad():
        tokens = both.projection.project_visual(encoded.features.patch_tokens)
    seen = see(encoded, half(pixels), both.segmenter(None, False, SIDE).project_patches)
    torch.testing.assert_close(seen.patches, F.normalize(tokens.flatten(0, 1), dim=-1))
    row = both.embed_exemplars([Exemplar(pixels, half(pixels))], SIDE)
    torch.testing.assert_close(row, class_rows([[seen]], None)[0][0])


def test_exemplars_are_looked_at_once(model: Talk2DINO, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Talk2DINO(model.vision, model.text, model.projection)
    calls: list[int] = []
    forward = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda x: calls.append(len(x)) or forward(x))
    array = halves().permute(1, 2, 0).numpy().copy()
    exemplar = Exemplar(array, half(halves()).numpy())
    first = made.embed_exemplars([exemplar], SIDE)
    seen = len(calls)
    assert torch.equal(made.embed_exemplars([exemplar], SIDE), first) and len(calls) == seen
    made.shown_rows([[exemplar], [exemplar]], SIDE)  # other company, the same look
    assert len(calls) == seen
    array[:, ::5] = 255  # another picture in the same place
    assert not torch.equal(made.embed_exemplars([exemplar], SIDE), first) and len(calls) > seen


def test_a_file_of_shown_classes_needs_no_text_encoder(
    model: Talk2DINO, wordless: Talk2DINO, tmp_path: Path
) -> None:
    pixels = halves()
    exemplar = Exemplar(pixels, half(pixels))
    classes: dict[str, Any] = {"dark": exemplar, "bright": Exemplar(pixels, half(pixels, True))}
    made = wordless.embed_classes(classes, short_side=48)
    file = made.save(tmp_path / "shown.safetensors")
    with safe_open(file, framework="np") as opened:
        content = json.loads(opened.metadata()[KEY])
    assert content["made_with"]["text"] is None
    assert content["exemplars"]["dark"] == [exemplar.digest]
    assert content["rows"][0] == {"class": 0, "word": "", "sentences": []}
    want = wordless.segment(halves(1), classes, short_side=48)
    for other in (wordless, model):
        got = other.segment(halves(1), file, short_side=48)
        assert torch.equal(got.labels, want.labels) and torch.equal(got.scores, want.scores)
    loaded = ClassEmbeddings.load(file)
    assert loaded.words == made.words and loaded.exemplars == made.exemplars
    assert list(loaded.select(["bright"]).exemplars) == ["bright"]
    weights = TimmVisionEncoder("test_vit", "random", image_size=32)
    with torch.no_grad():
        next(weights.model.parameters()).add_(1)
    with pytest.raises(CheckpointError, match=r"vision encoder \(other weights of test_vit\)"):
        Talk2DINO(weights, None, wordless.projection).segment(pixels, file)
    torch.manual_seed(1)
    with pytest.raises(CheckpointError, match="another projection"):
        Talk2DINO(model.vision, None, ProjectionLayer(8, 64)).segment(pixels, file)


def test_masks_of_every_kind(tmp_path: Path) -> None:
    pixels = halves()
    inside = half(pixels).numpy()
    Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "gray.png")
    Image.fromarray(inside.astype(np.uint8)).save(tmp_path / "values.png")
    Image.fromarray(inside).save(tmp_path / "bits.png")
    kinds = [
        *(tmp_path / name for name in ("gray.png", "values.png", "bits.png")),
        *(str(tmp_path / "gray.png"), Image.open(tmp_path / "gray.png")),
        *(inside, inside.astype(np.float32), torch.tensor(inside), torch.tensor(inside) * 3),
    ]
    digests = {Exemplar(pixels, mask).digest for mask in kinds}
    assert len(digests) == 1
    assert Exemplar(pixels, ~inside).digest not in digests
    assert Exemplar(pixels, inside, 0.25).digest not in digests
    assert Exemplar(pixels.flip(0), inside).digest not in digests


def test_masks_stand_as_their_pictures_do(tmp_path: Path) -> None:
    """A mask that Pillow opened is turned by its tag; one without a tag beside a turned picture."""
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down
    pixels = Image.fromarray(halves().permute(1, 2, 0).numpy())
    pixels.save(tmp_path / "turned.jpg", exif=tag)
    mask = Image.fromarray(half(halves()).numpy())
    mask.save(tmp_path / "turned.png", exif=tag)
    by_path = Exemplar(pixels, tmp_path / "turned.png").read()[1]
    assert torch.equal(by_path, half(halves(), right=True))
    assert torch.equal(Exemplar(pixels, Image.open(tmp_path / "turned.png")).read()[1], by_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Exemplar(tmp_path / "turned.jpg", tmp_path / "turned.png").read()
        Exemplar(pixels, mask).read()
    for picture in (tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")):
        for alone in (mask, np.asarray(mask)):
            with pytest.warns(ResultWarning, match="an EXIF tag turns its picture, and not"):
                Exemplar(picture, alone).read()


def test_a_picture_may_be_called_like_a_mask(tmp_path: Path) -> None:
    save_pair(tmp_path / "face", "face_mask", halves(), half(halves()))
    save_pair(tmp_path / "face", "b", halves(1), half(halves()))
    found = read_folder(tmp_path)["face"]
    masks = {Path(str(one.mask)).name for one in found}
    assert masks == {"b_mask.png", "face_mask_mask.png"}


def test_exemplars_that_are_refused(model: Talk2DINO, tmp_path: Path) -> None:
    pixels = halves()
    inside = half(pixels)
    Image.fromarray(inside.numpy()).convert("L").save(tmp_path / "m.jpg")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "m.png")
    refused: list[tuple[Any, str]] = [
        (inside[:-1], "47x96 pixels .* but its picture has 48x96; give a mask of the same size"),
        (inside & False, "mask of an exemplar: is empty"),
        (tmp_path / "no.png", r"no\.png: no such file"),
        (tmp_path / "m.jpg", "JPEG changes pixels; save the mask as PNG"),
        (tmp_path / "m.png", "a RGB picture, not a label map; save the mask with one channel"),
        (pixels, r"\(3, 48, 96\); give \[H, W\]"),
        ("", "no such file"),
        (None, "give"),
    ]
    for mask, said in refused:
        with pytest.raises(DataError, match=said) as error:
            model.segment(pixels, {"x": Exemplar(pixels, mask)})
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        model.segment(pixels, {"x": Exemplar(tmp_path / "no.jpg", inside)})
    for weight in (-0.1, 1.5, float("nan"), "1"):
        with pytest.raises(ConfigError, match=r"weight=.*use 0 to 1"):
            Exemplar(pixels, inside, weight)  # type: ignore[arg-type]
    nameless: Any = [Exemplar(pixels, inside)]
    for classes in (nameless, [nameless]):
        with pytest.raises(ConfigError, match="an exemplar has no name"):
            model.segment(pixels, classes)
    with pytest.raises(ConfigError, match="empty name"):
        model.segment(pixels, {"x": []})


# --- the commands -----------------------------------------------------------------------------


def save_pair(folder: Path, name: str, pixels: torch.Tensor, mask: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(folder / f"{name}_mask.png")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose text encoder cannot be built, a picture, and exemplars of two classes."""
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    text = OpenClipTextEncoder(CLIP, "random", templates="plain")
    torch.manual_seed(0)
    psi = ProjectionLayer(text.embed_dim, vision.embed_dim)
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    save_projection(psi, tmp_path / "psi.safetensors", specs)
    pixels = halves()
    save_pair(tmp_path / "shown" / "dark", "a", pixels, half(pixels))
    save_pair(tmp_path / "shown" / "dark", "b", halves(1), half(pixels))
    save_pair(tmp_path / "shown" / "bright", "a", pixels, half(pixels, right=True))
    Image.fromarray(halves(2).permute(1, 2, 0).numpy()).save(tmp_path / "p.png")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a text encoder was built")

    monkeypatch.setattr(OpenClipTextEncoder, "__init__", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = ("checkpoint=psi.safetensors", "accelerator=cpu", "short_side=48", "hydra.run.dir=run")
SEGMENT = ("segment", *GIVEN, "image=p.png", "pamr=false")


def test_a_folder_of_exemplars(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*SEGMENT, "exemplars=shown", "output=out.png", "resume=true")
    labels = torch.from_numpy(np.array(Image.open("out_labels.png")).astype(int))
    assert (labels == half(labels).long()).float().mean() > 0.9  # bright, dark: by name
    figures = json.loads(Path("out.json").read_text())
    assert [one["name"] for one in figures["classes"]] == ["bright", "dark"]
    found = read_folder("shown")
    digests = {name: [one.digest for one in shown] for name, shown in found.items()}
    assert figures["settings"]["exemplars"] == digests and len(digests["dark"]) == 2

    run(*SEGMENT, "exemplars=shown", "output=out.png", "resume=true")
    assert "1 of 1 pictures were done before" in capfd.readouterr().out
    for ending in (".png", "_mask.png"):
        Path(f"shown/dark/a{ending}").rename(f"shown/dark/z{ending}")
    assert [one.digest for one in read_folder("shown")["dark"]] == digests["dark"]
    run(*SEGMENT, "exemplars=shown", "output=out.png", "resume=true")
    assert "1 of 1 pictures were done before" in capfd.readouterr().out
    for change in ("another mask", "another weight"):
        if change == "another mask":
            save_pair(Path("shown/dark"), "b", halves(1), half(halves()) & (torch.arange(96) > 9))
        weight = 0.4 if change == "another weight" else 0.5
        run(*SEGMENT, "exemplars=shown", f"exemplar_weight={weight}", "output=out.png",
            "resume=true")  # fmt: skip
        assert "were done before" not in capfd.readouterr().out, change

    with pytest.warns(ResultWarning, match=r"exemplar_weight=0\.4: no class has both words and"):
        run("embed", *GIVEN, "exemplars=shown", "exemplar_weight=0.4", "output=shown.safetensors")
    assert "2 classes, 2 rows of width 64" in capfd.readouterr().out
    before = Path("out_labels.png").read_bytes()
    run(*SEGMENT, "classes=shown.safetensors", "output=file.png")
    assert Path("file_labels.png").read_bytes() == before
    said = fails(capfd, *SEGMENT, "classes=shown.safetensors", "exemplars=shown")
    assert "are embedded already; give the exemplars to talk2dino.embed" in said


def test_annotations_name_the_words_only(place: Path) -> None:
    need("pycocotools", "cv2", "shapely")
    run(*SEGMENT, "exemplars=shown", "output=out.png", "formats=[coco]")
    coco = json.loads(Path("out_annotations/coco/instances.json").read_text())
    assert [(c["name"], c["synonyms"]) for c in coco["categories"]] == [
        ("bright", []),
        ("dark", []),
    ]


def test_onnx_files_of_shown_classes(place: Path) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    run("embed", *GIVEN, "exemplars=shown", "output=shown.safetensors")
    run(
        *("export", GIVEN[0], "classes=shown.safetensors", "output=shown.onnx"),
        *(f"image_size={SIDE}", "hydra.run.dir=run"),
    )
    network = onnxruntime.InferenceSession("shown.onnx", providers=["CPUExecutionProvider"])
    picture = noise_pixels()[:, :SIDE, :SIDE]
    got = network.run(None, {"image": (picture[None].float() / 255).numpy()})[0]
    model = Talk2DINO.from_pretrained("psi.safetensors", device="cpu")
    want = model.segment(picture, "shown.safetensors", short_side=SIDE).scores
    np.testing.assert_allclose(got[0], want.numpy(), atol=1e-4)


def test_a_name_in_both_is_one_class(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place)
    run("embed", *GIVEN, "classes=[cat,[dark,gloomy]]", "exemplars=shown", "output=x.safetensors")
    made = ClassEmbeddings.load("x.safetensors")
    assert made.words.synonyms == {"cat": ("cat",), "dark": ("dark", "gloomy"), "bright": ()}
    assert {name: len(shown) for name, shown in made.exemplars.items()} == {"dark": 2, "bright": 1}
    model = Talk2DINO.from_pretrained("psi.safetensors", device="cpu")
    text = model.embed_classes(["cat", ["dark", "gloomy"]]).rows
    (place / "shown" / "dark").rename(place / "shown" / "cafe\u0301")  # as macOS writes it
    run("embed", *GIVEN, "classes=[café]", "exemplars=shown", "output=y.safetensors")
    assert ClassEmbeddings.load("y.safetensors").words.synonyms == {"café": ("café",), "bright": ()}
    folder = read_folder("shown")
    shown = model.shown_rows([folder["café"], folder["bright"]], 48)[0][0]
    torch.testing.assert_close(made.rows[0], text[0])
    torch.testing.assert_close(made.rows[1:3], F.normalize(text[1:] + shown, dim=1))


def test_a_negative_is_no_class_that_is_shown(model: Talk2DINO) -> None:
    exemplar = Exemplar(halves(), half(halves()))
    for classes in ({"caf\u00e9": exemplar, "sky": "sky"}, {"caf\u00e9": [exemplar], "sky": "sky"}):
        with pytest.raises(
            ConfigError, match="negatives: 'caf\u00e9' is also a class that is shown"
        ):
            model.segment(halves(), classes, negatives=["cafe\u0301"], short_side=SIDE)
    said: dict[str, Any] = {"thing": ["word", exemplar], "sky": "sky"}  # its name is no word of it
    model.embed_classes(said, negatives=["thing"], short_side=SIDE)
    with pytest.raises(ConfigError, match="'word' is also a word of the class 'thing'"):
        model.embed_classes(said, negatives=["word"], short_side=SIDE)


def test_folders_that_are_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(said: str, weight: float = 0.5) -> None:
        with pytest.raises((DataError, ConfigError)) as error:
            read_folder("bad", weight)
        assert said in str(error.value) and "\n" not in str(error.value), error.value

    bad = place / "bad"
    refused("exemplars=bad: no such folder; a folder per class holds pictures and masks")
    bad.mkdir()
    (bad / ".hidden").mkdir()
    refused("holds no folder of a class")
    for name in ("dark\nred", os.fsdecode(b"dark\xff")):
        (bad / name).mkdir()
        refused("a folder: 'dark\\")
        (bad / name).rmdir()
    for name in ("dark", "dark "):
        save_pair(bad / name, "a", halves(), half(halves()))
    refused("two folders are called 'dark'")
    shutil.rmtree(bad / "dark ")
    shutil.rmtree(bad / "dark")
    (bad / "dark").mkdir()
    refused("dark holds no pictures")
    pixels = halves()
    save_pair(bad / "dark", "a", pixels, half(pixels)[:, :50])
    refused("a_mask.png: 48x50 pixels (rows x columns), but its picture has 48x96")
    save_pair(bad / "dark", "a", pixels, half(pixels) & False)
    refused("a_mask.png: is empty")
    refused("exemplar_weight=2.0: use 0 to 1", 2.0)
    (bad / "dark" / "a_mask.png").rename(bad / "dark" / "c_mask.png")
    refused("dark/a.png needs a mask of its own, a_mask.png")
    save_pair(bad / "dark", "a", pixels, half(pixels))
    refused("dark/c_mask.png has no picture c.jpg beside it")
    (bad / "dark" / "c_mask.png").unlink()
    (bad / "dark" / "a.jpg").write_bytes((bad / "dark" / "a.png").read_bytes())
    refused("needs a mask of its own")  # a.jpg and a.png share one
    (bad / "dark" / "a.jpg").unlink()
    (bad / "dark" / "a_mask.png").unlink()
    refused("dark holds no masks")
    save_pair(bad / "dark", "a", pixels, half(pixels))
    (bad / "dark" / "a.png").write_bytes(b"")
    refused("a.png: cannot be read as an image")
    save_pair(bad, "b", pixels, half(pixels))
    refused("b.png lies in no folder of a class")
    for name in ("b.png", "b_mask.png"):
        (bad / name).unlink()
    (bad / "gone").symlink_to(bad / "nowhere")
    refused("gone is a link that leads nowhere")
    (bad / "gone").unlink()
    (bad / "dark" / "site").mkdir()
    refused("dark/site is a folder, in which nothing is read")
    (bad / "dark" / "site").rmdir()
    (bad / "dark" / "link.png").symlink_to(bad / "dark" / "link.png")
    refused("dark/link.png needs a mask of its own")  # a loop, which is not left out
    (bad / "dark" / "link.png").unlink()
    save_pair(bad, "b", pixels, half(pixels))
    missing = ("segment", "checkpoint=none.safetensors", "image=p.png")
    assert "b.png lies in no folder" in fails(capfd, *missing, "exemplars=bad")  # checkpoint unread
    said = fails(capfd, *missing)
    assert "classes=… not given" in said


def test_shown_beside_said_needs_a_calibration_and_says_so(model: Talk2DINO) -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = 200
    shown = {"left": Exemplar(image, image[0] == 0)}
    with pytest.warns(ResultWarning, match="hardly ever wins against words"):
        model.segment(image, {**shown, "sky": "sky"}, short_side=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        model.segment(image, {**shown, "right": Exemplar(image, image[0] > 0)}, short_side=64)
        model.segment(image, ["sky", "sea"], short_side=64)


def test_an_exemplar_that_is_settled_is_not_read_again() -> None:
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    exemplar = Exemplar(pixels, mask, 0.3)
    kept, before = exemplar.settled(), exemplar.digest
    pixels += 1
    assert kept.digest == before != exemplar.digest
    assert kept.weight == 0.3 and kept.settled().digest == before
    assert int(kept.read()[0].max()) == 0


def test_pictures_and_masks_whose_names_differ_in_case_are_pairs(tmp_path: Path) -> None:
    pixels = halves()
    save_pair(tmp_path / "shown" / "a", "x", pixels, half(pixels))
    folder = tmp_path / "shown" / "a"
    for before, after in (("x.png", "CAF\u00c9.PNG"), ("x_mask.png", "cafe\u0301_MASK.PNG")):
        (folder / before).rename(folder / after)
    for name in ("Thumbs.db", ".DS_Store", "._x.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    assert [one.digest for one in read_folder(tmp_path / "shown")["a"]] == [
        Exemplar(pixels, half(pixels)).digest
    ]


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_of_photographs_that_an_exif_tag_turns(orientation: int, tmp_path: Path) -> None:
    """They are drawn on the upright picture; where a size cannot tell, that is said."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, inside = halves(), half(halves())
    turns = {3: 2, 6: -1}[orientation]
    photo, mask = tmp_path / "a.png", tmp_path / "a_mask.png"
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(photo, exif=exif)
    upright = np.ascontiguousarray(np.rot90(inside.numpy(), turns))
    Image.fromarray(upright).save(mask)
    if orientation == 3:
        for given in ((photo, mask), (photo.read_bytes(), mask.read_bytes())):
            with pytest.warns(ResultWarning, match="an EXIF tag turns its picture, and not the"):
                found = Exemplar(*given).read()
            assert np.array_equal(found[1], upright)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResultWarning)
            assert np.array_equal(Exemplar(photo, mask).read()[1], upright)
        Image.fromarray(inside.numpy()).save(mask)
        with pytest.raises(DataError, match="mask of the same size; an EXIF tag turns one of them"):
            Exemplar(photo, mask).read()
    Image.fromarray(inside.numpy()).save(mask, exif=exif)  # the same tag in both
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResultWarning)
        assert np.array_equal(Exemplar(photo, mask).read()[1], upright)


def test_a_shown_class_that_is_nearly_said_elsewhere_is_said(model: Talk2DINO) -> None:
    exemplar = Exemplar(halves(), half(halves()))
    for classes, said in (
        ({"Rust": exemplar, "rust": "rust"}, "'Rust' is shown, and 'rust' stands for another"),
        (
            {"sofa": ["sofa", "couch"], "couch": exemplar},
            "'couch' stands for another class, 'sofa'",
        ),
        ({"Rust": exemplar, "rust": Exemplar(halves(1), half(halves()))}, "'rust' stands for"),
    ):
        with pytest.warns(ResultWarning, match=said):
            model.open_vocabulary(classes, short_side=SIDE)  # type: ignore[arg-type]
        with pytest.warns(ResultWarning, match=said) as caught:  # looks for exemplars twice
            model.embed_classes(classes, short_side=SIDE)  # type: ignore[arg-type]
        texts = [str(one.message) for one in caught]
        assert len(texts) == len(set(texts))


def test_masks_are_taken_for_what_they_show(tmp_path: Path) -> None:
    """Palettes by color, soft or labeled masks with a warning, NaN and lists not at all."""
    picture = np.zeros((4, 6, 3), np.uint8)
    inside = np.arange(6) < 2 + np.zeros((4, 1))
    white_first = Image.fromarray(np.uint8(~inside), "P")
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    white_first.save(tmp_path / "mask.png")
    for mask in (white_first, tmp_path / "mask.png", torch.tensor(inside).bfloat16()):
        assert np.array_equal(Exemplar(picture, mask).read()[1], inside)
    grad = torch.tensor(inside, dtype=torch.float32, requires_grad=True)
    assert np.array_equal(Exemplar(picture, grad).read()[1], inside)
    with pytest.warns(ResultWarning, match=r"holds 3 values \(0, 1, 2, …\); all but 0"):
        Exemplar(picture, np.uint8(inside) + np.uint8(np.arange(6) < 1)).read()
    with pytest.raises(DataError, match="holds 1 and 2 and no 0, so all of the picture would be"):
        Exemplar(picture, np.uint8(inside) + np.uint8(1)).read()
    for wrong in (np.where(inside, np.nan, 0), inside.tolist(), [[1], [1, 2]], grad.to_sparse()):
        with pytest.raises(DataError, match=r"mask of an exemplar: .*give \[H, W\]"):
            Exemplar(picture, wrong).read()
