"""Pictures and tables for W&B and TensorBoard, which take them in ways of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from talk2dino.evaluation.tables import markdown_table


def loggers_of(trainer: L.Trainer) -> list[tuple[Any, Any]]:
    """Every logger, and its client: W&B's run, TensorBoard's writer."""
    loggers: list[Any] = trainer.loggers
    return [(logger, logger.experiment) for logger in loggers]


def show_picture(trainer: L.Trainer, name: str, file: Path) -> None:
    """Give the picture `file` to every logger that takes pictures, under `name`."""
    for logger, client in loggers_of(trainer):
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(name, [str(file)])
        elif hasattr(client, "add_image"):  # TensorBoard
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            client.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def show_table(
    trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Give a table to every logger that takes tables or text."""
    for logger, client in loggers_of(trainer):
        if hasattr(logger, "log_table"):  # Weights & Biases
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])
        elif hasattr(client, "add_text"):  # TensorBoard
            client.add_text(name, markdown_table(columns, rows), trainer.global_step)


def close_loggers(trainer: L.Trainer) -> None:
    """Write everything out; the next run of a sweep in this process then starts its own."""
    for _, client in loggers_of(trainer):
        if hasattr(client, "finish"):  # Weights & Biases
            client.finish()
        elif hasattr(client, "close"):  # TensorBoard
            client.close()
