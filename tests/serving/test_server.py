"""The service as its clients see it: a real server, real requests, a model without weights."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from talk2dino.inference.exemplars import Exemplar, read_folder
from talk2dino.inference.model import Talk2DINO
from talk2dino.segmentation import KNN
from tests.helpers.encoders import hash_model
from tests.helpers.pipeline import need

httpx = pytest.importorskip("httpx")
need("fastapi_offline", "uvicorn", "prometheus_client", "defusedxml")

from talk2dino.serving import ml_backend, server  # noqa: E402
from talk2dino.serving.forms import SLOWLY, read_body  # noqa: E402
from talk2dino.serving.gate import Gate, Metrics, Rules  # noqa: E402
from talk2dino.serving.ml_backend import MLBackend, TaskPictures, read_controls  # noqa: E402
from talk2dino.serving.server import Routes, Server, bind, build_app, in_header  # noqa: E402
from talk2dino.serving.service import Limits, Service, TooLargeError  # noqa: E402

TOKEN = "a token of 22 letters!"
WORDS = ["cat", ["sofa", "couch"]]
SETUP = (
    '<View><Image name="img" value="$photo"/><BrushLabels name="tag" toName="img">'
    '<Label value="Cat" predicted_values="cat"/><Label value="Sofa" predicted_values="sofa,couch"/>'
    "</BrushLabels></View>"
)
ATTRIBUTES = 'model_background="false" toName'
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def picture(seed: int = 0, size: tuple[int, int] = (40, 64), kind: str = "PNG") -> bytes:
    """Blobs of noise."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def own_threads() -> set[int | None]:
    """Those that a service starts."""
    named = ("encoder", "pictures", "asyncio")
    return {one.ident for one in threading.enumerate() if one.name.startswith(named)}


@contextmanager
def serving(
    model: Talk2DINO,
    token: str | None = None,
    root: Path | None = None,
    classes: Any = None,
    refinement: KNN | None = None,
    **limits: Any,
) -> Iterator[Any]:
    """A client of a service in a thread of this process; it must end within seconds."""
    import uvicorn

    metrics, chosen = Metrics(), Limits(**limits)
    service = Service(model, chosen, classes, 32, metrics.batches.observe, refinement)
    pictures = TaskPictures(root=None if root is None else str(root))
    routes = Routes(service, MLBackend(service, pictures, "tiny"), metrics)
    gate: Gate = build_app(routes, Rules(chosen.body, chosen.timeout, chosen.queue, token))
    server = Server(uvicorn.Config(gate, log_config=None, ws="none", lifespan="on"))
    before = own_threads()
    with bind("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            address = f"http://127.0.0.1:{opened.getsockname()[1]}"
            with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()
    assert own_threads() <= before


@pytest.fixture(scope="module")
def model() -> Talk2DINO:
    made = hash_model()
    made.segment(picture(), WORDS, pamr=True, short_side=32)  # compiles PAMR where Numba is there
    return made


@pytest.fixture(scope="module")
def client(model: Talk2DINO) -> Iterator[Any]:
    most = {"max_megapixels": 1, "max_short_side": 64, "max_words": 8, "max_exemplars": 3}
    with serving(model, max_upload_mb=1, **most) as it:
        yield it


def segment(client: Any, content: bytes, classes: Any = WORDS, **fields: Any) -> Any:
    words = classes if isinstance(classes, str) else json.dumps(classes)
    data = {"classes": words} | {key: str(value) for key, value in fields.items()}
    return client.post("/segment", files={"image": ("a.png", content)}, data=data)


def metric(client: Any, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


class Blocked:
    """Lets the encoder wait: `asked` is set when it was called, `let` goes on."""

    def __init__(self, model: Talk2DINO) -> None:
        self.model, self.encode = model, model._encode
        self.asked, self.let = threading.Event(), threading.Event()

    def __enter__(self) -> Blocked:
        def waiting(*arguments: Any) -> Any:
            self.asked.set()
            assert self.let.wait(20)
            return self.encode(*arguments)

        self.model._encode = waiting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.let.set()
        self.model._encode = self.encode  # type: ignore[method-assign]


def labels_of(answer: dict[str, Any]) -> np.ndarray:
    """Label map of a COCO answer whose annotations cover the picture."""
    size = answer["annotations"][0]["segmentation"]["size"]
    labels = np.full(size, -1)
    for one in answer["annotations"]:
        labels[coco_mask.decode(one["segmentation"]) == 1] = one["category_id"] - 1
    return labels


def test_the_answer_is_what_python_gives(client: Any, model: Talk2DINO) -> None:
    content = picture()
    want = model.segment(content, WORDS, pamr=True, short_side=32)
    answer = segment(client, content)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json()
    coco = want.to_coco("a.png")
    for key in ("images", "categories", "annotations"):
        assert found[key] == coco[key]
    np.testing.assert_array_equal(labels_of(found), want.labels.numpy())
    assert [one["share"] for one in found["figures"]] == list(want.areas().values())
    for output, picture_ in (("labels", want.labels.numpy()), ("overlay", want.overlay())):
        png = segment(client, content, output=output)
        assert png.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(png.content))), picture_)


def test_options_reach_the_model(client: Any, model: Talk2DINO) -> None:
    content = picture(1, kind="JPEG")
    options = {"background": 0.51, "pamr": False, "short_side": 64, "instances": True}
    found = segment(client, content, "cat, sofa; couch", negatives="tree", **options)
    want = model.segment(content, WORDS, 0.51, False, 64, negatives=["tree"])
    assert found.json()["annotations"] == want.to_coco(instances=True)["annotations"]
    assert [one["name"] for one in found.json()["figures"]] == ["background", "cat", "sofa"]
    empty = segment(client, content, background="", negatives="", short_side="").json()
    assert empty["annotations"] == segment(client, content).json()["annotations"]
    mapping = segment(client, content, {"sofa": ["sofa", "couch"]}).json()
    assert mapping["categories"][0]["synonyms"] == ["sofa", "couch"]


def test_what_a_command_would_warn_of_is_answered(client: Any, model: Talk2DINO) -> None:
    """Every time, to the one who asked; and all words of the negatives count."""
    alone = "classes: 'cat' is alone"
    for _ in range(2):  # Python's own filter gives a warning once
        assert segment(client, picture(), '"cat"').json()["warnings"][0].startswith(alone)
    png = segment(client, picture(), "cat", output="labels")
    assert json.loads(png.headers["talk2dino-warnings"])[0].startswith(alone)
    assert "talk2dino-warnings" not in segment(client, picture(), output="labels").headers
    assert segment(client, picture()).json()["warnings"] == []
    several = BytesIO()
    pages = [Image.open(BytesIO(picture(n))).convert("RGB") for n in range(2)]
    pages[0].save(several, "TIFF", save_all=True, append_images=pages[1:])
    found = segment(client, several.getvalue()).json()
    assert found["warnings"] == ["image: holds several pictures; the first is taken"]
    assert found["annotations"] == segment(client, picture()).json()["annotations"]
    dark = segment(client, gray(4095, np.uint16)).json()["warnings"]
    assert dark == ["image: uses 12 of 16 bits, so it is nearly black; stretch its values first"]
    for negatives in ("tree; bush", '{"plant": ["tree", "bush"]}'):
        given = segment(client, picture(), negatives=negatives).json()
        want = model.segment(picture(), WORDS, None, True, 32, negatives=["tree", "bush"])
        assert given["annotations"] == want.to_coco("a.png")["annotations"]


def test_requests_at_once_share_batches_and_get_their_own_results(model: Talk2DINO) -> None:
    """Pictures of other sizes and words go together, other working sizes apart."""
    asked = [(picture(n, (30 + n, 70 - n)), ["cat", f"word {n}"], 64 if n % 4 == 3 else 32)
             for n in range(12)]  # fmt: skip

    def alone(content: bytes, classes: Any, side: int) -> Any:
        return model.segment(content, classes, pamr=True, short_side=side).to_coco("a.png")

    with serving(model, batch_wait_ms=50) as client, ThreadPoolExecutor(12) as pool:
        with Blocked(model) as encoder:  # so that the others wait
            first = pool.submit(segment, client, *asked[0][:2])
            assert encoder.asked.wait(10)
            rest = [pool.submit(segment, client, *a[:2], short_side=a[2]) for a in asked[1:]]
            while metric(client, "talk2dino_open_requests") < 12:
                time.sleep(0.01)
        answers = [one.result().json() for one in (first, *rest)]
        batches = metric(client, "talk2dino_batch_pictures_count")
        assert metric(client, "talk2dino_batch_pictures_sum") == 12 and batches <= 5
    for answer, given in zip(answers, asked, strict=True):
        assert answer["annotations"] == alone(*given)["annotations"]


def test_classes_that_are_shown(tmp_path: Path) -> None:
    """What requests get is what Python gives, also after the files have gone."""
    inside = np.zeros((40, 64), np.uint8)
    inside[:, 30:] = 1
    shown = {}
    for seed, name in enumerate(("Cat", "rust"), 5):  # `Cat` is a label of the setup
        folder = tmp_path / "shown" / name
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(picture(seed))
        Image.fromarray(inside).save(folder / "a_mask.png")
        shown[name] = Exemplar(picture(seed), inside)
    model, one, knn = hash_model(), picture(1), KNN(k=3)
    began = {"sofa": ("sofa", "couch"), **read_folder(tmp_path / "shown")}
    meant = {
        None: {"sofa": ["sofa", "couch"], **shown},
        "rust, moss": {"rust": shown["rust"], "moss": "moss"},
        "rust; stain, Cat": {"rust": ["rust", "stain", shown["rust"]], "Cat": shown["Cat"]},
    }
    with serving(model, classes=began, refinement=knn) as client:
        shutil.rmtree(tmp_path / "shown")
        for asked, classes in meant.items():
            data = {"output": "labels", "pamr": "false"} | ({"classes": asked} if asked else {})
            answer = client.post("/segment", files={"image": ("a.png", one)}, data=data)
            assert answer.status_code == 200, answer.text
            found = np.asarray(Image.open(BytesIO(answer.content)))
            wanted = model.segment(one, classes, short_side=32, refinement=knn)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, wanted.labels.numpy())
        rows = client.post("/embed", json={"classes": ["rust", "moss"]}).json()["rows"]
        assert [row["word"] for row in rows] == ["", "moss"]
        row = torch.tensor(rows[0]["vector"])
        torch.testing.assert_close(row, model.embed_exemplars([shown["rust"]], 32))

        setup = SETUP.replace(' predicted_values="cat"', "").replace("toName", ATTRIBUTES)
        photo = f"data:image/png;base64,{base64.b64encode(one).decode()}"
        asked = {"label_config": setup, "tasks": [{"id": 1, "data": {"photo": photo}}]}
        (made,) = client.post("/predict", json=asked).json()["results"]
    classes = {"Cat": shown["Cat"], "Sofa": ["sofa", "couch"]}
    wanted = model.segment(one, classes, short_side=32, pamr=True, refinement=knn)
    assert len(made["result"]) == len(torch.unique(wanted.labels))


def shown(
    client: Any, names: Any = "rust", masks: Any = (), images: Any = (), **fields: Any
) -> Any:
    """A request that brings exemplars."""
    files = [("image", ("a.png", picture(1)))]
    files += [("exemplar_images", ("b.png", one)) for one in images or [picture(5)]]
    files += [("exemplar_masks", ("c.png", one)) for one in masks or [mask()]]
    data = {"exemplar_classes": names, "pamr": "false", **fields}
    return client.post("/segment", files=files, data=data)


def mask(size: tuple[int, int] = (40, 64), value: int = 1, kind: str = "PNG") -> bytes:
    """The right half."""
    inside = np.zeros(size, np.uint8)
    inside[:, size[1] // 2 :] = value
    file = BytesIO()
    Image.fromarray(inside).save(file, kind)
    return file.getvalue()


def test_exemplars_of_a_request() -> None:
    """They are what `segment` takes, beside words, beside the service's own, and alone."""
    model, one, two, inside = hash_model(), picture(5), picture(6, (30, 50)), mask((30, 50), 255)
    first, second = Exemplar(one, mask()), Exemplar(two, inside)
    ours = Exemplar(picture(7), np.asarray(Image.open(BytesIO(mask()))))
    both = {"images": [one, two], "masks": [mask(), inside]}
    half = Exemplar(one, mask(), 0.25)
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (both | {"names": "rust, moss"}, {"rust": first, "moss": second}),
        (both | {"names": ["rust", "rust"], "background": "true"}, {"rust": [first, second]}),
        (
            {"names": " rust ", "classes": "rust; stain, sky", "exemplar_weight": "0.25"},
            {"rust": ["rust", "stain", half], "sky": "sky"},
        ),
        ({"names": "moss", "short_side": "64"}, {"moss": first}),
    ]
    with serving(model) as client:
        for fields, classes in asked:
            side, background = int(fields.get("short_side", 32)), "background" in fields
            want = model.segment(picture(1), classes, background, short_side=side)
            answer = shown(client, **fields)
            assert answer.status_code == 200, answer.text
            assert answer.json()["annotations"] == want.to_coco("a.png")["annotations"]
            assert list(want.areas()) == [f["name"] for f in answer.json()["figures"]]
        empty = {"exemplar_classes": "", "exemplar_images": "", "exemplar_masks": ""}
        assert segment(client, picture(), **empty).json() == segment(client, picture()).json()
    with serving(model, classes={"rust": (ours,), "sky": ("sky",)}) as client:
        for fields, classes in (
            ({}, {"rust": [ours, first], "sky": "sky"}),
            ({"classes": "sky, rust"}, {"sky": "sky", "rust": [ours, first]}),
        ):
            want = model.segment(picture(1), classes, short_side=32)
            found = shown(client, **fields).json()["annotations"]
            assert found == want.to_coco("a.png")["annotations"]
    kept = model.embed_classes({"rust": ours, "sky": "sky"}, short_side=32)
    with serving(model, classes=kept) as client:
        assert "embedded already" in shown(client).json()["detail"]


def test_embed(client: Any, model: Talk2DINO) -> None:
    found = client.post("/embed", json={"classes": WORDS}).json()
    want = model.embed_classes(WORDS)
    assert [(one["class"], one["word"]) for one in found["rows"]] == [
        ("cat", "cat"), ("sofa", "sofa"), ("sofa", "couch")
    ]  # fmt: skip
    vectors = torch.tensor([one["vector"] for one in found["rows"]])
    assert torch.equal(vectors, want.rows) and found["width"] == want.rows.shape[1]


def test_health_metrics_and_description(client: Any) -> None:
    health = client.get("/health").json()
    assert health["status"] == "UP" and health["model_class"] == "Talk2DINO"
    assert client.get("/").json() == health
    from prometheus_client.parser import text_string_to_metric_families

    segment(client, picture())
    families = {
        one.name: one for one in text_string_to_metric_families(client.get("/metrics").text)
    }
    counted = {
        (s.labels["path"], s.labels["status"]) for s in families["talk2dino_requests"].samples
    }
    assert ("/segment", "200") in counted
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    described = client.get("/openapi.json").json()["paths"]
    assert {"/segment", "/embed", "/health", "/metrics", "/setup", "/predict"} <= described.keys()
    page = client.get("/docs").text
    assert "https://" not in page  # nobody else is asked
    for script in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert client.get(f"/static-offline-docs/{script}").status_code == 200


@pytest.mark.parametrize(
    ("status", "said", "send"),
    [
        (413, "bytes", lambda c: segment(c, bytes(1_400_000))),
        (413, "bytes", lambda c: c.post("/embed", content=iter([bytes(100_000)] * 20))),
        (413, "1200x1000 pixels", lambda c: segment(c, picture(0, (1000, 1200), "JPEG"))),
        (413, "short_side=65", lambda c: segment(c, picture(), short_side=65)),
        (413, "9 words", lambda c: segment(c, picture(), list("abcdefghi"))),
        (413, "9 words", lambda c: c.post("/embed", json={"classes": list("abcdefghi")})),
        (422, "not a picture", lambda c: segment(c, b"GIF89a")),
        (422, "not a picture", lambda c: segment(c, b"")),
        (422, "no picture", lambda c: segment(c, picture()[:-300])),
        (422, "EPS", lambda c: segment(c, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
        (422, "named twice", lambda c: segment(c, picture(), "cat, cat")),
        (422, "at least one", lambda c: segment(c, picture(), " , ")),
        (422, "at least one", lambda c: c.post("/segment", files={"image": picture()})),
        (422, "neither a word", lambda c: segment(c, picture(), [[["cat"]]])),
        (422, "neither a word", lambda c: segment(c, picture(), [1, None])),
        (422, "stands twice", lambda c: segment(c, picture(), '{"a": "b", "a": "c"}')),
        (422, "not JSON", lambda c: segment(c, picture(), "[cat")),
        (422, "not JSON", lambda c: segment(c, picture(), "[" * 1_599)),
        (413, "1601 letters; give at most 1600", lambda c: segment(c, picture(), "[" * 1_601)),
        (413, "more than 1048576 bytes", lambda c: c.post("/embed", json={"classes": "a" * 2**20})),
        (422, "1 is neither a word", lambda c: c.post("/embed", json={"classes": [1] * 300})),
        (422, "half a character", lambda c: segment(c, picture(), ["a\u0000b"])),
        (422, "half a character", lambda c: segment(c, picture(), '["\\ud800"]')),
        (422, "longer than", lambda c: segment(c, picture(), ["x" * 201])),
        (422, "background", lambda c: segment(c, picture(), background="nan")),
        (422, "background", lambda c: segment(c, picture(), background=7)),
        (422, "left over", lambda c: segment(c, picture(), ["background"], background="true")),
        (422, "short_side", lambda c: segment(c, picture(), short_side=-3)),
        (413, "short_side", lambda c: segment(c, picture(), short_side=10**30)),
        (422, "pamr", lambda c: segment(c, picture(), pamr="perhaps")),
        (422, "pamr='5': give true or false", lambda c: segment(c, picture(), pamr=5)),
        (422, "instances='-1': give true or false", lambda c: segment(c, picture(), instances=-1)),
        (422, "negatives: 'rust' is also a class that is shown", lambda c: shown(
            c, "rust", classes="sky", negatives="rust")),
        (422, "model_instances='5': give true or false", lambda c: c.post(
            "/setup", json={"schema": SETUP.replace("toName", 'model_instances="5" toName')})),
        (422, "pmar: no such field; did you mean pamr?", lambda c: segment(
            c, picture(), pmar=True)),
        (422, "threshold: no such field; there are image, classes, background", lambda c: segment(
            c, picture(), threshold=0.5)),
        (422, "background='abc': give a number or true or false", lambda c: segment(
            c, picture(), background="abc")),
        (422, "short_side='32.5': give a whole number", lambda c: segment(
            c, picture(), short_side=32.5)),
        (422, "image: is there 2 times", lambda c: form(c, image(), image(1), words())),
        (422, "classes: is there 2 times", lambda c: form(c, image(), words(), words("dog"))),
        (422, "'background': stands in the address", lambda c: c.post(
            "/segment?background=true", files={"image": picture()}, data={"classes": "cat"})),
        (422, "'classes': stands in the address", lambda c: c.post("/embed?classes=a", json={})),
        (400, "breaks off", lambda c: form(c, image(), words(), end=b"")),
        (400, "breaks off", lambda c: form(c, words(), image()[:-40], end=b"")),
        (400, "boundary", lambda c: form(c, image(), kind="multipart/form-data")),
        (422, "image: is text; send a file", lambda c: form(c, words(), field("image", b"x"))),
        (422, "classes: is a file; send its content as text, curl -F 'classes=<FILE'",
         lambda c: form(c, image(), field("classes", b"cat", "a.txt"))),
        (422, "Content-Type: image/png; send a form", lambda c: form(c, kind="image/png")),
        (422, "Content-Type: is missing; send a form", lambda c: c.post("/segment")),
        (422, "Content-Type: text/plain; send JSON", lambda c: c.post(
            "/embed", content=b"{}", headers={"Content-Type": "text/plain"})),
        (422, "the name 'classes' stands twice", lambda c: c.post(
            "/embed", content=b'{"classes": "a", "classes": "b"}', headers=JSON)),
        (422, "the name 'a' stands twice", lambda c: c.post(
            "/embed", content=b'{"classes": {"a": "b", "a": "c"}}', headers=JSON)),
        (422, "is named twice", lambda c: segment(c, picture(), ["caf\u00e9", "cafe\u0301"])),
        (422, "negatives: 'a' is named twice", lambda c: segment(c, picture(), negatives="a, a")),
        (422, "not JSON", lambda c: segment(c, picture(), '"cat", "dog"')),
        (413, "more than 178956970 pixels", lambda c: segment(c, large_png(60_000))),
        (422, "0..70000; save it with 8 or 16 bits", lambda c: segment(c, gray(70_000, np.int32))),
        (422, "output", lambda c: segment(c, picture(), output="../x")),
        (422, "image: is missing", lambda c: form(c, words())),
        (422, "send a form", lambda c: c.post("/segment", data={"image": "text"})),
        (422, "send a form", lambda c: c.post("/segment", json={"classes": "cat"})),
        (422, "exemplar 1 of 'rust': mask of an exemplar: 41x64", lambda c: shown(
            c, masks=[mask((41, 64))])),
        (422, "exemplar 2 of 'rust'", lambda c: shown(
            c, ["rust", "rust"], [mask(), mask(value=0)], [picture(5)] * 2)),
        (422, "is empty", lambda c: shown(c, masks=[mask(value=0)])),
        (422, "JPEG", lambda c: shown(c, masks=[mask(kind="JPEG")])),
        (422, "one channel", lambda c: shown(c, masks=[picture(5)])),
        (422, "mask of exemplar 1 of 'rust': not a picture", lambda c: shown(c, masks=[b"P5"])),
        (422, "picture of exemplar 1 of 'rust': not", lambda c: shown(c, images=[b"%PDF"])),
        (422, "2 exemplar_classes, 1 exemplar_images, 1", lambda c: shown(c, "rust, moss")),
        (422, "1 exemplar_classes, 0 exemplar_images", lambda c: segment(
            c, picture(), exemplar_classes="rust")),
        (422, "give a text", lambda c: shown(c, " , ", [mask()] * 2, [picture(5)] * 2)),
        (422, "half a character", lambda c: shown(c, "a\u0007")),
        (422, "exemplar_weight=1.5", lambda c: shown(c, exemplar_weight="1.5")),
        (422, "exemplar_images", lambda c: segment(c, picture(), exemplar_images="text")),
        (413, "exemplar_images: 4; give at most 3", lambda c: shown(
            c, "a,b,c,d", [mask()] * 4, [picture(5)] * 4)),
        (413, "1200x1000 pixels", lambda c: shown(c, images=[picture(0, (1000, 1200), "JPEG")])),
        (413, "1200x1000 pixels", lambda c: shown(c, masks=[mask((1000, 1200))])),
        (413, "9 words", lambda c: shown(c, "rust", classes="a,b,c,d,e,f,g,h,i")),
        (400, "breaks off", lambda c: c.post("/segment", content=b"--x\r\nz", headers=MULTIPART)),
        (422, "body", lambda c: c.post("/embed", content=b"{", headers=JSON)),
        (400, "parsing", lambda c: c.post("/embed", content=b'{"classes": "\xff"}', headers=JSON)),
        (400, "", lambda c: c.post("/embed", content=b"[" * 200_000, headers=JSON)),
        (422, "", lambda c: c.post("/embed", json=[])),
        (422, "did you mean classes", lambda c: c.post("/embed", json={"clases": ["cat"]})),
        (422, "half a character", lambda c: c.post("/embed", content=SURROGATE, headers=JSON)),
        (404, "Not Found", lambda c: c.get("/../../etc/passwd")),
        (404, "Not Found", lambda c: c.get("/static-offline-docs/..%2f..%2fcore.py")),
        (405, "Not Allowed (/segment; send POST)", lambda c: c.get("/segment")),
        (404, "Not Found (/segment/; /docs", lambda c: c.post("/segment/")),
        (405, "Not Allowed", lambda c: c.request("PATCH", "/health", content=b"x" * 5000)),
        (421, "without a token", lambda c: c.get("/health", headers={"Host": "evil.example:80"})),
        (422, "tasks", lambda c: c.post("/predict", json={})),
        (422, "tasks", lambda c: c.post("/predict", json={"tasks": {"a": 1}})),
        (422, "body: not JSON (Expec", lambda c: c.post("/predict", content=b"{", headers=JSON)),
        (422, "body: not JSON (Expec", lambda c: c.post(
            "/predict", content=b" " * (1 << 20) + b"{", headers=JSON)),
        (422, "body: list; give an object", lambda c: c.post("/predict", json=[])),
        (422, "Content-Type: is missing; send JSON", lambda c: c.post("/setup", content=b"{}")),
        (422, "Content-Type: text/plain; send JSON", lambda c: c.post(
            "/predict", content=b"{}", headers={"Content-Type": "text/plain"})),
        (400, "parsing", lambda c: c.post("/setup", content=b'{"a": "\xff"}', headers=JSON)),
        (400, "parsing", lambda c: c.post("/setup", content=b"[" * 200_000, headers=JSON)),
        (400, "parsing", lambda c: c.post("/predict", content=b"[" * 1_200_000, headers=JSON)),
        (422, "has no data", lambda c: predict(c, [None])),
        (422, "'photo'", lambda c: predict(c, [{"data": {}}])),
        (422, "must be an address", lambda c: predict(c, [{"data": {"photo": 5}}])),
        (422, "label_config", lambda c: predict(c, [{"data": {}}], "<View/>")),
        (422, "label_config", lambda c: c.post("/setup", json={"schema": "<View>"})),
        (422, "label_config", lambda c: c.post("/setup", json={"schema": BOMB})),
        (422, "label_config", lambda c: c.post("/setup", json={"schema": ["x"]})),
        (422, "did you mean 'model_background'", lambda c: c.post(
            "/setup", json={"schema": SETUP.replace("toName", 'model_backgroud="1" toName')})),
        (422, "did you mean 'predicted_values'", lambda c: c.post(
            "/setup", json={"schema": SETUP.replace("predicted_values", "predicted_value")})),
        (422, "the label 'Cat' twice", lambda c: c.post(
            "/setup", json={"schema": SETUP.replace('"Sofa"', '"Cat"')})),
    ],
)  # fmt: skip
def test_what_is_refused(client: Any, status: int, said: str, send: Callable[[Any], Any]) -> None:
    """One line of JSON, whatever came; and the service goes on."""
    answer = send(client)
    assert answer.status_code == status, answer.text
    detail = answer.json()["detail"]
    assert said in detail and "\n" not in detail and "Traceback" not in detail
    assert client.get("/health").status_code == 200
    assert metric(client, "talk2dino_open_requests") == 0


def field(name: str, content: bytes, file: str = "") -> bytes:
    """A part of a form, as it is sent."""
    more = f'; filename="{file}"' if file else ""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


def image(seed: int = 0) -> bytes:
    return field("image", picture(seed), "a.png")


def words(text: str = "cat") -> bytes:
    return field("classes", text.encode())


def form(client: Any, *parts: bytes, end: bytes = b"\r\n--x--\r\n", kind: str = "") -> Any:
    """Parts put together by hand."""
    headers = {"Content-Type": kind or MULTIPART["Content-Type"]}
    return client.post("/segment", content=b"\r\n".join(parts) + end, headers=headers)


def gray(most: int, kind: Any, rows: int = 40) -> bytes:
    """A TIFF of wide values, `[rows, 64]`."""
    file = BytesIO()
    Image.fromarray(np.linspace(0, most, 64 * rows).astype(kind).reshape(rows, 64)).save(
        file, "TIFF"
    )
    return file.getvalue()


def large_png(side: int) -> bytes:
    """What its header says, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
JSON = {"Content-Type": "application/json"}
SURROGATE = b'{"classes": ["\\ud800"]}'
BOMB = '<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]><View>&d;</View>'


def test_an_upload_that_breaks_off_or_dawdles(model: Talk2DINO) -> None:
    with serving(model, timeout=3) as client:
        address = (client.base_url.host, client.base_url.port)
        head = (
            "POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        with socket.create_connection(address) as slow:
            for _ in range(5):
                with socket.create_connection(address) as connection:
                    connection.sendall(head.encode() + bytes(3000))
            slow.sendall(head.encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert segment(client, picture()).status_code == 200
        assert metric(client, 'talk2dino_requests_total{path="/segment",status="499"}') == 5


def test_full_queue_time_and_clients_that_hang_up(model: Talk2DINO) -> None:
    with serving(model, queue=3, timeout=4) as client, ThreadPoolExecutor(3) as pool:
        with Blocked(model) as encoder:
            waiting = [pool.submit(segment, client, picture(n)) for n in range(2)]
            assert encoder.asked.wait(10)
            with pytest.raises(httpx.ReadTimeout):  # hangs up; what it asked for never begins
                client.post("/segment", files={"image": picture()}, data={"classes": "cat"},
                            timeout=0.3)  # fmt: skip
            while metric(client, "talk2dino_open_requests") != 2:
                time.sleep(0.01)
            waiting.append(pool.submit(segment, client, picture(3)))
            while metric(client, "talk2dino_open_requests") != 3:
                time.sleep(0.01)
            full = segment(client, picture())
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            late = [one.result() for one in waiting]
            assert [one.status_code for one in late] == [408] * 3
            assert "within 4 s" in late[0].json()["detail"]
            assert client.get("/health").status_code == 200
        while metric(client, "talk2dino_open_requests"):
            time.sleep(0.01)
        assert segment(client, picture()).status_code == 200


def test_exemplars_of_a_request_whose_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No further one is looked at, of a request or of the service; and other words do not wait."""
    model, looks, look = hash_model(), list[int](), Talk2DINO._look

    def counted(*given: Any) -> Any:
        looks.append(1)
        return look(model, *given)

    monkeypatch.setattr(model, "_look", counted)
    ours = tuple(Exemplar(picture(n), np.asarray(Image.open(BytesIO(mask())))) for n in range(3))
    several = [picture(n) for n in range(5, 10)]

    def brought(client: Any) -> Any:
        return shown(client, ["rust"] * 5, [mask()] * 5, several, classes="moss")

    def embedded(client: Any) -> Any:
        return client.post("/embed", json={"classes": ["rust", "moss"]})

    model.encode_text("tree")
    for began, ask, every in ((None, brought, 5), ({"rust": ours}, embedded, 3)):
        looks.clear()
        with serving(model, classes=began, timeout=2) as client, Blocked(model) as encoder:
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(ask, client)
                assert encoder.asked.wait(10)
                assert model.embed_classes(["tree"]).rows.shape[0] == 1
                assert late.result().status_code == 408
            assert looks == [1]
            encoder.let.set()
            while metric(client, "talk2dino_open_requests"):
                time.sleep(0.01)
            assert looks == [1]
            assert ask(client).status_code == 200
            assert len(looks) == every  # the first of them was kept


def test_the_token(model: Talk2DINO) -> None:
    with serving(model, token=TOKEN) as client:
        assert client.get("/health").status_code == 200  # probes need none
        basic = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
        for path in ("/metrics", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert client.get(path).status_code == 401
            for right in (f"Bearer {TOKEN}", f"Basic {basic}"):
                assert client.get(path, headers={"Authorization": right}).status_code == 200
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Basic %", TOKEN):
            refused = client.post("/segment", headers={"Authorization": wrong})
            assert refused.status_code == 401 and "Basic" in refused.headers["www-authenticate"]
        task = {"id": 1, "data": {"photo": data_url(picture())}}
        # Label Studio brings the token to these, but not to the webhook that it adds by itself
        for path, body in (
            ("/setup", {"schema": SETUP}),
            ("/predict", {"tasks": [task], "label_config": SETUP}),
            ("/webhook", {"action": "ANNOTATION_CREATED", "project": {"id": 1}}),
        ):
            assert client.post(path, json=body).status_code == 401
            for right in (f"Bearer {TOKEN}", f"Basic {basic}"):
                said = client.post(path, json=body, headers={"Authorization": right})
                assert said.status_code == 200, said.text
        odd = client.post("/predict", headers=[(b"Authorization", b"Bearer \xff\xfe")])
        assert odd.status_code == 401
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert segment(client, picture()).status_code == 200
        assert client.get("/health", headers={"Host": "a.example"}).status_code == 200


def test_what_waits_in_the_queue_has_brought_the_token(model: Talk2DINO) -> None:
    """Reading `/health` needs none, sending to it does."""
    with serving(model, token=TOKEN) as client:
        assert client.head("/health").status_code == 200 and not client.head("/health").content
        assert client.post("/health", content=b"x").status_code == 401
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post("/health", content=b"x", headers=right).status_code == 405


SHORT = "not enough memory for this request; send smaller pictures"


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (RuntimeError("CUDA error"), 500, "the service failed; its log tells why"),
        (MemoryError(), 503, "not enough memory for this request; send smaller pictures"),
        (
            torch.OutOfMemoryError(),
            503,
            "not enough memory for this request; send smaller pictures",
        ),
    ],
)
def test_faults_of_the_service_are_counted_and_told(
    model: Talk2DINO, monkeypatch: pytest.MonkeyPatch, fault: Exception, status: int, said: str
) -> None:
    def broken(*_: Any) -> Any:
        raise fault

    with serving(model) as client:
        with monkeypatch.context() as patch:
            patch.setattr(model, "_encode", broken)
            answer = segment(client, picture())
        assert (answer.status_code, answer.json()) == (status, {"detail": said})
        counted = f'talk2dino_requests_total{{path="/segment",status="{status}"}}'
        assert metric(client, counted) == 1
        assert segment(client, picture()).status_code == 200
        assert metric(client, "talk2dino_open_requests") == 0


def test_exemplars_have_pixels_together(model: Talk2DINO) -> None:
    flat, inside = picture(size=(500, 400)), mask((500, 400))
    with serving(model, max_megapixels=0.21) as client:
        answer = shown(client, ["rust"] * 5, [inside] * 5, [flat] * 5)
        assert answer.status_code == 413
        assert "1 million pixels together; give at most 0.84 million" in answer.json()["detail"]
        masks = shown(client, ["rust"] * 5, [inside] * 5, [picture(5)] * 5)  # are decoded as well
        assert masks.json() == answer.json()
        assert shown(client, ["rust"] * 2, [inside] * 2, [flat] * 2).status_code == 200


def test_warnings_fit_into_a_header() -> None:
    said = [f"classes: {n} \u0441\u043b\u043e\u0432\u043e" for n in range(250)]
    made = in_header(said)
    assert len(made) <= 2000 and json.loads(made)[-1].startswith("and 2")
    assert json.loads(in_header(said[:3])) == said[:3]
    assert json.loads(in_header(["x" * 3000])) == ["and 1 more"]


def test_ending_finishes_what_is_running(model: Talk2DINO) -> None:
    with ThreadPoolExecutor(1) as pool, Blocked(model) as encoder:
        with serving(model) as client:
            other = httpx.Client(base_url=client.base_url, timeout=30)
            waiting = pool.submit(segment, other, picture())
            assert encoder.asked.wait(10)
            threading.Timer(0.5, encoder.let.set).start()
        assert waiting.result().status_code == 200  # the service has ended
        with pytest.raises(httpx.ConnectError):
            other.get("/health")


def predict(client: Any, tasks: list[Any], setup: str = SETUP) -> Any:
    """As Label Studio asks."""
    asked = {"tasks": tasks, "label_config": setup, "project": "1.17", "params": {"context": None}}
    return client.post("/predict", json=asked)


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_others_are_answered_while_tasks_are_read(
    model: Talk2DINO, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, let = threading.Event(), threading.Event()

    def waiting(*given: Any) -> Any:
        asked.set()
        assert let.wait(20)
        return read_body(*given)

    task = {"data": {"photo": data_url(picture())}}
    monkeypatch.setattr(server, "read_body", waiting)
    with serving(model) as client, ThreadPoolExecutor(1) as pool:
        for ask in (
            lambda: predict(client, [task]),
            lambda: client.post("/setup", json={"schema": SETUP}),
        ):
            asked.clear(), let.clear()
            answer = pool.submit(ask)
            try:
                assert asked.wait(10)
                assert client.get("/health", timeout=5).status_code == 200
            finally:
                let.set()
            assert answer.result().status_code == 200


def test_large_json_lets_other_threads_run() -> None:
    """C code that reads all of it in one go would let none; the same is read either way."""
    small = {"tasks": [{"data": {"a": "é\n\U0001f600", "b": [1, -2.5, 1e9, None, True, {}]}}]}
    one = json.dumps(small)
    assert read_body(f"{one}{' ' * SLOWLY}".encode(), "application/json") == small
    content = f'{{"tasks": [{"[]," * SLOWLY}0]}}'.encode()
    done, ran = threading.Event(), 0

    def read() -> None:
        read_body(content, "application/json; charset=utf-8")
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    while not done.wait(0.001):
        ran += 1
    thread.join()
    assert ran > 20


def test_pre_annotations(client: Any, model: Talk2DINO) -> None:
    setup = {"project": "1.17", "schema": SETUP, "hostname": "http://evil", "access_token": "x"}
    assert client.post("/setup", json=setup).json() == {"model_version": "tiny"}
    contents = [picture(n, (30, 40 + n)) for n in range(3)]
    tasks = [{"id": n, "data": {"photo": data_url(one)}} for n, one in enumerate(contents)]
    tasks.insert(1, {"id": 9, "data": {"photo": "http://127.0.0.1:1/secret.png"}})
    answer = predict(client, tasks).json()
    assert len(answer["errors"]) == 1 and "task 9: http://127.0.0.1:1" in answer["errors"][0]
    first, empty, *others = answer["results"]
    assert empty == []  # Label Studio keeps a prediction without regions, and asks no more
    for made, content in zip([first, *others], contents, strict=True):
        want = model.segment(content, {"Cat": ["cat"], "Sofa": ["sofa", "couch"]}, True, True, 32)
        theirs = want.to_labelstudio()["predictions"][0]
        names = {"from_name": "tag", "to_name": "img"}
        assert made["result"] == [one | names for one in theirs["result"]]
        assert made["score"] == theirs.get("score", 0.0)
    many = predict(client, [tasks[0]] * 9).json()  # of more than a batch it asks one by one then
    assert many["results"] == [first]
    assert client.get("/versions").json() == {"versions": ["tiny"]}
    assert client.post("/webhook", json={"action": "ANNOTATION_CREATED"}).json()["status"] == "ok"


def test_pre_annotations_in_label_studios_sdk(client: Any, model: Talk2DINO) -> None:
    pytest.importorskip("label_studio_sdk")
    from label_studio_sdk.converter.brush import decode_from_annotation
    from label_studio_sdk.label_interface import LabelInterface
    from label_studio_sdk.label_interface.objects import PredictionValue

    content = picture(4)
    whole_ = SETUP.replace("<BrushLabels ", '<BrushLabels model_background="false" ')
    answer = predict(client, [{"id": 1, "data": {"photo": data_url(content)}}], whole_).json()
    (made,) = answer["results"]
    interface = LabelInterface(whole_)
    assert interface.validate_prediction(made)
    control, (ours,) = interface.get_control("tag"), read_controls(whole_)
    assert (control.to_name, list(control.labels)) == ([ours.to_name], list(ours.words))
    PredictionValue(**made)
    layers = decode_from_annotation("tag", [one | one["value"] for one in made["result"]])
    want = model.segment(content, {"Cat": ["cat"], "Sofa": ["sofa", "couch"]}, None, True, 32)
    assert len(layers) == len(want.labels.unique())
    for key, mask in layers.items():
        label = want.classes.index(key.split("-")[1])
        np.testing.assert_array_equal(mask > 0, (want.labels == label).numpy())


def test_local_files_of_label_studio(model: Talk2DINO, tmp_path: Path) -> None:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "a b.png").write_bytes(picture())
    (tmp_path / "secret.png").write_bytes(picture())
    with serving(model, root=tmp_path / "root") as client:

        def asked(path: str) -> Any:
            return predict(client, [{"data": {"photo": path}}])

        assert len(asked("/data/local-files/?d=deep/a%20b.png").json()["results"]) == 1
        refused = asked("/data/local-files/?d=../secret.png")
        assert refused.status_code == 422 and "below image_root" in refused.json()["detail"]


def test_a_client_of_asyncio(client: Any, model: Talk2DINO) -> None:
    """Eight at a time over one pool of connections, again and again: no answer is another's."""
    contents = [picture(n, (30, 40 + n)) for n in range(8)]
    want = [model.segment(c, ["cat", "dog"], None, False, 32).labels.numpy() for c in contents]

    async def visit() -> None:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=30) as one:
            for _ in range(3):
                answers = await asyncio.gather(*(
                    one.post("/segment", files={"image": ("a.png", content)},
                             data={"classes": "cat, dog", "pamr": "false", "output": "labels"})
                    for content in contents
                ))  # fmt: skip
                for answer, labels in zip(answers, want, strict=True):
                    found = np.asarray(Image.open(BytesIO(answer.content)))
                    np.testing.assert_array_equal(found, labels)

    asyncio.run(visit())


def through_the_gate(app: Any, body: bytes = b"") -> tuple[list[Any], str]:
    """What a POST to `/embed` is sent, and the metrics after it; last what the gate raises."""
    from prometheus_client import generate_latest

    metrics = Metrics()
    sent: list[Any] = []
    gate = Gate(app, Rules(Limits().body, 10, 4), metrics, ["/embed"])
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/embed",
        "headers": [(b"host", b"localhost")],
    }
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.get_running_loop().create_future()
        asked = True
        return {"type": "http.request", "body": b"".join([body, b"."])}

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        try:
            await gate(scope, receive, send)
        except RuntimeError as error:
            sent.append(error)

    asyncio.run(ask())
    return sent, generate_latest(metrics.registry).decode()


def test_the_gate_keeps_no_body() -> None:
    """Whoever reads it holds the only reference: not three copies of every upload."""
    held = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal held
        body = (await receive()).pop("body")
        held = sys.getrefcount(body)
        await send({"type": "http.response.start", "status": 200})

    through_the_gate(app, bytes(1000))
    assert 0 < held <= 2  # this function's, and that of the call


def test_what_nothing_answered_counts_as_500() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("before the answer")

    sent, metrics = through_the_gate(app)
    assert [type(one) for one in sent] == [RuntimeError]
    assert 'talk2dino_requests_total{path="/embed",status="500"} 1.0' in metrics


@pytest.mark.parametrize("given", [5, True, 1.5])
def test_embed_takes_text_lists_and_objects_alone(client: Any, given: Any) -> None:
    answer = client.post("/embed", json={"classes": given})
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"].startswith(f"classes={given!r}: give a valid string or")


def test_lists_in_lists_just_below_the_depth_that_json_has(client: Any) -> None:
    """Read twice, the second time from deeper in the program."""
    for depth in range(940, 1000):
        content = b'{"classes": ' + b"[" * depth + b"]" * depth + b"}"
        answer = client.post("/embed", content=content, headers=JSON)
        assert answer.status_code < 500, (depth, answer.text)


def test_letters_of_any_script_count_once(client: Any) -> None:
    words = [f"{n} {'слово ' * 25}" for n in range(8)]
    assert len(client.post("/embed", json={"classes": words}).json()["rows"]) == 8


def test_negatives_are_as_short_as_classes(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(server, "read_negatives", read.append)
    answer = segment(client, picture(), negatives="a," * 801)
    assert (answer.status_code, read) == (413, [])
    assert answer.json()["detail"] == "negatives: 1602 letters; give at most 1600"


def test_labeling_setups_are_measured_before_they_are_read(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested controls hold each the labels of all within: work that grows with their square."""
    read: list[Any] = []
    monkeypatch.setattr(ml_backend, "refuse_typo", lambda *given: read.append(given))
    begin = '<View><Image name="i" value="$i"/>'
    one, label, end = '<BrushLabels toName="i">', '<Label value="{}"/>', "</BrushLabels>"
    labels = "".join(label.format(n) for n in range(9))
    for setup in (one + labels + end, one * 9 + label + end * 9):
        answer = client.post("/setup", json={"schema": f"{begin}{setup}</View>"})
        assert answer.status_code == 413 and read == []
        assert answer.json()["detail"] == "label_config: more than 8 labels; leave some out"
    refused = predict(client, [{"data": {}}], SETUP + " " * (1 << 20))
    assert refused.status_code == 413 and "characters; give at most 1048576" in refused.text
    with pytest.raises(TooLargeError, match="more than 256 labels"):
        read_controls(f"{begin}{one * 257}{label}{end * 257}</View>")


def test_a_webhook_is_not_read(client: Any) -> None:
    """Annotations are as large as pictures, and nothing is done with them."""
    answer = client.post("/webhook", content=b"[" * 1000, headers=JSON)
    assert answer.json() == {"status": "ok", "result": None}


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
    ],
)
def test_memory_that_pytorch_did_not_get(
    model: Talk2DINO, client: Any, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(model, "_encode", broken)
    answer = segment(client, picture())
    assert answer.status_code == 503 and "not enough memory" in answer.json()["detail"]
    assert metric(client, "talk2dino_open_requests") == 0


def test_every_warning_is_written_once_for_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    class Counting:
        @staticmethod
        def dumps(given: Any) -> str:
            made = json.dumps(given)
            written.append(len(made))
            return made

    said = [f"classes: {n} {'слово ' * 30}" for n in range(250)]
    monkeypatch.setattr(server, "json", Counting)
    assert len(in_header(said)) <= server.HEADER
    assert sum(written) <= len(json.dumps(said)) + server.HEADER
    exact = ["x" * 994, "y" * (server.HEADER - 1002)]
    assert json.loads(in_header(exact)) == exact
    assert json.loads(in_header([*exact, "z"])) == [exact[0], "and 2 more"]


def test_the_page_works_below_a_path_of_a_proxy(client: Any) -> None:
    """Its links, and the address of its requests, begin where it stands."""
    page = client.get("/docs").text
    links = re.findall(r"""(?:href|src|url)[=:]\s*["']([^"']+)""", page)
    assert len(links) == 4
    for link in links:
        assert not link.startswith("/") and client.get(f"/{link}").status_code == 200
    assert client.get("/openapi.json").json()["servers"] == [{"url": "."}]
