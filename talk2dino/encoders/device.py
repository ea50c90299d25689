"""Choosing the device to run encoders on."""

from __future__ import annotations

import os

import torch

from talk2dino.errors import ConfigError


def choose_device(accelerator: str = "auto") -> torch.device:
    """Return the device for `auto`, `cpu`, `gpu` or `mps`.

    Under torchrun each local rank takes its own GPU.

    Raises:
        ConfigError: unknown name, or no such device here.
    """
    available = {
        "gpu": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        accelerator = next(name for name, here in available.items() if here)
    if accelerator not in available:
        raise ConfigError(f"accelerator={accelerator!r}; choose auto, {', '.join(available)}")
    if not available[accelerator]:
        raise ConfigError(f"accelerator={accelerator}: there is none here; use accelerator=auto")
    if accelerator == "gpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(accelerator)
