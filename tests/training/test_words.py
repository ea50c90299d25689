"""Training on words of the captions through the entry point, with a real text encoder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from talk2dino import load_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.alignment.similarity import Dense, MaxScore, Similarity
from talk2dino.alignment.word_loss import WordLoss, WordOptions
from talk2dino.encoders.text import OpenClipTextEncoder
from talk2dino.errors import ConfigError
from talk2dino.features import FeatureStore, write_store
from talk2dino.training.word_embeddings import caption_word_loss
from tests.helpers.pipeline import TRAIN, fails, run
from tests.helpers.stores import CLIP, tiny_arrays

IMAGES, WIDTH = 20, 6  # the last five are held out
WORDS = ("words.min_count=2", "words.per_step=6")
THINGS = ("brown dog", "red ball", "young girl", "green field")


def loss_of(store: Path, psi: ProjectionLayer, similarity: Similarity, **options: Any) -> WordLoss:
    """Of the captions before the held-out ones."""
    given, rows = WordOptions(**{"min_count": 2, **options}), np.arange(2 * (IMAGES - 5))
    return caption_word_loss(given, FeatureStore(store), rows, psi, similarity, seed=0)


def captions() -> list[str]:
    """Two of every image, with one thing each; `zebra` occurs in held-out ones only."""
    seen = [(f"a {THINGS[i % 4]}", f"The {THINGS[i * 3 % 4]}.") for i in range(IMAGES - 5)]
    return [text for pair in [*seen, *[("a zebra", "zebra")] * 5] for text in pair]


@pytest.fixture(scope="module")
def encoder() -> OpenClipTextEncoder:
    return OpenClipTextEncoder(name=CLIP, weights="random")


@pytest.fixture(scope="module")
def store(encoder: OpenClipTextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("words") / "store", text=encoder.describe())


def make_store(folder: Path, **options: Any) -> Path:
    fields = {"patch_tokens": (5, WIDTH)}
    images, rows = tiny_arrays(fields, images=IMAGES, captions_per_image=2, text_dim=256)
    rows["text"] = np.array(captions())
    if options.pop("without_texts", False):
        del rows["text"]
    write_store(folder, images, rows, images_per_shard=8, **options)
    return folder


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TALK2DINO_CACHE", str(folder))
        yield folder


def overrides(store: Path, folder: Path, *more: str) -> list[str]:
    return [
        "experiment=vits_words",
        f"projection.text_dim={256}",
        f"projection.vision_dim={WIDTH}",
        f"store={store}",
        "data.val_fraction=0.25",
        "data.batch_size=8",
        "scheduler=constant",
        "trainer.log_every_n_steps=1",
        "trainer.max_epochs=2",
        "similarity.max_patches=3",
        *TRAIN,
        *more,
        f"hydra.run.dir={folder}",
    ]


def trained(store: Path, folder: Path, *more: str) -> dict[str, Tensor]:
    run("train", *overrides(store, folder, *(more if "words=none" in more else (*WORDS, *more))))
    return dict(load_projection(folder / "projection.safetensors").state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trained(store, folder)
    return folder


def test_words_are_logged_and_change_the_weights(
    store: Path, whole: Path, cache: Path, tmp_path: Path
) -> None:
    header, first, *_ = (whole / "logs" / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert 0 < float(row["train/word_loss"]) < float(row["train/loss"])
    assert len(list((cache / "text").glob("*.safetensors"))) == 1
    without = trained(store, tmp_path, "words=none")
    assert not same(without, load_projection(whole / "projection.safetensors").state_dict())


def test_a_stopped_run_goes_on_exactly_and_takes_embeddings_from_the_cache(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> Tensor:
        raise AssertionError("embedded again")

    monkeypatch.setattr(OpenClipTextEncoder, "encode", encode)
    former = "words._target_=talk2dino.training.texts.caption_word_loss"
    trained(store, tmp_path, "resume=true", "trainer.max_epochs=1", former)
    resumed = trained(store, tmp_path, "resume=true")
    assert same(load_projection(whole / "projection.safetensors").state_dict(), resumed)
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 6


def test_a_run_goes_on_with_its_own_words_only(
    store: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = fails(
        capfd, "train", *overrides(store, whole, *WORDS, "words.weight=2.0", "resume=true")
    )
    assert "was begun with words.weight=1.0, now words.weight=2.0" in line


def test_the_vocabulary_is_that_of_the_captions_to_train_on(
    store: Path, encoder: OpenClipTextEncoder
) -> None:
    built: Any = partial(loss_of, store, ProjectionLayer(256, WIDTH), Dense())
    words = built()
    names = sorted({*" ".join(THINGS).split(), *THINGS})
    assert len(words.embeddings) == len(names)
    torch.testing.assert_close(words.embeddings, encoder.encode([f"a {name}" for name in names]))
    dogs = names.index("brown dog")
    has = (words.of_image == dogs).any(dim=1)
    texts = captions()
    assert has.tolist() == [
        "brown dog" in " ".join(texts[2 * i : 2 * i + 2]) for i in range(IMAGES)
    ]
    averaged = built(templates="photo+plain").embeddings
    both = [
        encoder.encode([form.format(n) for n in names]) for form in ("a photo of a {}.", "a {}")
    ]
    torch.testing.assert_close(averaged, (both[0] + both[1]) / 2)
    near = torch.nn.functional.cosine_similarity(words.embeddings[dogs], words.embeddings, dim=1)
    sixth = float(near.sort().values[-6])
    wider = (built(synonym=sixth).of_image == dogs).any(dim=1)
    said = [torch.isin(row, torch.nonzero(near >= sixth)).any().item() for row in words.of_image]
    assert wider.tolist() == said
    assert wider.sum() > has.sum()
    assert built(temperature=0.3).similarity.temperature == 0.3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            ["words.min_count=40"],
            "words.min_count=40: no word occurs in so many of the 30 captions",
        ),
        (["words.per_step=1"], "words.per_step=1"),
        (["words.templates=other"], "templates='other' is unknown"),
        (["words.min_counts=2"], "did you mean words.min_count?"),
        (["words.synonym=0"], "words.synonym=0: a cosine above 0 and up to 1, or null"),
        (["words.near_synonym=high"], "words.near_synonym='high' is str, expected float or null"),
    ],
)
def test_wrong_values_are_one_line(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], given: list[str], line: str
) -> None:
    more = [f"+{one}" if "counts" in one else one for one in given]
    assert line in fails(capfd, "train", *overrides(store, tmp_path, *WORDS, *more))


def test_stores_and_similarities_that_do_not_fit_are_one_line(
    encoder: OpenClipTextEncoder, store: Path, tmp_path: Path
) -> None:
    info = encoder.describe()
    psi = ProjectionLayer(256, WIDTH)
    stores = {
        "holds no texts of its captions; extract again": {"without_texts": True, "text": info},
        "does not name its text encoder, which words=captions needs": {},
        "has other weights now": {"text": {**info, "weights_sha256": "0" * 64}},
    }
    for number, (line, options) in enumerate(stores.items()):
        other = make_store(tmp_path / str(number), **options)
        with pytest.raises(ConfigError, match=line):
            loss_of(other, psi, Dense())
    with pytest.raises(ConfigError, match=r"words\.temperature=0\.2: MaxScore pools no patches"):
        loss_of(store, psi, MaxScore(), temperature=0.2)
    psi.text_fields = ("second_last_tokens", "eot_index")  # type: ignore[misc]
    with pytest.raises(ConfigError, match="use projection=mlp, or words=none"):
        loss_of(store, psi, Dense())
