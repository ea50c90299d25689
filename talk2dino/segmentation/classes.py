"""Class lists: names, synonyms and label values, and their embeddings in the patch space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talk2dino.alignment.projection import Projection
from talk2dino.alignment.texts import embed_texts
from talk2dino.encoders.prompts import prompts
from talk2dino.encoders.text import TextEncoder
from talk2dino.errors import DataError

BACKGROUND = "background"


@dataclass(frozen=True)
class ClassSpec:
    """One class of a benchmark.

    Attributes:
        name: as reported.
        synonyms: what is put into the prompts; the best one counts.
        value: its pixels' value in the label files.
    """

    name: str
    synonyms: tuple[str, ...]
    value: int


@dataclass(frozen=True)
class ClassList:
    """The classes of a benchmark, index order.

    A first class called "background" has no prompt: it is what no class claims.

    Attributes:
        classes: in the order of the confusion matrix.
        unlabelled: label values that do not count, besides the benchmark's `ignore_index`.
    """

    classes: tuple[ClassSpec, ...]
    unlabelled: tuple[int, ...] = ()

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


def read_classes(source: str | Path | Sequence[Any]) -> ClassList:
    """Read a class list.

    Args:
        source: names, or a `.txt` (a class per line, `name; synonym; …`), or a `.json`: a list of
            names or of `{"name", "id", "synonyms"}`, or `{"classes": […], "unlabeled": 0}`.

    Raises:
        DataError: missing file, no class, an entry without name, a value used twice.
    """
    if isinstance(source, (str, Path)):
        origin = str(source)
        entries, unlabelled = _read_file(Path(source))
    else:
        origin, entries, unlabelled = "classes", list(source), ()
    if not entries:
        raise DataError(f"{origin}: the class list is empty; name at least one class")
    specs = tuple(_spec(entry, number, origin) for number, entry in enumerate(entries))
    values = [spec.value for spec in specs]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise DataError(f"{origin}: two classes have the label value {twice}")
    classes = ClassList(specs, unlabelled)
    if not classes.prompted:
        raise DataError(f"{origin}: background is the only class; name what to look for")
    return classes


def _read_file(path: Path) -> tuple[list[Any], tuple[int, ...]]:
    if not path.is_file():
        raise DataError(f"benchmark.classes={path}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line for line in map(str.strip, text.splitlines()) if line], ()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not a json file ({error})") from error
    ignored: list[int] = []
    if isinstance(content, dict):
        given = content.get("unlabeled", [])
        values = given if isinstance(given, list) else [given]
        ignored = [_label_value(value, f"{path}: unlabeled") for value in values]
        content = content.get("classes", [])
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of classes, found {type(content).__name__}")
    return content, tuple(ignored)


def _label_value(value: Any, where: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise DataError(f"{where} is {value!r}; give a label value, a whole number from 0")
    return value


def _spec(entry: Any, number: int, origin: str) -> ClassSpec:
    if isinstance(entry, str):
        names = tuple(part.strip() for part in entry.split(";") if part.strip())
        if names:
            return ClassSpec(names[0], names, number)
    elif isinstance(entry, dict) and str(entry.get("name", "")).strip():
        name = str(entry["name"]).strip()
        synonyms = tuple(map(str, entry.get("synonyms") or (name,)))
        value = _label_value(entry.get("id", number), f"{origin}: class {number} ({name}): id")
        return ClassSpec(name, synonyms, value)
    raise DataError(f"{origin}: class {number} is {entry!r}; give it a name")


@torch.no_grad()
def embed_classes(
    synonyms: Sequence[Sequence[str]],
    text: TextEncoder,
    projection: Projection,
    template_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed class names in the space of the patch tokens.

    Raw mean of the text embeddings over the templates, then ψ, then unit length (eps 1e-6), as the
    original's `build_text_embedding`; ψ is not linear, so the order matters. With `CLIPLastLayer`
    the mean is taken over the embeddings of its own last block.

    Args:
        synonyms: per class, the names that stand for it.
        text: text encoder.
        projection: ψ.
        template_set: name of the prompt templates; None takes those that suit the encoder.

    Returns:
        [N, D] unit rows, one per synonym, and [N] int64 the class of each row.
    """
    rows = [(number, name) for number, names in enumerate(synonyms) for name in names]
    groups = prompts([name for _, name in rows], template_set or text.templates)
    sentences = [sentence for group in groups for sentence in group]
    embeddings = embed_texts(sentences, text, projection)
    embeddings = embeddings.view(len(rows), len(groups[0]), -1).mean(dim=1)
    projected = projection.project_embedding(embeddings)
    classes = torch.tensor([number for number, _ in rows], device=projected.device)
    return F.normalize(projected, dim=-1, eps=1e-6), classes
