"""What every request passes: token, queue, size and time; and the counters of `/metrics`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # needs no token to be read
LARGE = ("/predict", "/webhook")  # JSON that may be as large as pictures: tasks, annotations
JSON = 1 << 20  # bytes of other JSON
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Metrics:
    """The figures that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "talk2dino_requests", "Answered requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "talk2dino_request_seconds",
            "From the first byte of a request to the end of its answer",
            ["path"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.open = Gauge(
            "talk2dino_open_requests", "Requests in the queue or at work", registry=self.registry
        )
        self.batches = Histogram(
            "talk2dino_batch_pictures",
            "Pictures that the encoder got together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )


class RefusedError(Exception):
    """A request that goes no further.

    Args:
        status: of HTTP.
        detail: one line.
        headers: besides the usual ones.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


class _GoneError(Exception):
    """The client hung up."""


@dataclass(frozen=True)
class Rules:
    """What `Gate` lets through.

    Attributes:
        body: bytes of a request; JSON other than Label Studio's tasks may have a megabyte.
        timeout: seconds from its first byte to its answer.
        queue: POST requests at a time; one whose time is up counts until its thread has ended.
        token: that every request but reading `/health` must bring, as a bearer or as the password
            of basic authentication; None for none. Then only requests to a local name are answered,
            so that no web page reads answers through a name of its own (DNS rebinding).
        names: the local names.
    """

    body: int
    timeout: float
    queue: int
    token: str | None = None
    names: Collection[str] = LOCAL


class Gate:
    """An ASGI application around another.

    Bodies are read here, whole: the application gets what is within the limits. One that takes too
    long, or whose client has gone, is cancelled.

    Args:
        app: answers.
        rules: limits and token.
        metrics: counts.
        paths: that are counted by name; others count as one.
    """

    def __init__(self, app: App, rules: Rules, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self.paths = frozenset(paths)
        self._tasks: set[asyncio.Task[None]] = set()  # of POST requests
        self._open = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # as others count clients that hung up

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_sender(scope)
            if scope["method"] == "POST":
                await self._post(scope, receive, counted, started)
            else:
                head = {"method": "GET"} if scope["method"] == "HEAD" else {}  # uvicorn cuts bodies
                await self.app({**scope, **head}, receive, counted)
        except RefusedError as refused:
            await _refuse(counted, refused)
        except _GoneError:
            pass
        except Exception:
            if status == 499:  # nothing was answered; uvicorn does
                status = 500
                raise
            logging.getLogger("uvicorn.error").exception("%s %s", scope["method"], scope["path"])
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def idle(self) -> None:
        """Wait for what goes on behind requests whose time was up."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_sender(self, scope: Message) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.rules.token is None:
            name = headers.get(b"host", "")
            known = self.rules.names
            if name.rpartition(":")[0] not in known and name not in known:
                names = ", ".join(dict.fromkeys(known))
                raise RefusedError(421, f"without a token only {names} are answered")
        elif scope["path"] not in OPEN or scope["method"] not in ("GET", "HEAD"):
            brought = _token(headers.get(b"authorization", ""))
            if not hmac.compare_digest(brought.encode(), self.rules.token.encode()):
                ways = {"WWW-Authenticate": 'Basic realm="talk2dino"'}  # which browsers ask for
                raise RefusedError(401, "the token is missing or another", ways)

    async def _post(self, scope: Message, receive: Receive, send: Send, started: float) -> None:
        """Hand the body to the application and wait for the answer, within the limits."""
        if self._open >= self.rules.queue:
            raise RefusedError(429, "too many requests at a time; try again", {"Retry-After": "1"})
        begun = False

        async def in_time(message: Message) -> None:
            nonlocal begun
            if waited_for:
                begun = True
                await send(message)

        self._entered(1)
        task: asyncio.Task[None] | None = None
        waited_for = True
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.rules.timeout)
            _refuse_broken_form(scope, body)
            task = asyncio.create_task(self._application(scope, body, in_time))
            del body  # the application alone holds it
        except asyncio.TimeoutError:
            raise self._late("was not complete") from None
        finally:
            if task is None:
                self._entered(-1)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        gone = asyncio.ensure_future(receive())  # says nothing more until the client hangs up
        try:
            left = max(started + self.rules.timeout - time.perf_counter(), 0)
            await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            elif gone.done() or begun:
                raise _GoneError
            else:
                raise self._late("was not answered")
        finally:
            waited_for = False
            gone.cancel()
            task.cancel()

    async def _application(self, scope: Message, body: bytes | None, send: Send) -> None:
        """Run it with a body that is there already, and is forgotten once it was handed over."""

        async def receive() -> Message:
            nonlocal body
            if body is None:
                await asyncio.get_running_loop().create_future()  # until the task ends
            given, body = body, None
            return {"type": "http.request", "body": given, "more_body": False}

        await self.app(scope, receive, send)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._entered(-1)
        if not task.cancelled():
            task.exception()  # is raised where the answer is awaited, if anybody does

    def _entered(self, step: int) -> None:
        self._open += step
        self.metrics.open.set(self._open)

    def _late(self, what: str) -> RefusedError:
        return RefusedError(408, f"the request {what} within {self.rules.timeout:g} s")

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body; RefusedError if it is too large, _GoneError if the client hung up."""
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        form = headers.get(b"content-type", b"").strip().lower().startswith(b"multipart/")
        most = self.rules.body if form or scope["path"] in LARGE else min(JSON, self.rules.body)
        parts: list[bytes] = []
        size = int(declared[:18]) if declared.isdigit() else 0
        read = 0
        while True:
            if max(size, read) > most:
                key = " (max_upload_mb)" if most == self.rules.body else ""
                raise RefusedError(413, f"more than {most} bytes{key}; send less")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            read += len(parts[-1])
            if not message.get("more_body", False) and read <= most:
                return b"".join(parts)


def _refuse_broken_form(scope: Message, body: bytes) -> None:
    """Refuse a form without its last line (RefusedError): a field would be lost in silence."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    found = re.match(rb"\s*multipart/.*;\s*boundary=\"?([^\";]+)", kind, re.IGNORECASE)
    if found and body and b"--" + found[1].strip() + b"--" not in body:
        raise RefusedError(400, "the form breaks off: its last line, --BOUNDARY--, is missing")


def _token(authorization: str) -> str:
    """What a header `Authorization` brings; empty if it is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(value, validate=True).decode(errors="replace")
        except (binascii.Error, ValueError):
            return ""
        return pair.partition(":")[2]
    return ""


async def _refuse(send: Send, refused: RefusedError) -> None:
    content = json.dumps({"detail": refused.detail}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    headers |= refused.headers
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
