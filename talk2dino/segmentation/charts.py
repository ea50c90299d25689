"""Charts of an evaluation as HTML and SVG text; colours come from the page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

LABELLED = 64  # classes whose names still fit along the sides of a heat map
CELLS = 4000  # cells of a heat map at most, the largest shares
SMALLEST = 0.005  # share of a row below which a cell stays empty


def class_bars(
    per_class: Mapping[str, float | None],
    before: Mapping[str, float | None] | None = None,
    mean: float | None = None,
) -> str:
    """Bars of IoU, best class first; classes that occur nowhere are listed below.

    Args:
        per_class: IoU in percent, or None for an empty union.
        before: of another result, drawn as a tick on each bar.
        mean: drawn as a line through the bars.
    """
    known = sorted(
        ((name, value) for name, value in per_class.items() if value is not None),
        key=lambda pair: -pair[1],
    )
    rows = []
    for name, value in known:
        other = (before or {}).get(name)
        tick = "" if other is None else f'<u style="left:{other:.1f}%" title="{other:.1f}"></u>'
        line = "" if mean is None else f'<i style="left:{mean:.1f}%"></i>'
        rows.append(
            f'<div class="bar"><span title="{escape(name)}">{escape(name)}</span>'
            f'<div><b style="width:{value:.1f}%"></b>{line}{tick}</div><em>{value:.1f}</em></div>'
        )
    absent = [name for name, value in per_class.items() if value is None]
    note = (
        f'<details class="note"><summary>{len(absent)} classes are neither in a label map nor in a '
        f"prediction</summary>{escape(', '.join(absent))}</details>"
    )
    return f'<div class="bars">{"".join(rows)}</div>{note if absent else ""}'


def heat_map(confusion: Counts, names: Sequence[str]) -> str:
    """The confusion matrix, every row divided by its sum: rows are the truth.

    Args:
        confusion: [K, K] pixels; classes without any are left out.
        names: of the K classes.
    """
    found = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    confusion, names = confusion[np.ix_(found, found)], [names[int(i)] for i in found]
    k, total = max(len(names), 1), confusion.sum(1, keepdims=True)
    share = confusion / np.maximum(total, 1)
    rows, columns = np.nonzero(share >= SMALLEST)
    order = np.argsort(-share[rows, columns], kind="stable")[:CELLS]
    cells = [
        f'<rect x="{j}" y="{i}" width="1" height="1" fill-opacity="{share[i, j] ** 0.6:.2f}">'
        f"<title>{escape(names[i])} → {escape(names[j])}: {100 * share[i, j]:.1f} %</title></rect>"
        for i, j in zip(rows[order], columns[order], strict=True)
    ]
    labelled = k <= LABELLED
    size = max(min(560 / k, 26), 3.2)  # pixels of a cell
    margin = 6.6 * min(max(map(len, names), default=0), 20) + 10 if labelled else 24
    side = margin + k * size + 4
    font = min(size * 0.8, 12)
    texts = _labels(names, size, margin, font) if labelled else _axes(k * size, margin)
    return (
        f'<svg class="heat" viewBox="0 0 {side:.0f} {side:.0f}" style="max-width:{side:.0f}px" '
        'role="img" aria-label="confusion matrix">'
        f'<g transform="translate({margin:.1f} {margin:.1f}) scale({size:.3f})">'
        f'<rect class="frame" width="{k}" height="{k}"/>{"".join(cells)}</g>{texts}</svg>'
    )


def _labels(names: Sequence[str], size: float, margin: float, font: float) -> str:
    parts = []
    for i, name in enumerate(names):
        place, shown = (
            margin + (i + 0.5) * size,
            escape(name if len(name) < 21 else name[:19] + "…"),
        )
        parts.append(
            f'<text x="{margin - 5:.1f}" y="{place + font / 3:.1f}" end="1">{shown}</text>'
        )
        parts.append(
            f'<text transform="translate({place + font / 3:.1f} {margin - 5:.1f}) rotate(-90)">'
            f"{shown}</text>"
        )
    joined = "".join(parts).replace('end="1"', 'text-anchor="end"')
    return f'<g font-size="{font:.1f}">{joined}</g>'


def _axes(length: float, margin: float) -> str:
    middle = margin + length / 2
    return (
        f'<g font-size="12"><text x="{middle:.0f}" y="14" text-anchor="middle">prediction</text>'
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        "truth</text></g>"
    )


def top_confusions(
    confusion: Counts, names: Sequence[str], count: int = 12
) -> list[tuple[str, str, float, float]]:
    """The largest cells beside the diagonal.

    Returns:
        Truth, prediction, percent of all counted pixels, percent of the truth's pixels.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:count]
    found = []
    for i, j in zip(*np.unravel_index(largest, wrong.shape), strict=True):
        if wrong[i, j]:
            of_all = 100 * wrong[i, j] / confusion.sum()
            of_class = 100 * wrong[i, j] / confusion[i].sum()
            found.append((names[i], names[j], float(of_all), float(of_class)))
    return found


def histogram(values: Sequence[float], bins: int = 20) -> str:
    """How many images reach which IoU: percent 0..100 in `bins` bars."""
    counts, _ = np.histogram(np.array(values), bins=bins, range=(0, 100))
    top, width, height = max(int(counts.max()), 1), 560, 120
    step = width / bins
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{height * (1 - n / top):.1f}" width="{step - 2:.1f}" '
        f'height="{height * n / top:.1f}"><title>{100 * i // bins} to {100 * (i + 1) // bins}: '
        f"{n} images</title></rect>"
        for i, n in enumerate(counts.tolist())
    )
    ticks = "".join(
        f'<text x="{width * t / 100:.0f}" y="{height + 18}" text-anchor="{anchor}">{t}</text>'
        for t, anchor in (
            (0, "start"),
            (25, "middle"),
            (50, "middle"),
            (75, "middle"),
            (100, "end"),
        )
    )
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height + 24}" role="img" '
        f'aria-label="IoU per image"><line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
        f'{bars}<g font-size="12">{ticks}</g></svg>'
    )
