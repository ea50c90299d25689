"""A local HTTP server that speaks the addresses of the Hub which its own client asks for."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

COMMIT = "0123456789" * 4


@dataclass(frozen=True)
class Sent:
    """An answer with a body: of which file, how many bytes, under which revision and login."""

    name: str
    bytes: int
    revision: str
    login: str | None


class Hub(ThreadingHTTPServer):
    """Keeps the files of commits, serves them to any repository, and notes what it sent."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]
    sent: list[Sent]
    ranges: bool  # whether a part of a file may be asked for

    def serve(self, folder: Path) -> None:
        """Serve the files of a folder."""
        self.files.update({path.name: path.read_bytes() for path in folder.iterdir()})

    def volume(self, name: str) -> int:
        """Bytes that were sent of a file."""
        return sum(one.bytes for one in self.sent if one.name == name)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            if "refused" in json.loads(body)["name"]:
                return self._json({"error": "no rights to this name"}, 403)
            return self._json(
                {"url": f"{constants.ENDPOINT}/me/psi", "name": "me/psi", "id": "me/psi"}
            )
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            for file in files:
                file["shouldIgnore"] = False
            return self._json({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{constants.ENDPOINT}/me/psi/commit/{COMMIT}"
            return self._json({"success": True, "commitUrl": url, "commitOid": COMMIT})
        return self._json({"warnings": [], "errors": []})  # validation of the card

    def do_HEAD(self) -> None:
        self._file(False)

    def do_GET(self) -> None:
        if "/revision/" in self.path and self.path.startswith("/api/"):  # clients before 1.0
            return self._json({"id": "me/psi", "xetEnabled": False})
        return self._file(True)

    def _file(self, with_body: bool) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        content = self.server.files.get(name)
        if "/resolve/" not in self.path or content is None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, digest = len(content), sha256(content).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            first, last = (int(number) for number in asked.groups())
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            revision = self.path.partition("/resolve/")[2].partition("/")[0]
            login = self.headers.get("Authorization")
            self.server.sent.append(Sent(name, len(content), revision, login))
            self.wfile.write(content)

    def _json(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, to which the client is directed, with an empty cache."""
    server = Hub(("127.0.0.1", 0), Answers)
    server.files, server.created, server.sent, server.ranges = {}, [], [], True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    here = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    template = f"{here}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # clients before 1.0 read it in the second
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()
