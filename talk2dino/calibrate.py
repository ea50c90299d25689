"""`python -m talk2dino.calibrate`: scores that compare between words, with few labels or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from talk2dino.calibration.background_threshold import common_words
from talk2dino.calibration.calibration import Calibration, beside, check_writable
from talk2dino.calibration.labeled import cross_fit, label_patches
from talk2dino.calibration.mentions import closeness, unmentioned, why_unknown
from talk2dino.calibration.reference import (
    FIELD,
    Drawn,
    draw_from_pictures,
    draw_from_store,
)
from talk2dino.calibration.rules import describe_rule
from talk2dino.config import command
from talk2dino.config.model_and_classes import load_model, require
from talk2dino.datasets.benchmarks.classes import BACKGROUND
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.encoders.text.prompts import prompts
from talk2dino.errors import Advance, ConfigError
from talk2dino.features.store.reader import FeatureStore
from talk2dino.files import user_path
from talk2dino.inference.model import Talk2DINO


def require_all(config: DictConfig) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        ConfigError: no checkpoint, not exactly one of `store` and `images`, or labels without
            their pictures or classes.
    """
    neither = config.store is None and config.images is None
    if config.checkpoint is None:
        require(config, "checkpoint", *(["store"] if neither else []))
    if config.masks is not None or config.classes is not None:
        for key in ("images", "masks", "classes"):
            if config[key] is None:
                raise ConfigError(
                    f"{key}=… not given: labels are images=DIR, masks=DIR with a label map of each "
                    "picture, and classes=FILE, which names the label values"
                )
    elif (config.store is None) == (config.images is None):
        raise ConfigError(
            "give one of store=DIR, a feature store with patch tokens, and images=DIR, a folder of "
            "pictures"
        )


def calibrate(config: DictConfig) -> None:
    """Draw the reference, choose the background's score, and write the file."""
    output = check_writable(config.output or _beside(config.checkpoint))
    rule = command.build(config.rule)
    describe_rule(rule)  # refuses what a file could not name
    if config.templates is not None:
        prompts([], config.templates)  # refuses unknown ones
    store = None if config.store is None else FeatureStore(config.store)
    if store is not None:
        store.require(images=[FIELD])
    labeled = _labeled_pictures(config)
    command.require_output_folder(output.parent, "output")
    model = load_model(config)
    with command.progress("patches of pictures") as advance:
        drawn = _draw(config, model, store, advance)
    words = model.embed_classes(common_words(), config.templates)
    facts = {"source": str(config.store or config.images), "pictures": drawn.pictures}
    facts |= {"seed": config.seed, "templates": words.templates}
    said = _unmentioned(config, model, store, drawn) if rule.reads_captions else None
    made = Calibration.of(
        drawn.tokens, words.rows, rule, model.vision, model.projection, facts, said
    ).with_background(model.projection)
    if labeled is not None:
        made = _with_labels(made, labeled, model, config)
    path = made.save(output)
    print(
        f"{path}: {len(made.tokens)} patches of {drawn.pictures} pictures, "
        f"background={made.describe()['background']}"
    )


def _unmentioned(
    config: DictConfig, model: Talk2DINO, store: FeatureStore | None, drawn: Drawn
) -> torch.Tensor | None:
    """Tokens of pictures that do not speak of a word, `[V, R]` bool, or None; says why."""
    if store is None or drawn.store_rows is None:
        why = f"images={config.images}: no captions"
    elif reason := why_unknown(store, model.text):
        why = f"store={config.store}: {reason}"
    else:
        close = closeness(store, drawn.store_rows, common_words(), model.text, config.templates)
        return unmentioned(close, drawn.picture)
    print(f"{why}, so what a word scores on all pictures is subtracted, as by rule=mean")
    return None


def _labeled_pictures(config: DictConfig) -> FolderBenchmark | None:
    """The pictures with label maps, all sizes compared, or None."""
    if config.masks is None:
        return None
    classes = config.classes
    if not isinstance(classes, str):
        classes = OmegaConf.to_container(classes)
    labeled = FolderBenchmark(
        name="labeled", images=config.images, masks=config.masks, classes=classes
    )
    with command.progress("label maps") as advance:
        labeled.check(advance)
    return labeled


def _with_labels(
    made: Calibration, labeled: FolderBenchmark, model: Talk2DINO, config: DictConfig
) -> Calibration:
    """The same with offsets of the labeled classes, if they are worth anything; says what."""
    classes = labeled.class_list
    named = {spec.name: spec.synonyms for spec in classes.prompted}
    words = model.embed_classes(named, config.templates)
    rows = made.score_rows(words.rows, [None] * len(words.rows), model.projection)
    assert made.background is not None
    with command.progress("labeled pictures") as advance:
        patches = label_patches(
            labeled,
            model.segmenter(None, False, config.short_side, refinement=None),
            rows,
            torch.tensor(words.words.row_classes),
            made.background.threshold,
            advance,
        )
    fitted = cross_fit(patches, config.seed)
    crossed = (
        f"mean IoU of the labeled patches of {patches.pictures} pictures: "
        f"{100 * fitted.before:.1f} without their labels, {100 * fitted.crossed:.1f} with offsets "
        f"that were fitted on other pictures ({fitted.folds} folds)"
    )
    if fitted.crossed <= fitted.before:
        print(f"{crossed}; the offsets bring nothing and are left out")
        return made
    offsets = dict(zip(classes.names, fitted.offsets.tolist(), strict=True))
    shown = set(patches.labels.tolist())
    unseen = [spec.name for n, spec in enumerate(classes.classes) if n not in shown]
    if unseen:
        crossed += f"; {len(unseen)} classes in no picture have no offset: {', '.join(unseen)}"
    print(crossed)
    background = made.background
    if classes.has_background:
        background = background.shifted(offsets.pop(BACKGROUND))
    kept = {name: value for name, value in offsets.items() if name not in unseen}
    facts = {
        "labeled": patches.pictures,
        "mean_iou_without": fitted.before,
        "mean_iou_cross_fitted": fitted.crossed,
    }
    return replace(made, background=background, class_offsets=kept, facts={**made.facts, **facts})


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
    return draw_from_pictures(
        user_path(config.images), segmenter, config.tokens, config.seed, advance
    )


if __name__ == "__main__":
    command.run("calibrate", calibrate, require_all)
