"""`python -m talk2dino.map`: a map of any size into a label map of the same place."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table

from talk2dino.config import command
from talk2dino.config.model_and_classes import (
    build_refinement,
    check_words,
    listed,
    named_classes,
    open_vocabulary,
    require_classes,
)
from talk2dino.errors import ConfigError, check_number
from talk2dino.files import user_path
from talk2dino.maps.blocks import MapResult, output_files, refuse_foreign_maps, segment_map
from talk2dino.maps.geotiff import MapImage


def run_map(config: DictConfig) -> None:
    """Segment the file that the config names."""
    classes = named_classes(config)
    check_words(config, classes)
    build_refinement(config)
    check_number("minimum_area", config.minimum_area, 1, 10**12)
    if config.minimum_area > 1 and not config.polygons:
        raise ConfigError(
            f"minimum_area={config.minimum_area}: does nothing without polygons; "
            "add polygons=true or leave minimum_area out"
        )
    with MapImage(
        config.image,
        config.meters_per_pixel,
        config.scale,
        *(listed(config[key]) or None for key in ("bands", "stretch", "value_range")),
    ) as image:
        if config.polygons:
            image.require_degrees()
        files = output_files(user_path(config.output), config.polygons)
        command.require_output_folder(files[0].parent, "output")
        refuse_foreign_maps(files, image.path, config.overwrite)
        vocabulary = open_vocabulary(config, classes, config.window)
        with command.progress("map") as advance:
            result = segment_map(
                vocabulary,
                image,
                files[0],
                polygons=config.polygons,
                minimum_area=config.minimum_area,
                overwrite=config.overwrite,
                advance=advance,
            )
        report(result, image.pixel_area, files)


def report(result: MapResult, pixel_area: float | None, files: list[Path]) -> None:
    """Print the area of each class, and what was left out."""
    unit = "pixels" if pixel_area is None else "square meters"
    table = Table(
        Column("class", overflow="fold"),
        Column("share", justify="right"),
        Column(unit, justify="right"),
    )
    seen = max(sum(result.pixels.values()), 1)
    for name, pixels in sorted(result.pixels.items(), key=lambda pair: -pair[1]):
        area = pixels * (pixel_area or 1)
        table.add_row(name, f"{100 * pixels / seen:.1f} %", f"{area:,.0f}")
    Console(markup=False, emoji=False).print(table)  # names have brackets
    if result.before:
        print(f"{result.before} of {result.blocks} blocks were done before")
    if result.ignored:
        print(f"{result.ignored} pixels without data are labeled as ignored")
    print(f"label map: {files[0]}")
    if result.polygons is not None:
        print(f"polygons: {files[1]} ({result.polygons})")


if __name__ == "__main__":
    command.run("map", run_map, lambda config: require_classes(config, "checkpoint", "image"))
