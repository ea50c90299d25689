"""Pictures shared among processes: each picture is one's, and the last to finish gathers.

The processes need no communication, as in extraction. Rank r of W takes every W-th picture from the
r-th on; when it has done them it leaves a record in the hidden folder `.parts` of the output. Who
then finds the records of all and the results of all pictures gathers, under a lock. The records
stay, marked as gathered: a rank that comes late with new results gathers again, and whoever finds
work missing knows from the mark that a record is of an earlier start, whose rank is still to come.
What is gathered are the annotations of all pictures: a data set per format.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from talk2dino.annotations.base import AnnotatedPicture, Annotation, Category, Options
from talk2dino.annotations.data_sets import write_data_sets
from talk2dino.encoders.devices import ProcessRank, process_rank
from talk2dino.errors import ConfigError, DataError
from talk2dino.files import PARTS, in_turn, read_json, user_path, write_json
from talk2dino.inference.result_files import Job


@dataclass(frozen=True)
class Share:
    """What this process does of all pictures.

    Attributes:
        jobs: all pictures, in the same order in every process.
        place: which of the processes this is.
        settings: a digest of what decides the results and what is gathered.
    """

    jobs: Sequence[Job]
    place: ProcessRank
    settings: str = ""
    _unread: dict[Job, object] = field(default_factory=dict)

    @classmethod
    def of(cls, jobs: Sequence[Job], *settings: object) -> Share:
        """The share of a process that torchrun or srun started; else all pictures.

        Args:
            jobs: all pictures.
            settings: plain values that are the same in every process.

        Raises:
            ConfigError: an environment that contradicts itself.
        """
        return cls(jobs, process_rank(), _digest(settings))

    @property
    def mine(self) -> Sequence[Job]:
        """The pictures of this process."""
        return self.jobs[self.place.rank :: self.place.world_size]

    @property
    def alone(self) -> bool:
        """Whether this process does everything."""
        return self.place.world_size == 1

    def begin(self) -> None:
        """Forget that this process had finished before; waits while another one gathers."""
        if not self.alone:
            self._folder().mkdir(exist_ok=True)
            with in_turn(self._folder()):
                self._record(self.place.rank).unlink(missing_ok=True)

    @contextmanager
    def reading(self, job: Job) -> Iterator[None]:
        """Keep which file it was that could not be read; in the end it may be another one."""
        stamp = _stamp(job)
        try:
            yield
        except DataError:
            self._unread[job] = stamp
            raise

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

        Raises:
            SystemExit: status 1, after a line on stderr: all have finished and work is missing.
        """
        if self.alone:
            yield dict(broken)
            return
        names = _digest([_key(job) for job in self.jobs])
        mine = {"settings": self.settings, "names": names, "pictures": len(self.jobs)}
        unread = {_key(job): [why, self._unread.get(job)] for job, why in broken.items()}
        with in_turn(self._folder()):
            write_json(self._record(self.place.rank), {**mine, "broken": unread})
            records = self._records()
            if records is None:
                yield None
                return
            found = self._broken(records)
            undone = [n for n, j in enumerate(self.jobs) if j not in found and not is_done(j)]
            others = {rank for rank, record in enumerate(records) if record["names"] != names}
            late = others | {number % len(records) for number in undone}
            if any(records[rank].get("gathered") for rank in late):
                yield None
                return
            if late:
                for rank in late:  # what it says is not so; its next start leaves another one
                    self._record(rank).unlink(missing_ok=True)
                self._stop(undone, {rank: records[rank]["pictures"] for rank in sorted(others)})
            yield found
            kept = {self._record(rank): record for rank, record in enumerate(records)}
            for path in set(self._folder().glob("segment-*-of-*.json")) - kept.keys():
                path.unlink(missing_ok=True)  # of another number of ranks
            for path, record in kept.items():
                write_json(path, {**record, "gathered": True})

    def _records(self) -> list[dict[str, Any]] | None:
        """Records of all ranks, in order; None unless all have left one with these settings."""
        records = []
        for rank in range(self.place.world_size):
            try:
                records.append(read_json(self._record(rank), dict, "record of a rank"))
            except DataError:
                return None
        return records if all(r.get("settings") == self.settings for r in records) else None

    def _broken(self, records: Sequence[Mapping[str, Any]]) -> dict[Job, str]:
        """Pictures that a rank could not read, in order, if they are still the same files."""
        named = {name: noted for record in records for name, noted in record["broken"].items()}
        noted = {j: named[_key(j)] for j in self.jobs if _key(j) in named}
        return {job: why for job, (why, read) in noted.items() if read == _stamp(job)}

    def _stop(self, undone: Sequence[int], others: Mapping[int, int]) -> None:
        rank, world, here = self.place.rank, self.place.world_size, len(self.jobs)
        lists = "rank {} saw another list of {} pictures, this one {}"
        said = [lists.format(other, seen, here) for other, seen in others.items()]
        if undone:
            first = self.jobs[undone[0]].image.name
            said.append(f"{len(undone)} of {here} pictures are not done ({first})")
        fix = "unless a rank is still to come, start all again with resume=true"
        print(f"rank {rank} of {world}: {'; '.join(said)}; {fix}", file=sys.stderr)
        raise SystemExit(1)

    def _folder(self) -> Path:
        return self.jobs[0].folder / PARTS

    def _record(self, rank: int) -> Path:
        return self._folder() / f"segment-{rank:05d}-of-{self.place.world_size:05d}.json"


def _digest(data: object) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()


def _stamp(job: Job) -> dict[str, int] | None:
    """Size and time of a picture; None for a link that leads nowhere."""
    try:
        return job.picture
    except OSError:
        return None


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
