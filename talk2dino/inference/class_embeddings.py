"""Classes as a file: their unit rows and what they were made with; no text encoder needed.

A safetensors file holds `rows` `[N, D]` float32, one per word, where classes were shown without a
calibration also `offsets` `[N]`, and as metadata a JSON entry `talk2dino_classes`:

| key | value |
| --- | --- |
| `version` | 1 |
| `classes` | names in order |
| `rows` | `{"class": index or null for a negative word, "word": …, "sentences": […]}` each |
| `templates` | name of the prompt templates, or sentences with `{}` |
| `made_with` | `vision`, `text`, `projection`: `spec` and `weights_sha256` each; `calibration`: its
digest, or an empty text, where classes were shown |
| `exemplars` | digests by class name, where classes were shown |

A class that exemplars alone stand for has one row, without word and sentences; where there are no
words at all, `text` is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talk2dino.alignment.checkpoint import identify_projection
from talk2dino.alignment.projection import Projection
from talk2dino.datasets.benchmarks.classes import check_word, composed
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import CheckpointError, ConfigError, DataError, say
from talk2dino.files import replacing, user_path
from talk2dino.inference.vocabulary import ClassWords, WordOrExemplar, Words
from talk2dino.renamed import TARGET, current

KEY = "talk2dino_classes"
VERSION = 1
SUFFIX = ".safetensors"
CALIBRATION = "calibration"
# of an encoder's spec, what changes no row, or what its name or digest says better
_IRRELEVANT = ("weights", "batch_size", "templates", "image_size", "rope_in_attention")
_HOW = "make it with: python -m talk2dino.embed checkpoint=… classes=… output=FILE.safetensors"


@dataclass(frozen=True, eq=False)
class ClassEmbeddings:
    """Classes with their text rows, made by `Talk2DINO.embed_classes` or read from a file.

    Attributes:
        words: names, sentences and the class of every row.
        rows: `[N, D]` float32 of unit length, on the CPU.
        templates: of the prompts.
        made_with: spec and digest of `vision`, `text` (None without words) and `projection`, and
            the digest of the `calibration` that exemplars were compared with, empty for none.
        exemplars: digests of those that show a class, by its name.
        origin: the file.
        offsets: `[N]` float32, what is subtracted from the cosines of the rows where the checkpoint
            has no calibration; None for words alone and with one.

    Examples:
        >>> import torch
        >>> from talk2dino import Talk2DINO
        >>> from talk2dino.alignment import ProjectionLayer
        >>> from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
        >>> from talk2dino.inference.class_embeddings import ClassEmbeddings
        >>> vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
        >>> text = OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain")
        >>> model = Talk2DINO(vision, text, ProjectionLayer(text.embed_dim, vision.embed_dim))
        >>> file = model.embed_classes(["cat", ["sofa", "couch"]]).save("classes.safetensors")
        >>> ClassEmbeddings.load(file).words.names
        ('cat', 'sofa')
        >>> model.segment(torch.zeros(3, 32, 32, dtype=torch.uint8), file, short_side=32).classes
        ['cat', 'sofa']
    """

    words: Words
    rows: Tensor = field(repr=False)
    templates: str | Sequence[str]
    made_with: Mapping[str, Any] = field(repr=False)
    exemplars: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    origin: str = "ClassEmbeddings"
    offsets: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, classes: object) -> ClassEmbeddings | None:
        """Those that were given, or in the file that was; None for words."""
        if isinstance(classes, ClassEmbeddings):
            return classes
        return cls.load(classes) if is_file(classes) else None

    @classmethod
    def load(cls, path: str | Path, key: str = "classes") -> ClassEmbeddings:
        """Read a file of `save`; `key` is for errors.

        Raises:
            DataError: no such file, not one of class embeddings, or what `check_word` refuses.
        """
        where = f"{key}={path}"
        file = user_path(path)
        if not file.is_file():
            raise DataError(f"{where}: no such file; {_HOW}")
        try:
            with safe_open(file, framework="pt") as opened:
                entry = (opened.metadata() or {}).get(KEY)
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{where}: not a safetensors file ({error}); {_HOW}") from error
        rows, offsets = held.get("rows"), held.get("offsets")
        if entry is None or rows is None:
            raise DataError(f"{where}: holds no class embeddings (no {KEY} entry); {_HOW}")
        try:
            content = json.loads(entry)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, known is {VERSION}")
            words = _read_words(content)
            for word in (*words.names, *filter(None, words.row_words)):
                check_word(word, where)
            made_with: dict[str, Any] = {}
            for part in _PARTS:
                if part == "text" and not any(words.rows) and content["made_with"][part] is None:
                    made_with[part] = None
                    continue
                made_with[part] = dict(content["made_with"][part])
                made_with[part]["spec"].get("name")  # a mapping
            made_with |= {k: str(v) for k, v in content["made_with"].items() if k == CALIBRATION}
            shown = {k: tuple(map(str, v)) for k, v in content.get("exemplars", {}).items()}
            _check_rows(rows, offsets, words)
            rows = rows.clone()  # aligned as computed ones are: the file's place decides otherwise
            used = content["templates"]
            return cls(words, rows, used, made_with, shown, str(path), offsets)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{where}: damaged ({reason}); {_HOW}") from error

    def save(self, path: str | Path) -> Path:
        """Write a `.safetensors` file, complete or not at all; an existing one is never replaced.

        Raises:
            ConfigError: there is such a file, or its name ends otherwise.
        """
        target = check_new(path)
        has_negatives, words = self.words.has_negatives, self.words
        described = zip(words.row_classes, words.row_words, words.rows, strict=True)
        entry = {
            "version": VERSION,
            "classes": words.names,
            "rows": [
                {"class": _index(number, has_negatives), "word": word, "sentences": sentences}
                for number, word, sentences in described
            ],
            "templates": self.templates,
            "made_with": self.made_with,
            **({"exemplars": dict(self.exemplars)} if self.exemplars else {}),
        }
        content = {"rows": self.rows.contiguous()}
        content |= {} if self.offsets is None else {"offsets": self.offsets.contiguous()}
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            save_file(content, temporary, {KEY: json.dumps(entry)})
        return target

    def __iter__(self) -> Iterator[str]:
        """Names, as of a mapping of names to words."""
        return iter(self.words.names)

    def select(self, names: Sequence[str]) -> ClassEmbeddings:
        """Only these classes, in this order; negative words stay.

        Accents may be typed in either of Unicode's forms; names are as they were embedded.

        Raises:
            ConfigError: no name, one that is not there, or one twice.
        """
        known, first = self.words.names, int(self.words.has_negatives)
        own = {composed(name): name for name in known}
        names = [name if name in known else own.get(composed(name), name) for name in names]
        unknown = [name for name in names if name not in known]
        if unknown or not names or len(set(names)) < len(names):
            wrong = f"{unknown[0]!r} is not in it" if unknown else "give each name once"
            raise ConfigError(f"classes={self.origin}: {wrong}; its classes are {', '.join(known)}")
        order = [0] * first + [first + known.index(name) for name in names]
        kept = [(new, row) for new, old in enumerate(order) for row in self._rows_of(old)]
        chosen = [row for _, row in kept]
        words = Words(
            tuple(names),
            tuple(self.words.rows[row] for row in chosen),
            tuple(new for new, _ in kept),
            self.words.has_negatives,
            tuple(self.words.row_words[row] for row in chosen),
        )
        shown = {name: self.exemplars[name] for name in names if name in self.exemplars}
        offsets = None if self.offsets is None else self.offsets[chosen]
        return replace(self, words=words, rows=self.rows[chosen], exemplars=shown, offsets=offsets)

    def refuse_words(self, *given: object) -> None:
        """Refuse templates, negatives and prompts, which are settled here (ConfigError)."""
        if any(given):
            raise ConfigError(
                f"classes={self.origin}: holds embeddings, so templates, negatives and prompts "
                "are settled; leave them out, or embed the classes with them"
            )

    def _rows_of(self, number: int) -> list[int]:
        return [row for row, one in enumerate(self.words.row_classes) if one == number]

    def check(
        self,
        vision: TimmVisionEncoder,
        text: Mapping[str, Any] | None,
        projection: Projection,
        calibration: str,
    ) -> ClassEmbeddings:
        """Refuse a model whose rows these are not; say that exemplars had another calibration.

        Args:
            vision: the model's encoder; where there are exemplars, its weights count as well.
            text: spec of its text encoder, which need not exist; None if the checkpoint names none.
            projection: ψ.
            calibration: its digest, or an empty text.

        Raises:
            CheckpointError: another projection or other encoders.
        """
        wrong = ""
        for part, spec in (("vision", vision.spec), ("text", text)):
            theirs = (self.made_with[part] or {"spec": spec})["spec"]
            if spec is not None and _identity(theirs) != _identity(spec):
                wrong = f"{part} encoder ({theirs.get('name')}, not {spec.get('name')})"
        weights = self.made_with["vision"]["weights_sha256"]
        if not wrong and self.exemplars and weights != state_dict_digest(vision.model):
            wrong = f"vision encoder (other weights of {vision.name})"
        if not wrong and self.made_with["projection"] != identify_projection(projection):
            wrong = "projection"
        if wrong:
            raise CheckpointError(
                f"classes={self.origin}: made with another {wrong} than this checkpoint has; embed "
                "the classes again with it"
            )
        if self.made_with.get(CALIBRATION, calibration) != calibration:
            say(
                f"classes={self.origin}: what is shown was compared with another calibration than "
                "this one, or with none; embed the classes again with it",
                stacklevel=4,
            )
        return self


Classes: TypeAlias = ClassWords | ClassEmbeddings | str | Path
NamedClasses: TypeAlias = Mapping[str, tuple[WordOrExemplar, ...]] | ClassEmbeddings
_PARTS = ("vision", "text", "projection")


def is_file(classes: object) -> TypeGuard[str | Path]:
    """Whether it names a file of class embeddings."""
    return isinstance(classes, (str, Path)) and Path(classes).suffix.lower() == SUFFIX


def check_new(path: str | Path) -> Path:
    """Where class embeddings may be written.

    Raises:
        ConfigError: there is such a file, or its name ends otherwise.
    """
    target = user_path(path)
    if target.suffix != SUFFIX:
        raise ConfigError(f"output={path}: the name must end in {SUFFIX}")
    if target.exists():
        raise ConfigError(f"output={path}: is there already; use another name or remove it")
    return target


def describe_model(
    vision: Mapping[str, Any], text: Mapping[str, Any] | None, projection: Projection
) -> dict[str, Any]:
    """What `made_with` says; `vision` and `text` are what the encoders' `describe` gives."""
    encoders = {"vision": vision, "text": text}
    kept = ("spec", "weights_sha256")
    described: dict[str, Any] = {
        part: told and {key: told[key] for key in kept} for part, told in encoders.items()
    }
    return described | {"projection": identify_projection(projection)}


def _identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in spec.items() if key not in _IRRELEVANT}
    return kept | {TARGET: current(str(spec.get(TARGET)))}


def _index(number: int, has_negatives: bool) -> int | None:
    """A row's class as the file counts: names only, null for what is none of them."""
    return None if has_negatives and number == 0 else number - int(has_negatives)


def _read_words(content: Mapping[str, Any]) -> Words:
    names = tuple(content["classes"])
    entries = content["rows"]
    has_negatives = any(entry["class"] is None for entry in entries)
    shift = int(has_negatives)
    numbers = tuple(0 if e["class"] is None else e["class"] + shift for e in entries)
    if not names or sorted(set(numbers)) != list(range(len(names) + shift)):
        raise ValueError("rows and classes do not belong together")
    rows = tuple(tuple(map(str, entry["sentences"])) for entry in entries)
    return Words(names, rows, numbers, has_negatives, tuple(str(e["word"]) for e in entries))


def _check_rows(rows: Tensor, offsets: Tensor | None, words: Words) -> None:
    if rows.ndim != 2 or rows.dtype != torch.float32 or len(rows) != len(words.rows):
        raise ValueError(
            f"rows {list(rows.shape)} {rows.dtype} instead of {len(words.rows)} of float32"
        )
    if not ((rows.norm(dim=1) - 1).abs() < 1e-3).all():
        raise ValueError("rows that are not of unit length")
    if offsets is not None and not (
        offsets.shape == rows.shape[:1]
        and offsets.dtype == torch.float32
        and offsets.isfinite().all()
    ):
        raise ValueError(f"offsets {list(offsets.shape)} {offsets.dtype}")
