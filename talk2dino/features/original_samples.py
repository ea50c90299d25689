"""The original's pre-extracted features: one `.pth` file, or tars of one `.pth` per sample."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from talk2dino.errors import DataError
from talk2dino.features.original_fields import Row
from talk2dino.features.tar_files import Member, TarReader, tar_members


class OriginalSamples(Protocol):
    """Images with their annotations, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        """The image and its annotations, at least one."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell this input from another."""


class FeatureFile:
    """A COCO-like dict of `images` and `annotations` that carry tensors, saved by `torch.save`.

    The file is memory-mapped: a tensor is read when it is converted. Images without an annotation
    are left out, as the original's dataset does; annotations keep their order within an image.

    Raises:
        DataError: no such file, not loadable without pickled code, not of that form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"input={path}: no such file")
        content = load_tensors(path, f"input={path}")
        for key in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise DataError(
                    f"input={path}: no list {key!r}; expected what the original's "
                    "dino_extraction_v2.py and text_features_extraction.py write"
                )
        grouped: dict[Any, list[Row]] = defaultdict(list)
        for row in _checked(path, content["annotations"], ("id", "image_id", "caption")):
            grouped[row["image_id"]].append(row)
        images = list(_checked(path, content["images"], ("id", "file_name")))
        known = {row["id"] for row in images}
        for image_id, rows in grouped.items():
            if image_id not in known:
                raise DataError(
                    f"input={path}: annotation {rows[0]['id']} names image {image_id}, which is "
                    "not in its images"
                )
        self._samples = [(row, grouped[row["id"]]) for row in images if row["id"] in grouped]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        return self._samples[index]

    def fingerprint(self) -> dict[str, Any]:
        """Name and size of the file."""
        return {"file": self.path.name, "bytes": self.path.stat().st_size}


class FeatureTars:
    """Tars that the original writes with `--write_as_wds`: a `.pth` per image with one caption.

    Every sample is a dict of the image's and the annotation's keys together (`image_id` is the
    image's id). The last sample of a tar counts like the others.

    Raises:
        DataError: a tar that is cut off, or no `.pth` in any.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = tars
        self._reader = TarReader(tars)
        self._members: list[tuple[int, Member]] = [
            (tar, member)
            for tar, path in enumerate(tars)
            for member in tar_members(path)
            if member.name.endswith(".pth")
        ]
        if not self._members:
            raise DataError(
                f"input={tars[0]}: no .pth in it; for images use extract source=webdataset"
            )

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[Row, Sequence[Row]]:
        tar, member = self._members[index]
        where = f"{self.tars[tar]}: {member.name}"
        try:
            data = self._reader.read(tar, member.offset, member.size)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        row = load_tensors(io.BytesIO(data), where)
        if not isinstance(row, dict) or not {"id", "image_id", "caption"} <= row.keys():
            raise DataError(f"{where}: expected a dict with id, image_id and caption")
        name = str(row.get("file_name", Path(member.name).stem))
        return row | {"id": row["image_id"], "file_name": name}, [row]

    def fingerprint(self) -> dict[str, Any]:
        """Names and sizes of the tars."""
        return {"tars": {path.name: path.stat().st_size for path in self.tars}}


def load_tensors(file: Path | BinaryIO, where: str) -> Any:
    """What `torch.save` wrote, tensors and plain values only; a path is memory-mapped.

    Raises:
        DataError: damaged, or holds objects that only running foreign code could restore.
    """
    try:
        if isinstance(file, Path) and zipfile.is_zipfile(file):  # torch before 1.6 wrote others
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{where}: cannot be loaded safely ({reason[:120]})") from error


def _checked(path: Path, rows: list[Any], keys: tuple[str, ...]) -> Iterator[Row]:
    kind = "images" if "file_name" in keys else "annotations"
    for number, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"input={path}: {kind}[{number}] has no {missing[0]}")
        yield row
