"""Batches and turns without a server: who goes with whom, who waits, what an error reaches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from talk2dino.serving.batching import Batcher, Budget, in_thread


class Encoder:
    """Notes its batches; gives back what it got; fails at 13; waits for `let` if it is clear."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], int]] = []
        self.let = threading.Event()
        self.let.set()

    def __call__(self, pictures: Sequence[torch.Tensor], side: int) -> list[Any]:
        self.let.wait(10)
        numbers = [int(one) for one in pictures]
        self.batches.append((numbers, side))
        if 13 in numbers:
            raise ValueError("13")
        return [(number, side) for number in numbers]


def run(visit: Callable[[Batcher, Encoder], Awaitable[Any]], **options: Any) -> Encoder:
    async def all_of_it() -> Encoder:
        encoder = Encoder()
        batcher = Batcher(encoder, **options)
        task = asyncio.create_task(batcher.run())
        await asyncio.wait_for(visit(batcher, encoder), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return encoder

    return asyncio.run(all_of_it())


def asked(batcher: Batcher, number: int, side: int = 32) -> asyncio.Task[Any]:
    return asyncio.ensure_future(batcher(torch.tensor(number), side))


def test_batches_by_side_in_order_of_arrival() -> None:
    async def visit(batcher: Batcher, encoder: Encoder) -> None:
        encoder.let.clear()
        first = asked(batcher, 0)
        await asyncio.sleep(0.05)  # it is with the encoder
        rest = [asked(batcher, n, 64 if n in (2, 5) else 32) for n in range(1, 8)]
        await asyncio.sleep(0)
        encoder.let.set()
        found = await asyncio.gather(first, *rest)
        assert found == [(n, 64 if n in (2, 5) else 32) for n in range(8)]

    encoder = run(visit, size=3, seconds=0.001)
    assert encoder.batches == [([0], 32), ([1, 3, 4], 32), ([2, 5], 64), ([6, 7], 32)]


def test_the_first_waits_for_others_but_not_long() -> None:
    async def visit(batcher: Batcher, encoder: Encoder) -> None:
        one = asked(batcher, 1)
        await asyncio.sleep(0.02)
        two = asked(batcher, 2)
        await asyncio.gather(one, two)
        await asked(batcher, 3)

    assert run(visit, seconds=0.2).batches == [([1, 2], 32), ([3], 32)]
    assert run(visit, seconds=0.0).batches == [([1], 32), ([2], 32), ([3], 32)]


def test_an_error_is_the_one_pictures_own_and_the_cancelled_are_left_out() -> None:
    async def visit(batcher: Batcher, encoder: Encoder) -> None:
        encoder.let.clear()
        before = asked(batcher, 0)
        await asyncio.sleep(0.05)
        three = [asked(batcher, n) for n in (12, 13, 14)]
        gone = asked(batcher, 99)
        await asyncio.sleep(0)
        gone.cancel()
        encoder.let.set()
        found = await asyncio.gather(before, *three, return_exceptions=True)
        assert found[0] == (0, 32) and found[1] == (12, 32) and found[3] == (14, 32)
        assert isinstance(found[2], ValueError)

    seen: list[int] = []
    encoder = run(visit, size=8, seconds=0.001, seen=seen.append)
    assert [batch for batch, _ in encoder.batches] == [[0], [12, 13, 14], [12], [13], [14]]
    assert seen == [1, 3, 1, 1, 1]


def test_memory_by_turns() -> None:
    """Never more than there is; the large one is not overtaken for ever; too large runs alone."""
    order: list[str] = []

    async def take(budget: Budget, name: str, size: int) -> None:
        async with budget.take(size):
            order.append(name)
            assert budget.free >= 0
            await asyncio.sleep(0.01)

    async def all_of_it() -> None:
        budget = Budget(10)
        jobs = [("a", 6), ("b", 6), ("c", 1), ("huge", 99), ("d", 3)]
        tasks = [asyncio.create_task(take(budget, *job)) for job in jobs]
        await asyncio.sleep(0.005)
        assert order == ["a"]
        late = asyncio.create_task(take(budget, "never", 9))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(*tasks)
        assert budget.free == 10

    asyncio.run(all_of_it())
    assert order == ["a", "b", "c", "huge", "d"]


def test_who_is_cancelled_waits_for_the_thread() -> None:
    done, begun, let = [], threading.Event(), threading.Event()

    def work(name: str) -> None:
        begun.set()
        let.wait(10)
        done.append(name)

    async def all_of_it() -> None:
        with ThreadPoolExecutor(1) as pool:
            running = asyncio.create_task(in_thread(pool, work, "running"))
            waiting = asyncio.create_task(in_thread(pool, work, "waiting"))
            await asyncio.to_thread(begun.wait)
            waiting.cancel()
            running.cancel()
            await asyncio.sleep(0.05)
            assert waiting.cancelled() and not running.done()
            let.set()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert done == ["running"]

    asyncio.run(all_of_it())
