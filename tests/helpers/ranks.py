"""Processes of a test's own, forked from one server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

# What the server imports before its first fork; tests/conftest.py hands it over.
PRELOAD = [
    "torch",
    "lightning",
    "timm",
    "open_clip",
    "talk2dino.train",
    "talk2dino.evaluate",
    "tests.helpers.pipeline",
]


def forked(target: Callable[..., None], *args: Any, **options: Any) -> BaseProcess:
    """Start `target(*args, **options)` in a new process, which shares nothing with this one."""
    process = multiprocessing.get_context("forkserver").Process(
        target=target, args=args, kwargs=options
    )
    process.start()
    return process


def two_ranks(target: Callable[..., None], *args: Any) -> None:
    """Run `target(rank, *args)` as ranks 0 and 1, with the environment that torchrun would give."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, (port, target, args), nprocs=2, start_method="forkserver"
    )


def fork_what_lightning_spawns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of `ddp_spawn` come from the server too: pickled alike, without their imports."""
    start = torch.multiprocessing.start_processes

    def forked_ones(*args: Any, start_method: str, **options: Any) -> Any:
        assert start_method == "spawn"
        return start(*args, start_method="forkserver", **options)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked_ones)


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
