"""`python -m talk2dino.embed`: classes, said or shown, into a file of their embeddings."""

from __future__ import annotations

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.model_and_classes import (
    check_words,
    embed_exemplars,
    listed,
    load_model,
    named_classes,
    require_classes,
)
from talk2dino.errors import ConfigError
from talk2dino.inference.class_embeddings import ClassEmbeddings, check_new


def embed(config: DictConfig) -> None:
    """Embed the classes and write the file, which `classes=` takes in place of words."""
    classes = named_classes(config)
    if isinstance(classes, ClassEmbeddings):
        raise ConfigError(f"classes={classes.origin}: holds embeddings already; give words")
    check_words(config, classes)
    output = check_new(config.output)
    command.require_output_folder(output.parent, "output")
    if config.exemplars is None:
        config.calibration = None  # words need none
    model = load_model(config)
    embed_exemplars(model, classes, config.short_side)
    made = model.embed_classes(
        classes, config.templates, negatives=listed(config.negatives), short_side=config.short_side
    )
    path = made.save(output)
    count, width = made.rows.shape
    print(f"{path}: {len(made.words.names)} classes, {count} rows of width {width}")


if __name__ == "__main__":
    command.run("embed", embed, lambda config: require_classes(config, "checkpoint"))
