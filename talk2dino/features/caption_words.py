"""The content words of captions, and which images they describe.

A caption tells a whole scene; its words name single things. Words, and pairs of neighboring words,
that many captions contain become texts of their own in training (`alignment/word_loss.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from talk2dino.errors import ConfigError

# English words that name nothing in a picture: articles, pronouns, prepositions, conjunctions,
# auxiliaries, numbers and quantities. Single letters count as such in any language.
_STOP_WORDS = """
about above across after again against all along alongside also although am amid among
amongst an and another any are around as aside at atop away back be because been before behind
being below beneath beside besides between beyond both but by can cannot could did do does doing
done down during each eight either else etc even ever every few five for forth four from front
full further get gets getting go goes going gone got had half has have having he her here hers
herself him himself his how if in inside instead into is it its itself just let like lot lots
made make makes making many me middle mid might mine more most much must my myself near nearby
neither next nine no nor not of off on one ones only onto or other others our ours out outside
over own past per plus put puts rather seven several shall she should side sides since six so
some somebody someone something somewhere soon still such ten than that the their theirs them
themselves then there these they thing things this those though three through throughout to
together top toward towards two under underneath until up upon upside us various very via was
way we were what when where whether which while whilst who whom whose why will with within
without would yet you your yours
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
_WORD_OR_STOP = re.compile(r"[^\W\d_]+|[^\s'’-]")  # a hyphen or an apostrophe parts no pair


@dataclass(frozen=True)
class CaptionWords:
    """Words and pairs of words, and those of every image.

    Attributes:
        words: V different ones, sorted.
        counts: `[V]` int64, captions that contain each.
        of_image: `[I, W]` int32, the words of an image's captions in ascending order, filled up
            with V.
    """

    words: tuple[str, ...]
    counts: NDArray[np.int64]
    of_image: NDArray[np.int32]

    @property
    def digest(self) -> str:
        """SHA-256 of the words and of which image has which, hex."""
        return sha256("\n".join(self.words).encode() + self.of_image.tobytes()).hexdigest()


def caption_words(
    texts: Sequence[str], image_row: NDArray[np.int64], images: int, min_count: int
) -> CaptionWords:
    """Find the content words of captions and the pairs of them that stand side by side.

    A word is a run of letters, in lower case, that is no stop word; punctuation parts a pair. The
    same captions give the same words in any order.

    Args:
        texts: T captions.
        image_row: `[T]`, the image of each, 0 … images - 1.
        images: number of images I; those without a caption here have no words.
        min_count: captions that a word or a pair must occur in.

    Raises:
        ConfigError: no word occurs in so many captions.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.features.caption_words import caption_words
        >>> texts = ["A brown dog runs.", "Two dogs, brown and wet", "The brown dog is wet"]
        >>> found = caption_words(texts, np.array([0, 0, 2]), images=3, min_count=2)
        >>> found.words, found.counts
        (('brown', 'brown dog', 'dog', 'wet'), array([3, 2, 2, 2]))
        >>> found.of_image
        array([[0, 1, 2, 3],
               [4, 4, 4, 4],
               [0, 1, 2, 3]], dtype=int32)
    """
    if min_count < 1:
        raise ConfigError(f"words.min_count={min_count}: use 1 or more")
    split = [_WORD_OR_STOP.findall(text.lower()) for text in texts]
    known: dict[str, int] = {}
    tokens = np.array(
        [known.setdefault(token, len(known)) for token in chain.from_iterable(split)], np.int64
    )
    names = list(known)
    content = np.array([_names_something(name) for name in names], np.bool_)[tokens]
    caption = np.repeat(np.arange(len(split)), [len(part) for part in split])
    pair = content[:-1] & content[1:] & (caption[:-1] == caption[1:])
    # A key is first * (n + 1) + second, and second is n for a word alone.
    base = len(names) + 1
    keys = np.concatenate(
        [tokens[content] * base + len(names), tokens[:-1][pair] * base + tokens[1:][pair]]
    )
    holders = np.concatenate([caption[content], caption[:-1][pair]])
    found, number = np.unique(keys, return_inverse=True)
    once = np.unique(holders * max(len(found), 1) + number)  # a caption counts a word once
    holders, number = np.divmod(once, max(len(found), 1))
    counts = np.bincount(number, minlength=len(found))
    frequent = np.flatnonzero(counts >= min_count)
    spelled = [_spelled(int(key), base, names) for key in found[frequent]]
    if not spelled:
        best = int(counts.max(initial=0))
        raise ConfigError(
            f"words.min_count={min_count}: no word occurs in so many of the {len(texts)} captions "
            f"to train on; use words{f'.min_count={best} or less' if best else '=none'}"
        )
    order = np.argsort(np.array(spelled))
    place = np.full(len(found), -1)
    place[frequent[order]] = np.arange(len(order))
    kept = place[number] >= 0
    return CaptionWords(
        words=tuple(spelled[i] for i in order),
        counts=counts[frequent[order]],
        of_image=_by_image(
            np.asarray(image_row)[holders[kept]], place[number[kept]], images, len(order)
        ),
    )


def with_synonyms(
    found: CaptionWords, embeddings: NDArray[np.floating], cosine: float
) -> CaptionWords:
    """Give every image the words that mean about the same as one that it has.

    Args:
        found: words and those of every image.
        embeddings: `[V, C]` of the words.
        cosine: of two embeddings from which on an image with one word has the other, too.

    Examples:
        >>> import numpy as np
        >>> from talk2dino.features.caption_words import CaptionWords, with_synonyms
        >>> found = CaptionWords(("bike", "bicycle", "dog"), np.ones(3), np.array([[0, 2], [1, 3]]))
        >>> with_synonyms(found, np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), 0.8).of_image
        array([[0, 1, 2],
               [0, 1, 3]], dtype=int32)
    """
    count = len(found.words)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    near = unit @ unit.T >= cosine
    np.fill_diagonal(near, True)
    first, second = np.nonzero(near)  # by first, in ascending order
    starts = np.searchsorted(first, np.arange(count + 1))
    rows, place = np.nonzero(found.of_image < count)
    said = found.of_image[rows, place]
    many = starts[said + 1] - starts[said]  # synonyms of each
    within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    words = second[np.repeat(starts[said], many) + within]
    return replace(
        found, of_image=_by_image(np.repeat(rows, many), words, len(found.of_image), count)
    )


def _names_something(token: str) -> bool:
    return len(token) > 1 and token not in STOP_WORDS


def _spelled(key: int, base: int, names: Sequence[str]) -> str:
    first, second = divmod(key, base)
    return names[first] if second == base - 1 else f"{names[first]} {names[second]}"


def _by_image(
    rows: NDArray[np.int64], words: NDArray[np.int64], images: int, count: int
) -> NDArray[np.int32]:
    """Different (row, word) pairs as `[images, W]`, filled up with `count`."""
    rows, words = np.divmod(np.unique(rows * count + words), count)
    lengths = np.bincount(rows, minlength=images)
    table = np.full((images, int(lengths.max())), count, np.int32)
    first = np.cumsum(lengths) - lengths
    table[rows, np.arange(len(rows)) - first[rows]] = words
    return table
