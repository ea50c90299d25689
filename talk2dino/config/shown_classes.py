"""The classes of a command, said in words or shown in a folder of exemplars."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from talk2dino.config.command import class_words, progress, require
from talk2dino.datasets.benchmarks.classes import composed
from talk2dino.errors import ConfigError
from talk2dino.inference.class_embeddings import ClassEmbeddings
from talk2dino.inference.exemplars import read_folder
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.vocabulary import Shown, exemplars_of


def named_classes(config: DictConfig) -> dict[str, tuple[Shown, ...]] | ClassEmbeddings:
    """The words of `classes` and the exemplars of the folder `exemplars`, by class.

    Arguments and errors as `class_words` and `exemplars.read_folder`; one of the two may be null.

    Raises:
        ConfigError: exemplars beside class embeddings.
    """
    words = {} if config.classes is None else class_words(config.classes)
    if config.exemplars is None:
        return words  # type: ignore[return-value]  # words are what a class may be shown by
    if isinstance(words, ClassEmbeddings):
        raise ConfigError(
            f"exemplars={config.exemplars}: the classes of {words.origin} are embedded already; "
            "give the exemplars to talk2dino.embed, or classes as words"
        )
    typed = {composed(name): name for name in words}
    folder = read_folder(config.exemplars, config.exemplar_weight)
    shown = {typed.get(name, name): exemplars for name, exemplars in folder.items()}
    return {name: (*words.get(name, ()), *shown.get(name, ())) for name in {**words, **shown}}


def require_classes(config: DictConfig, *keys: str) -> None:
    """`require`, with `classes` or `exemplars` in place of both."""
    require(config, *keys, *(["classes"] if config.exemplars is None else []))


def embed_exemplars(
    model: Talk2DINO, classes: Mapping[str, tuple[Shown, ...]] | ClassEmbeddings, short_side: int
) -> None:
    """Look at the exemplars of all classes with a progress bar; the model keeps their rows."""
    shown = {} if isinstance(classes, ClassEmbeddings) else exemplars_of(classes)
    with progress("exemplars", visible=bool(shown)) as advance:
        for done, exemplars in enumerate(shown.values()):
            model.embed_exemplars(exemplars, short_side)
            advance(done + 1, len(shown))
