"""`python -m talk2dino.calibrate`: scores that compare between words, from unlabeled pictures."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from talk2dino.calibration.calibration import Calibration, beside, check_writable
from talk2dino.calibration.reference import (
    FIELD,
    Advance,
    Drawn,
    check_draw,
    draw_from_pictures,
    draw_from_store,
)
from talk2dino.calibration.rules import describe_rule
from talk2dino.calibration.threshold import common_words
from talk2dino.config import command
from talk2dino.config.command import load_model, require
from talk2dino.errors import ConfigError
from talk2dino.features.store.reader import FeatureStore
from talk2dino.inference.model import Talk2DINO


def require_all(config: DictConfig) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        ConfigError: no checkpoint, or not exactly one of `store` and `images`.
    """
    neither = config.store is None and config.images is None
    if config.checkpoint is None:
        require(config, "checkpoint", *(["store"] if neither else []))
    if (config.store is None) == (config.images is None):
        raise ConfigError(
            "give one of store=DIR, a feature store with patch tokens, and images=DIR, a folder of "
            "pictures"
        )


def calibrate(config: DictConfig) -> None:
    """Draw the reference, choose the background's score, and write the file."""
    output = check_writable(config.output or _beside(config.checkpoint))
    rule = command.build(config.rule)
    describe_rule(rule)  # refuses what a file could not name
    check_draw(config.tokens, config.seed)
    store = None if config.store is None else FeatureStore(config.store)
    if store is not None:
        store.require(images=[FIELD])
    command.require_output_folder(output.parent, "output")
    model = load_model(config)
    with command.progress("patches of pictures") as advance:
        drawn = _draw(config, model, store, advance)
    words = model.embed_classes(common_words(), config.templates)
    facts = {"source": str(config.store or config.images), "pictures": drawn.pictures}
    facts |= {"seed": config.seed, "templates": words.templates}
    made = Calibration.of(
        drawn.tokens, words.rows, rule, model.vision, model.projection, facts
    ).with_background(model.projection)
    path = made.save(output)
    print(
        f"{path}: {len(made.tokens)} patches of {drawn.pictures} pictures, "
        f"background={made.describe()['background']}"
    )


def _beside(checkpoint: str) -> Path:
    """Where the file is found again."""
    path = beside(checkpoint)
    if path is None:
        raise ConfigError(
            f"checkpoint={checkpoint}: is no local file, so nothing is put beside it; give "
            "output=FILE.safetensors"
        )
    return path


def _draw(
    config: DictConfig, model: Talk2DINO, store: FeatureStore | None, advance: Advance
) -> Drawn:
    if store is not None:
        return draw_from_store(store, model.vision, config.tokens, config.seed, advance)
    segmenter = model.segmenter(None, False, config.short_side)
    return draw_from_pictures(Path(config.images), segmenter, config.tokens, config.seed, advance)


if __name__ == "__main__":
    command.run("calibrate", calibrate, require_all)
