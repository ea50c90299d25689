"""What the charts of a report show, as numbers; `templates/charts.html.j2` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

LABELED = 64  # classes whose names still fit along the sides of a heat map
CELLS = 4000  # cells of a heat map at most, the largest shares
SMALLEST = 0.005  # share of a row below which a cell stays empty


@dataclass(frozen=True)
class HeatMap:
    """A confusion matrix as squares; rows are the truth.

    Attributes:
        names: of the classes that occur, in the order of rows and columns.
        cells: row, column, and share 0..1 of the row's pixels; the largest first.
    """

    names: list[str]
    cells: list[tuple[int, int, float]]

    @property
    def labeled(self) -> bool:
        """Whether the names stand along the sides."""
        return len(self.names) <= LABELED

    @property
    def size(self) -> float:
        """Side of a cell in pixels."""
        return max(min(560 / max(len(self.names), 1), 26), 3.2)

    @property
    def margin(self) -> float:
        """Pixels above and left of the cells, for the names."""
        return 6.6 * min(max(map(len, self.names), default=0), 20) + 10 if self.labeled else 24


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another.

    Attributes:
        truth: name of their class.
        taken: name of the predicted class.
        of_all: percent of all counted pixels.
        of_class: percent of the pixels of `truth`.
    """

    truth: str
    taken: str
    of_all: float
    of_class: float


def heat_map(confusion: Counts, names: Sequence[str]) -> HeatMap:
    """The confusion matrix, every row divided by its sum.

    Args:
        confusion: [K, K] pixels; classes without any are left out.
        names: of the K classes.
    """
    found = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    confusion = confusion[np.ix_(found, found)]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    cells = [(i, j, float(share[i, j])) for i, j in np.argwhere(share >= SMALLEST).tolist()]
    cells.sort(key=lambda cell: -cell[2])
    return HeatMap([names[i] for i in found.tolist()], cells[:CELLS])


def top_confusions(confusion: Counts, names: Sequence[str], count: int = 12) -> list[Confusion]:
    """The largest cells beside the diagonal of a confusion matrix [K, K], largest first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:count]
    found = []
    for i, j in (divmod(place, len(names)) for place in largest.tolist()):
        if pixels := int(wrong[i, j]):
            of_all, of_class = 100 * pixels / confusion.sum(), 100 * pixels / confusion[i].sum()
            found.append(Confusion(names[i], names[j], float(of_all), float(of_class)))
    return found


def histogram(values: Sequence[float], bins: int = 20) -> list[int]:
    """How many of the values, percent 0..100, fall into each of equal bins."""
    counts: list[int] = np.histogram(np.array(values), bins=bins, range=(0, 100))[0].tolist()
    return counts
