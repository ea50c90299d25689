"""`python -m talk2dino.evaluate`: a projection on a benchmark."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import nn

from talk2dino.alignment.checkpoint import describe_projection
from talk2dino.alignment.class_embeddings import embed_classes
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.config import command
from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.encoders.hub import cache_dir
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.text.base import CachedTextEncoder
from talk2dino.encoders.weights import state_dict_digest
from talk2dino.errors import ConfigError, DataError
from talk2dino.evaluation.datamodule import SegmentationDataModule
from talk2dino.evaluation.module import Keep, SegmentationModule
from talk2dino.evaluation.progress import EvaluationProgress
from talk2dino.evaluation.records import Records
from talk2dino.files import write_json
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.html_report import ENVIRONMENT, write_report
from talk2dino.segmentation.report import table


def evaluate(config: DictConfig) -> None:
    """Score the checkpoint on the benchmark; print a table, write `results.json` and a report."""
    command.refuse_ddp_in_sweep(config)
    check_counts(config)
    check_precision(str(config.trainer.get("precision", "32-true")))
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    benchmark: Benchmark = command.build(config.benchmark)
    check_files(benchmark)
    model = load_model(config)
    plain = OmegaConf.to_container(config, resolve=True)
    columns: dict[str, Any] = {}
    if config.compare_untrained:
        untrained = fresh_projection(model.projection, model.text)
        file = folder / "results_untrained.json"
        baseline = predict(config, model, untrained, benchmark, folder / "untrained", file)
        if baseline:
            write_json(file, baseline | {"config": plain})
            columns["untrained"] = baseline
    file = folder / "results.json"
    results = predict(config, model, model.projection, benchmark, folder, file)
    if not results:
        return  # another rank reports
    write_json(file, results | {"config": plain})
    columns["trained" if columns else "IoU"] = results
    Console().print(table(columns, benchmark.reference))
    print(f"results: {file}")
    write_json(folder / ENVIRONMENT, describe_environment(config.trainer))
    print(f"report: {write_report(folder)}")
    for kind, wished in (("pictures", config.pictures), ("label_maps", config.label_maps)):
        if wished:
            print(f"{kind.replace('_', ' ')}: {folder / kind}")


def check_files(benchmark: Benchmark) -> None:
    """Refuse bad files before the model is loaded; thousands of headers take a few seconds.

    Raises:
        DataError: the first bad one.
    """
    console = Console(stderr=True)
    hidden = not console.is_terminal or getattr(rank_zero_only, "rank", 0) > 0
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("checking files", total=None)
        benchmark.check(lambda done, total: bar.update(task, completed=done, total=total))


def check_counts(config: DictConfig) -> None:
    """Refuse numbers that nothing could be done with.

    Raises:
        ConfigError: the first of them.
    """
    least = {
        "batch_size": 1,
        "window_batch_size": 1,
        "num_workers": 0,
        "pictures": 0,
        "examples": 0,
    }
    for key, value in least.items():
        if config[key] < value:
            raise ConfigError(f"{key}={config[key]}: use {value} or more")


def check_precision(precision: str) -> None:
    """Refuse a precision that would reach beyond the encoder.

    Raises:
        ConfigError: `bf16-true` and its like, which convert the class embeddings as well.
    """
    if precision.endswith("-true") and not precision.startswith(("32", "64")):
        mixed = precision.replace("-true", "-mixed")
        raise ConfigError(
            f"trainer.precision={precision}: would round the class scores too; use {mixed}, which "
            "runs the encoder alone in lower precision"
        )


def load_model(config: DictConfig) -> Talk2DINO:
    """Load the checkpoint with its own encoders, or those that the config chooses."""
    return Talk2DINO.from_pretrained(
        config.checkpoint,
        device="cpu",  # the trainer moves it
        vision=command.build(config.vision) if config.vision else None,
        text=command.build(config.text) if config.text else None,
    )


def fresh_projection(trained: Projection, text: TextEncoder) -> Projection:
    """A projection of the same kind as training starts from: new random weights for ψ."""
    arguments = describe_projection(trained)
    if isinstance(trained, CLIPLastLayer):
        kept = {key: arguments[key] for key in ("hidden_layers", "activation")}
        return CLIPLastLayer.from_text_encoder(text, trained.vision_dim, **kept)
    del arguments["_target_"]
    return type(trained)(**arguments)


def predict(
    config: DictConfig,
    model: Talk2DINO,
    projection: Projection,
    benchmark: Benchmark,
    folder: Path,
    file: Path,
) -> dict[str, Any]:
    """Run the predict loop and write the results; empty on all ranks but the first.

    Raises:
        DataError: an image or label map is bad; what was finished before it is kept in `folder`.
    """
    text, row_classes = embed_classes(
        [spec.synonyms for spec in benchmark.class_list.prompted],
        cached_text(model.text, projection),
        projection,
        benchmark.templates,
    )
    module = SegmentationModule(
        build_segmenter(config, model.vision, projection, benchmark),
        benchmark,
        text,
        row_classes,
        folder,
        Keep(
            describe_run(config, model, projection, benchmark),
            config.resume,
            config.pictures,
            config.label_maps,
            config.examples,
        ),
        batch_size=config.batch_size,
        results_file=file,
    )
    extra = {"callbacks": [EvaluationProgress()]} if config.trainer.enable_progress_bar else {}
    trainer: L.Trainer = command.build(
        config.trainer, default_root_dir=str(folder), logger=False, **extra
    )
    data = SegmentationDataModule(
        benchmark, config.num_workers, config.batch_size, finished=module.finished
    )
    try:
        trainer.predict(module, data, return_predictions=False)
    except Exception as error:
        message = command.user_message(error)
        if message is None or isinstance(error, ConfigError):
            raise
        raise DataError(f"{message} ({how_to_go_on(folder)})") from error
    if not trainer.is_global_zero:
        return {}
    results: dict[str, Any] = json.loads(file.read_text())  # the ranks may be other processes
    return results


def cached_text(text: TextEncoder, projection: Projection) -> TextEncoder:
    """Look embeddings up on disk where ψ takes nothing else: a benchmark's prompts never change."""
    cached = projection.text_fields == ("embedding",)
    return CachedTextEncoder(text, cache_dir() / "text") if cached else text


def build_segmenter(
    config: DictConfig, vision: nn.Module, projection: Projection, benchmark: Benchmark
) -> Segmenter:
    """The segmenter of a benchmark's protocol."""
    return Segmenter(
        vision,
        window=benchmark.window,
        stride=benchmark.stride,
        short_side=benchmark.short_side,
        long_side=benchmark.long_side,
        input_size=benchmark.input_size,
        background_cleaning=benchmark.background_cleaning,
        background_threshold=benchmark.threshold(getattr(vision, "embed_dim", None)),
        pamr=PAMR() if config.pamr else None,
        window_batch_size=config.window_batch_size,
        project_patches=visual_side(projection),
        knn=command.build(config.refinement) if config.refinement else None,
        pamr_whole_image=config.pamr_whole_image,
    )


def describe_run(
    config: DictConfig, model: Talk2DINO, projection: Projection, benchmark: Benchmark
) -> dict[str, Any]:
    """Everything that decides the figures: a run goes on with the records of its like only."""
    node = config.get("benchmark")
    protocol: Any = _plain(node) or {}
    return {
        "classes": [asdict(spec) for spec in benchmark.class_list.classes],
        "unlabelled": list(benchmark.class_list.unlabeled),
        **{f"benchmark.{k}": v for k, v in protocol.items() if k not in ("reference", "limit")},
        "pamr": config.pamr,
        "pamr_whole_image": config.pamr_whole_image,
        "refinement": _plain(config.refinement),
        "trainer.precision": str(config.trainer.get("precision", "32-true")),
        "projection": state_dict_digest(projection),
        "vision": state_dict_digest(model.vision),
        "text": model.text.describe()["weights_sha256"],
        **_specs(model),
    }


def _specs(model: Talk2DINO) -> dict[str, Any]:
    """How the encoders are built, without what changes no figure or stands in a digest."""
    specs = {
        "vision": getattr(model.vision, "spec", None),
        "text": model.text.describe().get("spec"),
    }
    return {
        f"{side}.{key}": value
        for side, spec in specs.items()
        for key, value in (spec or {}).items()
        if key not in ("weights", "batch_size", "image_size")
    }


def _plain(node: DictConfig | None) -> Any:
    return None if node is None else OmegaConf.to_container(node, resolve=True)


def describe_environment(trainer: DictConfig) -> dict[str, str]:
    """Versions and device, for the report."""
    packages = ("talk2dino", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy")
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in (*packages, "pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    on_gpu = torch.cuda.is_available() and trainer.get("accelerator") != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    return found | {"device": device, "precision": str(trainer.get("precision", "32-true"))}


def how_to_go_on(folder: Path) -> str:
    """What to do after an image could not be read."""
    done = len(Records(folder / "records").read())
    run = folder.parent if folder.name == "untrained" else folder
    where = f"run.dir={run}"
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        where = f"sweep.dir={HydraConfig.get().sweep.dir}"
    return (
        f"{done} images are finished and kept: mend the file and run the same command with "
        f"hydra.{where}, and with resume=false if its settings change"
    )


if __name__ == "__main__":
    command.run("evaluate", evaluate)
