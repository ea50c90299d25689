"""Hands pictures and tables to whatever loggers there are; files in the run folder come first.

A picture is always a PNG in the run folder. Weights & Biases and TensorBoard get a copy of it,
known by the methods they have; the CSV logger has none of them and needs no more than the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image


def boards(trainer: L.Trainer) -> list[tuple[Any, Any]]:
    """Every logger, and what it writes to."""
    loggers: list[Any] = trainer.loggers
    return [(logger, logger.experiment) for logger in loggers]


def show_picture(trainer: L.Trainer, name: str, file: Path) -> None:
    """Give the picture `file` to every logger that takes pictures, under `name`."""
    for logger, board in boards(trainer):
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(name, [str(file)])
        elif hasattr(board, "add_image"):  # TensorBoard
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            board.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def show_table(
    trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Give a table to every logger that takes tables or text."""
    for logger, board in boards(trainer):
        if hasattr(logger, "log_table"):  # Weights & Biases
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])
        elif hasattr(board, "add_text"):  # TensorBoard
            board.add_text(name, markdown_table(columns, rows), trainer.global_step)


def close_loggers(trainer: L.Trainer) -> None:
    """Write everything out; the next run of a sweep in this process then starts its own."""
    for _, board in boards(trainer):
        for name in ("finish", "close"):  # of Weights & Biases, of TensorBoard
            if hasattr(board, name):
                getattr(board, name)()
                break


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with two digits."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
