"""What the web page does, without the page: a picture, words and examples, and their result."""

from __future__ import annotations

import ctypes
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from PIL import Image

from talk2dino.annotations.data_sets import FORMATS, MARK
from talk2dino.calibration.calibration import AUTO
from talk2dino.datasets.benchmarks.classes import composed, parted, typed_classes
from talk2dino.datasets.pictures import read_picture
from talk2dino.errors import DataError
from talk2dino.inference.class_embeddings import ClassEmbeddings
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.inference.vocabulary import EncodedPicture, WordOrExemplar
from talk2dino.segmentation.windows import SHORT_SIDE
from talk2dino.web.examples import FOLDER, PaintedExample, new_example, pack, painted

MEGAPIXELS = 50  # a photograph of today's cameras; more would only be scaled down
MEMORY = 2 << 30  # bytes for the pictures of all visitors and their results
IDLE_SECONDS = 3600.0  # what a visitor who left had is dropped after an hour


@dataclass(frozen=True)
class Request:
    """What a visitor asks of a picture.

    Attributes:
        words: classes separated by commas, synonyms by semicolons: `cat, sofa; couch`.
        background: whether there is a background.
        threshold: its score.
        pamr: refine the edges.
        examples: classes that are shown, also beside words of the same name.
    """

    words: str
    background: bool = False
    threshold: float = 0.5
    pamr: bool = True
    examples: tuple[PaintedExample, ...] = ()

    @property
    def classes(self) -> dict[str, tuple[WordOrExemplar, ...]]:
        """Names, and the words and exemplars of each; never read from a file of the server.

        Raises:
            ConfigError: no class, or one that is named twice.
        """
        found: dict[str, tuple[WordOrExemplar, ...]] = {}
        if parted(self.words, ",") or not self.examples:
            found |= typed_classes(self.words)
        names = {composed(name): name for name in found}  # an accent may be typed in two ways
        for example in self.examples:
            name = names.get(example.name, example.name)
            found[name] = (*found.get(name, ()), example.exemplar)
        return found


@dataclass(frozen=True, eq=False)
class View:
    """One visitor's encoded picture, examples, and the latest result.

    Attributes:
        name: of the uploaded file.
        picture: encoded once; None after it was taken away.
        short_side: working size in pixels.
        examples: outlive the picture that they were painted on.
        request: those that `result` answers, or None.
        result: or None.
    """

    name: str = ""
    picture: EncodedPicture | None = field(default=None, repr=False)
    short_side: int = SHORT_SIDE
    examples: tuple[PaintedExample, ...] = ()
    request: Request | None = None
    result: SegmentedImage | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Memory that it holds, as far as it counts."""
        held = [tensor for one in self.examples for tensor in (one.pixels, one.inside)]
        if self.picture is not None:
            held += [self.picture.pixels, self.picture.windows.features.patch_tokens]
        size = sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
        if self.result is not None:
            size += self.result.labels.nbytes + self.result.class_scores.nbytes
        return size


class Views:
    """The views of all visitors; may be used from several threads.

    Those that were not used for `seconds` are dropped, and the longest unused ones when all
    together hold more than `most` bytes, whoever else still looks at the page.

    Args:
        most: bytes; the latest view is kept whatever its size.
        seconds: until an unused one is dropped.
        clock: in seconds.
    """

    def __init__(
        self,
        most: int = MEMORY,
        seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.seconds, self.clock = most, seconds, clock
        self._views: OrderedDict[str, tuple[float, View]] = OrderedDict()  # the latest used last
        self._lock = Lock()

    def keep(self, visitor: str, view: View) -> None:
        """Keep a visitor's view in place of the last one."""
        with self._lock:
            self._views[visitor] = self.clock(), view
            self._views.move_to_end(visitor)
            self._drop()

    def of(self, visitor: str) -> View | None:
        """A visitor's view; None if there is none, or none any more."""
        with self._lock:
            self._drop()
            if visitor not in self._views:
                return None
            view = self._views[visitor][1]
            self._views[visitor] = self.clock(), view
            self._views.move_to_end(visitor)
            return view

    def forget(self, visitor: str) -> None:
        """Drop a visitor's view."""
        with self._lock:
            self._views.pop(visitor, None)

    def _drop(self) -> None:
        held = sum(view.nbytes for _, view in self._views.values())
        while self._views:
            visitor, (used, view) = next(iter(self._views.items()))
            fits = held <= self.most or len(self._views) == 1
            if fits and self.clock() - used < self.seconds:
                return
            del self._views[visitor]
            held -= view.nbytes


def open_picture(model: Talk2DINO, file: Path, short_side: int) -> View:
    """Run the encoder on an uploaded file, the only slow step.

    Raises:
        DataError: no picture, or too many pixels.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
    except Exception as error:  # broken files make decoders raise anything
        raise DataError(f"{file.name} is no picture that can be read") from error
    if width * height > MEGAPIXELS * 1_000_000:
        raise DataError(
            f"{file.name} has {width}x{height} pixels; give at most {MEGAPIXELS} million"
        )
    try:
        picture = read_picture(file)
    except Exception as error:
        raise DataError(f"{file.name} is damaged: {error}") from error
    return View(file.name, model.encode(picture, short_side), short_side)


def add_example(
    model: Talk2DINO, view: View, name: str, layers: Sequence[Path], kept: Sequence[PaintedExample]
) -> View:
    """Take what a visitor painted on the picture as an example of a class.

    Args:
        model: looks at it, so that what shows nothing is refused here.
        view: the visitor's, with a picture.
        name: of the class.
        layers: files of the editor.
        kept: the examples to go on with; the view's others are dropped.

    Raises:
        DataError: see `painted`, `new_example` and `Talk2DINO.shown_rows`.
    """
    assert view.picture is not None
    pixels = view.picture.pixels
    height, width = pixels.shape[-2:]
    patch = model.vision.patch_size * min(height, width) / view.short_side
    example = new_example(name, pixels, painted(layers, (height, width)), kept, patch)
    every = (*kept, example)
    names = dict.fromkeys(one.name for one in every)
    model.shown_rows(
        [[one.exemplar for one in every if one.name == name] for name in names], view.short_side
    )
    return replace(view, examples=every)


def answer(
    model: Talk2DINO, view: View, request: Request, kept: ClassEmbeddings | None = None
) -> View:
    """Fulfil the request, computing only what changed; the encoder never runs again.

    Another threshold takes milliseconds; other words, PAMR or the background need new scores.

    Args:
        model: segments.
        view: the visitor's.
        request: what is asked of it.
        kept: class embeddings, of which the words are names.

    Raises:
        ConfigError: no class to look for, or a word that `kept` does not have.
    """
    old, result = view.request, view.result
    moved = old is not None and replace(old, threshold=request.threshold) == request
    if result is not None and moved and request.background:
        return replace(view, request=request, result=result.with_threshold(request.threshold))
    assert view.picture is not None
    threshold = request.threshold if request.background else None
    classes = request.classes
    every = [word for words in classes.values() for word in words if isinstance(word, str)]
    wanted = kept.select(every) if kept else classes
    result = model.segment(view.picture, wanted, threshold, request.pamr, view.short_side)
    return replace(view, request=request, result=result)


def areas(result: SegmentedImage) -> list[list[str]]:
    """Rows of class and share of the picture, largest first."""
    shares = sorted(result.areas().items(), key=lambda pair: -pair[1])
    return [[name, f"{100 * share:.1f} %"] for name, share in shares]


def scores_at(result: SegmentedImage, row: int, column: int) -> list[list[str]]:
    """Rows of class and score at a pixel, best first; none outside the picture."""
    height, width = result.labels.shape
    if not (0 <= row < height and 0 <= column < width):
        return []  # the legend
    scores = sorted(result.scores_at(row, column).items(), key=lambda pair: -pair[1])
    return [[name, f"{score:.3f}"] for name, score in scores]


def python_call(
    checkpoint: str,
    view: View,
    hidden: Sequence[str] = (),
    kept: ClassEmbeddings | None = None,
    calibration: str | None = AUTO,
) -> str:
    """The lines of Python that give the same overlay."""
    request = view.request or Request("")
    classes = request.classes
    plain = all(words == (name,) for name, words in classes.items())
    shown: dict[object, str] = {}
    for example in request.examples:
        picture, mask = (f"{FOLDER}/{file}" for file in example.files)
        shown[example.exemplar] = f"Exemplar({picture!r}, {mask!r})"
    groups = [
        f"{name!r}: [{', '.join(shown.get(word) or repr(word) for word in words)}]"
        for name, words in classes.items()
    ]
    words = repr(list(classes)) if plain else f"{{{', '.join(groups)}}}"
    if shown:  # long ones
        words = "{\n    " + ",\n    ".join(groups) + ",\n}"
    needed = ["Exemplar"] if shown else []
    if kept:
        words = f"ClassEmbeddings.load({kept.origin!r}).select({list(classes)!r})"
        needed = ["ClassEmbeddings"]
    background = f", background={request.threshold:g}" if request.background else ""
    hide = f"hide={list(hidden)!r}" if hidden else ""
    side = f", short_side={view.short_side}" if view.short_side != SHORT_SIDE else ""
    other = "" if calibration == AUTO else f", calibration={calibration!r}"
    return "\n".join(
        [
            f"from talk2dino import {', '.join([*needed, 'Talk2DINO'])}",
            "",
            f"model = Talk2DINO.from_pretrained({checkpoint!r}{other})",
            f"seg = model.segment({view.name!r}, {words}{background}, pamr={request.pamr}{side})",
            f'seg.overlay({hide}).save("overlay.png")',
        ]
    )


def annotation_files(view: View, folder: Path, instances: bool) -> list[Path]:
    """Write the annotations of the latest result: a file per format, a ZIP where it has several.

    The examples that were used are a ZIP of their own.

    Args:
        view: the visitor's, with a result.
        folder: an empty one.
        instances: an annotation per connected area, not one per class.

    Raises:
        ConfigError: a library is missing.
    """
    assert view.result is not None
    files = []
    for made in view.result.save_annotations(folder, [*FORMATS], view.name, instances=instances):
        (made / MARK).unlink()
        inside = [path for path in made.rglob("*") if path.is_file()]
        target = folder / f"{Path(view.name).stem}_{made.name}"
        if len(inside) == 1:
            files.append(inside[0].rename(target.with_name(target.name + inside[0].suffix)))
        else:
            files.append(Path(shutil.make_archive(str(target), "zip", made)))
    if view.request is not None and view.request.examples:
        files.append(pack(view.request.examples, folder / f"{FOLDER}.zip"))
    return files


def return_memory() -> None:
    """Give free memory back to the system: glibc keeps what decoders of pictures have freed."""
    with suppress(OSError, AttributeError, TypeError):  # there is another C library
        ctypes.CDLL(None).malloc_trim(0)
