"""Class lists: names, synonyms, label values and colors, and the files they are read from."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from talk2dino.errors import ConfigError, DataError, say
from talk2dino.files import read_json, read_text, user_path

BACKGROUND = "background"
Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassSpec:
    """One class of a benchmark.

    Attributes:
        name: as reported.
        synonyms: what is put into the prompts; the best one counts.
        value: its pixels' value in the label files.
        color: its pixels' color in colored label files, 0..255 RGB; None if not known.
    """

    name: str
    synonyms: tuple[str, ...]
    value: int
    color: Color | None = None


@dataclass(frozen=True)
class ClassList:
    """The classes of a benchmark, index order.

    A first class called "background" has no prompt: pixels belong to it where no class scores high.

    Attributes:
        classes: in the order of the confusion matrix.
        unlabeled: label values that do not count, besides the benchmark's `ignore_index`.
    """

    classes: tuple[ClassSpec, ...]
    unlabeled: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names in index order."""
        return [spec.name for spec in self.classes]

    @property
    def has_background(self) -> bool:
        """Whether class 0 is the background."""
        return self.classes[0].name == BACKGROUND

    @property
    def prompted(self) -> tuple[ClassSpec, ...]:
        """The classes that have a prompt."""
        return self.classes[1:] if self.has_background else self.classes


_ENTRY_KEYS = ("name", "id", "synonyms", "color")
# soft hyphen, no space, no break, byte order mark; the last two are no characters, of XML neither
_UNSEEN = "\u00ad\u200b\u2060\ufeff\ufffe\uffff"
MAX_VALUE = 65535  # of a 16-bit label map
_NO_CLASS = (BACKGROUND, "bg", "unlabeled", "unlabelled", "unknown", "void", "ignore")
_SHIPPED = Path(__file__).parent / "class_lists"


def shipped_lists() -> list[str]:
    """Names of the class lists that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.txt"))


def read_classes(source: str | Path | Sequence[Any], key: str = "benchmark.classes") -> ClassList:
    """Read a class list.

    Args:
        source: one of

            * names, `[cat, dog]`, or entries `{"name", "id", "synonyms", "color"}`;
            * a shipped list, or several joined by `+`: `voc`, `background+coco_things`;
            * a `.txt` file with a class per line, `name; synonym; …; #rrggbb` (the color is
              optional), or a `.json` file: a list of names or entries, or
              `{"classes": […], "unlabeled": 0}`.

            Without `id` a class's label value is its position in the list, from 0.
        key: of the config, for errors.

    Raises:
        DataError: missing file, no class, an entry without name, a name or value used twice, a
            background that is not the first class, or nothing besides it.
    """
    if isinstance(source, (str, Path)):
        origin = str(source)
        entries, unlabeled = _read(origin, key)
    else:
        origin, entries, unlabeled = key, list(source), ()
    if not entries:
        raise DataError(f"{origin}: the class list is empty; name at least one class")
    classes = ClassList(
        tuple(_spec(entry, number, origin) for number, entry in enumerate(entries)), unlabeled
    )
    _check(classes, origin)
    return classes


def typed_classes(given: object, key: str = "classes") -> dict[str, tuple[str, ...]]:
    """Names and the words that stand for them, as somebody typed them, in their order.

    Unlike in the list of a benchmark, `background` is a word, and `#` begins no color.

    Args:
        given: `"cat, sofa; couch"`; a list `["cat", "sofa; couch"]` or
            `["cat", ["sofa", "couch"]]`; or a mapping `{"sofa": ["sofa", "couch"]}`. Elsewhere a
            comma or semicolon is a part of its word.
        key: of the config or the form, for errors.

    Raises:
        ConfigError: none of these, no class, an empty word, or a class that is named twice.
        DataError: what `check_word` refuses.

    Examples:
        >>> from talk2dino.datasets.benchmarks.classes import typed_classes
        >>> typed_classes("cat, sofa; couch")
        {'cat': ('cat',), 'sofa': ('sofa', 'couch')}
    """
    if isinstance(given, str):
        given = parted(given, ",")
    if is_list(given):
        given = [parted(entry, ";") if isinstance(entry, str) else entry for entry in given]
    found = grouped_words(given, key)
    return {name.strip(): tuple(map(str.strip, words)) for name, words in found.items()}


def grouped_words(given: object, key: str, *also: type) -> dict[str, tuple[Any, ...]]:
    """Classes in order: their names, and what stands for each.

    Args:
        given: a list of names, and of lists that begin with one; or a mapping from names.
        key: for errors.
        also: types of what may stand beside words but is no name: exemplars.

    Raises:
        ConfigError: none of these, no class, an empty word, or a class that is named twice.
        DataError: what `check_word` refuses.
    """
    if isinstance(given, Mapping):
        pairs = [(name, words_of(words, key, *also)) for name, words in given.items()]
    elif is_list(given):
        groups = [words_of(entry, key, *also) for entry in given]
        pairs = [(words[0] if words else "", words) for words in groups]
    else:
        raise ConfigError(
            f"{key}={given!r:.60}: give a list of names, as ['cat', 'sofa'], or a .safetensors "
            "file of class embeddings"
        )
    if not pairs or not all(words for _, words in pairs):
        raise ConfigError(
            f"{key}: the list is empty or has an empty name; name at least one, for instance: "
            "cat, sofa"
        )
    if any(isinstance(name, also) for name, _ in pairs):
        raise ConfigError(f"{key}: an exemplar has no name; use {{'crack': Exemplar(…)}}")
    same = Counter(composed(name) for name in words_of([name for name, _ in pairs], key))
    [(name, times)] = same.most_common(1)
    if times > 1:
        raise ConfigError(f"{key}: {name!r} is named twice; leave one out")
    return dict(pairs)


def words_of(given: object, key: str, *also: type) -> tuple[Any, ...]:
    """A word, or the words of a list, which may be none; errors as `grouped_words`."""
    words = tuple(given) if is_list(given) else (given,)
    for word in words:
        if not isinstance(word, (str, *also)) or (isinstance(word, str) and not word.strip()):
            raise ConfigError(
                f"{key}: {word!r:.60} is neither a word nor a list of words; give a list, as "
                "['cat', 'sofa']"
            )
        if isinstance(word, str):
            check_word(word, key)
    return words


def is_list(given: object) -> TypeGuard[Iterable[Any]]:
    """Whether it can be gone through more than once, in parts and in the same order."""
    unordered = isinstance(given, Set) and not isinstance(given, KeysView)
    if isinstance(given, (str, bytes, Mapping)) or unordered:
        return False
    try:
        return iter(given) is not given  # type: ignore[call-overload]
    except TypeError:
        return False


def parted(text: str, marks: str) -> list[str]:
    """The words between any of the marks, without spaces around them; an empty one is none."""
    return [word.strip() for word in re.split(f"[{marks}]", text) if word.strip()]


def composed(word: str) -> str:
    """A name in Unicode's composed form, without the spaces around it.

    Some systems write an accent as a character of its own. The two forms look the same, so they
    count as one name.
    """
    return unicodedata.normalize("NFC", word).strip()


def folded(word: str) -> str:
    """The same for comparing without upper case."""
    return composed(word).casefold()


def check_word(word: object, where: str) -> None:
    """Refuse what is no name or synonym of a class.

    Raises:
        DataError: no text, an empty one, or one with control characters or half a character.
    """
    if not isinstance(word, str) or not word.strip():
        raise DataError(f"{where}: a name or synonym is {word!r:.60}; give a text")
    if any(unicodedata.category(letter) in ("Cc", "Cs") or letter in _UNSEEN for letter in word):
        raise DataError(
            f"{where}: {word!a:.60} has a control character, one that nobody sees, or half a "
            "character (lone surrogate); remove it"
        )


def read_color(given: Any, where: str) -> Color:
    """A color `[r, g, b]` of 0..255, or `"#rrggbb"`.

    Raises:
        DataError: neither of them.
    """
    if isinstance(given, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", given.strip()):
        text = given.strip()
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 3:
        red, green, blue = given
        if all(type(part) is int and 0 <= part <= 255 for part in (red, green, blue)):
            return red, green, blue
    raise DataError(f'{where} is {given!r}; give a color as [r, g, b] of 0..255 or "#rrggbb"')


def _check(classes: ClassList, origin: str) -> None:
    values = [spec.value for spec in classes.classes]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise DataError(f"{origin}: two classes have the label value {twice}")
    both = next((spec for spec in classes.classes if spec.value in classes.unlabeled), None)
    if both is not None:
        raise DataError(
            f"{origin}: unlabeled {both.value} is the label value of {both.name!r}; classes "
            'without an id count from 0: give {"name": …, "id": 1}, or another unlabeled value'
        )
    names = classes.names
    read = list(map(composed, names))
    same = next((name for name in read if read.count(name) > 1), None)
    if same is not None:
        raise DataError(f"{origin}: two classes are called {same!r}; results are listed by name")
    if names[0].strip("_").casefold() in _NO_CLASS and names[0] != BACKGROUND:
        say(
            f"{origin}: the first class, {names[0]!r}, is looked for as a word; call it "
            f"{BACKGROUND} if it is what no class fits"
        )
    if BACKGROUND in names[1:]:
        raise DataError(
            f"{origin}: {BACKGROUND} is class {names.index(BACKGROUND)}; only the first class may "
            "be the background, which has no prompt"
        )
    if not classes.prompted:
        raise DataError(f"{origin}: background is the only class; name what to look for")


def _read(source: str, key: str) -> tuple[list[Any], tuple[int, ...]]:
    parts = source.split("+")
    if all(part in shipped_lists() for part in parts):
        return [line for part in parts for line in _lines(_SHIPPED / f"{part}.txt")], ()
    path = user_path(source)
    if not path.is_file():
        raise DataError(
            f"{key}={source}: no such file; give a .txt or .json file, names as "
            f"[cat,dog], or a list that comes with the package: {', '.join(shipped_lists())}"
        )
    return _read_json(path) if path.suffix.lower() == ".json" else (_lines(path), ())


def _lines(path: Path) -> list[str]:
    """The lines of a list of classes that are not empty.

    Raises:
        DataError: all begin with a number, which would be part of the names.
    """
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    named = [line for line in lines if line]
    if 0 < len(named) < len(lines):
        empty = lines.index("") + 1
        say(f"{path}: line {empty} is empty and does not count: label values go on without a gap")
    numbers = [found[1] for found in map(re.compile(r"(\d+)[\s:;,.)]+\S").match, named) if found]
    if len(numbers) == len(named) > 1 and sorted(set(numbers), key=int) == numbers:
        raise DataError(
            f"{path}: line 1 is {named[0]!r:.60}, where the number would be part of the name; give "
            "the names alone, or a .json file with an id for each"
        )
    return named


def _read_json(path: Path) -> tuple[list[Any], tuple[int, ...]]:
    content: Any = read_json(path, object, "a list of classes")
    ignored: list[int] = []
    if isinstance(content, dict):
        given = content.get("unlabeled", [])
        values = given if isinstance(given, list) else [given]
        ignored = [_label_value(value, f"{path}: unlabeled") for value in values]
        refuse_typo(content, ("classes", "unlabeled"), str(path))
        content = content.get("classes", [])
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of classes, found {type(content).__name__}")
    return content, tuple(ignored)


def _label_value(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_VALUE:
        raise DataError(f"{where} is {value!r}; give a label value, a whole number 0..{MAX_VALUE}")
    return value


def _spec(entry: Any, number: int, origin: str) -> ClassSpec:
    if isinstance(entry, str):
        parts = parted(entry, ";")
        colors = [part for part in parts if part.startswith("#")]
        names = tuple(part for part in parts if not part.startswith("#"))
        if names and len(colors) < 2:
            for name in names:
                check_word(name, f"{origin}: class {number}")
            where = f"{origin}: class {number} ({names[0]}): color"
            color = read_color(colors[0], where) if colors else None
            return ClassSpec(names[0], names, number, color)
    elif (
        isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and entry["name"].strip()
    ):
        return _from_mapping(entry, number, origin)
    raise DataError(f"{origin}: class {number} is {entry!r:.200}; give it a name")


def _from_mapping(entry: Mapping[str, Any], number: int, origin: str) -> ClassSpec:
    check_word(entry["name"], f"{origin}: class {number}")
    name = entry["name"].strip()
    where = f"{origin}: class {number} ({name})"
    refuse_typo(entry, _ENTRY_KEYS, where)
    given = entry.get("synonyms") or (name,)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"{where}: synonyms is {given!r:.60}; give a list of names")
    for synonym in given:
        if isinstance(synonym, str) and not synonym.strip():
            raise DataError(f"{where}: a synonym is empty; remove it")
        check_word(synonym, f"{where}: synonyms")
    value = _label_value(entry.get("id", number), f"{where}: id")
    color = entry.get("color")
    return ClassSpec(
        name,
        tuple(synonym.strip() for synonym in given),
        value,
        None if color is None else read_color(color, f"{where}: color"),
    )


def refuse_typo(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that is nearly a known one (DataError); others may be another program's."""
    for key in given:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
        if near and key not in known:
            raise DataError(f"{where}: unknown key {key!r:.60}; did you mean {near[0]!r}?")
