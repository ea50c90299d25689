"""Words of captions against a count by hand; the same for any order."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from talk2dino.errors import ConfigError
from talk2dino.features.caption_words import (
    STOP_WORDS,
    CaptionWords,
    caption_words,
    with_synonyms,
)

NOUNS = ["dog", "dogs", "red", "ball", "Snow", "boy's", "t-shirt", "Straße", "a", "the", "in", "2"]


def sentences(count: int) -> list[str]:
    random = np.random.default_rng(0)
    endings = ["", ".", ", ", " - "]
    return [
        "".join(
            f"{random.choice(NOUNS)}{random.choice(endings)} " for _ in range(random.integers(0, 9))
        )
        for _ in range(count)
    ]


def by_hand(texts: list[str], image_row: list[int], min_count: int) -> dict[int, set[str]]:
    """Words of every image, letter by letter."""
    counts: Counter[str] = Counter()
    of_image: dict[int, set[str]] = defaultdict(set)
    for text, row in zip(texts, image_row, strict=True):
        tokens, run = [], ""
        for letter in f"{text.lower()} ":
            if letter.isalpha():
                run += letter
                continue
            tokens += [run] if run else []
            tokens += [letter] if letter in ".,2" else []
            run = ""
        good = [len(token) > 1 and token not in STOP_WORDS for token in tokens]
        words = {token for token, kept in zip(tokens, good, strict=True) if kept}
        for i in range(1, len(tokens)):
            if good[i - 1] and good[i]:
                words.add(f"{tokens[i - 1]} {tokens[i]}")
        counts.update(words)
        of_image[row] |= words
    frequent = {word for word, count in counts.items() if count >= min_count}
    return {row: words & frequent for row, words in of_image.items()}


def named(found: CaptionWords, row: int) -> set[str]:
    numbers = [n for n in found.of_image[row].tolist() if n < len(found.words)]
    assert numbers == sorted(set(numbers))
    return {found.words[n] for n in numbers}


def test_words_and_pairs_are_those_counted_by_hand() -> None:
    texts = sentences(300)
    rows = np.random.default_rng(1).integers(0, 50, 300)
    found = caption_words(texts, rows, 60, min_count=3)
    want = by_hand(texts, rows.tolist(), 3)
    assert set(found.words) == set().union(*want.values())
    assert {"ball red", "straße", "boy"} <= set(found.words)
    assert list(found.words) == sorted(found.words)
    for row in range(60):
        assert named(found, row) == want.get(row, set())
    dog = found.words.index("dog")
    assert found.counts[dog] == sum("dog" in f" {t} ".replace("dogs", "") for t in texts)


def test_the_order_of_captions_does_not_matter() -> None:
    texts, rows = sentences(200), np.arange(200) // 5
    mixed = np.random.default_rng(2).permutation(200)
    one = caption_words(texts, rows, 40, 5)
    other = caption_words([texts[i] for i in mixed], rows[mixed], 40, 5)
    assert one.words == other.words
    assert one.digest == other.digest
    assert one.digest != caption_words(texts, rows[::-1], 40, 5).digest


def test_a_pair_brings_its_words_along() -> None:
    found = caption_words(["A brown dog", "brown dogs", "the brown dog!"], np.arange(3), 3, 2)
    assert found.words == ("brown", "brown dog", "dog")
    assert found.counts.tolist() == [3, 2, 2]
    assert named(found, 1) == {"brown"}


def test_an_image_has_the_synonyms_of_its_words() -> None:
    rows = np.random.default_rng(3).integers(0, 50, 300)
    found = caption_words(sentences(300), rows, 60, min_count=3)
    vectors = np.random.default_rng(4).normal(size=(len(found.words), 3))
    more = with_synonyms(found, vectors, 0.8)
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    for row in range(60):
        own = [found.words.index(word) for word in named(found, row)]
        want = {
            word
            for k, word in enumerate(found.words)
            if k in own or any(unit[k] @ unit[n] >= 0.8 for n in own)
        }
        assert named(more, row) == want
    assert sum(len(named(more, r)) - len(named(found, r)) for r in range(60)) > 50
    assert more.words == found.words
    assert more.digest != found.digest
    np.testing.assert_array_equal(with_synonyms(found, vectors, 1.0).of_image, found.of_image)


@pytest.mark.parametrize(
    ("texts", "min_count", "line"),
    [
        (
            ["a dog", "a dog", "the cat"],
            3,
            "words.min_count=3: no word occurs in so many of the 3 ",
        ),
        (["a dog", "a dog", "the cat"], 9, "use words.min_count=2 or less"),
        (["the of", ""], 1, "use words=none"),
        ([], 1, "use words=none"),
        (["a dog"], 0, "words.min_count=0: use 1 or more"),
    ],
)
def test_too_few_words_are_one_line(texts: list[str], min_count: int, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        caption_words(texts, np.arange(len(texts)), 5, min_count)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
