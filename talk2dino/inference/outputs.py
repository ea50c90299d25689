"""Which pictures a command means, and the files that it writes for each of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from talk2dino.datasets.pictures import is_picture
from talk2dino.errors import ConfigError, DataError
from talk2dino.files import read_json, write_json
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.segmentation.overlay import legend_colors, save_picture


@dataclass(frozen=True)
class Job:
    """One picture and where its results go.

    Attributes:
        image: the picture file.
        overlay: PNG of the picture with colors and legend.
    """

    image: Path
    overlay: Path

    @property
    def labels(self) -> Path:
        """The label map."""
        return self._beside("_labels.png")

    @property
    def figures(self) -> Path:
        """The JSON with areas; it is written last."""
        return self._beside(".json")

    def heatmaps(self, names: Sequence[str]) -> dict[str, Path]:
        """The map of each class; names that would give one file name get their number."""
        slugs = [re.sub(r"[^\w-]+", "-", name) for name in names]
        unique = [
            slug if slugs.count(slug) == 1 else f"{slug}-{number}"
            for number, slug in enumerate(slugs)
        ]
        paths = [self._beside(f"_heat_{slug}.png") for slug in unique]
        return dict(zip(names, paths, strict=True))

    def _beside(self, ending: str) -> Path:
        return self.overlay.with_name(self.overlay.stem + ending)

    def done_with(self, settings: Mapping[str, Any]) -> bool:
        """Whether these results exist, made with the same settings."""
        return self.figures.is_file() and _settings_of(self.figures) == dict(settings)


def plan(image: str, output: Path) -> list[Job]:
    """The jobs for a picture, a folder of pictures, or a pattern such as `photos/*.jpg`.

    Raises:
        DataError: no picture there, or two whose results would have one name.
        ConfigError: several pictures, but one output file, or results on top of pictures.
    """
    path = Path(image).expanduser()
    if path.is_file():
        target = output / f"{path.stem}.png" if output.is_dir() else output.with_suffix(".png")
        jobs = [Job(path, target)]
    else:
        jobs = [Job(one, output / f"{one.stem}.png") for one in _several(image, path)]
        if output.suffix or output.is_file():
            raise ConfigError(
                f"output={output}: image={image} means several pictures, so output must be a folder"
            )
    _check_collisions(jobs, image)
    return jobs


def _several(image: str, path: Path) -> list[Path]:
    if path.is_dir():
        found = list(path.iterdir())
    else:
        found = [Path(one) for one in glob(str(path), recursive=True)]  # noqa: PTH207 (any root)
    found = [one for one in found if is_picture(one)]
    if not found and path.is_dir():
        raise DataError(f"image={image}: no pictures in this folder")
    if not found:
        raise DataError(f"image={image}: no such file or folder, and no picture fits it as pattern")
    return sorted(found)


def _check_collisions(jobs: list[Job], image: str) -> None:
    sources = {job.image.resolve() for job in jobs}
    for job in jobs:
        for target in (job.overlay, job.labels):
            if target.resolve() in sources:
                raise ConfigError(
                    f"output={job.overlay.parent}: {target.name} would overwrite the image of "
                    "that name; use another folder or name"
                )
    counts = Counter(target for job in jobs for target in (job.overlay, job.labels))
    twice = next((target for target, count in counts.items() if count > 1), None)
    if twice is not None:
        names = [job.image.name for job in jobs if twice in (job.overlay, job.labels)]
        raise DataError(
            f"image={image}: {' and '.join(names)} would both become {twice.name}; rename one"
        )


def write(
    result: SegmentedImage, job: Job, heatmaps: bool = False, settings: Mapping[str, Any] = {}
) -> None:
    """Write overlay, label map, heat maps if wanted, and last the JSON with areas.

    Args:
        result: of the job's picture.
        job: names the files.
        heatmaps: one picture per class besides the background.
        settings: plain values for the JSON; what `Job.done_with` compares.
    """
    save_picture(result.overlay(), job.overlay)
    result.save_labels(job.labels)
    maps = job.heatmaps(result.names) if heatmaps else {}
    for name, path in maps.items():
        save_picture(result.heatmap(name), path)
    content = {
        "image": str(job.image),
        "size": list(result.labels.shape),  # rows, columns
        "classes": figures(result),
        "overlay": job.overlay.name,
        "label_map": job.labels.name,
        "heatmaps": {name: path.name for name, path in maps.items()},
        "settings": dict(settings),
    }
    write_json(job.figures, content)


def figures(result: SegmentedImage) -> list[dict[str, Any]]:
    """Index, name, share 0..1, pixels and color of every class."""
    colors = legend_colors(result.classes)
    return [
        {
            "index": index,
            "name": name,
            "share": share,
            "pixels": round(share * result.labels.numel()),
            "color": list(colors[index]),
        }
        for index, (name, share) in enumerate(result.areas().items())
    ]


def _settings_of(path: Path) -> object:
    try:
        return read_json(path, dict, "figures of talk2dino.segment").get("settings")
    except DataError:
        return None
