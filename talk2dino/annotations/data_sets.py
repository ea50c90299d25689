"""Formats by name, and their folders: built aside, put in place whole, known by what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from talk2dino.annotations.base import WRITTEN_BY, AnnotatedPicture, Category, Options, Writer
from talk2dino.annotations.coco_instances import CocoInstances
from talk2dino.annotations.cvat import CvatImages
from talk2dino.annotations.geojson import GeoJson
from talk2dino.annotations.labelstudio import LabelStudio
from talk2dino.annotations.yolo_labels import YoloLabels
from talk2dino.errors import ConfigError, DataError, require_extra
from talk2dino.files import file_digest, read_json, replacing_folder, write_json

FORMATS: dict[str, Callable[[Options], Writer]] = {
    "coco": CocoInstances,
    "yolo": YoloLabels,
    "labelstudio": LabelStudio,
    "cvat": CvatImages,
    "geojson": GeoJson,
}
MARK = "written_by.json"  # in every folder: the digest of the rest


def check_formats(formats: Sequence[str]) -> None:
    """Refuse what cannot be written, before anything long starts.

    Raises:
        ConfigError: an unknown format or one named twice, a text in place of a list, or a library
            that is not installed.
    """
    if isinstance(formats, str):
        raise ConfigError(f"formats={formats!r}: give a list, ['{formats}']")
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(
                f"formats=[{name}]: no such format; choose among {', '.join(FORMATS)}"
            )
        if list(formats).count(name) > 1:
            raise ConfigError(f"formats=[{','.join(formats)}]: {name} is there twice; name it once")
    if formats:
        require_extra("annotations", f"formats=[{','.join(formats)}]")


def refuse_changed(folder: Path, formats: Sequence[str]) -> None:
    """Refuse to replace what is not, file by file, what this program wrote.

    Args:
        folder: holds a folder for each format.
        formats: those to be written.

    Raises:
        ConfigError: the first folder with files of other origin, or corrected ones.
    """
    for name in formats:
        if (folder / name).exists() and not _is_as_written(folder / name):
            raise ConfigError(
                f"{folder / name}: is there and holds other files than were written by "
                "talk2dino.segment, or changed ones; move it away, or overwrite=true"
            )


def write_data_sets(
    pictures: Iterable[AnnotatedPicture],
    categories: Sequence[Category],
    folder: Path,
    formats: Sequence[str],
    options: Options,
    overwrite: bool = False,
) -> list[Path]:
    """Write one data set per format; no more than one picture is in memory.

    Args:
        pictures: gone through once.
        categories: of their annotations.
        folder: gets a folder for each format.
        formats: names of `FORMATS`.
        options: of the formats.
        overwrite: replace files of other origin as well.

    Returns:
        The folders.

    Raises:
        ConfigError: as `check_formats` and `refuse_changed` raise it.
        WriteError: the disk is full, or a folder cannot be written.
    """
    check_formats(formats)
    if not overwrite:
        refuse_changed(folder, formats)
    with ExitStack() as places:
        made: dict[Path, Writer] = {}
        for name in formats:
            target = folder / name
            whole = not target.exists() or _is_as_written(target)
            built = places.enter_context(replacing_folder(target, whole))
            made[built] = FORMATS[name](options)
            made[built].open(built, categories)
        for picture in pictures:
            for writer in made.values():
                writer.add(picture)
        for built, writer in made.items():
            writer.close()
            write_json(built / MARK, {"written_by": WRITTEN_BY, "sha256": _digest(built)})
    for name in formats:
        for stale in [*(folder / name).rglob("*.cache")]:  # a trainer's, of older labels
            if stale.is_file():
                stale.unlink()
    return [folder / name for name in formats]


def _is_as_written(folder: Path) -> bool:
    """Whether a folder holds the very files that were written, and no others."""
    try:
        return bool(read_json(folder / MARK, dict, "")["sha256"] == _digest(folder))
    except (DataError, KeyError):
        return False


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents, hex; of links only where they lead.

    Trainers add caches, and file managers hidden files: those do not count.
    """
    total = hashlib.sha256()
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for path in (Path(where, name) for name in sorted(names)):
            if path != folder / MARK and not path.name.startswith(".") and path.suffix != ".cache":
                content = str(path.readlink()) if path.is_symlink() else file_digest(path)
                line = f"{path.relative_to(folder).as_posix()}\0{content}\n"
                total.update(line.encode(errors="surrogateescape"))
    return total.hexdigest()
