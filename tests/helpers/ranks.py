"""Two real processes with gloo, forked from one server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

PRELOAD = ["torch", "lightning", "talk2dino.train", "talk2dino.evaluate", "tests.helpers.pipeline"]


def two_ranks(target: Callable[..., None], *args: Any) -> None:
    """Run `target(rank, *args)` as ranks 0 and 1, with the environment that torchrun would give."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, (port, target, args), nprocs=2, start_method="forkserver"
    )


def _rank(rank: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    target(rank, *args)
