"""Words, names and paths of the command line arrive as they were typed.

Hydra's grammar reads `null`, `true`, `1e3` and `2024_05_06` as values, and takes no letter beyond
ASCII outside quotes. So the texts among a command's arguments are put into quotes before Hydra
sees them: those whose key holds texts. Everything else keeps Hydra's grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from talk2dino.errors import ConfigError
from talk2dino.files import user_path

TypedWords = list[Any] | dict[str, Any] | str

# keys of config groups that hold texts, whatever the group's option; `hydra.run.dir` and its like
_TEXTS = frozenset(
    (
        *("name", "weights", "root", "images", "masks", "annotations", "tars", "split", "json_key"),
        *("classes", "templates", "image_suffix", "mask_suffix", "dir", "save_dir", "project"),
        "query",
    )
)
RUN_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")  # which Hydra makes itself
_ARGUMENT = re.compile(r"(\+{0,2}([\w@/]+(?:\.[\w@/]+)*)=)(.*)", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z/.][\w./-]*", re.ASCII)  # which Hydra reads as the same text
_RESERVED = ("null", "true", "false", "nan", "inf")


def text_keys(schema: type, lists: bool = False) -> Iterator[str]:
    """Dotted keys of a command's schema that hold a text or a list of texts.

    Args:
        schema: a dataclass.
        lists: those only that hold nothing but a list.
    """
    for name, hint in get_type_hints(schema).items():
        arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if list[str] in arms or (not lists and (name in _TEXTS or str in arms)):
            if not (lists and str in arms):
                yield name
        elif is_dataclass(hint):
            inside = text_keys(hint, lists)  # type: ignore[arg-type]
            yield from (f"{name}.{inner}" for inner in inside)


def _switches(schema: type) -> Iterator[str]:
    """Dotted keys of a command's schema that hold true or false."""
    for name, hint in get_type_hints(schema).items():
        if hint is bool:
            yield name
        elif is_dataclass(hint):
            yield from (f"{name}.{inner}" for inner in _switches(hint))  # type: ignore[arg-type]


def _refuse_number(argument: str, switches: set[str]) -> None:
    """Refuse a number for true or false (ConfigError), which OmegaConf takes for true."""
    match = _ARGUMENT.fullmatch(argument)
    if match is None or match[2].strip("+=") not in switches:
        return
    for value in match[3].split(","):
        if re.fullmatch(r"[+-]?[\d_]+", value.strip(" '\"")) and value not in ("0", "1"):
            raise ConfigError(f"{match[2].strip('+=')}={match[3]:.60}: give true or false")


def quote_overrides(arguments: Sequence[str], schema: type | None) -> list[str]:
    """The arguments for Hydra, with quotes around texts and around the texts of lists.

    What stands in quotes already, `null` for a single text, interpolations (`${…}`), and in a
    sweep (`-m`) everything with a comma or a call outside of a list, are left to Hydra. Where a key
    takes nothing but a list, its brackets may be left out: `formats=coco,yolo`.

    Args:
        arguments: of the command line, without the program.
        schema: the command's dataclass; None for a command without one.

    Raises:
        ConfigError: a list that cannot be read, or a number for true or false.
    """
    switches = set(_switches(schema)) if schema is not None else set()
    for argument in arguments:
        _refuse_number(argument, switches)
    sweep = bool({"-m", "--multirun"} & set(arguments))
    keys = set(text_keys(schema)) if schema is not None else set()
    lists = set(text_keys(schema, lists=True)) if schema is not None else set()
    return [_quoted_argument(argument, keys, lists, sweep) for argument in arguments]


def _quoted_argument(argument: str, keys: set[str], lists: set[str], sweep: bool) -> str:
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        return argument
    given, key, value = match.groups()
    nested = "." in key and key.rpartition(".")[2] in _TEXTS
    if not (key in keys or nested) or "${" in value or value[:1] in ("'", '"'):
        return argument
    if value.startswith("["):
        if nested and "{" in value and ":" in value:  # a benchmark's classes with ids and colors
            return argument
        words = parse_words(value, key)
        if key in lists and not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{key}={value:.60}: a list within the list; write {key}=[a,b]")
        return given + _hydra(words, key)
    calls_or_choices = "," in value or re.match(r"\w+\(", value) is not None
    if value in ("", "null") or (sweep and calls_or_choices):
        return argument
    if key in lists:  # `formats=coco`
        return given + _hydra(parse_words(f"[{value}]", key), key)
    if key in RUN_FOLDERS and value.startswith("~"):
        value = str(user_path(value))
    plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
    return given + (value if plain else quoted(value))


def quoted(text: str) -> str:
    """A text in Hydra's quotes, where a backslash counts only before a quote or the end."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def _hydra(words: TypedWords, key: str) -> str:
    """Parsed words as a list of Hydra's grammar."""
    if isinstance(words, str):
        return quoted(words)
    if isinstance(words, dict):
        raise ConfigError(f"{key}: a mapping stands alone, not in a list: {key}='{{cat: [kitty]}}'")
    return f"[{','.join(_hydra(word, key) for word in words)}]"


def parse_words(text: str, key: str) -> TypedWords:
    """A list `[cat, 'a, b', [sofa, couch]]` or a mapping `{cat: [kitty, kitten]}` of texts.

    Words are taken as they stand, without the spaces around them; one with a comma, a colon in a
    mapping, or a bracket goes into quotes, in which a backslash stands before a quote.

    Args:
        text: the list or mapping.
        key: config key, for the message.

    Raises:
        ConfigError: a bracket or quote that does not close, a comma too many, or a name twice.

    Examples:
        >>> from talk2dino.config.quoting import parse_words
        >>> parse_words("[café, null, 1_000, farmer's market, 'a, b', [sofa, couch]]", "classes")
        ['café', 'null', '1_000', "farmer's market", 'a, b', ['sofa', 'couch']]
        >>> parse_words("{cat: [kitty, kitten]}", "classes")
        {'cat': ['kitty', 'kitten']}
    """
    reader = _Reader(text, key)
    found = reader.value("")
    if reader.place < len(text.rstrip()):
        raise reader.error("something follows after its end")
    return found


class _Reader:
    def __init__(self, text: str, key: str) -> None:
        self.text, self.key, self.place = text, key, 0

    def error(self, what: str) -> ConfigError:
        shown = self.text if len(self.text) <= 60 else f"{self.text[:60]}…"
        return ConfigError(
            f"{self.key}={shown}: {what} (character {self.place + 1}); write "
            f"'{self.key}=[cat,\"a, b\"]', with quotes around a word that has a comma or bracket"
        )

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1
        return self.text[self.place : self.place + 1]

    def value(self, ends: str) -> TypedWords:
        """What stands here, up to one of `ends`, which is left."""
        first = self.peek()
        if first == "[":
            return list(self.items("]", lambda: self.value(",]")))
        if first == "{":
            pairs = list(self.items("}", self.pair))
            names = [name for name, _ in pairs]
            if len(set(names)) < len(names):
                raise self.error("a name stands twice")
            return dict(pairs)
        return self.word(ends)

    def pair(self) -> tuple[str, Any]:
        """`name: words` of a mapping."""
        name = self.word(":,}")
        if self.peek() != ":":
            raise self.error(f"after {name!r} a colon and its words are missing")
        self.place += 1
        return name, self.value(",}")

    def items(self, end: str, item: Any) -> Iterator[Any]:
        """Items with commas between them, up to the bracket `end`."""
        self.place += 1
        while self.peek() != end:
            yield item()
            if self.peek() == ",":
                self.place += 1
            elif self.peek() != end:
                raise self.error(f"{end!r} is missing")
        self.place += 1

    def word(self, ends: str) -> str:
        """A word in quotes, or all up to one of `ends`."""
        quote = self.peek()
        if quote and quote in "'\"":
            found = re.compile(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}", re.DOTALL).match(
                self.text, self.place
            )
            if found is None:
                raise self.error(f"a quote {quote} does not close")
            self.place = found.end()
            return re.sub(r"\\(['\"\\])", r"\1", found[1])
        start = self.place
        while self.place < len(self.text) and self.text[self.place] not in ends:
            braces = re.compile(r"\{[^][{}]*\}").match(self.text, self.place)  # {00..12}.tar
            if self.text[self.place] in "[]{}" and (braces is None or "}" in ends):
                raise self.error(f"{self.text[self.place]!r} within a word")
            self.place = braces.end() if braces else self.place + 1
        word = self.text[start : self.place].strip()
        if not word:
            raise self.error("a word is missing")
        return word
