"""Learning-rate schedules with linear warm-up, one step per batch (original `src/scheduler.py`).

Factories with the same two keywords, so that either fits the training module's one call.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from talk2dino.errors import ConfigError


def constant_with_warmup(
    optimizer: Optimizer,
    warmup_steps: int = 0,
    warmup_epochs: float = 0.0,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
) -> LambdaLR:
    """Rise linearly to the optimiser's rate, then stay there (original `const_lr`).

    Args:
        optimizer: its current rates are the base rates.
        warmup_steps: optimiser steps of warm-up; step s has base * (s + 1) / warmup_steps.
        warmup_epochs: the same in epochs, where `warmup_steps` is 0.
        total_steps: not used; taken so that both schedules are called alike.
        steps_per_epoch: optimiser steps of an epoch; needed with `warmup_epochs`.

    Raises:
        ConfigError: a warm-up is negative.

    Examples:
        >>> import torch
        >>> from talk2dino.alignment.schedules import constant_with_warmup, warmup_factor
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        >>> constant_with_warmup(optimizer, warmup_steps=4).get_last_lr()
        [0.1]
        >>> [warmup_factor(step, warmup_steps=4) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    warmup = warmup_length(warmup_steps, warmup_epochs, steps_per_epoch)
    return LambdaLR(optimizer, lambda step: warmup_factor(step, warmup))


def cosine_with_warmup(
    optimizer: Optimizer,
    warmup_steps: int = 0,
    warmup_epochs: float = 0.0,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
) -> LambdaLR:
    """Rise linearly, then fall along half a cosine to zero at `total_steps` (`cosine_lr`).

    Up to `total_steps` the numbers are the original's. Past it the original's cosine rises again;
    here the rate stays zero. A run that is cut short within its warm-up never falls.

    Args:
        optimizer: its current rates are the base rates.
        warmup_steps: optimiser steps of warm-up.
        warmup_epochs: the same in epochs, where `warmup_steps` is 0.
        total_steps: optimiser steps of the whole run, warm-up included.
        steps_per_epoch: optimiser steps of an epoch; needed with `warmup_epochs`.

    Raises:
        ConfigError: `total_steps` is missing, or a warm-up is negative.

    Examples:
        >>> from talk2dino.alignment.schedules import cosine_factor
        >>> [round(cosine_factor(step, warmup_steps=2, total_steps=6), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    warmup = warmup_length(warmup_steps, warmup_epochs, steps_per_epoch)
    if total_steps is None:
        raise ConfigError("scheduler.total_steps is None: a cosine needs the length of the run")
    total = total_steps
    return LambdaLR(optimizer, lambda step: cosine_factor(step, warmup, total))


def warmup_length(warmup_steps: int, warmup_epochs: float, steps_per_epoch: float | None) -> int:
    """Steps of warm-up: `warmup_steps` if it is not 0, else `warmup_epochs` in steps.

    Raises:
        ConfigError: negative, or epochs without `steps_per_epoch`.
    """
    for name, value in (("warmup_steps", warmup_steps), ("warmup_epochs", warmup_epochs)):
        if value < 0:
            raise ConfigError(f"scheduler.{name} is {value}: it must not be negative")
    if warmup_epochs and not warmup_steps and steps_per_epoch is None:
        raise ConfigError(f"scheduler.warmup_epochs={warmup_epochs} needs steps_per_epoch")
    return warmup_steps or round(warmup_epochs * (steps_per_epoch or 0))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the base rate at `step` (from 0); the last warm-up step already has all of it."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the base rate at `step` (from 0) of the cosine schedule."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return (1 + math.cos(math.pi * progress)) / 2
