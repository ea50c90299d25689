"""`python -m talk2dino.segment`: pictures and class names into label maps and overlays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from talk2dino.config import command
from talk2dino.config.command import CHECKPOINTS
from talk2dino.config.words import class_words, listed
from talk2dino.encoders.devices import choose_device
from talk2dino.errors import ConfigError, DataError
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.outputs import Job, plan, write
from talk2dino.inference.segmented import SegmentedImage, background_threshold
from talk2dino.inference.vocabulary import OpenVocabulary
from talk2dino.segmentation.overlay import legend_colors

# what makes two results differ; kept with each result, so that `resume=true` can compare
SETTINGS = ("checkpoint", "classes", "negatives", "templates", "background", "pamr", "short_side")


def require(config: DictConfig) -> None:
    """Say all that is missing at once, and where a checkpoint comes from.

    Raises:
        ConfigError: checkpoint, image or classes are not given.
    """
    missing = [key for key in ("checkpoint", "image", "classes") if config[key] is None]
    if missing:
        how = CHECKPOINTS if "checkpoint" in missing else "for instance classes='[cat,sofa]'"
        raise ConfigError(f"{', '.join(f'{key}=…' for key in missing)} not given; {how}")


def segment(config: DictConfig) -> None:
    """Segment the picture, or all pictures of the folder or pattern, that the config names."""
    classes = class_words(config.classes)
    background_threshold(config.background)  # refuses it before the model is loaded
    output = Path(config.output).expanduser()
    jobs = plan(str(config.image), output)
    command.require_output_folder(jobs[0].overlay.parent, "output")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    settings = {key: settings[key] for key in SETTINGS}
    left = [job for job in jobs if not (config.resume and job.done_with(settings))]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} pictures were done before")
    if left:
        vocabulary = open_vocabulary(config, classes)
        _segment(left, vocabulary, settings, bool(config.heatmaps), single=len(jobs) == 1)


def open_vocabulary(config: DictConfig, classes: dict[str, tuple[str, ...]]) -> OpenVocabulary:
    """Load the model and settle the classes."""
    model = Talk2DINO.from_pretrained(
        config.checkpoint,
        device=choose_device(config.accelerator),
        vision=command.build(config.vision) if config.vision else None,
        text=command.build(config.text) if config.text else None,
    )
    return model.open_vocabulary(
        classes,
        config.background,
        config.pamr,
        config.short_side,
        config.templates,
        negatives=listed(config.negatives),
    )


def _segment(
    jobs: Sequence[Job],
    vocabulary: OpenVocabulary,
    settings: dict[str, Any],
    heatmaps: bool,
    single: bool,
) -> None:
    """Write every result; broken pictures of a folder are named at the end (exit status 1)."""
    console = Console()
    totals: dict[str, list[float]] = {}
    broken: list[str] = []
    for job in track(jobs, "segment", console=console, disable=single):
        try:
            result = vocabulary(job.image)
        except DataError as error:
            if single:
                raise
            broken.append(str(error))
            continue
        write(result, job, heatmaps, settings)
        for name, share in result.areas().items():
            totals.setdefault(name, []).append(share)
    if totals:
        console.print(_table(result, None) if single else _table(result, totals))
        print(f"overlay: {jobs[0].overlay if single else jobs[0].overlay.parent}")
        print(f"label map, areas: {jobs[-1].labels}, {jobs[-1].figures.name}")
    if broken:
        print(f"{len(broken)} of {len(jobs)} pictures could not be read:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in broken), file=sys.stderr)
        raise SystemExit(1)


def _table(result: SegmentedImage, totals: dict[str, list[float]] | None) -> Table:
    """Classes, their share of the picture and their colour; several pictures: the mean share."""
    table = Table()
    table.add_column("")
    table.add_column("class", overflow="fold")
    table.add_column("share" if totals is None else "mean share", justify="right")
    if totals is not None:
        table.add_column("pictures", justify="right")
    shares = result.areas() if totals is None else {k: sum(v) / len(v) for k, v in totals.items()}
    colours = dict(zip(result.classes, legend_colors(result.classes), strict=True))
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        red, green, blue = colours[name]
        swatch = Text("██", style=f"rgb({red},{green},{blue})")
        seen = [] if totals is None else [str(sum(one > 0 for one in totals[name]))]
        table.add_row(swatch, Text(name), f"{100 * share:.1f} %", *seen)
    return table


if __name__ == "__main__":
    command.run("segment", segment, require)
