"""Where the time of a segmentation goes, beside the encoder's own.

    python benchmarks/segmentation.py
    python benchmarks/segmentation.py --images DIR --count 8 --classes 21 171
    python benchmarks/segmentation.py --checkpoint RUN

Real photographs, the bundled ViT-S/14 in float32, every stage timed by itself; the best of several
runs per image, then the mean over images. Everything but the encoder is to take at most 25 % of
the encoder's time with 21 classes and at most 100 % with 171.

With PAMR the time depends on how many classes come near winning somewhere. With a checkpoint whose
vision encoder is the same, classes are the names of VOC (21 with background), Pascal Context (60)
and COCO-Stuff (171); without one their vectors are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from talk2dino.datasets.benchmarks.classes import read_classes
from talk2dino.datasets.mosaic import MosaicScenes
from talk2dino.encoders.vision import TimmVisionEncoder
from talk2dino.evaluation.metrics import mean_iou_metric
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation import KNN, PAMR, Segmenter, clean_background
from talk2dino.segmentation.labels import contender_labels, label_map
from talk2dino.segmentation.scores import class_scores
from talk2dino.segmentation.segmenter import EncodedImage
from talk2dino.segmentation.windows import SeparableScores, coverage, resize_image
from tests.helpers.windows import stitch

LIMITS = {21: 0.25, 171: 1.0}  # share of the encoder's time
STAGES = {  # what each way to labels consists of
    "plain": ("resize", "cosine", "to labels", "metric"),
    "cleaning": ("resize", "cosine", "cleaning", "to labels", "metric"),
    "kNN": ("resize", "cosine", "kNN", "to labels", "metric"),
    "PAMR": ("resize", "cosine", "PAMR: weights", "PAMR to labels", "metric"),
    "cleaning + PAMR": (
        *("resize", "cosine", "cleaning"),
        *("PAMR: weights", "PAMR to labels, cleaned", "metric"),
    ),
    "PAMR of all classes": (
        *("resize", "cosine", "PAMR: weights"),
        *("PAMR, all classes", "stitch", "argmax", "metric"),
    ),
    "PAMR, whole image": ("resize", "cosine", "once: weights", "once: to labels", "metric"),
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


def class_times(clock: Clock, encoded: EncodedImage, text: Tensor) -> None:
    """Every stage behind the encoder."""
    features, windows = encoded.features, encoded.windows
    tokens, maps, grid = features.patch_tokens, features.self_attn_maps, features.grid
    working = (encoded.image.shape[-2], encoded.image.shape[-1])
    scores = clock("cosine", lambda: class_scores(tokens, text, grid))
    cleaned = clock("cleaning", lambda: clean_background(scores, tokens, maps, text))
    clock("kNN", lambda: KNN()(tokens, scores))
    labels = clock(
        "to labels", lambda: SeparableScores(scores, windows, working, encoded.size).labels()
    )
    metric = mean_iou_metric(len(text))
    clock("metric", lambda: metric.update(labels[None], labels[None]))
    pamr_times(clock, encoded, scores, cleaned)


def pamr_times(clock: Clock, encoded: EncodedImage, scores: Tensor, cleaned: Tensor) -> None:
    pamr, windows = PAMR(), encoded.windows
    crops = [window.crop(encoded.image) for window in windows]
    working = (encoded.image.shape[-2], encoded.image.shape[-1])
    share = coverage(windows, *working).reciprocal_()
    refined_maps: list[int] = []

    refiners = clock("PAMR: weights", lambda: list(pamr.prepare(crops)))

    def refine(tokens: Tensor) -> Tensor:
        refined_maps.append(tokens.shape[1])
        total = tokens.new_zeros(tokens.shape[1], *working)
        for refiner, window, one in zip(refiners, windows, tokens, strict=True):
            refiner.add_to(window.crop(total), one, window.crop(share))
        return total

    found = clock("PAMR to labels", lambda: contender_labels(scores, refine, encoded.size))
    clock.best["refined maps"] = sum(refined_maps) / clock.repeats
    clock(
        "PAMR to labels, cleaned",
        lambda: contender_labels(cleaned, refine, encoded.size),
    )

    def refine_all() -> list[Tensor]:
        return [refiner(one) for refiner, one in zip(refiners, scores, strict=True)]

    refined = clock("PAMR, all classes", refine_all)
    whole = clock("stitch", lambda: stitch(refined, windows, *working))
    expected = clock("argmax", lambda: label_map(whole, *encoded.size))
    clock.best["different labels"] = float((found != expected).double().mean())

    [once] = clock("once: weights", lambda: list(pamr.prepare([encoded.image])))

    def refine_once(tokens: Tensor) -> Tensor:
        return once(SeparableScores(tokens, windows, working, working).full())

    clock(
        "once: to labels",
        lambda: contender_labels(scores, refine_once, encoded.size),
    )


def class_vectors(counts: Sequence[int], checkpoint: Path | None) -> dict[int, Tensor]:
    """`[K, D]` of unit length for every K: of names, or random ones without a checkpoint."""
    if checkpoint is None:
        return {count: F.normalize(torch.randn(count, 384), dim=-1) for count in counts}
    voc, context, things, stuff = (
        read_classes(name).names for name in ("voc", "context", "coco_things", "coco_stuff")
    )
    lists = {21: ["background", *voc], 60: ["background", *context], 171: [*things, *stuff]}
    model = Talk2DINO.from_pretrained(checkpoint)
    with torch.inference_mode():
        return {
            count: F.normalize(
                model.encode_text([f"a photo of a {name}" for name in lists[count]]), dim=-1
            )
            for count in counts
        }


def report(classes: int, mean: Times) -> None:
    encoder = mean["encoder"]
    print(f"\n{classes} classes; encoder {encoder:.3f} s per image")
    print(
        f"  PAMR refines {mean['refined maps']:.0f} maps; labels that differ from those of all "
        f"classes: {mean['different labels']:.2%}"
    )
    print(f"  {'stage':<24}{'seconds':>9}{'of encoder':>12}")
    listed = dict.fromkeys(stage for stages in STAGES.values() for stage in stages)
    for stage in listed:
        print(f"  {stage:<24}{mean[stage]:9.4f}{mean[stage] / encoder:12.1%}")
    limit = LIMITS.get(classes)
    for way, stages in STAGES.items():
        total = sum(mean[stage] for stage in stages)
        share = total / encoder
        verdict = "" if limit is None else f"  at most {limit:.0%}: "
        verdict += "" if limit is None else ("met" if share <= limit else "missed")
        print(f"  = {way:<22}{total:9.4f}{share:12.1%}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "realdata" / "coco100" / "images"
    parser.add_argument("--images", type=Path, default=default, help="folder of photographs")
    parser.add_argument("--count", type=int, default=4, help="photographs")
    parser.add_argument("--checkpoint", type=Path, help="run or model with the same encoder")
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
        vectors = class_vectors(arguments.classes, arguments.checkpoint)
        timed: dict[int, list[Times]] = {classes: [] for classes in vectors}
        windows = 0
        for image in images:
            clock = Clock(arguments.repeats)
            encoded = encoder_times(clock, segmenter, image)
            windows += len(encoded.windows)
            for classes, text in vectors.items():
                class_times(clock, encoded, text)
                timed[classes].append(dict(clock.best))
    print(
        f"{len(images)} photographs ({source}), {windows / len(images):.2f} windows each, ViT-S/14 "
        f"float32, {arguments.threads} threads, CPU, torch {torch.__version__}"
    )
    for classes, times in timed.items():
        report(classes, {key: sum(t[key] for t in times) / len(times) for key in times[0]})


if __name__ == "__main__":
    main()
