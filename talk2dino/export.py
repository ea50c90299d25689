"""`python -m talk2dino.export`: a checkpoint and class names into ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.command import class_words, load_model, require
from talk2dino.datasets.benchmarks.classes import BACKGROUND
from talk2dino.errors import ConfigError
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.onnx_export import (
    ExportedFile,
    export_dense,
    export_projection,
    require_packages,
    sorted_rows,
)


def require_all(config: DictConfig) -> None:
    """Say what is missing, before anything is loaded.

    Raises:
        ConfigError: no checkpoint, or no classes for a single dense file.
        EncoderError: packages of the extra `export` are absent.
    """
    require(config, "checkpoint")
    if Path(config.output).suffix == ".onnx" and config.classes is None:
        raise ConfigError(
            f"output={config.output}: a single file is the dense path, which needs "
            "classes='[cat,sofa]'; for the projection alone name a folder"
        )
    require_packages()


def export(config: DictConfig) -> None:
    """Write `projection.onnx`, and `segmenter.onnx` if classes are given, and compare them."""
    output = Path(config.output).expanduser()
    single = output.suffix == ".onnx"
    classes = class_words(config.classes) if config.classes is not None else None
    command.require_output_folder(output.parent if single else output, "output")
    model = load_model(config, "cpu", classes)
    facts = _facts(model)
    if not single:
        path = output / "projection.onnx"
        _say(export_projection(path, model.projection, facts, config.tolerance))
    if classes is not None:
        vocabulary = model.open_vocabulary(classes, templates=config.templates)
        words = vocabulary.words
        rows, row_classes = sorted_rows(vocabulary.rows, words.row_classes)
        background = [BACKGROUND] if words.has_negatives else []
        done = export_dense(
            output if single else output / "segmenter.onnx",
            model.vision,
            model.projection,
            rows,
            row_classes,
            {**facts, "class_names": background + list(words.names)},
            size=config.image_size,
            full_size=config.upsample,
            tolerance=config.tolerance,
        )
        _say(done)


def _facts(model: Talk2DINO) -> dict[str, Any]:
    """What a file says of the model it came from."""
    text = model.text_spec or {}  # nothing, if the checkpoint names no text encoder
    return {
        "vision": model.vision.name,
        "text": str(text.get("name", "")),
        "templates": str(text.get("templates", "")),
        "checkpoint": model.source.name if model.source else "",
    }


def _say(done: ExportedFile) -> None:
    size = done.path.stat().st_size / 1e6
    print(f"{done.path}: {size:.1f} MB, deviates from PyTorch by {done.deviation:.1e} at most")


if __name__ == "__main__":
    command.run("export", export, require_all)
