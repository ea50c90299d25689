"""Where the time of a segmentation goes, beside the encoder's own.

    python benchmarks/segmentation.py
    python benchmarks/segmentation.py --images DIR --count 8 --classes 21 171

Real photographs, the bundled ViT-S/14 in float32, every stage timed by itself; the best of several
runs per image, then the mean over images. The vectors of the classes are random: time does not
depend on them. Everything but the encoder is to take at most 25 % of the encoder's time with 21
classes and at most 100 % with 171.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.features.mosaic import MosaicScenes
from talk2dino.segmentation import KNN, PAMR, Segmenter, clean_background
from talk2dino.segmentation.metrics import mean_iou_metric
from talk2dino.segmentation.scores import class_scores, label_map
from talk2dino.segmentation.segmenter import EncodedImage
from talk2dino.segmentation.separable import SeparableScores
from talk2dino.segmentation.windows import resize_image, stitch

LIMITS = {21: 0.25, 171: 1.0}  # share of the encoder's time
STAGES = {  # what each way to labels consists of
    "plain": ("resize", "cosine", "to labels", "metric"),
    "cleaning": ("resize", "cosine", "cleaning", "to labels", "metric"),
    "kNN": ("resize", "cosine", "kNN", "to labels", "metric"),
    "PAMR": ("resize", "cosine", "PAMR: weights", "PAMR: rest", "stitch", "argmax", "metric"),
    "cleaning + PAMR": (
        *("resize", "cosine", "cleaning"),
        *("PAMR: weights", "PAMR: rest", "stitch", "argmax", "metric"),
    ),
    "PAMR, whole image": ("resize", "cosine", "to scores", "PAMR, once", "argmax", "metric"),
}

T = TypeVar("T")
Times = dict[str, float]


def photographs(folder: Path, count: int) -> list[Tensor]:
    """The first pictures of a folder, or composed scenes of real photographs without one."""
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))
        arrays = [np.array(Image.open(path).convert("RGB")) for path in paths[:count]]
    else:
        scenes = MosaicScenes("heldout", count, 480, 640)
        arrays = [scenes[index].image for index in range(count)]
    return [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]


class Clock:
    """Best seconds of every stage over several runs."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.best: Times = {}

    def __call__(self, stage: str, action: Callable[[], T]) -> T:
        """Run and time `action`; return what it gives."""
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            result = action()
            times.append(time.perf_counter() - start)
        self.best[stage] = min(times)
        return result


def encoder_times(clock: Clock, segmenter: Segmenter, image: Tensor) -> EncodedImage:
    encoded = segmenter.encode(image)
    crops = torch.stack([window.crop(encoded.image) for window in encoded.windows])
    clock("encoder", lambda: segmenter.encode_windows(crops))
    clock("resize", lambda: resize_image(image, *encoded.image.shape[-2:]))
    return encoded


def class_times(clock: Clock, encoded: EncodedImage, classes: int) -> None:
    """Every stage behind the encoder."""
    features, windows = encoded.features, encoded.windows
    tokens, maps, grid = features.patch_tokens, features.self_attn_maps, features.grid
    text = F.normalize(torch.randn(classes, tokens.shape[-1]), dim=-1)
    working = (encoded.image.shape[-2], encoded.image.shape[-1])
    scores = clock("cosine", lambda: class_scores(tokens, text, grid))
    clock("cleaning", lambda: clean_background(scores, tokens, maps, text))
    clock("kNN", lambda: KNN()(tokens, scores))
    labels = clock(
        "to labels", lambda: SeparableScores(scores, windows, working, encoded.size).labels()
    )
    clock("to scores", lambda: SeparableScores(scores, windows, working, working).full())
    metric = mean_iou_metric(classes)
    clock("metric", lambda: metric.update(labels[None], labels[None]))
    pamr_times(clock, encoded, scores)


def pamr_times(clock: Clock, encoded: EncodedImage, scores: Tensor) -> None:
    pamr, windows = PAMR(), encoded.windows
    crops = [window.crop(encoded.image) for window in windows]
    working = (encoded.image.shape[-2], encoded.image.shape[-1])

    engine = pamr.engine(encoded.image.device)

    def weights() -> None:
        for crop in crops:
            engine.affinity(crop.float())

    clock("PAMR: weights", weights)
    refined = clock("PAMR", lambda: list(pamr.each(crops, scores)))
    clock.best["PAMR: rest"] = max(0.0, clock.best["PAMR"] - clock.best["PAMR: weights"])
    whole = clock("stitch", lambda: stitch(refined, windows, *working))
    clock("argmax", lambda: label_map(whole, *encoded.size))
    clock("PAMR, once", lambda: next(pamr.each([encoded.image], [whole])))


def report(classes: int, mean: Times) -> None:
    encoder = mean["encoder"]
    print(f"\n{classes} classes; encoder {encoder:.3f} s per image")
    print(f"  {'stage':<20}{'seconds':>9}{'of encoder':>12}")
    listed = dict.fromkeys(stage for stages in STAGES.values() for stage in stages)
    for stage in listed:
        print(f"  {stage:<20}{mean[stage]:9.4f}{mean[stage] / encoder:12.1%}")
    limit = LIMITS.get(classes)
    for way, stages in STAGES.items():
        total = sum(mean[stage] for stage in stages)
        share = total / encoder
        verdict = "" if limit is None else f"  at most {limit:.0%}: "
        verdict += "" if limit is None else ("met" if share <= limit else "missed")
        print(f"  = {way:<18}{total:9.4f}{share:12.1%}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata" / "coco100" / "images"
    parser.add_argument("--images", type=Path, default=default, help="folder of photographs")
    parser.add_argument("--count", type=int, default=4, help="photographs")
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 60, 171])
    parser.add_argument("--repeats", type=int, default=3, help="runs of a stage; the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    segmenter = Segmenter(TimmVisionEncoder("vit_small_patch14_dinov2.lvd142m", "bundled"))
    images = photographs(arguments.images, arguments.count)
    source = arguments.images if arguments.images.is_dir() else "composed scenes"
    with torch.inference_mode():
        timed: dict[int, list[Times]] = {classes: [] for classes in arguments.classes}
        windows = 0
        for image in images:
            clock = Clock(arguments.repeats)
            encoded = encoder_times(clock, segmenter, image)
            windows += len(encoded.windows)
            for classes in arguments.classes:
                class_times(clock, encoded, classes)
                timed[classes].append(dict(clock.best))
    print(
        f"{len(images)} photographs ({source}), {windows / len(images):.2f} windows each, ViT-S/14 "
        f"float32, {arguments.threads} threads, CPU, torch {torch.__version__}"
    )
    for classes, times in timed.items():
        report(classes, {key: sum(t[key] for t in times) / len(times) for key in times[0]})


if __name__ == "__main__":
    main()
