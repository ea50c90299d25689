"""`python -m talk2dino.video`: a video and class names into a video with the classes in color."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

import talk2dino
from talk2dino.config import command
from talk2dino.config.command import progress
from talk2dino.config.model_and_classes import (
    check_words,
    class_words,
    open_vocabulary,
    require,
    shares_table,
)
from talk2dino.errors import ConfigError, DataError, require_extra
from talk2dino.files import read_json, refuse_foreign, user_path, write_json
from talk2dino.segmentation.overlay import legend_colors
from talk2dino.videos.frames import Smoother, segment_video
from talk2dino.videos.video_files import WRITTEN_BY, is_our_video, open_video


def require_all(config: DictConfig) -> None:
    """Refuse to begin without a key that is needed or without PyAV (ConfigError)."""
    require(config, "checkpoint", "video", "classes")
    require_extra("video", "video")


def video(config: DictConfig) -> None:
    """Segment the frames of a video; writes the overlay and a JSON of figures beside it."""
    classes = class_words(config.classes, config.background)
    check_words(config, classes)
    smoother = Smoother(config.smoothing)
    source, output = user_path(config.video), user_path(config.output)
    open_video(source).close()
    if output.suffix.lower() != ".mp4":
        raise ConfigError(f"output={output}: the name must end in .mp4")
    figures = output.with_suffix(".json")
    refuse_foreign([output, figures], is_ours, WRITTEN_BY, config.overwrite, source)
    command.require_output_folder(output.parent, "output")
    vocabulary = open_vocabulary(config, classes, config.short_side)
    with progress("frames") as advance:
        found = segment_video(source, output, vocabulary, smoother, advance)
    colors = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in legend_colors(list(found.shares))]
    content = {
        "written_by": f"{WRITTEN_BY} {talk2dino.__version__}",
        "video": str(source),
        "overlay": output.name,
        "frames": found.frames,
        "size": list(found.size),
        "shares": found.shares,
        "colors": dict(zip(found.shares, colors, strict=True)),
        "checkpoint": str(config.checkpoint),
        "background": config.background,
        "short_side": config.short_side,
        "flicker": found.flicker,
        "cuts": found.cuts,
        "smoothing": config.smoothing,
    }
    write_json(figures, content)
    Console(markup=False, emoji=False).print(shares_table(found.shares))
    told = f"{output}: {found.frames} frames"
    if found.flicker is not None:
        told += f", {100 * found.flicker:.2f} % of labels change a frame, {found.cuts} cuts"
    print(told)


def is_ours(file: Path) -> bool:
    """Whether this command wrote an overlay, or the figures beside it."""
    if file.suffix != ".json":
        return is_our_video(file)
    try:
        return str(read_json(file, dict, "figures").get("written_by")).startswith(WRITTEN_BY)
    except DataError:
        return False


if __name__ == "__main__":
    command.run("video", video, require_all)
