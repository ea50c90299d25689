"""`python -m talk2dino.evaluate`: a projection on a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from talk2dino.alignment.checkpoint import describe_projection
from talk2dino.alignment.class_names import embed_class_names
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Projection, visual_side
from talk2dino.calibration.calibration import Calibration
from talk2dino.config import command
from talk2dino.config.model_and_classes import build_refinement, load_model
from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.encoders.text import TextEncoder
from talk2dino.encoders.text.base import CachedTextEncoder
from talk2dino.errors import ConfigError, DataError, say
from talk2dino.evaluation.datamodule import SegmentationDataModule
from talk2dino.evaluation.module import EvaluationProgress, OutputOptions, SegmentationModule
from talk2dino.evaluation.records import how_to_go_on
from talk2dino.evaluation.report import ENVIRONMENT, write_report
from talk2dino.evaluation.settings import (
    PRECISION,
    check_encoder_precision,
    describe_environment,
    describe_run,
)
from talk2dino.evaluation.tables import class_table, published
from talk2dino.files import cache_dir, read_json, refuse_foreign_run, write_json
from talk2dino.inference.model import Talk2DINO
from talk2dino.inference.vocabulary import say_equal
from talk2dino.segmentation import PAMR, Segmenter


def evaluate(config: DictConfig) -> None:
    """Score the checkpoint on the benchmark; print a table, write `results.json` and a report."""
    command.check_processes(config)
    precision = str(config.trainer.get("precision", PRECISION))
    check_encoder_precision(precision)
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    benchmark: Benchmark = command.build(config.benchmark)
    published(benchmark.reference)  # refuses what could not be printed in the end
    if config.compare_untrained:  # the other names are refused where their records begin
        records = folder / "untrained" / "records"
        refuse_foreign_run(folder, records.is_dir, ["results_untrained.json"])
    classes = benchmark.class_list.classes
    if len(classes) == 1:
        say(
            f"benchmark.classes: {classes[0].name!r} is alone, so every pixel becomes it and "
            "nothing is measured; add a background or more classes to compare with"
        )
    with command.progress("checking files", getattr(rank_zero_only, "rank", 0) == 0) as advance:
        benchmark.check(advance)  # bad files are refused before the model is loaded
    model = load_model(config, "cpu")  # the trainer moves it
    calibration = model.calibration
    if "calibration" in config:
        config.calibration = calibration.origin if calibration else None  # what `auto` has found
    build_refinement(config)
    columns: dict[str, Any] = {}
    if config.compare_untrained:
        untrained = fresh_projection(model.projection, model.text)
        file = folder / "results_untrained.json"
        baseline = predict(config, model, untrained, benchmark, folder / "untrained", file)
        if baseline:
            columns["untrained"] = baseline
    file = folder / "results.json"
    results = predict(config, model, model.projection, benchmark, folder, file, calibration)
    if not results:
        return  # another rank reports
    columns["trained" if columns else "IoU"] = results
    Console(markup=False, emoji=False).print(class_table(columns, benchmark.reference))
    print(f"results: {file}")
    where = describe_environment(config.trainer.get("accelerator"), precision)
    write_json(folder / ENVIRONMENT, where)
    print(f"report: {write_report(folder)}")
    for kind, wanted in (("pictures", config.pictures), ("label_maps", config.label_maps)):
        if wanted:
            print(f"{kind.replace('_', ' ')}: {folder / kind}")


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
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Run the predict loop and write the results; empty on all ranks but the first.

    Raises:
        DataError: an image or label map is bad; what was finished before it is kept in `folder`.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    text, row_classes = embed_class_names(
        [spec.synonyms for spec in benchmark.class_list.prompted],
        cached_text(model.text, projection),
        projection,
        benchmark.templates,
    )
    words = [word for spec in benchmark.class_list.prompted for word in spec.synonyms]
    say_equal(words, row_classes.tolist(), text, "benchmark.classes")
    if calibration is not None:
        names = [benchmark.class_list.prompted[number].name for number in row_classes.tolist()]
        text = calibration.score_rows(text, names, projection)
    module = SegmentationModule(
        build_segmenter(config, model.vision, projection, benchmark, calibration),
        benchmark,
        text,
        row_classes,
        folder,
        OutputOptions(
            describe_run(plain, model.vision, model.text, projection, benchmark)
            | ({"calibration": calibration.digest} if calibration else {}),
            config.resume,
            config.pictures,
            config.label_maps,
            config.examples,
        ),
        batch_size=config.batch_size,
        results_file=file,
        besides={"config": plain}
        | ({"calibration": calibration.describe()} if calibration else {}),
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
        run = folder.parent if folder.name == "untrained" else folder
        hint = how_to_go_on(folder, command.folder_override(run))
        raise DataError(f"{message} ({hint})") from error
    if not trainer.is_global_zero:
        return {}
    return read_json(file, dict, "results")  # the ranks may be other processes


def cached_text(text: TextEncoder, projection: Projection) -> TextEncoder:
    """Look embeddings up on disk where ψ takes nothing else: a benchmark's prompts never change."""
    cached = projection.text_fields == ("embedding",)
    return CachedTextEncoder(text, cache_dir() / "text") if cached else text


def build_segmenter(
    config: DictConfig,
    vision: nn.Module,
    projection: Projection,
    benchmark: Benchmark,
    calibration: Calibration | None = None,
) -> Segmenter:
    """The segmenter of a benchmark's protocol, with the refinements of the config.

    What is no PAMR refines token scores as `KNN` does, a class of the user's own too. Background
    thresholds by model size are those of scores without calibration, which brings its own; a
    single number was chosen by somebody and stays.
    """
    chosen = build_refinement(config)
    own = isinstance(chosen, PAMR)
    pamr: PAMR | None = chosen if own else PAMR() if config.pamr else None
    if pamr is not None:
        pamr.whole_image = pamr.whole_image or config.pamr_whole_image
    segmenter = Segmenter(
        vision,
        benchmark,
        pamr=pamr,
        knn=None if own else chosen,
        project_patches=visual_side(projection),
        window_batch_size=config.window_batch_size,
    )
    by_size = isinstance(benchmark.background_threshold, Mapping)
    if calibration is not None and by_size and segmenter.background_threshold is not None:
        chosen = calibration.background_score(benchmark.background_cleaning, benchmark.lambda_bg)
        if chosen is not None:
            segmenter.background_threshold = chosen
    return segmenter


def name_refinement(config: DictConfig) -> None:
    """Let `refinement=pamr` set `pamr`, which is what results and reports tell."""
    if config.refinement and str(config.refinement.get("_target_")).endswith(".PAMR"):
        config.pamr = True
        whole = bool(config.refinement.get("whole_image"))
        config.pamr_whole_image = config.pamr_whole_image or whole


if __name__ == "__main__":
    command.require_common_folder()
    command.run("evaluate", evaluate, name_refinement)
