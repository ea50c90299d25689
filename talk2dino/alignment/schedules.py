"""Learning-rate schedules with linear warm-up, one step per batch (original `src/scheduler.py`).

Factories with the same two keywords, so that either fits the training module's one call.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from talk2dino.errors import ConfigError


def constant_with_warmup(
    optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None
) -> LambdaLR:
    """Rise linearly to the optimiser's rate, then stay there (original `const_lr`).

    Args:
        optimizer: its current rates are the base rates.
        warmup_steps: optimiser steps of warm-up; step s has base * (s + 1) / warmup_steps.
        total_steps: not used; taken so that both schedules are called alike.

    Raises:
        ConfigError: `warmup_steps` is negative.
    """
    _check_warmup(warmup_steps)
    return LambdaLR(optimizer, lambda step: warmup_factor(step, warmup_steps))


def cosine_with_warmup(
    optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None
) -> LambdaLR:
    """Rise linearly, then fall along half a cosine to zero at `total_steps` (`cosine_lr`).

    Up to `total_steps` the numbers are the original's. Past it the original's cosine rises again;
    here the rate stays zero.

    Args:
        optimizer: its current rates are the base rates.
        warmup_steps: optimiser steps of warm-up.
        total_steps: optimiser steps of the whole run, warm-up included.

    Raises:
        ConfigError: `total_steps` is missing or not above `warmup_steps`.
    """
    _check_warmup(warmup_steps)
    if total_steps is None or total_steps <= warmup_steps:
        raise ConfigError(
            f"scheduler.total_steps is {total_steps}: it must exceed warmup_steps={warmup_steps}"
        )
    total = total_steps
    return LambdaLR(optimizer, lambda step: cosine_factor(step, warmup_steps, total))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the base rate at `step` (from 0); the last warm-up step already has all of it."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the base rate at `step` (from 0) of the cosine schedule."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return (1 + math.cos(math.pi * progress)) / 2


def _check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise ConfigError(f"scheduler.warmup_steps is {warmup_steps}: it must not be negative")
