"""What an evaluation has counted so far, image by image, so that it can stop and go on.

A folder `records/`:

* `settings.json`: what decides the figures (weights' digests, benchmark, PAMR, precision);
* `part-<rank>-<random>.jsonl`: one line per finished image, appended by one process.

A line holds the non-zero cells of the image's own confusion matrix: some hundred bytes, so
that the 5,000 images of COCO-Stuff take a few megabytes. A process that is killed while it writes
leaves half a line, which is not read. Nobody writes into a part of another process, and a rank
decides by its own images only what is left to do, so ranks need not agree about anything.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from talk2dino.errors import ConfigError
from talk2dino.files import read_json, refuse_foreign_run, write_json
from talk2dino.renamed import first_difference

SETTINGS = "settings.json"
_RESULTS = (  # beside the records
    *("results.json", "confusion.npz", "examples.json", "report.html"),
    *("environment.json", "images.csv", "examples"),
)


@dataclass(frozen=True)
class Record:
    """A finished image.

    Attributes:
        name: of the image, unique in its benchmark.
        cells: non-zero cells of its confusion matrix [K, K], counted row by row from 0.
        counts: pixels in these cells.
        seconds: when it was finished, since the process began to predict.
    """

    name: str
    cells: list[int]
    counts: list[int]
    seconds: float

    @classmethod
    def of(cls, name: str, confusion: Tensor, seconds: float) -> Record:
        """Take the record of an image from its confusion matrix [K, K]."""
        flat = confusion.flatten().cpu()
        cells = flat.nonzero().flatten()
        return cls(name, cells.tolist(), flat[cells].tolist(), round(seconds, 3))

    def confusion(self, num_classes: int) -> Tensor:
        """The image's confusion matrix, [K, K] int64."""
        flat = torch.zeros(num_classes * num_classes, dtype=torch.int64)
        cells, counts = torch.tensor([self.cells, self.counts], dtype=torch.int64)
        flat[cells] = counts
        return flat.view(num_classes, num_classes)


class Records:
    """The records of one evaluation, on disk.

    Args:
        folder: created when the first line is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._part: IO[str] | None = None

    def claim(
        self, settings: Mapping[str, Any], resume: bool = True, files: Sequence[str] = ()
    ) -> None:
        """Reserve the folder for an evaluation with these settings.

        Args:
            settings: plain values, compared with those of the records that are there.
            resume: False drops what is there.
            files: that images will have; of another origin, they are not to be overwritten.

        Raises:
            ConfigError: the folder holds records of other settings, or other files.
        """
        file = self.folder / SETTINGS
        begun = file.is_file()
        killed = self.folder.is_dir() and all(p.name.startswith(".") for p in self.folder.iterdir())
        names = _RESULTS if killed else (self.folder.name, *_RESULTS)  # before its first file
        refuse_foreign_run(self.folder.parent, file.is_file, [*names, *files])
        if not resume:
            for part in self._parts():
                part.unlink()
        wanted = json.loads(json.dumps(settings))
        if begun and resume:
            old = read_json(file, dict, "the settings of an evaluation, or another folder")
            if found := first_difference(old, wanted):
                key, *values = found
                before, now = map(_short, values)
                raise ConfigError(
                    f"{self.folder}: began with {key}={before}, now it is {now}; choose another "
                    "folder with hydra.run.dir=…, or drop what is there with resume=false"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)

    def read(self) -> dict[str, Record]:
        """All finished images by name; half-written lines are left out."""
        return {record.name: record for part in self._parts() for record in _lines(part)}

    def seconds(self) -> float:
        """How long rank 0 has predicted in all its processes together."""
        parts = (list(_lines(part)) for part in self._parts() if part.name.startswith("part-0-"))
        return sum(max((record.seconds for record in part), default=0.0) for part in parts)

    def add(self, record: Record, rank: int = 0) -> None:
        """Append a finished image; it outlives the process from here on."""
        if self._part is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"part-{rank}-{uuid.uuid4().hex[:12]}.jsonl"
            self._part = (self.folder / name).open("a", encoding="utf-8")
        self._part.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
        self._part.flush()

    def close(self) -> None:
        """Finish this process's part; another `add` begins a new one."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))


def how_to_go_on(folder: Path, override: str) -> str:
    """What to do after an image could not be read.

    Args:
        folder: of the evaluation.
        override: of the command line, by which the same command finds this folder again.
    """
    done = len(Records(folder / "records").read())
    return (
        f"{done} images are finished and kept: mend the file and run the same command with "
        f"{override}, and with resume=false if its settings change"
    )


def _lines(part: Path) -> Iterator[Record]:
    names = {item.name for item in fields(Record)}
    for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed in the middle
        if isinstance(content, dict) and set(content) == names:
            yield Record(**content)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:16]}…"
