"""`python -m talk2dino.evaluate`: a projection on a benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from talk2dino import cli
from talk2dino.alignment.checkpoint import describe_projection
from talk2dino.alignment.clip_last_layer import CLIPLastLayer
from talk2dino.alignment.projection import Projection
from talk2dino.alignment.projection_base import visual_side
from talk2dino.api import Talk2DINO
from talk2dino.atomic import write_json
from talk2dino.encoders.bundled import cache_dir
from talk2dino.encoders.cache import CachedTextEncoder
from talk2dino.encoders.text import TextEncoder
from talk2dino.segmentation import PAMR, Segmenter
from talk2dino.segmentation.benchmarks import Benchmark
from talk2dino.segmentation.classes import embed_classes
from talk2dino.segmentation.datamodule import SegmentationDataModule
from talk2dino.segmentation.module import SegmentationModule
from talk2dino.segmentation.report import table


def evaluate(config: DictConfig) -> None:
    """Score the checkpoint on the benchmark; print a table and write `results.json`."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    benchmark: Benchmark = cli.build(config.benchmark)
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
    if config.pictures:
        print(f"pictures: {folder / 'pictures'}")


def load_model(config: DictConfig) -> Talk2DINO:
    """Load the checkpoint with its own encoders, or those that the config chooses."""
    return Talk2DINO.from_pretrained(
        config.checkpoint,
        device="cpu",  # the trainer moves it
        vision=cli.build(config.vision) if config.vision else None,
        text=cli.build(config.text) if config.text else None,
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
    """Run the predict loop and write the results; empty on all ranks but the first."""
    synonyms = [spec.synonyms for spec in benchmark.class_list.prompted]
    encoder: TextEncoder = model.text
    if projection.text_fields == ("embedding",):  # prompts of a benchmark are always the same
        encoder = CachedTextEncoder(encoder, cache_dir() / "text")
    text, row_classes = embed_classes(synonyms, encoder, projection, benchmark.templates)
    has_background = benchmark.class_list.has_background
    segmenter = Segmenter(
        model.vision,
        window=benchmark.window,
        stride=benchmark.stride,
        short_side=benchmark.short_side,
        long_side=benchmark.long_side,
        input_size=benchmark.input_size,
        background_cleaning=benchmark.background_cleaning,
        background_threshold=benchmark.background_threshold if has_background else None,
        pamr=PAMR() if config.pamr else None,
        project_patches=visual_side(projection),
    )
    module = SegmentationModule(
        segmenter, benchmark, text, row_classes, folder, config.pictures, results_file=file
    )
    trainer: L.Trainer = cli.build(config.trainer, default_root_dir=str(folder), logger=False)
    data = SegmentationDataModule(benchmark, config.num_workers)
    trainer.predict(module, data, return_predictions=False)
    if not trainer.is_global_zero:
        return {}
    results: dict[str, Any] = json.loads(file.read_text())  # the ranks may be other processes
    return results


if __name__ == "__main__":
    cli.run("evaluate", evaluate)
