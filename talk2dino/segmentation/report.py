"""What an evaluation leaves behind: a table in the terminal, pictures, and `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from torch import Tensor

from talk2dino.datasets.benchmarks.base import Sample
from talk2dino.files import replacing
from talk2dino.segmentation.overlay import overlay
from talk2dino.segmentation.summary import published


def table(columns: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Any]) -> Table:
    """A table of per-class IoU and mIoU, a column per result.

    Args:
        columns: results (see `SegmentationModule`) by heading.
        reference: published mIoU, see `published`; printed below one's own.
    """
    first = next(iter(columns.values()))
    out = Table(title=f"{first['benchmark']}: IoU in percent, {first['images']} images")
    out.add_column("class")
    for heading in columns:
        out.add_column(heading, justify="right")
    for name in first["per_class"]:
        out.add_row(name, *(_percent(result["per_class"][name]) for result in columns.values()))
    out.add_section()
    for key, label in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        out.add_row(label, *(_percent(result[key]) for result in columns.values()), style="bold")
    for name, pamr, value in published(reference):
        label = f"published: {name}" + {True: ", PAMR", False: "", None: ""}[pamr]
        out.add_row(label, *[""] * (len(columns) - 1), f"{value:.1f}", style="dim")
    return out


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def panel(sample: Sample, labels: Tensor, names: Sequence[str], ignore_index: int) -> Image.Image:
    """The image, the truth and the prediction side by side."""
    picture = Image.fromarray(sample.image.cpu().permute(1, 2, 0).contiguous().numpy())
    truth = sample.target.masked_fill(sample.target == ignore_index, 255)
    parts = [picture, *(overlay(picture, m, names) for m in (truth, labels))]
    gap = 8
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (width, max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + gap
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
