"""PAMR, window scores and labels on the device beside the original's arrays and the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.pamr_ways import WAYS, PAMRBy
from benchmarks.gpu_parts.rows import Row, Setting, check, deviation
from talk2dino.segmentation import KNN, PAMR, Segmenter
from tests.helpers.goldens import PAMR_CASES, golden_arrays, pamr_inputs


def pamr(setting: Setting) -> Iterator[Row]:
    """Every way of PAMR on the original's arrays: the largest deviation of all cases."""
    arrays, few = golden_arrays("pamr"), ["40x56_c3_iter1_dil1_4", "flat24x20_c2_iter10"]
    for way in WAYS:
        worst = 0.0
        names = few if setting.tiny else list(PAMR_CASES)
        try:
            for name in names:
                image, mask, num_iter, dilations = pamr_inputs(name, arrays)
                refine = PAMRBy(way, num_iter, dilations)
                got = refine(image.to(setting.at), mask.to(setting.at))
                worst = max(worst, deviation(got, arrays[f"out/{name}"]))
        except ModuleNotFoundError as error:
            yield Row(f"PAMR, {way}", float("nan"), "", note=f"needs {error.name}")
            continue
        yield check(f"PAMR, {way}, {len(names)} cases", worst, 1e-5)


def window_scores(setting: Setting) -> Iterator[Row]:
    """The original's window scores, with cleaning and with PAMR."""
    from tests.helpers.windows import golden_segmenters

    cases = list(golden_segmenters())
    for name, refined in (("window scores", False), ("window scores with PAMR", True)):
        chosen = [case for case in cases if (case.segmenter.pamr is not None) == refined]
        worst = max(deviation(case.scores(setting.at), case.want) for case in chosen)
        yield check(f"{name}, {len(chosen)} cases", worst, 1e-5)


LABELED: dict[str, dict[str, Any]] = {
    "plain": {},
    "background, cleaned": {"background_threshold": 0.55, "background_cleaning": True},
    "kNN": {"knn": KNN(8)},
    "PAMR": {"pamr": PAMR()},
    "PAMR, whole image": {"pamr": PAMR(whole_image=True)},
}


def labels(setting: Setting) -> Iterator[Row]:
    """Share of pixels whose label differs from the CPU's; rounding decides where two are equal."""
    from tests.helpers.encoders import MeanColorEncoder, directions

    generator = torch.Generator().manual_seed(0)
    height, width = setting.choose((480, 640), (60, 100))
    coarse = torch.rand(1, 3, height // 20, width // 20, generator=generator)
    picture = F.interpolate(coarse, (height, width), mode="bicubic")
    noise = 0.05 * torch.rand(3, height, width, generator=generator)
    image = (picture[0] + noise).clamp(0, 1).mul(255).to(torch.uint8)
    side = setting.choose(448, 64)
    for name, options in LABELED.items():
        segmenter = Segmenter(
            MeanColorEncoder(), window=side, stride=side // 2, short_side=side, input_size=side,
            **options,
        )  # fmt: skip
        for classes in (21, 171):
            text = directions(classes)
            want = segmenter(image, text).labels
            got = segmenter.to(setting.at)(image.to(setting.at), text.to(setting.at)).labels.cpu()
            share = float((got != want).double().mean())
            yield check(f"labels, {name}, {classes} classes", share, 1e-3, "share")
