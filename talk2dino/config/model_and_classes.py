"""The checkpoint and the classes of a command: loaded, said in words or shown, and printed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.table import Column, Table
from rich.text import Text

from talk2dino.calibration.calibration import AUTO, find_calibration
from talk2dino.config.command import build, progress
from talk2dino.config.quoting import parse_words
from talk2dino.datasets.benchmarks.classes import (
    BACKGROUND,
    composed,
    read_classes,
    shipped_lists,
    typed_classes,
)
from talk2dino.encoders.devices import choose_device
from talk2dino.errors import ConfigError, say
from talk2dino.inference.class_embeddings import ClassEmbeddings, NamedClasses, is_file
from talk2dino.inference.exemplars import WEIGHT, read_folder
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.segmented import background_threshold, refuse_background
from talk2dino.inference.vocabulary import ClassWords, OpenVocabulary, exemplars_of, read_words
from talk2dino.segmentation.overlay import legend_colors

CHECKPOINTS = (
    "a checkpoint is a run folder, a .safetensors, .ckpt or original .pth file, or a Hub id like "
    "org/name; `make quickstart` trains one in minutes: checkpoint=outputs/quickstart/dense"
)


def require(config: DictConfig, *keys: str) -> None:
    """Name all keys at once that are not given, and say where a checkpoint comes from.

    Raises:
        ConfigError: a key is null.
    """
    missing = [key for key in keys if config[key] is None]
    if missing:
        how = CHECKPOINTS if "checkpoint" in missing else "for instance classes='[cat,sofa]'"
        raise ConfigError(f"{', '.join(f'{key}=…' for key in missing)} not given; {how}")


def load_model(config: DictConfig, device: str | None = None, classes: object = None) -> Talk2DINO:
    """Load `checkpoint` with its own encoders, or with those that `vision` and `text` choose.

    Args:
        config: of a command with these keys.
        device: where to; None takes the one that `accelerator` names.
        classes: of `class_words`; for class embeddings no text encoder is built.

    Raises:
        UserError: the checkpoint or an encoder cannot be loaded.
    """
    text: Any = config.text or None
    if text and isinstance(classes, ClassEmbeddings):
        text = OmegaConf.to_container(text, resolve=True)  # a name to compare with
    elif text:
        text = build(text)
    return Talk2DINO.from_pretrained(
        config.checkpoint,
        device=device or choose_device(config.accelerator),
        vision=build(config.vision) if config.vision else None,
        text=text,
        calibration=config.get("calibration"),
    )


def class_words(
    given: object, background: bool | float | None = None, key: str = "classes"
) -> dict[str, tuple[str, ...]] | ClassEmbeddings:
    """Class names and the words that stand for them, from the command line or a file.

    Args:
        given: `[cat,"sofa; couch"]`, `[cat,[sofa,couch]]`, `"cat, sofa"`, a mapping
            `{cat: [kitty]}`, a `.txt` or `.json` file or the name of a list that comes with the
            package (see `datasets.benchmarks.classes`), or a `.safetensors` file of class
            embeddings. A background of a file is not prompted; among words it is one like any
            other.
        background: what is asked for; without, it is said that a file's own is left out.
        key: of the config, for errors.

    Raises:
        ConfigError: no class, one that is named twice, or a word that is a file.
        DataError: a class file that cannot be read, or what `check_word` refuses.
    """
    if is_file(given):
        return ClassEmbeddings.load(given, key)
    if isinstance(given, str) and _is_file(given):
        found = read_classes(given, key)
        if found.has_background and (background is None or background is False):
            say(
                f"{key}={given}: its {BACKGROUND} is left out, for it is no word; "
                "background=true, where the classes are used, labels what no class fits"
            )
        return {spec.name: spec.synonyms for spec in found.prompted}
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given, resolve=True)
    elif isinstance(given, str) and given.lstrip().startswith(("{", "[")):
        given = parse_words(given, key)
    typed = typed_classes(given, key)
    for name, words in typed.items():
        if words == (name,) and Path(name).suffix and os.path.isfile(name):  # noqa: PTH113
            raise ConfigError(
                f"{key}: {name!r:.200} is a file; a list is a .txt or .json file, alone and "
                "without brackets"
            )
    return typed


def _is_file(given: str) -> bool:
    shipped = all(part in shipped_lists() for part in given.split("+"))
    return shipped or Path(given).suffix.lower() in (".txt", ".json")


def listed(given: Any) -> list[Any]:
    """A config list as a plain one; a single text is one entry."""
    if isinstance(given, ListConfig):
        return list(OmegaConf.to_container(given))  # type: ignore[arg-type]
    return [given] if isinstance(given, str) else list(given or [])


def named_classes(config: DictConfig, brought: bool = False) -> NamedClasses:
    """The words of `classes` and the exemplars of the folder `exemplars`, by class.

    Errors as `class_words` and `exemplars.read_folder`; one of the two may be null.

    Args:
        config: of a command with these keys.
        brought: whether exemplars may come later, so that their weight is of use in any case.

    Raises:
        ConfigError: exemplars beside class embeddings.
    """
    words = {} if config.classes is None else class_words(config.classes, config.get("background"))
    idle = f"exemplar_weight={config.exemplar_weight}: no class has both words and exemplars"
    if config.exemplars is None:
        if config.exemplar_weight != WEIGHT and not brought:
            say(f"{idle}, so it does nothing")
        return words
    if isinstance(words, ClassEmbeddings):
        raise ConfigError(
            f"exemplars={config.exemplars}: the classes of {words.origin} are embedded already; "
            "give the exemplars to talk2dino.embed, or classes as words"
        )
    typed = {composed(name): name for name in words}
    folder = read_folder(config.exemplars, config.exemplar_weight)
    shown = {typed.get(name, name): exemplars for name, exemplars in folder.items()}
    if config.exemplar_weight != WEIGHT and not brought and not words.keys() & shown.keys():
        say(f"{idle}, so it does nothing")
    return {name: (*words.get(name, ()), *shown.get(name, ())) for name in {**words, **shown}}


def check_words(config: DictConfig, classes: NamedClasses) -> None:
    """Refuse, before the model is loaded, what it would refuse of a command with these keys.

    Args:
        config: with `templates`, maybe `negatives` and `background`.
        classes: of `class_words` or `named_classes`.

    Raises:
        UserError: a wrong background, one that is also a class, a negative that is no word or one
            of a class, unknown templates, or negatives or templates beside class embeddings.
    """
    threshold = background_threshold(config.get("background"))
    negatives, templates = listed(config.get("negatives")), config.templates
    if not isinstance(classes, ClassEmbeddings):
        read_words(classes, negatives, templates="plain" if templates is None else templates)
    else:
        classes.refuse_words(templates, negatives)
    if threshold is not None:
        refuse_background(list(classes))


def require_classes(config: DictConfig, *keys: str) -> None:
    """`require`, with `classes` or `exemplars` in place of both."""
    require(config, *keys, *(["classes"] if config.exemplars is None else []))


def embed_exemplars(
    model: Talk2DINO, classes: ClassWords | ClassEmbeddings, short_side: int
) -> None:
    """Look at the exemplars of all classes with a progress bar; the model keeps their rows."""
    shown = {} if isinstance(classes, ClassEmbeddings) else exemplars_of(classes)
    with progress("exemplars", visible=bool(shown)) as advance:
        model.shown_rows(list(shown.values()), short_side, advance)


def build_refinement(config: DictConfig) -> Any:
    """Build what `refinement` names, None if nothing; of `auto`, what it is for such scores.

    The config then names that one, so that results tell it.

    Raises:
        UserError: a setting out of its range, or a calibration that cannot be read.
    """
    given = config.refinement
    if given and "calibrated" in given:
        found = find_calibration(config.calibration, config.checkpoint)
        config.refinement = given.uncalibrated if found is None else given.calibrated
    return build(config.refinement) if config.refinement else None


def open_vocabulary(
    config: DictConfig,
    classes: ClassWords | ClassEmbeddings,
    short_side: int,
) -> OpenVocabulary:
    """Load the model of a command and embed its classes and negatives, once for all pictures."""
    model = load_model(config, classes=classes)
    refinement = build_refinement(config) if "refinement" in config else AUTO
    embed_exemplars(model, classes, short_side)
    return model.open_vocabulary(
        classes,
        config.background,
        config.pamr,
        short_side,
        config.templates,
        negatives=listed(config.negatives),
        refinement=refinement,
    )


def shares_table(shares: Mapping[str, float], pictures: Mapping[str, int] | None = None) -> Table:
    """Classes for the terminal, the most frequent first: color, name, share in percent.

    Args:
        shares: of each class, 0..1, in the order of the labels, which gives the colors.
        pictures: those with some of each class; the shares are means then. None for one picture.
    """
    figure = Column("share" if pictures is None else "mean share", justify="right")
    table = Table("", Column("class", overflow="fold"), figure)
    if pictures is not None:
        table.add_column("pictures", justify="right")
    colors = dict(zip(shares, legend_colors(list(shares)), strict=True))
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        red, green, blue = colors[name]
        swatch = Text("██", style=f"rgb({red},{green},{blue})")
        seen = [] if pictures is None else [str(pictures[name])]
        table.add_row(swatch, Text(name), f"{100 * share:.1f} %", *seen)
    return table
