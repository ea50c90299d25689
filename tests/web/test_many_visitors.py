"""The web page under load and attack: visitors at once, broken uploads, files of others.

More of all: python -c "from tests.web.test_many_visitors import main; main(requests=50, large=10)"
"""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from talk2dino.web.session import Views, annotation_files
from tests.helpers.encoders import hash_model
from tests.helpers.pipeline import need

WORDS = "cat, grass"
PRIVATE = "Drop a picture first"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need("gradio", "httpx")
    yield from serving(tmp_path_factory.mktemp("uploads"))


def serving(folder: Path) -> Iterator[str]:
    """The page of a model without weights; uploads go below `folder`."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    from talk2dino.web.page import Page, show_page

    blocks = Page(hash_model(), "outputs/run", WORDS, 32).build()
    try:
        yield show_page(blocks, "127.0.0.1", None, max_upload_mb=2)
    finally:
        blocks.close()
        del os.environ["GRADIO_TEMP_DIR"]


class Visitor:
    """One open page, as its browser speaks to the server."""

    def __init__(self, address: str, number: int) -> None:
        import httpx

        self.name = f"visitor{number}"
        self.http = httpx.Client(base_url=address, timeout=300)
        config = self.http.get("config").json()
        self.api = config["api_prefix"].strip("/")
        self.events = {
            (event, target): dependency
            for dependency in reversed(config["dependencies"])
            for target, event in dependency["targets"]
        }
        self.parts = {
            component["props"].get("elem_id"): component["id"] for component in config["components"]
        }

    def upload(self, picture: bytes, name: str = "a.png") -> dict[str, Any]:
        """What the server says of a file that it took."""
        answer = self.http.post(f"{self.api}/upload", files={"files": (name, picture)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def call(self, part: str, event: str, *data: Any) -> dict[str, Any]:
        """The outcome of an event: `{"success": …, "output": …}`."""
        number = self.events[event, self.parts[part]]["id"]
        asked = {"data": data, "fn_index": number, "session_hash": self.name}
        answer = self.http.post(f"{self.api}/queue/join", json=asked)
        if answer.status_code != 200:
            return {"success": False, "output": answer.json()}
        with self.http.stream(
            "GET", f"{self.api}/queue/data", params={"session_hash": self.name}
        ) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    told = json.loads(line[5:])
                    if told["msg"] == "process_completed":
                        return dict(told)
        raise AssertionError("the stream ended without an answer")

    def open(self, file: dict[str, Any] | bytes) -> dict[str, Any]:
        given = self.upload(file) if isinstance(file, bytes) else file
        return self.call("picture", "upload", given)

    def segment(self) -> dict[str, Any]:
        return self.call("go", "click", WORDS, False, 0.5, False, [])

    def leave(self) -> None:
        """Close the page: its browser held a stream open, and no longer does."""
        with self.http.stream("GET", f"{self.api}/heartbeat/{self.name}") as lines:
            next(lines.iter_lines())

    def get(self, path: str) -> tuple[int, bytes]:
        answer = self.http.get(path)
        return answer.status_code, answer.content


def picture(width: int, height: int, shade: int = 90) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (shade, 90, 90)).save(file, "PNG")
    return file.getvalue()


def visit(address: str, number: int) -> str:
    """Drop a picture of one's own size and look; what is wrong with the overlay."""
    visitor = Visitor(address, number)
    width = 40 + number
    opened = visitor.open(picture(width, 30, number))
    if not opened["success"]:
        return f"not opened: {opened}"
    done = visitor.segment()
    if not done["success"]:
        return f"not segmented: {done}"
    status, content = visitor.get(done["output"]["data"][0]["url"])
    shown = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    if status != 200 or shown.shape[0] < 30 or shown.shape[1] < width:
        return f"status {status}, {shown.shape}"
    table = done["output"]["data"][2]
    return "" if "cat" in table and "grass" in table else f"no shares: {table}"


def visits(address: str, count: int, first: int = 0) -> list[str]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda n: visit(address, n), range(first, first + count)))


def broken_off(address: str) -> None:
    """An upload that ends before it is complete."""
    host, port = address.removeprefix("http://").strip("/").split(":")
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        'Content-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + bytes(300_000))


def read_what_is_not_ours(address: str, secret: Path) -> list[str]:
    """Ways to files outside the folder of uploads, that gave them."""
    thief = Visitor(address, 900)
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    found = []
    ways = [str(secret), f"{uploads}/../{secret.name}", f"{uploads}/%2e%2e/{secret.name}"]
    ways += [f"..{secret}", f"//{secret}", str(uploads), ".", "pyproject.toml", "/etc/passwd"]
    for way in ways:
        for route in (f"{thief.api}/file=", f"{thief.api}/file/", "file=", "static/", "assets/"):
            status, content = thief.get(route + way)
            if status == 200 and not content.lstrip().startswith(b"<!"):
                found.append(f"{route}{way}: {content[:80]!r}")
    for path in (str(secret), f"{uploads}/../{secret.name}", "file:///etc/passwd"):
        for key in ("path", "url"):
            given = {"path": path, key: path, "meta": {"_type": "gradio.FileData"}}
            if thief.open(given)["success"]:
                found.append(f"picture {key}={path}")
            thief.open(picture(40, 30))
            painted = {"background": None, "layers": [given], "composite": None}
            told = thief.call("add", "click", painted, "mine", [])
            if told["success"] or "paint" in str(told["output"]):  # it was opened
                found.append(f"painted {key}={path}")
    return found


def memory() -> int:
    """Bytes of this process, the server's, now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_the_picture_of_a_visitor_who_left_is_dropped(address: str) -> None:
    stays, leaves = Visitor(address, 30), Visitor(address, 31)
    for visitor in (stays, leaves):
        assert visitor.open(picture(40, 30))["success"]
    leaves.leave()
    until = time.monotonic() + 20
    while leaves.segment()["success"] and time.monotonic() < until:
        time.sleep(0.1)
    assert not leaves.segment()["success"]
    assert stays.segment()["success"]


def test_visitors_at_once_see_their_own_pictures(address: str) -> None:
    assert visits(address, 6) == [""] * 6


def test_nothing_but_ones_own_is_given(address: str, tmp_path: Path) -> None:
    secret = Path(os.environ["GRADIO_TEMP_DIR"]).parent / "secret.png"
    secret.write_bytes(picture(30, 30))
    assert read_what_is_not_ours(address, secret) == []
    owner, other = Visitor(address, 901), Visitor(address, 902)
    assert owner.open(picture(50, 30))["success"]
    assert owner.segment()["success"]
    told = other.segment()
    assert not told["success"] and PRIVATE in told["output"]["error"]


def test_annotations_do_not_pile_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was handed out can be fetched when the page's own files have gone."""
    from talk2dino.web import page

    folders: list[Path] = []

    def noted(view: Any, folder: Path, instances: bool) -> list[Path]:
        folders.append(folder)
        return annotation_files(view, folder, instances)

    monkeypatch.setattr(page, "annotation_files", noted)
    owner = Visitor(address, 904)
    assert owner.open(picture(50, 30))["success"]
    assert owner.segment()["success"]
    told = [owner.call("annotate", "click", False) for _ in range(page.KEPT + 3)]
    assert sorted(folders[0].parent.iterdir()) == sorted(folders[-page.KEPT :])
    links = [file["url"] for file in told[0]["output"]["data"][0]["value"]]
    assert len(links) == 5 and {owner.get(link)[0] for link in links} == {200}


def test_it_answers_after_uploads_that_break_off(address: str) -> None:
    for _ in range(3):
        broken_off(address)
    large = Visitor(address, 903)
    told = large.open(picture(10_000, 6_000))
    assert not told["success"] and "give at most 50 million" in told["output"]["error"]
    assert visit(address, 5) == ""
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    parts = [path for path in uploads.glob("tmp*") if path.is_file()]
    assert parts  # younger than an hour
    for part in parts[1:]:
        os.utime(part, (0, 0))
    assert visit(address, 6) == ""
    assert [path for path in uploads.glob("tmp*") if path.is_file()] == parts[:1]


class FakeView:
    """As large as it says."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_views_are_dropped_by_age_and_by_size() -> None:
    now = [0.0]
    views = Views(most=100, seconds=10, clock=lambda: now[0])
    small: Any = [FakeView(40) for _ in range(3)]
    views.keep("a", small[0])
    views.keep("b", small[1])
    assert views.of("a") is small[0]  # now b is the longest unused
    views.keep("c", small[2])
    assert [views.of(name) for name in "abc"] == [small[0], None, small[2]]
    huge: Any = FakeView(1000)
    views.keep("d", huge)
    assert [views.of(name) for name in "acd"] == [None, None, huge]
    now[0] = 10.0
    assert views.of("d") is None
    views.keep("a", small[0])
    views.forget("a")
    assert views.of("a") is None


def main(requests: int, large: int) -> None:
    """Print what the page did with so many visitors at once, large pictures and broken uploads."""
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret.png"
        secret.write_bytes(picture(30, 30))
        (Path(folder) / "uploads").mkdir()
        for address in serving(Path(folder) / "uploads"):
            print(f"before: {[visit(address, 0)]}, {memory() / 1e6:.0f} MB", flush=True)
            for round_ in range(2):
                started = time.perf_counter()
                wrong = [line for line in visits(address, requests, 10 * round_) if line]
                seconds = time.perf_counter() - started
                print(f"{requests} visits at once in {seconds:.1f} s, wrong: {wrong}", flush=True)
                print(f"  {memory() / 1e6:.0f} MB", flush=True)
            for megapixels, width in ((48, 8000), (60, 10_000)):
                with ThreadPoolExecutor(large) as pool:
                    content = picture(width, 6000)
                    told = list(
                        pool.map(
                            lambda n, a=address, c=content: Visitor(a, 500 + n).open(c),
                            range(large),
                        )
                    )
                opened = sum(one["success"] for one in told)
                held = memory() / 1e6
                print(f"{large} pictures of {megapixels} MP: {opened} opened, {held:.0f} MB")
            threads = [
                threading.Thread(target=broken_off, args=(address,)) for _ in range(requests)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(f"{requests} uploads broken off; then {[visit(address, 1)]}", flush=True)
            left = sum(p.stat().st_size for p in Path(folder).rglob("tmp*") if p.is_file())
            print(f"left of them: {left} bytes")
            print(f"read what is not ours: {read_what_is_not_ours(address, secret)}")
            print(f"after: {memory() / 1e6:.0f} MB", flush=True)
            for number in [*range(requests + 11), *range(500, 500 + large)]:
                Visitor(address, number).leave()
            time.sleep(20)  # the server asks every 15 seconds whether a page is open
            print(f"all left: {memory() / 1e6:.0f} MB", flush=True)
