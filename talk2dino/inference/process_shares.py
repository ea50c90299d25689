"""Pictures shared among processes: each picture is one's, and the last to finish gathers.

The processes need no communication, as in extraction. Rank r of W takes every W-th picture from the
r-th on; when it has done them it leaves a record in the hidden folder `.parts` of the output. Who
then finds the records of all and the results of all pictures gathers, under a lock, and takes the
records away. What is gathered are the annotations of all pictures: a data set per format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from talk2dino.annotations.base import AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.data_sets import write_data_sets
from talk2dino.encoders.devices import ProcessRank, process_rank
from talk2dino.errors import ConfigError, DataError
from talk2dino.features.store.shard_writer import shard_lock
from talk2dino.files import read_json, user_path, write_json
from talk2dino.inference.result_files import Job

PARTS = ".parts"


@dataclass(frozen=True)
class Share:
    """What this process does of all pictures.

    Attributes:
        jobs: all pictures, in the same order in every process.
        place: which of the processes this is.
    """

    jobs: Sequence[Job]
    place: ProcessRank

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Share:
        """The share of a process that torchrun or srun started; else all pictures.

        Raises:
            ConfigError: an environment that contradicts itself.
        """
        return cls(jobs, process_rank())

    @property
    def mine(self) -> Sequence[Job]:
        """The pictures of this process."""
        return self.jobs[self.place.rank :: self.place.world_size]

    @property
    def alone(self) -> bool:
        """Whether this process does everything."""
        return self.place.world_size == 1

    def begin(self) -> None:
        """Forget that this process had finished before."""
        if not self.alone:
            self._record(self.place.rank).unlink(missing_ok=True)

    @contextmanager
    def finished(
        self, broken: Mapping[Job, str], is_done: Callable[[Job], bool]
    ) -> Iterator[dict[Job, str] | None]:
        """Say that this process has done its part, and gather within this context if all have.

        Args:
            broken: own pictures that could not be read, with what is wrong.
            is_done: whether the results of a picture are there, made with these settings.

        Returns:
            The broken pictures of all processes; None while others still work.
        """
        if self.alone:
            yield dict(broken)
            return
        parts = self._folder()
        parts.mkdir(exist_ok=True)
        named = {_key(job): reason for job, reason in broken.items()}
        write_json(self._record(self.place.rank), named)
        with shard_lock(parts, 0):
            found = self._all_broken()
            if found is None or not all(is_done(job) for job in self.jobs if job not in found):
                yield None
                return
            yield found
            for record in parts.glob("segment-*-of-*.json"):  # of another number of ranks, too
                record.unlink(missing_ok=True)

    def _all_broken(self) -> dict[Job, str] | None:
        """Broken pictures of all ranks, in order; None unless all have left their records."""
        named: dict[str, str] = {}
        for rank in range(self.place.world_size):
            try:
                named |= read_json(self._record(rank), dict, "record of a rank")
            except DataError:
                return None
        return {job: named[_key(job)] for job in self.jobs if _key(job) in named}

    def _folder(self) -> Path:
        return self.jobs[0].folder / PARTS

    def _record(self, rank: int) -> Path:
        return self._folder() / f"segment-{rank:05d}-of-{self.place.world_size:05d}.json"


def _key(job: Job) -> str:
    return job.overlay.relative_to(job.folder).as_posix()


def annotations_folder(jobs: Sequence[Job], image: str) -> Path:
    """Where the data sets of several pictures, or of one that is named alone, go."""
    alone = user_path(image).is_file()
    return jobs[0].folder / (f"{jobs[0].overlay.stem}_annotations" if alone else "annotations")


def refuse_no_folder(folder: Path, formats: Sequence[str], jobs: Sequence[Job]) -> None:
    """Refuse to begin where the data sets could not be put in the end (ConfigError).

    Args:
        folder: gets a folder for each format.
        formats: those to be written.
        jobs: whose results must not lie among them.
    """
    for one in (folder, *(folder / name for name in formats)) if formats else ():
        if not one.is_dir() and (one.exists() or one.is_symlink()):
            raise ConfigError(f"{one}: is no folder, and formats= needs one there; move it away")
    for job in jobs if formats else ():
        if job.overlay.is_relative_to(folder):
            raise ConfigError(
                f"subfolders=true: the results of {job.name} would lie among the data sets in "
                f"{folder}; rename the folder of the picture"
            )


def annotated(jobs: Iterable[Job], classes: int) -> Iterator[AnnotatedPicture]:
    """The pictures of jobs that are done, with the masks that their JSON keeps.

    Args:
        jobs: written with `options`.
        classes: how many there are.

    Raises:
        DataError: a JSON that is damaged.
    """
    for job in jobs:
        with _damaged(job.figures) as noted:
            height, width = map(int, noted["size"])
            masks = [
                Annotation(
                    range(classes).index(one["class"]), str(one["counts"]), float(one["score"])
                )
                for one in noted["annotations"]["masks"]
            ]
        yield AnnotatedPicture(job.name, height, width, masks, job.image)


@contextmanager
def _damaged(file: Path) -> Iterator[dict[str, Any]]:
    """The content of a picture's JSON; a DataError if it holds other things than are looked for."""
    noted = read_json(file, dict, "figures of talk2dino.segment")
    try:
        yield noted
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: damaged ({reason}); remove it and use resume=true") from error


def write_annotations(
    jobs: Sequence[Job],
    synonyms: Mapping[str, Sequence[str]],
    folder: Path,
    formats: Sequence[str],
    options: Options,
    overwrite: bool,
) -> list[Path]:
    """Gather the masks of all jobs into a data set per format.

    Args:
        jobs: one or more, all done with `options`.
        synonyms: words of each class, in order.
        folder: gets a folder for each format.
        formats: names of `annotations.data_sets.FORMATS`.
        options: of the formats.
        overwrite: replace files that this program did not write, too.

    Raises:
        ConfigError: such files.
        DataError: a job's JSON is damaged.
    """
    with _damaged(jobs[0].figures) as first:
        colors = {one["name"]: one["color"] for one in first["classes"]}
        categories = []
        for name, words in synonyms.items():
            red, green, blue = map(int, colors[name])
            categories.append(Category(name, tuple(words), (red, green, blue)))
    pictures = annotated(track(jobs, "annotations", disable=len(jobs) == 1), len(categories))
    return write_data_sets(pictures, categories, folder, formats, options, overwrite)
