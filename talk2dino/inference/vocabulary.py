"""`OpenVocabulary`: class names, synonyms and prompts bound to a model, for one picture or many."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import TypeAlias, overload

import torch
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import (
    composed,
    grouped_words,
    is_list,
    words_of,
)
from talk2dino.datasets.pictures import ImageLike, as_list, size_of
from talk2dino.encoders.text.prompts import prompts as named_prompts
from talk2dino.errors import ConfigError, say
from talk2dino.inference.exemplars import Exemplar
from talk2dino.inference.segmented import SegmentedImage, refuse_background
from talk2dino.segmentation.class_maps import ClassMaps
from talk2dino.segmentation.memory import WorkingMemory
from talk2dino.segmentation.segmenter import EncodedImage, Segmenter

WordOrExemplar: TypeAlias = str | Exemplar  # a class is said in words, or shown
ClassWords: TypeAlias = (
    Sequence[str | Sequence[WordOrExemplar]]
    | Mapping[str, WordOrExemplar | Sequence[WordOrExemplar]]
)
Sentences: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """The classes of a vocabulary and its negatives, as sentences to embed.

    Attributes:
        names: of the K classes.
        rows: the sentences of every text row, negatives first; their embeddings are averaged.
            None for a class that exemplars alone stand for.
        row_classes: class of every row; with negatives, class 0 is all of them.
        has_negatives: whether it is.
        row_words: the word that every row stands for: a name, a synonym or a negative; empty for
            exemplars alone.
    """

    names: tuple[str, ...]
    rows: tuple[Sentences, ...]
    row_classes: tuple[int, ...]
    has_negatives: bool
    row_words: tuple[str, ...]

    @property
    def row_names(self) -> list[str | None]:
        """The name of every row's class; None for a negative."""
        names = [None, *self.names] if self.has_negatives else self.names
        return [names[number] for number in self.row_classes]

    @property
    def synonyms(self) -> dict[str, tuple[str, ...]]:
        """The words that stand for each class; none, where only exemplars do."""
        rows = list(zip(self.row_names, self.row_words, strict=True))
        return {
            name: tuple(word for row, word in rows if row == name and word) for name in self.names
        }


def read_words(
    classes: ClassWords,
    negatives: Sequence[str] = (),
    prompts: Mapping[str, str | Sequence[str]] | None = None,
    templates: str | Sequence[str] = "plain",
) -> Words:
    """Bring the arguments of `Talk2DINO.segment` into one form.

    Args:
        classes: names; a list inside the list is a name and its synonyms; or a mapping of a name
            to the words that stand for it. Exemplars among them are left to `exemplars_of`.
        negatives: words whose pixels count as background.
        prompts: by class name, whole sentences in place of templates and synonyms.
        templates: name of a set of `encoders.text.prompts`, or sentences with `{}` for the name.

    Raises:
        ConfigError: no class, an empty or repeated name, or prompts for no class.
    """
    groups = named_groups(classes)
    names = list(groups)
    if not isinstance(prompts or {}, Mapping):
        raise ConfigError(f"prompts={prompts!r:.60}: give sentences by class name")
    own = {name: words_of(texts, "prompts") for name, texts in (prompts or {}).items()}
    for name, texts in own.items():
        if name not in groups:
            raise ConfigError(f"prompts: {name!r} is none of the classes {names}")
        if not texts:
            raise ConfigError("prompts: the list is empty; give a sentence")
    negative = words_of(negatives, "negatives")
    _refuse_shut(groups, negative)
    if negative:
        refuse_background(groups)
    rows = [(0, *row) for row in zip(negative, _sentences(negative, templates), strict=True)]
    for number, (name, entries) in enumerate(groups.items(), start=1 if negative else 0):
        stated = tuple(entry for entry in entries if isinstance(entry, str))
        given = _sentences(stated, templates)
        if not stated:
            stated, given = ("",), [()]
        if name in own:
            stated, given = (name,), [own[name]]
        rows += [(number, *row) for row in zip(stated, given, strict=True)]
    return Words(
        tuple(names),
        tuple(sentences for _, _, sentences in rows),
        tuple(number for number, _, _ in rows),
        bool(negative),
        tuple(word for _, word, _ in rows),
    )


def exemplars_of(classes: ClassWords) -> dict[str, tuple[Exemplar, ...]]:
    """The exemplars of every class that has some; errors as `read_words`."""
    shown = {
        name: tuple(entry for entry in entries if isinstance(entry, Exemplar))
        for name, entries in named_groups(classes).items()
    }
    return {name: exemplars for name, exemplars in shown.items() if exemplars}


def named_groups(classes: ClassWords) -> dict[str, tuple[WordOrExemplar, ...]]:
    """Names and what stands for them, in order."""
    return grouped_words(classes, "classes", Exemplar)


def _refuse_shut(groups: Mapping[str, Sequence[WordOrExemplar]], negatives: Sequence[str]) -> None:
    """Refuse a negative that is a class's word, or the name of one without (ConfigError)."""
    shut = set(map(composed, negatives))
    for name, entries in groups.items():
        said = {composed(entry) for entry in entries if isinstance(entry, str)}
        for word in said or {composed(name)}:
            if word in shut:
                what = f"a word of the class {name!r}" if said else "a class that is shown"
                raise ConfigError(f"negatives: {word!r} is also {what}; leave out one of the two")


def say_equal(
    words: Sequence[str], classes: Sequence[int], rows: Tensor, key: str = "classes"
) -> None:
    """Say which words of several classes have the same vector: the first class gets their pixels.

    Text encoders mostly know no upper case, or take a word of a foreign script for an unknown one.

    Args:
        words: of every row, empty where there is none.
        classes: of every row.
        rows: `[N, D]`, unit.
        key: for the message.
    """
    told = set()
    for begin in range(0, len(rows), 256):
        equal = rows[begin : begin + 256] @ rows.T > 1 - 2e-6
        for number, first in (equal.nonzero() + torch.tensor([begin, 0]).to(rows.device)).tolist():
            here, there = words[number], words[first]
            if classes[first] < classes[number] and classes[number] not in told and here and there:
                told.add(classes[number])
                what = f"{there!r} and {here!r} have the same vector"
                if composed(here) == composed(there):
                    what = f"{here!r} is a word of two classes"
                say(f"{key}: {what}: the first gets its pixels", stacklevel=3)


def _sentences(names: Sequence[str], templates: str | Sequence[str]) -> list[Sentences]:
    if isinstance(templates, str):
        return [tuple(group) for group in named_prompts(names, templates)]
    if not is_list(templates):
        raise ConfigError(f"templates={templates!r:.60}: give sentences with {{}} for the name")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ConfigError(f"templates: {template!r} has no {{}} for the name of the class")
    if not templates:
        raise ConfigError("templates: the list is empty; give a sentence with {} for the name")
    return [tuple(t.replace("{}", name) for t in templates) for name in names]


@dataclass
class TextCache:
    """The latest text rows by their sentences; safe to share among threads.

    Attributes:
        size: rows to keep; 4096 rows of ViT-L are 16 MB.
        rows: by sentences, the least recently used first.
    """

    size: int = 4096
    rows: OrderedDict[tuple[object, Sentences], Tensor] = field(default_factory=OrderedDict)
    lock: RLock = field(default_factory=RLock, repr=False)

    def get(
        self,
        wanted: Sequence[Sentences],
        state: object,
        compute: Callable[[Sequence[Sentences]], Tensor],
    ) -> Tensor:
        """`[N, D]` of N rows; those that are new are computed together.

        Args:
            wanted: the sentences of every row.
            state: of the model; rows of another state are computed anew.
            compute: `[M, D]` of M rows.
        """
        with self.lock:
            known = {s: self.rows[state, s] for s in wanted if (state, s) in self.rows}
            new = [s for s in dict.fromkeys(wanted) if s not in known]
            if new:
                computed = (row.clone() for row in compute(new))  # a view would keep all of them
                known |= dict(zip(new, computed, strict=True))
            for sentences in wanted:
                self.rows[state, sentences] = known[sentences]
                self.rows.move_to_end((state, sentences))
            while len(self.rows) > self.size:
                self.rows.popitem(last=False)
            return torch.stack([known[sentences] for sentences in wanted])

    def __reduce__(self) -> tuple[type[TextCache], tuple[int]]:
        """Copies and pickles start empty: a lock cannot travel, and rows are soon computed."""
        return TextCache, (self.size,)


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """An encoded picture: the slow step is done, and nothing in it depends on the classes.

    Attributes:
        pixels: `[3, H, W]` uint8 RGB, the picture, on the CPU.
        windows: its features, on the model's device.
    """

    pixels: Tensor = field(repr=False)
    windows: EncodedImage = field(repr=False)


@dataclass(frozen=True, eq=False)
class OpenVocabulary:
    """Classes whose text embeddings, thresholds and refinement are settled; call it on pictures.

    Made by `Talk2DINO.open_vocabulary`; may be called from several threads.

    Attributes:
        words: names, synonyms and negatives.
        rows: `[N, D]` unit text rows, or calibrated ones `[N, D + 1]`.
        threshold: score of the background, or None.
        segmenter: scores windows with the options of this vocabulary.
        encode: from pictures to encoded pictures, at the working size of this vocabulary.
    """

    words: Words
    rows: Tensor = field(repr=False)
    threshold: float | None
    segmenter: Segmenter = field(repr=False)
    encode: Callable[[Sequence[ImageLike]], list[EncodedPicture]] = field(repr=False)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is a sequence, too
        self, image: ImageLike | EncodedPicture
    ) -> SegmentedImage: ...
    @overload
    def __call__(
        self, image: Sequence[ImageLike] | Sequence[EncodedPicture]
    ) -> list[SegmentedImage]: ...
    def __call__(
        self, image: ImageLike | EncodedPicture | Sequence[ImageLike] | Sequence[EncodedPicture]
    ) -> SegmentedImage | list[SegmentedImage]:
        """Segment one picture, or each of a list or `[B, 3, H, W]` batch.

        Args:
            image: as `Talk2DINO.segment` takes it, or an encoded picture, whose working size
                counts then. Pictures of a list may differ in size.

        Raises:
            DataError: not a picture, or one that takes more memory than there is.
        """
        if isinstance(image, EncodedPicture):
            self._require_memory(image)
            return self._score(image)
        several = as_list(image)  # type: ignore[arg-type]
        for one in several or [image]:  # type: ignore[list-item]
            self._require_memory(one)
        if several is None:
            return self._score(self.encode([image])[0])  # type: ignore[list-item]
        return [one for batch in _batches(several) for one in self._segment(batch)]

    def memory(self, image: ImageLike | EncodedPicture) -> WorkingMemory | None:
        """What segmenting a picture takes, before it is decoded; None if it is no picture."""
        size = size_of(image.pixels if isinstance(image, EncodedPicture) else image)
        return None if size is None else WorkingMemory.of(self.segmenter, size, len(self.rows))

    def _require_memory(self, image: ImageLike | EncodedPicture) -> None:
        needed = self.memory(image)
        if needed is not None:
            shown = f"image={image}" if isinstance(image, (str, Path)) else "image"
            needed.require(f"{shown} with {len(self.rows)} class prompts")

    def _segment(self, batch: Sequence[ImageLike | EncodedPicture]) -> list[SegmentedImage]:
        """A few pictures, of which some may be encoded already; their windows fill batches."""
        raw = [image for image in batch if not isinstance(image, EncodedPicture)]
        fresh = iter(self.encode(raw))
        return [
            self._score(image if isinstance(image, EncodedPicture) else next(fresh))
            for image in batch
        ]

    @torch.no_grad()
    def scores(self, picture: EncodedPicture) -> ClassMaps:
        """Scores at working size, `[K, h, w]`; with negatives, the best of them comes first."""
        rows = self.rows.to(picture.windows.features.patch_tokens.device)
        classes = torch.tensor(self.words.row_classes, device=rows.device)
        return self.segmenter.class_maps(picture.windows, rows, classes)

    def _score(self, picture: EncodedPicture) -> SegmentedImage:
        scores, negative = self.scores(picture), None
        if self.words.has_negatives:
            negative, scores = scores.split(1)
        return SegmentedImage.from_scores(
            picture.pixels, self.words.names, scores, negative, self.threshold, self.words.synonyms
        )


def _batches(
    images: Sequence[ImageLike | EncodedPicture], size: int = 8
) -> list[Sequence[ImageLike | EncodedPicture]]:
    """Features of eight pictures are held at a time, 20 MB each for a large one."""
    return [images[start : start + size] for start in range(0, len(images), size)]
