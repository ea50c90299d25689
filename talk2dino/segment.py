"""`python -m talk2dino.segment`: pictures and class names into label maps and overlays."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from talk2dino import cli
from talk2dino.api import SegmentedImage, Talk2DINO
from talk2dino.encoders.device import choose_device
from talk2dino.errors import ConfigError, DataError
from talk2dino.segmentation.overlay import save_label_map
from talk2dino.segmentation.report import save_picture


def segment(config: DictConfig) -> None:
    """Segment the picture, or all pictures of the folder, that the config names."""
    classes = class_names(config.classes)
    jobs = plan(Path(config.image).expanduser(), Path(config.output).expanduser())
    model = Talk2DINO.from_pretrained(
        config.checkpoint,
        device=choose_device(config.accelerator),
        vision=cli.build(config.vision) if config.vision else None,
        text=cli.build(config.text) if config.text else None,
    )
    console = Console()
    for image, output in track(jobs, "segment", console=console, disable=len(jobs) == 1):
        result = model.segment(
            image,
            classes,
            background=config.background if config.background is not None else False,
            pamr=config.pamr,
            short_side=config.short_side,
        )
        write(result, output)
    if len(jobs) == 1:
        console.print(areas(result))
    print(f"overlay: {jobs[0][1] if len(jobs) == 1 else jobs[0][1].parent}")
    print(f"label map: {label_path(jobs[-1][1])}")


def class_names(given: object) -> list[str]:
    """The class list of the command line, `[cat,sofa]` or `"cat, sofa"`.

    Raises:
        ConfigError: no class.
    """
    parts = list(given) if isinstance(given, ListConfig) else str(given).split(",")
    names = [str(part).strip() for part in parts if str(part).strip()]
    if not names:
        raise ConfigError("classes: the list is empty; name what to look for: classes='[cat,sofa]'")
    return names


def plan(image: Path, output: Path) -> list[tuple[Path, Path]]:
    """Pairs of picture and overlay file.

    Raises:
        DataError: no picture there.
        ConfigError: a folder of pictures, but one output file.
    """
    if image.is_file():
        overlay = output / f"{image.stem}.png" if output.is_dir() else output.with_suffix(".png")
        if overlay.resolve() == image.resolve():
            raise ConfigError(f"output={output}: this would overwrite the image; use another name")
        cli.require_output_folder(overlay.parent, "output")
        return [(image, overlay)]
    if not image.is_dir():
        raise DataError(f"image={image}: no such file or folder")
    if output.suffix:
        raise ConfigError(f"output={output}: image is a folder, so output must be a folder too")
    if output.resolve() == image.resolve():
        raise ConfigError(f"output={output}: is the folder of the images; use another folder")
    cli.require_output_folder(output, "output")
    known = Image.registered_extensions()
    found = sorted(path for path in image.iterdir() if path.suffix.lower() in known)
    if not found:
        raise DataError(f"image={image}: no pictures in this folder")
    for one, other in pairwise(sorted(found, key=lambda path: path.stem)):
        if one.stem == other.stem:
            raise DataError(
                f"image={image}: {one.name} and {other.name} would both become {one.stem}.png; "
                "rename one"
            )
    return [(path, output / f"{path.stem}.png") for path in found]


def label_path(output: Path) -> Path:
    """Where the label map of an overlay goes."""
    return output.with_name(f"{output.stem}_labels.png")


def write(result: SegmentedImage, output: Path) -> None:
    """Write overlay and label map."""
    save_picture(result.overlay(), output)
    save_label_map(result.labels, label_path(output))


def areas(result: SegmentedImage) -> Table:
    """A table of the classes and their share of the picture."""
    table = Table()
    table.add_column("class")
    table.add_column("share", justify="right")
    for index, name in enumerate(result.classes):
        table.add_row(name, f"{100 * float((result.labels == index).float().mean()):.1f} %")
    return table


if __name__ == "__main__":
    cli.run("segment", segment)
