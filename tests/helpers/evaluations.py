"""A benchmark of colored squares, and evaluations of it that need no weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from talk2dino.datasets.benchmarks.base import Benchmark
from talk2dino.datasets.benchmarks.labeled_folders import FolderBenchmark
from talk2dino.evaluate import predict
from tests.helpers.encoders import HashText, MeanColorEncoder, NamedColors
from tests.helpers.pipeline import TRAIN

NAMES = ["background", "red", "green", "blue"]
COLORS = torch.eye(3) - 0.3  # [3, 3] ψ of red, green and blue
SMALL: dict[str, Any] = {"short_side": 32, "window": 32, "stride": 16, "input_size": 32}


def write_benchmark(root: Path, count: int = 5, size: tuple[int, int] = (40, 56)) -> Path:
    """Pictures of colored squares with noise; label values 0, 10, 20, 30, and 99 unlabeled."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    random = np.random.default_rng(0)
    values = np.array([0, 10, 20, 30, 99, 255])
    for number in range(count):
        blocks = random.integers(0, 6, (size[0] // 8, size[1] // 8))
        labels = blocks.repeat(8, 0).repeat(8, 1)
        shown = np.where(random.random(labels.shape) < 0.3, random.integers(0, 6), labels)
        palette = np.array(
            [[90, 90, 90], [220, 30, 30], [30, 220, 30], [30, 30, 220], [9, 9, 9], [200, 200, 0]]
        )
        pixels = (palette[shown] + random.integers(-9, 10, (*size, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(values[labels].astype(np.uint8)).save(root / "masks" / f"{number}.png")
    classes = [{"name": n, "id": 10 * i} for i, n in enumerate(NAMES)]
    content = {"classes": classes, "unlabeled": 99}
    (root / "classes.json").write_text(json.dumps(content))
    return root


def benchmark(root: Path, **options: Any) -> FolderBenchmark:
    """The benchmark in `root`, cut into small windows."""
    settings = {"name": "squares", "images": "images", "masks": "masks", "classes": "classes.json"}
    settings |= {"root": str(root), "background_threshold": 0.6} | SMALL | options
    return FolderBenchmark(**settings)


def settings(
    devices: int = 1,
    strategy: str = "auto",
    pictures: int = 0,
    batch_size: int = 1,
    **changes: Any,
) -> DictConfig:
    """The config of an evaluation, as far as `predict` reads it."""
    trainer = {
        "_target_": "lightning.Trainer",
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    plain = {"pamr": False, "pictures": pictures, "num_workers": 0, "batch_size": batch_size}
    plain |= {"label_maps": False, "examples": 0, "resume": True, "window_batch_size": 8}
    plain |= {"refinement": None, "pamr_whole_image": False}
    return OmegaConf.create({"trainer": trainer} | plain | {"benchmark": None} | changes)


def evaluate(folder: Path, bench: Benchmark, config: DictConfig | None = None) -> dict[str, Any]:
    """Results of a segmenter that knows red, green and blue by their mean color."""
    folder.mkdir(exist_ok=True)
    model: Any = SimpleNamespace(vision=MeanColorEncoder(), text=HashText())
    psi: Any = NamedColors(NAMES[1:], COLORS)
    return predict(config or settings(), model, psi, bench, folder, folder / "results.json")


def evaluate_mosaic(checkpoint: Path, folder: Path, *overrides: object) -> list[str]:
    """Command line of an evaluation on three small mosaic scenes."""
    return [
        "evaluate",
        f"checkpoint={checkpoint}",
        "benchmark=mosaic",
        "benchmark.count=3",
        "benchmark.height=112",
        "benchmark.width=112",
        "benchmark.short_side=112",
        "benchmark.window=112",
        "benchmark.stride=56",
        "benchmark.input_size=112",
        "num_workers=0",
        *TRAIN,
        f"hydra.run.dir={folder}",
        *map(str, overrides),
    ]
