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

from rich.progress import track

from talk2dino.annotations.base import AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.data_sets import write_data_sets
from talk2dino.encoders.devices import ProcessRank, process_rank
from talk2dino.errors import DataError
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


def annotated(jobs: Iterable[Job]) -> Iterator[AnnotatedPicture]:
    """The pictures of jobs that are done, with the masks that their JSON keeps.

    Args:
        jobs: written with `options`.
    """
    for job in jobs:
        noted = read_json(job.figures, dict, "figures of talk2dino.segment")
        masks = noted["annotations"]["masks"]
        height, width = noted["size"]
        yield AnnotatedPicture(
            job.name,
            height,
            width,
            [Annotation(one["class"], one["counts"], one["score"]) for one in masks],
            job.image,
        )


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
        synonyms: words of each class.
        folder: gets a folder for each format.
        formats: names of `annotations.data_sets.FORMATS`.
        options: of the formats.
        overwrite: replace files that this program did not write, too.

    Raises:
        ConfigError: such files.
    """
    first = read_json(jobs[0].figures, dict, "figures of talk2dino.segment")
    categories = [
        Category(one["name"], tuple(synonyms[one["name"]]), tuple(one["color"]))
        for one in first["classes"]
        if one["name"] in synonyms  # what is left over is none
    ]
    pictures = annotated(track(jobs, "annotations", disable=len(jobs) == 1))
    return write_data_sets(pictures, categories, folder, formats, options, overwrite)
