"""Pictures shared among processes: each picture is one's, and the last to finish gathers.

The processes need no communication, as in extraction. Rank r of W takes every W-th picture from the
r-th on; when it has done them it leaves a record in the hidden folder `.parts` of the output. Who
then finds the records of all and the results of all pictures gathers, under a lock, and takes the
records away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from talk2dino.encoders.devices import ProcessRank, process_rank
from talk2dino.errors import DataError
from talk2dino.files import PARTS, in_turn, read_json, write_json
from talk2dino.inference.result_files import Job


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
        named = {job.overlay.name: reason for job, reason in broken.items()}
        write_json(self._record(self.place.rank), named)
        with in_turn(parts):
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
        return {j: named[j.overlay.name] for j in self.jobs if j.overlay.name in named}

    def _folder(self) -> Path:
        return self.jobs[0].overlay.parent / PARTS

    def _record(self, rank: int) -> Path:
        return self._folder() / f"segment-{rank:05d}-of-{self.place.world_size:05d}.json"
