"""Classes that a visitor shows: what was painted on a picture, within limits."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import check_word, composed
from talk2dino.datasets.pictures import to_picture
from talk2dino.errors import DataError
from talk2dino.inference.exemplars import MASK, Exemplar

MOST = 8  # examples of a visitor
SIDE = 768  # longer side of the picture that is painted on, in pixels
FOLDER = "exemplars"  # in the call that the page shows


@dataclass(frozen=True, eq=False)
class PaintedExample:
    """What a visitor painted.

    Attributes:
        name: of the class.
        number: tells those of a class apart.
        pixels: the picture, `[3, H, W]` uint8.
        inside: where it was painted on, `[H, W]` bool.
        exemplar: of the two.
    """

    name: str
    number: int
    pixels: Tensor = field(repr=False)
    inside: Tensor = field(repr=False)
    exemplar: Exemplar = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exemplar", Exemplar(self.pixels, self.inside))

    @property
    def label(self) -> str:
        """What the page calls it."""
        return f"{self.name} {self.number}"

    @property
    def files(self) -> tuple[str, str]:
        """Picture and mask below the folder that `exemplars=` takes."""
        return f"{self.name}/{self.number}.png", f"{self.name}/{self.number}{MASK}.png"


def to_paint_on(pixels: Tensor) -> Image.Image:
    """A picture `[3, H, W]` uint8 as the editor gets it, at most `SIDE` long."""
    picture = to_picture(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def painted(layers: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Where a visitor painted, `[H, W]` bool.

    Args:
        layers: files of the editor, opaque where something is painted.
        size: of the picture, height and width in pixels.

    Raises:
        DataError: nothing is painted, or a file is none of the editor's.
    """
    inside = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        try:
            with Image.open(layer) as opened:
                if max(opened.size) > 2 * SIDE or "A" not in opened.getbands():
                    raise ValueError("no layer")
                alpha = opened.getchannel("A").resize(size[::-1], Image.Resampling.NEAREST)
        except Exception as error:  # broken files make decoders raise anything
            raise DataError("what was painted cannot be read; paint again") from error
        inside |= torch.from_numpy(np.asarray(alpha) > 127)
    if not inside.any():
        raise DataError("Nothing is painted: brush over what the class looks like")
    return inside


def new_example(
    name: str, pixels: Tensor, inside: Tensor, known: Sequence[PaintedExample], patch: float
) -> PaintedExample:
    """An example within the limits.

    Args:
        name: of the class, as typed.
        pixels: the picture, `[3, H, W]` uint8.
        inside: where it was painted on, `[H, W]` bool.
        known: those that are kept beside it.
        patch: side of a patch in pixels of the picture.

    Raises:
        DataError: no name or one that names no folder, less than a patch, or too many examples.
    """
    name = composed(name)
    if not name:
        raise DataError("Name the class that you painted")
    check_word(name, "name of the class")
    if name.startswith(".") or len(name) > 100 or any(letter in ",;/\\:" for letter in name):
        raise DataError(
            "the name of a painted class has at most 100 letters and none of , ; : / \\"
        )
    if len(known) >= MOST:
        raise DataError(f"{MOST} examples are in use; uncheck one")
    if inside.sum() < patch * patch:
        raise DataError(
            f"What is painted is smaller than a patch of {patch:.0f}x{patch:.0f} pixels, the "
            "least that the model sees; paint more"
        )
    taken = {example.number for example in known if example.name == name}
    number = next(n for n in range(1, MOST + 1) if n not in taken)
    return PaintedExample(name, number, pixels, inside)


def pack(examples: Sequence[PaintedExample], target: Path) -> Path:
    """Write a ZIP of the folder that `exemplars=` and `exemplars.read_folder` take."""
    with zipfile.ZipFile(target, "w") as packed:
        for example in examples:
            mask = Image.fromarray((255 * example.inside.byte()).numpy())
            for name, picture in zip(
                example.files, (to_picture(example.pixels), mask), strict=True
            ):
                file = BytesIO()
                picture.save(file, "PNG")
                packed.writestr(name, file.getvalue())
    return target
