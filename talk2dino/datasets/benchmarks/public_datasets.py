"""Cityscapes, COCO-Stuff and COCO-Object: label files as downloaded, or converted beforehand."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.errors import Advance, ConfigError, DataError
from talk2dino.files import file_digest, replacing


@dataclass(kw_only=True)
class RawLabelsBenchmark(FolderBenchmark):
    """Reads `mask_suffix`, or the download's own label files where no prepared one exists.

    Preparing only looks every pixel up in a table; here the same table is applied while reading, so
    the scores are the same.

    Attributes:
        raw_suffix: end of a raw label file's name.
        raw_pattern: glob that raw label files match and prepared ones do not.
    """

    raw_suffix: ClassVar[str]
    raw_pattern: ClassVar[str]

    def raw_label_map(self) -> Mapping[int, int | None]:
        """From raw value to label value; `ignore_index` for what does not count, None refuses."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        masks = self._path(self.masks)
        prepared = next(masks.rglob(f"*{self.mask_suffix}"), None)
        if prepared is None and next(masks.rglob(self.raw_pattern), None) is not None:
            self.mask_suffix, self.label_map = self.raw_suffix, self.raw_label_map()
        super().__post_init__()


# The 19 evaluated ids of the 34, in the order of the classes (cityscapesScripts, `labels.py`).
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(kw_only=True)
class CityscapesBenchmark(RawLabelsBenchmark):
    """Train ids as cityscapesScripts' `createTrainIdLabelImgs.py` makes them, or `_labelIds.png`.

    The other 15 ids do not count, and neither does 255.
    """

    raw_suffix = "_gtFine_labelIds.png"
    raw_pattern = "*_gtFine_labelIds.png"

    def raw_label_map(self) -> Mapping[int, int | None]:
        """From id to train id 0..18."""
        return dict.fromkeys(range(34), self.ignore_index) | {
            number: train_id for train_id, number in enumerate(EVALUATED)
        }


SUFFIX = "_instanceTrainIds.png"  # the name mmsegmentation's dataset reads
TRAIN_IDS = "_labelTrainIds.png"  # COCO-Stuff's own prepared maps: other ids, not an input
UNUSED_VALUES = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # COCO ids of nothing, minus one
THING_VALUES = tuple(value for value in range(90) if value not in UNUSED_VALUES)  # 80
STUFF_VALUES = tuple(range(91, 182))
BACKGROUND_VALUES = (*STUFF_VALUES, 255)
_UNKNOWN = -1
_SOURCE = "talk2dino: SHA-256 of the COCO-Stuff label map"  # in a converted PNG


def convert_coco_object(
    masks: Path,
    output: Path,
    num_workers: int = 1,
    advance: Advance = lambda done, total: None,
) -> int:
    """Write `X_instanceTrainIds.png` for every COCO-Stuff label map `X.png`.

    Finished files are skipped, so a stopped conversion continues; they are known by the input's
    SHA-256, which they carry as a text of the PNG, or by their labels. Files appear complete
    or not at all. Subfolders (`train2017`, `val2017`) are kept. `output` may be `masks`: the new
    files then stand beside the old ones, which are never written to.

    Args:
        masks: folder of label maps, searched with its subfolders; files that end in
            `_labelTrainIds.png` or `_instanceTrainIds.png` are no input.
        output: folder to write into.
        num_workers: processes; 0 and 1 work in this one.
        advance: called with (files done, files in all) after every file, and once at the start.

    Returns:
        Number of files written now.

    Raises:
        ConfigError: `output` is a file or lies where a folder cannot be, or `num_workers` < 0.
        DataError: no label map; one that cannot be read or holds a value COCO-Stuff does not
            use; an output that is there already but is no conversion of its input.
    """
    jobs = _jobs(masks, output)
    if num_workers < 0:
        raise ConfigError(f"num_workers={num_workers}: use 0 or more")
    waiting = [(source, target) for source, target in jobs if not _finished(source, target)]
    done = len(jobs) - len(waiting)
    advance(done, len(jobs))
    for folder in sorted({target.parent for _, target in waiting}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise ConfigError(f"output={folder}: cannot create this folder ({reason})") from error
    for _ in _convert_all(waiting, num_workers):
        done += 1
        advance(done, len(jobs))
    return len(waiting)


def object_labels(values: NDArray[np.integer], name: str = "label map") -> NDArray[np.uint8]:
    """COCO-Stuff values as COCO-Object classes.

    Args:
        values: [H, W] of any integer type.
        name: file, for the message.

    Raises:
        DataError: a value that COCO-Stuff does not use; the original treats it as a class.
    """
    wide = values.astype(np.int64)
    labels = _table()[np.clip(wide, 0, 255)]
    unknown = (labels == _UNKNOWN) | (wide < 0) | (wide > 255)
    if unknown.any():
        raise DataError(
            f"{name}: label value {int(wide[unknown][0])} is no class of COCO-Stuff; give the raw "
            "maps of stuffthingmaps_trainval2017 (things 0..89, stuff 91..181, unlabeled 255)"
        )
    return labels.astype(np.uint8)


def _table() -> NDArray[np.int64]:
    table = np.full(256, _UNKNOWN, np.int64)
    table[list(THING_VALUES)] = np.arange(1, len(THING_VALUES) + 1)
    table[list(BACKGROUND_VALUES)] = 0
    return table


def _jobs(masks: Path, output: Path) -> list[tuple[Path, Path]]:
    """Every input with its output, in the order of names."""
    if not masks.is_dir():
        raise DataError(f"input={masks}: no such folder")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output}: is a file; give a folder")
    found = [
        path
        for path in sorted(masks.rglob("*.png"))
        if not path.name.endswith((SUFFIX, TRAIN_IDS)) and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"input={masks}: no label maps X.png (those ending in {TRAIN_IDS} or {SUFFIX} are "
            "none); give the folder of stuffthingmaps_trainval2017"
        )
    return [
        (path, output / path.relative_to(masks).with_name(f"{path.stem}{SUFFIX}")) for path in found
    ]


def _finished(source: Path, target: Path) -> bool:
    if not target.exists():
        return False
    try:
        with Image.open(target) as there:
            same = there.info.get(_SOURCE) == file_digest(source) or np.array_equal(
                np.asarray(there), _converted(source)
            )
    except (OSError, SyntaxError, ValueError, DataError):
        same = False
    if not same:
        raise DataError(f"{target}: is there already but is no conversion of {source}; remove it")
    return True


def _convert_all(jobs: list[tuple[Path, Path]], num_workers: int) -> Iterator[None]:
    if num_workers < 2 or len(jobs) < 2:
        for job in jobs:
            _convert(job)
            yield
        return
    # spawn: a forked copy of a process that runs threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context) as pool:
        running = [pool.submit(_convert, job) for job in jobs]
        try:
            for future in as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _convert(job: tuple[Path, Path]) -> None:
    source, target = job
    labels, origin = Image.fromarray(_converted(source)), PngInfo()
    origin.add_text(_SOURCE, file_digest(source))
    with replacing(target) as temporary:
        labels.save(temporary, format="PNG", pnginfo=origin)


def _converted(source: Path) -> NDArray[np.uint8]:
    """The labels [H, W] of a file of COCO-Stuff as COCO-Object classes."""
    try:
        with Image.open(source) as file:
            if file.mode not in ("L", "P"):
                raise DataError(f"{source}: a {file.mode} picture, not an 8-bit label map")
            values = np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{source}: cannot be read ({error})") from error
    return object_labels(values, str(source))


@dataclass(kw_only=True)
class CocoStuffBenchmark(RawLabelsBenchmark):
    """`X_labelTrainIds.png` as mmsegmentation's `coco_stuff164k.py` makes them, or `X.png`.

    The 171 values that are in use are numbered in their order, 255 does not count.
    """

    raw_suffix = ".png"
    raw_pattern = "*[0-9].png"  # not X_labelTrainIds.png

    def raw_label_map(self) -> dict[int, int | None]:
        """From the value in `stuffthingmaps` to 0..170."""
        used = [*THING_VALUES, *STUFF_VALUES]
        return _only(dict(zip(used, range(len(used)), strict=True)) | {255: self.ignore_index})


@dataclass(kw_only=True)
class CocoObjectBenchmark(RawLabelsBenchmark):
    """`X_instanceTrainIds.png` as `convert_coco_object` makes them, or `X.png`.

    Things are 1..80, everything else is background, unlabeled pixels too.
    """

    raw_suffix = ".png"
    raw_pattern = "*[0-9].png"

    def raw_label_map(self) -> dict[int, int | None]:
        """From the value in `stuffthingmaps` to 0..80."""
        things = {value: number for number, value in enumerate(THING_VALUES, 1)}
        return _only(things | dict.fromkeys(BACKGROUND_VALUES, 0))


def _only(known: dict[int, int]) -> dict[int, int | None]:
    """Refuse the values that COCO-Stuff does not use."""
    return dict.fromkeys(range(256), None) | known
