"""The pictures that an evaluation writes: image by image, and the best and worst of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from talk2dino.datasets.benchmarks.base import Benchmark, Sample
from talk2dino.datasets.benchmarks.classes import Color
from talk2dino.datasets.pictures import to_picture
from talk2dino.evaluation.metrics import ImageScore, extremes
from talk2dino.files import read_json, replacing, write_json
from talk2dino.segmentation.overlay import (
    ignored_label,
    legend_colors,
    overlay,
    save_label_map,
    save_picture,
)


@dataclass(frozen=True)
class ImageFiles:
    """Which files are written for an image.

    Attributes:
        folder: of the run; files go to `pictures`, `label_maps` and `overlays` in it.
        names: of the K classes.
        ignore_index: label value that does not count.
        pictures: the first so many images get a sheet of image, truth and prediction.
        label_maps: every image gets its label map, a PNG of class indices, and an overlay.
        palette: the dataset's colors for the label maps; None takes those of the overlays.
    """

    folder: Path
    names: Sequence[str]
    ignore_index: int = 255
    pictures: int = 0
    label_maps: bool = False
    palette: Sequence[Color] | None = None

    def paths(self, index: int, name: str) -> list[Path]:
        """Files that image `index` has when it is finished."""
        return list(self._files(index, name).values())

    def _files(self, index: int, name: str) -> dict[str, Path]:
        wanted = {
            "pictures": index < self.pictures,
            "label_maps": self.label_maps,
            "overlays": self.label_maps,
        }
        kinds = [kind for kind, on in wanted.items() if on]
        return {kind: self.folder / kind / f"{name}.png" for kind in kinds}

    def write(self, index: int, sample: Sample, labels: Tensor) -> None:
        """Write the image's files; each appears complete or not at all."""
        files = self._files(index, sample.name)
        labels = labels.cpu() if files else labels
        for kind, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "label_maps":
                colors = self.palette or legend_colors(self.names)
                save_label_map(labels, path, colors, len(self.names))
            elif kind == "overlays":
                save_picture(overlay(to_picture(sample.image.cpu()), labels, self.names), path)
            else:
                save_picture(panel(sample, labels, self.names, self.ignore_index), path)


def panel(sample: Sample, labels: Tensor, names: Sequence[str], ignore_index: int) -> Image.Image:
    """The image, the truth and the prediction side by side, with legends."""
    picture = to_picture(sample.image.cpu())
    truth = sample.target.masked_fill(sample.target == ignore_index, ignored_label(len(names)))
    return side_by_side([picture, *(overlay(picture, m, names) for m in (truth, labels))], gap=8)


def side_by_side(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a row on white, `gap` pixels apart, aligned at the top."""
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


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
        classes: name, RGB color, share of the truth and of the prediction in percent; the ones
            that occur, largest first.
    """

    kind: Literal["best", "worst"]
    name: str
    iou: float
    file: str
    classes: list[tuple[str, Color, float, float]]


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
        truth = truth.masked_fill(truth == benchmark.ignore_index, ignored_label(len(names)))
        file = f"examples/{number:02d}-{kind}.jpg"
        _save(_strip(to_picture(sample.image.cpu()), truth, labels, names), folder / file)
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
    found = read_json(folder / FILE, list, "the examples of an evaluation")
    return [Example(**entry) for entry in found]


def _strip(
    picture: Image.Image, truth: Tensor, labels: Tensor, names: Sequence[str]
) -> Image.Image:
    parts = [picture, *(overlay(picture, m, names, legend=False) for m in (truth, labels))]
    factor = min(HEIGHT / picture.height, WIDTH / picture.width, 1.0)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return side_by_side([part.resize(size, Image.Resampling.LANCZOS) for part in parts], GAP)


def _areas(
    truth: Tensor, labels: Tensor, names: Sequence[str]
) -> list[tuple[str, Color, float, float]]:
    colors = legend_colors(names)
    found = []
    for k, name in enumerate(names):
        shares = [100 * float((m == k).float().mean()) for m in (truth, labels)]
        if any(shares):
            found.append((name, colors[k], shares[0], shares[1]))
    return sorted(found, key=lambda entry: -max(entry[2:]))


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="JPEG", quality=82)
