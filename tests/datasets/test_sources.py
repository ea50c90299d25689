"""Captioned images from COCO json, folders and mosaic scenes; one line for everything wrong."""

from __future__ import annotations

import csv
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from talk2dino.datasets.captions import CaptionFolder, CocoCaptions, Entry
from talk2dino.datasets.mosaic import Mosaic
from talk2dino.errors import ConfigError, DataError, UserError
from tests.helpers.pipeline import need


def picture(path: Path, color: int = 0) -> None:
    Image.new("RGB", (6, 4), (color, 10, 20)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("b.png", "a.png", "c.JPG")):
        picture(images / name, number * 50)
    return images


def coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "b.png"},
            {"id": 3, "file_name": "a.png"},
            {"id": 9, "file_name": "c.JPG"},  # no caption: left out
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "first"},
            {"id": 2, "image_id": 7, "caption": "second"},
            {"id": 5, "image_id": 3, "caption": "third"},
        ],
    }


def write(tmp_path: Path, content: object) -> str:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_coco_keeps_the_order_of_the_json(tmp_path: Path, folder: Path) -> None:
    source = CocoCaptions(write(tmp_path, coco()), str(folder))
    assert [source.entry(i) for i in range(len(source))] == [
        Entry(7, "b.png", ((2, "second"),)),
        Entry(3, "a.png", ((1, "first"), (5, "third"))),
    ]
    assert source.image(1).getpixel((0, 0)) == (50, 10, 20)
    assert source.fingerprint()["images"] == 2
    assert pickle.loads(pickle.dumps(source)).entry(0) == source.entry(0)
    assert len(CocoCaptions(write(tmp_path, coco()), str(folder), limit=1)) == 1


def without(*path: str | int) -> dict[str, Any]:
    data = coco()
    *parents, last = path
    node: Any = data
    for key in parents:
        node = node[key]
    del node[last]
    return data


def twice(key: str) -> dict[str, Any]:
    data = coco()
    data[key].append(data[key][0])
    return data


def orphan() -> dict[str, Any]:
    data = coco()
    data["annotations"].append({"id": 8, "image_id": 77, "caption": "lost"})
    return data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not a json file"),
        ([1], "no list 'images'"),
        pytest.param("[" * 100_000, "not a json file", id="deep"),
        ({"images": [1]}, "no list 'annotations'"),
        ({"images": [1], "annotations": []}, r"images\[0\] needs id and file_name"),
        (without("annotations"), "no list 'annotations'"),
        (without("images", 1, "id"), r"images\[1\] needs id and file_name"),
        (without("images", 0, "file_name"), r"images\[0\] needs id and file_name"),
        (without("annotations", 2, "caption"), r"annotations\[2\] needs id, image_id and caption"),
        (twice("images"), r"images\[3\] has id 7, as an image before it"),
        (twice("annotations"), r"annotations\[3\] has id 1, as a caption before it"),
        (orphan(), "caption 8 names image 77, which is not in its images"),
        ({"images": [], "annotations": []}, "no captioned images"),
    ],
)
def test_coco_errors_are_one_line(
    tmp_path: Path, folder: Path, content: object, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        CocoCaptions(path, str(folder))
    assert "\n" not in str(error.value)
    assert path in str(error.value)


def test_coco_missing_file_and_folders(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path, coco())
    with pytest.raises(DataError, match=r"source\.annotations=.*nothere\.json: no such file"):
        CocoCaptions(str(tmp_path / "nothere.json"), str(folder))
    with pytest.raises(DataError, match=r"source\.images=.*nowhere: no such folder"):
        CocoCaptions(path, str(tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"b\.png, named by .*captions\.json, is not there"):
        CocoCaptions(path, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "url", "sub"),
    [
        ("COCO_train2014_000000000009.jpg", None, "train2014"),
        (
            "COCO_val2014_000000000042.jpg",
            "http://x/val2014/COCO_val2014_000000000042.jpg",
            "val2014",
        ),
        ("000000000139.jpg", "http://images.cocodataset.org/val2017/000000000139.jpg", "val2017"),
    ],
)
def test_coco_folders_of_2014_and_2017(
    tmp_path: Path, name: str, url: str | None, sub: str
) -> None:
    """The folder of the files, the folder above it, and names that contain their folder."""
    (tmp_path / "coco" / sub).mkdir(parents=True)
    picture(tmp_path / "coco" / sub / name, 90)
    image = {"id": 9, "file_name": name} | ({"coco_url": url} if url else {})
    data = {"images": [image], "annotations": [{"id": 1, "image_id": 9, "caption": "x"}]}
    for folder, want in ((tmp_path / "coco", f"{sub}/{name}"), (tmp_path / "coco" / sub, name)):
        source = CocoCaptions(write(tmp_path, data), str(folder))
        assert source.entry(0).file_name == want
        assert source.image(0).size == (6, 4)
    image["file_name"] = f"{sub}/{name}"
    assert CocoCaptions(write(tmp_path, data), str(tmp_path / "coco")).image(0).size == (6, 4)


def karpathy(name: str, number: int, split: str, **more: object) -> dict[str, Any]:
    sentences = [{"raw": f"{name} {k}", "sentid": 10 * number + k, "tokens": []} for k in (0, 1)]
    return {"filename": name, "imgid": number, "split": split, "sentences": sentences} | more


def test_karpathy_splits(tmp_path: Path, folder: Path) -> None:
    rows = [
        karpathy("a.png", 0, "train"),
        karpathy("b.png", 1, "restval", cocoid=77, filepath="elsewhere"),
        karpathy("c.JPG", 2, "test", filepath="sub", cocoid=88),
    ]
    (folder / "sub").mkdir()
    picture(folder / "sub" / "c.JPG")
    path = write(tmp_path, {"images": rows, "dataset": "coco"})
    source = CocoCaptions(path, str(folder), split=["train", "restval"])
    assert [source.entry(i) for i in range(len(source))] == [
        Entry(0, "a.png", ((0, "a.png 0"), (1, "a.png 1"))),
        Entry(77, "b.png", ((10, "b.png 0"), (11, "b.png 1"))),
    ]
    assert source.fingerprint()["split"] == ["train", "restval"]
    assert len(CocoCaptions(path, str(folder))) == 3
    test = CocoCaptions(path, str(folder), split="test")
    assert test.entry(0).file_name == "sub/c.JPG"
    with pytest.raises(DataError, match=r"no split 'dev'; it has restval, test, train"):
        CocoCaptions(path, str(folder), split="dev")
    with pytest.raises(ConfigError, match=r"source\.split=train: .* has no splits"):
        CocoCaptions(write(tmp_path, coco()), str(folder), split="train")
    for key, value in (("cocoid", 0), ("sentences", rows[0]["sentences"])):
        twice = [rows[0], {**rows[1], key: value}]
        with pytest.raises(DataError, match=r"images\[1\]: (imgid|sentid) 0 is also that of a row"):
            CocoCaptions(write(tmp_path, {"images": twice}), str(folder))
    del rows[1]["sentences"][0]["raw"]
    with pytest.raises(DataError, match=r"images\[1\] needs filename, imgid and sentences"):
        CocoCaptions(write(tmp_path, {"images": rows}), str(folder))


@pytest.mark.parametrize(
    ("table", "key", "value", "reason"),
    [
        ("annotations", "caption", None, "caption is null, not a text"),
        ("annotations", "caption", ["a", "b"], r"caption is \['a', 'b'\], not a text"),
        ("annotations", "caption", {"raw": "a"}, "not a text"),
        ("annotations", "caption", float("nan"), "caption is nan, not a text"),
        ("annotations", "caption", " \n", "caption is empty"),
        ("annotations", "caption", "a \ud83d", "half a character"),
        ("annotations", "id", 2**63, "id is 9223372036854775808, not a whole number"),
        ("annotations", "id", 1.5, "id is 1.5, not a whole number"),
        ("annotations", "id", True, "id is true, not"),
        ("annotations", "image_id", "3 ", "image_id is '3 ', not"),
        ("images", "id", -(2**63) - 1, "not a whole number of at most 64 bits"),
        ("images", "file_name", None, "file_name is null, not the name"),
        ("images", "file_name", "", "file_name is '', not the name"),
    ],
)
def test_coco_takes_no_value_for_another(
    tmp_path: Path, folder: Path, table: str, key: str, value: object, reason: str
) -> None:
    data = coco()
    data[table][1][key] = value
    with pytest.raises(DataError, match=rf"{table}\[1\]: .*{reason}"):
        CocoCaptions(write(tmp_path, data), str(folder))


def test_ids_at_the_ends_of_their_range(tmp_path: Path, folder: Path) -> None:
    data = coco()
    data["annotations"][0]["id"], data["annotations"][1]["id"] = 2**63 - 1, "-9223372036854775808"
    source = CocoCaptions(write(tmp_path, data), str(folder))
    assert source.entry(0).captions[0][0] == -(2**63)
    assert source.entry(1).captions[0][0] == 2**63 - 1


def test_what_is_left_out_is_listed(tmp_path: Path, folder: Path) -> None:
    source: CocoCaptions | CaptionFolder = CocoCaptions(write(tmp_path, coco()), str(folder))
    assert source.left_out == [{"file_name": "c.JPG", "reason": "has no caption"}]
    (folder / "b.TXT").write_text("one")
    (folder / "photo.raw").write_bytes(b"x")
    (folder / "photo.txt").write_text("two")
    (folder / "c.txt").write_text(" \n")
    (folder / "sub").mkdir()
    picture(folder / "sub" / "d.png")
    (folder / "sub" / "d.txt").write_text("three")
    source = CaptionFolder(str(folder))
    assert list(source.entries) == [Entry(0, "b.png", ((0, "one"),))]
    assert {item["file_name"]: item["reason"] for item in source.left_out} == {
        "a.png": "no .txt beside it",
        "c.JPG": "c.txt is empty",
        "c.txt": "no picture of its name that can be read",
        "photo.txt": "no picture of its name that can be read",
        "sub/d.png": "lies in a subfolder: write a captions.csv with its path",
        "sub/d.txt": "no picture of its name that can be read",
    }


def test_two_spellings_of_a_path_are_one_image(folder: Path) -> None:
    (folder / "captions.csv").write_text("file_name,caption\n./a.png,x\nsub/../a.png,y\na.png,z\n")
    entries = CaptionFolder(str(folder)).entries
    assert list(entries) == [Entry(0, "a.png", ((0, "x"), (1, "y"), (2, "z")))]


@pytest.mark.parametrize("limit", [0, -3])
def test_limits_must_be_positive(tmp_path: Path, folder: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"source.limit={limit}: use 1 or more"):
        CocoCaptions(write(tmp_path, coco()), str(folder), limit=limit)
    with pytest.raises(ConfigError, match=r"source\.limit=-?\d: use"):
        Mosaic(limit=limit)


EXPECTED = [
    Entry(0, "a.png", ((1, "a dog, asleep"), (2, "Straße"))),
    Entry(1, "b.png", ((0, "a cat"),)),
]


def test_folder_with_csv(folder: Path) -> None:
    text = 'file_name,caption\nb.png,a cat\na.png,"a dog, asleep"\na.png,Straße\n'
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "captions.csv").write_text(text, encoding=encoding)
        source = CaptionFolder(str(folder))
        assert list(source.entries) == EXPECTED
    assert source.image(0).getpixel((0, 0)) == (50, 10, 20)
    fingerprint = source.fingerprint()
    content = fingerprint.pop("content")
    assert fingerprint == {"folder": "images", "images": 2, "captions": 3}
    (folder / "captions.csv").write_text(text.replace("dog", "fox"))
    assert CaptionFolder(str(folder)).fingerprint()["content"] != content


def test_pictures_that_a_table_does_not_name_are_left_out(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("sub/one.png", "sub/two.png"):
        picture(folder / name)
    (folder / "captions.csv").write_text("file_name,caption\n./a.png,a dog\nsub/one.png,a cat\n")
    source = CaptionFolder(str(folder))
    assert [source.entry(n).file_name for n in range(len(source))] == ["a.png", "sub/one.png"]
    reason = "captions.csv does not name it"
    names = ["b.png", "c.JPG", "sub/two.png"]
    assert source.left_out == [{"file_name": name, "reason": reason} for name in names]


def test_folder_with_jsonl(folder: Path) -> None:
    rows = [
        {"file_name": e.file_name, "caption": text, "number": number}
        for e in EXPECTED
        for number, text in e.captions
    ]
    rows.sort(key=lambda row: row["number"])
    (folder / "captions.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert list(CaptionFolder(str(folder)).entries) == EXPECTED


def test_folder_with_texts(folder: Path) -> None:
    (folder / "b.txt").write_text("one\n\n  two \n")
    (folder / "c.txt").write_text("three")
    assert list(CaptionFolder(str(folder)).entries) == [
        Entry(0, "b.png", ((0, "one"), (1, "two"))),
        Entry(1, "c.JPG", ((2, "three"),)),
    ]


def test_folder_with_a_tabbed_text(folder: Path) -> None:
    text = "b.png#0\ta cat\n\na.png#0\ta dog, asleep \r\na.png#1\tStraße"
    (folder / "captions.txt").write_text(text, encoding="utf-8", newline="")
    assert list(CaptionFolder(str(folder)).entries) == EXPECTED
    (folder / "captions.csv").write_text("file_name,caption\na.png,x\n")
    with pytest.raises(
        DataError, match=r"captions\.csv and captions\.txt are both there; keep one"
    ):
        CaptionFolder(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"file_name,caption\na.png,\n", "line 2 needs file_name and caption"),
        ("captions.csv", b"file,text\na.png,x\n", "line 1 must name the columns file_name and cap"),
        ("captions.csv", b"file_name,caption\na.png,Stra\xdfe\n", "not a text file in UTF-8"),
        ("captions.csv", b"file_name,caption\n", "no captioned images"),
        ("captions.csv", b"file_name,caption,caption\na.png,x,y\n", "names caption twice"),
        ("captions.jsonl", b'\n{"file_name": "a.png"}', "line 2 needs"),
        ("captions.jsonl", b'{"file_name": "a.png", "caption": "x"}\n{oops', "line 2 is not json"),
        ("captions.jsonl", b"[1]", "line 1 needs"),
        ("captions.csv", b"file_name,caption\na.png," + b"x" * 140_000, "line 2: not csv"),
        ("captions.csv", b"file_name,caption\na.png,a dog, asleep\n", "line 2 has more than 2 col"),
        ("captions.csv", b'file_name,caption\nb.png,x\na.png,"open\nb.png,y\n', "line 3: not csv"),
        ("captions.csv", b'file_name,caption\na.png,"x" y\n', "line 2: not csv"),
        ("captions.jsonl", b'{"file_name": "a.png", "caption": null}', "caption is null, not a te"),
        ("captions.jsonl", b'{"file_name": 3, "caption": "x"}', "file_name is 3, not the name of"),
        ("captions.jsonl", b'{"file_name": "a.png", "caption": "\\ud83d"}', "line 1 .*half a char"),
        pytest.param("captions.jsonl", b"[" * 100_000, "line 1 is not json", id="deep"),
        ("captions.txt", b"a.png\tx\0y", "line 1 .*a NUL"),
        ("a.txt", b"one\n\0", r"a\.txt: line 2: .*a NUL"),
        ("captions.csv", b'file_name,caption\na.png,"x\ny"\nb.png\n', "line 4 needs"),
        ("captions.txt", b"a.png\tx\n\nb.png y\n", "line 3 has no tab"),
        ("captions.txt", b"a.png\t \n", "line 1 needs file_name and caption"),
        ("a.txt", b"\xff\xfe\xdf", "not a text file in UTF-8"),
        (
            "notes.md",
            b"nothing",
            r"no captions\.csv, captions\.jsonl or captions\.txt and no \.txt",
        ),
    ],
)
def test_folder_errors_are_one_line(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        CaptionFolder(str(folder))
    assert "\n" not in str(error.value)


def test_mosaic_entries_and_images_belong_together() -> None:
    need("skimage", "sklearn")
    source = Mosaic(count=5, image_size=32, captions_per_scene=2, limit=3)
    assert len(source) == 3
    with pytest.raises(ConfigError, match=r"^source\.image_size=15"):
        Mosaic(image_size=15)
    smallest = Mosaic(count=40, image_size=16)
    assert {smallest.image(n).size for n in range(40)} == {(16, 16)}
    entry = source.entry(2)
    assert (entry.image_id, entry.file_name) == (2, "train-00002.png")
    assert [number for number, _ in entry.captions] == [4, 5]
    assert source.image(2).size == (32, 32)
    assert source.fingerprint() != Mosaic(count=3, image_size=32, seed=1).fingerprint()


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30)
pairs = st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "c.JPG"]), texts), max_size=5)
files = st.sampled_from(["captions.csv", "captions.jsonl", "captions.txt", "a.txt"])
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@relaxed
@given(rows=pairs)
def test_captions_survive_every_table(folder: Path, rows: list[tuple[str, str]]) -> None:
    """What is written comes back letter by letter, or its row is named."""
    if sys.version_info < (3, 11):  # whose csv writes no NUL
        rows = [(name, text.replace("\0", " ")) for name, text in rows]
    kept = [(name, text) for name, text in rows if text.strip() and "\0" not in text]
    for table in (folder / "captions.csv", folder / "captions.jsonl"):
        if table.suffix == ".csv":
            with table.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("file_name", "caption"), *rows])
        else:
            lines = [json.dumps({"file_name": name, "caption": text}) for name, text in rows]
            table.write_text("\n".join(lines), encoding="utf-8")
        try:
            source = CaptionFolder(str(folder))
        except DataError as error:
            assert not rows or kept != rows or "no captioned images" in str(error)
        else:
            found = {entry.file_name: [t for _, t in entry.captions] for entry in source.entries}
            assert found == {n: [t for m, t in rows if m == n] for n in {m for m, _ in rows}}
        table.unlink()


@relaxed
@given(name=files, content=st.binary(max_size=80) | texts.map(str.encode))
def test_no_caption_file_makes_a_traceback(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        CaptionFolder(str(folder))
    except UserError as error:
        assert "\n" not in str(error)
    (folder / name).unlink()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@relaxed
@given(table=st.sampled_from(["images", "annotations"]), value=values, data=st.data())
def test_no_value_of_a_json_makes_a_traceback(
    tmp_path: Path, folder: Path, table: str, value: object, data: st.DataObject
) -> None:
    content = coco()
    key = data.draw(st.sampled_from([*sorted(content[table][1]), None, "whole"]), "key")
    if key == "whole":
        content[table] = value
    elif key is None:
        content[table][1] = value
    else:
        content[table][1][key] = value
    try:
        CocoCaptions(write(tmp_path, content), str(folder))
    except UserError as error:
        assert "\n" not in str(error)
