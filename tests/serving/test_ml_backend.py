"""Label Studio's side without a server: labeling setups, and pictures from allowed places only."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from talk2dino.errors import ConfigError, DataError
from tests.helpers.pipeline import need

need("httpx", "defusedxml")

from talk2dino.serving.ml_backend import TaskPictures, read_controls  # noqa: E402

SECRET, PICTURE, KEY = b"secret", b"a picture", "key of 1234"
BRUSH = (
    '<View><Image name="i" value="$im"/><BrushLabels name="b" toName="i"{}>{}</BrushLabels></View>'
)


def read(pictures: TaskPictures, source: Any) -> bytes:
    return asyncio.run(pictures.read(source))


class Handler(BaseHTTPRequestHandler):
    """`/redirect/URL` leads to URL; `/large` never ends; others say with which key they came."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        if self.path.startswith("/redirect/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/redirect/"))
            self.end_headers()
        elif self.path == "/none":
            self.send_error(404)
        elif self.path == "/personal" and self.headers.get("Authorization") != "Bearer short":
            self.send_error(401)
        else:
            self.send_response(200)
            self.end_headers()
            try:
                while self.path == "/large":
                    self.wfile.write(bytes(1000))
                self.wfile.write(SECRET if self.path == "/secret" else PICTURE)
            except OSError:
                pass

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, given["refresh"]))  # type: ignore[attr-defined]
        self.send_response(200 if given["refresh"] == KEY else 401)
        self.end_headers()
        self.wfile.write(b'{"access": "short"}')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[Any]]:
    """Two servers; of each the address and what it was asked."""
    made = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for one in made:
        one.asked = []  # type: ignore[attr-defined]
        one.place = f"127.0.0.1:{one.server_port}"  # type: ignore[attr-defined]
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    for one in made:
        one.shutdown()
        one.server_close()


def test_allowed_hosts_alone_are_asked(servers: list[Any]) -> None:
    good, evil = servers
    pictures = TaskPictures([good.place], most=5000)
    assert read(pictures, f"http://{good.place}/a.png") == PICTURE
    assert read(pictures, f"HTTP://{good.place}/redirect/http://{good.place}/a.png") == PICTURE
    port = evil.server_port
    hop = f"http://{good.place}/redirect"
    for source in (
        *(f"http://{evil.place}/secret", f"http://localhost:{port}/secret", "//x/y", "ftp://x/y"),
        *(f"http://127.1:{port}/secret", f"http://2130706433:{port}/s", f"http://0x7f.1:{port}/s"),
        *(f"http://[::ffff:127.0.0.1]:{port}/s", f"http://{good.place}@{evil.place}/secret"),
        *(f"http://{evil.place}#@{good.place}/", f"http://{evil.place}\\@{good.place}/"),
        *(f"http://user:pw@{good.place}/a", f"{hop}/http://{evil.place}/s"),
        *(f"{hop}///{evil.place}/s", f"{hop}/file:///etc/passwd", "", "\n", "http://"),
        *("file:///etc/passwd", "/etc/passwd", "s3://bucket/key", "gopher://x"),
        *(f"http://{good.place}/\r\nX: y", "http://[", "http://x:99999999/", "a.png", "\ud800"),
        *(f"http://{good.place}.evil.example/", f"http://{good.place}:80/", "https://127.0.0.1/"),
    ):
        with pytest.raises(DataError):
            assert read(pictures, source) is None
    assert evil.asked == []
    for path in ("none", "large", "redirect/" * 5 + f"http://{good.place}/a.png"):
        with pytest.raises(DataError):
            read(pictures, f"http://{good.place}/{path}")
    for source in (5, None, [], {"a": 1}, b"http://x"):
        with pytest.raises(DataError, match="must be an address"):
            read(pictures, source)


def test_label_studios_key_goes_to_it_alone(servers: list[Any]) -> None:
    home, other = servers
    pictures = TaskPictures([other.place], None, f"http://{home.place}", KEY)
    assert read(pictures, "/data/upload/1/a.png") == PICTURE
    assert read(pictures, f"http://{other.place}/a.png") == PICTURE
    assert read(pictures, f"http://{home.place}/redirect/http://{other.place}/b.png") == PICTURE
    assert home.asked[0] == ("/data/upload/1/a.png", f"Token {KEY}")
    assert [key for _, key in home.asked] == [f"Token {KEY}"] * 2
    assert [key for _, key in other.asked] == [None] * 2
    with pytest.raises(DataError):
        read(TaskPictures(), "/data/upload/1/a.png")


def test_a_personal_access_token_is_exchanged(servers: list[Any]) -> None:
    """As Label Studio's SDK does it; anew when what it gave has expired."""
    home, other = servers
    pictures = TaskPictures([other.place], None, f"http://{home.place}/", KEY)
    assert read(pictures, "/personal") == read(pictures, "/personal") == PICTURE
    renewed = ("/api/token/refresh/", KEY)
    assert home.asked == [
        ("/personal", f"Token {KEY}"),
        renewed,
        *[("/personal", "Bearer short")] * 2,
    ]
    pictures._access = "expired"
    assert read(pictures, "/personal") == PICTURE
    assert home.asked[4:] == [
        ("/personal", "Bearer expired"),
        renewed,
        ("/personal", "Bearer short"),
    ]
    with pytest.raises(DataError, match=r"401$"):
        read(pictures, f"http://{other.place}/personal")
    assert other.asked == [("/personal", None)]
    with pytest.raises(DataError, match=r"status 401 \(LABEL_STUDIO_API_KEY\)"):
        read(TaskPictures([], None, f"http://{home.place}", "wrong"), "/personal")


def test_files_below_the_root_alone_are_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a.png").write_bytes(PICTURE)
    (root / "large.png").write_bytes(bytes(6000))
    (tmp_path / "root2").mkdir()
    for name in ("secret.png", "root2/secret.png"):
        (tmp_path / name).write_bytes(SECRET)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "good.png").symlink_to(root / "in" / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    pictures = TaskPictures(root=str(root), most=5000)
    for name in ("in/a.png", "in/../in/a.png", "in%2Fa.png", "good.png", f"{root}/in/a.png"):
        assert read(pictures, f"/data/local-files/?d={name}") == PICTURE
    for name in (
        *("../secret.png", "..%2fsecret.png", "in/../../secret.png", f"{tmp_path}/secret.png"),
        *("link.png", "folder/secret.png", "../root2/secret.png", "loop.png", "pipe.png", ""),
        *("/etc/passwd", "none.png", "in", ".", "a%00b", "%2e%2e/secret.png", "x" * 5000),
        *("large.png", "~/x", "/dev/zero", "/proc/self/environ"),
    ):
        with pytest.raises(DataError):
            assert read(pictures, f"/data/local-files/?d={name}") is None
    with pytest.raises(DataError):
        read(TaskPictures(), "/data/local-files/?d=in/a.png")
    with pytest.raises(ConfigError, match="no such folder"):
        TaskPictures(root=str(tmp_path / "none"))


def test_data_addresses() -> None:
    pictures = TaskPictures(most=50)
    coded = base64.b64encode(PICTURE).decode()
    for source in (f"data:image/png;base64,{coded}", f"DATA:;BASE64,{coded}", "data:,a%20picture"):
        assert read(pictures, source) == PICTURE
    for source in ("data:image/png;base64", "data:;base64,%%%", f"data:;base64,{coded[:-1]}!",
                   f"data:,{'x' * 51}", "data:;base64,\ud800"):  # fmt: skip
        with pytest.raises(DataError):
            read(pictures, source)


@pytest.mark.parametrize(
    "host", ["http://x", "a/b", "", "u@x", "x:y", "x#y", "a b", "[", "*", "[]"]
)
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(ConfigError, match="image_hosts"):
        TaskPictures([host])
    if host != "http://x":
        with pytest.raises(ConfigError, match="label_studio_url"):
            TaskPictures(label_studio_url=host)


def test_labeling_setups() -> None:
    labels = (
        '<Label value="Car" predicted_values=" car, truck,"/><Label value="Grüne Fläche &amp; so"/>'
    )
    more = ' model_background="0.4" model_instances="True" model_minimum_area="50"'
    (control,) = read_controls(BRUSH.format(more, labels))
    assert (control.name, control.to_name, control.key) == ("b", "i", "im")
    assert control.words == {
        "Car": ("car", "truck"),
        "Grüne Fläche & so": ("Grüne Fläche & so",),
    }
    (other,) = read_controls(BRUSH.format("", '<Label value="A" predicted_values="b; c"/>'))
    assert other.words == {"A": ("b", "c")}
    assert control.background == 0.4
    assert control.options.instances and control.options.minimum_area == 50
    (plain,) = read_controls(BRUSH.format("", labels))
    assert plain.background is True and not plain.options.instances
    (named,) = read_controls(BRUSH.format("", labels + '<Label value="background"/>'))
    assert named.background is False  # a label of its own
    two = BRUSH.format("", labels).replace("</View>", "<Image name='x' value='$y'/>"
          "<BrushLabels name='c' toName='x'><Label value='a'/></BrushLabels></View>")  # fmt: skip
    assert [(one.name, one.key) for one in read_controls(two)] == [("b", "im"), ("c", "y")]


@pytest.mark.parametrize(
    "setup",
    [
        *("", None, 5, [], "<View>", "<View/>", "no XML", "\x00", "<a>" * 5000, "\ud800"),
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><View/>',
        '<!DOCTYPE a [<!ENTITY b "c">]><View>&b;</View>',
        BRUSH.format("", ""),
        BRUSH.format("", "<Label/>"),
        BRUSH.format(' model_background="nan"', '<Label value="a"/>'),
        BRUSH.format(' model_background="half"', '<Label value="a"/>'),
        BRUSH.format(' model_minimum_area="-1"', '<Label value="a"/>'),
        BRUSH.format(' model_instances="perhaps"', '<Label value="a"/>'),
        BRUSH.format("", '<Label value="a"/>').replace("$im", "im"),
        BRUSH.format("", '<Label value="a"/>').replace('toName="i"', 'toName="j"'),
    ],
)
def test_setups_that_are_refused(setup: object) -> None:
    with pytest.raises((DataError, ConfigError), match="label_config"):
        read_controls(setup)
