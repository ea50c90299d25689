"""Choosing the device to run encoders on."""

from __future__ import annotations

import torch

from talk2dino.encoders.ranks import process_rank
from talk2dino.errors import ConfigError


def choose_device(accelerator: str = "auto") -> torch.device:
    """Return the device for `auto`, `cpu`, `gpu` or `mps`.

    Under torchrun or srun each local rank takes its own GPU; more ranks than visible GPUs share
    them (srun may show every task one GPU only).

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
        return torch.device("cuda", process_rank().local_rank % torch.cuda.device_count())
    return torch.device(accelerator)
