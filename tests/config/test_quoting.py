"""What is typed on a command line arrives as it was typed, through Hydra's own parser."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from talk2dino.config.quoting import parse_words, quote_overrides, quoted, text_keys
from talk2dino.config.schemas import SCHEMAS, SegmentConfig
from talk2dino.errors import ConfigError


@pytest.mark.parametrize("given", ["pamr=5", "+pamr=-1", "++pamr='10'", "pamr=1_0", "polygons=7"])
def test_a_number_is_no_switch(given: str) -> None:
    with pytest.raises(ConfigError, match=r"=.*: give true or false"):
        quote_overrides([given], SegmentConfig)
    nested = ["sample_segmentations.pamr=true,2", "resume=1", "-m"]
    with pytest.raises(ConfigError, match="pamr=true,2: give true or false"):
        quote_overrides(nested, SCHEMAS["train"])
    fine = ["pamr=1", "pamr=0", "pamr=true", "pamr=off", "pamr=${polygons}", "minimum_area=5"]
    assert quote_overrides(fine, SegmentConfig) == fine


def through_hydra(*arguments: str) -> list[Any]:
    """The values that Hydra reads from a `segment` command line."""
    parser = OverridesParser.create()
    return [parser.parse_override(one).value() for one in quote_overrides(arguments, SegmentConfig)]


@pytest.mark.parametrize(
    ("argument", "want"),
    [
        ("classes=[cat,null,true,1e3,1_000]", ["cat", "null", "true", "1e3", "1_000"]),
        ("classes=[café,naïve, кошка ,猫]", ["café", "naïve", "кошка", "猫"]),
        ("classes=[farmer's market,a:b,50%,c#]", ["farmer's market", "a:b", "50%", "c#"]),
        ("classes=['a, b',\"it's\",[sofa,couch]]", ["a, b", "it's", ["sofa", "couch"]]),
        ("classes=[]", []),
        ("classes=cat, sofa", "cat, sofa"),
        ("classes={cat: [kitty]}", "{cat: [kitty]}"),
        ("classes='[x'", "[x"),
        ("negatives=[no,off,.5]", ["no", "off", ".5"]),
        ("negatives=person", ["person"]),
        ("negatives=farmer's market, 1_0", ["farmer's market", "1_0"]),
        ("formats=coco", ["coco"]),
        ("formats=coco,yolo", ["coco", "yolo"]),
        ("output=2024_05_06", "2024_05_06"),
        ("image=1e3", "1e3"),
        ("image=true", "true"),
        ("image=My Photos (1)/näs[1].jpg", "My Photos (1)/näs[1].jpg"),
        ("image=photos/*.jpg", "photos/*.jpg"),
        ("image=~/photos", "~/photos"),
        ("hydra.run.dir=~/my runs", "/home/me/my runs"),
        ("hydra.sweep.dir=~/runs", "/home/me/runs"),
        ("image=a\\b'c\\", "a\\b'c\\"),
        ("image=a=b", "a=b"),
        ("checkpoint=null", None),
        ("vision.name=1_000", "1_000"),
        ("vision.image_size=448", 448),
        ("hydra.run.dir=2024_05_06", "2024_05_06"),
        ("background=0.5", 0.5),
        ("pamr=true", True),
        ("short_side=1_000", 1000),
    ],
)
def test_words_arrive_as_typed(argument: str, want: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert through_hydra(argument) == [want]


def test_sweeps_keep_their_commas() -> None:
    arguments = ["-m", "image=a.jpg,b.jpg", "output=choice(x,y)", "classes=[1_0,x]", "image=1_0"]
    arguments += ["formats=coco", "negatives=a,b"]
    assert quote_overrides(arguments, SegmentConfig) == [
        *("-m", "image=a.jpg,b.jpg", "output=choice(x,y)"),
        *("classes=['1_0','x']", "image='1_0'"),
        *("formats=['coco']", "negatives=a,b"),
    ]


def test_other_arguments_are_left_alone() -> None:
    classes = "benchmark.classes=[{name: cat, id: 1}, dog]"
    assert quote_overrides([classes], SegmentConfig) == [classes]
    arguments = ["--cfg", "job", "~text", "+new=1_0", "pamr=true", "image=${output}", "image="]
    assert quote_overrides(arguments, SegmentConfig) == arguments
    assert quote_overrides(["image=1_0"], None) == ["image=1_0"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[cat", r"classes=\[cat: '\]' is missing \(character 5\)"),
        ("[cat,,dog]", "a word is missing"),
        ("['cat]", "a quote ' does not close"),
        ("['cat' dog]", r"'\]' is missing"),
        ("[cat [big]]", r"'\[' within a word"),
        ("[cat] dog", "something follows after its end"),
        ("[{cat: [kitty]}]", "a mapping stands alone"),
        ("[cat]]", "something follows"),
    ],
)
def test_bad_lists_are_one_line_with_advice(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        quote_overrides([f"classes={value}"], SegmentConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[[]]", "[a,[b]]", "[[[a]]]"])
def test_lists_of_plain_words(value: str) -> None:
    with pytest.raises(ConfigError, match=r"formats=.*: a list within the list; write formats="):
        quote_overrides([f"formats={value}"], SegmentConfig)


@pytest.mark.parametrize(
    ("value", "said"),
    [("{cat}", "a colon and its words are missing"), ("{a: b, a: c}", "a name stands twice")],
)
def test_bad_mappings(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_words(value, "classes")


@pytest.mark.parametrize("command", SCHEMAS)
def test_text_keys_are_keys_of_the_schema(command: str) -> None:
    keys = set(text_keys(SCHEMAS[command]))
    assert keys
    assert "background" not in keys and "data.batch_size" not in keys
    if command == "segment":
        assert {"classes", "negatives", "image", "output", "checkpoint"} <= keys


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@settings(deadline=None)  # the first call imports
@given(texts)
@example("\\")
@example("\\'")
@example("a\\\\'b\\\\")
def test_any_text_survives_hydra(text: str) -> None:
    value = OverridesParser.create().parse_override(f"image={quoted(text)}").value()
    assert value == text


@settings(deadline=None)  # the first call imports
@given(texts.filter(lambda t: t not in ("", "null") and t[0] not in "['\"" and "${" not in t))
@example("a\\")
@example("choice(a,b)")
@example("café.jpg")
@example("A¹")
@example("True")
@example(" a ")
@example("~")
@example("a~b")
def test_any_path_arrives_as_typed(text: str) -> None:
    assert through_hydra(f"image={text}", f"output={text}") == [text, text]


@settings(deadline=None)  # the first call imports
@given(st.lists(texts.filter(lambda word: word.strip() != ""), max_size=4))
def test_any_list_of_words_survives(words: list[str]) -> None:
    escaped = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
    line = ",".join(f'"{word}"' for word in escaped)
    if "${" not in line:
        assert through_hydra(f"classes=[{line}]") == [words]


@settings(deadline=None)  # the first call imports
@given(st.text(max_size=20))
def test_no_text_makes_a_traceback(text: str) -> None:
    for line in (f"[{text}]", f"{{{text}}}", text):
        try:
            parse_words(line, "classes")
        except ConfigError as error:
            assert "classes=" in str(error)
