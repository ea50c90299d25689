"""Offsets of words: counted by hand, kept in a file, refused where they do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from talk2dino import Talk2DINO
from talk2dino.alignment.projection import DoubleMLP, ProjectionLayer
from talk2dino.calibration.background_threshold import Background
from talk2dino.calibration.calibration import KEY, Calibration, beside, find_calibration
from talk2dino.calibration.rules import (
    MeanOffset,
    QuantileOffset,
    UnmentionedOffset,
    build_rule,
    describe_rule,
    upper_quantile,
)
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.errors import CheckpointError, ConfigError
from talk2dino.segmentation import KNN
from talk2dino.segmentation.scores import class_scores, split_offsets, with_offsets
from tests.helpers.encoders import HashText, hash_model, noise_pixels

CLASSES = ["cat", ["dog", "wolf"], "sun"]
BACK = Background(0.51, 0.45)


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    return hash_model()


def calibration_of(model: Talk2DINO, share: float = 0.5, quantile: float = 0.95) -> Calibration:
    tokens = torch.randn(300, model.vision.embed_dim, generator=torch.Generator().manual_seed(1))
    rows = model.embed_classes(["sky", "tree", "road"]).rows
    rule = QuantileOffset(share, quantile)
    return Calibration.of(tokens, rows, rule, model.vision, model.projection, {"seed": 1})


def with_calibration(model: Talk2DINO, calibration: Calibration | None) -> Talk2DINO:
    made = Talk2DINO(model.vision, model.text, model.projection)
    made.calibration = calibration
    return made


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.95, 0.999, 1.0])
def test_quantile_is_numpys(quantile: float) -> None:
    values = torch.randn(5, 101)
    want = np.quantile(values.numpy().astype(np.float64), quantile, axis=1)
    np.testing.assert_allclose(upper_quantile(values, quantile), want, atol=1e-6)


def test_offsets_and_scores_as_counted_by_numpy(model: Talk2DINO) -> None:
    calibration = calibration_of(model, share=0.7, quantile=0.9)
    rows = model.embed_classes(CLASSES).rows
    got_rows, offsets = calibration.apply(rows)
    tokens = calibration.tokens.numpy().astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    want = 0.7 * np.quantile(rows.numpy() @ tokens.T, 0.9, axis=1)
    np.testing.assert_allclose(offsets, want, atol=1e-6)
    assert torch.equal(got_rows, rows)

    patches = np.random.default_rng(0).standard_normal((6, rows.shape[1]))
    unit = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    scores = 1 / (1 + np.exp(want[:, None] - rows.numpy() @ unit.T))
    text = calibration.score_rows(rows, [None] * 4)
    got = class_scores(torch.tensor(patches, dtype=torch.float32)[None], text, (2, 3))
    np.testing.assert_allclose(got[0].flatten(1), scores, atol=1e-6)


def test_a_row_gets_its_offset_whatever_its_company(model: Talk2DINO) -> None:
    calibration = calibration_of(model)
    rows = F.normalize(torch.randn(600, model.vision.embed_dim), dim=-1)
    together = calibration.apply(rows)[1]
    for place in (0, 255, 256, 599):
        torch.testing.assert_close(
            calibration.apply(rows[place : place + 1])[1][0], together[place]
        )


def test_nothing_subtracted_is_nothing_changed(model: Talk2DINO) -> None:
    picture = model.encode(noise_pixels())
    fresh = with_calibration(model, None)  # which embeds all words together, as the other does
    plain = fresh.segment(picture, CLASSES, background=0.5, negatives=["moon"])
    off = with_calibration(model, calibration_of(model, share=0.0))
    same = off.segment(picture, CLASSES, 0.5, negatives=["moon"], refinement=None)
    assert torch.equal(same.scores, plain.scores)
    assert torch.equal(same.labels, plain.labels)


def test_scores_are_spread_where_they_are_calibrated(model: Talk2DINO) -> None:
    picture, calibration = model.encode(noise_pixels()), calibration_of(model)
    for given, usual, other in ((None, None, KNN()), (calibration, KNN(), None)):
        made = with_calibration(model, given)
        found = made.segment(picture, CLASSES).scores
        assert torch.equal(found, made.segment(picture, CLASSES, refinement=usual).scores)
        assert not torch.equal(found, made.segment(picture, CLASSES, refinement=other).scores)


def test_offsets_stay_with_their_rows() -> None:
    rows, offsets = torch.randn(5, 4), torch.randn(5)
    text = with_offsets(rows, offsets)
    chosen = torch.tensor([4, 1])
    got = split_offsets(text[chosen], 4)
    assert torch.equal(got[0], rows[chosen])
    assert got[1] is not None and torch.equal(got[1], offsets[chosen])
    assert split_offsets(rows, 4) == (rows, None)


def test_accents_written_in_two_ways_are_one_class(model: Talk2DINO) -> None:
    fitted = replace(calibration_of(model), class_offsets={"fene\u0302tre": 0.25})
    rows = torch.randn(2, fitted.tokens.shape[1])
    _, offsets = fitted.apply(rows)
    got = fitted.score_rows(rows, ["fen\u00eatre", None])[:, -1]
    torch.testing.assert_close(got - offsets, torch.tensor([0.25, 0.0]))


def test_offset_of_a_class_counts_for_its_synonyms_only(model: Talk2DINO) -> None:
    calibration = calibration_of(model)
    own = with_calibration(model, replace(calibration, class_offsets={"dog": 0.25, "moon": 9.0}))
    before = with_calibration(model, calibration).open_vocabulary(CLASSES, negatives=["moon"])
    after = own.open_vocabulary(CLASSES, negatives=["moon"])
    moved = (after.rows - before.rows)[:, -1]
    assert after.words.row_words == ("moon", "cat", "dog", "wolf", "sun")
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.0, 0.25, 0.25, 0.0]))
    assert torch.equal(after.rows[:, :-1], before.rows[:, :-1])


def test_the_reference_passes_the_image_side() -> None:
    vision = TimmVisionEncoder("test_vit", "random", image_size=32)
    psi = DoubleMLP(8, vision.embed_dim).eval()
    calibration = calibration_of(Talk2DINO(vision, HashText(), psi))
    rows = F.normalize(torch.randn(3, vision.embed_dim), dim=-1)
    tokens = F.normalize(psi.project_visual(calibration.tokens.float()), dim=-1)
    want = 0.5 * torch.quantile(rows @ tokens.t(), 0.95, dim=1)
    torch.testing.assert_close(calibration.apply(rows, psi)[1], want)


def test_a_file_gives_the_same_scores(model: Talk2DINO, tmp_path: Path) -> None:
    made = replace(calibration_of(model), background=BACK, class_offsets={"cat": -0.1})
    path = made.save(tmp_path / "new" / "calibration.safetensors")
    read = Calibration.load(path)
    assert read.digest == made.digest
    assert (read.background, read.class_offsets, read.facts) == (BACK, {"cat": -0.1}, {"seed": 1})
    one, two = (with_calibration(model, c).segment(noise_pixels(), CLASSES) for c in (made, read))
    assert torch.equal(one.scores, two.scores)
    read.check(model.vision, model.projection)
    assert (
        replace(made, background=None).digest
        != made.digest
        != replace(made, rule=QuantileOffset(0.4)).digest
    )
    made.save(path)  # one of ours may be replaced


def test_somebody_elses_file_is_not_overwritten(model: Talk2DINO, tmp_path: Path) -> None:
    other = tmp_path / "calibration.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    before = other.read_bytes()
    with pytest.raises(ConfigError, match=r"not written by talk2dino\.calibrate"):
        calibration_of(model).save(other)
    assert other.read_bytes() == before
    with pytest.raises(ConfigError, match="must end in"):
        calibration_of(model).save(tmp_path / "x.pt")


def test_the_background_that_was_chosen_is_the_default(model: Talk2DINO) -> None:
    """Halfway between threshold and lowest score for a weight of one; `segment` cleans by 0.2."""
    chosen = replace(calibration_of(model), background=BACK)
    assert BACK.after_cleaning(1.0) == pytest.approx(0.48)
    assert (chosen.background_score(False, 0.2), calibration_of(model).background) == (0.51, None)
    threshold = with_calibration(model, chosen).open_vocabulary(CLASSES, True).threshold
    assert threshold == pytest.approx((0.51 + 0.2 * 0.45) / 1.2)
    assert with_calibration(model, chosen).open_vocabulary(CLASSES, 0.6).threshold == 0.6
    assert with_calibration(model, None).open_vocabulary(CLASSES, True).threshold == 0.55


def test_another_model_is_refused(model: Talk2DINO) -> None:
    calibration = calibration_of(model)
    other = ProjectionLayer(8, model.vision.embed_dim)
    other.linear_layer.bias.data += 1
    with pytest.raises(CheckpointError, match=r"another projection .* calibration=none"):
        calibration.check(model.vision, other)
    changed = TimmVisionEncoder("test_vit", "random", image_size=32)
    changed.model.norm.weight.data += 1
    with pytest.raises(CheckpointError, match="another vision encoder"):
        calibration.check(changed, model.projection)
    last = TimmVisionEncoder("test_vit", "random", image_size=32, layers=[-1])
    with pytest.raises(CheckpointError, match=r"vision\.layers=null, not of \[5\]"):
        calibration.check(last, model.projection)


def test_pretrained_folder_carries_it(model: Talk2DINO, tmp_path: Path) -> None:
    calibrated = with_calibration(model, calibration_of(model))
    calibrated.save_pretrained(tmp_path)
    assert "calibration: rule | QuantileOffset" in (tmp_path / "README.md").read_text()
    found = Talk2DINO.from_pretrained(tmp_path, "cpu", text=HashText())
    assert found.calibration is not None
    want = calibrated.segment(noise_pixels(), CLASSES)
    assert torch.equal(found.segment(noise_pixels(), CLASSES).scores, want.scores)
    for setting in (None, "none"):
        off = Talk2DINO.from_pretrained(tmp_path, "cpu", text=HashText(), calibration=setting)
        assert off.calibration is None
    (tmp_path / "else").mkdir()
    moved = (tmp_path / "calibration.safetensors").rename(tmp_path / "else" / "c.safetensors")
    assert Talk2DINO.from_pretrained(tmp_path, "cpu", text=HashText()).calibration is None
    other = Talk2DINO.from_pretrained(tmp_path, "cpu", text=HashText(), calibration=moved)
    assert other.calibration is not None and other.calibration.digest == found.calibration.digest
    assert beside(tmp_path / "projection.safetensors") == tmp_path / "calibration.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        find_calibration(tmp_path / "absent.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"rule": {"_target_": "os.system"}}, "names the rule 'os.system'"),
        ({"rule": {"_target_": "talk2dino.calibration.rules.QuantileOffset", "x": 1}}, "built"),
        ({"background": {"threshold": 2, "lowest": 0}}, "within 0..1"),
        ({"background": 0.5}, "damaged"),
        ({"made_with": {}}, "damaged"),
        ({"class_offsets": [1]}, "damaged"),
    ],
)
def test_damaged_files_are_one_line(
    change: dict[str, object], message: str, model: Talk2DINO, tmp_path: Path
) -> None:
    made = calibration_of(model)
    path = tmp_path / "calibration.safetensors"
    parts = {"tokens": made.tokens, "vocabulary": made.vocabulary}
    save_file(parts, path, {KEY: json.dumps(made._entry() | change)})
    with pytest.raises(CheckpointError, match=message) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_none(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "z.safetensors", {KEY: "[" * 100_000})
    (tmp_path / "y.safetensors").write_text("no tensors")
    said = {"x": "holds no calibration", "y": "not a safetensors file", "z": "damaged"}
    for name, message in said.items():
        with pytest.raises(CheckpointError, match=message):
            Calibration.load(tmp_path / f"{name}.safetensors")


def test_only_known_rules_are_built() -> None:
    rule = QuantileOffset(0.25, 0.9)
    assert build_rule(describe_rule(rule), "here") == rule
    with pytest.raises(ConfigError, match="QuantileOffset"):
        describe_rule(object())
    with pytest.raises(ConfigError, match=r"rule.share=1.5: use 0 to 1"):
        QuantileOffset(1.5)


def test_pictures_that_speak_of_a_word_do_not_count(model: Talk2DINO, tmp_path: Path) -> None:
    """Counted by NumPy; kept in a file, part of the digest, and nothing more without captions."""
    tokens = torch.randn(300, model.vision.embed_dim, generator=torch.Generator().manual_seed(1))
    words = model.embed_classes(["sky", "tree", "road"]).rows
    said = torch.rand(3, 300, generator=torch.Generator().manual_seed(2)) < 0.5
    of = Calibration.of(
        tokens, words, UnmentionedOffset(0.8), model.vision, model.projection, unmentioned=said
    )
    rows = model.embed_classes(CLASSES).rows
    unit = of.tokens.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    near = of.vocabulary.double().numpy()
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    means = np.stack([unit[flags].mean(0) for flags in said.numpy()])
    alike = np.exp(rows.numpy() @ near.T / 0.05)
    alike /= alike.sum(1, keepdims=True)
    want = 0.8 * (rows.numpy() * (alike @ means)).sum(1)
    np.testing.assert_allclose(of.apply(rows)[1], want, atol=1e-5)
    again = Calibration.load(of.save(tmp_path / "c.safetensors"))
    assert again.digest == of.digest and torch.equal(again.apply(rows)[1], of.apply(rows)[1])
    without = replace(of, unmentioned=None)
    assert without.digest != of.digest
    plain = replace(without, rule=MeanOffset(0.8))
    assert torch.equal(without.apply(rows)[1], plain.apply(rows)[1])


def test_a_damaged_table_of_mentions_is_one_line(model: Talk2DINO, tmp_path: Path) -> None:
    of = calibration_of(model)
    for said in (
        torch.zeros(3, 300, dtype=torch.bool),  # a word without a token
        torch.ones(2, 300, dtype=torch.bool),
        torch.ones(3, 300),
    ):
        path = replace(of, unmentioned=said).save(tmp_path / "c.safetensors")
        with pytest.raises(CheckpointError, match=r"c\.safetensors: damaged \(unmentioned"):
            Calibration.load(path)


def test_the_mean_rule_compares_with_tokens_without_their_mean(model: Talk2DINO) -> None:
    made = replace(calibration_of(model), rule=MeanOffset())
    assert build_rule(describe_rule(made.rule), "here") == made.rule
    rows = model.encode_text(["a cat", "a red car", "grass"])
    same, offsets = made.apply(rows)
    assert torch.equal(same, rows)
    tokens = made.reference().tokens
    centered = rows @ (tokens - tokens.mean(dim=0)).t()
    torch.testing.assert_close(rows @ tokens.t() - offsets[:, None], centered)
    assert torch.equal(replace(made, rule=MeanOffset(0.0)).apply(rows)[1], torch.zeros(3))
    with pytest.raises(ConfigError, match=r"rule.share=-1: use 0 to 1"):
        MeanOffset(-1)
