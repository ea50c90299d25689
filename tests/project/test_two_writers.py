"""Two processes that write at the same place at once, and what a killed one left there."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from talk2dino.errors import WriteError
from talk2dino.files import replacing, replacing_folder, sole_writer, temporary_name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each writes its own; both files are whole, and the later one stays."""
    target = tmp_path / "a.txt"
    with replacing(target) as one:
        one.write_text("first")
        with replacing(target) as other:
            other.write_text("second")
        assert target.read_text() == "second"
        with one.open("a") as file:
            file.write(", whole")
    assert target.read_text() == "first, whole"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("library_renames", [False, True])
def test_what_a_killed_writer_left(tmp_path: Path, library_renames: bool) -> None:
    target = tmp_path / "a.txt"
    left = temporary_name(target)
    left.write_text("half")
    left.chmod(0o600)
    with replacing(target) as temporary:
        assert temporary == left and temporary.read_text() == ""
        if library_renames:  # as safetensors does
            (tmp_path / "b").write_text("whole")
            (tmp_path / "b").replace(temporary)
        temporary.write_text("whole")
    assert target.read_text() == "whole" and names(tmp_path) == ["a.txt"]
    (tmp_path / "new").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """The second is told, and the first one's files stay."""
    target = tmp_path / "set"
    with replacing_folder(target, whole=True) as one:
        (one / "a.txt").write_text("first")
        with (
            pytest.raises(WriteError, match=f"{target}: another process is writing it"),
            replacing_folder(target, whole=True),
        ):
            pass
    assert (target / "a.txt").read_text() == "first" and names(tmp_path) == ["set"]
    temporary_name(target).mkdir()
    (temporary_name(target) / "left").mkdir()
    with replacing_folder(target, whole=True) as other:
        assert names(other) == []
        (other / "b.txt").write_text("second")
    assert names(target) == ["b.txt"] and names(tmp_path) == ["set"]
    with sole_writer(target, target), pytest.raises(WriteError), sole_writer(target, target):
        pass
