"""A process that computes parts: it may hang or lose its device, and the other parts go on."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu_parts.rows import Row, Setting


@dataclass
class Outcome:
    """What became of a part: `done`, `failed`, `left out` or `did not fit`, and the rows so far."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


class Worker:
    """Runs parts one by one in a process of its own, started anew after one that did not finish."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.process: Any = None
        self.pipe: Any = None

    def run(self, target: str, seconds: float) -> Outcome:
        """Run the part `module:function`, for `seconds` at most; rows until then are kept."""
        if self.process is None:
            self._start()
        outcome, start = Outcome("did not fit"), time.monotonic()
        try:
            self.pipe.send(target)
            while self.pipe.poll(max(start + seconds - time.monotonic(), 0)):
                kind, content = self.pipe.recv()
                if kind != "row":
                    outcome.status, outcome.reason = kind, content
                    break
                outcome.rows.append(content)
        except (EOFError, OSError):
            self.process.join(5)
            outcome.status = "failed"
            outcome.reason = f"its process ended with status {self.process.exitcode}"
        outcome.seconds = time.monotonic() - start
        if outcome.status in ("failed", "did not fit"):  # the device may be unusable from here on
            self.close()
        return outcome

    def close(self) -> None:
        """End the process and all that it started."""
        if self.process is None:
            return
        with suppress(OSError):  # its own session: see `serve`
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.setting))
        self.process.start()
        theirs.close()


def serve(pipe: Connection, setting: Setting) -> None:
    """The process: parts come in, their rows go out as they are found."""
    with suppress(OSError):
        os.setsid()
    logging.disable(logging.WARNING)  # libraries announce every Trainer
    warnings.simplefilter("ignore")
    if setting.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    while True:
        try:
            target = pipe.recv()
        except EOFError:
            return
        try:
            module, _, function = target.partition(":")
            for row in getattr(importlib.import_module(module), function)(setting):
                pipe.send(("row", row))
            gc.collect()
            if setting.device == "cuda":
                torch.cuda.empty_cache()  # the next part measures how much memory there is
            pipe.send(("done", ""))
        except ModuleNotFoundError as error:
            pipe.send(("left out", f"{error.name} is not installed"))
        except NotHere as error:
            pipe.send(("left out", str(error)))
        except Exception as error:
            lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [""]
            first, last = lines[0], f" … {lines[-1]}" if len(lines) > 1 else ""
            pipe.send(("failed", f"{type(error).__name__}: {first[:200]}{last[:200]}"))


class NotHere(Exception):  # noqa: N818 (nothing went wrong)
    """The machine lacks what a part needs."""
