"""Figures and tables as text: percent with one digit, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

_RULES = {"l": "---", "r": "---:"}


def percent(value: float | None) -> str:
    """A figure in percent with one digit; a dash for None and NaN.

    >>> from talk2dino.evaluation.tables import percent
    >>> percent(87.06), percent(None)
    ('87.1', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """A Markdown table; floats with two digits, other cells by `str`.

    Args:
        columns: the header.
        rows: as many cells each.
        align: a letter per column, `l` for left and `r` for right; empty means left everywhere.
    """
    rules = [_RULES[letter] for letter in align or "l" * len(columns)]
    lines = [columns, rules, *([_cell(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").splitlines())
