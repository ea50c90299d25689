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
