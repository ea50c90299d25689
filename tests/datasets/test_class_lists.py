"""Every reader of class names and label values: names round-trip, and no input is a traceback."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from talk2dino.config.model_and_classes import class_words
from talk2dino.datasets.benchmarks.classes import (
    MAX_VALUE,
    ClassList,
    ClassSpec,
    composed,
    read_classes,
)
from talk2dino.datasets.benchmarks.label_values import LabelColors, LabelValues
from talk2dino.errors import UserError
from talk2dino.inference.vocabulary import read_words
from talk2dino.web.session import Request
from tests.helpers.pipeline import need

few = settings(max_examples=60, deadline=None)


def is_word(text: str) -> bool:
    """Independent of the readers: all of it visible or a space, no half a character."""
    kinds = {unicodedata.category(c) for c in text}
    return bool(text.strip()) and not kinds & {"Cc", "Cs"} and not set(text) & set(UNSEEN)


UNSEEN = "\u00ad\u200b\u2060\ufeff\ufffe\uffff"
letters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=UNSEEN)
words = st.text(letters, min_size=1, max_size=10).map(str.strip).filter(is_word)
plain = words.filter(lambda word: not set(word) & set(";#"))
groups = st.lists(
    st.lists(plain, min_size=1, max_size=3), max_size=4, unique_by=lambda g: composed(g[0])
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("name", "id", "synonyms", "color", "synonym"), anything)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists")


def spelled(group: list[str]) -> str:
    return "[" + ",".join(json.dumps(word, ensure_ascii=False) for word in group) + "]"


@few
@given(groups.filter(bool))
@example([["cat", "#1 pet"], ["null"], ["C#", "é"], ["\u200c\u0645"]])
def test_typed_words_come_out_as_they_are(typed: list[list[str]]) -> None:
    want = {group[0]: tuple(group) for group in typed}
    assert class_words(f"[{','.join(map(spelled, typed))}]") == want
    assert class_words(typed) == want
    assert class_words({group[0]: group for group in typed}) == want
    assert read_words(typed).synonyms == want
    pairs = (f"{spelled(g[:1])[1:-1]}: {spelled(g)}" for g in typed)
    assert class_words(f"{{{','.join(pairs)}}}") == want


@few
@given(st.text("ab,; \t") | st.lists(st.text("ab;,") | st.lists(st.text("a,;"), max_size=2)))
@example([["a; b", "a"]])
@example(["a", ""])
def test_commands_services_and_pages_part_words_alike(typed: Any) -> None:
    need("fastapi")
    from talk2dino.serving.forms import requested_words

    readers: dict[str, Any] = {"command": class_words, "service": requested_words}
    if isinstance(typed, str):
        readers["page"] = lambda text: Request(text).classes
    found: list[Any] = []
    for name, reader in readers.items():
        as_json = name == "service" and not isinstance(typed, str)
        try:
            found.append(reader(json.dumps(typed) if as_json else typed))
        except UserError as error:
            found.append(str(error))
    assert found.count(found[0]) == len(found)


@few
@given(groups.filter(bool))
def test_files_give_the_names_that_they_hold(folder: Path, typed: list[list[str]]) -> None:
    typed = [group for group in typed if group[0] != "background"] or [["cat"]]
    assume(not all(group[0][0].isdecimal() for group in typed))  # see test_evaluation.py
    as_text, as_json = folder / "list.txt", folder / "list.json"
    as_text.write_text("".join(";".join(group) + "\r\n\n" for group in typed), encoding="utf-8")
    listed = [{"name": g[0], "synonyms": g, "id": n} for n, g in enumerate(typed)]
    as_json.write_text(json.dumps({"classes": listed, "unlabeled": 255}))
    for file in (as_text, as_json):
        found = read_classes(file).classes
        assert [list(spec.synonyms) for spec in found] == typed, file
        assert [(spec.name, spec.value) for spec in found] == [
            (group[0], number) for number, group in enumerate(typed)
        ]
        assert class_words(str(file)) == {group[0]: tuple(group) for group in typed}


@few
@given(anything | st.lists(entries | anything, max_size=3))
@example([{"name": True}])
@example([{"name": ["cat"]}])
@example([{"name": "cat", "synonyms": [None]}])
@example([{"name": "cat", "synonym": ["kitten"]}])
@example({"classes": ["cat"], "unlabelled": 0})
@example([{"name": "\ud800"}])
@example([{"name": "a\u0000b"}])
@example(["a\u001bb"])
@example([{"name": "cat", "id": 1e3}])
def test_any_json_is_a_list_of_classes_or_a_line(folder: Path, content: Any) -> None:
    file = folder / "any.json"
    file.write_text(json.dumps(content))
    try:
        found = read_classes(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    listed = content["classes"] if isinstance(content, dict) else content
    assert len(found.names) == len(listed)
    for spec, entry in zip(found.classes, listed, strict=True):
        name = entry if isinstance(entry, str) else entry["name"]
        assert isinstance(name, str) and (spec.name in name) and is_word(spec.name)
        assert all(map(is_word, spec.synonyms))


@few
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"cat\x00\n")
@example("\ufeffcat\n".encode())
def test_any_bytes_are_a_list_or_a_line(folder: Path, content: bytes) -> None:
    for ending in ("txt", "json"):
        file = folder / f"bytes.{ending}"
        file.write_bytes(content)
        try:
            assert all(map(is_word, class_words(str(file))))
        except UserError as error:
            assert "\n" not in str(error)


@few
@given(anything | st.lists(st.text(max_size=4) | anything, max_size=3))
@example(["\ud800"])
@example(["a\nb"])
@example({"cat": []})
@example({"cat": [" "]})
@example({"": ["cat"]})
@example({"\x1b": "0"})
def test_python_takes_names_or_answers_in_a_line(content: Any) -> None:
    for reader in (read_words, class_words):
        try:
            found = reader(content)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        names = getattr(found, "names", found)
        assert names and all(map(is_word, names))


@few
@given(st.data())
def test_label_values_are_looked_up(data: st.DataObject) -> None:
    """Against a dictionary, pixel by pixel."""
    values = st.integers(0, 300) | st.integers(0, MAX_VALUE)
    used = data.draw(st.lists(values, min_size=1, max_size=5, unique=True))
    unlabeled = data.draw(st.lists(values.filter(lambda v: v not in used), max_size=2))
    shift = data.draw(st.booleans())
    label_map = data.draw(st.dictionaries(values, values | st.none(), max_size=2))
    specs = [ClassSpec(str(value), (str(value),), value) for value in used]
    ignore = data.draw(values.filter(lambda v: v >= len(used) and v - shift not in used))
    read = LabelValues(ClassList(tuple(specs), tuple(unlabeled)), ignore, shift, label_map)

    def meaning(stored: int, mapped: bool = False) -> int | None:
        if stored in label_map and not mapped:
            target = label_map[stored]
            return None if target is None else meaning(target, True)
        if stored - shift in used:
            return used.index(stored - shift)
        void = stored == ignore or (shift and stored == 0) or stored - shift in unlabeled
        return ignore if void else None

    stored = [*used, *unlabeled, *label_map, ignore, -1, 0, 70000, data.draw(values)]
    for value in stored:
        pixels = np.array([[value]], np.int64)
        want = meaning(value)
        if want is None:
            with pytest.raises(UserError, match=f"x: label value {value} is no class"):
                read.targets(pixels, "x")
        else:
            assert read.targets(pixels, "x").item() == want


@few
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=5, unique=True))
def test_label_colors_are_looked_up(colors: list[tuple[int, int, int]]) -> None:
    read = LabelColors(colors[:-1] or colors, colors[-1:] if colors[1:] else ())
    known = {color: number for number, color in enumerate(colors)}
    if colors[1:]:
        known[colors[-1]] = 255
    picture = np.array([list(known)], np.uint8)
    assert read.targets(picture).tolist() == [list(known.values())]
    other = next(color for n in range(6) if (color := (n, n, n)) not in known)
    with pytest.raises(UserError, match="is no class of"):
        read.targets(np.array([[other]], np.uint8))
