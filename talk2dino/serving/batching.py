"""Requests that come at the same time: pictures for the encoder in batches, memory by turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

from torch import Tensor

from talk2dino.inference.vocabulary import EncodedPicture

T = TypeVar("T")
Encode = Callable[[Sequence[Tensor], int], list[EncodedPicture]]

_left: ContextVar[Event] = ContextVar("left")  # is set when a thread's caller was cancelled


class LeftError(Exception):
    """Nobody waits for the result any more."""


def stop_if_left(*_: object) -> None:
    """End a function of `in_thread` whose caller was cancelled; long ones call it between steps.

    Raises:
        LeftError: it was.
    """
    left = _left.get(None)
    if left is not None and left.is_set():
        raise LeftError


async def in_thread(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a thread; a caller that is cancelled still waits until it has ended.

    So whatever the caller holds meanwhile (memory, its place in the queue) is not given away while
    the thread goes on. A function that has not begun does not begin then, and one that asks
    `stop_if_left` ends there. What it says is heard where the caller listens (`errors.listening`).
    """
    context, left = copy_context(), Event()
    context.run(_left.set, left)
    running = pool.submit(context.run, function, *arguments)
    waiting = asyncio.wrap_future(running)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        left.set()
        if not running.cancel():
            with suppress(Exception):
                await waiting
        raise


class Budget:
    """Bytes that requests may take together; first come, first served.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = self.free = most
        self._line, self._given_back = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Wait until `size` bytes are free, at most all of them, and hold them meanwhile."""
        size = min(size, self.most)
        async with self._line:
            while self.free < size:
                self._given_back.clear()
                await self._given_back.wait()
            self.free -= size
        try:
            yield
        finally:
            self.free += size
            self._given_back.set()


@dataclass(frozen=True, eq=False)
class _Waiting:
    pixels: Tensor
    side: int
    answer: asyncio.Future[EncodedPicture]


class Batcher:
    """Pictures that wait for the encoder; those with windows of one size go together.

    Args:
        encode: `encode(pictures [3, H, W] uint8 each, short side)` gives one result per picture,
            the same as for each alone.
        size: most pictures of a batch; 1 encodes one at a time.
        seconds: how long the first picture of a batch waits for others.
        seen: is told the size of every batch.
    """

    def __init__(
        self,
        encode: Encode,
        size: int = 8,
        seconds: float = 0.005,
        seen: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.encode, self.size, self.seconds, self.seen = encode, size, seconds, seen
        self._line: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encoder")

    async def __call__(self, pixels: Tensor, side: int) -> EncodedPicture:
        """Encode a picture at a working size; one whose caller is cancelled is left out."""
        answer: asyncio.Future[EncodedPicture] = asyncio.get_running_loop().create_future()
        self._line.append(_Waiting(pixels, side, answer))
        self._changed.set()
        return await answer

    async def run(self) -> None:
        """Form batches, until cancelled; the one that is being encoded then is finished."""
        try:
            while True:
                for waiting in (batch := await self._next()):
                    self._line.remove(waiting)
                await self._answer(batch)
        finally:
            self._thread.shutdown()

    async def _next(self) -> list[_Waiting]:
        """The first that waits and those that fit to it, when they are enough or late enough."""
        clock = asyncio.get_running_loop().time
        latest = None
        while True:
            self._changed.clear()
            self._line = [one for one in self._line if not one.answer.done()]
            batch = [one for one in self._line if one.side == self._line[0].side][: self.size]
            if not batch:
                latest = None
            elif latest is None:
                latest = clock() + self.seconds
            left = None if latest is None else latest - clock()
            if len(batch) == self.size or (left is not None and left <= 0):
                return batch
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        self.seen(len(batch))
        side = batch[0].side
        pictures = [one.pixels for one in batch]
        try:
            results = await in_thread(self._thread, self.encode, pictures, side)
        except Exception as error:
            if len(batch) > 1:  # which of them it was shows when each goes alone
                for one in batch:
                    await self._answer([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            if not one.answer.done():
                one.answer.set_result(result)
