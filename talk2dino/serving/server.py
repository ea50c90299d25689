"""The routes, their OpenAPI description, and the server that runs them until it is told to end."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from itertools import accumulate
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import talk2dino
from talk2dino.annotations.base import Options
from talk2dino.annotations.coco_instances import coco_annotation, coco_categories, coco_image
from talk2dino.errors import ConfigError, UserError, listening
from talk2dino.inference.result_files import figures
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.segmentation.overlay import label_picture
from talk2dino.serving.forms import (
    EmbedRequest,
    Filled,
    brought_exemplars,
    read_body,
    read_negatives,
    refuse_unread,
    what_is_wrong,
)
from talk2dino.serving.gate import Gate, Metrics, Rules
from talk2dino.serving.ml_backend import MLBackend
from talk2dino.serving.service import Service, TooLargeError, Wanted


class Routes:
    """What the paths do.

    Args:
        service: segments.
        backend: speaks Label Studio's protocol.
        metrics: are shown.
        model: its name, for `/health`.
    """

    def __init__(
        self, service: Service, backend: MLBackend, metrics: Metrics, model: str = ""
    ) -> None:
        self.service, self.backend, self.metrics, self.model = service, backend, metrics, model

    async def segment(self, form: Filled, request: Request) -> Response:
        """Find the classes in a picture.

        JSON is a COCO data set of this picture, with run lengths as pycocotools takes them and a
        `score` for each annotation; `figures` says index, share and color of every class, and
        `warnings` where the result says less than it seems to (of a PNG, JSON in a header).

        Exemplars show classes in pictures with masks, beside `classes` or instead of them.
        """
        await refuse_unread(request)
        self.service.check_length(form.negatives or "", "negatives")
        weight = form.exemplar_weight
        exemplars = brought_exemplars(
            [name for names in form.exemplar_classes for name in names.split(",")],
            [await one.read() for one in form.exemplar_images],
            [await one.read() for one in form.exemplar_masks],
            self.service.exemplar_weight if weight is None else weight,
        )
        wanted = Wanted(
            self.service.words(form.classes, bool(exemplars)),
            form.background,
            form.pamr,
            form.short_side,
            read_negatives(form.negatives) if form.negatives else (),
            exemplars,
        )
        options = Options(instances=form.instances, minimum_area=form.minimum_area)
        content = await form.image.read()
        with listening() as said:
            async with self.service.segmented(content, wanted) as result:
                name = form.image.filename or "image"
                given = (result, form.output, name, options, said)
                made, kind = await self.service.call(_answer, *given)
        told = {"Talk2DINO-Warnings": in_header(said)} if said and kind == PNG else None
        return Response(made, media_type=kind, headers=told)

    async def embed(self, body: EmbedRequest, request: Request) -> Response:
        """Vectors of classes in the space of the patch tokens: unit rows, one per word.

        The word of a class that is only shown by exemplars is empty.
        """
        await refuse_unread(request)
        given = body.classes
        if isinstance(given, (list, dict)):
            given = json.dumps(given, ensure_ascii=False)
        classes = self.service.words(given)
        self.service.check_words(classes, ())
        with listening() as said:
            made = await self.service.call(self.service.embed, classes)
        words, vectors = made.words, made.rows.tolist()
        rows = [
            {"class": name, "word": word, "vector": row}
            for name, word, row in zip(words.row_names, words.row_words, vectors, strict=True)
        ]
        return JSONResponse({"width": made.rows.shape[1], "rows": rows, "warnings": said})

    async def health(self) -> dict[str, Any]:
        """Whether the service answers."""
        return {
            "status": "UP",
            "model_class": type(self.service.model).__name__,
            "model": self.model,
            "version": talk2dino.__version__,
        }

    async def metrics_text(self) -> Response:
        """Figures in Prometheus form."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def setup(self, request: Request) -> dict[str, Any]:
        """Label Studio: a project says its labeling setup."""
        made: dict[str, Any] = await self.service.call(
            self.backend.setup, await self._sent(request)
        )
        return made

    async def versions(self) -> dict[str, Any]:
        """Label Studio: the versions of the model, which are one."""
        return {"versions": [self.backend.version]}

    async def predict(self, request: Request) -> Response:
        """Label Studio: pre-annotations of tasks."""
        made = await self.backend.predict(await self._sent(request))
        return Response(await self.service.call(json.dumps, made), media_type="application/json")

    async def webhook(self) -> dict[str, Any]:
        """Label Studio: something was annotated; nothing is learned from it, so it is not read."""
        return {"status": "ok", "result": None}

    async def _sent(self, request: Request) -> dict[str, Any]:
        """What Label Studio sent, read in a thread."""
        given = (await request.body(), request.headers.get("content-type", ""))
        found: dict[str, Any] = await self.service.call(read_body, *given)
        return found


def _answer(
    result: SegmentedImage, output: str, name: str, options: Options, said: list[str]
) -> tuple[bytes, str]:
    """The content of an answer and its type."""
    if output != "json":
        labels = label_picture(result.labels, classes=len(result.classes))
        file = BytesIO()
        (labels if output == "labels" else result.overlay()).save(file, "PNG")
        return file.getvalue(), PNG
    picture, categories = result.annotated(name, options)
    made = {
        "images": [coco_image(picture, 1)],
        "categories": coco_categories(categories),
        "annotations": [
            coco_annotation(picture, one, number, 1, options)
            for number, one in enumerate(picture.annotations, 1)
        ],
        "figures": figures(result),
        "warnings": said,
    }
    return json.dumps(made).encode(), "application/json"


def in_header(said: Sequence[str]) -> str:
    """Warnings as JSON that proxies let through: at most `HEADER` bytes."""
    ends = list(accumulate(len(json.dumps(one)) + 2 for one in said))
    count = len(said) if ends[-1:] <= [HEADER] else bisect_right(ends, HEADER - 30)
    left = [f"and {len(said) - count} more"] if count < len(said) else []
    return json.dumps([*said[:count], *left])


PNG = "image/png"
OBJECT = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
HEADER = 2000  # nginx takes four to eight kilobytes for all headers together
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "the token is missing or another"},
    408: {"description": "not complete, or not answered, in time"},
    413: {"description": "too many bytes, pixels, words or exemplars"},
    422: {"description": "a picture, words or options that cannot be used; `detail` says why"},
    429: {"description": "the queue is full"},
    500: {"description": "a fault of the service, which its log tells"},
    503: {"description": "not enough memory"},
}


def build_app(routes: Routes, rules: Rules) -> Gate:
    """The application: routes, errors as one line of JSON, limits around all."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with routes.service.running():
            yield
            await gate.idle()

    app = FastAPIOffline(
        title="talk2dino",
        version=talk2dino.__version__,
        description="Segment a picture into classes that are named in words.",
        servers=[{"url": "."}],  # from the description itself, as the links of its page: a proxy
        docs_url=None,  # may lead here below a path of its own
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # a client that does not follow would take nothing for an answer
    )
    files = "static-offline-docs"
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="talk2dino",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},
    )

    async def docs() -> Response:
        return page

    app.add_api_route("/docs", docs, include_in_schema=False)
    png: dict[str, Any] = {"content": {"image/png": {}, "application/json": {}}}
    post: dict[str, Any] = {"methods": ["POST"], "responses": ERRORS}
    get: dict[str, Any] = {"methods": ["GET"], "responses": {401: ERRORS[401]}}
    app.add_api_route("/segment", routes.segment, **post | {"responses": {200: png, **ERRORS}})
    app.add_api_route("/embed", routes.embed, **post)
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics_text, **get)
    app.add_api_route("/", routes.health, include_in_schema=False, **get)
    app.add_api_route("/versions", routes.versions, tags=["Label Studio"], **get)
    for path, route in (
        ("/setup", routes.setup),
        ("/predict", routes.predict),
        ("/webhook", routes.webhook),
    ):
        sent = None if path == "/webhook" else {"requestBody": OBJECT}
        app.add_api_route(path, route, tags=["Label Studio"], openapi_extra=sent, **post)

    async def said(request: Request, error: Exception) -> Response:
        return _error(413 if isinstance(error, TooLargeError) else 422, str(error))

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _error(422, what_is_wrong(request, error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        fix = {404: "/docs describes the paths", 405: f"send {(error.headers or {}).get('Allow')}"}
        more = (
            f" ({request.url.path:.100}; {fix[error.status_code]})"
            if error.status_code in fix
            else ""
        )
        return _error(error.status_code, f"{error.detail}{more}", error.headers)

    async def failed(request: Request, error: Exception) -> Response:
        # PyTorch says it in a class or in words of its own for each device
        if re.search("(?i)MemoryError|(out of|enough|allocate) memory", repr(error)):
            return _error(503, "not enough memory for this request; send smaller pictures")
        return _error(500, "the service failed; its log tells why")

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(UserError, said)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    gate = Gate(app, rules, routes.metrics, paths)
    return gate


def _error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """One line, whatever letters a client sent."""
    content = json.dumps({"detail": " ".join(detail.split())[:2000]})
    return Response(content, status, headers, "application/json")


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can reach before `answer_requests` listens.

    Raises:
        ConfigError: no such host or port, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"host={host:.200} port={port}: cannot be opened ({error})") from error
    return opened


class Server(uvicorn.Server):
    """Says where it listens, and leaves with status 0 when it is told to end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets=sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"http://{shown}:{port}  (Ctrl+C ends it; /docs describes it)", flush=True)


def answer_requests(app: Gate, opened: socket.socket, timeout: float) -> None:
    """Answer requests until SIGTERM or Ctrl+C; what is running then is finished.

    Args:
        app: from `build_app`.
        opened: from `bind`.
        timeout: seconds that a request may take.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout) + 5,
    )
    # uvicorn raises the signal again when all is done: then it shall end nothing.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[opened])
