"""`python -m talk2dino.serve` as a process: started, refused, and told to end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from talk2dino.alignment.checkpoint import save_projection
from talk2dino.alignment.projection import ProjectionLayer
from talk2dino.encoders import OpenClipTextEncoder, TimmVisionEncoder
from talk2dino.errors import ConfigError
from tests.helpers.pipeline import fails, need


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = TimmVisionEncoder("test_vit", weights="random", image_size=32)
    text = OpenClipTextEncoder("ViT-S-32-alt", weights="random", templates="plain")
    specs = {"vision": vision.spec, "text": text.describe()["spec"]}
    file = tmp_path_factory.mktemp("serve") / "psi.safetensors"
    save_projection(ProjectionLayer(text.embed_dim, vision.embed_dim), file, specs)
    return file


def upload() -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 30), (200, 90, 10)).save(file, "PNG")
    parts = [b'name="classes"\r\n\r\ncat, sofa; couch', b'name="pamr"\r\n\r\nfalse']
    parts += [b'name="image"; filename="a.png"\r\n\r\n' + file.getvalue()]
    body = b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    return body + b"--x--\r\n"


@pytest.mark.slow
def test_it_serves_until_sigterm_and_finishes_what_is_running(checkpoint: Path) -> None:
    need("fastapi_offline", "uvicorn", "prometheus_client", "defusedxml")
    command = [sys.executable, "-m", "talk2dino.serve", f"checkpoint={checkpoint}", "port=0"]
    command += ["short_side=32", "accelerator=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = b""
            while not said.startswith(b"http://"):  # before it, what uvicorn logs
                said = process.stdout.readline()
                assert said, process.stderr.read().decode()[-2000:]
            found = re.match(rb"http://127\.0\.0\.1:(\d+)", said)
            assert found
            port = int(found[1])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                body = upload()
                head = (
                    f"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                )
                head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
                connection.sendall(head.encode() + body[:100])
                with socket.create_connection(("127.0.0.1", port)) as idle:
                    idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert b"200 OK" in idle.recv(1000)
                    process.send_signal(signal.SIGTERM)
                    while idle.recv(1000):  # the rest of the answer, until it is closed
                        pass
                connection.sendall(body[100:])
                answer = b""
                while part := connection.recv(65536):
                    answer += part
            head_, _, content = answer.partition(b"\r\n\r\n")
            assert head_.startswith(b"HTTP/1.1 200 ")
            names = [one["name"] for one in json.loads(content)["categories"]]
            assert names == ["cat", "sofa"]
            assert process.wait(20) == 0
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["host=0.0.0.0", "port=0"], r"host=0\.0\.0\.0: .*needs a token: set TALK2DINO_TOKEN"),
        (["host=::", "port=0"], "needs a token"),
        (["host=0.0.0.0", "port=0", "token=short"], "token: give 16 or more"),
        (["token='with spaces is not good'"], "token: give 16 or more"),
        (["token="], "token: is empty; give a token"),
        (["host=no.such.host.invalid"], r"host=no\.such\.host\.invalid port=8000: cannot be"),
        (["port=70000"], "port=70000: use 0 to 65535"),
        (["queue=0"], "queue=0: use 1 to"),
        (["timeout=nan"], "timeout=nan: use 0.001 to"),
        (["short_side=2000", "port=0"], "short_side=2000: give at most 896"),
        (["image_root=none"], "image_root=none: no such folder"),
        (["image_hosts=[http://x]"], "image_hosts: 'http://x' is no host"),
        (["label_studio_url=x"], "label_studio_url=x: give http://"),
    ],
)
def test_what_it_does_not_start_with(
    given: list[str], said: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need("fastapi_offline", "uvicorn", "prometheus_client", "defusedxml")
    assert re.search(said, fails(capfd, "serve", f"checkpoint={checkpoint}", *given))


def test_a_taken_port(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("fastapi_offline", "uvicorn", "prometheus_client", "defusedxml")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = fails(capfd, "serve", f"checkpoint={checkpoint}", f"port={port}")
    assert f"port={port}: cannot be opened" in told


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from talk2dino.serve import read_token
    from tests.helpers.configs import compose

    config = compose("serve")
    assert "TALK2DINO_TOKEN" not in os.environ and read_token(config, "127.0.0.1") is None
    assert read_token(config, "::1") is None
    monkeypatch.setenv("TALK2DINO_TOKEN", "of-the-environment")
    assert read_token(config, "0.0.0.0") == "of-the-environment"
    config.token = "of-the-command-line"
    assert read_token(config, "127.0.0.1") == "of-the-command-line"
    config.token = None
    for given, said in (("", "TALK2DINO_TOKEN: is empty"), ("a" * 16 + "\n", "line breaks")):
        monkeypatch.setenv("TALK2DINO_TOKEN", given)  # $(cat missing), or a file as it is
        with pytest.raises(ConfigError, match=said):
            read_token(config, "127.0.0.1")


def test_the_key_of_label_studio_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from talk2dino.serve import read_key
    from tests.helpers.configs import compose

    config = compose("serve")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "")
    assert read_key(config) is None  # nothing would be asked with it
    config.label_studio_url = "http://localhost:8080"
    for given in ("", "key\n", "k y", "ключ"):
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", given)
        with pytest.raises(ConfigError, match="LABEL_STUDIO_API_KEY: is empty, or has a space"):
            read_key(config)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "a.key")
    assert read_key(config) == "a.key"


def test_without_its_libraries_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "uvicorn")
    import importlib.util

    find = importlib.util.find_spec
    absent = ("uvicorn", "prometheus_client")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find(n))
    told = fails(capfd, "serve", "checkpoint=x")
    assert told == "serving needs uvicorn, prometheus_client: pip install 'talk2dino[serve]'"
