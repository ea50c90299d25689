"""The model card: what a Hub page says about a projection, from files and measured numbers only.

This file collects the values; `templates/model_card.md.j2` is the text around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

import talk2dino
from talk2dino.alignment.checkpoint import describe_projection, is_projection
from talk2dino.alignment.projection import Projection
from talk2dino.encoders.hub import WEIGHTS
from talk2dino.errors import ConfigError, DataError
from talk2dino.evaluation.runs import RESULTS, read_config
from talk2dino.evaluation.settings import settled
from talk2dino.evaluation.tables import markdown_table, percent
from talk2dino.files import read_json, user_path, write_json, write_text

LIBRARY = "talk2dino"
LICENSE = "other"  # the owner of the weights decides; the card says so
# what of a run's config says how it was trained, and nothing of the machine it was trained on
_SETTINGS = {
    "similarity": "similarity._target_",
    "temperature": "similarity.temperature",
    "loss": "loss._target_",
    "optimizer": "optimizer._target_",
    "learning rate": "optimizer.lr",
    "batch size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "seed": "seed",
}
_METRICS = {"miou": "mean_iou", "pixel_accuracy": "accuracy"}  # the Hub's names


def write_card(
    folder: Path,
    projection: Projection,
    encoders: Mapping[str, Mapping[str, Any]],
    source: Path | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    calibration: Mapping[str, Any] = {},
) -> None:
    """Write `config.json` and `README.md` into `folder`.

    Args:
        folder: exists.
        projection: what is described.
        encoders: specs of `vision` and `text`.
        source: the checkpoint it came from; `metrics.json` and `config.yaml` of that folder go
            into the card.
        results: of `read_results`.
        calibration: what `Calibration.describe` says, or nothing.
    """
    spec = describe_projection(projection)
    content = {"library_name": LIBRARY, "talk2dino_version": talk2dino.__version__}
    write_json(folder / "config.json", {**content, "projection": spec, **encoders})
    run = _run_folder(source)
    name = f"Talk2DINO projection for {encoders['vision'].get('name') or 'a vision encoder'}"
    text = _template().render(
        name=name,
        head=_head(name, results),
        parts=_rows(_parts(spec, encoders, calibration)),
        settings=_rows(_settings(run)),
        results=[_figures(result) for result in results],
        validation=_rows(_last_validation(run)),
    )
    write_text(folder / "README.md", text)


def refuse_foreign_card(folder: Path) -> None:
    """Refuse to replace weights, `README.md` or `config.json` of other origin (ConfigError)."""
    readers: dict[str, Callable[[Path], Any]] = {
        "README.md": lambda path: ModelCard.load(path).data.library_name,
        WEIGHTS: lambda path: LIBRARY if is_projection(path) else None,
        "config.json": lambda path: read_json(path, dict, "a model's config").get("library_name"),
    }
    for name, read in readers.items():
        try:
            ours = not (folder / name).exists() or read(folder / name) == LIBRARY
        except Exception:  # somebody's, of whatever kind
            ours = False
        if not ours:
            raise ConfigError(
                f"{folder / name}: is there and was not written by talk2dino; use another folder"
            )


def _template() -> Template:
    templates = Environment(
        loader=PackageLoader("talk2dino.inference"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["table"] = markdown_table  # it escapes what Markdown needs escaped
    return templates.get_template("model_card.md.j2")


def _parts(
    projection: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    vision, text = encoders["vision"], encoders["text"]
    return {
        "vision encoder": vision.get("name"),
        "vision weights": vision.get("weights"),
        "patch tokens of blocks": vision.get("layers"),
        "text encoder": text.get("name"),
        "text weights": text.get("weights"),
        "prompt templates": text.get("templates"),
        **{f"projection: {key}": value for key, value in projection.items()},
        **{f"calibration: {key}": value for key, value in calibration.items()},
    }


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values without the empty ones; of this package's classes the name alone."""
    texts = {key: str(value) for key, value in values.items() if value not in (None, "")}
    return [(k, v.rpartition(".")[2] if "talk2dino." in v else v) for k, v in texts.items()]


def _head(name: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The YAML that the Hub reads."""
    found = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=str(result["benchmark"]),
            dataset_name=str(result["benchmark"]),
            metric_type=metric,
            metric_value=round(float(result[key]), 2),
        )
        for result in results
        for key, metric in _METRICS.items()
        if result.get(key) is not None
    ]
    data = ModelCardData(
        license=LICENSE,
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        tags=["open-vocabulary-segmentation", "talk2dino", "dinov2", "vision-language"],
        model_name=name if found else None,
        eval_results=found or None,
    )
    return str(data.to_yaml()).strip()


def _figures(result: Mapping[str, Any]) -> list[str]:
    """A row of the table of measurements."""
    config = result.get("config")
    refined = isinstance(config, Mapping) and config.get("pamr")
    figures = [percent(result.get(key)) for key in _METRICS]
    images = str(result.get("images", ""))
    return [str(result["benchmark"]), *figures, images, "yes" if refined else "no"]


def _last_validation(run: Path | None) -> dict[str, str]:
    """Retrieval figures of the last validation of a run, percent."""
    if run is None or not (run / "metrics.json").is_file():
        return {}
    metrics = read_json(run / "metrics.json", dict, "what talk2dino.train measured")
    passes = [one for one in metrics.get("validation") or [] if isinstance(one, dict)]
    return {
        f"validation {key.removeprefix('val/').replace('/', ' ').replace('_', ' ')}": percent(value)
        for key, value in (passes[-1] if passes else {}).items()
        if "recall" in key and isinstance(value, float)
    }


def _settings(run: Path | None) -> dict[str, Any]:
    config = settled(read_config(run / "config.yaml")) if run else {}
    return {label: config.get(key) for label, key in _SETTINGS.items()}


def _run_folder(source: Path | None) -> Path | None:
    """The folder of a checkpoint; Lightning's lie one folder deeper."""
    if source is None:
        return None
    return source.parent.parent if source.parent.name == "checkpoints" else source.parent


def read_results(
    source: Path | None, given: str | Path | Mapping[str, Any] | Sequence[Any]
) -> list[Mapping[str, Any]]:
    """Measured numbers: those that lie beside a checkpoint, and those that are given.

    Raises:
        DataError: a results file that is none.
    """
    run = _run_folder(source)
    beside = [run / RESULTS] if run and (run / RESULTS).is_file() else []
    more = [given] if isinstance(given, (str, Path, Mapping)) else given
    return [_read_result(item) for item in [*beside, *more]]


def _read_result(item: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    where, result = "results", item
    if not isinstance(result, Mapping):
        where = f"results={item}"
        result = read_json(user_path(result), dict, "results of talk2dino.evaluate")
    if not {"benchmark", "miou"} <= result.keys():
        raise DataError(f"{where}: no results of an evaluation, which name benchmark and miou")
    figures = result["miou"], result.get("pixel_accuracy") or 0.0
    if not all(isinstance(figure, (int, float)) for figure in figures):
        raise DataError(f"{where}: miou and pixel_accuracy are {figures}; give numbers in percent")
    return result
