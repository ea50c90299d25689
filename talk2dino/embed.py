"""`python -m talk2dino.embed`: class names into a file of their embeddings."""

from __future__ import annotations

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.command import class_words, listed, load_model, require
from talk2dino.errors import ConfigError
from talk2dino.inference.class_embeddings import ClassEmbeddings, check_new


def embed(config: DictConfig) -> None:
    """Embed the classes and write the file, which `classes=` takes in place of words."""
    classes = class_words(config.classes)
    if isinstance(classes, ClassEmbeddings):
        raise ConfigError(f"classes={classes.origin}: holds embeddings already; give words")
    output = check_new(config.output)
    command.require_output_folder(output.parent, "output")
    made = load_model(config).embed_classes(
        classes, config.templates, negatives=listed(config.negatives)
    )
    path = made.save(output)
    count, width = made.rows.shape
    print(f"{path}: {len(made.words.names)} classes, {count} rows of width {width}")


if __name__ == "__main__":
    command.run("embed", embed, lambda config: require(config, "checkpoint", "classes"))
