"""Which of several processes this is, as torchrun or SLURM's srun tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from talk2dino.errors import ConfigError


@dataclass(frozen=True)
class ProcessRank:
    """Number of this process, of all processes, and its number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def process_rank(environment: Mapping[str, str] | None = None) -> ProcessRank:
    """Read the place of this process among all: torchrun's variables, else those of srun.

    torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_PROCID, SLURM_LOCALID and
    SLURM_STEP_NUM_TASKS (older ones SLURM_NTASKS). Without any of them there is one process.

    Raises:
        ConfigError: a variable that is no number, or a rank beyond the number of processes.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in given and "WORLD_SIZE" not in given:
        # SLURM_NTASKS is that of the whole job, of which srun may start a part.
        step = "SLURM_STEP_NUM_TASKS" in given
        tasks = "SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
    else:
        return ProcessRank(local_rank=_number(given, "LOCAL_RANK", 0))
    rank = _number(given, names[0], 0)
    world_size = _number(given, names[1], 1)
    if rank >= world_size:
        raise ConfigError(
            f"{names[0]}={rank} with {names[1]}={world_size}: a rank lies below their number; "
            "start through torchrun or srun, or unset both"
        )
    return ProcessRank(rank, world_size, _number(given, names[2], 0))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} in the environment is no number; unset it")
    return int(value)
