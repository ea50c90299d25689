"""The model card: what a Hub page says about a projection, from files and measured numbers only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCardData

from talk2dino.alignment.checkpoint import describe_projection
from talk2dino.alignment.projection import Projection
from talk2dino.errors import DataError
from talk2dino.files import replacing, write_json

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


def write_card(
    folder: Path,
    projection: Projection,
    encoders: Mapping[str, Mapping[str, Any]],
    source: Path | None = None,
    results: Sequence[str | Path | Mapping[str, Any]] = (),
) -> None:
    """Write `config.json` and `README.md` into `folder`.

    Args:
        folder: exists.
        projection: what is described.
        encoders: specs of `vision` and `text`.
        source: the checkpoint it came from; `results.json`, `metrics.json` and `config.yaml` of
            that folder go into the card.
        results: more results, files or content.

    Raises:
        DataError: a results file that is none.
    """
    spec = describe_projection(projection)
    content = {"library_name": "talk2dino", "talk2dino_version": _version()}
    write_json(folder / "config.json", {**content, "projection": spec, **encoders})
    run = _run_folder(source)
    beside = [run / "results.json"] if run and (run / "results.json").is_file() else []
    measured = [_read_result(item) for item in [*beside, *results]]
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card(spec, encoders, measured, run), encoding="utf-8")


def card(
    projection: Mapping[str, Any],
    encoders: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]] = (),
    run: Path | None = None,
) -> str:
    """The text of a model card, with a YAML head that the Hub reads."""
    vision, text = (str(encoders[kind].get("name", "")) for kind in ("vision", "text"))
    name = f"Talk2DINO projection for {vision or 'a vision encoder'}"
    sections = [
        f"---\n{_head(name, results)}\n---",
        f"# {name}",
        "Maps text into the space of a frozen vision backbone's patch tokens, so that the cosine "
        "with every patch is an open-vocabulary segmentation "
        "([Talk2DINO](https://arxiv.org/abs/2411.19331), ICCV 2025).",
        "## Use",
        "```python\nfrom talk2dino import Talk2DINO\n\n"
        'model = Talk2DINO.from_pretrained("<this repository or its folder>")\n'
        'model.segment("photo.jpg", ["cat", "sofa"], pamr=True).overlay().save("out.png")\n```',
        "The encoders' weights are not in here: they are loaded by name.",
        "## Parts",
        _table(
            {
                "vision encoder": vision,
                "vision weights": encoders["vision"].get("weights"),
                "text encoder": text,
                "text weights": encoders["text"].get("weights"),
                "prompt templates": encoders["text"].get("templates"),
                **{f"projection: {key}": value for key, value in projection.items()},
            }
        ),
    ]
    if run is not None and (settings := _settings(run)):
        sections += ["## Training", _table(settings)]
    sections += ["## Measured", _measured(results, run)]
    sections += [
        "## Licence",
        "To be stated by the owner of these weights; those of the encoders have their own.",
    ]
    return "\n\n".join(sections) + "\n"


def _head(name: str, results: Sequence[Mapping[str, Any]]) -> str:
    found = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=str(result["benchmark"]),
            dataset_name=str(result["benchmark"]),
            metric_type=kind,
            metric_value=round(float(result[key]), 2),
        )
        for result in results
        for key, kind in (("miou", "mean_iou"), ("pixel_accuracy", "accuracy"))
        if key in result
    ]
    data = ModelCardData(
        license=LICENSE,
        library_name="talk2dino",
        pipeline_tag="image-segmentation",
        tags=["open-vocabulary-segmentation", "talk2dino", "dinov2", "vision-language"],
        model_name=name if found else None,
        eval_results=found or None,
    )
    return str(data.to_yaml()).strip()


def _measured(results: Sequence[Mapping[str, Any]], run: Path | None) -> str:
    lines = []
    if results:
        rows = [
            f"| {result['benchmark']} | {float(result['miou']):.1f} "
            f"| {_number(result.get('pixel_accuracy'))} | {result.get('images', '')} "
            f"| {'yes' if _pamr(result) else 'no'} |"
            for result in results
        ]
        names = "| benchmark | mIoU | pixel accuracy | images | PAMR |"
        head = f"{names}\n| --- | ---: | ---: | ---: | --- |"
        lines.append("\n".join([head, *rows]))
    validation = _last_validation(run)
    if validation:
        lines.append(_table(validation))
    return "\n\n".join(lines) or "No measurement was given when this card was written."


def _pamr(result: Mapping[str, Any]) -> bool:
    config = result.get("config")
    return bool(config.get("pamr")) if isinstance(config, Mapping) else False


def _last_validation(run: Path | None) -> dict[str, str]:
    """Retrieval figures of the last validation of a run, percent."""
    if run is None or not (run / "metrics.json").is_file():
        return {}
    metrics = _json(run / "metrics.json")
    passes = metrics.get("validation") or [{}] if isinstance(metrics, dict) else [{}]
    last = passes[-1] if isinstance(passes[-1], dict) else {}
    return {
        f"validation {key.removeprefix('val/').replace('/', ' ').replace('_', ' ')}": f"{value:.1f}"
        for key, value in last.items()
        if "recall" in key and isinstance(value, float)
    }


def _settings(run: Path) -> dict[str, Any]:
    if not (run / "config.yaml").is_file():
        return {}
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):  # the run's own record; the card can do without
        return {}
    found = {label: _select(config, key) for label, key in _SETTINGS.items()}
    return {label: value for label, value in found.items() if value is not None}


def _select(config: Any, key: str) -> Any:
    """The value under a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _run_folder(source: Path | None) -> Path | None:
    """The folder of a checkpoint; Lightning's lie one folder deeper."""
    if source is None:
        return None
    return source.parent.parent if source.parent.name == "checkpoints" else source.parent


def _read_result(item: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    result = item if isinstance(item, Mapping) else _json(Path(item))
    if not isinstance(result, Mapping) or not {"benchmark", "miou"} <= result.keys():
        where = "results" if isinstance(item, Mapping) else f"results={item}"
        raise DataError(f"{where}: no results of an evaluation, which name benchmark and miou")
    return result


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"results={path}: cannot be read ({error})") from error


def _table(rows: Mapping[str, Any]) -> str:
    body = [
        f"| {key} | {str(value).split('.')[-1] if 'talk2dino.' in str(value) else value} |"
        for key, value in rows.items()
        if value not in (None, "")
    ]
    return "\n".join(["| | |", "| --- | --- |", *body])


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, (int, float)) else "–"


def _version() -> str:
    try:
        return version("talk2dino")
    except PackageNotFoundError:  # a checkout that is not installed
        return "checkout"
