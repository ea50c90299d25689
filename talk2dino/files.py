"""Files that appear complete or not at all (temporary name, flush, rename), and text read back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from talk2dino.errors import ConfigError, DataError, WriteError

if sys.platform != "win32":
    import fcntl

PARTS = ".parts"  # folder of the records of what is done, within that of the results
T = TypeVar("T")


def user_path(path: str | Path) -> Path:
    """A path that somebody typed: `~` and `~name` in front are home folders.

    Shells leave them in `key=~/photos`. One of a name that no user has stays as it is.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's raises for unknown names)


def cache_dir() -> Path:
    """`$TALK2DINO_CACHE`, else `~/.cache/talk2dino`: weights, embeddings and lists of tars."""
    return user_path(os.environ.get("TALK2DINO_CACHE", "~/.cache/talk2dino"))


@contextmanager
def replacing(target: Path, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is synced and renamed to `target`.

    The temporary name depends on the target only, so a restarted run overwrites what a killed one
    left. While another process writes the same target it is another name: both write a whole file,
    and the later one stays. With `shared` it is always unique, for processes of several machines.
    On any exception it is removed. The file gets the permissions that the umask says. A failed
    write (disk full, quota, permissions) raises WriteError with one line, whichever library failed;
    give `torch.save` an open file for that.
    """
    unique = temporary_name(target).with_suffix(f".{uuid.uuid4().hex}.tmp")
    with _said_in_one_line(target), ExitStack() as stack:
        temporary = unique if shared else temporary_name(target)
        handle = None if shared else _create_held(temporary)
        if handle is None:
            temporary = unique
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, handle)
        with _removed_on_error(temporary):
            mode = os.fstat(handle).st_mode  # as the umask says; some libraries write files as 600
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, target)  # noqa: PTH105 (tests interrupt exactly here)
            sync(target.parent)


def _create_held(path: Path) -> int | None:
    """Create a file that counts as this process's until the handle is closed.

    What a killed process left there is removed. None: another process has it.
    """
    for _ in range(2):
        left = path.exists()
        flags = os.O_RDONLY if left else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            handle = os.open(path, flags, 0o666)
        except (FileExistsError, FileNotFoundError):  # another process was faster
            continue
        if _held(handle) and _is(path, handle):
            if not left:
                return handle
            path.unlink()
        os.close(handle)
    return None


def _is(path: Path, handle: int) -> bool:
    """Whether an open file still has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _held(handle: int) -> bool:
    """Lock an open file or folder unless another process has; true where there are no locks."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        pass
    return True


@contextmanager
def sole_writer(folder: Path, target: Path) -> Iterator[None]:
    """Hold a folder of temporary files, which is there, for as long as its files are used.

    Raises:
        WriteError: another process does, for the same `target`.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _held(handle):
            raise WriteError(
                f"{target}: another process is writing it; wait for it, or use another output"
            )
        yield
    finally:
        os.close(handle)


@contextmanager
def in_turn(folder: Path, number: int = 0) -> Iterator[None]:
    """Wait until no other process is in such a context, with the same folder and number."""
    with (folder / "lock").open("ab") as file:
        if sys.platform != "win32":
            with suppress(OSError):  # the file system has no locks
                fcntl.lockf(file, fcntl.LOCK_EX, 1, number)  # a byte of the file for each number
        yield  # closing the file releases the lock


@contextmanager
def replacing_folder(target: Path, whole: bool) -> Iterator[Path]:
    """Give an empty folder beside `target`; on success it takes that place.

    A restarted run removes what a killed one left. The files directly in it are flushed to the
    disk, those in folders below are not.

    Args:
        target: the folder, whose parents are made.
        whole: take the place of all that is there; else of files of the same names only.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    temporary, old = temporary_name(target), target.with_name(f".{target.name}.old")
    with ExitStack() as stack:
        stack.enter_context(_said_in_one_line(target))
        temporary.mkdir(parents=True, exist_ok=True)
        stack.enter_context(sole_writer(temporary, target))
        stack.enter_context(_removed_on_error(temporary))
        for left in (*temporary.iterdir(), *([old] if old.exists() else [])):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield temporary
        files = [path for path in temporary.iterdir() if path.is_file()]
        for path in files:
            sync(path)
        if whole and target.exists():
            target.rename(old)
        if not target.exists():
            temporary.rename(target)
        for where, _, names in os.walk(temporary):  # not there any more, unless others stay
            place = target / Path(where).relative_to(temporary)
            place.mkdir(exist_ok=True)
            for name in names:
                Path(where, name).replace(place / name)
        sync(target.parent)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


@contextmanager
def _said_in_one_line(target: Path) -> Iterator[None]:
    """A failed write (disk full, quota, permissions) becomes a WriteError."""
    try:
        yield
    except BaseException as error:
        code = _error_code(error)
        if code is None:
            raise
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space and start again" if full else "check the folder and its permissions"
        raise WriteError(f"{target}: not written ({os.strerror(code)}); {fix}") from error


def temporary_name(target: Path) -> Path:
    """Where `replacing(target)` writes first."""
    return target.with_name(f".{target.name}.tmp")


def write_text(target: Path, text: str, shared: bool = False) -> None:
    """Write UTF-8 through `replacing`."""
    with replacing(target, shared) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, data: object, shared: bool = False) -> None:
    """Write `data` as indented JSON through `replacing`."""
    write_text(target, json.dumps(data, indent=1) + "\n", shared)


def json_lines(items: Iterable[object]) -> str:
    """JSON values, one a line."""
    return "".join(json.dumps(item) + "\n" for item in items)


def read_json(file: Path, kind: type[T], what: str) -> T:
    """Content of a JSON file.

    Args:
        file: to read.
        kind: `dict`, `list` or, for either, `object`: what the file must hold.
        what: the file should be, for the error's one line.

    Raises:
        DataError: it is missing, cannot be read, is no JSON, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: {os.strerror(error.errno or 0)}; give {what}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a json file ({error}); give {what}") from error
    if not isinstance(content, kind):
        raise DataError(f"{file}: holds {type(content).__name__}, not {what}")
    return content


def refuse_foreign_run(folder: Path, ours: Callable[[], bool], names: Sequence[str]) -> None:
    """Refuse a run folder in which files of other origin have the names of a run's results.

    Args:
        folder: where a run is about to write.
        ours: whether an earlier run of this command has written there.
        names: of the results.

    Raises:
        ConfigError: the first such file.
    """
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not ours():
        raise ConfigError(
            f"{there[0]}: is there and was not written by this command; use another folder"
        )


def refuse_foreign(
    files: Iterable[Path],
    ours: Callable[[Path], bool],
    by: str,
    overwrite: bool | None = False,
    source: Path | None = None,
) -> None:
    """Refuse files that a command is about to write over.

    Args:
        files: that it will write.
        ours: whether one that is there is its own.
        by: the command, for the message.
        overwrite: replace others, too, but no folder; None where there is no such key.
        source: what the command reads, which is never replaced.

    Raises:
        ConfigError: the first such file.
    """
    for file in files:
        if source is not None and file.exists() and file.samefile(source):
            raise ConfigError(f"output={file}: is the input itself; use another name")
        if file.is_dir() or (file.exists() and not overwrite and not ours(file)):
            more = "" if overwrite is None or file.is_dir() else ", or overwrite=true"
            raise ConfigError(
                f"output={file}: is there and was not written by {by}; use another output{more}"
            )


def foreign(file: Path) -> WriteError:
    """The refusal to replace a file of other origin."""
    return WriteError(
        f"{file}: is there and is not what this program wrote; move it away and start again"
    )


def put_known(target: Path, records: Path, text: str) -> None:
    """Write a text file over nothing but what an earlier call wrote.

    Several processes may write the same at once.

    Args:
        target: the file.
        records: a folder, in which a copy stays that tells the earlier call's file from others.
        text: its content.

    Raises:
        WriteError: a file of other origin has that name, or the disk is full.
    """
    check_known(target, records, text)
    content = text.encode()
    if target.exists() and target.read_bytes() == content:
        return
    target.unlink(missing_ok=True)
    for path in (records / target.name, target):  # a file without its copy is of other origin
        with replacing(path, shared=True) as temporary:
            temporary.write_bytes(content)


def check_known(target: Path, records: Path, text: str) -> None:
    """Refuse a file that `put_known` would not replace; see there."""
    if target.exists():
        kept = records / target.name
        known = [text.encode()] + ([kept.read_bytes()] if kept.exists() else [])
        if not target.is_file() or target.read_bytes() not in known:
            raise foreign(target)


def create_json(target: Path, data: object) -> bool:
    """Write `data` as `write_json` does unless `target` is there; returns whether it was written.

    Of several processes that try at once, one writes. File systems without hard links cannot tell:
    there the last one wins.
    """
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    write_json(draft, data)
    try:
        os.link(draft, target)
    except FileExistsError:
        return False
    except OSError:
        os.replace(draft, target)  # noqa: PTH105 (as above)
    finally:
        draft.unlink(missing_ok=True)
    return True


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without the mark that Windows editors put in front.

    Raises:
        DataError: not readable, or other bytes than UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a text file in UTF-8 ({error}); save it as UTF-8") from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _error_code(error: BaseException) -> int | None:
    """The `errno` of an operating system's error, or of one that a library wrapped.

    HDF5 writes `errno = 28`, Rust `(os error 28)`, and PyTorch fails on its own after the file.
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, Exception):
        if found := re.search(r"\b(?:errno =|os error) (\d+)", str(error)):
            return int(found.group(1))
        if isinstance(error, RuntimeError) and error.__context__ is not None:
            return _error_code(error.__context__)
    return None
