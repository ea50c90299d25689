"""Arithmetic of an encoder's forward pass: float32, or autocast to a shorter type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from talk2dino.errors import ConfigError

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def check_precision(precision: str, key: str = "precision") -> None:
    """Refuse a name that is not in `PRECISIONS` with a ConfigError that names `key`."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{key}={precision!r}; choose one of {', '.join(PRECISIONS)}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a new context for forward passes on `device`."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
