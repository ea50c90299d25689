"""Label Studio's protocol for models: pre-annotations by the words of the labeling setup."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit
from xml.etree.ElementTree import Element, ParseError

import httpx
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from talk2dino.annotations.base import Options
from talk2dino.annotations.labelstudio import prediction
from talk2dino.datasets.benchmarks.classes import BACKGROUND, composed, parted, refuse_typo
from talk2dino.errors import ConfigError, DataError, UserError
from talk2dino.files import user_path
from talk2dino.inference.segmented import background_threshold
from talk2dino.serving.service import Service, TooLargeError, Wanted

log = logging.getLogger(__name__)

LOCAL_FILES = "/data/local-files/"
SETUP = 1 << 20  # characters of a labeling setup
HOPS = 3  # redirects that are followed, to hosts that are allowed
_SETTINGS = ("model_background", "model_instances", "model_minimum_area")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0", "")


@dataclass(frozen=True)
class Control:
    """`BrushLabels` of a labeling setup.

    Attributes:
        name: of the control.
        to_name: of the `Image` that it labels.
        key: under which a task's data holds the address of the picture.
        words: labels and what is looked for.
        background: as `Talk2DINO.segment` takes it.
        options: how masks are cut out.
    """

    name: str
    to_name: str
    key: str
    words: Mapping[str, tuple[str, ...]]
    background: bool | float
    options: Options


def read_controls(setup: object, most: int = 256) -> list[Control]:
    """The brushes of a labeling setup.

    `<Label value="Car" predicted_values="car,truck"/>` says the words of a label, which is its own
    word otherwise. `<BrushLabels … model_background="0.5" model_instances="true"
    model_minimum_area="50">` says the score of the background (`true`: the model's own, which is
    the default; `false`: every pixel gets a label), and whether connected areas are regions.

    Args:
        setup: XML.
        most: labels of a control, and controls.

    Raises:
        TooLargeError: more of them, or XML of more than a megabyte.
        DataError: no XML, without `BrushLabels` for an `Image`, a label that is there twice, or an
            attribute that is nearly one of these.
        ConfigError: an attribute out of its range.
    """
    if not isinstance(setup, str) or not setup.strip():
        raise DataError("label_config: a labeling setup is missing")
    if len(setup) > SETUP:
        raise TooLargeError(f"label_config: {len(setup)} characters; give at most {SETUP}")
    try:
        root: Element = fromstring(setup, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, RecursionError) as error:
        raise DataError(f"label_config: not the XML of a labeling setup ({error})") from error
    images = {one.get("name", ""): one.get("value", "") for one in root.iter("Image")}
    brushes = root.iter("BrushLabels")
    found = [b for b in brushes if images.get(b.get("toName", ""), "").startswith("$")]
    for number, one in enumerate(found, 1):  # of nested ones each holds the labels of all within
        if max(number, sum(1 for _ in one.iter("Label"))) > most:
            raise TooLargeError(f"label_config: more than {most} labels; leave some out")
    if not found:
        raise DataError(
            'label_config: holds no <BrushLabels toName="…"> of an <Image value="$…">, which is '
            "what this model fills"
        )
    return [_control(one, images[one.get("toName", "")]) for one in found]


def _control(tag: Element, value: str) -> Control:
    words: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    where = f"label_config: <BrushLabels name={tag.get('name')!r}>"
    refuse_typo(tag.attrib, _SETTINGS, where)
    for label in tag.iter("Label"):
        name = label.get("value", "")
        refuse_typo(label.attrib, ("predicted_values",), f"{where} <Label value={name!r:.60}>")
        if composed(name) in taken:
            raise DataError(f"{where} has the label {name!r:.60} twice; leave one out")
        taken.add(composed(name))
        words[name] = tuple(parted(label.get("predicted_values", ""), ",;")) or (name,)
    if not words or not all(name.strip() for name in words):
        raise DataError(f"{where} has no labels, or one without a value")
    background = tag.get("model_background", "false" if BACKGROUND in words else "true").lower()
    area = tag.get("model_minimum_area", "1")
    if not area.isdecimal() or len(area) > 9:
        raise ConfigError(f"{where} model_minimum_area={area[:40]!r}: give a number of pixels")
    score: bool | float | None = background in _YES
    if background not in (*_YES, *_NO):
        try:
            score = background_threshold(float(background))
        except (ValueError, ConfigError) as error:
            raise ConfigError(
                f"{where} model_background={background[:40]!r}: give true, false or a score 0..1"
            ) from error
    instances = tag.get("model_instances", "false").lower()
    if instances not in (*_YES, *_NO):
        raise ConfigError(f"{where} model_instances={instances[:40]!r}: give true or false")
    options = Options(instances=instances in _YES, minimum_area=int(area))
    names = (tag.get("name", ""), tag.get("toName", ""), value.removeprefix("$"))
    return Control(*names, words, score or False, options)


class TaskPictures:
    """Pictures that tasks name; from nowhere but where the one who started the service says.

    Args:
        hosts: `name` or `name:port` of servers whose pictures are fetched; without a port, that of
            http and https.
        root: folder of Label Studio's local files (its `LOCAL_FILES_DOCUMENT_ROOT`), or None.
        label_studio_url: of Label Studio, for pictures that were uploaded there; allowed, too.
        key: its access token, a personal or a legacy one; sent to that server alone.
        most: bytes of a picture.
        seconds: for fetching one.

    Raises:
        ConfigError: a host that is none, or no such folder.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        root: str | None = None,
        label_studio_url: str | None = None,
        key: str | None = None,
        most: int = 20 << 20,
        seconds: float = 30,
    ) -> None:
        self.most, self.seconds, self.key = most, seconds, key
        self._access: str | None = None  # what a personal access token gave, for minutes
        self.hosts = {place for host in hosts for place in _places(host)}
        self.home = None if label_studio_url is None else _address(label_studio_url)
        if label_studio_url is not None and (self.home is None or not self.home.host):
            raise ConfigError(f"label_studio_url={label_studio_url}: give http://HOST:PORT")
        if self.home is not None:
            self.hosts.add(_place(self.home))
        self.root = None if root is None else user_path(root).resolve()
        if self.root is not None and not self.root.is_dir():
            raise ConfigError(f"image_root={root}: no such folder")

    async def read(self, source: object) -> bytes:
        """The bytes of a picture.

        Args:
            source: a data: URL, an address on an allowed host, or a path of Label Studio:
                `/data/local-files/?d=…` below the root, anything else from Label Studio itself.

        Raises:
            DataError: elsewhere, not there, or too large.
        """
        if not isinstance(source, str):
            raise DataError(f"a task's picture is {source!r:.60}; it must be an address")
        if source[:5].lower() == "data:":
            return self._sized(await asyncio.to_thread(_data, source))
        if source.startswith(LOCAL_FILES) and self.root is not None:
            return await asyncio.to_thread(self._local, source, self.root)
        if source.startswith("/") and not source.startswith("//") and self.home is not None:
            return await self._fetch(str(self.home.join(source)))
        return await self._fetch(source)

    def _local(self, source: str, root: Path) -> bytes:
        named = parse_qs(urlsplit(source).query).get("d", [""])[0]
        refused = DataError(f"{source:.200}: no picture below image_root")
        try:
            path = (root / named).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                raise refused
            with path.open("rb") as file:
                return self._sized(file.read(self.most + 1))
        except (OSError, ValueError, RuntimeError) as error:  # loops of links, NUL in a name
            raise refused from error

    async def _fetch(self, source: str) -> bytes:
        async with httpx.AsyncClient(trust_env=False, timeout=self.seconds) as client:
            address = self._allowed(source)
            hops, renewed = HOPS, False
            while hops >= 0:
                headers = {"Accept-Encoding": "identity"}
                ours = self.home is not None and _place(address) == _place(self.home)
                if self.key and ours:
                    bearer = f"Bearer {self._access}" if self._access else None
                    headers["Authorization"] = bearer or f"Token {self.key}"
                try:
                    async with client.stream("GET", address, headers=headers) as answer:
                        if answer.has_redirect_location:
                            address = self._allowed(str(address.join(answer.headers["location"])))
                            hops -= 1
                            continue
                        if answer.status_code == 401 and ours and self.key and not renewed:
                            renewed, self._access = True, await self._renew(client)
                            continue
                        if answer.status_code != 200:
                            which = " (LABEL_STUDIO_API_KEY)" if ours else ""
                            raise DataError(f"{source:.200}: status {answer.status_code}{which}")
                        parts, size = [], 0
                        async for part in answer.aiter_raw():
                            parts.append(part)
                            size += len(part)
                            if size > self.most:
                                break
                        return self._sized(b"".join(parts))
                except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                    raise DataError(f"{source:.200}: {type(error).__name__}") from error
            raise DataError(f"{source:.200}: more than {HOPS} redirects")

    async def _renew(self, client: httpx.AsyncClient) -> str | None:
        """The token that Label Studio gives for a personal access token, as its SDK gets it."""
        address = f"{str(self.home).rstrip('/')}/api/token/refresh/"
        answer = await client.post(address, json={"refresh": self.key})
        found = answer.json() if answer.status_code == 200 else None
        made = found.get("access") if isinstance(found, dict) else None
        return made if isinstance(made, str) else None

    def _allowed(self, source: str) -> httpx.URL:
        address = _address(source)
        if address is None or address.userinfo or _place(address) not in self.hosts:
            raise DataError(
                f"{source:.200}: pictures come as data: URLs, from image_hosts, label_studio_url, "
                "or from below image_root; this is none of them"
            )
        return address

    def _sized(self, content: bytes) -> bytes:
        if len(content) > self.most:
            raise TooLargeError(f"a task's picture has more than {self.most} bytes")
        return content


def _address(text: str) -> httpx.URL | None:
    try:
        address = httpx.URL(text)
    except (httpx.InvalidURL, ValueError, TypeError):
        return None
    return address if address.scheme in ("http", "https") and address.host else None


def _place(address: httpx.URL) -> tuple[str, int]:
    return address.host.lower(), address.port or (443 if address.scheme == "https" else 80)


def _places(host: object) -> list[tuple[str, int]]:
    """What an entry of `image_hosts` allows."""
    found = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d+))?", str(host))
    address = _address(f"http://{host}") if found else None
    if found is None or address is None:
        raise ConfigError(f"image_hosts: {host!r} is no host; write [images.example.org:8080]")
    ports = (80, 443) if found[2] is None else (int(found[2]),)
    return [(address.host.lower(), port) for port in ports]


def _data(source: str) -> bytes:
    """What a data: URL holds (RFC 2397)."""
    head, comma, content = source.partition(",")
    if not comma:
        raise DataError("data: URL without a comma")
    try:
        raw = unquote_to_bytes(content)
        return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw
    except (binascii.Error, ValueError) as error:
        raise DataError(f"data: URL that is not base64 ({error})") from error


class MLBackend:
    """Answers what Label Studio asks of a model.

    Args:
        service: segments.
        pictures: of the tasks.
        version: of the model, noted with each prediction.
    """

    def __init__(self, service: Service, pictures: TaskPictures, version: str) -> None:
        self.service, self.pictures, self.version = service, pictures, version
        self._turns = asyncio.Semaphore(service.limits.batch_size)  # pictures held at a time

    def setup(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`/setup`: a project names its labeling setup.

        Raises:
            DataError: there is nothing in it that this model fills.
        """
        most = self.service.limits.max_words
        for control in read_controls(given.get("schema") or given.get("label_config"), most):
            self.service.check_words(self._classes(control)[0], ())
        return {"model_version": self.version}

    async def predict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`/predict`: a prediction per task, in order.

        Label Studio sends all tasks that were chosen at once, waits 100 seconds, and says nothing
        of what goes wrong. So of more than a batch the first alone is answered, upon which it asks
        for one after the other. A task whose picture cannot be had gets no prediction (an empty
        one would be kept, and never asked for again) and is named in `errors` and in the log; if
        that is all of them, the request is refused.

        Raises:
            UserError: no task, a setup without brushes, or no task that could be done.
        """
        tasks = given.get("tasks")
        if not isinstance(tasks, list) or not tasks:
            raise DataError("tasks: a list of tasks is missing")
        if len(tasks) > self.service.limits.batch_size:
            tasks = tasks[:1]
        most = self.service.limits.max_words
        controls = await self.service.call(read_controls, given.get("label_config"), most)
        working = [asyncio.create_task(self._task(one, controls)) for one in tasks]
        try:
            done = await asyncio.gather(*working)
        finally:
            for one in working:
                one.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        errors = [
            f"task {_number(task)}: {made}"
            for task, made in zip(tasks, done, strict=True)
            if isinstance(made, UserError)
        ]
        for error in errors:
            log.warning("predict: %s", " ".join(error.split()))
        if len(errors) == len(tasks):
            first = next(made for made in done if isinstance(made, UserError))
            raise type(first)("; ".join(errors)[:2000])
        results = [[] if isinstance(made, UserError) else made for made in done]
        return {"results": results} | ({"errors": errors} if errors else {})

    async def _task(self, task: Any, controls: Sequence[Control]) -> dict[str, Any] | UserError:
        """A prediction, or what is wrong."""
        try:
            data = task.get("data") if isinstance(task, dict) else None
            if not isinstance(data, dict):
                raise DataError("has no data")
            made: list[dict[str, Any]] = []
            for control in controls:
                if control.key not in data:
                    raise DataError(f"its data has no {control.key!r:.60}")
                async with self._turns:
                    made.append(await self._regions(data[control.key], control))
        except UserError as error:
            return error
        regions = [
            region | {"id": f"a{number}"}
            for number, region in enumerate((r for one in made for r in one["result"]), 1)
        ]
        scores = [one["score"] for one in made if "score" in one]
        score = sum(scores) / len(scores) if scores else 0.0
        return {"model_version": self.version, "result": regions, "score": score}

    async def _regions(self, source: object, control: Control) -> dict[str, Any]:
        """The prediction of one control."""
        content = await self.pictures.read(source)
        classes, labels = self._classes(control)
        async with self.service.segmented(content, Wanted(classes, control.background)) as result:
            picture, _ = await self.service.call(result.annotated, "image", control.options)
            given = (picture, labels, control.name, control.to_name, self.version)
            made: dict[str, Any] = await self.service.call(prediction, *given)
            return made

    def _classes(self, control: Control) -> tuple[Any, list[str]]:
        """The classes to look for, and the label of each; of class embeddings one per word."""
        kept = self.service.classes
        if kept is None or isinstance(kept, Mapping):
            return self.service.shown(control.words), list(control.words)
        pairs = [(label, word) for label, words in control.words.items() for word in words]
        return kept.select([word for _, word in pairs]), [label for label, _ in pairs]


def _number(task: Any) -> str:
    return f"{task.get('id') if isinstance(task, dict) else task!r}"[:40]
