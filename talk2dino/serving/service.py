"""What a request asks for and how it is done: words, a picture within limits, a segmentation."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

from talk2dino.calibration.calibration import AUTO
from talk2dino.datasets.benchmarks.classes import composed
from talk2dino.datasets.pictures import picture_suffixes, size_of, to_pixels, too_large
from talk2dino.errors import ConfigError, DataError
from talk2dino.inference.class_embeddings import ClassEmbeddings, NamedClasses
from talk2dino.inference.exemplars import WEIGHT, Exemplar
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.inference.vocabulary import OpenVocabulary, WordOrExemplar, exemplars_of
from talk2dino.segmentation.memory import WorkingMemory, machine_memory
from talk2dino.segmentation.refinement.knn import KNN
from talk2dino.segmentation.refinement.pamr import PAMR
from talk2dino.segmentation.windows import SHORT_SIDE
from talk2dino.serving.batching import Batcher, Budget, in_thread, stop_if_left
from talk2dino.serving.forms import requested_words

# those whose decoders run nothing but a decoder: EPS, for one, would start Ghostscript
FORMATS = frozenset(
    (*("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF"), *("JPEG2000", "PPM"))
)
LONGEST = 200  # characters of a word
LETTERS = 200  # of a word on average, with quotes and commas
PICTURES = 4  # of exemplars of a request, each as large as may be: their pixels together
WORKERS = 2  # threads for all that is not the encoder


class TooLargeError(DataError):
    """A picture, or a number of words, above a limit."""


@dataclass(frozen=True)
class Limits:
    """What a request may take, named as in serve.yaml."""

    max_upload_mb: float = 20
    max_megapixels: float = 50
    max_short_side: int = 896
    max_words: int = 256
    max_exemplars: int = 16
    memory_gb: float = 4
    timeout: float = 60
    queue: int = 32
    batch_size: int = 8
    batch_wait_ms: float = 5

    @property
    def body(self) -> int:
        """Bytes of a request: an upload and the words beside it."""
        return int(self.max_upload_mb * 1024 * 1024) + (1 << 18)

    @property
    def memory(self) -> int:
        """Bytes for the pictures of all requests: `memory_gb`, or half of what there is."""
        return min(int(self.memory_gb * 1e9), machine_memory() // 2)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a picture.

    Attributes:
        classes: names, and the words and exemplars of each, or class embeddings.
        background: as `Talk2DINO.segment` takes it.
        pamr: refine the edges.
        short_side: working size in pixels; None takes the service's own.
        negatives: words that count as background.
        exemplars: that the request brought, by class, beside `classes`.
    """

    classes: NamedClasses
    background: bool | float | None = None
    pamr: bool = True
    short_side: int | None = None
    negatives: tuple[str, ...] = ()
    exemplars: Mapping[str, tuple[Exemplar, ...]] = field(default_factory=dict)

    @property
    def all_classes(self) -> NamedClasses:
        """The classes with the exemplars that were brought.

        Raises:
            ConfigError: these beside class embeddings.
        """
        if not self.exemplars:
            return self.classes
        if isinstance(self.classes, ClassEmbeddings):
            raise ConfigError(
                "exemplar_images: the classes of this service are embedded already; leave them out"
            )
        names = {composed(name): name for name in self.classes}
        found = dict(self.classes)
        for brought, exemplars in self.exemplars.items():
            name = names.get(brought, brought)
            found[name] = (*found.get(name, ()), *exemplars)
        return found


class Service:
    """A model that answers many at a time; `running` must surround all calls.

    Args:
        model: segments.
        limits: of requests.
        classes: of requests that name none; class embeddings are all there is to choose from.
        short_side: working size of requests that name none, in pixels.
        seen: is told the size of every batch that the encoder gets.
        refinement: of all requests, as `Talk2DINO.segment` takes it.
        exemplar_weight: of exemplars that requests bring without saying it.

    Raises:
        DataError: an exemplar that cannot be read.
    """

    def __init__(
        self,
        model: Talk2DINO,
        limits: Limits | None = None,
        classes: NamedClasses | None = None,
        short_side: int = SHORT_SIDE,
        seen: Callable[[int], object] = lambda size: None,
        refinement: KNN | PAMR | str | None = AUTO,
        exemplar_weight: float = WEIGHT,
    ) -> None:
        self.model, self.limits, self.seen = model, limits or Limits(), seen
        self.short_side, self.refinement = short_side, refinement
        self.exemplar_weight = exemplar_weight
        self.classes: NamedClasses | None = None
        if isinstance(classes, ClassEmbeddings):
            self.classes = classes
        elif classes:
            self.classes = {
                name: tuple(one if isinstance(one, str) else one.settled() for one in given)
                for name, given in classes.items()
            }
        self.side(None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Threads and queue, which live as long as this context."""
        picture_suffixes()  # registers HEIC, if its decoder is installed
        limits = self.limits
        self._budget = Budget(limits.memory)
        self._pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), "pictures")
        self._batcher = Batcher(
            self.model.encode, limits.batch_size, limits.batch_wait_ms / 1000, self.seen
        )
        batches = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            batches.cancel()
            with suppress(asyncio.CancelledError):
                await batches
            self._pool.shutdown()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run something that takes its time, in a thread."""
        return await in_thread(self._pool, function, *arguments)

    @asynccontextmanager
    async def segmented(self, content: bytes, wanted: Wanted) -> AsyncIterator[SegmentedImage]:
        """The result for a picture file; its memory is given back at the end of the context.

        Raises:
            TooLargeError: more pixels, words or exemplars, or a larger working size, than the
                limits allow.
            DataError: not a picture, or an exemplar that shows nothing.
            ConfigError: an argument out of its range.
        """
        classes = wanted.all_classes
        self.check_words(classes, wanted.negatives)
        side = self.side(wanted.short_side)
        self.check_picture(content)
        brought = list(numbered(wanted.exemplars))
        if len(brought) > self.limits.max_exemplars:
            most = self.limits.max_exemplars
            raise TooLargeError(f"exemplar_images: {len(brought)}; give at most {most}")
        for name, exemplar in brought:
            self.check_picture(exemplar.image, f"picture of {name}")
            self.check_picture(exemplar.mask, f"mask of {name}")
        looking = self.model.segmenter(None, False, side)
        sizes = [size_of(exemplar.image) or (0, 0) for _, exemplar in brought]
        masks = [size_of(exemplar.mask) or (0, 0) for _, exemplar in brought]
        pixels = sum(max(map(math.prod, each)) for each in zip(sizes, masks, strict=True))
        together = PICTURES * self.limits.max_megapixels
        if pixels > together * 1_000_000:
            raise TooLargeError(
                f"exemplar_images: {pixels / 1e6:.0f} million pixels together; give at most "
                f"{together:g} million"
            )
        memory = [WorkingMemory.of(looking, size, 0).total for size in sizes if all(size)]
        async with self._budget.take(max(memory, default=0)):
            for one in brought:  # a request whose time is up ends between them
                await self.call(read_one, *one)
            vocabulary = await self.call(self._vocabulary, wanted, classes)
        needed = vocabulary.memory(content)
        async with self._budget.take(0 if needed is None else needed.total):
            pixels = await self.call(to_pixels, content)
            side = vocabulary.segmenter.protocol.input_size
            encoded = await self._batcher(pixels, side)
            yield await self.call(vocabulary, encoded)

    def embed(self, classes: NamedClasses) -> ClassEmbeddings:
        """Vectors of classes, as `Talk2DINO.embed_classes` gives them.

        Raises:
            LeftError: nobody waits for them any more.
        """
        self._look(classes, self.short_side)
        return self.model.embed_classes(classes, short_side=self.short_side)

    def _look(self, classes: NamedClasses, side: int) -> None:
        """Look at the exemplars, whose rows the model keeps; LeftError between two of them."""
        if not isinstance(classes, ClassEmbeddings):
            shown = exemplars_of(classes)
            self.model.shown_rows(list(shown.values()), side, stop_if_left)

    def _vocabulary(self, wanted: Wanted, classes: Any) -> OpenVocabulary:
        self._look(classes, self.side(wanted.short_side))
        return self.model.open_vocabulary(
            classes,
            wanted.background,
            wanted.pamr,
            self.side(wanted.short_side),
            negatives=wanted.negatives,
            refinement=self.refinement,
        )

    def side(self, asked: int | None) -> int:
        """The working size of a request.

        Raises:
            TooLargeError: above the limit.
            ConfigError: not positive.
        """
        side = self.short_side if asked is None else asked
        if side > self.limits.max_short_side:
            raise TooLargeError(f"short_side={side}: give at most {self.limits.max_short_side}")
        if side < 1:
            raise ConfigError(f"short_side={side}: give pixels, for instance 448")
        return side

    def check_length(self, text: str, key: str = "classes") -> None:
        """Refuse what is longer than so many words are, before it is taken apart.

        Raises:
            TooLargeError: more than `LETTERS` for each word that the limits allow.
        """
        most = LETTERS * self.limits.max_words
        if len(text) > most:
            raise TooLargeError(f"{key}: {len(text)} letters; give at most {most}")

    def check_words(self, classes: NamedClasses, negatives: Sequence[str]) -> None:
        """Refuse words that nobody means, and too many.

        Raises:
            TooLargeError: more than the limits allow.
            DataError: a word that is very long.
        """
        if isinstance(classes, ClassEmbeddings):
            every = list(classes)
        else:
            said = (one for given in classes.values() for one in given if isinstance(one, str))
            every = [*classes, *said]
        every += negatives
        count = len(every) - (0 if isinstance(classes, ClassEmbeddings) else len(classes))
        if count > self.limits.max_words:
            raise TooLargeError(f"classes: {count} words; give at most {self.limits.max_words}")
        for word in every:
            if len(word) > LONGEST:
                raise DataError(f"classes: {word[:40]!r}… is longer than {LONGEST} characters")

    def check_picture(self, content: Any, what: str = "image") -> None:
        """Refuse bytes that are no picture, or of too many pixels, before they are decoded.

        Raises:
            DataError: not a picture of a format that is read.
            TooLargeError: too many pixels.
        """
        try:
            with Image.open(BytesIO(content)) as opened:
                kind, (width, height) = opened.format, opened.size
        except Image.DecompressionBombError as error:
            most = self.limits.max_megapixels
            raise TooLargeError(f"{what}: {too_large()}; give at most {most:g} million") from error
        except Exception as error:  # broken files make decoders raise anything
            raise DataError(f"{what}: not a picture that can be read") from error
        if kind not in FORMATS:
            raise DataError(f"{what}: {kind} is not read here; send JPEG, PNG, WebP or TIFF")
        if width * height > self.limits.max_megapixels * 1_000_000:
            raise TooLargeError(
                f"{what}: {width}x{height} pixels; give at most "
                f"{self.limits.max_megapixels:g} million"
            )

    def words(self, text: str | None, shown: bool = False) -> NamedClasses:
        """The classes of a request; a name that the service has exemplars of brings them.

        Args:
            text: `cat, sofa; couch`, or JSON: `["cat", ["sofa", "couch"]]`,
                `{"sofa": ["sofa", "couch"]}`; never the name of a file. None takes those that the
                service began with.
            shown: the request brings exemplars, so there may be no words.

        Raises:
            ConfigError: no class, one that is named twice, or a name that the class embeddings
                do not have.
            DataError: JSON that cannot be read.
            TooLargeError: a text that is longer than so many words are.
        """
        if text is None and self.classes is not None:
            return self.classes
        if text is None and shown:
            return {}
        self.check_length(text or "")
        named = requested_words(text or "")
        if not isinstance(self.classes, ClassEmbeddings):
            return self.shown(named)
        every = [word for words in named.values() for word in words]
        return self.classes.select(every)

    def shown(self, named: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[WordOrExemplar, ...]]:
        """Named classes, with the exemplars that the service has of them.

        A bare name of such a class means it as the service began with it: without the name as a
        word, if only exemplars stand for it.
        """
        classes = self.classes if isinstance(self.classes, Mapping) else {}
        began = {composed(name): given for name, given in classes.items()}
        found: dict[str, tuple[WordOrExemplar, ...]] = {}
        for name, words in named.items():
            known = began.get(composed(name), ())
            exemplars = tuple(one for one in known if not isinstance(one, str))
            bare = bool(exemplars) and words == (name,)
            found[name] = known if bare else (*words, *exemplars)
        return found


def numbered(exemplars: Mapping[str, tuple[Exemplar, ...]]) -> Iterator[tuple[str, Exemplar]]:
    """What messages call them, one by one."""
    for name, several in exemplars.items():
        for number, one in enumerate(several, 1):
            yield f"exemplar {number} of {name!r:.60}", one


def read_one(name: str, exemplar: Exemplar) -> None:
    """Read it once, so that what is wrong names the exemplar."""
    try:
        exemplar.digest  # noqa: B018  # reads picture and mask, and is kept
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
