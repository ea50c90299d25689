"""`python -m talk2dino.export`: a checkpoint and class names into ONNX files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from talk2dino.config import command
from talk2dino.config.model_and_classes import check_words, class_words, load_model, require
from talk2dino.datasets.benchmarks.classes import BACKGROUND
from talk2dino.errors import ConfigError, require_extra
from talk2dino.files import refuse_foreign, user_path
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.onnx_export import (
    check_export_size,
    export_dense,
    export_projection,
    sorted_rows,
)
from talk2dino.inference.onnx_files import ExportedFile, is_our_file
from talk2dino.inference.onnx_text import check_text, export_text


def require_all(config: DictConfig) -> None:
    """Say what is missing, before anything is loaded.

    Raises:
        ConfigError: no checkpoint, no classes for a single dense file or for 8 bits, or a package
            is absent.
    """
    require(config, "checkpoint")
    if Path(config.output).suffix == ".onnx" and (config.classes is None or config.text_tower):
        raise ConfigError(
            f"output={config.output}: a single file is the dense path, which needs "
            "classes='[cat,sofa]'; for the projection or the text tower name a folder"
        )
    if config.int8 and config.classes is None and not config.text_tower:
        raise ConfigError(
            "int8=true: there is no segmenter to write in 8 bits; add classes='[cat,sofa]' or "
            "text_tower=true"
        )
    require_extra("export", "export")


def export(config: DictConfig) -> None:
    """Write what is asked for, each file compared with PyTorch.

    `projection.onnx`, `segmenter.onnx` if classes are given, and with `text_tower` `text.onnx`,
    `tokenizer.json` and `open_vocabulary.onnx`, a segmenter that takes class embeddings.
    """
    output = user_path(config.output)
    single = output.suffix == ".onnx"
    classes = class_words(config.classes) if config.classes is not None else None
    if classes is not None:
        check_words(config, classes)
    command.require_output_folder(output.parent if single else output, "output")
    check_output(config, output, single)
    model = load_model(config, "cpu", classes)
    psi = model.projection
    if config.text_tower:
        check_text(model.text, psi)
    if config.text_tower or classes is not None:
        check_export_size(model.vision, config.image_size)
    facts = _facts(model, config.templates)
    dense = partial(
        export_dense,
        vision=model.vision,
        projection=psi,
        size=config.image_size,
        full_size=config.upsample,
        tolerance=config.tolerance,
        int8_tolerance=config.int8_tolerance if config.int8 else None,
    )
    if classes is not None:  # builds the text encoder: its errors come before the first file
        vocabulary = model.open_vocabulary(classes, templates=config.templates)
    if not single:
        path = output / "projection.onnx"
        _say(export_projection(path, psi, facts, config.tolerance, model.calibration))
    if classes is not None:
        words = vocabulary.words
        rows, row_classes = sorted_rows(vocabulary.rows, words.row_classes)
        names = [BACKGROUND, *words.names] if words.has_negatives else list(words.names)
        path = output if single else output / "segmenter.onnx"
        named = {**facts, "class_names": names}
        _say(*dense(path, rows=rows, row_classes=row_classes, metadata=named))
    if config.text_tower:
        _say(export_text(output, model.text, facts["templates"], facts, config.tolerance))
        rows = model.open_vocabulary(["cat", "sofa", "grass"]).rows  # an example
        path, numbers = output / "open_vocabulary.onnx", torch.arange(len(rows))
        _say(*dense(path, rows=rows, row_classes=numbers, metadata=facts, open_vocabulary=True))


def check_output(config: DictConfig, output: Path, single: bool) -> None:
    """Refuse to overwrite what this command did not write (ConfigError)."""
    segmenters = ["segmenter"] * (config.classes is not None)
    segmenters += ["open_vocabulary"] * config.text_tower
    names = [*segmenters, *(f"{name}-int8" for name in segmenters if config.int8), "projection"]
    files = [output / f"{name}.onnx" for name in names]
    if single:
        files = [output, *[output.with_name(f"{output.stem}-int8.onnx")] * config.int8]
    files += [output / "text.onnx"] * config.text_tower
    files += [output / "tokenizer.json"] * config.text_tower

    def ours(file: Path) -> bool:  # a tokenizer goes with our text.onnx
        return is_our_file(file if file.suffix == ".onnx" else output / "text.onnx")

    refuse_foreign(files, ours, "talk2dino.export", config.overwrite)


def _facts(model: Talk2DINO, templates: str | None) -> dict[str, str]:
    """What a file says of the model it came from."""
    text = model.text_spec or {}  # nothing, if the checkpoint names no text encoder
    return {
        "vision": model.vision.name,
        "text": str(text.get("name", "")),
        "templates": templates or str(text.get("templates", "")),
        "checkpoint": model.source.name if model.source else "",
        **({"calibration": model.calibration.digest} if model.calibration else {}),
    }


def _say(*written: ExportedFile) -> None:
    for done in written:
        size = done.path.stat().st_size / 1e6
        print(f"{done.path}: {size:.1f} MB, deviates from PyTorch by {done.deviation:.1e} at most")


if __name__ == "__main__":
    command.run("export", export, require_all)
