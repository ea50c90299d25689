"""Plain tar files read at offsets: their names, their members, and reads from any process."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talk2dino.errors import DataError
from talk2dino.files import user_path

_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


def expand_tars(tars: str | Sequence[str], key: str) -> list[Path]:
    """All tars that a brace range, a glob, a folder, a file or a list of those names, in order.

    Args:
        tars: `cc3m/{00000..00331}.tar`, `cc3m/*.tar`, `cc3m`, `cc3m/00000.tar`, or several.
        key: the config key, for messages.

    Raises:
        DataError: nothing there, a missing file, or one that is named twice.
    """
    found: list[Path] = []
    for item in [tars] if isinstance(tars, str) else tars:
        for name in _without_braces(str(item)):
            found += _existing(user_path(name), key)
    if not found:
        raise DataError(f"{key}={tars}: names no tar")
    seen: set[Path] = set()
    for path in found:
        if path in seen:
            raise DataError(f"{key}: {path} is named twice; name every tar once")
        seen.add(path)
    return found


def tar_members(path: Path) -> Iterator[Member]:
    """The regular files of a plain tar, in order, the last one included.

    Raises:
        DataError: compressed, no tar at all, or cut off.
    """
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            listing: Any = tar
            while (info := tar.next()) is not None:
                listing.members.clear()  # tarfile would keep them all
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                if info.offset_data + info.size > size:
                    break
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
    except tarfile.ReadError as error:
        if not end:
            raise DataError(f"{path}: no plain tar ({error}); unpack a compressed one") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    _check_end(path, end, size)


def _check_end(path: Path, end: int, size: int) -> None:
    """After the last member come zeros or nothing; tarfile itself stops silently at other bytes."""
    with path.open("rb") as file:
        file.seek(min(end, size))
        other = file.read(_BLOCK).strip(b"\0")
    if end - size >= _BLOCK or (end > size and size % _BLOCK) or other:
        raise DataError(
            f"{path}: is cut off or damaged at byte {min(end, size)} of {size}; copy or download "
            "it again"
        )


def read_member(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a tar from `offset`; OSError if they are not there."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{path}: ends before byte {offset + size}")
    return data


def _without_braces(pattern: str) -> Iterator[str]:
    """`a{1..3}{x,y}` as `a1x`, `a1y`, `a2x`, …; zeros before the first number set the width."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(found.group(1))
    if numbers:
        first, last = numbers.groups()
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = found.group(1).split(",")
    for choice in choices:
        yield from _without_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _existing(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise DataError(f"{key}={path}: no .tar in this folder")
        return found
    if path.is_file():
        return [path]
    if not any(mark in str(path) for mark in "*?["):
        raise DataError(f"{key}: {path}: no such file")
    parent = Path(path.anchor)
    found = sorted(p for p in parent.glob(str(path.relative_to(path.anchor))) if p.is_file())
    if not found:
        raise DataError(f"{key}={path}: no file matches")
    return found
