"""Data sets as folders: written in one pass, replaced only while they are what was written."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from talk2dino.annotations.base import (
    AnnotatedPicture,
    Annotation,
    Category,
    Options,
    check_file_name,
)
from talk2dino.annotations.data_sets import (
    FORMATS,
    check_formats,
    refuse_changed,
    write_data_sets,
)
from talk2dino.errors import ConfigError, WriteError
from tests.helpers.pipeline import files_below

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
CATEGORIES = [Category("cat", ("cat",), (250, 10, 160))]
COUNTS = coco_mask.encode(np.asfortranarray(np.eye(32, dtype=np.uint8)))["counts"].decode()
PICTURES = [AnnotatedPicture(f"{n}.png", 32, 32, [Annotation(0, COUNTS, 0.5)]) for n in "ab"]


def write(folder: Path, formats: list[str], overwrite: bool = False) -> None:
    write_data_sets(PICTURES, CATEGORIES, folder, formats, Options(), overwrite)


def test_all_formats_of_nothing(tmp_path: Path) -> None:
    """A picture without annotations is in the files; so are none at all."""
    picture = AnnotatedPicture("a.png", 4, 5, [])
    for name, pictures in (("none", []), ("empty", [picture])):
        folder = tmp_path / name
        write_data_sets(pictures, CATEGORIES, folder, list(FORMATS), Options())
        coco = json.loads((folder / "coco" / "instances.json").read_text())
        assert (len(coco["images"]), coco["annotations"]) == (len(pictures), [])
        tasks = json.loads((folder / "labelstudio" / "tasks.json").read_text())
        assert len(tasks) == len(pictures)
        assert (
            json.loads((folder / "geojson" / "annotations.geojson").read_text())["features"] == []
        )
        tree = ElementTree.parse(folder / "cvat" / "annotations.xml")
        assert len(tree.findall("image")) == len(pictures)
        assert len(list((folder / "yolo" / "labels").iterdir())) == len(pictures)


def test_one_picture_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """What was written is forgotten, and the files grow on the way."""
    seen: list[weakref.ref[AnnotatedPicture]] = []
    sizes = []

    def pictures() -> Iterator[AnnotatedPicture]:
        for number in range(100):
            yield AnnotatedPicture(f"{number}.png", 32, 32, PICTURES[0].annotations)
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            sizes.append(sum(path.stat().st_size for path in files))

    def watched() -> Iterator[AnnotatedPicture]:
        for picture in pictures():
            assert sum(one() is not None for one in seen) <= 1
            seen.append(weakref.ref(picture))
            yield picture

    write_data_sets(watched(), CATEGORIES, tmp_path, ["coco", "cvat", "geojson"], Options())
    assert len(seen) == 100
    assert 0 < sizes[60] < sizes[80] < sizes[-1]


def test_corrected_annotations_are_not_replaced(tmp_path: Path) -> None:
    """A folder of ours is replaced only if it is, file by file, what was written."""
    folder = tmp_path / "yolo"
    (tmp_path / ".yolo.tmp").mkdir()  # of a run that was killed
    (tmp_path / ".yolo.tmp" / "half").touch()
    write(tmp_path, ["yolo"])
    write(tmp_path, ["yolo"])  # its own
    label, cache = folder / "labels" / "a.txt", folder / "labels.old"
    written = files_below(folder)

    def refused() -> None:
        now = files_below(tmp_path)
        for step in (
            lambda: refuse_changed(tmp_path, ["coco", "yolo"]),
            lambda: write(tmp_path, ["yolo"]),
        ):
            with pytest.raises(ConfigError, match="yolo: is there and holds other files than were"):
                step()
        assert files_below(tmp_path) == now

    cache.write_bytes(b"of a trainer")
    refused()
    label.write_bytes(b"0 0.1 0.1 0.2 0.2 0.1 0.2")
    refused()
    cache.unlink()
    refused()
    label.unlink()
    refused()
    cache.write_bytes(b"of a trainer")
    write(tmp_path, ["yolo"], overwrite=True)
    assert files_below(folder) == written | {"labels.old": b"of a trainer"}
    (tmp_path / "cvat").write_text("a file of somebody")
    with pytest.raises(ConfigError, match="cvat: is there"):
        write(tmp_path, ["cvat"])
    with pytest.raises(WriteError, match="cvat: not written"):
        write(tmp_path, ["cvat"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"yolo", "cvat"}  # nothing half written


def test_what_trainers_and_file_managers_add_is_no_change(tmp_path: Path) -> None:
    """Their notes are of older labels, so none stays."""
    write(tmp_path, ["yolo"])
    written = files_below(tmp_path / "yolo")

    def used() -> None:
        (tmp_path / "yolo" / "labels.cache").write_bytes(b"of a trainer")
        (tmp_path / "yolo" / "labels" / ".ipynb_checkpoints").mkdir(exist_ok=True)
        for hidden in (".DS_Store", "labels/.ipynb_checkpoints/a.txt"):
            (tmp_path / "yolo" / hidden).write_bytes(b"x")

    used()
    refuse_changed(tmp_path, ["yolo"])
    write(tmp_path, ["yolo"])
    assert files_below(tmp_path / "yolo") == written
    used()
    (tmp_path / "yolo" / "labels" / "a.txt").write_bytes(b"corrected")
    write(tmp_path, ["yolo"], overwrite=True)
    assert (tmp_path / "yolo" / ".DS_Store").exists()  # it stays, as all of somebody else's
    assert not (tmp_path / "yolo" / "labels.cache").exists()


def test_yolo_labels_lie_where_ultralytics_looks(tmp_path: Path) -> None:
    """It puts `labels` for the last folder `images` of a path; no two pictures have one label."""
    names = ["a", "images/a", "images_/a", "images__/a", "train/images/a", "train/images/images/a"]
    names += ["train/a", "images1/a", "my images/a", "images"]
    (tmp_path / "photo.png").touch()
    pictures = [
        AnnotatedPicture(f"{name}.png", 32, 32, [], tmp_path / "photo.png") for name in names
    ]
    out = tmp_path / "images"
    write_data_sets(pictures, CATEGORIES, out, ["yolo"], Options())
    found = [path for path in (out / "yolo" / "images").rglob("*") if path.is_file()]
    labels = {"/labels/".join(str(path).rsplit("/images/", 1))[:-4] + ".txt" for path in found}
    assert len(labels) == len(found) == len(names)
    assert labels == {str(path) for path in (out / "yolo").rglob("*.txt")}


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\x01b.png", "a\0.png", "a\ufffe.png"])
@pytest.mark.parametrize("kind", ["labelstudio", "cvat"])
def test_names_that_are_no_text(tmp_path: Path, name: str, kind: str) -> None:
    """One line in place of a traceback, or of XML that nobody can read; nothing is left."""
    pictures = [AnnotatedPicture(name, 32, 32, PICTURES[0].annotations)]
    with pytest.raises(ConfigError, match=r"^image='.*' is no character of a text; rename"):
        write_data_sets(pictures, CATEGORIES, tmp_path, [kind], Options())
    assert not list(tmp_path.iterdir())


def test_names_with_odd_characters(tmp_path: Path) -> None:
    names = [
        "日本.png",
        "tab\tname.png",
        "two\nlines.png",
        'a&b<c>"q".png',
        "e\u0301\U0001f600.png",
    ]
    for name in names:
        check_file_name(name, "image")
    pictures = [AnnotatedPicture(name, 4, 5, []) for name in names]
    write_data_sets(pictures, CATEGORIES, tmp_path, ["cvat"], Options())
    tree = ElementTree.parse(tmp_path / "cvat" / "annotations.xml")
    assert [one.get("name") for one in tree.iter("image")] == names


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, list(FORMATS))
    before = files_below(tmp_path)

    def pictures() -> Iterator[AnnotatedPicture]:
        yield PICTURES[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match=r"not written \(No space left on device\)"):
        write_data_sets(pictures(), CATEGORIES, tmp_path, list(FORMATS), Options())
    assert files_below(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="formats=\\[x\\]: no such format; choose among coco, yo"):
        check_formats(["coco", "x"])
    with pytest.raises(ConfigError, match=r"formats='coco': give a list, \['coco'\]"):
        check_formats("coco")
    with pytest.raises(ConfigError, match=r"^formats=\[coco,yolo,coco\]: coco is there twice"):
        check_formats(["coco", "yolo", "coco"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs pycocotools, .*'talk2dino\[annotations\]'"):
        check_formats(["coco"])
    check_formats([])
