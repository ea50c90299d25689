"""Which pictures a command means, and the files that it writes for each of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

from PIL import Image

import talk2dino
from talk2dino.annotations.base import Options
from talk2dino.annotations.data_sets import MARK
from talk2dino.datasets.pictures import HEIF, is_picture, picture_suffixes, unread
from talk2dino.errors import ConfigError, DataError, say
from talk2dino.files import read_json, user_path, write_json
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.renamed import first_difference
from talk2dino.segmentation.overlay import is_our_picture, legend_colors, save_picture

_FIGURES = {"image", "size", "classes", "overlay", "label_map"}  # keys of every JSON of ours


@dataclass(frozen=True)
class Job:
    """One picture and where its results go.

    Attributes:
        image: the picture file.
        overlay: PNG of the picture with colors and legend.
        folder: that of all results.
        name: of the picture below the folder that `image=` begins with, for data sets.
    """

    image: Path
    overlay: Path
    folder: Path
    name: str

    @property
    def picture(self) -> dict[str, int]:
        """Size and time of the picture's file, by which another one of its name is told."""
        about = self.image.stat()
        return {"bytes": about.st_size, "modified": about.st_mtime_ns}

    @property
    def labels(self) -> Path:
        """The label map."""
        return self._beside("_labels.png")

    @property
    def figures(self) -> Path:
        """The JSON with areas; it is written last."""
        return self._beside(".json")

    def heatmaps(self, names: Sequence[str]) -> dict[str, Path]:
        """The map of each class; names that would give one file name get their number.

        Names are cut to 100 bytes, and count as one if a file system that ignores case would.
        """
        slugs = [re.sub(r"[^\w-]+", "-", n).encode()[:100].decode(errors="ignore") for n in names]
        counts = Counter(map(str.casefold, slugs))
        taken = {slug for slug, count in counts.items() if count == 1}
        paths = {}
        for number, (name, slug) in enumerate(zip(names, slugs, strict=True)):
            if counts[slug.casefold()] > 1:
                slug = f"{slug}-{number}"
                while slug.casefold() in taken:
                    slug += "-"
                taken.add(slug.casefold())
            paths[name] = self._beside(f"_heat_{slug}.png")
        return paths

    def files(self, heatmaps: Sequence[str] = ()) -> list[Path]:
        """All files of this job, with the maps of the classes `heatmaps`."""
        return [self.figures, self.overlay, self.labels, *self.heatmaps(heatmaps).values()]

    def _beside(self, ending: str) -> Path:
        return self.overlay.with_name(self.overlay.stem + ending)

    def lacks(
        self,
        settings: Mapping[str, Any],
        heatmaps: Sequence[str] = (),
        cut: Mapping[str, Any] | None = None,
    ) -> str:
        """Why these results are not those of this picture and these settings; empty if they are.

        Args:
            settings: as `write` noted them.
            heatmaps: classes whose maps are wanted.
            cut: of `Options`, if annotations are wanted.
        """
        absent = next((file for file in self.files() if not file.is_file()), None)
        if absent is not None:
            return f"{absent.name} is not there"
        figures = _figures_of(self.figures)
        noted = figures.get("heatmaps")
        known = set(noted if isinstance(noted, dict) else ())  # others are of an earlier run
        maps = self.heatmaps(heatmaps).values()
        if not set(heatmaps) <= known or not all(file.is_file() for file in maps):
            return "it has no heat maps"
        if cut is not None:
            noted = figures.get("annotations")
            if not isinstance(noted, dict):
                return "it has no annotations"
            if other := first_difference({key: noted.get(key) for key in cut}, dict(cut)):
                return "with {}={!s:.60}, now {!s:.60}".format(*other)
        if figures.get("picture", self.picture) != self.picture:
            return "of another picture"
        old = figures.get("settings")
        if not isinstance(old, dict):
            return "it has no settings"
        now = dict(settings)
        if "weights" not in old:  # of version 0.1, which noted less
            now = {key: value for key, value in now.items() if key in old}
        if old != now:
            other = first_difference(old, now) or ("settings", "others", "these")
            return "with {}={!s:.60}, now {!s:.60}".format(*other)
        ordered = ("words", "classes")  # their order is that of the labels
        same = all(_keys(old.get(key)) == _keys(now.get(key)) for key in ordered)
        return "" if same else "with the classes in another order"

    def foreign(self, heatmaps: Sequence[str] = ()) -> Path | None:
        """The first file that is in the way and was not written by this program."""
        there = [file for file in self.files(heatmaps) if file.exists()]
        if not there:
            return None
        figures = _figures_of(self.figures) if self.figures.is_file() else {}
        ours = figures.keys() >= _FIGURES
        named = {figures["overlay"], figures["label_map"], self.figures.name} if ours else set()
        if is_our_picture(self.labels) and _has_legend(self.overlay, self.labels):
            named.add(self.overlay.name)  # of version 0.1, killed before it wrote the figures
        return next((f for f in there if f.name not in named and not is_our_picture(f)), None)


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, Mapping) else []


def plan(
    image: str, output: str | Path, subfolders: bool = False, formats: Sequence[str] = ()
) -> list[Job]:
    """The jobs for a picture, a folder of pictures, or a pattern such as `photos/*.jpg`.

    Args:
        image: as the config says it.
        output: the overlay of a picture, or a folder: one that is there, or ends in a slash.
        subfolders: keep the folders of the pictures, see `Job.name`, below `output`.
        formats: of annotations, which cannot write every name of a file.

    Raises:
        DataError: no picture there, two whose results would have one name, or a name that no format
            can write.
        ConfigError: an output of another kind than PNG, several pictures but one output file, or
            results on top of pictures.
    """
    path = user_path(image)
    as_folder = str(output).endswith((os.sep, "/"))  # which a Path forgets
    output = user_path(output)
    as_folder = as_folder or output.is_dir()
    if path.is_file():
        named = output.suffix.lower() in picture_suffixes()  # `results.v1` is not a kind of picture
        if named and output.suffix.lower() != ".png" and not as_folder:
            raise ConfigError(
                f"output={output}: overlays are PNG; use output={output.with_suffix('.png')}"
            )
        if as_folder:
            target = output / f"{path.stem}.png"
        else:
            target = output if named else output.with_name(f"{output.name}.png")
        jobs = [Job(path, target, target.parent, path.name)]
    else:
        jobs, root = [], _literal(path)
        for one in _several(image, path, output, subfolders):
            name = one.relative_to(root)
            place = output / name.parent if subfolders else output
            jobs.append(Job(one, place / f"{one.stem}.png", output, name.as_posix()))
        if not as_folder and (output.suffix.lower() in picture_suffixes() or output.is_file()):
            raise ConfigError(
                f"output={output}: image={image} means several pictures, so output must be a folder"
            )
    _check_collisions(jobs, image, subfolders)
    if formats or subfolders:
        _check_names(jobs, image)
    return jobs


def _check_names(jobs: list[Job], image: str) -> None:
    for job in jobs:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in job.name):
            raise DataError(
                f"image={image}: {job.name!a} has a control character, or bytes that are not "
                "UTF-8, which formats= and subfolders= cannot write; rename it"
            )
        if ".." in Path(job.name).parts:
            raise DataError(
                f"image={image}: {job.name} leads back by ..; put no .. behind a wildcard, for "
                "formats= and subfolders= name pictures by their folders"
            )


def _literal(path: Path) -> Path:
    """The folder that a pattern begins with; one that is there is no wildcard: `trip [2020]/*`."""
    return next(one for one in (path, *path.parents) if one.is_dir() or one == one.parent)


def _several(image: str, path: Path, output: Path, below: bool) -> list[Path]:
    if path.is_dir():
        files = list(_visible(path) if below else path.iterdir())
    else:
        root = _literal(path)
        pattern = f"{escape(str(root))}/{path.relative_to(root)}"
        files = [Path(one) for one in glob(pattern, recursive=True)]  # noqa: PTH207 (any root)
    results = output.resolve()  # of an earlier run, if the pattern finds them
    data_sets = [mark.parent for mark in results.glob(f"*annotations/*/{MARK}")]
    found = sorted(
        one
        for one in files
        if is_picture(one)
        and not (one.resolve().is_relative_to(results) and is_our_picture(one))
        and not any((one.parent.resolve() / one.name).is_relative_to(own) for own in data_sets)
    )
    if found:
        _say_left_out(image, path, files, output, below)
        return found
    if not below and (left := _left_below(image, path, output)):
        raise DataError(f"image={image}: no pictures in this folder; {left}")
    endings = sorted({one.suffix.lower() for one in files if one.is_file() and one.suffix})
    if endings:
        raise DataError(f"image={image}: no pictures that can be read ({unread(endings)})")
    if path.is_dir():
        raise DataError(f"image={image}: no pictures in this folder")
    raise DataError(f"image={image}: no such file or folder, and no picture fits it as pattern")


def _say_left_out(image: str, path: Path, files: Sequence[Path], output: Path, below: bool) -> None:
    """Say what is left out: photographs that need a library, and, but for results, subfolders."""
    unread_here = [one for one in files if one.suffix.lower() in HEIF and not is_picture(one)]
    if unread_here:
        why = unread(sorted({one.suffix.lower() for one in unread_here}))
        say(f"image={image}: {len(unread_here)} pictures are left out; {why}")
    if not below and (left := _left_below(image, path, output)):
        say(f"image={image}: {left}")


def _left_below(image: str, path: Path, output: Path) -> str:
    """How many pictures lie in a folder's subfolders, and how to take them; empty for none."""
    every = (one for one in _visible(path) if one.parent != path) if path.is_dir() else ()
    count = sum(is_picture(one) and not one.is_relative_to(output) for one in every)
    takes = "subfolders=true takes them"
    return f"{count} pictures in its subfolders are left out; {takes}" if count else ""


def _visible(folder: Path) -> Iterator[Path]:
    """All below a folder but what is hidden, or lies in a hidden folder."""
    for one in folder.rglob("*"):
        if not any(part.startswith(".") for part in one.relative_to(folder).parts):
            yield one


def _check_collisions(jobs: list[Job], image: str, subfolders: bool) -> None:
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
        names = [job.name for job in jobs if twice in (job.overlay, job.labels)]
        apart = len({name.rpartition("/")[0] for name in names}) > 1 and not subfolders
        fix = "subfolders=true keeps their folders" if apart else "rename one"
        raise DataError(
            f"image={image}: {' and '.join(names[:2])} would both become {twice.name}; {fix}"
        )


def refuse_heatmap_collisions(jobs: Sequence[Job], names: Sequence[str], image: str) -> None:
    """Refuse heat maps under the name of another picture, or of its results (DataError)."""
    taken = {file: job for job in jobs for file in (job.image, job.overlay, job.labels)}
    for job in jobs if names else ():
        for target in job.heatmaps(names).values():
            if target in taken:
                raise DataError(
                    f"image={image}: {target.name} would be a heat map of {job.name} and "
                    f"belongs to {taken[target].name}; rename one"
                )


def write(
    result: SegmentedImage,
    job: Job,
    heatmaps: bool = False,
    settings: Mapping[str, Any] = {},
    options: Options | None = None,
) -> None:
    """Write overlay, label map, heat maps if wanted, and last the JSON with areas.

    Args:
        result: of the job's picture.
        job: names the files.
        heatmaps: one picture per class besides the background.
        settings: plain values for the JSON; what `Job.lacks` compares.
        options: of the annotations that the JSON keeps for `write_annotations`; None for none.
    """
    job.figures.unlink(missing_ok=True)  # until all is new, nothing says that it is done
    save_picture(result.overlay(), job.overlay)
    result.save_labels(job.labels)
    maps = job.heatmaps(result.names) if heatmaps else {}
    for name, path in maps.items():
        save_picture(result.heatmap(name), path)
    content: dict[str, Any] = {
        "written_by": f"talk2dino.segment {talk2dino.__version__}",
        "image": str(job.image),
        "picture": job.picture,
        "size": list(result.labels.shape),  # rows, columns
        "classes": figures(result),
        "overlay": job.overlay.name,
        "label_map": job.labels.name,
        "heatmaps": {name: path.name for name, path in maps.items()},
        "settings": dict(settings),
    }
    if options is not None:
        masks = [one.as_dict() for one in result.annotations(options)]
        content["annotations"] = {**options.cut, "masks": masks}
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


def refuse_foreign_outputs(jobs: Sequence[Job], heatmaps: Sequence[str] = ()) -> None:
    """Refuse to overwrite what this program did not write (ConfigError)."""
    for job in jobs:
        if (file := job.foreign(heatmaps)) is not None:
            raise ConfigError(
                f"output={file.parent}: {file.name} is there and was not written by "
                "talk2dino.segment; use another output, or overwrite=true"
            )


def _has_legend(overlay: Path, labels: Path) -> bool:
    """Whether a picture is as large as a label map with a strip below."""
    try:
        with Image.open(overlay) as one, Image.open(labels) as other:
            return one.width >= other.width and one.height > other.height
    except Exception:  # somebody's, of whatever kind
        return False


def _figures_of(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict, "figures of talk2dino.segment")
    except DataError:
        return {}
