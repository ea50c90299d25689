"""Arrays that the original code computed, from `tests/goldens`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
Golden = Callable[[str], dict[str, Tensor]]  # the type of the fixture `golden`


def golden_arrays(name: str) -> dict[str, Tensor]:
    """`golden_arrays("loss")`: all of `tests/goldens/loss.npz`, names as stored."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def golden_json(name: str) -> dict[str, Any]:
    """`golden_json("classes")`: the content of `tests/goldens/classes.json`."""
    return dict(json.loads((GOLDENS / f"{name}.json").read_text()))


def parameters(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state dict stored under `{prefix}param/`."""
    start = f"{prefix}param/"
    return {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}


# name of the output: image, its scale, mask, dilations (10 iterations with all six, else one)
PAMR_CASES = {
    "40x56_c3_iter10": ("40x56", 1, "40x56_c3", (1, 2, 4, 8, 12, 24)),
    "40x56_c3_iter10_image01": ("40x56", 255, "40x56_c3", (1, 2, 4, 8, 12, 24)),
    "40x56_c21_iter10": ("40x56", 1, "40x56_c21", (1, 2, 4, 8, 12, 24)),
    "64x64_c3_iter10": ("64x64", 1, "64x64_c3", (1, 2, 4, 8, 12, 24)),
    "64x64_lowresmask16_c3_iter10": ("64x64", 1, "16x16_c3", (1, 2, 4, 8, 12, 24)),
    "40x56_c3_iter1_dil1": ("40x56", 1, "40x56_c3", (1,)),
    "40x56_c3_iter1_dil1_4": ("40x56", 1, "40x56_c3", (1, 4)),
    "flat24x20_c2_iter1_dil1": ("flat24x20", 1, "24x20_c2", (1,)),
    "flat24x20_c2_iter1_dil1_2": ("flat24x20", 1, "24x20_c2", (1, 2)),
    "flat24x20_c2_iter10": ("flat24x20", 1, "24x20_c2", (1, 2, 4, 8, 12, 24)),
}


def pamr_inputs(
    name: str, arrays: dict[str, Tensor]
) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    """Picture, mask, iterations and dilations of `out/NAME` of `golden_arrays("pamr")`."""
    image, scale, mask, dilations = PAMR_CASES[name]
    iterations = 10 if "iter10" in name else 1
    return arrays[f"image/{image}"] / scale, arrays[f"mask/{mask}"], iterations, dilations
