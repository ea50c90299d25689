"""Where and how encoders run: the device, the process rank, the arithmetic."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from talk2dino.errors import ConfigError


@dataclass(frozen=True)
class ProcessRank:
    """Number of this process, and of all processes."""

    rank: int = 0
    world_size: int = 1


def process_rank() -> ProcessRank:
    """Read which of several processes this is: from torchrun's variables, else from srun's.

    torchrun sets RANK and WORLD_SIZE; srun sets SLURM_PROCID and SLURM_STEP_NUM_TASKS. Without any
    of them, and in a shell of srun, there is one process.

    Raises:
        ConfigError: a variable that is no number, a rank beyond the number of processes, or a
            batch script of several tasks that starts this one without srun.
    """
    if "RANK" in os.environ:
        names = ("RANK", "WORLD_SIZE")
    elif (
        "SLURM_PROCID" in os.environ
        and "WORLD_SIZE" not in os.environ
        and (shell := os.environ.get("SLURM_JOB_NAME")) != "bash"  # `srun --pty bash`
    ):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        # A batch script is one process, with the SLURM_PROCID 0 and the SLURM_NTASKS of the job.
        tasks = 1 if names[1] in os.environ else _number("SLURM_NTASKS", 1)
        if tasks > 1 and shell != "interactive":  # salloc's shell, in which srun may start tasks
            raise ConfigError(
                f"SLURM_NTASKS={tasks}, but srun did not start this process; start it with srun, "
                "or set RANK and WORLD_SIZE (0 and 1 for a process that does everything)"
            )
    else:
        return ProcessRank()
    rank = _number(names[0], 0)
    world_size = _number(names[1], 1)
    if rank >= world_size:
        raise ConfigError(
            f"{names[0]}={rank} with {names[1]}={world_size}: a rank lies below their number; "
            "start through torchrun or srun, or unset both"
        )
    return ProcessRank(rank, world_size)


def local_rank() -> int:
    """Number of this process on its machine, from torchrun or srun; 0 without them.

    Raises:
        ConfigError: a variable that is no number.
    """
    return _number("LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID", 0)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} in the environment is no number; unset it")
    return int(value)


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
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device(accelerator)


def devices_here() -> list[str]:
    """What `Module.to` takes on this machine."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, here in there.items() if here)]


PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


def check_precision(precision: str, key: str = "precision") -> None:
    """Refuse a name that is not in `PRECISIONS` with a ConfigError that names `key`."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{key}={precision!r}; choose one of {', '.join(PRECISIONS)}")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a new context for forward passes on `device`."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
