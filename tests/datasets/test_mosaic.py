"""Mosaic scenes: the same for a seed, exact label maps, and held-out pixels that stay unseen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from talk2dino.datasets import mosaic
from talk2dino.datasets.mosaic import CONCEPTS, MosaicScenes, open_photo, split_canvas
from talk2dino.errors import DataError
from tests.helpers.pipeline import need


@pytest.fixture(autouse=True)
def _photographs() -> None:
    need("skimage", "sklearn")


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    few, many = MosaicScenes(count=3, seed=4), MosaicScenes(count=300, seed=4)
    for index in (2, 0):  # in any order
        one, other = few[index], many[index]
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.captions == other.captions
    assert not np.array_equal(MosaicScenes(seed=5)[0].image, many[0].image)
    assert not np.array_equal(MosaicScenes("heldout", seed=4)[0].image, many[0].image)
    assert not np.array_equal(many[1].image, many[0].image)


def test_iteration_ends_and_outside_is_an_error() -> None:
    scenes = MosaicScenes(count=2, height=32, width=48)
    assert len(list(scenes)) == 2
    assert scenes[1].image.shape == (32, 48, 3)
    with pytest.raises(IndexError):
        scenes[2]


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda c: c.name)
def test_held_out_pixels_are_never_in_a_training_crop(concept: mosaic.Concept) -> None:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = concept.train, concept.heldout
    assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
    width, height = open_photo(concept).size
    for x0, y0, x1, y1 in (concept.train, concept.heldout):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


def test_captions_name_concepts_of_the_scene_only() -> None:
    scenes = MosaicScenes(count=60, height=32, width=32)
    phrases = [c.phrase for c in CONCEPTS]
    for scene in scenes:
        present = {int(label) for label in np.unique(scene.labels)}
        assert 2 <= len(present) <= 4
        assert len(scene.captions) == 5
        for caption in scene.captions:
            # "a page of text" contains no other phrase, nor does any other
            named = {i for i, phrase in enumerate(phrases) if phrase in caption}
            assert named
            assert named <= present, caption


def test_label_maps_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With photographs of one color each, the picture itself says what every pixel shows."""
    colors = [(7 * i + 5, 255 - 9 * i, 3 * i) for i in range(len(CONCEPTS))]

    def flat(concept: mosaic.Concept) -> Image.Image:
        return Image.new("RGB", (2000, 2000), colors[CONCEPTS.index(concept)])

    monkeypatch.setattr(mosaic, "open_photo", flat)
    for scene in MosaicScenes("heldout", count=8, height=60, width=90):
        np.testing.assert_array_equal(scene.image, np.array(colors)[scene.labels])


def test_scenes_show_the_part_of_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(concept: mosaic.Concept) -> Image.Image:
        picture = Image.new("L", (2000, 2000), 100)
        picture.paste(200, concept.train)
        picture.paste(30, concept.heldout)
        return picture.convert("RGB")

    monkeypatch.setattr(mosaic, "open_photo", halves)
    assert {int(v) for s in MosaicScenes("train", 20) for v in np.unique(s.image)} == {200}
    assert {int(v) for s in MosaicScenes("heldout", 20) for v in np.unique(s.image)} == {30}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_rectangles_cover_the_canvas_once(number: int) -> None:
    covered = np.zeros((50, 70), int)
    boxes = split_canvas(50, 70, number, np.random.default_rng(0))
    for y0, x0, y1, x1 in boxes:
        covered[y0:y1, x0:x1] += 1
    assert len(boxes) == number
    assert (covered == 1).all()


def test_wrong_settings_are_one_line() -> None:
    with pytest.raises(DataError, match=r"split='test'; choose one of train, heldout"):
        MosaicScenes("test")
    with pytest.raises(DataError, match="max_regions=5"):
        MosaicScenes(max_regions=5)


def test_absent_photographs_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"talk2dino\[quickstart\]"):
        MosaicScenes()[0]
