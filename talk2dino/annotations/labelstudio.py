"""Label Studio: `tasks.json` with brush masks as predictions, and the labeling setup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from talk2dino.annotations.base import (
    WRITTEN_BY,
    AnnotatedPicture,
    Category,
    Mask,
    Options,
    check_file_name,
)

LENGTHS = (3, 4, 8, 16)  # bits that a run's length may take


class LabelStudio:
    """Writes a task per picture and, for a new project, `label_config.xml`.

    Args:
        options: `image_root_url`.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def open(self, folder: Path, categories: Sequence[Category]) -> None:
        """Write the labeling setup."""
        self.categories = categories
        labels = "".join(
            f"    <Label value={quoteattr(one.name)} background={quoteattr(one.hex_color)}/>\n"
            for one in categories
        )
        (folder / "label_config.xml").write_text(
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n</View>\n',
            encoding="utf-8",
        )
        self.file = (folder / "tasks.json").open("w", encoding="utf-8")
        self.file.write("[")
        self.first = True

    def add(self, picture: AnnotatedPicture) -> None:
        """Write its task (ConfigError: its name is no text)."""
        check_file_name(picture.file_name, "image")
        self.file.write(("" if self.first else ",") + "\n" + json.dumps(self._task(picture)))
        self.first = False

    def _task(self, picture: AnnotatedPicture) -> dict[str, Any]:
        root = self.options.image_root_url
        # Label Studio unquotes these, and takes the keys of a cloud storage as they are.
        quoted = root.startswith(("http://", "https://", "/data/"))
        address = root + (quote(picture.file_name) if quoted else picture.file_name)
        names = [one.name for one in self.categories]
        return {"data": {"image": address}, "predictions": [prediction(picture, names)]}

    def close(self) -> None:
        """End the list."""
        with self.file:
            self.file.write("\n]\n")


def prediction(
    picture: AnnotatedPicture,
    names: Sequence[str],
    from_name: str = "label",
    to_name: str = "image",
    version: str = WRITTEN_BY,
) -> dict[str, Any]:
    """What Label Studio takes for a prediction: a brush region per mask, with scores.

    Args:
        picture: with its masks.
        names: label of each category.
        from_name: of the `BrushLabels` in the labeling setup.
        to_name: of its `Image`.
        version: of the model.
    """
    result: list[dict[str, Any]] = []
    shape = picture.height, picture.width
    for number, one in enumerate(picture.annotations, 1):
        value = {"format": "rle", "rle": list(brush(*picture.cropped(one), shape))}
        result.append(
            {
                "id": f"a{number}",
                "type": "brushlabels",
                "from_name": from_name,
                "to_name": to_name,
                "original_width": picture.width,
                "original_height": picture.height,
                "image_rotation": 0,
                "value": value | {"brushlabels": [names[one.category]]},
                "score": one.score,
            }
        )
    made: dict[str, Any] = {"model_version": version, "result": result}
    areas = [picture.area(one) for one in picture.annotations]
    if areas:
        scores = [one.score for one in picture.annotations]
        made["score"] = round(float(np.average(scores, weights=areas)), 6)
    return made


def brush(
    mask: Mask, corner: tuple[int, int] = (0, 0), shape: tuple[int, int] | None = None
) -> bytes:
    """A mask as Label Studio's brush has it: RGBA pixels of 0 or 255, row by row, in packed runs.

    Bits, most significant first: 32 for the number of values, 5 for the bits of a value less one,
    4 each for the four sizes of a length, less one. Then for every run 1, two bits that choose the
    size, the length less one, and the value.

    Args:
        mask: `[h, w]` of 0 and 1, a part of the picture; the rest is 0.
        corner: column and row of the picture where it begins.
        shape: height and width of the picture; None: the mask is as large.
    """
    height, width = shape or mask.shape
    pixels = height * width
    rows, columns = np.nonzero(np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0))
    places = (rows + corner[1]) * width + columns + corner[0]
    edges, times = np.unique(places, return_counts=True)
    edges = edges[(times == 1) & (edges < pixels)]  # twice: it runs on from a row's end
    first = int(len(edges) > 0 and edges[0] == 0)  # value of the first pixel
    starts = edges if first else np.insert(edges, 0, 0)
    lengths = 4 * np.diff(starts, append=pixels)
    values = (np.arange(len(starts)) + first) % 2 * 255
    longest = 1 << LENGTHS[-1]
    pieces = -(-lengths // longest)
    values = values.repeat(pieces)
    rest = lengths - (pieces - 1) * longest
    lengths = np.full(len(values), longest)
    lengths[np.cumsum(pieces) - 1] = rest
    choice = np.searchsorted(1 << np.array(LENGTHS), lengths)
    size = np.array(LENGTHS)[choice]
    # flag, choice, length and value of a run as one number of 3 + size + 8 bits
    codes = (((4 + choice) << size) + lengths - 1 << 8) + values
    head = [_bits(np.array([4 * pixels]), 32), _bits(np.array([7]), 5)]
    head += [_bits(np.array([one - 1]), 4) for one in LENGTHS]
    return np.packbits(np.concatenate([*head, _bits(codes, size + 11)])).tobytes()


def _bits(
    numbers: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.int64]:
    """The last `sizes` bits of each number, most significant first, one after the other."""
    sizes = np.broadcast_to(sizes, numbers.shape)
    place = np.arange(int(sizes.max()))[::-1]
    table = numbers[:, None] >> place & 1
    found: npt.NDArray[np.int64] = table[place < sizes[:, None]]
    return found
