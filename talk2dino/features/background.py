"""One thing done behind the main thread's back, with its errors brought to light."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs one call at a time in a thread; the next one waits for the last.

    Leaving the context waits too, so that nothing is cut off by an error of the main thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._last: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def run(self, call: Callable[[], None]) -> None:
        """Start `call` after the last one; raises what the last one raised."""
        self.wait()
        self._last = self._pool.submit(call)

    def wait(self) -> None:
        """Wait for the last call; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
