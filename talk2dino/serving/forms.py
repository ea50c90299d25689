"""The fields of `/segment` and `/embed`: what they mean, or in a line what is wrong."""

from __future__ import annotations

import difflib
import json
import json.scanner
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_origin

from fastapi import Form, HTTPException, Request, UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from starlette.datastructures import UploadFile as Uploaded

from talk2dino.datasets.benchmarks.classes import check_word, composed, typed_classes
from talk2dino.errors import DataError, check_number
from talk2dino.inference.exemplars import Exemplar

WordsField = Annotated[
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
    classes: WordsField = None
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
    minimum_area: int = Field(1, ge=0, description="pixels; smaller connected areas are left out")
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


_TEXT: dict[str, Any] = {"type": "string"}
_WORDS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_CLASSES: dict[str, Any] = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _WORDS},
        {"type": "object", "additionalProperties": _WORDS},
        {"type": "null"},
    ]
}


class EmbedRequest(BaseModel):
    """Body of `POST /embed`."""

    model_config = ConfigDict(extra="forbid")

    # elements are checked by `typed_classes`, which stops at the first fault: pydantic notes all
    classes: Annotated[str | list[Any] | dict[str, Any] | None, WithJsonSchema(_CLASSES)] = Field(
        None, description="as in `/segment`", examples=[["cat", ["sofa", "couch"]]]
    )


FIELDS: Mapping[str, type[BaseModel]] = {"/segment": SegmentForm, "/embed": EmbedRequest}
_HINTS = {  # by the kind of pydantic's error, where its own words say less
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
}


async def refuse_unread(request: Request) -> None:
    """Refuse what nothing reads (DataError): fields in the address, all but the last of several."""
    if request.query_params:
        name = next(iter(request.query_params))
        raise DataError(f"{name!r:.60}: stands in the address, where nothing is read; send a field")
    if not request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        try:
            json.loads(await request.body(), object_pairs_hook=read_object)
        except RecursionError as error:  # FastAPI, which reads it first, stands less deep
            raise DataError("body: too many lists in lists; give names and synonyms") from error
        return
    several = {name for name, one in SegmentForm.model_fields.items() if _is_list(one.annotation)}
    for name, count in Counter(key for key, _ in (await request.form()).multi_items()).items():
        if count > 1 and name not in several:
            raise DataError(f"{name}: is there {count} times; send it once")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def what_is_wrong(request: Request, errors: Sequence[Mapping[str, Any]]) -> str:
    """One line for the first field that does not fit: its name, its value, and what to send.

    Args:
        request: that was refused.
        errors: of pydantic.
    """
    first, path = errors[0], request.url.path
    kind, given = first["type"], first.get("input")
    where = [] if kind == "json_invalid" else [str(part) for part in first["loc"][1:]]
    sent = request.headers.get("content-type", "").strip()
    wanted, how = "application/json", "send JSON"
    if path == "/segment":
        wanted, how = "multipart/form-data", "send a form, curl -F image=@cat.jpg -F classes=cat"
    if not sent.lower().startswith(wanted):
        return _sent_as(sent, wanted, how)
    if not where:
        return f"body: {first['msg']}"
    name = where[0]
    if kind == "missing":
        return f"{name}: is missing"
    if kind == "extra_forbidden":
        known = list(FIELDS[path].model_fields) if path in FIELDS else []
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{name:.60}: no such field; {fix}"
    if isinstance(given, (UploadFile, Uploaded)):
        return f"{name}: is a file; send its content as text, curl -F '{name}=<FILE'"
    if "UploadFile" in first["msg"]:
        return f"{name}: is text; send a file, curl -F {name}=@FILE"
    hints = [
        _HINTS.get(e["type"], e["msg"].removeprefix("Input should be "))
        for e in errors
        if e["loc"][1:2] == first["loc"][1:2]
    ]
    return f"{name}={given!r:.60}: give {' or '.join(dict.fromkeys(hints))}"


def _sent_as(kind: str, wanted: str, how: str) -> str:
    return f"Content-Type: {kind[:60] or 'is missing'}; {how}, as {wanted}"


SLOWLY = 1 << 20  # bytes of JSON, from which on it is read a value at a time


class _Patient(json.JSONDecoder):
    """Reads as Python does without its C library, which lets no other thread run until it is done.

    So the service answers others meanwhile; long texts, such as pictures, take no longer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def read_body(content: bytes, kind: str) -> dict[str, Any]:
    """The object of JSON that a body is; for a thread, since pictures may be in it.

    Args:
        content: the body.
        kind: its `Content-Type`.

    Raises:
        DataError: not said to be JSON, none, or not an object.
        HTTPException: letters that cannot be decoded, or too many lists in lists (400).
    """
    sent = kind.strip()
    if not sent.lower().startswith("application/json"):
        raise DataError(_sent_as(sent, "application/json", "send JSON"))
    try:
        found = json.loads(content, cls=_Patient if len(content) > SLOWLY else None)
    except (UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, "There was an error parsing the body") from error
    except ValueError as error:
        raise DataError(f"body: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"body: {type(found).__name__}; give an object, {{…}}")
    return found


def requested_words(text: str, key: str = "classes") -> dict[str, tuple[str, ...]]:
    """Names and the words that stand for them, see `Service.words`; `key` is the field's.

    Raises:
        ConfigError: no class, or one that is named twice.
        DataError: JSON that cannot be read.
    """
    given: Any = text
    if text.lstrip().startswith(("[", "{", '"')):
        try:
            given = json.loads(text, object_pairs_hook=read_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{key}: not JSON ({error})") from error
        given = [given] if isinstance(given, str) else given
    return typed_classes(given, key)


def read_negatives(text: str) -> tuple[str, ...]:
    """The words of a request that count as background, synonyms among them."""
    found = requested_words(text, "negatives")
    return tuple(dict.fromkeys(word for words in found.values() for word in words))


def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        DataError: a name that stands twice, of which JSON's readers keep the last.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DataError(f"JSON: the name {name!r:.60} stands twice; leave one out")
        found[name] = value
    return found


def brought_exemplars(
    names: Sequence[str], images: Sequence[bytes], masks: Sequence[bytes], weight: float
) -> dict[str, tuple[Exemplar, ...]]:
    """The exemplars of a request by class; `names`, `images` and `masks` go together.

    Raises:
        DataError: not as many of each, or a name that is none.
        ConfigError: a weight out of its range.
    """
    check_number("exemplar_weight", weight, 0.0, 1.0)
    counts = f"{len(names)} exemplar_classes, {len(images)} exemplar_images, {len(masks)}"
    if not len(names) == len(images) == len(masks):
        raise DataError(f"{counts} exemplar_masks: give a picture and a mask for each name")
    found: dict[str, tuple[Exemplar, ...]] = {}
    for name, image, mask in zip(map(composed, names), images, masks, strict=True):
        check_word(name, "exemplar_classes")
        found[name] = (*found.get(name, ()), Exemplar(image, mask, weight))
    return found
