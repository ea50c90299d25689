"""The routes, their OpenAPI description, and the server that runs them until it is told to end."""

from __future__ import annotations

import json
import math
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from io import BytesIO
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

import talk2dino
from talk2dino.annotations.base import Options
from talk2dino.annotations.coco_instances import coco_annotation, coco_categories, coco_image
from talk2dino.errors import ConfigError, UserError
from talk2dino.inference.outputs import figures
from talk2dino.inference.segmented import SegmentedImage
from talk2dino.segmentation.overlay import label_picture
from talk2dino.serving.brought import brought_exemplars
from talk2dino.serving.gate import Gate, Metrics, Rules
from talk2dino.serving.ml_backend import MLBackend
from talk2dino.serving.service import Service, TooLargeError, Wanted, read_words

Words = Annotated[
    str | None,
    Field(
        description="`cat, sofa; couch`: names separated by commas, synonyms by semicolons; or "
        'JSON, `["cat", ["sofa", "couch"]]` or `{"sofa": ["sofa", "couch"]}`. Those that the '
        "service began with if left out.",
        examples=["cat, sofa; couch"],
    ),
]

T = TypeVar("T")
# the page of the description sends a list that is empty as one empty field
Several = Annotated[list[T], BeforeValidator(lambda given: [one for one in given if one != ""])]

EMPTY: dict[str, Any] = {"example": ""}  # what the page of the description begins with


class SegmentForm(BaseModel):
    """Fields of `POST /segment`."""

    model_config = ConfigDict(extra="forbid")

    image: UploadFile = Field(description="the picture: JPEG, PNG, WebP, TIFF …")
    classes: Words = None
    background: Annotated[float | bool | None, Field(union_mode="left_to_right")] = Field(
        None,
        description="true, or a score 0..1: pixels that no class fits are background",
        json_schema_extra=EMPTY,
    )
    negatives: str | None = Field(
        None,
        description="words that count as background where they win, as `classes`",
        json_schema_extra=EMPTY,
    )
    pamr: bool = Field(True, description="refine the edges")
    short_side: int | None = Field(
        None, description="working size in pixels; smaller is faster", json_schema_extra=EMPTY
    )
    instances: bool = Field(False, description="an annotation per connected area, not per class")
    minimum_area: int = Field(1, ge=0, description="pixels; smaller annotations are left out")
    exemplar_classes: Several[str] = Field(
        [],
        description="classes that are shown: the name of each exemplar, in order; separated by "
        "commas, or the field several times",
    )
    exemplar_images: Several[UploadFile] = Field([], description="a picture for each name")
    exemplar_masks: Several[UploadFile] = Field(
        [],
        description="a mask for each picture, of its size: one channel, 0 outside the class; no "
        "JPEG",
    )
    exemplar_weight: float | None = Field(
        None,
        description="share of the exemplars, 0..1, where a class has words as well",
        json_schema_extra=EMPTY,
    )
    output: Literal["json", "labels", "overlay"] = Field(
        "json", description="JSON, or a PNG: the label map, or the picture with the classes"
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, given: Any) -> Any:
        """The page of the description sends fields that nobody filled; older FastAPI keeps them."""
        kept = given.items() if isinstance(given, dict) else ()
        return {key: value for key, value in kept if value != ""} if kept else given


Filled = Annotated[SegmentForm, Form(media_type="multipart/form-data")]


class EmbedRequest(BaseModel):
    """Body of `POST /embed`."""

    model_config = ConfigDict(extra="forbid")

    classes: str | list[str | list[str]] | dict[str, str | list[str]] | None = Field(
        None, description="as in `/segment`", examples=[["cat", ["sofa", "couch"]]]
    )


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

    async def segment(self, form: Filled) -> Response:
        """Find the classes in a picture.

        JSON is a COCO data set of this picture, with run lengths as pycocotools takes them and a
        `score` for each annotation; `figures` says index, share and color of every class.

        Exemplars show classes in pictures with masks, beside `classes` or instead of them.
        """
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
            tuple(read_words(form.negatives)) if form.negatives else (),
            exemplars,
        )
        options = Options(instances=form.instances, minimum_area=form.minimum_area)
        content = await form.image.read()
        async with self.service.segmented(content, wanted) as result:
            name = form.image.filename or "image"
            made, kind = await self.service.call(_answer, result, form.output, name, options)
        return Response(made, media_type=kind)

    async def embed(self, body: EmbedRequest) -> Response:
        """Vectors of classes in the space of the patch tokens: unit rows, one per word.

        The word of a class that is only shown by exemplars is empty.
        """
        given = body.classes
        text = given if given is None or isinstance(given, str) else json.dumps(given)
        classes = self.service.words(text)
        self.service.check_words(classes, ())
        embed = partial(self.service.model.embed_classes, short_side=self.service.short_side)
        made = await self.service.call(embed, classes)
        names, first = made.words.names, int(made.words.has_negatives)
        rows = [
            {
                "class": None if number < first else names[number - first],
                "word": word,
                "vector": row,
            }
            for number, word, row in zip(
                made.words.row_classes, made.words.row_words, made.rows.tolist(), strict=True
            )
        ]
        return JSONResponse({"width": made.rows.shape[1], "rows": rows})

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

    async def setup(self, body: dict[str, Any]) -> dict[str, Any]:
        """Label Studio: a project says its labeling setup."""
        return self.backend.setup(body)

    async def versions(self) -> dict[str, Any]:
        """Label Studio: the versions of the model, which are one."""
        return {"versions": [self.backend.version]}

    async def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        """Label Studio: pre-annotations of tasks."""
        return await self.backend.predict(body)

    async def webhook(self, body: dict[str, Any]) -> dict[str, Any]:
        """Label Studio: something was annotated; nothing is learned from it."""
        return {"status": "ok", "result": None}


def _answer(result: SegmentedImage, output: str, name: str, options: Options) -> tuple[bytes, str]:
    """The content of an answer and its type."""
    if output != "json":
        labels = label_picture(result.labels, classes=len(result.classes))
        file = BytesIO()
        (labels if output == "labels" else result.overlay()).save(file, "PNG")
        return file.getvalue(), "image/png"
    picture, categories = result.annotated(name, options)
    made = {
        "images": [coco_image(picture, 1)],
        "categories": coco_categories(categories),
        "annotations": [
            coco_annotation(picture, one, number, 1, options)
            for number, one in enumerate(picture.annotations, 1)
        ],
        "figures": figures(result),
    }
    return json.dumps(made).encode(), "application/json"


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "the token is missing or another"},
    408: {"description": "not complete, or not answered, in time"},
    413: {"description": "too many bytes, pixels, words or exemplars"},
    422: {"description": "a picture, words or options that cannot be used; `detail` says why"},
    429: {"description": "the queue is full"},
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
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},
    )
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
        app.add_api_route(path, route, tags=["Label Studio"], **post)

    async def said(request: Request, error: Exception) -> Response:
        return _error(413 if isinstance(error, TooLargeError) else 422, str(error))

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [] if first["type"] == "json_invalid" else first["loc"][1:]
        place = ".".join(map(str, where)) or "body"
        return _error(422, f"{place}: {first['msg']}")

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, str(error.detail), error.headers)

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
    """A socket at an address, which nobody can reach before `serve` listens.

    Raises:
        ConfigError: no such host or port, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port}: a number of 0..65535")
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


def serve(app: Gate, opened: socket.socket, timeout: float) -> None:
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
