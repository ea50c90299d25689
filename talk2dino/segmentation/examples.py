"""The best and the worst segmented images of an evaluation, for its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from talk2dino.atomic import replacing, write_json
from talk2dino.segmentation.benchmarks import Benchmark, Sample
from talk2dino.segmentation.outputs import pixels
from talk2dino.segmentation.overlay import IGNORED, Colour, class_colours, overlay
from talk2dino.segmentation.per_image import ImageScore, extremes

FILE = "examples.json"
HEIGHT, WIDTH = 240, 420  # of a panel, in pixels at most: a report holds dozens
GAP = 4  # pixels between panels


@dataclass(frozen=True)
class Example:
    """An image of the report.

    Attributes:
        kind: best or worst.
        name: of the image.
        iou: mean over the classes in its label map, percent.
        file: JPEG with image, truth and prediction side by side, relative to the run folder.
        classes: name, RGB colour, share of the truth and of the prediction in percent; the ones
            that occur, largest first.
    """

    kind: Literal["best", "worst"]
    name: str
    iou: float
    file: str
    classes: list[tuple[str, Colour, float, float]]


def write_examples(
    scores: Sequence[ImageScore],
    count: int,
    benchmark: Benchmark,
    segment: Callable[[Sample], Tensor],
    folder: Path,
) -> None:
    """Segment the `count` best and worst images once more and write their panels.

    That costs a few images and needs no memory of label maps during the run, and so an evaluation
    that was interrupted shows the same as one that was not.

    Args:
        scores: of all images.
        count: 0 writes nothing.
        benchmark: gives images and names.
        segment: sample to labels [H, W].
        folder: of the run; `examples.json` and `examples/*.jpg` go there.
    """
    best, worst = extremes(scores, count)
    chosen = [("best", s) for s in best] + [("worst", s) for s in worst]
    names = benchmark.class_list.names
    examples = []
    for number, (kind, score) in enumerate(chosen):
        sample = benchmark.sample(score.index)
        labels = segment(sample).cpu()
        truth = sample.target.cpu()
        truth = truth.masked_fill(truth == benchmark.ignore_index, IGNORED)
        file = f"examples/{number:02d}-{kind}.jpg"
        _save(_strip(pixels(sample), truth, labels, names), folder / file)
        classes = _areas(truth, labels, names)
        examples.append(
            Example("best" if kind == "best" else "worst", score.name, score.iou, file, classes)
        )
    if count:
        write_json(folder / FILE, [asdict(example) for example in examples])


def read_examples(folder: Path) -> list[Example]:
    """The examples of a run folder; none if it has no such file."""
    if not (folder / FILE).is_file():
        return []
    found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return [Example(**entry) for entry in found]


def _strip(
    picture: Image.Image, truth: Tensor, labels: Tensor, names: Sequence[str]
) -> Image.Image:
    parts = [picture, *(overlay(picture, m, names, legend=False) for m in (truth, labels))]
    factor = min(HEIGHT / picture.height, WIDTH / picture.width, 1.0)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    sheet = Image.new("RGB", (3 * size[0] + 2 * GAP, size[1]), "white")
    for place, part in enumerate(parts):
        sheet.paste(part.resize(size, Image.Resampling.LANCZOS), (place * (size[0] + GAP), 0))
    return sheet


def _areas(
    truth: Tensor, labels: Tensor, names: Sequence[str]
) -> list[tuple[str, Colour, float, float]]:
    colours = class_colours(names)
    found = []
    for k, name in enumerate(names):
        shares = [100 * float((m == k).float().mean()) for m in (truth, labels)]
        if any(shares):
            found.append((name, colours[k], shares[0], shares[1]))
    return sorted(found, key=lambda entry: -max(entry[2:]))


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="JPEG", quality=82)
